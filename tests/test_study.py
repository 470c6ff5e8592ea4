"""Every study of tests/study.py runs from nothing to its table and picture, on a model that learns nothing."""

import json

import pytest
from conftest import tiny

import maskrl
import study


@pytest.fixture
def small(monkeypatch, tmp_path):
    """study.main with everything cut short, writing into one folder."""
    monkeypatch.setattr(maskrl, "preset", lambda name, seed=0: tiny(seed=seed, scale=0.0))
    for name, short in dict(LONG=dict(gsim_iters=3), TEACHER=dict(teacher_iters=2), SHORT=dict(gsim_iters=2), HALVING=dict(gsim_iters=2), LONGER=2).items():
        monkeypatch.setattr(study, name, short)
    monkeypatch.setattr(study, "KS", (16, 1))
    monkeypatch.setattr(study, "CHAINS", (8, 5))
    monkeypatch.setattr(study, "RL", study.RL | dict(rl_iters=4))
    monkeypatch.setattr(study, "DEMO", study.DEMO | dict(rl_iters=2))
    return lambda *args: study.main([*args, "--out", str(tmp_path), "--device", "cpu"])


def test_every_study_runs(small, tmp_path, capsys):
    for name in study.STUDIES:  # in the order of the list: the picture of grid needs the times of speed
        small(*(["speed", "grid"] if name == "grid" else [name]), "--seeds", "0")
    rows = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "seed0").glob("*.json")}
    assert {"real", "student", "L1+L2", "regression", "teacher, 5 steps, K = 1", "teacher, 50 annealed to 5 (DiSA)", "s = 3", "eps head", "cost", "routing", "demo, beta 1", "halved to 4", "student, fixed 1", "backprop, all, beta 0", "story: + learned schedule"} <= set(rows)
    assert rows["routing"]["curve"][0]["step"] == -1 and len(rows["routing"]["curve"]) == 5
    for picture in ("grid", "guidance", "rates", "tokens", "drift", "backprop", "frontier"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5000
    assert "| L1+L2 | 1 |" in capsys.readouterr().out


def test_what_is_there_is_not_done_again_and_seeds_share_a_table(small, tmp_path, monkeypatch, capsys):
    only = ["distil", "--only", "real", "student"]
    small(*only, "--seeds", "0")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    small(*only, "--seeds", "0,1")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert "| real | 2 |" in capsys.readouterr().out
    with pytest.raises(maskrl.InputError, match="--only"):
        small("distil", "--only", "no such row", "--seeds", "0")
