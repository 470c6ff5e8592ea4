"""What README.md says is there, and no figure in it is typed. `python tests/study.py` renews its
line numbers and its table of results."""

import re
import shlex
from dataclasses import fields

import budget
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
PAPERS = "2.31 1.78 1.55 3.06 2.51 2.00 0.61 0.97 1.67 2.60 2.06 20.10 30.98 29.33 29.78"


def computed() -> dict[str, list[str]]:
    """The cells of the README's computed tables, as tests/budget.py computes them."""
    rows = {}
    stages = budget.stages(maskrl.preset("small"))
    names = {"teacher": "teacher", "GSIM": "GSIM", "RL, critical steps": "RL, critical"}
    for row, stage in names.items():
        stage = stages[stage]
        size = (stage.weights + stage.activations) / budget.GB
        rows[row] = [f"{stage.updates:,}", f"{stage.hours:.1f}", f"{size:.1f}"]
    for row, name in {"MAR-B": "mar_b", "MAR-L": "mar_l", "MAR-H": "mar_h"}.items():
        settings = maskrl.preset(name, precision="bf16")
        fixed = budget.fixed_bytes(budget.parameters(settings), "bf16")
        kept = budget.activation_bytes(settings, settings.batch, True)
        hours = budget.hours_of_released(settings)
        sizes = [sum(fixed.values()) + kept, sum(budget.rl_bytes(settings).values())]
        times = [
            hours["latents of 60 % of ImageNet, both flips"],
            hours["GSIM, --gsim-iters"],
            hours["progress and report of distilling"],
            hours["RL, --rl-iters"] + hours["report of RL"],
        ]
        rows[row] = [f"{n / budget.GB:.1f}" for n in sizes] + [f"{n:.1f}" for n in times]
    return rows


def test_what_is_computed_is_what_the_readme_says():
    for row, cells in computed().items():
        assert f"| {row} | {' | '.join(cells)} |" in README


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
    joined = README.replace("\\\n", " ")  # a command may go on in the next line
    for words in re.findall(rf"python {re.escape(script)}([^\n`#]*)", joined):
        PARSERS[script](shlex.split(words))


def test_every_option_that_the_readme_names_exists(capsys):
    known = set()
    for parse in PARSERS.values():
        with pytest.raises(SystemExit):
            parse(["--help"])
        for line in re.findall(r"^  (?:-h, )?(--.*)$", capsys.readouterr().out, re.MULTILINE):
            known.update(re.findall(r"--[a-z][a-z-]+", line.split("  ")[0]))
    others = re.compile(r"\b(pip|jupyter|torchrun)\b")
    ours = [line for line in README.splitlines() if not others.search(line)]
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
    tables = decimals(" ".join(cell for cells in computed().values() for cell in cells))
    typed = decimals(prose(README)) - results - defaults - CONSTANTS - set(PAPERS.split()) - tables
    assert not typed, f"{sorted(typed)} are neither in assets/results.md nor constants"


def test_decimals_of_prose():
    text = "0.83 and 12.5 ms, 1.2.3, 2406.11838, `0.1` [x](a#0.2), v0.7, 1.50.\n```\n0.9\n```\n"
    assert decimals(prose(text)) == {"0.83", "12.5", "1.50"}
