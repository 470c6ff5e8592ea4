"""The bench (section 20): the arms, their times, and what a checkpoint's folder gives."""

import json
import time

import pytest
import torch
from conftest import error_of, random_model, tiny

import maskrl
import sample

CPU = ("--device", "cpu", "--threads", 1)


def models_of(*kinds):
    models = {kind: random_model(kind, steps=8) for kind in kinds}
    if "policy" in models:
        maskrl.add_schedule(models["policy"])
    return models


@pytest.fixture
def folder(tmp_path):
    """teacher.pt, student.pt and policy.pt of the shapes, with random weights."""
    classes, _, _ = maskrl.load_shapes(tiny(), 8)
    for kind in ("teacher", "student", "policy"):
        model = maskrl.MAR(tiny(steps=3), classes, kind)
        if kind == "policy":
            maskrl.add_schedule(model)
        maskrl.save_checkpoint(tmp_path / f"{kind}.pt", model)
    return tmp_path


def test_there_is_an_arm_for_each_idea_that_the_models_allow():
    arms = maskrl.bench_arms(models_of("teacher", "student", "policy"), None)
    assert list(arms) == [
        *("teacher, 100 steps", "teacher, 25 steps", "annealed teacher"),
        *("student", "student + cache", "student + schedule", "all together"),
    ]
    assert arms["student + schedule"][0].schedule is not None
    assert list(maskrl.bench_arms(models_of("teacher"), None)) == list(arms)[:3]


def test_without_a_policy_the_schedule_is_a_quarter_of_the_iterations():
    models = models_of("student")
    for steps, fewer in ((None, 2), (16, 4), (2, 1)):
        arms = maskrl.bench_arms(models, steps)
        taken = [sampling.steps for _, sampling in arms.values()]
        assert taken == [steps, steps, fewer, fewer]


def test_factors_are_ratios_of_medians_and_multiply():
    seconds = {"teacher, 100 steps": 60.0, "student": 3.0, "student + cache": 2.0}
    seconds |= {"student + schedule": 1.0, "all together": 0.8}
    rows = {name: {"seconds": {1: [0.0, median, 99.0]}} for name, median in seconds.items()}
    found = maskrl.factors(rows, 1)
    expected = {"one step": 20, "cache": 1.5, "schedule": 3, "product": 90, "all together": 75}
    assert found == pytest.approx(expected)
    del rows["teacher, 100 steps"]
    assert maskrl.factors(rows, 1) == {}


def test_calls_are_timed_in_turns_and_the_first_round_is_left_out():
    said = []
    calls = {name: lambda name=name: said.append(name) for name in "ab"}
    seconds = maskrl.seconds_in_turns(calls, 3, torch.device("cpu"))
    assert said == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_shares_say_where_the_seconds_go_and_leave_the_model_as_it_was(student):
    def slow(images):
        time.sleep(0.2)
        return images

    parts, steps = maskrl.shares(student, maskrl.Sampling(4), 2, slow)
    assert steps == 4
    assert min(parts.values()) > 0 and sum(parts.values()) < 1
    fast, _ = maskrl.shares(student, maskrl.Sampling(4), 2, maskrl.unchanged)
    assert fast["decoding"] < parts["decoding"]
    assert not any(module._forward_hooks for module in student.modules())
    assert not any(module._forward_pre_hooks for module in student.modules())


def test_the_bench_of_a_checkpoint_judges_it_and_what_lies_beside_it(folder, tmp_path, capsys):
    path = tmp_path / "bench.json"
    argv = [folder / "student.pt", "--bench", path, "--rounds", 2, "--batches", 2, *CPU]
    sample.main([str(a) for a in argv])
    result = json.loads(path.read_text())
    assert len(result["rows"]) == 7
    for row in result["rows"].values():
        assert set(row["seconds"]) == {"2"} and row["frechet"] > 0
    assert result["rows"]["student"]["steps"] == 3 > result["rows"]["all together"]["steps"]
    assert "measured all together" in capsys.readouterr().out


def test_the_bench_of_a_preset_says_that_its_weights_are_random(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(maskrl.PRESETS, "tiny", {"image_size": 8, "patch": 2, "width": 32})
    path = tmp_path / "bench.json"
    argv = ["tiny", "--bench", path, "--steps", 1, "--rounds", 2, "--batches", 1, *CPU]
    sample.main([str(a) for a in argv])
    result = json.loads(path.read_text())
    assert result["weights"] == "random: for speed only"
    assert not any("frechet" in row for row in result["rows"].values())
    assert "random: for speed only" in capsys.readouterr().out


def test_wrong_options_of_the_bench_end_in_one_line(tmp_path, capsys):
    for option in (("--rounds", 1), ("--batches", 0)):
        said = error_of(sample.main, ["tiny", "--bench", *option, *CPU], capsys)
        assert "--rounds must be at least 2, and --batches at least 1" in said
