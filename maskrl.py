"""maskrl: fast masked image generators in one file, to be read beside three papers.

A masked auto-regressive generator (MAR, arXiv 2406.11838) reveals the tokens of an image over K
iterations, and runs a denoising chain of about 100 steps inside each of them. Three papers attack
that cost, and this file unites them on one model:

    MARVAL     2511.15190  distil the inner chain into ONE denoising step (GSIM, guided score
                           implicit matching), then improve the one-step student by RL
    MaskFocus  2512.18766  spend RL only on the critical steps, found by information gain
    Speed-RL   2512.01094  reward quality and needing fewer steps

Part I, the methods, in the order of the papers. Every section opens with its idea:

    1  Settings     4  Diffusion             7  GSIM              10  Policy gradient
    2  Tokens       5  Training a teacher    8  Critical steps    11  Checkpoints
    3  Model        6  Generation            9  Policies

Part II, the workbench, serves the scripts; a reader of the papers may stop before it:

    12  Data                16  Rewards                20  Bench
    13  Training loop       17  Report and pictures    21  MAR's released weights
    14  Reward network      18  Command line           22  KL-16 autoencoder
    15  Judge               19  Several processes

Letters, the same in the papers, the docstrings and the code:

    x     [B, L, D]  B images as L tokens of D channels
    mask  [B, L]     true where a token is still hidden
    c     [B, L, W]  context of every token, from the transformer of width W
    z     [B, L, D]  Gaussian noise; g(z, c) is the student's token
    N                rows of a flat batch of tokens: x_0 [N, D], c [N, W], t [N]
    t     0...999    diffusion time, with x_t = alpha_t x_0 + sigma_t eps
    s                guidance; s_p and s_q are scores, gradients of a log density
    K, T             unmasking iterations ("steps"): the most there may be; those an image took
    P, G             prompts (class labels); rollouts of each prompt, which are its group
    R, A             reward, advantage

In sections 9 and 10 mu is the mean of z, sigma the standard deviation of an action, alpha the
exponent of speed, and beta the weight of the KL divergence.
"""

import argparse
import errno
import hashlib
import importlib
import io
import itertools
import json
import logging
import math
import os
import platform
import signal
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import copy, deepcopy
from dataclasses import Field, asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, partial, partialmethod, wraps
from multiprocessing.pool import ThreadPool
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import URLError
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import functional as TF
from torchvision.utils import make_grid
from tqdm import tqdm


class InputError(ValueError):
    """The user gave something that cannot work; the message says what, and how to mend it."""


class NonFinite(RuntimeError):
    """A loss, gradient, weight or reward is infinite or NaN."""


# ==================================================================================================
# Part I: the methods
# ==================================================================================================

# 1 Settings ---------------------------------------------------------------------------------------
# One flat list of numbers and choices, from which the scripts make their command line, and which
# every checkpoint carries. Reading for the first time? Go on to section 2 and come back for a name.


def option(default, help: str, **limits) -> Any:
    """A field of Settings. limits: at_least, above, at_most, below (numbers) or choices."""
    return field(default=default, metadata={"help": help, "limits": limits})


PREDICTS = ("x_0", "velocity", "eps")  # MAR's own network predicts eps
PRECISIONS = ("fp32", "bf16")  # never fp16, whose range losses and gradients would leave
METHODS = ("grpo", "backprop")  # policy gradient over groups, or through the generation
ORDERS = ("random", "halton")
ACTIONS = ("z", "x")  # what a policy draws for a token: the noise it starts from, or the token
RL_STEPS = ("critical", "random", "first", "all")
RL_TOKENS = ("revealed", "hidden", "fresh")  # revealed there, all hidden, all under a fresh mask


@dataclass
class Settings:
    """All settings of a model and its training; the defaults are the preset `tiny`.

    Raises InputError, naming the option, for a value of the wrong type or outside its limits."""

    # data
    image_size: int = option(16, "height and width, in pixels or latents", at_least=1, at_most=4096)
    per_class: int = option(3000, "images of each built-in shape", at_least=20, at_most=10**6)
    flip: bool = option(False, "mirror training images at random (not for digits or letters)")
    seed: int = option(0, "of shapes, weights and noise", at_least=0, below=2**63)
    # model
    patch: int = option(4, "side of a token in pixels; L = (image_size / patch)^2", at_least=1)
    mean: float = option(0.0, "tokens = (pixels - mean) x scale", at_least=-1000, at_most=1000)
    scale: float = option(0.0, "0: scale and mean are measured", at_least=0, at_most=1000)
    width: int = option(96, "W, a multiple of 4 and of --heads", at_least=4, at_most=2**14)
    depth: int = option(2, "blocks of the encoder, and of the decoder", at_least=1, at_most=200)
    decoder_depth: int = option(0, "of the decoder, if not --depth (0)", at_least=0, at_most=200)
    heads: int = option(4, "attention heads", at_least=1)
    buffer: int = option(4, "rows of the class before the tokens", at_least=1, at_most=4096)
    head_width: int = option(128, "width of the diffusion head, an MLP", at_least=1, at_most=2**14)
    head_depth: int = option(2, "residual blocks of the diffusion head", at_least=1, at_most=200)
    predicts: str = option("x_0", "what the head's network predicts", choices=PREDICTS)
    checkpointing: bool = option(False, "compute blocks twice in training, to save memory")
    precision: str = option("fp32", "of the hidden layers' matrix products", choices=PRECISIONS)
    # generation
    steps: int = option(16, "K, unmasking iterations per image", at_least=1)
    order: str = option("halton", "in which tokens are revealed", choices=ORDERS)
    denoise_steps: int = option(100, "of the teacher's chain", at_least=2, at_most=1000)
    guidance: float = option(1.2, "s; eps = eps_null + s (eps_class - eps_null)", at_least=0)
    x_0_limit: float = option(1.3, "clips the chain's x_0 (white is 1); 0 is off", at_least=0)
    # training the teacher
    batch: int = option(64, "images per update of teacher and student", at_least=1, at_most=10**5)
    micro_batch: int = option(0, "images at a time of a batch, to save memory; 0: all", at_least=0)
    teacher_iters: int = option(2600, "teacher updates", at_least=1)
    teacher_lr: float = option(2e-3, "learning rate of the teacher's AdamW", above=0, at_most=1000)
    muon_lr: float = option(4e-3, "of its matrices; 0: AdamW for all", at_least=0, at_most=1000)
    draws: int = option(4, "noise draws per hidden token and update", at_least=1, at_most=1000)
    label_dropout: float = option(0.1, "share trained without a class", at_least=0, below=1)
    ema: float = option(0.995, "limit of the teacher's EMA decay", at_least=0, below=1)
    # GSIM
    gsim_iters: int = option(650, "student updates", at_least=1)
    student_lr: float = option(6e-4, "learning rate of the student", above=0, at_most=1000)
    aux_lr: float = option(1.2e-3, "learning rate of the auxiliary network", above=0, at_most=1000)
    student_ema: float = option(0.98, "limit of the student's EMA decay", at_least=0, below=1)
    noise_ratio: float = option(5.0, "sigma / alpha where the student starts", above=0, below=1e4)
    # RL
    method: str = option("grpo", "backprop: the reward's own gradient", choices=METHODS)
    rl_iters: int = option(150, "policy updates", at_least=1)
    noise_lr: float = option(2e-3, "learning rate of the noise policy", above=0, at_most=1000)
    rl_lr: float = option(1e-4, "of the generator with --action x", above=0, at_most=1000)
    prompts: int = option(16, "P, groups of rollouts per update", at_least=1, at_most=10**5)
    group: int = option(8, "G, rollouts per group", at_least=2, at_most=10**5)
    action: str = option("z", "z ~ N(mu(c), 1), or x ~ N(g(z, c), sigma^2)", choices=ACTIONS)
    rl_steps: str = option("critical", "which steps are optimised", choices=RL_STEPS)
    critical_steps: int = option(4, "K_c, how many of them per rollout", at_least=1)
    rl_tokens: str = option("revealed", "of --action x: which tokens count", choices=RL_TOKENS)
    rl_epochs: int = option(1, "of --action x: updates per batch of rollouts", at_least=1)
    explore: float = option(0.1, "of --action x: sigma, and unit of the routing's H", above=0)
    route: float = option(0.0, "more exploration for prompts of low entropy", at_least=0)
    clip_ratio: float = option(0.2, "epsilon of the clipped ratio", above=0)
    beta: float = option(0.05, "weight of KL(policy || student)", at_least=0)
    learn_steps: bool = option(True, "learn a schedule of at most --steps iterations")
    schedule_lr: float = option(3e-3, "learning rate of the schedule policy", above=0, at_most=1000)
    schedule_iters: int = option(100, "at the end: updates of the schedule alone", at_least=0)
    alpha: float = option(0.5, "reward = quality x speed^alpha", at_least=0)
    # reward network and judge
    judge_iters: int = option(400, "updates of the reward network and of the judge", at_least=1)
    judge_n: int = option(2250, "images in a row of the judge's table", at_least=2, at_most=10**6)

    def __post_init__(self):
        for f in fields(self):
            check_option(f, getattr(self, f.name))
        if self.image_size % self.patch:
            raise InputError(
                f"--image-size {self.image_size} must be a multiple of --patch {self.patch}"
            )
        if self.width % 4 or self.width % self.heads:
            raise InputError(
                f"--width {self.width} must be a multiple of 4 and of --heads {self.heads}"
            )
        if self.steps > self.length:
            raise InputError(
                f"--steps {self.steps} must lie in 1...{self.length}, the number of tokens"
            )
        if self.action == "z" and (self.rl_tokens != "revealed" or self.rl_epochs != 1):
            raise InputError("--rl-tokens and --rl-epochs need --action x")

    @property
    def length(self) -> int:
        """L, tokens per image."""
        return (self.image_size // self.patch) ** 2


def flag(name: str) -> str:
    """The command-line option of a field of Settings."""
    return "--" + name.replace("_", "-")


def check_option(f: Field, value) -> None:
    """InputError unless `value` has the type of the Settings field `f` and obeys its limits."""
    limits, name = f.metadata["limits"], flag(f.name)
    accepted = (int, float) if f.type is float else f.type
    if not isinstance(value, accepted) or (isinstance(value, bool) and f.type is not bool):
        raise InputError(f"{name} {value!r} must be of type {f.type.__name__}")
    if "choices" in limits and value not in limits["choices"]:
        raise InputError(f"{name} {value} must be one of {', '.join(limits['choices'])}")
    if f.type is float and not math.isfinite(value):
        raise InputError(f"{name} {value} must be a finite number")
    if "at_least" in limits and value < limits["at_least"]:
        raise InputError(f"{name} {value} must be at least {limits['at_least']}")
    if "above" in limits and value <= limits["above"]:
        raise InputError(f"{name} {value} must be above {limits['above']}")
    if "at_most" in limits and value > limits["at_most"]:
        raise InputError(f"{name} {value} must be at most {limits['at_most']}")
    if "below" in limits and value >= limits["below"]:
        raise InputError(f"{name} {value} must be below {limits['below']}")


# fmt: off
PRESETS = {
    "tiny": {},  # the built-in shapes
    "folder": {  # a folder of images, on a CPU
        "image_size": 32, "steps": 32, "batch": 32, "draws": 2, "teacher_iters": 12_000,
        "gsim_iters": 1200, "rl_iters": 50, "schedule_iters": 25, "judge_iters": 800,
    },
    "small": {  # a folder of images, on a GPU
        "image_size": 64, "patch": 4, "steps": 64, "width": 384, "depth": 6, "heads": 6,
        "buffer": 16, "head_width": 512, "head_depth": 4, "batch": 128, "teacher_iters": 100_000,
        "teacher_lr": 4e-4, "muon_lr": 8e-4, "ema": 0.9999, "gsim_iters": 20_000,
        "student_lr": 3e-5, "aux_lr": 6e-5, "critical_steps": 6, "judge_iters": 2000,
        "precision": "bf16", "micro_batch": 32,
    },
}
# fmt: on


def preset(name: str, **overrides) -> Settings:
    """The Settings of a preset, with single fields replaced."""
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return Settings(**{**PRESETS[name], **overrides})


def rng(*names, device="cpu") -> torch.Generator:
    """A generator seeded by what it is for, e.g. rng(seed, "gsim", step).

    No random state has to be saved: a resumed run asks for the same names and draws the same."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(names).encode()))


# 2 Tokens -----------------------------------------------------------------------------------------
# A token is a square patch of pixels with all its channels in one row. There is no codebook: tokens
# are vectors of real numbers, shifted and scaled to mean 0 and variance 1 over the training images.


def patchify(images: Tensor, patch: int) -> Tensor:
    """Images [B, C, H, W] -> tokens [B, L, D] in raster order, D = C patch^2."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens: Tensor, patch: int) -> Tensor:
    """Tokens [B, L, D] of square images -> images [B, C, H, W]; the exact inverse of `patchify`."""
    side = math.isqrt(tokens.shape[1])
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=side, w=side, p=patch, q=patch)


def to_tokens(images: Tensor, settings: Settings) -> Tensor:
    """Images [B, C, H, W] in [-1, 1] -> tokens [B, L, D] as the model sees them."""
    return (patchify(images, settings.patch) - settings.mean) * settings.scale


def to_images(tokens: Tensor, settings: Settings) -> Tensor:
    """Tokens [B, L, D] -> images [B, C, H, W] in about [-1, 1]."""
    return unpatchify(tokens / settings.scale + settings.mean, settings.patch)


# 3 Model ------------------------------------------------------------------------------------------
# MAR (2406.11838). An encoder sees the class and the visible tokens; a decoder adds a mask token
# for each hidden one and gives every token a context c; a small MLP, the head, then denoises each
# hidden token by itself, given its c. Names and arithmetic are those of the official code, whose
# `diffloss.net` is our `head`.


def in_precision(method: Callable) -> Callable:
    """The method of a module, with matrix products in the module's `precision`; it returns float32.

    Weights, residuals and norms are float32 in any case."""

    @wraps(method)
    def call(module, *inputs, **options):
        low = module.precision == "bf16"
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=low):
            return method(module, *inputs, **options).float()

    return call


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, keys: Tensor | None = None, cache: "Cache | None" = None
    ) -> Tensor:
        """x [B, n, W] attends to itself or, with a cache, to all places that this holds.

        keys: true for what may be attended to, [B, n] or [B, N] of a cache (None: everything)."""
        width = x.shape[-1]
        q, kv = self.qkv(x).split([width, 2 * width], -1)
        if cache is not None:
            kv = cache.renew(self, kv)
        q = rearrange(q, "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(kv, "b n (two h d) -> two b h n d", two=2, h=self.heads)
        attn_mask = None if keys is None else keys[:, None, None, :]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Transformer block with the norms before attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, 4 * width)

    def forward(
        self, x: Tensor, keys: Tensor | None = None, cache: "Cache | None" = None
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), keys, cache)
        return x + self.mlp(self.norm2(x))


def silu_mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


class TimeEmbedding(nn.Module):
    """t [N] in 0...999 -> cosines and sines of 128 frequencies exp(-ln(1e4) k / 128) -> MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = silu_mlp(256, width, width)

    @staticmethod
    def waves(t: Tensor) -> Tensor:
        frequency = torch.exp(-math.log(1e4) * torch.arange(128, device=t.device) / 128)
        angle = t[:, None].float() * frequency
        return torch.cat([angle.cos(), angle.sin()], 1)  # [N, 256]

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.waves(t))


class HeadBlock(nn.Module):
    """Residual MLP block, shifted, scaled and gated by the condition (adaLN)."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = silu_mlp(width, width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulate(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, -1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Head(nn.Module):
    """The diffusion head, an MLP: (x_t [N, D], t [N] in 0...999, c [N, W]) -> [N, 2D].

    The first D outputs are eps. The last D interpolate the log variance of a denoising step
    (section 4); we train on eps alone, which leaves them at zero, the middle, where the official
    code trains them.

    predicts: what the network itself gives, from which eps is made: "eps" (MAR's own form, which
    its weights need); "x_0", so that eps = (x_t - alpha_t x_0) / sigma_t; or "velocity" v, so that
    eps = sigma_t x_t + alpha_t v.
    Differs from MAR, whose network predicts eps: at high noise eps says next to nothing about x_0,
    and there the tokens come to agree with each other. With x_0 a small model learns in minutes
    what it otherwise needs hours for."""

    def __init__(self, channels: int, context: int, width: int, depth: int, predicts="x_0"):
        super().__init__()
        self.predicts, self.precision = predicts, "fp32"
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(context, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)

    @in_precision
    def hidden(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        condition = self.time_embed(t) + self.cond_embed(c)
        for block in self.res_blocks:
            x = block(x, condition)
        return self.final_layer.modulate(x, condition)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        out = self.final_layer.linear(self.hidden(self.input_proj(x_t), t, c))
        if self.predicts == "eps":
            return out
        alpha, sigma = BASE.alpha_sigma(t)  # BASE: all 1000 times, section 4
        predicted, variance = out.chunk(2, -1)
        if self.predicts == "x_0":
            eps = (x_t - alpha * predicted) / sigma
        else:
            eps = sigma * x_t + alpha * predicted
        return torch.cat([eps, variance], -1)

    def eps(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """eps alone [N, D]; the score is -eps / sigma_t."""
        return self(x_t, t, c).chunk(2, -1)[0]


def sincos_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column, W / 4 of each, of wavelengths from `side` tokens up.

    [side^2, W], and our choice."""
    k = torch.arange(width // 4) / (width // 4)
    angle = torch.arange(side)[:, None] * 2 * math.pi / side * torch.exp(-math.log(100) * k)
    wave = torch.cat([angle.sin(), angle.cos()], 1)  # [side, width / 2]
    rows = repeat(wave, "h w -> (h n) w", n=side)
    columns = repeat(wave, "h w -> (n h) w", n=side)
    return torch.cat([rows, columns], 1)


class MAR(nn.Module):
    """Masked auto-regressive model over continuous tokens (2406.11838).

    classes: their names; one more, the null class, is added. kind: "teacher" (samples by a
    denoising chain), "student" (in one step) or "policy" (a student after RL). image_channels: 3
    for pixels. Only a policy may have a `noise_policy` and a `schedule`
    (section 9)."""

    def __init__(self, settings: Settings, classes: list[str], kind="teacher", image_channels=3):
        super().__init__()
        width, length, buffer = settings.width, settings.length, settings.buffer
        self.classes, self.kind = list(classes), kind
        self.num_classes, self.length = len(classes), length
        self.channels = image_channels * settings.patch**2  # D
        self.class_emb = nn.Embedding(self.num_classes, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))  # the null class
        self.z_proj = nn.Linear(self.channels, width)  # MAR's name: it projects tokens, not z
        self.z_proj_ln = nn.LayerNorm(width, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, buffer + length, width))
        self.encoder_blocks = self.blocks(settings, settings.depth)
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, buffer + length, width))
        self.decoder_blocks = self.blocks(settings, settings.decoder_depth or settings.depth)
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, length, width))
        self.head = Head(
            self.channels, width, settings.head_width, settings.head_depth, settings.predicts
        )
        self.noise_policy = self.schedule = None
        self.settings = settings
        self.init_weights()

    @property
    def settings(self) -> Settings:
        return self._settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self._settings = settings
        self.precision = self.head.precision = settings.precision

    @staticmethod
    def blocks(settings: Settings, depth: int) -> nn.ModuleList:
        return nn.ModuleList(Block(settings.width, settings.heads) for _ in range(depth))

    def init_weights(self) -> None:
        """Differs from MAR, which starts all embeddings at std 0.02 and trains for 400 epochs.

        Classes at std 1 and positions at sines and cosines are as large as the tokens, and
        attention finds its neighbours within minutes."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_emb.weight, std=1.0)
        nn.init.normal_(self.fake_latent, std=1.0)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.diffusion_pos_embed_learned, std=0.02)
        for positions in (self.encoder_pos_embed_learned, self.decoder_pos_embed_learned):
            nn.init.normal_(positions, std=0.7)
            side = math.isqrt(self.length)
            positions.data[0, self.settings.buffer :] = sincos_positions(side, self.settings.width)
        # adaLN-zero: every block of the head starts as the identity, and the head's output as zero
        for layer in (*self.head.res_blocks, self.head.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.head.final_layer.linear.weight)

    @property
    def device(self) -> torch.device:
        return self.fake_latent.device

    def apply_block(self, block: Block, *inputs) -> Tensor:
        """block(*inputs); with --checkpointing the backward pass computes its inside once more."""
        if self.settings.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def null(self, labels: Tensor) -> Tensor:
        """The null class in place of every label [B]."""
        return torch.full_like(labels, self.num_classes)

    @in_precision
    def context(self, tokens: Tensor, mask: Tensor, labels: Tensor, *cached) -> Tensor:
        """c [B, L, W] of tokens [B, L, D] under mask [B, L], for labels [B] (num_classes: null).

        Hidden tokens are dropped before the encoder's blocks. Images may hide different numbers of
        tokens: shorter sequences are padded, and nothing attends to the padding, so that each image
        comes out as if it were alone. cached: see `cached_context`."""
        if cached:
            return self.cached_context(tokens, mask, labels, *cached)
        visible = self.visible(mask)
        count = visible.sum(1)
        most = int(count.max())
        rows = first(visible)[:, :most]  # of the visible places, then of padding
        ragged = int(count.min()) < most
        keys = torch.arange(most, device=mask.device) < count[:, None] if ragged else None

        x = take(self.encoder_input(tokens, labels), rows)  # [B, most, W]
        for block in self.encoder_blocks:
            x = self.apply_block(block, x, keys)
        x = self.decoder_embed(self.encoder_norm(x))
        full = torch.zeros(*visible.shape, x.shape[-1], device=x.device, dtype=x.dtype)
        x = self.decoder_input(full.scatter(1, rows[..., None].expand_as(x), x), visible)
        for block in self.decoder_blocks:
            x = self.apply_block(block, x)
        return self.places_of_tokens(self.decoder_norm(x))

    def visible(self, mask: Tensor) -> Tensor:
        """Places of the sequence [B, buffer + L] that the encoder sees: the class, visible tokens.

        mask [B, L]."""
        return F.pad(~mask, (self.settings.buffer, 0), value=True)

    def encoder_input(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """`buffer` copies of the class, then all tokens in raster order [B, buffer + L, W]."""
        classes = torch.cat([self.class_emb.weight, self.fake_latent])[labels]  # [B, W]
        classes = repeat(classes, "b w -> b n w", n=self.settings.buffer)
        x = torch.cat([classes, self.z_proj(tokens)], 1)
        return self.z_proj_ln(x + self.encoder_pos_embed_learned)

    def decoder_input(self, encoded: Tensor, visible: Tensor) -> Tensor:
        """What was encoded [B, buffer + L, W] where it is visible, and mask tokens elsewhere."""
        x = torch.where(visible[..., None], encoded, self.mask_token.to(encoded.dtype))
        return x + self.decoder_pos_embed_learned

    def places_of_tokens(self, x: Tensor) -> Tensor:
        """c [B, L, W] of what the decoder gives [B, buffer + L, W]."""
        return x[:, self.settings.buffer :] + self.diffusion_pos_embed_learned

    def cached_context(self, tokens, mask, labels, cache: "Cache", wanted=None) -> Tensor:
        """`context`, where the cache has a part of it: only the tokens wanted [B, L] are computed,
        at least those revealed since the last call (None: all of them, and the class). Everything
        else, the other tokens' c too, is as the cache has it."""
        visible = self.visible(mask)
        computed = torch.ones_like(visible)
        if wanted is not None:
            computed = F.pad(wanted, (self.settings.buffer, 0))

        x = take(self.encoder_input(tokens, labels), cache.choose(visible & computed))
        for block in self.encoder_blocks:
            x = block(x, visible, cache)
        encoded = cache.renew("encoder", self.decoder_embed(self.encoder_norm(x)))
        x = take(self.decoder_input(encoded, visible), cache.choose(computed))
        for block in self.decoder_blocks:
            x = block(x, None, cache)
        return self.places_of_tokens(cache.renew("decoder", self.decoder_norm(x)))


def first(wanted: Tensor) -> Tensor:
    """The places of each row [B, N], those that are wanted [B, N] before the others."""
    return (~wanted).to(torch.uint8).argsort(dim=1, stable=True)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """The rows [B, n] of x [B, N, W]."""
    return x.gather(1, repeat(rows, "b n -> b n w", w=x.shape[-1]))


class Cache:
    """What the layers gave at each of the N = buffer + L places of the sequence when last computed.

    Between two refreshes of a generation (section 6) only the places `rows` [B, n] are computed;
    they attend to the keys and values that are kept of all others."""

    def __init__(self):
        self.rows, self.kept = None, {}

    def choose(self, wanted: Tensor) -> Tensor:
        """rows := the places where wanted [B, N]; an image with fewer of them repeats its last."""
        count = wanted.sum(1, keepdim=True)
        most = torch.arange(int(count.max()), device=wanted.device)
        self.places = wanted.shape[1]
        self.rows = first(wanted).gather(1, torch.minimum(most, (count - 1).clamp(min=0)))
        return self.rows

    def renew(self, name, x: Tensor) -> Tensor:
        """Keep x [B, n, W] at the places `rows`; returns what there is of `name` [B, N, W]."""
        if name not in self.kept:
            self.kept[name] = x.new_zeros(len(x), self.places, x.shape[-1])
        return self.kept[name].scatter_(1, self.rows[..., None].expand_as(x), x)


# 4 Diffusion --------------------------------------------------------------------------------------
# x_t = alpha_t x_0 + sigma_t eps on a cosine schedule of 1000 times, nearly clean at t = 0 and
# nearly pure noise at t = 999; the head predicts eps. The teacher walks back along a respaced chain
# of about 100 steps; the student jumps from one fixed time tau straight to x_0.


class Diffusion:
    """`n` of the 1000 times of the cosine schedule, evenly spaced from 0 to 999.

    alphas_bar(u) = cos^2((u + 0.008) / 1.008 pi / 2) at u = (t + 1) / 1000, over its value at u =
    0, every beta at most 0.999 (which changes t = 999 alone). `times`, `alpha`, `sigma` and the
    other tables are [n] and, as in the official code, float64; all are derived anew from the
    respaced alphas_bar, and the posterior log variance of index 0 is taken from index 1.
    InputError unless n lies in 2...1000."""

    def __init__(self, n: int = 1000):
        if not 2 <= n <= 1000:
            raise InputError(
                f"--denoise-steps {n}: a denoising chain has 2...1000 steps (1 is the "
                "one-step student)"
            )
        u = torch.arange(1001, dtype=torch.float64) / 1000
        bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        alphas_bar = (1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999)).cumprod(0)
        self.times = torch.tensor([round(i * 999 / (n - 1)) for i in range(n)])
        self.alphas_bar = alphas_bar[self.times]
        previous = F.pad(self.alphas_bar[:-1], (1, 0), value=1.0)
        self.betas = 1 - self.alphas_bar / previous
        self.alpha = self.alphas_bar.sqrt()
        self.sigma = (1 - self.alphas_bar).sqrt()
        self.table = torch.stack([self.alpha, self.sigma]).float()  # moves to where it is used
        # q(x_{t-1} | x_t, x_0) = N(coef_x0 x_0 + coef_xt x_t, variance)
        self.coef_x0 = self.betas * previous.sqrt() / (1 - self.alphas_bar)
        self.coef_xt = (1 - previous) * (1 - self.betas).sqrt() / (1 - self.alphas_bar)
        variance = self.betas * (1 - previous) / (1 - self.alphas_bar)
        self.log_variance_min = torch.cat([variance[1:2], variance[1:]]).log()
        self.log_variance_max = self.betas.log()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t [N, 1] at indices t [N] into this chain, which for BASE are times."""
        if self.table.device != t.device:
            self.table = self.table.to(t.device)
        return self.table[:, t, None].unbind(0)

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps for x_0, eps [N, D] and indices t [N]."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x_0 + sigma * eps

    def step(self, i: int, x_t, out, noise, temperature=1.0, limits=None) -> Tensor:
        """x_{t-1} from x_t [N, D], the head's output [N, 2D] and noise [N, D], at index i.

        log variance = f log beta + (1 - f) log posterior variance, f = (variance channel + 1) / 2.
        temperature: factor on the step's standard deviation. limits (low, high) of the estimate of
        x_0: without them an imperfect model explodes at the noisy end, where 1 / alpha_t is 2e4."""
        eps, variance = out.chunk(2, -1)
        x_0 = (x_t - float(self.sigma[i]) * eps) / float(self.alpha[i])
        if limits:
            x_0 = x_0.clamp(*limits)
        mean = float(self.coef_x0[i]) * x_0 + float(self.coef_xt[i]) * x_t
        if i == 0:
            return mean
        low, high = float(self.log_variance_min[i]), float(self.log_variance_max[i])
        f = (variance + 1) / 2
        log_variance = f * high + (1 - f) * low
        return mean + temperature * torch.exp(log_variance / 2) * noise

    def sample(self, head: Callable, x: Tensor, generator, temperature=1.0, limits=None) -> Tensor:
        """The whole ancestral chain from noise x [N, D]; head(x_t, t) -> [N, 2D], t on 0...999."""
        for i in reversed(range(len(self.times))):
            t = torch.full((len(x),), int(self.times[i]), device=x.device)
            noise = torch.randn(x.shape, generator=generator, device=x.device)
            x = self.step(i, x, head(x, t), noise, temperature, limits)
        return x


BASE = Diffusion()  # all 1000 times: here training, head and student look up alpha_t and sigma_t


def one_step(head: Head, z: Tensor, c: Tensor, noise_ratio: float) -> Tensor:
    """The student's g(z, c) [N, D] for z [N, D], c [N, W]: one step from a fixed time tau,

        g(z, c) = (sigma_tau z - sigma_tau eps_hat(sigma_tau z, tau, c)) / alpha_tau,

    tau being the first time with sigma_tau / alpha_tau >= noise_ratio. This is the x_0 that eps_hat
    implies for x_tau, whose small term alpha_tau x_0 is left out, so the teacher's weights are a
    good start, as in SiD (score identity distillation, 2404.04057). Where the network predicts x_0,
    g is what it gives at tau. MARVAL does not print its parametrisation; this is ours."""
    tau = int(torch.searchsorted(BASE.sigma / BASE.alpha, noise_ratio))
    alpha, sigma = float(BASE.alpha[tau]), float(BASE.sigma[tau])
    t = torch.full((len(z),), tau, device=z.device)
    return (sigma * z - sigma * head.eps(sigma * z, t, c)) / alpha


# 5 Training a teacher -----------------------------------------------------------------------------
# MAR's training step: hide a random share of an image's tokens, compute contexts from the visible
# ones, and denoise each hidden token given its context. Now and then the label is dropped, so that
# the model also learns the null class, which guidance needs.


def random_mask(ratio: Tensor, length: int, generator) -> Tensor:
    """mask [n, L] that hides ceil(ratio L) tokens of each row, at least one, at random places."""
    hidden = torch.ceil(length * ratio).clamp(1, length)
    rank = torch.rand(len(ratio), length, generator=generator).argsort(1)
    return rank < hidden[:, None]


def denoising_loss(head: Head, x_0: Tensor, c: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Mean of w_t |eps - eps_hat(x_t, t, c)|^2 over tokens x_0 [N, D] and their channels.

    The diffusion loss of MAR, and the denoising score matching of GSIM's auxiliary network. The
    weight makes it the squared error of what the network predicts: w_t = 1 for eps; alpha_t^-2 for
    velocity and (sigma_t / alpha_t)^2 for x_0, with alpha_t^-2 at most 1e4, which t > 992 would
    exceed."""
    error = (head.eps(BASE.q_sample(x_0, t, eps), t, c) - eps).square()
    if head.predicts != "eps":
        alpha, sigma = BASE.alpha_sigma(t)
        error = error / alpha.square().clamp(min=1e-4)
        if head.predicts == "x_0":
            error = error * sigma.square()
    return error.mean()


def micro_batches(mask: Tensor, size: int) -> list[Tensor]:
    """The rows 0...B - 1 of mask [B, L] in parts of at most `size` (0: all of them in one).

    Rows that hide about as many tokens come together, so that `MAR.context` pads little."""
    alike = mask.sum(1).argsort(stable=True)
    return [rows.sort().values for rows in alike.split(size or len(mask))]


def descend(losses: Iterable[Tensor], *optimizers, max_norm: float = 1.0) -> tuple[float, float]:
    """One step of the optimisers on the sum of `losses`, whose gradient is clipped to max_norm.

    Each of the losses is made when its turn comes, and its graph is freed before the next one's.
    Returns the sum, and the gradient's norm before it was clipped. NonFinite is raised before any
    weight changes if loss or gradient are not finite; after it if the step itself was too large, so
    that no average ever takes such weights in."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    for p in parameters:
        p.grad = None
    total = 0.0
    for loss in losses:
        if not torch.isfinite(loss):
            raise NonFinite(f"the loss is {loss.item()}")
        loss.backward()
        total += loss.item()
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    if not torch.isfinite(norm):
        raise NonFinite(f"the gradient norm is {norm.item()}")
    for optimizer in optimizers:
        optimizer.step()
    size = nn.utils.get_total_norm(parameters)
    if not torch.isfinite(size):
        raise NonFinite(f"the step made the norm of the weights {size.item()}")
    return total, norm.item()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, limit: float) -> None:
    """ema <- d ema + (1 - d) model with d = min(limit, (1 + i) / (10 + i)) at step i.

    A short memory at first, so that the average never lags behind the start."""
    d = min(limit, (1 + step) / (10 + step))
    for average, value in zip(ema.state_dict().values(), model.state_dict().values()):
        if average.is_floating_point():
            average.lerp_(value, 1 - d)
        else:
            average.copy_(value)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: what trains the weight matrices of a teacher (Jordan et al.,
    2024).

    Each gradient matrix is replaced by the nearest orthogonal one, so that all directions of a
    weight move equally far, those with small gradients too. Steps are as large as Adam's, a root
    mean square of 0.2 lr (2502.16982). As in theirs the iterations are in bfloat16 on a GPU; most
    CPUs only emulate it, and there it would be slower than the rest of the update."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.02):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - momentum)
                nesterov = p.grad.lerp(average, momentum)
                direction = orthogonalise(nesterov.bfloat16() if p.is_cuda else nesterov)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(direction, alpha=-0.2 * lr * math.sqrt(max(p.shape)))


def orthogonalise(x: Tensor) -> Tensor:
    """About U V^T of a matrix x = U S V^T, by five Newton-Schulz iterations, each of which moves
    the singular values towards 1."""
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
        factor = -4.7750 * square + 2.0315 * square @ square
        x = 3.4445 * x + (x @ factor if x.shape[0] > x.shape[1] else factor @ x)
    return x


def weight_decay_groups(model: MAR, decay: float = 0.02) -> list[dict]:
    """Parameter groups by MAR's rule: no weight decay on 1-D tensors, biases and the head."""
    decayed, spared = [], []
    for name, p in model.named_parameters():
        spare = p.ndim == 1 or name.startswith("head.")
        (spared if spare else decayed).append(p)
    return [{"params": decayed, "weight_decay": decay}, {"params": spared, "weight_decay": 0.0}]


def hidden_matrices(model: MAR) -> list[nn.Parameter]:
    """The weight matrices between hidden layers: neither embeddings nor those that touch tokens."""
    outer = ("z_proj", "head.input_proj", "head.final_layer")
    named = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [linear.weight for name, linear in named if not name.startswith(outer)]


def teacher_optimizers(model: MAR) -> list[torch.optim.Optimizer]:
    """AdamW with MAR's weight decay; with muon_lr above 0, Muon for the hidden matrices."""
    settings = model.settings
    groups = weight_decay_groups(model)
    how = {"betas": (0.9, 0.95), "fused": model.device.type == "cuda"}
    if settings.muon_lr == 0:
        return [torch.optim.AdamW(groups, settings.teacher_lr, **how)]
    matrices = hidden_matrices(model)
    taken = {id(p) for p in matrices}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in taken]
    adamw = torch.optim.AdamW(groups, settings.teacher_lr, **how)
    return [adamw, Muon(matrices, settings.muon_lr)]


