"""The rewards that can be named, and what happens to those that do not work."""

import importlib
import json
import math
import os
import re
import sys
from dataclasses import replace

import pytest
import torch
from conftest import SHORT, error_of, tiny
from helpers_rewards import OUT_OF_MEMORY, Refused, reward_net, shapes

import train_rl
from maskrl import MAR, patchify, rng, total_reward, unpatchify
from workbench import quality_net, rewards
from workbench.damage import blur
from workbench.data import COLOURS, draw_shapes, shape_masks, to_unit
from workbench.errors import InputError
from workbench.files import read_checkpoint
from workbench.rewards import (
    CheckedReward,
    MeanReward,
    ScaledReward,
    ShapeFit,
    calibrate,
    check_held_out,
    check_reward_name,
    make_reward,
    reward_weights,
    student_images,
)
from workbench.run import read_log

CPU = torch.device("cpu")


# The perfect shape


def test_shape_fit_knows_a_perfect_image():
    labels = torch.arange(9).repeat(4)
    fit = ShapeFit(16)
    x = to_unit(draw_shapes(labels, 16, rng(0))).requires_grad_()
    real, blurred, wrong = fit(x, labels), fit(blur(x), labels), fit(x, labels.roll(1))
    assert (real > blurred).all()
    assert (blurred > wrong).float().mean() > 0.9
    assert 0.3 < real.min() <= real.max() <= 1
    gradient = torch.autograd.grad(real.sum(), x)[0]
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_shape_fit_of_one_of_its_own_shapes_is_one():
    """At one of its own positions and sizes, on its own kind of background."""
    middle, radius = torch.tensor([0.5]), torch.tensor([0.27])
    inside = shape_masks(middle, middle, radius, 16)[0, 0]
    red = torch.tensor(COLOURS["red"])[:, None, None] / 255
    exact = inside * red + (1 - inside) * 0.1
    assert ShapeFit(16)(2 * exact[None] - 1, torch.tensor([0])) > 0.99


def test_shape_fit_sees_seams():
    """Tokens swapped in from other images of the class lower it, the more the lower."""
    labels, fit = torch.zeros(64, dtype=torch.long), ShapeFit(16)
    tokens = patchify(to_unit(draw_shapes(labels, 16, rng(0))), 4)
    rank = torch.rand(64, 16, generator=rng(1)).argsort(1)[..., None]
    curve = []
    for n in (0, 2, 4, 8):
        swapped = torch.where(rank < n, tokens.roll(1, 0), tokens)
        curve.append(float(fit(unpatchify(swapped, 4), labels).mean()))
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] < 0.7 * curve[0]


# Names


def make(name, **settings):
    return make_reward(name, tiny(**settings), shapes(), CPU, reward_net())


@pytest.mark.parametrize("name", ["embedded", "fit", "clip", "mine:f", "my.module:function"])
def test_what_reward_may_name(name):
    check_reward_name(name)


WRONG_NAMES = "clp|clip,|clip:|:f|module:|a.csv|embedded:2,clip|a:b:c|a-b:c|a..b:c|../a:b|"


@pytest.mark.parametrize("name", WRONG_NAMES.split("|"))
def test_what_reward_may_not_name(name):
    expected = re.escape(f"--reward {name}: expected embedded, fit, clip or mod")
    with pytest.raises(InputError, match=f"^{expected}"):
        check_reward_name(name)


def test_embedded_is_the_reward_network():
    test = shapes().test
    x, labels = to_unit(test.images[::9]), test.labels[::9]
    assert torch.equal(make("embedded")(x, labels), reward_net().quality(x, labels))


def test_fit_is_for_the_shapes_alone():
    test = shapes().test
    x, labels = to_unit(test.images[::9]), test.labels[::9]
    assert torch.equal(make("fit")(x, labels), ShapeFit(8)(x, labels))
    photos = replace(shapes(), name="photos/")
    with pytest.raises(InputError, match="--reward fit .* only --data shapes"):
        make_reward("fit", tiny(), photos, CPU, reward_net())


