"""Image files: each as a person sees it, and a folder of them as bytes.

A folder of images, with one sub-folder per class, is decoded once, into a cache that later runs
map into memory: it may hold more images than fit into memory.
"""

import hashlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from workbench.errors import InputError, abbreviate

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = {end: name for end, name in Image.registered_extensions().items() if name in FORMATS}

# One image ----------------------------------------------------------------------------------------


def read_rgb(path, size: int | None = None) -> Image.Image:
    """The first frame of an image file in 8 bits, upright, and on white where it is transparent.

    size: side of the square in pixels that the image will be resized to; a JPEG is then decoded at
    about twice that, which is faster. InputError says why a file cannot be read."""
    try:
        with Image.open(path, formats=tuple(set(EXTENSIONS.values()))) as image:
            if size:
                image.draft(None, (2 * size, 2 * size))
            ImageOps.exif_transpose(image, in_place=True)
            return on_white(eight_bits(image))
    except UnidentifiedImageError:
        raise InputError(f"{path}: no image, or a damaged one") from None
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        raise InputError(f"{path}: {error or type(error).__name__}") from None


def eight_bits(image: Image.Image) -> Image.Image:
    """Pixels of 16 bits and floats scaled to 0...255, where Pillow would clip them.

    White is 65535; for floats 1, unless some are larger: then 255, or 65535."""
    if image.mode not in ("F", "I", "I;16", "I;16B", "I;16L", "I;16N"):
        return image
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float32))
    white = 65535
    if image.mode == "F":
        white = next((level for level in (1, 255) if pixels.max() <= level), white)
    return Image.fromarray((pixels / white * 255).clip(0, 255).round().astype(np.uint8))


