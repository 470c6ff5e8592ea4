"""Statements about section 10 of maskrl.py: the updates of PolicyGradient."""

import inspect

import pytest
import torch
from helpers_methods import (
    ACTIONS,
    FOUR_PROMPTS,
    always_one,
    brightness,
    distance_between,
    flatten,
    last_minus_first,
    policy_gradient,
)

import maskrl
from maskrl import group_advantages, one_step, rollout

TWO_PROMPTS = torch.tensor([0, 1])


def rollouts_of_the_first_update(model, labels=TWO_PROMPTS):
    """What training.update(0, labels, 3) learns from."""
    return rollout(model, brightness, labels, (3, "rollout", 0))


@pytest.mark.parametrize(
    "training, names",
    [
        (maskrl.TeacherTraining, ["self", "step", "x", "labels", "seed"]),
        (maskrl.Distillation, ["self", "step", "x", "labels", "seed"]),
        (maskrl.PolicyGradient, ["self", "step", "labels", "seed"]),
        (maskrl.RewardBackpropagation, ["self", "step", "labels", "seed"]),
    ],
)
def test_all_trainings_are_updated_in_the_same_way(training, names):
    assert list(inspect.signature(training.update).parameters) == names


# What learns --------------------------------------------------------------------------------------


@ACTIONS
def test_the_policy_starts_as_the_student_and_the_reference_stays_so(student, action):
    """Of the action z only the noise policy learns, and the generator remains the student."""
    rates = {"rl_lr": 1e-2, "noise_lr": 1e-2, "schedule_lr": 1e-2}
    training = policy_gradient(student, action=action, **rates)
    training.update(0, FOUR_PROMPTS, 3)
    assert distance_between(student, training.reference) == 0
    assert (distance_between(student, training.model) > 0) == (action == "x")
    assert distance_between(training.reference.schedule, training.model.schedule) > 0
    if action == "z":
        before, after = training.reference.noise_policy, training.model.noise_policy
        assert distance_between(before, after) > 0
    assert (student.kind, training.model.kind) == ("student", "policy")
    assert student.schedule is None


@ACTIONS
def test_rl_on_a_policy_is_refused(student, action):
    """Its noise policy would silently be forgotten."""
    policy = policy_gradient(student, action=action).model
    with pytest.raises(ValueError, match="not from a policy"):
        policy_gradient(policy, action=action)


def test_generator_and_schedule_have_an_optimizer_each_and_no_parameter_in_common(student):
    """Each parameter that learns is in exactly one of them, so the losses need no weights."""
    for action, name in (("x", "generator"), ("z", "noise")):
        training = policy_gradient(student, action=action)
        held = {
            key: {id(p) for group in optimizer.param_groups for p in group["params"]}
            for key, optimizer in training.optimizers.items()
        }
        assert set(held) == {name, "schedule"}
        assert not held[name] & held["schedule"]
        assert held["schedule"] == {id(p) for p in training.model.schedule.parameters()}
        learn = {id(p) for p in training.model.parameters() if p.requires_grad}
        assert held[name] | held["schedule"] == learn


def test_a_constant_reward_moves_nothing(student):
    rates = {"rl_lr": 1e-2, "noise_lr": 1e-2, "schedule_lr": 1e-2}
    training = policy_gradient(student, always_one, alpha=0.0, **rates)
    metrics = training.update(0, TWO_PROMPTS, 3)
    assert metrics["frac_zero_advantage"] == 1
    assert metrics["reward_std"] == 0
    assert "grad_norm" not in metrics
    assert distance_between(training.model, training.reference) == 0


# The ratio of learner and sampler -----------------------------------------------------------------


