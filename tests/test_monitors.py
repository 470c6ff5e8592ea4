"""What is logged during training about the images that a model makes."""

import pytest
import torch
from conftest import tiny
from helpers_rewards import reward_net, shapes

from maskrl import MAR, rng
from workbench.judge import Judge
from workbench.monitors import (
    RLMonitor,
    ValidationMetric,
    policy_measurements,
    student_measurements,
    view_filters,
)
from workbench.settings import preset


def test_noise_and_seams_count_wherever_they_are():
    """The metric once saw one pixel of every fourth token: noise in all the others changed
    nothing."""
    filters = view_filters(32)
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    view = torch.nn.functional.conv2d(x, filters, stride=filters.shape[-1])
    assert view.shape == (1, 6, 8, 8)
    gradient = torch.autograd.grad(view[:, 3:].square().sum() + view.sum(), x)[0]
    assert (gradient != 0).all()
    average = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 32, 32, generator=rng(0)), 4)
    image = average.repeat_interleave(4, 2).repeat_interleave(4, 3)
    view = torch.nn.functional.conv2d(image, filters, stride=4)
    torch.testing.assert_close(view[:, :3], average)
    norms = filters.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(6))


def test_a_pattern_that_averages_to_nothing_is_seen():
    stripes = torch.ones(1, 3, 32, 32)
    stripes[..., ::2] = -1
    view = torch.nn.functional.conv2d(stripes, view_filters(32), stride=4)
    assert view[:, :3].abs().max() < 1e-6
    assert view[:, 3:].abs().min() > 1e-3


@pytest.mark.parametrize(
    "options, images, expected",
    [
        ({}, 16_200, (10, 1024)),  # the demo, whose figures are published
        ({"gsim_iters": 325}, 16_200, (10, 520)),
        ({"gsim_iters": 65}, 16_200, (8, 128)),
        ({"gsim_iters": 1}, 16_200, (1, 128)),
        ({"name": "folder", "gsim_iters": 60}, 119, (1, 119)),
        ({"name": "folder"}, 1896, (10, 240)),
        ({"name": "folder"}, 119, (10, 119)),
        ({"name": "small"}, 10**6, (10, 1024)),
    ],
)
def test_short_stages_and_few_images_are_measured_less(options, images, expected):
    """Of 60 updates that took 36 seconds all measurements once took 343."""
    settings = preset(**{"name": "tiny"} | options)
    assert student_measurements(settings, images) == expected


def test_rl_is_measured_in_proportion_too():
    assert policy_measurements(preset("tiny"), 2250) == (10, 512)  # the demo
    assert policy_measurements(preset("tiny", rl_iters=5, schedule_iters=5), 2250) == (2, 128)
    assert policy_measurements(preset("tiny", rl_iters=10, learn_steps=False), 36) == (3, 36)


def shapes_model(kind):
    torch.manual_seed(0)
    return MAR(tiny(), shapes().classes, kind).eval()


def test_the_validation_metric_is_repeatable_and_tells_models_apart():
    metric = ValidationMetric(reward_net(), shapes(), tiny(), "cpu", n=32)
    assert torch.equal(metric.labels.unique(), torch.arange(9))
    student = shapes_model("student")
    last = student.head.final_layer.linear.weight  # zero: it draws the same whatever its noise
    grey = metric(student)
    torch.nn.init.normal_(last)
    first, again = metric(student), metric(student)
    assert first == again
    assert set(first) == {"validation", "reward_features"}
    assert all(value > 0 for value in first.values())
    assert first["validation"] > grey["validation"]


def test_training_images_have_no_distance_to_themselves():
    metric = ValidationMetric(reward_net(), shapes(), tiny(), "cpu", n=9)
    pixels, features = metric.views(shapes().train.spaced())
    assert torch.equal(pixels, metric.reference[0])
    assert torch.equal(features, metric.reference[1])
    assert pixels.shape[1:] == (6 * 8 * 8,)
    assert features.shape[1:] == (64,)


def bright(images, labels):
    return images.clamp(-1, 1).mean((1, 2, 3)) / 2 + 0.5


@pytest.mark.parametrize("held_out", [None, bright])
def test_rl_monitors_the_reward_the_judge_and_what_is_held_out(held_out):
    judge = Judge(shapes(), tiny(), torch.device("cpu"))
    monitor = RLMonitor(tiny(), reward_net().quality, held_out, judge, n=18)
    assert torch.equal(monitor.labels.unique(), torch.arange(9))
    metrics = monitor(shapes_model("student"))
    assert set(metrics) == {"quality_mean", "judge"} | ({"held_out"} if held_out else set())
    assert 0 < metrics["quality_mean"] < 1
    assert metrics["judge"] > 0
    assert monitor(shapes_model("student")) == metrics


class OneStep(torch.nn.Module):
    """A schedule that has collapsed."""

    def select(self, states, generator=None):
        return torch.full((len(states),), 16)


def test_a_policy_that_collapses_is_told_of_once(capsys):
    judge = Judge(shapes(), tiny(), torch.device("cpu"))
    monitor = RLMonitor(tiny(), reward_net().quality, None, judge, n=18)
    policy = shapes_model("policy")
    capsys.readouterr()  # what the judge says of itself
    monitor.start(policy)
    monitor(policy)
    assert capsys.readouterr().out == ""
    policy.schedule = OneStep()
    monitor(policy)
    assert "gone to one step" in capsys.readouterr().out
    monitor.distance_at_start /= 3
    monitor(policy)
    said = capsys.readouterr().out
    assert "judge's distance has risen" in said
    assert "one step" not in said
    monitor(policy)
    assert capsys.readouterr().out == ""
