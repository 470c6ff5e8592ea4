"""Folders of photographs: what is read, how a file looks, the cache, and some of the classes."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image

import maskrl
import sample
import train_rl

SIDE = 8
SHORT = (
    "--gsim-iters 2 --rl-iters 1 --schedule-iters 1 --judge-iters 2 --batch 8 "
    "--prompts 2 --group 2 --denoise-steps 2 --device cpu --threads 1"
).split()


def settings(**overrides):
    return maskrl.preset("tiny", image_size=SIDE, patch=2, **overrides)


def make(folder, classes=("cat", "dog"), n=20):
    """n noisy PNG files in a sub-folder for each of the classes, every one another."""
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture
def photos(tmp_path):
    return make(tmp_path / "photos")


@pytest.fixture
def load(photos, tmp_path):
    """A function that loads the photos through a cache."""

    def load(size=SIDE):
        smaller = dataclasses.replace(settings(), steps=1, image_size=size)
        return maskrl.load_data(smaller, str(photos), cache=tmp_path / "cache")

    return load


def caches(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def pixel(path, x=0, y=0):
    return maskrl.read_rgb(path).getpixel((x, y))


# How a file looks


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


def turned(path, size, colour, corner):
    """Save an image of one colour, whose upper left quarter as a person sees it has another; the
    file holds it lying on its side, and EXIF says so."""
    image = Image.new("RGB", size, colour)
    image.paste(corner, (0, 0, size[0] // 2, size[1] // 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    return path


def test_exif_turns_an_image_and_its_mask_upright(tmp_path):
    image = turned(tmp_path / "image.png", (40, 80), "red", "blue")
    assert maskrl.read_rgb(image).size == (40, 80) and pixel(image) == (0, 0, 255)
    mask = turned(tmp_path / "mask.png", (8, 16), "black", "white")
    tokens, hidden = sample.to_complete(image, mask, settings(scale=1.0))
    corner = [(row, column) for row in range(2) for column in range(2)]  # of the middle square
    assert [divmod(i, 4) for i in hidden.nonzero().flatten().tolist()] == corner
    completed = maskrl.to_images(tokens, settings(scale=1.0))[0]
    assert completed[:, 0, 0].tolist() == [-1, -1, 1] and completed[:, -1, -1].tolist() == [
        1,
        -1,
        -1,
    ]


def test_a_transparent_mask_is_white(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "image.png")
    mask = Image.new("RGBA", (8, 8), "black")
    mask.putpixel((0, 0), (0, 0, 0, 0))
    mask.save(tmp_path / "mask.png")
    _, hidden = sample.to_complete(tmp_path / "image.png", tmp_path / "mask.png", settings())
    assert hidden.nonzero().flatten().tolist() == [0]


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    ramp = np.linspace(0, 255, 640).astype(np.uint8)[None].repeat(480, 0)
    Image.fromarray(ramp).save(tmp_path / "a.jpg", quality=95)
    whole = maskrl.middle_square(maskrl.read_rgb(tmp_path / "a.jpg"), SIDE)
    small = maskrl.read_rgb(tmp_path / "a.jpg", SIDE)
    assert small.width < 640 / 2
    assert (maskrl.middle_square(small, SIDE).int() - whole.int()).abs().max() <= 2


# What is read and what is not


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
    for kind in ("2 .heic", "1 .txt", "1 .DS_Store", "1 .png beside the sub-folders"):
        assert kind in errors
    assert "1 .png (a broken link)" in errors


def test_links_to_files_and_folders_are_followed(photos, load, tmp_path):
    elsewhere = make(tmp_path / "elsewhere", ["bird"], 21)
    (photos / "bird").symlink_to(elsewhere / "bird")
    for name in ("extra.png", "more"):
        (photos / "cat" / name).symlink_to(elsewhere / "bird" / ("00.png" if "." in name else ""))
    data = load()
    assert data.classes == ["bird", "cat", "dog"]
    labels = torch.cat([part.labels for part in (data.train, data.judge, data.test)])
    assert labels.bincount().tolist() == [21, 20 + 1 + 21, 20]


def test_a_folder_that_cannot_serve_ends_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    make(tmp_path / "few", ["cat"], 19)
    cases = {
        "missing": "No such file",
        "empty": "has no sub-folders",
        "hollow": "'cat' in .* has 0 readable images",
        "few": "'cat' in .* has 19 readable images",
    }
    for name, message in cases.items():
        with pytest.raises(maskrl.InputError, match=message):
            maskrl.load_data(settings(), str(tmp_path / name))


def test_few_images_come_with_what_that_means(tmp_path):
    make(tmp_path / "photos", ["a", "b"], 60)
    data = maskrl.load_data(settings(), str(tmp_path / "photos"))
    text = maskrl.describe(data, settings())
    assert "72 to train on, 24 for the judge, 24 held out, n = 12 in each row" in text
    assert "distances are rough" in text and "resized to 8 x 8 pixels (--image-size" in text


# The cache


def test_mapped_batches_equal_those_in_memory(photos, load):
    mapped, in_memory = load(), maskrl.load_data(settings(), str(photos))
    for part in ("train", "judge", "test"):
        batches = [
            getattr(data, part).batch(16, maskrl.rng(3), flip=True) for data in (mapped, in_memory)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*batches))
    assert torch.equal(mapped.train.spaced(), in_memory.train.spaced())


def test_images_are_decoded_once(load, tmp_path, monkeypatch):
    first = load()
    monkeypatch.setattr(maskrl, "decode", None)
    assert torch.equal(load().train.images, first.train.images)
    assert len(caches(tmp_path)) == 1


def test_a_changed_an_added_and_a_removed_file_are_noticed(photos, load, tmp_path):
    before = load().train.stored.clone()
    first = photos / "cat" / "00.png"
    Image.new("RGB", (SIDE, SIDE), "red").save(first)
    changed = load().train.stored
    assert changed[0, :, 0, 0].tolist() == [255, 0, 0] and torch.equal(changed[1:], before[1:])
    (photos / "cat" / "added.png").write_bytes(first.read_bytes())
    assert len(load().train.stored) == 41
    (photos / "cat" / "added.png").unlink()
    os.utime(first, (0, 0))  # the same bytes, written at another time
    load()
    assert len(caches(tmp_path)) == 4
    load(size=4)
    assert len(caches(tmp_path)) == 5


def test_an_interrupted_build_leaves_nothing_behind(load, tmp_path, monkeypatch):
    def interrupted(paths, size, file):
        file.write(bytes(100))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(maskrl, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load()
    assert caches(tmp_path) == []
    (tmp_path / "cache" / "unfinished-x" / "part").mkdir(parents=True)  # as killed by the system
    assert load().train.stored.any()


def test_two_runs_may_make_the_same_cache_at_once(load, tmp_path, monkeypatch):
    real = maskrl.decode

    def overtaken(*args):
        monkeypatch.setattr(maskrl, "decode", real)
        load()  # another run begins later and is done first
        return real(*args)

    monkeypatch.setattr(maskrl, "decode", overtaken)
    assert load().train.stored.any() and len(caches(tmp_path)) == 1


def test_a_cache_that_cannot_be_written_ends_in_one_line(photos, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(maskrl.InputError, match="cache"):
        maskrl.load_data(settings(), str(photos), cache=tmp_path / "cache")


def test_no_more_than_20_000_images_become_floats():
    many = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8).expand(100_000, -1, -1, -1)
    labels = torch.arange(100_000) // 100
    part = maskrl.Split(many, torch.arange(100_000), labels)
    images = maskrl.Data("many", [str(y) for y in range(1000)], {}, part, part, part)
    assert 10_000 <= len(images.train.spaced()) <= 20_000


def test_large_images_become_no_more_than_4_GB_of_floats():
    one = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    taken = []

    class Counted(maskrl.Split):
        def take(self, index):
            taken.append(len(self.rows[index]))
            return maskrl.Split(one, torch.zeros(1, dtype=torch.long), torch.zeros(1))

    part = Counted(
        one.expand(1_000_000, -1, -1, -1), torch.arange(1_000_000), torch.arange(1_000_000)
    )
    part.spaced()
    assert 2_500 < taken[0] and taken[0] * one.numel() * 4 < 4.4e9


# Some of the classes

NAMES = """n01440764 tench, Tinca tinca
n02012849 crane
n02102040 English springer, English springer spaniel
n03126707 crane
"""
CLASSES = [line.split()[0] for line in NAMES.splitlines()]


@pytest.fixture
def synsets(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text(NAMES)
    return path


@pytest.fixture
def imagenet(tmp_path):
    return make(tmp_path / "imagenet", CLASSES)


def test_classes_are_chosen_by_folder_by_name_and_by_file(synsets, tmp_path):
    names = maskrl.read_class_names(synsets, CLASSES)
    (tmp_path / "chosen.txt").write_text("n03126707\n\ntench\n")
    cases = {
        ("n02102040", "n01440764"): [2, 0],
        ("n02102040,n01440764",): [2, 0],
        ("tench", "English springer spaniel"): [0, 2],
        ("tench, Tinca tinca",): [0],
        (str(tmp_path / "chosen.txt"),): [3, 0],
    }
    for texts, expected in cases.items():
        assert maskrl.find_classes(texts, CLASSES, names) == expected
    with pytest.raises(maskrl.InputError, match="any of n02012849, n03126707"):
        maskrl.find_classes(["crane"], CLASSES, names)
    with pytest.raises(maskrl.InputError, match="no class 'heron'; there are: n01440764"):
        maskrl.find_classes(["heron"], CLASSES, names)


def test_a_file_that_names_no_class_is_refused(synsets):
    with pytest.raises(maskrl.InputError, match="names none of the classes cat, dog"):
        maskrl.read_class_names(synsets, ["cat", "dog"])
    with pytest.raises(maskrl.InputError, match="need --data FOLDER"):
        maskrl.load_data(settings(), "shapes", ["red circle"])


def test_a_class_is_divided_alike_whatever_other_classes_there_are(imagenet):
    everything = maskrl.load_data(settings(), str(imagenet))
    some = maskrl.load_data(settings(), str(imagenet), ["n02102040", "n03126707"])
    assert some.classes == ["n02102040", "n03126707"]
    for part in ("train", "judge", "test"):
        whole, chosen = getattr(everything, part), getattr(some, part)
        for label, y in enumerate([2, 3]):
            images = whole.images[whole.labels == y]
            assert torch.equal(chosen.images[chosen.labels == label], images)


def test_a_subset_keeps_the_labels_of_the_checkpoint(imagenet):
    data = maskrl.load_data(settings(), str(imagenet), ["n03126707", "n01440764"])
    known = ["another", *reversed(CLASSES)]
    labelled = data.labelled_as(known)
    assert labelled.classes == known and labelled.labels.tolist() == [1, 4]
    for label, y in ((0, 4), (1, 1)):
        images = labelled.train.images[labelled.train.labels == y]
        assert torch.equal(images, data.train.images[data.train.labels == label])
    with pytest.raises(maskrl.InputError, match="checkpoint has not: n03126707"):
        data.labelled_as(CLASSES[:2])


def test_clip_is_asked_by_name(imagenet, synsets, monkeypatch):
    asked = []

    def reward(options, classes, device):
        asked.extend(classes)
        return lambda images, labels: images.mean((1, 2, 3)) / 2 + 0.5

    monkeypatch.setattr(maskrl, "clip_reward", reward)
    data = maskrl.load_data(settings(), str(imagenet), class_names=synsets)
    maskrl.make_reward("clip", settings(), data, torch.device("cpu"), critic=None)
    assert asked == ["tench", "crane", "English springer", "crane"]


def test_all_stages_on_some_classes_of_a_checkpoint_that_knows_more(
    imagenet, synsets, tmp_path, monkeypatch, capsys
):
    teacher = maskrl.MAR(settings(steps=4, width=32, depth=1, heads=2, scale=2.0), CLASSES)
    maskrl.save_checkpoint(tmp_path / "teacher.pt", teacher)
    asked = []
    rollout = maskrl.rollout

    def watched(model, quality, labels, *args, **kwargs):
        asked.extend(labels.tolist())
        return rollout(model, quality, labels, *args, **kwargs)

    monkeypatch.setattr(maskrl, "rollout", watched)
    out = tmp_path / "runs" / "some"
    common = ["--class-names", str(synsets), "--classes", "English springer,n03126707"]
    given = ["--data", str(imagenet), "--teacher", str(tmp_path / "teacher.pt")]
    train_rl.main([*SHORT, *common, *given, "--out", str(out)])
    assert set(asked) == {2, 3}
    assert "Their columns: English springer, crane" in capsys.readouterr().out
    assert len(caches(out.parent)) == 1
    policy = out / "policy.pt"
    assert maskrl.load_checkpoint(policy).classes == CLASSES
    files = tmp_path / "files"
    pictures = ["--n", "2", "--out", str(tmp_path / "a.png"), "--files", str(files)]
    sample.main([str(policy), *common, *pictures, "--device", "cpu"])
    assert sorted(path.name for path in files.iterdir()) == [
        "00000 English springer.png",
        "00001 crane.png",
    ]