@ACTIONS
def test_ratio_is_one_and_kl_zero_on_the_first_pass(student, action):
    metrics = policy_gradient(student, action=action).update(0, TWO_PROMPTS, 3)
    assert abs(metrics["ratio"] - 1) < 1e-4
    assert metrics["log_ratio"] < 1e-3
    assert metrics["kl"] < 1e-6
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    "overrides",
    [
        {"action": "x"},
        {"action": "x", "rl_steps": "all"},
        {"action": "x", "route": 2.0},
        {"action": "x", "learn_steps": False},
        {"rl_steps": "all"},
        {"rl_steps": "random"},
        {"rl_steps": "first"},
        {"route": 2.0},
        {"route": 2.0, "temperature": 0.7},
        {"action": "x", "temperature": 0.7},
        {"learn_steps": False},
    ],
)
def test_every_kind_of_update_starts_at_ratio_one(student, overrides):
    """Also where some rows explore with a larger sigma: they are scored under the one that drew
    them."""
    training = policy_gradient(student, **overrides)
    assert (training.model.schedule is None) == ("learn_steps" in overrides)
    metrics = training.update(0, FOUR_PROMPTS, 3)
    assert metrics["log_ratio"] < 1e-3
    assert metrics["clip_fraction"] == 0
    assert metrics["grad_norm"] > 0
    assert 0 <= metrics["frac_not_prefix"] <= (overrides.get("rl_steps") not in ("all", "first"))


def test_later_updates_on_the_same_rollouts_move_the_ratio(student):
    """What is logged of log r is the first update's: 0 if sampler and learner agree."""
    training = policy_gradient(student, learn_steps=False)
    noise_policy = training.model.noise_policy
    training.optimizers["noise"] = torch.optim.SGD(noise_policy.parameters(), 0.3)
    metrics = training.update(0, TWO_PROMPTS, 3)
    assert metrics["log_ratio"] < 1e-3
    assert metrics["kl"] > 1e-6
    assert metrics["ratio"] != 1


def scored(student, monkeypatch, **overrides):
    """Tokens x [N, D] and sigma [N] that an update on four prompts takes log pi of."""
    calls, token_log_prob = [], maskrl.token_log_prob

    def watched(x, mean, sigma):
        calls.append((x, sigma))
        return token_log_prob(x, mean, sigma)

    with monkeypatch.context() as patch:
        patch.setattr(maskrl, "token_log_prob", watched)
        policy_gradient(student, **overrides).update(0, FOUR_PROMPTS, 3)
    return calls[0]


def test_z_is_scored_at_the_temperature_that_it_was_drawn_at(student, monkeypatch):
    """From 1, at the first iteration, down towards the setting."""
    drawn, sigma = scored(student, monkeypatch, rl_steps="all", temperature=0.2)
    assert sigma.max() == 1 and 0.2 < sigma.min() < 0.4
    for cool in (sigma < 0.7, sigma >= 0.7):
        unit = drawn[cool] / sigma[cool, None]
        assert unit.std().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("action, sigma", [("x", 0.3), ("z", 1.0)])
def test_routed_rows_are_scored_under_the_sigma_that_drew_them(student, monkeypatch, action, sigma):
    """The plain one, and one for each of the two routed prompts."""
    _, plain = scored(student, monkeypatch, action=action)
    assert plain.unique().tolist() == pytest.approx([sigma])
    drawn, routed = scored(student, monkeypatch, action=action, route=2.0)
    assert len(routed.unique()) == 3
    assert routed.max() > 1.03 * sigma
    if action == "z":  # of mean 0 here, so that what was drawn shows under which sigma
        widest = drawn[routed == routed.max()]
        assert widest.std().item() == pytest.approx(routed.max().item(), rel=0.1)


@ACTIONS
def test_only_tokens_that_the_optimised_steps_revealed_count(student, monkeypatch, action):
    overrides = {"action": action, "learn_steps": False, "steps": 16}
    drawn, _ = scored(student, monkeypatch, critical_steps=2, **overrides)
    everything, _ = scored(student, monkeypatch, rl_steps="all", **overrides)
    assert len(everything) == 16 * 16  # rollouts of tokens
    assert len(drawn) == 16 * 2


