"""The reward network and the judge's, and how a resumed run keeps them."""

import pytest
import torch
from conftest import tiny
from helpers_rewards import Attack, reward_net, shapes

from workbench import quality_net
from workbench.data import load_data
from workbench.quality_net import QualityNet, kept_quality_net, train_quality_net


def test_quality_lies_between_zero_and_one_and_its_gradient_reaches_the_pixels():
    net, x = QualityNet("reward", 8, 3), torch.rand(5, 3, 8, 8, requires_grad=True)
    quality = net.quality(x, torch.tensor([0, 1, 2, 0, 1]))
    assert quality.shape == (5,)
    assert ((quality > 0) & (quality <= 1)).all()
    gradient = torch.autograd.grad(quality.sum(), x)[0]
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


@torch.no_grad()
def test_quality_asks_for_the_class_and_for_an_undamaged_image():
    net, x = QualityNet("reward", 8, 2), torch.rand(5, 3, 8, 8)
    labels = torch.zeros(5, dtype=torch.long)
    net.classify.bias[0] = net.detect.bias[0] = 20.0
    assert net.quality(x, labels).min() > 0.99
    assert net.quality(x, 1 - labels).max() < 0.01
    net.detect.bias[1] = 40.0
    assert net.quality(x, labels).max() < 0.01


def test_colours_that_no_image_has_do_not_pay():
    """The policy was once paid for colours beyond [-1, 1]: clipped, its 0.62 were 0.57."""
    net, labels = QualityNet("reward", 8, 3), torch.zeros(5, dtype=torch.long)
    x = 4 * torch.rand(5, 3, 8, 8) - 2
    assert torch.equal(net.quality(x, labels), net.quality(x.clamp(-1, 1), labels))


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_images_of_one_token_of_two_pixels_are_enough(name):
    """The smallest that the settings allow; of one pixel it once ended in a traceback."""
    settings = tiny(image_size=2, patch=2, steps=1, judge_iters=2)
    net = train_quality_net(name, load_data(settings).train, settings, "cpu")
    assert net.quality(torch.zeros(2, 3, 2, 2), torch.tensor([0, 1])).isfinite().all()


def test_calibration_lifts_the_median_to_one_half_and_keeps_the_order():
    net = QualityNet("reward", 8, 10)
    x, labels = torch.randn(101, 3, 8, 8), torch.arange(101) % 10
    before = net.quality(x, labels)
    assert before.median() < 0.1  # of ten classes and five kinds, untrained
    net.calibrate(x, labels)
    after = net.quality(x, labels)
    assert abs(float(after.median().detach()) - 0.5) < 1e-4
    assert torch.equal(after.argsort(), before.argsort())
    odds = net.odds
    net.calibrate(x, labels)  # from where it started, not on top
    assert net.odds == odds


def test_a_reward_that_is_generous_enough_is_left_alone():
    net, labels = QualityNet("reward", 8, 1), torch.zeros(50, dtype=torch.long)
    with torch.no_grad():
        net.detect.bias[0] = 10.0
    net.calibrate(torch.randn(50, 3, 8, 8), labels)
    assert net.odds == 1


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_both_networks_are_frozen_and_know_classes_and_damage(name):
    net = train_quality_net(name, shapes().train, tiny(), "cpu")
    features, classes, kinds = net(torch.zeros(2, 3, 8, 8))
    assert features.shape == (2, 64)
    assert classes.shape == (2, 9)
    assert kinds.shape == (2, 5)
    assert not any(p.requires_grad for p in net.parameters())


# Kept for --resume


@pytest.fixture
def trained(monkeypatch):
    """The names of the networks that are trained from here on."""
    trained, train = [], quality_net.train_quality_net

    def counted(name, *rest):
        trained.append(name)
        return train(name, *rest)

    monkeypatch.setattr(quality_net, "train_quality_net", counted)
    return trained


def kept(path, name="reward", resume=True, part="train", **settings):
    return kept_quality_net(path, name, getattr(shapes(), part), tiny(**settings), "cpu", resume)


def test_a_resumed_run_keeps_its_network(tmp_path, trained):
    """Both networks were once trained again at every --resume."""
    path = tmp_path / "new" / "reward.pt"
    first = kept(path)
    again = kept(path)
    assert trained == ["reward"]
    expected, found = reward_net().state_dict(), again.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    x, labels = torch.rand(5, 3, 8, 8), torch.arange(5)
    assert torch.equal(again.quality(x, labels), first.quality(x, labels))
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert [file.name for file in path.parent.iterdir()] == ["reward.pt"]  # no half of a file


def test_the_calibration_is_not_kept(tmp_path):
    """It is of the student, and chosen each time from where it starts."""
    net = kept(tmp_path / "reward.pt")
    net.odds = 7.0
    assert kept(tmp_path / "reward.pt").odds == 1.0


def test_a_new_run_trains_its_network(tmp_path, trained):
    kept(tmp_path / "reward.pt", seed=1)
    kept(tmp_path / "reward.pt", resume=False)
    kept(tmp_path / "reward.pt")
    assert trained == ["reward", "reward"]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"judge_iters": 6},
        {"flip": True},
        {"patch": 4, "steps": 4},
        {"name": "judge"},
        {"part": "judge"},
    ],
)
def test_a_network_that_was_trained_in_another_way_is_trained_again(
    tmp_path, trained, capsys, change
):
    path = tmp_path / "net.pt"
    kept(path)
    net = kept(path, **change)
    assert len(trained) == 2
    name = change.get("name", "reward")
    assert f"the {name} network is trained again: {path} is of another" in capsys.readouterr().out
    found = kept(path, **change).state_dict()  # which has taken the place of the first
    assert len(trained) == 2
    assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("damage", ["cut", "junk", "attack", "list", "no weights", "misshapen"])
def test_a_damaged_file_is_replaced(tmp_path, trained, capsys, damage):
    path, hacked = tmp_path / "reward.pt", tmp_path / "hacked"
    kept(path)
    content = torch.load(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "junk":
        path.write_bytes(b"junk")
    elif damage == "attack":
        torch.save(content | {"model": Attack(hacked)}, path)
    elif damage == "list":
        torch.save([content], path)
    elif damage == "no weights":
        torch.save({"trained_with": content["trained_with"]}, path)
    else:
        content["model"]["classify.bias"] = torch.zeros(3)
        torch.save(content, path)
    net = kept(path)
    assert len(trained) == 2
    assert "the reward network is trained again: " in capsys.readouterr().out
    assert not hacked.exists()
    weights = reward_net().state_dict()
    assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())
    kept(path)
    assert len(trained) == 2
