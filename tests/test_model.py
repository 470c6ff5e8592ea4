"""Statements about sections 1 to 4 of maskrl.py: settings, tokens, model and diffusion."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import random_model
from helpers_methods import gaussian_eps

import maskrl
from maskrl import BASE, Diffusion, alpha_sigma, rng

# 1 Settings ---------------------------------------------------------------------------------------


def draw(*names):
    return torch.rand(3, generator=rng(*names))


def test_random_numbers_depend_on_every_name_and_on_nothing_else():
    first = draw(0, "gsim", 1)
    assert torch.equal(first, draw(0, "gsim", 1))
    for other in ((1, "gsim", 1), (0, "teacher", 1), (0, "gsim", 2)):
        assert not torch.equal(first, draw(*other))


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_an_integer_of_numpy_is_the_same_name_as_pythons(integer):
    """A seed from a NumPy array would otherwise silently be another one; also inside a tuple."""
    assert torch.equal(draw(integer(1)), draw(1))
    assert torch.equal(
        draw((integer(1), "rollout", (integer(2),)), 3), draw((1, "rollout", (2,)), 3)
    )
    assert not torch.equal(draw(integer(1)), draw(integer(2)))


def test_host_and_device_draw_from_one_generator_on_a_cpu():
    """What the host must know is then no draw more."""
    host, of_device = maskrl.rngs(0, "gsim", 1, device="cpu")
    assert host is of_device
    assert torch.equal(torch.rand(3, generator=host), draw(0, "gsim", 1))


# 2 Tokens -----------------------------------------------------------------------------------------


def test_patchify_is_inverted_exactly_and_keeps_raster_order():
    images = torch.randn(2, 3, 8, 8)
    tokens = maskrl.patchify(images, 2)
    assert tokens.shape == (2, 16, 12)
    assert torch.equal(maskrl.unpatchify(tokens, 2), images)
    assert torch.equal(tokens[:, 5].view(2, 3, 2, 2), images[:, :, 2:4, 2:4])


def test_tokens_are_centred_and_scaled_pixels_and_give_back_the_images(settings):
    s = settings(mean=-0.25, scale=3.0)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    tokens = maskrl.to_tokens(images, s)
    torch.testing.assert_close(tokens, 3 * (maskrl.patchify(images, 2) + 0.25))
    torch.testing.assert_close(maskrl.to_images(tokens, s), images)


def test_a_scale_that_was_not_measured_is_refused():
    """All tokens would be zero, and all images NaN."""
    s = maskrl.Settings(scale=0.0)
    with pytest.raises(ValueError, match="scale is 0"):
        maskrl.to_tokens(torch.rand(1, 3, 16, 16), s)
    with pytest.raises(ValueError, match="scale is 0"):
        maskrl.to_images(torch.rand(1, 16, 48), s)


# 3 Model ------------------------------------------------------------------------------------------


def test_rows_with_different_numbers_of_hidden_tokens_are_computed_as_if_alone(model):
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


@pytest.mark.parametrize("predicts", ["x_0", "eps"])
def test_a_head_gives_eps_and_is_trained_on_the_error_of_what_it_predicts(predicts):
    """Its network's output o stands for x_0 or for eps; either way eps follows from it and x_t, and
    the loss is |o - what it stands for|^2."""
    head = random_model(predicts=predicts).head
    x_0, eps, c = torch.randn(7, 12), torch.randn(7, 12), torch.randn(7, 32)
    t = torch.tensor([5, 100, 300, 500, 700, 900, 990])
    alpha, sigma = alpha_sigma(t)
    x_t = alpha * x_0 + sigma * eps
    eps_hat, loss = head.eps(x_t, t, c), maskrl.denoising_loss(head, x_0, c, t, eps)
    head.predicts = "eps"
    o = head.eps(x_t, t, c)
    expected = {"x_0": (x_t - alpha * o) / sigma, "eps": o}
    target = {"x_0": x_0, "eps": eps}
    torch.testing.assert_close(eps_hat, expected[predicts])
    torch.testing.assert_close(loss, (o - target[predicts]).square().mean(), rtol=1e-3, atol=0)


# 4 Diffusion --------------------------------------------------------------------------------------


def test_q_sample_has_the_closed_form_mean_and_variance():
    n, t = 40000, 400

    def cosine(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar = cosine(401 / 1000) / cosine(0)
    x_t = maskrl.q_sample(torch.full((n, 1), 3.0), torch.full((n,), t), torch.randn(n, 1))
    assert abs(float(x_t.mean()) - 3 * math.sqrt(alpha_bar)) < 0.02
    assert abs(float(x_t.var()) / (1 - alpha_bar) - 1) < 0.03


def test_ancestral_sampling_recovers_a_gaussian_whose_optimal_eps_is_known():
    m, s = 1.5, 0.4

    def head(x, t):
        eps = gaussian_eps(m, s)(x, t)
        return torch.cat([eps, torch.zeros_like(eps)], 1)

    z, generator = torch.randn(10000, 1, dtype=torch.float64), rng(0)
    x = Diffusion(250).sample(head, z, generator)
    assert abs(float(x.mean()) - m) < 0.02
    assert abs(float(x.std()) / s - 1) < 0.03
    cold = Diffusion(250).sample(head, z, generator, temperature=0.5)
    assert float(cold.std()) < 0.9 * s
    clipped = Diffusion(250).sample(head, z, generator, limits=(-1.5, 1.5))
    assert float(clipped.max()) <= 1.5


@pytest.mark.parametrize("n", [0, 1, 1001])
def test_a_chain_has_from_two_to_a_thousand_steps(n):
    with pytest.raises(ValueError, match=f"2 to 1000 denoising steps, not {n}"):
        Diffusion(n)


def test_the_shared_schedule_is_not_changed_by_use():
    """BASE once moved to the device that asked last; `meta` stands for a GPU here."""
    identity = {name: id(value) for name, value in vars(BASE).items()}
    before, times = deepcopy(vars(BASE)), torch.tensor([0, 400, 999])
    for device in ("meta", "cpu"):
        alpha, sigma = alpha_sigma(times.to(device))
        assert alpha.device.type == sigma.device.type == device
    maskrl.q_sample(torch.randn(3, 5), times, torch.randn(3, 5))
    maskrl.one_step(PointMass(0.7), torch.randn(3, 3), None, 5.0)
    assert {name: id(value) for name, value in vars(BASE).items()} == identity
    for name, value in vars(BASE).items():
        assert value.device.type == "cpu"
        assert torch.equal(value, before[name])


class PointMass(maskrl.Head):
    """The optimal head where all data are x_0 = m."""

    def __init__(self, m, predicts="eps"):
        super().__init__(channels=3, context=4, width=4, depth=1, predicts=predicts)
        self.m = m

    def network(self, x, t, c):
        alpha, sigma = alpha_sigma(t)
        x_0 = torch.full_like(x, self.m)
        eps = (x - alpha * x_0) / sigma
        return torch.cat([x_0 if self.predicts == "x_0" else eps, torch.zeros_like(x)], 1)


PREDICTS = pytest.mark.parametrize("predicts", ["x_0", "eps"])


@PREDICTS
def test_one_step_generator_inverts_the_noising_of_a_point_mass(predicts):
    """One step lands on m from any z."""
    x_0 = maskrl.one_step(PointMass(0.7, predicts), torch.randn(50, 3), None, noise_ratio=2.5)
    torch.testing.assert_close(x_0, torch.full_like(x_0, 0.7), atol=1e-5, rtol=0)


@PREDICTS
def test_one_step_is_what_its_eps_implies(predicts):
    """g = (sigma z - sigma eps) / alpha at the time of sigma / alpha = 5."""
    head = random_model(predicts=predicts).head
    z, c = torch.randn(20, 12), torch.randn(20, 32)
    tau = int((BASE.sigma / BASE.alpha < 5.0).sum())
    alpha, sigma = float(BASE.alpha[tau]), float(BASE.sigma[tau])
    implied = (sigma * z - sigma * head.eps(sigma * z, torch.tensor([tau]), c)) / alpha
    torch.testing.assert_close(maskrl.one_step(head, z, c, 5.0), implied, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ratio", [0.5, 2.5, 5.0])
def test_the_one_step_starts_at_the_first_time_that_is_noisy_enough(ratio):
    times = []

    class Watched(PointMass):
        def network(self, x, t, c):
            times.extend(t.unique().tolist())
            return super().network(x, t, c)

    maskrl.one_step(Watched(0.0), torch.randn(5, 3), None, ratio)
    (tau,) = times
    ratios = [float(BASE.sigma[t] / BASE.alpha[t]) for t in (tau - 1, tau)]
    assert ratios[0] < ratio <= ratios[1]


def test_a_chain_is_respaced_as_the_official_code_does():
    """It adds up the stride and rounds, which differs from rounding i * 999 / (n - 1)."""
    for n in range(2, 1001):
        times, t = [], 0.0
        for _ in range(n):
            times.append(round(t))
            t += 999 / (n - 1)
        assert Diffusion(n).times.tolist() == times, n
