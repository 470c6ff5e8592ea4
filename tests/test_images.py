"""Image files: how one looks, what of a folder is read, and the cache of decoded images."""

import errno
import os
import random
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_files import DAMAGE
from helpers_images import SIDE, make_folder, small_settings
from PIL import Image, PngImagePlugin, TiffImagePlugin

from maskrl import rng
from workbench import images
from workbench.data import load_data
from workbench.errors import InputError
from workbench.images import middle_square, read_rgb


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


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("name", ["a.tif", "a.ppm"])
def test_fewer_bits_in_16_are_scaled_by_what_the_file_says(tmp_path, name, bits):
    """Pixels of 12 bits were once nearly black."""
    white = 2**bits - 1
    ramp = np.array([[0, white / 5, white * 3 / 5, white]]).round().astype(np.uint16)
    if name == "a.tif":
        Image.fromarray(ramp).save(tmp_path / name, tiffinfo={281: white})  # MaxSampleValue
    else:
        header = f"P5 4 1 {white}\n".encode()
        (tmp_path / name).write_bytes(header + ramp.astype(">u2").tobytes())
    assert [pixel(tmp_path / name, x)[0] for x in range(4)] == [0, 51, 153, 255]


def tiff_of_12_bits(pixels):
    """A TIFF that packs its grey pixels [1, W] in 12 bits each."""
    packed = int("".join(f"{v:012b}" for v in pixels), 2).to_bytes(len(pixels) * 12 // 8, "big")
    # width, height, bits, no compression, black is 0, where, channels, rows, bytes
    tags = {256: len(pixels), 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1}
    tags[279] = len(packed)
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    head = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed
    return head + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)


def test_a_tiff_of_12_bits_is_scaled(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff_of_12_bits([0, 819, 2457, 4095]))
    assert [pixel(tmp_path / "a.tif", x)[0] for x in range(4)] == [0, 51, 153, 255]


def test_a_maximum_that_is_only_the_brightest_pixel_does_not_scale(tmp_path):
    """TIFF keeps MaxSampleValue for statistics."""
    ramp = np.array([[0, 257 * 100]], dtype=np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.tif", tiffinfo={281: 25700})
    assert pixel(tmp_path / "a.tif", 1)[0] == 100


def test_a_tiff_may_say_that_0_is_white(tmp_path):
    ramp = np.array([[0, 257 * 51, 65535]], dtype=np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as image:
        assert image.tag_v2[262] == 0
    assert [pixel(tmp_path / "a.tif", x)[0] for x in range(3)] == [255, 204, 0]


FLOATS = {  # name: pixels, what a TIFF says of lowest and highest, and the bytes to be read
    "from -1 to 1": ([-1, -0.2, 0.2, 1], {}, [0, 102, 153, 255]),
    "a little beyond": ([0, 0.2, 1, 1.02, -0.02], {}, [0, 51, 255, 255, 0]),
    "infinite": ([0, 0.2, 1, np.inf, -np.inf], {}, [0, 51, 255, 255, 0]),
    "no data": ([0, 0.2, 1, -9999], {}, [0, 51, 255, 0]),
    "as it says": ([10, 12, 20], {340: 10.0, 341: 20.0}, [0, 51, 255]),
    "as it cannot be": ([0, 0.2, 1], {340: 5.0, 341: 5.0}, [0, 51, 255]),
}


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_scaled_by_what_the_file_says_or_by_their_range(tmp_path, name):
    """Those from -1 to 1 lost their darker half; a single one above 1 made all others black."""
    pixels, tags, expected = FLOATS[name]
    image = Image.fromarray(np.array([pixels], dtype=np.float32))
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[tag], info.tagtype[tag] = value, 11  # a float
    image.save(tmp_path / "a.tif", tiffinfo=info)
    assert [pixel(tmp_path / "a.tif", x)[0] for x in range(len(pixels))] == expected


TRANSPARENT = {  # bits, kind of colour, two pixels of which the second is transparent, its colour
    "grey of 16 bits": (16, 0, "0000 1234", "1234"),
    "black of 16 bits": (16, 0, "ffff 0000", "0000"),
    "grey of 2 bits": (2, 0, "c0", "0000"),
    "light grey of 2 bits": (2, 0, "20", "0002"),
    "grey of 4 bits": (4, 0, "05", "0005"),
    "grey of 8 bits": (8, 0, "00 09", "0009"),
    "colour of 8 bits": (8, 2, "000000 010203", "0001 0002 0003"),
    "colour of 16 bits": (16, 2, "000000000000 123456789abc", "1234 5678 9abc"),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_a_transparent_colour_is_white_whatever_the_depth(tmp_path, name):
    """Of 16 bits it was black: Pillow leaves the colour in units of the file."""
    bits, kind, row, colour = TRANSPARENT[name]
    parts = [
        png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, kind, 0, 0, 0)),
        png_chunk(b"tRNS", bytes.fromhex(colour)),
        png_chunk(b"IDAT", zlib.compress(b"\0" + bytes.fromhex(row))),
        png_chunk(b"IEND", b""),
    ]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert pixel(tmp_path / "a.png", 1) == (255, 255, 255)
    is_white = name in ("black of 16 bits", "grey of 2 bits")
    assert pixel(tmp_path / "a.png", 0) == 3 * (255 * is_white,)


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


BROKEN_EXIF = {
    "prefixes": b"Exif\0\0Exif\0\0Exif\0\0MM\0*\0\0\0\x08\0\0",
    "text": b"Exif\0\0no TIFF header at all",
    "cut": b"Exif\0\0MM\0*\0\0\0\x08\0\x10\x01\x12",
    "far": b"Exif\0\0II*\0\xff\xff\xff\x7f",
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
@pytest.mark.parametrize("broken", BROKEN_EXIF)
def test_an_image_with_broken_exif_is_taken_as_it_lies(tmp_path, name, broken):
    """Its pixels are sound; it once was skipped."""
    Image.new("RGB", (16, 8), "red").save(tmp_path / name, exif=BROKEN_EXIF[broken])
    read = read_rgb(tmp_path / name)
    assert read.size == (16, 8) and read.getpixel((3, 3))[0] > 250


@pytest.mark.parametrize("text", ["no hexadecimal at all", "\nexif\n  8\nzz", "\n\n\n45786966"])
def test_a_raw_profile_that_is_no_exif_does_not_matter(tmp_path, text):
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", text)
    Image.new("RGB", (16, 8), "red").save(tmp_path / "a.png", pnginfo=info)
    assert read_rgb(tmp_path / "a.png").size == (16, 8)


def test_exif_of_which_only_the_orientation_is_sound_still_turns(tmp_path, monkeypatch):
    """Pillow turns the image before it writes the EXIF again, which may fail."""

    def fails(*_):
        raise struct.error("argument out of range")

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8), "red").save(tmp_path / "a.jpg", exif=exif)
    monkeypatch.setattr(Image.Exif, "tobytes", fails)
    assert read_rgb(tmp_path / "a.jpg").size == (8, 16)


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


