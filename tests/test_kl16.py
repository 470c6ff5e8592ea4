"""The KL-16 autoencoder, and latents as data.

tests/data/kl16_small.npz was computed by the autoencoder of an earlier version at a time when it
met the official code's numbers on other weights."""

import numpy as np
import pytest
import torch
from helpers_released import DATA, refusal, small_mar, small_vae, with_wave_weights, without

from maskrl import patchify, rng, to_images, to_tokens
from workbench.data import Data, Split, identity, to_unit
from workbench.errors import InputError
from workbench.kl16 import KL16, halve, load_kl16, posterior_sample
from workbench.latents import autoencoder_for, latents_of, with_latents
from workbench.settings import RunSettings

SMALL_VAE = {k: torch.from_numpy(v) for k, v in np.load(DATA / "kl16_small.npz").items()}

# The autoencoder ----------------------------------------------------------------------------------


def test_the_autoencoder_computes_what_it_did_when_it_met_the_official_code():
    vae = small_vae((1, 1, 2, 2, 2))
    assert (vae.stride, vae.channels, vae.scale) == (16, 16, 0.0)
    moments = vae.moments(SMALL_VAE["image"])
    torch.testing.assert_close(moments, SMALL_VAE["moments"], atol=1e-4, rtol=0)
    decoded = vae.decode(moments.chunk(2, 1)[0])
    # its weights are waves, which amplify rounding: machines and torch differ by 9e-3 of up to 19
    torch.testing.assert_close(decoded, SMALL_VAE["decoded"], atol=2e-2, rtol=0)


def test_downsampling_pads_below_and_to_the_right():
    layer, x = with_wave_weights(halve(32)), torch.randn(1, 32, 4, 4)
    weight, bias = layer.conv.weight, layer.conv.bias
    corner = (weight[:, :, :2, :2] * x[:, :, 2:, 2:]).sum((1, 2, 3)) + bias
    torch.testing.assert_close(layer(x)[0, :, 1, 1], corner, atol=1e-5, rtol=0)
    whole = (weight * x[:, :, :3, :3]).sum((1, 2, 3)) + bias
    torch.testing.assert_close(layer(x)[0, :, 0, 0], whole, atol=1e-5, rtol=0)


def test_the_official_autoencoder_has_a_known_scale():
    with torch.device("meta"):
        vae = KL16()
    assert vae.scale == 0.2325 and vae.stride == 16
    assert vae.decoder.mid.block_1.conv1.weight.shape == (512, 512, 3, 3)


def test_latents_are_drawn_from_the_posterior():
    moments = torch.cat([torch.full((1, 16, 40, 40), 3.0), torch.full((1, 16, 40, 40), -2.0)], 1)
    latents = posterior_sample(moments, rng(0))
    assert latents.mean() == pytest.approx(3, abs=0.02)
    assert latents.std() == pytest.approx(np.exp(-1), abs=0.01)
    moments[:, 16:] = 100  # clamped to 20
    assert posterior_sample(moments, rng(0)).std() == pytest.approx(np.exp(10), rel=0.02)


def test_encoding_draws_from_the_moments():
    vae, images = small_vae(), torch.randn(2, 3, 8, 8)
    latents = vae.encode(images, rng(0))
    assert torch.equal(latents, posterior_sample(vae.moments(images), rng(0)))


