"""What can be wrong with an image: the faults that the reward network and the judge learn to see.

There are four kinds for each of the two, and no kind is in both. Each kind is a function

    (x, amount, partner, patch, generator) -> the damaged images [B, C, H, W]

of images x [B, C, H, W] in [-1, 1], the amount of damage [B, 1, 1, 1] in 0...1, another image of
the same class for each of them (partner, shaped like x), the side of a patch in pixels, and a
generator on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from maskrl import Settings, gather_rows, patchify, true_first, unpatchify


def uniform(shape, generator, device) -> Tensor:
    """Uniform random numbers in 0...1, which do not depend on the device."""
    return torch.rand(shape, generator=generator).to(device)


# What the reward network learns, and the judge is checked with


def blurred(x: Tensor, amount: Tensor, partner: Tensor, patch: int, generator) -> Tensor:
    """x mixed with a blurred x; larger images are blurred more widely."""
    soft = x
    for _ in range(max(1, x.shape[-1] // 16)):
        soft = blur(soft)
    return x + (0.2 + 0.8 * amount) * (soft - x)


def blur(x: Tensor) -> Tensor:
    """Binomial blur by one pixel [B, C, H, W]."""
    kernel = torch.tensor([1.0, 2.0, 1.0], device=x.device, dtype=x.dtype) / 4
    kernel = (kernel[:, None] * kernel).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])


def noisy(x: Tensor, amount: Tensor, partner: Tensor, patch: int, generator) -> Tensor:
    """x with Gaussian noise."""
    return x + 0.2 * amount * torch.randn(x.shape, generator=generator).to(x.device)


def swapped(x: Tensor, amount: Tensor, partner: Tensor, patch: int, generator) -> Tensor:
    """x with 10 to 50 % of its patches taken from the partner."""
    tokens = patchify(x, patch)
    swaps = uniform(tokens.shape[:2], generator, x.device) < 0.1 + 0.4 * amount.flatten(1)
    return unpatchify(torch.where(swaps[..., None], patchify(partner, patch), tokens), patch)


def shuffled(x: Tensor, amount: Tensor, partner: Tensor, patch: int, generator) -> Tensor:
    """x with 10 to 50 % of its patches moved, at random, to each other's positions."""
    tokens = patchify(x, patch)
    keys = uniform(tokens.shape[:2], generator, x.device)
    moves = uniform(tokens.shape[:2], generator, x.device) < 0.1 + 0.4 * amount.flatten(1)
    # the patches that move, in raster order and in random order; the others follow in raster order
    to_here = true_first(moves)
    from_there = keys.masked_fill(~moves, 2.0).argsort(dim=1, stable=True)
    source = torch.empty_like(to_here).scatter(1, to_here, from_there)
    return unpatchify(gather_rows(tokens, source), patch)


REWARD_DAMAGE = (blurred, noisy, swapped, shuffled)


# What the judge learns


def torn(x: Tensor, amount: Tensor, partner: Tensor, patch: int, generator) -> Tensor:
    """x with a band of rows, or of columns, shifted by up to a third of the image."""
    if torch.rand(1, generator=generator) < 0.5:
        return torn_rows(x.mT, amount, generator).mT
    return torn_rows(x, amount, generator)


def torn_rows(x: Tensor, amount: Tensor, generator) -> Tensor:
    B, _, H, W = x.shape
    top, height = H / 2 * uniform((2, B, 1), generator, x.device)
    rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    in_band = (rows >= top) & (rows < top + 2 + height)  # [B, H]
    shift = in_band * (1 + amount.flatten(1) * W / 3).long()
    source = (columns - shift[..., None]) % W  # [B, H, W]
    return x.gather(3, source[:, None].expand_as(x))


def pasted(x: Tensor, amount: Tensor, partner: Tensor, patch: int, generator) -> Tensor:
    """x with a square of the partner, 30 to 70 % as wide, at the square's own position."""
    B, _, H, W = x.shape
    side = 0.3 + 0.4 * amount.flatten(1)
    top, left = uniform((2, B, 1), generator, x.device) * (1 - side)
    rows = (torch.arange(H, device=x.device) + 0.5) / H
    columns = (torch.arange(W, device=x.device) + 0.5) / W
    in_rows = (rows >= top) & (rows < top + side)  # [B, H]
    in_columns = (columns >= left) & (columns < left + side)
    return torch.where((in_rows[:, :, None] & in_columns[:, None])[:, None], partner, x)


def pixelated(x: Tensor, amount: Tensor, partner: Tensor, patch: int, generator) -> Tensor:
    """x mixed with x in coarse pixels."""
    side = max(2, x.shape[-1] // 16)
    coarse = F.interpolate(F.avg_pool2d(x, side), x.shape[-2:], mode="nearest")
    return x + (0.2 + 0.8 * amount) * (coarse - x)


def speckled(x: Tensor, amount: Tensor, partner: Tensor, patch: int, generator) -> Tensor:
    """x with 1 to 11 % of its pixels in random colours."""
    colours = 2 * uniform(x.shape, generator, x.device) - 1
    hit = uniform(x[:, :1].shape, generator, x.device) < 0.01 + 0.1 * amount
    return torch.where(hit, colours, x)


JUDGE_DAMAGE = (torn, pasted, pixelated, speckled)


def partners(labels: Tensor, generator) -> Tensor:
    """For every image a random one of the same class: indices [B] of labels [B]."""
    random_order = torch.randperm(len(labels), generator=generator).to(labels.device)
    own = labels.argsort(stable=True)
    other = random_order[labels[random_order].argsort(stable=True)]  # sorted by class like `own`
    return torch.empty_like(own).scatter(0, own, other)


def damage(
    x: Tensor, labels: Tensor, patch: int, generator, kinds=REWARD_DAMAGE
) -> tuple[Tensor, Tensor]:
    """Damage about half of the images x [B, C, H, W] in [-1, 1], each by a random amount.

    Returns the images, and what was done to each of them [B]: 0 nothing, i the i-th of `kinds`.
    patch: side of a patch in pixels."""
    B, device, n = len(x), x.device, len(kinds)
    kind = (torch.randint(2 * n, (B,), generator=generator) - n + 1).clamp(min=0).to(device)
    amount = uniform((B, 1, 1, 1), generator, device)
    partner = x[partners(labels, generator)]
    versions = [x, *(make(x, amount, partner, patch, generator) for make in kinds)]
    damaged = torch.stack(versions)[kind, torch.arange(B, device=device)].clamp(-1, 1)
    changed = (damaged != x).flatten(1).any(1)  # patches swapped for equal ones are no damage
    return damaged, kind * changed


def patch_in_pixels(images: Tensor, settings: Settings) -> int:
    """Side in pixels of what a token covers, also where the tokens are of smaller latents."""
    return settings.patch * images.shape[-1] // settings.image_size