def test_clip_is_asked_by_the_names_that_people_use(monkeypatch):
    asked = []

    def clip_reward(options, classes, device):
        asked.extend(classes)
        return bright

    monkeypatch.setattr(rewards, "ClipReward", clip_reward)
    names = {"n01440764": "tench, Tinca tinca", "n02012849": "crane"}
    data = replace(shapes(), classes=["n01440764", "n02012849", "mine"], names=names)
    make_reward("clip", tiny(), data, CPU)
    assert asked == ["tench", "crane", "mine"]


# Functions of one's own

MODULE = """
import torch
weight = torch.nn.Parameter(torch.tensor(0.1))  # not frozen, as somebody may forget
calls = []
def bright(images, labels):
    calls.append(images.detach())
    return 0.5 + weight * images.mean((1, 2, 3))
def nan(images, labels):
    return bright(images, labels) * float("nan")
def nan_later(images, labels):
    return nan(images, labels) if len(calls) >= 13 else bright(images, labels)
def matrix(images, labels):
    return bright(images, labels)[:, None]
def number(images, labels):
    return 0.5
def negative(images, labels):
    return -bright(images, labels)
def above_one(images, labels):
    return 1 + bright(images, labels)
def constant(images, labels):
    return 0.3 + 0 * bright(images, labels)
def counted(images, labels):
    return (images > 0).float().mean((1, 2, 3))
"""


DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Options:
    weight: float = 1.0
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of rewards in the folder that we are in; its name is new in every test."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
    monkeypatch.chdir(tmp_path)
    name = f"mine_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    yield name
    sys.modules.pop(name, None)


def test_a_function_gets_clamped_images_and_lets_gradient_through(module):
    quality, labels = make(f"{module}:bright"), torch.tensor([0, 1])
    torch.testing.assert_close(quality(3 * torch.ones(2, 3, 8, 8), labels), torch.full((2,), 0.6))
    x = torch.zeros(2, 3, 8, 8, requires_grad=True)
    assert torch.autograd.grad(quality(x, labels).sum(), x)[0].min() > 0


def test_weights_that_somebody_forgot_to_freeze_get_no_graph(module):
    """Without gradient in the pixels there is nothing to differentiate, and memory to lose."""
    quality = make(f"{module}:bright")
    assert not quality(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])).requires_grad


@pytest.mark.parametrize("function", ["none", "calls"])
def test_a_function_that_is_missing_or_none_is_named(module, function):
    with pytest.raises(InputError, match=f"--reward {module}:{function}: "):
        make(f"{module}:{function}")


def test_a_module_that_is_missing_is_named():
    with pytest.raises(InputError, match="--reward no_such_module:f: ModuleNotFoundError"):
        make("no_such_module:f")


@pytest.mark.parametrize("name", ["sample", "code", "test", "random", "torch", "mine"])
def test_the_file_in_the_current_folder_is_read_whatever_else_has_its_name(
    tmp_path, monkeypatch, capsys, name
):
    """A reward in test.py was once looked for in Python's own `test`, without a word of which."""
    monkeypatch.chdir(tmp_path)
    before = dict(sys.modules)
    (tmp_path / f"{name}.py").write_text(DATACLASS + MODULE)
    make(f"{name}:bright")
    assert f"--reward {name}:bright: from {tmp_path}/{name}.py\n" in capsys.readouterr().out
    sys.modules.pop("mine", None)
    assert all(sys.modules[key] is before[key] for key in ("torch", "random"))
    assert sys.modules.get("code") in (None, importlib.import_module("code"))


def test_a_reward_that_was_edited_is_read_again(module, tmp_path):
    """In a notebook."""
    make(f"{module}:bright")
    with pytest.raises(InputError, match="gave 0.3 for all"):
        make(f"{module}:constant")
    (tmp_path / f"{module}.py").write_text(MODULE.replace("0.3 + 0 * bright", "bright"))
    make(f"{module}:constant")


