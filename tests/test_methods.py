"""Statements about Part I of maskrl.py, the methods, in its order."""

import ast
import math
import os
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import random_model, tiny

import maskrl
from maskrl import BASE, InputError, Sampling

STILL = 1e-30  # a learning rate that moves nothing


def brightness(images, labels):
    return images.mean((1, 2, 3)).sigmoid()


def always_one(images, labels):
    return torch.ones(len(labels))


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def teacher_that_hears_the_class(**overrides):
    """As a teacher is initialised, all but its head: the class makes more of a difference."""
    model = maskrl.MAR(tiny(**overrides), ["a", "b", "c"])
    for p in model.head.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def distance_between(a, b):
    return sum((p - q).abs().sum().item() for p, q in zip(a.parameters(), b.parameters()))


# 1 Settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", fields(maskrl.Settings), ids=lambda option: option.name)
def test_a_setting_of_the_wrong_type_is_refused_by_its_option(option):
    wrong = {int: ["8", 8.0, True, None], float: ["0.1", True, None], bool: [1, "yes"], str: [3]}
    for value in wrong[option.type]:
        with pytest.raises(InputError, match=rf"^{maskrl.flag(option.name)} .* must be of type"):
            tiny(**{option.name: value})


def float_options():
    return [f.name for f in fields(maskrl.Settings) if f.type is float]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", float_options())
def test_no_setting_may_be_infinite_or_nan(name, value):
    with pytest.raises(InputError, match=rf"^{maskrl.flag(name)} .* must be a finite number"):
        tiny(**{name: value})


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("image_size", 0, "--image-size 0 must be at least 1"),
        ("image_size", 9, "--image-size 9 must be a multiple of --patch 2"),
        ("per_class", 19, "--per-class 19 must be at least 20"),
        ("width", 30, "--width 30 must be a multiple of 4"),
        ("heads", 3, "of --heads 3"),
        ("steps", 17, r"--steps 17 must lie in 1\.\.\.16"),
        ("steps", 0, "--steps 0 must be at least 1"),
        ("denoise_steps", 1, "--denoise-steps 1 must be at least 2"),
        ("denoise_steps", 1001, "--denoise-steps 1001 must be at most 1000"),
        ("guidance", -0.1, "--guidance -0.1 must be at least 0"),
        ("teacher_lr", 0.0, "--teacher-lr 0.0 must be above 0"),
        ("label_dropout", 1.0, "--label-dropout 1.0 must be below 1"),
        ("label_dropout", -0.1, "--label-dropout -0.1 must be at least 0"),
        ("ema", 1, "--ema 1 must be below 1"),
        ("noise_ratio", 1e4, "--noise-ratio 10000.0 must be below"),
        ("group", 1, "--group 1 must be at least 2"),
        ("explore", 0, "--explore 0 must be above 0"),
        ("judge_n", 1, "--judge-n 1 must be at least 2"),
        ("method", "ppo", "--method ppo must be one of grpo, backprop"),
        ("predicts", "v", "--predicts v must be one of x_0, velocity, eps"),
        ("rl_steps", "foo", "--rl-steps foo must be one of critical, random, first, all"),
        ("rl_tokens", "foo", "--rl-tokens foo must be one of revealed, hidden, fresh"),
        ("rl_tokens", "fresh", "--rl-tokens and --rl-epochs need --action x"),
        ("rl_epochs", 2, "--rl-tokens and --rl-epochs need --action x"),
        ("order", "up", "--order up must be one of random, halton"),
        ("action", "y", "--action y must be one of z, x"),
    ],
)
def test_a_setting_outside_its_limits_is_refused_by_its_option(name, value, said):
    with pytest.raises(InputError, match=said):
        tiny(**{name: value})


def test_presets_are_sound_and_single_fields_can_be_replaced():
    assert maskrl.preset("tiny") == maskrl.Settings()
    assert maskrl.preset("small").length == 256
    assert maskrl.preset("small", guidance=2, steps=8).steps == 8  # a whole number is a float, too
    with pytest.raises(InputError, match="no preset 'huge'; there are tiny, folder, small"):
        maskrl.preset("huge")


def test_random_numbers_depend_on_every_name_and_on_nothing_else():
    first = torch.rand(3, generator=maskrl.rng(0, "gsim", 1))
    assert torch.equal(first, torch.rand(3, generator=maskrl.rng(0, "gsim", 1)))
    for other in ((1, "gsim", 1), (0, "teacher", 1), (0, "gsim", 2)):
        assert not torch.equal(first, torch.rand(3, generator=maskrl.rng(*other)))


# 2 Tokens -----------------------------------------------------------------------------------------


def test_patchify_is_inverted_exactly_and_keeps_raster_order():
    images = torch.randn(2, 3, 8, 8)
    tokens = maskrl.patchify(images, 2)
    assert tokens.shape == (2, 16, 12)
    assert torch.equal(maskrl.unpatchify(tokens, 2), images)
    assert torch.equal(tokens[:, 5].view(2, 3, 2, 2), images[:, :, 2:4, 2:4])


def test_tokens_are_centred_and_scaled_pixels_and_images_come_back(settings):
    s = settings(mean=-0.25, scale=3.0)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    tokens = maskrl.to_tokens(images, s)
    torch.testing.assert_close(tokens, 3 * (maskrl.patchify(images, 2) + 0.25))
    torch.testing.assert_close(maskrl.to_images(tokens, s), images)


# 3 Model ------------------------------------------------------------------------------------------