# The gradient, against densities written out by hand ----------------------------------------------


def log_density_of_the_images(model, tokens, trace, labels, A):
    """sum over rows and tokens of A log N(token; g, sigma^2), forwards, as it was generated."""
    total, hidden = 0.0, torch.ones(len(labels), 16, dtype=torch.bool)
    rank = trace.order.argsort(1)
    for count in trace.counts.T:
        reveal = hidden & (rank >= (hidden.sum(1) - count)[:, None])
        c = model.context(tokens * ~hidden[..., None], hidden, labels)[reveal]
        mean = one_step(model.head, trace.z[reveal], c, model.settings.noise_ratio)
        log_density = torch.distributions.Normal(mean, 0.3).log_prob(tokens[reveal]).sum(1)
        total = total + (A[:, None].expand(reveal.shape)[reveal] * log_density).sum()
        hidden = hidden & ~reveal
    return total


def clipped(gradient):
    """As optimizer_step clips it."""
    return gradient * min(1, 1 / gradient.norm())


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_the_gradient_of_all_revealed_tokens_is_that_of_the_log_probability_of_the_image(
    student, micro_batch
):
    """With fixed steps: against the log-density written out over the trajectory by hand."""
    overrides = {"action": "x", "rl_steps": "all", "learn_steps": False, "beta": 0.0, "steps": 4}
    training = policy_gradient(student, micro_batch=micro_batch, **overrides)
    training.update(0, TWO_PROMPTS, 3)
    model = training.model
    ours = flatten(p.grad for p in model.parameters())

    rollouts = rollouts_of_the_first_update(model)
    A = group_advantages(rollouts.quality, 4)
    total = log_density_of_the_images(model, rollouts.tokens, rollouts.trace, rollouts.labels, A)
    mean_over_channels = -total / (8 * 16 * 12)
    parameters = list(model.parameters())
    exact = torch.autograd.grad(mean_over_channels, parameters, materialize_grads=True)
    torch.testing.assert_close(ours, clipped(flatten(exact)), atol=1e-5, rtol=1e-3)


def test_the_gradient_of_the_noise_policy_is_that_of_the_log_probability_of_the_noise(student):
    """Against log N(z; mu(c), 1) of every token in the context that it was drawn in, by hand."""
    overrides = {"rl_steps": "all", "learn_steps": False, "beta": 0.0, "steps": 4}
    training = policy_gradient(student, policy_epochs=1, **overrides)
    model, policy = training.model, training.model.noise_policy
    torch.nn.init.normal_(policy.net[-1].weight, std=0.1)  # for a mu that differs among tokens
    rollouts = rollouts_of_the_first_update(model)
    training.update(0, TWO_PROMPTS, 3)
    ours = flatten(p.grad for p in policy.parameters())

    trace, tokens = rollouts.trace, rollouts.tokens
    A = group_advantages(rollouts.quality, 4)
    total, (masks, reveals) = 0.0, trace.masks()
    for k in range(4):
        c = model.context(tokens * ~masks[:, k, :, None], masks[:, k], rollouts.labels)
        c, eps = c[reveals[:, k]].detach(), trace.z[reveals[:, k]]
        mu = policy(c)
        z = (eps + mu).detach()
        drawn = one_step(model.head, z, c, model.settings.noise_ratio)
        torch.testing.assert_close(drawn, tokens[reveals[:, k]], atol=1e-4, rtol=1e-4)
        log_density = torch.distributions.Normal(mu, 1.0).log_prob(z).sum(1)
        total = total + (A[:, None].expand(-1, 16)[reveals[:, k]] * log_density).sum()
    exact = clipped(flatten(torch.autograd.grad(-total / (8 * 16 * 12), list(policy.parameters()))))
    assert exact.norm() > 1e-3
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-3)


# The schedule -------------------------------------------------------------------------------------


