"""Image files: each as a person sees it, and a folder of them as bytes.

A folder of images, with one sub-folder per class, is decoded once, into a cache that later runs
map into memory: it may hold more images than fit into memory.
"""

import errno
import hashlib
import os
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from workbench.cache import build_or_load_cache
from workbench.errors import InputError, abbreviate, is_out_of_memory

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = {end: name for end, name in Image.registered_extensions().items() if name in FORMATS}

# What one unit of a PNG's transparent colour is in the pixels that Pillow makes, by its raw mode
TRANSPARENT_UNITS = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
PHOTOMETRIC, BITS, MAXIMUM, LOWEST, HIGHEST = 262, 258, 281, 340, 341  # tags of a TIFF


class Unavailable(InputError):
    """A file could not be read now, which says nothing about what is in it."""


# One image ----------------------------------------------------------------------------------------


def read_rgb(path, size: int | None = None, behind="white") -> Image.Image:
    """The first frame of an image file in 8 bits, upright, and on `behind` where it is transparent.

    size: side of the square in pixels that the image will be resized to; a JPEG is then decoded at
    about twice that, which is faster. InputError says why a file cannot be read; Unavailable if
    that may pass: no permission, no memory, a lost network."""
    try:
        with Image.open(path, formats=tuple(set(EXTENSIONS.values()))) as image:
            if size:
                image.draft(None, (2 * size, 2 * size))
            fit_transparent_colour(image)
            turn_upright(image)
            return opaque(eight_bits(image), behind)
    except UnidentifiedImageError:
        raise InputError(f"{path}: no image, or a damaged one") from None
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        kind = Unavailable if may_pass(error) else InputError
        raise kind(f"{path}: {reason}") from None


def may_pass(error: Exception) -> bool:
    """Whether the system failed to provide a file, or memory; Pillow's errors have no number."""
    number = getattr(error, "errno", None)  # EINVAL: a damaged file asked for an impossible place
    return is_out_of_memory(error) or number not in (None, errno.EINVAL)


def fit_transparent_colour(image: Image.Image) -> None:
    """Before a PNG is decoded: its transparent colour, which Pillow leaves in units of the file, in
    those of the pixels. Of 16-bit colours only the high bytes remain, and are compared."""
    is_png = image.format == "PNG" and image.tile
    unit = TRANSPARENT_UNITS.get(image.tile[0][3]) if is_png else None
    colour = image.info.get("transparency")
    if unit and colour is not None:
        numbers = colour if isinstance(colour, tuple) else (colour,)
        scaled = tuple(int(number * unit) for number in numbers)
        image.info["transparency"] = scaled if isinstance(colour, tuple) else scaled[0]


def turn_upright(image: Image.Image) -> None:
    """Turn the image as its EXIF says; if that is broken, it stays as it lies in the file."""
    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:
        if may_pass(error):
            raise


def eight_bits(image: Image.Image) -> Image.Image:
    """Pixels of 16 bits and floats scaled to 0...255, where Pillow would clip them; see `levels`.
    A transparent colour becomes a second channel."""
    if image.mode not in ("F", "I", "I;16", "I;16B", "I;16L", "I;16N"):
        return image
    pixels = np.asarray(image, dtype=np.float32)
    black, white = levels(image, pixels)
    pixels = np.nan_to_num(pixels, nan=black, posinf=max(black, white), neginf=min(black, white))
    scaled = (pixels - black) / (white - black) * 255
    grey = Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return grey


