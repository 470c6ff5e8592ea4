"""The bench: the arms, their times, and what a checkpoint's folder gives."""

import json
import re
import time

import pytest
import torch
from conftest import error_of, random_model, tiny

import maskrl
import sample
from maskrl import Sampling
from workbench import bench as bench_module
from workbench.bench import (
    CACHED,
    PARTS,
    bench,
    bench_arms,
    bench_table,
    factor_ranges,
    factors,
    shares,
)
from workbench.data import identity, load_data
from workbench.files import write_checkpoint
from workbench.lazymar import LazyContexts
from workbench.report import generate_many
from workbench.settings import PRESETS
from workbench.timing import Stopwatch, lower_median, seconds_in_turns, time_in_turns

CPU = ("--device", "cpu", "--threads", 1)


def models_of(*kinds):
    models = {kind: random_model(kind, steps=8) for kind in kinds}
    if "policy" in models:
        maskrl.add_schedule(models["policy"])
    return models


@pytest.fixture
def folder(tmp_path):
    """teacher.pt, student.pt and policy.pt of the shapes, with random weights."""
    classes = load_data(tiny()).classes
    for kind in ("teacher", "student", "policy"):
        model = maskrl.MAR(tiny(steps=3), classes, kind)
        if kind == "policy":
            maskrl.add_schedule(model)
            model.schedule.net[-1].bias.data[0] = 9.0  # all at once
        write_checkpoint(tmp_path / f"{kind}.pt", model)
    return tmp_path


# Times --------------------------------------------------------------------------------------------


def test_calls_are_timed_in_turns_and_the_first_round_is_left_out():
    said = []

    def a():
        said.append("a")

    def b():
        said.append("b")

    seconds = seconds_in_turns({"a": a, "b": b}, 3, torch.device("cpu"))
    assert said == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_timing_takes_the_median_and_leaves_out_the_first_round(student, monkeypatch):
    """The first round of each arm is its warm-up."""
    readings = iter([0, 9, 0, 3, 0, 1, 0, 2])

    def perf_counter():
        return next(readings)

    monkeypatch.setattr("workbench.timing.time.perf_counter", perf_counter)
    arms = {"student": (student, Sampling(steps=1))}
    assert time_in_turns(arms, torch.tensor([0, 1])) == {"student": 2 / 2}


@pytest.mark.parametrize("ordered, middle", [([4], 4), ([1, 2], 1), ([1, 2, 3], 2), ([1] * 4, 1)])
def test_the_median_is_one_of_the_numbers(ordered, middle):
    assert lower_median(ordered) == middle


def test_a_stopwatch_adds_what_each_part_takes(monkeypatch):
    readings = iter([0, 1, 5, 7, 10, 14])

    def perf_counter():
        return next(readings)

    monkeypatch.setattr("workbench.timing.time.perf_counter", perf_counter)
    watch = Stopwatch(torch.device("cpu"))
    for part in ("a", "b", "a"):
        watch.call(part, abs, -1)
    assert watch.spent == {"a": 5, "b": 2}


# The arms -----------------------------------------------------------------------------------------


def test_there_is_an_arm_for_each_idea_that_the_models_allow():
    arms = bench_arms(models_of("teacher", "student", "policy"), None)
    assert list(arms) == [
        *("teacher, 100 steps", "teacher, 25 steps", "annealed teacher"),
        *("student", "student + cache", "student + schedule", "all together"),
    ]
    assert list(bench_arms(models_of("teacher"), None)) == list(arms)[:3]


def test_an_arm_adds_its_own_idea_and_nothing_else():
    models = models_of("teacher", "student", "policy")
    teacher, student, policy = models.values()
    assert bench_arms(models, 8) == {
        "teacher, 100 steps": (teacher, Sampling(8, denoise_steps=100)),
        "teacher, 25 steps": (teacher, Sampling(8, denoise_steps=25)),
        "annealed teacher": (teacher, Sampling(8, denoise_steps=(50, 5))),
        "student": (student, Sampling(8)),
        "student + cache": (student, Sampling(8, contexts=CACHED)),
        "student + schedule": (policy, Sampling()),
        "all together": (policy, Sampling(contexts=CACHED)),
    }
    assert (CACHED.func, CACHED.keywords) == (LazyContexts, {"every": 8})
    del models["policy"]
    arms = bench_arms(models, 8)
    assert arms["student + schedule"] == (student, Sampling(2))
    assert arms["all together"] == (student, Sampling(2, contexts=CACHED))


def test_without_a_policy_the_schedule_is_a_quarter_of_the_iterations():
    models = models_of("student")
    for steps, fewer in ((None, 2), (16, 4), (2, 1), ((1, 2, 3, 10), 1)):
        arms = bench_arms(models, steps)
        taken = [sampling.steps for _, sampling in arms.values()]
        assert taken == [steps, steps, fewer, fewer]


# The figures --------------------------------------------------------------------------------------


