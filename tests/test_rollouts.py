"""Statements about section 10 of maskrl.py: advantages, the loss of GRPO, and rollouts."""

import math

import pytest
import torch
from conftest import random_model
from helpers_methods import ACTIONS, always_one, brightness, flatten, policy_gradient

import maskrl
from maskrl import group_advantages, policy_loss, rng, rollout, token_kl, token_log_prob

# The loss -----------------------------------------------------------------------------------------


def test_advantages_have_zero_mean_and_unit_std_in_a_group():
    A = group_advantages(torch.randn(24), 8).view(3, 8)
    torch.testing.assert_close(A.mean(1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(A.std(1), torch.ones(3), atol=1e-4, rtol=0)


def test_equal_rewards_give_no_gradient():
    A = group_advantages(torch.full((8,), 0.37), 8)
    log_prob = torch.randn(8, requires_grad=True)
    loss, _ = policy_loss(log_prob, log_prob.detach(), A)
    assert torch.autograd.grad(loss, log_prob)[0].abs().max() == 0


def test_undivided_advantages_weigh_groups_as_their_rewards_differ():
    R = torch.randn(4, 6, generator=rng(0)) * torch.tensor([[0.0], [0.1], [1.0], [3.0]])
    A = group_advantages(R.flatten(), 6, divide=False).view(4, 6)
    torch.testing.assert_close(A, R - R.mean(1, keepdim=True))
    assert group_advantages(torch.full((12,), 0.37), 6, divide=False).eq(0).all()


def test_policy_loss_has_the_exact_gradient_on_a_toy():
    """Actions x ~ N(mu, sigma^2), reward -(x - 2)^2: the gradient of E[R] in mu is -2 (mu - 2), by
    quadrature, with the weights in the advantage."""
    sigma, mu = 0.3, torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    u = torch.linspace(-7, 7, 401, dtype=torch.float64)
    w = torch.exp(-(u**2) / 2) / torch.exp(-(u**2) / 2).sum()
    x = mu.detach() + sigma * u
    log_prob = token_log_prob(x[:, None], mu, sigma)
    advantage = -((x - 2) ** 2) * w * len(x)
    loss, metrics = policy_loss(log_prob, log_prob.detach(), advantage)
    gradient = torch.autograd.grad(loss, mu)[0]
    assert abs(gradient.item() - 2 * (0.5 - 2)) < 1e-6
    assert metrics["ratio"] == 1
    assert metrics["log_ratio"] == 0


def test_policy_loss_clips_what_would_gain_more_and_not_what_would_lose():
    log_prob = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    A = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, metrics = policy_loss(log_prob, torch.zeros(4), A, clip_ratio=0.2)
    expected = -(1.2 + math.exp(-0.5) - math.exp(0.5) - 0.8) / 4
    assert abs(loss.item() - expected) < 1e-6
    assert metrics["clip_fraction"] == 1
    gradient = torch.autograd.grad(loss, log_prob)[0]
    assert gradient[[0, 3]].tolist() == [0, 0]
    assert (gradient[[1, 2]] != 0).all()


def test_kl_is_that_of_two_gaussians_and_beta_weighs_it():
    mean, mean_ref, sigma = torch.randn(6, 5), torch.randn(6, 5), 0.3
    P = torch.distributions.Normal(mean, sigma)
    Q = torch.distributions.Normal(mean_ref, sigma)
    kl = token_kl(mean, mean_ref, sigma)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(P, Q).mean(1))
    loss, _ = policy_loss(torch.zeros(6), torch.zeros(6), torch.zeros(6), kl, beta=0.5)
    torch.testing.assert_close(loss, 0.5 * kl.mean())


def test_token_log_prob_is_the_channel_mean_of_the_normal_density():
    x, mean = torch.randn(6, 5), torch.randn(6, 5)
    log_density = torch.distributions.Normal(mean, 0.3).log_prob(x)
    torch.testing.assert_close(token_log_prob(x, mean, 0.3), log_density.mean(1))
    sigma = torch.linspace(0.1, 0.6, 6)  # or one sigma a token
    log_density = torch.distributions.Normal(mean, sigma[:, None]).log_prob(x)
    torch.testing.assert_close(token_log_prob(x, mean, sigma), log_density.mean(1))


# Rollouts -----------------------------------------------------------------------------------------


@ACTIONS
@pytest.mark.parametrize("explore", [True, False])
def test_rollouts_of_a_group_share_what_is_no_action(policy, settings, action, explore):
    """Class, order and, unless it is the action, z. Where only the schedule explores, the tokens
    are those that the generator means."""
    policy.settings = settings(action=action)
    rollouts = rollout(policy, always_one, torch.tensor([0, 1]), 3, explore=explore)
    trace = rollouts.trace

    def is_shared(values):
        assert not torch.equal(values[0], values[4])
        return all(torch.equal(row, values[4 * (i // 4)]) for i, row in enumerate(values))

    assert is_shared(trace.order)
    assert is_shared(rollouts.labels)
    assert is_shared(trace.z) == (action == "x" or not explore)
    assert not torch.equal(rollouts.tokens[0], rollouts.tokens[1])
    noisy = not torch.equal(rollouts.tokens, trace.means)
    assert noisy == (action == "x" and explore)


def test_routing_raises_the_sigma_of_the_less_uncertain_half_of_the_prompts(student, settings):
    student.settings = settings(route=2.0, explore=0.01, action="x", order="random")
    labels = torch.tensor([0, 1, 2, 1])
    sigma_scale = maskrl.routing(student, labels, rng(0))
    assert (sigma_scale > 1).sum() == 2
    assert ((sigma_scale >= 1) & (sigma_scale <= 3)).all()
    rollouts = rollout(student, always_one, labels, 3)
    sigma = rollouts.sigma[:, 0]
    assert torch.equal(rollouts.sigma, sigma[:, None].expand(16, 16))
    routed = sigma > 0.0101
    assert routed.sum() == 2 * student.settings.group
    std = (rollouts.tokens - rollouts.trace.means).std((1, 2))
    torch.testing.assert_close(std, sigma, rtol=0.3, atol=0)  # drawn as it says
    order = rollouts.trace.order.view(4, 4, 16)
    same_order = (order == order[:, :1]).all(2)[:, 1:].all(1)
    assert torch.equal(same_order, ~routed.view(4, 4)[:, 0])


def test_routing_knows_which_prompts_are_uncertain(student, settings, monkeypatch):
    """Predictions of standard deviation label + 1: the classes 0 and 1 are routed, the more the
    surer the head is, by 1 + 2 exp(-log(std / explore))."""
    student.settings = settings(route=2.0, explore=0.5)

    def context(tokens, mask, labels):
        return (labels + 1.0)[:, None, None].expand(-1, 16, 32)

    def one_step(head, z, c, noise_ratio):
        return z * c[:, :1]

    monkeypatch.setattr(student, "context", context)
    monkeypatch.setattr(maskrl, "one_step", one_step)
    sigma_scale = maskrl.routing(student, torch.tensor([2, 0, 2, 1]), rng(0), draws=200)
    assert sigma_scale[0] == sigma_scale[2] == 1
    expected = 1 + 2 * torch.tensor([0.5, 0.25])
    torch.testing.assert_close(sigma_scale[[1, 3]], expected, rtol=0.02, atol=0)


# Rewards ------------------------------------------------------------------------------------------

TRAININGS = pytest.mark.parametrize(
    "training", [maskrl.PolicyGradient, maskrl.RewardBackpropagation]
)
TWO_PROMPTS = torch.tensor([0, 1])


def one_column(images, labels):
    return brightness(images, labels)[:, None]


def the_mean(images, labels):
    return brightness(images, labels).mean()


def one_too_few(images, labels):
    return brightness(images, labels)[1:]


def a_list(images, labels):
    return brightness(images, labels).tolist()


def nan_for_one(images, labels):
    return brightness(images, labels).index_fill(0, torch.tensor([1]), math.nan)


def infinite(images, labels):
    return brightness(images, labels) + math.inf


def training_of_a_generator(training, quality):
    """A training of all weights with large learning rates."""
    overrides = {"action": "x", "rl_lr": 1.0, "learn_steps": False, "micro_batch": 3}
    return policy_gradient(random_model("student"), quality, training, **overrides)


@TRAININGS
@pytest.mark.parametrize("quality", [one_column, the_mean, one_too_few, a_list])
def test_a_reward_that_is_not_one_number_per_image_is_refused(training, quality):
    """The mean of the images, say, would silently reward all of them alike."""
    with pytest.raises(ValueError, match="the reward returned .*, not a tensor of . numbers"):
        training_of_a_generator(training, quality).update(0, TWO_PROMPTS, 3)


@TRAININGS
@pytest.mark.parametrize("quality", [nan_for_one, infinite])
def test_a_reward_that_is_not_finite_is_refused_before_any_weight_changes(training, quality):
    rl = training_of_a_generator(training, quality)
    before = flatten(rl.model.parameters())
    with pytest.raises(FloatingPointError, match="the reward is infinite or NaN"):
        rl.update(0, TWO_PROMPTS, 3)
    assert torch.equal(flatten(rl.model.parameters()), before)


@TRAININGS
def test_a_reward_that_changes_labels_in_place_changes_no_class(training, monkeypatch):
    """The updates would otherwise compute contexts of other classes than those that were drawn."""

    def careless(images, labels):
        labels.fill_(2)
        return brightness(images, labels)

    labels, calls = TWO_PROMPTS.clone(), []
    rl = training_of_a_generator(training, careless)
    context = rl.model.context

    def watched(tokens, mask, labels, hidden=None):
        calls.append(labels.clone())
        return context(tokens, mask, labels, hidden)

    monkeypatch.setattr(rl.model, "context", watched)
    rl.update(0, labels, 3)
    assert torch.equal(labels, TWO_PROMPTS)
    assert set(torch.cat(calls).tolist()) == {0, 1}
    rollouts = rollout(rl.model, careless, labels, 3)
    assert rollouts.labels.tolist() == [0] * 4 + [1] * 4
