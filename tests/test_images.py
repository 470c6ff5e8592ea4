"""Image files: how one looks, what of a folder is read, and the cache of decoded images."""

import os
import random
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from helpers_files import DAMAGE
from helpers_images import SIDE, make_folder, small_settings
from PIL import Image

from maskrl import rng
from workbench import images
from workbench.data import load_data
from workbench.errors import InputError
from workbench.images import build_or_load_cache, middle_square, read_rgb


@pytest.fixture
def photos(tmp_path):
    return make_folder(tmp_path / "photos")


@pytest.fixture
def load(photos, tmp_path):
    """A function that loads the photos through a cache."""

    def load(size=SIDE):
        return load_data(small_settings(image_size=size), str(photos), cache=tmp_path / "cache")

    return load


def caches(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def pixel(path, x=0, y=0):
    return read_rgb(path).getpixel((x, y))


# How a file looks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("LA", (0, 51), (204, 204, 204)),
        ("I;16", 257 * 50, (50, 50, 50)),
        ("I;16", 65535, (255, 255, 255)),
    ],
)
def test_a_png_reads_as_a_person_sees_it(tmp_path, mode, colour, expected):
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == expected


def test_a_palette_may_be_transparent(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1)
    assert [pixel(tmp_path / "a.png", x) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_cmyk_reads_as_rgb(tmp_path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert pixel(tmp_path / "a.tif") == (255, 0, 0)


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_a_ramp_of_floats_is_scaled_by_its_white(tmp_path, white):
    ramp = np.array([[0, 0.2, 0.6, 1, np.nan]], dtype=np.float32) * white
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    assert [pixel(tmp_path / "a.tif", x)[0] for x in range(5)] == [0, 51, 153, 255, 0]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_ramp_of_16_bits_is_scaled(tmp_path, name):
    ramp = np.array([[0, 257 * 51, 257 * 153, 65535]], dtype=np.uint16)
    Image.fromarray(ramp).save(tmp_path / name)
    assert [pixel(tmp_path / name, x)[0] for x in range(4)] == [0, 51, 153, 255]


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "a.gif") == (255, 0, 0)


def test_exif_turns_an_image_upright(tmp_path):
    image = Image.new("RGB", (40, 80), "red")
    image.paste("blue", (0, 0, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # the file holds it on its side, to be turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "image.png", exif=exif)
    assert read_rgb(tmp_path / "image.png").size == (40, 80)
    assert pixel(tmp_path / "image.png") == (0, 0, 255)
    assert pixel(tmp_path / "image.png", 39, 79) == (255, 0, 0)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    ramp = np.linspace(0, 255, 640).astype(np.uint8)[None].repeat(480, 0)
    Image.fromarray(ramp).save(tmp_path / "a.jpg", quality=95)
    whole = middle_square(read_rgb(tmp_path / "a.jpg"), SIDE)
    small = read_rgb(tmp_path / "a.jpg", SIDE)
    assert small.width < 640 / 2
    assert (middle_square(small, SIDE).int() - whole.int()).abs().max() <= 2


def test_an_image_is_resized_and_its_middle_taken(tmp_path):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (8, 0, 24, 16))
    image.save(tmp_path / "image.png")
    image = read_rgb(tmp_path / "image.png")
    assert middle_square(image, 16).min() == 255
    assert middle_square(image, 8).shape == (3, 8, 8)


# Damaged files ------------------------------------------------------------------------------------

IMAGES = {
    "a.png": ("RGB", {}),
    "b.png": ("I;16", {}),
    "c.jpg": ("RGB", {}),
    "d.jpg": ("CMYK", {}),
    "e.gif": ("P", {"save_all": True}),
    "f.webp": ("RGBA", {}),
    "g.tiff": ("L", {"compression": "tiff_lzw"}),
    "h.bmp": ("RGB", {}),
    "i.jp2": ("RGB", {}),
    "j.ppm": ("RGB", {}),
}


def check_damaged_images(tmp_path, dice, n):
    for i in range(n):
        name = dice.choice(list(IMAGES))
        mode, options = IMAGES[name]
        image = Image.effect_noise((24, 16), 80)
        image = Image.new("I;16", (24, 16)) if mode == "I;16" else image.convert(mode)
        image.save(tmp_path / name, **options)
        damaged = DAMAGE[i % len(DAMAGE)]((tmp_path / name).read_bytes(), dice)
        (tmp_path / name).write_bytes(damaged)
        try:
            image = read_rgb(tmp_path / name, 8)
        except InputError as error:
            assert name in str(error)
        else:
            assert middle_square(image, 8).shape == (3, 8, 8)


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_image_is_refused_or_read(tmp_path):
    check_damaged_images(tmp_path, random.Random(0), 60)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_many_damaged_images_are_refused_or_read(tmp_path):
    check_damaged_images(tmp_path, random.Random(1), 1000)


# What is read and what is not ---------------------------------------------------------------------


def test_files_that_cannot_be_read_are_named_and_counted(photos, load, capsys):
    whole = (photos / "cat" / "00.png").read_bytes()
    (photos / "cat" / "bomb.ppm").write_bytes(b"P6 20000 20000 255\n")
    (photos / "cat" / "empty.jpg").write_bytes(b"")
    (photos / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    for _ in range(2):  # the cache remembers
        data = load()
        errors = capsys.readouterr().err
        assert "bomb.ppm: Image size (400000000 pixels) exceeds limit" in errors
        assert "empty.jpg: no image" in errors and "cut.png" in errors
        assert "skipped 3 of 43 images" in errors
        assert sum(len(part) for part in (data.train, data.judge, data.test)) == 40


def test_of_many_unreadable_files_ten_are_named(photos, load, capsys):
    for i in range(30):
        (photos / "cat" / f"empty{i}.jpg").write_bytes(b"")
    load()
    errors = capsys.readouterr().err
    assert errors.count("empty") == 10 and "skipped 30 of 70" in errors


def test_other_files_are_counted_by_kind(photos, load, capsys):
    for name in ("a.heic", "b.HEIC", "c.txt", ".DS_Store"):
        (photos / "cat" / name).write_bytes(b"x")
    Image.new("RGB", (4, 4)).save(photos / "lost.png")
    (photos / "cat" / "gone.png").symlink_to("nowhere.png")
    (photos / ".git").mkdir()
    assert load().classes == ["cat", "dog"]
    errors = capsys.readouterr().err
    for kind in ("2 .heic", "1 .txt", "1 .DS_Store", "1 .png outside the sub-folders"):
        assert kind in errors
    assert "1 .png (a broken link)" in errors


def test_links_to_files_and_folders_are_followed(photos, load, tmp_path):
    elsewhere = make_folder(tmp_path / "elsewhere", ["bird"], 21)
    (photos / "bird").symlink_to(elsewhere / "bird")
    (photos / "cat" / "extra.png").symlink_to(elsewhere / "bird" / "00.png")
    (photos / "cat" / "more").symlink_to(elsewhere / "bird")
    data = load()
    assert data.classes == ["bird", "cat", "dog"]
    labels = torch.cat([part.labels for part in (data.train, data.judge, data.test)])
    assert labels.bincount().tolist() == [21, 20 + 1 + 21, 20]


def test_a_folder_that_cannot_serve_ends_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    make_folder(tmp_path / "few", ["cat"], 19)
    cases = {
        "missing": "No such file",
        "empty": "has no sub-folders",
        "hollow": "'cat' in .* has 0 readable images",
        "few": "'cat' in .* has 19 readable images; at least 20",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            load_data(small_settings(), str(tmp_path / name))


def png_header(side):
    """A PNG that says it has side x side pixels, and has none."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + checksum


def test_a_folder_of_odd_things_is_read_as_far_as_it_can_be(tmp_path, monkeypatch):
    """Links in a circle, names that are not UTF-8, images of one pixel, and one that says it has
    400 million."""
    # as Python opens it for a process; pytest's own is stricter
    monkeypatch.setattr(sys, "stderr", open(tmp_path / "said", "w", errors="backslashreplace"))
    folder = os.fsencode(tmp_path / "photos") + b"/caf\xe9"
    os.makedirs(folder)
    for i in range(20):
        Image.new("RGB", (1, 1), (i, 0, 0)).save(os.fsdecode(folder + b"/\xff%d.png" % i))
    os.symlink(b"..", folder + b"/above")
    os.symlink(b".", folder + b"/here")
    os.symlink(b"itself", folder + b"/itself")
    os.symlink(b"me.png", folder + b"/me.png")
    (tmp_path / "photos" / "caf\udce9" / "huge.png").write_bytes(png_header(20_000))
    data = load_data(small_settings(), str(tmp_path / "photos"))
    assert len(data.train) + len(data.judge) + len(data.test) == 20
    assert data.classes == ["caf\udce9"]
    sys.stderr.flush()
    said = (tmp_path / "said").read_text()
    assert "1 itself (a broken link), 1 .png (a broken link)" in said
    assert "huge.png" in said
    assert "skipped 1 of 21" in said


# The cache ----------------------------------------------------------------------------------------


def test_mapped_batches_equal_those_in_memory(photos, load):
    mapped, in_memory = load(), load_data(small_settings(), str(photos))
    for part in ("train", "judge", "test"):
        batches = [getattr(data, part).batch(16, rng(3), flip=True) for data in (mapped, in_memory)]
        assert all(torch.equal(a, b) for a, b in zip(*batches))
    assert torch.equal(mapped.train.spaced(), in_memory.train.spaced())


def test_images_are_decoded_once(load, tmp_path, monkeypatch):
    once = load()
    monkeypatch.setattr(images, "decode", None)
    assert torch.equal(load().train.images, once.train.images)
    assert len(caches(tmp_path)) == 1


def test_a_changed_an_added_and_a_removed_file_are_noticed(photos, load, tmp_path):
    before = load().train.stored.clone()
    path = photos / "cat" / "00.png"
    Image.new("RGB", (SIDE, SIDE), "red").save(path)
    changed = load().train.stored
    assert changed[0, :, 0, 0].tolist() == [255, 0, 0] and torch.equal(changed[1:], before[1:])
    (photos / "cat" / "added.png").write_bytes(path.read_bytes())
    assert len(load().train.stored) == 41
    (photos / "cat" / "added.png").unlink()
    os.utime(path, (0, 0))  # the same bytes, written at another time
    load()
    assert len(caches(tmp_path)) == 4
    load(size=4)
    assert len(caches(tmp_path)) == 5


def test_an_interrupted_build_leaves_nothing_behind(load, tmp_path, monkeypatch):
    def interrupted(paths, size, file):
        file.write(bytes(100))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load()
    assert caches(tmp_path) == []
    (tmp_path / "cache" / "unfinished-x" / "part").mkdir(parents=True)  # as killed by the system
    assert load().train.stored.any()


def test_two_runs_may_make_the_same_cache_at_once(load, tmp_path, monkeypatch):
    real = images.decode

    def overtaken(*args):
        monkeypatch.setattr(images, "decode", real)
        load()  # another run begins later and is done first
        return real(*args)

    monkeypatch.setattr(images, "decode", overtaken)
    assert load().train.stored.any() and len(caches(tmp_path)) == 1


def test_a_cache_that_cannot_be_written_ends_in_one_line(photos, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match="cache"):
        load_data(small_settings(), str(photos), cache=tmp_path / "cache")


def write_seven(file):
    file.write(bytes([7, 0, 7]))
    return {"sevens": 2}


def test_a_cache_has_the_same_bytes_and_metadata_in_memory_and_in_a_folder(tmp_path):
    in_memory = build_or_load_cache(None, "numbers", write_seven)
    built = build_or_load_cache(tmp_path / "cache", "numbers", write_seven)
    loaded = build_or_load_cache(tmp_path / "cache", "numbers", None)
    for content, metadata in (in_memory, built, loaded):
        assert content.dtype == torch.uint8 and content.tolist() == [7, 0, 7]
        assert metadata == {"sevens": 2}
