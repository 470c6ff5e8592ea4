"""Grids, labelled rows, films, single files and curves."""

import json
import sys

import pytest
import torch
from conftest import full_disk, random_model
from PIL import Image, ImageFont

from maskrl import PolicyGradient, Sampling, generate, rollout, to_images
from workbench import pictures
from workbench.errors import InputError
from workbench.pictures import (
    curves,
    film,
    gain_picture,
    grid_columns,
    labelled_rows,
    panels,
    picture,
    pixel_mask,
    samples_picture,
    save_picture,
    two_of_each_class,
    write_files,
)


def test_a_caption_wider_than_its_images_is_not_cut_off(tmp_path):
    """It once was, where a block had few columns."""
    caption = "its nearest training images, a long story: 16.0 x 100 steps, 123.4 ms per image"
    labelled_rows(tmp_path / "rows.png", {caption: torch.zeros(2, 3, 8, 8)}, columns=2)
    sheet = Image.open(tmp_path / "rows.png").convert("L")
    text = ImageFont.load_default(size=15).getlength(caption)
    assert sheet.width >= 6 + text
    last_letter = sheet.crop((int(text) - 8, 0, sheet.width, 24))
    assert last_letter.getextrema()[0] < 128


@pytest.mark.parametrize(
    "n, classes, columns",
    [(64, 9, 8), (63, 9, 9), (18, 9, 9), (5, 9, 5), (100, 1000, 10), (64, 2, 8), (17, 9, 9)],
)
def test_a_grid_leaves_few_places_empty(n, classes, columns):
    """64 images of nine classes once left one alone in the last row."""
    assert grid_columns(n, classes) == columns
    assert -n % columns <= 1


