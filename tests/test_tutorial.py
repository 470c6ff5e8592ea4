"""The tutorial as it is committed; .ci/run executes it."""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

import make_tutorial_checkpoints
import maskrl
import train_distill
import train_rl

MODULES = {"maskrl": maskrl, "train_distill": train_distill, "train_rl": train_rl}
ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "tutorial.ipynb"


def cells(kind):
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_it_is_a_valid_notebook():
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(NOTEBOOK, 4))


def test_it_and_its_checkpoints_are_small():
    assert NOTEBOOK.stat().st_size <= 1_500_000
    for kind in maskrl.KINDS:
        path = ROOT / "assets" / "tutorial" / f"{kind}.pt"
        assert path.stat().st_size <= 1_500_000 and maskrl.load_checkpoint(path, kind).kind == kind


def test_it_was_executed_once_from_top_to_bottom_without_errors():
    assert [cell["execution_count"] for cell in cells("code")] == list(range(1, len(cells("code")) + 1))
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 10  # a picture in every section


def test_it_uses_only_what_there_is():
    for cell in cells("code"):
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in MODULES:
                assert hasattr(MODULES[node.value.id], node.attr), f"{node.value.id}.{node.attr}"


def test_the_source_that_it_shows_is_the_present_one():
    shown = [text for cell in cells("code") for output in cell["outputs"]
             if (text := "".join(output.get("data", {}).get("text/markdown", ""))).startswith("From `")]
    assert len(shown) > 15
    for text in shown:
        thing, code = re.fullmatch(r"From `([\w.]+)`:\n```python\n(.*)\n```", text, re.S).groups()
        module = inspect.getsource(MODULES[thing.split(".")[0]])
        flat = lambda source: "\n".join(line.strip() for line in source.splitlines())
        assert flat(code) in flat(module), thing


def test_every_exercise_has_a_check_and_a_folded_answer():
    text = "".join("".join(cell["source"]) for cell in cells("markdown"))
    numbers = [n for n in range(1, 20) if f"**Exercise {n}.**" in text]
    assert numbers == list(range(1, len(numbers) + 1)) and 5 <= len(numbers) <= 8
    assert text.count("<details>") == text.count("</details>") == len(numbers)
    assert sum("\ncheck(" in "".join(cell["source"]) for cell in cells("code")) == len(numbers)


def test_a_small_copy_of_a_checkpoint_generates_nearly_the_same(tmp_path, model):
    maskrl.save_checkpoint(tmp_path / "student.pt", "student", model)
    small = tmp_path / "small" / "student.pt"
    small.parent.mkdir()
    size = make_tutorial_checkpoints.shrink(tmp_path / "student.pt", small)
    assert size == small.stat().st_size < 0.5 * (tmp_path / "student.pt").stat().st_size
    a, b = (maskrl.generate(m, torch.arange(3), steps=4, denoise_steps=1) for m in (model, maskrl.load_checkpoint(small, "student")))
    torch.testing.assert_close(a, b, atol=0.02 * float(a.std()), rtol=0)
