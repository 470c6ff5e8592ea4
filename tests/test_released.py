"""MAR's released format and the KL-16 autoencoder: readers, writer, latents, and the scripts.

tests/data/mar_A.pth is a tiny model with random weights in the official format, whose arithmetic
test_reference.py checks; kl16_small.npz was computed by `maskrl.KL16` at a time when it met the
official code's numbers on other weights."""

import argparse
import json
import pathlib
import sys
import types
from urllib.error import URLError

import budget
import numpy as np
import pytest
import released
import torch
from conftest import error_of
from PIL import Image
from torch.utils.checkpoint import checkpoint

import maskrl
import sample
import train_distill
import train_rl

MAR_A = released.DATA / "mar_A.pth"
SMALL_VAE = {k: torch.from_numpy(v) for k, v in np.load(released.DATA / "kl16_small.npz").items()}


@pytest.fixture(scope="module")
def mar():
    return maskrl.load_mar(MAR_A, ema=False, num_heads=4)


def write(path, content):
    torch.save(content, path)
    return path


def one_line(call, path):
    """The message of the InputError that `call` raises, which names the file, on one line."""
    with pytest.raises(maskrl.InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


# MAR's format


def test_settings_are_read_off_the_shapes(mar):
    s = mar.settings
    assert (s.image_size, s.patch, s.width, s.heads, s.buffer) == (4, 1, 64, 4, 8)
    assert (s.depth, s.decoder_depth, s.head_width, s.head_depth) == (2, 2, 64, 2)
    assert (s.predicts, s.muon_lr, s.x_0_limit) == ("eps", 0.0, 0.0)
    assert (s.mean, s.scale) == (0.0, 0.2325)
    assert mar.classes == [str(i) for i in range(10)] and mar.kind == "teacher"
    assert mar.channels == 16 and not mar.training


def test_ema_is_taken_and_a_namespace_dropped(tmp_path, mar):
    content = released.official() | {"args": argparse.Namespace(lr=1e-4), "epoch": 399}
    path = write(tmp_path / "mar.pth", content)
    plain = maskrl.load_mar(path, ema=False, num_heads=4)
    ema = maskrl.load_mar(path, num_heads=4)
    for own, a, b in zip(*(m.state_dict().values() for m in (mar, plain, ema))):
        assert torch.equal(own, a)
        torch.testing.assert_close(1.01 * own, b)
    assert "model_ema" in one_line(lambda: maskrl.load_mar(MAR_A, num_heads=4), MAR_A)


def test_class_names_may_be_given():
    names = [f"class {i}" for i in range(10)]
    assert maskrl.load_mar(MAR_A, False, 4, classes=names).classes == names
    message = one_line(lambda: maskrl.load_mar(MAR_A, False, 4, classes=names[:3]), MAR_A)
    assert "10 classes" in message and "3 names" in message


SHAPES = (
    {"depth": 3, "decoder_depth": 1, "heads": 4},
    {"depth": 1, "decoder_depth": 2, "heads": 1, "width": 48, "buffer": 5},
    {"image_size": 8, "patch": 2, "head_width": 16, "head_depth": 3},
)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_is_read_back_in_every_shape(tmp_path, shape):
    model, ema = released.small_mar(**shape), released.small_mar(**shape)
    path = tmp_path / "mar.pth"
    maskrl.save_mar(path, model, ema)
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"model", "model_ema"}
    assert "diffloss.net.res_blocks.0.in_ln.weight" in content["model"]
    assert not any(name.startswith("head.") for name in content["model"])
    for original, flag in ((model, False), (ema, True)):
        again = maskrl.load_mar(path, flag, num_heads=model.settings.heads)
        assert all(getattr(again.settings, name) == value for name, value in shape.items())
        assert again.settings.order == "random"  # as MAR reveals
        sampling = maskrl.Sampling(steps=2, guidance=2.0, denoise_steps=3, order="random")
        made = [maskrl.generate(m, [0, 2], sampling) for m in (original, again)]
        assert torch.equal(*made)