def test_factors_are_ratios_of_medians_and_multiply():
    seconds = {"teacher, 100 steps": 60.0, "student": 3.0, "student + cache": 2.0}
    seconds |= {"student + schedule": 1.0, "all together": 0.8}
    expected = {"one step": 20, "cache": 1.5, "schedule": 3, "product": 90, "all together": 75}
    assert factors(seconds) == pytest.approx(expected)
    del seconds["teacher, 100 steps"]
    assert factors(seconds) == {}


def test_the_range_of_a_factor_is_that_of_single_rounds():
    """Once a product of medians came without one: 132, 119 and 80 on three machines."""
    seconds = {"teacher, 100 steps": [60.0, 90.0, 30.0], "student": [3.0, 3.0, 3.0]}
    seconds |= {"student + cache": [2.0, 1.0, 3.0], "student + schedule": [1.0] * 3}
    ranges = factor_ranges(seconds | {"all together": [1.0, 1.0, 2.0]})
    assert ranges["one step"] == [10, 20, 30]
    assert ranges["cache"] == [1, 1.5, 3]
    assert ranges["product"] == [30, 90, 270]
    assert ranges["all together"] == [15, 60, 90]
    assert factor_ranges({"student": [1.0]}) == {}


def test_seconds_are_lowest_median_and_highest_per_image_decoded(student, monkeypatch):
    pauses = iter([0.5, 0.4, 0.1, 0.2, 0.0])  # the first round's is not counted; shares

    def slow(images):
        assert images.shape == (2, 3, 8, 8)
        time.sleep(next(pauses))

    def one_arm(models, steps):
        return {"a": (student, Sampling(1))}

    monkeypatch.setattr(bench_module, "bench_arms", one_arm)
    result = bench({"student": student}, slow, batches=(2,), rounds=4)
    assert result["rows"]["a"]["seconds"][2] == pytest.approx([0.05, 0.1, 0.2], abs=0.04)
    assert next(pauses, None) is None


def test_every_round_draws_other_images_and_all_arms_the_same(monkeypatch):
    drawn = []

    def watched(model, labels, *rest, seed, **options):
        drawn.append((tuple(labels.tolist()), seed))
        return maskrl.generate(model, labels, *rest, seed=seed, **options)

    monkeypatch.setattr(bench_module, "generate", watched)
    rows = bench(models_of("student"), steps=1, batches=(2,), rounds=3)["rows"]
    rounds = [((0, 1), 0), ((1, 2), 1), ((2, 0), 2)]
    for i, images in enumerate(rounds):
        assert drawn[i * len(rows) : (i + 1) * len(rows)] == [images] * len(rows)


def test_shares_and_factors_are_those_of_the_first_batch_size():
    sizes = []

    def decode(images):
        sizes.append(len(images))

    result = bench(models_of("teacher", "student"), decode, None, 1, (1, 3), rounds=2)
    arms = len(result["rows"])
    assert sizes == [1] * 2 * arms + [3] * 2 * arms + [1] * arms
    first, other = (
        factors({name: row["seconds"][batch][1] for name, row in result["rows"].items()})
        for batch in (1, 3)
    )
    assert result["factors"] == pytest.approx(first) != pytest.approx(other)
    assert result["factor_ranges"][3]["cache"][1] == pytest.approx(other["cache"])


def test_a_distance_is_of_the_images_of_its_own_arm():
    models = models_of("teacher", "student")

    class Judge:
        labels = torch.arange(6) % 3

        def __call__(self, images):
            return {"frechet": float(images.square().mean())}

    judge = Judge()
    rows = bench(models, judge=judge, steps=4, batches=(1,), rounds=2)["rows"]
    expected = {}
    for name, (model, sampling) in bench_arms(models, 4).items():
        images, _ = generate_many(model, judge.labels, sampling, model.settings.seed, name)
        expected[name] = judge(images)["frechet"]
    assert {name: row["frechet"] for name, row in rows.items()} == expected
    assert len(set(expected.values())) == 6  # a single iteration is never cached


@pytest.mark.parametrize("contexts", [None, CACHED], ids=["exact", "cached"])
@pytest.mark.parametrize("slow", ["transformer", "head", "decoding"])
def test_the_slow_part_has_the_share(student, slow, contexts):
    def pause(*_):
        time.sleep(0.05)

    def slow_decode(images):
        time.sleep(0.25)

    # of a part that every iteration computes, with a cache too
    inside = {"transformer": student.decoder_blocks[0].mlp, "head": student.head.input_proj}
    if slow in inside:
        inside[slow].register_forward_hook(pause)
    decode = slow_decode if slow == "decoding" else identity
    parts, steps = shares(student, Sampling(5, contexts=contexts), 2, decode)
    assert steps == 5
    assert parts.keys() == set(PARTS)
    assert parts[slow] > 0.5 and min(parts.values()) > 0 and sum(parts.values()) < 1


def test_shares_leave_the_model_as_it_was(student):
    shares(student, Sampling(4), 2, identity)
    assert not any(module._forward_hooks for module in student.modules())
    assert not any(module._forward_pre_hooks for module in student.modules())