def on_white(image: Image.Image) -> Image.Image:
    """Any image in RGB, transparent pixels composited on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def middle_square(image: Image.Image, size: int) -> Tensor:
    """The middle of an RGB image, resized to uint8 [3, size, size]."""
    return pil_to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))


# The files of a folder ----------------------------------------------------------------------------


def class_folders(folder: str) -> list[str]:
    """The names of the sub-folders, sorted; hidden ones are not classes.

    InputError if the folder cannot be read or has none."""
    try:
        visible = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"--data {folder}: {error.strerror}") from None
    names = sorted(entry.name for entry in visible if os.path.isdir(entry.path))
    if not names:
        raise InputError(f"--data {folder} has no sub-folders; expected one of images per class")
    return names


def files_below(folder: str, parents: frozenset[str] = frozenset()) -> Iterator[os.DirEntry]:
    """All files in a folder and its sub-folders, in a fixed order.

    Symbolic links are followed, but not from a folder to itself or to one of its `parents`."""
    parents = parents | {os.path.realpath(folder)}
    for entry in sorted(os.scandir(folder), key=attrgetter("name")):
        if not os.path.isdir(entry.path):
            yield entry
        elif os.path.realpath(entry.path) not in parents:
            yield from files_below(entry.path, parents)


def file_kind(entry: os.DirEntry) -> str:
    """The extension of a file in lower case, e.g. `.jpg`, or its name if it has none."""
    kind = Path(entry.name).suffix.lower() or entry.name
    return kind if os.path.isfile(entry.path) else f"{kind} (a broken link)"


def list_images(folder: str, classes: list[str]) -> tuple[list[str], Tensor, str]:
    """Paths and labels [N] of the images of the `classes`, and a digest that changes when a file is
    added, removed or changed. Prints how many files of which kinds are ignored."""
    paths = []
    labels = []
    digest = hashlib.sha256(b"upright, white behind, middle square")
    root = os.path.abspath(folder)
    outside = [file_kind(entry) for entry in os.scandir(root) if not os.path.isdir(entry.path)]
    ignored = Counter(f"{kind} outside the sub-folders" for kind in outside)
    for label, name in enumerate(classes):
        for entry in files_below(os.path.join(root, name)):
            kind = file_kind(entry)
            if kind not in EXTENSIONS:
                ignored[kind] += 1
                continue
            stat = entry.stat()
            version = entry.path.removeprefix(root), stat.st_size, stat.st_mtime_ns
            digest.update(f"{version}\n".encode())
            paths.append(entry.path)
            labels.append(label)
    if ignored:
        kinds = abbreviate([f"{count} {kind}" for kind, count in ignored.most_common()])
        print(f"ignored in {folder}: {kinds}", file=sys.stderr)
    return paths, torch.tensor(labels, dtype=torch.long), digest.hexdigest()


def check_class_size(folder: str, class_name: str, n: int) -> None:
    """InputError unless n images are enough to be divided into train, judge and test."""
    if n < 20:
        raise InputError(
            f"class {class_name!r} in --data {folder} has {n} readable images; at least 20 are "
            "needed, or --classes without it"
        )


# A folder as bytes --------------------------------------------------------------------------------


def read_square(path: str, size: int) -> bytes | str:
    """The middle of an image file as 3 x size x size bytes, or why it cannot be read."""
    try:
        return middle_square(read_rgb(path, size), size).numpy().tobytes()
    except InputError as error:
        return str(error)


def decode(paths: list[str], size: int, file: BinaryIO) -> list[tuple[int, str]]:
    """Write the images to `file` as 3 x size x size bytes each, in order; zeros for an unreadable
    one. Returns (index, reason) of each unreadable one."""
    unreadable = []
    pool = ThreadPool(os.cpu_count())  # threads: Pillow lets others run while it decodes
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # odd metadata, or merely large
            results = pool.imap(partial(read_square, size=size), paths, chunksize=32)
            for i, result in enumerate(tqdm(results, "decoding", len(paths), leave=False)):
                if isinstance(result, str):
                    unreadable.append((i, result))
                    result = bytes(3 * size * size)
                file.write(result)
    finally:
        pool.terminate()
        pool.join()  # after Ctrl-C too: a thread that is still working would crash Python's exit
    return unreadable


def decode_folder(folder: str, paths: list[str], size: int, file: BinaryIO) -> dict:
    """What `decode` does, and the metadata that the cache keeps with the images."""
    unreadable = decode(paths, size, file)
    return {"folder": folder, "image_size": size, "files": len(paths), "unreadable": unreadable}


def load_folder(
    folder: str, classes: list[str], size: int, cache=None
) -> tuple[Tensor, Tensor, Path | None]:
    """Images uint8 [N, 3, size, size] and labels [N] of a folder with a sub-folder per class, -1
    where an image is unreadable; and the folder that keeps the decoded images.

    cache: the parent of that folder; None: the images are in memory. InputError if the folder or
    the cache cannot be read, or a class has fewer than 20 image files."""
    try:
        paths, labels, digest = list_images(folder, classes)
    except OSError as error:
        raise InputError(f"--data {folder}: {error}") from None
    for name, n in zip(classes, labels.bincount(minlength=len(classes)).tolist()):
        check_class_size(folder, name, n)  # before the long work
    cache_folder = None if cache is None else Path(cache, f"{digest[:20]}-{size}")
    build = partial(decode_folder, folder, paths, size)
    pixels, metadata = build_or_load_cache(cache_folder, "images", build)
    unreadable = dict(metadata["unreadable"])
    for reason in list(unreadable.values())[:10]:
        print(f"skipped {reason}", file=sys.stderr)
    if unreadable:
        print(f"skipped {len(unreadable)} of {len(paths)} images in {folder}", file=sys.stderr)
    labels[list(unreadable)] = -1
    return pixels.view(-1, 3, size, size), labels, cache_folder


# Caches -------------------------------------------------------------------------------------------


def build_or_load_cache(folder: Path | None, name: str, build: Callable) -> tuple[Tensor, dict]:
    """The bytes that build(file) writes, as uint8 [bytes], and the metadata that it returns.

    folder: keeps both between runs, as <name>.bytes, which is mapped into memory, and key.json;
    None: both are in memory. InputError if the folder cannot be written or read."""
    if folder is None:
        file = io.BytesIO()
        metadata = build(file)
        return torch.frombuffer(file.getbuffer(), dtype=torch.uint8), metadata
    try:
        if not folder.exists():
            print(f"{name} are made once and kept in {folder}", file=sys.stderr)
            build_cache(folder, name, build)
        metadata = json.loads((folder / "key.json").read_text())
        return torch.from_numpy(np.memmap(folder / f"{name}.bytes", np.uint8, "c")), metadata
    except OSError as error:
        raise InputError(f"{name} cannot be kept in {folder}: {error}") from None


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
            file.flush()
            os.fsync(file.fileno())
        (unfinished / "key.json").write_text(json.dumps(metadata, indent=1))
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