def test_the_writer_makes_the_names_of_the_official_code(tmp_path, mar):
    maskrl.save_mar(tmp_path / "again.pth", mar)
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    weights = released.official()["model"]
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_the_writer_refuses_what_the_format_cannot_hold(tmp_path):
    path = tmp_path / "mar.pth"
    for settings, word in (({"predicts": "x_0"}, "eps"), ({"scale": 1.0}, "0.2325")):
        assert word in one_line(
            lambda s=settings: maskrl.save_mar(path, released.small_mar(**s)), path
        )
    student = released.small_mar()
    student.kind = "student"
    assert "not for a student" in one_line(lambda: maskrl.save_mar(path, student), path)
    assert not path.exists()


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


def broken(name):
    """{what is wrong: (a changed part of a checkpoint, words of the message)}[name]."""
    weights = released.official()["model"]
    return {
        "missing": (without(weights, "mask_token"), "mask_token is missing"),
        "missing, for shapes": (without(weights, "z_proj.weight"), "z_proj.weight is missing"),
        "unexpected": (weights | {"pos": torch.zeros(3)}, "pos is unexpected"),
        "a shape": (
            weights | {"mask_token": torch.zeros(1, 1, 8)},
            "mask_token is [1, 1, 8], not [1, 1, 64]",
        ),
        "dimensions": (weights | {"z_proj.weight": torch.zeros(3)}, "z_proj.weight is [3]"),
        "no square": (
            weights | {"diffusion_pos_embed_learned": torch.zeros(1, 15, 64)},
            "15 tokens of 16 channels",
        ),
        "no buffer": (
            weights | {"encoder_pos_embed_learned": torch.zeros(1, 16, 64)},
            "--buffer 0 must be at least 1",
        ),
        "a block": (
            without(weights, "decoder_blocks.1.attn.qkv.bias"),
            "decoder_blocks.1.attn.qkv.bias is missing",
        ),
        "the head": (
            without(weights, "diffloss.net.res_blocks.0.mlp.2.bias"),
            "diffloss.net.res_blocks.0.mlp.2.bias is missing",
        ),
        "no tensor": (weights | {"mask_token": 3}, "'mask_token' under 'model' is not a tensor"),
    }[name]


BROKEN = (
    "missing",
    "missing, for shapes",
    "unexpected",
    "a shape",
    "dimensions",
    "no square",
    "no buffer",
    "a block",
    "the head",
    "no tensor",
)


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_weights_are_named_in_one_line(tmp_path, name):
    weights, words = broken(name)
    path = write(tmp_path / "mar.pth", {"model": weights})
    assert words in one_line(lambda: maskrl.load_mar(path, False, 4), path)


def test_many_wrong_weights_are_counted(tmp_path):
    weights = released.official()["model"]
    few = {name: value for name, value in weights.items() if ".norm" not in name}
    path = write(tmp_path / "mar.pth", {"model": few})
    assert "; and 11 more" in one_line(lambda: maskrl.load_mar(path, False, 4), path)


