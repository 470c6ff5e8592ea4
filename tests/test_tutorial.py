"""The tutorial as it is committed; .ci/run executes it."""

import ast
import builtins
import importlib
import json
import math
import re
import symtable
from pathlib import Path

import pytest
import torch

import maskrl
from workbench import lesson_pictures, lessons
from workbench.files import load_checkpoint, write_checkpoint
from workbench.studies.make_checkpoints import shrink

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "tutorial.ipynb"
PACKAGES = ("maskrl", "workbench")


def cells(kind):
    content = json.loads(NOTEBOOK.read_text())
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def markdown_outputs():
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    return ["".join(output.get("data", {}).get("text/markdown", "")) for output in outputs]


def shown_sources():
    """What `source` shows in the notebook."""
    return [text for text in markdown_outputs() if text.startswith("From `")]


def test_it_is_a_valid_notebook():
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(NOTEBOOK, 4))


def test_it_and_its_checkpoints_are_small():
    assert NOTEBOOK.stat().st_size <= 3_000_000
    for kind in ("teacher", "student", "policy"):
        path = ROOT / "assets" / "tutorial" / f"{kind}.pt"
        assert path.stat().st_size <= 1_600_000
        assert load_checkpoint(path, kind).kind == kind


def test_it_was_executed_once_from_top_to_bottom_without_errors():
    counts = [cell["execution_count"] for cell in cells("code")]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures >= 25


def test_it_uses_only_existing_names_of_maskrl_and_the_workbench():
    modules = {"maskrl": maskrl, "lessons": lessons, "pictures": lesson_pictures}
    for cell in cells("code"):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in modules:
                    assert hasattr(modules[node.value.id], node.attr), node.attr
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES:
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module}.{name.name}"


def test_the_source_that_it_shows_is_the_present_one():
    """If this fails: python -m workbench.lessons refresh."""
    shown = shown_sources()
    assert len(shown) >= 12
    assert all(re.fullmatch(lessons.LISTING, text, re.S) for text in shown)
    assert lessons.refresh(lessons.read()) == []


def test_an_old_listing_is_refreshed():
    notebook = lessons.read()
    text = json.dumps(notebook).replace("residual = weight(t)", "residual = 2 * weight(t)")
    old = json.loads(text)
    assert old != notebook
    assert lessons.refresh(old) == ["gsim_terms"]
    assert old == notebook


def is_heading(cell, kind):
    return cell["cell_type"] == "markdown" and re.search(rf"^{kind} ", source(cell), re.M)


def test_each_section_begins_with_its_part_of_the_short_path():
    inside = True
    for cell in lessons.read()["cells"]:
        if is_heading(cell, "##"):
            inside = True
        elif is_heading(cell, "### Depth:") or "**Exercise" in source(cell):
            inside = False
        assert lessons.is_short(cell) == inside, source(cell)[:80]


def test_the_short_path_is_short():
    every = lessons.read()["cells"]
    short = [cell for cell in every if lessons.is_short(cell)]
    prose = [cell for cell in short if cell["cell_type"] == "markdown"]
    assert lessons.words(prose) <= 4900  # a little over twenty minutes
    assert lessons.words(short) <= 0.37 * lessons.words(every)
    assert lessons.words(every) <= 18_300


def global_names(table):
    """(assigned, read): the global names of a cell, also of those inside its functions."""
    is_module = table.get_type() == "module"
    symbols = [symbol for symbol in table.get_symbols() if is_module or symbol.is_global()]
    assigned = {v.get_name() for v in symbols if v.is_assigned() or v.is_imported()}
    read = {v.get_name() for v in symbols if v.is_referenced()}
    for child in table.get_children():
        more_assigned, more_read = global_names(child)
        assigned, read = assigned | more_assigned, read | more_read
    return assigned, read


def undefined(cells):
    """Names that cells of code read before any of them assigns them."""
    known, missing = set(dir(builtins)), set()
    for cell in cells:
        assigned, read = global_names(symtable.symtable(source(cell), "cell", "exec"))
        missing |= read - known - assigned
        known |= assigned
    return missing


def test_the_short_path_needs_nothing_of_the_depth():
    assert undefined(cells("code")) == set()
    assert undefined([cell for cell in cells("code") if lessons.is_short(cell)]) == set()
    assert "student" in undefined(cells("code")[2:])  # the test can fail


