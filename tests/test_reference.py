"""Against the official MAR code: a tiny random model, and what that code returned (fp32, CPU).

tests/data/mar_A.*: image 64, stride 16, patch 1, so 16 tokens of 16 channels; width 64, depth 2, 4
heads, buffer 8."""

from pathlib import Path

import numpy as np
import pytest
import torch

import maskrl
from workbench.released import load_mar

DATA = Path(__file__).parent / "data"
REFERENCE = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(DATA / "mar_A.npz").items()}


@pytest.fixture(scope="module")
def mar():
    return load_mar(DATA / "mar_A.pth", ema=False, num_heads=4)


def of(*names):
    return [REFERENCE[name] for name in names]


def close(a, name, atol=2e-5, rtol=0.0):
    torch.testing.assert_close(a, REFERENCE[name].to(a.dtype), atol=atol, rtol=rtol)


def relative(a, name):
    """Whole chains of an untrained model grow to 1e5: compare them relative to their spread."""
    return float((a - REFERENCE[name][: len(a)]).abs().max() / REFERENCE[name].std())


def official_guided_head(mar, c, scale):
    """guided_head of the official contexts: conditional rows first, unconditional ones behind."""
    c, c_null = c.chunk(2)
    return maskrl.guided(mar.head, c, c_null, float(scale))


def test_contexts(mar):
    tokens, mask, labels = REFERENCE["tokens"], REFERENCE["mask"].bool(), REFERENCE["labels"]
    close(mar.context(tokens, mask, labels), "cond_z")
    close(mar.context(tokens, mask, mar.null(labels)), "uncond_z")
    close(mar.context(tokens, torch.ones_like(mask), labels), "allmask_cond_z")
    close(mar.context(tokens, torch.zeros_like(mask), labels), "nomask_cond_z")


def test_head(mar):
    close(mar.head(*of("head_in", "head_t", "head_c")), "head_out")
    waves = maskrl.TimeEmbedding(8).waves(torch.tensor([0, 1, 500, 999]))
    close(waves, "timestep_embedding_0_999", atol=1e-4)


def test_guided_head(mar):
    x, t, c, scale, expected = of(
        "head_cfg_in", "head_cfg_t", "head_cfg_c", "head_cfg_scale", "head_cfg_out"
    )
    half = len(x) // 2  # both halves share x
    out = official_guided_head(mar, c, scale)(x[:half], t[:half])
    torch.testing.assert_close(out, expected[:half], atol=2e-5, rtol=0)


def test_schedule_tables():
    base = maskrl.Diffusion()
    close(base.betas, "betas", atol=0, rtol=1e-9)
    close(base.alphas_bar, "alphas_cumprod", atol=0, rtol=1e-9)
    close(base.log_variance_min, "posterior_log_variance_clipped", atol=0, rtol=1e-9)
    close(maskrl.Diffusion(10).alphas_bar, "gen10_alphas_cumprod", atol=0, rtol=1e-9)


@pytest.mark.parametrize("n", [10, 25, 50, 100])
def test_respaced_times(n):
    assert maskrl.Diffusion(n).times.tolist() == REFERENCE[f"gen{n}_timesteps"].tolist()


def test_training_loss(mar):
    x_0, t, eps, c = of("train_x0", "train_t", "train_noise", "train_c")
    close(maskrl.q_sample(x_0, t, eps), "q_sample", atol=1e-5)
    rows = [slice(i, i + 1) for i in range(len(t))]
    losses = [maskrl.denoising_loss(mar.head, x_0[i], c[i], t[i], eps[i]) for i in rows]
    close(torch.stack(losses), "train_mse", rtol=1e-5)