class Foreign:
    """Its unpickling would run code of the file's choice."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("touched"),)


def test_files_that_are_none_and_foreign_objects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bytes_of_a = MAR_A.read_bytes()
    (tmp_path / "cut.pth").write_bytes(bytes_of_a[: len(bytes_of_a) // 2])
    (tmp_path / "text.pth").write_text("not weights\n")
    (tmp_path / "empty.pth").write_bytes(b"")
    write("foreign.pth", released.official() | {"args": Foreign()})
    write("list.pth", [1, 2])
    write("other.pth", {"model": {"weight": torch.zeros(3)}})
    cases = {
        "none.pth": "there is no checkpoint",
        "cut.pth": "not a checkpoint that can be read safely",
        "text.pth": "not a checkpoint that can be read safely",
        "empty.pth": "not a checkpoint that can be read safely",
        "foreign.pth": "it holds a pathlib",
        "list.pth": "not a file in MAR's format",
        "other.pth": "not a file in MAR's format",
    }
    for name, words in cases.items():
        assert words in one_line(lambda n=name: maskrl.load_mar(n), name)
        assert one_line(lambda n=name: maskrl.load_kl16(n), name)
        assert one_line(lambda n=name: maskrl.load_model(n), name)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name, millions", [("mar_b", 208), ("mar_l", 479), ("mar_h", 943)])
def test_released_sizes(name, millions):
    settings = maskrl.preset(name)
    assert abs(budget.parameters(settings) / 1e6 - millions) < 1
    assert settings.length == 256
    with torch.device("meta"):
        model = maskrl.MAR(settings, maskrl.numbered(1000), image_channels=16)
    weights = {maskrl.mar_name(key): value for key, value in model.state_dict().items()}
    read = maskrl.mar_settings("mar.pth", weights, None)  # heads: known from the width
    differs = {key for key in vars(settings) if getattr(settings, key) != getattr(read, key)}
    assert differs == {"scale", "decoder_depth"}  # scale is measured; the depth is written out
    assert read.decoder_depth == settings.depth


def test_heads_are_asked_for_where_the_width_does_not_tell():
    message = one_line(lambda: maskrl.load_mar(MAR_A, ema=False), MAR_A)
    assert "width 64" in message and "num_heads" in message and "--heads" in message


def test_the_budget_is_a_table():
    settings = released.small_mar().settings
    assert "| small | 8 | " in budget.table({"small": settings})
    assert budget.fixed_bytes(10) == {"teacher": 40, "student": 240, "auxiliary": 160}
    plain, checkpointed = (budget.activation_bytes(settings, 4, on) for on in (False, True))
    assert checkpointed < plain
    assert budget.activation_bytes(settings, 8, False) == pytest.approx(2 * plain, rel=1e-6)


@pytest.mark.parametrize("name, gigabytes", [("mar_b", 24), ("mar_l", 80)])
def test_released_sizes_are_distilled_and_rewarded_in_the_memory_promised(name, gigabytes):
    settings = maskrl.preset(name)
    assert settings.checkpointing
    gsim = sum(budget.fixed_bytes(budget.parameters(settings)).values())
    gsim += budget.activation_bytes(settings, settings.batch, checkpointing=True)
    assert gsim < 0.85 * gigabytes * 1e9  # the rest for what is not counted
    assert sum(budget.rl_bytes(settings).values()) < 0.85 * gigabytes * 1e9


def test_hours_follow_from_the_products_of_matrices():
    settings, rows = maskrl.preset("mar_b"), 64 + 256
    hours = [budget.hours_of_released(settings, K)["1000 images of the student"] for K in (64, 32)]
    W = settings.width
    block = rows * 2 * 12 * W**2 + 2 * 2 * rows**2 * W  # projections and MLP, attention
    context = 24 * block / (0.3 * 156e12) / 3600
    assert hours[0] - hours[1] == pytest.approx(1000 * 32 * context, rel=1e-6)


# The autoencoder


def test_the_autoencoder_computes_what_it_did_when_it_met_the_official_code():
    vae = released.small_vae((1, 1, 2, 2, 2))
    assert (vae.stride, vae.channels, vae.scale) == (16, 16, 0.0)
    moments = vae.moments(SMALL_VAE["image"])
    torch.testing.assert_close(moments, SMALL_VAE["moments"], atol=1e-4, rtol=0)
    decoded = vae.decode(moments.chunk(2, 1)[0])
    # its weights are waves, which amplify rounding: versions of torch differ by 7e-4 of up to 19
    torch.testing.assert_close(decoded, SMALL_VAE["decoded"], atol=2e-3, rtol=0)


def test_downsampling_pads_below_and_to_the_right():
    layer, x = released.filled(maskrl.downsample(32)), torch.randn(1, 32, 4, 4)
    weight, bias = layer.conv.weight, layer.conv.bias
    corner = (weight[:, :, :2, :2] * x[:, :, 2:, 2:]).sum((1, 2, 3)) + bias
    torch.testing.assert_close(layer(x)[0, :, 1, 1], corner, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        layer(x)[0, :, 0, 0], (weight * x[:, :, :3, :3]).sum((1, 2, 3)) + bias, atol=1e-5, rtol=0
    )


def test_the_official_autoencoder_has_a_known_scale():
    with torch.device("meta"):
        vae = maskrl.KL16()
    assert vae.scale == 0.2325 and vae.stride == 16
    assert vae.decoder.mid.block_1.conv1.weight.shape == (512, 512, 3, 3)


def test_latents_are_drawn_from_the_posterior():
    moments = torch.cat([torch.full((1, 16, 40, 40), 3.0), torch.full((1, 16, 40, 40), -2.0)], 1)
    latents = maskrl.posterior_sample(moments, maskrl.rng(0))
    assert latents.mean() == pytest.approx(3, abs=0.02)
    assert latents.std() == pytest.approx(np.exp(-1), abs=0.01)
    moments[:, 16:] = 100  # clamped to 20
    wide = maskrl.posterior_sample(moments, maskrl.rng(0))
    assert wide.std() == pytest.approx(np.exp(10), rel=0.02)


def test_decoding_in_parts_and_its_gradient():
    vae, latents = released.small_vae(), torch.randn(6, 16, 2, 2, requires_grad=True)
    vae.pixels_at_once = 4 * 4**2
    images = vae.decode(latents)
    at_once = vae.decoder(vae.post_quant_conv(latents))
    torch.testing.assert_close(images, at_once, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(x.square().sum(), latents)[0] for x in (images, at_once)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_256_pixels_are_decoded_four_at_a_time():
    with torch.device("meta"):
        vae, latents, seen = maskrl.KL16(), torch.zeros(10, 16, 16, 16), []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        assert vae.decode(latents).shape == (10, 3, 256, 256)
    assert seen == [4, 4, 2]


def test_a_gradient_keeps_nothing_of_the_decoder():
    vae, kept = released.small_vae(), []
    latents = torch.randn(6, 16, 2, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), id):
        vae.decode(latents)
    assert sum(kept) <= 2 * latents.numel()


@pytest.mark.parametrize(
    "multipliers, channels", [((1,), 16), ((2, 1), 4), ((1, 2, 1), 16), ((1, 1, 2, 2, 4), 16)]
)
def test_widths_are_read_off_the_shapes(tmp_path, multipliers, channels):
    vae = released.small_vae(multipliers, channels)
    weights = vae.state_dict() | {"loss.discriminator.weight": torch.zeros(1)}
    again = maskrl.load_kl16(write(tmp_path / "vae.ckpt", {"model": weights}))
    assert (again.stride, again.channels) == (2 ** (len(multipliers) - 1), channels)
    x = torch.randn(1, 3, 32, 32)
    moments = vae.moments(x)
    assert torch.equal(again.moments(x), moments)
    latents = moments.chunk(2, 1)[0]
    assert torch.equal(again.decode(latents), vae.decode(latents))
    assert not any(p.requires_grad for p in again.parameters())


def test_wrong_autoencoders_are_refused_in_one_line(tmp_path):
    weights, path = released.small_vae().state_dict(), tmp_path / "vae.ckpt"
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
        write(path, {"model": content})
        assert words in one_line(lambda: maskrl.load_kl16(path), path)
    write(path, {"state_dict": weights})
    assert "no weights under 'model'" in one_line(lambda: maskrl.load_kl16(path), path)


# Latents as data


@pytest.fixture(scope="module")
def split():
    labels = torch.arange(6) % 3
    images = torch.randint(256, (6, 3, 8, 8), generator=maskrl.rng("images")).to(torch.uint8)
    return maskrl.Split(images, torch.arange(6), labels)


def test_latents_of_a_split_serve_batches_like_images(split):
    vae = released.small_vae()
    latents = maskrl.latents_of(split, vae, flip=True)
    assert latents.moments.shape == (2, 6, 32, 4, 4) and latents.moments.dtype == torch.float16
    mirrored = vae.moments(maskrl.to_unit(split.images).flip(-1))
    torch.testing.assert_close(latents.moments[1].float(), mirrored, atol=2e-3, rtol=2e-3)
    x, labels = latents.batch(5, maskrl.rng(1), flip=True)
    assert x.shape == (5, 16, 4, 4) and labels.shape == (5,)
    same, _ = latents.batch(5, maskrl.rng(1), flip=True)
    other, _ = latents.batch(5, maskrl.rng(2), flip=True)
    assert torch.equal(x, same) and not torch.equal(x, other)
    assert latents.spaced().shape == (6, 16, 4, 4) and latents.channels == 16
    assert len(maskrl.latents_of(split, vae).moments) == 1


def test_latents_are_cached_like_images(split, tmp_path, monkeypatch, capsys):
    vae = released.small_vae()
    in_memory = maskrl.latents_of(split, vae, flip=True)
    made = maskrl.latents_of(split, vae, True, tmp_path)
    assert "latents are made once" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(maskrl.KL16, "moments", None)  # nothing is encoded any more
        kept = maskrl.latents_of(split, vae, True, tmp_path)
    batches = [latents.batch(32, maskrl.rng(3), flip=True) for latents in (in_memory, made, kept)]
    for x, labels in batches[1:]:
        assert torch.equal(x, batches[0][0]) and torch.equal(labels, batches[0][1])
    assert torch.equal(kept.spaced(), in_memory.spaced())
    assert len(list(tmp_path.iterdir())) == 1
    maskrl.latents_of(split, vae, False, tmp_path)  # without the mirrored ones
    maskrl.latents_of(split.take([0, 1]), vae, True, tmp_path)  # of other images
    vae.quant_conv.bias.data[0] += 1
    other = maskrl.latents_of(split, vae, True, tmp_path)  # by another autoencoder
    assert not torch.equal(other.moments, kept.moments)
    assert len(list(tmp_path.iterdir())) == 4


def test_tokens_of_latents_come_back(split):
    settings = released.small_mar().settings
    latents = maskrl.latents_of(split, released.small_vae()).spaced()
    tokens = maskrl.to_tokens(latents, settings)
    assert tokens.shape == (6, 16, 16)
    torch.testing.assert_close(tokens, maskrl.patchify(latents, 1) * 0.2325)
    torch.testing.assert_close(maskrl.to_images(tokens, settings), latents)


def test_mean_and_scale_of_other_autoencoders_are_measured(split):
    data = maskrl.Data("folder", ["a", "b", "c"], {}, split, split, split)
    data = maskrl.with_latents(data, released.small_vae(), flip=False)
    settings = data.measure(maskrl.Settings(image_size=4, patch=1, steps=4))
    tokens = maskrl.to_tokens(data.learned.spaced(), settings)
    assert tokens.mean() == pytest.approx(0, abs=1e-3)
    assert tokens.std() == pytest.approx(1, abs=1e-3)


def test_checkpointing_changes_no_gradient():
    gradients = []
    tokens, labels = torch.randn(2, 16, 16), torch.tensor([0, 1])
    mask = maskrl.random_mask(torch.tensor([0.3, 0.9]), 16, maskrl.rng(0))
    model = released.small_mar()
    for on in (False, True):
        model.settings.checkpointing = on
        model.zero_grad()
        model.context(tokens, mask, labels).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.encoder_blocks.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


def test_checkpointing_is_used_by_the_student_and_the_auxiliary_network(monkeypatch):
    calls = []

    def counted(block, *inputs, **options):
        calls.append(block)
        return checkpoint(block, *inputs, **options)

    monkeypatch.setattr(maskrl, "checkpoint", counted)
    teacher = released.small_mar(checkpointing=True)
    training = maskrl.Distillation(teacher, teacher.settings)
    training.update(0, torch.randn(2, 16, 16), torch.tensor([0, 1]), maskrl.rng(0))
    blocks = {id(b) for m in (training.model, training.aux) for b in m.encoder_blocks}
    assert blocks <= {id(block) for block in calls}


# The scripts, from files in the official formats

SHORT = (
    "--judge-iters 4 --judge-n 18 --per-class 20 --batch 8 --prompts 2 --group 4 --steps 3 "
    "--gsim-iters 2 --rl-iters 1 --schedule-iters 1 --critical-steps 2 "
    "--denoise-steps 3 --device cpu"
).split()


def brightness(images, labels):
    """A reward of this test: it must be shown pixels."""
    assert images.shape[1:] == (3, 8, 8)
    return (images.mean((1, 2, 3)) + 1) / 2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with MAR's file, the autoencoder's, and images 8 x 8 of nine classes."""
    path = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    maskrl.save_mar(path / "mar.pth", released.small_mar(classes=9))
    torch.save({"model": released.small_vae().state_dict()}, path / "kl16.ckpt")
    labels = torch.arange(9).repeat_interleave(20)
    shapes = maskrl.draw_shapes(labels, 8, maskrl.rng("shapes"))
    for i, (image, label) in enumerate(zip(shapes, labels.tolist())):
        folder = path / "images" / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def latent_options(files):
    return ["--vae", str(files / "kl16.ckpt"), "--data", str(files / "images"), *SHORT]