def test_a_picture_has_its_images_in_rows_and_enlarges_small_ones():
    images = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 3, 8, 8)
    grid = picture(images, columns=3, pixels=16, padding=0)
    assert grid.size == (3 * 16, 2 * 16)
    levels = [grid.getpixel((16 * (i % 3) + 15, 16 * (i // 3)))[0] for i in range(6)]
    assert levels == [0, 51, 102, 153, 204, 255]


def test_a_picture_on_a_full_disk_names_its_file_and_leaves_nothing(tmp_path):
    image = Image.effect_noise((200, 200), 50)
    message = "a.png cannot be written: File too large"
    with full_disk(100), pytest.raises(InputError, match=message):
        save_picture(tmp_path / "a.png", image)
    assert list(tmp_path.iterdir()) == []


def test_a_token_covers_its_own_pixels():
    mask = torch.tensor([True, False, False, True])
    pixels = pixel_mask(mask, 4)
    assert pixels.shape == (1, 4, 4)
    assert pixels[0].tolist() == [[True] * 2 + [False] * 2] * 2 + [[False] * 2 + [True] * 2] * 2


def test_a_film_ends_with_the_image_and_starts_grey(student, tmp_path):
    tokens, trace = generate(student, [0, 1], Sampling(steps=4), trace=True)
    film(tmp_path / "film.png", tokens, trace, student.settings)
    strip = Image.open(tmp_path / "film.png")
    tile, columns = 48 + 4, 5
    assert strip.size == (4 + columns * tile, 4 + 2 * tile)
    first = strip.crop((4, 4, 52, 52))
    assert first.getextrema() == ((128, 128),) * 3
    last = strip.crop((4 + 4 * tile, 4, 52 + 4 * tile, 52))
    image = to_images(tokens[:1], student.settings)
    assert last.tobytes() == picture(image, 1, pixels=48, padding=0).tobytes()


def test_a_gif_shows_every_iteration_and_rests_on_the_last(student, tmp_path):
    tokens, trace = generate(student, [0] * 9, Sampling(steps=4), trace=True)
    film(tmp_path / "film.GIF", tokens, trace, student.settings)
    moving = Image.open(tmp_path / "film.GIF")
    assert moving.format == "GIF"
    assert moving.size == (4 + 4 * 68, 4 + 2 * 68)  # eight images at most
    durations = []
    for i in range(moving.n_frames):
        moving.seek(i)
        durations.append(moving.info["duration"])
    assert sum(durations) == 250 * (5 + 6)


NAMES = ["red circle", "red, like wine", "a/b"]


def test_a_slash_in_a_class_name_makes_no_folder(tmp_path):
    write_files(tmp_path, torch.zeros(1, 3, 8, 8), NAMES[2:])
    assert [path.name for path in tmp_path.iterdir()] == ["00000 a_b.png"]


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\u6f22", "\U0001f408"])
def test_a_class_name_of_250_bytes_is_cut_for_its_file(tmp_path, letter):
    """It once ended in `File name too long`."""
    name = letter * (250 // len(letter.encode()))
    write_files(tmp_path, torch.zeros(1, 3, 8, 8), [name])
    (path,) = tmp_path.iterdir()
    assert path.stem == "00000 " + letter * (200 // len(letter.encode()))


def test_files_count_on_and_have_the_pixels_of_the_images(tmp_path):
    images = torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, 8, 8)
    write_files(tmp_path, images, NAMES[:2], first=7)
    found = {path.name: Image.open(path) for path in tmp_path.iterdir()}
    assert found.keys() == {"00007 red circle.png", "00008 red, like wine.png"}
    assert [found[name].getextrema()[0] for name in sorted(found)] == [(0, 0), (255, 255)]
    assert all(image.size == (8, 8) for image in found.values())


def test_two_images_of_each_class_are_the_first_in_a_row_each():
    labels = torch.tensor([4, 2, 4, 4, 2, 7, 7])
    assert two_of_each_class(labels) == ([1, 0, 5, 4, 2, 6], 3)
    assert two_of_each_class(torch.arange(30) % 15)[1] == 12


def test_the_picture_of_samples_leaves_out_the_untrained(tmp_path, monkeypatch):
    drawn = {}

    def watched(path, rows, columns):
        drawn.update(rows)

    monkeypatch.setattr(pictures, "labelled_rows", watched)
    images = {name: torch.rand(4, 3, 8, 8) for name in ("real", "untrained", "student")}
    speed = {"steps": 7.0, "denoise_steps": 1, "seconds_per_image": 0.0123}
    rows = {"real": {}, "untrained": speed, "student": speed}
    samples_picture(tmp_path / "samples.png", images, rows, torch.tensor([0, 1, 0, 1]))
    caption = "student: 7.0 x 1 steps, 12.3 ms per image"
    assert list(drawn) == ["real", caption]
    assert torch.equal(drawn[caption], images["student"])


# Curves -------------------------------------------------------------------------------------------

LINES = [
    {"stage": "teacher", "step": 0, "loss": 3.0},
    {"stage": "teacher", "step": 1, "loss": 2.0},
    {"stage": "teacher", "step": 1, "loss": 1.0},  # repeated after an interruption
    {"stage": "student", "step": 1, "validation": 5.0},
    {"stage": "policy", "step": 0, "quality": 0.5, "unknown": 1.0},
]


def test_of_a_repeated_step_the_last_value_is_drawn():
    assert panels(LINES) == {
        "teacher: loss": {0: 3.0, 1: 1.0},
        "student: Fréchet distance, pixels": {1: 5.0},
        "policy: quality": {0: 0.5},
    }


def no_matplotlib():
    return None


def test_curves_are_drawn_of_what_was_logged(tmp_path, monkeypatch):
    curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "figure_class", no_matplotlib)
        curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()
    curves(tmp_path)
    assert Image.open(tmp_path / "curves.png").width > 1000


def test_curves_leave_the_backend_of_a_notebook_alone(tmp_path):
    """A notebook that had trained once showed no figures any more."""
    matplotlib = pytest.importorskip("matplotlib")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    with matplotlib.rc_context({"backend": "svg"}):
        curves(tmp_path)
        assert matplotlib.get_backend() == "svg"
    assert (tmp_path / "curves.png").exists()


def test_without_matplotlib_its_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert pictures.figure_class() is None
    assert "pip install matplotlib" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["z", "x"])
def test_the_information_gain_is_drawn_for_16_prompts(tmp_path, action, monkeypatch):
    student = random_model("student", action=action, steps=4, group=2, critical_steps=2)
    mean_image = torch.zeros(1, 16, 12)
    training = PolicyGradient(student, student.settings, pictures.quality_one, mean_image)
    prompts = []

    def watched(model, quality, labels, seed):
        prompts.append(labels.tolist())
        return rollout(model, quality, labels, seed)

    monkeypatch.setattr(pictures, "rollout", watched)
    gain_picture(tmp_path, training, torch.tensor([0, 2]))
    assert prompts == [[0, 2] * 8]
    darkest, brightest = Image.open(tmp_path / "gain.png").convert("L").getextrema()
    assert darkest < 100 and brightest == 255
