"""Distances, the judge, and what it is insensitive to."""

import pytest
import torch
from conftest import tiny
from helpers_rewards import shapes

from workbench import judge as judge_module
from workbench.data import load_data, to_unit
from workbench.judge import Judge, diversity, frechet_distance, precision_recall
from workbench.quality_net import QualityNet
from workbench.report import report_table
from workbench.settings import RunSettings

CPU = torch.device("cpu")


def test_frechet_distance_of_two_gaussians():
    """|m|^2 + sum (s_a - s_b)^2 for independent features."""
    a = torch.randn(200_000, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5])
    b = torch.randn(200_000, 3, dtype=torch.float64) + torch.tensor([1.0, 0.0, -1.0])
    assert abs(frechet_distance(a, b) - (2 + 1 + 0.25)) < 0.05
    assert frechet_distance(a, a) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_have_no_distance(value):
    a, b = torch.randn(2, 9, 3)
    b[4, 1] = value
    with pytest.raises(FloatingPointError, match="infinite or NaN"):
        frechet_distance(a, b)


def test_precision_and_recall_tell_a_collapse_from_garbage():
    real, same, labels = torch.randn(600, 4), torch.randn(600, 4), torch.arange(600) % 3
    precision, recall = precision_recall(real, same)
    assert precision > 0.9
    assert recall > 0.9
    # three images, again and again: all good, few covered
    collapsed = same[labels] + 0.01 * torch.randn(600, 4)
    precision, recall = precision_recall(real, collapsed)
    assert precision > 0.6
    assert recall < 0.1
    # too wide: most are not real, but they surround all
    precision, _ = precision_recall(real, 4 * same)
    assert precision < 0.4
    assert diversity(collapsed, labels) < 0.02 * diversity(same, labels)


def test_diversity_is_the_mean_distance_within_a_class():
    """Of the classes 0, 0, 1, 1: distances 1 and 3."""
    x = torch.tensor([[0.0], [1.0], [5.0], [8.0]])
    assert diversity(x, torch.tensor([0, 0, 1, 1])) == 2


@pytest.fixture(scope="module")
def shapes_judge():
    """The judge of the preset tiny, trained for half as long."""
    settings = RunSettings(scale=1.0, judge_iters=200)
    return Judge(load_data(settings), settings, CPU)


@pytest.fixture(scope="module")
def real_row(shapes_judge):
    return shapes_judge.real_row()


def test_the_judge_sees_damage_that_it_did_not_learn(shapes_judge, real_row):
    assert shapes_judge.insensitive_to == []
    for name, (weak, strong) in shapes_judge.sensitivity.items():
        assert real_row["frechet"] < weak < strong, name


def test_a_judge_is_insensitive_to_what_it_does_not_order():
    """Real images must come below weak damage, and that below strong."""

    class Measured(Judge):
        def measure_sensitivity(self, settings):
            return {"seen": (1e6, 2e6), "turned round": (2e6, 1e6), "weak unseen": (-1.0, 1e6)}

    judge = Measured(shapes(), tiny(), CPU)
    assert judge.insensitive_to == ["turned round", "weak unseen"]


def mean_colour(images):
    return images.mean((2, 3))


def test_a_judge_says_what_it_is_insensitive_to(capsys):
    """Mean colours do not change when patches change places; they do when noise is clipped."""
    judge = Judge(shapes(), tiny(), CPU, embed=mean_colour)
    assert "shuffled" in judge.insensitive_to
    assert "INSENSITIVE to " in capsys.readouterr().out
    row = judge.real_row() | {"nearest": 1.0}
    metrics = {"n": 9, "rows": {"real": row}, "hardware": "", "settings": {"seed": 0}}
    table = report_table(metrics | {"insensitive_to": judge.insensitive_to})
    assert "? ±" in table
    assert "insensitive to images that are" in table
    assert "? ±" not in report_table(metrics | {"insensitive_to": []})


def test_the_judge_knows_real_images(shapes_judge, real_row):
    assert len(shapes_judge.labels) >= 2000
    assert real_row["accuracy"] > 0.99
    assert real_row["precision"] > 0.9
    assert real_row["recall"] > 0.9
    assert 0.9 < real_row["diversity"] < 1.1


def test_the_judge_takes_bytes_as_well_as_floats(shapes_judge):
    half = shapes_judge.halves[0][1].take(slice(0, 20))
    from_bytes, _ = shapes_judge.features(half.images)
    from_floats, _ = shapes_judge.features(to_unit(half.images))
    assert torch.equal(from_bytes, from_floats)


def two_colours(images):
    return images.mean((2, 3))[:, :2] + images[:, :2, 0, 0]


def test_the_judge_looks_through_given_features():
    judge = Judge(shapes(), tiny(), CPU, embed=two_colours)
    assert judge.references[0].shape[1] == 2
    x = judge.real_images
    expected = frechet_distance(two_colours(x), judge.references[1])
    distances = [frechet_distance(two_colours(x), r) for r in judge.references]
    assert distances[1] == expected
    assert judge(x)["frechet"] == pytest.approx(sum(distances) / len(distances), rel=1e-5)


def test_a_judge_with_a_trained_network_trains_none(monkeypatch):
    monkeypatch.setattr(judge_module, "train_quality_net", None)
    net = QualityNet("judge", 8, 9).eval()
    assert Judge(shapes(), tiny(), CPU, net=net).net is net