def test_several_updates_of_the_schedule_go_further_until_the_clipped_ratio_stops_them(student):
    """The gradient of a clipped ratio is zero beyond 1 +- epsilon."""
    state = torch.cat([torch.zeros(1, 32), torch.ones(1, 2)], 1)

    def moved(epochs, clip_ratio):
        torch.manual_seed(0)  # the same schedule policy to start from
        overrides = {"clip_ratio": clip_ratio, "policy_epochs": epochs, "alpha": 1.0}
        training = policy_gradient(student, always_one, **overrides)
        schedule = training.model.schedule
        training.optimizers["schedule"] = torch.optim.SGD(schedule.parameters(), 0.005)
        metrics = training.update(0, TWO_PROMPTS, 3)
        before = training.reference.schedule.log_probs(state)
        log_ratio = schedule.log_probs(state) - before
        return log_ratio[0, :5].abs().max().item(), metrics["schedule_clipped"]

    once, four_times = moved(1, 0.2)[0], moved(4, 0.2)[0]
    clipped, unclipped = moved(60, 0.2), moved(60, 1e6)
    assert 0 < once < four_times < clipped[0] < 0.5 * unclipped[0]
    assert clipped[1] > 0.1
    assert unclipped[1] == 0


def watch_the_schedule(training):
    """A list that gets each Trace and the advantages from which the schedule would learn."""
    seen = []

    def watched(trace, A):
        seen.append((trace, A))
        return 0.0

    training.schedule_update = watched
    return seen


@ACTIONS
def test_the_schedule_learns_from_rollouts_without_noise_on_the_tokens(student, action):
    images = []

    def quality(x, labels):
        images.append(x)
        return brightness(x, labels)

    training = policy_gradient(student, quality, action=action)
    seen = watch_the_schedule(training)
    training.update(0, FOUR_PROMPTS, 3)
    ((trace, _),) = seen
    torch.testing.assert_close(images[-1], maskrl.to_images(trace.means, student.settings))
    assert len(images) == (2 if action == "x" else 1)


@ACTIONS
def test_where_the_schedule_learns_alone_a_group_shares_z(student, action):
    """So that its rewards differ by their schedules alone, also where z is the action of RL."""
    training = policy_gradient(student, action=action, rl_iters=5)
    seen = watch_the_schedule(training)
    training.update(5, FOUR_PROMPTS, 3)
    ((trace, _),) = seen
    z = trace.z.view(len(FOUR_PROMPTS), -1, *trace.z.shape[1:])  # [P, G, L, D]
    assert (z == z[:, :1]).all()
    assert not torch.equal(z[0], z[1])


@ACTIONS
def test_where_the_schedule_learns_alone_a_prompt_weighs_as_its_rewards_differ(student, action):
    def quality(images, labels):
        """1; for class 2, of every other image 0."""
        return torch.where(labels == 2, torch.arange(len(labels)) % 2, 1.0)

    training = policy_gradient(student, quality, action=action, rl_iters=5, alpha=0.01)
    seen = watch_the_schedule(training)
    training.update(5, torch.tensor([2, 0, 1, 0]), 3)
    ((_, A),) = seen
    spread = A.view(4, -1).std(1)
    assert spread[0] > 0.5
    assert (spread[1:] < 0.02).all() and (spread[1:] > 0).any()


@ACTIONS
def test_in_the_last_phase_only_the_schedule_changes(student, action):
    """To suit the generator as it has become, which the update before still changed."""
    rates = {"rl_lr": 1e-2, "noise_lr": 1e-2, "schedule_lr": 1e-3}
    training = policy_gradient(student, action=action, rl_iters=1, schedule_iters=4, **rates)
    assert training.iters == 5
    model, moved = training.model, []
    learner = next(name for name in training.optimizers if name != "schedule")
    learner = training.optimizers[learner].param_groups[0]["params"]
    for step in range(5):
        before, schedule = flatten(learner).detach(), flatten(model.schedule.parameters()).detach()
        training.update(step, TWO_PROMPTS, 3)
        after = flatten(model.schedule.parameters())
        moved.append((not torch.equal(flatten(learner), before), not torch.equal(after, schedule)))
    assert moved == [(True, True)] + [(False, True)] * 4