def test_single_denoising_steps_honour_the_learned_variance(mar):
    chain, temperature, moved = maskrl.Diffusion(10), float(REFERENCE["step_temp"]), []
    for row, i in enumerate(REFERENCE["step_index"].tolist()):
        x, c, noise, expected = (
            v[row : row + 1] for v in of("step_x", "step_c", "step_noise", "step_out")
        )
        out = mar.head(x, chain.times[i : i + 1], c)
        error = (chain.step(i, x, out, noise, temperature) - expected).abs().max()
        bound = 2e-5 * max(1, float(expected.abs().max()))
        assert error <= bound
        out[:, 16:] = 0  # the middle of the variances is another one
        middle = chain.step(i, x, out, noise, temperature)
        moved.append(float((middle - expected).abs().max()) / bound)
    assert max(moved) > 1000


def denoise(mar, x, c, noises, start, temperature=1.0):
    """x after the steps of index start...0 of a chain of ten, with the official noise of each."""
    chain = maskrl.Diffusion(10)
    for noise, i in zip(noises, range(start, -1, -1)):
        out = mar.head(x, chain.times[i].repeat(len(x)), c)
        x = chain.step(i, x, out, noise, temperature)
    return x


def test_denoising_from_the_middle(mar):
    x, c, noises, start = of("mid_x", "mid_c", "mid_step_noise", "mid_start_index")
    close(denoise(mar, x, c, noises, int(start)), "mid_out")


def test_whole_chains_without_noise(mar):
    chain, generator = maskrl.Diffusion(10), maskrl.rng(0)
    x, c = of("sample_noise", "sample_c")

    def head(x, t):
        return mar.head(x, t, c)

    assert relative(chain.sample(head, x, generator, temperature=0.0), "sample_out") < 2e-5
    x, c, scale = of("sample_cfg_noise", "sample_cfg_c", "sample_cfg_scale")
    guided_head = official_guided_head(mar, c, scale)
    guided = chain.sample(guided_head, x[: len(c) // 2], generator, temperature=0.0)
    assert relative(guided, "sample_cfg_out") < 2e-5


def test_a_whole_chain_with_noise_at_a_temperature(mar):
    x, c, noises, temperature = of(
        "sample_noise", "sample_c", "sample_temp_step_noise", "sample_temp"
    )
    out = denoise(mar, x, c, noises, start=9, temperature=float(temperature))
    assert relative(out, "sample_temp_out") < 2e-5


@pytest.mark.parametrize("K", [4, 8, 16])
def test_reveal_counts_and_guidance(K):
    counts = torch.tensor(maskrl.reveal_counts(16, K))
    assert counts.tolist() == REFERENCE[f"iter{K}_num_pred"].tolist()
    hidden_after = 16 - counts.cumsum(0)
    close(maskrl.guidance_scale(3.0, hidden_after, 16), f"iter{K}_cfg3_linear", atol=1e-6)


def noise_by_position(order, noise, counts):
    """z [2, 16, 16] of the official loop, which draws fresh noise for the tokens of each iteration,
    row by row, where ours keeps it by position."""
    z, at, end = torch.zeros(2, 16, 16), 0, 16
    for n in counts.tolist():
        revealed_now = order[:, end - n // 2 : end]
        reveal = torch.zeros(2, 16, dtype=torch.bool).scatter(1, revealed_now, True)
        z[reveal] = noise[at : at + n]
        at, end = at + n, end - n // 2
    return z


@pytest.mark.parametrize("name, s", [("nocfg", 1.0), ("cfg3", 3.0)])
def test_whole_generation(mar, name, s):
    order, labels, noise, counts = (
        REFERENCE[f"e2e_{name}_{k}"] for k in ("orders", "labels", "noise", "noise_counts")
    )
    start = maskrl.Noise(order, noise_by_position(order, noise, counts))
    sampling = maskrl.Sampling(steps=4, guidance=s, denoise_steps=10, temperature=0.0)
    tokens = maskrl.generate(mar, labels, sampling, start)
    assert relative(maskrl.unpatchify(tokens, 1), f"e2e_{name}_out") < 2e-5