@pytest.fixture(scope="module")
def student(files, latent_options):
    """student.pt of the teacher in MAR's format."""
    out = files / "student"
    teacher = ["--teacher", str(files / "mar.pth"), "--heads", "2"]
    metrics = train_distill.main([*teacher, *latent_options, "--checkpointing", "--out", str(out)])
    assert {"teacher", "student"} <= set(metrics["rows"])
    assert metrics["settings"]["checkpointing"]
    return out / "student.pt"


def test_sampling_from_mars_file(files, tmp_path):
    out, film = tmp_path / "samples.png", tmp_path / "film.png"
    common = [str(files / "mar.pth"), "--vae", str(files / "kl16.ckpt"), "--heads", "2"]
    short = ["--n", "4", "--steps", "3", "--denoise-steps", "3", "--device", "cpu"]
    paths = ["--out", str(out), "--film", str(film), "--files", str(tmp_path / "files")]
    sample.main([*common, *short, *paths, "--classes", "2", "7"])
    assert Image.open(out).size[0] > 100 and film.exists()
    written = sorted(p.name for p in (tmp_path / "files").iterdir())
    assert written == ["00000 2.png", "00001 7.png", "00002 2.png", "00003 7.png"]
    assert Image.open(tmp_path / "files" / written[0]).size == (8, 8)


