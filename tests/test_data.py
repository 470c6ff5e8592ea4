"""Data: shapes, parts that do not overlap, batches, and which classes of a folder are asked for."""

import math

import pytest
import torch
from conftest import tiny
from helpers_images import SIDE, make_folder, small_settings

from maskrl import rng, to_tokens
from workbench.data import (
    Data,
    Split,
    display_names,
    draw_shapes,
    find_classes,
    load_data,
    read_class_names,
    to_unit,
)
from workbench.errors import InputError


@pytest.fixture(scope="module")
def data():
    return load_data(tiny())


def as_bytes(images):
    """Each image as something that a set can hold."""
    return [bytes(x.numpy().tobytes()) for x in images]


# Shapes -------------------------------------------------------------------------------------------


def test_shapes_are_the_same_for_a_seed_and_differ_within_a_class():
    a, b, c = (load_data(tiny(seed=seed)) for seed in (0, 0, 1))
    assert len(a.classes) == 9
    assert torch.equal(a.train.images, b.train.images)
    assert not torch.equal(a.train.images, c.train.images)
    one_class = as_bytes(a.train.images[a.train.labels == 0])
    assert len(set(one_class)) == len(one_class)


def test_shapes_have_their_colour_and_area():
    """Circle, square and triangle, by the mean of r^2."""
    labels = torch.arange(9).repeat_interleave(50)
    x = draw_shapes(labels, 64, rng(0)).float()
    bright = x.amax(1) > 100
    colour = torch.stack([x[i, :, bright[i]].mean(1).argmax() for i in range(len(x))])
    assert torch.equal(colour, labels // 3)
    area = bright.float().mean((1, 2)).view(9, 50).mean(1)
    r2 = 0.27**2 + 0.1**2 / 12
    expected = torch.tensor([math.pi, (2 * 0.88) ** 2, 3 * math.sqrt(3) * 0.6**2]) * r2
    torch.testing.assert_close(area.view(3, 3).mean(0), expected, rtol=0.08, atol=0)


# Parts and batches --------------------------------------------------------------------------------


def test_splits_are_disjoint_and_halves_balanced(data):
    train, judge, test = (set(as_bytes(x.images)) for x in (data.train, data.judge, data.test))
    assert not (train & judge or train & test or judge & test)
    assert [len(x) for x in (data.train, data.judge, data.test)] == [9 * 18, 9 * 6, 9 * 6]
    a, b = data.test.balanced_halves(tiny().judge_n, rng(1))
    assert torch.equal(a.labels.bincount(), b.labels.bincount())
    assert len(a.labels.bincount().unique()) == 1
    assert len(a) == 9 * data.test.balanced_half(tiny().judge_n)
    assert not set(as_bytes(a.images)) & set(as_bytes(b.images))


TEN = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """200 images in ten classes, and one file that is not an image."""
    path = make_folder(tmp_path_factory.mktemp("images") / "ten", TEN)
    (path / "3" / "broken.png").write_bytes(b"not a picture")
    return path


def test_a_broken_image_is_named_skipped_and_counted(folder, capsys):
    data = load_data(tiny(), str(folder))
    error = capsys.readouterr().err
    assert "broken.png" in error
    assert "skipped 1 of 201" in error
    assert len(data.train) + len(data.judge) + len(data.test) == 200
    assert data.classes == TEN


def test_the_parts_of_a_folder_do_not_move_with_the_seed(folder):
    """They once did: RL with another seed could have met what the judge of its student held out."""
    a, b = (load_data(tiny(seed=seed), str(folder)) for seed in (0, 1))
    assert torch.equal(a.train.images, b.train.images)
    assert torch.equal(a.test.images, b.test.images)


def test_a_class_needs_twenty_readable_images(tmp_path):
    path = make_folder(tmp_path / "few", TEN)
    (path / "0" / "00.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="class '0' .* has 19 readable images; at least 20"):
        load_data(tiny(), str(path))


def test_measured_tokens_have_mean_zero_and_variance_one(data):
    """Uncentred tokens hid what varies behind a constant, and attention hardly learned to look."""
    measured = data.measure(tiny(scale=0.0))
    tokens = to_tokens(data.train.spaced(), measured)
    assert abs(float(tokens.mean())) < 1e-3
    assert abs(float(tokens.std()) - 1) < 1e-3
    given = tiny(mean=0.3, scale=2.0)
    assert data.measure(given) == given


def test_a_batch_is_mirrored_only_on_request_and_then_half_of_it(data):
    plain, labels = data.train.batch(200, rng(0))
    flipped, same_labels = data.train.batch(200, rng(0), flip=True)
    assert torch.equal(labels, same_labels)
    known = set(as_bytes(to_unit(data.train.images)))
    assert set(as_bytes(plain)) <= known
    mirrored = (flipped != plain).flatten(1).any(1)
    assert torch.equal(flipped[mirrored], plain[mirrored].flip(-1))
    assert 0.3 < mirrored.float().mean() < 0.7


def test_no_more_than_20_000_images_become_floats():
    many = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8).expand(100_000, -1, -1, -1)
    labels = torch.arange(100_000) // 100
    part = Split(many, torch.arange(100_000), labels)
    images = Data("many", [str(y) for y in range(1000)], {}, part, part, part)
    assert 10_000 <= len(images.train.spaced()) <= 20_000


class CountingSplit(Split):
    """It counts the images of each `take` in `self.counts`, and takes only one of them."""

    def take(self, index):
        vars(self).setdefault("counts", []).append(len(self.rows[index]))
        return Split(self.stored, self.rows[:1], self.labels[:1])


def test_large_images_become_no_more_than_4_GB_of_floats():
    one = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    million = torch.arange(1_000_000)
    part = CountingSplit(one.expand(1_000_000, -1, -1, -1), million, million)
    part.spaced()
    assert 2_500 < part.counts[0] and part.counts[0] * one.numel() * 4 < 4.4e9


def test_spaced_images_are_computed_once_for_each_split(data):
    """A report once converted the training images six times."""
    part = CountingSplit(data.train.stored, data.train.rows, data.train.labels)
    assert part.spaced() is part.spaced()
    assert part.counts == [len(part)]


def test_a_split_of_some_images_has_spaced_images_of_its_own(data):
    everything = data.train.spaced()
    some = data.train.take(torch.tensor([5, 3]))
    assert torch.equal(some.spaced(), everything[[5, 3]])
    relabelled = data.labelled_as(["another", *data.classes]).train
    assert torch.equal(relabelled.spaced(), everything)


# Some of the classes ------------------------------------------------------------------------------

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
    return make_folder(tmp_path / "imagenet", CLASSES)


def test_classes_are_chosen_by_folder_by_name_and_by_file(synsets, tmp_path):
    names = read_class_names(synsets, CLASSES)
    (tmp_path / "chosen.txt").write_text("n03126707\n\ntench\n")
    cases = {
        ("n02102040", "n01440764"): [2, 0],
        ("n02102040,n01440764",): [2, 0],
        ("tench", "English springer spaniel"): [0, 2],
        ("tench, Tinca tinca",): [0],
        (str(tmp_path / "chosen.txt"),): [3, 0],
    }
    for texts, expected in cases.items():
        assert find_classes(texts, CLASSES, names) == expected
    with pytest.raises(InputError, match="any of n02012849, n03126707"):
        find_classes(["crane"], CLASSES, names)
    with pytest.raises(InputError, match="no class 'heron'; there are: n01440764"):
        find_classes(["heron"], CLASSES, names)
    for nothing in ("", " , "):
        with pytest.raises(InputError, match="--classes names no class"):
            find_classes([nothing], CLASSES, {})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_text_files_may_begin_with_a_byte_order_mark(tmp_path, encoding):
    """Windows writes one; the first class was once lost with it."""
    (tmp_path / "names.txt").write_text("caf\u00e9 coffee\r\ntea\tTee", encoding=encoding)
    (tmp_path / "chosen.txt").write_text("caf\u00e9\ntea\n", encoding=encoding)
    names = read_class_names(tmp_path / "names.txt", ["caf\u00e9", "tea"])
    assert names == {"caf\u00e9": "coffee", "tea": "Tee"}
    assert find_classes([str(tmp_path / "chosen.txt")], ["tea", "caf\u00e9"], {}) == [1, 0]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "cp437"])