def test_the_table_shows_the_median_the_range_the_best_batch_and_the_product():
    row = {
        "seconds": {1: [0.1, 0.2, 0.4], 8: [0.01, 0.03, 0.9], 32: [0.02, 0.05, 0.06]},
        "shares": {"transformer": 0.5, "head": 0.25, "decoding": 0.125},
        **{"steps": 7.0, "frechet": 1.5},
    }
    product = {"one step": 2, "cache": 3, "schedule": 4, "product": 24, "all together": 20}
    ranges = {8: {name: [value - 1, value, value + 1] for name, value in product.items()}}
    _, line, last, _ = bench_table({"rows": {"an arm": row}, "factor_ranges": ranges}).splitlines()
    assert line.split() == [
        *("an", "arm", "0.2", "(0.1-0.4)", "0.03", "(8)", "7.0", "50%", "25%", "12%", "1.50"),
    ]
    assert last == (
        "times as fast, batch 8: one step 2 (1-3) x cache 3 (2-4) x schedule 4 (3-5) = 24 (23-25); "
        "measured all together 20 (19-21)"
    )


# sample.py --bench --------------------------------------------------------------------------------


def test_the_bench_of_a_checkpoint_judges_it_and_the_others_in_its_folder(folder, tmp_path, capsys):
    path = tmp_path / "bench.json"
    argv = [folder / "student.pt", "--bench", path, "--rounds", 2, "--batches", 2, "--judge", *CPU]
    sample.main([str(a) for a in argv])
    result = json.loads(path.read_text())
    assert len(result["rows"]) == 7
    for row in result["rows"].values():
        assert set(row["seconds"]) == {"2"} and row["frechet"] > 0
    assert result["rows"]["student"]["steps"] == 3
    assert result["rows"]["all together"]["steps"] == 1
    said = capsys.readouterr().out
    assert "timing 7 ways to make an image, 2 rounds in batches of 2" in said
    assert "training a judge: 5 updates" in said
    assert re.search(r"drawing \d+ images in each way: about \d+\.\d minutes", said)
    assert "measured all together" in said


def test_a_bench_judges_only_on_request(folder, tmp_path, monkeypatch):
    """It once trained a judge and drew thousands of images unasked: 12 minutes without a word."""
    monkeypatch.setattr(sample, "bench_judge", pytest.fail)
    path = tmp_path / "bench.json"
    argv = [folder / "student.pt", "--bench", path, "--rounds", 2, "--batches", 1, *CPU]
    sample.main([str(a) for a in argv])
    assert not any("frechet" in row for row in json.loads(path.read_text())["rows"].values())


def test_models_of_other_classes_or_sizes_are_left_out(folder):
    other = maskrl.MAR(tiny(steps=3), ["a", "b"], "teacher")
    write_checkpoint(folder / "teacher.pt", other)
    models, decode = bench_module.bench_models(folder / "student.pt", torch.device("cpu"), None)
    assert models.keys() == {"student", "policy"}
    assert decode is identity


def test_models_of_other_data_are_not_judged(capsys):
    models = models_of("student")
    assert bench_module.bench_judge(models, "shapes", None, torch.device("cpu")) is None
    assert "these are not the classes of --data" in capsys.readouterr().out


def test_the_bench_of_a_preset_says_that_its_weights_are_random(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", {"image_size": 8, "patch": 2, "width": 32})
    path = tmp_path / "bench.json"
    argv = ["tiny", "--bench", path, "--steps", 1, "--rounds", 2, "--batches", 1, *CPU]
    sample.main([str(a) for a in argv])
    result = json.loads(path.read_text())
    assert result["weights"] == "random: for speed only"
    assert not any("frechet" in row for row in result["rows"].values())
    assert "random: for speed only" in capsys.readouterr().out


@pytest.mark.parametrize("device, low", [("cpu", False), ("meta", True)])
def test_random_models_share_weights_and_are_bfloat16_where_that_is_fast(device, low, monkeypatch):
    """Most CPUs only emulate it."""
    monkeypatch.setitem(PRESETS, "small", {"image_size": 8, "patch": 2, "precision": "bf16"})
    models, _ = bench_module.random_models("small", torch.device(device), None)
    teacher, student = models["teacher"], models["student"]
    assert (teacher.kind, student.kind) == ("teacher", "student")
    assert student.z_proj.weight is teacher.z_proj.weight
    assert all(("context" in vars(model)) == low for model in (teacher, student))
    assert student.settings.precision == ("bf16" if low else "fp32")


def test_wrong_options_of_the_bench_end_in_one_line(tmp_path, capsys):
    for option in (("--rounds", 1), ("--batches", 0)):
        said = error_of(sample.main, ["tiny", "--bench", *option, *CPU], capsys)
        assert "--rounds must be at least 2, and --batches at least 1" in said
    argv = ["tiny", "--bench", tmp_path / "bench.json", "--steps", 99, *CPU]
    assert "--steps 99 must lie in 1...16" in error_of(sample.main, argv, capsys)
    assert not (tmp_path / "bench.json").exists()
