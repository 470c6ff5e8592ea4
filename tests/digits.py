"""Real images that nobody drew for us: scikit-learn's handwritten digits, 1,797 of 8x8 pixels.

    python tests/digits.py make runs/digits-images      # a folder of PNGs, one sub-folder per class
    python train_rl.py --data runs/digits-images --out runs/digits
    python tests/digits.py judge runs/digits            # an SVM reads the generated digits

The SVM is scikit-learn's, trained on the same real images; no network of ours learns from it."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

import maskrl


def make(folder, per_class=None):
    """Write the digits as folder/<digit>/<number>.png, all or `per_class` of each."""
    images, labels = load_digits(return_X_y=True)
    for i, (image, label) in enumerate(zip(images, labels)):
        path = Path(folder) / str(label)
        path.mkdir(parents=True, exist_ok=True)
        if per_class is None or len(list(path.iterdir())) < per_class:
            pixels = (image.reshape(8, 8) * 255 / 16).round().astype(np.uint8)
            Image.fromarray(pixels).save(path / f"{i:04}.png")


def svm():
    return SVC(gamma=0.001, C=10)


def as_the_svm_reads(images):
    """Images [N, 3, S, S] in [-1, 1] -> [N, 64] in 0...16, as scikit-learn's digits are."""
    grey = F.interpolate(images.mean(1, keepdim=True), (8, 8), mode="area")
    return (grey.flatten(1).clamp(-1, 1) + 1) * 8


def judge(run, n=2000):
    """Share of n generated digits of each checkpoint in `run` that the SVM reads as what they were
    asked to be; and of the real digits, by cross-validation."""
    images, labels = load_digits(return_X_y=True)
    reader = svm().fit(images, labels)
    shares = {"real, cross-validated": float(cross_val_score(svm(), images, labels, cv=5).mean())}
    wanted = torch.arange(n) % 10
    for kind in maskrl.KINDS:
        model = maskrl.load_checkpoint(Path(run) / f"{kind}.pt")
        tokens = maskrl.generate(model, wanted, maskrl.Sampling(progress=True))
        read = reader.predict(as_the_svm_reads(maskrl.to_images(tokens, model.settings)).numpy())
        digits = torch.tensor([int(name) for name in model.classes])[wanted]
        shares[kind] = float(np.mean(read == digits.numpy()))
    return shares


def main(command, folder):
    if command == "make":
        make(folder)
    else:
        for name, share in judge(folder).items():
            print(f"{name:24}{share:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
