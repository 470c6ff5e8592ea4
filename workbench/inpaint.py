"""The input of sample.py --inpaint: an image to complete, and a mask of what is drawn."""

import sys

import torch.nn.functional as F
from torch import Tensor

from maskrl import Settings, rng, to_tokens
from workbench.data import to_unit
from workbench.errors import InputError
from workbench.images import middle_square, read_rgb
from workbench.kl16 import KL16


def read_square(option: str, path, size: int | None = None, behind="white") -> tuple[Tensor, tuple]:
    """Pixels uint8 [3, S, S] of the middle of the image at `path`, and its width and height.

    size: S; None for as many pixels as the image has. behind: what transparent pixels show.
    InputError names the option."""
    try:
        image = read_rgb(path, behind=behind)
    except InputError as error:
        raise InputError(f"--{option} {error}") from None
    return middle_square(image, size or min(image.size)), image.size


def read_inpainting(
    image, mask, settings: Settings, vae: KL16 | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens [1, L, D] of the file `image`, and of the file `mask` a mask [L]: true where any pixel
    of a token is white; transparent pixels of the mask are not. Prints how many these are. vae:
    makes the tokens, if they are latents.

    InputError if a file cannot be read, their shapes differ, or nothing is white."""
    stride = vae.stride if vae else 1
    pixels, (width, height) = read_square("inpaint", image, settings.image_size * stride)
    white, (mask_width, mask_height) = read_square("mask", mask, behind="black")
    shape, mask_shape = width / height, mask_width / mask_height
    if abs(shape / mask_shape - 1) > 0.02:
        raise InputError(
            f"--mask {mask} is not of the shape of {image}: width / height "
            f"{mask_shape:.2f}, not {shape:.2f}"
        )
    white = (white.float().mean(0, keepdim=True) > 127).float()
    side = settings.image_size // settings.patch
    hidden = F.adaptive_max_pool2d(white, side).flatten() > 0
    if not hidden.any():
        raise InputError(f"--mask {mask} has no white pixel: nothing to draw")
    drawn = f"{int(hidden.sum())} of {len(hidden)} tokens are drawn"
    if (width, height) != (mask_width, mask_height):
        drawn += f"; its {mask_width} x {mask_height} pixels are laid on {width} x {height}"
    print(f"--mask {mask}: {drawn}", file=sys.stderr)
    pixels = to_unit(pixels[None])
    if vae:
        pixels = vae.encode(pixels.to(vae.device), rng("inpaint"))
    return to_tokens(pixels, settings), hidden
