"""maskrl: fast masked image generators in one file, to be read beside three papers.

A masked auto-regressive generator (MAR, arXiv 2406.11838) reveals the tokens of an image over K
iterations, and runs a denoising chain of about 100 steps inside each of them. Three papers attack
that cost, and this file unites them on one model:

    MARVAL     2511.15190  distil the inner chain into ONE denoising step (GSIM, guided score
                           implicit matching), then improve the one-step student by RL
    MaskFocus  2512.18766  spend RL only on the critical steps, found by information gain
    Speed-RL   2512.01094  reward quality and needing fewer steps

Sections, in the order of the papers; each opens with its idea:

    1  Settings     4  Diffusion             7  GSIM              10  Reinforcement learning
    2  Tokens       5  Training a teacher    8  Critical steps    11  Checkpoints
    3  Model        6  Generation            9  Policies

This file needs torch, einops and tqdm, and works alone. Data, command line, resuming, judges,
attention caching and MAR's released weights live in workbench/, which imports it.

Letters, the same in the papers, the docstrings and the code:

    x     [B, L, D]  B images as L tokens of D channels
    mask  [B, L]     true where a token is still hidden
    c     [B, L, W]  context of every token, from the transformer of width W
    z     [B, L, D]  Gaussian noise; g(z, c) is the student's token
    N                rows of a flat batch of tokens: x_0 [N, D], c [N, W], t [N]
    t     0...999    diffusion time, with x_t = alpha_t x_0 + sigma_t eps
    s                guidance; s_p and s_q are scores, gradients of a log density
    K, T             unmasking iterations ("steps"): the maximum; the number an image took
    P, G             prompts (class labels); rollouts of each prompt, which are its group
    R, A             reward, advantage

In sections 9 and 10 mu is the mean of z, sigma the standard deviation of an action, alpha the
exponent of speed, and beta the weight of the KL divergence.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from functools import cache, cached_property, partial
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from tqdm import tqdm

# 1 Settings ---------------------------------------------------------------------------------------
# Every number and choice of the methods. The defaults train the built-in shapes, 16 x 16 pixels, in
# minutes on a CPU. Reading for the first time? Start at section 2.


@dataclass
class Settings:
    """All settings of the methods; `workbench.settings` adds those of a run, and checks them."""

    # tokens
    image_size: int = 16  # height and width, in pixels or latents
    patch: int = 4  # side of a token in pixels; L = (image_size / patch)^2
    mean: float = 0.0  # tokens = (pixels - mean) x scale
    scale: float = 1.0  # makes the variance of the tokens 1
    # model
    width: int = 96  # W, a multiple of 4 and of heads
    depth: int = 2  # blocks of the encoder (and of the decoder)
    decoder_depth: int = 0  # blocks of the decoder; 0: as many as depth
    heads: int = 4  # attention heads
    buffer: int = 4  # copies of the class embedding in front of the tokens
    head_width: int = 128  # width of the diffusion head, an MLP
    head_depth: int = 2  # residual blocks of the diffusion head
    predicts: str = "x_0"  # what the head's network predicts; or eps, MAR's own form
    # generation
    steps: int = 16  # K, unmasking iterations per image
    order: str = "halton"  # the order in which tokens are revealed; or random (MAR's)
    denoise_steps: int = 100  # denoising steps of the teacher's chain
    guidance: float = 1.2  # s; eps = eps_null + s (eps_class - eps_null)
    x_0_limit: float = 1.3  # the chain clips x_0 to +-this (white is 1); 0: off
    # training the teacher
    micro_batch: int = 0  # images of a batch at a time, to save memory; 0: all
    teacher_iters: int = 2600  # updates of the teacher
    teacher_lr: float = 2e-3  # AdamW learning rate of the teacher
    muon_lr: float = 4e-3  # Muon learning rate for hidden matrices; 0: AdamW for everything
    draws: int = 4  # noise draws per hidden token and update, teacher and GSIM
    label_dropout: float = 0.1  # fraction of images trained without their class
    ema: float = 0.995  # limit of the teacher's EMA decay
    # GSIM
    gsim_iters: int = 650  # updates of the student
    heads_iters: int = 0  # how many of these, at the start, train the heads alone
    student_lr: float = 6e-4  # learning rate of the student
    aux_lr: float = 1.2e-3  # learning rate of the auxiliary network
    student_ema: float = 0.98  # limit of the student's EMA decay
    gsim_guidance: str = "linear"  # MAR's schedule of s in GSIM; or constant, as in MARVAL
    noise_ratio: float = 5.0  # sigma / alpha at the one time from which the student jumps
    # RL
    rl_iters: int = 150  # updates of the policy; 0: only the schedule learns
    noise_lr: float = 2e-3  # learning rate of the noise policy
    rl_lr: float = 1e-4  # learning rate of the generator, with action x
    prompts: int = 16  # P, prompts (class labels) per update
    group: int = 8  # G, rollouts per prompt
    action: str = "z"  # z ~ N(mu(c), temperature^2), or x ~ N(g(z, c), explore^2)
    rl_steps: str = "critical"  # which steps are optimised: critical, random, first or all
    critical_steps: int = 4  # K_c, how many steps are optimised per rollout
    explore: float = 0.1  # sigma of action x, and the unit of entropy in routing
    route: float = 0.0  # extra exploration for prompts of low entropy; 0: no routing
    temperature: float = 0.4  # factor on a policy's z: 1 at the start, falling to this
    policy_epochs: int = 4  # updates of noise policy and schedule per batch of rollouts
    clip_ratio: float = 0.2  # eps of the clipped probability ratio
    beta: float = 0.05  # weight of KL(policy || student at the policy's temperature)
    learn_steps: bool = True  # learn a schedule of at most K iterations
    schedule_lr: float = 1e-2  # learning rate of the schedule policy
    schedule_iters: int = 100  # updates of the schedule alone, at the end
    alpha: float = 0.3  # reward = quality x speed^alpha

    @property
    def length(self) -> int:
        """L, tokens per image."""
        return (self.image_size // self.patch) ** 2


def rng(*names, device="cpu") -> torch.Generator:
    """A generator seeded by what it is for, e.g. rng(seed, "gsim", step).

    No random state has to be saved: a resumed run asks for the same names and draws the same."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(plain(names)).encode()))


def rngs(*names, device) -> tuple[torch.Generator, torch.Generator]:
    """Two generators rng(*names): the host's, for numbers that it must know, and the device's.

    On a CPU they are the same one."""
    host = rng(*names)
    return host, host if torch.device(device).type == "cpu" else rng(*names, device=device)


def plain(name) -> Any:
    """Integers of any type, also inside tuples, as int: NumPy's seeds then equal Python's."""
    if isinstance(name, tuple):
        return tuple(map(plain, name))
    return int(name) if isinstance(name, Integral) else name


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
    return (patchify(images, settings.patch) - settings.mean) * pixel_scale(settings)


def to_images(tokens: Tensor, settings: Settings) -> Tensor:
    """Tokens [B, L, D] -> images [B, C, H, W] in about [-1, 1]."""
    return unpatchify(tokens / pixel_scale(settings) + settings.mean, settings.patch)


def pixel_scale(settings: Settings) -> float:
    """settings.scale; ValueError for the 0 of a run's settings that no data has replaced."""
    if not settings.scale:
        raise ValueError("scale is 0: measure it on the images, 1 / the std of their tokens")
    return settings.scale


# 3 Model ------------------------------------------------------------------------------------------
# MAR (2406.11838). An encoder sees the class and the visible tokens; a decoder adds a mask token
# for each hidden one and gives every token a context c; a small MLP, the head, then denoises each
# hidden token on its own, given its c. Names and arithmetic are those of the official code, whose
# `diffloss.net` is our `head`.


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """x [B, n, W] attends to itself, where keys [B, n] is true (None: everywhere)."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
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
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), keys)
        return x + self.mlp(self.norm2(x))


def silu_mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


class TimeEmbedding(nn.Module):
    """t [N] in 0...999 -> cosines and sines of 128 frequencies exp(-ln(1e4) k / 128) -> MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = silu_mlp(256, width, width)
        frequency = torch.exp(-math.log(1e4) * torch.arange(128) / 128)
        self.register_buffer("frequency", frequency, persistent=False)

    def waves(self, t: Tensor) -> Tensor:
        angle = t[:, None].float() * self.frequency
        return torch.cat([angle.cos(), angle.sin()], 1)  # [N, 256]

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.waves(t))


