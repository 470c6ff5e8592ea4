"""MAR's released format: reader, writer, and the scripts on files in the official formats.

tests/data/mar_A.pth is a tiny model with random weights in the official format, whose arithmetic
test_reference.py checks."""

import argparse
import json
import pathlib
import sys
import types

import pytest
import torch
from conftest import error_of
from helpers_released import DATA, official, refusal, small_mar, small_vae, without
from PIL import Image

import sample
import train_distill
import train_rl
from maskrl import MAR, Sampling, generate, rng, to_images
from workbench.data import Data, draw_shapes
from workbench.files import load_checkpoint, write_checkpoint
from workbench.inpaint import read_inpainting
from workbench.kl16 import load_kl16
from workbench.options import measured_data, named_classes
from workbench.released import (
    load_mar,
    load_model,
    mar_name,
    mar_settings,
    numbered,
    read_model,
    save_mar,
)
from workbench.settings import RunSettings, preset

MAR_A = DATA / "mar_A.pth"


@pytest.fixture(scope="module")
def mar():
    return load_mar(MAR_A, ema=False, num_heads=4)


# MAR's format -------------------------------------------------------------------------------------


def test_settings_are_read_off_the_shapes(mar):
    s = mar.settings
    assert (s.image_size, s.patch, s.width, s.heads, s.buffer) == (4, 1, 64, 4, 8)
    assert (s.depth, s.decoder_depth, s.head_width, s.head_depth) == (2, 2, 64, 2)
    assert (s.predicts, s.muon_lr, s.x_0_limit) == ("eps", 0.0, 0.0)
    assert (s.mean, s.scale) == (0.0, 0.2325)
    assert mar.classes == [str(i) for i in range(10)] and mar.kind == "teacher"
    assert mar.channels == 16 and not mar.training


def test_ema_is_taken_and_a_namespace_dropped(tmp_path, mar):
    path = tmp_path / "mar.pth"
    torch.save(official() | {"args": argparse.Namespace(lr=1e-4), "epoch": 399}, path)
    plain = load_mar(path, ema=False, num_heads=4)
    ema = load_mar(path, num_heads=4)
    for own, a, b in zip(*(m.state_dict().values() for m in (mar, plain, ema))):
        assert torch.equal(own, a)
        torch.testing.assert_close(1.01 * own, b)
    assert "model_ema" in refusal(MAR_A, load_mar, MAR_A, num_heads=4)


def test_class_names_may_be_given():
    names = [f"class {i}" for i in range(10)]
    assert load_mar(MAR_A, False, 4, classes=names).classes == names
    message = refusal(MAR_A, load_mar, MAR_A, False, 4, classes=names[:3])
    assert "10 classes" in message and "3 names" in message


SHAPES = (
    {"depth": 3, "decoder_depth": 1, "heads": 4},
    {"depth": 1, "decoder_depth": 2, "heads": 1, "width": 48, "buffer": 5},
    {"image_size": 8, "patch": 2, "head_width": 16, "head_depth": 3},
)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_is_read_back_in_every_shape(tmp_path, shape):
    model, ema = small_mar(**shape), small_mar(**shape)
    path = tmp_path / "mar.pth"
    save_mar(path, model, ema)
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"model", "model_ema"}
    assert "diffloss.net.res_blocks.0.in_ln.weight" in content["model"]
    assert not any(name.startswith("head.") for name in content["model"])
    sampling = Sampling(steps=2, guidance=2.0, denoise_steps=3, order="random")
    for original, flag in ((model, False), (ema, True)):
        again = load_mar(path, flag, num_heads=model.settings.heads)
        assert all(getattr(again.settings, name) == value for name, value in shape.items())
        assert again.settings.order == "random"  # as MAR reveals
        assert torch.equal(generate(original, [0, 2], sampling), generate(again, [0, 2], sampling))


