"""The study of the official code against ours; with the real code where runs/mar has it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import error_of, tiny

from workbench.errors import InputError
from workbench.studies import official, records
from workbench.studies.__main__ import main
from workbench.studies.official import Official, compare, official_model, random_teacher, running_on

CPU = torch.device("cpu")
STAND_IN = Path(__file__).parent / "data" / "official"
REAL = records.ROOT / Official.peer


@pytest.fixture(autouse=True)
def small_and_forgotten(monkeypatch, tmp_path):
    """Tiny models; what was imported from a peer is imported again."""
    monkeypatch.setattr(official, "preset", tiny_preset)
    monkeypatch.setattr(records, "ASSETS", tmp_path / "assets")
    for name in [name for name in sys.modules if name.split(".")[0] in ("models", "diffusion")]:
        monkeypatch.delitem(sys.modules, name)


def tiny_preset(name, **overrides):
    return tiny(**overrides)


def both(folder):
    teacher = random_teacher("small", CPU, 2.9)
    return official_model(folder, teacher), teacher


@pytest.mark.skipif(not REAL.exists(), reason=f"no official code in {Official.peer}")
def test_the_real_code_computes_the_same_and_makes_an_image():
    with running_on(CPU):
        model, teacher = both(REAL)
        assert compare(model, teacher) < 1e-5
        official.official_image(model, 2, 2.9)


def test_a_peer_that_computes_something_else_is_refused():
    with running_on(CPU):
        model, teacher = both(STAND_IN)
        assert compare(model, teacher) == 0
        model.decoder_norm.weight += 0.1
        with pytest.raises(InputError, match="computes something else"):
            compare(model, teacher)


def test_without_the_official_code_the_command_says_how_to_get_it(tmp_path, capsys):
    argv = ["official", "--peer", tmp_path / "none", "--out", tmp_path, "--threads", 1]
    message = error_of(main, [*argv, "--device", "cpu"], capsys)
    assert f"--peer {tmp_path / 'none'}" in message
    assert "git clone https://github.com/LTH14/mar" in message


def test_every_arm_is_timed_in_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(Official, "sizes", {"small": (8, 2), "mar_b": (4, 2)})
    argv = ["official", "--peer", str(STAND_IN), "--out", str(tmp_path), "--threads", "1"]
    main([*argv, "--device", "cpu", "--only", "small"])
    rows = json.loads(records.result_file("official").read_text())["rows"]
    steps = {name: row["0"]["steps"] for name, row in rows.items()}
    student = {"small, student": 8, "small, student, cache": 8}
    fewer = {"small, student, fewer": 2, "small, student, fewer, cache": 2}
    assert steps == {"small, official": 8, "small, teacher": 8} | student | fewer
    assert rows["small, official"]["0"]["faster"] == 1
    assert rows["small, student"]["0"]["faster"] > 1