def test_in_the_last_phase_four_times_the_prompts_are_wanted(student):
    training = policy_gradient(student, prompts=5, rl_iters=3, schedule_iters=2)
    assert [training.prompts(step) for step in range(5)] == [5, 5, 5, 20, 20]
    fixed = policy_gradient(student, prompts=5, rl_iters=3, schedule_iters=2, learn_steps=False)
    assert fixed.iters == 3


def test_in_the_last_phase_the_learning_rate_falls_to_zero(student):
    training = policy_gradient(student, schedule_lr=0.1, rl_iters=2, schedule_iters=4, group=2)
    rates = []
    for step in range(8):  # two more than it has
        training.update(step, TWO_PROMPTS, 3)
        rates.append(training.optimizers["schedule"].param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.075, 0.05, 0.025, 0.0, 0.0])


# Learning -----------------------------------------------------------------------------------------


@ACTIONS
def test_rl_raises_a_reward_that_is_easy_to_raise(student, action):
    """Brightness: the policy gradient must find it, through the same update that training uses."""
    rates = {"rl_lr": 2e-3, "noise_lr": 2e-2, "schedule_lr": 1e-3}
    overrides = {"beta": 0.0, "alpha": 0.0, "group": 8, "steps": 4}
    training = policy_gradient(student, action=action, **rates, **overrides)
    curve = [training.update(i, FOUR_PROMPTS, 0)["quality"] for i in range(12)]
    assert last_minus_first(curve) > 0.02


def test_the_schedule_learns_to_be_fast_when_only_speed_counts(student):
    overrides = {"alpha": 1.0, "group": 8, "schedule_lr": 0.02, "policy_epochs": 1}
    training = policy_gradient(student, always_one, **overrides)
    curve = [training.update(i, FOUR_PROMPTS, 0)["steps"] for i in range(25)]
    assert last_minus_first(curve) < -2


def test_what_is_logged_of_the_parts_of_a_batch_is_a_mean_and_the_largest_log_ratio(
    student, monkeypatch
):
    """Means over actions weigh the parts by their numbers; a ratio far from 1 must not drown."""
    training = policy_gradient(student, action="x", micro_batch=1, rl_steps="all")
    own_loss, parts = maskrl.policy_loss, []

    def numbered(log_prob, *args):
        loss, metrics = own_loss(log_prob, *args)
        parts.append(len(log_prob))
        value = torch.tensor(float(len(parts)))
        return loss, dict.fromkeys(metrics, value)

    monkeypatch.setattr(maskrl, "policy_loss", numbered)
    rollouts = rollouts_of_the_first_update(student)
    A = torch.linspace(-1, 1, len(rollouts.labels))
    counted = torch.ones_like(rollouts.trace.order, dtype=torch.bool)
    metrics = training.generator_update(rollouts, A, counted)
    assert len(parts) > 2 and metrics["log_ratio"] == len(parts)
    mean = sum(n * (i + 1) for i, n in enumerate(parts)) / sum(parts)
    assert metrics["kl"] == pytest.approx(mean)


def test_predictions_are_freed_before_the_policy_learns(student, settings, monkeypatch):
    """They are the largest part of a Trace: [B, T, L, D]."""
    kept = []

    def note(training, rollouts, A, counted):
        kept.append(rollouts.trace.predictions)
        return {}

    monkeypatch.setattr(maskrl.PolicyGradient, "noise_update", note)
    student.settings = settings(rl_steps="critical", learn_steps=False)
    training = maskrl.PolicyGradient(student, student.settings, brightness, torch.zeros(1, 16, 12))
    training.update(0, torch.tensor([0, 1]), seed=0)
    assert kept == [None]