def levels(image: Image.Image, pixels: np.ndarray) -> tuple[float, float]:
    """Which values of a grey image of 16 bits or floats are black and white.

    A TIFF may say it. Of whole numbers: by bits per sample if these are fewer than 16, or by a
    maximum of 2^k - 1, such as 4095 for 12 bits in 16 (another maximum is only the brightest
    pixel's). Of floats: by a lowest and a highest value. Else white is 65535, and of floats 1, 255
    or 65535, the least that they hardly exceed; black is 0, or -1 for floats from -1 to 1."""
    tags = getattr(image, "tag_v2", {})
    black, white = 0.0, 65535.0
    if image.mode == "F":
        finite = pixels[np.isfinite(pixels)]
        low, high = finite.min(initial=0), finite.max(initial=0)
        white = next((level for level in (1.0, 255.0) if high <= 1.1 * level), white)
        if white == 1 and -1.1 <= low < -0.1:
            black = -1.0
        said = number_in(tags, LOWEST), number_in(tags, HIGHEST)
        if 0 < said[1] - said[0] < np.inf:
            black, white = said
    else:
        bits, maximum = number_in(tags, BITS), number_in(tags, MAXIMUM)
        if bits < 16:
            white = 2**bits - 1
        if 1 <= maximum < 2**bits and float(np.log2(maximum + 1)).is_integer():
            white = maximum
    return (white, black) if tags.get(PHOTOMETRIC) == 0 else (black, white)


def number_in(tags, tag: int) -> float:
    """The first number under a tag of a TIFF; NaN if there is none."""
    try:
        return float(np.ravel(tags[tag])[0])
    except (KeyError, IndexError, TypeError, ValueError):
        return float("nan")


