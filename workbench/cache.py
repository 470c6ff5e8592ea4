"""Caches: bytes that take long to compute are kept in files, and mapped into memory."""

import io
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workbench.errors import InputError

DAY = 24 * 60 * 60  # seconds
# what reading a damaged cache raises; any other OSError is not the cache's fault
DAMAGE = (AttributeError, LookupError, TypeError, ValueError)
DAMAGE += (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def build_or_load_cache(folder: Path | None, name: str, build: Callable) -> tuple[Tensor, dict]:
    """The bytes that build(file) writes, as uint8 [bytes], and the metadata that it returns.

    folder: keeps both between runs, as <name>.bytes, which is mapped into memory, and key.json; if
    they are damaged, they are built again. None: both are in memory. InputError if the folder
    cannot be written or read."""
    if folder is None:
        file = io.BytesIO()
        metadata = build(file)
        return torch.frombuffer(file.getbuffer(), dtype=torch.uint8), metadata
    try:
        remove_leftovers(folder.parent)
        with suppress(*DAMAGE):
            return load_cache(folder, name)
        if os.path.lexists(folder):
            print(f"{folder} is damaged: {name} are made again", file=sys.stderr)
        else:
            print(f"{name} are made once and kept in {folder}", file=sys.stderr)
        build_cache(folder, name, build)
        return load_cache(folder, name)
    except OSError as error:
        raise InputError(f"{name} cannot be kept in {folder}: {error}") from None


def load_cache(folder: Path, name: str) -> tuple[Tensor, dict]:
    """What `build_or_load_cache` returns, from its files; one of DAMAGE if they are not whole."""
    metadata = json.loads((folder / "key.json").read_bytes())
    if metadata.pop("checksum") != checksum(metadata):
        raise ValueError("key.json has changed")
    stored = np.memmap(folder / f"{name}.bytes", np.uint8, "c")
    if len(stored) != metadata.pop("bytes"):
        raise ValueError("the bytes are not all there")
    return torch.from_numpy(stored), metadata


def is_sound(folder: Path, name: str) -> bool:
    try:
        load_cache(folder, name)
    except DAMAGE:
        return False
    return True


def checksum(metadata: dict) -> int:
    return zlib.crc32(json.dumps(metadata).encode())


def build_cache(folder: Path, name: str, build: Callable) -> None:
    """The folder of `build_or_load_cache`. It gets its name when it is complete and on the disk, so
    that an interruption leaves nothing; of two runs that build it at once, the first to finish
    provides it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=folder.parent) as temporary:
        unfinished = Path(temporary, "part")
        unfinished.mkdir()
        with open(unfinished / f"{name}.bytes", "wb") as file:
            metadata = build(file)
            metadata = metadata | {"bytes": file.tell()}
            file.flush()
            os.fsync(file.fileno())
        with open(unfinished / "key.json", "w") as file:
            json.dump(metadata | {"checksum": checksum(metadata)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        try:
            unfinished.rename(folder)
        except OSError:
            if not is_sound(folder, name):
                remove(folder)
                unfinished.rename(folder)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what runs that were killed a day ago or earlier had not finished in the folder, and
    nothing that only has such a name."""
    for unfinished in folder.glob("unfinished-*"):
        with suppress(OSError):  # another run may be doing the same
            files = [unfinished, *unfinished.rglob("*")]
            own = all(f.name in ("part", "key.json") or f.suffix == ".bytes" for f in files[1:])
            if own and time.time() - max(f.stat().st_mtime for f in files) > DAY:
                remove(unfinished)