class TeacherTraining:
    """MAR's own training. `model` learns; `ema`, an average of its weights, is what is used.

    50 steps of warm-up, a constant rate, and a linear fall to zero over the second half.
    Differs from MAR: a uniform share of the tokens is hidden, where MAR draws it from a normal of
    mean 1 and std 0.25 truncated to [0.7, 1], because a small model should meet the late
    iterations, with few hidden tokens, as often; Muon trains the hidden matrices, which makes the
    shapes clean within minutes; each context serves several draws of noise; and the variance
    channels are not trained."""

    def __init__(self, settings: Settings, classes: list[str], device="cpu", image_channels=3):
        self.model = MAR(settings, classes, image_channels=image_channels).to(device)
        self.ema = deepcopy(self.model).requires_grad_(False)
        self.optimizers = teacher_optimizers(self.model)

        def factor(i):
            return min((i + 1) / 50, 1, 2 * (1 - i / settings.teacher_iters))

        schedule = torch.optim.lr_scheduler.LambdaLR
        self.rates = [schedule(optimizer, factor) for optimizer in self.optimizers]
        self.state = {}  # what a checkpoint adds
        for i, (optimizer, rate) in enumerate(zip(self.optimizers, self.rates)):
            self.state |= {f"optimizer_{i}": optimizer, f"rate_{i}": rate}

    def update(self, step: int, x: Tensor, labels: Tensor, generator) -> dict[str, float]:
        """One update on tokens x [B, L, D] of classes labels [B]; metrics to log."""
        model, settings = self.model, self.model.settings
        B, L, _ = x.shape
        unlabelled = torch.rand(B, generator=generator) < settings.label_dropout
        labels = torch.where(unlabelled.to(x.device), model.null(labels), labels)
        ratio = torch.rand(B, generator=generator)
        mask = random_mask(ratio, L, generator).to(x.device)

        x_0 = x[mask].repeat(settings.draws, 1)  # [N, D]
        owner = mask.nonzero()[:, 0].repeat(settings.draws)  # [N]: the image of each token
        t = torch.randint(1000, (len(x_0),), generator=generator).to(x.device)
        eps = torch.randn(x_0.shape, generator=generator).to(x.device)

        def loss_of(rows):  # of some images: their share of the mean over all N tokens
            c = model.context(x[rows], mask[rows], labels[rows])[mask[rows]]
            n = torch.isin(owner, rows)
            loss = denoising_loss(model.head, x_0[n], c.repeat(settings.draws, 1), t[n], eps[n])
            return loss * n.float().mean()

        parts = micro_batches(mask, settings.micro_batch)
        loss, norm = descend(map(loss_of, parts), *self.optimizers)
        for rate in self.rates:
            rate.step()
        update_ema(self.ema, model, step, settings.ema)
        return {"loss": loss, "grad_norm": norm}


# 6 Generation -------------------------------------------------------------------------------------
# Start with every token hidden. At each of K iterations: contexts from the visible tokens, a token
# for each place to be revealed (by the teacher's chain or the student's one step), reveal, repeat.


def reveal_counts(length: int, steps: int) -> list[int]:
    """MAR's cosine schedule: how many of L tokens each of K iterations reveals; they sum to L."""
    if not 1 <= steps <= length:
        raise InputError(f"--steps {steps} must lie in 1...{length}, the number of tokens to draw")
    hidden, counts = length, []
    for k in range(steps - 1):
        after = math.floor(length * math.cos(math.pi / 2 * (k + 1) / steps))
        after = max(1, min(hidden - 1, after))
        counts.append(hidden - after)
        hidden = after
    return counts + [hidden]


def guidance_scale(s: float, hidden_after: Tensor, length: int) -> Tensor:
    """MAR's linear guidance schedule, 1 + (s - 1)(L - hidden) / L.

    hidden_after: tokens that remain hidden after the step (0 counts as 1). The scale multiplies as
    eps = eps_null + scale (eps_class - eps_null), so 1 is no guidance."""
    return 1 + (s - 1) * (length - hidden_after.clamp(min=1)) / length


def guided(head: Callable, c: Tensor, c_null: Tensor, scale: Tensor | float) -> Callable:
    """guided_head(x, t) -> [N, 2D] with eps = eps_null + scale (eps_class - eps_null).

    The variance channels are those of the class."""

    both_c = torch.cat([c, c_null])  # one batch

    def guided_head(x, t):
        both = head(x.repeat(2, 1), t.repeat(2), both_c)
        eps, variance = both.chunk(2, -1)
        eps_class, eps_null = eps.chunk(2)
        eps = eps_null + scale * (eps_class - eps_null)
        return torch.cat([eps, variance[: len(x)]], -1)

    return guided_head


WARM_UP = 3  # iterations that compute everything, whatever the refresh


@dataclass
class Sampling:
    """How to sample; what is None is decided by the model.

    steps: K of the cosine schedule, or the counts themselves, such as (1, 2, 3, 4, 6) for 16 tokens
    (None: a policy's learned schedule, else settings.steps).
    guidance: s of a teacher, linear in the share revealed (None: settings.guidance; a student has
    it baked in and takes none). denoise_steps: of a teacher's chain (None: settings.denoise_steps),
    1 for the one-step generator, or (50, 5), annealed from the first iteration to the last as in
    DiSA (2505.20297). temperature: factor on the chain's noise or, where there is but one step, on
    z. refresh: all contexts are computed only in the first few iterations and every so many (see
    `unmask`); 1 is exact. order: in which tokens are revealed (None: settings.order), see
    `draw_noise`. greedy: a learned schedule takes its most probable count; else it draws one, as in
    rollouts. progress: show a bar."""

    steps: int | tuple[int, ...] | None = None
    guidance: float | None = None
    denoise_steps: int | tuple[int, int] | None = None
    temperature: float = 1.0
    progress: bool = False
    refresh: int = 1
    order: str | None = None
    greedy: bool = True

    def resolve(self, model: MAR) -> "Sampling":
        """The same with nothing left open; InputError where it does not suit the model's kind."""
        settings, denoise_steps, guidance = model.settings, self.denoise_steps, self.guidance
        if denoise_steps is None:
            denoise_steps = settings.denoise_steps if model.kind == "teacher" else 1
        if model.kind != "teacher" and denoise_steps != 1:
            raise InputError(
                f"--denoise-steps {denoise_steps}: a {model.kind} takes one step; only "
                "a teacher walks a chain"
            )
        if guidance is None:
            guidance = 1.0 if denoise_steps == 1 else settings.guidance
        if denoise_steps == 1 and guidance != 1:
            raise InputError(
                "--guidance needs a teacher's chain: a one-step student has its guidance baked in"
            )
        if not (0 <= self.temperature < math.inf and 0 <= guidance < math.inf):
            raise InputError("--temperature and --guidance must be numbers from 0 up")
        if self.refresh < 1:
            raise InputError(f"--refresh {self.refresh} must be at least 1, which is no cache")
        order = settings.order if self.order is None else self.order
        if order not in ORDERS:
            raise InputError(f"--order {order} must be one of {', '.join(ORDERS)}")
        return replace(self, denoise_steps=denoise_steps, guidance=guidance, order=order)

    def counts(self, length: int, settings: Settings) -> list[int]:
        """How many of the `length` tokens to be drawn each iteration reveals."""
        if isinstance(self.steps, tuple):
            if min(self.steps) < 1 or sum(self.steps) != length:
                raise InputError(f"--steps {self.steps} must be counts that sum to {length}")
            return list(self.steps)
        steps = min(length, settings.steps) if self.steps is None else self.steps
        return reveal_counts(length, steps)

    def computes_everything(self, k: int) -> bool:
        """Whether iteration k = 0, 1, ... is a refresh."""
        return k < WARM_UP or k % self.refresh == 0

    def chains(self, iterations: int) -> list[Diffusion] | None:
        """The denoising chain of each of K iterations; None for the one-step generator."""
        if self.denoise_steps == 1:
            return None
        if isinstance(self.denoise_steps, tuple):
            counts = torch.linspace(*self.denoise_steps, iterations)
            return [Diffusion(round(n)) for n in counts.tolist()]
        return [Diffusion(self.denoise_steps)] * iterations


@dataclass
class Noise:
    """What a generation starts from. Token order[b, j] is revealed before token order[b, j - 1],
    as in MAR, which reveals from the end of the order."""

    order: Tensor  # [B, L]
    z: Tensor  # [B, L, D]
    # exploration noise added to a revealed token: a number, [B, 1, 1] or [B, L, 1]
    sigma: Tensor | float = 0.0


def draw_noise(model: MAR, n: int, generator, kind="random") -> Noise:
    """An order of one of the kinds ORDERS, and z, for n images."""
    shape, device = (n, model.length), generator.device
    if kind == "random":
        order = torch.rand(shape, generator=generator, device=device).argsort(1)
    else:
        order = halton_order(math.isqrt(model.length), n, generator)
    z = torch.randn(*shape, model.channels, generator=generator, device=device)
    return Noise(order, z)


def halton_order(side: int, n: int, generator) -> Tensor:
    """Orders [n, L] that spread the tokens of every iteration over the image (2503.17076).

    Neighbours that are drawn in the same iteration do not know of each other, so they fit together
    the less. The cells of the grid are visited as points of Halton's sequence in bases 2 and 3 fall
    into them. Ours: each image shifts the grid around its edges, and half of them transpose it."""
    first_visit = halton_cells(side).to(generator.device)
    y, x = first_visit // side, first_visit % side
    drawn = {"generator": generator, "device": generator.device}
    dy, dx = torch.randint(side, (2, n, 1), **drawn)
    y, x = (y + dy) % side, (x + dx) % side
    swap = torch.rand(n, 1, **drawn) < 0.5
    return torch.where(swap, x * side + y, y * side + x).flip(1)  # the end is revealed first


@cache
def halton_cells(side: int) -> Tensor:
    """The cells [L] of a grid in the order in which Halton's sequence first visits them."""
    cells = {}
    for i in itertools.count(1):
        y, x = (int(radical_inverse(i, base) * side) for base in (2, 3))
        cells.setdefault(y * side + x)
        if len(cells) == side**2:
            return torch.tensor(list(cells))


def radical_inverse(i: int, base: int) -> float:
    """The digits of i mirrored at the point: 6 = 110 in base 2 gives 0.011 = 3/8."""
    value, digit = 0.0, 1.0
    while i:
        digit /= base
        value += digit * (i % base)
        i //= base
    return value


@dataclass
class Trace:
    """What `generate` did over T iterations, the most of any image; others have counts of 0 at the
    end. A revealed token never changes, so the state before any step is the final image under the
    step's mask."""

    order: Tensor  # [B, L]
    z: Tensor  # [B, L, D]
    contexts: Tensor  # [B, L, W]: each token's c when it was revealed
    means: Tensor  # [B, L, D]: each token as predicted then, before exploration noise
    counts: Tensor  # [B, T]: tokens revealed
    predictions: Tensor | None  # [B, T, L, D]: the whole image as predicted before each step
    states: Tensor | None  # [B, T, W + 1]: what the schedule policy saw
    actions: Tensor | None  # [B, T]: what it chose

    @property
    def steps(self) -> Tensor:
        """T of each image [B]."""
        return (self.counts > 0).sum(1)

    def hidden(self) -> Tensor:
        """Tokens still hidden before each step [B, T]."""
        return self.counts.flip(1).cumsum(1).flip(1)  # all that is revealed from this step on

    def masks(self) -> tuple[Tensor, Tensor]:
        """mask before each step [B, T, L], and which tokens the step revealed [B, T, L]."""
        rank, hidden = self.order.argsort(1)[:, None], self.hidden()[..., None]
        mask = rank < hidden
        return mask, mask & (rank >= hidden - self.counts[..., None])


def class_and_null_context(model: MAR, tokens, mask, labels, *cached) -> tuple[Tensor, Tensor]:
    """c for the labels and c for the null class, each [B, L, W], computed in one batch."""
    both = torch.cat([labels, model.null(labels)])
    cached = [x.repeat(2, 1) if torch.is_tensor(x) else x for x in cached]
    return model.context(tokens.repeat(2, 1, 1), mask.repeat(2, 1), both, *cached).chunk(2)


