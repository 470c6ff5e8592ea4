"""Latents as data: the generator learns what an autoencoder makes of images.

An autoencoder, KL-16, turns an image of 256 x 256 pixels into 16 x 16 vectors of 16 channels, which
are the tokens, and back. Nothing else changes: tokens are cut from latents as they are from pixels,
and rewards, judge and pictures get what the autoencoder decodes.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torchvision.transforms.functional import hflip
from tqdm import tqdm

from maskrl import rng
from workbench.cache import build_or_load_cache
from workbench.data import Data, Split, identity, to_unit
from workbench.errors import InputError
from workbench.kl16 import KL16, load_kl16, posterior_sample


@dataclass
class Latents:
    """What a Split is to a generator of latents; every batch draws its latents again."""

    moments: Tensor  # float16 [1 or 2, N, 2C, h, w]: of the images, and of their mirror images
    labels: Tensor  # [N]

    def __len__(self):
        return len(self.labels)

    @property
    def channels(self) -> int:
        return self.moments.shape[2] // 2

    def spaced(self) -> Tensor:
        """Latents [n, C, h, w] of all images, or of 10,000 to 20,000 evenly spaced ones."""
        moments = self.moments[0, :: max(1, len(self) // 10_000)]
        return posterior_sample(moments.float(), rng("latents"))

    def batch(self, n: int, generator, device="cpu", flip=False) -> tuple[Tensor, Tensor]:
        """Latents [n, C, h, w] of n random images, half of them mirrored if `flip`; labels [n]."""
        index = torch.randint(len(self), (n,), generator=generator)
        mirrored = torch.randint(2 if flip else 1, (n,), generator=generator)
        moments = self.moments[mirrored, index].to(device).float()
        return posterior_sample(moments, generator), self.labels[index].to(device)


def latents_of(split: Split, vae: KL16, flip=False, cache=None) -> Latents:
    """The moments of all images of a Split, computed once; flip: also of their mirror images.

    cache: the folder that keeps the images; the moments are kept in it, under a name that changes
    with the rows of the Split and the weights of the autoencoder. None: they are in memory."""
    views = (identity, hflip) if flip else (identity,)
    folder = None
    if cache:
        digest = hashlib.sha256(split.rows.numpy())
        for weight in vae.state_dict().values():
            digest.update(weight.cpu().numpy())
        folder = Path(cache, f"latents-{digest.hexdigest()[:20]}-{len(views)}")
    build = partial(write_moments, split, vae, views)
    written, _ = build_or_load_cache(folder, "latents", build)
    side = split.size // vae.stride
    shape = len(views), len(split), 2 * vae.channels, side, side
    return Latents(written.view(torch.float16).view(shape), split.labels)


@torch.no_grad()
def write_moments(split: Split, vae: KL16, views: tuple, file: BinaryIO) -> dict:
    """Encode the images of a Split into the file, once in each view; returns metadata."""
    parts = [(view, rows) for view in views for rows in split.rows.split(16)]
    for view, rows in tqdm(parts, "encoding", leave=False):
        images = view(to_unit(split.stored[rows].to(vae.device)))
        file.write(vae.moments(images).half().cpu().numpy().tobytes())
    return {"images": len(split), "views": len(views)}


def with_latents(data: Data, vae: KL16, flip: bool) -> Data:
    """The data for a generator of latents: it learns them, and what it makes is decoded."""
    latents = latents_of(data.train, vae, flip, data.cache)
    return replace(data, latents=latents, decode=vae.decode)


def autoencoder_for(image_channels: int | None, path, device) -> KL16 | None:
    """The autoencoder at --vae `path`, or None for pixels; InputError unless it suits a generator
    of `image_channels` (None: any)."""
    if path is None and image_channels not in (None, 3):
        raise InputError(f"the generator makes latents of {image_channels} channels: give --vae")
    if path is None:
        return None
    if image_channels == 3:
        raise InputError(f"--vae {path}: the generator makes pixels; leave it out")
    vae = load_kl16(path, device)
    if image_channels not in (None, vae.channels):
        raise InputError(
            f"--vae {path} has latents of {vae.channels} channels; the generator makes "
            f"{image_channels}"
        )
    return vae
