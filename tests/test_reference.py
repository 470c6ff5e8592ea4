"""Against the official MAR code: a tiny model with random weights, and what that code returned for it (fp32, CPU).

tests/data/mar_A.*: image 64, stride 16, patch 1, so 16 tokens of 16 channels; width 64, depth 2, 4 heads, buffer 8."""

from pathlib import Path

import numpy as np
import pytest
import torch

import maskrl

DATA = Path(__file__).parent / "data"
REFERENCE = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(DATA / "mar_A.npz").items()}


@pytest.fixture(scope="module")
def mar():
    s = maskrl.Settings(image_size=4, patch=1, image_channels=16, width=64, depth=2, heads=4, buffer=8, head_width=64,
                        head_depth=2, velocity=False, scale=1.0, clip=0.0, steps=4)
    model = maskrl.MAR(s, [str(i) for i in range(10)])
    weights = torch.load(DATA / "mar_A.pth", weights_only=True)["model"]
    model.load_state_dict({k.replace("diffloss.net.", "head."): v for k, v in weights.items()})
    return model.eval().requires_grad_(False)


def close(a, name, atol=2e-5, rtol=0.0):
    torch.testing.assert_close(a, REFERENCE[name].to(a.dtype), atol=atol, rtol=rtol)


def relative(a, name):
    """Whole chains of an untrained model grow to 1e5: compare them relative to their spread."""
    return float((a - REFERENCE[name]).abs().max() / REFERENCE[name].std())


def test_contexts(mar):
    tokens, mask, labels = REFERENCE["tokens"], REFERENCE["mask"].bool(), REFERENCE["labels"]
    close(mar.context(tokens, mask, labels), "cond_z")
    close(mar.context(tokens, mask), "uncond_z")
    close(mar.context(tokens, torch.ones_like(mask), labels), "allmask_cond_z")
    close(mar.context(tokens, torch.zeros_like(mask), labels), "nomask_cond_z")


def test_head(mar):
    close(mar.head(REFERENCE["head_in"], REFERENCE["head_t"], REFERENCE["head_c"]), "head_out")
    close(maskrl.TimeEmbedding.waves(torch.tensor([0, 1, 500, 999])), "timestep_embedding_0_999", atol=1e-4)


def test_guided_head(mar):
    half = len(REFERENCE["head_cfg_in"]) // 2  # official: conditional rows first, both halves share x
    c = REFERENCE["head_cfg_c"]
    head = maskrl.guided(mar.head, c[:half], c[half:], float(REFERENCE["head_cfg_scale"]))
    out = head(REFERENCE["head_cfg_in"][:half], REFERENCE["head_cfg_t"][:half])
    torch.testing.assert_close(out[:, :16], REFERENCE["head_cfg_out"][:half, :16], atol=2e-5, rtol=0)
    torch.testing.assert_close(out[:, 16:], REFERENCE["head_cfg_out"][:half, 16:], atol=2e-5, rtol=0)


def test_schedule_tables():
    base = maskrl.Diffusion()
    torch.testing.assert_close(base.betas, REFERENCE["betas"], atol=0, rtol=1e-9)
    torch.testing.assert_close(base.alphas_bar, REFERENCE["alphas_cumprod"], atol=0, rtol=1e-9)
    torch.testing.assert_close(base.log_variance_min, REFERENCE["posterior_log_variance_clipped"], atol=0, rtol=1e-9)
    torch.testing.assert_close(maskrl.Diffusion(10).alphas_bar, REFERENCE["gen10_alphas_cumprod"], atol=0, rtol=1e-9)


@pytest.mark.parametrize("n", [10, 25, 50, 100])
def test_respaced_times(n):
    assert maskrl.Diffusion(n).times.tolist() == REFERENCE[f"gen{n}_timesteps"].tolist()