def test_a_module_of_a_package_and_its_neighbours_are_found(module, tmp_path, capsys):
    (tmp_path / f"{module}_package").mkdir()
    (tmp_path / f"{module}_package" / "part.py").write_text(
        f"from .other import bright\nfrom {module} import nan\n"
    )
    (tmp_path / f"{module}_package" / "other.py").write_text(MODULE)
    make(f"{module}_package.part:bright")
    assert f"from {tmp_path}/{module}_package/part.py\n" in capsys.readouterr().out


def test_a_missing_function_names_the_file_that_was_read(module, tmp_path):
    with pytest.raises(InputError, match=f"there is none, not a function, in {tmp_path}/{module}"):
        make(f"{module}:glow")


PROGRAMS = {
    "arguments": "import argparse\nargparse.ArgumentParser().parse_args(['--unknown'])",
    "exit": "import sys\nsys.exit()",
    "quit": "raise SystemExit('done')",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_module_that_exits_when_it_is_imported_is_wrong_input(module, tmp_path, program):
    """It once ended the script without a word."""
    (tmp_path / f"{module}.py").write_text(f"{MODULE}\n{program}\n")
    with pytest.raises(InputError, match=f"--reward {module}:bright: {module} exits when"):
        make(f"{module}:bright")
    assert module not in sys.modules


@pytest.mark.parametrize(
    "function, said",
    [
        ("nan", "gave values from nan"),
        ("matrix", r"gave \[32, 1\], not a tensor \[32\]"),
        ("number", "gave float, not a tensor"),
        ("negative", "gave values from -0"),
        ("above_one", "gave values from 1"),
        ("constant", "gave 0.3 for all"),
    ],
)
def test_a_broken_reward_is_reported_before_training(module, function, said):
    with pytest.raises(InputError, match=f"--reward {module}:{function} {said}"):
        make(f"{module}:{function}")


def test_backpropagation_refuses_a_reward_without_gradient(module):
    make(f"{module}:counted")
    make(f"{module}:bright", method="backprop")
    with pytest.raises(InputError, match=f"backprop: the reward {module}:counted gives no grad"):
        make(f"{module}:counted", method="backprop")


# A reward that breaks


def bright(images, labels):
    return images.mean((1, 2, 3)).sigmoid()


def test_a_reward_that_breaks_later_is_no_input_error():
    """Wrong input has no effect; a reward that breaks after an hour has a policy to save."""
    broken = []

    def quality(images, labels):
        return bright(images, labels) * (float("nan") if broken else 1)

    images, labels = shapes().train.batch(8, rng(0))
    reward = CheckedReward("mine", quality)
    reward.try_out(images, labels)
    assert torch.equal(reward(images, labels), bright(images, labels))
    broken.append(True)
    with pytest.raises(FloatingPointError, match="--reward mine gave values from nan"):
        reward(images, labels)


def test_a_reward_that_raises_names_itself():
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    reward = CheckedReward("my:reward", Refused(ConnectionError("no server")))
    said = r"--reward my:reward raised ConnectionError: no server \(.*\.py, line \d+\)"
    with pytest.raises(FloatingPointError, match=said) as later:
        reward(images, labels)
    assert isinstance(later.value.__cause__, ConnectionError)
    with pytest.raises(InputError, match=said) as at_the_start:
        reward.try_out(images, labels)
    assert isinstance(at_the_start.value.__cause__, ConnectionError)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_too_little_memory_in_a_reward_stays_what_it_is(error):
    """It once ended as a reward that is broken, without a word on how to need less memory."""
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    reward = CheckedReward("my:reward", Refused(error))
    for call in (reward, reward.try_out):
        with pytest.raises(type(error)) as raised:
            call(images, labels)
        assert raised.value is error


def test_a_reward_that_exits_names_itself():
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    with pytest.raises(FloatingPointError, match="--reward my:reward raised SystemExit: 3"):
        CheckedReward("my:reward", Refused(SystemExit(3)))(images, labels)


def test_a_reward_may_change_its_images_and_labels():
    """The accuracy of real images was once 0.14 in a report, because their labels were others'."""

    def quality(images, labels):
        labels += 1
        images.zero_()
        return bright(images, labels)

    images, labels = shapes().train.batch(8, rng(0))
    before = images.clone(), labels.clone()
    reward = CheckedReward("mine", quality)
    assert torch.equal(reward(images, labels), torch.full((8,), 0.5))
    reward(images.clone().requires_grad_(), labels)
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])


