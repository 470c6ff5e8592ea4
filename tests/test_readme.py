"""README.md and assets/training.md say what is there, and their figures come from results."""

import re
import shlex
from dataclasses import fields

import pytest

import maskrl
import sample
import train_distill
import train_rl
from workbench.settings import RunSettings
from workbench.studies import __main__ as studies
from workbench.studies import records, tables

README = (records.ROOT / "README.md").read_text()
DOCUMENTS = {path.name: path.read_text() for path in tables.DOCUMENTS}
PARSERS = {
    "train_distill.py": train_distill.parse,
    "train_rl.py": train_rl.parse,
    "sample.py": sample.parse,
    "-m workbench.studies": studies.parse,
}
CONSTANTS = {
    "3.10",  # Python
    "1.6",  # megabytes of a batch of `small`
    "0.9",  # a quantile of the student's rewards
    "0.3",  # a healthy schedule_clipped is below it
}  # decimals in the prose that are neither results nor defaults of the settings
PAPERS = "3.06 2.51 2.00"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables_are_what_the_json_and_the_budget_give(name):
    text = DOCUMENTS[name]
    assert tables.with_tables(text) == text, "python -m workbench.studies renews it"


def test_the_table_of_results_stands_in_the_readme():
    assert tables.readme_results() in README


def test_the_computed_hours_and_memory_of_the_prose_are_those_of_the_table():
    said = re.search(r"([\d.]+) hours and at most ([\d.]+) GB", README)
    assert f"| all | | {said[1]} | {said[2]} |" in DOCUMENTS["training.md"]


# Functions ----------------------------------------------------------------------------------------


def sections() -> dict[str, int]:
    """{name: number of the section} of what maskrl.py defines."""
    found, section = {}, 0
    for line in (records.ROOT / "maskrl.py").read_text().splitlines():
        if heading := re.match(r"# (\d+) .* -{3,}$", line):
            section = int(heading[1])
        elif definition := re.match(r"(?:class|def) (\w+)", line):
            found[definition[1]] = section
    return found


def test_every_function_in_the_table_of_equations_is_in_its_section():
    rows = re.findall(r"^\|.*\| (§.*) \|$", README, re.MULTILINE)
    cells = [cell for row in rows for cell in re.findall(r"§(\d+) ([^§]+)", row)]
    assert len(cells) > 10
    defined = sections()
    for section, names in cells:
        for name in re.findall(r"`([\w.]+)`", names):
            function, *attributes = name.split(".")
            assert defined[function] == int(section), name
            found = getattr(maskrl, function)
            for attribute in attributes:
                found = getattr(found, attribute)


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```python\n(import torch\n.*?)^```", README, re.DOTALL | re.M)
    exec(example, {})
    assert "reward" in capsys.readouterr().out


# Files and commands -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_a_document_links_to_exists(name):
    folder = next(path.parent for path in tables.DOCUMENTS if path.name == name)
    for path in re.findall(r"\]\((?!https?:|#)([\w./-]+)", DOCUMENTS[name]):
        assert (folder / path).exists(), path


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)+\w*(?:\.\w+)?)`", README))))
def test_every_place_in_the_repository_that_the_readme_names_exists(path):
    if not path.startswith("runs/"):
        assert (records.ROOT / path).exists(), path


@pytest.mark.parametrize("script", PARSERS)
def test_every_command_is_one_that_the_script_takes(script):
    joined = "\n".join(DOCUMENTS.values()).replace("\\\n", " ")  # a command may go on
    for words in re.findall(rf"python {re.escape(script)}(?!\.)([^\n`#]*)", joined):
        PARSERS[script](shlex.split(words))


def test_every_option_that_a_document_names_exists(capsys):
    known = set()
    for parse in PARSERS.values():
        with pytest.raises(SystemExit):
            parse(["--help"])
        for line in re.findall(r"^  (?:-h, )?(--.*)$", capsys.readouterr().out, re.MULTILINE):
            known.update(re.findall(r"--[a-z][a-z-]+", line.split("  ")[0]))
    others = re.compile(r"\b(pip|jupyter|torchrun|fidelity)\b")
    lines = [line for text in DOCUMENTS.values() for line in text.splitlines()]
    ours = "\n".join(line for line in lines if not others.search(line))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours))
    assert named <= known, named - known


# Figures ------------------------------------------------------------------------------------------


def decimals(text: str) -> set[str]:
    """Numbers like 0.83; not versions like 1.2.3, and not ids of arXiv."""
    return set(re.findall(r"(?<![\w.])\d+\.\d{1,4}(?![\w.]*\d)", text))


def prose(text: str) -> str:
    """Text without generated tables, blocks of code, code in a line, and targets of links."""
    text = re.sub(r"<!-- (.+) -->\n.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`|\]\([^)\n]*\)", "", text)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_decimal_of_the_prose_is_a_result(name):
    results = decimals(tables.results_markdown())
    generated = [tables.small_table(), tables.released_table()]
    results |= decimals(" ".join(generated)) | set(PAPERS.split())
    defaults = {str(field.default) for field in fields(RunSettings)}
    typed = decimals(prose(DOCUMENTS[name])) - results - defaults - CONSTANTS
    assert not typed, f"{sorted(typed)} are neither in assets/results.md nor constants"


def test_decimals_of_prose():
    text = "0.83 and 12.5 ms, 1.2.3, 2406.11838, `0.1` [x](a#0.2), v0.7, 1.50.\n```\n0.9\n```\n"
    text += "<!-- a b -->\n0.4\n<!-- /a b -->\n"
    assert decimals(prose(text)) == {"0.83", "12.5", "1.50"}
