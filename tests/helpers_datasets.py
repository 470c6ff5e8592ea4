"""Small sets of images in the formats of MNIST and CIFAR, which torchvision's own readers read."""

import gzip
import hashlib
import pickle
import tarfile

import numpy as np
from torchvision.datasets import MNIST

from workbench.studies.make_mnist import write_parts

TRAINING, TEST = 24, 20  # images of each class
UNREACHABLE = "http://127.0.0.1:9/"  # nobody answers there


def pixels(n, *shape, seed):
    """n different images."""
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def make_idx(root, kind=MNIST):
    """The four unpacked files of MNIST or a set like it, of which no checksums are known."""
    folder = root / kind.__name__ / "raw"
    sizes = {"train": TRAINING, "t10k": TEST}
    write_parts(
        folder,
        {part: [pixels(n, 28, 28, seed=[y, n]) for y in range(10)] for part, n in sizes.items()},
    )
    return folder


def pack_idx(folder, kind, monkeypatch):
    """The same files as they are downloaded: packed, with the checksums that torchvision wants."""
    resources = []
    for path in sorted(folder.glob("*-ubyte")):
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        resources.append((packed.name, md5(packed)))
        path.unlink()
    monkeypatch.setattr(kind, "resources", resources)


def make_cifar(root, kind, monkeypatch, per_class=TRAINING):
    """The pickled files of CIFAR-10 or -100, which torchvision's checksums are made to fit."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    n = int(kind.__name__.removeprefix("CIFAR"))
    names = [f"kind {y}" for y in range(n)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    for files, count in ((kind.train_list, per_class), (kind.test_list, TEST)):
        labels = np.repeat(np.arange(n), count)
        data = pixels(len(labels), 3 * 32 * 32, seed=count)
        order = np.random.default_rng(0).permutation(len(labels))
        for (name, _), rows in zip(files, np.array_split(order, len(files))):
            key = "labels" if n == 10 else "fine_labels"
            batch = {"data": data[rows], key: labels[rows].tolist()}
            (folder / name).write_bytes(pickle.dumps(batch))
    for part in ("train_list", "test_list"):
        known = [[name, md5(folder / name)] for name, _ in getattr(kind, part)]
        monkeypatch.setattr(kind, part, known)
    monkeypatch.setitem(kind.meta, "md5", md5(folder / kind.meta["filename"]))
    return folder


def pack_cifar(folder, kind, monkeypatch):
    """The archive that CIFAR is downloaded as, in place of its files."""
    archive = folder.with_name(kind.filename)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, kind.base_folder)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    monkeypatch.setattr(kind, "tgz_md5", md5(archive))