def test_training_loss(mar):
    x_0, t, eps, c = (REFERENCE[f"train_{k}"] for k in ("x0", "t", "noise", "c"))
    close(maskrl.BASE.q_sample(x_0, t, eps), "q_sample", atol=1e-5)
    loss = torch.stack([maskrl.denoising_loss(mar.head, *(v[i:i + 1] for v in (x_0, c, t, eps))) for i in range(len(t))])
    close(loss, "train_mse", rtol=1e-5)


def test_single_denoising_steps(mar):
    chain = maskrl.Diffusion(10)
    for row, i in enumerate(REFERENCE["step_index"].tolist()):
        x, c, noise = (REFERENCE[k][row:row + 1] for k in ("step_x", "step_c", "step_noise"))
        out = mar.head(x, chain.times[i:i + 1], c)
        after = chain.step(i, x, out, noise, float(REFERENCE["step_temp"]))
        expected = REFERENCE["step_out"][row:row + 1]
        assert (after - expected).abs().max() <= 2e-5 * max(1, float(expected.abs().max()))


def test_denoising_from_the_middle(mar):
    chain, x, c = maskrl.Diffusion(10), REFERENCE["mid_x"], REFERENCE["mid_c"]
    for noise, i in zip(REFERENCE["mid_step_noise"], range(int(REFERENCE["mid_start_index"]), -1, -1)):
        x = chain.step(i, x, mar.head(x, chain.times[i].repeat(len(x)), c), noise)
    close(x, "mid_out")


def test_whole_chains(mar):
    chain = maskrl.Diffusion(10)
    g, c = maskrl.rng(0), REFERENCE["sample_c"]
    plain = chain.sample(lambda x, t: mar.head(x, t, c), REFERENCE["sample_noise"], g, temperature=0.0)
    assert relative(plain, "sample_out") < 2e-5
    half, c = 6, REFERENCE["sample_cfg_c"]
    head = maskrl.guided(mar.head, c[:half], c[half:], float(REFERENCE["sample_cfg_scale"]))
    out = chain.sample(head, REFERENCE["sample_cfg_noise"][:half], g, temperature=0.0)
    assert float((out - REFERENCE["sample_cfg_out"][:half]).abs().max() / REFERENCE["sample_cfg_out"].std()) < 2e-5
    x, c = REFERENCE["sample_noise"], REFERENCE["sample_c"]
    for noise, i in zip(REFERENCE["sample_temp_step_noise"], range(9, -1, -1)):
        x = chain.step(i, x, mar.head(x, chain.times[i].repeat(len(x)), c), noise, float(REFERENCE["sample_temp"]))
    assert relative(x, "sample_temp_out") < 2e-5


@pytest.mark.parametrize("K", [4, 8, 16])
def test_reveal_counts_and_guidance(K):
    counts = torch.tensor(maskrl.reveal_counts(16, K))
    assert counts.tolist() == REFERENCE[f"iter{K}_num_pred"].tolist()
    hidden_after = 16 - counts.cumsum(0)
    close(maskrl.guidance_scale(3.0, hidden_after, 16), f"iter{K}_cfg3_linear", atol=1e-6)


@pytest.mark.parametrize("name, s", [("nocfg", 1.0), ("cfg3", 3.0)])
def test_whole_generation(mar, name, s):
    """The official loop draws fresh noise for the tokens of each iteration, row by row; ours keeps it by position."""
    order, labels, noise, counts = (REFERENCE[f"e2e_{name}_{k}"] for k in ("orders", "labels", "noise", "noise_counts"))
    z, at, end = torch.zeros(2, 16, 16), 0, 16
    for n in counts.tolist():
        reveal = torch.zeros(2, 16, dtype=torch.bool).scatter(1, order[:, end - n // 2:end], True)
        z[reveal] = noise[at:at + n]
        at, end = at + n, end - n // 2
    tokens = maskrl.generate(mar, labels, steps=4, guidance=s, denoise_steps=10, temperature=0.0, order=order, z=z)
    assert relative(maskrl.unpatchify(tokens, 1), f"e2e_{name}_out") < 2e-5