# One scale


def grey_of(values):
    """Images of these greys in [0, 1], which `grey` gives back."""
    values = torch.as_tensor(values)
    return (2 * values - 1)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()


def grey(images, labels):
    return (images.mean((1, 2, 3)) + 1) / 2


def like_clip(images, labels):
    """All images within a tenth, as CLIP has them."""
    return 0.58 + 0.1 * grey(images, labels)


def no_labels(images):
    return torch.zeros(len(images), dtype=torch.long)


def on_scale_of(values, quality):
    images = grey_of(values)
    return ScaledReward(CheckedReward("mine", quality), images, no_labels(images))


def test_the_students_quantiles_become_a_tenth_a_half_and_nine_tenths(capsys):
    """A reward that its author multiplied by ten differs in nothing."""
    values = torch.linspace(0.2, 0.7, 501)
    for quality in (grey, like_clip):
        scaled = on_scale_of(values, quality)
        q = scaled(grey_of([0.25, 0.45, 0.65]), torch.zeros(3, dtype=torch.long))
        torch.testing.assert_close(q, torch.tensor([0.1, 0.5, 0.9]), atol=1e-3, rtol=0)
    assert "0.605, 0.625 and 0.645, become about 0.1, 0.5 and 0.9" in capsys.readouterr().out


def test_a_scaled_reward_keeps_the_order_and_lets_gradient_through():
    scaled = on_scale_of(torch.linspace(0.4, 0.6, 100) ** 2, grey)  # a skew one
    x = grey_of(torch.linspace(0.1, 0.5, 50)).requires_grad_()
    q = scaled(x, no_labels(x))
    assert (q.diff() > 0).all() and 0 < q.min() and q.max() < 1
    low, high = scaled(grey_of(scaled.quantiles[::2]), torch.zeros(2, dtype=torch.long)).logit()
    assert float(high - low) == pytest.approx(2 * math.log(9), rel=1e-3)
    assert torch.autograd.grad(q.sum(), x)[0].flatten(1).max(1).values.min() > 0


def test_one_step_no_longer_wins_with_a_torn_image():
    """CLIP's reward is 0.58 for a torn image and 0.68 for a good one: speed paid more than that."""
    torn_and_good, steps = grey_of([0.0, 1.0]), torch.tensor([1, 8])
    labels, settings = torch.tensor([0, 0]), tiny(steps=16, alpha=0.5)
    torn, good = total_reward(like_clip(torn_and_good, labels), steps, settings)
    assert torn > good
    scaled = on_scale_of(torch.linspace(0.5, 1.0, 101), like_clip)
    q = scaled(torn_and_good, labels)
    assert q[0] < 0.01 and q[1] > 0.9
    torn, good = total_reward(q, steps, settings)
    assert good > 10 * torn


def test_a_reward_that_cannot_tell_the_students_images_apart_is_refused():
    values = torch.full((100,), 0.3)
    values[:8] = 0.9
    said = "--reward mine gave 0.3 for 80 % of the student's images: nothing to learn"
    with pytest.raises(InputError, match=said):
        on_scale_of(values, grey)


