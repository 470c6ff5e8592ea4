"""Rewards, networks and closed forms that the tests of maskrl.py share."""

import pytest
import torch
from conftest import tiny

import maskrl

ACTIONS = pytest.mark.parametrize("action", ["z", "x"])
FOUR_PROMPTS = torch.tensor([0, 1, 2, 0])
STILL = 1e-30  # a learning rate that moves nothing


def brightness(images, labels):
    return images.mean((1, 2, 3)).sigmoid()


def always_one(images, labels):
    return torch.ones(len(labels))


def flatten(tensors):
    return torch.cat([t.flatten() for t in tensors])


def distance_between(a, b):
    """The sum of |p - q| over the parameters that both networks have."""
    b = dict(b.named_parameters())
    return sum((p - b[name]).abs().sum().item() for name, p in a.named_parameters() if name in b)


def class_sensitive_teacher(**overrides):
    """Initialised as a teacher is, except for its head: the class makes more of a difference."""
    model = maskrl.MAR(tiny(**overrides), ["a", "b", "c"])
    for p in model.head.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def gaussian_eps(m, s):
    """eps-prediction of x_0 ~ N(m, s^2), noised to time t; m and s may carry gradient:
    E[eps | x_t] = sigma (x_t - alpha m) / (alpha^2 s^2 + sigma^2)."""

    def eps(x_t, t):
        alpha, sigma = (v.double() for v in maskrl.alpha_sigma(t))
        return sigma * (x_t - alpha * m) / (alpha**2 * s**2 + sigma**2)

    return eps


def policy_gradient(student, quality=brightness, training=maskrl.PolicyGradient, **overrides):
    """RL on a copy of the student; unless learning rates are given, nothing moves."""
    still = {"noise_lr": STILL, "rl_lr": STILL, "schedule_lr": STILL}
    settings = tiny(**{"explore": 0.3, "rl_iters": 100, **still, **overrides})
    return training(student, settings, quality, torch.zeros(1, 16, 12))


def last_minus_first(curve):
    return sum(curve[-5:]) / 5 - sum(curve[:5]) / 5