def opaque(image: Image.Image, behind="white") -> Image.Image:
    """Any image in RGB, transparent pixels composited on the colour `behind`."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, behind), image).convert("RGB")


def middle_square(image: Image.Image, size: int) -> Tensor:
    """The middle of an RGB image, resized to uint8 [3, size, size]."""
    return pil_to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))


# The files of a folder ----------------------------------------------------------------------------

# What systems and archivers put next to the images, as hidden folders are
SYSTEM_FOLDERS = {"@eaDir", "@Recycle", "@__thumb", "@tmp", "#recycle", "$RECYCLE.BIN"}
SYSTEM_FOLDERS |= {"__MACOSX", "__pycache__", "System Volume Information", "lost+found"}
RUN_FILES = ("choices.json", "images.bytes", "latents.bytes")  # of --out, and of a cache
PARTS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}


def composed(name: str) -> str:
    """The name with its accents as Unicode composes them (NFC): macOS takes them apart."""
    return unicodedata.normalize("NFC", name)


def composed_name(entry: os.DirEntry) -> str:
    return composed(entry.name)


def is_of_a_run(folder: str) -> bool:
    """Whether a run made the folder: its --out, a cache, or one with nothing but such folders."""
    if any(os.path.exists(os.path.join(folder, name)) for name in RUN_FILES):
        return True
    if not os.access(folder, os.R_OK):
        return False
    visible = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    if not visible:
        return os.path.exists(os.path.join(folder, ".lock"))
    return all(entry.is_dir(follow_symlinks=False) and is_of_a_run(entry.path) for entry in visible)


def holds_images(entry: os.DirEntry, ignored: Counter) -> bool:
    """Whether a folder may have images of a class in it; if not, it is counted in `ignored`."""
    kind = f"{entry.name}/"
    if not entry.name.startswith(".") and entry.name not in SYSTEM_FOLDERS:
        if not is_of_a_run(entry.path):
            return True
        kind += " (of a run)"
    ignored[kind] += 1
    return False


def class_paths(folder: str, ignored: Counter) -> dict[str, list[str]]:
    """{class: its sub-folders}, sorted: several if their names differ only in Unicode's spelling.

    ignored: counts what else there is. InputError if the folder cannot be read or has no class."""
    paths = {}
    try:
        for entry in sorted(os.scandir(folder), key=composed_name):
            if not os.path.isdir(entry.path):
                ignored[f"{file_kind(entry)} outside the sub-folders"] += 1
            elif holds_images(entry, ignored):
                paths.setdefault(composed_name(entry), []).append(entry.path)
    except OSError as error:
        raise InputError(f"--data {folder}: {error.strerror}") from None
    if not paths:
        raise InputError(f"--data {folder} has no sub-folders; expected one of images per class")
    return paths


def class_folders(folder: str) -> list[str]:
    """The names of the classes of a folder, sorted; InputError as of `class_paths`."""
    return list(class_paths(folder, Counter()))


def files_below(
    folder: str, ignored: Counter, parents: frozenset[str] = frozenset()
) -> Iterator[os.DirEntry]:
    """All files in a folder and its sub-folders, in a fixed order; `ignored` as of `holds_images`.

    Symbolic links are followed, but not from a folder to itself or to one of its `parents`."""
    parents = parents | {os.path.realpath(folder)}
    for entry in sorted(os.scandir(folder), key=composed_name):
        if not os.path.isdir(entry.path):
            yield entry
        elif os.path.realpath(entry.path) not in parents and holds_images(entry, ignored):
            yield from files_below(entry.path, ignored, parents)


def file_kind(entry: os.DirEntry) -> str:
    """The extension of a file in lower case, e.g. `.jpg`, or its name if it has none."""
    kind = Path(entry.name).suffix.lower() or entry.name
    if not os.path.isfile(entry.path):
        return f"{kind} (a broken link)"
    return f"hidden {kind}" if entry.name.startswith(".") and kind in EXTENSIONS else kind


def list_images(folder: str, classes: list[str]) -> tuple[list[str], list[int], str]:
    """Paths and labels of N images of the `classes`, and a digest that changes when a file is
    added, removed or changed. Prints how many files of which kinds are ignored.

    Archives and builds give equal times to files of other content: the digest is of where each
    file really is, its inode and size, and both its times. The system sets the second one, ctime,
    when a file or its permissions change. A folder that was moved or copied is decoded again."""
    paths, labels, nested, ignored = [], [], True, Counter()
    root = os.path.abspath(folder)
    digest = hashlib.sha256(f"2: as `read_rgb` reads it, {os.path.realpath(root)!a}".encode())
    by_class = class_paths(root, ignored)
    for label, name in enumerate(classes):
        for class_path in by_class.get(name, []):
            for entry in files_below(class_path, ignored):
                kind = file_kind(entry)
                if kind not in EXTENSIONS:
                    ignored[kind] += 1
                    continue
                stat = entry.stat()
                version = entry.path.removeprefix(root), stat.st_ino, stat.st_size
                version += stat.st_mtime_ns, stat.st_ctime_ns
                digest.update(f"{version}\n".encode())
                paths.append(entry.path)
                labels.append(label)
                nested &= os.path.dirname(entry.path) != class_path
    if ignored:
        kinds = abbreviate([f"{count} {kind}" for kind, count in ignored.most_common()])
        print(f"ignored in {folder}: {kinds}", file=sys.stderr)
    if paths and (nested or {name.lower() for name in classes} <= PARTS):
        print(
            f"each of these is taken for one class, with all that is below it: "
            f"{abbreviate(classes)}. If its sub-folders are the classes, give --data "
            f"{os.path.join(folder, classes[0])}",
            file=sys.stderr,
        )
    return paths, labels, digest.hexdigest()


def check_class_size(folder: str, class_name: str, n: int) -> None:
    """InputError unless n images are enough to be divided into train, judge and test."""
    if n < 20:
        raise InputError(
            f"class {class_name!r} in --data {folder} has {n} readable images; at least 20 are "
            "needed, or --classes without it"
        )


# A folder as bytes --------------------------------------------------------------------------------


def read_square(path: str, size: int) -> bytes | InputError:
    """The middle of an image file as 3 x size x size bytes, or why it cannot be read."""
    try:
        return middle_square(read_rgb(path, size), size).numpy().tobytes()
    except InputError as error:
        return error
    except MemoryError:
        return Unavailable(f"{path}: too little memory")


def read_and_digest(path: str, size: int) -> tuple[bytes | InputError, bytes]:
    """`read_square`, and the digest of the bytes."""
    square = read_square(path, size)
    return square, b"" if isinstance(square, InputError) else hashlib.sha256(square).digest()


def decode(paths: list[str], labels: list[int], size: int, file: BinaryIO) -> dict:
    """Write the images to `file` as 3 x size x size bytes each, in order; zeros for an unreadable
    one. Returns (index, reason) of those that are "unreadable", and of those that "failed" for a
    reason that may pass; and "digests" of the pixels that could be read of each label, which cost
    little here: each thread has them of its own images."""
    unreadable, failed, digests = [], [], {label: hashlib.sha256() for label in labels}
    pool = ThreadPool(torch.get_num_threads())  # threads: Pillow lets others run while it decodes
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # odd metadata, or merely large
            results = pool.imap(partial(read_and_digest, size=size), paths, chunksize=32)
            results = tqdm(results, "decoding", len(paths), leave=False)
            for i, (square, digest) in enumerate(results):
                if isinstance(square, InputError):
                    kind = failed if isinstance(square, Unavailable) else unreadable
                    kind.append((i, str(square)))
                    square = bytes(3 * size * size)
                file.write(square)
                digests[labels[i]].update(digest)
    finally:
        pool.terminate()
        pool.join()  # after Ctrl-C too: a thread that is still working would crash Python's exit
    hexadecimal = [digest.hexdigest() for digest in digests.values()]
    return {"unreadable": unreadable, "failed": failed, "digests": hexadecimal}


def decode_folder(
    folder: str, paths: list[str], labels: list[int], size: int, file: BinaryIO
) -> dict:
    """What `decode` does, and the metadata that the cache keeps with the images."""
    about = {"folder": folder, "image_size": size, "files": len(paths)}
    return about | decode(paths, labels, size, file)


def digests_of(images: Tensor, labels: Tensor) -> list[str]:
    """The "digests" of `decode`, of images [N, 3, size, size] and labels [N] (-1: unreadable): a
    second for some 300 MB of pixels."""
    digests = {}
    for image, label in zip(images, labels.tolist()):
        if label >= 0:
            square = hashlib.sha256(image.numpy().tobytes())
            digests.setdefault(label, hashlib.sha256()).update(square.digest())
    return [digests[label].hexdigest() for label in sorted(digests)]


def load_folder(
    folder: str, classes: list[str], size: int, cache=None
) -> tuple[Tensor, Tensor, list[str], Path | None]:
    """Images uint8 [N, 3, size, size] and labels [N] of a folder with a sub-folder per class, -1
    where an image is unreadable; a digest of the pixels of each class; and the folder that keeps
    the decoded images.

    cache: the parent of that folder; None: the images are in memory. What failed for a reason that
    may pass is tried again each time. InputError if the folder or the cache cannot be read, or a
    class has fewer than 20 image files."""
    try:
        paths, labels, digest = list_images(folder, classes)
    except OSError as error:
        raise InputError(f"--data {folder}: {error}") from None
    counts = Counter(labels)
    for label, name in enumerate(classes):
        check_class_size(folder, name, counts[label])  # before the long work
    cache_folder = None if cache is None else Path(cache, f"{digest[:20]}-{size}")
    build = partial(decode_folder, folder, paths, labels, size)
    pixels, metadata = build_or_load_cache(cache_folder, "images", build)
    images, labels = pixels.view(-1, 3, size, size), torch.tensor(labels)
    unreadable = dict(metadata["unreadable"])
    for i, _ in metadata["failed"]:
        square = read_square(paths[i], size)
        if isinstance(square, InputError):
            unreadable[i] = str(square)
        else:  # in this process alone: the file is as it was
            images[i] = torch.frombuffer(bytearray(square), dtype=torch.uint8).view(3, size, size)
    for reason in list(unreadable.values())[:10]:
        print(f"skipped {reason}", file=sys.stderr)
    if unreadable:
        print(f"skipped {len(unreadable)} of {len(paths)} images in {folder}", file=sys.stderr)
    labels[list(unreadable)] = -1
    digests = digests_of(images, labels) if metadata["failed"] else metadata["digests"]
    return images, labels, digests, cache_folder