def test_the_students_images_are_the_same_every_time():
    student = MAR(tiny(), shapes().classes, "student").eval()
    for p in student.parameters():  # an untrained one draws the same whatever its noise
        torch.nn.init.normal_(p, std=0.1)
    images, labels = student_images(student, shapes())
    torch.rand(3)
    again, same_labels = student_images(student, shapes())
    assert torch.equal(images, again) and torch.equal(labels, same_labels)
    assert images.shape == (512, 3, 8, 8) and images.std(0).min() > 0


# Several rewards, and one held out


def test_words_of_reward_are_names_and_weights():
    assert reward_weights(["embedded"]) == {"embedded": 1}
    assert reward_weights(["clip=7", "a.b:c=3"]) == reward_weights(["a.b:c=0.3", "clip=.7"])
    assert reward_weights(["clip=7", "a.b:c=3"]) == {"clip": 0.7, "a.b:c": 0.3}
    assert reward_weights(["fit", "clip"]) == {"fit": 0.5, "clip": 0.5}


@pytest.mark.parametrize("weight", ["", "x", "0", "-1", "nan", "inf", "1=2"])
def test_a_weight_is_a_positive_number(weight):
    with pytest.raises(InputError, match=f"--reward clip={weight}: the weight must be a positive"):
        reward_weights(["fit=1", f"clip={weight}"])


def test_a_reward_is_named_once():
    with pytest.raises(InputError, match="--reward clip is given twice"):
        reward_weights(["clip=0.5", "fit", "clip"])
    with pytest.raises(InputError, match="--reward clp: expected embedded"):
        reward_weights(["clp=0.5"])


def test_what_is_held_out_is_a_reward_that_is_not_climbed():
    check_held_out("fit", {"embedded": 1.0})
    with pytest.raises(InputError, match="--held-out clip: --reward names it, too"):
        check_held_out("clip", {"clip": 0.7, "fit": 0.3})
    with pytest.raises(InputError, match="--held-out clp: expected embedded"):
        check_held_out("clp", {"embedded": 1.0})


def test_a_held_out_function_names_its_option(module):
    with pytest.raises(InputError, match=f"--held-out {module}:nan gave values from nan"):
        make_reward(f"{module}:nan", tiny(), shapes(), CPU, option="--held-out")
    held_out = f"{module}:counted"  # it has no gradient and needs none
    make_reward(held_out, tiny(method="backprop"), shapes(), CPU, option="--held-out")


def test_the_mean_of_rewards_is_weighted_and_all_but_embedded_are_scaled():
    def dark(images, labels):
        return 1 - like_clip(images, labels)

    rewards = {"embedded": grey, "a:dark": dark, "a:grey": grey}
    rewards = {name: CheckedReward(name, quality) for name, quality in rewards.items()}
    images = grey_of(torch.linspace(0.2, 0.7, 501))
    weights = {"a:dark": 0.3, "a:grey": 0.1, "embedded": 0.6}
    mean = MeanReward(weights, rewards, images, no_labels(images))
    x = grey_of([0.25, 0.65])
    expected = 0.3 * torch.tensor([0.9, 0.1]) + 0.1 * torch.tensor([0.1, 0.9])
    expected += 0.6 * torch.tensor([0.25, 0.65])
    torch.testing.assert_close(mean(x, no_labels(x)), expected, atol=1e-3, rtol=0)
    assert mean.raw == {"a:dark": rewards["a:dark"], "a:grey": rewards["a:grey"]}
    assert mean.described()["embedded"] == {"weight": 0.6}
    quantiles = pytest.approx([0.25, 0.45, 0.65], abs=1e-5)
    assert mean.described()["a:grey"] == {"weight": 0.1, "quantiles": quantiles}
    assert rewards["a:dark"].quality is dark  # the dictionary that was given is as it was


# In the script


