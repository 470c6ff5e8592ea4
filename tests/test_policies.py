"""Statements about sections 8 and 9 of maskrl.py: critical steps and policies."""

import math
from dataclasses import replace

import pytest
import torch

import maskrl
from maskrl import (
    Sampling,
    SchedulePolicy,
    Settings,
    critical_steps,
    generate,
    information_gain,
    reveal_counts,
    rng,
    schedule_state,
    select_steps,
    total_reward,
)

# 8 Critical steps ---------------------------------------------------------------------------------


def predictions_at(degrees):
    """Predictions [1, T, 2] at these angles to the final image (1, 0)."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)[None]


def test_information_gain_of_a_trace_made_by_hand():
    """Predictions at 90, 60 and 0 degrees to the final image: S = 0, 1/2, 1, and 1 at the end."""
    final, predictions = torch.tensor([[1.0, 0.0]]), predictions_at([90.0, 60.0, 0.0])
    expected = torch.tensor([[0.5, 0.5, 0.0]])
    torch.testing.assert_close(information_gain(predictions, final), expected)
    shifted = information_gain(predictions + 4.0, final + 4.0, mean=4.0)
    torch.testing.assert_close(shifted, expected, atol=1e-5, rtol=0)


def test_a_step_back_is_as_critical_as_a_step_forward():
    """V_k = |S_{k+1} - S_k|: from 0 to 60 degrees S falls by 1/2, which the last step restores."""
    gain = information_gain(predictions_at([0.0, 60.0]), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(gain, torch.tensor([[0.5, 0.5]]))


def test_critical_steps_are_chosen_per_sample_and_never_beyond_a_shorter_row():
    none = -math.inf
    gain = torch.tensor([[0.1, 0.5, 0.3, 0.0], [0.9, 0.2, none, none], [0.0, 0.1, 0.2, 0.3]])
    expected = [[1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1]]
    assert critical_steps(gain, 3).int().tolist() == expected
    final, valid = torch.randn(2, 5), torch.tensor([[True, True, True], [True, False, False]])
    gain = information_gain(torch.randn(2, 3, 5), final, valid)
    assert gain[1, 1:].tolist() == [none] * 2
    assert critical_steps(gain, 2).sum(1).tolist() == [2, 1]


def test_only_the_chosen_number_of_steps_is_optimised(student, settings):
    s, sampling = settings(critical_steps=3, steps=8), Sampling(steps=8)
    tokens, trace = generate(student, [0, 1, 2], sampling, trace="predictions")

    def selected(name):
        return select_steps(trace, tokens, replace(s, rl_steps=name), 0.0, rng(0))

    assert selected("all").all()
    assert selected("first").int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]] * 3
    assert selected("random").sum(1).tolist() == [3, 3, 3]
    critical = selected("critical")
    assert critical.sum(1).tolist() == [3, 3, 3]
    gain = information_gain(trace.predictions, tokens)
    least_chosen = gain.masked_fill(~critical, 9).min(1).values
    most_left_out = gain.masked_fill(critical, -9).max(1).values
    assert (least_chosen >= most_left_out).all()


@pytest.mark.parametrize("rl_steps", ["critical", "random", "first", "all"])
def test_only_steps_that_an_image_took_are_optimised(policy, settings, rl_steps):
    """Under a learned schedule images take different numbers of steps; each has K_c optimised, or
    all if it took fewer."""
    s = settings(critical_steps=10, rl_steps=rl_steps)
    labels, sampling = torch.arange(12) % 3, Sampling(greedy=False)
    tokens, trace = generate(policy, labels, sampling, trace="predictions")
    assert trace.steps.min() < 10 < trace.steps.max()
    steps = select_steps(trace, tokens, s, 0.0, rng(0))
    assert not (steps & (trace.counts == 0)).any()
    expected = trace.steps if rl_steps == "all" else trace.steps.clamp(max=10)
    assert torch.equal(steps.sum(1), expected)


def test_an_unknown_way_to_select_steps_is_refused(student):
    """It was once taken for the first steps."""
    tokens, trace = generate(student, [0, 1], Sampling(steps=4), trace="predictions")
    with pytest.raises(KeyError, match="critcal"):
        select_steps(trace, tokens, Settings(rl_steps="critcal"), 0.0, rng(0))


# 9 Policies ---------------------------------------------------------------------------------------


def states_of(hidden, left, length, K, width=4):
    """States [n, width + 2] with so many hidden tokens and steps left, of mean context 0."""
    hidden, left = torch.tensor(hidden) / length, torch.tensor(left) / K
    return torch.cat([torch.zeros(len(hidden), width), hidden[:, None], left[:, None]], 1)


def test_the_schedule_sees_the_mean_context_of_hidden_tokens_their_fraction_and_the_steps_left():
    c, mask = torch.randn(2, 4, 3), torch.tensor([[True, False, True, False], [False] * 4])
    state = schedule_state(c, mask, 0.75)
    expected = torch.cat([c[0, [0, 2]].mean(0), torch.tensor([0.5, 0.75])])
    torch.testing.assert_close(state[0], expected)
    assert state[1].tolist() == [0, 0, 0, 0, 0.75]  # nothing is hidden or divided by 0


@pytest.mark.parametrize("K", [7, 3, 1])
def test_probabilities_of_all_schedules_sum_to_one(K):
    """Every way to reveal 7 tokens within K steps, by a policy whose choice depends on the past."""
    policy = SchedulePolicy(width=4, length=7, max_steps=K)
    torch.nn.init.normal_(policy.net[-1].weight)

    def total(history, hidden):
        if not hidden:
            return 1.0
        assert len(history) < K
        state = states_of([hidden], [K - len(history)], 7, K)
        state[:, :4] = torch.randn(1, 4, generator=rng(history))
        p = policy.log_probs(state).exp()[0]
        possible = [n for n in range(1, 8) if p[n - 1] > 0]
        assert max(possible) <= hidden
        return sum(p[n - 1].item() * total((*history, n), hidden - n) for n in possible)

    assert abs(total((), 7) - 1) < 1e-5


def played(policy, n, generator=None):
    """The tokens that are still hidden [K, n] after each step of so many schedules."""
    L, K = policy.length, policy.max_steps
    hidden, after = torch.full((n,), L), []
    for k in range(K):
        counts = policy.select(states_of(hidden.tolist(), [K - k] * n, L, K), generator)
        hidden = (hidden - counts).clamp(min=0)
        after.append(hidden)
    return torch.stack(after)


@pytest.mark.parametrize("length, K", [(16, 16), (16, 9), (64, 32), (64, 5), (256, 64), (4096, 99)])
def test_a_schedule_starts_near_the_cosine_schedule(length, K):
    """Its medians; even where fewer than L / K tokens are revealed."""
    hidden = played(SchedulePolicy(width=4, length=length, max_steps=K), 1)[:, 0]
    cosine = length - torch.tensor(reveal_counts(length, K)).cumsum(0)
    assert (hidden - cosine).abs().max() <= max(1, length / 8)
    assert abs((hidden > 0).sum() - (cosine > 0).sum()) <= max(1, K / 16)


def test_an_early_image_stays_early_and_a_late_one_catches_up():
    """Early ones once waited for the cosine schedule, so that nothing but K steps was explored."""
    policy = SchedulePolicy(width=4, length=16, max_steps=8)
    assert reveal_counts(16, 8) == [1, 1, 1, 2, 3, 2, 3, 3]  # hidden: 16, 15, 14, 13, 11, 8, 6, 3
    on_time, early, late = (13, 3), (8, 3), (13, 5)
    states = states_of(*zip(*((hidden, 8 - k) for hidden, k in (on_time, early, late))), 16, 8)
    assert policy.select(states).tolist() == [2, 3, 7]


@pytest.mark.parametrize("length, K", [(16, 16), (49, 24), (64, 32), (256, 64)])
def test_a_new_schedule_explores_fewer_steps(length, K):
    hidden = played(SchedulePolicy(width=4, length=length, max_steps=K), 200, rng(0))
    steps = 1 + (hidden > 0).sum(0).float()
    assert hidden[-1].sum() == 0
    assert 0.5 * K < steps.mean() < 0.96 * K and steps.std() > 0.03 * K


def test_a_step_may_reveal_any_number_of_hidden_tokens_and_the_last_one_all():
    policy = SchedulePolicy(width=4, length=16, max_steps=8)
    state = states_of([16, 10, 10, 1], [8, 2, 1, 5], 16, 8)
    possible = policy.log_probs(state).isfinite()
    ranges = [(1, 16), (1, 10), (10, 10), (1, 1)]
    for row, (least, most) in zip(possible, ranges):
        assert (row.nonzero()[:, 0] + 1).tolist() == list(range(least, most + 1))


def test_a_schedule_never_stops_exploring():
    """Its width has a floor: with 1/8 the first counts were soon always the same."""
    policy = SchedulePolicy(width=4, length=16, max_steps=16)
    policy.net[-1].bias.data[1] = -50.0
    p = policy.log_probs(states_of([16], [16], 16, 16))[0].exp()
    ratio = (p[1] / p[0]).item()  # of revealing two tokens and one
    assert ratio == pytest.approx(math.exp(-8 * math.log(2) ** 2) / 2, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 16])
@pytest.mark.parametrize("greedy", [True, False])
def test_a_schedule_that_sees_nan_reveals_all_that_is_hidden(policy, steps, greedy):
    """A training that diverged: images are finished, and their reward says what has happened."""
    policy.settings = replace(policy.settings, steps=steps)
    maskrl.add_schedule(policy)
    torch.nn.init.constant_(policy.mask_token, math.nan)
    tokens, trace = generate(policy, [0, 1], Sampling(greedy=greedy), trace=True)
    assert tokens.isnan().all() and trace.counts.tolist() == [[16], [16]]


def test_a_schedule_draws_counts_with_its_probabilities():
    policy = SchedulePolicy(width=4, length=16, max_steps=16)
    state = states_of([16], [16], 16, 16)
    n = torch.arange(1, 17)
    expected = torch.exp(-2 * n.log() ** 2) / n  # log n is normal around 0, with w = 1/2
    expected = expected / expected.sum()
    torch.testing.assert_close(policy.log_probs(state)[0].exp(), expected)
    drawn = policy.select(state.expand(20_000, -1), rng(0))
    frequency = drawn.bincount(minlength=17)[1:] / 20_000
    torch.testing.assert_close(frequency, expected, atol=0.012, rtol=0)


def test_speed_is_one_for_one_step_and_falls_evenly():
    speed = maskrl.speed(torch.tensor([1, 4, 16]), 16)
    torch.testing.assert_close(speed, torch.tensor([1.0, 13 / 16, 1 / 16]))


def test_a_product_pays_nothing_for_fast_and_wrong(settings):
    """A sum would: measured, it was exploited within 150 updates. Speeds are 1, 1/4 and 1/16."""
    quality, steps = torch.tensor([0.0, 0.64, 1.0]), torch.tensor([1, 13, 16])
    reward = total_reward(quality, steps, settings(steps=16, alpha=0.5))
    torch.testing.assert_close(reward, torch.tensor([0.0, 0.32, 0.25]))
    assert torch.equal(total_reward(quality, steps, settings(alpha=0.0)), quality)
