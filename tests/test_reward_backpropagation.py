"""Statements about section 10 of maskrl.py: the reward's own gradient through a generation."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import random_model
from helpers_methods import ACTIONS, FOUR_PROMPTS, brightness, flatten, policy_gradient

import maskrl
from maskrl import Noise, PolicyGradient, RewardBackpropagation, Sampling, generate, replay


class SavedForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Counts the numbers that autograd keeps."""

    def __init__(self):
        self.numbers = 0
        super().__init__(self.pack, self.unpack)

    def pack(self, tensor):
        self.numbers += tensor.numel()
        return tensor

    def unpack(self, tensor):
        return tensor


def replayed(model, labels, tokens, trace, keep):
    """Gradient of mean x^2 in the head by a replay, and the numbers that it keeps for that."""
    saved = SavedForBackward()
    with saved:
        x, _ = replay(model, model, labels, trace, keep)
    torch.testing.assert_close(x, tokens, atol=1e-5, rtol=1e-4)
    gradient = torch.autograd.grad(x.square().mean(), list(model.head.parameters()))
    return flatten(gradient).double(), saved.numbers


def test_a_replay_repeats_the_generation_and_its_gradient_is_that_of_the_kept_steps():
    model = random_model("student", beta=0.0)
    labels, sampling = torch.tensor([0, 1, 2]), Sampling(steps=4)
    tokens, trace = generate(model, labels, sampling, trace=True)
    everything = torch.ones(3, 4, dtype=torch.bool)
    whole, memory = replayed(model, labels, tokens, trace, everything)
    direction = [torch.randn_like(p) for p in model.head.parameters()]

    @torch.no_grad()
    def moved(h):
        """Mean x^2 of the whole generation with the head moved by h."""
        other = deepcopy(model)
        for p, d in zip(other.head.parameters(), direction):
            p.add_(h * d)
        x = generate(other, labels, sampling, Noise(trace.order, trace.z))
        return float(x.double().square().mean())

    slope = (moved(1e-3) - moved(-1e-3)) / 2e-3
    assert abs(float(whole @ flatten(direction).double()) - slope) < 0.03 * abs(slope)
    last = torch.zeros_like(everything)
    last[:, -1] = True
    part, less = replayed(model, labels, tokens, trace, last)
    assert less < 0.5 * memory
    assert part.norm() > 0
    assert (part - whole).norm() > 0.05 * whole.norm()


def test_backpropagation_has_no_schedule_and_forgets_no_setting(student, settings):
    """It once switched learn_steps off in the settings, so that its checkpoint, given to GRPO, kept
    its fixed steps."""
    s, mean_image = settings(method="backprop"), torch.zeros(1, 16, 12)
    training = RewardBackpropagation(student, s, brightness, mean_image)
    assert training.model.schedule is None
    assert training.model.settings.learn_steps
    assert training.iters == s.rl_iters
    training = PolicyGradient(student, replace(s, method="grpo"), brightness, mean_image)
    assert training.model.schedule is not None


@ACTIONS
def test_the_rewards_own_gradient_raises_it_and_the_kl_holds_it(student, action):
    def climb(beta):
        overrides = {"beta": beta, "steps": 4, "rl_lr": 2e-3, "noise_lr": 2e-3, "action": action}
        training = policy_gradient(student, brightness, RewardBackpropagation, **overrides)
        curve = [training.update(0, FOUR_PROMPTS, 7)["quality"] for _ in range(6)]
        return curve[-1] - curve[0]

    free, held = climb(0.0), climb(3.0)
    assert free > 0.005
    assert held < 0.5 * free


def brightness_without_gradient(images, labels):
    return brightness(images.detach(), labels)


@ACTIONS
def test_a_reward_without_a_gradient_in_the_pixels_is_refused(student, action):
    """With a KL term training would go on, and learn nothing."""
    reward, overrides = brightness_without_gradient, {"action": action, "beta": 1.0, "steps": 4}
    training = policy_gradient(student, reward, RewardBackpropagation, **overrides)
    with pytest.raises(ValueError, match="no gradient in the pixels"):
        training.update(0, FOUR_PROMPTS, 7)


@pytest.mark.parametrize("rl_steps", ["critical", "random", "first", "all"])
def test_the_gradient_passes_through_the_selected_steps(student, monkeypatch, rl_steps):
    """K_c of them in every image, or all."""
    kept, replay = [], maskrl.replay

    def watched(model, reference, labels, trace, keep):
        kept.append(keep)
        return replay(model, reference, labels, trace, keep)

    monkeypatch.setattr(maskrl, "replay", watched)
    overrides = {"rl_steps": rl_steps, "steps": 4, "critical_steps": 2, "action": "x"}
    training = policy_gradient(student, brightness, RewardBackpropagation, **overrides)
    metrics = training.update(0, FOUR_PROMPTS, 7)
    assert torch.cat(kept).sum(1).tolist() == [4 if rl_steps == "all" else 2] * 16
    assert metrics["grad_norm"] > 0
    assert metrics["steps"] == 4