def test_rows_with_different_numbers_of_hidden_tokens_come_out_as_if_alone(model):
    tokens, labels = torch.randn(6, 16, 12), torch.tensor([0, 1, 2, 3, 0, 1])
    mask = torch.stack([torch.randperm(16) < n for n in (16, 11, 7, 1, 0, 11)])
    together = model.context(tokens, mask, labels)
    rows = [slice(i, i + 1) for i in range(6)]
    alone = torch.cat([model.context(tokens[i], mask[i], labels[i]) for i in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_context_depends_on_visible_tokens_and_class_but_not_on_hidden_ones(model):
    tokens, mask, label = torch.randn(1, 16, 12), torch.arange(16)[None] < 6, torch.tensor([1])
    c = model.context(tokens, mask, label)
    other_hidden, other_visible = tokens + 5 * mask[..., None], tokens + 5 * ~mask[..., None]
    assert torch.equal(model.context(other_hidden, mask, label), c)
    assert not torch.allclose(model.context(other_visible, mask, label), c, atol=1e-3)
    assert not torch.allclose(model.context(tokens, mask, torch.tensor([2])), c, atol=1e-4)


def test_the_null_class_has_an_embedding_of_its_own(model):
    tokens, mask, labels = torch.randn(2, 16, 12), torch.ones(2, 16).bool(), torch.tensor([0, 2])
    null = model.null(labels)
    assert null.tolist() == [3, 3]
    c_null = model.context(tokens, mask, null)
    assert torch.equal(c_null[0], c_null[1])
    assert not torch.allclose(model.context(tokens, mask, labels), c_null, atol=1e-4)
    with torch.no_grad():
        model.class_emb.weight.add_(1.0)
    assert torch.equal(model.context(tokens, mask, null), c_null)


@pytest.mark.parametrize("predicts", maskrl.PREDICTS)
def test_a_head_gives_eps_and_is_trained_on_the_error_of_what_it_predicts(predicts):
    """Its network's output o stands for x_0, v = alpha eps - sigma x_0 or eps itself; whichever it
    is, eps follows from it and x_t, and the loss is |o - what it stands for|^2."""
    head = random_model(predicts=predicts).head
    x_0, eps, c = torch.randn(7, 12), torch.randn(7, 12), torch.randn(7, 32)
    t = torch.tensor([5, 100, 300, 500, 700, 900, 990])
    alpha, sigma = BASE.alpha_sigma(t)
    x_t = alpha * x_0 + sigma * eps
    eps_hat, loss = head.eps(x_t, t, c), maskrl.denoising_loss(head, x_0, c, t, eps)
    head.predicts = "eps"
    o = head.eps(x_t, t, c)
    expected = {
        "x_0": (x_t - alpha * o) / sigma,
        "velocity": sigma * x_t + alpha * o,
        "eps": o,
    }
    target = {"x_0": x_0, "velocity": alpha * eps - sigma * x_0, "eps": eps}
    torch.testing.assert_close(eps_hat, expected[predicts])
    torch.testing.assert_close(loss, (o - target[predicts]).square().mean(), rtol=1e-3, atol=0)


# 4 Diffusion --------------------------------------------------------------------------------------


def test_q_sample_has_the_closed_form_mean_and_variance():
    n, t = 40000, 400

    def cosine(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar = cosine(401 / 1000) / cosine(0)
    x_t = BASE.q_sample(torch.full((n, 1), 3.0), torch.full((n,), t), torch.randn(n, 1))
    assert abs(float(x_t.mean()) - 3 * math.sqrt(alpha_bar)) < 0.02
    assert abs(float(x_t.var()) / (1 - alpha_bar) - 1) < 0.03


def test_ancestral_sampling_recovers_a_gaussian_whose_optimal_eps_is_known():
    """For x_0 ~ N(m, s^2): E[eps | x_t] = sigma (x_t - alpha m) / (alpha^2 s^2 + sigma^2)."""
    m, s = 1.5, 0.4

    def head(x, t):
        eps = gaussian_eps(m, s)(x, t)
        return torch.cat([eps, torch.zeros_like(eps)], 1)

    z, generator = torch.randn(20000, 1, dtype=torch.float64), maskrl.rng(0)
    x = maskrl.Diffusion(250).sample(head, z, generator)
    assert abs(float(x.mean()) - m) < 0.02
    assert abs(float(x.std()) / s - 1) < 0.03
    cold = maskrl.Diffusion(250).sample(head, z, generator, temperature=0.5)
    assert float(cold.std()) < 0.9 * s
    clipped = maskrl.Diffusion(250).sample(head, z, generator, limits=(-1.5, 1.5))
    assert float(clipped.max()) <= 1.5


def test_the_chains_limits_are_those_of_pixels_a_little_beyond_white(settings):
    low, high = maskrl.token_limits(settings(mean=-0.5, scale=3.0, x_0_limit=1.3))
    white = maskrl.to_tokens(torch.full((1, 3, 8, 8), 1.3), settings(mean=-0.5, scale=3.0))
    torch.testing.assert_close(white, torch.full_like(white, high))
    torch.testing.assert_close(-white - low, torch.full_like(white, -3.0))  # about the mean
    assert maskrl.token_limits(settings(x_0_limit=0.0)) is None


@pytest.mark.parametrize("n", [0, 1, 1001])
def test_a_chain_has_from_two_to_a_thousand_steps(n):
    with pytest.raises(InputError, match=f"--denoise-steps {n}"):
        maskrl.Diffusion(n)


class PointMass:
    """The optimal head where all data are x_0 = m."""

    def __init__(self, m):
        self.m = m

    def eps(self, x, t, c):
        alpha, sigma = BASE.alpha_sigma(t)
        return (x - alpha * self.m) / sigma


def test_one_step_generator_inverts_the_noising_of_a_point_mass():
    """One step lands on m from any z."""
    x_0 = maskrl.one_step(PointMass(0.7), torch.randn(50, 3), None, noise_ratio=2.5)
    torch.testing.assert_close(x_0, torch.full_like(x_0, 0.7), atol=1e-5, rtol=0)


@pytest.mark.parametrize("ratio", [0.5, 2.5, 5.0])
def test_the_one_step_starts_at_the_first_time_that_is_noisy_enough(ratio):
    times = []

    class Watched(PointMass):
        def eps(self, x, t, c):
            times.extend(t.unique().tolist())
            return super().eps(x, t, c)

    maskrl.one_step(Watched(0.0), torch.randn(5, 3), None, ratio)
    (tau,) = times
    noisy = [float(BASE.sigma[t] / BASE.alpha[t]) for t in (tau - 1, tau)]
    assert noisy[0] < ratio <= noisy[1]


# 5 Training a teacher -----------------------------------------------------------------------------


def test_a_uniform_ratio_hides_every_number_of_tokens_equally_often():
    ratio = torch.rand(20000, generator=maskrl.rng(0))
    hidden = maskrl.random_mask(ratio, 16, maskrl.rng(1)).sum(1)
    share = hidden.bincount(minlength=17)[1:] / 20000
    torch.testing.assert_close(share, torch.full((16,), 1 / 16), atol=0.008, rtol=0)


def test_a_mask_hides_at_least_one_token_and_every_place_equally_often():
    assert maskrl.random_mask(torch.zeros(50), 16, maskrl.rng(0)).sum(1).tolist() == [1] * 50
    share = maskrl.random_mask(torch.full((20000,), 0.25), 16, maskrl.rng(0)).float().mean(0)
    torch.testing.assert_close(share, torch.full((16,), 0.25), atol=0.015, rtol=0)


def watch_contexts(model, monkeypatch):
    """A list that gets the (mask, labels) of every context that the model computes."""
    seen, context = [], model.context

    def watched(tokens, mask, labels):
        seen.append((mask, labels))
        return context(tokens, mask, labels)

    monkeypatch.setattr(model, "context", watched)
    return seen


def teacher_update(settings, monkeypatch, B=1000):
    """The mask and labels that a new teacher meets in an update on B images of class 1."""
    training = maskrl.TeacherTraining(settings, ["a", "b", "c"])
    seen = watch_contexts(training.model, monkeypatch)
    training.update(0, torch.randn(B, 16, 12), torch.ones(B).long(), maskrl.rng(0))
    (mask_and_labels,) = seen
    return mask_and_labels


def test_the_teacher_meets_every_number_of_hidden_tokens_equally_often(settings, monkeypatch):
    """Also few: MAR hides 70 to 100 %, and a small model then knows the late iterations badly."""
    mask, _ = teacher_update(settings(), monkeypatch, B=4000)
    share = mask.sum(1).bincount(minlength=17)[1:] / 4000
    torch.testing.assert_close(share, torch.full((16,), 1 / 16), atol=0.015, rtol=0)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_teacher_trains_a_share_of_the_images_without_their_class(settings, monkeypatch, share):
    """Guidance needs a null class that was trained: without it eps_null would be random."""
    _, labels = teacher_update(settings(label_dropout=share), monkeypatch)
    assert set(labels.tolist()) == {1, 3}
    assert abs(float((labels == 3).float().mean()) - share) < 0.05


def test_without_label_dropout_no_label_is_dropped(settings, monkeypatch):
    _, labels = teacher_update(settings(label_dropout=0.0), monkeypatch)
    assert set(labels.tolist()) == {1}


def test_the_teachers_rates_warm_up_and_fall_to_zero_over_the_second_half(settings):
    training = maskrl.TeacherTraining(
        settings(teacher_iters=200, teacher_lr=0.1, muon_lr=0.2), ["a"]
    )
    for p in training.model.parameters():
        p.grad = torch.zeros_like(p)
    rates = []
    for _ in range(200):
        rates.append([rate.get_last_lr()[0] for rate in training.rates])
        for optimizer, rate in zip(training.optimizers, training.rates):
            optimizer.step()
            rate.step()
    adamw, muon = (list(rate) for rate in zip(*rates))
    assert muon == pytest.approx([2 * rate for rate in adamw])
    assert adamw[0] == pytest.approx(0.1 / 50)
    assert adamw[24] == pytest.approx(0.1 / 2)
    assert adamw[50:100] == pytest.approx([0.1] * 50)
    assert adamw[150] == pytest.approx(0.1 / 2)
    assert adamw[199] == pytest.approx(0.1 / 100)


def test_every_weight_of_a_teacher_has_one_optimiser_and_hidden_matrices_have_muon(model):
    adamw, muon = maskrl.teacher_optimizers(model)
    held = [[p for group in o.param_groups for p in group["params"]] for o in (adamw, muon)]
    assert isinstance(muon, maskrl.Muon)
    assert len(held[0]) + len(held[1]) == len(list(model.parameters()))
    assert {id(p) for p in held[0] + held[1]} == {id(p) for p in model.parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for p in held[1]}
    assert {"encoder_blocks.0.attn.qkv.weight", "head.res_blocks.0.mlp.0.weight"} <= matrices
    outer = {"class_emb.weight", "z_proj.weight", "head.input_proj.weight", "mask_token"}
    assert not matrices & (outer | {"head.final_layer.linear.weight", "fake_latent"})


def test_without_a_rate_for_muon_adamw_trains_the_matrices_too(settings):
    model = maskrl.MAR(settings(muon_lr=0.0), ["a"])
    (adamw,) = maskrl.teacher_optimizers(model)
    assert isinstance(adamw, torch.optim.AdamW)
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(
        list(model.parameters())
    )


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_orthogonalise_keeps_the_singular_vectors_and_evens_their_values(shape):
    x = torch.randn(shape)
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    x = U * torch.linspace(0.1, 2, len(S)) @ Vh
    values = U.T @ maskrl.orthogonalise(x) @ Vh.T
    assert 0.6 < values.diag().min() <= values.diag().max() < 1.3
    torch.testing.assert_close(values, values.diag().diag(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_a_step_of_muon_is_as_large_as_one_of_adam_whatever_the_gradient(shape):
    """A root mean square of 0.2 lr, against the gradient."""
    for scale in (1e-3, 1e3):
        weight = torch.nn.Parameter(torch.zeros(shape))
        gradient = scale * torch.randn(shape)
        weight.grad = gradient.clone()
        maskrl.Muon([weight], lr=0.1).step()
        rms = weight.detach().square().mean().sqrt()
        assert 0.7 < rms / (0.2 * 0.1) < 1.2
        assert (weight * gradient).sum() < 0


def test_a_teacher_learns_one_image_by_heart(settings):
    """The loss of a head that says nothing is the variance of what it should predict, 1."""
    s = settings(teacher_iters=60, teacher_lr=3e-3, label_dropout=0.0)
    training, x = maskrl.TeacherTraining(s, ["a"]), torch.randn(1, 16, 12).repeat(16, 1, 1)
    labels = torch.zeros(16).long()
    losses = [training.update(i, x, labels, maskrl.rng(i))["loss"] for i in range(60)]
    assert losses[0] > 0.8
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


def test_ema_follows_at_once_and_then_ever_more_slowly():
    net, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.ones_(net.weight)
    torch.nn.init.zeros_(ema.weight)
    maskrl.update_ema(ema, net, 0, 0.995)
    assert abs(float(ema.weight.detach()) - 0.9) < 1e-6  # d = 1 / 10
    torch.nn.init.zeros_(ema.weight)
    maskrl.update_ema(ema, net, 10**6, 0.995)
    assert abs(float(ema.weight.detach()) - 0.005) < 1e-6


def test_weight_decay_spares_norms_biases_and_the_head(model):
    groups = maskrl.weight_decay_groups(model)
    decayed, spared = (group["params"] for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.02, 0.0]
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed) + len(spared) == len(names)
    assert all(p.ndim > 1 and not names[id(p)].startswith("head.") for p in decayed)
    expected = {"head.input_proj.weight", "encoder_norm.weight", "z_proj.bias"}
    assert expected <= {names[id(p)] for p in spared}


def test_a_step_that_is_not_finite_changes_no_weight():
    """Both an infinite loss and, though the loss is finite, an infinite gradient."""
    weight = torch.nn.Parameter(torch.tensor([0.0, 1.0]))
    optimizer = torch.optim.SGD([weight], 0.1)
    with pytest.raises(maskrl.NonFinite, match="loss is nan"):
        maskrl.descend([weight.sum() * math.nan], optimizer)
    with pytest.raises(maskrl.NonFinite, match="gradient norm is inf"):
        maskrl.descend([weight.sqrt().sum()], optimizer)
    assert weight.tolist() == [0.0, 1.0]


def test_a_step_clips_the_gradient_and_says_what_it_was():
    weight = torch.nn.Parameter(torch.zeros(2))
    loss = 1 + weight @ torch.tensor([3.0, 4.0])
    total, norm = maskrl.descend([loss], torch.optim.SGD([weight], 1.0))
    assert (total, norm) == (1, pytest.approx(5))
    torch.testing.assert_close(weight.detach(), -torch.tensor([0.6, 0.8]))


# 6 Generation -------------------------------------------------------------------------------------


def test_guidance_of_one_is_none_and_of_zero_drops_the_class(model):
    x, t, c, null = torch.randn(5, 12), torch.arange(5), torch.randn(5, 32), torch.randn(5, 32)
    of_class, of_null = model.head(x, t, c), model.head(x, t, null)
    with_one = maskrl.guided(model.head, c, null, 1.0)(x, t)
    with_zero = maskrl.guided(model.head, c, null, 0.0)(x, t)
    torch.testing.assert_close(with_one, of_class, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(with_zero[:, :12], of_null[:, :12], atol=1e-5, rtol=1e-5)


SAMPLINGS = {
    "a student's steps": ("student", Sampling(steps=4)),
    "a guided chain": ("teacher", Sampling(steps=3, denoise_steps=4, guidance=2.0)),
    "a learned schedule": ("policy", Sampling()),
}


@pytest.mark.parametrize("side", [1, 3, 4, 8])
def test_a_halton_order_reveals_every_token_once_and_differs_from_image_to_image(side):
    order = maskrl.halton_order(side, 50, maskrl.rng("order"))
    assert torch.equal(order.sort(1).values, torch.arange(side**2).expand(50, -1))
    assert len(order.unique(dim=0)) > min(20, 2 * side**2 - 2)


def test_halton_spreads_the_tokens_of_an_iteration():
    """Of an 8x8 grid, 8 tokens in turn are farther apart than 8 random ones, in the mean."""

    def nearest(order):
        place = torch.stack([order // 8, order % 8], -1).float()
        distance = torch.cdist(place, place) + 99 * torch.eye(8)
        return distance.min(-1).values.mean()

    halton = maskrl.halton_order(8, 200, maskrl.rng("order"))
    random = torch.rand(200, 64, generator=maskrl.rng("order")).argsort(1)
    halton_turns, random_turns = halton.view(200, 8, 8), random.view(200, 8, 8)
    assert nearest(halton_turns) > 1.15 * nearest(random_turns)
    assert nearest(halton_turns[:, -1]) > 1.3 * nearest(random_turns[:, -1])  # revealed first


def test_radical_inverse_mirrors_the_digits():
    assert [maskrl.radical_inverse(i, 2) for i in (1, 2, 3, 6)] == [1 / 2, 1 / 4, 3 / 4, 3 / 8]
    assert maskrl.radical_inverse(5, 3) == pytest.approx(7 / 9)  # 12 in base 3 gives 0.21


def test_steps_may_be_the_counts_themselves(student):
    counts = (1, 2, 3, 4, 6)
    _, trace = maskrl.generate(student, [0, 1], Sampling(counts), trace=True)
    assert trace.counts.tolist() == [list(counts)] * 2
    for wrong in ((8, 7), (17, -1), (16, 0)):
        with pytest.raises(maskrl.InputError, match="must be counts that sum to 16"):
            maskrl.generate(student, [0, 1], Sampling(wrong))


def test_the_order_is_the_models_unless_another_is_asked_for(student, settings):
    def revealed(**how):
        return maskrl.generate(student, [0, 1], Sampling(**how), trace=True)[1].order

    halton = revealed()
    assert torch.equal(halton, revealed(order="halton"))
    assert not torch.equal(halton, revealed(order="random"))
    student.settings = settings(order="random")
    assert torch.equal(revealed(), revealed(order="random"))
    with pytest.raises(maskrl.InputError, match="--order up must be one of random, halton"):
        revealed(order="up")


@torch.no_grad()
def test_a_noise_policy_starts_as_the_student_and_moves_the_noise(student):
    """z = eps + mu(c), with the context of the moment when the token is revealed."""
    before, labels = maskrl.generate(student, [0, 1]), torch.tensor([0, 1])
    maskrl.add_noise_policy(student)
    assert torch.equal(maskrl.generate(student, labels), before)
    student.noise_policy.net[-1].bias.fill_(0.5)

    def draw(c, c_null, z, hidden_after, generator):
        return maskrl.one_step(student.head, z + 0.5, c, student.settings.noise_ratio)

    counts = maskrl.reveal_counts(16, student.settings.steps)
    expected = by_hand(student, labels, counts, draw)
    torch.testing.assert_close(maskrl.generate(student, labels), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind, sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_same_seed_same_samples(kind, sampling):
    model, labels = random_model(kind), torch.tensor([0, 1, 2, 0])
    if kind == "policy":
        maskrl.add_schedule(model)
    a, trace = maskrl.generate(model, labels, sampling, seed=5, trace=True)
    assert torch.equal(a, maskrl.generate(model, labels, sampling, seed=5))
    assert not torch.equal(a, maskrl.generate(model, labels, sampling, seed=6))
    assert trace.counts.sum(1).tolist() == [16] * 4


def by_hand(model, labels, counts, draw):
    """Tokens that a generation with these counts must give; draw(c, c_null, z, hidden_after,
    generator) -> tokens [N, D] of the places that an iteration reveals."""
    generator = maskrl.rng(0, "generate")
    noise = maskrl.draw_noise(model, len(labels), generator, model.settings.order)
    rank, hidden = noise.order.argsort(1), model.length
    tokens = torch.zeros_like(noise.z)
    for count in counts:
        mask = rank < hidden
        hidden = hidden - count
        reveal = mask & (rank >= hidden)
        c = model.context(tokens, mask, labels)[reveal]
        c_null = model.context(tokens, mask, model.null(labels))[reveal]
        tokens[reveal] = draw(c, c_null, noise.z[reveal], hidden, generator)
    return tokens


@torch.no_grad()
def test_generate_alone_walks_a_teachers_chain_under_its_guidance():
    how = {"steps": 4, "guidance": 3.0, "denoise_steps": 6, "x_0_limit": 0.3}  # so that it clips
    model = teacher_that_hears_the_class(**how)
    labels, head = torch.tensor([0, 1, 2]), model.head
    limit = model.settings.x_0_limit * model.settings.scale  # the mean is 0

    def draw(c, c_null, z, hidden_after, generator):
        scale = 1 + (3.0 - 1) * (16 - max(hidden_after, 1)) / 16

        def guided_head(x, t):
            eps, variance = head(x, t, c).chunk(2, 1)
            eps_null = head.eps(x, t, c_null)
            return torch.cat([eps_null + scale * (eps - eps_null), variance], 1)

        chain = maskrl.Diffusion(6)
        return chain.sample(guided_head, z, generator, limits=(-limit, limit))

    expected = by_hand(model, labels, maskrl.reveal_counts(16, 4), draw)
    torch.testing.assert_close(maskrl.generate(model, labels), expected, atol=1e-4, rtol=1e-4)
    unguided = maskrl.generate(model, labels, Sampling(guidance=1.0))
    assert not torch.allclose(unguided, expected, atol=1e-2)


@torch.no_grad()
def test_generate_alone_takes_a_students_one_step_without_guidance():
    student, labels = random_model("student", steps=4, guidance=3.0), torch.tensor([0, 1, 2])

    def draw(c, c_null, z, hidden_after, generator):
        return maskrl.one_step(student.head, z, c, student.settings.noise_ratio)

    expected = by_hand(student, labels, maskrl.reveal_counts(16, 4), draw)
    torch.testing.assert_close(maskrl.generate(student, labels), expected, atol=1e-5, rtol=1e-4)


def test_generate_alone_takes_a_policys_learned_counts(policy):
    """Unless the number of steps is asked for."""
    labels = torch.arange(12) % 3
    _, trace = maskrl.generate(policy, labels, Sampling(greedy=False), trace=True)
    hidden = trace.hidden()
    taken = hidden > 0
    chosen = policy.schedule.count(trace.actions[taken], hidden[taken])
    assert torch.equal(trace.counts[taken], chosen)
    assert len(set(trace.steps.tolist())) > 1
    _, fixed = maskrl.generate(policy, labels, Sampling(steps=4), trace=True)
    assert fixed.counts.tolist() == [maskrl.reveal_counts(16, 4)] * 12
    assert fixed.actions is None


def test_a_learned_schedule_takes_the_most_probable_count_and_explores_in_rollouts(policy):
    torch.nn.init.normal_(policy.schedule.net[-1].weight)
    labels = torch.arange(12) % 3
    rollouts = maskrl.rollout(policy, always_one, labels, 0)
    for trace, greedy in (
        (maskrl.generate(policy, labels, trace=True)[1], True),
        (rollouts.trace, False),
    ):
        hidden = trace.hidden()
        taken = hidden > 0
        log_probs = policy.schedule.log_probs(trace.states[taken], hidden[taken])
        most_probable = log_probs.argmax(1) == trace.actions[taken]
        assert most_probable.all() == greedy


def test_labels_may_be_a_list_of_integers(student):
    tensor = torch.tensor([0, 1, 2])
    assert torch.equal(maskrl.generate(student, [0, 1, 2]), maskrl.generate(student, tensor))


@pytest.mark.parametrize("wrong", [-1, 4])
def test_labels_out_of_range_are_refused_and_the_null_class_is_not(student, wrong):
    """A negative index would silently be another class."""
    with pytest.raises(
        InputError, match=rf"labels must be integers in 0\.\.\.2 .*not \[0, {wrong}\]"
    ):
        maskrl.generate(student, [0, wrong])
    assert maskrl.generate(student, [3]).isfinite().all()


def test_labels_that_are_no_integers_are_refused(student):
    with pytest.raises(InputError, match="labels must be integers"):
        maskrl.generate(student, [0.5])


@pytest.mark.parametrize("kind", ["student", "policy"])
@pytest.mark.parametrize(
    "sampling, said",
    [
        (Sampling(guidance=2.0), "--guidance needs a teacher's chain"),
        (Sampling(denoise_steps=5), "--denoise-steps 5: a .* takes one step"),
        (Sampling(denoise_steps=(5, 2)), "takes one step"),
        (Sampling(denoise_steps=0), "--denoise-steps 0: a .* takes one step"),
        (Sampling(temperature=-0.5), "must be numbers from 0 up"),
    ],
)
def test_a_one_step_generator_refuses_what_only_a_chain_has(kind, sampling, said):
    with pytest.raises(InputError, match=said):
        maskrl.generate(random_model(kind), [0], sampling)


@pytest.mark.parametrize("kind", ["teacher", "student", "policy"])
def test_the_temperature_of_one_step_is_the_standard_deviation_of_z(kind):
    one_step, sampling = random_model(kind), Sampling(steps=4, guidance=1.0, denoise_steps=1)
    if kind == "policy":
        maskrl.add_noise_policy(one_step)  # which moves the mean of z, whatever its temperature
        torch.nn.init.ones_(one_step.noise_policy.net[-1].bias)
    noise = maskrl.draw_noise(one_step, 3, maskrl.rng("warm"))
    cooler = maskrl.Noise(noise.order, 0.5 * noise.z)
    by_hand, trace = maskrl.generate(one_step, [0, 1, 2], sampling, cooler, trace=True)
    cool = replace(sampling, temperature=0.5)
    tokens, same = maskrl.generate(one_step, [0, 1, 2], cool, noise, trace=True)
    assert torch.equal(tokens, by_hand) and torch.equal(same.z, trace.z)
    assert not torch.equal(tokens, maskrl.generate(one_step, [0, 1, 2], sampling, noise))


@pytest.mark.parametrize(
    "sampling, said",
    [
        (Sampling(denoise_steps=1, guidance=2.0), "--guidance needs a teacher's chain"),
        (Sampling(denoise_steps=0), "--denoise-steps 0: a denoising chain has"),
        (Sampling(guidance=-1.0), "must be numbers from 0 up"),
        (Sampling(guidance=math.nan), "must be numbers from 0 up"),
        (Sampling(temperature=math.inf), "must be numbers from 0 up"),
        (Sampling(steps=0), "--steps 0"),
        (Sampling(steps=17), "--steps 17"),
    ],
)
def test_a_teacher_refuses_what_cannot_be(model, sampling, said):
    with pytest.raises(InputError, match=said):
        maskrl.generate(model, [0], sampling)


@torch.no_grad()
def test_a_teacher_asked_for_one_step_is_the_start_of_its_student(model):
    labels = torch.tensor([0, 1, 2])
    student = maskrl.student_of(model, model.settings)
    one_step = maskrl.generate(model, labels, Sampling(denoise_steps=1))
    assert torch.equal(one_step, maskrl.generate(student, labels))


def test_denoising_steps_are_annealed_from_the_first_iteration_to_the_last(model, monkeypatch):
    lengths, Diffusion = [], maskrl.Diffusion

    def watched(n):
        lengths.append(n)
        return Diffusion(n)

    monkeypatch.setattr(maskrl, "Diffusion", watched)
    maskrl.generate(model, [0], Sampling(steps=4, denoise_steps=(8, 2)))
    assert lengths == [8, 6, 4, 2]


@pytest.mark.parametrize("kind", ["student", "policy"])
def test_completing_an_image_keeps_what_is_known_and_sees_it(kind):
    model, known, labels = random_model(kind), torch.randn(3, 16, 12), torch.tensor([0, 1, 2])
    mask = torch.arange(16) % 3 == 0
    if kind == "policy":
        maskrl.add_schedule(model)

    def complete(known):
        return maskrl.generate(model, labels, known=(known, mask), trace=True)

    tokens, trace = complete(known)
    assert torch.equal(tokens[:, ~mask], known[:, ~mask])
    assert not torch.isclose(tokens[:, mask], known[:, mask]).any(-1).all()
    assert (trace.counts.sum(1) == mask.sum()).all()
    assert torch.equal(trace.masks()[0][:, 0], mask.expand(3, -1))
    other_visible = torch.where(mask[:, None], known, -known)
    assert not torch.allclose(complete(other_visible)[0][:, mask], tokens[:, mask])
    other_hidden = torch.where(mask[:, None], 7.0, known)
    assert torch.equal(complete(other_hidden)[0], tokens)


@torch.no_grad()
def test_a_trace_agrees_with_what_was_generated(policy):
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    sampling = Sampling(greedy=False)
    tokens, trace = maskrl.generate(policy, labels, sampling, seed=1, trace="predictions")
    mask, revealed = trace.masks()
    assert len(set(trace.steps.tolist())) > 1  # rows differ in their number of steps
    assert torch.equal(revealed.sum(2), trace.counts)
    assert torch.equal(revealed.sum(1), torch.ones(6, 16, dtype=torch.long))  # every token once
    assert torch.equal(trace.means, tokens)  # there was no exploration
    for k in range(trace.counts.shape[1]):  # a token keeps the value it was revealed with
        now = revealed[:, k]
        assert torch.equal(trace.predictions[:, k][now], tokens[now])
        c = policy.context(tokens, mask[:, k], labels)[now]
        again = maskrl.one_step(policy.head, trace.z[now], c, policy.settings.noise_ratio)
        torch.testing.assert_close(again, tokens[now], atol=1e-4, rtol=1e-4)


def test_predictions_are_traced_only_on_request_and_change_no_image(policy):
    labels = torch.tensor([0, 1, 2])
    tokens, trace = maskrl.generate(policy, labels, trace=True)
    again, with_predictions = maskrl.generate(policy, labels, trace="predictions")
    assert trace.predictions is None
    assert with_predictions.predictions.shape == (3, trace.counts.shape[1], 16, 12)
    torch.testing.assert_close(tokens, again, atol=1e-5, rtol=1e-4)


def test_every_model_starts_from_the_same_noise(model, student, policy):
    traces = [maskrl.generate(m, [0, 1], seed=4, trace=True)[1] for m in (model, student, policy)]
    for trace in traces[1:]:
        assert torch.equal(trace.z, traces[0].z)
        assert torch.equal(trace.order, traces[0].order)


# 7 GSIM -------------------------------------------------------------------------------------------


def gaussian_eps(m, s):
    """eps-prediction of x_0 ~ N(m, s^2), noised to time t; m and s may carry gradient."""

    def eps(x_t, t):
        alpha, sigma = (v.double() for v in BASE.alpha_sigma(t))
        return sigma * (x_t - alpha * m) / (alpha**2 * s**2 + sigma**2)

    return eps


def guided_eps(x_t, t):
    """eps_null + s (eps_class - eps_null) of two Gaussians, s = 2."""
    eps_class, eps_null = gaussian_eps(0.3, 0.5)(x_t, t), gaussian_eps(-0.2, 0.9)(x_t, t)
    return eps_null + 2 * (eps_class - eps_null)


def mixture_eps(x_t, t):
    """Of a mixture of two Gaussians of scale s: sigma (x_t - alpha E[m | x_t]) / variance."""
    weights, means, s = torch.tensor([[0.3, 0.7]]), torch.tensor([[-0.8, 0.9]]).double(), 0.35
    alpha, sigma = (v.double() for v in BASE.alpha_sigma(t))
    variance = alpha**2 * s**2 + sigma**2
    posterior = (weights.log() - (x_t - alpha * means) ** 2 / (2 * variance)).softmax(1)
    return sigma * (x_t - alpha * (posterior * means).sum(1, keepdim=True)) / variance


def squared(y):
    """d(y) = |y|^2 [N] and d'(y) = 2 y [N, D]."""
    return y.square().sum(-1), 2 * y


def pseudo_huber(y):
    """With an r at which it is neither |y| nor its square."""
    return maskrl.pseudo_huber(y, 0.5)


def eps_units(t):
    """The weight that leaves differences of eps as they are."""
    return torch.ones(len(t), 1)


TIMES = (150, 400, 650)
TEACHERS = {"gaussian": gaussian_eps(0.3, 0.5), "guided": guided_eps, "mixture": mixture_eps}
DISTANCES = {"squared": squared, "huber": pseudo_huber}
WEIGHTS = {"velocity": maskrl.velocity_weight, "eps": eps_units}


def student_parameters():
    """Mean and scale of the student N(theta_0, theta_1^2)."""
    return torch.tensor([-0.1, 0.8], dtype=torch.float64, requires_grad=True)


def quadrature(n=121, width=7.0):
    """Two independent standard normals: points u, v [n^2, 1] and weights that sum to one."""
    x = torch.linspace(-width, width, n, dtype=torch.float64)
    w = torch.exp(-(x**2) / 2)
    u, v = torch.meshgrid(x, x, indexing="ij")
    return u.reshape(-1, 1), v.reshape(-1, 1), (w[:, None] * w / w.sum() ** 2).flatten()


def divergence(theta, eps_p, distance, weight=maskrl.velocity_weight):
    """sum over t of E d(weight sigma_t (s_q - s_p)), s_q the student's exact score."""
    u, v, w = quadrature()
    total = 0.0
    for t in TIMES:
        t = torch.full((len(u),), t)
        alpha, sigma = (x.double() for x in BASE.alpha_sigma(t))
        x_t = alpha * (theta[0] + theta[1] * u) + sigma * v
        difference = eps_p(x_t, t) - gaussian_eps(*theta)(x_t, t)
        total = total + (w * distance(weight(t) * difference)[0]).sum()
    return total


def exact_gradient(eps_p, distance, weight=maskrl.velocity_weight):
    theta = student_parameters()
    return torch.autograd.grad(divergence(theta, eps_p, distance, weight), theta)[0]


def gsim_gradient(
    eps_p,
    distance,
    weight=maskrl.velocity_weight,
    loss=maskrl.gsim_loss,
    through_the_students_score=False,
):
    """Gradient in theta of the very gsim_loss that training uses, expectations by quadrature."""
    theta = student_parameters()
    eps_q = gaussian_eps(*(theta if through_the_students_score else theta.detach()))
    u, v, w = quadrature()
    total = 0.0
    for t in TIMES:
        x_0, t = theta[0] + theta[1] * u, torch.full((len(u),), t)
        total = total + (w * loss(x_0, t, v, eps_q, eps_p, distance, weight)).sum()
    return torch.autograd.grad(total, theta)[0]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_gradient_equivalence_theorem(teacher, distance, weight):
    """The gradient of L1 + L2 is that of the divergence, although no gradient enters the student's
    score function."""
    parts = TEACHERS[teacher], DISTANCES[distance], WEIGHTS[weight]
    exact = exact_gradient(*parts)
    assert (gsim_gradient(*parts) - exact).norm() < 1e-2 * exact.norm()


def L1_dropped(*args):
    return maskrl.gsim_terms(*args)[1]


def L2_dropped(*args):
    return maskrl.gsim_terms(*args)[0]


def sign_of_L1_flipped(*args):
    L1, L2 = maskrl.gsim_terms(*args)
    return L2 - L1


def x_t_detached(x_0, *args):
    return maskrl.gsim_loss(x_0.detach(), *args) + 0 * x_0.sum()


def d_prime_detached(x_0, t, eps, eps_q, eps_p, distance, weight):
    def detached(y):
        d, d_prime = distance(y)
        return d, d_prime.detach()

    return maskrl.gsim_loss(x_0, t, eps, eps_q, eps_p, detached, weight)


WRONG = [L1_dropped, L2_dropped, sign_of_L1_flipped, x_t_detached, d_prime_detached]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("wrong", WRONG)
def test_the_theorem_notices(wrong, weight):
    parts = mixture_eps, squared, WEIGHTS[weight]
    exact = exact_gradient(*parts)
    assert (gsim_gradient(*parts, loss=wrong) - exact).norm() > 0.05 * exact.norm()


def test_gradient_into_an_exact_student_score_makes_L1_vanish_while_the_sum_stays_right():
    parts = TEACHERS["gaussian"], squared
    exact = exact_gradient(*parts)
    both = gsim_gradient(*parts, through_the_students_score=True)
    L1 = gsim_gradient(*parts, loss=L2_dropped, through_the_students_score=True)
    assert (both - exact).norm() < 1e-2 * exact.norm()
    assert L1.norm() < 1e-2 * exact.norm()


def test_the_terms_of_gsim_are_what_the_paper_prints():
    """L1 = -d'(y)^T (s_q - grad log p(x_t | x_0)) and L2 = d(y), y = s_q - s_p; written in scores,
    with the weight that turns sigma_t (s_q - s_p) back into scores."""
    x_0, eps, t = torch.randn(3, 2).double(), torch.randn(3, 2).double(), torch.tensor(TIMES)
    alpha, sigma = (v.double() for v in BASE.alpha_sigma(t))
    eps_q, eps_p = gaussian_eps(-0.1, 0.8), gaussian_eps(0.3, 0.5)

    def weight(t):
        return 1 / sigma

    x_t = alpha * x_0 + sigma * eps
    s_q, s_p = -eps_q(x_t, t) / sigma, -eps_p(x_t, t) / sigma
    gradient_of_log_p = -(x_t - alpha * x_0) / sigma**2
    d, d_prime = pseudo_huber(s_q - s_p)
    L1, L2 = maskrl.gsim_terms(x_0, t, eps, eps_q, eps_p, pseudo_huber, weight)
    torch.testing.assert_close(L1, -(d_prime * (s_q - gradient_of_log_p)).sum(1))
    torch.testing.assert_close(L2, d)
    torch.testing.assert_close(
        maskrl.gsim_loss(x_0, t, eps, eps_q, eps_p, pseudo_huber, weight), L1 + L2
    )


@pytest.mark.parametrize("distance", [squared, pseudo_huber, maskrl.pseudo_huber])
def test_a_distance_gives_its_own_derivative(distance):
    y = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    d, d_prime = distance(y)
    torch.testing.assert_close(torch.autograd.grad(d.sum(), y)[0], d_prime)


def test_the_weight_makes_differences_of_eps_differences_of_velocities():
    """Of two predictions for the same x_t: eps = sigma_t x_t + alpha_t v."""
    t, x_t, v = torch.tensor(TIMES), torch.randn(3, 12), torch.randn(2, 3, 12)
    alpha, sigma = BASE.alpha_sigma(t)
    eps = sigma * x_t + alpha * v
    difference = maskrl.velocity_weight(t) * (eps[0] - eps[1])
    torch.testing.assert_close(difference, v[0] - v[1], atol=1e-5, rtol=1e-4)


def test_gsim_loss_lowers_the_divergence_between_two_gaussians():
    """A student N(mean, scale^2) in 8 channels, by samples alone, with the paper's r = 1e-5."""
    theta = torch.tensor([-0.5, 1.2], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.03)
    teacher = gaussian_eps(0.3, 0.5)
    before = divergence(theta, teacher, squared)
    for _ in range(150):
        z, eps = torch.randn(2, 256, 8, dtype=torch.float64)
        t, eps_q = torch.randint(20, 985, (256,)), gaussian_eps(*theta.detach().clone())
        loss = maskrl.gsim_loss(theta[0] + theta[1] * z, t, eps, eps_q, teacher)
        maskrl.descend([loss.mean()], optimizer)
    assert divergence(theta, teacher, squared) < 0.02 * before
    expected = torch.tensor([0.3, 0.5], dtype=torch.float64)
    torch.testing.assert_close(theta.detach().abs(), expected, atol=0.06, rtol=0)


def test_a_distillation_trains_student_and_auxiliary_but_not_the_teacher(model, settings):
    teacher = deepcopy(model)
    distillation = maskrl.Distillation(teacher, settings(guidance=2.0))
    for network in (distillation.model, distillation.aux, distillation.ema):
        assert distance_between(network, model) == 0
    distillation.update(0, torch.randn(4, 16, 12), torch.tensor([0, 1, 2, 0]), maskrl.rng(0))
    assert distance_between(teacher, model) == 0
    assert distance_between(distillation.model, model) > 0
    assert distance_between(distillation.aux, model) > 0
    assert 0 < distance_between(distillation.ema, model)
    assert distillation.model.kind == distillation.ema.kind == "student"
    assert teacher.kind == "teacher"


def test_a_distillation_compares_the_guided_teacher_with_the_auxiliary_network():
    """The guidance is that of an iteration that reveals one token of what is hidden; each score
    has the context of its own network, for the masks that the update drew."""
    model, seen = teacher_that_hears_the_class(guidance=3.0, draws=1), []

    def watched(x_0, t, eps, eps_q, eps_p):
        x_t = maskrl.BASE.q_sample(x_0, t, eps).detach()
        seen.append((x_t, t, eps_q(x_t, t), eps_p(x_t, t)))
        return maskrl.gsim_loss(x_0, t, eps, eps_q, eps_p)

    x, labels = torch.randn(6, 16, 12), torch.tensor([0, 1, 2, 0, 1, 2])
    distillation = maskrl.Distillation(model, model.settings, watched)
    distillation.update(0, x, labels, maskrl.rng(0))
    ((x_t, t, eps_q, eps_p),) = seen

    generator = maskrl.rng(0)
    mask = maskrl.random_mask(torch.rand(6, generator=generator), 16, generator)
    assert len(set(mask.sum(1).tolist())) > 2
    c, c_null = model.context(x, mask, labels)[mask], model.context(x, mask, model.null(labels))
    eps_class, eps_null = model.head.eps(x_t, t, c), model.head.eps(x_t, t, c_null[mask])
    hidden_after = (mask.sum(1) - 1).clamp(min=1)
    scale = (1 + (3.0 - 1) * (16 - hidden_after) / 16)[:, None].expand(6, 16)[mask][:, None]
    expected = eps_null + scale * (eps_class - eps_null)
    torch.testing.assert_close(eps_p, expected, atol=1e-4, rtol=1e-4)

    aux = distillation.aux  # as its own update left it
    expected = aux.head.eps(x_t, t, aux.context(x, mask, labels)[mask])
    torch.testing.assert_close(eps_q, expected, atol=1e-4, rtol=1e-4)


def test_times_of_gsim_avoid_both_ends():
    t = maskrl.gsim_times(20000, maskrl.rng(0))
    assert (t.min(), t.max()) == (20, 984)


# 8 Critical steps ---------------------------------------------------------------------------------


def predictions_at(degrees):
    """Predictions [1, T, 2] at these angles to the final image (1, 0)."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)[None]


def test_information_gain_of_a_hand_made_trace():
    """Predictions at 90, 60 and 0 degrees to the final image: S = 0, 1/2, 1, and 1 at the end."""
    final, predictions = torch.tensor([[1.0, 0.0]]), predictions_at([90.0, 60.0, 0.0])
    expected = torch.tensor([[0.5, 0.5, 0.0]])
    torch.testing.assert_close(maskrl.information_gain(predictions, final), expected)
    shifted = maskrl.information_gain(predictions + 4.0, final + 4.0, mean=4.0)
    torch.testing.assert_close(shifted, expected, atol=1e-5, rtol=0)


def test_a_step_back_is_as_critical_as_a_step_forward():
    """V_k = |S_{k+1} - S_k|: from 0 to 60 degrees S falls by 1/2, and the last step mends it."""
    gain = maskrl.information_gain(predictions_at([0.0, 60.0]), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(gain, torch.tensor([[0.5, 0.5]]))


def test_critical_steps_are_chosen_per_sample_and_never_beyond_a_shorter_row():
    none = -math.inf
    gain = torch.tensor([[0.1, 0.5, 0.3, 0.0], [0.9, 0.2, none, none], [0.0, 0.1, 0.2, 0.3]])
    expected = [[1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1]]
    assert maskrl.critical_steps(gain, 3).int().tolist() == expected
    final, valid = torch.randn(2, 5), torch.tensor([[True, True, True], [True, False, False]])
    gain = maskrl.information_gain(torch.randn(2, 3, 5), final, valid)
    assert gain[1, 1:].tolist() == [none] * 2
    assert maskrl.critical_steps(gain, 2).sum(1).tolist() == [2, 1]


# 9 Schedule policy --------------------------------------------------------------------------------


def test_the_schedule_policy_sees_the_mean_context_of_hidden_tokens_and_their_share():
    c, mask = torch.randn(2, 4, 3), torch.tensor([[True, False, True, False], [False] * 4])
    state = maskrl.schedule_state(c, mask)
    torch.testing.assert_close(state[0], torch.cat([c[0, [0, 2]].mean(0), torch.tensor([0.5])]))
    assert state[1].tolist() == [0, 0, 0, 0]  # nothing is hidden, and nothing is divided by 0


def test_probabilities_of_all_schedules_sum_to_one():
    """Every way to reveal 7 tokens, with a policy whose choice depends on what was done so far."""
    policy = maskrl.SchedulePolicy(width=4, length=7, max_steps=7)
    torch.nn.init.normal_(policy.net[-1].weight)
    assert policy.counts.tolist() == [1, 2, 3, 4, 6, 7]

    def total(history, left):
        if not left:
            return 1.0
        state = torch.randn(1, 5, generator=maskrl.rng(history))
        p = policy.log_probs(state, torch.tensor([left])).exp()[0]
        counts = policy.count(torch.arange(6), torch.full((6,), left))
        possible = [a for a in range(6) if p[a] > 0]
        return sum(p[a].item() * total((*history, a), left - int(counts[a])) for a in possible)

    assert abs(total((), 7) - 1) < 1e-5


def test_a_policy_starts_in_favour_of_small_counts_and_never_chooses_what_cannot_be():
    policy = maskrl.SchedulePolicy(width=4, length=16, max_steps=8)
    assert policy.counts.tolist() == [2, 4, 6, 8, 12, 16]
    log = policy.log_probs(torch.zeros(3, 5), torch.tensor([16, 4, 1]))
    impossible = [[0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]]
    assert log.isinf().int().tolist() == impossible
    times_count = log[0].exp() * policy.counts  # in proportion to 1 / count
    torch.testing.assert_close(times_count, times_count[:1].expand(6))


def test_the_longest_schedule_has_at_most_K_steps():
    for length, K in ((16, 8), (16, 16), (256, 64), (16, 5)):
        policy = maskrl.SchedulePolicy(width=4, length=length, max_steps=K)
        assert math.ceil(length / int(policy.counts[0])) <= K


def test_speed_is_one_for_one_step_and_falls_evenly():
    speed = maskrl.speed(torch.tensor([1, 4, 16]), 16)
    torch.testing.assert_close(speed, torch.tensor([1.0, 13 / 16, 1 / 16]))


def test_a_product_pays_nothing_for_fast_and_wrong(settings):
    """A sum would: measured, it was exploited within 150 updates. Speeds are 1, 1/4 and 1/16."""
    quality, steps = torch.tensor([0.0, 0.64, 1.0]), torch.tensor([1, 13, 16])
    reward = maskrl.total_reward(quality, steps, settings(steps=16, alpha=0.5))
    torch.testing.assert_close(reward, torch.tensor([0.0, 0.32, 0.25]))
    assert torch.equal(maskrl.total_reward(quality, steps, settings(alpha=0.0)), quality)


# 10 Policy gradient -------------------------------------------------------------------------------


def test_advantages_have_zero_mean_and_unit_std_in_a_group():
    A = maskrl.group_advantages(torch.randn(24), 8).view(3, 8)
    torch.testing.assert_close(A.mean(1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(A.std(1), torch.ones(3), atol=1e-4, rtol=0)


def test_equal_rewards_give_no_gradient():
    A = maskrl.group_advantages(torch.full((8,), 0.37), 8)
    log_prob = torch.randn(8, requires_grad=True)
    loss, _ = maskrl.policy_loss(log_prob, log_prob.detach(), A)
    assert torch.autograd.grad(loss, log_prob)[0].abs().max() == 0


def test_policy_loss_has_the_exact_gradient_on_a_toy():
    """Actions x ~ N(mu, sigma^2), reward -(x - 2)^2: the gradient of E[R] in mu is -2 (mu - 2), by
    quadrature, with the weights in the advantage."""
    sigma, mu = 0.3, torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    u = torch.linspace(-7, 7, 401, dtype=torch.float64)
    w = torch.exp(-(u**2) / 2) / torch.exp(-(u**2) / 2).sum()
    x = mu.detach() + sigma * u
    log_prob = maskrl.token_log_prob(x[:, None], mu, sigma)
    advantage = -((x - 2) ** 2) * w * len(x)
    loss, metrics = maskrl.policy_loss(log_prob, log_prob.detach(), advantage)
    gradient = torch.autograd.grad(loss, mu)[0]
    assert abs(gradient.item() - 2 * (0.5 - 2)) < 1e-6
    assert metrics["ratio"] == 1
    assert metrics["log_ratio"] == 0


def test_policy_loss_clips_what_would_gain_more_and_not_what_would_lose():
    log_prob = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    A = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, metrics = maskrl.policy_loss(log_prob, torch.zeros(4), A, clip_ratio=0.2)
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
    kl = maskrl.token_kl(mean, mean_ref, sigma)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(P, Q).mean(1))
    loss, _ = maskrl.policy_loss(torch.zeros(6), torch.zeros(6), torch.zeros(6), kl, beta=0.5)
    torch.testing.assert_close(loss, 0.5 * kl.mean())


def test_token_log_prob_is_the_channel_mean_of_the_normal_density():
    x, mean = torch.randn(6, 5), torch.randn(6, 5)
    log_density = torch.distributions.Normal(mean, 0.3).log_prob(x)
    torch.testing.assert_close(maskrl.token_log_prob(x, mean, 0.3), log_density.mean(1))
    sigma = torch.linspace(0.1, 0.6, 6)  # or one sigma a token
    log_density = torch.distributions.Normal(mean, sigma[:, None]).log_prob(x)
    torch.testing.assert_close(maskrl.token_log_prob(x, mean, sigma), log_density.mean(1))


def policy_gradient(student, quality=brightness, training=maskrl.PolicyGradient, **overrides):
    """RL on a copy of the student; unless learning rates are given, nothing moves."""
    still = {"noise_lr": STILL, "rl_lr": STILL, "schedule_lr": STILL}
    s = tiny(**{"explore": 0.3, **still, **overrides})
    return training(student, s, quality, torch.zeros(1, 16, 12))


FOUR_PROMPTS = torch.tensor([0, 1, 2, 0])


ACTIONS = pytest.mark.parametrize("action", maskrl.ACTIONS)


@ACTIONS
def test_the_policy_starts_as_the_student_and_the_reference_stays_so(student, action):
    """Of the action z only the noise policy learns, and the generator remains the student."""
    how = {"rl_lr": 1e-2, "noise_lr": 1e-2, "schedule_lr": 1e-2}
    training = policy_gradient(student, action=action, **how)
    training.update(FOUR_PROMPTS, 3)
    # zip ends before the policies
    assert distance_between(student, training.reference) == 0
    assert (distance_between(student, training.model) > 0) == (action == "x")
    assert distance_between(training.reference.schedule, training.model.schedule) > 0
    if action == "z":
        before, after = training.reference.noise_policy, training.model.noise_policy
        assert distance_between(before, after) > 0
    assert (student.kind, training.model.kind) == ("student", "policy")
    assert student.schedule is None


def test_generator_and_schedule_have_an_optimiser_each_and_no_parameter_in_common(student):
    """Each parameter that learns is in exactly one of them, so the losses need no weights."""
    for action, name in (("x", "generator"), ("z", "noise")):
        training = policy_gradient(student, action=action)
        groups = {key: o.param_groups for key, o in training.optimizers.items()}
        held = {key: {id(p) for g in of for p in g["params"]} for key, of in groups.items()}
        assert set(held) == {name, "schedule"}
        assert not held[name] & held["schedule"]
        assert held["schedule"] == {id(p) for p in training.model.schedule.parameters()}
        learn = {id(p) for p in training.model.parameters() if p.requires_grad}
        assert held[name] | held["schedule"] == learn


@ACTIONS
def test_ratio_is_one_and_kl_zero_on_the_first_pass(student, action):
    metrics = policy_gradient(student, action=action).update(torch.tensor([0, 1]), 3)
    assert abs(metrics["ratio"] - 1) < 1e-4
    assert metrics["log_ratio"] < 1e-3
    assert metrics["kl"] < 1e-6
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    "how",
    [
        {"action": "x"},
        {"action": "x", "rl_tokens": "hidden"},
        {"action": "x", "rl_tokens": "fresh"},
        {"action": "x", "rl_steps": "all"},
        {"action": "x", "route": 2.0},
        {"action": "x", "learn_steps": False},
        {"rl_steps": "all"},
        {"rl_steps": "random"},
        {"route": 2.0},
        {"learn_steps": False},
    ],
)
def test_every_kind_of_update_starts_at_ratio_one(student, how):
    """Also where some rows explore with a larger sigma: they are scored under the one that drew
    them."""
    training = policy_gradient(student, **how)
    assert (training.model.schedule is None) == ("learn_steps" in how)
    metrics = training.update(FOUR_PROMPTS, 3)
    assert metrics["log_ratio"] < 1e-3
    assert metrics["clip_fraction"] == 0
    assert metrics["grad_norm"] > 0


def scored(student, monkeypatch, **how):
    """Tokens x [N, D] and sigma [N] that an update on four prompts takes log pi of."""
    calls, token_log_prob = [], maskrl.token_log_prob

    def watched(x, mean, sigma):
        calls.append((x, sigma))
        return token_log_prob(x, mean, sigma)

    with monkeypatch.context() as patch:
        patch.setattr(maskrl, "token_log_prob", watched)
        policy_gradient(student, **how).update(FOUR_PROMPTS, 3)
    return calls[0]


def test_which_tokens_count(student, monkeypatch):
    revealed, hidden, fresh = (
        scored(student, monkeypatch, action="x", rl_tokens=how)[0]
        for how in ("revealed", "hidden", "fresh")
    )
    assert len(revealed) < len(hidden)
    assert len(hidden) == len(fresh)  # as many are hidden under a fresh mask
    assert not torch.equal(hidden, fresh)  # but others


@pytest.mark.parametrize("action, sigma", [("x", 0.3), ("z", 1.0)])
def test_routed_rows_are_scored_under_the_sigma_that_drew_them(student, monkeypatch, action, sigma):
    """The plain one, and one for each of the two hotter prompts."""
    _, plain = scored(student, monkeypatch, action=action)
    assert plain.unique().tolist() == pytest.approx([sigma])
    drawn, routed = scored(student, monkeypatch, action=action, route=2.0)
    assert len(routed.unique()) == 3
    assert routed.max() > 1.03 * sigma
    if action == "z":  # of mean 0 here, so that what was drawn shows under which sigma
        hottest = drawn[routed == routed.max()]
        assert hottest.std().item() == pytest.approx(routed.max().item(), rel=0.1)


def log_density_of_the_images(model, tokens, trace, labels, A):
    """sum over rows and tokens of A log N(token; g, sigma^2), forwards, as it was generated."""
    total, hidden = 0.0, torch.ones(len(labels), 16, dtype=torch.bool)
    rank = trace.order.argsort(1)
    for count in trace.counts.T:
        reveal = hidden & (rank >= (hidden.sum(1) - count)[:, None])
        c = model.context(tokens * ~hidden[..., None], hidden, labels)[reveal]
        mean = maskrl.one_step(model.head, trace.z[reveal], c, model.settings.noise_ratio)
        log_density = torch.distributions.Normal(mean, 0.3).log_prob(tokens[reveal]).sum(1)
        total = total + (A[:, None].expand(reveal.shape)[reveal] * log_density).sum()
        hidden = hidden & ~reveal
    return total


def test_the_gradient_of_all_revealed_tokens_is_that_of_the_log_probability_of_the_image(student):
    """With fixed steps: against the log-density written out over the trajectory by hand."""
    how = {"action": "x", "rl_steps": "all", "learn_steps": False, "beta": 0.0, "steps": 4}
    training, labels = policy_gradient(student, **how), torch.tensor([0, 1])
    training.update(labels, 3)
    model = training.model
    ours = flat(p.grad for p in model.parameters())

    rollouts = maskrl.rollout(model, brightness, labels, 3)
    A = maskrl.group_advantages(rollouts.quality, 4)
    total = log_density_of_the_images(model, rollouts.tokens, rollouts.trace, rollouts.labels, A)
    mean_over_channels = -total / (8 * 16 * 12)
    exact = torch.autograd.grad(
        mean_over_channels, list(model.parameters()), materialize_grads=True
    )
    exact = flat(exact)
    exact = exact * min(1, 1 / exact.norm())  # as descend clips it
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-3)


def test_the_gradient_of_the_noise_policy_is_that_of_the_log_probability_of_the_noise(student):
    """Against log N(z; mu(c), 1) of every token in the context that it was drawn in, by hand."""
    how = {"rl_steps": "all", "learn_steps": False, "beta": 0.0, "steps": 4}
    training, labels = policy_gradient(student, **how), torch.tensor([0, 1])
    model, policy = training.model, training.model.noise_policy
    torch.nn.init.normal_(
        policy.net[-1].weight, std=0.1
    )  # for a mu that differs from place to place
    rollouts = maskrl.rollout(model, brightness, labels, 3)
    training.policy_epochs = 1
    training.update(labels, 3)
    ours = flat(p.grad for p in policy.parameters())

    trace, tokens = rollouts.trace, rollouts.tokens
    A = maskrl.group_advantages(rollouts.quality, 4)
    total, (masks, reveals) = 0.0, trace.masks()
    for k in range(4):
        c = model.context(tokens * ~masks[:, k, :, None], masks[:, k], rollouts.labels)
        c, eps = c[reveals[:, k]].detach(), trace.z[reveals[:, k]]
        mu = policy(c)
        z = (eps + mu).detach()
        made = maskrl.one_step(model.head, z, c, model.settings.noise_ratio)
        torch.testing.assert_close(made, tokens[reveals[:, k]], atol=1e-4, rtol=1e-4)
        log_density = torch.distributions.Normal(mu, 1.0).log_prob(z).sum(1)
        total = total + (A[:, None].expand(-1, 16)[reveals[:, k]] * log_density).sum()
    exact = flat(torch.autograd.grad(-total / (8 * 16 * 12), list(policy.parameters())))
    exact = exact * min(1, 1 / exact.norm())  # as descend clips it
    assert exact.norm() > 1e-3
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-3)


def test_only_the_tokens_of_the_optimised_steps_teach_the_noise_policy(student, monkeypatch):
    drawn, _ = scored(student, monkeypatch, critical_steps=2, learn_steps=False, steps=16)
    everything, _ = scored(student, monkeypatch, rl_steps="all", learn_steps=False, steps=16)
    assert len(everything) == 16 * 16  # rollouts of tokens
    assert len(drawn) == 16 * 2


def test_only_the_chosen_number_of_steps_is_optimised(student, settings):
    s, sampling = settings(critical_steps=3, steps=8), Sampling(steps=8)
    tokens, trace = maskrl.generate(student, [0, 1, 2], sampling, trace="predictions")

    def pick(how):
        return maskrl.optimised_steps(trace, tokens, replace(s, rl_steps=how), 0.0, maskrl.rng(0))

    assert pick("all").all()
    assert pick("first").int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]] * 3
    assert pick("random").sum(1).tolist() == [3, 3, 3]
    critical = pick("critical")
    assert critical.sum(1).tolist() == [3, 3, 3]
    gain = maskrl.information_gain(trace.predictions, tokens)
    least_chosen = gain.masked_fill(~critical, 9).min(1).values
    most_left_out = gain.masked_fill(critical, -9).max(1).values
    assert (least_chosen >= most_left_out).all()


@pytest.mark.parametrize("how", maskrl.RL_STEPS)
def test_only_steps_that_an_image_took_are_optimised(policy, settings, how):
    """Under a learned schedule images take different numbers of steps; each has all of K_c
    optimised, or all that it took."""
    s = settings(critical_steps=6, rl_steps=how)
    labels, sampling = torch.arange(12) % 3, Sampling(greedy=False)
    tokens, trace = maskrl.generate(policy, labels, sampling, trace="predictions")
    assert trace.steps.min() < 6 < trace.steps.max()
    steps = maskrl.optimised_steps(trace, tokens, s, 0.0, maskrl.rng(0))
    assert not (steps & (trace.counts == 0)).any()
    assert torch.equal(steps.sum(1), trace.steps if how == "all" else trace.steps.clamp(max=6))


def test_routing_heats_the_less_uncertain_half_of_the_prompts(student, settings):
    student.settings = settings(route=2.0, explore=0.01, action="x", order="random")
    labels = torch.tensor([0, 1, 2, 1])
    heat = maskrl.routing(student, labels, maskrl.rng(0))
    assert (heat > 1).sum() == 2
    assert ((heat >= 1) & (heat <= 3)).all()
    rollouts = maskrl.rollout(student, always_one, labels, 3)
    hot = rollouts.sigma > 0.0101
    assert hot.sum() == 2 * student.settings.group
    spread = (rollouts.tokens - rollouts.trace.means).std((1, 2))
    torch.testing.assert_close(spread, rollouts.sigma, rtol=0.3, atol=0)  # drawn as it says
    order = rollouts.trace.order.view(4, 4, 16)
    same_order = (order == order[:, :1]).all(2)[:, 1:].all(1)
    assert torch.equal(same_order, ~hot.view(4, 4)[:, 0])


def test_routing_knows_which_prompts_are_uncertain(student, settings, monkeypatch):
    """Predictions of standard deviation label + 1: the classes 0 and 1 are routed, hotter the surer
    the head is, 1 + 2 exp(-log(std / explore))."""
    student.settings = settings(route=2.0, explore=0.5)

    def context(tokens, mask, labels):
        return (labels + 1.0)[:, None, None].expand(-1, 16, 32)

    def one_step(head, z, c, noise_ratio):
        return z * c[:, :1]

    monkeypatch.setattr(student, "context", context)
    monkeypatch.setattr(maskrl, "one_step", one_step)
    heat = maskrl.routing(student, torch.tensor([2, 0, 2, 1]), maskrl.rng(0), draws=200)
    assert heat[0] == heat[2] == 1
    expected = 1 + 2 * torch.tensor([0.5, 0.25])
    torch.testing.assert_close(heat[[1, 3]], expected, rtol=0.02, atol=0)


def test_a_second_update_on_the_same_rollouts_moves_the_ratio(student):
    training = policy_gradient(student, action="x", rl_epochs=3)
    parameters = training.optimizers["generator"].param_groups[0]["params"]
    training.optimizers["generator"] = torch.optim.SGD(parameters, 0.3)
    metrics = training.update(torch.tensor([0, 1]), 3)
    assert metrics["log_ratio"] < 1e-3 < metrics["kl"]
    assert metrics["ratio"] != 1


def test_several_updates_of_the_schedule_go_further_until_the_clipped_ratio_stops_them(student):
    """The gradient of a clipped ratio is zero beyond 1 +- epsilon."""
    state, hidden = torch.zeros(1, 33), torch.tensor([16])

    def moved(epochs, clip_ratio):
        torch.manual_seed(0)  # the same schedule policy to start from
        training = policy_gradient(student, always_one, clip_ratio=clip_ratio, alpha=1.0)
        training.policy_epochs = epochs
        schedule = training.model.schedule
        training.optimizers["schedule"] = torch.optim.SGD(schedule.parameters(), 0.05)
        metrics = training.update(torch.tensor([0, 1]), 3)
        before = training.reference.schedule.log_probs(state, hidden)
        log_ratio = schedule.log_probs(state, hidden) - before
        return log_ratio[log_ratio.isfinite()].abs().max().item(), metrics["schedule_clipped"]

    once, four_times = moved(1, 0.2)[0], moved(maskrl.PolicyGradient.policy_epochs, 0.2)[0]
    clipped, unclipped = moved(300, 0.2), moved(300, 1e6)
    assert 0 < once < four_times < clipped[0] < 0.5 * unclipped[0]
    assert clipped[1] > 0.1
    assert unclipped[1] == 0


@ACTIONS
def test_the_schedule_learns_from_rollouts_without_noise_around_the_tokens(student, action):
    training, seen = policy_gradient(student, action=action), []
    training.schedule_update = lambda trace, A: seen.append(trace)
    qualities = []

    def quality(images, labels):
        qualities.append(images)
        return brightness(images, labels)

    training.quality = quality
    training.update(FOUR_PROMPTS, 3)
    (trace,) = seen
    means = maskrl.to_images(trace.means, student.settings)
    torch.testing.assert_close(qualities[-1], means)
    assert len(qualities) == (2 if action == "x" else 1)


@ACTIONS
def test_where_the_schedule_learns_alone_a_group_shares_z_unless_that_is_the_action(
    student, action
):
    training, seen = policy_gradient(student, action=action), []
    training.schedule_update = lambda trace, A: seen.append(trace)
    training.update_schedule_alone(FOUR_PROMPTS, 3)
    z = seen[0].z.view(len(FOUR_PROMPTS), -1, *seen[0].z.shape[1:])  # [P, G, L, D]
    assert torch.equal(z[:, 0], z[:, 1]) == (action == "x")


def test_a_constant_reward_moves_nothing(student):
    training = policy_gradient(student, always_one, alpha=0.0, rl_lr=1e-2, schedule_lr=1e-2)
    metrics = training.update(torch.tensor([0, 1]), 3)
    assert metrics["no_spread"] == 1
    assert "grad_norm" not in metrics
    assert distance_between(training.model, training.reference) == 0


@ACTIONS
@pytest.mark.parametrize("explore", [True, False])
def test_rollouts_of_a_group_share_what_is_no_action(policy, settings, action, explore):
    """Class, order and, unless it is the action, z. Where only the schedule explores, the tokens
    are those that the generator means."""
    policy.settings = settings(action=action)
    labels = torch.tensor([0, 1])
    rollouts = maskrl.rollout(policy, always_one, labels, 3, explore=explore)
    trace = rollouts.trace

    def shared(values):
        assert not torch.equal(values[0], values[4])
        return all(torch.equal(row, values[4 * (i // 4)]) for i, row in enumerate(values))

    assert shared(trace.order)
    assert shared(rollouts.labels)
    assert shared(trace.z) == (action == "x" or not explore)
    assert not torch.equal(rollouts.tokens[0], rollouts.tokens[1])
    noisy = not torch.equal(rollouts.tokens, trace.means)
    assert noisy == (action == "x" and explore)


def last_minus_first(curve):
    return sum(curve[-5:]) / 5 - sum(curve[:5]) / 5


@ACTIONS
def test_rl_raises_a_reward_that_is_easy_to_raise(student, action):
    """Brightness: the policy gradient must find it, through the same update that training uses."""
    how = {"beta": 0.0, "alpha": 0.0, "group": 8, "rl_lr": 1e-3, "noise_lr": 1e-2}
    training = policy_gradient(student, action=action, schedule_lr=1e-3, **how)
    curve = [training.update(FOUR_PROMPTS, i)["quality"] for i in range(30)]
    assert last_minus_first(curve) > 0.02


def test_the_schedule_policy_learns_to_be_fast_when_only_speed_counts(student):
    training = policy_gradient(student, always_one, alpha=1.0, group=8, schedule_lr=0.02)
    training.policy_epochs = 1
    curve = [training.update(FOUR_PROMPTS, i)["steps"] for i in range(25)]
    assert last_minus_first(curve) < -2


class SavedForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Counts the numbers that autograd keeps."""

    def __init__(self):
        self.numbers = 0
        super().__init__(self.count, self.back)

    def count(self, tensor):
        self.numbers += tensor.numel()
        return tensor

    def back(self, tensor):
        return tensor


def replayed(model, labels, tokens, trace, keep):
    """Gradient of mean x^2 in the head by a replay, and the numbers that it keeps for that."""
    saved = SavedForBackward()
    with saved:
        x, _ = maskrl.replay(model, model, labels, trace, keep)
    torch.testing.assert_close(x, tokens, atol=1e-5, rtol=1e-4)
    gradient = torch.autograd.grad(x.square().mean(), list(model.head.parameters()))
    return flat(gradient).double(), saved.numbers


def test_a_replay_repeats_the_generation_and_its_gradient_is_that_of_the_kept_steps():
    model = random_model("student", beta=0.0)
    labels, sampling = torch.tensor([0, 1, 2]), Sampling(steps=4)
    tokens, trace = maskrl.generate(model, labels, sampling, trace=True)
    everything = torch.ones(3, 4, dtype=torch.bool)
    whole, memory = replayed(model, labels, tokens, trace, everything)
    direction = [torch.randn_like(p) for p in model.head.parameters()]

    @torch.no_grad()
    def moved(h):
        """Mean x^2 of the whole generation with the head moved by h."""
        other = deepcopy(model)
        for p, d in zip(other.head.parameters(), direction):
            p.add_(h * d)
        x = maskrl.generate(other, labels, sampling, maskrl.Noise(trace.order, trace.z))
        return float(x.double().square().mean())

    slope = (moved(1e-3) - moved(-1e-3)) / 2e-3
    assert abs(float(whole @ flat(direction).double()) - slope) < 0.03 * abs(slope)
    last = torch.zeros_like(everything)
    last[:, -1] = True
    part, less = replayed(model, labels, tokens, trace, last)
    assert less < 0.5 * memory
    assert part.norm() > 0
    assert (part - whole).norm() > 0.05 * whole.norm()


def test_backpropagation_has_no_schedule_policy_and_forgets_no_setting(student, settings):
    """It once switched learn_steps off in the settings, so that a checkpoint of it, given to GRPO,
    kept its fixed steps."""
    s = settings(method="backprop")
    policy = maskrl.policy_of(student, s)
    assert policy.schedule is None
    assert policy.settings.learn_steps
    assert maskrl.policy_of(student, replace(s, method="grpo")).schedule is not None


@ACTIONS
def test_the_rewards_own_gradient_raises_it_and_the_anchor_holds(student, action):
    def climb(beta):
        how = {"method": "backprop", "beta": beta, "steps": 4, "rl_lr": 1e-3, "noise_lr": 1e-3}
        how["action"] = action
        training = policy_gradient(student, brightness, maskrl.RewardBackpropagation, **how)
        curve = [training.update(FOUR_PROMPTS, 7)["quality"] for _ in range(12)]
        return curve[-1] - curve[0]

    free, anchored = climb(0.0), climb(3.0)
    assert free > 0.005
    assert anchored < 0.5 * free


# 11 Checkpoints -----------------------------------------------------------------------------------


def test_a_loaded_checkpoint_generates_what_was_saved(policy, tmp_path):
    maskrl.save_checkpoint(tmp_path / "policy.pt", policy)
    again = maskrl.load_checkpoint(tmp_path / "policy.pt")
    assert again.kind == "policy"
    assert again.settings == policy.settings
    assert again.classes == policy.classes
    assert torch.equal(maskrl.generate(again, [0, 1, 2]), maskrl.generate(policy, [0, 1, 2]))


def test_what_a_checkpoint_is_used_for_are_its_averaged_weights(model, tmp_path):
    ema = deepcopy(model)
    torch.nn.init.ones_(ema.mask_token)
    maskrl.save_checkpoint(tmp_path / "teacher.pt", model, ema)
    assert (maskrl.load_checkpoint(tmp_path / "teacher.pt").mask_token == 1).all()
    content = maskrl.read_checkpoint(tmp_path / "teacher.pt")
    assert torch.equal(content["model"]["mask_token"], model.mask_token)


def test_a_saved_checkpoint_leaves_no_other_file(model, tmp_path):
    """It is moved to its name, not copied: a half-written copy would be a torn checkpoint."""
    maskrl.save_checkpoint(tmp_path / "new" / "teacher.pt", model)
    maskrl.save_checkpoint(tmp_path / "new" / "teacher.pt", model, step=2)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["teacher.pt"]


def test_an_interrupted_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "teacher.pt"
    maskrl.save_checkpoint(path, model, step=1)

    def torn(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        maskrl.save_checkpoint(path, model, step=2)
    assert maskrl.read_checkpoint(path)["step"] == 1


def test_a_save_has_the_new_file_on_the_disk_before_it_takes_the_old_ones_name(
    model, tmp_path, monkeypatch
):
    """Otherwise a power failure could leave a name without its content."""
    path, order = tmp_path / "teacher.pt", []
    maskrl.save_checkpoint(path, model, step=1)
    fsync, move = os.fsync, os.replace

    def watched_fsync(file):
        order.append("written")
        fsync(file)

    def watched_move(source, target):
        assert maskrl.read_checkpoint(target)["step"] == 1
        assert maskrl.read_checkpoint(source)["step"] == 2
        order.append("moved")
        move(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_move)
    maskrl.save_checkpoint(path, model, step=2)
    assert order == ["written", "moved"]


@pytest.fixture
def altered(student, tmp_path):
    """altered(change) -> path of a student.pt whose content was changed by change(content)."""

    def alter(change):
        path = tmp_path / "student.pt"
        maskrl.save_checkpoint(path, student)
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
        return path

    return alter


def setting(**values):
    """A change of single settings."""

    def change(content):
        content["settings"].update(values)

    return change


def part(name, value):
    """A change of a whole part."""

    def change(content):
        content[name] = value

    return change


def without(name):
    def change(content):
        del content[name]

    return change


def weight(name, value):
    """A change of one weight; None takes it away."""

    def change(content):
        content["model_ema"][name] = value
        if value is None:
            del content["model_ema"][name]

    return change


UNSOUND = {
    "negative size": (setting(image_size=-8), "--image-size -8 must be at least 1"),
    "size not in tokens": (setting(image_size=9), "--image-size 9 must be a multiple"),
    "no scale": (setting(scale=0.0), "its --scale is 0"),
    "a size that is text": (setting(image_size="8"), "--image-size '8' must be of type int"),
    "unknown choice": (setting(rl_steps="foo"), "--rl-steps foo must be one of"),
    "nan": (setting(guidance=math.nan), "--guidance nan must be a finite number"),
    "unknown setting": (setting(colour="red"), "settings that this version does not know: colour"),
    "no settings": (without("settings"), "is not a maskrl checkpoint"),
    "settings that are none": (part("settings", None), "is not a maskrl checkpoint"),
    "unknown kind": (part("kind", "master"), "is not a maskrl checkpoint"),
    "more classes": (part("classes", list("abcd")), "weights do not fit its settings: .*class_emb"),
    "fewer classes": (part("classes", ["a"]), "weights do not fit its settings: .*class_emb"),
    "no classes": (part("classes", None), "its classes must be of type list"),
    "classes in one text": (part("classes", "abc"), "its classes must be of type list"),
    "classes that are numbers": (part("classes", [1, 2, 3]), "must be a list of names"),
    "a step that is text": (part("step", "1"), "its step must be of type int"),
    "a key that is no text": (part("settings", {1: 2}), "does not know: 1"),
    "other width": (setting(width=64), "weights do not fit its settings"),
    "other patch": (setting(patch=1), "weights do not fit its settings"),
    "misshapen weight": (weight("mask_token", torch.zeros(3)), "do not fit .*mask_token"),
    "flat weight": (weight("z_proj.weight", torch.zeros(3)), r"z_proj.weight is \[3\]"),
    "missing weight": (weight("z_proj.weight", None), "z_proj.weight is missing"),
    "another missing weight": (weight("mask_token", None), "settings: mask_token is missing"),
    "no weights": (part("model_ema", None), "has no weights under 'model_ema'"),
    "nan in a weight": (weight("mask_token", torch.full((1, 1, 32), math.nan)), "infinite or NaN"),
    "integers": (weight("mask_token", torch.zeros(1, 1, 32).long()), "of type torch.int64"),
    "complex numbers": (weight("mask_token", torch.zeros(1, 1, 32).cfloat()), "no plain tensor"),
    "a sparse weight": (weight("mask_token", torch.zeros(1, 1, 32).to_sparse()), "no plain tensor"),
    "a weight of a teaspoon": (
        weight("mask_token", torch.zeros(1).expand(10**6, 10**6)),
        "larger than the file",
    ),
    "huge depth": (setting(depth=10_000), "--depth 10000 must be at most 200"),
    "large depth": (setting(depth=200), "weights do not fit its settings: encoder_blocks.1"),
    "large width": (setting(width=2**14), "weights do not fit its settings"),
    "huge image": (setting(image_size=2**20), "--image-size 1048576 must be at most"),
    "large image": (setting(image_size=4096, patch=2), "weights do not fit its settings"),
}


@pytest.mark.parametrize("change, said", UNSOUND.values(), ids=UNSOUND)
def test_an_unsound_checkpoint_is_named_and_what_is_wrong_with_it(altered, change, said):
    path = altered(change)
    with pytest.raises(InputError, match=said) as error:
        maskrl.load_checkpoint(path)
    assert "student.pt" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_kind_is_refused(altered):
    path = altered(setting(guidance=2.0))
    assert maskrl.read_checkpoint(path, "student")["settings"].guidance == 2
    with pytest.raises(InputError, match="student.pt is a student; a teacher is needed here"):
        maskrl.load_checkpoint(path, "teacher")


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_reading_a_checkpoint_runs_no_code_in_it(altered, tmp_path):
    path = altered(part("training", Attack(tmp_path / "hacked")))
    with pytest.raises(InputError, match="is not a checkpoint that can be read safely"):
        maskrl.load_checkpoint(path)
    assert not (tmp_path / "hacked").exists()


# The file itself ----------------------------------------------------------------------------------

SOURCE = Path(maskrl.__file__).read_text()


def test_no_line_of_maskrl_is_longer_than_100_columns():
    assert [line for line in SOURCE.splitlines() if len(line) > 100] == []


def test_the_methods_need_no_lambda():
    """Part I is read beside the papers; a function there has a name."""
    methods = SOURCE[: SOURCE.index("# Part II")]
    assert "class PolicyGradient" in methods
    assert not [node for node in ast.walk(ast.parse(methods)) if isinstance(node, ast.Lambda)]
