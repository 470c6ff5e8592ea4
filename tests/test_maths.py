"""Statements about the mathematics, in the order of maskrl.py."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

import maskrl
import train_distill
import train_rl
from maskrl import BASE


# Data and tokens


def test_patchify_is_inverted_exactly_and_keeps_raster_order():
    images = torch.randn(2, 3, 8, 8)
    tokens = maskrl.patchify(images, 2)
    assert tokens.shape == (2, 16, 12)
    assert torch.equal(maskrl.unpatchify(tokens, 2), images)
    assert torch.equal(tokens[:, 5].view(2, 3, 2, 2), images[:, :, 2:4, 2:4])


def test_shapes_are_the_same_for_a_seed_and_differ_within_a_class(settings):
    a, b = train_distill.load_data(settings()), train_distill.load_data(settings())
    assert len(a.classes) == 9 and torch.equal(a.train.images, b.train.images)
    assert not torch.equal(a.train.images, train_distill.load_data(settings(seed=1)).train.images)
    first = a.train.images[a.train.labels == 0]
    assert len({bytes(x.numpy().tobytes()) for x in first}) == len(first)


def test_shapes_have_their_colour_and_area():
    labels = torch.arange(9).repeat_interleave(50)
    x = train_distill.draw_shapes(labels, 64, generator=maskrl.rng(0)).float()
    bright = x.amax(1) > 100
    colour = torch.stack([x[i, :, bright[i]].mean(1).argmax() for i in range(len(x))])
    assert torch.equal(colour, labels // 3)
    share = bright.float().mean((1, 2)).view(9, 50).mean(1)
    r2 = 0.27**2 + 0.1**2 / 12  # mean of r^2
    expected = torch.tensor([math.pi, (2 * 0.88) ** 2, 3 * math.sqrt(3) * 0.6**2]) * r2  # circle, square, triangle
    torch.testing.assert_close(share.view(3, 3).mean(0), expected, rtol=0.08, atol=0)


def test_splits_are_disjoint_and_halves_balanced(settings):
    s = settings(difficulty=1)
    data = train_distill.load_data(s)
    parts = [{x.numpy().tobytes() for x in split.images} for split in (data.train, data.judge, data.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    a, b = data.test.balanced_halves(s.judge_n, maskrl.rng(1))
    assert torch.equal(a.labels.bincount(), b.labels.bincount()) and a.labels.bincount().unique().numel() == 1
    assert not {x.numpy().tobytes() for x in a.images} & {x.numpy().tobytes() for x in b.images}


# Model


def test_rows_with_different_numbers_of_hidden_tokens_come_out_as_if_alone(model):
    tokens, labels = torch.randn(6, 16, 12), torch.tensor([0, 1, 2, 3, 0, 1])
    mask = torch.stack([torch.randperm(16) < n for n in (16, 11, 7, 1, 0, 11)])
    together = model.context(tokens, mask, labels)
    alone = torch.cat([model.context(tokens[i:i + 1], mask[i:i + 1], labels[i:i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_context_depends_on_visible_tokens_and_class_but_not_on_hidden_ones(model):
    tokens, mask, labels = torch.randn(1, 16, 12), torch.arange(16)[None] < 6, torch.tensor([1])
    c = model.context(tokens, mask, labels)
    other = tokens + mask[..., None] * 5.0
    assert torch.equal(model.context(other, mask, labels), c)
    assert not torch.allclose(model.context(tokens + ~mask[..., None] * 5.0, mask, labels), c, atol=1e-3)
    assert not torch.allclose(model.context(tokens, mask, torch.tensor([2])), c, atol=1e-4)
    assert torch.equal(model.context(tokens, mask, torch.tensor([3])), model.context(tokens, mask))  # 3 = the null class


@pytest.mark.parametrize("how, low", [("uniform", 1), ("mar", 12), ("mixed", 1)])
def test_random_masks_have_the_stated_range_and_mean(how, low):
    hidden = maskrl.random_mask(20000, 16, how, maskrl.rng(0)).sum(1)
    assert hidden.min() == low and hidden.max() == 16
    if how == "uniform":
        torch.testing.assert_close(hidden.bincount(minlength=17)[1:] / 20000, torch.full((16,), 1 / 16), atol=0.008, rtol=0)
    if how == "mar":  # P(ratio > 15/16) of the truncated normal
        Phi = lambda x: (1 + math.erf(x / math.sqrt(2))) / 2
        expected = (Phi(0) - Phi(-0.0625 / 0.25)) / (Phi(0) - Phi(-0.3 / 0.25))
        assert abs(float((hidden == 16).float().mean()) - expected) < 0.012


# Diffusion


def test_q_sample_has_the_closed_form_mean_and_variance():
    n, t = 40000, 400
    bar = math.cos((401 / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    x_t = BASE.q_sample(torch.full((n, 1), 3.0), torch.full((n,), t), torch.randn(n, 1))
    assert abs(float(x_t.mean()) - 3 * math.sqrt(bar)) < 0.02
    assert abs(float(x_t.var()) / (1 - bar) - 1) < 0.03


def test_ancestral_sampling_recovers_a_gaussian_whose_optimal_eps_is_known():
    """For x_0 ~ N(m, s^2): E[eps | x_t] = sigma (x_t - alpha m) / (alpha^2 s^2 + sigma^2)."""
    m, s = 1.5, 0.4

    def head(x, t):
        alpha, sigma = (v.double() for v in BASE.alpha_sigma(t))
        eps = sigma * (x - alpha * m) / (alpha**2 * s**2 + sigma**2)
        return torch.cat([eps, torch.zeros_like(eps)], 1)

    z = torch.randn(20000, 1, dtype=torch.float64)
    generator = maskrl.rng(0)
    x = maskrl.Diffusion(250).sample(head, z, generator)
    assert abs(float(x.mean()) - m) < 0.02 and abs(float(x.std()) / s - 1) < 0.03
    cold = maskrl.Diffusion(250).sample(head, z, generator, temperature=0.5)
    assert float(cold.std()) < 0.9 * s
    clipped = maskrl.Diffusion(250).sample(head, z, generator, clip=(-1.5, 1.5))
    assert float(clipped.max()) <= 1.5


def test_one_step_generator_inverts_the_noising_of_a_point_mass():
    """If all data are x_0 = m, the optimal eps is (x_t - alpha m) / sigma, and one step lands on m from any z."""

    class Head:
        def eps(self, x, t, c):
            alpha, sigma = BASE.alpha_sigma(t)
            return (x - alpha * 0.7) / sigma

    x_0 = maskrl.one_step(Head(), torch.randn(50, 3), None, noise_ratio=2.5)
    torch.testing.assert_close(x_0, torch.full_like(x_0, 0.7), atol=1e-5, rtol=0)


def test_a_velocity_head_gives_eps_and_is_trained_on_the_velocity_error(model):
    """v = alpha eps - sigma x_0; the network's output o becomes eps_hat = sigma x_t + alpha o, and the loss is |v - o|^2."""
    x_0, eps, c, t = torch.randn(7, 12), torch.randn(7, 12), torch.randn(7, 32), torch.tensor([5, 100, 300, 500, 700, 900, 990])
    alpha, sigma = BASE.alpha_sigma(t)
    x_t = alpha * x_0 + sigma * eps
    eps_hat = model.head.eps(x_t, t, c)
    model.head.velocity = False
    o = model.head.eps(x_t, t, c)
    torch.testing.assert_close(eps_hat, sigma * x_t + alpha * o)
    model.head.velocity = True
    loss = maskrl.denoising_loss(model.head, x_0, c, t, eps)
    torch.testing.assert_close(loss, (alpha * eps - sigma * x_0 - o).square().mean(), rtol=1e-3, atol=0)


