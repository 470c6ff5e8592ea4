"""Folders of images, as the tests of images and data need them."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from maskrl import rng
from workbench.data import COLOURS, FORMS, draw_shapes
from workbench.settings import preset

SIDE = 8  # height and width in pixels


def small_settings(**overrides):
    """Settings for images of SIDE pixels."""
    return preset("tiny", **{"image_size": SIDE, "patch": 2, "steps": 1, **overrides})


def make_folder(folder, classes=("cat", "dog"), n=20):
    """n PNG files of different noise in a sub-folder for each of the classes."""
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


def make_shapes_folder(folder, per_class):
    """PNG files of the built-in shapes, in a sub-folder for each of the nine classes."""
    names = [f"{colour} {form}" for colour in COLOURS for form in FORMS]
    for y, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        images = draw_shapes(torch.full((per_class,), y), SIDE, rng("folder", y))
        for i, image in enumerate(images):
            to_pil_image(image).save(folder / name / f"{i:02}.png")
    return folder
