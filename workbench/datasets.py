"""Well-known sets of small images, which torchvision downloads and reads.

Their own test images are what the judge compares generated ones with; a quarter of the training
images trains the judge, which so looks at images that the generator has not seen.
"""

import hashlib
import sys
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import FileLock
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, KMNIST, MNIST, FashionMNIST, VisionDataset
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from maskrl import rng
from workbench.cache import build_or_load_cache
from workbench.errors import InputError
from workbench.images import check_class_size, middle_square

DATASETS = {
    "mnist": MNIST,
    "fashion": FashionMNIST,
    "kmnist": KMNIST,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
}


@dataclass
class Dataset:
    """All images of one of the DATASETS, as torchvision reads them."""

    name: str
    classes: list[str]
    images: Tensor  # uint8 [N, 3, S, S], the training images and then the test images
    labels: Tensor  # [N]
    training: int  # how many of them are training images

    def choose(self, classes: list[str]) -> Tensor:
        """Labels [N] that index these `classes`; -1 for an image of another one."""
        labels = torch.full((len(self.classes),), -1)
        labels[[self.classes.index(name) for name in classes]] = torch.arange(len(classes))
        return labels[self.labels]


def download_folder() -> Path:
    """Where sets are kept without --cache: next to what torch.hub downloads, for all runs."""
    return Path(torch.hub.get_dir()).parent / "datasets"


def read_dataset(name: str, folder=None) -> Dataset:
    """One of the DATASETS, downloaded into the folder (None: `download_folder`) unless it is there.

    Grey images get three equal channels. InputError if it can neither be read nor downloaded."""
    parts = read_or_download(name, folder or download_folder())
    images = torch.cat([torch.as_tensor(part.data) for part in parts])
    if images.dim() == 3:  # grey: an image is kept once, and seen three times
        images = images[:, None].expand(-1, 3, -1, -1)
    else:
        images = images.permute(0, 3, 1, 2).contiguous()
    labels = torch.cat([torch.as_tensor(part.targets) for part in parts])
    classes = [text.split(" - ")[0] for text in parts[0].classes]  # "7 - seven" is 7
    return Dataset(name, classes, images, labels, len(parts[0]))


def read_or_download(name: str, folder) -> list[VisionDataset]:
    """The training and the test images of one of the DATASETS."""
    kind = DATASETS[name]
    try:
        return [kind(folder, train) for train in (True, False)]
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if "not found" not in str(error):  # torchvision looks at MNIST's only as it reads them
            raise InputError(
                f"--data {name}: a file in {folder} is damaged ({error}): delete it, for it to be "
                "unpacked or downloaded again"
            ) from None
    print(f"{name} is downloaded once and kept in {folder}", file=sys.stderr)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(folder, f"{name}.lock")):  # another process may be doing the same
            return [kind(folder, train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, HTTPException) as error:
        raise InputError(
            f"--data {name} cannot be downloaded ({error}). On a computer with a network fetch "
            f"{where_to_put(kind, folder)}"
        ) from None


def where_to_put(kind: type[VisionDataset], folder) -> str:
    """Which files a set consists of, where they come from, and where they belong."""
    if issubclass(kind, MNIST):
        files = ", ".join(file for file, _ in kind.resources)
        return f"{files} from {kind.mirrors[0]} and put them into {Path(folder, kind.__name__)}/raw"
    return f"{kind.url} and put it into {folder}, as it is"


def resized(dataset: Dataset, size: int, cache=None) -> tuple[Tensor, Path | None]:
    """Its images as uint8 [N, 3, size, size], and the folder that keeps what is made of them.

    cache: the parent of that folder; None: nothing is kept."""
    folder = None
    if cache:
        digest = hashlib.sha256(dataset.images[:, 0].numpy().tobytes()).hexdigest()
        folder = Path(cache, f"{dataset.name}-{digest[:20]}-{size}")
    if dataset.images.shape[-1] == size:
        return dataset.images, folder
    written, _ = build_or_load_cache(folder, "images", partial(write_resized, dataset, size))
    return written.view(-1, 3, size, size), folder


def write_resized(dataset: Dataset, size: int, file: BinaryIO) -> dict:
    """Write its images to `file` as 3 x size x size bytes each; returns metadata."""
    for image in tqdm(dataset.images, "resizing", leave=False):
        file.write(middle_square(to_pil_image(image), size).numpy().tobytes())
    return {"dataset": dataset.name, "image_size": size}


def divide_dataset(dataset: Dataset, labels: Tensor, classes: list[str]) -> list[Tensor]:
    """Rows of `labels` [N] for train, judge and test: three quarters and one quarter of the
    training images of every class, as many to one another as of a folder, and the test images.

    Independent of the seed and of other classes: no stage meets what another one held out."""
    parts = []
    for y, class_name in enumerate(classes):
        rows = (labels == y).nonzero().squeeze(1)
        training, test = rows[rows < dataset.training], rows[rows >= dataset.training]
        check_class_size(dataset.name, class_name, min(len(training), len(test)))
        training = training[torch.randperm(len(training), generator=rng("split", class_name))]
        train, judge = training.tensor_split((int(0.75 * len(training)),))
        parts.append((train, judge, test))
    return [torch.cat(part) for part in zip(*parts)]