def test_decoding_in_parts_and_its_gradient():
    vae, latents = small_vae(), torch.randn(6, 16, 2, 2, requires_grad=True)
    vae.pixels_at_once = 4 * 4**2
    images = vae.decode(latents)
    at_once = vae.decoder(vae.post_quant_conv(latents))
    torch.testing.assert_close(images, at_once, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(x.square().sum(), latents)[0] for x in (images, at_once)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_256_pixels_are_decoded_four_at_a_time():
    with torch.device("meta"):
        vae, latents, sizes = KL16(), torch.zeros(10, 16, 16, 16), []

    def note_size(_, inputs):
        sizes.append(len(inputs[0]))

    vae.decoder.register_forward_pre_hook(note_size)
    with torch.no_grad():
        assert vae.decode(latents).shape == (10, 3, 256, 256)
    assert sizes == [4, 4, 2]


def test_a_gradient_keeps_nothing_of_the_decoder():
    vae, kept = small_vae(), []
    latents = torch.randn(6, 16, 2, 2, requires_grad=True)

    def keep(x):
        kept.append(x.numel())

    with torch.autograd.graph.saved_tensors_hooks(keep, identity):
        vae.decode(latents)
    assert sum(kept) <= 2 * latents.numel()


@pytest.mark.parametrize(
    "multipliers, channels", [((1,), 16), ((2, 1), 4), ((1, 2, 1), 16), ((1, 1, 2, 2, 4), 16)]
)
def test_widths_are_read_off_the_shapes(tmp_path, multipliers, channels):
    vae, path = small_vae(multipliers, channels), tmp_path / "vae.ckpt"
    weights = vae.state_dict() | {"loss.discriminator.weight": torch.zeros(1)}
    torch.save({"model": weights}, path)
    again = load_kl16(path)
    assert (again.stride, again.channels) == (2 ** (len(multipliers) - 1), channels)
    x = torch.randn(1, 3, 32, 32)
    moments = vae.moments(x)
    assert torch.equal(again.moments(x), moments)
    latents = moments.chunk(2, 1)[0]
    assert torch.equal(again.decode(latents), vae.decode(latents))
    assert not any(p.requires_grad for p in again.parameters())


def test_wrong_autoencoders_are_refused_in_one_line(tmp_path):
    weights, path = small_vae().state_dict(), tmp_path / "vae.ckpt"
    cases = [
        (without(weights, "decoder.conv_out.bias"), "decoder.conv_out.bias is missing"),
        (without(weights, "encoder.conv_in.weight"), "encoder.conv_in.weight is missing"),
        (weights | {"quant_conv.bias": torch.zeros(5)}, "quant_conv.bias is [5], not [32]"),
        (weights | {"x": torch.zeros(5)}, "x is unexpected"),
        (weights | {"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)}, "a base of 0"),
        (weights | {"encoder.conv_in.weight": torch.zeros(48, 3, 3, 3)}, "a base of 48"),
        (
            weights
            | {"encoder.conv_in.weight": torch.zeros(48, 3, 3, 3)}
            | {f"encoder.down.{i}.block.0.conv1.weight": torch.zeros(48, 48, 3, 3) for i in (0, 1)},
            "widths [48, 48], on a base of 48",
        ),
    ]
    for content, words in cases:
        torch.save({"model": content}, path)
        assert words in refusal(path, load_kl16, path)
    torch.save({"state_dict": weights}, path)
    assert "no weights under 'model'" in refusal(path, load_kl16, path)


def test_an_autoencoder_must_suit_its_generator(tmp_path):
    path = tmp_path / "vae.ckpt"
    torch.save({"model": small_vae(channels=4).state_dict()}, path)
    assert autoencoder_for(3, None, "cpu") is None and autoencoder_for(None, None, "cpu") is None
    for image_channels in (4, None):
        assert autoencoder_for(image_channels, path, "cpu").channels == 4
    with pytest.raises(InputError, match="latents of 16 channels: give --vae"):
        autoencoder_for(16, None, "cpu")
    assert "makes pixels; leave it out" in refusal(path, autoencoder_for, 3, path, "cpu")
    message = refusal(path, autoencoder_for, 16, path, "cpu")
    assert "has latents of 4 channels; the generator makes 16" in message


# Latents as data ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split():
    images = torch.randint(256, (6, 3, 8, 8), generator=rng("images")).to(torch.uint8)
    return Split(images, torch.arange(6), torch.arange(6) % 3)


def test_latents_of_a_split_serve_batches_like_images(split):
    vae = small_vae()
    latents = latents_of(split, vae, flip=True)
    assert latents.moments.shape == (2, 6, 32, 4, 4) and latents.moments.dtype == torch.float16
    mirrored = vae.moments(to_unit(split.images).flip(-1))
    torch.testing.assert_close(latents.moments[1].float(), mirrored, atol=2e-3, rtol=2e-3)
    x, labels = latents.batch(5, rng(1), flip=True)
    assert x.shape == (5, 16, 4, 4) and labels.shape == (5,)
    same, _ = latents.batch(5, rng(1), flip=True)
    other, _ = latents.batch(5, rng(2), flip=True)
    assert torch.equal(x, same) and not torch.equal(x, other)
    assert latents.spaced().shape == (6, 16, 4, 4) and latents.channels == 16
    assert len(latents_of(split, vae).moments) == 1


def test_latents_are_cached_like_images(split, tmp_path, monkeypatch, capsys):
    vae = small_vae()
    in_memory = latents_of(split, vae, flip=True)
    encoded = latents_of(split, vae, True, tmp_path)
    assert "latents are made once" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(KL16, "moments", None)  # nothing is encoded any more
        kept = latents_of(split, vae, True, tmp_path)
    batches = [latents.batch(32, rng(3), flip=True) for latents in (in_memory, encoded, kept)]
    for x, labels in batches[1:]:
        assert torch.equal(x, batches[0][0]) and torch.equal(labels, batches[0][1])
    assert torch.equal(kept.spaced(), in_memory.spaced())
    assert len(list(tmp_path.iterdir())) == 1
    latents_of(split, vae, False, tmp_path)  # without the mirrored ones
    latents_of(split.take([0, 1]), vae, True, tmp_path)  # of other images
    vae.quant_conv.bias.data[0] += 1
    other = latents_of(split, vae, True, tmp_path)  # by another autoencoder
    assert not torch.equal(other.moments, kept.moments)
    assert len(list(tmp_path.iterdir())) == 4


def test_tokens_of_latents_become_the_same_latents(split):
    settings = small_mar().settings
    latents = latents_of(split, small_vae()).spaced()
    tokens = to_tokens(latents, settings)
    assert tokens.shape == (6, 16, 16)
    torch.testing.assert_close(tokens, patchify(latents, 1) * 0.2325)
    torch.testing.assert_close(to_images(tokens, settings), latents)


def test_mean_and_scale_of_other_autoencoders_are_measured(split):
    data = Data("folder", ["a", "b", "c"], {}, split, split, split)
    data = with_latents(data, small_vae(), flip=False)
    settings = data.measure(RunSettings(image_size=4, patch=1, steps=4))
    tokens = to_tokens(data.learned.spaced(), settings)
    assert tokens.mean() == pytest.approx(0, abs=1e-3)
    assert tokens.std() == pytest.approx(1, abs=1e-3)
    assert data.decode(data.learned.spaced()).shape == (6, 3, 8, 8)
