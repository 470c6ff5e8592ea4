"""Data: the built-in shapes, a well-known set of images, or a folder with a sub-folder per class.

All become bytes in three parts: `train` (for the generator and the reward network), `judge` (for
the judge alone) and `test` (real images that the judge compares generated ones with).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskrl import rng
from workbench.datasets import (
    DATASETS,
    divide_dataset,
    download_folder,
    read_dataset,
    resized,
)
from workbench.errors import InputError, abbreviate
from workbench.images import check_class_size, class_folders, composed, digests_of, load_folder
from workbench.settings import RunSettings


def to_unit(images: Tensor) -> Tensor:
    """Bytes -> floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def identity(images: Tensor) -> Tensor:
    """Decodes what a generator of pixels makes."""
    return images


@dataclass
class Split:
    """Some of the images of a data set, and their labels."""

    stored: Tensor  # uint8 [M, 3, S, S], all images of the data set, perhaps mapped from a file
    rows: Tensor  # [N], the indices in `stored` of the images in this part
    labels: Tensor  # [N]

    def __len__(self):
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """A copy of this part's images, uint8 [N, 3, S, S]; of a large part, `take` some first."""
        return self.stored[self.rows]

    @property
    def channels(self) -> int:
        return self.stored.shape[1]

    @property
    def size(self) -> int:
        """S, height and width of an image in pixels."""
        return self.stored.shape[-1]

    def spaced(self) -> Tensor:
        """Images in [-1, 1] [n, 3, S, S], every class in proportion: all of them, or 10,000 to
        20,000 evenly spaced ones; fewer of large images, so that all take at most 4.3 GB. Computed
        once and kept: do not change them in place."""
        return self.evenly_spaced_images

    @cached_property
    def evenly_spaced_images(self) -> Tensor:
        most = min(10_000, 2**29 // self.stored[0].numel())
        return to_unit(self.take(slice(None, None, max(1, len(self) // most))).images)

    def take(self, index) -> "Split":
        """The Split of the images at `index`: a slice, or a tensor of indices or of booleans."""
        return Split(self.stored, self.rows[index], self.labels[index])

    def batch(self, n: int, generator, device="cpu", flip=False) -> tuple[Tensor, Tensor]:
        """n random images in [-1, 1] [n, 3, S, S] and their labels [n]; flip: half are mirrored."""
        index = torch.randint(len(self), (n,), generator=generator)
        images = self.stored[self.rows[index]]
        if flip:
            mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        return to_unit(images.to(device)), self.labels[index].to(device)

    def balanced_half(self, most: int) -> int:
        """How many images of each class either of the `balanced_halves` has."""
        counts = self.labels.unique(return_counts=True)[1]
        return max(2, min(int(counts.min()) // 2, most // len(counts)))

    def balanced_halves(self, most: int, generator) -> tuple["Split", "Split"]:
        """Two disjoint random halves with equally many images of every class: at most `most` images
        each, but at least two of each class."""
        m = self.balanced_half(most)
        by_class = [(self.labels == y).nonzero().squeeze(1) for y in self.labels.unique()]
        shuffled = [index[torch.randperm(len(index), generator=generator)] for index in by_class]
        halves = [index[:m] for index in shuffled], [index[m : 2 * m] for index in shuffled]
        return self.take(torch.cat(halves[0])), self.take(torch.cat(halves[1]))


@dataclass
class Data:
    """A data set in three parts, and what its labels mean."""

    name: str  # "shapes", one of DATASETS, or the folder
    classes: list[str]  # of the labels; those of a checkpoint may be more than occur here
    names: dict[str, str]  # {class: what people call it}, from --class-names
    train: Split
    judge: Split
    test: Split
    cache: Path | None = None  # the folder that keeps the decoded images, if there is one
    digests: dict[str, str] = field(default_factory=dict)  # {class: of its pixels}; not of shapes
    latents: Any = None  # workbench.latents.Latents of `train`, for a generator of latents
    decode: Callable = identity  # what a generator makes -> images in [-1, 1]

    @property
    def labels(self) -> Tensor:
        """The labels that occur, ascending."""
        return self.train.labels.unique()

    @property
    def learned(self) -> Any:
        """What a generator learns: the training images, or their latents."""
        return self.train if self.latents is None else self.latents

    def labelled_as(self, classes: list[str]) -> "Data":
        """The same images with labels that index a checkpoint's `classes`; InputError unless these
        include all of the data's own."""
        known = {composed(name): y for y, name in reversed(list(enumerate(classes)))}
        unknown = [name for name in self.classes if composed(name) not in known]
        if unknown:
            raise InputError(
                f"--data {self.name} has classes that the checkpoint does not know: "
                f"{abbreviate(unknown)}; it knows {abbreviate(classes)}. Choose with --classes"
            )
        new_labels = torch.tensor([known[composed(name)] for name in self.classes])
        train, judge, test = [
            replace(part, labels=new_labels[part.labels])
            for part in (self.train, self.judge, self.test)
        ]
        return replace(self, classes=classes, train=train, judge=judge, test=test)

    def measure(self, settings: RunSettings) -> RunSettings:
        """The settings with mean and scale measured on what is learned, unless scale is given.

        Tokens that are not centred hide what varies behind a constant, and attention then hardly
        learns to look at them."""
        if settings.scale:
            return settings
        x = self.learned.spaced()
        mean = round(float(x.mean()), 4)
        scale = round(float(1 / x.std().clamp(min=1e-3)), 4)
        return replace(settings, mean=mean, scale=scale)


def load_data(
    settings: RunSettings, name="shapes", classes=None, class_names=None, cache=None, stride=1
) -> Data:
    """The built-in shapes, or a folder's images: 60, 20 and 20 % of every class in the three parts.
    Or one of DATASETS, whose own test images are `test`.

    classes: a list as --classes has it (None: all). class_names: a file as --class-names has it.
    cache: a folder to keep decoded images in (None: in memory), and to download a set into. stride:
    pixels per side of a latent if latents are generated. InputError if there is no such folder or
    class, too few images, or no network to download a set."""
    size = settings.image_size * stride
    if name == "shapes":
        if classes or class_names:
            raise InputError("--classes and --class-names need --data FOLDER; shapes are all drawn")
        classes, images, labels = load_shapes(settings, size)
        return Data(name, classes, {}, *splits(images, labels, divide(labels, name, classes)))
    dataset = read_dataset(name, cache) if name in DATASETS else None
    available = dataset.classes if dataset else class_folders(name)
    names = read_class_names(class_names, available) if class_names else {}
    positions = find_classes(classes, available, names) if classes else range(len(available))
    classes = [available[y] for y in sorted(set(positions))]
    if dataset:
        images, cache_folder = resized(dataset, size, cache)
        labels = dataset.choose(classes)
        parts = splits(images, labels, divide_dataset(dataset, labels, classes))
        digests = digests_of(images, labels)
    else:
        images, labels, digests, cache_folder = load_folder(name, classes, size, cache)
        parts = splits(images, labels, divide(labels, name, classes))
    return Data(name, classes, names, *parts, cache_folder, dict(zip(classes, digests)))


def splits(images: Tensor, labels: Tensor, parts: list[Tensor]) -> list[Split]:
    """A Split of the images [N, 3, S, S] at the rows of each part."""
    return [Split(images, rows, labels[rows]) for rows in parts]


def is_folder(name: str) -> bool:
    """Whether --data names a folder. ./mnist is one, and mnist is not."""
    return name != "shapes" and name not in DATASETS


def usual_preset(name: str, device: torch.device) -> str:
    """The preset of --data if --preset is not given."""
    on_gpu = device.type == "cuda"
    if is_folder(name):
        return "small" if on_gpu else "folder"
    if name.startswith("cifar"):
        return "cifar_gpu" if on_gpu else "cifar"
    return "tiny" if name == "shapes" else "mnist"


def usual_cache(name: str, out: Path) -> Path:
    """Where the images of --data are kept if --cache is not given; downloads serve all runs."""
    return download_folder() if name in DATASETS else out / "cache"


def divide(labels: Tensor, name: str, classes: list[str]) -> list[Tensor]:
    """Rows of `labels` [N] for train, judge and test; label -1 is in none of them.

    Independent of the seed and of other classes: no stage meets what another one held out."""
    parts = []
    shared = rng("split")
    for y, class_name in enumerate(classes):
        rows = (labels == y).nonzero().squeeze(1)
        n = len(rows)
        check_class_size(name, class_name, n)
        generator = shared if name == "shapes" else rng("split", class_name)
        rows = rows[torch.randperm(n, generator=generator)]
        parts.append(rows.tensor_split((int(0.6 * n), int(0.8 * n))))
    return [torch.cat(part) for part in zip(*parts)]


# Shapes -------------------------------------------------------------------------------------------

COLOURS = {"red": (220, 50, 50), "green": (50, 200, 70), "blue": (60, 90, 230)}
FORMS = ("circle", "square", "triangle")


def shape_masks(x: Tensor, y: Tensor, r: Tensor, size: int) -> Tensor:
    """The fraction of every pixel that lies inside each of the FORMS [N, 3, size, size], with
    centres x, y [N] and radii r [N] in units of the image's side."""
    grid = (torch.arange(size, device=x.device) + 0.5) / size
    dx, dy, r = grid - x[:, None, None], grid[:, None] - y[:, None, None], r[:, None, None]
    # signed distances to the edge, negative inside
    circle = (dx**2 + dy**2).sqrt() - r
    square = torch.maximum(dx.abs(), dy.abs()) - 0.88 * r
    triangle = torch.maximum(dy + 0 * dx, 0.866 * dx.abs() - 0.5 * dy) - 0.6 * r
    return (0.5 - torch.stack([circle, square, triangle], 1) * size).clamp(0, 1)


def draw_shapes(labels: Tensor, size: int, generator=None) -> Tensor:
    """Antialiased shapes of the classes `labels` [N], as uint8 [N, 3, size, size].

    The class is 3 x colour + form; centres lie within +-0.1 of the middle, radii in 0.22...0.32,
    and backgrounds are dark greys."""
    u = torch.rand(len(labels), 4, generator=generator)
    x, y = 0.5 + 0.1 * (2 * u[:, :2] - 1).T
    masks = shape_masks(x, y, 0.22 + 0.10 * u[:, 2], size)
    inside = masks[torch.arange(len(labels)), labels % 3][:, None]
    colour = torch.tensor(list(COLOURS.values())).float()[labels // 3][:, :, None, None]
    background = 51 * u[:, 3, None, None, None]
    return (inside * colour + (1 - inside) * background).round().to(torch.uint8)


def load_shapes(settings: RunSettings, size: int) -> tuple[list[str], Tensor, Tensor]:
    """Class names, images uint8 [N, 3, size, size] and labels [N] of the built-in shapes."""
    classes = [f"{colour} {form}" for colour in COLOURS for form in FORMS]
    labels = torch.arange(len(classes)).repeat_interleave(settings.per_class)
    generator = rng(settings.seed, "shapes")
    images = [draw_shapes(part, size, generator) for part in labels.split(4096)]
    return classes, torch.cat(images), labels


# Names of classes ---------------------------------------------------------------------------------


def read_lines(option: str, path) -> list[str]:
    """The lines of a text file that an option names, with Unicode's accents composed; InputError if
    it cannot be read, or is not in UTF-8."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # "sig": Windows begins files by a mark
    except OSError as error:
        raise InputError(f"{option} {path}: {error}") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # as in UTF-16
        raise InputError(f"{option} {path} is not a text file in UTF-8: save it as one")
    return composed(text).splitlines()


def read_class_names(path, classes: list[str]) -> dict[str, str]:
    """{class: what people call it} from a file with lines such as `n01440764 tench, Tinca tinca`;
    InputError if it names none of the `classes`."""
    pairs = [line.split(maxsplit=1) for line in read_lines("--class-names", path)]
    names = {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}
    if not names.keys() & set(map(composed, classes)):
        raise InputError(
            f"--class-names {path} names none of the classes {abbreviate(classes, 3)}; expected "
            "lines such as 'n01440764 tench, Tinca tinca'"
        )
    return names


def display_names(classes: list[str], names: dict[str, str]) -> list[str]:
    """What to call the `classes`: the first of several names; the class itself if it has none."""
    short_names = {name: synonyms.split(",")[0] for name, synonyms in names.items()}
    return [short_names.get(composed(name), name) for name in classes]


def find_classes(texts: list[str], classes: list[str], names: dict[str, str]) -> list[int]:
    """Positions in `classes` of those that --classes asks for.

    texts: classes or their `names`, several of them separated by commas, or files with one a line;
    the spaces around a name may be left out. InputError if there is no such class, or if several
    have the name."""
    positions, exact = {}, {}
    for y, name in enumerate(map(composed, classes)):
        exact.setdefault(name, []).append(y)
        synonyms = names.get(name, "")
        spellings = {name.strip(), synonyms, *map(str.strip, synonyms.split(","))}
        for spelling in spellings - {""}:
            positions.setdefault(spelling, []).append(y)
    positions |= exact
    wanted = [name for text in texts for name in split_names(text, positions)]
    if not wanted:
        raise InputError("--classes names no class")
    for name in wanted:
        if name not in positions:
            raise InputError(f"--classes: no class {name!r}; there are: {abbreviate(classes)}")
        if len(positions[name]) > 1:
            several = abbreviate([classes[y] for y in positions[name]])
            raise InputError(f"--classes: {name!r} may be any of {several}: name one of these")
    return [positions[name][0] for name in wanted]


def split_names(text: str, known) -> list[str]:
    """The names in one value of --classes: a `known` one, the lines of a file, or a comma list."""
    if composed(text) in known:
        return [composed(text)]
    is_file = os.path.isfile(text)
    parts = read_lines("--classes", text) if is_file else composed(text).split(",")
    return [name if name in known else name.strip() for name in parts if name.strip()]