def test_every_exercise_has_a_check_and_a_folded_answer():
    text = "".join(source(cell) for cell in cells("markdown"))
    numbers = [n for n in range(1, 20) if f"**Exercise {n}.**" in text]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) == 7
    assert text.count("<details>") == text.count("</details>") == len(numbers)
    broken = [n for n in range(1, 20) if f"**Break it on purpose {n}" in text]
    assert broken == [1, 2, 3]
    code = [source(cell) for cell in cells("code")]
    assert sum("\ncheck(" in cell for cell in code) == len(numbers) + len(broken)
    assert sum("\nprediction = None" in f"\n{cell}" for cell in code) == len(broken)


def answers():
    """{number: the folded answer of an exercise}."""
    text = "\n".join(source(cell) for cell in cells("markdown"))
    found = re.findall(r"\*\*Exercise (\d+)\.\*\*.*?<details>(.*?)</details>", text, re.S)
    return {int(number): answer for number, answer in found}


def function_in(answer):
    """The function that an answer defines, run in the names of the notebook's first cell."""
    code = re.search(r"```python\n(.*?)```", answer, re.S).group(1)
    names = {"torch": torch, "math": math}
    names |= {"alpha_sigma": maskrl.alpha_sigma, "q_sample": maskrl.q_sample}
    exec(code, names)
    return names[re.match(r"def (\w+)", code).group(1)]


def test_the_folded_answers_are_right():
    given = answers()
    x_0, eps, t = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([10, 200, 400, 600, 800])
    clean = function_in(given[1])(maskrl.q_sample(x_0, t, eps), t, eps)
    torch.testing.assert_close(clean, x_0, atol=1e-4, rtol=0)
    for length, steps in ((16, 8), (256, 64), (5, 1)):
        assert function_in(given[2])(length, steps) == maskrl.reveal_counts(length, steps)
    rewards = torch.cat([torch.rand(16), torch.full((8,), 0.3)])
    expected = maskrl.group_advantages(rewards, 8)
    torch.testing.assert_close(function_in(given[4])(rewards, 8), expected)
    new, old, advantage = torch.randn(3, 50)
    expected, _ = maskrl.policy_loss(new, old, advantage)
    torch.testing.assert_close(function_in(given[5])(new, old, advantage, 0.2), expected)


def test_the_answer_for_L1_is_the_term_that_training_uses():
    def squared(y):
        return y.square().sum(-1), 2 * y

    def unweighted(t):
        return torch.ones(len(t), 1)

    def eps_q(x_t, t):
        return 0.3 * x_t

    def eps_p(x_t, t):
        return x_t.tanh()

    x_0, eps, t = torch.randn(8, 3), torch.randn(8, 3), torch.randint(20, 985, (8,))
    expected, _ = maskrl.gsim_terms(x_0, t, eps, eps_q, eps_p, squared, unweighted)
    torch.testing.assert_close(function_in(answers()[3])(x_0, t, eps, eps_q, eps_p), expected)


def test_every_section_ends_with_a_summary_of_three_sentences_and_every_figure_has_a_verdict():
    text = "\n".join(source(cell) for cell in cells("markdown"))
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    assert len(sections) == 15
    for section in sections[:-1]:  # the last only points elsewhere
        summary = re.split(r"\n(?:\n|#|\*\*Exercise)", section.split("**Summary.**")[1].strip())[0]
        assert len(re.findall(r"[.!?](?:\s|$)", summary)) == 3, section.splitlines()[0]
    said = [text for text in markdown_outputs() if text.startswith("**Verdict.**")]
    assert len(said) >= 25
    assert not [text for text in said if "nan" in text or "inf " in text]


def test_a_small_copy_of_a_checkpoint_generates_nearly_the_same(tmp_path, model):
    model.kind = "student"
    full, small = tmp_path / "student.pt", tmp_path / "small" / "student.pt"
    write_checkpoint(full, model)
    small.parent.mkdir()
    size = shrink(full, small)
    assert size == small.stat().st_size < 0.6 * full.stat().st_size
    copy = load_checkpoint(small, "student")
    labels, sampling = torch.arange(3), maskrl.Sampling(steps=4)
    a, b = (maskrl.generate(m, labels, sampling) for m in (model, copy))
    torch.testing.assert_close(a, b, atol=0.02 * float(a.std()), rtol=0)