def test_the_writer_makes_the_names_of_the_official_code(tmp_path, mar):
    save_mar(tmp_path / "again.pth", mar)
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    weights = official()["model"]
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_the_writer_refuses_what_the_format_cannot_hold(tmp_path):
    path = tmp_path / "mar.pth"
    for settings, word in (({"predicts": "x_0"}, "eps"), ({"scale": 1.0}, "0.2325")):
        assert word in refusal(path, save_mar, path, small_mar(**settings))
    student = small_mar()
    student.kind = "student"
    assert "not for a student" in refusal(path, save_mar, path, student)
    assert not path.exists()


def broken(name):
    """{what is wrong: (a changed part of a checkpoint, words of the message)}[name]."""
    weights = official()["model"]
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
    path = tmp_path / "mar.pth"
    torch.save({"model": weights}, path)
    assert words in refusal(path, load_mar, path, False, 4)


def test_many_wrong_weights_are_counted(tmp_path):
    few = {name: value for name, value in official()["model"].items() if ".norm" not in name}
    path = tmp_path / "mar.pth"
    torch.save({"model": few}, path)
    assert "; and 11 more" in refusal(path, load_mar, path, False, 4)


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
    torch.save(official() | {"args": Foreign()}, "foreign.pth")
    torch.save([1, 2], "list.pth")
    torch.save({"model": {"weight": torch.zeros(3)}}, "other.pth")
    cases = {
        "none.pth": "there is no checkpoint",
        "cut.pth": "is cut off",
        "text.pth": "is not a checkpoint: it is a text that begins with 'not weights'",
        "empty.pth": "is not a checkpoint: it is empty",
        "foreign.pth": "it holds a pathlib",
        "list.pth": "not a file in MAR's format",
        "other.pth": "not a file in MAR's format",
    }
    for name, words in cases.items():
        assert words in refusal(name, load_mar, name)
        assert refusal(name, load_kl16, name)
        assert refusal(name, load_model, name)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name, millions", [("mar_b", 208), ("mar_l", 479), ("mar_h", 943)])
def test_released_sizes(name, millions):
    settings = preset(name)
    assert settings.length == 256
    with torch.device("meta"):
        model = MAR(settings, numbered(1000), image_channels=16)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1
    weights = {mar_name(key): value for key, value in model.state_dict().items()}
    read = mar_settings("mar.pth", weights, None)  # heads: known from the width
    differs = {key for key in vars(settings) if getattr(settings, key) != getattr(read, key)}
    assert differs == {"scale", "decoder_depth"}  # scale is measured; the depth is written out
    assert read.decoder_depth == settings.depth


def test_heads_are_asked_for_where_the_width_does_not_tell():
    message = refusal(MAR_A, load_mar, MAR_A, ema=False)
    assert "width 64" in message and "num_heads" in message and "--heads" in message


def test_a_file_is_read_by_its_format(tmp_path):
    mars, own = tmp_path / "mar.pth", tmp_path / "teacher.pt"
    model = small_mar()
    save_mar(mars, model)
    write_checkpoint(own, model)
    sampling = Sampling(steps=2, denoise_steps=3, order="random", guidance=1.0)
    expected = generate(model, [0, 1], sampling)
    for path in (mars, own):
        assert read_model(path, "teacher", num_heads=2)["classes"] == numbered(3)
        assert torch.equal(generate(load_model(path, num_heads=2), [0, 1], sampling), expected)
        assert "is a teacher; a student is needed" in refusal(path, read_model, path, "student")