def test_what_systems_put_next_to_images_is_not_trained_on(photos, load, capsys):
    """Copies of images in hidden folders were in train, judge and test at once; `._` files of
    macOS filled the ten lines that name unreadable ones."""
    sound = (photos / "cat" / "00.png").read_bytes()
    folders = (".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX", "more")
    for place in (photos / "cat", photos):
        for name in folders[: 5 if place.name == "cat" else 4]:
            (place / name / "below").mkdir(parents=True)
            (place / name / "below" / "00.png").write_bytes(sound)
    for i in range(20):
        (photos / "dog" / f"._{i:02}.png").write_bytes(b"resource fork")
    (photos / "dog" / ".hidden.png").write_bytes(sound)
    data = load()
    assert data.classes == ["cat", "dog"]
    labels = torch.cat([part.labels for part in (data.train, data.judge, data.test)])
    assert labels.bincount().tolist() == [21, 20]  # one in cat/more/below
    said = capsys.readouterr().err
    assert "skipped" not in said and "21 hidden .png" in said
    assert all(f"2 {name}/" in said for name in folders[:4]) and "more" not in said


def test_parts_that_are_taken_for_classes_are_said(photos, tmp_path, capsys):
    """photos/train and photos/val once became two classes without a word."""
    load_data(small_settings(), str(photos))
    assert "taken for one class" not in capsys.readouterr().err
    above = tmp_path / "above"
    for name in ("train", "val"):
        shutil.copytree(photos, above / name)
    assert load_data(small_settings(), str(above)).classes == ["train", "val"]
    expected = (
        f"below it: train, val. If its sub-folders are the classes, give --data {above}/train"
    )
    assert expected in capsys.readouterr().err
    flat = make_folder(tmp_path / "flat", ["Train", "Test"])
    load_data(small_settings(), str(flat))
    assert "below it: Test, Train. If" in capsys.readouterr().err
    (above / "train" / "top.png").write_bytes((photos / "cat" / "00.png").read_bytes())
    (above / "val").rename(above / "photos")
    load_data(small_settings(), str(above))  # one image lies where those of a class do
    assert "taken for one class" not in capsys.readouterr().err