def test_rl_climbs_a_mix_and_logs_what_is_held_out(module, tmp_path, capsys):
    mix = ["--reward", f"{module}:bright=3", "fit=1"]
    out = ["--held-out", f"{module}:counted", "--out", str(tmp_path / "run")]
    metrics = train_rl.main([*SHORT, *mix, *out])
    bright, fit = metrics["rewards"][f"{module}:bright"], metrics["rewards"]["fit"]
    assert (bright["weight"], fit["weight"]) == (0.75, 0.25)
    lines = [line for line in read_log(tmp_path / "run") if "quality_mean" in line]
    assert {"held_out", "raw fit", f"raw {module}:bright"} <= set(lines[-1])
    assert 0.4 < lines[0][f"raw {module}:bright"] < 0.6  # as it is; the scaled one goes to 0 and 1
    assert 0 < metrics["rl"]["before"]["quality"] < 1

    again = train_rl.main([*SHORT, *mix, *out, "--resume"])
    assert again["rewards"] == metrics["rewards"]
    kept = json.loads((tmp_path / "run" / "choices.json").read_text())
    assert kept["reward"] == f"fit=0.25 {module}:bright=0.75"
    other = [*SHORT, "--reward", f"{module}:bright", "fit", *out, "--resume"]
    begun = f"was begun with --reward {kept['reward']}, not fit=0.5 {module}:bright=0.5"
    assert begun in error_of(train_rl.main, other, capsys)
    other = [*SHORT, *mix, "--out", tmp_path / "run", "--resume"]
    assert f"--held-out {module}:counted, not None" in error_of(train_rl.main, other, capsys)


def test_rl_climbs_a_function_and_trains_each_network_once(module, tmp_path, monkeypatch):
    """Both networks were once trained again at every --resume."""
    train, trained = quality_net.train_quality_net, []

    def counted(name, *rest):
        trained.append(name)
        return train(name, *rest)

    monkeypatch.setattr(quality_net, "train_quality_net", counted)
    argv = [*SHORT, "--reward", f"{module}:bright", "--out", str(tmp_path / "run")]
    metrics = train_rl.main(argv)
    assert sorted(trained) == ["judge", "reward"]
    assert set(metrics["minutes"]) == {"teacher", "student", "policy"}
    seen = sys.modules[module].calls
    assert len(seen) > 3
    assert min(x.min() for x in seen) >= -1
    assert max(x.max() for x in seen) <= 1
    # by RLMonitor, then by compare_schedules
    low, median, high = metrics["rewards"][f"{module}:bright"]["quantiles"]
    judged = [0.5 + 0.1 * x.mean((1, 2, 3)) for x in seen if len(x) == metrics["n"]]
    scaled = [((r - median) * 2 * math.log(9) / (high - low)).sigmoid().mean() for r in judged]
    before = metrics["rl"]["before"]["quality"]
    assert any(before == pytest.approx(float(q), abs=1e-4) for q in scaled)

    again = train_rl.main([*argv, "--resume"])
    assert sorted(trained) == ["judge", "reward"]
    assert again["sensitivity"] == metrics["sensitivity"]


def test_a_reward_that_breaks_later_stops_the_training(module, tmp_path, capsys):
    new = ["--reward", f"{module}:nan_later", "--out", tmp_path / "run"]
    error = error_of(train_rl.main, [*SHORT, "--rl-iters", 4, *new], capsys, code=1)
    assert f"policy, step 2: --reward {module}:nan_later gave values from nan" in error
    assert read_checkpoint(tmp_path / "run" / "policy.pt")["step"] == 2


@pytest.mark.parametrize("role", ["the reward", "the held-out reward"])
def test_calibration_says_what_the_network_is_there_for(role, capsys):
    """Under --reward fit it was once called the reward."""
    torch.manual_seed(0)
    student = MAR(tiny(), shapes().classes, "student").eval()
    calibrate(reward_net(), *student_images(student, shapes()), role)
    assert capsys.readouterr().out.startswith(f"{role} (embedded) is calibrated: its odds x ")