# The scripts, from files in the official formats --------------------------------------------------

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
    save_mar(path / "mar.pth", small_mar(classes=9))
    torch.save({"model": small_vae().state_dict()}, path / "kl16.ckpt")
    labels = torch.arange(9).repeat_interleave(20)
    shapes = draw_shapes(labels, 8, rng("shapes"))
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
    vae, settings = load_kl16(files / "kl16.ckpt"), small_mar().settings
    tokens, mask = read_inpainting(tmp_path / "image.png", tmp_path / "mask.png", settings, vae)
    assert tokens.shape == (1, 16, 16)
    assert mask.view(4, 4).tolist() == 4 * [[True, True, False, False]]
    common = [str(files / "mar.pth"), "--vae", str(files / "kl16.ckpt"), "--heads", "2"]
    paths = ["--inpaint", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png")]
    short = ["--n", "2", "--steps", "2", "--denoise-steps", "3", "--device", "cpu"]
    sample.main([*common, *paths, *short, "--out", str(tmp_path / "completed.png")])
    assert (tmp_path / "completed.png").exists()


def test_a_student_of_mars_file_knows_what_it_needs(student, files):
    model = load_checkpoint(student, "student")
    assert model.channels == 16 and model.settings.scale == 0.2325
    assert model.classes == [f"class {i}" for i in range(9)]  # of the data
    latents = to_images(generate(model, [0, 1]), model.settings)
    assert load_kl16(files / "kl16.ckpt").decode(latents).shape == (2, 3, 8, 8)


def test_some_classes_keep_the_numbers_of_mars_file(files, latent_options, tmp_path):
    base = read_model(files / "mar.pth", "teacher", num_heads=2)
    chosen = ["--classes", "class 5", "class 2", "--out", str(tmp_path / "out")]
    args = train_distill.parse([*latent_options, *chosen])
    data, settings = measured_data(args, base["settings"], base, torch.device("cpu"))
    assert data.classes == [f"class {i}" for i in range(9)] and settings.scale == 0.2325
    assert data.labels.tolist() == data.learned.labels.unique().tolist() == [2, 5]
    mapped = next((tmp_path / "out" / "cache").iterdir())  # the latents' images come from there
    assert json.loads((mapped / "key.json").read_text())["image_size"] == 8
    assert next(mapped.glob("latents-*/latents.bytes")).stat().st_size == 24 * 2 * 32 * 16 * 2
    assert data.learned.moments.shape == (2, 24, 32, 4, 4)


def test_numbers_that_are_names_stay_names(files):
    data = Data(str(files / "images"), ["class 0"], {}, None, None, None)
    mars = read_model(files / "mar.pth", num_heads=2)
    assert named_classes(mars, data) == [f"class {i}" for i in range(9)]
    own = files / "numbered.pt"
    write_checkpoint(own, small_mar(classes=9))
    assert named_classes(read_model(own), data) == numbered(9)
    fewer = files / "fewer.pth"
    save_mar(fewer, small_mar(classes=8))
    assert named_classes(read_model(fewer, num_heads=2), data) == numbered(8)


def test_rl_on_a_student_of_latents_sees_pixels(student, latent_options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pixels", types.SimpleNamespace(brightness=brightness))
    options = ["--student", str(student), *latent_options, "--reward", "pixels:brightness"]
    for method in ("grpo", "backprop"):
        out = tmp_path / method
        metrics = train_rl.main([*options, "--method", method, "--out", str(out)])
        assert {"student", "policy"} <= set(metrics["rows"])
        assert load_checkpoint(out / "policy.pt").channels == 16


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
    assert load_checkpoint(tmp_path / "teacher.pt").channels == 16
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"teacher", "student"}


def test_wrong_combinations_end_in_one_line(files, student, latent_options, tmp_path, capsys):
    mar, vae, images = files / "mar.pth", files / "kl16.ckpt", files / "images"
    new, cpu = ["--out", tmp_path / "new"], ["--device", "cpu"]
    few = files / "few"
    few.mkdir()
    (few / "class 0").symlink_to(images / "class 0")
    pixels = tmp_path / "pixels.pt"
    write_checkpoint(pixels, MAR(RunSettings(scale=1.0), ["a"]))
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
            "has classes that the checkpoint does not know: class 0",
        ),
        (train_rl.main, ["--student", mar, *heads, *latent_options, *new], "a student is needed"),
    ]
    for main, argv, words in cases:
        assert words in error_of(main, argv, capsys)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"cache"}
