"""The tutorial as it is committed; .ci/run executes it."""

import ast
import inspect
import json
import re
from pathlib import Path

import make_tutorial_checkpoints
import pytest
import torch

import maskrl

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "tutorial.ipynb"


def cells(kind):
    content = json.loads(NOTEBOOK.read_text())
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def shown_sources():
    """What `source` shows in the notebook: the text of its Markdown outputs."""
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    texts = ["".join(output.get("data", {}).get("text/markdown", "")) for output in outputs]
    return [text for text in texts if text.startswith("From `")]


def flat(code):
    return "\n".join(line.strip() for line in code.splitlines())


def test_it_is_a_valid_notebook():
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(NOTEBOOK, 4))


def test_it_and_its_checkpoints_are_small():
    assert NOTEBOOK.stat().st_size <= 1_500_000
    for kind in maskrl.KINDS:
        path = ROOT / "assets" / "tutorial" / f"{kind}.pt"
        assert path.stat().st_size <= 1_600_000
        assert maskrl.load_checkpoint(path, kind).kind == kind


def test_it_was_executed_once_from_top_to_bottom_without_errors():
    counts = [cell["execution_count"] for cell in cells("code")]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures >= 10  # one in every section


def test_it_uses_only_what_there_is():
    for cell in cells("code"):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "maskrl":
                    assert hasattr(maskrl, node.attr), f"maskrl.{node.attr}"


def test_the_source_that_it_shows_is_the_present_one():
    shown = shown_sources()
    assert len(shown) > 15
    module = flat(inspect.getsource(maskrl))
    for text in shown:
        match = re.fullmatch(r"From `maskrl\.([\w.]+)`:\n```python\n(.*)\n```", text, re.S)
        thing, code = match.groups()
        assert flat(code) in module, thing


def test_every_exercise_has_a_check_and_a_folded_answer():
    text = "".join(source(cell) for cell in cells("markdown"))
    numbers = [n for n in range(1, 20) if f"**Exercise {n}.**" in text]
    assert numbers == list(range(1, len(numbers) + 1))
    assert 5 <= len(numbers) <= 8
    assert text.count("<details>") == text.count("</details>") == len(numbers)
    assert sum("\ncheck(" in source(cell) for cell in cells("code")) == len(numbers)


def test_a_small_copy_of_a_checkpoint_generates_nearly_the_same(tmp_path, model):
    model.kind = "student"
    full, small = tmp_path / "student.pt", tmp_path / "small" / "student.pt"
    maskrl.save_checkpoint(full, model)
    small.parent.mkdir()
    size = make_tutorial_checkpoints.shrink(full, small)
    assert size == small.stat().st_size < 0.6 * full.stat().st_size
    copy = maskrl.load_checkpoint(small, "student")
    labels, sampling = torch.arange(3), maskrl.Sampling(steps=4)
    a, b = (maskrl.generate(m, labels, sampling) for m in (model, copy))
    torch.testing.assert_close(a, b, atol=0.02 * float(a.std()), rtol=0)
