"""Real images that nobody drew for us: scikit-learn's bundled handwritten digits (1,797 images of 8x8, 10 classes).

    python tests/digits.py make runs/digits-images             # a folder of PNGs, one sub-folder per class
    python train_rl.py --data runs/digits-images --out runs/digits
    python tests/digits.py judge runs/digits                   # an SVM trained on the real digits reads the generated ones

The SVM is scikit-learn's, trained on the same real images; no network of ours learns from it."""

import sys
from pathlib import Path

import numpy as np
import torch
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
            Image.fromarray((image.reshape(8, 8) * 255 / 16).round().astype(np.uint8)).save(path / f"{i:04}.png")


def judge(run, n=2000):
    """Share of n generated digits of each checkpoint in `run` that the SVM reads as the digit they were asked to be."""
    images, labels = load_digits(return_X_y=True)
    svm = SVC(gamma=0.001, C=10).fit(images, labels)
    shares = {"real, cross-validated": float(cross_val_score(SVC(gamma=0.001, C=10), images, labels, cv=5).mean())}
    wanted = torch.arange(n) % 10
    for kind in maskrl.KINDS:
        model = maskrl.load_checkpoint(Path(run) / f"{kind}.pt")
        teacher = kind == "teacher"
        tokens = maskrl.generate(model, wanted, guidance=model.settings.guidance if teacher else 1.0,
                                 denoise_steps=model.settings.denoise_steps if teacher else 1, progress=True)
        x = maskrl.to_images(tokens, model.settings).mean(1, keepdim=True)
        x = (torch.nn.functional.interpolate(x, (8, 8), mode="area").flatten(1).clamp(-1, 1) + 1) * 8
        digits = torch.tensor([int(name) for name in model.classes])[wanted]
        shares[kind] = float(np.mean(svm.predict(x.numpy()) == digits.numpy()))
    return shares


if __name__ == "__main__":
    command, folder = sys.argv[1:]
    for name, share in (make(folder) or {} if command == "make" else judge(folder)).items():
        print(f"{name:24}{share:.3f}")