class Contexts:
    """The contexts of a generation: c and, under guidance, c_null, each [B, L, W].

    alike: all images are finished at the same time; else those that were finished at the last
    refresh are left out, and have zeros."""

    def __init__(self, model: MAR, labels: Tensor, sampling: Sampling, alike: bool):
        self.model, self.labels, self.alike = model, labels, alike
        self.guided, self.caches = sampling.guidance != 1, sampling.refresh > 1

    def refresh(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """All contexts, computed anew."""
        self.live = slice(None) if self.alike else mask.any(1).nonzero()[:, 0]
        self.cache = Cache() if self.caches else None
        return self.compute(tokens, mask)

    def renew(self, tokens: Tensor, mask: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        """The contexts of the tokens wanted [B, L] computed anew; the others as they were."""
        return self.compute(tokens, mask, wanted)

    def compute(self, tokens, mask, *wanted) -> tuple[Tensor, Tensor | None]:
        inputs = [x[self.live] for x in (tokens, mask, self.labels)]
        if self.cache is not None:
            inputs += [self.cache, *(x[self.live] for x in wanted)]
        c = torch.zeros(*mask.shape, self.model.settings.width, device=mask.device)
        if not self.guided:
            c[self.live] = self.model.context(*inputs)
            return c, None
        c_null = torch.zeros_like(c)
        c[self.live], c_null[self.live] = class_and_null_context(self.model, *inputs)
        return c, c_null


@torch.no_grad()
def generate(
    model: MAR,
    labels,
    sampling: Sampling | None = None,
    noise: Noise | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    seed=0,
    trace: bool | str = False,
) -> Tensor | tuple[Tensor, Trace]:
    """Tokens [B, L, D] of new images of classes `labels` [B] (integers); `to_images` shows them.

    `generate(model, labels)` is right for every kind of model: a teacher walks its chain under its
    guidance, a student takes one step, a policy also chooses how many iterations to take.

    sampling: how, where that should be another way. noise: order, z and exploration; drawn from
    `seed` if not given, and then the same for every model. known: (tokens [B, L, D], mask [L]), to
    complete images: only tokens under the mask are drawn. trace: True also returns the Trace, and
    "predictions" the Trace with its predictions, for which a teacher draws more noise.
    Same seed, device and arguments: same images. InputError if the sampling does not suit the
    model."""
    sampling = (sampling or Sampling()).resolve(model)
    labels = torch.as_tensor(labels, device=model.device)
    in_range = (0 <= labels) & (labels <= model.num_classes)
    if labels.is_floating_point() or not in_range.all():
        raise InputError(
            f"labels must be integers in 0...{model.num_classes - 1} (or {model.num_classes}, the "
            f"null class), not {labels.tolist()}"
        )
    generator = rng(seed, "generate", device=model.device)
    # in any case, so that what follows is the same
    drawn = draw_noise(model, len(labels), generator, sampling.order)
    predictions = trace == "predictions"
    result = unmask(model, labels, sampling, noise or drawn, known, generator, predictions)
    return result if trace else result[0]


def unmask(model, labels, sampling, noise, known, generator, predictions) -> tuple[Tensor, Trace]:
    """The loop of `generate`: contexts, tokens for some hidden places, reveal them; K times.

    With a refresh above 1, most iterations compute two kinds of tokens only: those just revealed,
    which are new to the encoder, and those about to be. They attend to the kept keys and values of
    all others, which miss only what the new tokens would have changed in them. A refresh, in the
    first few iterations, when each token changes most, and in every refresh-th, computes
    everything. A schedule policy then looks at the contexts of the iteration before. This is the
    token cache of LazyMAR (2503.12450), which computes the `buffer` rows, too, and takes
    c_null - c from the last refresh."""
    tokens, order, to_draw = starting_point(noise, known)
    schedule = model.schedule if sampling.steps is None else None
    fixed = sampling.counts(to_draw, model.settings)
    contexts = Contexts(model, labels, sampling, alike=schedule is None)
    chains = sampling.chains(len(fixed))
    limits = token_limits(model.settings)

    rank, reveal, z = order.argsort(1), None, noise.z
    if chains is None:
        z = sampling.temperature * z
    means = torch.zeros_like(tokens)
    revealed_c = torch.zeros(*rank.shape, model.settings.width, device=model.device)
    hidden = torch.full((len(labels),), to_draw, device=model.device)
    record = {name: [] for name in ("counts", "predictions", "states", "actions")}
    bar = tqdm(total=len(fixed), desc="iterations", disable=not sampling.progress, leave=False)
    for k in range(len(fixed)):
        mask = rank < hidden[:, None]
        if schedule is not None and not mask.any():
            break
        everything = sampling.computes_everything(k)
        if everything:
            c, c_null = contexts.refresh(tokens, mask)
        if schedule is None:
            count = torch.full_like(hidden, fixed[k])
        else:
            state = schedule_state(c, mask)
            action = schedule.choose(state, hidden, None if sampling.greedy else generator)
            count = schedule.count(action, hidden)
            record["states"].append(state)
            record["actions"].append(action)
        just_revealed, reveal = reveal, mask & (rank >= (hidden - count)[:, None])
        if not everything:
            c, c_null = contexts.renew(tokens, mask, just_revealed | reveal)

        # the whole image, or only what is revealed
        fill = (mask if predictions else reveal).nonzero(as_tuple=True)
        if chains is None:
            start = starting_noise(model, z[fill], c[fill])
            drawn = one_step(model.head, start, c[fill], model.settings.noise_ratio)
        else:
            scale = guidance_scale(sampling.guidance, hidden - count, model.length)
            head = chain_head(model.head, c, c_null, scale, fill)
            drawn = chains[k].sample(head, z[fill], generator, sampling.temperature, limits)
        image = tokens.clone()
        image[fill] = drawn
        means = torch.where(reveal[..., None], image, means)
        revealed_c = torch.where(reveal[..., None], c, revealed_c)
        tokens = torch.where(reveal[..., None], add_noise(image, noise.sigma, generator), tokens)
        hidden = hidden - count
        bar.update()
        record["counts"].append(count)
        if predictions:
            record["predictions"].append(image)
    bar.close()
    stacked = {name: torch.stack(steps, 1) if steps else None for name, steps in record.items()}
    return tokens, Trace(order, z, revealed_c, means, **stacked)


def starting_point(noise: Noise, known) -> tuple[Tensor, Tensor, int]:
    """Tokens [B, L, D], order [B, L], and how many tokens are to be drawn, before the first step.

    Known tokens go to the end of the order, where they are never hidden."""
    if known is None:
        return torch.zeros_like(noise.z), noise.order, noise.order.shape[1]
    tokens, mask = known
    drawn_first = (~mask[noise.order]).to(torch.uint8).argsort(dim=1, stable=True)
    return tokens.clone(), noise.order.gather(1, drawn_first), int(mask.sum())


def chain_head(head, c, c_null, scale, fill) -> Callable:
    """head(x, t) of the places fill, guided by scale [B] where there is a c_null.

    fill: indices of images and of tokens, [N] each."""
    if c_null is None:
        return partial(head, c=c[fill])
    return guided(head, c[fill], c_null[fill], scale[fill[0], None])


def token_limits(settings: Settings) -> tuple[float, float] | None:
    """Lowest and highest value that the chain lets its estimate of a token's x_0 take, or None."""
    if not settings.x_0_limit:
        return None
    return (
        (-settings.x_0_limit - settings.mean) * settings.scale,
        (settings.x_0_limit - settings.mean) * settings.scale,
    )


def add_noise(image: Tensor, sigma: Tensor | float, generator) -> Tensor:
    """image [B, L, D] + exploration noise of standard deviation sigma (see Noise)."""
    if not torch.is_tensor(sigma) and not sigma:
        return image
    return image + sigma * torch.randn(image.shape, generator=generator, device=image.device)


# 7 GSIM -------------------------------------------------------------------------------------------
# MARVAL, stage 1. The student's tokens x_0 = g(z, c) should be distributed as the teacher's. Noise
# both to time t and compare scores: the teacher's guided score s_p, and the student's own score
# s_q, which an auxiliary network learns from the student's samples. Minimising d(s_q - s_p) alone
# is not enough: s_q changes with the student, and the frozen auxiliary network cannot show how. The
# theorem replaces that missing gradient by L1, all of whose parts are at hand. Scores appear as
# eps-predictions here, s = -eps / sigma_t.


def pseudo_huber(y: Tensor, r: float = 1e-5) -> tuple[Tensor, Tensor]:
    """d(y) = sqrt(|y|^2 + r^2) - r [N] and its derivative y / sqrt(|y|^2 + r^2) [N, D]."""
    root = (y.square().sum(-1, keepdim=True) + r**2).sqrt()
    return root.squeeze(-1) - r, y / root


def velocity_weight(t: Tensor) -> Tensor:
    """1 / alpha_t [N, 1]: makes differences of eps differences of velocities."""
    alpha, _ = BASE.alpha_sigma(t)
    return 1 / alpha


def gsim_terms(
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    eps_q: Callable,
    eps_p: Callable,
    distance: Callable = pseudo_huber,
    weight: Callable = velocity_weight,
) -> tuple[Tensor, Tensor]:
    """L1 and L2 [N] of GSIM (MARVAL, gradient equivalence theorem), whose sum is the loss:

        L1 = -d'(y_t)^T (s_q - grad log p(x_t | x_0)),   L2 = d(y_t),   y_t = s_q - s_p

    x_0 = g(z, c) [N, D]: the student's tokens; t [N] on 0...999; eps [N, D]. eps_q, eps_p:
    functions (x_t, t) -> eps [N, D], the student's own score and the teacher's guided one. Their
    parameters must be frozen, but gradient must pass through them to x_t, in y_t and in d'(y_t)
    too. One term alone does not have the divergence's gradient (L1 with a squared d is SiD at alpha
    = 1). distance: y -> d [N], d' [N, D]. weight: t -> [N, 1], a factor on y_t and on the residual,
    which for each t is the theorem with another distance and which the paper leaves open. Ours
    compares velocities: what all tokens share is decided at high noise, where eps is nearly x_t
    whatever x_0 is, and an error in eps hardly counts."""
    x_t = BASE.q_sample(x_0, t, eps)
    e_q, e_p = eps_q(x_t, t), eps_p(x_t, t)
    d, d_prime = distance(weight(t) * (e_p - e_q))  # eps_p - eps_q = sigma_t (s_q - s_p)
    residual = weight(t) * (eps - e_q)  # grad log p(x_t | x_0) = -eps / sigma_t
    L1 = -(d_prime * residual).sum(-1)
    return L1, d


def gsim_loss(*args, **kwargs) -> Tensor:
    """L_GSIM = L1 + L2 [N] of `gsim_terms`."""
    L1, L2 = gsim_terms(*args, **kwargs)
    return L1 + L2


def gsim_times(n: int, generator) -> Tensor:
    """t [n] uniform on 20...984 (our choice): beyond it scores say nothing, or explode."""
    return torch.randint(20, 985, (n,), generator=generator)


def student_of(teacher: MAR, settings: Settings) -> MAR:
    """A trainable one-step student with the teacher's weights."""
    student = deepcopy(teacher).requires_grad_(True)
    student.kind, student.settings = "student", settings
    return student


class Distillation:
    """GSIM: the student (`model`, and `ema`, the average of its weights) and the auxiliary network
    both start as the teacher and are updated in turn.

    Adam with beta_1 = 0 and cosine decay. loss: as `gsim_loss`; another one is for ablations.
    Differs from the paper: guidance follows MAR's linear schedule as if the iteration revealed one
    token, where the paper's s is constant."""

    def __init__(self, teacher: MAR, settings: Settings, loss: Callable = gsim_loss):
        self.teacher, self.loss = teacher, loss
        self.model = student_of(teacher, settings)
        self.aux = deepcopy(self.model)
        self.ema = deepcopy(self.model).requires_grad_(False)
        self.optimizers, self.rates = {}, {}
        networks = (
            ("student", self.model, settings.student_lr),
            ("aux", self.aux, settings.aux_lr),
        )
        for name, network, lr in networks:
            how = {"betas": (0.0, 0.999), "fused": teacher.device.type == "cuda"}
            optimizer = torch.optim.Adam(network.parameters(), lr, **how)
            rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.gsim_iters)
            self.optimizers[name], self.rates[name] = optimizer, rate
        self.state = {"aux": self.aux}
        for name in self.optimizers:
            self.state[f"{name}_optimizer"] = self.optimizers[name]
            self.state[f"{name}_rate"] = self.rates[name]

    def update(self, step: int, x: Tensor, labels: Tensor, generator) -> dict[str, float]:
        """One update of each network on data tokens x [B, L, D], labels [B]; metrics to log.

        A uniform share of the tokens is hidden, since the student meets every stage of generation.
        Each network computes its own context from the same visible data tokens; that is the costly
        part, so each context serves several draws of noise."""
        student, aux, settings = self.model, self.aux, self.model.settings
        ratio = torch.rand(len(x), generator=generator)
        mask = random_mask(ratio, student.length, generator).to(x.device)
        owner = mask.nonzero()[:, 0].repeat(settings.draws)  # [N]: the image of each token
        scale = guidance_scale(settings.guidance, mask.sum(1) - 1, student.length)[owner, None]
        parts = micro_batches(mask, settings.micro_batch)

        def draw():  # z [N, D], t [N] and eps [N, D]
            shape = (len(owner), student.channels)
            z, t = torch.randn(shape, generator=generator), gsim_times(len(owner), generator)
            return (v.to(x.device) for v in (z, t, torch.randn(shape, generator=generator)))

        def hidden(c, rows):  # [b, L, W] of some images -> [n, W] of their tokens
            return c[mask[rows]].repeat(settings.draws, 1)

        def context(network, rows):
            return hidden(network.context(x[rows], mask[rows], labels[rows]), rows)

        whole = context(student, parts[0]) if len(parts) == 1 else None  # for both losses

        def student_context(rows):
            return context(student, rows) if whole is None else whole

        # the auxiliary network learns the score of the student's samples
        z, t, eps = draw()

        def aux_loss_of(rows):  # their share of the mean over all N tokens
            n = torch.isin(owner, rows)
            with torch.no_grad():
                x_0 = one_step(student.head, z[n], student_context(rows), settings.noise_ratio)
            loss = denoising_loss(aux.head, x_0, context(aux, rows), t[n], eps[n])
            return loss * n.float().mean()

        aux_loss, _ = descend(map(aux_loss_of, parts), self.optimizers["aux"])

        # the student follows both scores; their parameters are frozen, but not the way to x_t
        z, t, eps = draw()

        def loss_of(rows):
            n = torch.isin(owner, rows)
            with torch.no_grad():
                c_q = context(aux, rows)
                both = class_and_null_context(self.teacher, x[rows], mask[rows], labels[rows])
            c_p, c_null = (hidden(c, rows) for c in both)
            teacher_head = guided(self.teacher.head, c_p, c_null, scale[n])

            def eps_p(x_t, t):
                return teacher_head(x_t, t).chunk(2, -1)[0]

            x_0 = one_step(student.head, z[n], student_context(rows), settings.noise_ratio)
            loss = self.loss(x_0, t[n], eps[n], partial(aux.head.eps, c=c_q), eps_p)
            return loss.sum() / len(owner)

        aux.requires_grad_(False)
        loss, norm = descend(map(loss_of, parts), self.optimizers["student"])
        aux.requires_grad_(True)
        self.rates["student"].step()
        self.rates["aux"].step()
        update_ema(self.ema, student, step, settings.student_ema)
        return {"loss": loss, "aux_loss": aux_loss, "grad_norm": norm}


# 8 Critical steps ---------------------------------------------------------------------------------
# MaskFocus. Most of what an image will be is decided in a few steps; only those are optimised.


def information_gain(
    predictions: Tensor, final: Tensor, valid: Tensor | None = None, mean: Tensor | float = 0.0
) -> Tensor:
    """V_k = |S_{k+1} - S_k| [B, T] with S_k = cos(E_k, E_final)   (MaskFocus, critical steps).

    predictions [B, T, ...]: the whole image as predicted before step k reveals; final [B, ...].
    S after the last step is 1. valid [B, T]: the steps that a row has; the others get -inf. The
    embedding E is what is passed in, less `mean` (the mean image), without which the cosine
    saturates. The paper embeds in its tokeniser's space; we take the tokens."""
    E, E_final = (predictions - mean).flatten(2), (final - mean).flatten(1)
    S = F.cosine_similarity(E, E_final[:, None], dim=-1)  # [B, T]
    if valid is not None:
        S = S.masked_fill(~valid, 1.0)
    S_next = torch.cat([S[:, 1:], torch.ones_like(S[:, :1])], 1)
    gain = (S_next - S).abs()
    return gain if valid is None else gain.masked_fill(~valid, -math.inf)


def critical_steps(score: Tensor, k: int) -> Tensor:
    """The k steps of largest score in each row, as a mask [B, T]; those of score -inf never."""
    top = score.topk(min(k, score.shape[1]), dim=1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, top, True) & score.isfinite()


# 9 Policies ---------------------------------------------------------------------------------------
# What RL changes must be an action with a probability, and must vary within a group. The quality of
# an image is decided by the noise z of its tokens, whose mean a small network chooses from their
# contexts; the student stays as it is. Speed-RL rewards images that need fewer steps, so, as in
# learned unmasking policies (2512.09106), another one chooses how many tokens a step reveals. Both
# networks are ours.


class NoisePolicy(nn.Module):
    """The mean mu(c) [N, D] of the noise z ~ N(mu(c), 1) that tokens start from, for c [N, W].

    Zero at first: the policy is then the student."""

    def __init__(self, width: int, channels: int, inner: int = 128):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.net = silu_mlp(width, inner, channels)
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, c: Tensor) -> Tensor:
        return self.net(self.norm(c))


def starting_noise(model: MAR, z: Tensor, c: Tensor) -> Tensor:
    """z [N, D] of mean 0, moved by mu(c) where the model has a noise policy."""
    return z if model.noise_policy is None else z + model.noise_policy(c)


def schedule_state(c: Tensor, mask: Tensor) -> Tensor:
    """What the policy sees [B, W + 1]: the hidden tokens' mean context, and the share hidden."""
    hidden = mask.sum(1, keepdim=True)
    mean_context = (c * mask[..., None]).sum(1) / hidden.clamp(min=1)
    return torch.cat([mean_context, hidden / mask.shape[1]], 1)


