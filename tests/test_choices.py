"""What a resumed run must have in common with the one that began."""

import json
import os
import shutil
from argparse import Namespace

import pytest
from helpers_images import SIDE, make_folder, small_settings
from PIL import Image

from workbench.choices import save_run_args
from workbench.data import load_data
from workbench.errors import InputError

OTHERS = "was begun with other images than those of --data"


@pytest.fixture
def photos(tmp_path):
    return make_folder(tmp_path / "photos", ["bird", "cat", "dog"])


@pytest.fixture
def resume(tmp_path):
    """A function that resumes the run in tmp_path/out, which it also begins."""

    def resume(folder, classes=None, **options):
        data = load_data(small_settings(), str(folder), classes, cache=tmp_path / "out" / "cache")
        args = Namespace(out=tmp_path / "out", resume=True, vae=None, features="own", teacher=None)
        vars(args).update(preset=None, quick=False)
        vars(args).update(options)
        save_run_args(args, data)
        (tmp_path / "out" / "teacher.pt").write_text("")

    return resume


def test_the_same_images_are_accepted_wherever_they_are(photos, resume, tmp_path, monkeypatch):
    """They once had to have the same path as before, letter by letter."""
    resume(photos)
    (tmp_path / "link").symlink_to(photos)
    resume(tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    resume("photos/")
    resume(os.path.join("photos", "..", "photos"))
    photos.rename(tmp_path / "moved")
    resume(tmp_path / "moved")
    resume(shutil.copytree(tmp_path / "moved", tmp_path / "copied"))


def test_an_image_that_was_never_readable_does_not_count(photos, resume):
    (photos / "cat" / "000.png").write_bytes(b"not a picture")
    resume(photos)
    (photos / "cat" / "000.png").unlink()
    resume(photos)


def test_other_images_of_the_same_names_are_refused(photos, resume, tmp_path):
    """With size and times of the others, too."""
    for path in photos.rglob("*.png"):
        Image.new("RGB", (SIDE, SIDE), "red").save(path.with_suffix(".bmp"))
        path.unlink()
    resume(photos)
    path = photos / "dog" / "07.bmp"
    stat = path.stat()
    Image.new("RGB", (SIDE, SIDE), "blue").save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    with pytest.raises(InputError, match=f"{OTHERS} {photos}: class dog has other images. Give"):
        resume(photos)


def test_a_class_that_vanished_or_is_new_is_named(photos, resume, tmp_path):
    resume(photos)
    (photos / "cat").rename(photos / "wolf")
    with pytest.raises(InputError, match="class cat is missing, class wolf is new"):
        resume(photos)


@pytest.mark.parametrize("options", [{"preset": "tiny"}, {"quick": True}])
def test_what_the_settings_started_from_may_be_left_out_but_not_exchanged(options, photos, resume):
    """Another --preset, and --quick, were once ignored without a word."""
    resume(photos, **options)
    resume(photos, **options)
    resume(photos)
    with pytest.raises(InputError, match="was begun with.* --preset.*: give the same again"):
        resume(photos, preset="small")


def test_a_whole_run_does_not_become_a_quick_one(photos, resume):
    resume(photos)
    with pytest.raises(InputError, match="was begun without --quick: give the same again"):
        resume(photos, quick=True)


def test_images_do_not_change_places(photos, resume):
    """What was held out would be trained on."""
    resume(photos)
    (photos / "cat" / "00.png").rename(photos / "cat" / "99.png")
    with pytest.raises(InputError, match="class cat has other images"):
        resume(photos)


def test_classes_may_be_written_in_any_way(photos, resume, tmp_path):
    resume(photos, ["cat,dog"])
    resume(photos, ["dog", "cat"])
    (tmp_path / "chosen.txt").write_text("cat\ndog\n")
    resume(photos, [str(tmp_path / "chosen.txt")])
    with pytest.raises(InputError, match="class bird is new"):
        resume(photos)
    with pytest.raises(InputError, match="class dog is missing"):
        resume(photos, ["cat"])


def test_shapes_and_a_folder_are_not_the_same(photos, resume):
    resume("shapes")
    resume("shapes")
    with pytest.raises(InputError, match=f"{OTHERS} {photos}: class bird is new, class cat is"):
        resume(photos)


def test_an_autoencoder_is_what_is_in_its_file(photos, resume, tmp_path, monkeypatch):
    vae = tmp_path / "kl16.ckpt"
    vae.write_bytes(b"weights")
    resume(photos, vae=vae)
    monkeypatch.chdir(tmp_path)
    resume(photos, vae="kl16.ckpt")
    vae.rename(tmp_path / "renamed.ckpt")
    resume(photos, vae=tmp_path / "renamed.ckpt")
    vae.write_bytes(b"others")
    with pytest.raises(InputError, match=r"--vae renamed.ckpt \(sha256 .*, not kl16.ckpt \(sha256"):
        resume(photos, vae=vae)
    with pytest.raises(InputError, match="not None: give it again"):
        resume(photos)


def test_a_resumed_run_learns_from_the_teacher_and_student_with_which_it_was_begun(
    photos, resume, tmp_path
):
    paths = [tmp_path / "one.pt", tmp_path / "another.pt"]
    for path in paths:
        path.write_text(path.name)
    resume(photos, teacher=paths[0])
    with pytest.raises(InputError, match="begun with --teacher one.pt .*, not another.pt"):
        resume(photos, teacher=paths[1])
    rl = {"reward": {"fit": 1.0}, "held_out": None}
    resume(photos, student=paths[0], **rl)
    with pytest.raises(InputError, match="begun with --student one.pt .*, not another.pt"):
        resume(photos, student=paths[1], **rl)


def test_a_run_from_before_images_were_compared_is_still_of_its_data(photos, resume, tmp_path):
    resume(photos)
    path = tmp_path / "out" / "choices.json"
    kept = json.loads(path.read_text())
    assert kept.pop("images").keys() == {"bird", "cat", "dog"}
    path.write_text(json.dumps(kept | {"data": "elsewhere"}))
    with pytest.raises(InputError, match=f"begun with --data elsewhere, not {photos}"):
        resume(photos)
    path.write_text(json.dumps(kept))
    resume(photos)
    assert "images" in json.loads(path.read_text())


@pytest.mark.parametrize("text", ["", "[1]", '{"images": 3}', '{"images": ["a"]}', "\xff"])
def test_choices_that_are_damaged_say_what_to_do(photos, resume, tmp_path, text):
    resume(photos)
    (tmp_path / "out" / "choices.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="choices.json cannot be read .*: delete it"):
        resume(photos)
    (tmp_path / "out" / "choices.json").unlink()
    resume(photos)