def test_completing_an_image_in_latents(files, tmp_path):
    half = Image.new("L", (8, 8), 0)
    half.paste(255, (0, 0, 4, 8))
    half.save(tmp_path / "mask.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "image.png")
    vae = maskrl.load_kl16(files / "kl16.ckpt")
    settings = released.small_mar().settings
    tokens, mask = sample.to_complete(tmp_path / "image.png", tmp_path / "mask.png", settings, vae)
    assert tokens.shape == (1, 16, 16)
    assert mask.view(4, 4).tolist() == 4 * [[True, True, False, False]]
    common = [str(files / "mar.pth"), "--vae", str(files / "kl16.ckpt"), "--heads", "2"]
    paths = ["--inpaint", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png")]
    short = ["--n", "2", "--steps", "2", "--denoise-steps", "3", "--device", "cpu"]
    sample.main([*common, *paths, *short, "--out", str(tmp_path / "completed.png")])
    assert (tmp_path / "completed.png").exists()


def test_a_student_of_mars_file_knows_what_it_needs(student, files):
    model = maskrl.load_checkpoint(student, "student")
    assert model.channels == 16 and model.settings.scale == 0.2325
    assert model.classes == [f"class {i}" for i in range(9)]  # of the data
    images = maskrl.to_images(maskrl.generate(model, [0, 1]), model.settings)
    assert maskrl.load_kl16(files / "kl16.ckpt").decode(images).shape == (2, 3, 8, 8)


def test_some_classes_keep_the_numbers_of_mars_file(files, latent_options, tmp_path):
    base = maskrl.read_model(files / "mar.pth", "teacher", num_heads=2)
    chosen = ["--classes", "class 5", "class 2", "--out", str(tmp_path / "out")]
    args = train_distill.parse([*latent_options, *chosen])
    data, settings = maskrl.measured_data(args, base["settings"], base, torch.device("cpu"))
    assert data.classes == [f"class {i}" for i in range(9)] and settings.scale == 0.2325
    assert data.labels.tolist() == data.learned.labels.unique().tolist() == [2, 5]
    mapped = next((tmp_path / "cache").iterdir())  # the latents' images come from there
    assert json.loads((mapped / "key.json").read_text())["image_size"] == 8
    assert next(mapped.glob("latents-*/latents.bytes")).stat().st_size == 24 * 2 * 32 * 16 * 2
    assert data.learned.moments.shape == (2, 24, 32, 4, 4)


def test_numbers_that_are_names_stay_names(files):
    data = maskrl.Data(str(files / "images"), ["class 0"], {}, None, None, None)
    mars = maskrl.read_model(files / "mar.pth", num_heads=2)
    assert maskrl.named_classes(mars, data) == [f"class {i}" for i in range(9)]
    own = files / "numbered.pt"
    maskrl.save_checkpoint(own, released.small_mar(classes=9))
    assert maskrl.named_classes(maskrl.read_model(own), data) == maskrl.numbered(9)
    fewer = files / "fewer.pth"
    maskrl.save_mar(fewer, released.small_mar(classes=8))
    assert maskrl.named_classes(maskrl.read_model(fewer, num_heads=2), data) == maskrl.numbered(8)


def test_rl_on_a_student_of_latents_sees_pixels(student, latent_options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pixels", types.SimpleNamespace(brightness=brightness))
    options = ["--student", str(student), *latent_options, "--reward", "pixels:brightness"]
    for method in ("grpo", "backprop"):
        out = tmp_path / method
        metrics = train_rl.main([*options, "--method", method, "--out", str(out)])
        assert {"student", "policy"} <= set(metrics["rows"])
        assert maskrl.load_checkpoint(out / "policy.pt").channels == 16


def test_rl_with_clip_on_a_student_of_latents(student, latent_options, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    weights, name = tmp_path / "clip.pt", "ViT-S-32-alt"
    torch.save(open_clip.create_model(name).half().state_dict(), weights)
    clip = ["--reward", "clip", "--clip-model", name, "--clip-weights", str(weights)]
    out = ["--out", str(tmp_path / "clip")]
    metrics = train_rl.main(["--student", str(student), *latent_options, *clip, *out])
    assert 0 < metrics["rl"]["after"]["quality"] < 1


def test_a_teacher_of_latents_from_nothing(latent_options, tmp_path):
    small = "--image-size 4 --patch 1 --width 32 --depth 1 --heads 2 --head-width 32".split()
    iters = ["--teacher-iters", "2", "--flip", "--out", str(tmp_path)]
    metrics = train_distill.main([*small, *iters, *latent_options])
    assert metrics["settings"]["scale"] not in (0, 0.2325)  # measured
    assert maskrl.load_checkpoint(tmp_path / "teacher.pt").channels == 16
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"teacher", "student"}


def test_wrong_combinations_end_in_one_line(files, student, latent_options, tmp_path, capsys):
    mar, vae, images = files / "mar.pth", files / "kl16.ckpt", files / "images"
    new, cpu = ["--out", tmp_path / "new"], ["--device", "cpu"]
    few = files / "few"
    few.mkdir()
    (few / "class 0").symlink_to(images / "class 0")
    pixels = tmp_path / "pixels.pt"
    maskrl.save_checkpoint(pixels, maskrl.MAR(maskrl.Settings(scale=1.0), ["a"]))
    heads = ["--heads", 2]
    cases = [
        (sample.main, [mar, *heads, *cpu], "give --vae"),
        (sample.main, [mar, "--vae", vae, *cpu], "give num_heads (--heads)"),
        (sample.main, [mar, "--vae", mar, *heads, *cpu], "encoder.conv_in.weight is missing"),
        (sample.main, [vae, *cpu], "not a maskrl checkpoint"),
        (sample.main, [pixels, "--vae", vae, *cpu], "makes pixels; leave it out"),
        (train_distill.main, ["--preset", "mar_b", "--data", images, *new, *cpu], "give --vae"),
        (train_distill.main, ["--teacher", mar, *heads, *new, *cpu], "give --vae"),
        (train_distill.main, ["--teacher", mar, *latent_options, *new], "give num_heads"),
        (
            train_distill.main,
            ["--teacher", mar, *heads, *latent_options, "--data", few, *new],
            "has classes that the checkpoint has not: class 0",
        ),
        (train_rl.main, ["--student", mar, *heads, *latent_options, *new], "a student is needed"),
    ]
    for main, argv, words in cases:
        assert words in error_of(main, argv, capsys)
    assert not (tmp_path / "new").exists()


# FID


def test_fid_without_its_library_or_its_weights(tmp_path, monkeypatch):
    images = torch.zeros(4, 3, 8, 8)
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(maskrl.InputError, match=r"pip install maskrl\[fid\]"):
        maskrl.fid_report(tmp_path, images, 8)

    def offline(**options):
        raise URLError("no network")

    fake = types.SimpleNamespace(calculate_metrics=offline)
    monkeypatch.setitem(sys.modules, "torch_fidelity", fake)
    with pytest.raises(maskrl.InputError, match="could not be downloaded.*no network"):
        maskrl.fid_report(tmp_path, images, 8)
    with pytest.raises(maskrl.InputError, match="no images"):
        maskrl.fid_report(tmp_path / "empty", images, 8)


def test_fid_is_asked_for_bytes_of_one_size(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (20, 10), "white").save(tmp_path / "deep" / "white.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "zz.png").write_text("no image either")
    seen = {}

    def calculate(**options):
        seen.update(options)
        names = ("inception_score_mean", "inception_score_std", "frechet_inception_distance")
        return dict(zip(names, (2.0, 0.1, 30.0)))

    fake = types.SimpleNamespace(calculate_metrics=calculate)
    monkeypatch.setitem(sys.modules, "torch_fidelity", fake)
    report = maskrl.fid_report(tmp_path, torch.full((2, 3, 8, 8), -1.0), 8)
    assert report == {"fid": 30.0, "inception_score": 2.0, "inception_score_std": 0.1}
    assert len(seen["input1"]) == 2 and len(seen["input2"]) == 2
    assert one_line(lambda: seen["input2"][1], "zz.png")
    assert torch.equal(seen["input1"][1], torch.zeros(3, 8, 8, dtype=torch.uint8))
    assert torch.equal(seen["input2"][0], torch.full((3, 8, 8), 255, dtype=torch.uint8))
