"""KL-16, the autoencoder of latent diffusion (2112.10752) that MAR's tokens come from.

Convolutions with the official names and arithmetic; a first reader may skip them.
"""

import itertools
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from workbench.errors import InputError
from workbench.files import build_and_load, count_blocks, load_safely, shape_of, tensors_of

KL16_SCALE = 0.2325  # makes the variance of KL-16's latents 1 over ImageNet


def named(**layers: nn.Module) -> nn.Sequential:
    """The layers, each under its name, applied in this order."""
    return nn.Sequential(OrderedDict(layers))


def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


group_norm = partial(nn.GroupNorm, 32, eps=1e-6)  # of a width


class ConvBlock(nn.Module):
    """Residual block: [B, inputs, h, w] -> [B, outputs, h, w]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), conv(inputs, outputs)
        self.norm2, self.conv2 = group_norm(outputs), conv(outputs, outputs)
        self.nin_shortcut = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class ConvAttention(nn.Module):
    """Self-attention with one head between all positions of x [B, width, h, w]."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = group_norm(width)
        self.q, self.k, self.v, self.proj_out = (conv(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).mT for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # [B, h w, width]
        return x + self.proj_out(h.mT.unflatten(2, x.shape[2:]))


class Level(nn.Module):
    """The blocks of one resolution, each with attention or without, then a change of resolution."""

    def __init__(self, inputs, width, blocks: int, attention=False, downsample=None, upsample=None):
        super().__init__()
        widths = [inputs] + blocks * [width]
        self.block = nn.ModuleList(ConvBlock(a, b) for a, b in itertools.pairwise(widths))
        attend = ConvAttention if attention else nn.Identity
        self.attn = nn.ModuleList(attend(width) for _ in range(blocks))
        self.downsample = downsample or nn.Identity()
        self.upsample = upsample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block, attend in zip(self.block, self.attn):
            x = attend(block(x))
        return self.upsample(self.downsample(x))


def halve(width: int) -> nn.Module:
    """Half the resolution; padded by a row below and a column to the right."""
    return named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))


def double(width: int) -> nn.Module:
    """Twice the resolution."""
    return named(nearest=nn.Upsample(scale_factor=2), conv=conv(width, width))


def middle(width: int) -> nn.Module:
    return named(
        block_1=ConvBlock(width, width),
        attn_1=ConvAttention(width),
        block_2=ConvBlock(width, width),
    )


def encoder(width: int, widths: list[int], outputs: int) -> nn.Module:
    """Images [B, 3, S, S] -> [B, outputs, S / stride, S / stride]; widths: of the levels."""
    inputs = [width, *widths]
    levels = [Level(a, b, 2, downsample=halve(b)) for a, b in itertools.pairwise(inputs[:-1])]
    return named(
        conv_in=conv(3, width),
        down=nn.Sequential(*levels, Level(inputs[-2], inputs[-1], 2, attention=True)),
        mid=middle(widths[-1]),
        norm_out=group_norm(widths[-1]),
        silu=nn.SiLU(),
        conv_out=conv(widths[-1], outputs),
    )


def decoder(widths: list[int], channels: int) -> nn.Module:
    """Latents [B, channels, h, w] -> images [B, 3, S, S], by the encoder's levels in reverse."""
    levels, inputs = {}, widths[-1]
    for i, width in reversed(list(enumerate(widths))):
        levels[str(i)] = Level(inputs, width, 3, upsample=double(width) if i else None)
        inputs = width
    return named(
        conv_in=conv(channels, widths[-1]),
        mid=middle(widths[-1]),
        up=named(**levels),
        norm_out=group_norm(widths[0]),
        silu=nn.SiLU(),
        conv_out=conv(widths[0], 3),
    )


def posterior_sample(moments: Tensor, generator) -> Tensor:
    """Latents [B, C, h, w] drawn from a Gaussian, whose mean and log variance are the two halves of
    moments [B, 2C, h, w]; generator: on the CPU."""
    mean, log_variance = moments.chunk(2, 1)
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    return mean + (log_variance.clamp(-30, 20) / 2).exp() * noise


class KL16(nn.Module):
    """Images [B, 3, S, S] in [-1, 1] <-> latents [B, C, S / stride, S / stride].

    multipliers: width of each level, as a multiple of `width`; each but the first halves the image.
    channels: C. Names and arithmetic are those of the official code."""

    pixels_at_once = 2**18  # pixels decoded at a time: four images of 256 x 256

    def __init__(self, width=128, multipliers=(1, 1, 2, 2, 4), channels=16):
        super().__init__()
        widths = [width * m for m in multipliers]
        official = (width, *multipliers) == (128, 1, 1, 2, 2, 4)
        self.channels = channels
        self.stride = 2 ** (len(widths) - 1)  # pixels per side of a latent
        self.scale = KL16_SCALE if official else 0.0  # 0: to be measured
        self.encoder = encoder(width, widths, 2 * channels)
        self.decoder = decoder(widths, channels)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @property
    def device(self) -> torch.device:
        return self.quant_conv.weight.device

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log variance [B, 2C, h, w] of the latents of images [B, 3, S, S]."""
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor, generator) -> Tensor:
        """Latents [B, C, h, w] of images [B, 3, S, S], drawn from their posterior."""
        return posterior_sample(self.moments(images), generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, S, S] in about [-1, 1] of latents [B, C, h, w].

        To save memory, a few at a time, which the backward pass computes once more."""
        at_once = max(1, self.pixels_at_once // (latents[0, 0].numel() * self.stride**2))
        parts = latents.split(at_once)
        return torch.cat([checkpoint(self.decode_part, x, use_reentrant=False) for x in parts])

    def decode_part(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


def load_kl16(path, device="cpu") -> KL16:
    """The autoencoder in an official file, {"model": weights}, frozen; its widths are read off the
    shapes. InputError names what is missing, unexpected or of the wrong shape."""
    weights = tensors_of(path, load_safely(path, lazily=True), "model")
    weights = {name: value for name, value in weights.items() if not name.startswith("loss.")}
    width = shape_of(path, weights, "encoder.conv_in.weight", 4)[0]
    channels = shape_of(path, weights, "post_quant_conv.weight", 4)[0]
    levels = range(count_blocks(weights, "encoder.down"))
    first_convs = [f"encoder.down.{i}.block.0.conv1.weight" for i in levels]
    widths = [shape_of(path, weights, name, 4)[0] for name in first_convs]
    fits = width and all(w and w % 32 == 0 and w % width == 0 for w in (width, *widths))
    if not (widths and fits):
        raise InputError(f"{path}: the encoder's levels have widths {widths}, on a base of {width}")
    build = partial(KL16, width, [w // width for w in widths], channels)
    return build_and_load(path, build, weights).to(device).eval().requires_grad_(False)
