"""The report: its table, what it keeps of an earlier one, distances to the training images."""

import json
import math

import pytest
import torch
from conftest import tiny
from PIL import Image

import maskrl
from maskrl import PolicyGradient, Sampling, total_reward
from workbench import report as report_module
from workbench.data import Split, load_data
from workbench.judge import Judge
from workbench.report import (
    arms_of_report,
    compare_schedules,
    distances_to_training,
    generate_many,
    nearest,
    report,
    report_table,
    score,
    with_earlier,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings():
    return tiny(steps=4, denoise_steps=2)


@pytest.fixture(scope="module")
def data(settings):
    return load_data(settings)


@pytest.fixture(scope="module")
def judge(data, settings):
    return Judge(data, settings, CPU, draws=2)


def no_curves(out):
    """matplotlib takes long."""


def model_of(kind, settings, data):
    model = maskrl.MAR(settings, data.classes, kind)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.fixture
def models(settings, data):
    return {kind: model_of(kind, settings, data) for kind in ("teacher", "student", "policy")}


# The table ----------------------------------------------------------------------------------------


def test_the_report_of_all_models(models, settings, data, judge, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report_module, "curves", no_curves)
    metrics = report(tmp_path, settings, data, judge, models, {"minutes": {"teacher": 1.0}})
    said = capsys.readouterr().out
    arms = ["untrained", "teacher", "one-step start", "student", "policy"]
    assert list(metrics["rows"]) == ["real", *arms]
    for name in arms:
        row = metrics["rows"][name]
        assert row["seconds_per_image"] > 0
        assert (row["steps"], row["denoise_steps"]) == (4, 2 if name == "teacher" else 1)
        assert f"\n{name:16}" in said
    assert metrics["rows"]["real"]["nearest"] == 1
    assert metrics["sensitivity"] == judge.sensitivity
    assert metrics["insensitive_to"] == judge.insensitive_to
    assert not {"examination", "blind"} & metrics.keys()
    assert metrics["minutes"] == {"teacher": 1.0}
    assert metrics["n"] == len(judge.labels)
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert kept["rows"].keys() == metrics["rows"].keys()
    assert {path.name for path in tmp_path.iterdir()} == {
        *("metrics.json", "samples.png", "neighbours.png"),
    }
    assert Image.open(tmp_path / "neighbours.png").width > 9 * 64
    assert f"Their columns: {', '.join(data.classes)}" in said


def test_every_arm_has_the_same_classes_and_noise(models, settings, data, judge, monkeypatch):
    calls = []

    def watched(model, labels, sampling, seed, name, decode):
        calls.append((labels, seed, decode))
        return torch.zeros(len(labels), 3, 8, 8), torch.ones(len(labels))

    monkeypatch.setattr(report_module, "generate_many", watched)
    arms = arms_of_report(models, settings, data)
    rows, _ = report_module.judge_arms(arms, settings, judge)
    assert len(calls) == len(arms) == 5
    assert all(call == (judge.labels, settings.seed, judge.decode) for call in calls)
    assert rows.keys() == {"real", *arms}


def test_the_one_step_start_is_the_teacher_asked_for_one_step(models, settings, data):
    arms = arms_of_report(models, settings, data)
    assert arms["one-step start"] == (models["teacher"], Sampling(denoise_steps=1))
    untrained = arms["untrained"][0]
    assert untrained.kind == "student"
    again = arms_of_report(models, settings, data)["untrained"][0]
    assert torch.equal(untrained.z_proj.weight, again.z_proj.weight)
    del models["teacher"], models["policy"]
    assert list(arms_of_report(models, settings, data)) == ["untrained", "student"]


def test_a_judge_that_does_not_see_a_fault_marks_its_distances(judge):
    row = judge.real_row() | {"nearest": 1.0}
    metrics = {"n": 9, "rows": {"real": row}, "hardware": "", "settings": {"seed": 0}}
    table = report_table(metrics | {"insensitive_to": ["shuffled", "swapped"]})
    assert "? ±" in table
    assert "insensitive to images that are shuffled, swapped" in table
    assert "? ±" not in report_table(metrics | {"insensitive_to": []})


def test_many_images_are_those_of_each_part_under_its_own_seed(student, monkeypatch):
    labels, sampling = torch.arange(300) % 3, Sampling(steps=1)
    images, steps = generate_many(student, labels, sampling, 5, "a name")
    assert images.shape == (300, 3, 8, 8)
    assert torch.equal(steps, torch.ones(300))
    tokens = maskrl.generate(student, labels[256:], sampling, seed=(5, 1))
    assert torch.equal(images[256:], maskrl.to_images(tokens, student.settings))
    negated, _ = generate_many(student, labels, sampling, 5, "a name", torch.Tensor.neg)
    assert torch.equal(negated, -images)


# What an earlier report had -----------------------------------------------------------------------


def metrics_of(**changes):
    row = {"frechet": 1.0}
    same = {"n": 9, "settings": {"seed": 0}, "minutes": {"student": 1.0}, "rows": {"student": row}}
    return same | changes


def test_a_report_of_the_student_keeps_what_rl_had_reported(tmp_path):
    path, rl = tmp_path / "metrics.json", {"before": {"quality": 0.5}}
    rows = {"student": {"frechet": 2.0}, "policy": {"frechet": 3.0, "recall": None}}
    earlier = metrics_of(rows=rows, rl=rl, minutes={"student": 5.0, "policy": 7.0})
    path.write_text(json.dumps(earlier))
    merged = with_earlier(path, metrics_of())
    assert merged["rl"] == rl
    assert merged["minutes"] == {"student": 1.0, "policy": 7.0}
    assert merged["rows"]["student"] == {"frechet": 1.0}
    assert merged["rows"]["policy"]["frechet"] == 3.0
    assert math.isnan(merged["rows"]["policy"]["recall"])


OTHERS = {
    "other settings": json.dumps(metrics_of(settings={"seed": 1}, rl={})),
    "another number of images": json.dumps(metrics_of(n=8, rl={})),
    "half a file": json.dumps(metrics_of(rl={}))[:-5],
    "no metrics": json.dumps([1, 2]),
    "rows that are none": json.dumps(metrics_of(rl={}, rows=[1])),
    "no minutes": json.dumps({k: v for k, v in metrics_of(rl={}).items() if k != "minutes"}),
}


@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS)
def test_a_report_of_something_else_adds_nothing(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    assert with_earlier(tmp_path / "metrics.json", metrics_of()) == metrics_of()
    assert with_earlier(tmp_path / "none.json", metrics_of()) == metrics_of()


# The nearest training image -----------------------------------------------------------------------


def test_the_nearest_training_image_of_a_training_image_is_itself(data):
    images = data.train.spaced()[[3, 50]]
    found, distance = nearest(images, data)
    assert torch.equal(found, images)
    assert distance.max() < 0.01
    _, distance = nearest(0.5 * images, data)
    assert distance.min() > 0.05


def test_distances_are_in_those_of_real_images(data, judge):
    real = judge.real_images
    found = distances_to_training({"real": real, "training": data.train.spaced()[:40]}, data)
    assert found["real"] == 1
    assert found["training"] < 0.1
    by_hand = nearest(-real, data)[1].median() / nearest(real, data)[1].median()
    assert distances_to_training({"real": real, "-real": -real}, data)["-real"] == by_hand


def test_a_report_prepares_the_training_images_once(models, settings, judge, tmp_path, monkeypatch):
    """They were once decoded for each of its rows and for the picture of neighbours."""
    data, decoded, take = load_data(settings), [], Split.take

    def watched(split, index):
        decoded.append(split is data.train)
        return take(split, index)

    monkeypatch.setattr(report_module, "curves", no_curves)
    monkeypatch.setattr(Split, "take", watched)
    report(tmp_path, settings, data, judge, models)
    assert sum(decoded) == 1


# RL -----------------------------------------------------------------------------------------------


def redness(images, labels):
    return torch.sigmoid(images[:, 0].mean((1, 2)))


def test_a_score_is_of_the_images_that_the_judge_asks_for(models, judge):
    student = models["student"]
    row = score(student, redness, judge, steps=2)
    images, steps = generate_many(
        student, judge.labels, Sampling(2), student.settings.seed, "", judge.decode
    )
    quality = redness(images, judge.labels)
    assert row["quality"] == pytest.approx(float(quality.mean()))
    reward = total_reward(quality, steps, student.settings)
    assert row["reward"] == pytest.approx(float(reward.mean()))
    assert (row["steps"], row["steps_std"]) == (2, 0)
    assert row["frechet"] == judge(images)["frechet"]


def test_a_policy_is_compared_with_fixed_schedules_of_both_generators(
    models, settings, judge, capsys
):
    student = models["student"]
    training = PolicyGradient(student, settings, redness, torch.zeros(1, 16, 12))
    rows = compare_schedules(training, redness, judge)
    fixed = {4, 2, 1, max(1, round(rows["after"]["steps"]))}
    expected = [f"{who}, fixed K = {K}" for who in ("student", "policy") for K in fixed]
    assert rows.keys() == {"before", "after", *expected}
    assert rows["policy, fixed K = 1"]["steps"] == 1
    assert rows["policy, fixed K = 4"]["steps_std"] == 0
    said = capsys.readouterr().out
    assert all(f"\n{name:24}" in said for name in rows)


def test_hardware_names_the_threads_and_torch():
    text = report_module.hardware(CPU)
    assert text.endswith(f", {torch.get_num_threads()} threads, torch {torch.__version__}")