# Generation


def test_guidance_of_one_is_none_and_of_zero_drops_the_class(model):
    x, t, c, null = torch.randn(5, 12), torch.arange(5), torch.randn(5, 32), torch.randn(5, 32)
    out_c, out_u = model.head(x, t, c), model.head(x, t, null)
    torch.testing.assert_close(maskrl.guided(model.head, c, null, 1.0)(x, t), out_c, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(maskrl.guided(model.head, c, null, 0.0)(x, t)[:, :12], out_u[:, :12], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", [dict(steps=4, denoise_steps=1), dict(steps=3, denoise_steps=4, guidance=2.0), dict(denoise_steps=1)])
def test_same_seed_same_samples(model, how):
    maskrl.add_schedule(model)
    labels = torch.tensor([0, 1, 2, 0])
    a, trace = maskrl.generate(model, labels, **how, seed=5, trace=True)
    assert torch.equal(a, maskrl.generate(model, labels, **how, seed=5, trace=True)[0])
    assert not torch.equal(a, maskrl.generate(model, labels, **how, seed=6))
    assert trace.counts.sum(1).tolist() == [16] * 4


def test_denoising_steps_are_annealed_from_the_first_iteration_to_the_last(model, monkeypatch):
    lengths = []
    monkeypatch.setattr(maskrl, "Diffusion", lambda n: lengths.append(n) or maskrl.BASE.__class__(n))
    maskrl.generate(model, torch.tensor([0]), steps=4, denoise_steps=(8, 2))
    assert lengths == [8, 6, 4, 2]


@pytest.mark.parametrize("learned", [False, True])
def test_completing_an_image_keeps_what_is_known_and_sees_it(model, learned):
    if learned:
        maskrl.add_schedule(model)
    known, labels = torch.randn(3, 16, 12), torch.tensor([0, 1, 2])
    mask = torch.arange(16) % 3 == 0
    draw = lambda known: maskrl.generate(model, labels, denoise_steps=1, known=(known, mask), trace=True)
    tokens, trace = draw(known)
    assert torch.equal(tokens[:, ~mask], known[:, ~mask]) and not torch.isclose(tokens[:, mask], known[:, mask]).any(-1).all()
    assert (trace.counts.sum(1) == mask.sum()).all() and torch.equal(trace.masks()[0][:, 0], mask.expand(3, -1))
    other = torch.where(mask[:, None], known, -known)
    assert not torch.allclose(draw(other)[0][:, mask], tokens[:, mask])  # what is drawn depends on what is there
    assert torch.equal(draw(torch.where(mask[:, None], 7.0, known))[0], tokens)  # and not on what was under the mask


def test_a_trace_agrees_with_what_was_generated(model):
    maskrl.add_schedule(model)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    tokens, trace = maskrl.generate(model, labels, denoise_steps=1, seed=1, trace=True)
    mask, revealed = trace.masks()
    assert torch.equal(revealed.sum(2), trace.counts)
    assert torch.equal(revealed.sum(1), torch.ones(6, 16, dtype=torch.long))  # every token once
    for k in range(trace.counts.shape[1]):  # a token keeps the value it was revealed with
        assert torch.equal(trace.predictions[:, k][revealed[:, k]], tokens[revealed[:, k]])
        c = model.context(tokens, mask[:, k], labels)[revealed[:, k]]
        again = maskrl.one_step(model.head, trace.z[revealed[:, k]], c, model.settings.noise_ratio)
        torch.testing.assert_close(again, tokens[revealed[:, k]], atol=1e-4, rtol=1e-4)
    assert len(set(trace.steps.tolist())) > 1  # rows differ in their number of steps


# GSIM


def gaussian_eps(m, s):
    """eps-prediction of x_0 ~ N(m, s^2), noised to time t; m and s may carry gradient."""

    def eps(x_t, t):
        alpha, sigma = (v.double() for v in BASE.alpha_sigma(t))
        return sigma * (x_t - alpha * m) / (alpha**2 * s**2 + sigma**2)

    return eps


def mixture_eps(weights, means, s):
    """The same for a mixture of Gaussians of scale s (one dimension): sigma (x - alpha E[m | x]) / variance."""

    def eps(x_t, t):
        alpha, sigma = (v.double() for v in BASE.alpha_sigma(t))
        v = alpha**2 * s**2 + sigma**2
        log = torch.cat([math.log(w) - (x_t - alpha * m) ** 2 / (2 * v) for w, m in zip(weights, means)], 1)
        posterior = (log.softmax(1) * torch.tensor(means, dtype=torch.float64)).sum(1, keepdim=True)
        return sigma * (x_t - alpha * posterior) / v

    return eps


TIMES = torch.tensor([150, 400, 650])
TEACHERS = {
    "gaussian": gaussian_eps(0.3, 0.5),
    "guided": lambda x, t: 2 * gaussian_eps(0.3, 0.5)(x, t) - gaussian_eps(-0.2, 0.9)(x, t),  # u + s (c - u), s = 2
    "mixture": mixture_eps((0.3, 0.7), (-0.8, 0.9), 0.35),
}
DISTANCES = {"squared": maskrl.squared, "huber": lambda y: maskrl.pseudo_huber(y, 0.5)}


def grid(n=121, width=7.0):
    """Quadrature for two independent standard normals: points u, v [n^2, 1] and weights summing to one."""
    x = torch.linspace(-width, width, n, dtype=torch.float64)
    w = torch.exp(-(x**2) / 2)
    u, v = torch.meshgrid(x, x, indexing="ij")
    return u.reshape(-1, 1), v.reshape(-1, 1), ((w[:, None] * w) / w.sum() ** 2).flatten()


def divergence(theta, eps_p, distance, units="velocity"):
    """sum over t of E d(sigma_t / alpha_t (s_q - s_p)) for the student N(theta_0, theta_1^2), its exact score, by quadrature.

    In eps units it is E d(sigma_t (s_q - s_p))."""
    u, v, w = grid()
    total = 0.0
    for t in TIMES:
        t = t.repeat(len(u))
        alpha, sigma = (x.double() for x in BASE.alpha_sigma(t))
        x_t = alpha * (theta[0] + theta[1] * u) + sigma * v
        total = total + (w * distance((eps_p(x_t, t) - gaussian_eps(theta[0], theta[1])(x_t, t)) / (alpha if units == "velocity" else 1))[0]).sum()
    return total


def gsim_gradient(theta, eps_p, distance, score_gradient=False, loss=maskrl.gsim_loss):
    """Gradient in theta of the very gsim_loss that training uses, expectations by quadrature."""
    theta = theta.clone().requires_grad_(True)
    frozen = theta if score_gradient else theta.detach()
    u, v, w = grid()
    total = 0.0
    for t in TIMES:
        x_0 = theta[0] + theta[1] * u
        total = total + (w * loss(x_0, t.repeat(len(u)), v, gaussian_eps(frozen[0], frozen[1]), eps_p, distance)).sum()
    return torch.autograd.grad(total, theta)[0]


@pytest.mark.parametrize("units", ["velocity", "eps"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_gradient_equivalence_theorem(teacher, distance, units):
    """The gradient of L1 + L2 is that of the divergence, although no gradient enters the student's score function."""
    theta = torch.tensor([-0.1, 0.8], dtype=torch.float64, requires_grad=True)
    exact = torch.autograd.grad(divergence(theta, TEACHERS[teacher], DISTANCES[distance], units), theta)[0]
    ours = gsim_gradient(theta.detach(), TEACHERS[teacher], DISTANCES[distance], loss=partial(maskrl.gsim_loss, units=units))
    assert (ours - exact).norm() < 1e-2 * exact.norm()


def wrong_losses():
    """gsim_loss with one thing wrong, each of which must break the theorem."""

    gsim = maskrl.gsim_loss
    only = lambda terms: lambda *args: gsim(*args, terms=terms)
    detached = lambda distance: lambda y: (distance(y)[0], distance(y)[1].detach())
    return {"L1 dropped": only("L2"), "L2 dropped": only("L1"), "sign of L1": lambda *args: 2 * only("L2")(*args) - gsim(*args),
            "x_t detached": lambda x_0, *args: gsim(x_0.detach(), *args) + 0 * x_0.sum(),
            "d' detached": lambda *args: gsim(*args[:-1], detached(args[-1]))}


@pytest.mark.parametrize("wrong", wrong_losses())
def test_the_theorem_notices(wrong):
    theta = torch.tensor([-0.1, 0.8], dtype=torch.float64, requires_grad=True)
    exact = torch.autograd.grad(divergence(theta, TEACHERS["mixture"], maskrl.squared), theta)[0]
    broken = gsim_gradient(theta.detach(), TEACHERS["mixture"], maskrl.squared, loss=wrong_losses()[wrong])
    assert (broken - exact).norm() > 0.05 * exact.norm()


def test_gradient_into_an_exact_student_score_makes_L1_vanish_while_the_sum_stays_right():
    theta = torch.tensor([-0.1, 0.8], dtype=torch.float64, requires_grad=True)
    exact = torch.autograd.grad(divergence(theta, TEACHERS["gaussian"], maskrl.squared), theta)[0]
    total = gsim_gradient(theta.detach(), TEACHERS["gaussian"], maskrl.squared, score_gradient=True)
    L1 = gsim_gradient(theta.detach(), TEACHERS["gaussian"], maskrl.squared, True, wrong_losses()["L2 dropped"])
    assert (total - exact).norm() < 1e-2 * exact.norm() and L1.norm() < 1e-2 * exact.norm()


def test_pseudo_huber_derivative():
    y = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    for distance in (maskrl.pseudo_huber, maskrl.squared):
        d, d_prime = distance(y)
        torch.testing.assert_close(torch.autograd.grad(d.sum(), y)[0], d_prime)


def test_gsim_loss_lowers_the_divergence_between_two_gaussians():
    """A student N(mean, scale^2) in 8 channels, trained by samples alone, with the paper's r = 1e-5."""
    theta = torch.tensor([-0.5, 1.2], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.03)
    teacher, before = gaussian_eps(0.3, 0.5), divergence(theta, gaussian_eps(0.3, 0.5), maskrl.squared)
    for step in range(150):
        z, eps = torch.randn(2, 256, 8, dtype=torch.float64)
        t = torch.randint(20, 985, (256,))
        frozen = theta.detach().clone()
        maskrl.descend(maskrl.gsim_loss(theta[0] + theta[1] * z, t, eps, gaussian_eps(*frozen), teacher).mean(), optimizer)
    assert divergence(theta, teacher, maskrl.squared) < 0.02 * before
    torch.testing.assert_close(theta.detach().abs(), torch.tensor([0.3, 0.5], dtype=torch.float64), atol=0.06, rtol=0)


def test_gsim_update_trains_student_and_auxiliary_but_not_the_teacher(model, settings):
    from copy import deepcopy

    teacher, student, aux = deepcopy(model).requires_grad_(False), deepcopy(model), deepcopy(model)
    optimizers = {"student": torch.optim.Adam(student.parameters(), 1e-3), "aux": torch.optim.Adam(aux.parameters(), 1e-3)}
    teacher.settings = student.settings = settings(guidance=2.0)
    maskrl.gsim_update(teacher, student, aux, torch.randn(4, 16, 12), torch.tensor([0, 1, 2, 0]), optimizers, maskrl.rng(0))
    moved = lambda net: sum((a - b).abs().sum().item() for a, b in zip(net.parameters(), model.parameters()))
    assert moved(teacher) == 0 and moved(student) > 0 and moved(aux) > 0


# Critical steps


def test_information_gain_of_a_hand_made_trace():
    """Predictions at 90, 60 and 0 degrees to the final image: S = 0, 1/2, 1, and 1 after the last step."""
    final = torch.tensor([[1.0, 0.0]])
    angles = torch.tensor([90.0, 60.0, 0.0]).deg2rad()
    predictions = torch.stack([angles.cos(), angles.sin()], 1)[None]
    torch.testing.assert_close(maskrl.information_gain(predictions, final), torch.tensor([[0.5, 0.5, 0.0]]))
    shifted = maskrl.information_gain(predictions + 4.0, final + 4.0, mean=4.0)
    torch.testing.assert_close(shifted, torch.tensor([[0.5, 0.5, 0.0]]), atol=1e-5, rtol=0)


def test_critical_steps_are_chosen_per_sample_and_never_beyond_a_shorter_row():
    gain = torch.tensor([[0.1, 0.5, 0.3, 0.0], [0.9, 0.2, -math.inf, -math.inf], [0.0, 0.1, 0.2, 0.3]])
    assert maskrl.critical_steps(gain, 3).int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1]]
    final, valid = torch.randn(2, 5), torch.tensor([[True, True, True], [True, False, False]])
    gain = maskrl.information_gain(torch.randn(2, 3, 5), final, valid)
    assert gain[1, 1:].tolist() == [-math.inf] * 2
    assert maskrl.critical_steps(gain, 2).sum(1).tolist() == [2, 1]


# Schedule policy


def test_probabilities_of_all_schedules_sum_to_one():
    """Every way to reveal 7 tokens, with a policy whose choice depends on what was done so far."""
    policy = maskrl.SchedulePolicy(width=4, length=7, max_steps=7)
    torch.nn.init.normal_(policy.net[-1].weight)
    assert policy.counts.tolist() == [1, 2, 3, 4, 6, 7]
    state_after = lambda history: torch.randn(1, 5, generator=maskrl.rng(history))

    def total(history, left):
        if not left:
            return 1.0
        p = policy.log_probs(state_after(history), torch.tensor([left])).exp()[0]
        counts = policy.count(torch.arange(6), torch.full((6,), left))
        return sum(p[a].item() * total(history + (a,), left - int(counts[a])) for a in range(6) if p[a] > 0)

    assert abs(total((), 7) - 1) < 1e-5


def test_impossible_choices_have_probability_zero_and_the_longest_schedule_has_K_max_steps():
    policy = maskrl.SchedulePolicy(width=4, length=16, max_steps=8)
    assert policy.counts.tolist() == [2, 4, 6, 8, 12, 16]
    log = policy.log_probs(torch.zeros(3, 5), torch.tensor([16, 4, 1]))
    assert log.isinf().int().tolist() == [[0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]]
    torch.testing.assert_close(log[0].exp() * policy.counts, (log[0, 0].exp() * 2).expand(6))  # in proportion to 1 / count
    assert math.ceil(16 / int(policy.counts[0])) == 8


def test_speed_is_one_for_one_step_and_falls_evenly():
    torch.testing.assert_close(maskrl.speed(torch.tensor([1, 4, 16]), 16), torch.tensor([1.0, 13 / 16, 1 / 16]))


def test_a_product_pays_nothing_for_fast_and_wrong_but_a_sum_does(settings):
    q, steps = torch.tensor([0.0, 0.64, 1.0]), torch.tensor([1, 13, 16])  # of at most 16: speeds 1, 1/4 and 1/16
    torch.testing.assert_close(maskrl.total_reward(q, steps, settings(steps=16, alpha=0.5)), torch.tensor([0.0, 0.32, 0.25]))
    torch.testing.assert_close(maskrl.total_reward(q, steps, settings(steps=16, alpha=0.5, additive=True)), torch.tensor([0.5, 0.765, 1.03125]))


# Policy gradient


def test_advantages_have_zero_mean_in_a_group_and_equal_rewards_give_no_gradient():
    R = torch.randn(24)
    A = maskrl.group_advantages(R, 8).view(3, 8)
    torch.testing.assert_close(A.mean(1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(A.std(1), torch.ones(3), atol=1e-4, rtol=0)
    log_prob = torch.randn(8, requires_grad=True)
    loss, _ = maskrl.policy_loss(log_prob, log_prob.detach(), maskrl.group_advantages(torch.full((8,), 0.37), 8))
    assert torch.autograd.grad(loss, log_prob)[0].abs().max() == 0


def test_the_baseline_of_the_others_leaves_each_rollout_out_of_its_own():
    R = torch.randn(12)
    A = maskrl.group_advantages(R, 4, baseline="others", normalise=False)
    assert abs(A[5] - (R[5] - (R[4] + R[6] + R[7]) / 3)) < 1e-6
    torch.testing.assert_close(A, maskrl.group_advantages(R, 4, normalise=False) * 4 / 3)


def test_rollouts_below_the_floor_get_no_advantage_and_enter_no_mean():
    R = torch.tensor([1.0, 2.0, 3.0, -50.0, 7.0, 0.0, 0.0, 0.0])
    A = maskrl.group_advantages(R, 4, keep=R > 0)
    torch.testing.assert_close(A, torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]))  # of the second group only one is left


def test_policy_loss_has_the_exact_gradient_on_a_toy():
    """Actions x ~ N(mu, sigma^2), reward -(x - 2)^2: the gradient of E[R] in mu is -2 (mu - 2), by quadrature."""
    sigma, mu = 0.3, torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    u = torch.linspace(-7, 7, 401, dtype=torch.float64)
    w = torch.exp(-(u**2) / 2) / torch.exp(-(u**2) / 2).sum()
    x = mu.detach() + sigma * u
    log_prob = maskrl.token_log_prob(x[:, None], mu, sigma)
    loss, stats = maskrl.policy_loss(log_prob, log_prob.detach(), -((x - 2) ** 2) * w * len(x))  # weights in the advantage
    gradient = torch.autograd.grad(loss, mu)[0]
    assert abs(gradient.item() - 2 * (0.5 - 2)) < 1e-6
    assert stats["ratio"] == 1 and stats["log_ratio"] == 0


def test_policy_loss_clips_what_would_gain_more_and_not_what_would_lose():
    log_prob = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    A = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, stats = maskrl.policy_loss(log_prob, torch.zeros(4), A, clip_ratio=0.2)
    expected = -(1.2 + math.exp(-0.5) - math.exp(0.5) - 0.8) / 4
    assert abs(loss.item() - expected) < 1e-6 and stats["clip_fraction"] == 1
    gradient = torch.autograd.grad(loss, log_prob)[0]
    assert gradient[[0, 3]].tolist() == [0, 0] and (gradient[[1, 2]] != 0).all()


def test_kl_is_that_of_two_gaussians_and_beta_weighs_it():
    mean, ref, sigma = torch.randn(6, 5), torch.randn(6, 5), 0.3
    P, Q = torch.distributions.Normal(mean, sigma), torch.distributions.Normal(ref, sigma)
    kl = maskrl.token_kl(mean, ref, sigma)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(P, Q).mean(1))
    loss, stats = maskrl.policy_loss(torch.zeros(6), torch.zeros(6), torch.zeros(6), kl, beta=0.5)
    torch.testing.assert_close(loss, 0.5 * kl.mean())


def test_token_log_prob_is_the_channel_mean_of_the_normal_density():
    x, mean = torch.randn(6, 5), torch.randn(6, 5)
    torch.testing.assert_close(maskrl.token_log_prob(x, mean, 0.3), torch.distributions.Normal(mean, 0.3).log_prob(x).mean(1))


def rl_parts(model, settings, **overrides):
    model.settings = settings(explore=0.3, **overrides)
    reference = copy.deepcopy(model)
    generator = list(model.parameters())
    maskrl.add_schedule(model)
    optimizers = {"generator": torch.optim.SGD(generator, 0.0), "schedule": torch.optim.SGD(model.schedule.parameters(), 0.0)}
    return model, reference, optimizers


def test_ratio_is_one_and_kl_zero_on_the_first_pass(model, settings):
    model, reference, optimizers = rl_parts(model, settings)
    quality = lambda images, labels: images.mean((1, 2, 3)).sigmoid()
    stats = maskrl.rl_update(model, reference, quality, torch.tensor([0, 1]), 0.0, optimizers, 3)
    assert abs(stats["ratio"] - 1) < 1e-4 and stats["log_ratio"] < 1e-3 and stats["kl"] < 1e-6
    assert stats["grad_norm"] > 0


@pytest.mark.parametrize("how", [dict(rl_tokens="hidden"), dict(rl_tokens="fresh"), dict(rl_steps="all"), dict(rl_steps="random"),
                                 dict(route=2.0), dict(learn_steps=False)])
def test_every_kind_of_update_starts_at_ratio_one(model, settings, how):
    """Also where some rows explore with a larger sigma: they are scored under the one that drew them."""
    model, reference, optimizers = rl_parts(model, settings, **how)
    if not model.settings.learn_steps:
        model.schedule = None
    quality = lambda images, labels: images.mean((1, 2, 3)).sigmoid()
    stats = maskrl.rl_update(model, reference, quality, torch.tensor([0, 1, 2, 0]), 0.0, optimizers, 3)
    assert stats["log_ratio"] < 1e-3 and stats["clip_fraction"] == 0 and stats["grad_norm"] > 0


def scored(model, settings, monkeypatch, **how):
    """Tokens x and sigma that an update on four prompts takes the log-probability of, and what it logs."""
    model, reference, optimizers = rl_parts(copy.deepcopy(model), settings, **how)
    calls, real = [], maskrl.token_log_prob
    monkeypatch.setattr(maskrl, "token_log_prob", lambda x, mean, sigma: calls.append((x, sigma)) or real(x, mean, sigma))
    quality = lambda images, labels: images.mean((1, 2, 3)).sigmoid()
    stats = maskrl.rl_update(model, reference, quality, torch.tensor([0, 1, 2, 0]), 0.0, optimizers, 3)
    monkeypatch.setattr(maskrl, "token_log_prob", real)
    return *calls[0], stats


def test_which_tokens_count(model, settings, monkeypatch):
    tokens = {how: scored(model, settings, monkeypatch, rl_tokens=how)[0] for how in ("revealed", "hidden", "fresh")}
    assert len(tokens["revealed"]) < len(tokens["hidden"]) == len(tokens["fresh"])  # as many are hidden under a fresh mask
    assert not torch.equal(tokens["hidden"], tokens["fresh"])  # but others


def test_routed_rows_are_scored_under_the_sigma_that_drew_them(model, settings, monkeypatch):
    assert scored(model, settings, monkeypatch)[1].unique().tolist() == pytest.approx([0.3])
    sigmas = scored(model, settings, monkeypatch, route=2.0)[1].unique()
    assert len(sigmas) == 3 and sigmas.max() > 0.31  # the plain one, and one for each of the two hotter prompts


def test_the_quality_floor_leaves_rollouts_out(model, settings, monkeypatch):
    everything, _, unfiltered = scored(model, settings, monkeypatch)
    x, _, stats = scored(model, settings, monkeypatch, quality_floor=unfiltered["quality"])  # the mean: some lie below
    assert 0 < stats["filtered"] < 1 and unfiltered["filtered"] == 0 and len(x) < len(everything)


def test_the_gradient_of_all_revealed_tokens_is_that_of_the_log_probability_of_the_image(model, settings):
    """With fixed steps, sum over tokens of A grad log pi: against the log-density written out over the trajectory by hand."""
    model, reference, optimizers = rl_parts(model, settings, rl_steps="all", learn_steps=False, beta=0.0, steps=4)
    model.schedule = None
    quality = lambda images, labels: images.mean((1, 2, 3)).sigmoid()
    labels = torch.tensor([0, 1])
    maskrl.rl_update(model, reference, quality, labels, 0.0, optimizers, 3)
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    tokens, trace, labels, q, sigma = maskrl.rollout(model, quality, labels, 3)
    A, total, hidden = maskrl.group_advantages(q, 4), 0.0, torch.ones(8, 16, dtype=torch.bool)
    for count in trace.counts.T:  # forwards, as it was generated
        rank = trace.order.argsort(1)
        reveal = hidden & (rank >= (hidden.sum(1) - count)[:, None])
        c = model.context(tokens * ~hidden[..., None], hidden, labels)[reveal]
        mean = maskrl.one_step(model.head, trace.z[reveal], c, model.settings.noise_ratio)
        log_density = torch.distributions.Normal(mean, 0.3).log_prob(tokens[reveal]).sum(1)
        total = total + (A[:, None].expand(8, 16)[reveal] * log_density).sum()
        hidden = hidden & ~reveal
    exact = torch.autograd.grad(-total / (8 * 16 * 12), list(model.parameters()), allow_unused=True)
    exact = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(exact, model.parameters())])
    exact = exact * min(1, 1 / exact.norm())  # as descend clips it
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-3)