class SchedulePolicy(nn.Module):
    """Chooses to reveal unit x 1, 2, 3, 4, 6, 8, 12, ... tokens or all that remain, with unit =
    ceil(L / K), so that an image takes at most K steps.

    It starts independent of the state and in favour of small counts: probability ~ 1 / count."""

    def __init__(self, width: int, length: int, max_steps: int, inner: int = 64):
        super().__init__()
        unit = math.ceil(length / max_steps)
        sizes = [1, *sorted(m * 2**i for m in (2, 3) for i in range(length.bit_length()))]
        counts = [unit * n for n in sizes if unit * n < length] + [length]
        self.register_buffer("counts", torch.tensor(counts))
        self.norm = nn.LayerNorm(width)
        self.net = silu_mlp(width + 1, inner, len(counts))
        nn.init.zeros_(self.net[-1].weight)
        with torch.no_grad():
            self.net[-1].bias.copy_(-self.counts.log())

    def log_probs(self, states: Tensor, hidden: Tensor) -> Tensor:
        """log pi [N, choices] for states [N, W + 1] with hidden [N] tokens left.

        A count that is not below what remains has probability 0; `all` stands for it."""
        features = torch.cat([self.norm(states[:, :-1]), states[:, -1:]], 1)
        possible = self.counts < hidden[:, None]
        possible[:, -1] = True
        return self.net(features).masked_fill(~possible, -math.inf).log_softmax(-1)

    def choose(self, states: Tensor, hidden: Tensor, generator=None) -> Tensor:
        """Actions [N]: drawn from pi or, without a generator, the most probable ones."""
        probabilities = self.log_probs(states, hidden).exp()
        if not probabilities.isfinite().all():
            raise NonFinite("the schedule's probabilities are infinite or NaN")
        if generator is None:
            return probabilities.argmax(1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

    def count(self, actions: Tensor, hidden: Tensor) -> Tensor:
        """Tokens that the actions [N] reveal where hidden [N] remain."""
        return torch.minimum(self.counts[actions], hidden)


def speed(steps: Tensor, max_steps: int) -> Tensor:
    """(K - T + 1) / K in (0, 1]; 1 for one step. As in 2512.09106, with K in place of L."""
    return (max_steps - steps + 1) / max_steps


def total_reward(quality: Tensor, steps: Tensor, settings: Settings) -> Tensor:
    """R [B] = quality x speed^alpha of images that took `steps` [B].

    Our choice: Speed-RL's formula is not public in what we have. A sum instead of the product would
    pay for images that are fast and wrong."""
    return quality * speed(steps, settings.steps) ** settings.alpha


# 10 Policy gradient -------------------------------------------------------------------------------
# GRPO, group relative policy optimisation, and then MARVAL's back-propagation of a reward. An
# action (--action) is one of two Gaussians, whose log pi is known in closed form:
#     z   the noise of a token, drawn from N(mu(c), 1); only mu learns
#     x   a token, drawn from N(g(z, c), sigma^2) with z given; the whole generator learns
# The rollouts of a group share the class and the order and, if z is no action, z: they differ in
# their actions alone. quality(images [B, 3, H, W] in [-1, 1], labels [B]) -> [B] in [0, 1] is the
# reward for an image.


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """A = (R - mean) / std within each group of G consecutive rollouts [P G]   (GRPO).

    The std is over G - 1; a group whose rewards are all equal gets zeros."""
    R = rearrange(rewards, "(p g) -> p g", g=group)
    A = R - R.mean(1, keepdim=True)
    std = R.std(1, keepdim=True)
    return torch.where(std > 1e-5, A / std, 0.0).flatten()


def token_log_prob(x: Tensor, mean: Tensor, sigma: Tensor | float) -> Tensor:
    """log pi [N]: the mean over D channels of log N(x; mean, sigma^2), sigma [N] or a number.

    A mean, not a sum: ratios are then the exact ones to the power 1 / D, and tame."""
    sigma = torch.as_tensor(sigma, device=mean.device)[..., None]
    log_density = -((x - mean) / sigma).square() / 2 - (sigma * math.sqrt(2 * math.pi)).log()
    return log_density.mean(-1)


def token_kl(mean: Tensor, mean_ref: Tensor | float, sigma: Tensor | float) -> Tensor:
    """KL(N(mean, sigma^2) || N(mean_ref, sigma^2)) [N] in closed form, over D as log pi is."""
    sigma = torch.as_tensor(sigma, device=mean.device)[..., None]
    return ((mean - mean_ref) / sigma).square().mean(-1) / 2


def policy_loss(
    log_prob: Tensor,
    log_prob_old: Tensor,
    advantage: Tensor,
    kl: Tensor | float = 0.0,
    clip_ratio: float = 0.2,
    beta: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """-mean(min(r A, clip(r, 1 - eps, 1 + eps) A) - beta KL) over actions [N], r = pi / pi_old.

    The objective of GRPO and MaskFocus. Returns the loss and, to log, `ratio` and `kl`, their
    means; `clip_fraction`; and `log_ratio`, the largest |log r|."""
    kl = torch.as_tensor(kl)
    log_ratio = log_prob - log_prob_old.detach()
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    objective = torch.minimum(ratio * advantage, clipped * advantage) - beta * kl
    outside = (ratio - 1).abs() > clip_ratio
    metrics = {
        "ratio": ratio.mean().item(),
        "clip_fraction": outside.float().mean().item(),
        "kl": kl.mean().item(),
        "log_ratio": log_ratio.abs().max().item(),
    }
    return -objective.mean(), metrics


@dataclass
class Rollouts:
    """Finished images of a batch of prompts, the G rows of a group one after the other; B = P G."""

    tokens: Tensor  # [B, L, D]
    trace: Trace
    labels: Tensor  # [B]
    quality: Tensor  # [B]
    sigma: Tensor  # [B]: the standard deviation of each one's actions


@torch.no_grad()
def routing(model: MAR, labels: Tensor, generator, draws: int = 8) -> Tensor:
    """The factor on the sigma of each prompt's actions [P], 1 or more (MaskFocus, dynamic routing).

    The half of the prompts with the lower entropy H explores 1 + route exp(-H) times as much. H =
    max(0, mean over tokens and channels of log(std / explore)), the std being that of one-step
    predictions of a wholly hidden image over `draws` of z.
    Differs from the paper, which routes the samples of a group step by step and gives each token
    the temperature T exp(-H / alpha) + T_min: our samples share class and order, so that they are
    alike at first, and prompts are routed instead."""
    settings, P, L, D = model.settings, len(labels), model.length, model.channels
    mask = torch.ones(P, L, dtype=torch.bool, device=labels.device)
    c = model.context(torch.zeros(P, L, D, device=labels.device), mask, labels)
    z = torch.randn(draws * P * L, D, generator=generator, device=labels.device)
    g = one_step(model.head, z, repeat(c, "p l w -> (n p l) w", n=draws), settings.noise_ratio)
    variance = g.view(draws, P, L, D).var(0).clamp(min=1e-12)
    H = (variance.log() / 2 - math.log(settings.explore)).mean((1, 2)).clamp(min=0)
    certain = H.argsort().argsort() < P // 2
    return torch.where(certain, 1 + settings.route * torch.exp(-H), 1.0)


def rollout(
    model: MAR, quality: Callable, labels: Tensor, seed, predictions=True, explore=True
) -> Rollouts:
    """G rollouts of each class of `labels` [P].

    predictions: whether their Trace has them. explore: whether the generator's actions vary, too,
    not only the schedule's. What a group shares leaves the gradient unbiased and quiets it. Where
    routing heats a prompt, its rows explore with a larger sigma, and each shuffles the order a
    little, because exploration in MaskFocus also changes which positions are revealed."""
    settings, device = model.settings, labels.device
    drawn = {"generator": rng(seed, "shared", device=device), "device": device}
    noise = draw_noise(model, len(labels), drawn["generator"], settings.order)
    heat = torch.ones(len(labels), device=device)
    if settings.route and explore:
        heat = routing(model, labels, drawn["generator"])
    rows = torch.arange(len(labels), device=device).repeat_interleave(settings.group)
    labels, noise.order, noise.z, heat = (v[rows] for v in (labels, noise.order, noise.z, heat))
    sigma = heat
    if explore and settings.action == "z":
        noise.z = sigma[:, None, None] * torch.randn(noise.z.shape, **drawn)
    elif explore:
        sigma = settings.explore * heat
        noise.sigma = sigma[:, None, None]
    place = noise.order.argsort(1) / model.length  # in [0, 1)
    jitter = (heat[:, None] - 1) * torch.randn(place.shape, **drawn)  # our choice of how little
    noise.order = (place + jitter).argsort(1)
    trace = "predictions" if predictions else True
    tokens, trace = generate(model, labels, Sampling(greedy=False), noise, seed=seed, trace=trace)
    return Rollouts(tokens, trace, labels, quality(to_images(tokens, settings), labels), sigma)


def optimised_steps(
    trace: Trace, tokens: Tensor, settings: Settings, mean_image: Tensor, generator
) -> Tensor:
    """Which steps of each rollout are optimised [B, T]: all of its own, or K_c by --rl-steps.

    mean_image [1, L, D]: tokens that the information gain subtracts."""
    valid = trace.counts > 0
    if settings.rl_steps == "all":
        return valid
    if settings.rl_steps == "critical":
        score = information_gain(trace.predictions, tokens, valid, mean_image)
    elif settings.rl_steps == "random":
        score = torch.rand(valid.shape, generator=generator).to(tokens)
    else:  # the first
        score = -torch.arange(valid.shape[1]).to(tokens).expand(valid.shape)
    return critical_steps(score.masked_fill(~valid, -math.inf), settings.critical_steps)


def policy_of(student: MAR, settings: Settings) -> MAR:
    """A trainable copy of the student, with the policies that the settings ask for."""
    policy = deepcopy(student).requires_grad_(settings.action == "x")
    policy.kind, policy.settings = "policy", settings
    if settings.action == "z":
        add_noise_policy(policy)
    if settings.learn_steps and settings.method == "grpo":
        add_schedule(policy)
    return policy


def add_noise_policy(model: MAR) -> None:
    model.noise_policy = NoisePolicy(model.settings.width, model.channels).to(model.device)


def add_schedule(model: MAR) -> None:
    settings = model.settings
    schedule = SchedulePolicy(settings.width, settings.length, settings.steps)
    model.schedule = schedule.to(model.device)


class PolicyGradient:
    """RL on the critical steps and on the schedule; `model` is the policy, `reference` the student.

    What --action names learns from the tokens of the optimised steps: the noise policy, or the
    generator. That is the exact policy gradient, up to 1 / D, (G - 1) / G and each group's 1 / std,
    with --rl-steps all, --rl-tokens revealed and one update per rollout; with --action x also
    --no-learn-steps, since new contexts change the schedule. Fewer steps are MaskFocus' choice,
    made on the finished image, and biased; `hidden` and `fresh` (its re-masking), which --action x
    has, are surrogates, which count tokens that were not drawn from this context. The schedule
    learns from all its choices. Each has an optimiser of its own, so that no loss needs a weight.

    The noise policy and the schedule see contexts that the rollouts kept, so that their updates
    cost next to nothing, and are several per batch of rollouts."""

    policy_epochs = 4

    def __init__(self, student: MAR, settings: Settings, quality: Callable, mean_image: Tensor):
        self.quality, self.mean_image = quality, mean_image
        self.model = policy_of(student, settings)
        self.ema = self.model  # no average: the updates are few and small
        self.reference = deepcopy(self.model).requires_grad_(False)
        schedule, noise_policy = self.model.schedule, self.model.noise_policy
        self.optimizers = {}
        if noise_policy is not None:
            self.optimizers["noise"] = self.adamw(noise_policy.parameters(), settings.noise_lr)
        else:
            named = self.model.named_parameters()
            generator = [p for name, p in named if not name.startswith("schedule.")]
            self.optimizers["generator"] = self.adamw(generator, settings.rl_lr)
        if schedule is not None:
            self.optimizers["schedule"] = self.adamw(schedule.parameters(), settings.schedule_lr)
        self.state = self.optimizers

    def adamw(self, parameters, lr: float) -> torch.optim.AdamW:
        how = {"betas": (0.9, 0.95), "fused": self.model.device.type == "cuda"}
        return torch.optim.AdamW(parameters, lr, weight_decay=0.0, **how)

    def update(self, labels: Tensor, seed) -> dict[str, float]:
        """G rollouts of each class of `labels` [P], then updates on them; metrics to log.

        Groups whose rewards do not differ have A = 0 and take no part."""
        settings, generator = self.model.settings, rng(seed, "update")
        predictions = settings.rl_steps == "critical" or settings.rl_tokens == "hidden"
        rollouts = rollout(self.model, self.quality, labels, seed, predictions)
        trace, (A, metrics) = rollouts.trace, self.advantages_of(rollouts)
        steps = optimised_steps(trace, rollouts.tokens, settings, self.mean_image, generator)
        not_first = steps.float().cumprod(1).sum(1) < steps.sum(1)
        metrics["not_first"] = not_first.float().mean().item()
        if A.any() and settings.action == "z":
            metrics |= self.noise_update(rollouts, A, steps)
        elif A.any():
            metrics |= self.generator_update(rollouts, A, steps, generator)
        if self.model.schedule is not None:
            if settings.action == "x":
                alone = self.update_schedule_alone(labels, (seed, "schedule"))
                metrics["schedule_clipped"] = alone["schedule_clipped"]
            else:
                metrics["schedule_clipped"] = self.schedule_update(rollouts.trace, A)
        return metrics

    def update_schedule_alone(self, labels: Tensor, seed) -> dict[str, float]:
        """G rollouts of each class of `labels` [P], then updates of the schedule alone.

        They are without noise around the tokens, which the reward takes for damage."""
        explore = self.model.settings.action == "z"
        rollouts = rollout(self.model, self.quality, labels, seed, False, explore)
        A, metrics = self.advantages_of(rollouts)
        return metrics | {"schedule_clipped": self.schedule_update(rollouts.trace, A)}

    def advantages_of(self, rollouts: Rollouts) -> tuple[Tensor, dict[str, float]]:
        """A [B], and what to log of the rewards."""
        settings, steps = self.model.settings, rollouts.trace.steps
        R = total_reward(rollouts.quality, steps, settings)
        A = group_advantages(R, settings.group)
        return A, {
            "reward": R.mean().item(),
            "quality": rollouts.quality.mean().item(),
            "steps": steps.float().mean().item(),
            "spread": R.view(-1, settings.group).std(1).mean().item(),
            "no_spread": (A == 0).float().mean().item(),
        }

    def noise_update(self, rollouts: Rollouts, A: Tensor, steps: Tensor) -> dict[str, float]:
        """Updates of the noise policy on the tokens of the steps [B, T], with advantages A [B]."""
        model, settings, trace = self.model, self.model.settings, rollouts.trace
        optimised = steps & (A != 0)[:, None]
        counted = (optimised[..., None] & trace.masks()[1]).any(1)  # [B, L]
        row = counted.nonzero()[:, 0]  # [N]: the rollout of each counted token
        c, sigma = trace.contexts[counted], rollouts.sigma[row]
        mu_old = model.noise_policy(c).detach()
        z = trace.z[counted] + mu_old  # as it was drawn
        log_old = token_log_prob(z, mu_old, sigma)
        for epoch in range(self.policy_epochs):
            mu = model.noise_policy(c)
            loss, metrics = policy_loss(
                token_log_prob(z, mu, sigma),
                log_old,
                A[row],
                token_kl(mu, 0.0, sigma),
                settings.clip_ratio,
                settings.beta,
            )
            if epoch == 0:
                log_ratio = metrics["log_ratio"]
            loss, norm = descend([loss], self.optimizers["noise"])
        return metrics | {"log_ratio": log_ratio, "loss": loss, "grad_norm": norm}

    def generator_update(self, rollouts, A, steps, generator) -> dict[str, float]:
        """`rl_epochs` updates on the tokens of the steps [B, T], with advantages A [B]."""
        model, settings, trace = self.model, self.model.settings, rollouts.trace
        # M pairs of rollout and step, each the final image under the step's mask
        row, step = (steps & (A != 0)[:, None]).nonzero(as_tuple=True)
        x, z, labels = rollouts.tokens[row], trace.z[row], rollouts.labels[row]
        mask, counted = (masks[row, step] for masks in trace.masks())  # [M, L]
        old = trace.means[row]  # as sampled, so that the first ratio compares sampler and learner
        if settings.rl_tokens == "hidden":
            counted, old = mask, trace.predictions[row, step]
        elif settings.rl_tokens == "fresh":
            rank = torch.rand(mask.shape, generator=generator).argsort(1).to(mask.device)
            mask = counted = rank < mask.sum(1, keepdim=True)

        pair = counted.nonzero()[:, 0]  # [N]: the pair that each counted token belongs to
        x_counted, A, sigma = x[counted], A[row][pair], rollouts.sigma[row][pair]
        parts = micro_batches(mask, settings.micro_batch)

        def means(network, m):  # g(z, c) of the counted tokens of the pairs m [n, D]
            c = network.context(x[m], mask[m], labels[m])[counted[m]]
            return one_step(network.head, z[m][counted[m]], c, settings.noise_ratio)

        g_ref, g_old = torch.empty_like(x_counted), old[counted]
        with torch.no_grad():
            for m in parts:
                n = torch.isin(pair, m)
                g_ref[n] = means(self.reference, m)
                if settings.rl_tokens == "fresh":
                    g_old[n] = means(model, m)
            log_old = token_log_prob(x_counted, g_old, sigma)

        def loss_of(m):  # of the pairs m: their share of the mean over all N tokens
            n = torch.isin(pair, m)
            g = means(model, m)
            loss, metrics = policy_loss(
                token_log_prob(x_counted[n], g, sigma[n]),
                log_old[n],
                A[n],
                token_kl(g, g_ref[n], sigma[n]),
                settings.clip_ratio,
                settings.beta,
            )
            share = n.float().mean()
            seen.append((share.item(), metrics))
            return loss * share

        for epoch in range(settings.rl_epochs):
            seen = []
            loss, norm = descend(map(loss_of, parts), self.optimizers["generator"])
            if epoch == 0:  # 0 if sampler and learner agree
                log_ratio = max(metrics["log_ratio"] for _, metrics in seen)
        means_of = {name: sum(s * m[name] for s, m in seen) for name in seen[0][1]}
        return means_of | {"log_ratio": log_ratio, "loss": loss, "grad_norm": norm}

    def schedule_update(self, trace: Trace, A: Tensor) -> float:
        """Updates of the schedule policy on all its choices in a Trace; the clip fraction.

        It starts from nothing, so there is no base model that a KL could hold it to."""
        schedule, settings = self.model.schedule, self.model.settings
        if not A.any():
            return 0.0
        row, step = ((trace.counts > 0) & (A != 0)[:, None]).nonzero(as_tuple=True)
        states, hidden = trace.states[row, step], trace.hidden()[row, step]
        actions = trace.actions[row, step, None]

        def log_prob():
            return schedule.log_probs(states, hidden).gather(1, actions).squeeze(1)

        log_old = log_prob().detach()
        for _ in range(self.policy_epochs):
            loss, metrics = policy_loss(log_prob(), log_old, A[row], clip_ratio=settings.clip_ratio)
            descend([loss], self.optimizers["schedule"])
        return metrics["clip_fraction"]


class RewardBackpropagation(PolicyGradient):
    """MARVAL-RL: L = -E[R(G(z, class, K))], by the reward's own gradient through the generation.

    For rewards that are differentiable in the pixels, and a fixed number of steps. With --rl-steps
    all the gradient passes through the whole generation, as in the paper; else through the
    optimised steps alone, which needs less memory. beta KL holds the policy to the student."""

    def update(self, labels: Tensor, seed) -> dict[str, float]:
        """One update on P x G images of the classes `labels` [P]; metrics to log."""
        model, settings = self.model, self.model.settings
        labels = labels.repeat_interleave(settings.group)
        predictions = "predictions" if settings.rl_steps == "critical" else True
        tokens, trace = generate(model, labels, seed=seed, trace=predictions)
        keep = optimised_steps(trace, tokens, settings, self.mean_image, rng(seed, "update"))
        tokens = (trace.counts * keep).sum(1)  # [B]: how many an image reveals in those steps
        seen = []

        def loss_of(rows):  # of some images: their shares of the means over all
            part = replace(
                trace, order=trace.order[rows], z=trace.z[rows], counts=trace.counts[rows]
            )
            made, mean_kl = replay(model, self.reference, labels[rows], part, keep[rows])
            of_each = self.quality(to_images(made, settings), labels[rows])
            shares = of_each.sum() / len(labels), mean_kl * tokens[rows].sum() / tokens.sum()
            seen.append(torch.stack(shares).detach())
            return settings.beta * shares[1] - shares[0]

        parts = micro_batches(keep, settings.micro_batch)
        learner = self.optimizers["generator" if settings.action == "x" else "noise"]
        _, norm = descend(map(loss_of, parts), learner)
        quality, kl = sum(seen).tolist()
        return {
            "quality": quality,
            "steps": trace.steps.float().mean().item(),
            "kl": kl,
            "grad_norm": norm,
        }


def replay(
    model: MAR, reference: MAR, labels: Tensor, trace: Trace, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """The generation of `trace` once more: tokens [B, L, D] with gradient through the steps keep
    [B, T], and the mean KL of the actions to the reference's at those steps.

    At the other steps nothing is recorded: their tokens are constants to later contexts."""
    settings, tokens, kls = model.settings, torch.zeros_like(trace.z), []
    masks, reveals = trace.masks()

    def revealed(network, rows, k):  # c and g of the tokens that step k reveals in these rows
        c = network.context(tokens[rows], masks[rows, k], labels[rows])
        shown = reveals[rows, k]
        z = starting_noise(network, trace.z[rows][shown], c[shown])
        return c[shown], one_step(network.head, z, c[shown], settings.noise_ratio)

    for k in range(keep.shape[1]):
        unfinished = reveals[:, k].any(1)
        for kept in (True, False):
            rows = unfinished & (keep[:, k] == kept)
            if not rows.any():
                continue
            with torch.set_grad_enabled(kept):
                c, g = revealed(model, rows, k)
            if kept and settings.beta and model.noise_policy is not None:
                kls.append(token_kl(model.noise_policy(c), 0.0, 1.0))
            elif kept and settings.beta:
                with torch.no_grad():
                    _, g_ref = revealed(reference, rows, k)
                kls.append(token_kl(g, g_ref, settings.explore))
            tokens = tokens.masked_scatter((rows[:, None] & reveals[:, k])[..., None], g)
    kl = torch.cat(kls).mean() if kls else torch.zeros((), device=tokens.device)
    return tokens, kl


# 11 Checkpoints -----------------------------------------------------------------------------------
# MAR's own format, {"model": ..., "model_ema": ...}, and what it takes to use it: kind, settings,
# class names; during training also what it takes to go on as if there had been no interruption.

KINDS = ("teacher", "student", "policy")


def save_checkpoint(path, model: MAR, ema: MAR | None = None, step=0, training=None) -> None:
    """training: the state to resume from, where training is not finished."""
    content = {
        "kind": model.kind,
        "settings": asdict(model.settings),
        "classes": model.classes,
        "step": step,
        "model": model.state_dict(),
        "model_ema": (ema or model).state_dict(),
        "training": training,
    }
    write_file(path, content)


def write_file(path, content: dict) -> None:
    with writing(path) as file:
        torch.save(content, file)


@contextmanager
def writing(path) -> Iterator[BinaryIO]:
    """A file that takes the name `path` when it is complete: an interruption leaves the old file
    or the new one, never half of one. InputError names the path where the disk is full."""
    path = Path(os.devnull if rank() else path)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        if rank():  # the first of several processes writes for all
            with open(path, "wb") as file:
                yield file
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the old one's name
        os.replace(unfinished, path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink()
        if not isinstance(error, (OSError, RuntimeError)):  # the latter is torch.save's
            raise
        raise InputError(f"{path} cannot be written: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    """Why a file cannot be written or read, in one line."""
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    return getattr(cause, "strerror", None) or str(cause).splitlines()[0]


def load_safely(path, device="cpu", lazily=False) -> Any:
    """What torch.save wrote to `path`; no code in the file is ever run. InputError if it is none,
    or if a bit of it has changed.

    An argparse.Namespace, which MAR's own files hold, is read as data; any other class is refused
    by its name. lazily: leave weights on the disk until they are used."""
    try:
        stat = os.stat(path)
        damage = damage_of(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)
        if damage:
            raise InputError(f"{path} is damaged: {damage}. Get it anew")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, device, weights_only=True, mmap=lazily)
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}") from None
    except InputError:
        raise
    except Exception as error:
        reason = ", ".join([type(error).__name__, *foreign_classes(path)])
        raise InputError(
            f"{path} is not a checkpoint that can be read safely ({reason}); expected teacher.pt, "
            "student.pt or policy.pt, or a file in MAR's format"
        ) from None


@cache
def damage_of(path: str, size: int, mtime: int) -> str | None:
    """What is wrong with the zip archive that torch.save makes, if something is; by its checksums,
    which torch.load leaves aside. size, mtime: of the file, which is read once until it changes."""
    with ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != ZIP_STORED for part in parts):
            return "it is compressed, which torch.save never does"
        if sum(part.file_size for part in parts) > size:
            return "it says that it holds more than it has"
        damaged = archive.testzip()
    return damaged and f"the checksum of {damaged} is wrong"


def foreign_classes(path) -> list[str]:
    """Names of the classes and functions that a file would need to be unpickled, if it has some."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a file that can tell
        return []
    return sorted(f"it holds a {name}" for name in names if name != "argparse.Namespace")


def read_checkpoint(path, kind: str | None = None, device="cpu") -> dict:
    """The content of a checkpoint, its "settings" as Settings.

    InputError if it is none, if it is of another kind, or if its settings are out of range."""
    content = load_safely(path, device)
    parts = {"kind": str, "settings": dict, "classes": list, "step": int, "training": object}
    if not isinstance(content, dict) or not {*parts, "model", "model_ema"} <= set(content):
        raise InputError(f"{path} is not a maskrl checkpoint")
    for name, accepted in parts.items():
        if not isinstance(content[name], accepted):
            raise InputError(
                f"{path} is not a maskrl checkpoint: its {name} must be of type {accepted.__name__}"
            )
    if content["kind"] not in KINDS or content["step"] < 0:
        raise InputError(f"{path} is not a maskrl checkpoint")
    if not all(isinstance(name, str) for name in content["classes"]):
        raise InputError(f"{path}: its classes must be a list of names")
    for part in ("model", "model_ema"):
        tensors_of(path, content, part)
    if kind and content["kind"] != kind:
        raise InputError(f"{path} is a {content['kind']}; a {kind} is needed here")
    unknown = {str(name) for name in content["settings"]} - {f.name for f in fields(Settings)}
    if unknown:
        raise InputError(
            f"{path} has settings that this version does not know: {some(sorted(unknown), 3)}. If "
            "another version made it, make it anew"
        )
    try:
        content["settings"] = Settings(**content["settings"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if content["settings"].scale == 0:
        raise InputError(f"{path}: its --scale is 0, and no longer measured")
    return content


def load_checkpoint(path, kind: str | None = None, device="cpu") -> MAR:
    """The EMA model of a checkpoint, ready for `generate`; InputError if the file is not sound."""
    content = read_checkpoint(path, kind, device)
    settings, weights = content["settings"], content["model_ema"]
    image_channels = shape_of(path, weights, "z_proj.weight", 2)[1] // settings.patch**2

    def build():
        model = MAR(settings, content["classes"], content["kind"], image_channels)
        if model.kind == "policy" and "noise_policy.norm.weight" in weights:
            add_noise_policy(model)
        if model.kind == "policy" and "schedule.counts" in weights:
            add_schedule(model)
        return model

    return filled(path, build, weights).to(device).eval().requires_grad_(False)


# ==================================================================================================
# Part II: the workbench. A reader of the papers may stop here.
# ==================================================================================================

# 12 Data ------------------------------------------------------------------------------------------
# Either shapes that anybody can draw, or a folder with one sub-folder of images per class. Both end
# as bytes, in three parts: `train` (generator and reward), `judge` (the judge alone) and `test`
# (what the judge compares with). A folder is decoded once, into a file that is then mapped: it may
# hold more images than fit into memory.

COLOURS = {"red": (220, 50, 50), "green": (50, 200, 70), "blue": (60, 90, 230)}
FORMS = ("circle", "square", "triangle")


def to_unit(images: Tensor) -> Tensor:
    """Bytes -> floats in [-1, 1]."""
    return images.float() / 127.5 - 1


@dataclass
class Split:
    """Some of the images of a data set, and their labels."""

    stored: Tensor  # uint8 [M, 3, S, S], all images of the data set, perhaps mapped from a file
    rows: Tensor  # [N], which of them belong to this part
    labels: Tensor  # [N]

    def __len__(self):
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """A copy of this part's images, uint8 [N, 3, S, S]; of a large one, `take` some first."""
        return self.stored[self.rows]

    @property
    def channels(self) -> int:
        return self.stored.shape[1]

    @property
    def size(self) -> int:
        """S, height and width of an image."""
        return self.stored.shape[-1]

    def spaced(self) -> Tensor:
        """Images in [-1, 1] [n, 3, S, S], every class in its share: all of them, or evenly spaced
        10,000 to 20,000; of large images fewer, so that all take at most 4.3 GB."""
        most = min(10_000, 2**29 // self.stored[0].numel())
        return to_unit(self.take(slice(None, None, max(1, len(self) // most))).images)

    def take(self, index) -> "Split":
        return Split(self.stored, self.rows[index], self.labels[index])

    def batch(self, n: int, generator, device="cpu", flip=False) -> tuple[Tensor, Tensor]:
        """n random images in [-1, 1] [n, 3, S, S] and their labels [n]."""
        index = torch.randint(len(self), (n,), generator=generator)
        x = to_unit(self.stored[self.rows[index]].to(device))
        if flip:
            mirrored = torch.rand(n, 1, 1, 1, generator=generator).to(device) < 0.5
            x = torch.where(mirrored, x.flip(-1), x)
        return x, self.labels[index].to(device)

    def balanced_half(self, most: int) -> int:
        """Images of each class in either of the `balanced_halves`."""
        counts = self.labels.unique(return_counts=True)[1]
        return max(2, min(int(counts.min()) // 2, most // len(counts)))

    def balanced_halves(self, most: int, generator) -> tuple["Split", "Split"]:
        """Two disjoint halves with equally many images of every class: at most `most` images each,
        but at least two of each class."""
        m = self.balanced_half(most)
        rows = [(self.labels == y).nonzero().squeeze(1) for y in self.labels.unique()]
        rows = [r[torch.randperm(len(r), generator=generator)] for r in rows]
        first, second = [r[:m] for r in rows], [r[m : 2 * m] for r in rows]
        return self.take(torch.cat(first)), self.take(torch.cat(second))


def unchanged(images: Tensor) -> Tensor:
    """What decodes the images of a generator of pixels."""
    return images


@dataclass
class Data:
    name: str  # "shapes", or the folder
    classes: list[str]  # what labels stand for; a checkpoint's, which may be more than occur here
    names: dict[str, str]  # {class: what people call it}, of --class-names
    train: Split
    judge: Split
    test: Split
    cache: Path | None = None  # the folder that keeps the decoded images, if there is one
    latents: Any = None  # of `train`, as Latents (section 21), if the generator makes latents
    decode: Callable = unchanged  # what a generator makes -> images in [-1, 1]

    @property
    def labels(self) -> Tensor:
        """The labels that occur, ascending."""
        return self.train.labels.unique()

    @property
    def learned(self) -> Any:
        """What a generator learns: the training images, or their latents."""
        return self.train if self.latents is None else self.latents

    def labelled_as(self, classes: list[str]) -> "Data":
        """The same images under the labels of a checkpoint's `classes`, of which these are some."""
        unknown = [name for name in self.classes if name not in classes]
        if unknown:
            raise InputError(
                f"--data {self.name} has classes that the checkpoint has not: {some(unknown)}; "
                f"its own are {some(classes)}. Choose by --classes"
            )
        label = torch.tensor([classes.index(name) for name in self.classes])
        parts = {name: getattr(self, name) for name in ("train", "judge", "test")}
        parts = {name: replace(part, labels=label[part.labels]) for name, part in parts.items()}
        return replace(self, classes=classes, **parts)

    def measure(self, settings: Settings) -> Settings:
        """The Settings with mean and scale measured on what is learned, unless scale is given.

        Tokens that are not centred hide what varies behind a constant, and attention then hardly
        learns to look at them."""
        if settings.scale:
            return settings
        x = self.learned.spaced()
        mean = round(float(x.mean()), 4)
        scale = round(float(1 / x.std().clamp(min=1e-3)), 4)
        return replace(settings, mean=mean, scale=scale)


def shape_masks(x: Tensor, y: Tensor, r: Tensor, size: int) -> Tensor:
    """Share of every pixel inside each of the FORMS [N, 3, size, size].

    x, y, r [N]: centres and radii, as shares of the image's side."""
    grid = (torch.arange(size, device=x.device) + 0.5) / size
    dx, dy, r = grid - x[:, None, None], grid[:, None] - y[:, None, None], r[:, None, None]
    # signed distances to the edge, negative inside
    circle = (dx**2 + dy**2).sqrt() - r
    square = torch.maximum(dx.abs(), dy.abs()) - 0.88 * r
    triangle = torch.maximum(dy + 0 * dx, 0.866 * dx.abs() - 0.5 * dy) - 0.6 * r
    return (0.5 - torch.stack([circle, square, triangle], 1) * size).clamp(0, 1)


def draw_shapes(labels: Tensor, size: int, generator=None) -> Tensor:
    """Antialiased shapes of the classes `labels` [N], as uint8 [N, 3, size, size].

    The class is 3 x colour + form; centres lie within +-0.1 of the middle, radii in 0.22...0.32,
    and backgrounds are dark greys."""
    u = torch.rand(len(labels), 4, generator=generator)
    x, y = 0.5 + 0.1 * (2 * u[:, :2] - 1).T
    masks = shape_masks(x, y, 0.22 + 0.10 * u[:, 2], size)
    inside = masks[torch.arange(len(labels)), labels % 3][:, None]
    paint = torch.tensor(list(COLOURS.values())).float()[labels // 3][:, :, None, None]
    background = 51 * u[:, 3, None, None, None]
    return (inside * paint + (1 - inside) * background).round().to(torch.uint8)


def load_data(
    settings: Settings, name: str = "shapes", chosen=None, class_names=None, cache=None, stride=1
) -> Data:
    """Data called `shapes`, or of a folder; 60 / 20 / 20 % of every class to train, judge and test.

    chosen: names of the folder's classes, as --classes has them (None: all). class_names: a file,
    as --class-names has it. cache: a folder to keep decoded images in; without one they stay in
    memory. stride: pixels per side of a latent, if the generator makes latents. A class is divided
    alike for every seed, and whatever other classes there are.
    InputError if the folder is missing, or a class has fewer than 20 images."""
    names, place, size = {}, None, settings.image_size * stride
    if name == "shapes":
        if chosen or class_names:
            raise InputError("--classes and --class-names need --data FOLDER; shapes are all drawn")
        classes, images, labels = load_shapes(settings, size)
    else:
        classes = class_folders(name)
        if class_names:
            names = read_class_names(class_names, classes)
        if chosen:
            classes = [classes[y] for y in sorted(set(find_classes(chosen, classes, names)))]
        images, labels, place = load_folder(name, classes, size, cache)
    parts = [Split(images, rows, labels[rows]) for rows in divide(labels, name, classes)]
    return Data(name, classes, names, *parts, place)


def divide(labels: Tensor, name: str, classes: list[str]) -> list[Tensor]:
    """Rows of `labels` [N] for train, judge and test; labels that are no class are in none.

    The seed has no part in it: no stage meets what another one held out."""
    train, judge, test = [], [], []
    generator = rng("split")
    for y, class_name in enumerate(classes):
        rows = (labels == y).nonzero().squeeze(1)
        n = len(rows)
        if name != "shapes":
            check_class_size(name, class_name, n)
            generator = rng("split", class_name)
        rows = rows[torch.randperm(n, generator=generator)]
        train.append(rows[: int(0.6 * n)])
        judge.append(rows[int(0.6 * n) : int(0.8 * n)])
        test.append(rows[int(0.8 * n) :])
    return [torch.cat(part) for part in (train, judge, test)]


def check_class_size(folder: str, class_name: str, n: int) -> None:
    """InputError unless n images are enough to be divided."""
    if n < 20:
        raise InputError(
            f"class {class_name!r} in --data {folder} has {n} readable images; at least 20 are "
            "needed, or --classes without it"
        )


def load_shapes(settings: Settings, size: int) -> tuple[list[str], Tensor, Tensor]:
    """Class names, images uint8 [N, 3, size, size] and labels [N] of the built-in shapes."""
    classes = [f"{colour} {form}" for colour in COLOURS for form in FORMS]
    labels = torch.arange(len(classes)).repeat_interleave(settings.per_class)
    generator = rng(settings.seed, "shapes")
    parts = [draw_shapes(y, size, generator) for y in labels.split(4096)]
    return classes, torch.cat(parts), labels


def some(texts: list[str], most: int = 10) -> str:
    """The first of `texts`, and how many there are where these are not all."""
    more = f", ... ({len(texts)} in all)" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def read_lines(option: str, path) -> list[str]:
    """The lines of a text file; InputError if it is none."""
    try:
        return Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {path}: {error}") from None


def read_class_names(path, classes: list[str]) -> dict[str, str]:
    """{class: what people call it} of a file with lines such as `n01440764 tench, Tinca tinca`.

    InputError if it names none of the `classes`."""
    words = [line.split(maxsplit=1) for line in read_lines("--class-names", path)]
    names = {pair[0]: pair[1].strip() for pair in words if len(pair) == 2}
    if not names.keys() & set(classes):
        raise InputError(
            f"--class-names {path} names none of the classes {some(classes, 3)}; expected lines "
            "such as 'n01440764 tench, Tinca tinca'"
        )
    return names


def display_names(classes: list[str], names: dict[str, str]) -> list[str]:
    """What to call the `classes`: the first of several names; the class itself if it has none."""
    first = {name: called.split(",")[0] for name, called in names.items()}
    return [first.get(name, name) for name in classes]


def find_classes(texts: list[str], classes: list[str], names: dict[str, str]) -> list[int]:
    """Positions in `classes` of those that --classes asks for.

    texts: classes or their `names`, several of them apart by commas, or files with one a line.
    InputError if there is no such class, or if a name is that of several."""
    meant = {}
    for y, name in enumerate(classes):
        called = names.get(name, "")
        for spelling in {called, *map(str.strip, called.split(","))}:
            meant.setdefault(spelling, []).append(y)
    meant |= {name: [y] for y, name in enumerate(classes)}
    wanted = []
    for text in texts:
        if text in meant:
            wanted.append(text)
        elif os.path.isfile(text):
            wanted += read_lines("--classes", text)
        else:
            wanted += text.split(",")
    wanted = [name.strip() for name in wanted if name.strip()]
    if not wanted:
        raise InputError("--classes names no class")
    for name in wanted:
        if name not in meant:
            raise InputError(f"--classes: there is no class {name!r}; there are: {some(classes)}")
        if len(meant[name]) > 1:
            several = some([classes[y] for y in meant[name]])
            raise InputError(f"--classes: {name!r} may be any of {several}: name one of these")
    return [meant[name][0] for name in wanted]


# Image files: each as a person sees it, and a folder of them as bytes.

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = {end: name for end, name in Image.registered_extensions().items() if name in FORMATS}


def read_rgb(path, side: int | None = None) -> Image.Image:
    """The first frame of an image file in 8 bits, upright, and on white where it is transparent.

    side: the side of the square that will be made of it; a JPEG is decoded no larger than that
    takes. InputError says why a file cannot be read."""
    try:
        with Image.open(path, formats=tuple(set(EXTENSIONS.values()))) as image:
            if side:
                image.draft(None, (2 * side, 2 * side))
            ImageOps.exif_transpose(image, in_place=True)
            return on_white(eight_bits(image))
    except UnidentifiedImageError:
        raise InputError(f"{path}: no image, or a damaged one") from None
    except Exception as error:  # over a damaged file Pillow raises nearly anything
        raise InputError(f"{path}: {error or type(error).__name__}") from None


def eight_bits(image: Image.Image) -> Image.Image:
    """Pixels of 16 bits and floats scaled to 0...255, where Pillow would clip them.

    White is 65535; of floats 1, unless some are larger: then 255, or 65535."""
    if image.mode not in ("F", "I", "I;16", "I;16B", "I;16L", "I;16N"):
        return image
    x = np.nan_to_num(np.asarray(image, dtype=np.float32))
    white = 65535
    if image.mode == "F":
        white = next((level for level in (1, 255) if x.max() <= level), white)
    return Image.fromarray((x / white * 255).clip(0, 255).round().astype(np.uint8))


def on_white(image: Image.Image) -> Image.Image:
    """Any image in RGB, transparent pixels composited on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def middle_square(image: Image.Image, size: int) -> Tensor:
    """The middle of an RGB image, resized to uint8 [3, size, size]."""
    return TF.pil_to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))


def class_folders(folder: str) -> list[str]:
    """The names of the sub-folders, sorted; hidden ones are no classes."""
    try:
        names = [e.name for e in os.scandir(folder) if not e.name.startswith(".")]
        found = [name for name in names if os.path.isdir(os.path.join(folder, name))]
    except OSError as error:
        raise InputError(f"--data {folder}: {error.strerror}") from None
    if not found:
        raise InputError(f"--data {folder} has no sub-folders; expected one of images per class")
    return sorted(found)


def files_below(folder, above=frozenset()) -> Iterator[os.DirEntry]:
    """All files in a folder and its sub-folders, in a fixed order; symbolic links are followed,
    but not into a folder that one is in already."""
    above = above | {os.path.realpath(folder)}
    for entry in sorted(os.scandir(folder), key=attrgetter("name")):
        if not os.path.isdir(entry.path):
            yield entry
        elif os.path.realpath(entry.path) not in above:
            yield from files_below(entry.path, above)


def kind_of(entry: os.DirEntry) -> str:
    """What tells the kind of a file: how its name ends, e.g. `.jpg`."""
    kind = Path(entry.name).suffix.lower() or entry.name
    return kind if os.path.isfile(entry.path) else f"{kind} (a broken link)"


def list_images(folder: str, classes: list[str]) -> tuple[list[str], Tensor, str]:
    """Paths and labels [N] of the images of the `classes`, and a digest that changes when a file is
    added, removed or changed. Says how many other files there are, of which kinds."""
    paths, labels, digest = [], [], hashlib.sha256(b"upright, white behind, middle square")
    root = os.path.abspath(folder)
    beside = [kind_of(entry) for entry in os.scandir(root) if not os.path.isdir(entry.path)]
    ignored = Counter(f"{kind} beside the sub-folders" for kind in beside)
    for y, name in enumerate(classes):
        for entry in files_below(os.path.join(root, name)):
            kind = kind_of(entry)
            if kind not in EXTENSIONS:
                ignored[kind] += 1
                continue
            stat = entry.stat()
            about = entry.path.removeprefix(root), stat.st_size, stat.st_mtime_ns
            digest.update(f"{about}\n".encode())
            paths.append(entry.path)
            labels.append(y)
    if ignored:
        kinds = some([f"{count} {kind}" for kind, count in ignored.most_common()])
        print(f"ignored in {folder}: {kinds}", file=sys.stderr)
    return paths, torch.tensor(labels, dtype=torch.long), digest.hexdigest()


def decode(paths: list[str], size: int, file: BinaryIO) -> dict[int, str]:
    """Write the images as 3 x size x size bytes each, in order. Returns {index: reason} of those
    that cannot be read, in whose place are zeros.

    Threads, since Pillow lets others run while it decodes and resizes."""
    reasons = {}

    def read(path):
        try:
            return middle_square(read_rgb(path, size), size).numpy().tobytes()
        except InputError as error:
            return str(error)

    pool = ThreadPool(os.cpu_count())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # odd metadata, or merely large
            results = tqdm(pool.imap(read, paths, 32), "decoding", len(paths), leave=False)
            for i, result in enumerate(results):
                if isinstance(result, str):
                    reasons[i], result = result, bytes(3 * size * size)
                file.write(result)
    finally:
        pool.terminate()
        pool.join()  # after Ctrl-C too, a thread still at work would crash Python's exit
    return reasons


def made_once(place: Path | None, name: str, make: Callable) -> tuple[Tensor, dict]:
    """The bytes that make(file) writes, as uint8 [bytes], and the dictionary that it returns.

    place: a folder that keeps both from run to run, as <name>.bytes, which is mapped, and key.json;
    None: they are in memory. The folder gets its name when it is complete, so that nobody finds
    half of one; two runs that make it at the same time make the same. InputError if it cannot be
    written or read."""
    if place is None:
        file = io.BytesIO()
        key = make(file)
        return torch.from_numpy(np.frombuffer(file.getbuffer(), np.uint8)), key
    try:
        if not place.exists():
            print(f"{name} are made once, and kept in {place}", file=sys.stderr)
            write_folder(place, name, make)
        key = json.loads((place / "key.json").read_text())
        return torch.from_numpy(np.memmap(place / f"{name}.bytes", np.uint8, "c")), key
    except OSError as error:
        raise InputError(f"{name} cannot be kept in {place}: {error}") from None


def write_folder(place: Path, name: str, make: Callable) -> None:
    """The folder of `made_once`, written under another name, on the disk before it gets its own."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=place.parent) as unfinished:
        part = Path(unfinished, "part")
        part.mkdir()
        with open(part / f"{name}.bytes", "wb") as file:
            key = make(file)
            file.flush()
            os.fsync(file.fileno())
        (part / "key.json").write_text(json.dumps(key, indent=1))
        try:
            part.rename(place)
        except OSError:
            if not place.exists():  # else another run was first
                raise


def load_folder(
    folder: str, classes: list[str], size: int, cache=None
) -> tuple[Tensor, Tensor, Path | None]:
    """Images uint8 [N, 3, size, size] and labels [N] of a folder of folders, -1 where unreadable;
    and the folder in which the bytes are kept.

    cache: where that is, from run to run; None: the bytes are in memory."""
    try:
        paths, labels, digest = list_images(folder, classes)
    except OSError as error:
        raise InputError(f"--data {folder}: {error}") from None
    for name, n in zip(classes, labels.bincount(minlength=len(classes)).tolist()):
        check_class_size(folder, name, n)  # before long work

    def make(file):
        reasons = decode(paths, size, file)
        key = {"folder": folder, "image_size": size, "files": len(paths)}
        return key | {"unreadable": list(reasons.items())}

    place = None if cache is None else Path(cache, f"{digest[:20]}-{size}")
    pixels, key = made_once(place, "images", make)
    reasons = dict(key["unreadable"])
    for reason in list(reasons.values())[:10]:
        print(f"skipped {reason}", file=sys.stderr)
    if reasons:
        print(f"skipped {len(reasons)} of {len(paths)} images in {folder}", file=sys.stderr)
    labels[list(reasons)] = -1
    return pixels.view(-1, 3, size, size), labels, place


# 13 Training loop ---------------------------------------------------------------------------------
# One loop for teacher, student and policy: progress bar, log, checkpoints, and going on where an
# interrupted run stopped.


def train(
    training, update: Callable, path, iters: int, resume=False, measure=None, every=250
) -> MAR:
    """Call update(step) -> {name: float} `iters` times; returns the EMA model.

    training: a TeacherTraining, Distillation or PolicyGradient. path: of the checkpoint, written
    every `every` steps; log.jsonl lies beside it. measure: function ema -> {name: float}, logged
    ten times; where it gives `progress`, the EMA weights with the lowest are kept at the end.
    Ctrl-C and SIGTERM let a step finish, save, and raise Stopped. NonFinite names the stage, the
    step and the tensors, and leaves a checkpoint of before the step, or, where half of the step is
    done, the last one; from it --resume repeats what led there, since every step draws its noise
    from (seed, stage, step)."""
    path, model, ema = Path(path), training.model, training.ema
    path.parent.mkdir(parents=True, exist_ok=True)
    # seconds of all updates so far; the lowest progress, and the EMA weights that it is of
    record = {"seconds": 0.0, "lowest": math.inf, "weights": {}}
    start = saved = restore(training, path, record, iters) if resume and path.exists() else 0
    trim_log(path.parent, model.kind, start)
    average_gradients(training)
    stepped = []  # whether the weights have changed since the last update was complete
    for value in training.state.values():
        if isinstance(value, torch.optim.Optimizer):
            value.register_step_post_hook(lambda *_: stepped.append(True))

    def log(step, metrics):
        values = {k: round(v, 6) for k, v in ({"seconds": record["seconds"]} | metrics).items()}
        append_log(path.parent, {"stage": model.kind, "step": step, **values})

    def save(step):
        state = {name: value.state_dict() for name, value in training.state.items()}
        state["record"] = record
        save_checkpoint(path, model, ema, step, None if step == iters else state)

    bar = tqdm(range(start, iters), model.kind, iters, initial=start, mininterval=1)
    with held_signals() as signals:
        for step in bar:
            began = time.perf_counter()
            stepped.clear()
            try:
                metrics = update(step)
                record["seconds"] += time.perf_counter() - began
                if step % max(1, iters // 200) == 0 or step == iters - 1:
                    bar.set_postfix({k: f"{v:.3g}" for k, v in list(metrics.items())[:3]})
                    log(step, metrics)
                tenth_is_over = (step + 1) * 10 // iters > step * 10 // iters
                if measure and tenth_is_over:
                    values = measure(ema)
                    log(step, values)
                    if values.get("progress", math.inf) < record["lowest"]:
                        weights = deepcopy(ema.state_dict())
                        record |= {"lowest": values["progress"], "weights": weights}
            except NonFinite as error:
                if not stepped and step > saved:
                    save(step)
                    saved = step
                good = f"{path} holds the good weights after {saved} steps, and --resume"
                raise NonFinite(
                    f"{model.kind}, step {step}: {error}{non_finite_tensors(training)}. "
                    f"{good if saved else 'Nothing was saved; the same command'} repeats what led "
                    "here. If training diverged, start afresh in another --out with a lower "
                    "learning rate"
                ) from None
            if step + 1 == iters and record["weights"]:
                ema.load_state_dict(record["weights"])
            stop = agreed(signals[0] if signals else 0, model.device)
            if (step + 1) % every == 0 or step + 1 == iters or stop:
                save(step + 1)
                saved = step + 1
            if stop:
                agreed(stop, model.device)  # no process ends before the file is written
                where = f"{model.kind} is saved in {path} after {saved} steps"
                raise Stopped(stop, f"{where}; the same command with --resume continues")
        if signals:  # while the last file was written
            where = f"{model.kind} is complete in {path}"
            raise Stopped(signals[0], f"{where}; the same command with --resume continues")
    return ema


class Stopped(KeyboardInterrupt):
    """args: the signal that stopped a script, and what becomes of its work."""


@contextmanager
def held_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are noted in the list, for a training step to be finished and saved; the
    same one once more stops at once, where torchrun does not pass on what all had got already."""
    noted = []

    def note(number, _):
        if number in noted and not dist.is_initialized():
            raise Stopped(number, "at once, by the second signal; --resume repeats a few steps")
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield noted
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def non_finite_tensors(training) -> str:
    """Names of the weights and gradients that are not finite, for a message."""
    networks = {"": training.model} | {
        f"{name}.": network
        for name, network in training.state.items()
        if isinstance(network, nn.Module)
    }
    names = []
    for prefix, network in networks.items():
        for name, p in network.named_parameters():
            if not p.isfinite().all():
                names.append(prefix + name)
            elif p.grad is not None and not p.grad.isfinite().all():
                names.append(f"the gradient of {prefix}{name}")
    return f" ({some(names, 3)})" if names else ""


def restore(training, path, record: dict, iters: int) -> int:
    """Put the checkpoint at `path` into `training` and `record`; returns the step to go on with.
    InputError if it does not fit them."""
    content = read_checkpoint(path, training.model.kind)
    step, state = content["step"], content["training"]
    if step > iters or (state is None) != (step == iters):
        raise InputError(f"{path} is of step {step} of {iters}: --resume cannot go on with it")
    try:
        load_state(training.model, content["model"])
        load_state(training.ema, content["model_ema"])
        if state is not None:
            check_alike(dict.fromkeys([*training.state, "record"]), dict.fromkeys(state))
            weights = training.ema.state_dict() if state["record"]["weights"] else {}
            check_alike(record | {"weights": weights}, state["record"])
            record.update(state["record"])
            for name, value in training.state.items():
                load_state(value, state[name])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not of this training, or of another version of torch: --resume cannot go "
            f"on with it ({str(error).splitlines()[0]})"
        ) from None
    return step


def load_state(value, saved) -> None:
    """value.load_state_dict(saved), of a network, an optimiser or a schedule of its rates;
    ValueError if `saved` has another form."""
    form = value.state_dict()
    if isinstance(value, torch.optim.Optimizer):  # which adds averages of gradients as it steps
        parameters = [p for group in value.param_groups for p in group["params"]]
        if len({frozenset(entries) for entries in saved["state"].values()}) > 1:
            raise ValueError("an optimiser that keeps less of some parameters than of others")
        form["state"] = {
            i: {key: torch.zeros(()) if key == "step" else parameters[i] for key in entries}
            for i, entries in saved["state"].items()
        }
    check_alike(form, saved)
    for own, group in zip(form.get("param_groups", []), saved.get("param_groups", [])):
        if own["params"] != group["params"]:
            raise ValueError("an optimiser of other parameters")
    value.load_state_dict(saved)


def check_alike(own, saved) -> None:
    """ValueError unless `saved` has the keys, types and shapes of `own`, and finite tensors."""
    if isinstance(own, dict):
        alike = isinstance(saved, dict) and own.keys() == saved.keys()
        pairs = [(own[key], saved[key]) for key in own] if alike else []
    elif isinstance(own, (list, tuple)):
        alike = isinstance(saved, (list, tuple)) and len(own) == len(saved)
        pairs = zip(own, saved) if alike else []
    elif torch.is_tensor(own):
        alike = torch.is_tensor(saved) and own.shape == saved.shape and saved.isfinite().all()
        pairs = []
    else:
        alike, pairs = isinstance(saved, type(own)), []
    if not alike:
        raise ValueError(f"an unexpected {type(saved).__name__}")
    for pair in pairs:
        check_alike(*pair)


def locked(file) -> bool:
    """Lock an open file for this process, if no other one holds it: whether that is so. The lock
    ends with the process, however that ends."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # else: a disk without locks
    return True


LOCKS = {}  # {folder: its open lock file}, of this process


def claim(out: Path) -> None:
    """Make this process the only one that trains in the folder `out`, for as long as it lives;
    InputError if another one does."""
    if rank():
        return
    place = out.resolve()
    if place in LOCKS:
        LOCKS.pop(place).close()
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a")
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}") from None
    if not locked(file):
        raise InputError(f"another run is at work in --out {out}: wait for it, or stop it first")
    LOCKS[place] = file


def read_log(out) -> list[dict]:
    """The lines of out/log.jsonl, but for one cut short by a power failure; none if there is no
    such file."""
    path, lines = Path(out) / "log.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def append_log(out, line: dict) -> None:
    """One more line in out/log.jsonl."""
    path = Path(os.devnull if rank() else Path(out) / "log.jsonl")
    try:
        with open(path, "a") as file:
            file.write(as_json(line) + "\n")
            file.flush()
            if not rank():
                os.fsync(file.fileno())  # on the disk before the checkpoint that comes after it
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def trim_log(out, stage: str, start: int) -> None:
    """Take from out/log.jsonl the lines of a stage from step `start` on, which it logs again."""
    lines = read_log(out)
    kept = [line for line in lines if line["stage"] != stage or line["step"] < start]
    if (Path(out) / "log.jsonl").exists():
        write_text(Path(out) / "log.jsonl", "".join(as_json(line) + "\n" for line in kept))


def write_text(path, text: str) -> None:
    with writing(path) as file:
        file.write(text.encode())


def as_json(value, **options) -> str:
    """JSON, in which a number that is infinite or NaN is null."""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(v) for key, v in value.items()}
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    return json.dumps(finite(value), allow_nan=False, **options)


def train_teacher(settings: Settings, data: Data, out, device, resume=False) -> MAR:
    """A teacher from random weights, written to out/teacher.pt."""
    torch.manual_seed(settings.seed)
    training = TeacherTraining(settings, data.classes, device, data.learned.channels)

    def update(step):
        generator = rng(settings.seed, "teacher", step)
        images, labels = data.learned.batch(settings.batch, generator, device, settings.flip)
        return training.update(step, to_tokens(images, settings), labels, generator)

    return train(training, update, Path(out) / "teacher.pt", settings.teacher_iters, resume)


def train_student(training: Distillation, data: Data, out, resume=False, measure=None) -> MAR:
    """A student by `training`, written to out/student.pt; the best by measure's `progress`."""
    settings, device = training.model.settings, training.model.device

    def update(step):
        generator = rng(settings.seed, "gsim", step)
        images, labels = data.learned.batch(settings.batch, generator, device, settings.flip)
        return training.update(step, to_tokens(images, settings), labels, generator)

    path = Path(out) / "student.pt"
    return train(training, update, path, settings.gsim_iters, resume, measure)


def train_policy(
    student: MAR, settings: Settings, quality, data: Data, out, resume=False, measure=None
) -> PolicyGradient:
    """RL on the student, written to out/policy.pt; returns the training, whose `model` is the
    policy and whose `reference` is the policy at its start.

    At the end the schedule learns alone, what suits the generator as it has become: from the
    rollouts of four times the prompts, at a learning rate that falls to 0."""
    torch.manual_seed(settings.seed)
    method = {"grpo": PolicyGradient, "backprop": RewardBackpropagation}[settings.method]
    occurring, mean = data.labels, mean_image(data, settings).to(student.device)

    def quality_of_made(made, labels):
        return quality(data.decode(made), labels)

    training = method(student, settings, quality_of_made, mean)
    last = settings.schedule_iters if training.model.schedule is not None else 0

    def update(step):
        alone = step - settings.rl_iters  # updates of the schedule alone before this one
        prompts = settings.prompts if alone < 0 else 4 * settings.prompts
        generator = rng(settings.seed, "rl", step)
        index = torch.randint(len(occurring), (prompts,), generator=generator)
        labels, seed = occurring[index].to(student.device), (settings.seed, "rollout", step)
        if alone < 0:
            return training.update(labels, seed)
        lr = settings.schedule_lr * (1 - alone / last)
        training.optimizers["schedule"].param_groups[0]["lr"] = lr
        return training.update_schedule_alone(labels, seed)

    iters = settings.rl_iters + last
    train(training, update, Path(out) / "policy.pt", iters, resume, measure, every=25)
    training.model.eval()
    return training


def mean_image(data: Data, settings: Settings) -> Tensor:
    """Tokens of the mean training image [1, L, D], which the information gain subtracts."""
    return to_tokens(data.learned.spaced().mean(0, keepdim=True), settings)


# 14 Reward network --------------------------------------------------------------------------------
# Two networks of different architecture, seed and data. The reward network is what RL climbs unless
# --reward says otherwise; the judge writes the reports, and nothing trains on it. Both learn from
# real images alone, to tell their classes and what was done to them: an image is whole, or damaged
# in one of four ways. To see these a network must look at edges, at structure, and at what belongs
# together. The two share no kind of damage.


def blurred(x: Tensor, amount: Tensor, partner: Tensor, patch: int, generator) -> Tensor:
    """x, mixed with itself seen through a binomial kernel, wider for larger images."""
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
    chosen = torch.rand(tokens.shape[:2], generator=generator).to(x.device)
    chosen = chosen < 0.1 + 0.4 * amount.flatten(1)
    return unpatchify(torch.where(chosen[..., None], patchify(partner, patch), tokens), patch)


def shuffled(x: Tensor, amount: Tensor, partner: Tensor, patch: int, generator) -> Tensor:
    """x with 10 to 50 % of its patches in each other's places: those that random keys move."""
    tokens = patchify(x, patch)
    L = tokens.shape[1]
    keys = torch.rand(tokens.shape[:2], generator=generator).to(x.device)
    moves = torch.rand(tokens.shape[:2], generator=generator).to(x.device)
    moves = moves < 0.1 + 0.4 * amount.flatten(1)
    # the places that move, in their own order and in that of their keys; the others come last, in
    # their own order in both, and stay
    places = torch.arange(L, device=x.device).expand(len(x), L)
    from_here = torch.where(moves, places, L).argsort(dim=1, stable=True)
    to_there = torch.where(moves, keys, 2.0).argsort(dim=1, stable=True)
    source = places.scatter(1, from_here, to_there)
    return unpatchify(tokens.gather(1, source[..., None].expand_as(tokens)), patch)


def torn(x: Tensor, amount: Tensor, partner: Tensor, patch: int, generator) -> Tensor:
    """x with a band of rows, or of columns, shifted by up to a third of the image."""
    if torch.rand(1, generator=generator) < 0.5:
        return torn_rows(x.mT, amount, generator).mT
    return torn_rows(x, amount, generator)


def torn_rows(x: Tensor, amount: Tensor, generator) -> Tensor:
    B, _, H, W = x.shape
    first, height = (H / 2 * torch.rand(2, B, 1, generator=generator)).to(x.device)
    rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    in_band = (rows >= first) & (rows < first + 2 + height)  # [B, H]
    shift = in_band * (1 + amount.flatten(1) * W / 3).long()
    source = (columns - shift[..., None]) % W  # [B, H, W]
    return x.gather(3, source[:, None].expand_as(x))


def pasted(x: Tensor, amount: Tensor, partner: Tensor, patch: int, generator) -> Tensor:
    """x with a square of the partner's at the same place, 30 to 70 % wide."""
    B, _, H, W = x.shape
    side = 0.3 + 0.4 * amount.flatten(1)
    top, left = torch.rand(2, B, 1, generator=generator).to(x.device) * (1 - side)
    rows = (torch.arange(H, device=x.device) + 0.5) / H
    columns = (torch.arange(W, device=x.device) + 0.5) / W
    in_rows = (rows >= top) & (rows < top + side)  # [B, H]
    in_columns = (columns >= left) & (columns < left + side)
    return torch.where((in_rows[:, :, None] & in_columns[:, None])[:, None], partner, x)


def pixelated(x: Tensor, amount: Tensor, partner: Tensor, patch: int, generator) -> Tensor:
    """x, mixed with itself in coarse pixels."""
    side = max(2, x.shape[-1] // 16)
    coarse = F.interpolate(F.avg_pool2d(x, side), x.shape[-2:], mode="nearest")
    return x + (0.2 + 0.8 * amount) * (coarse - x)


def speckled(x: Tensor, amount: Tensor, partner: Tensor, patch: int, generator) -> Tensor:
    """x with 1 to 11 % of its pixels in random colours."""
    colours = 2 * torch.rand(x.shape, generator=generator).to(x.device) - 1
    hit = torch.rand(x[:, :1].shape, generator=generator).to(x.device) < 0.01 + 0.1 * amount
    return torch.where(hit, colours, x)


REWARD_DAMAGE = (blurred, noisy, swapped, shuffled)
JUDGE_DAMAGE = (torn, pasted, pixelated, speckled)


def partners(labels: Tensor, generator) -> Tensor:
    """For every image one of the same class, drawn at random: indices [B] of labels [B]."""
    random_order = torch.randperm(len(labels), generator=generator).to(labels.device)
    own = labels.argsort(stable=True)
    other = random_order[labels[random_order].argsort(stable=True)]  # sorted by class like `own`
    return torch.empty_like(own).scatter(0, own, other)


def damage(
    x: Tensor, labels: Tensor, patch: int, generator, kinds=REWARD_DAMAGE
) -> tuple[Tensor, Tensor]:
    """x [B, 3, H, W] in [-1, 1] with about half of the images damaged by a random amount, and what
    was done [B]: 0 nothing, else 1 + the place among `kinds`. patch: side of a patch, in pixels."""
    B, device, n = len(x), x.device, len(kinds)
    kind = (torch.randint(2 * n, (B,), generator=generator) - n + 1).clamp(min=0).to(device)
    amount = torch.rand(B, 1, 1, 1, generator=generator).to(device)
    partner = x[partners(labels, generator)]
    versions = [x, *(make(x, amount, partner, patch, generator) for make in kinds)]
    damaged = torch.stack(versions)[kind, torch.arange(B, device=device)].clamp(-1, 1)
    changed = (damaged != x).flatten(1).any(1)  # swapped with itself is not damaged
    return damaged, kind * changed


def patch_in_pixels(images: Tensor, settings: Settings) -> int:
    """Side of a token in these images, which may be larger than the latents that were cut."""
    return settings.patch * images.shape[-1] // settings.image_size


class Critic(nn.Module):
    """images [B, 3, S, S] in [-1, 1] -> features [B, 64], logits of the classes [B, classes] and of
    what was done to the image [B, 5] (0: nothing); `reward` or `judge`.

    Convolutions halve the image until it is 4 pixels wide, then comes a dense layer. No layer of
    the two networks is alike."""

    def __init__(self, name: str, size: int, classes: int):
        super().__init__()
        stem, width, stem_kernel, kernel, activation = {
            "reward": (32, 64, 3, 3, nn.ReLU),
            "judge": (48, 48, 5, 4, nn.GELU),
        }[name]
        layers = [nn.Conv2d(3, stem, stem_kernel, padding=stem_kernel // 2), activation()]
        channels = stem
        while size > 4:
            layers.append(nn.Conv2d(channels, width, kernel, stride=2, padding=1))
            layers += [nn.GroupNorm(8, width), activation()]
            channels, size = width, size // 2
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, 64)]
        self.body = nn.Sequential(*layers, activation())
        self.classify = nn.Linear(64, classes)
        self.kinds = REWARD_DAMAGE if name == "reward" else JUDGE_DAMAGE
        self.detect = nn.Linear(64, 1 + len(self.kinds))
        self.odds = 1.0  # factor on the odds of quality, see `calibrate`

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # colours that no image has must not pay; 64 at once if they are of 256 x 256 pixels
        parts = images.clamp(-1, 1).split(max(1, 2**22 // images[0, 0].numel()))
        features = torch.cat([self.body(part) for part in parts])
        return features, self.classify(features), self.detect(features)

    def quality(self, images: Tensor, labels: Tensor) -> Tensor:
        """p(its class) p(undamaged) in (0, 1] [B], its odds times `odds`; differentiable in the
        pixels."""
        _, classes, damage = self(images)
        p_class = classes.softmax(-1).gather(1, labels[:, None]).squeeze(1)
        p = p_class * damage.softmax(-1)[:, 0]
        return self.odds * p / (1 + (self.odds - 1) * p)

    @torch.no_grad()
    def calibrate(self, images: Tensor, labels: Tensor) -> None:
        """Choose `odds` such that half of these images, a generator's, have a quality above 0.5,
        if it is fewer: a reward that gives all of them nothing cannot tell them apart."""
        self.odds = 1.0
        p = torch.cat([self.quality(*part) for part in zip(images.split(256), labels.split(256))])
        median = p.median().clamp(1e-6, 0.5)
        self.odds = float((1 - median) / median)


def train_critic(name: str, split: Split, settings: Settings, device) -> Critic:
    """The network `name` (reward or judge) trained on the images of `split`, frozen."""
    torch.manual_seed(zlib.crc32(f"{name} {settings.seed}".encode()))
    classes = int(split.labels.max()) + 1  # some may not occur, where a checkpoint knows more
    critic = Critic(name, split.size, classes).to(device)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=settings.judge_iters)
    for step in tqdm(range(settings.judge_iters), name, leave=False):
        generator = rng(settings.seed, name, step)
        x, labels = split.batch(128, generator, device, settings.flip)
        x, kind = damage(x, labels, patch_in_pixels(x, settings), generator, critic.kinds)
        _, class_logits, damage_logits = critic(x)
        loss = F.cross_entropy(class_logits, labels) + F.cross_entropy(damage_logits, kind)
        descend([loss], optimizer)
        rate.step()
    return critic.eval().requires_grad_(False)


# 15 Judge -----------------------------------------------------------------------------------------
# What reports are written by. FID's formula and the k-nearest-neighbour precision and recall, on
# the features of a network that nothing trains on: the judge's own, or a pretrained one. It is
# examined first, for a judge that does not see a fault passes no sentence on it.


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) of features a [N, F], b [M, F].

    FID's formula, in float64. With S_a = A^T A, A being centred and divided by sqrt(N - 1), the
    last trace is the sum of the singular values of A B^T, or of their QR factors, which are small
    where there are fewer images than features, and where there are more."""
    a, b = a.cpu().double(), b.cpu().double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise NonFinite("features of images are infinite or NaN")
    A, B = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    R_A, R_B = (torch.linalg.qr(X, mode="r").R for X in (A, B))
    cross = torch.linalg.svdvals(R_A @ R_B.T).sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + A.square().sum() + B.square().sum() - 2 * cross)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of `fake` features [M, F] inside the manifold of `real` [N, F], and of real inside
    fake's (1904.06991). A manifold is a union of balls, each reaching to its centre's k-th nearest
    neighbour."""

    def reach(points):
        nearest_first = torch.cdist(points, points).sort(1).values  # the nearest one is itself
        return nearest_first[:, min(k, len(points) - 1)]

    def share_inside(points, manifold):
        return float((torch.cdist(points, manifold) <= reach(manifold)).any(1).float().mean())

    return share_inside(fake, real), share_inside(real, fake)


def diversity(features: Tensor, labels: Tensor) -> float:
    """Mean distance between two images of a class in feature space, averaged over the classes."""
    within = [F.pdist(features[labels == y].cpu()).mean() for y in labels.unique()]
    return float(torch.stack(within).nanmean())


class Judge:
    """Judges n class-balanced images of the classes `labels` [n].

    Every set of images is compared with several draws of n real held-out images, and the row `real`
    compares each of these draws with as many other real images. embed: pretrained features, a
    function of images [B, 3, S, S] in [-1, 1] -> [B, F], in place of the judge's own; the class
    accuracy is the judge's own in any case.

    `examination` is {kind of damage: (weak, strong)}, the Fréchet distances of held-out images that
    were damaged in ways that the judge did not learn from; `blind`, the kinds that it does not
    order, real images below weak damage below strong."""

    def __init__(
        self, data: Data, settings: Settings, device, embed: Callable | None = None, draws: int = 5
    ):
        self.critic = train_critic("judge", data.judge, settings, device)
        self.embed, self.device, self.decode = embed, device, data.decode
        self.halves = [
            data.test.balanced_halves(settings.judge_n, rng(settings.seed, "halves", i))
            for i in range(draws)
        ]
        self.labels = self.halves[0][0].labels.to(device)
        self.references = [self.features(half.images)[0] for half, _ in self.halves]
        real = self.real_row()
        self.examination = self.examine(settings)
        self.blind = [
            name
            for name, (weak, strong) in self.examination.items()
            if not real["frechet"] < weak < strong or strong < real["frechet"] + real["frechet_std"]
        ]
        print(self.report_examination(real))

    @property
    def real_images(self) -> Tensor:
        """The first draw of real images [n, 3, S, S] in [-1, 1], of the classes `labels`."""
        return to_unit(self.halves[0][0].images)

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, F] and class logits of images in [-1, 1], or of bytes."""
        if images.dtype == torch.uint8:
            images = to_unit(images)
        features, logits = [], []
        for part in images.split(512):
            own, classes, _ = self.critic(part.to(self.device))
            features.append(self.embed(part.to(self.device)) if self.embed else own)
            logits.append(classes)
        return torch.cat(features), torch.cat(logits)

    def __call__(self, images: Tensor) -> dict[str, float]:
        """The row of images [n, 3, S, S]: class accuracy; frechet and its std over the draws;
        precision, recall and within-class diversity (1: as diverse as real images)."""
        return self.row([self.features(images)] * len(self.references))

    def real_row(self) -> dict[str, float]:
        """The row of real against real: what a perfect generator would get."""
        return self.row([self.features(other.images) for _, other in self.halves])

    def row(self, views) -> dict[str, float]:
        """The row of [(features, logits), ...], one for each reference draw."""
        pairs = zip(views, self.references)
        distances = torch.tensor([frechet_distance(f, reference) for (f, _), reference in pairs])
        hits = torch.stack([(logits.argmax(1) == self.labels).float() for _, logits in views])
        features, real = views[0][0], self.references[0]
        precision, recall = precision_recall(real, features)
        real_diversity = max(diversity(real, self.labels), 1e-12)
        return {
            "accuracy": float(hits.mean()),
            "frechet": float(distances.mean()),
            "frechet_std": float(distances.std()),
            "precision": precision,
            "recall": recall,
            "diversity": diversity(features, self.labels) / real_diversity,
        }

    def examine(self, settings: Settings) -> dict[str, tuple[float, float]]:
        """Distances of real images that are in no first draw, after every REWARD_DAMAGE."""
        half = self.halves[0][1]
        x, patch = to_unit(half.images), patch_in_pixels(half.images, settings)
        partner = x[partners(half.labels, rng(settings.seed, "partners"))]

        def distance(make, strength):
            amount = torch.full((len(x), 1, 1, 1), strength)
            images = make(x, amount, partner, patch, rng(settings.seed, make.__name__))
            features, _ = self.features(images.clamp(-1, 1))
            return sum(frechet_distance(features, r) for r in self.references) / len(self.halves)

        return {
            make.__name__: (distance(make, 0.25), distance(make, 1.0)) for make in REWARD_DAMAGE
        }

    def report_examination(self, real: dict[str, float]) -> str:
        """The examination in words."""
        kinds = [f"{name} {a:.2f}, {b:.2f}" for name, (a, b) in self.examination.items()]
        verdict = "it sees them all"
        if self.blind:
            verdict = f"it is BLIND to {', '.join(self.blind)}: its distances say nothing of that"
        return (
            f"the judge's examination on damaged real images, weakly and strongly: "
            f"{' · '.join(kinds)}; undamaged {real['frechet']:.2f} ± {real['frechet_std']:.2f}: "
            f"{verdict}"
        )


class Pictures(torch.utils.data.Dataset):
    """uint8 [3, size, size] of images in [-1, 1] [N, 3, size, size], or of all in a folder and its
    sub-folders, resized and centre-cropped. InputError if there are none."""

    def __init__(self, source: Tensor | str | Path, size: int):
        self.size, self.source = size, source
        if not torch.is_tensor(source):
            files = sorted(Path(source).rglob("*"))
            self.source = [path for path in files if path.suffix.lower() in EXTENSIONS]
        if len(self.source) == 0:
            raise InputError(f"there are no images in {source}")

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        if torch.is_tensor(self.source):
            return ((self.source[i].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return middle_square(read_rgb(self.source[i]), self.size)


def fid_report(real: str | Path, images: Tensor | str | Path, size: int = 256) -> dict[str, float]:
    """FID of `images` to a folder of real ones, and their Inception Score with its std.

    images: [N, 3, size, size] in [-1, 1], or a folder. Needs maskrl[fid], which downloads its
    Inception weights at the first call.

    What papers on ImageNet report: 50,000 images, 50 of each of the 1000 classes, against all
    1,281,167 training images, resized to 256 on the short side and cropped to the centre; the
    Inception Score in 10 parts. As 50,000 images fit no memory, write them to files by

        for i in $(seq 50); do
            python sample.py mar_b.pth --vae kl16.ckpt --n 1000 --seed $i --files pictures/$i
        done

    FID falls with the number of images: compare like with like.
    InputError if torch-fidelity or its weights are not there."""
    try:
        import torch_fidelity
    except ImportError:
        raise InputError("FID needs torch-fidelity: pip install maskrl[fid]") from None
    generated, given = Pictures(images, size), Pictures(real, size)
    try:
        values = torch_fidelity.calculate_metrics(
            input1=generated,
            input2=given,
            isc=True,
            fid=True,
            cuda=torch.cuda.is_available(),
            verbose=False,
        )
    except URLError as error:
        raise InputError(
            f"FID: torch-fidelity's Inception weights could not be downloaded ({error}); without a "
            f"network, put their file into {torch.hub.get_dir()}/checkpoints"
        ) from None
    return {
        "fid": values["frechet_inception_distance"],
        "inception_score": values["inception_score_mean"],
        "inception_score_std": values["inception_score_std"],
    }


def view_filters(size: int) -> Tensor:
    """Three filters [6, 3, side, side] that average a colour over a cell of an 8x8 grid, and three
    random ones of the same norm."""
    side = max(1, size // 8)
    average = torch.eye(3)[:, :, None, None].expand(3, 3, side, side) / side**2
    random = torch.randn(average.shape, generator=rng("views"))
    random = random / random.flatten(1).norm(dim=1)[:, None, None, None] / side
    return torch.cat([average, random])


class Progress:
    """A yardstick for training that is not the judge: Fréchet distances to training images, of n
    images of fixed labels, order and noise.

    `reward_features` is taken on the reward network's features, `progress` on views of the pixels.
    Weights are kept by the latter: the former prefers clean images that are all alike to diverse
    ones. A view has, for each cell of a grid of 8x8, the average colour and three fixed random
    projections of all its pixels, so that noise and seams count, wherever they are."""

    def __init__(self, critic: Critic, data: Data, settings: Settings, device, n: int = 1024):
        self.critic, self.settings, self.decode = critic, settings, data.decode
        evenly = torch.linspace(0, len(data.train) - 1, n).long()
        self.labels = data.train.labels[evenly].to(device)  # every class in its share
        self.filters = view_filters(data.train.size).to(device)
        views = [self.views(x.to(device)) for x in data.train.spaced().split(512)]
        self.reference = [torch.cat(parts) for parts in zip(*views)]

    @torch.no_grad()
    def views(self, images: Tensor) -> tuple[Tensor, Tensor]:
        view = F.conv2d(images, self.filters, stride=self.filters.shape[-1])
        return view.flatten(1), self.critic(images)[0]

    def __call__(self, model: MAR, sampling: Sampling | None = None) -> dict[str, float]:
        sampling = replace(sampling or Sampling(), order="random")  # the masks of training
        parts = [
            generate(model, y, sampling, seed=(self.settings.seed, "progress", i))
            for i, y in enumerate(self.labels.split(256))
        ]
        views = self.views(self.decode(to_images(torch.cat(parts), self.settings)))
        distances = [frechet_distance(a, b) for a, b in zip(views, self.reference)]
        return {"progress": distances[0], "reward_features": distances[1]}


class Watch:
    """What RL logs of a model, on fixed noise without exploration: `quality_mean`, the trained
    reward; and, to expose reward hacking, `held_out`, a reward that is not trained on (if there is
    one), and `judge`, the judge's Fréchet distance. n is small: compare within a run."""

    def __init__(self, settings: Settings, quality, held_out, judge: Judge, n: int = 512):
        evenly = torch.linspace(0, len(judge.labels) - 1, min(n, len(judge.labels))).long()
        self.labels = judge.labels[evenly]
        self.settings, self.quality, self.held_out, self.judge = settings, quality, held_out, judge

    @torch.no_grad()
    def __call__(self, model: MAR) -> dict[str, float]:
        tokens = generate(model, self.labels, seed=(self.settings.seed, "watch"))
        images = self.judge.decode(to_images(tokens, self.settings))
        features, _ = self.judge.features(images)
        values = {
            "quality_mean": float(self.quality(images, self.labels).mean()),
            "judge": frechet_distance(features, self.judge.references[0]),
        }
        if self.held_out:
            values["held_out"] = float(self.held_out(images, self.labels).mean())
        return values


# 16 Rewards ---------------------------------------------------------------------------------------
# What --reward may name: a function quality(images [B, 3, S, S] in [-1, 1], labels [B]) -> [B] in
# [0, 1]. Of the ready-made ones all are differentiable in the pixels.


class ShapeFit:
    """--reward fit: how well an image is *some* shape of its class, exp(-e / 0.04) in (0, 1].

    e is the root mean square difference, in units of the pixels' 0...1, to the nearest of 4,851
    shapes of the right form and colour (21 x 21 centres, 11 radii), each on the flat dark grey that
    suits the image best, found in closed form. Nothing is learned."""

    def __init__(self, size: int, device="cpu"):
        centre = 0.5 + 0.1 * torch.linspace(-1, 1, 21, device=device)
        radius = torch.linspace(0.22, 0.32, 11, device=device)
        x, y, r = torch.cartesian_prod(centre, centre, radius).T
        self.masks = shape_masks(x, y, r, size).flatten(2).permute(1, 2, 0)  # [3, pixels, 4851]
        self.paint = torch.tensor(list(COLOURS.values()), device=device) / 255

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        pixels = (images.clamp(-1, 1) + 1).flatten(2) / 2  # [B, 3, pixels]
        e = torch.zeros(len(images), device=images.device)
        for form, masks in enumerate(self.masks):
            rows = (labels % 3 == form).nonzero().squeeze(1)
            paint = self.paint[labels[rows] // 3][:, :, None]  # [b, 3, 1]
            error = self.squared_error(pixels[rows], masks, paint)  # [b, 4851]
            e = e.index_put((rows,), error.min(1).values.clamp(min=1e-8).sqrt())
        return torch.exp(-e / 0.04)

    @staticmethod
    def squared_error(x, m, paint):
        """Mean of |x - (m paint + (1 - m) background)|^2 [b, n] for pixels x [b, 3, p], masks m
        [p, n] and paint [b, 3, 1], at the background in 0...0.2 that makes it least."""
        ones = torch.ones_like(m[:, :1])
        outside = x @ (ones - m)  # sum of (1 - m) x, [b, 3, n]
        mixed = (m * (1 - m)).sum(0)  # [n]
        outside_area = (1 - m).square().sum(0)
        background = ((outside - paint * mixed) / outside_area).clamp(0, 0.2)
        error = (
            x.square().sum(2, keepdim=True)
            - 2 * paint * (x @ m)
            + paint**2 * m.square().sum(0)
            - 2 * background * (outside - paint * mixed)
            + background**2 * outside_area
        )
        return error.sum(1) / (3 * len(m))


def named_function(option: str, name: str) -> Callable:
    """What an option names as module:function, the module being installed or in the folder one is
    in; InputError if there is no such function."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, function = name.split(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:
        raise InputError(f"{option} {name}: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise InputError(f"{option} {name}: {function} is a {type(found).__name__}, not a function")
    return found


def names_function(name: str) -> bool:
    """Whether `name` has the form module:function."""
    module, _, function = name.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def clip_pixels(images: Tensor, size, mean, std, interpolation="bicubic", **_) -> Tensor:
    """Square images [B, 3, S, S] in [-1, 1] as CLIP takes them [B, 3, side, side].

    open_clip's own transform, in tensors; the keywords are those of its preprocess_cfg."""
    side = size if isinstance(size, int) else min(size)
    x = (images + 1) / 2
    # first the width, then the height: bicubic overshoots, and PIL clips after each
    for shape in ((x.shape[-2], side), (side, side)):
        x = TF.resize(x, shape, TF.InterpolationMode(interpolation), antialias=True).clamp(0, 1)
    return TF.normalize(x, mean, std)


@dataclass
class ClipOptions:
    """Which CLIP --reward clip and --features clip ask, and what; from the command line alone."""

    model: str = "ViT-B-32"
    weights: str = "laion2b_s34b_b79k"
    prompt: str = "a high-quality and harmonious picture of {class}"


def load_clip(options: ClipOptions, classes: list[str], device) -> tuple[nn.Module, Tensor]:
    """open_clip's model and its tokenised prompts, one per class; InputError says what is wrong."""
    try:
        import open_clip
    except ImportError:
        raise InputError("clip needs open_clip: pip install open_clip_torch") from None
    name, weights = options.model, options.weights
    if name not in open_clip.list_models():
        raise InputError(
            f"--clip-model {name}: open_clip has no such model; "
            "open_clip.list_models() has their names"
        )
    is_file = os.path.isfile(weights)
    known = open_clip.list_pretrained_tags_by_model(name)
    if not is_file and weights not in known:
        raise InputError(
            f"--clip-weights {weights}: neither a file nor weights that open_clip has "
            f"for {name}: {', '.join(known[:6]) or 'none'}"
        )
    logging.disable()  # downloads complain at length; here is one line for all of it
    try:
        source = os.path.abspath(weights) if is_file else weights
        model = open_clip.create_model(name, source, device=device).eval().requires_grad_(False)
        texts = [options.prompt.replace("{class}", c.replace("_", " ")) for c in classes]
        return model, open_clip.get_tokenizer(name)(texts)
    except Exception as error:
        failure = (
            f"loaded safely as weights of --clip-model {name}"
            if is_file
            else "downloaded; without a network, give a file of weights"
        )
        raise InputError(
            f"--clip-weights {weights} could not be {failure} ({type(error).__name__})"
        ) from None
    finally:
        logging.disable(logging.NOTSET)


def clip_embedding(clip: nn.Module, images: Tensor) -> Tensor:
    """CLIP's embeddings [B, E], of length 1, of images [B, 3, S, S] in [-1, 1]."""
    embedded = [
        clip.encode_image(clip_pixels(part, **clip.visual.preprocess_cfg), normalize=True)
        for part in images.split(64)
    ]
    return torch.cat(embedded)


def clip_reward(options: ClipOptions, classes: list[str], device) -> Callable:
    """--reward clip: (1 + c) / 2, c the cosine of CLIP's embeddings of the image and of the prompt
    with its class's name."""
    clip, prompts = load_clip(options, classes, device)
    parts = [clip.encode_text(part, normalize=True) for part in prompts.to(device).split(256)]
    text = torch.cat(parts)  # [classes, E]

    def quality(images, labels):
        return (1 + (clip_embedding(clip, images) * text[labels]).sum(-1)) / 2

    return quality


# Pretrained features, for the judge.


def pretrained_features(name: str, clip: ClipOptions, device) -> Callable | None:
    """The features that --features asks for, images [B, 3, S, S] in [-1, 1] -> [B, F]: None for
    `own`, CLIP's for `clip`, those before the last layer of a torchvision model for its FILE of
    weights, or a function of the user's for module:function.

    InputError unless they are finite numbers and images differ in them."""
    if name == "own":
        return None
    if name == "clip":
        embed = partial(clip_embedding, load_clip(clip, [], device)[0])
    elif os.path.exists(name):
        embed = torchvision_features(Path(name), device)
    elif names_function(name):
        embed = named_function("--features", name)
    else:
        raise InputError(
            f"--features {name}: expected own, clip, module:function, or a file of a torchvision "
            "model's weights that is called as torchvision calls it, such as resnet50-11ad3fa6.pth"
        )
    x = torch.rand(4, 3, 32, 32, generator=rng("features")).to(device) * 2 - 1
    try:
        with torch.no_grad():
            found = embed(x)
    except Exception as error:
        raise InputError(f"--features {name}: {type(error).__name__}: {error}") from None
    if not torch.is_tensor(found) or found.ndim != 2 or len(found) != 4:
        got = list(found.shape) if torch.is_tensor(found) else type(found).__name__
        raise InputError(f"--features {name} gave {got} for 4 images, not a tensor [4, F]")
    if not found.isfinite().all() or torch.equal(found[0], found[1]):
        raise InputError(f"--features {name}: not finite, or the same for different images")
    return embed


def torchvision_features(path: Path, device) -> Callable:
    """Features [B, F] of images [B, 3, S, S] before the last layer of the torchvision model that
    the file of weights is named after."""
    names = [name for name in torchvision.models.list_models() if path.name.startswith(name)]
    if not names:
        raise InputError(
            f"--features {path}: its name starts with that of no torchvision model; keep the one "
            "that it was downloaded by, such as resnet50-11ad3fa6.pth"
        )
    name = max(names, key=len)
    model = torchvision.models.get_model(name)
    try:
        model.load_state_dict(load_safely(path))
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"--features {path}: not weights of {name}: {reason}") from None
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise InputError(f"--features {path}: {name} has no last layer that could be taken off")
    model.set_submodule(linear[-1], nn.Identity())
    model = model.to(device).eval().requires_grad_(False)
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()

    def embed(images):
        size, mean, std = transform.crop_size, transform.mean, transform.std
        parts = [clip_pixels(part, size, mean, std, "bilinear") for part in images.split(64)]
        return torch.cat([model(part) for part in parts])

    return embed


# From a name to a reward.


def checked_reward(name: str, quality: Callable, images: Tensor, labels: Tensor) -> Callable:
    """`quality` on images clamped to [-1, 1], its answers checked: [B], finite, in [0, 1].

    NonFinite stops training if a check fails. InputError if one already fails on these images
    [B, 3, S, S], labels [B], or if all of them get the same."""

    def check(q, labels, error):
        if not torch.is_tensor(q) or q.shape != labels.shape:
            got = list(q.shape) if torch.is_tensor(q) else type(q).__name__
            raise error(f"--reward {name} gave {got}, not a tensor [{len(labels)}]")
        if not ((q >= 0) & (q < 1 + 1e-4)).all():  # NaN fails too; a little above 1 is rounding
            raise error(
                f"--reward {name} gave values from {q.min():.4g} to {q.max():.4g}; they "
                "must lie in [0, 1]"
            )

    def checked(images, labels, error=NonFinite):
        # no graph for weights that somebody forgot to freeze
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            try:
                q = quality(images.clamp(-1, 1), labels)
            except Exception as problem:
                kind = type(problem).__name__
                raise error(f"--reward {name} raised {kind}: {problem}") from problem
        check(q, labels, error)
        return q.to(images)

    first = checked(images, labels, InputError)
    if first.min() == first.max():
        raise InputError(
            f"--reward {name} gave {first[0]:.4g} for all of {len(first)} images, half "
            "of them damaged: nothing to learn"
        )
    return checked


def check_reward_name(name: str) -> None:
    """InputError unless --reward is one that there can be."""
    if name not in ("embedded", "fit", "clip") and not names_function(name):
        raise InputError(f"--reward {name}: expected embedded, fit, clip or module:function")


def calibrate(critic: Critic, student: MAR, data: Data) -> None:
    """Critic.calibrate on 512 images of the student where RL starts; says what it did, if much."""
    evenly = torch.linspace(0, len(data.train) - 1, 512).long()
    labels = data.train.labels[evenly].to(student.device)
    parts = [
        generate(student, y, seed=(student.settings.seed, "calibrate", i))
        for i, y in enumerate(labels.split(256))
    ]
    critic.calibrate(data.decode(to_images(torch.cat(parts), student.settings)), labels)
    if critic.odds > 1:
        print(
            f"the embedded reward is calibrated: its odds x {critic.odds:.3g} give half of the "
            "student's images a quality above 0.5"
        )


def make_reward(
    name: str,
    settings: Settings,
    data: Data,
    device,
    critic: Critic | None = None,
    clip: ClipOptions | None = None,
) -> Callable:
    """The reward `name` as a checked function; critic: the reward network, for `embedded` alone."""
    check_reward_name(name)
    if name == "fit" and data.name != "shapes":
        raise InputError(
            "--reward fit knows what a perfect image is, which only --data shapes can "
            f"say, not {data.name}"
        )
    if name == "embedded":
        quality = critic.quality
    elif name == "fit":
        quality = ShapeFit(data.train.size, device)
    elif name == "clip":
        names = display_names(data.classes, data.names)
        quality = clip_reward(clip or ClipOptions(), names, device)
    else:
        quality = named_function("--reward", name)
    generator = rng(settings.seed, "reward check")
    x, labels = data.train.batch(32, generator, device)
    x, _ = damage(x, labels, patch_in_pixels(x, settings), generator)  # a reward tells them apart
    quality = checked_reward(name, quality, x, labels)
    if settings.method == "backprop":
        if not quality(x.clone().requires_grad_(), labels).requires_grad:
            raise InputError(
                f"--method backprop: the reward {name} gives no gradient in the pixels"
            )
    return quality


# 17 Report and pictures ---------------------------------------------------------------------------
# One table by the judge, metrics.json, and the pictures.


def picture(images: Tensor, columns: int, pixels: int = 64, padding: int = 4) -> Image.Image:
    """A grid of images [N, 3, S, S] in [-1, 1], small ones enlarged to about `pixels`."""
    scale = max(1, round(pixels / images.shape[-1]))
    images = images.clamp(-1, 1).cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid((images + 1) / 2, columns, padding=padding, pad_value=1.0)
    return TF.to_pil_image((grid * 255).round().to(torch.uint8))


def save_picture(path, image: Image.Image, **options) -> None:
    with writing(path) as file:
        image.save(file, EXTENSIONS[Path(path).suffix.lower()], **options)


def labelled_rows(path, rows: dict[str, Tensor], columns: int) -> None:
    """Save a picture of {label: images}, each block of images under its label."""
    font, space = ImageFont.load_default(size=15), 26
    blocks = {label: picture(images, columns) for label, images in rows.items()}
    width = max(max(b.width, 12 + math.ceil(font.getlength(label))) for label, b in blocks.items())
    height = sum(block.height + space for block in blocks.values())
    sheet = Image.new("RGB", (width, height), "white")
    y = 0
    for label, block in blocks.items():
        ImageDraw.Draw(sheet).text((6, y + 4), label, fill="black", font=font)
        sheet.paste(block, (0, y + space))
        y += block.height + space
    save_picture(path, sheet)


def pixel_mask(mask: Tensor, size: int) -> Tensor:
    """mask [..., L] of tokens -> of pixels [..., 1, S, S], S being `size`."""
    side = math.isqrt(mask.shape[-1])
    mask = mask.cpu().unflatten(-1, (side, side))[..., None, :, :]
    return mask.repeat_interleave(size // side, -1).repeat_interleave(size // side, -2)


def film(path, tokens: Tensor, trace: Trace, settings: Settings, decode=unchanged) -> None:
    """The unmasking of up to 8 images, hidden tokens grey: a .gif moves, else one row an image."""
    hidden = trace.masks()[0][:8]  # [8, T, L]
    hidden = torch.cat([hidden, torch.zeros_like(hidden[:, :1])], 1)  # and at the end none
    images = decode(to_images(tokens[:8], settings)).cpu()  # a revealed token never changes
    hidden_pixels = pixel_mask(hidden, images.shape[-1])
    frames = torch.where(hidden_pixels, 0.0, images[:, None])  # [8, T + 1, 3, S, S]
    if Path(path).suffix.lower() != ".gif":
        save_picture(path, picture(frames.flatten(0, 1), frames.shape[1], 48))
        return
    pictures = [picture(frame, 4) for frame in frames.transpose(0, 1)]
    rest = pictures[1:] + [pictures[-1]] * 6
    save_picture(path, pictures[0], save_all=True, append_images=rest, duration=250, loop=0)


@torch.no_grad()
def generate_many(
    model: MAR, labels: Tensor, sampling: Sampling, seed, name: str, decode: Callable = unchanged
) -> tuple[Tensor, Tensor]:
    """Images [N, 3, S, S], on the CPU, and unmasking iterations [N] of many labels."""
    images, steps = [], []
    for i, part in enumerate(tqdm(labels.split(256), f"judging {name}", leave=False)):
        tokens, trace = generate(model, part, sampling, seed=(seed, i), trace=True)
        images.append(decode(to_images(tokens, model.settings)).cpu())
        steps.append(trace.steps)
    return torch.cat(images), torch.cat(steps)


def seconds_in_turns(calls: dict[str, Callable], rounds: int, device) -> dict[str, list[float]]:
    """Seconds of every call {name: function}, sorted, of all rounds but the first; the calls in
    turns, so that a busy moment of the machine hits all alike."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock(device)
            call()
            seconds[name].append(clock(device) - start)
    return {name: sorted(times[1:]) for name, times in seconds.items()}


def clock(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_in_turns(arms: dict, labels: Tensor, rounds: int = 4) -> dict[str, float]:
    """Seconds per image of every arm {name: (model, Sampling)}, a median of all in turns."""
    calls = {name: partial(generate, model, labels, how) for name, (model, how) in arms.items()}
    times = seconds_in_turns(calls, rounds, labels.device)
    return {name: lower_median(seconds) / len(labels) for name, seconds in times.items()}


def lower_median(ordered: list[float]) -> float:
    return ordered[(len(ordered) - 1) // 2]


def nearest(images: Tensor, data: Data) -> tuple[Tensor, Tensor]:
    """The training image next to each of `images` [N, 3, S, S] in [-1, 1], and its distance [N]
    (root mean square, in pixels)."""
    train = data.train.spaced()
    distance, index = torch.cdist(images.clamp(-1, 1).flatten(1), train.flatten(1)).min(1)
    return train[index], distance / images[0].numel() ** 0.5


def arms_of_report(models: dict[str, MAR], settings: Settings, data: Data) -> dict:
    """{name: (model, Sampling)}: besides `models` an untrained one, and the one-step start, which
    is the teacher's weights asked for one step, before GSIM."""
    torch.manual_seed(settings.seed + 1)
    student = models["student"]
    image_channels = student.channels // settings.patch**2
    untrained = MAR(settings, data.classes, "student", image_channels).to(student.device)
    arms = {"untrained": (untrained, Sampling())}
    if "teacher" in models:
        arms["teacher"] = (models["teacher"], Sampling())
        arms["one-step start"] = (models["teacher"], Sampling(denoise_steps=1))
    for name in ("student", "policy"):
        if name in models:
            arms[name] = (models[name], Sampling())
    return arms


def report(
    out, settings: Settings, data: Data, judge: Judge, models: dict, extra: dict | None = None
) -> dict:
    """Judge every generator on the same classes and noise, time them side by side, print the table,
    and write metrics.json and the pictures into the folder `out`. Returns the metrics.

    models: {"student": ..., and perhaps "teacher" and "policy"}; extra: more entries of metrics."""
    arms = arms_of_report(models, settings, data)
    images, rows = {"real": judge.real_images}, {"real": judge.real_row()}
    for name, (model, sampling) in arms.items():
        images[name], steps = generate_many(
            model, judge.labels, sampling, settings.seed, name, judge.decode
        )
        rows[name] = judge(images[name]) | {
            "steps": float(steps.float().mean()),
            "steps_std": float(steps.float().std()),
            "denoise_steps": sampling.resolve(model).denoise_steps,
        }
    evenly = torch.linspace(0, len(judge.labels) - 1, 32).long()
    for name, seconds in time_in_turns(arms, judge.labels[evenly]).items():
        rows[name]["seconds_per_image"] = seconds
    sample = slice(None, None, max(1, len(judge.labels) // 500))  # of every class
    distances = {name: nearest(x[sample], data)[1].median() for name, x in images.items()}
    for name in rows:  # 1: as far from the training images as held-out images are
        rows[name]["nearest"] = float(distances[name] / distances["real"].clamp(min=1e-6))

    metrics = {
        "n": len(judge.labels),
        "rows": rows,
        "hardware": hardware(judge.device),
        "settings": asdict(settings),
        "examination": judge.examination,
        "blind": judge.blind,
    } | (extra or {})
    metrics = with_earlier(Path(out) / "metrics.json", metrics)
    write_text(Path(out) / "metrics.json", as_json(metrics, indent=1))
    print(report_table(metrics))
    samples_picture(out, images, rows, judge.labels, data)
    curves(out)
    columns = [data.classes[y] for y in data.labels[:12]]
    print(
        f"\nPictures: {Path(out) / 'samples.png'}, neighbours.png, curves.png; "
        f"figures: {Path(out) / 'metrics.json'}\n"
        f"Their columns: {', '.join(display_names(columns, data.names))}"
    )
    return metrics


def with_earlier(path: Path, metrics: dict) -> dict:
    """`metrics` with what the file at `path` has besides, if it is of the same settings: a report
    of teacher and student alone does not lose what RL had reported."""
    try:
        earlier = json.loads(path.read_text())
        if earlier["settings"] != metrics["settings"] or earlier["n"] != metrics["n"]:
            return metrics
        rows = {
            name: {key: math.nan if v is None else v for key, v in row.items()}
            for name, row in earlier["rows"].items()
        }
        minutes = earlier["minutes"] | metrics["minutes"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return metrics
    return earlier | metrics | {"rows": rows | metrics["rows"], "minutes": minutes}


def report_table(metrics: dict) -> str:
    """The judge's table as text."""
    lines = [
        f"\nBy the judge, n = {metrics['n']} per row, seed {metrics['settings']['seed']}, "
        f"{metrics['hardware']}:",
        f"{'':16}{'class accuracy':>15}{'Fréchet distance':>18}{'precision':>11}{'recall':>8}"
        f"{'diversity':>11}{'nearest':>9}{'steps':>14}{'ms/image':>10}",
    ]
    for name, row in metrics["rows"].items():
        doubt = "?" if metrics["blind"] else " "
        line = (
            f"{name:16}{row['accuracy']:15.3f}{row['frechet']:10.2f}{doubt} ± "
            f"{row['frechet_std']:4.2f}"
            f"{row['precision']:11.3f}{row['recall']:8.3f}{row['diversity']:11.3f}"
            f"{row['nearest']:9.2f}"
        )
        if "steps" in row:
            line += (
                f"{row['steps']:8.1f} x {row['denoise_steps']:<4}"
                f"{1000 * row['seconds_per_image']:9.2f}"
            )
        lines.append(line)
    lines.append(
        "diversity: within classes; nearest: distance to the nearest training image; of "
        "both, 1 = as real held-out images"
    )
    if metrics["blind"]:
        lines.append(
            f"?: the judge is blind to images that are {', '.join(metrics['blind'])} (see its "
            "examination): a lower distance need not be a better image. Pretrained --features help"
        )
    return "\n".join(lines)


def samples_picture(out, images: dict, rows: dict, labels: Tensor, data: Data) -> None:
    """samples.png, two images per class of every arm; neighbours.png, the last arm's images above
    the training images next to them."""
    per_class = [(labels == y).nonzero().flatten().tolist()[:2] for y in labels.unique()[:12]]
    columns = len(per_class)
    pick = [i for pair in zip(*per_class) for i in pair]
    captioned = {}
    for name, row in rows.items():
        if name == "untrained":
            continue
        caption = name
        if "steps" in row:
            caption += (
                f": {row['steps']:.1f} x {row['denoise_steps']} steps, "
                f"{1000 * row['seconds_per_image']:.1f} ms per image"
            )
        captioned[caption] = images[name][pick]
    labelled_rows(Path(out) / "samples.png", captioned, columns)
    last = list(rows)[-1]
    first_row = images[last][pick[:columns]]
    neighbours = {last: first_row, "its nearest training images": nearest(first_row, data)[0]}
    labelled_rows(Path(out) / "neighbours.png", neighbours, columns)


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files; None, with a word, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("curves are not drawn: pip install matplotlib")
        return None
    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


CURVES = {
    "teacher": {"loss": "loss"},
    "student": {
        "aux_loss": "auxiliary loss",
        "progress": "Fréchet distance, pixels",
        "reward_features": "Fréchet distance, reward's features",
    },
    "policy": {
        "reward": "reward",
        "quality": "quality",
        "steps": "steps",
        "kl": "KL",
        "quality_mean": "quality, no exploration",
        "held_out": "held-out reward",
        "judge": "Fréchet distance, judge",
        "grad_norm": "gradient norm",
    },
}


def curves(out) -> None:
    """curves.png: what was logged of every stage."""
    plt, lines = pyplot(), read_log(out)
    panels = []
    for stage, titles in CURVES.items():
        for key, title in titles.items():
            points = {
                line["step"]: line[key]
                for line in lines  # where resumed, the last counts
                if line["stage"] == stage and key in line
            }
            if points:
                panels.append((f"{stage}: {title}", points))
    if not plt or not panels:
        return
    rows = math.ceil(len(panels) / 4)
    figure, axes = plt.subplots(
        rows, 4, figsize=(13, 2.4 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for (title, points), axis in zip(panels, axes.flat):
        style = ".-" if len(points) < 20 else "-"
        axis.plot(points.keys(), points.values(), style, markersize=5, linewidth=1)
        axis.set_title(title, fontsize=9)
    with writing(Path(out) / "curves.png") as file:
        figure.savefig(file, dpi=80)
    plt.close(figure)


def gain_picture(out, training: PolicyGradient, occurring: Tensor) -> None:
    """gain.png: information gain along trajectories of the labels `occurring`, and how often each
    step is critical."""
    plt, model = pyplot(), training.model
    if not plt:
        return
    labels = occurring[torch.arange(16) % len(occurring)].to(model.device)

    def constant_quality(images, labels):
        return torch.ones(len(labels))

    rollouts = rollout(model, constant_quality, labels, "gain")
    valid = rollouts.trace.counts > 0
    gain = information_gain(rollouts.trace.predictions, rollouts.tokens, valid, training.mean_image)
    critical = critical_steps(gain, model.settings.critical_steps)
    gain = gain.masked_fill(~valid, math.nan).cpu()
    steps = range(1, gain.shape[1] + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot(steps, gain[::4].T.numpy(), color="tab:blue", alpha=0.15, linewidth=0.8)
    left.plot(steps, gain.nanmean(0).numpy(), color="black", marker="o", markersize=3)
    left.set(xlabel="step k", title="information gain V_k, and its mean")
    right.bar(steps, critical.float().mean(0).tolist())
    right.set(xlabel="step k", title="share of rollouts in which step k is critical")
    with writing(Path(out) / "gain.png") as file:
        figure.savefig(file, dpi=80)
    plt.close(figure)


@torch.no_grad()
def score(model: MAR, quality, judge: Judge, steps: int | None = None) -> dict[str, float]:
    """Means of quality and reward, unmasking iterations and the judge's distance, without
    exploration. steps: None for the model's own schedule, else K of the cosine schedule."""
    settings = model.settings
    images, count = generate_many(
        model, judge.labels, Sampling(steps), settings.seed, "schedules", judge.decode
    )
    q = quality(images.to(judge.device), judge.labels)
    reward = total_reward(q, count, settings)
    return {
        "quality": float(q.mean()),
        "reward": float(reward.mean()),
        "steps": float(count.float().mean()),
        "steps_std": float(count.float().std()),
        "frechet": judge(images)["frechet"],
    }


def compare_schedules(training: PolicyGradient, quality, judge: Judge) -> dict[str, dict]:
    """Rows before and after RL, and of both generators under fixed schedules: those that a learned
    one must beat. Prints them."""
    start, policy, K_max = training.reference, training.model, training.model.settings.steps
    rows = {"before": score(start, quality, judge), "after": score(policy, quality, judge)}
    fixed = {max(1, K_max >> i) for i in range(5)} | {max(1, round(rows["after"]["steps"]))}
    for K in sorted(fixed, reverse=True):
        rows[f"student, fixed K = {K}"] = score(start, quality, judge, K)
        rows[f"policy, fixed K = {K}"] = score(policy, quality, judge, K)
    print(
        f"\nRL, without exploration:\n{'':24}{'quality':>8}{'reward':>8}{'steps':>13}"
        f"{'Fréchet distance':>18}"
    )
    for name, row in rows.items():
        print(
            f"{name:24}{row['quality']:8.3f}{row['reward']:8.3f}{row['steps']:7.1f} ± "
            f"{row['steps_std']:3.1f}{row['frechet']:18.2f}"
        )
    return rows


def hardware(device: torch.device) -> str:
    """Name of the GPU or CPU, threads, and version of torch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        models = [line.split(":")[1] for line in cpu.splitlines() if line.startswith("model name")]
        name = models[0].strip() if models else platform.machine()
        name += f", {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


# 18 Command line ----------------------------------------------------------------------------------
# What the three scripts share: options, the device, settings from options and checkpoints, and the
# stages that more than one script may need.

MODEL_SETTINGS = (
    "image_size",
    "patch",
    "mean",
    "scale",
    "width",
    "depth",
    "decoder_depth",
    "heads",
    "buffer",
    "head_width",
    "head_depth",
    "predicts",
)  # what a checkpoint's weights depend on
MEMORY_SETTINGS = ("checkpointing", "precision", "micro_batch")  # how, not what, is computed
STUDENT_SETTINGS = (*MODEL_SETTINGS, "noise_ratio", "guidance")  # and what was distilled into them
GROUPS = {
    "image_size": "data",
    "patch": "model",
    "steps": "generation",
    "batch": "training the teacher",
    "gsim_iters": "GSIM",
    "method": "RL (train_rl.py)",
    "judge_iters": "reward network and judge",
}  # first field: title of a group of options


def training_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the options that people use; `add_settings` adds all the others."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=doc,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data",
        default="shapes",
        metavar="FOLDER",
        help="one sub-folder of images per class (default: the built-in shapes)",
    )
    add(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="sub-folders to use, apart by spaces or commas, or a file with one a line "
        "(default: all)",
    )
    add(
        "--class-names",
        metavar="FILE",
        help="what the sub-folders' classes are called, in lines such as n01440764 tench",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/latest"),
        help="folder to write into (default: %(default)s)",
    )
    add(
        "--resume",
        action="store_true",
        help="continue what is in --out: finished stages are kept, an interrupted one goes on",
    )
    add(
        "--preset",
        choices=PRESETS,
        help="settings to start from (default: small on a CUDA GPU; else folder for a folder, "
        "tiny for the shapes)",
    )
    add(
        "--teacher",
        type=Path,
        metavar="teacher.pt",
        help="a teacher to start from, instead of training one; also a file in MAR's own format",
    )
    add(
        "--vae",
        type=Path,
        metavar="kl16.ckpt",
        help="an autoencoder: generate its latents, not pixels (MAR's released models need it)",
    )
    add(
        "--features",
        default="own",
        help="what the judge compares images by: own (a network trained here), clip, the file of a "
        "torchvision model's weights, or module:function (default: %(default)s)",
    )
    clip = ClipOptions()
    add(
        "--clip-model",
        default=clip.model,
        help="of --reward clip and --features clip, as open_clip names it "
        "(default: %(default)s; OpenAI's weights need ViT-B-32-quickgelu)",
    )
    add(
        "--clip-weights",
        default=clip.weights,
        help="a file, or the name of weights that open_clip downloads (default: %(default)s)",
    )
    add(
        "--clip-prompt",
        default=clip.prompt,
        help="the text of --reward clip (default: %(default)s)",
    )
    return parser


def clip_options(args) -> ClipOptions:
    """ClipOptions of the command line; InputError if nothing asks CLIP."""
    options = ClipOptions(args.clip_model, args.clip_weights, args.clip_prompt)
    if options != ClipOptions() and "clip" not in (args.features, getattr(args, "reward", None)):
        raise InputError(
            "--clip-model, --clip-weights, --clip-prompt: only --reward clip and "
            "--features clip ask CLIP"
        )
    return options


def make_judge(args, settings: Settings, data: Data, device) -> Judge:
    """The judge, which looks as --features says; it prints its examination."""
    embed = pretrained_features(args.features, clip_options(args), device)
    return Judge(data, settings, device, embed)


def add_device(parser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads (default: half of "
        "the cores, at most 8; more of them wait for each other)",
    )


def add_settings(parser) -> None:
    """Every field of Settings as an option, absent from the namespace where not given."""
    for f in fields(Settings):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            choices = f.metadata["limits"].get("choices")
            metavar = {int: "N", float: "X", str: None}[f.type]
            kind = {"type": f.type, "choices": choices, "metavar": metavar}
        text = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        group.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **kind)
    others = [
        f"{preset} has " + ", ".join(f"{name}={value}" for name, value in PRESETS[preset].items())
        for preset in ("folder", "small")
    ]
    parser.epilog = (
        f"The defaults are those of --preset tiny; {'; '.join(others)}. The sizes of MAR's "
        f"released models, on latents (--vae), are {', '.join(RELEASED)}."
    )


def find_device(name: str = "auto", threads: int | None = None) -> torch.device:
    """torch.device of that name; `auto` takes cuda, mps or cpu, the first there is. Sets the number
    of CPU threads: half of the cores, at most 8, unless given."""
    threads = max(1, min(8, (os.cpu_count() or 1) // 2)) if threads is None else threads
    if not 1 <= threads <= 1024:
        raise InputError(f"--threads {threads} must lie in 1...1024")
    torch.set_num_threads(threads)
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    available = [kind for kind, is_there in there.items() if is_there]
    if name == "auto":
        return torch.device(available[0])
    kind, _, number = name.partition(":")
    if kind not in available or (number and not (kind == "cuda" and number.isdigit())):
        raise InputError(f"--device {name}: there is none here; there is {', '.join(available)}")
    return torch.device(name)


def usual_preset(data: str, device) -> str:
    """The preset where --preset is not given."""
    if device.type == "cuda":
        return "small"
    return "tiny" if data == "shapes" else "folder"


def settings_from(args, device, content: dict | None, resume: bool) -> Settings:
    """Settings of the options that were given, on top of the preset, or of a checkpoint's
    `content`, which fixes some of them (when resuming what it began, all but MEMORY_SETTINGS)."""
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    if content is None:
        return preset(args.preset or usual_preset(args.data, device), **given)
    if args.preset and not resume:
        raise InputError(
            f"--preset {args.preset}: the settings come from the {content['kind']}; leave it out"
        )
    base = content["settings"]
    if resume:
        fixed = [f.name for f in fields(Settings) if f.name not in MEMORY_SETTINGS]
    else:
        fixed = MODEL_SETTINGS if content["kind"] == "teacher" else STUDENT_SETTINGS
    for name in fixed:
        value = getattr(base, name)
        if given.get(name, value) != value:
            advice = ". Another --out starts afresh" if resume else ""
            raise InputError(f"{flag(name)} is fixed by the checkpoint: {value}{advice}")
    return replace(base, **given)


def describe(data: Data, settings: Settings) -> str:
    """How many images there are and what for, and what a person may not expect of them."""
    n = len(data.labels) * data.test.balanced_half(settings.judge_n)
    text = (
        f"{len(data.labels)} classes; images: {len(data.train)} to train on, {len(data.judge)} "
        f"for the judge, {len(data.test)} held out, n = {n} in each row of the judge's table"
    )
    if n < 500:
        text += " (few: its distances are rough)"
    if data.name != "shapes":
        side = data.train.size
        text += f"; resized to {side} x {side} pixels (--image-size; more of them want a GPU)"
    return text


def prepare(
    args, written: list[str], base: dict | None = None
) -> tuple[Settings, Data, torch.device]:
    """Settings, data and device; everything that can go wrong does so here, before long work.

    written: the checkpoints that the script writes, the last stage first. base: the content of the
    checkpoint that it starts from."""
    device = join_processes(find_device(args.device, args.threads))
    if args.out.exists():
        claim(args.out)
    there = [name for name in written if (args.out / name).exists()]
    if there and not args.resume:
        raise InputError(
            f"{args.out / there[0]} exists: --resume continues it, another --out starts afresh"
        )
    if there:
        earlier = written[written.index(there[0]) :]
        missing = [name for name in earlier if name not in there]
        if missing and not args.teacher:
            kind = missing[0].removesuffix(".pt")
            raise InputError(
                f"{args.out} was begun with another {missing[0]}: give it again by --{kind}"
            )
        base = read_checkpoint(args.out / there[0])
    settings = settings_from(args, device, base, resume=bool(there))
    print("settings: " + ", ".join(f"{k}={v}" for k, v in asdict(settings).items()))
    data, settings = measured_data(args, settings, base, device)
    check_memory(settings, data, device)
    print(f"{describe(data, settings)}; on {hardware(device)}")
    if args.resume and not there:
        print(f"nothing to resume in {args.out}: starting afresh")
    claim(args.out)
    remember_choices(args, resume=bool(there))
    return settings, data, device


def check_memory(settings: Settings, data: Data, device) -> None:
    """InputError if a model cannot be trained in the memory of the device: weights, gradient, two
    averages of an optimiser and the EMA alone take 20 bytes per parameter."""
    with torch.device("meta"):
        model = MAR(settings, data.classes, image_channels=data.learned.channels)
    need = 20 * sum(p.numel() for p in model.parameters()) / 2**30
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory / 2**30
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    else:  # Windows does not say
        return
    if need > there:
        raise InputError(
            f"to train this model takes at least {need:,.0f} GiB of memory, and {device} has "
            f"{there:,.0f}: lower --width, --depth, --head-width, --head-depth or --image-size"
        )


def measured_data(args, settings: Settings, base, device) -> tuple[Data, Settings]:
    """The data, with latents if there is a --vae, and the Settings with their mean and scale."""
    image_channels = None
    if base:
        image_channels = base["model_ema"]["z_proj.weight"].shape[1] // settings.patch**2
    elif args.preset in RELEASED:
        image_channels = 16
    vae = autoencoder_for(image_channels, args.vae, device)
    cache, stride = args.out.parent / "cache", vae.stride if vae else 1
    data = load_data(settings, args.data, args.classes, args.class_names, cache, stride)
    if base:
        data = data.labelled_as(named_classes(base, data))
    if vae:
        data = with_latents(data, vae, settings.flip)
        settings = replace(settings, scale=settings.scale or vae.scale)
    return data, data.measure(settings)


def named_classes(base: dict, data: Data) -> list[str]:
    """A checkpoint's classes; where a file in MAR's format only counts them, the folder's as they
    are sorted, which for ImageNet is the order that MAR was trained with."""
    there = data.classes if data.name == "shapes" else class_folders(data.name)
    counted = base.get("classes_counted") and len(there) == len(base["classes"])
    return there if counted else base["classes"]


def remember_choices(args, resume: bool) -> None:
    """Keep --data, --classes, --vae, --features and --reward in out/choices.json; InputError where
    a resumed run has others.

    They name files and code: what a file says is compared with them, and never used."""
    path = args.out / "choices.json"
    given = {"data": str(Path(args.data)), "classes": " ".join(args.classes or [])}
    given |= {"vae": str(args.vae or ""), "features": args.features}
    if "reward" in args:  # train_distill.py has none
        given["reward"] = args.reward
    try:
        kept = json.loads(path.read_text()) if resume and path.exists() else {}
        kept = {name: str(kept[name]) for name in kept}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it") from None
    for name in given:
        if kept.get(name) not in (None, given[name]):
            raise InputError(
                f"{args.out} was begun with {flag(name)} {kept[name] or None}, not "
                f"{given[name] or None}: give it again, or another --out"
            )
    write_text(path, as_json(kept | given))


def teacher_and_student(
    args, settings: Settings, data: Data, device, critic: Critic
) -> tuple[dict[str, MAR], dict[str, float]]:
    """A teacher, unless args.teacher is one, and its student: {name: model}, and the minutes that
    each of them took."""
    minutes, start = {}, time.perf_counter()
    if args.teacher:
        teacher = load_model(args.teacher, "teacher", device, settings.heads)
        teacher.settings = settings  # which may differ in what a checkpoint leaves open
        teacher.classes = data.classes  # MAR's own files do not name them
    else:
        teacher = train_teacher(settings, data, args.out, device, args.resume)
        minutes["teacher"] = (time.perf_counter() - start) / 60
    start = time.perf_counter()
    progress = Progress(critic, data, settings, device)
    distillation = Distillation(teacher, settings)
    student = train_student(distillation, data, args.out, args.resume, progress)
    minutes["student"] = (time.perf_counter() - start) / 60
    return {"teacher": teacher, "student": student}, minutes


def run(main: Callable) -> None:
    """Call main() as a script. Wrong input ends in one line and exit code 2; a non-finite loss, or
    too little memory, in one line and code 1; Ctrl-C in one line and code 130, SIGTERM in 143."""
    untold = "the files that are there are whole; --resume continues a training"

    def stop(number, _):
        raise Stopped(number, untold)

    signal.signal(signal.SIGTERM, stop)
    for stream in (sys.stdout, sys.stderr):  # folders may have names that are no UTF-8
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        leave_processes()
    except (InputError, OSError) as error:
        fail(error, 2)
    except NonFinite as error:
        fail(error, 1)
    except (MemoryError, RuntimeError) as error:
        if is_lost_process(error):
            fail(f"process {rank()} lost another one: {error}", 1)
        if not is_out_of_memory(error):
            raise
        fail("out of memory: try --checkpointing or a smaller --micro-batch, --batch or model", 1)
    except KeyboardInterrupt as stopped:
        number, work = stopped.args or (signal.SIGINT, untold)
        print(f"stopped: {work}", file=sys.stderr)
        sys.exit(128 + number)


def fail(error, code: int) -> None:
    """End with one line, whatever characters the names in it have."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python was refused memory, on the CPU or on a GPU."""
    refused = "can't allocate memory" in str(error) or "out of memory" in str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or refused


# 19 Several processes -----------------------------------------------------------------------------
# `torchrun --nproc_per_node=N train_rl.py ...` trains on N GPUs. All processes run the same program
# on the same whole batch, with the same random numbers, and hold the same weights. Two calls alone,
# which are nearly all of the work, are divided: `MAR.context` and `Head.forward` compute rows 1 / N
# each, and then all gather the rows. So every other line, losses, groups, advantages and judges,
# sees the batch as if there were one process; results agree but for rounding, with any N.


def rank() -> int:
    """The number of this process; 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def join_processes(device: torch.device) -> torch.device:
    """The device of this process, if torchrun started several; else `device`."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    MAR.context, Head.forward = divided(MAR.context), divided(Head.forward)
    if rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    return device


def divided(function: Callable) -> Callable:
    """A method whose inputs and output have a row for each of B things, computed by all."""

    def times_processes(gradient):  # whose mean over them is then the whole gradient of a weight
        return gradient * dist.get_world_size()

    @wraps(function)
    def call(self, *inputs):
        B, N = len(inputs[0]), dist.get_world_size()
        if B == 0:
            return function(self, *inputs)
        rows = math.ceil(B / N)
        mine = (torch.arange(rows, device=inputs[0].device) + rows * rank()) % B  # some twice
        own = function(self, *(hooked(x, mean_over_processes)[mine] for x in inputs))
        parts = [torch.empty_like(own) for _ in range(N)]
        dist.all_gather(parts, own.detach())
        parts[rank()] = hooked(own, times_processes)
        return torch.cat(parts)[:B]

    return call


def hooked(x: Tensor, hook: Callable) -> Tensor:
    """x, whose gradient passes through `hook` on its way back."""
    x = x.view_as(x)  # so that other uses of x do not
    if x.requires_grad:
        x.register_hook(hook)
    return x


def mean_over_processes(x: Tensor) -> Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def average_gradients(training) -> None:
    """Let every gradient of these networks be the mean over all processes."""
    if not dist.is_initialized():
        return

    def average(p):
        p.grad = mean_over_processes(p.grad)

    for network in (training.model, *training.state.values()):
        for p in network.parameters() if isinstance(network, nn.Module) else ():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(average)


def agreed(number: int, device) -> int:
    """The largest `number` of all processes."""
    if not dist.is_initialized():
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def is_lost_process(error: Exception) -> bool:
    """Whether another process ended, or did not answer in time."""
    named = any(name in str(error) for name in ("gloo", "NCCL", "Connection"))
    return dist.is_initialized() and (isinstance(error, dist.DistError) or named)


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# 20 Bench -----------------------------------------------------------------------------------------
# Which idea makes an image how much faster: the one step, the cache, the schedule, each alone and
# all together, timed in turns in one run.

BENCH_REFRESH = 8  # of the arms with a cache
PARTS = ("transformer", "head", "decoding")


def bench_arms(models: dict[str, MAR], steps: int | tuple | None) -> dict:
    """{name: (model, Sampling)} of what `models`, {kind: model}, allow: each idea alone, and all.

    steps: as of Sampling (None: the checkpoint's). The schedule is the learned one of a
    policy or, without a policy, a quarter of the student's iterations."""
    teacher, student, policy = (models.get(kind) for kind in ("teacher", "student", "policy"))
    arms = {}
    if teacher:
        arms["teacher, 100 steps"] = teacher, Sampling(steps, denoise_steps=100)
        arms["teacher, 25 steps"] = teacher, Sampling(steps, denoise_steps=25)
        arms["annealed teacher"] = teacher, Sampling(steps, denoise_steps=(50, 5))
    if student:
        arms["student"] = student, Sampling(steps)
        arms["student + cache"] = student, Sampling(steps, refresh=BENCH_REFRESH)
    if policy:
        arms["student + schedule"] = policy, Sampling()
        arms["all together"] = policy, Sampling(refresh=BENCH_REFRESH)
    elif student:
        fewer = max(1, len(Sampling(steps).counts(student.length, student.settings)) // 4)
        arms["student + schedule"] = student, Sampling(fewer)
        arms["all together"] = student, Sampling(fewer, refresh=BENCH_REFRESH)
    return arms


def bench(
    models: dict[str, MAR],
    decode: Callable = unchanged,
    judge: Judge | None = None,
    steps: int | None = None,
    batches: tuple[int, ...] = (1, 8, 32),
    rounds: int = 5,
) -> dict:
    """Every arm's seconds per image in every batch size, where they go, and with a judge its
    Fréchet distance; and what each idea contributes. {"rows": {arm: figures}, "factors": ...}.

    seconds: {batch: [lowest, median, highest]} of rounds - 1 rounds, all arms in turns. Every round
    has a noise of its own, as a learned schedule takes a while for one image and less for another.
    """
    arms = bench_arms(models, steps)
    rows = {name: {"seconds": {}} for name in arms}
    for batch in batches:
        calls = {
            name: partial(make_images, *arm, batch, decode, iter(range(rounds)))
            for name, arm in arms.items()
        }
        device = next(iter(models.values())).device
        for name, times in seconds_in_turns(calls, rounds, device).items():
            per_image = [times[0] / batch, lower_median(times) / batch, times[-1] / batch]
            rows[name]["seconds"][batch] = per_image
    for name, (model, sampling) in arms.items():
        rows[name]["shares"], rows[name]["steps"] = shares(model, sampling, batches[0], decode)
        if judge:
            images, steps_taken = generate_many(
                model, judge.labels, sampling, model.settings.seed, name, decode
            )
            rows[name]["frechet"] = judge(images)["frechet"]
            rows[name]["steps"] = float(steps_taken.float().mean())
    return {"rows": rows, "factors": factors(rows, batches[0])}


def factors(rows: dict, batch: int) -> dict[str, float]:
    """How many times as fast each idea alone makes an image; their product, and all together."""
    seconds = {name: row["seconds"][batch][1] for name, row in rows.items()}
    if not {"teacher, 100 steps", "student"} <= seconds.keys():
        return {}
    one_step = seconds["teacher, 100 steps"] / seconds["student"]
    cache = seconds["student"] / seconds["student + cache"]
    schedule = seconds["student"] / seconds["student + schedule"]
    return {
        "one step": one_step,
        "cache": cache,
        "schedule": schedule,
        "product": one_step * cache * schedule,
        "all together": seconds["teacher, 100 steps"] / seconds["all together"],
    }


@torch.no_grad()
def make_images(model: MAR, sampling: Sampling, batch: int, decode, seeds: Iterator[int]) -> Trace:
    """Draw and decode `batch` images of the next seed, from whose number on classes are in turn."""
    seed = next(seeds)
    labels = (seed + torch.arange(batch, device=model.device)) % model.num_classes
    tokens, trace = generate(model, labels, sampling, seed=seed, trace=True)
    decode(to_images(tokens, model.settings))
    return trace


def shares(model: MAR, sampling: Sampling, batch: int, decode: Callable) -> tuple[dict, float]:
    """Share of each of PARTS in the seconds of a generation, and its unmasking iterations.

    The rest is the loop's own: choosing places, noise, guidance and the steps of the chain."""
    spent, started, device = Counter(), {}, model.device

    def begins(part, *_):
        started[part] = clock(device)

    def ends(part, *_):
        spent[part] += clock(device) - started[part]

    def timed_decode(images):
        begins("decoding")
        decode(images)
        ends("decoding")

    hooks = [
        model.z_proj.register_forward_pre_hook(partial(begins, "transformer")),
        model.decoder_norm.register_forward_hook(partial(ends, "transformer")),
        model.head.register_forward_pre_hook(partial(begins, "head")),
        model.head.register_forward_hook(partial(ends, "head")),
    ]
    try:
        start = clock(device)
        trace = make_images(model, sampling, batch, timed_decode, iter([0]))
        total = clock(device) - start
    finally:
        for hook in hooks:
            hook.remove()
    return {part: spent[part] / total for part in PARTS}, float(trace.steps.float().mean())


def bench_models(name, device, vae: "KL16 | None", num_heads=None) -> tuple[dict, Callable]:
    """{kind: model} of a checkpoint and of teacher.pt, student.pt and policy.pt beside it, as far
    as they make the same images; or, of a preset's name, random weights. And what decodes."""
    if name in PRESETS:
        return random_models(name, device, vae)
    models = [load_model(name, None, device, num_heads)]
    for kind in ("teacher", "student", "policy"):
        path = Path(name).parent / f"{kind}.pt"
        if path.exists() and kind != models[0].kind:
            models.append(load_checkpoint(path, kind, device))
    first = models[0]
    alike = [m for m in models if (m.classes, m.length) == (first.classes, first.length)]
    return {model.kind: model for model in alike}, vae.decode if vae else unchanged


def bench_judge(models: dict[str, MAR], name: str, vae: "KL16 | None", device) -> Judge | None:
    """A judge of the data called `name`; None, with a word, if the models make other classes."""
    model = next(iter(models.values()))
    data = load_data(model.settings, name, stride=vae.stride if vae else 1)
    if data.classes != model.classes:
        print("no Fréchet distance: these are not the classes of --data")
        return None
    return Judge(data, model.settings, device)


def random_models(name: str, device, vae: "KL16 | None") -> tuple[dict, Callable]:
    """Teacher and student of a preset's size, of the same random weights, and what decodes; in
    float32 on a CPU, most of which only emulate bfloat16."""
    image_channels = 16 if name in RELEASED else 3
    settings = replace(preset(name), scale=1.0)
    if device.type == "cpu":
        settings = replace(settings, precision="fp32")
    teacher = MAR(settings, numbered(1000), "teacher", image_channels).to(device).eval()
    student = copy(teacher)
    student.kind = "student"
    if name in RELEASED:
        vae = vae or KL16().to(device).eval()
    return {"teacher": teacher, "student": student}, vae.decode if vae else unchanged


def bench_table(result: dict) -> str:
    """bench.json as text."""
    first = next(iter(next(iter(result["rows"].values()))["seconds"]))
    header = f"{'seconds per image':20}{f'batch {first}':>10}{'(spread)':>18}{'best batch':>12}"
    header += f"{'(of)':>7}{'iterations':>12}" + "".join(f"{part:>13}" for part in PARTS)
    lines = [header + f"{'Fréchet':>10}"]
    for name, row in result["rows"].items():
        low, middle, high = row["seconds"][first]
        best = min(row["seconds"], key=lambda batch: row["seconds"][batch][1])
        line = f"{name:20}{middle:10.4g}{f'({low:.4g}-{high:.4g})':>18}"
        line += f"{row['seconds'][best][1]:12.4g}{f'({best})':>7}{row['steps']:12.1f}"
        line += "".join(f"{row['shares'][part]:13.0%}" for part in PARTS)
        line += f"{row['frechet']:10.2f}" if "frechet" in row else f"{'-':>10}"
        lines.append(line)
    if result["factors"]:
        lines.append(
            "times as fast, in the first batch size: one step {one step:.1f} x cache {cache:.2f} x "
            "schedule {schedule:.2f} = {product:.0f}; measured all together "
            "{all together:.0f}".format(**result["factors"])
        )
    return "\n".join(lines)


# 21 MAR's released weights ------------------------------------------------------------------------
# MAR's authors publish three models of ImageNet at 256 x 256. They make latents: an autoencoder,
# KL-16, turns an image into 16 x 16 vectors of 16 channels, which are the tokens, and back. A file
# in MAR's format is {"model": weights, "model_ema": weights}; its settings are read off the shapes.
# Nothing else changes: tokens are cut from latents as they are from pixels, and rewards, judge and
# pictures get what the autoencoder decodes.

KL16_SCALE = 0.2325  # makes the variance of KL-16's latents 1 over ImageNet
# fmt: off
MAR_SETTINGS = PRESETS["small"] | {
    "image_size": 16, "patch": 1, "buffer": 64, "predicts": "eps", "steps": 256, "batch": 16,
    "denoise_steps": 100, "x_0_limit": 0.0, "flip": True, "muon_lr": 0.0, "checkpointing": True,
    "precision": "fp32", "micro_batch": 0, "prompts": 4, "order": "random",
}  # trained as `small`, which nobody has tried at this size
RELEASED = {
    "mar_b": MAR_SETTINGS | {
        "width": 768, "depth": 12, "heads": 12, "head_width": 1024, "head_depth": 6,
        "guidance": 2.9,
    },
    "mar_l": MAR_SETTINGS | {
        "width": 1024, "depth": 16, "heads": 16, "head_width": 1280, "head_depth": 8,
        "guidance": 3.0,
    },
    "mar_h": MAR_SETTINGS | {
        "width": 1280, "depth": 20, "heads": 16, "head_width": 1536, "head_depth": 12,
        "guidance": 3.2,
    },
}
# fmt: on
PRESETS |= RELEASED


def numbered(n: int) -> list[str]:
    """Names of n classes of which only the number is known."""
    return [str(i) for i in range(n)]


def mar_name(name: str) -> str:
    """The name in MAR's files of a weight of our MAR."""
    return "diffloss.net." + name.removeprefix("head.") if name.startswith("head.") else name


def is_mar_file(content) -> bool:
    """Whether the content of a file is in MAR's format: weights under MAR's names, and no kind."""
    if not isinstance(content, dict) or "kind" in content:
        return False
    parts = [content.get(part) for part in ("model", "model_ema")]
    names = [str(name) for part in parts if isinstance(part, dict) for name in part]
    return any(name.startswith(("diffloss.net.", "z_proj.")) for name in names)


def tensors_of(path, content: dict, part: str) -> dict[str, Tensor]:
    """The weights under `part` of a file's content; InputError if they are not there."""
    weights = content.get(part) if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise InputError(f"{path} has no weights under {part!r}")
    for name, value in weights.items():
        if not (isinstance(name, str) and torch.is_tensor(value)):
            raise InputError(f"{path}: {name!r} under {part!r} is not a tensor with a name")
        if value.layout != torch.strided or value.is_meta or value.is_complex():
            raise InputError(f"{path}: {name} is no plain tensor")
    if sum(value.nbytes for value in weights.values()) > os.path.getsize(path):
        raise InputError(f"{path}: its weights under {part!r} are larger than the file")
    for name, value in weights.items():
        if not value.isfinite().all():
            raise InputError(f"{path}: {name} under {part!r} has weights that are infinite or NaN")
    return weights


def filled(path, build: Callable, weights: dict[str, Tensor], rename: Callable = str) -> nn.Module:
    """The module build() with the `weights` of a file, which has them as rename(their name there).

    Shapes are compared first, on a model without memory: none is taken for what does not fit."""
    with torch.device("meta"):
        expected = build().state_dict()
    check_names_and_shapes(path, {rename(name): expected[name] for name in expected}, weights)
    module = build()
    weights = {name: weights[rename(name)] for name in expected}
    for name, own in module.state_dict().items():
        if not own.is_floating_point() and not torch.equal(own, weights[name]):
            raise InputError(f"{path}: {name} is not what its settings make it")
    module.load_state_dict(weights)
    return module


def check_names_and_shapes(path, module: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """InputError naming what is missing, unexpected or misshapen in weights of `path`."""
    wrong = [f"{name} is missing" for name in module if name not in weights]
    wrong += [f"{name} is unexpected" for name in weights if name not in module]
    for name, value in weights.items():
        if name in module and value.shape != module[name].shape:
            wrong.append(f"{name} is {list(value.shape)}, not {list(module[name].shape)}")
        elif name in module and value.is_floating_point() != module[name].is_floating_point():
            wrong.append(f"{name} is of type {value.dtype}, not {module[name].dtype}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(
            f"{path}: its weights do not fit its settings: {'; '.join(wrong[:5])}{more}"
        )


def shape_of(path, weights: dict[str, Tensor], name: str, dimensions: int) -> torch.Size:
    """The shape of one of the weights; InputError unless it is there and has the dimensions."""
    if name not in weights:
        raise InputError(f"{path}: {name} is missing")
    if weights[name].ndim != dimensions:
        raise InputError(f"{path}: {name} is {list(weights[name].shape)}: a wrong shape")
    return weights[name].shape


def count_blocks(weights: dict[str, Tensor], prefix: str) -> int:
    """How many blocks have weights called prefix.<number>.<...>."""
    start = prefix + "."
    rest = [name.removeprefix(start) for name in weights if name.startswith(start)]
    return len({name.split(".")[0] for name in rest})


def mar_settings(path, weights: dict[str, Tensor], num_heads: int | None) -> Settings:
    """The Settings that MAR's weights were made with, as far as shapes tell; else the released."""
    width, channels = shape_of(path, weights, "z_proj.weight", 2)
    length = shape_of(path, weights, "diffusion_pos_embed_learned", 3)[1]
    rows = shape_of(path, weights, "encoder_pos_embed_learned", 3)[1]
    side, patch = math.isqrt(length), math.isqrt(channels // 16)
    if side**2 != length or 16 * patch**2 != channels:
        raise InputError(
            f"{path}: {length} tokens of {channels} channels are not the square patches of a "
            "square of 16-channel latents"
        )
    known = {size["width"]: size for size in RELEASED.values()}
    heads = num_heads or known.get(width, {}).get("heads")
    if heads is None:
        raise InputError(
            f"{path}: width {width} is none of the released ones, and the number of attention "
            "heads cannot be read off the weights: give num_heads (--heads)"
        )
    read = {
        "image_size": side * patch,
        "patch": patch,
        "scale": KL16_SCALE,
        "width": width,
        "depth": count_blocks(weights, "encoder_blocks"),
        "decoder_depth": count_blocks(weights, "decoder_blocks"),
        "heads": heads,
        "buffer": rows - length,
        "head_width": shape_of(path, weights, "diffloss.net.input_proj.weight", 2)[0],
        "head_depth": count_blocks(weights, "diffloss.net.res_blocks"),
        "steps": min(length, MAR_SETTINGS["steps"]),
    }
    try:
        return Settings(**(known.get(width, MAR_SETTINGS) | read))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_mar(path, ema=True, num_heads=None, classes=None) -> dict:
    """A file in MAR's format as `read_checkpoint` would give it, its weights under their own names.

    InputError if it is none, or if its shapes say no settings."""
    content = load_safely(path, lazily=True)
    if not is_mar_file(content):
        raise InputError(f"{path} is not a file in MAR's format")
    part = "model_ema" if ema else "model"
    weights = tensors_of(path, content, part)
    number = shape_of(path, weights, "class_emb.weight", 2)[0]
    if classes is not None and len(classes) != number:
        raise InputError(f"{path} has {number} classes, and {len(classes)} names are given")
    return {
        "kind": "teacher",
        "settings": mar_settings(path, weights, num_heads),
        "classes": list(classes or numbered(number)),
        "classes_counted": classes is None,
        "model_ema": weights,
    }


def load_mar(path, ema=True, num_heads=None, device="cpu", classes=None) -> MAR:
    """A teacher from a file in MAR's official format, ready for `generate`.

    ema: the averaged weights, which MAR is evaluated with, else those under "model". num_heads:
    needed where the width is not a released one. classes: names (default "0", "1", ...).
    InputError names what is missing, unexpected or of the wrong shape; no code in the file is
    run."""
    content = read_mar(path, ema, num_heads, classes)
    build = partial(MAR, content["settings"], content["classes"], image_channels=16)
    model = filled(path, build, content["model_ema"], mar_name)
    return model.to(device).eval().requires_grad_(False)


def save_mar(path, model: MAR, ema: MAR | None = None) -> None:
    """Write a teacher in MAR's official format; `ema` (default: the model) goes to "model_ema".

    InputError for what that format does not know: a student, a head that predicts anything but
    eps, and tokens that are not latents x 0.2325."""
    settings = model.settings
    if model.kind != "teacher":
        raise InputError(f"{path}: MAR's format is for teachers, not for a {model.kind}")
    if settings.predicts != "eps":
        raise InputError(f"{path}: in MAR's format the head predicts eps (--predicts eps)")
    if (settings.mean, settings.scale) != (0, KL16_SCALE):
        raise InputError(
            f"{path}: in MAR's format tokens are latents x {KL16_SCALE}, with mean 0; this model "
            f"has --mean {settings.mean} and --scale {settings.scale}"
        )
    content = {}
    for part, network in (("model", model), ("model_ema", ema or model)):
        content[part] = {mar_name(name): value for name, value in network.state_dict().items()}
    write_file(path, content)


def read_model(path, kind: str | None = None, num_heads: int | None = None) -> dict:
    """`read_checkpoint` or `read_mar`, as the names of the file's weights say."""
    if not is_mar_file(load_safely(path, lazily=True)):
        return read_checkpoint(path, kind)
    if kind not in (None, "teacher"):
        raise InputError(f"{path} is a teacher; a {kind} is needed here")
    return read_mar(path, num_heads=num_heads)


def load_model(path, kind=None, device="cpu", num_heads=None) -> MAR:
    """`load_checkpoint` or `load_mar`, as the names of the file's weights say."""
    if is_mar_file(load_safely(path, lazily=True)):
        return load_mar(path, num_heads=num_heads, device=device)
    return load_checkpoint(path, kind, device)


def autoencoder_for(image_channels: int | None, path, device) -> "KL16 | None":
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


@dataclass
class Latents:
    """What a Split is to a generator of latents; every batch draws its latents anew."""

    moments: Tensor  # float16 [1 or 2, N, 2C, h, w]: of the images, and mirrored; may be mapped
    labels: Tensor  # [N]

    def __len__(self):
        return len(self.labels)

    @property
    def channels(self) -> int:
        return self.moments.shape[2] // 2

    def spaced(self) -> Tensor:
        """Latents [n, C, h, w], of all images or of evenly spaced 10,000 to 20,000."""
        moments = self.moments[0, :: max(1, len(self) // 10_000)]
        return posterior_sample(moments.float(), rng("latents"))

    def batch(self, n: int, generator, device="cpu", flip=False) -> tuple[Tensor, Tensor]:
        """Latents [n, C, h, w] of n random images, and their labels [n]."""
        index = torch.randint(len(self), (n,), generator=generator)
        mirrored = torch.randint(2 if flip else 1, (n,), generator=generator)
        moments = self.moments[mirrored, index].to(device).float()
        return posterior_sample(moments, generator), self.labels[index].to(device)


@torch.no_grad()
def latents_of(split: Split, vae: "KL16", flip=False, cache=None) -> Latents:
    """The moments of all images of a Split, computed once; flip: also of their mirror images.

    cache: the folder that keeps the images; the moments are kept in it, under a name that changes
    with the rows of the Split and the weights of the autoencoder. None: they are in memory."""
    views = (unchanged, TF.hflip)[: 1 + flip]

    def make(file):
        parts = [(view, rows) for view in views for rows in split.rows.split(16)]
        for view, rows in tqdm(parts, "encoding", leave=False):
            images = view(to_unit(split.stored[rows].to(vae.device)))
            file.write(vae.moments(images).half().cpu().numpy().tobytes())
        return {"images": len(split), "views": len(views)}

    place = None
    if cache:
        digest = hashlib.sha256(split.rows.numpy())
        for weight in vae.state_dict().values():
            digest.update(weight.cpu().numpy())
        place = Path(cache, f"latents-{digest.hexdigest()[:20]}-{len(views)}")
    written, _ = made_once(place, "latents", make)
    side = split.size // vae.stride
    shape = len(views), len(split), 2 * vae.channels, side, side
    return Latents(written.view(torch.float16).view(shape), split.labels)


def with_latents(data: Data, vae: "KL16", flip: bool) -> Data:
    """The data for a generator of latents: it learns them, and what it makes is decoded."""
    latents = latents_of(data.train, vae, flip, data.cache)
    return replace(data, latents=latents, decode=vae.decode)


# 22 KL-16 autoencoder -----------------------------------------------------------------------------
# Convolutions with the official names and arithmetic; a first reader may skip them.


def named(**layers: nn.Module) -> nn.Sequential:
    """The layers, each under its name, applied in this order."""
    return nn.Sequential(OrderedDict(layers))


def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


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
    """Every place of x [B, width, h, w] attends to all of them, with one head."""

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
    """The blocks of one resolution, with attention or without, and the way to the next one."""

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


def downsample(width: int) -> nn.Module:
    """Half the size; padded by a row below and a column to the right."""
    return named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))


def upsample(width: int) -> nn.Module:
    return named(nearest=nn.Upsample(scale_factor=2), conv=conv(width, width))


def middle(width: int) -> nn.Module:
    first, last = ConvBlock(width, width), ConvBlock(width, width)
    return named(block_1=first, attn_1=ConvAttention(width), block_2=last)


def encoder(width: int, widths: list[int], outputs: int) -> nn.Module:
    """Images [B, 3, S, S] -> [B, outputs, S / stride, S / stride]; widths: of the levels."""
    inputs = [width, *widths]
    levels = [Level(a, b, 2, downsample=downsample(b)) for a, b in itertools.pairwise(inputs[:-1])]
    return named(
        conv_in=conv(3, width),
        down=nn.Sequential(*levels, Level(inputs[-2], inputs[-1], 2, attention=True)),
        mid=middle(widths[-1]),
        norm_out=group_norm(widths[-1]),
        silu=nn.SiLU(),
        conv_out=conv(widths[-1], outputs),
    )


def decoder(widths: list[int], channels: int) -> nn.Module:
    """Latents [B, channels, h, w] -> images [B, 3, S, S], by the encoder's levels backward."""
    levels, inputs = {}, widths[-1]
    for i, width in reversed(list(enumerate(widths))):
        levels[str(i)] = Level(inputs, width, 3, upsample=upsample(width) if i else None)
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
    """Latents [B, C, h, w] drawn from a Gaussian of these moments, mean and log variance [B, 2C, h,
    w]; generator: on the CPU."""
    mean, log_variance = moments.chunk(2, 1)
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    return mean + (log_variance.clamp(-30, 20) / 2).exp() * noise


class KL16(nn.Module):
    """The autoencoder of latent diffusion (2112.10752) that MAR's tokens come from.

    multipliers: width of each level, as a multiple of `width`; each but the first halves the image.
    channels: of a latent. Names and arithmetic are those of the official code."""

    pixels_at_once = 2**18  # what is decoded at a time: four images of 256 x 256

    def __init__(self, width=128, multipliers=(1, 1, 2, 2, 4), channels=16):
        super().__init__()
        widths = [width * m for m in multipliers]
        self.channels = channels
        self.stride = 2 ** (len(widths) - 1)  # pixels per side of a latent
        self.scale = KL16_SCALE if (width, *multipliers) == (128, 1, 1, 2, 2, 4) else 0.0  # or open
        self.encoder = encoder(width, widths, 2 * channels)
        self.decoder = decoder(widths, channels)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @property
    def device(self) -> torch.device:
        return self.quant_conv.weight.device

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log variance [B, 2C, h, w] of the latents of images [B, 3, S, S] in [-1, 1]."""
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor, generator) -> Tensor:
        """Latents [B, C, h, w] of images [B, 3, S, S], drawn from their posterior."""
        return posterior_sample(self.moments(images), generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, S, S] in about [-1, 1] of latents [B, C, h, w].

        To save memory, a few at a time, and for a gradient they are computed once more."""

        def decoded(part):
            return self.decoder(self.post_quant_conv(part))

        at_once = max(1, self.pixels_at_once // (latents[0, 0].numel() * self.stride**2))
        parts = [checkpoint(decoded, part, use_reentrant=False) for part in latents.split(at_once)]
        return torch.cat(parts)


def load_kl16(path, device="cpu") -> KL16:
    """The autoencoder from an official file, {"model": weights}, frozen; its widths are read off
    the shapes. InputError names what is missing, unexpected or of the wrong shape."""
    weights = tensors_of(path, load_safely(path, lazily=True), "model")
    weights = {name: value for name, value in weights.items() if not name.startswith("loss.")}
    width = shape_of(path, weights, "encoder.conv_in.weight", 4)[0]
    channels = shape_of(path, weights, "post_quant_conv.weight", 4)[0]
    levels = range(count_blocks(weights, "encoder.down"))
    first = [f"encoder.down.{i}.block.0.conv1.weight" for i in levels]
    widths = [shape_of(path, weights, name, 4)[0] for name in first]
    fits = width and all(w and w % 32 == 0 and w % width == 0 for w in (width, *widths))
    if not (widths and fits):
        raise InputError(f"{path}: the encoder's levels have widths {widths}, on a base of {width}")
    vae = filled(path, partial(KL16, width, [w // width for w in widths], channels), weights)
    return vae.to(device).eval().requires_grad_(False)
