"""What README.md says is there, and no figure in it is typed. `python tests/study.py` renews its
line numbers and its table of results."""

import re
import shlex
from dataclasses import fields

import pytest
import study

import maskrl
import sample
import train_distill
import train_rl

README = study.README.read_text()
PARSERS = {
    "train_distill.py": train_distill.parse,
    "train_rl.py": train_rl.parse,
    "sample.py": sample.parse,
    "tests/study.py": study.parse,
}
CONSTANTS = {
    "3.10",  # Python
    "0.04",  # ShapeFit: exp(-e / 0.04)
    "0.3",  # a healthy schedule_clipped is below it
}  # decimals in the prose that are neither results nor defaults of Settings


def test_every_link_points_to_what_it_names():
    links = study.LINK.findall(README)
    assert len(links) > 20
    wrong = [
        f"{name} is at {file}#L{study.line_of(name, file)}, not {line}"
        for name, file, line in links
        if study.line_of(name, file) != int(line)
    ]
    assert not wrong, f"{wrong}\npython tests/study.py renews them"


def test_every_file_that_the_readme_links_to_exists():
    paths = re.findall(r"\]\((?!https?:|#)([\w./-]+)", README)
    assert paths
    for path in paths:
        assert (study.ROOT / path).exists(), path


@pytest.mark.parametrize("script", PARSERS)
def test_every_command_of_the_readme_is_one_that_the_script_takes(script):
    for words in re.findall(rf"python {re.escape(script)}([^\n`#]*)", README):
        PARSERS[script](shlex.split(words))


def test_every_option_that_the_readme_names_exists(capsys):
    known = set()
    for parse in PARSERS.values():
        with pytest.raises(SystemExit):
            parse(["--help"])
        for line in re.findall(r"^  (?:-h, )?(--.*)$", capsys.readouterr().out, re.MULTILINE):
            known.update(re.findall(r"--[a-z][a-z-]+", line.split("  ")[0]))
    ours = [line for line in README.splitlines() if not re.search(r"\b(pip|jupyter)\b", line)]
    named = re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(ours))
    assert set(named) <= known, set(named) - known


def test_the_table_of_results_is_what_the_json_gives():
    assert study.with_table(README) == README, "python tests/study.py renews it"


def decimals(text: str) -> set[str]:
    """Numbers like 0.83; not versions like 1.2.3, and not ids of arXiv."""
    return set(re.findall(r"(?<![\w.])\d+\.\d{1,4}(?![\w.]*\d)", text))


def prose(text: str) -> str:
    """Text without the table of results, blocks of code, code in a line, and targets of links."""
    text = re.sub(f"{study.BEGIN}.*?{study.END}", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`|\]\([^)\n]*\)", "", text)


def test_every_decimal_of_the_prose_is_a_result():
    results = decimals((study.ASSETS / "results.md").read_text())
    defaults = {str(field.default) for field in fields(maskrl.Settings)}
    typed = decimals(prose(README)) - results - defaults - CONSTANTS
    assert not typed, f"{sorted(typed)} are neither in assets/results.md nor constants"


def test_decimals_of_prose():
    text = "0.83 and 12.5 ms, 1.2.3, 2406.11838, `0.1` [x](a#0.2), v0.7, 1.50.\n```\n0.9\n```\n"
    assert decimals(prose(text)) == {"0.83", "12.5", "1.50"}