def test_only_the_chosen_number_of_steps_is_optimised(model, settings):
    s = settings(critical_steps=3, steps=8)
    tokens, trace = maskrl.generate(model, torch.tensor([0, 1, 2]), steps=8, denoise_steps=1, trace=True)
    pick = lambda how: maskrl.optimised_steps(trace, tokens, replace(s, rl_steps=how), 0.0, maskrl.rng(0))
    assert pick("first").int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]] * 3 and pick("all").all()
    assert pick("random").sum(1).tolist() == pick("critical").sum(1).tolist() == [3, 3, 3]
    gain = maskrl.information_gain(trace.predictions, tokens)
    assert (gain.masked_fill(~pick("critical"), 9).min(1).values >= gain.masked_fill(pick("critical"), -9).max(1).values).all()


@pytest.mark.parametrize("how", ["critical", "random", "first", "all"])
def test_only_steps_that_an_image_took_are_optimised(model, settings, how):
    """Under a learned schedule images take different numbers of steps; each has all of K_c optimised, or all that it took."""
    model.settings = s = settings(critical_steps=6, rl_steps=how)
    maskrl.add_schedule(model)
    tokens, trace = maskrl.generate(model, torch.arange(12) % 3, denoise_steps=1, trace=True)
    assert trace.steps.min() < 6 < trace.steps.max()
    steps = maskrl.optimised_steps(trace, tokens, s, 0.0, maskrl.rng(0))
    assert not (steps & (trace.counts == 0)).any()
    assert torch.equal(steps.sum(1), trace.steps if how == "all" else trace.steps.clamp(max=6))