def test_text_files_in_other_code_pages_are_refused_by_name(tmp_path, encoding):
    """They were read as other letters, without a word."""
    path = tmp_path / "names.txt"
    path.write_text("caf\u00e9 coffee\ntea Tee", encoding=encoding)
    for read in (read_class_names, choose_by_file):
        with pytest.raises(InputError, match=f"{path} is not a text file in UTF-8: save it as one"):
            read(path, ["tea", "caf\u00e9"])


def choose_by_file(path, classes):
    return find_classes([str(path)], classes, {})


def test_accents_may_be_composed_or_not(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    (tmp_path / "names.txt").write_text(f"{apart} coffee\n", encoding="utf-8")
    for known in (composed, apart):  # the latter in checkpoints of before
        classes = ["tea", known]
        names = read_class_names(tmp_path / "names.txt", classes)
        assert display_names(classes, names) == ["tea", "coffee"]
        for text in (composed, apart, f"tea,{apart}", "coffee"):
            assert find_classes([text], classes, names)[-1] == 1
    with pytest.raises(InputError, match="may be any of"):
        find_classes([composed], [composed, apart], {})
    part = Split(torch.zeros(1, 3, 2, 2).byte(), torch.tensor([0]), torch.tensor([0]))
    data = Data("photos", [composed], {}, part, part, part)
    assert data.labelled_as(["tea", apart]).labels.tolist() == [1]


def test_a_class_may_begin_or_end_with_a_space(tmp_path):
    """It once could not be chosen in a list or a file."""
    (tmp_path / "chosen.txt").write_text("cat \n dog\n")
    cases = {
        ("cat ",): ["cat "],
        ("cat",): ["cat"],
        ("dog",): [" dog"],
        ("cat ,dog",): ["cat ", " dog"],
        ("cat, dog",): ["cat", " dog"],
        (str(tmp_path / "chosen.txt"),): ["cat ", " dog"],
    }
    classes = [" dog", "cat", "cat "]
    for texts, expected in cases.items():
        assert [classes[y] for y in find_classes(texts, classes, {})] == expected
    with pytest.raises(InputError, match="'fox' may be any of fox ,  fox: name one"):
        find_classes(["fox"], ["fox ", " fox"], {})


def test_a_class_is_shown_by_the_first_of_its_names(synsets):
    shown = display_names([*CLASSES, "a, b"], read_class_names(synsets, CLASSES))
    assert shown == ["tench", "crane", "English springer", "crane", "a, b"]


def test_a_file_that_names_no_class_is_refused(synsets, tmp_path):
    with pytest.raises(InputError, match="names none of the classes cat, dog"):
        read_class_names(synsets, ["cat", "dog"])
    with pytest.raises(InputError, match="--class-names .*missing.txt: .*No such file"):
        read_class_names(tmp_path / "missing.txt", CLASSES)
    with pytest.raises(InputError, match="need --data FOLDER"):
        load_data(small_settings(), "shapes", ["red circle"])


def test_a_class_is_divided_alike_whatever_other_classes_there_are(imagenet):
    everything = load_data(small_settings(), str(imagenet))
    subset = load_data(small_settings(), str(imagenet), ["n02102040", "n03126707"])
    assert subset.classes == ["n02102040", "n03126707"]
    for part in ("train", "judge", "test"):
        whole, chosen = getattr(everything, part), getattr(subset, part)
        for label, y in enumerate([2, 3]):
            images = whole.images[whole.labels == y]
            assert torch.equal(chosen.images[chosen.labels == label], images)


def test_a_subset_keeps_the_labels_of_the_checkpoint(imagenet):
    data = load_data(small_settings(), str(imagenet), ["n03126707", "n01440764"])
    known = ["another", *reversed(CLASSES)]
    labelled = data.labelled_as(known)
    assert labelled.classes == known and labelled.labels.tolist() == [1, 4]
    for label, y in ((0, 4), (1, 1)):
        images = labelled.train.images[labelled.train.labels == y]
        assert torch.equal(images, data.train.images[data.train.labels == label])
    with pytest.raises(InputError, match="checkpoint does not know: n03126707"):
        data.labelled_as(CLASSES[:2])