def test_a_class_may_have_its_accents_composed_or_not(tmp_path):
    """As a folder has them that comes from macOS. Its images are divided alike."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    first = make_folder(tmp_path / "first", [composed, "tea"])
    data = load_data(small_settings(), str(first))
    second = make_folder(tmp_path / "second", [apart, "tea"])
    again = load_data(small_settings(), str(second))
    assert again.classes == data.classes == [composed, "tea"]
    assert torch.equal(again.train.images, data.train.images)
    shutil.copytree(first / composed, second / composed)  # both of them: one class
    both = load_data(small_settings(), str(second))
    assert both.classes == [composed, "tea"] and len(both.train.stored) == 60


def test_a_run_in_its_own_data_does_not_become_a_class(photos, tmp_path, monkeypatch, capsys):
    """It trained, and could never be resumed: its pictures and its cache were two more classes."""
    monkeypatch.chdir(photos)

    def classes_with_cache(cache):
        return load_data(small_settings(), ".", cache=cache).classes

    assert classes_with_cache("out/cache") == ["cat", "dog"]
    assert classes_with_cache("out/cache") == ["cat", "dog"]  # it stopped before --out was begun
    assert "1 out/ (of a run)" in capsys.readouterr().err
    for out in ("out", "runs/latest", "runs/other", "cat/inside"):
        os.makedirs(out, exist_ok=True)
        Image.new("RGB", (4, 4)).save(f"{out}/samples.png")
        Path(out, "choices.json").write_text("{}")
    (photos / "killed" / "cache" / "unfinished-x" / "part").mkdir(parents=True)
    (photos / "killed" / "cache" / "unfinished-x" / "part" / "images.bytes").write_bytes(b"x")
    (photos / "new").mkdir()
    (photos / "new" / ".lock").write_text("")
    data = load_data(small_settings(), ".", cache="shared")
    assert load_data(small_settings(), ".", cache="shared").digests == data.digests
    assert data.classes == ["cat", "dog"] and len(data.train.stored) == 40
    (photos / "runs" / "cats").mkdir()
    shutil.copy(photos / "cat" / "00.png", photos / "runs" / "cats")
    with pytest.raises(InputError, match="class 'runs' .* has 1 readable images"):
        load_data(small_settings(), ".")  # a folder of images, whatever it is called


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


def png_chunk(name, content):
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def png_header(side):
    """A PNG that says it has side x side pixels, and has none."""
    content = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", content)


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


def flat_photos(folder, colour):
    """40 BMP files of one colour in two classes: equal names, sizes and times."""
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            path = folder / name / f"{i:02}.bmp"
            Image.new("RGB", (SIDE, SIDE), colour).save(path)
            os.utime(path, (0, 0))
    return folder


def test_equal_names_sizes_and_times_are_not_equal_images(tmp_path):
    """As archives and builds set them. A second folder once got the pixels of the first."""

    def first_pixel(folder):
        data = load_data(small_settings(), str(folder), cache=tmp_path / "cache")
        return data.train.stored[0, :, 0, 0].tolist()

    red, blue = (flat_photos(tmp_path / colour, colour) for colour in ("red", "blue"))
    assert first_pixel(red) == [255, 0, 0]
    assert first_pixel(blue) == [0, 0, 255]
    red.rename(tmp_path / "gone")
    blue.rename(red)
    assert first_pixel(red) == [0, 0, 255]  # in the same place
    for path in red.rglob("*.bmp"):
        Image.new("RGB", (SIDE, SIDE), "lime").save(path)  # into the same files
        os.utime(path, (0, 0))
    assert first_pixel(red) == [0, 255, 0]


@pytest.mark.parametrize(
    "error, reason",
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("out of memory error when reading image file"), "out of memory error"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_failure_that_passes_is_not_remembered(photos, load, monkeypatch, capsys, error, reason):
    """After a moment without memory images were lost for all later runs, some without a reason."""
    real = Image.open
    for name in ("cat", "dog"):
        shutil.copy(photos / name / "03.png", photos / name / "lost.png")

    def fails(path, **options):
        if Path(path).name == "lost.png":
            raise error
        return real(path, **options)

    (photos / "dog" / "damaged.png").write_bytes(b"not a picture")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fails)
        lost = load()
    said = capsys.readouterr().err
    assert f"lost.png: {reason}" in said and "skipped 3 of 43" in said
    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", None)  # the others are not decoded again
        found = load()
    assert "skipped 1 of 43" in capsys.readouterr().err
    whole = load_data(small_settings(), str(photos))
    assert torch.equal(found.train.images, whole.train.images)
    assert found.digests == whole.digests != lost.digests


def test_too_little_memory_to_resize_is_a_failure_that_passes(photos, load, monkeypatch):
    def fails(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(images, "middle_square", fails)
        with pytest.raises(InputError, match="class 'cat' .* has 0 readable images"):
            load()
    assert len(load().train.stored) == 40


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
    def interrupted(paths, labels, size, file):
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