def test_routing_heats_the_less_uncertain_half_of_the_prompts(model, settings):
    model.settings = settings(route=2.0, explore=0.01)
    heat = maskrl.routing(model, torch.tensor([0, 1, 2, 1]), maskrl.rng(0))
    assert (heat > 1).sum() == 2 and (heat >= 1).all() and (heat <= 3).all()
    tokens, trace, labels, _, sigma = maskrl.rollout(model, lambda x, y: torch.ones(len(y)), torch.tensor([0, 1, 2, 1]), 3)
    hot = sigma > 0.0101
    assert hot.sum() == 2 * model.settings.group
    spread = (tokens - trace.means).std((1, 2))
    torch.testing.assert_close(spread, sigma, rtol=0.3, atol=0)  # drawn under the sigma that it says
    same_order = (trace.order == trace.order[::4].repeat_interleave(4, 0)).all(1).view(4, 4)[:, 1:].all(1)
    assert torch.equal(same_order, ~hot.view(4, 4)[:, 0])


def test_routing_knows_which_prompts_are_uncertain(model, settings, monkeypatch):
    """Predictions of standard deviation label + 1: the classes 0 and 1 are routed, hotter the surer the head is."""
    model.settings = settings(route=2.0, explore=0.5)
    monkeypatch.setattr(model, "context", lambda tokens, mask, labels: (labels + 1.0)[:, None, None].expand(-1, 16, 32))
    monkeypatch.setattr(maskrl, "one_step", lambda head, z, c, noise_ratio: z * c[:, :1])
    heat = maskrl.routing(model, torch.tensor([2, 0, 2, 1]), maskrl.rng(0), draws=200)
    assert heat[0] == heat[2] == 1
    torch.testing.assert_close(heat[[1, 3]], 1 + 2 * torch.tensor([0.5, 0.25]), rtol=0.02, atol=0)  # exp(-log(std / explore))