class HeadBlock(nn.Module):
    """Residual MLP block, shifted, scaled and gated by the condition (adaLN).

    MAR has a SiLU in place of the Identity; here it is applied once, for all blocks."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = silu_mlp(width, width, width)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(width, 2 * width))

    def modulate(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, -1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Head(nn.Module):
    """The diffusion head, an MLP: (x_t [N, D], t [N] in 0...999, c [N, W]) -> [N, 2D].

    t [1] is the time of all rows, which is then embedded only once.

    The first D outputs are eps. The last D interpolate the log variance of a denoising step
    (section 4). We train on eps alone, which leaves them at zero, the middle of the range; the
    official code trains them too.

    predicts: what the network itself gives: "eps" (MAR's own form, which its weights need), or
    "x_0", from which eps = (x_t - alpha_t x_0) / sigma_t.
    Differs from MAR, whose network predicts eps: at high noise, where tokens agree on what the
    image will be, eps says next to nothing about x_0. Predicting x_0, a small model learns in
    minutes what otherwise takes hours."""

    def __init__(self, channels: int, context: int, width: int, depth: int, predicts="x_0"):
        super().__init__()
        if predicts not in ("x_0", "eps"):
            raise ValueError(f"a head predicts x_0 or eps, not {predicts!r}")
        self.predicts = predicts
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(context, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)

    def hidden(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        condition = F.silu(self.time_embed(t) + self.cond_embed(c))
        for block in self.res_blocks:
            x = block(x, condition)
        return self.final_layer.modulate(x, condition)

    def network(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.final_layer.linear(self.hidden(self.input_proj(x_t), t, c))

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        out = self.network(x_t, t, c)
        if self.predicts == "eps":
            return out
        x_0, variance = out.chunk(2, -1)
        alpha, sigma = alpha_sigma(t)  # section 4
        return torch.cat([(x_t - alpha * x_0) / sigma, variance], -1)

    def eps(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """eps alone [N, D]; the score is -eps / sigma_t."""
        return self(x_t, t, c).chunk(2, -1)[0]

    def x_0(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """x_0 [N, D], which is (x_t - sigma_t eps) / alpha_t."""
        prediction = self.network(x_t, t, c).chunk(2, -1)[0]
        if self.predicts == "x_0":
            return prediction
        alpha, sigma = alpha_sigma(t)
        return (x_t - sigma * prediction) / alpha


def sincos_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column [side^2, W], with wavelengths from `side` tokens up.

    W / 4 of each; our choice."""
    k = torch.arange(width // 4) / (width // 4)
    angle = torch.arange(side)[:, None] * 2 * math.pi / side * torch.exp(-math.log(100) * k)
    wave = torch.cat([angle.sin(), angle.cos()], 1)  # [side, width / 2]
    rows = repeat(wave, "h w -> (h n) w", n=side)
    columns = repeat(wave, "h w -> (n h) w", n=side)
    return torch.cat([rows, columns], 1)


class MAR(nn.Module):
    """Masked auto-regressive model over continuous tokens (2406.11838).

    classes: names; one more class, the null class, is added. kind: "teacher" (samples with a
    denoising chain), "student" (in one step) or "policy" (a student after RL, which may have a
    `noise_policy` and a `schedule`, section 9). image_channels: 3 for pixels."""

    def __init__(self, settings: Settings, classes: list[str], kind="teacher", image_channels=3):
        super().__init__()
        width, length, buffer = settings.width, settings.length, settings.buffer
        self.classes, self.kind = [str(name) for name in classes], kind
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

    @staticmethod
    def blocks(settings: Settings, depth: int) -> nn.ModuleList:
        return nn.ModuleList(Block(settings.width, settings.heads) for _ in range(depth))

    def init_weights(self) -> None:
        """Differs from MAR, which starts all embeddings at std 0.02 and trains for 400 epochs.

        With classes at std 1 and sines and cosines for positions, both as large as the tokens,
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
        # adaLN-zero: every block of the head starts as the identity, and its network's output as 0
        for layer in (*self.head.res_blocks, self.head.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.head.final_layer.linear.weight)

    @property
    def device(self) -> torch.device:
        return self.fake_latent.device

    def labels(self, classes) -> Tensor:
        """Labels [B] of a list of class names or of integers, of which num_classes is the null
        class; ValueError for anything else."""
        error = ValueError(
            f"labels must be a list of integers in 0...{self.num_classes} or of class names, "
            f"such as {', '.join(self.classes[:8])}"
        )
        if not torch.is_tensor(classes):
            try:
                numbers = [self.classes.index(y) if isinstance(y, str) else y for y in classes]
                classes = torch.tensor(numbers)
            except (TypeError, ValueError):
                raise error from None
        if classes.ndim != 1 or classes.is_floating_point() or classes.dtype == torch.bool:
            raise error
        if not ((0 <= classes) & (classes <= self.num_classes)).all():
            raise error
        return classes.long().to(self.device)

    def null(self, labels: Tensor) -> Tensor:
        """The null class for each of the labels [B]."""
        return torch.full_like(labels, self.num_classes)

    def context(
        self, tokens: Tensor, mask: Tensor, labels: Tensor, hidden: list[int] | None = None
    ) -> Tensor:
        """c [B, L, W] of tokens [B, L, D] under mask [B, L], for labels [B] (num_classes: null).

        Hidden tokens are dropped before the encoder's blocks. Images may hide different numbers of
        tokens: shorter sequences are padded, and nothing attends to the padding, so that each image
        is computed as if it were alone. hidden: these numbers, if the host knows them; else it
        waits for the device."""
        visible = self.visible(mask)
        hidden = mask.sum(1).tolist() if hidden is None else hidden
        most = visible.shape[1] - min(hidden)
        rows = true_first(visible)[:, :most]  # positions of visible tokens, then padding
        keys = None
        if min(hidden) < max(hidden):
            keys = torch.arange(most, device=mask.device) < visible.sum(1)[:, None]  # [B, most]

        x = gather_rows(self.encoder_input(tokens, labels), rows)  # [B, most, W]
        for block in self.encoder_blocks:
            x = block(x, keys)
        x = self.decoder_embed(self.encoder_norm(x))
        full = torch.zeros(*visible.shape, x.shape[-1], device=x.device, dtype=x.dtype)
        x = self.decoder_input(full.scatter(1, rows[..., None].expand_as(x), x), visible)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_output(self.decoder_norm(x))

    def visible(self, mask: Tensor) -> Tensor:
        """Positions [B, buffer + L] that the encoder sees under mask [B, L]: the class and the
        visible tokens."""
        return F.pad(~mask, (self.settings.buffer, 0), value=True)

    def encoder_input(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """`buffer` copies of the class, then all tokens in raster order: [B, buffer + L, W]."""
        classes = torch.cat([self.class_emb.weight, self.fake_latent])[labels]  # [B, W]
        classes = repeat(classes, "b w -> b n w", n=self.settings.buffer)
        x = torch.cat([classes, self.z_proj(tokens)], 1)
        return self.z_proj_ln(x + self.encoder_pos_embed_learned)

    def decoder_input(self, encoded: Tensor, visible: Tensor) -> Tensor:
        """Encoded rows [B, buffer + L, W] where visible, mask tokens elsewhere."""
        x = torch.where(visible[..., None], encoded, self.mask_token.to(encoded.dtype))
        return x + self.decoder_pos_embed_learned

    def decoder_output(self, x: Tensor) -> Tensor:
        """c [B, L, W] from the decoder's rows [B, buffer + L, W]."""
        return x[:, self.settings.buffer :] + self.diffusion_pos_embed_learned


def true_first(mask: Tensor) -> Tensor:
    """Column indices [R, C] of mask [R, C]: those where it is true, in order, then the others."""
    return mask.view(torch.uint8).argsort(dim=1, descending=True, stable=True)


def find_true(mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Row and column [n] of each of the n places where mask [R, C] is true, row by row.

    As mask.nonzero(as_tuple=True), for which the host waits for the device, to learn n."""
    first = mask.flatten().view(torch.uint8).argsort(descending=True, stable=True)[:n]
    return first // mask.shape[1], first % mask.shape[1]


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[b, rows[b]] for every image b: [B, n, W] of x [B, buffer + L, W] and rows [B, n]."""
    return x.gather(1, repeat(rows, "b n -> b n w", w=x.shape[-1]))


# 4 Diffusion --------------------------------------------------------------------------------------
# x_t = alpha_t x_0 + sigma_t eps on a cosine schedule of 1000 times, nearly clean at t = 0 and
# nearly pure noise at t = 999; the head predicts eps. The teacher walks back along a respaced chain
# of about 100 steps; the student jumps from one fixed time tau straight to x_0.


class Diffusion:
    """`n` of the 1000 times of the cosine schedule, evenly spaced from 0 to 999.

    alphas_bar(u) = cos^2((u + 0.008) / 1.008 pi / 2) at u = (t + 1) / 1000, over its value at u =
    0, every beta at most 0.999 (which changes t = 999 alone). `times`, `alpha`, `sigma` and the
    other tables are [n] and, as in the official code, float64, derived from the respaced
    alphas_bar; the posterior log variance of index 0 is that of index 1. n: 2...1000."""

    def __init__(self, n: int = 1000):
        if not 2 <= n <= 1000:
            raise ValueError(f"a chain has 2 to 1000 denoising steps, not {n}")
        u = torch.arange(1001, dtype=torch.float64) / 1000
        bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        alphas_bar = (1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999)).cumprod(0)
        strides = itertools.repeat(999 / (n - 1), n - 1)
        times = itertools.accumulate(strides, initial=0.0)  # as the official code rounds
        self.times = torch.tensor([round(t) for t in times])
        self.alphas_bar = alphas_bar[self.times]
        previous = F.pad(self.alphas_bar[:-1], (1, 0), value=1.0)
        self.betas = 1 - self.alphas_bar / previous
        self.alpha = self.alphas_bar.sqrt()
        self.sigma = (1 - self.alphas_bar).sqrt()
        # q(x_{t-1} | x_t, x_0) = N(coef_x0 x_0 + coef_xt x_t, variance)
        self.coef_x0 = self.betas * previous.sqrt() / (1 - self.alphas_bar)
        self.coef_xt = (1 - previous) * (1 - self.betas).sqrt() / (1 - self.alphas_bar)
        variance = self.betas * (1 - previous) / (1 - self.alphas_bar)
        self.log_variance_min = torch.cat([variance[1:2], variance[1:]]).log()
        self.log_variance_max = self.betas.log()

    def step(self, i: int, x_t, out, noise, temperature=1.0, limits=None) -> Tensor:
        """x_{t-1} from x_t [N, D], the head's output [N, 2D] and noise [N, D], at index i.

        log variance = f log beta + (1 - f) log posterior variance, f = (variance channel + 1) / 2.
        temperature: factor on the step's standard deviation. limits (low, high) clip the estimate
        of x_0: without them an imperfect model blows up at the noisy end, where 1 / alpha_t is
        2e4."""
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
        """The whole ancestral chain from noise x [N, D]; head(x_t, t) -> [N, 2D], t [1]."""
        for i in reversed(range(len(self.times))):
            t = torch.full((1,), int(self.times[i]), device=x.device)
            noise = torch.randn(x.shape, generator=generator, device=x.device)
            x = self.step(i, x, head(x, t), noise, temperature, limits)
        return x


BASE = Diffusion()  # all 1000 times: training, the head and the student look up alpha_t, sigma_t


@cache
def alpha_sigma_table(device: torch.device) -> Tensor:
    return torch.stack([BASE.alpha, BASE.sigma]).float().to(device)  # [2, 1000]


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t [N, 1] at times t [N]."""
    return alpha_sigma_table(t.device)[:, t, None].unbind(0)


def q_sample(x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t eps for x_0, eps [N, D] and times t [N]."""
    alpha, sigma = alpha_sigma(t)
    return alpha * x_0 + sigma * eps


def one_step(head: Head, z: Tensor, c: Tensor, noise_ratio: float) -> Tensor:
    """The student's g(z, c) [N, D] for z [N, D], c [N, W]: one step from a fixed time tau,

        g(z, c) = x_0_hat(sigma_tau z, tau, c) = (sigma_tau z - sigma_tau eps_hat) / alpha_tau,

    with tau the first time at which sigma_tau / alpha_tau >= noise_ratio. This is the head's x_0
    for x_tau without its small term alpha_tau x_0, so the teacher's weights are a good start, as in
    SiD (score identity distillation, 2404.04057). MARVAL does not print its parametrisation; this
    is ours."""
    tau = int(torch.searchsorted(BASE.sigma / BASE.alpha, noise_ratio))
    return head.x_0(float(BASE.sigma[tau]) * z, torch.full((1,), tau, device=z.device), c)


# 5 Training a teacher -----------------------------------------------------------------------------
# MAR's training step: hide a random fraction of an image's tokens, compute contexts from the
# visible ones, and denoise each hidden token given its context. Now and then the label is dropped,
# so that the model also learns the null class, which guidance needs.


def hidden_counts(n: int, length: int, generator) -> Tensor:
    """How many of the L tokens each of n images hides [n]: a uniform fraction, at least one."""
    return torch.ceil(length * torch.rand(n, generator=generator)).clamp(1, length).long()


def random_mask(hidden: Tensor, length: int, generator) -> Tensor:
    """mask [n, L] that hides `hidden` [n] tokens of each row; `hidden` may be on the host."""
    device = generator.device
    rank = torch.rand(len(hidden), length, generator=generator, device=device).argsort(1)
    return rank < hidden.to(device, non_blocking=True)[:, None]


def denoising_loss(head: Head, x_0: Tensor, c: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Mean of w_t |eps - eps_hat(x_t, t, c)|^2 over tokens x_0 [N, D] and their channels.

    MAR's diffusion loss, and the denoising score matching of GSIM's auxiliary network. The weight
    makes it the squared error of what the network predicts: w_t = 1 for eps, and for x_0
    (sigma_t / alpha_t)^2, with alpha_t^-2 at most 1e4, which t > 992 would exceed."""
    error = (head.eps(q_sample(x_0, t, eps), t, c) - eps).square()
    if head.predicts == "x_0":
        alpha, sigma = alpha_sigma(t)
        error = error / alpha.square().clamp(min=1e-4) * sigma.square()
    return error.mean()


@dataclass
class MaskedBatch:
    """Images with hidden tokens, and draws of noise for each token: all that a loss needs.

    `flat` puts the hidden tokens of all draws into one batch of N rows, always in one order."""

    x: Tensor  # [B, L, D]
    mask: Tensor  # [B, L]
    hidden: Tensor  # [B], on the host: how many tokens each image hides
    labels: Tensor  # [B]
    t: Tensor  # [B, draws, L]
    eps: Tensor  # [B, draws, L, D]
    z: Tensor | None = None  # [B, draws, L, D]
    c: Tensor | None = None  # [B, L, W] for the class, where all networks share it; else None
    c_null: Tensor | None = None  # [B, L, W], the same for the null class

    def __getitem__(self, rows: Tensor) -> "MaskedBatch":
        """The sub-batch of these images; rows are on the host."""
        values = (getattr(self, field.name) for field in fields(self))
        parts = (None if v is None else v[rows.to(v.device, non_blocking=True)] for v in values)
        return MaskedBatch(*parts)

    @property
    def N(self) -> int:
        """Rows of `flat`: the hidden tokens of all draws."""
        return int(self.hidden.sum()) * self.t.shape[1]

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row in 0...B draws - 1 and token [N] of every hidden token of every draw."""
        return find_true(repeat(self.mask, "b l -> (b n) l", n=self.t.shape[1]), self.N)

    def flat(self, v: Tensor) -> Tensor:
        """v [B, draws, L, ...], of every draw -> [N, ...]."""
        return v.flatten(0, 1)[self.places]

    def flat_repeated(self, v: Tensor) -> Tensor:
        """v [B, L, ...], the same for all draws -> [N, ...]."""
        row, token = self.places
        return v[row // self.t.shape[1], token]

    def inputs(self) -> tuple:
        """What `MAR.context` gets."""
        return self.x, self.mask, self.labels, self.hidden.tolist()

    def context(self, network: MAR) -> Tensor:
        """c [N, W]. The costly part, so one context serves all draws."""
        c = network.context(*self.inputs()) if self.c is None else self.c
        return self.flat_repeated(c)

    def denoising_loss(self, network: MAR, x_0: Tensor) -> Tensor:
        """The sum of `denoising_loss` over N tokens x_0 [N, D]."""
        c, t, eps = self.context(network), self.flat(self.t), self.flat(self.eps)
        return self.N * denoising_loss(network.head, x_0, c, t, eps)


def micro_batches(hidden: Tensor, size: int) -> list[Tensor]:
    """Rows 0...B - 1 of images that hide `hidden` [B] tokens, in parts of at most size (0: one).

    Rows that hide about as many tokens go together, so that `MAR.context` pads little."""
    by_count = hidden.argsort(stable=True)
    return [rows.sort().values for rows in by_count.split(size or len(hidden))]


def optimizer_step(losses: Iterable[Tensor], *optimizers, max_norm=1.0) -> tuple[float, float]:
    """One step on the sum of `losses`, each of which is computed, and its graph freed, in turn.

    Returns the sum, and the norm of the gradient before it was clipped to max_norm.
    FloatingPointError, before any weight changes, if either is infinite or NaN."""
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = None
    total = 0.0
    for loss in losses:
        loss.backward()
        total = total + loss.detach()
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    loss, norm = torch.stack([total, norm]).tolist()  # the host waits for the device once
    if not math.isfinite(loss + norm):
        raise FloatingPointError("the loss or its gradient is infinite or NaN")
    for optimizer in optimizers:
        optimizer.step()
    return loss, norm


def micro_batched_step(
    loss: Callable, batch: MaskedBatch, size: int, *optimizers
) -> tuple[float, float]:
    """`optimizer_step` on the mean over tokens of the sum loss(batch), `size` images at a time."""
    parts = (batch[rows] for rows in micro_batches(batch.hidden, size)) if size else [batch]
    return optimizer_step((loss(part) / batch.N for part in parts), *optimizers)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, limit: float) -> None:
    """ema <- d ema + (1 - d) model, with d = min(limit, (1 + i) / (10 + i)) at step i.

    Early on d is small, so the initial weights are soon forgotten."""
    d = min(limit, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for the matrices between hidden layers (Jordan et al., 2024).

    Every gradient matrix is replaced by about the nearest orthogonal one, so that all directions of
    a weight move equally far, those with small gradients too. Updates are as large as Adam's, a
    root mean square of 0.2 lr (2502.16982). Matrices of one shape share a batch. As in the original
    they are orthogonalised in bfloat16, but only on GPUs that have it; torch.optim.Muon does so
    everywhere, and most CPUs only emulate it."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.02):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self.update(params, group["lr"], group["momentum"], group["weight_decay"])

    def update(self, params: list, lr: float, momentum: float, weight_decay: float) -> None:
        """Update matrices [n, m], all of one shape."""
        for p in params:
            if not self.state[p]:
                self.state[p]["average"] = torch.zeros_like(p)
        averages, gradients = [self.state[p]["average"] for p in params], [p.grad for p in params]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        nesterov = torch._foreach_lerp(gradients, averages, momentum)
        nesterov = torch.stack(nesterov)
        if nesterov.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
            nesterov = nesterov.bfloat16()
        directions = orthogonalise(nesterov).float()
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        size = 0.2 * lr * math.sqrt(max(params[0].shape))
        torch._foreach_add_(params, list(directions.unbind()), alpha=-size)


def orthogonalise(x: Tensor) -> Tensor:
    """About U V^T of matrices x = U S V^T [B, n, m]: five Newton-Schulz iterations
    x <- a x + (b A + c A^2) x, A = x x^T, each of which moves the singular values towards 1."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    for _ in range(5):
        square = x.mT @ x if tall else x @ x.mT
        factor = -4.7750 * square + 2.0315 * square @ square
        x = 3.4445 * x + (x @ factor if tall else factor @ x)
    return x


def teacher_optimizers(model: MAR) -> dict[str, torch.optim.Optimizer]:
    """AdamW and, if muon_lr is above 0, Muon for the matrices between hidden layers.

    Weight decay: Muon's on all of its matrices, those in the head too; AdamW's, as in MAR, not on
    biases, other 1-D tensors and the head."""
    settings = model.settings
    outer_layers = ("z_proj", "head.input_proj", "head.final_layer")
    muon, decay, no_decay = [], [], []
    for name, p in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        is_matrix = kind == "weight" and isinstance(model.get_submodule(layer), nn.Linear)
        if settings.muon_lr and is_matrix and not name.startswith(outer_layers):
            muon.append(p)
        elif p.ndim == 1 or name.startswith("head."):
            no_decay.append(p)
        else:
            decay.append(p)
    groups = [{"params": decay, "weight_decay": 0.02}, {"params": no_decay, "weight_decay": 0.0}]
    optimizers = {
        "adamw": torch.optim.AdamW(groups, settings.teacher_lr, betas=(0.9, 0.95), fused=True)
    }
    if muon:
        optimizers["muon"] = Muon(muon, settings.muon_lr)
    return optimizers


def warm_up_and_decay(step: int, iters: int) -> float:
    """A factor on the learning rate: 50 steps up, constant, linear to 0 over the second half."""
    return max(0.0, min((step + 1) / 50, 1, 2 * (1 - step / iters)))


def cosine_decay(step: int, iters: int) -> float:
    """A factor on the learning rate: half a cosine from 1 to 0."""
    return (1 + math.cos(math.pi * min(step / iters, 1))) / 2


def learning_rates(optimizers: dict, factor: Callable, iters: int) -> dict:
    """{name of an optimiser + "_rate": the scheduler that multiplies its rate by factor(step)}."""
    factor = partial(factor, iters=iters)
    scheduler = torch.optim.lr_scheduler.LambdaLR
    return {f"{name}_rate": scheduler(opt, factor) for name, opt in optimizers.items()}


class TeacherTraining:
    """MAR's own training. `model` learns; `ema`, the average of its weights, is what is used.

    state: what a run needs besides model and ema to continue exactly; iters: how many updates the
    settings ask for. All three trainings have these.
    Differs from MAR: a uniform fraction of the tokens is hidden (MAR: a normal of mean 1 and std
    0.25 truncated to [0.7, 1]), because a small model should meet the late iterations, with few
    hidden tokens, as often; Muon trains the hidden matrices, which makes the shapes clean within
    minutes; one context serves several draws of noise; the variance channels are not trained."""

    def __init__(self, settings: Settings, classes: list[str], device="cpu", image_channels=3):
        self.model = MAR(settings, classes, image_channels=image_channels).to(device)
        self.ema = deepcopy(self.model).requires_grad_(False)
        self.iters = settings.teacher_iters
        self.optimizers = teacher_optimizers(self.model)
        self.rates = learning_rates(self.optimizers, warm_up_and_decay, self.iters)
        self.state = self.optimizers | self.rates

    def update(self, step: int, x: Tensor, labels: Tensor, seed) -> dict[str, float]:
        """One update on tokens x [B, L, D] of classes labels [B]; returns metrics to log."""
        model, settings = self.model, self.model.settings
        B, L, D = x.shape
        host, generator = rngs(seed, "teacher", step, device=x.device)
        unlabelled = torch.rand(B, generator=host) < settings.label_dropout
        unlabelled = unlabelled.to(x.device, non_blocking=True)
        labels = torch.where(unlabelled, model.null(labels), labels)
        hidden = hidden_counts(B, L, host)
        mask = random_mask(hidden, L, generator)
        on_device = {"generator": generator, "device": x.device}
        t = torch.randint(1000, (B, settings.draws, L), **on_device)
        eps = torch.randn(B, settings.draws, L, D, **on_device)

        batch = MaskedBatch(x, mask, hidden, labels, t, eps)
        optimizers = self.optimizers.values()
        loss, norm = micro_batched_step(self.loss, batch, settings.micro_batch, *optimizers)
        for rate in self.rates.values():
            rate.step()
        update_ema(self.ema, model, step, settings.ema)
        return {"loss": loss, "grad_norm": norm}

    def loss(self, batch: MaskedBatch) -> Tensor:
        """The denoising loss of the hidden tokens, summed over them."""
        return batch.denoising_loss(self.model, batch.flat_repeated(batch.x))


# 6 Generation -------------------------------------------------------------------------------------
# Start with every token hidden. At each of K iterations: compute contexts from the visible tokens,
# draw the tokens to be revealed (by the teacher's chain or the student's one step), reveal, repeat.


def reveal_counts(length: int, steps: int) -> list[int]:
    """MAR's cosine schedule: how many of L tokens each of K iterations reveals; they sum to L.

    floor(L cos(pi/2 (k + 1) / K)) tokens remain hidden after iteration k, at least one less than
    before and, until the last, at least one."""
    hidden, counts = length, []
    for k in range(steps - 1):
        after = math.floor(length * math.cos(math.pi / 2 * (k + 1) / steps))
        after = max(1, min(hidden - 1, after))
        counts.append(hidden - after)
        hidden = after
    return counts + [hidden]


def guidance_scale(s: float, hidden_after: Tensor, length: int) -> Tensor:
    """MAR's linear guidance schedule, 1 + (s - 1)(L - hidden) / L.

    hidden_after: how many tokens remain hidden after the step (0 counts as 1). The scale is that of
    eps = eps_null + scale (eps_class - eps_null), so 1 is no guidance."""
    return 1 + (s - 1) * (length - hidden_after.clamp(min=1)) / length


def guided(head: Callable, c: Tensor, c_null: Tensor, scale: Tensor | float) -> Callable:
    """A head(x_t, t) -> [N, 2D] with eps = eps_null + scale (eps_class - eps_null).

    c, c_null [N, W]; scale a number or [N, 1]. The variance channels are those of the class."""
    return partial(guided_output, head, torch.cat([c, c_null]), scale)


def guided_output(head: Callable, both_c: Tensor, scale, x_t: Tensor, t: Tensor) -> Tensor:
    t = t if len(t) == 1 else t.repeat(2)
    eps, variance = head(x_t.repeat(2, 1), t, both_c).chunk(2, -1)
    eps_class, eps_null = eps.chunk(2)
    eps = eps_null + scale * (eps_class - eps_null)
    return torch.cat([eps, variance[: len(x_t)]], -1)


def eps_of(head: Callable, x_t: Tensor, t: Tensor) -> Tensor:
    """eps alone [N, D] of a head(x_t, t) -> [N, 2D]."""
    return head(x_t, t).chunk(2, -1)[0]


@dataclass
class Sampling:
    """How to sample; fields left as None come from the model.

    steps: K of the cosine schedule, or the counts themselves, such as (1, 2, 3, 4, 6) for 16 tokens
    (None: a policy's learned schedule, else settings.steps).
    guidance: s of a teacher, linear in the fraction revealed (a student has it baked in).
    denoise_steps: of a teacher's chain; 1 for a one-step generator; or (50, 5), annealed from the
    first iteration to the last as in DiSA (2505.20297). temperature: a factor on the chain's noise
    or, in a one-step generator, on z; or (1, 0.4), annealed as well (see `temperature_at`). greedy:
    a learned schedule takes its median count; otherwise it draws one, as in rollouts.
    contexts: who computes c (see `Contexts`)."""

    steps: int | tuple[int, ...] | None = None
    guidance: float | None = None
    denoise_steps: int | tuple[int, int] | None = None
    temperature: float | tuple[float, float] | None = None
    order: str | None = None
    greedy: bool = True
    progress: bool = False
    contexts: Callable | None = None

    def resolve(self, model: MAR) -> "Sampling":
        """A copy whose guidance, denoise_steps, temperature and order are known; ValueError for
        what the model cannot do."""
        settings = model.settings
        denoise_steps, guidance, temperature = self.denoise_steps, self.guidance, self.temperature
        if denoise_steps is None:
            denoise_steps = settings.denoise_steps if model.kind == "teacher" else 1
        if guidance is None:
            guidance = 1.0 if denoise_steps == 1 else settings.guidance
        if temperature is None:
            temperature = (1.0, settings.temperature) if model.kind == "policy" else 1.0
        if model.kind != "teacher" and denoise_steps != 1:
            raise ValueError(f"a {model.kind} takes one denoising step, not {denoise_steps}")
        if denoise_steps == 1 and guidance != 1:
            raise ValueError("in one denoising step guidance is baked in, or there is none")
        order = self.order or settings.order
        if order not in ("random", "halton"):
            raise ValueError(f"there is no order {order!r}, only random and halton")
        resolved = {"denoise_steps": denoise_steps, "guidance": guidance}
        return replace(self, **resolved, temperature=temperature, order=order)

    def counts(self, length: int, settings: Settings) -> list[int]:
        """How many of the `length` tokens to be drawn each iteration reveals."""
        steps = min(length, settings.steps) if self.steps is None else self.steps
        counts = list(steps) if isinstance(steps, tuple) else reveal_counts(length, steps)
        too_few = isinstance(steps, int) and steps < 1
        if too_few or not counts or min(counts) < 1 or sum(counts) != length:
            raise ValueError(f"{length} tokens cannot be revealed in steps {steps}")
        return counts

    def chains(self, iterations: int) -> list["Diffusion | None"]:
        """The denoising chain of every iteration, None for one step."""
        if self.denoise_steps == 1:
            return [None] * iterations
        first, last = self.denoise_steps, self.denoise_steps
        if isinstance(self.denoise_steps, tuple):
            first, last = self.denoise_steps
        return [Diffusion(round(n)) for n in torch.linspace(first, last, iterations).tolist()]

    def temperature_at(self, hidden: Tensor, length: int) -> Tensor:
        """The temperature where `hidden` [...] of the `length` tokens are hidden.

        A pair is interpolated by 2/pi acos(hidden / L), which is k / K after k of K cosine steps:
        early tokens decide what the image will be, late ones are drawn many at a time and have to
        fit together."""
        if not isinstance(self.temperature, tuple):
            return torch.full(hidden.shape, self.temperature, device=hidden.device)
        first, last = self.temperature
        progress = 2 / math.pi * torch.acos(hidden / length)
        return first + (last - first) * progress


@dataclass
class Noise:
    """What a generation starts from. Tokens are revealed from the end of the order, as in MAR:
    order[b, j] before order[b, j - 1]."""

    order: Tensor  # [B, L]
    z: Tensor  # [B, L, D]
    sigma: Tensor | float = 0.0  # of exploration noise on revealed tokens: number or [B, 1 or L, 1]


def draw_noise(model: MAR, n: int, generator, order: str) -> Noise:
    """Orders, "random" or "halton", and z for n images."""
    shape, device = (n, model.length), generator.device
    if order == "random":
        orders = torch.rand(shape, generator=generator, device=device).argsort(1)
    else:
        orders = halton_order(math.isqrt(model.length), n, generator)
    z = torch.randn(*shape, model.channels, generator=generator, device=device)
    return Noise(orders, z)


def halton_order(side: int, n: int, generator) -> Tensor:
    """Orders [n, L] that spread the tokens of every iteration over the image (2503.17076).

    Tokens of the same iteration are drawn independently, so adjacent ones may not match. The cells
    of the grid are visited as points of Halton's sequence in bases 2 and 3 fall into them. Ours:
    each image shifts the grid around its edges, and half of them transpose it."""
    first_visit = halton_cells(side, generator.device)
    y, x = first_visit // side, first_visit % side
    rng_kwargs = {"generator": generator, "device": generator.device}
    dy, dx = torch.randint(side, (2, n, 1), **rng_kwargs)
    y, x = (y + dy) % side, (x + dx) % side
    transpose = torch.rand(n, 1, **rng_kwargs) < 0.5
    return torch.where(transpose, x * side + y, y * side + x).flip(1)  # the end is revealed first


@cache
def halton_cells(side: int, device: torch.device) -> Tensor:
    """The cells [L] of a grid in the order in which Halton's sequence first visits them."""
    cells = {}
    for i in itertools.count(1):
        y, x = (int(radical_inverse(i, base) * side) for base in (2, 3))
        cells.setdefault(y * side + x)
        if len(cells) == side**2:
            return torch.tensor(list(cells), device=device)


def radical_inverse(i: int, base: int) -> Fraction:
    """The digits of i mirrored at the point: 6 = 110 in base 2 gives 0.011 = 3/8."""
    value, digit = Fraction(0), Fraction(1)
    while i:
        digit /= base
        value += digit * (i % base)
        i //= base
    return value


@dataclass
class Trace:
    """What `generate` did. T is the largest of the batch; shorter rows are padded with zero counts.
    A revealed token never changes, so the state before any step is the final image under the step's
    mask."""

    order: Tensor  # [B, L]
    z: Tensor  # [B, L, D]: the noise each token was drawn from; in one step, times its temperature
    temperature: Tensor  # [B, L]
    contexts: Tensor  # [B, L, W]: c of each token when it was revealed
    means: Tensor  # [B, L, D]: each token before exploration noise; without any, the tokens
    counts: Tensor  # [B, T]: tokens revealed
    predictions: Tensor | None  # [B, T, L, D]: the whole image as predicted before each step
    states: Tensor | None  # [B, T, W + 2]: what the schedule policy saw

    @property
    def steps(self) -> Tensor:
        """T of each image [B]."""
        return (self.counts > 0).sum(1)

    def hidden(self) -> Tensor:
        """How many tokens are hidden before each step [B, T]."""
        return self.counts.flip(1).cumsum(1).flip(1)  # all that are revealed from this step on

    def masks(self) -> tuple[Tensor, Tensor]:
        """mask before each step [B, T, L], and which tokens the step revealed [B, T, L]."""
        rank, hidden = self.order.argsort(1)[:, None], self.hidden()[..., None]
        mask = rank < hidden
        return mask, mask & (rank >= hidden - self.counts[..., None])


def class_and_null_context(
    model: MAR, tokens, mask, labels, hidden: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """c for the labels and c for the null class, each [B, L, W], computed in one batch."""
    both = torch.cat([labels, model.null(labels)])
    return model.context(tokens.repeat(2, 1, 1), mask.repeat(2, 1), both, hidden).chunk(2)


class Contexts:
    """c and, under guidance, c_null [B, L, W] in every iteration; finished images get zeros.

    `before` is asked first, for what the schedule sees; `after` once it is known which tokens are
    revealed, for what they are drawn from. Here both answers are the same. A cache, such as
    workbench.lazymar, computes less in between."""

    def __init__(self, model: MAR, labels: Tensor, guided: bool):
        self.model, self.labels, self.guided = model, labels, guided

    def before(
        self, k: int, tokens: Tensor, mask: Tensor, hidden: list[int]
    ) -> tuple[Tensor, Tensor | None]:
        """k: the iteration; tokens [B, L, D], mask [B, L]; hidden: how many each image hides."""
        unfinished, left = slice(None), [n for n in hidden if n]
        if len(left) < len(hidden):
            unfinished, _ = find_true(mask.any(1, keepdim=True), len(left))
        c = torch.zeros(*mask.shape, self.model.settings.width, device=mask.device)
        c_null = torch.zeros_like(c) if self.guided else None
        inputs = tokens[unfinished], mask[unfinished], self.labels[unfinished], left
        if self.guided:
            c[unfinished], c_null[unfinished] = class_and_null_context(self.model, *inputs)
        else:
            c[unfinished] = self.model.context(*inputs)
        self.current = c, c_null
        return self.current

    def after(self, reveal: Tensor) -> tuple[Tensor, Tensor | None]:
        """reveal [B, L]: the tokens that this iteration reveals."""
        return self.current


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
    """Tokens [B, L, D] of new images of classes `labels` [B], their numbers or their names;
    `to_images` shows them.

    `generate(model, labels)` is right for every kind of model: a teacher walks its chain under its
    guidance, a student takes one step, a policy also chooses how many iterations to take.

    sampling: overrides the defaults. noise: order, z and exploration; by default drawn from `seed`,
    and then the same for all models of one shape and order. known: (tokens [B, L, D], mask [L])
    completes images: only the tokens under the mask are drawn. trace: True also returns the Trace;
    "predictions" the Trace with its predictions, for which a teacher draws more noise.
    Same seed, device and arguments: same images."""
    sampling = (sampling or Sampling()).resolve(model)
    labels = model.labels(labels)
    generator = rng(seed, "generate", device=model.device)
    from_seed = draw_noise(model, len(labels), generator, sampling.order)
    noise = noise or from_seed  # drawn in any case, so that what follows is the same
    result = unmask(model, labels, sampling, noise, known, generator, trace == "predictions")
    return result if trace else result[0]


def unmask(model, labels, sampling, noise, known, generator, predictions) -> tuple[Tensor, Trace]:
    """The loop of `generate`: contexts, tokens for some hidden positions, reveal them; K times."""
    tokens, order, to_draw = initial_state(noise, known, model.device)
    schedule = model.schedule if sampling.steps is None else None
    fixed = sampling.counts(to_draw, model.settings)
    chains = sampling.chains(len(fixed))
    contexts = (sampling.contexts or Contexts)(model, labels, sampling.guidance != 1)

    rank = order.argsort(1)
    hidden = torch.full((len(labels),), to_draw, device=model.device)
    host_hidden = [to_draw] * len(labels)  # the same numbers, as the host knows them
    mask = rank < hidden[:, None]
    explores = torch.is_tensor(noise.sigma) or noise.sigma != 0
    means, temperatures = tokens, torch.ones(rank.shape, device=model.device)
    revealed_c = torch.zeros(*rank.shape, model.settings.width, device=model.device)
    counts, predicted, states = [], [], []
    for k in tqdm(range(len(fixed)), "iterations", disable=not sampling.progress, leave=False):
        if not any(host_hidden):
            break
        c, _ = contexts.before(k, tokens, mask, host_hidden)
        temperature = sampling.temperature_at(hidden, model.length)[:, None]
        if schedule is None:
            hidden = hidden - fixed[k]
            host_left = [n - fixed[k] for n in host_hidden]
        else:
            states.append(schedule_state(c, mask, (len(fixed) - k) / model.settings.steps))
            count = schedule.select(states[-1], None if sampling.greedy else generator)
            hidden = (hidden - count).clamp(min=0)  # a finished image hides none
            host_left = hidden.tolist()  # the host waits for the device
        counts.append([n - left for n, left in zip(host_hidden, host_left)])
        still_hidden = rank < hidden[:, None]
        reveal = mask ^ still_hidden
        c, c_null = contexts.after(reveal)

        # which tokens to draw: the whole image, or only what is revealed
        if predictions:
            drawn = find_true(mask, sum(host_hidden))
        else:
            drawn = find_true(reveal, sum(counts[-1]))
        scale = None
        if c_null is not None:
            scale = guidance_scale(sampling.guidance, hidden, model.length)[drawn[0], None]
            c_null = c_null[drawn]
        image = tokens.clone()
        inputs = noise.z[drawn], c[drawn], c_null, scale, temperature[drawn[0]], generator
        image[drawn] = draw_tokens(model, chains[k], *inputs)
        if predictions:
            predicted.append(image)
        shown = reveal[..., None]
        revealed_c = torch.where(shown, c, revealed_c)
        temperatures = torch.where(reveal, temperature, temperatures)
        if explores:
            means = torch.where(shown, image, means)
            exploration = torch.randn(image.shape, generator=generator, device=image.device)
            image = image + noise.sigma * exploration
        tokens = torch.where(shown, image, tokens)
        mask, host_hidden = still_hidden, host_left
    if any(host_hidden):
        raise ValueError(f"tokens are left after {len(fixed)} steps: the schedule has learned more")

    return tokens, Trace(
        order,
        z=noise.z if chains[0] else temperatures[..., None] * noise.z,
        temperature=temperatures,
        contexts=revealed_c,
        means=means if explores else tokens,
        counts=torch.tensor(counts).T.to(model.device, non_blocking=True),
        predictions=torch.stack(predicted, 1) if predicted else None,
        states=torch.stack(states, 1) if states else None,
    )


def draw_tokens(model, chain, z, c, c_null, scale, temperature, generator) -> Tensor:
    """Tokens [N, D] for z [N, D] and c [N, W]: in one step, or by a teacher's chain."""
    settings = model.settings
    if chain is None:
        z = starting_noise(model, temperature * z, c)
        return one_step(model.head, z, c, settings.noise_ratio)
    head = partial(model.head, c=c) if c_null is None else guided(model.head, c, c_null, scale)
    return chain.sample(head, z, generator, temperature, x_0_limits(settings))


def initial_state(noise: Noise, known, device) -> tuple[Tensor, Tensor, int]:
    """Tokens [B, L, D], order [B, L] and the number of tokens to draw, before the first step.

    Known tokens go to the end of the order, where they are never hidden."""
    if known is None:
        return torch.zeros_like(noise.z), noise.order, noise.order.shape[1]
    tokens, mask = known[0].to(device), known[1].to(device).bool()
    order = noise.order.gather(1, true_first(mask[noise.order]))
    return tokens.clone(), order, int(mask.sum())


def x_0_limits(settings: Settings) -> tuple[float, float] | None:
    """The range to which the chain clips its estimate of a token's x_0; None: no clipping."""
    limit, mean, scale = settings.x_0_limit, settings.mean, settings.scale
    return ((-limit - mean) * scale, (limit - mean) * scale) if limit else None


# 7 GSIM -------------------------------------------------------------------------------------------
# MARVAL, stage 1. The student's tokens x_0 = g(z, c) should be distributed as the teacher's. Add
# noise to both up to time t and compare scores: the teacher's guided score s_p, and the student's
# own score s_q, which an auxiliary network S_phi learns from the student's samples. Minimising
# d(s_q - s_p) alone is not enough: s_q changes with the student, and a frozen S_phi cannot show
# how. The theorem replaces that missing gradient by L1, every part of which can be computed.
# Scores appear as eps-predictions here, s = -eps / sigma_t.


def pseudo_huber(y: Tensor, r: float = 1e-5) -> tuple[Tensor, Tensor]:
    """d(y) = sqrt(|y|^2 + r^2) - r [N] and its derivative y / sqrt(|y|^2 + r^2) [N, D]."""
    root = (y.square().sum(-1, keepdim=True) + r**2).sqrt()
    return root.squeeze(-1) - r, y / root


def velocity_weight(t: Tensor) -> Tensor:
    """1 / alpha_t [N, 1]: turns differences of eps into differences of velocities."""
    alpha, _ = alpha_sigma(t)
    return 1 / alpha


def eps_weight(t: Tensor) -> Tensor:
    """1 [N, 1]: differences of eps themselves."""
    return torch.ones_like(t, dtype=torch.float)[:, None]


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

    x_0 = g(z, c) [N, D]: the student's tokens; t [N] in 0...999; eps [N, D]. eps_q, eps_p:
    functions (x_t, t) -> eps [N, D], the student's own score and the teacher's guided one. Their
    parameters must be frozen, but gradient must pass through them to x_t, in y_t and in d'(y_t)
    too. One term alone does not have the gradient of the divergence (L1 with a squared d is SiD
    with alpha = 1). distance: y -> d [N], d' [N, D]. weight: t -> [N, 1], a factor on y_t and on
    the residual; for each t this is the theorem with another distance, which the paper leaves
    open. Ours compares velocities: what all tokens share is decided at high noise, where eps is
    nearly x_t whatever x_0 is, and an error in eps hardly counts."""
    x_t = q_sample(x_0, t, eps)
    e_q, e_p = eps_q(x_t, t), eps_p(x_t, t)
    d, d_prime = distance(weight(t) * (e_p - e_q))  # eps_p - eps_q = sigma_t (s_q - s_p)
    residual = weight(t) * (eps - e_q)  # grad log p(x_t | x_0) = -eps / sigma_t
    L1 = -(d_prime * residual).sum(-1)
    return L1, d


def gsim_loss(*args, **kwargs) -> Tensor:
    """L_GSIM = L1 + L2 [N] of `gsim_terms`."""
    L1, L2 = gsim_terms(*args, **kwargs)
    return L1 + L2


def student_of(teacher: MAR, settings: Settings) -> MAR:
    """A trainable one-step student with the teacher's weights."""
    student = deepcopy(teacher).requires_grad_(True)
    student.kind, student.settings = "student", settings
    return student


def gsim_times(shape: tuple, generator) -> Tensor:
    """t uniform on 20...984 (our choice): beyond these, scores are uninformative or blow up."""
    return torch.randint(20, 985, shape, generator=generator, device=generator.device)


class Distillation:
    """GSIM: the student (`model`, and `ema`, the average of its weights) and the auxiliary network
    S_phi (`aux`) both start as the teacher and are updated in turn. The teacher is frozen.

        min over phi E w_t |eps - eps_phi(x_t)|^2,  min over theta E[L1 + L2],  x_0 = g_theta(z, c)

    Adam with beta_1 = 0 and cosine decay. loss: `gsim_loss`; another one is for ablations. The
    first heads_iters updates train heads alone: until then no transformer has moved, so that the
    three networks share the teacher's contexts, without gradient, which saves work and memory.
    Differs from the paper: by default guidance follows MAR's linear schedule as if the iteration
    revealed one token; gsim_guidance "constant" is the paper's."""

    def __init__(self, teacher: MAR, settings: Settings, loss: Callable = gsim_loss):
        self.teacher, self.gsim_loss = teacher.requires_grad_(False), loss
        self.model = student_of(teacher, settings)
        self.aux = deepcopy(self.model)
        self.ema = deepcopy(self.model).requires_grad_(False)
        self.iters = settings.gsim_iters
        adam = partial(torch.optim.Adam, betas=(0.0, 0.999), fused=True)
        self.optimizers = {
            "student": adam(self.model.parameters(), settings.student_lr),
            "aux": adam(self.aux.parameters(), settings.aux_lr),
        }
        self.rates = learning_rates(self.optimizers, cosine_decay, self.iters)
        self.state = self.optimizers | self.rates | {"aux_network": self.aux}

    def update(self, step: int, x: Tensor, labels: Tensor, seed) -> dict[str, float]:
        """One update of each network on data tokens x [B, L, D], labels [B]; metrics to log.

        A uniform fraction of the tokens is hidden, since the student meets every stage of
        generation. Each network computes its own context from the same visible data tokens."""
        settings = self.model.settings
        size = settings.micro_batch
        host, generator = rngs(seed, "gsim", step, device=x.device)
        hidden = hidden_counts(len(x), x.shape[1], host)
        mask = random_mask(hidden, x.shape[1], generator)
        shared = None, None
        if step < settings.heads_iters:
            shared = self.teacher_contexts(x, mask, labels, hidden.tolist())

        images = x, mask, hidden, labels
        batch = self.draw(images, generator, *shared)
        aux_loss, _ = micro_batched_step(self.aux_loss, batch, size, self.optimizers["aux"])
        self.aux.requires_grad_(False)  # its parameters, but not the way through it to x_t
        batch = self.draw(images, generator, *shared)
        loss, norm = micro_batched_step(self.student_loss, batch, size, self.optimizers["student"])
        self.aux.requires_grad_(True)
        for rate in self.rates.values():
            rate.step()
        update_ema(self.ema, self.model, step, settings.student_ema)
        return {"loss": loss, "aux_loss": aux_loss, "grad_norm": norm}

    @torch.no_grad()
    def teacher_contexts(self, *inputs) -> tuple[Tensor, Tensor]:
        return class_and_null_context(self.teacher, *inputs)

    def draw(self, images: tuple, generator, c=None, c_null=None) -> MaskedBatch:
        """The images (x, mask, hidden, labels) with fresh times, eps and z for every token."""
        B, L, D = images[0].shape
        shape = B, self.model.settings.draws, L
        t = gsim_times(shape, generator)
        eps, z = torch.randn(2, *shape, D, generator=generator, device=generator.device)
        return MaskedBatch(*images, t, eps, z, c, c_null)

    def student_tokens(self, batch: MaskedBatch) -> Tensor:
        """g(z, c) [N, D]."""
        z, c = batch.flat(batch.z), batch.context(self.model)
        return one_step(self.model.head, z, c, self.model.settings.noise_ratio)

    def guidance(self, batch: MaskedBatch) -> Tensor | float:
        """s of the teacher [N, 1], or the same for all tokens."""
        s = self.model.settings.guidance
        if self.model.settings.gsim_guidance == "constant":
            return s
        hidden = batch.mask.sum(1, keepdim=True).expand_as(batch.mask)
        return guidance_scale(s, batch.flat_repeated(hidden) - 1, self.model.length)[:, None]

    def aux_loss(self, batch: MaskedBatch) -> Tensor:
        """Denoising score matching: S_phi learns the score of the student's samples."""
        with torch.no_grad():
            x_0 = self.student_tokens(batch)
        return batch.denoising_loss(self.aux, x_0)

    def student_loss(self, batch: MaskedBatch) -> Tensor:
        """L_GSIM of the student's tokens, summed over them."""
        with torch.no_grad():
            c_q = batch.context(self.aux)
        both = batch.c, batch.c_null
        if batch.c is None:
            both = self.teacher_contexts(*batch.inputs())
        c_p, c_null = map(batch.flat_repeated, both)
        eps_p = partial(eps_of, guided(self.teacher.head, c_p, c_null, self.guidance(batch)))
        eps_q = partial(self.aux.head.eps, c=c_q)
        x_0, t, eps = self.student_tokens(batch), batch.flat(batch.t), batch.flat(batch.eps)
        weight = velocity_weight if self.model.head.predicts == "x_0" else eps_weight
        return self.gsim_loss(x_0, t, eps, eps_q, eps_p, weight=weight).sum()


# 8 Critical steps ---------------------------------------------------------------------------------
# MaskFocus. Most of what an image will be is decided in a few steps; only those are optimised.


def information_gain(
    predictions: Tensor, final: Tensor, valid: Tensor | None = None, mean: Tensor | float = 0.0
) -> Tensor:
    """V_k = |S_{k+1} - S_k| [B, T] with S_k = cos(E_k, E_final)   (MaskFocus, critical steps).

    predictions [B, T, ...]: the whole image as predicted before step k reveals; final [B, ...].
    S after the last step is 1. valid [B, T]: the steps that a row has; the others get -inf. The
    embedding E is what is passed in, minus `mean` (the mean image), without which the cosine
    saturates. The paper embeds in its tokeniser's space; we take the tokens."""
    E, E_final = (predictions - mean).flatten(2), (final - mean).flatten(1)
    S = F.cosine_similarity(E, E_final[:, None], dim=-1)  # [B, T]
    if valid is not None:
        S = S.masked_fill(~valid, 1.0)
    S_next = torch.cat([S[:, 1:], torch.ones_like(S[:, :1])], 1)
    gain = (S_next - S).abs()
    return gain if valid is None else gain.masked_fill(~valid, -math.inf)


def critical_steps(score: Tensor, k: int) -> Tensor:
    """The k steps of largest score in each row, as a mask [B, T]; never those of score -inf."""
    top = score.topk(min(k, score.shape[1]), dim=1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, top, True) & score.isfinite()


# What --rl-steps may name: functions (trace, tokens, mean_image, generator) -> score [B, T].


def score_critical(trace: Trace, tokens: Tensor, mean_image: Tensor, generator) -> Tensor:
    return information_gain(trace.predictions, tokens, trace.counts > 0, mean_image)


def score_random(trace: Trace, tokens: Tensor, mean_image: Tensor, generator) -> Tensor:
    return torch.rand(trace.counts.shape, generator=generator, device=generator.device)


def score_first(trace: Trace, tokens: Tensor, mean_image: Tensor, generator) -> Tensor:
    steps = torch.arange(trace.counts.shape[1], device=trace.counts.device)
    return -steps.float().expand(trace.counts.shape)


STEP_SCORES = {"critical": score_critical, "random": score_random, "first": score_first}
NEED_PREDICTIONS = ("critical",)  # scores that look at trace.predictions


def select_steps(
    trace: Trace, tokens: Tensor, settings: Settings, mean_image: Tensor, generator
) -> Tensor:
    """Which steps of each rollout are optimised [B, T]: all of them, or K_c by their score.

    mean_image [1, L, D]: tokens that the information gain subtracts."""
    valid = trace.counts > 0
    if settings.rl_steps == "all":
        return valid
    score = STEP_SCORES[settings.rl_steps](trace, tokens, mean_image, generator)
    return critical_steps(score.masked_fill(~valid, -math.inf), settings.critical_steps)


# 9 Policies ---------------------------------------------------------------------------------------
# What RL changes must be an action with a probability, and must vary within a group. The noise z
# that tokens start from decides the quality of an image. A small network chooses its mean from the
# tokens' contexts; the student stays as it is. Speed-RL rewards images that need fewer steps: as in
# learned unmasking policies (2512.09106), an action must then decide how many tokens a step reveals
# (there it chooses positions, here a count). Both networks are ours.


class NoisePolicy(nn.Module):
    """The mean mu(c) [N, D] of the noise z ~ N(mu(c), temperature^2) that tokens start from.

    It starts at zero, where the policy is the student at that temperature."""

    def __init__(self, width: int, channels: int, inner: int = 128):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.net = silu_mlp(width, inner, channels)
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, c: Tensor) -> Tensor:
        return self.net(self.norm(c))


def starting_noise(model: MAR, z: Tensor, c: Tensor) -> Tensor:
    """z [N, D] of mean 0, shifted by mu(c) where the model has a noise policy."""
    return z if model.noise_policy is None else z + model.noise_policy(c)


def schedule_state(c: Tensor, mask: Tensor, steps_left: float) -> Tensor:
    """What the schedule sees [B, W + 2]: the hidden tokens' mean context, the fraction of the L
    tokens that are hidden, and steps_left, the fraction of the K steps that are left."""
    hidden = mask.sum(1, keepdim=True)
    mean_context = (c * mask[..., None]).sum(1) / hidden.clamp(min=1)
    left = torch.full_like(mean_context[:, :1], steps_left)
    return torch.cat([mean_context, hidden / mask.shape[1], left], 1)


class SchedulePolicy(nn.Module):
    """Chooses how many tokens a step reveals: any number, and in the Kth step all that are hidden.

    log n is normal around log f m with standard deviation w. m tokens take the image one step
    further along the cosine schedule or, if it is late, to where that is after this step. A network
    sets the factor f and the width w, which start at 1 and 1/2. An image that is early stays early:
    if it waited, all would take K steps, and none would show what fewer are worth."""

    def __init__(self, width: int, length: int, max_steps: int, inner: int = 64):
        super().__init__()
        self.length, self.max_steps = length, max_steps
        still_hidden = length - torch.tensor(reveal_counts(length, max_steps)).cumsum(0)
        self.register_buffer("cosine", still_hidden, persistent=False)  # [K], after each step
        self.norm = nn.LayerNorm(width)
        self.net = silu_mlp(width + 2, inner, 2)
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def log_probs(self, states: Tensor) -> Tensor:
        """log pi [N, L] of revealing 1...L tokens, for states [N, W + 2]."""
        L, K = self.length, self.max_steps
        hidden = (L * states[:, -2:-1]).round().clamp(min=1)
        left = (K * states[:, -1:]).round().long()
        angle = (hidden / L).acos() + math.pi / (2 * K)
        one_step_on = L * angle.clamp(max=math.pi / 2).cos()
        m = (hidden - torch.minimum(one_step_on, self.cosine[K - left])).clamp(min=1)
        features = torch.cat([self.norm(states[:, :-2]), states[:, -2:]], 1)
        log_f, log_w = self.net(features).chunk(2, 1)
        w = 0.5 * 2 ** log_w.tanh()  # 1/4 to 1: narrower, it would no longer explore
        n = torch.arange(1, L + 1, device=states.device)
        logits = -((n.log() - m.log() - log_f) / w).square() / 2 - n.log()
        least = torch.where(left > 1, 1, hidden)
        return logits.masked_fill((n < least) | (n > hidden), -math.inf).log_softmax(-1)

    def select(self, states: Tensor, generator=None) -> Tensor:
        """Counts [N]: drawn from pi or, without a generator, its medians."""
        pi = self.log_probs(states).exp().nan_to_num(0.0)
        pi[:, -1] += pi.sum(1) == 0  # after divergence, which rewards tell: all that are hidden
        if generator is None:
            return (pi.cumsum(1) < 0.5).sum(1) + 1
        return torch.multinomial(pi, 1, generator=generator).squeeze(1) + 1


def speed(steps: Tensor, max_steps: int) -> Tensor:
    """(K - T + 1) / K in (0, 1]; 1 for one step. As in 2512.09106, with K in place of L."""
    return (max_steps - steps + 1) / max_steps


def total_reward(quality: Tensor, steps: Tensor, settings: Settings) -> Tensor:
    """R [B] = quality x speed^alpha of images that took `steps` [B].

    Our choice: Speed-RL's formula is not public. A sum instead of the product would pay for images
    that are fast and wrong."""
    return quality * speed(steps, settings.steps) ** settings.alpha


# 10 Reinforcement learning ------------------------------------------------------------------------
# GRPO, group relative policy optimisation, and then MARVAL's back-propagation of a reward. The
# action is one of two Gaussians, whose log pi is known in closed form:
#     z   the noise of a token, drawn from N(mu(c), temperature^2); only mu learns
#     x   a token, drawn from N(g(z, c), sigma^2) with z given; the whole generator learns
# The rollouts of a group share the class and the order and, if z is no action, z: they differ in
# their actions alone. quality(images [B, 3, H, W] in [-1, 1], labels [B]) -> [B] in [0, 1] is the
# reward for an image.


def group_advantages(rewards: Tensor, group: int, divide=True) -> Tensor:
    """A = (R - mean) / std within each group of G consecutive rollouts [P G]   (GRPO).

    The std is over G - 1; a group whose rewards are all equal gets zeros. divide=False leaves the
    std out, as Dr. GRPO does (2503.20783): dividing makes small differences count as much as large
    ones."""
    R = rearrange(rewards, "(p g) -> p g", g=group)
    A = R - R.mean(1, keepdim=True)
    std = R.std(1, keepdim=True)
    return torch.where(std > 1e-5, A / std if divide else A, 0.0).flatten()


def token_log_prob(x: Tensor, mean: Tensor, sigma: Tensor | float) -> Tensor:
    """log pi [N]: the mean over D channels of log N(x; mean, sigma^2), sigma [N] or a number.

    With a mean instead of a sum, ratios are the exact ones to the power 1 / D, and stay tame."""
    sigma = torch.as_tensor(sigma, device=mean.device)[..., None]
    log_density = -((x - mean) / sigma).square() / 2 - (sigma * math.sqrt(2 * math.pi)).log()
    return log_density.mean(-1)


def token_kl(mean: Tensor, mean_ref: Tensor | float, sigma: Tensor | float) -> Tensor:
    """KL(N(mean, sigma^2) || N(mean_ref, sigma^2)) [N], averaged over channels, as log pi is."""
    sigma = sigma[..., None] if torch.is_tensor(sigma) else sigma
    return ((mean - mean_ref) / sigma).square().mean(-1) / 2


def policy_loss(
    log_prob: Tensor,
    log_prob_old: Tensor,
    advantage: Tensor,
    kl: Tensor | float = 0.0,
    clip_ratio: float = 0.2,
    beta: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-mean(min(r A, clip(r, 1 - eps, 1 + eps) A) - beta KL) over actions [N], r = pi / pi_old.

    The objective of GRPO and MaskFocus. Returns the loss and, to log, `ratio` and `kl`, their
    means; `clip_fraction`; and `log_ratio`, the largest |log r|."""
    kl = torch.as_tensor(kl, dtype=log_prob.dtype, device=log_prob.device)
    log_ratio = log_prob - log_prob_old.detach()
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    objective = torch.minimum(ratio * advantage, clipped * advantage) - beta * kl
    outside = (ratio - 1).abs() > clip_ratio
    metrics = {
        "ratio": ratio.mean().detach(),
        "clip_fraction": outside.float().mean(),
        "kl": kl.mean().detach(),
        "log_ratio": log_ratio.abs().max().detach(),
    }
    return -objective.mean(), metrics


def as_numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Metrics to log; the host waits for the device once."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist()))


@dataclass
class Rollouts:
    """Finished images of a batch of prompts, the G rows of a group one after the other; B = P G."""

    tokens: Tensor  # [B, L, D]
    trace: Trace
    labels: Tensor  # [B]
    quality: Tensor  # [B]
    sigma: Tensor  # [B, L]: the standard deviation of each token's action


def rollout(
    model: MAR,
    quality: Callable,
    labels: Tensor,
    seed,
    predictions=True,
    explore=True,
) -> Rollouts:
    """G rollouts of each class of `labels` [P].

    predictions: whether their Trace has them. explore: if false, only the schedule's choices vary
    within a group. Sharing class, order and, if z is no action, z within a group keeps the
    gradient unbiased and lowers its variance."""
    settings, G = model.settings, model.settings.group
    generator = rng(seed, "shared", device=labels.device)
    shared = draw_noise(model, len(labels), generator, settings.order)
    noise = Noise(*(v.repeat_interleave(G, 0) for v in (shared.order, shared.z)))
    sigma = torch.ones(len(labels) * G, device=labels.device)
    if settings.route and explore:
        sigma = routing(model, labels, generator).repeat_interleave(G)
        noise.order = shuffled_order(noise.order, sigma - 1, generator)
    labels = labels.repeat_interleave(G)
    if explore and settings.action == "z":
        z = torch.randn(noise.z.shape, generator=generator, device=labels.device)
        noise.z = sigma[:, None, None] * z
    elif explore:
        sigma = settings.explore * sigma
        noise.sigma = sigma[:, None, None]
    trace = "predictions" if predictions else True
    tokens, trace = generate(model, labels, Sampling(greedy=False), noise, seed=seed, trace=trace)
    sigma = sigma[:, None].expand(trace.order.shape)
    if settings.action == "z":
        sigma = sigma * trace.temperature
    with torch.no_grad():
        Q = checked_quality(quality(to_images(tokens, settings), labels.clone()), labels)
    return Rollouts(tokens, trace, labels, Q, sigma)


def checked_quality(quality: Tensor, labels: Tensor) -> Tensor:
    """quality [B]; ValueError or FloatingPointError if a reward returns anything else."""
    if not torch.is_tensor(quality) or quality.shape != labels.shape:
        returned = getattr(quality, "shape", type(quality).__name__)
        raise ValueError(f"the reward returned {returned}, not a tensor of {len(labels)} numbers")
    if not quality.isfinite().all():
        raise FloatingPointError("the reward is infinite or NaN for some images")
    return quality.to(labels.device)


@torch.no_grad()
def routing(model: MAR, labels: Tensor, generator, draws: int = 8) -> Tensor:
    """A factor on the sigma of each prompt's actions [P], 1 or more (MaskFocus, dynamic routing).

    The half of the prompts with the lower entropy H explores 1 + route exp(-H) times as much. H =
    max(0, mean over tokens and channels of log(std / explore)), the std being that of one-step
    predictions of a fully hidden image over `draws` of z.
    Differs from the paper, which routes the samples of a group step by step and gives each token
    the temperature T exp(-H / alpha) + T_min: our samples share class and order, so they are alike
    at first, and prompts are routed instead."""
    settings, P, L, D = model.settings, len(labels), model.length, model.channels
    mask = torch.ones(P, L, dtype=torch.bool, device=labels.device)
    c = model.context(torch.zeros(P, L, D, device=labels.device), mask, labels)
    z = torch.randn(draws * P * L, D, generator=generator, device=labels.device)
    g = one_step(model.head, z, repeat(c, "p l w -> (n p l) w", n=draws), settings.noise_ratio)
    variance = g.view(draws, P, L, D).var(0).clamp(min=1e-12)
    H = (variance.log() / 2 - math.log(settings.explore)).mean((1, 2)).clamp(min=0)
    low_entropy = H.argsort().argsort() < P // 2
    return torch.where(low_entropy, 1 + settings.route * torch.exp(-H), 1.0)


def shuffled_order(order: Tensor, amount: Tensor, generator) -> Tensor:
    """Orders [B, L], each shuffled by `amount` [B], the std by which a token moves, in units of L.

    Exploration in MaskFocus also changes which positions are revealed; how much is our choice."""
    position = order.argsort(1) / order.shape[1]  # in [0, 1)
    jitter = torch.randn(position.shape, generator=generator, device=order.device)
    return (position + amount[:, None] * jitter).argsort(1)


def policy_of(student: MAR, settings: Settings, can_learn_steps=True) -> MAR:
    """A trainable copy of the student, with a noise policy for action z and, if the settings ask
    for one and it can learn, a schedule policy."""
    if settings.action not in ("z", "x"):
        raise ValueError(f"there is no action {settings.action!r}, only z and x")
    if student.kind == "policy":
        raise ValueError("RL starts from a student, not from a policy")
    policy = deepcopy(student).requires_grad_(settings.action == "x")
    policy.kind, policy.settings = "policy", settings
    if settings.action == "z":
        add_noise_policy(policy)
    if settings.learn_steps and can_learn_steps:
        add_schedule(policy)
    return policy


def add_noise_policy(model: MAR) -> None:
    model.noise_policy = NoisePolicy(model.settings.width, model.channels).to(model.device)


def add_schedule(model: MAR) -> None:
    settings = model.settings
    schedule = SchedulePolicy(settings.width, settings.length, settings.steps)
    model.schedule = schedule.to(model.device)


class PolicyGradient:
    """RL on selected steps and on the schedule; `model` is the policy, `reference` the student.

    With action z the noise policy learns, with action x the generator, both from the tokens of the
    selected steps; the schedule learns from all of its choices. Each has its own optimiser, so that
    no loss needs a weight. At the end the schedule learns alone, to suit the generator as it has
    become: from four times the prompts, with a learning rate that falls to 0.

    This is the exact policy gradient, up to its length and each group's 1 / std, with rl_steps
    "all", no routing, beta 0 and one update per batch of rollouts; with action x also without a
    learned schedule, whose states new contexts change. Its length: it is a mean over the counted
    tokens and channels, A has the factor (G - 1) / G, and the norm is clipped to 1. Fewer steps are
    MaskFocus' choice, made on the finished image, and biased.
    Differs from MaskFocus, which counts all hidden tokens of a step, under a fresh mask. Those were
    not drawn from this context: for discrete tokens a surrogate, but continuous ones lie up to six
    sigma from the means of an early step, so we count the tokens that the step revealed.

    Noise policy and schedule see contexts that the rollouts kept, so that an update costs next to
    nothing: each batch of rollouts gets several."""

    can_learn_steps = True  # a schedule needs a policy gradient

    def __init__(self, student: MAR, settings: Settings, quality: Callable, mean_image: Tensor):
        self.quality, self.mean_image = quality, mean_image.to(student.device)
        self.model = policy_of(student, settings, self.can_learn_steps)
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
        self.iters = settings.rl_iters + (settings.schedule_iters if schedule is not None else 0)

    @staticmethod
    def adamw(parameters, lr: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def is_schedule_alone(self, step: int) -> bool:
        """Whether only the schedule learns at this step."""
        return step >= self.model.settings.rl_iters

    def prompts(self, step: int) -> int:
        """P, the number of labels that `update` should get at this step."""
        return self.model.settings.prompts * (4 if self.is_schedule_alone(step) else 1)

    def update(self, step: int, labels: Tensor, seed) -> dict[str, float]:
        """G rollouts of each class of `labels` [P], then updates on them; metrics to log."""
        seed = seed, "rollout", step
        if not self.is_schedule_alone(step):
            return self.policy_update(labels, seed)
        settings = self.model.settings
        progress = (step - settings.rl_iters) / settings.schedule_iters
        lr = settings.schedule_lr * max(0.0, 1 - progress)
        self.optimizers["schedule"].param_groups[0]["lr"] = lr
        return self.update_schedule_alone(labels, seed)

    def policy_update(self, labels: Tensor, seed) -> dict[str, float]:
        """Updates of the noise policy or generator on selected steps, and of the schedule.

        Groups whose rewards do not differ have A = 0 and take no part."""
        settings, generator = self.model.settings, rng(seed, "update", device=labels.device)
        predictions = settings.rl_steps in NEED_PREDICTIONS
        rollouts = rollout(self.model, self.quality, labels, seed, predictions)
        A, metrics = self.advantages(rollouts)
        trace = rollouts.trace
        steps = select_steps(trace, rollouts.tokens, settings, self.mean_image, generator)
        trace.predictions = None  # which take the most memory, and have served
        is_prefix = steps.float().cumprod(1).sum(1) == steps.sum(1)
        metrics["frac_not_prefix"] = (~is_prefix).float().mean()
        metrics = as_numbers(metrics)
        counted = (steps[..., None] & trace.masks()[1]).any(1)
        if metrics["frac_zero_advantage"] < 1:
            learn = self.noise_update if settings.action == "z" else self.generator_update
            metrics |= learn(rollouts, A, counted)
        if self.model.schedule is not None and settings.action == "z":
            metrics["schedule_clipped"] = self.schedule_update(rollouts.trace, A)
        elif self.model.schedule is not None:
            alone = self.update_schedule_alone(labels, (seed, "schedule"))
            metrics["schedule_clipped"] = alone["schedule_clipped"]
        return metrics

    def update_schedule_alone(self, labels: Tensor, seed) -> dict[str, float]:
        """Updates of the schedule alone, on rollouts of its own.

        Nothing else varies within a group, so that its rewards differ by their schedules alone. In
        most groups they differ only by speed, and little. Divided by their std, these would outvote
        the few whose images fewer steps spoil: advantages are not divided."""
        rollouts = rollout(self.model, self.quality, labels, seed, False, explore=False)
        A, metrics = self.advantages(rollouts, divide=False)
        clipped = self.schedule_update(rollouts.trace, A)
        return as_numbers(metrics) | {"schedule_clipped": clipped}

    def advantages(self, rollouts: Rollouts, divide=True) -> tuple[Tensor, dict[str, Tensor]]:
        """A [B], and what to log of the rewards."""
        settings, steps = self.model.settings, rollouts.trace.steps
        R = total_reward(rollouts.quality, steps, settings)
        A = group_advantages(R, settings.group, divide)
        metrics = {
            "reward": R.mean(),
            "quality": rollouts.quality.mean(),
            "steps": steps.float().mean(),
            "reward_std": R.view(-1, settings.group).std(1).mean(),
            "frac_zero_advantage": (A == 0).float().mean(),
        }
        return A, metrics

    def noise_update(self, rollouts: Rollouts, A: Tensor, counted: Tensor) -> dict[str, float]:
        """Updates of the noise policy on the counted tokens [B, L], with advantages A [B]."""
        model, settings, trace = self.model, self.model.settings, rollouts.trace
        counted = (counted & (A != 0)[:, None]).nonzero(as_tuple=True)
        row = counted[0]  # [N]: the rollout of each counted token
        c, sigma = trace.contexts[counted], rollouts.sigma[counted]
        mu_old = model.noise_policy(c).detach()
        z = trace.z[counted] + mu_old  # as it was drawn
        log_old = token_log_prob(z, mu_old, sigma)
        history = []
        for _ in range(self.model.settings.policy_epochs):
            mu = model.noise_policy(c)
            log_prob, kl = token_log_prob(z, mu, sigma), token_kl(mu, 0.0, sigma)
            loss, metrics = policy_loss(
                log_prob, log_old, A[row], kl, settings.clip_ratio, settings.beta
            )
            history.append(metrics)
            loss, norm = optimizer_step([loss], self.optimizers["noise"])
        first = {"log_ratio": history[0]["log_ratio"]}  # 0 if sampler and learner agree
        return as_numbers(history[-1] | first) | {"loss": loss, "grad_norm": norm}

    def generator_update(self, rollouts: Rollouts, A: Tensor, counted: Tensor) -> dict[str, float]:
        """One update on the counted tokens [B, L], with advantages A [B]."""
        history = []
        losses = self.step_losses(rollouts, A, counted & (A != 0)[:, None], history)
        loss, norm = optimizer_step(losses, self.optimizers["generator"])
        total = {key: sum(w * metrics[key] for w, metrics in history) for key in history[0][1]}
        log_ratios = torch.stack([metrics["log_ratio"] for _, metrics in history])
        total["log_ratio"] = log_ratios.max()  # 0 if sampler and learner agree
        return as_numbers(total) | {"loss": loss, "grad_norm": norm}

    def step_losses(self, rollouts: Rollouts, A, counted, history: list) -> Iterable[Tensor]:
        """The contributions of some steps at a time to the mean over the counted tokens [B, L];
        history gets the weight and the metrics of each.

        log pi_old is of the means as sampled: the ratio compares sampler and learner."""
        settings, trace = self.model.settings, rollouts.trace
        mask, reveal = trace.masks()
        reveal = reveal & counted[:, None]
        row, step = reveal.any(2).nonzero(as_tuple=True)
        mask, reveal = mask[row, step], reveal[row, step]  # [M, L] of M steps
        for part in micro_batches(mask.sum(1), settings.micro_batch):
            rows, reveals = row[part], reveal[part]
            x = rollouts.tokens[rows]
            inputs = x, mask[part], rollouts.labels[rows], reveals, trace.z[rows]
            _, g = revealed_tokens(self.model, *inputs)
            with torch.no_grad():
                _, g_ref = revealed_tokens(self.reference, *inputs)
            of_token = rows.repeat_interleave(reveals.sum(1), output_size=len(g))
            sigma, g_old = rollouts.sigma[rows][reveals], trace.means[rows][reveals]
            x = x[reveals]
            log_prob, log_old = token_log_prob(x, g, sigma), token_log_prob(x, g_old, sigma)
            kl, advantage = token_kl(g, g_ref, sigma), A[of_token]
            loss, metrics = policy_loss(
                log_prob, log_old, advantage, kl, settings.clip_ratio, settings.beta
            )
            weight = len(g) / reveal.sum()
            history.append((weight, metrics))
            yield loss * weight

    def schedule_update(self, trace: Trace, A: Tensor) -> float:
        """Updates of the schedule policy on all of its choices in a Trace; the clip fraction.

        It does not start from a base model, so there is no KL term."""
        schedule, settings = self.model.schedule, self.model.settings
        if not A.any():
            return 0.0
        row, step = ((trace.counts > 0) & (A != 0)[:, None]).nonzero(as_tuple=True)
        states, counts = trace.states[row, step], trace.counts[row, step]
        log_old = None
        for _ in range(self.model.settings.policy_epochs):
            log_prob = schedule.log_probs(states).gather(1, counts[:, None] - 1).squeeze(1)
            if log_old is None:
                log_old = log_prob.detach()
            loss, metrics = policy_loss(log_prob, log_old, A[row], clip_ratio=settings.clip_ratio)
            optimizer_step([loss], self.optimizers["schedule"])
        return metrics["clip_fraction"].item()


class RewardBackpropagation(PolicyGradient):
    """MARVAL-RL: L = -E[R(G(z, class, K))], by the reward's own gradient through the generation.

    For rewards that are differentiable in the pixels, and a fixed number of steps. With rl_steps
    "all" the gradient passes through the whole generation, as in the paper; otherwise through the
    selected steps alone, which needs less memory. beta KL holds the policy to the student."""

    can_learn_steps = False

    def policy_update(self, labels: Tensor, seed) -> dict[str, float]:
        """One update on P x G images of the classes `labels` [P]; metrics to log."""
        model, settings = self.model, self.model.settings
        generator = rng(seed, "update", device=labels.device)
        labels = labels.repeat_interleave(settings.group)
        predictions = "predictions" if settings.rl_steps in NEED_PREDICTIONS else True
        tokens, trace = generate(model, labels, seed=seed, trace=predictions)
        keep = select_steps(trace, tokens, settings, self.mean_image, generator)
        actions = (trace.counts * keep).sum(1)  # [B]: how many tokens an image has in those steps
        history = []
        parts = micro_batches(keep.sum(1), settings.micro_batch)
        losses = (self.image_loss(history, labels, trace, keep, actions, rows) for rows in parts)
        learner = self.optimizers["generator" if settings.action == "x" else "noise"]
        _, norm = optimizer_step(losses, learner)
        quality, kl = sum(history).tolist()
        steps = trace.steps.float().mean().item()
        return {"quality": quality, "steps": steps, "kl": kl, "grad_norm": norm}

    def image_loss(self, history: list, labels, trace: Trace, keep, actions, rows) -> Tensor:
        """The contribution of some images to the means over all; quality and KL go to history."""
        model, settings = self.model, self.model.settings
        of_rows = {v: getattr(trace, v)[rows] for v in ("order", "z", "temperature", "counts")}
        part = replace(trace, **of_rows)
        tokens, kl = replay(model, self.reference, labels[rows], part, keep[rows])
        images = to_images(tokens, settings)
        per_image = checked_quality(self.quality(images, labels[rows].clone()), labels[rows])
        if not per_image.requires_grad:
            raise ValueError("the reward has no gradient in the pixels: back-propagation needs one")
        quality = per_image.sum() / len(labels)
        kl = kl * actions[rows].sum() / actions.sum()
        history.append(torch.stack([quality, kl]).detach())
        return settings.beta * kl - quality


def replay(
    model: MAR, reference: MAR, labels: Tensor, trace: Trace, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """The generation of `trace` again: tokens [B, L, D] with gradient through the steps keep
    [B, T], and the mean KL of the actions to the reference's at those steps.

    At the other steps no graph is recorded: their tokens are constants to later contexts."""
    settings, tokens, kls = model.settings, torch.zeros_like(trace.z), []
    masks, reveals = trace.masks()
    for k in range(keep.shape[1]):
        unfinished = reveals[:, k].any(1)
        for with_graph in (True, False):
            chosen = unfinished & (keep[:, k] == with_graph)
            rows = chosen.nonzero()[:, 0]
            if len(rows) == 0:
                continue
            inputs = tokens[rows], masks[rows, k], labels[rows], reveals[rows, k], trace.z[rows]
            with torch.set_grad_enabled(with_graph):
                c, g = revealed_tokens(model, *inputs)
            if with_graph and settings.beta and model.noise_policy is not None:
                sigma = trace.temperature[rows][reveals[rows, k]]
                kls.append(token_kl(model.noise_policy(c), 0.0, sigma))
            elif with_graph and settings.beta:
                with torch.no_grad():
                    _, g_ref = revealed_tokens(reference, *inputs)
                kls.append(token_kl(g, g_ref, settings.explore))
            tokens = tokens.masked_scatter((chosen[:, None] & reveals[:, k])[..., None], g)
    kl = torch.cat(kls).mean() if kls else torch.zeros((), device=tokens.device)
    return tokens, kl


def revealed_tokens(network: MAR, tokens, mask, labels, reveal, z) -> tuple[Tensor, Tensor]:
    """c [n, W] and g [n, D] of the tokens that a step reveals."""
    revealed = reveal.nonzero(as_tuple=True)
    c = network.context(tokens, mask, labels)[revealed]
    z = starting_noise(network, z[revealed], c)
    return c, one_step(network.head, z, c, network.settings.noise_ratio)


# 11 Checkpoints -----------------------------------------------------------------------------------
# MAR's own layout, {"model": weights, "model_ema": weights}, and what it takes to use them.


def checkpoint(model: MAR, ema: MAR | None = None) -> dict:
    """The content of a file that carries its own settings."""
    return {
        "kind": model.kind,
        "settings": asdict(model.settings),
        "classes": model.classes,
        "model": model.state_dict(),
        "model_ema": (ema or model).state_dict(),
    }


def from_checkpoint(content: dict) -> MAR:
    """The EMA model of `checkpoint`'s content, on the CPU, ready for `generate`."""
    weights = content["model_ema"]
    known = {f.name for f in fields(Settings)}  # a run's settings are more
    settings = Settings(**{k: v for k, v in content["settings"].items() if k in known})
    image_channels = weights["z_proj.weight"].shape[1] // settings.patch**2
    model = MAR(settings, content["classes"], content["kind"], image_channels)
    if "noise_policy.norm.weight" in weights:
        add_noise_policy(model)
    if "schedule.norm.weight" in weights:
        add_schedule(model)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def save(path, model: MAR) -> None:
    torch.save(checkpoint(model), path)


def load(path, device="cpu") -> MAR:
    """The model in a file; no code in the file is ever run."""
    return from_checkpoint(torch.load(path, "cpu", weights_only=True)).to(device)
