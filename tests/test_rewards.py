"""The rewards that can be named, and what happens to those that do not work."""

import importlib
import os
import re
import sys
from dataclasses import replace

import pytest
import torch
from conftest import SHORT, error_of, tiny
from helpers_rewards import OUT_OF_MEMORY, Refused, reward_net, shapes

import train_rl
from maskrl import MAR, patchify, rng, unpatchify
from workbench import quality_net, rewards
from workbench.damage import blur
from workbench.data import COLOURS, draw_shapes, shape_masks, to_unit
from workbench.errors import InputError
from workbench.files import read_checkpoint
from workbench.rewards import CheckedReward, ShapeFit, calibrate, check_reward_name, make_reward

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
    return nan(images, labels) if len(calls) >= 5 else bright(images, labels)
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
    said = "--reward my:reward raised ConnectionError: no server"
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


# In the script


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
    judged = [float(0.5 + 0.1 * x.mean()) for x in seen if len(x) == metrics["n"]]
    before = metrics["rl"]["before"]["quality"]
    assert any(before == pytest.approx(q, abs=1e-5) for q in judged)

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
    calibrate(reward_net(), student, shapes(), role)
    assert capsys.readouterr().out.startswith(f"{role} (embedded) is calibrated: its odds x ")