def test_a_second_update_on_the_same_rollouts_moves_the_ratio(model, settings):
    model, reference, optimizers = rl_parts(model, settings, rl_epochs=3)
    optimizers["generator"] = torch.optim.SGD([p for n, p in model.named_parameters() if "schedule" not in n], 0.3)
    quality = lambda images, labels: images.mean((1, 2, 3)).sigmoid()
    stats = maskrl.rl_update(model, reference, quality, torch.tensor([0, 1]), 0.0, optimizers, 3)
    assert stats["log_ratio"] < 1e-3 < stats["kl"] and stats["ratio"] != 1


def test_several_updates_of_the_schedule_go_further_until_the_clipped_ratio_stops_them(model, settings):
    """The gradient of a clipped ratio is zero beyond 1 +- epsilon."""
    moved = {}
    for epochs, clip_ratio in ((1, 0.2), (4, 0.2), (300, 0.2), (300, 1e6)):
        net, reference, optimizers = rl_parts(copy.deepcopy(model), settings, schedule_epochs=epochs, clip_ratio=clip_ratio, alpha=1.0)
        before = copy.deepcopy(net.schedule)
        optimizers["schedule"] = torch.optim.SGD(net.schedule.parameters(), 0.05)
        stats = maskrl.rl_update(net, reference, lambda images, labels: torch.ones(len(labels)), torch.tensor([0, 1]), 0.0, optimizers, 3)
        state, hidden = torch.zeros(1, net.settings.width + 1), torch.tensor([16])
        log_ratio = net.schedule.log_probs(state, hidden) - before.log_probs(state, hidden)
        moved[epochs, clip_ratio] = log_ratio[log_ratio.isfinite()].abs().max().item()
    assert 0 < moved[1, 0.2] < moved[4, 0.2] < moved[300, 0.2] < 0.5 * moved[300, 1e6]
    assert stats["schedule_clipped"] == 0


