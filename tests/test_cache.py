"""What is kept between runs: whole, or built again."""

import json
import os
import time

import pytest
import torch

from workbench.cache import build_or_load_cache
from workbench.errors import InputError


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


def cut_key(folder):
    text = (folder / "key.json").read_text()
    (folder / "key.json").write_text(text[: len(text) // 2])


def empty_key(folder):
    (folder / "key.json").write_text("")


def other_key(folder):
    content = json.loads((folder / "key.json").read_text())
    (folder / "key.json").write_text(json.dumps(content | {"sevens": "two"}))


def key_that_is_a_list(folder):
    (folder / "key.json").write_text("[1]")


def key_of_other_bytes(folder):
    (folder / "key.json").write_bytes(b"\xff\xfe\x00")


def no_key(folder):
    (folder / "key.json").unlink()


def fewer_bytes(folder):
    (folder / "numbers.bytes").write_bytes(b"\x07")


def more_bytes(folder):
    (folder / "numbers.bytes").write_bytes(bytes(100))


def empty_bytes(folder):
    (folder / "numbers.bytes").write_bytes(b"")


def no_bytes(folder):
    (folder / "numbers.bytes").unlink()


def a_file_instead(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("a file")


KEYS = (cut_key, empty_key, other_key, key_that_is_a_list, key_of_other_bytes, no_key)
BYTES = (fewer_bytes, more_bytes, empty_bytes, no_bytes, a_file_instead)


@pytest.mark.parametrize("damage", [*KEYS, *BYTES])
def test_a_damaged_cache_is_built_again_and_said(tmp_path, damage, capsys):
    """It once was a traceback, or a reshape that failed, in every later run."""
    folder = tmp_path / "cache"
    build_or_load_cache(folder, "numbers", write_seven)
    capsys.readouterr()
    damage(folder)
    content, metadata = build_or_load_cache(folder, "numbers", write_seven)
    assert content.tolist() == [7, 0, 7] and metadata == {"sevens": 2}
    assert capsys.readouterr().err == f"{folder} is damaged: numbers are made again\n"
    build_or_load_cache(folder, "numbers", None)  # now it is sound
    assert capsys.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_another_run_repaired_meanwhile_is_kept(tmp_path):
    folder = tmp_path / "cache"
    build_or_load_cache(folder, "numbers", write_seven)
    empty_key(folder)

    def overtaken(file):
        build_or_load_cache(folder, "numbers", write_seven)
        kept.append(folder.stat().st_ino)
        return write_seven(file)

    kept = []
    assert build_or_load_cache(folder, "numbers", overtaken)[0].tolist() == [7, 0, 7]
    assert [folder.stat().st_ino] == kept


def test_a_cache_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    build_or_load_cache(tmp_path / "cache", "numbers", write_seven)
    with monkeypatch.context() as patch:
        patch.setattr("workbench.cache.np.memmap", denied)
        with pytest.raises(InputError, match="numbers cannot be kept in .*: .*Permission denied"):
            build_or_load_cache(tmp_path / "cache", "numbers", None)
    build_or_load_cache(tmp_path / "cache", "numbers", None)


def test_both_files_are_on_the_disk_before_the_cache_has_its_name(tmp_path, monkeypatch):
    """After a power failure key.json was once empty."""
    synced, real = [], os.fsync

    def fsync(number):
        synced.append(os.fstat(number).st_ino)
        assert not (tmp_path / "cache").exists()
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    build_or_load_cache(tmp_path / "cache", "numbers", write_seven)
    files = [tmp_path / "cache" / name for name in ("numbers.bytes", "key.json")]
    assert synced == [path.stat().st_ino for path in files]


def test_what_a_killed_run_left_is_removed_after_a_day_and_nothing_else(tmp_path):
    yesterday = time.time() - 25 * 60 * 60
    content = {
        "unfinished-old": "part/images.bytes",
        "unfinished-empty": "part/key.json",
        "unfinished-at-work": "part/images.bytes",
        "unfinished-novel": "chapter.txt",
    }
    for name, file in content.items():
        path = tmp_path / name / file
        path.parent.mkdir(parents=True)
        path.write_text("x")
        for old in (path, path.parent, tmp_path / name):
            os.utime(old, (yesterday, yesterday))
    os.utime(tmp_path / "unfinished-at-work" / "part" / "images.bytes")  # still being written
    build_or_load_cache(tmp_path / "cache", "numbers", write_seven)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"cache", "unfinished-at-work", "unfinished-novel"}