def test_a_constant_reward_moves_nothing_and_a_group_shares_what_it_should(model, settings):
    model, reference, optimizers = rl_parts(model, settings, alpha=0.0)
    stats = maskrl.rl_update(model, reference, lambda images, labels: torch.ones(len(labels)), torch.tensor([0, 1]), 0.0, optimizers, 3)
    assert stats["filtered"] == 1 and "grad_norm" not in stats
    tokens, trace, labels, _, _ = maskrl.rollout(model, lambda images, labels: torch.ones(len(labels)), torch.tensor([0, 1]), 3)
    for shared in (trace.order, trace.z, labels):
        assert all(torch.equal(row, shared[4 * (i // 4)]) for i, row in enumerate(shared))
        assert not torch.equal(shared[0], shared[4])
    assert not torch.equal(tokens[0], tokens[1])


def test_rl_raises_a_reward_that_is_easy_to_raise(model, settings):
    """Brightness: the policy gradient must find it, through the same update that training uses."""
    model, reference, _ = rl_parts(model, settings, beta=0.0, alpha=0.0, prompts=4, group=8)
    optimizers = {"generator": torch.optim.Adam([p for n, p in model.named_parameters() if "schedule" not in n], 1e-3),
                  "schedule": torch.optim.Adam(model.schedule.parameters(), 1e-3)}
    quality = lambda images, labels: images.mean((1, 2, 3)).sigmoid()
    labels = torch.tensor([0, 1, 2, 0])
    curve = [maskrl.rl_update(model, reference, quality, labels, 0.0, optimizers, i)["quality"] for i in range(30)]
    assert sum(curve[-5:]) / 5 > sum(curve[:5]) / 5 + 0.02


def test_the_schedule_policy_learns_to_be_fast_when_only_speed_counts(model, settings):
    model, reference, optimizers = rl_parts(model, settings, alpha=1.0, prompts=4, group=8)
    optimizers["schedule"] = torch.optim.Adam(model.schedule.parameters(), 0.02)
    quality = lambda images, labels: torch.ones(len(labels))
    curve = [maskrl.rl_update(model, reference, quality, torch.tensor([0, 1, 2, 0]), 0.0, optimizers, i)["steps"] for i in range(25)]
    assert sum(curve[-5:]) / 5 < sum(curve[:5]) / 5 - 2


def test_a_replay_repeats_the_generation_and_its_gradient_is_that_of_the_kept_steps(model, settings):
    model.settings = settings(beta=0.0)
    labels = torch.tensor([0, 1, 2])
    tokens, trace = maskrl.generate(model, labels, steps=4, denoise_steps=1, trace=True)
    everything = torch.ones(3, 4, dtype=torch.bool)

    def gradient(keep):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            x, _ = maskrl.replay(model, model, labels, trace, keep)
        torch.testing.assert_close(x, tokens, atol=1e-5, rtol=1e-4)
        g = torch.autograd.grad(x.square().mean(), list(model.head.parameters()), retain_graph=True)
        return torch.cat([v.flatten() for v in g]).double(), sum(saved)

    whole, memory = gradient(everything)
    direction = [torch.randn_like(p) for p in model.head.parameters()]

    def loss(h):  # the whole generation with the head moved by h: finite differences
        for p, d in zip(model.head.parameters(), direction):
            p.data += h * d
        x = maskrl.generate(model, labels, steps=4, denoise_steps=1, order=trace.order, z=trace.z)
        for p, d in zip(model.head.parameters(), direction):
            p.data -= h * d
        return float(x.double().square().mean())

    slope = (loss(1e-3) - loss(-1e-3)) / 2e-3
    along = float(whole @ torch.cat([d.flatten() for d in direction]).double())
    assert abs(along - slope) < 0.03 * abs(slope)
    last = torch.zeros_like(everything)
    last[:, -1] = True
    part, less = gradient(last)
    assert less < 0.5 * memory and part.norm() > 0 and (part - whole).norm() > 0.05 * whole.norm()


def test_backpropagation_has_no_schedule_policy_and_forgets_no_setting(settings):
    s = settings(method="backprop")
    assert not s.has_schedule and replace(s, method="grpo").has_schedule


def test_the_rewards_own_gradient_raises_it_and_the_anchor_holds(model, settings):
    quality = lambda images, labels: images.mean((1, 2, 3)).sigmoid()
    ends = {}
    for beta in (0.0, 3.0):
        net, reference, _ = rl_parts(copy.deepcopy(model), settings, beta=beta, steps=4, learn_steps=False, method="backprop")
        net.schedule = None
        optimizers = {"generator": torch.optim.Adam(net.parameters(), 1e-3)}
        curve = [maskrl.backprop_update(net, reference, quality, torch.tensor([0, 1, 2, 0]), 0.0, optimizers, 7) for _ in range(12)]
        ends[beta] = curve[-1]["quality"] - curve[0]["quality"]
    assert ends[0.0] > 0.005 and ends[3.0] < 0.5 * ends[0.0]


# Reward and judge


@pytest.mark.parametrize("difficulty", [0, 1])
def test_shape_fit_knows_a_perfect_image(difficulty):
    labels = torch.arange([9, 16][difficulty]).repeat(4)
    fit = train_rl.ShapeFit(16, difficulty, "cpu")
    x = train_distill.draw_shapes(labels, 16, difficulty, maskrl.rng(0)).float() / 127.5 - 1
    real, blurred, wrong = fit(x, labels), fit(train_distill.blur(x), labels), fit(x, labels.roll(1))
    assert (real > blurred).all() and (blurred > wrong).float().mean() > 0.9 and real.min() > 0.3 and (real <= 1).all()
    p, r = torch.tensor([0.5]), torch.tensor([0.27])  # one of its own places and sizes, on its own kind of ground
    inside = train_distill.shape_masks(p, p, r, 16)[0, 0]
    exact = inside * torch.tensor(train_distill.COLOURS["red"])[:, None, None] / 255 + (1 - inside) * 0.1
    assert fit(2 * exact[None] - 1, torch.tensor([0])) > 0.99
    x.requires_grad_(True)
    assert (torch.autograd.grad(fit(x, labels).sum(), x)[0].flatten(1).norm(dim=1) > 0).all()


def test_shape_fit_sees_seams():
    """Seams: tokens swapped in from other images of the class lower it, the more the lower."""
    labels, fit = torch.zeros(64, dtype=torch.long), train_rl.ShapeFit(16, 0, "cpu")
    tokens = maskrl.patchify(train_distill.draw_shapes(labels, 16, 0, maskrl.rng(0)).float() / 127.5 - 1, 4)
    rank = torch.rand(64, 16, generator=maskrl.rng(1)).argsort(1)[..., None]
    curve = [float(fit(maskrl.unpatchify(torch.where(rank < n, tokens.roll(1, 0), tokens), 4), labels).mean()) for n in (0, 2, 4, 8)]
    assert curve == sorted(curve, reverse=True) and curve[-1] < 0.7 * curve[0]


def test_frechet_distance_of_two_gaussians():
    """|m|^2 + sum (s_a - s_b)^2 for independent features."""
    scale = torch.tensor([1.0, 2.0, 0.5])
    a = torch.randn(200_000, 3, dtype=torch.float64) * scale
    b = torch.randn(200_000, 3, dtype=torch.float64) + torch.tensor([1.0, 0.0, -1.0])
    assert abs(train_distill.frechet_distance(a, b) - (2 + 1 + 0.25)) < 0.05
    assert train_distill.frechet_distance(a, a) < 1e-6


def test_precision_and_recall_tell_a_collapse_from_garbage():
    real, same, labels = torch.randn(600, 4), torch.randn(600, 4), torch.arange(600) % 3
    precision, recall = train_distill.precision_recall(real, same)
    assert precision > 0.9 and recall > 0.9
    collapsed = same[labels] + 0.01 * torch.randn(600, 4)  # three images, again and again: all good, few covered
    precision, recall = train_distill.precision_recall(real, collapsed)
    assert precision > 0.6 and recall < 0.1
    precision, recall = train_distill.precision_recall(real, 4 * same)  # too wide: most are not real, but they surround all
    assert precision < 0.4
    assert train_distill.diversity(collapsed, labels) < 0.02 * train_distill.diversity(same, labels)
    x = torch.tensor([[0.0], [1.0], [5.0], [8.0]])  # classes 0, 0, 1, 1: distances 1 and 3
    assert train_distill.diversity(x, torch.tensor([0, 0, 1, 1])) == 2


def test_damage_swaps_only_within_a_class_and_leaves_half_alone():
    labels = torch.arange(3).repeat(400)
    x = labels[:, None, None, None].float().expand(-1, 3, 8, 8) / 3
    out, kind = train_distill.damage(x, labels, 2, maskrl.rng(0))
    assert not (kind == 2).any()  # images of a class are equal here: those whose patches were swapped are whole
    assert torch.equal(out[kind == 0], x[kind == 0]) and not torch.equal(out[kind == 3], x[kind == 3])
    x = torch.rand(1200, 3, 8, 8)
    out, kind = train_distill.damage(x, labels, 2, maskrl.rng(0))
    assert all(not torch.equal(out[i], x[i]) for i in (kind == 1).nonzero().flatten()[:20])
    assert abs(float((kind == 0).float().mean()) - 0.5) < 0.05
    changed = (out[kind == 2] != x[kind == 2]).any(1).float().mean()
    assert 0.2 < changed < 0.4


def test_the_judge_sees_blur_seams_and_noise():
    s = maskrl.Settings(scale=1.0)
    judge = train_distill.Judge(train_distill.load_data(s), s, torch.device("cpu"))
    real = judge.real()
    assert len(judge.labels) >= 2000 and real["accuracy"] > 0.99
    half = judge.halves[0][1]  # real images that are in no reference draw of row 0
    x, rows = half.images.float() / 127.5 - 1, half.labels.argsort(stable=True)
    g = maskrl.rng(1)
    partner = torch.cat([torch.roll(r, 1) for r in rows.split(int(half.labels.bincount()[0]))])
    tokens = maskrl.patchify(x, s.patch)
    swap = torch.rand(tokens.shape[:2], generator=g)[..., None] < 0.25
    swapped = maskrl.unpatchify(torch.where(swap, tokens[partner.argsort()][rows.argsort()], tokens), s.patch)
    for damaged in (train_distill.blur(x), swapped, x + 0.15 * torch.randn(x.shape, generator=g)):
        assert judge(damaged)["frechet"] > real["frechet"] + 3 * max(real["frechet_std"], 1e-9)


def test_quality_lies_between_zero_and_one_and_its_gradient_reaches_the_pixels():
    critic = train_distill.Critic("reward", 8, 4)
    x = torch.rand(5, 3, 8, 8, requires_grad=True)
    assert torch.equal(critic.quality(x * 3 - 1, torch.zeros(5, dtype=torch.long)),
                       critic.quality((x * 3 - 1).clamp(-1, 1), torch.zeros(5, dtype=torch.long)))  # no pay beyond the range
    q = critic.quality(x, torch.tensor([0, 1, 2, 0, 1]))
    assert q.shape == (5,) and (q > 0).all() and (q <= 1).all()
    assert (torch.autograd.grad(q.sum(), x)[0].flatten(1).norm(dim=1) > 0).all()


# Training


def test_training_keeps_the_weights_that_measured_best(tmp_path, model):
    """The yardstick is lowest after the fourth of ten updates; those weights come back, though training went on."""
    bias = model.decoder_norm.bias

    def update(step):
        bias.data.fill_(step)
        return {"loss": 0.0}

    train_distill.train("student", tmp_path / "student.pt", 10, update, model, log=tmp_path / "log.jsonl",
                 measure=lambda ema: {"progress": abs(ema.decoder_norm.bias[0].item() - 3.2)})
    assert (model.decoder_norm.bias == 3).all()
    assert (maskrl.load_checkpoint(tmp_path / "student.pt").decoder_norm.bias == 3).all()
    assert sum("progress" in line for line in (tmp_path / "log.jsonl").read_text().splitlines()) == 10


def test_ema_follows_at_once_and_then_ever_more_slowly():
    net, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(ema.weight), torch.nn.init.ones_(net.weight)
    train_distill.update_ema(ema, net, 0, 0.995)
    assert abs(float(ema.weight.detach()) - 0.9) < 1e-6  # d = 1 / 10
    torch.nn.init.zeros_(ema.weight)
    train_distill.update_ema(ema, net, 10**6, 0.995)
    assert abs(float(ema.weight.detach()) - 0.005) < 1e-6


def test_weight_decay_spares_norms_biases_and_the_head(model):
    decayed, spared = (g["params"] for g in train_distill.weight_decay_groups(model))
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(decayed) + len(spared) == len(names)
    assert all(p.ndim > 1 and not names[id(p)].startswith("head.") for p in decayed)
    assert {"head.input_proj.weight", "encoder_norm.weight", "z_proj.bias"} <= {names[id(p)] for p in spared}
