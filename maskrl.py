"""maskrl: fast masked image generators in one file, to be read beside three papers.

A masked auto-regressive generator (MAR, arXiv 2406.11838) reveals the tokens of an image over K iterations
and runs a ~100-step denoising chain inside each. Three papers attack that cost, and this file unites them:

    MARVAL    (2511.15190)  distil the inner chain into ONE denoising step (GSIM, guided score implicit matching: the
                            student learns to have the teacher's scores, gradients of the log density), then RL
    MaskFocus (2512.18766)  spend RL only on the critical steps, found by information gain
    Speed-RL  (2512.01094)  reward quality and needing fewer steps

Letters:  x tokens of an image [B, L, D] (L tokens of D channels) - mask [B, L], true = still hidden - c context of each
token, out of the transformer [B, L, W] - z Gaussian noise [B, L, D] - t diffusion time 0...999, x_t = alpha_t x_0 +
sigma_t eps - s guidance (and, in code, the Settings) - s_p, s_q scores - K unmasking iterations ("steps"), at most; T
those that an image took - g(z, c) the one-step student's token (a g alone may be a random generator) - P prompts (class
labels), G rollouts of each (a group) - A advantage, R reward - N rows of a flat batch, mostly tokens [N, D]. In
sections 3 to 6 alpha and sigma are alpha_t and sigma_t; in 8 and 9 sigma is the exploration noise, alpha the exponent
of speed and beta the weight of the KL.

Contents:  1 Settings - 2 Tokens - 3 Model - 4 Diffusion - 5 Generation - 6 GSIM - 7 Critical steps -
8 Schedule policy - 9 Policy gradient - 10 Checkpoints and scripts.  The methods are here; the experiment around them
(data, training loop, reward network, judge, report) is in train_distill.py, and other rewards are in train_rl.py.
"""

import math
import os
import sys
import zlib
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from tqdm import tqdm


class InputError(ValueError):
    """The user gave something that cannot work; the message says what, and how to mend it."""


class NonFinite(RuntimeError):
    """A loss or gradient is infinite or NaN, or a reward outside its range; no weight was changed by it."""


# 1 Settings ---------------------------------------------------------------------------------------------
# Every knob of the project, flat. Each script's command line is made from these fields, and every checkpoint
# carries them, so that `sample.py` needs nothing but a path. Reading for the first time? Go on to section 2: the
# options of the methods are explained where they are used.


def option(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """All settings; the defaults are the preset `tiny`, which trains in minutes on two CPU cores."""

    # data
    data: str = option("shapes", "'shapes' (drawn on the fly), or a folder with one sub-folder of images per class")
    image_size: int = option(16, "height and width in pixels; must be a multiple of --patch")
    image_channels: int = option(3, "3, RGB (16, the latents of MAR's autoencoder, cannot be loaded yet)")
    difficulty: int = option(0, "of the shapes: 0 = 9 easy classes; 1 = 16, coloured backgrounds, more jitter", (0, 1))
    per_class: int = option(3000, "images per class that 'shapes' draws")
    flip: bool = option(False, "mirror training images at random (not for digits or letters)")
    seed: int = option(0, "seeds the shapes, initial weights and noise; the split of a folder is always the same")
    # model: an encoder and a decoder of `depth` blocks each, and the diffusion head
    mean: float = option(0.0, "tokens = (pixels in [-1, 1] - mean) x scale; used if --scale is given, else measured")
    scale: float = option(0.0, "0 = measured on the training images, so that tokens have mean 0 and variance 1")
    patch: int = option(4, "side of a token in pixels; L = (image_size / patch)^2")
    width: int = option(96, "width W of the transformer")
    depth: int = option(2, "transformer blocks in the encoder, and again in the decoder")
    heads: int = option(4, "attention heads")
    buffer: int = option(4, "rows at the start of the sequence that carry the class")
    head_width: int = option(128, "width of the MLP diffusion head")
    head_depth: int = option(2, "residual blocks of the diffusion head")
    velocity: bool = option(True, "the head predicts velocity, and eps is made from it; off for MAR's own weights")
    # generation
    steps: int = option(16, "K, unmasking iterations per image")
    denoise_steps: int = option(100, "denoising steps of the teacher's chain inside each iteration")
    guidance: float = option(1.5, "s in eps = eps_null + s (eps_class - eps_null); 1 = none. The teacher is "
                                  "sampled with it, and GSIM bakes it into the student, which is sampled without")
    clip: float = option(1.3, "the chain clips its estimate of x_0 to pixels within +-clip, theirs being 1; 0 = off")
    # teacher
    batch: int = option(64, "images per teacher update")
    teacher_iters: int = option(2500, "teacher updates")
    teacher_lr: float = option(2e-3, "AdamW; 50 steps of warm-up, constant, linear to 0 over the last quarter")
    draws: int = option(4, "noise draws per hidden token and update, of the teacher and of GSIM")
    label_dropout: float = option(0.1, "share of images trained without their class, which guidance needs")
    ema: float = option(0.995, "limit of the EMA decay min(ema, (1+i)/(10+i)) after i updates")
    # GSIM
    gsim_batch: int = option(64, "images per GSIM update")
    gsim_iters: int = option(800, "student updates")
    student_lr: float = option(6e-4, "Adam (beta_1 = 0), cosine decay")
    aux_lr: float = option(1.2e-3, "the same, of the auxiliary network")
    aux_updates: int = option(1, "auxiliary updates per student update")
    student_ema: float = option(0.98, "as ema, of the student")
    gsim_terms: str = option("L1+L2", "of the GSIM loss; one alone is for ablations", ("L1+L2", "L1", "L2"))
    gsim_masks: str = option("uniform", "mask ratios of GSIM, see random_mask", ("uniform", "mar", "mixed"))
    gsim_units: str = option("velocity", "in which GSIM compares the scores, a weight over t", ("velocity", "eps"))
    distance: str = option("huber", "d of GSIM: pseudo-Huber or squared", ("huber", "squared"))
    huber: float = option(1e-5, "r of the pseudo-Huber distance sqrt(|y|^2 + r^2) - r")
    noise_ratio: float = option(5.0, "the student starts at the time tau with sigma_tau / alpha_tau = this")
    # RL
    rl_iters: int = option(150, "policy updates")
    rl_lr: float = option(3e-5, "AdamW, of the generator")
    schedule_lr: float = option(3e-3, "AdamW, of the schedule policy")
    prompts: int = option(16, "groups per policy update")
    group: int = option(8, "G, rollouts per group; they share class, order and z")
    method: str = option("grpo", "policy gradient over groups of rollouts, or the reward's own gradient through the "
                         "whole generation (MARVAL-RL), for rewards differentiable in the pixels and fixed steps; "
                         "it uses prompts, group (as one batch), rl_steps, critical_steps, explore and beta alone",
                         ("grpo", "backprop"))
    rl_steps: str = option("critical", "steps to optimise: K_c by information gain, at random, the first, or all",
                           ("critical", "random", "first", "all"))
    critical_steps: int = option(4, "K_c, the steps per rollout that are optimised")
    rl_tokens: str = option("revealed", "tokens that count at such a step: those revealed there (the exact policy "
                            "gradient), all that are hidden, or all under a fresh mask (surrogates)",
                            ("revealed", "hidden", "fresh"))
    rl_epochs: int = option(1, "updates per rollout; from the second on, ratios leave 1 and are clipped")
    schedule_epochs: int = option(4, "the same, of the schedule policy, for which they cost nearly nothing")
    explore: float = option(0.1, "sigma of the Gaussian policy around the one-step student")
    route: float = option(0.0, "the less uncertain half of the prompts explores 1 + this x exp(-H) times as much, H "
                          "the entropy of the first prediction; 0 = no routing")
    baseline: str = option("mean", "of the advantage: mean of the group, or of its other rollouts (leave-one-out)",
                           ("mean", "others"))
    normalise: bool = option(True, "divide the advantage by the group's std")
    quality_floor: float = option(0.0, "rollouts of lower quality are left out; groups without any spread always are")
    clip_ratio: float = option(0.2, "epsilon of the clipped ratio")
    beta: float = option(0.2, "weight of KL(policy || student)")
    learn_steps: bool = option(True, "learn a schedule policy of at most --steps; off: the cosine schedule of --steps")
    alpha: float = option(0.5, "reward = quality * speed^alpha; 0 = quality alone")
    additive: bool = option(False, "reward = quality + alpha * speed: an ablation, which fast and wrong images exploit")
    # reward and judge
    reward: str = option("embedded", "the quality that RL climbs: 'embedded' (a network trained here on data), 'fit' "
                         "(exact, for shapes), 'clip', a .csv file of preferred pairs, or 'module:function'; or a "
                         "weighted mean: 'clip:1,embedded:0.5,module:function:2'")
    clip_model: str = option("ViT-B-32", "of --reward clip, as open_clip names it; OpenAI's: ViT-B-32-quickgelu")
    clip_weights: str = option("laion2b_s34b_b79k", "a local file, or the name of weights that open_clip downloads")
    clip_prompt: str = option("a high-quality and harmonious picture of {class}", "the text of --reward clip")
    judge_iters: int = option(400, "updates of the reward network, of the judge, and of a reward learned from pairs")
    judge_n: int = option(2250, "images in each row of the judge's table, if the held-out data hold twice as many")

    def __post_init__(self):
        counts = ("patch depth heads buffer batch teacher_iters draws gsim_batch gsim_iters aux_updates "
                  "rl_iters rl_epochs schedule_epochs prompts critical_steps judge_iters")
        for names, ok, said in (
                (counts, lambda v: v >= 1, "be at least 1"),
                ("group", lambda v: v >= 2, "be at least 2, or no rollout differs from another"),
                ("teacher_lr student_lr aux_lr rl_lr schedule_lr huber explore", lambda v: v > 0, "be above 0"),
                ("label_dropout ema student_ema quality_floor", lambda v: 0 <= v < 1, "lie in [0, 1)"),
                ("denoise_steps", lambda v: 2 <= v <= 1000, "lie in 2...1000; the student takes one step anyway"),
                ("image_size", lambda v: v % self.patch == 0, f"be a multiple of --patch {self.patch}"),
                ("width", lambda v: v % 4 == v % self.heads == 0, f"be a multiple of 4 and of --heads {self.heads}"),
                ("steps", lambda v: 1 <= v <= self.length, f"lie in 1...{self.length}, the number of tokens"),
                ("noise_ratio", lambda v: 0 < v < 1e4, "lie between 0 and 10,000")):
            for name in names.split():
                if not ok(value := getattr(self, name)):
                    raise InputError(f"--{name.replace('_', '-')} {value} must {said}")

    @property
    def length(self):
        """L, tokens per image."""
        return (self.image_size // self.patch) ** 2

    @property
    def has_schedule(self):
        """Whether RL gives the model a schedule policy: back-propagation trains none, so it must not sample by one."""
        return self.learn_steps and self.method == "grpo"

    @property
    def clip_range(self):
        """Lowest and highest value that the chain lets a token's x_0 take, or None."""
        return ((-self.clip - self.mean) * self.scale, (self.clip - self.mean) * self.scale) if self.clip else None

    @property
    def channels(self):
        """D, channels per token."""
        return self.image_channels * self.patch**2


PRESETS = {
    "tiny": {},
    "small": dict(image_size=64, patch=4, width=384, depth=6, heads=6, buffer=16, head_width=512, head_depth=4,
                  steps=64, teacher_iters=100_000, teacher_lr=4e-4, ema=0.9999, gsim_iters=20_000, student_lr=3e-5,
                  aux_lr=6e-5, critical_steps=6, prompts=4, batch=128, judge_iters=2000),
}


def preset(name, **overrides):
    """The Settings of preset `tiny` or `small`, with single fields replaced."""
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return Settings(**{**PRESETS[name], **overrides})


def rng(*names, device="cpu"):
    """A generator seeded by what it is for, e.g. rng(seed, "gsim", step): a resumed run draws the same noise."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(names).encode()))


# 2 Tokens ------------------------------------------------------------------------------------------------
# A token is a square patch of pixels, all its channels in one row: continuous, no codebook.


def patchify(images, patch):
    """Images [B, C, H, W] -> tokens [B, L, D], in raster order, D = C patch^2."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens, patch):
    """Tokens [B, L, D] of a square image -> images [B, C, H, W]; the exact inverse of `patchify`."""
    side = math.isqrt(tokens.shape[1])
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=side, w=side, p=patch, q=patch)


def to_tokens(images, s):
    """Images [B, C, H, W] in [-1, 1] -> tokens [B, L, D] as the model sees them, of mean 0 and variance 1."""
    return (patchify(images, s.patch) - s.mean) * s.scale


def to_images(tokens, s):
    """Tokens [B, L, D] -> images [B, C, H, W] in about [-1, 1]."""
    return unpatchify(tokens / s.scale + s.mean, s.patch)


# 3 Model -------------------------------------------------------------------------------------------------
# MAR (2406.11838): an encoder sees the class and the visible tokens, a decoder adds a mask token for each hidden
# one and gives every token a context c; a small MLP then denoises each hidden token alone, given its c.
# Names and arithmetic are those of the official code, whose `diffloss.net` is our `head`.


def sincos_positions(side, width):
    """Sines and cosines of row and column, W / 4 of each, wavelengths of `side` tokens and more (ours) [side^2, W]."""
    frequency = 2 * math.pi / side * torch.exp(-math.log(100) * torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], 1)  # [side, width / 2]
    return torch.cat([repeat(wave, "h w -> (h n) w", n=side), repeat(wave, "h w -> (n h) w", n=side)], 1)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, keys=None):  # x [B, N, W]; keys [B, N]: rows that may be attended to, None = all
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=None if keys is None else keys[:, None, None, :])
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x, keys=None):
        x = x + self.attn(self.norm1(x), keys)
        return x + self.mlp(self.norm2(x))


def silu_mlp(*widths):
    """Linear layers with SiLU between them."""
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


class TimeEmbedding(nn.Module):
    """t in 0...999 (also after respacing) -> [cos, sin] of 128 frequencies exp(-ln(1e4) k / 128) -> MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = silu_mlp(256, width, width)

    @staticmethod
    def waves(t):
        angle = t[:, None].float() * torch.exp(-math.log(1e4) * torch.arange(128, device=t.device) / 128)
        return torch.cat([angle.cos(), angle.sin()], 1)

    def forward(self, t):
        return self.mlp(self.waves(t))


class HeadBlock(nn.Module):
    """Residual MLP block; the condition shifts, scales and gates it (adaLN, adaptive layer norm)."""

    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = silu_mlp(width, width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, condition):
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, condition):
        shift, scale = self.adaLN_modulation(condition).chunk(2, -1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class Head(nn.Module):
    """The MLP diffusion head: (x_t [N, D], t [N] in 0...999, c [N, W]) -> [N, 2D].

    The first D channels are eps; the last D interpolate the log variance of the denoising step (section 4). We train
    on eps alone, which leaves the last D at exactly zero, the middle; the official code trains them.
    velocity: the network gives v = alpha_t eps - sigma_t x_0, and eps = sigma_t x_t + alpha_t v is made from it (False:
    it gives eps itself, as MAR's weights do). At high noise eps says next to nothing about x_0, and there the tokens
    agree with each other: with v a small model learns in minutes what it otherwise takes hours to."""

    def __init__(self, channels, context, width, depth, velocity=True):
        super().__init__()
        self.velocity = velocity
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(context, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)

    def forward(self, x_t, t, c):
        condition = self.time_embed(t) + self.cond_embed(c)
        x = self.input_proj(x_t)
        for block in self.res_blocks:
            x = block(x, condition)
        out = self.final_layer(x, condition)
        if self.velocity:
            v, variance = out.chunk(2, -1)
            alpha, sigma = BASE.alpha_sigma(t)  # BASE: all 1000 times, section 4
            out = torch.cat([sigma * x_t + alpha * v, variance], -1)
        return out

    def eps(self, x_t, t, c):
        """eps alone [N, D]; the score is -eps / sigma_t."""
        return self(x_t, t, c).chunk(2, -1)[0]


class MAR(nn.Module):
    """Masked auto-regressive model over continuous tokens (2406.11838).

    L tokens of D channels, `num_classes` classes and one null class; its schedule policy (section 8) is None
    until RL gives it one. `settings` and `classes` (names) travel with it into checkpoints."""

    def __init__(self, settings, classes):
        super().__init__()
        s, W = settings, settings.width
        self.settings, self.classes, self.num_classes = s, list(classes), len(classes)
        self.length, self.channels, self.buffer = s.length, s.channels, s.buffer
        self.class_emb = nn.Embedding(self.num_classes, W)
        self.fake_latent = nn.Parameter(torch.zeros(1, W))  # the null class
        self.z_proj = nn.Linear(self.channels, W)  # MAR's name: it projects tokens, not z
        self.z_proj_ln = nn.LayerNorm(W, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, s.buffer + s.length, W))
        self.encoder_blocks = nn.ModuleList(Block(W, s.heads) for _ in range(s.depth))
        self.encoder_norm = nn.LayerNorm(W, eps=1e-6)
        self.decoder_embed = nn.Linear(W, W)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, W))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, s.buffer + s.length, W))
        self.decoder_blocks = nn.ModuleList(Block(W, s.heads) for _ in range(s.depth))
        self.decoder_norm = nn.LayerNorm(W, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, s.length, W))
        self.head = Head(self.channels, W, s.head_width, s.head_depth, s.velocity)
        self.schedule = None
        self.apply(self._init)
        # Differs from MAR, which starts all embeddings at std 0.02 and trains for 400 epochs: classes at 1 and
        # places at sines and cosines are of the size of the tokens; attention finds its neighbours in minutes.
        for p, std in ((self.class_emb.weight, 1.0), (self.fake_latent, 1.0),
                       (self.mask_token, 0.02), (self.diffusion_pos_embed_learned, 0.02)):
            nn.init.normal_(p, std=std)
        for p in (self.encoder_pos_embed_learned, self.decoder_pos_embed_learned):
            nn.init.normal_(p, std=0.7)
            p.data[0, s.buffer:] = sincos_positions(math.isqrt(s.length), W)
        # adaLN-zero: every block of the head starts as the identity, and its output as zero
        for layer in [b.adaLN_modulation[1] for b in self.head.res_blocks] + [
                self.head.final_layer.adaLN_modulation[1], self.head.final_layer.linear]:
            nn.init.zeros_(layer.weight)

    @staticmethod
    def _init(module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def context(self, tokens, mask, labels=None):
        """c [B, L, W] of tokens [B, L, D], mask [B, L] (true = hidden), labels [B] (num_classes = null; None: all so).

        Hidden tokens are dropped before the encoder's blocks. Images may hide different numbers of tokens: shorter
        sequences are padded, and the padding is never attended to, so that each comes out as if it were alone."""
        B, L, _ = tokens.shape
        if labels is None:
            labels = torch.full((B,), self.num_classes, device=tokens.device)
        classes = torch.cat([self.class_emb.weight, self.fake_latent])[labels]  # [B, W]

        # encoder: `buffer` copies of the class and the visible tokens, in raster order
        x = torch.cat([repeat(classes, "b w -> b n w", n=self.buffer), self.z_proj(tokens)], 1)
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned)
        visible = F.pad(~mask, (self.buffer, 0), value=True)  # [B, buffer + L]
        count = visible.sum(1)
        most = int(count.max())
        keep = (~visible).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]  # visible places first
        x = x.gather(1, repeat(keep, "b n -> b n w", w=x.shape[-1]))
        keys = None if int(count.min()) == most else torch.arange(most, device=x.device) < count[:, None]
        for block in self.encoder_blocks:
            x = block(x, keys)

        # decoder: what was kept goes back among mask tokens; the padding lands on hidden places and is overwritten
        x = self.decoder_embed(self.encoder_norm(x))
        full = torch.zeros(B, self.buffer + L, x.shape[-1], device=x.device, dtype=x.dtype)
        full = full.scatter(1, repeat(keep, "b n -> b n w", w=x.shape[-1]), x)
        x = torch.where(visible[..., None], full, self.mask_token.to(x.dtype)) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.buffer:] + self.diffusion_pos_embed_learned


def random_mask(n, length, how, generator, device="cpu"):
    """mask [n, L], true = hidden, with 1...L hidden tokens per row at random places.

    how: `mar`, ratios from a normal of mean 1 and std 0.25 cut to [0.7, 1], as in training MAR; `uniform` over
    1...L, every stage of generation alike; `mixed`, half of the rows each."""
    u = torch.rand(n, generator=generator)
    # inverse distribution function of that half of a normal which lies below its mean
    ratio = 1 + 0.25 * math.sqrt(2) * torch.erfinv((u - 1) * math.erf(0.3 / 0.25 / math.sqrt(2)))
    mar = torch.ceil(length * ratio).clamp(1, length)
    uniform = torch.ceil(length * u).clamp(1, length)
    hidden = {"mar": mar, "uniform": uniform, "mixed": torch.where(torch.arange(n) % 2 == 0, mar, uniform)}[how]
    rank = torch.rand(n, length, generator=generator).argsort(1)
    return (rank < hidden[:, None]).to(device)


# 4 Diffusion ---------------------------------------------------------------------------------------------
# x_t = alpha_t x_0 + sigma_t eps on a cosine schedule of 1000 times; the head returns eps. The teacher walks a
# respaced chain of ~100 ancestral steps; the student jumps from one fixed time tau to x_0.


class Diffusion:
    """`n` of the 1000 times of the cosine schedule abar(u) = cos^2((u + 0.008) / 1.008 pi/2), u = (t + 1) / 1000,
    over its value at u = 0, each beta at most 0.999 (which changes t = 999 alone).

    times [n] on 0...999; alpha, sigma [n]; tables in float64. Official semantics: endpoints 0 and 999, all tables
    derived again from the respaced abar, posterior log variance of index 0 taken from index 1."""

    def __init__(self, n=1000):
        if not 2 <= n <= 1000:
            raise InputError(f"a denoising chain has 2...1000 steps (1 = the one-step student), not {n}")
        bar = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        alphas_bar = (1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999)).cumprod(0)
        self.times = torch.tensor([round(i * 999 / (n - 1)) for i in range(n)])
        self.alphas_bar = alphas_bar[self.times]
        previous = F.pad(self.alphas_bar[:-1], (1, 0), value=1.0)
        self.betas = 1 - self.alphas_bar / previous
        self.alpha, self.sigma = self.alphas_bar.sqrt(), (1 - self.alphas_bar).sqrt()
        self.table = torch.stack([self.alpha, self.sigma]).float()  # moves to the device it is used on
        # q(x_{t-1} | x_t, x_0) = N(coef_x0 x_0 + coef_xt x_t, variance)
        self.coef_x0 = self.betas * previous.sqrt() / (1 - self.alphas_bar)
        self.coef_xt = (1 - previous) * (1 - self.betas).sqrt() / (1 - self.alphas_bar)
        variance = self.betas * (1 - previous) / (1 - self.alphas_bar)
        self.log_variance_min = torch.cat([variance[1:2], variance[1:]]).log()
        self.log_variance_max = self.betas.log()

    def alpha_sigma(self, t):
        """alpha_t and sigma_t [N, 1] for indices t [N] into this chain, which for BASE are the times."""
        if self.table.device != t.device:
            self.table = self.table.to(t.device)
        return self.table[:, t, None].unbind(0)

    def q_sample(self, x_0, t, eps):
        """x_t = alpha_t x_0 + sigma_t eps for x_0, eps [N, D] and indices t [N]."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x_0 + sigma * eps

    def step(self, i, x_t, out, noise, temperature=1.0, clip=None):
        """x_{t-1} from x_t [N, D], the head's output [N, 2D] and noise [N, D], at index i of this chain.

        log variance = f log beta + (1 - f) log posterior variance, f = (variance channel + 1) / 2. `temperature`
        multiplies the step's standard deviation; `clip` (low, high) bounds the estimate of x_0, without which an
        imperfect model explodes at the noisy end, where 1 / alpha_t is 2e4."""
        eps, variance = out.chunk(2, -1)
        x_0 = (x_t - float(self.sigma[i]) * eps) / float(self.alpha[i])
        if clip:
            x_0 = x_0.clamp(*clip)
        mean = float(self.coef_x0[i]) * x_0 + float(self.coef_xt[i]) * x_t
        f = (variance + 1) / 2
        log_variance = f * float(self.log_variance_max[i]) + (1 - f) * float(self.log_variance_min[i])
        return mean + temperature * torch.exp(log_variance / 2) * noise if i else mean

    def sample(self, head, x, generator, temperature=1.0, clip=None):
        """The whole ancestral chain from noise x [N, D]; head(x_t, t) -> [N, 2D], t on 0...999."""
        for i in reversed(range(len(self.times))):
            t = torch.full((len(x),), int(self.times[i]), device=x.device)
            noise = torch.randn(x.shape, generator=generator, device=x.device)
            x = self.step(i, x, head(x, t), noise, temperature, clip)
        return x


BASE = Diffusion()  # all 1000 times: where training, head and one-step student look up alpha_t and sigma_t


def denoising_loss(head, x_0, c, t, eps):
    """Mean of w_t |eps - eps_hat(x_t, t, c)|^2 over tokens x_0 [N, D]: diffusion loss, or denoising score matching.

    w_t = 1, MAR's loss, for a head whose network gives eps; 1 / alpha_t^2, which is |v - v_hat|^2, for one whose
    network gives v (at most 1e4, which t > 992 would exceed). Averaged over tokens and channels."""
    error = (head.eps(BASE.q_sample(x_0, t, eps), t, c) - eps).square()
    if head.velocity:
        alpha, _ = BASE.alpha_sigma(t)
        error = error / alpha.square().clamp(min=1e-4)
    return error.mean()


def one_step(head, z, c, noise_ratio):
    """The student's g(z, c) [N, D] for z [N, D], c [N, W]: one denoising step from the fixed time tau,

        g(z, c) = (sigma_tau z - sigma_tau eps_hat(sigma_tau z, tau, c)) / alpha_tau,

    tau being the first time with sigma_tau / alpha_tau >= noise_ratio: the x_0 that eps_hat implies for x_tau, whose
    small term alpha_tau x_0 is left out. So the teacher's weights are a good start, as in SiD (score identity
    distillation, 2404.04057). MARVAL does not print its parametrisation; this is ours."""
    tau = int(torch.searchsorted(BASE.sigma / BASE.alpha, noise_ratio))
    alpha, sigma = float(BASE.alpha[tau]), float(BASE.sigma[tau])
    t = torch.full((len(z),), tau, device=z.device)
    return (sigma * z - sigma * head.eps(sigma * z, t, c)) / alpha


# 5 Generation --------------------------------------------------------------------------------------------
# Start with every token hidden. At each of K iterations: contexts from the visible tokens, denoise, reveal some.


def reveal_counts(length, steps):
    """MAR's cosine schedule: how many of L tokens each of K iterations reveals, a list that sums to L."""
    if not 1 <= steps <= length:
        raise InputError(f"--steps {steps} must lie in 1...{length}, the number of tokens to draw")
    hidden, counts = length, []
    for k in range(steps - 1):
        after = max(1, min(hidden - 1, math.floor(length * math.cos(math.pi / 2 * (k + 1) / steps))))
        counts.append(hidden - after)
        hidden = after
    return counts + [hidden]


def guidance_scale(s, hidden_after, length):
    """MAR's linear schedule 1 + (s - 1)(L - hidden)/L; `hidden` tokens remain after the step (0 counts as 1).

    It multiplies as eps = eps_null + scale (eps_class - eps_null); 1 is no guidance."""
    return 1 + (s - 1) * (length - hidden_after.clamp(min=1)) / length


def guided(head, c, null, scale):
    """head(x, t) -> [N, 2D] with eps = eps_null + scale (eps_class - eps_null); the variance is the class row's."""

    def call(x, t):
        out = head(x.repeat(2, 1), t.repeat(2), torch.cat([c, null]))  # class and null rows in one batch
        (e_c, variance), (e_u, _) = (rows.chunk(2, -1) for rows in out.chunk(2))
        return torch.cat([e_u + scale * (e_c - e_u), variance], -1)

    return call


@dataclass
class Trace:
    """What a call of `generate` did over T iterations, the most of any row; rows that ended earlier have counts of 0.

    Token order[b, j] is revealed before order[b, j - 1] (MAR reveals from the end of the order)."""

    order: torch.Tensor  # [B, L]
    z: torch.Tensor  # [B, L, D] the noise that each token came from
    means: torch.Tensor  # [B, L, D] each token as it was predicted when it was revealed, before exploration noise
    counts: torch.Tensor  # [B, T] tokens revealed
    predictions: torch.Tensor  # [B, T, L, D] the full image predicted at each step, before revealing; or None
    states: torch.Tensor  # [B, T, W + 1] what the schedule policy saw; None without one
    actions: torch.Tensor  # [B, T] what it chose; None without one

    @property
    def steps(self):
        """Unmasking iterations of each row [B]."""
        return (self.counts > 0).sum(1)

    def hidden(self):
        """Tokens still hidden before each step [B, T]."""
        return self.counts.flip(1).cumsum(1).flip(1)  # all that is revealed from this step on

    def masks(self):
        """mask before each step [B, T, L], and which tokens it revealed [B, T, L]."""
        rank, hidden = self.order.argsort(1)[:, None], self.hidden()[..., None]
        mask = rank < hidden
        return mask, mask & (rank >= hidden - self.counts[..., None])


@torch.no_grad()
def generate(model, labels, steps=None, guidance=1.0, denoise_steps=100, temperature=1.0, explore=0.0,
             order=None, z=None, seed=0, trace=False, progress=False, known=None):
    """Tokens [B, L, D] of new images of classes `labels` [B]; and their Trace, if trace is True, or "steps" (without
    predictions).

    steps: K of the cosine schedule; None: the model's schedule policy if it has one, else settings.steps.
    guidance: s, linear in the share revealed (`guidance_scale`); the student is sampled with 1.
    denoise_steps: of the chain inside every iteration; 1 = the one-step student, g(z, c); (50, 5): annealed linearly
    from the first iteration to the last, as in DiSA (2505.20297), under a fixed schedule.
    temperature: of the chain's noise.  explore: sigma, a number or [B], of the policy N(g(z, c), sigma^2) (section 9).
    order [B, L], z [B, L, D]: drawn from `seed` if not given; the same for teacher and student of a seed.
    known: (tokens [B, L, D], mask [L]) of images to complete: only the tokens under the mask are drawn.
    Same seed, same device: same images. InputError where guidance is asked of one step, or steps are out of range."""
    if denoise_steps == 1 and guidance != 1:
        raise InputError("--guidance needs a denoising chain: a one-step student has its guidance baked in")
    s, L, D, (B,), device = model.settings, model.length, model.channels, labels.shape, labels.device
    g = rng(seed, "generate", device=device)
    drawn_order = torch.rand(B, L, generator=g, device=device).argsort(1)
    drawn_z = torch.randn(B, L, D, generator=g, device=device)
    order, z = drawn_order if order is None else order, drawn_z if z is None else z
    tokens, to_draw = torch.zeros(B, L, D, device=device), L
    if known:
        tokens, to_draw = known[0].clone(), int(known[1].sum())
        first_drawn = (~known[1][order]).to(torch.uint8).argsort(dim=1, stable=True)  # ranks 0...to_draw - 1
        order = order.gather(1, first_drawn)
    policy = model.schedule if steps is None else None
    fixed = None if policy else reveal_counts(to_draw, min(to_draw, s.steps) if steps is None else steps)
    first, last = denoise_steps if isinstance(denoise_steps, tuple) else (denoise_steps, denoise_steps)
    respaced = cache(Diffusion)  # one chain, or as many as annealing asks for
    if policy and first != last:
        raise InputError("annealed denoising steps need a fixed number of iterations: give --steps")

    rank = order.argsort(1)
    means = torch.zeros_like(tokens)
    explore = torch.as_tensor(explore, device=device).expand(B)[:, None, None]
    hidden = torch.full((B,), to_draw, device=device)
    record = {name: [] for name in ("counts", "predictions", "states", "actions")}
    bar = tqdm(total=B * to_draw, desc="tokens", disable=not progress, leave=False)
    while int(hidden.max()):
        k = len(record["counts"])
        live = hidden.nonzero().squeeze(1)  # rows whose image is not finished
        mask = rank < hidden[:, None]
        c = torch.zeros(B, L, s.width, device=device)
        c[live] = model.context(tokens[live], mask[live], labels[live])
        if policy:
            states = schedule_state(c, mask)
            actions = torch.multinomial(policy.log_probs(states, hidden).exp(), 1, generator=g).squeeze(1)
            count = policy.count(actions, hidden)
        else:
            count = torch.full_like(hidden, fixed[k])
        reveal = mask & (rank >= (hidden - count)[:, None])

        fill = mask if trace is True else reveal  # a full trace shows the whole predicted image
        share = 0 if policy else k / max(1, len(fixed) - 1)
        chain = None if denoise_steps == 1 else respaced(round(first + (last - first) * share))
        if chain is None:
            predicted = one_step(model.head, z[fill], c[fill], s.noise_ratio)
        elif guidance == 1:
            predicted = chain.sample(lambda x, t: model.head(x, t, c[fill]), z[fill], g, temperature, s.clip_range)
        else:
            null = torch.zeros_like(c)
            null[live] = model.context(tokens[live], mask[live])
            scale = guidance_scale(guidance, hidden - count, L)[:, None, None].expand(B, L, 1)[fill]
            head = guided(model.head, c[fill], null[fill], scale)
            predicted = chain.sample(head, z[fill], g, temperature, s.clip_range)
        image = tokens.clone()
        image[fill] = predicted
        noise = explore * torch.randn(B, L, D, generator=g, device=device) if explore.any() else 0.0
        tokens = torch.where(reveal[..., None], image + noise, tokens)
        means = torch.where(reveal[..., None], image, means)
        hidden = hidden - count
        bar.update(int(count.sum()))
        record["counts"].append(count)
        if trace is True:
            record["predictions"].append(image)
        if trace and policy:
            record["states"].append(states)
            record["actions"].append(actions)
    bar.close()
    if not trace:
        return tokens
    return tokens, Trace(order, z, means, *(torch.stack(values, 1) if values else None for values in record.values()))


# 6 GSIM --------------------------------------------------------------------------------------------------
# MARVAL stage 1. The student's tokens x_0 = g(z, c) should be distributed as the teacher's. Noise both to time t and
# compare scores: the teacher's guided score s_p, and the student's own s_q, which the auxiliary network learns from the
# student's samples. d(s_q - s_p) alone is not enough: s_q changes with the student, and the frozen auxiliary network
# cannot show how. The theorem replaces that missing gradient by L1, all of whose parts are at hand. Scores appear as
# eps-predictions here, s = -eps / sigma_t.


def pseudo_huber(y, r=1e-5):
    """d(y) = sqrt(|y|^2 + r^2) - r over the D channels [N], and its derivative d'(y) = y / sqrt(|y|^2 + r^2) [N, D]."""
    root = (y.square().sum(-1, keepdim=True) + r**2).sqrt()
    return root.squeeze(-1) - r, y / root


def squared(y):
    """d(y) = |y|^2 [N] and d'(y) = 2 y [N, D]."""
    return y.square().sum(-1), 2 * y


def gsim_loss(x_0, t, eps, eps_q, eps_p, distance=pseudo_huber, terms="L1+L2", units="velocity"):
    """GSIM (MARVAL, gradient equivalence theorem): [N] per token, for the student's tokens x_0 = g(z, c) [N, D].

        L = L1 + L2,   L1 = -d'(y_t)^T (s_q - grad log p(x_t | x_0)),   L2 = d(y_t),   y_t = s_q - s_p

    eps_q, eps_p: functions (x_t, t) -> eps [N, D] of the student's own score and the teacher's guided score; their
    parameters must be frozen, but gradient must pass to x_t, in y_t and in d'(y_t) too. t [N] on 0...999, eps [N, D].
    terms: one alone is for ablations, its gradient not the divergence's (with a squared d, L1 is SiD, alpha = 1).
    units: velocity multiplies y and the residual by sigma_t / alpha_t, which makes them differences of velocities; eps
    by sigma_t. For each t that is the theorem with another distance, a choice that the paper leaves open (w(t)). At
    high noise what all tokens share is decided; there eps is nearly x_t whatever x_0 is, and an error in it hardly
    counts."""
    x_t = BASE.q_sample(x_0, t, eps)
    e_q, e_p = eps_q(x_t, t), eps_p(x_t, t)
    per_alpha = 1 / BASE.alpha_sigma(t)[0] if units == "velocity" else 1.0
    d, d_prime = distance(per_alpha * (e_p - e_q))  # eps_p - eps_q = sigma (s_q - s_p): the sigma is in them
    L1 = -(d_prime * per_alpha * (eps - e_q)).sum(-1)  # grad log p(x_t | x_0) = -eps / sigma_t
    return ("L1" in terms) * L1 + ("L2" in terms) * d


def descend(loss, optimizer, clip=1.0):
    """One optimiser step, gradient norm clipped; returns the norm. NonFinite is raised before any weight changes."""
    if not torch.isfinite(loss):
        raise NonFinite(f"the loss is {loss.item()}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    if not torch.isfinite(norm):
        raise NonFinite(f"the gradient norm is {norm.item()}")
    optimizer.step()
    return norm.item()


def gsim_times(n, generator, device):
    """t uniform on 20...984 (our choice): outside, scores say nothing (pure noise) or explode (no noise)."""
    return torch.randint(20, 985, (n,), generator=generator).to(device)


def gsim_update(teacher, student, aux, x, labels, optimizers, generator):
    """One GSIM update on data tokens x [B, L, D], labels [B]; {name: float} to log.

    Each of the three networks computes its own context from the same visible data tokens. First the auxiliary
    network learns the score of the student's samples, aux_updates times; then the student takes its step. Contexts
    are the costly part, so each serves `draws` draws of noise. optimizers: of "student" and "aux"."""
    s, (B, L, D), device = student.settings, x.shape, x.device
    mask = random_mask(B, L, s.gsim_masks, generator, device)  # uniform: the student meets every stage at generation
    N = int(mask.sum()) * s.draws
    noise = lambda: torch.randn(N, D, generator=generator).to(device)
    times = lambda: gsim_times(N, generator, device)
    at_hidden = lambda c: c[mask].repeat(s.draws, 1)  # [B, L, W] -> [N, W]

    c = at_hidden(student.context(x, mask, labels))
    for _ in range(s.aux_updates):
        with torch.no_grad():
            x_0 = one_step(student.head, noise(), c, s.noise_ratio)
        aux_loss = denoising_loss(aux.head, x_0, at_hidden(aux.context(x, mask, labels)), times(), noise())
        descend(aux_loss, optimizers["aux"])

    with torch.no_grad():
        c_q = at_hidden(aux.context(x, mask, labels))
        both = torch.cat([labels, torch.full_like(labels, teacher.num_classes)])
        c_p, c_null = map(at_hidden, teacher.context(x.repeat(2, 1, 1), mask.repeat(2, 1), both).chunk(2))
        # as if this iteration revealed one token; the paper's s is constant instead
        scale = guidance_scale(s.guidance, mask.sum(1) - 1, L)[:, None, None].expand(B, L, 1)
    head = guided(teacher.head, c_p, c_null, at_hidden(scale))
    x_0 = one_step(student.head, noise(), c, s.noise_ratio)
    aux.requires_grad_(False)  # its parameters are frozen here, but gradient passes through it to x_t
    distance = squared if s.distance == "squared" else lambda y: pseudo_huber(y, s.huber)
    loss = gsim_loss(x_0, times(), noise(), lambda x_t, t: aux.head.eps(x_t, t, c_q),
                     lambda x_t, t: head(x_t, t).chunk(2, -1)[0], distance, s.gsim_terms, s.gsim_units).mean()
    norm = descend(loss, optimizers["student"])
    aux.requires_grad_(True)
    return {"loss": loss.item(), "aux_loss": aux_loss.item(), "grad_norm": norm}


# 7 Critical steps ----------------------------------------------------------------------------------------
# MaskFocus: most of what an image will be is decided in a few steps. Optimise only those.


def information_gain(predictions, final, valid=None, mean=0.0):
    """V_k = |S_{k+1} - S_k| with S_k = cos(E_k, E_final) -> [B, T]   (MaskFocus, critical step selection).

    predictions [B, T, ...]: the full image predicted before step k reveals; final [B, ...]. S after the last step is 1.
    valid [B, T]: steps that the row has; the others get -inf. The embedding E is what is passed in, minus `mean`
    (the mean image): without it the cosine saturates. The paper embeds in the tokeniser's space; we take the tokens."""
    E, E_final = (predictions - mean).flatten(2), (final - mean).flatten(1)
    S = F.cosine_similarity(E, E_final[:, None], dim=-1)  # [B, T]
    if valid is not None:
        S = S.masked_fill(~valid, 1.0)
    gain = (torch.cat([S[:, 1:], torch.ones_like(S[:, :1])], 1) - S).abs()
    return gain if valid is None else gain.masked_fill(~valid, -math.inf)


def critical_steps(gain, k):
    """The k steps of largest gain (or another score) of each row, as a mask [B, T]; fewer in rows with fewer steps."""
    top = gain.topk(min(k, gain.shape[1]), dim=1).indices
    return torch.zeros_like(gain, dtype=torch.bool).scatter(1, top, True) & gain.isfinite()


# 8 Schedule policy ---------------------------------------------------------------------------------------
# Speed-RL rewards images that need fewer steps, and a reward can only change what is an action. So, as in learned
# unmasking policies (2512.09106), at every step a small head, ours, looks at the contexts of the hidden tokens and
# chooses how many to reveal. K_max is K, the most steps that an image may take.


def schedule_state(c, mask):
    """What the schedule policy sees [B, W + 1]: the mean context of the hidden tokens, and the share still hidden."""
    hidden = mask.sum(1, keepdim=True)
    return torch.cat([(c * mask[..., None]).sum(1) / hidden.clamp(min=1), hidden / mask.shape[1]], 1)


class SchedulePolicy(nn.Module):
    """Chooses to reveal `unit` x 1, 2, 3, 4, 6, 8, 12, ... tokens, or all that remain; unit = ceil(L / K_max), so that
    K_max steps are the most.

    Starts independent of the state, preferring small counts: the probability is proportional to 1 / count."""

    def __init__(self, width, length, max_steps, inner=64):
        super().__init__()
        unit = math.ceil(length / max_steps)
        sizes = [1] + sorted(m * 2**i for m in (2, 3) for i in range(length.bit_length()))
        counts = [unit * n for n in sizes if unit * n < length] + [length]
        self.register_buffer("counts", torch.tensor(counts))
        self.norm = nn.LayerNorm(width)
        self.net = silu_mlp(width + 1, inner, len(counts))
        nn.init.zeros_(self.net[-1].weight)
        with torch.no_grad():
            self.net[-1].bias.copy_(-self.counts.log())

    def log_probs(self, states, hidden):
        """log pi [N, choices] for states [N, W + 1] with `hidden` [N] tokens left; impossible: -inf.

        A count that is not below what remains is impossible: the last choice, `all`, stands for it."""
        logits = self.net(torch.cat([self.norm(states[:, :-1]), states[:, -1:]], 1))
        possible = self.counts < hidden[:, None]
        possible[:, -1] = True
        return logits.masked_fill(~possible, -math.inf).log_softmax(-1)

    def count(self, actions, hidden):
        """Tokens that the actions [N] reveal where `hidden` [N] remain."""
        return torch.minimum(self.counts[actions], hidden)


def speed(steps, max_steps):
    """(K_max - T + 1) / K_max in (0, 1]: 1 for one step. As in 2512.09106, with K in place of L;
    Speed-RL's own formula is not public in what we have, so quality x speed^alpha is our choice."""
    return (max_steps - steps + 1) / max_steps


def total_reward(quality, steps, s):
    """R [B] = quality x speed^alpha of images that took `steps` [B]; --additive: quality + alpha x speed."""
    fast = speed(steps, s.steps)
    return quality + s.alpha * fast if s.additive else quality * fast**s.alpha


# 9 Policy gradient ---------------------------------------------------------------------------------------
# GRPO (group relative policy optimisation), and at the end MARVAL's back-propagation. A rollout draws every token from
# N(g(z, c), sigma^2) around the one-step student, z stored, so log pi is Gaussian in closed form. A group shares class,
# order and z (but see routing), so that only the actions differ. The functions below take quality(images [B, C, H, W],
# labels [B]) -> [B] in [0, 1]; reference, the frozen student; labels [P], a class a prompt; mean_image, tokens that the
# information gain subtracts; and optimizers of "generator" and "schedule".


def group_advantages(rewards, group, keep=None, baseline="mean", normalise=True):
    """A = (R - baseline) / std within each group of G consecutive rollouts [P G]; zero where all rewards are equal.

    keep [P G]: rollouts that count; the others get zero. baseline: the group's `mean` (GRPO), or that of the `others`,
    which multiplies A by G / (G - 1) and, without the std, makes its expected gradient exact. normalise: divide by the
    std (GRPO; over G - 1), which weighs prompts alike; without it those on which little can be won count little."""
    R = rearrange(rewards, "(p g) -> p g", g=group)
    w = torch.ones_like(R) if keep is None else rearrange(keep.to(R), "(p g) -> p g", g=group)
    n = w.sum(1, keepdim=True).clamp(min=2)
    A = w * (R - (w * R).sum(1, keepdim=True) / n)
    std = (A.square().sum(1, keepdim=True) / (n - 1)).sqrt()
    A = A * n / (n - 1) if baseline == "others" else A
    return torch.where((std > 1e-5) & (w.sum(1, keepdim=True) > 1), A / std if normalise else A, 0.0).flatten()


def token_log_prob(x, mean, sigma):
    """Mean over the D channels of log N(x; mean, sigma^2) [N], sigma [N] or a number: log pi, divided by D.

    The division keeps ratios tame: they are the exact ratio to the power 1/D."""
    sigma = torch.as_tensor(sigma, device=mean.device)[..., None]
    return (-((x - mean) / sigma).square() / 2 - (sigma * math.sqrt(2 * math.pi)).log()).mean(-1)


def token_kl(mean, mean_ref, sigma):
    """KL(N(mean, sigma^2) || N(mean_ref, sigma^2)) given z [N] in closed form, divided by D as log pi is."""
    return ((mean - mean_ref) / torch.as_tensor(sigma, device=mean.device)[..., None]).square().mean(-1) / 2


def policy_loss(log_prob, log_prob_old, advantage, kl=torch.zeros(()), clip_ratio=0.2, beta=0.0):
    """-mean(min(r A, clip(r, 1 - eps, 1 + eps) A) - beta KL) over actions [N], r = pi / pi_old   (GRPO; MaskFocus).

    Returns the loss and, to log, `ratio` and `kl`, their means; `clip_fraction`; `log_ratio`, the largest |log r|."""
    log_ratio = log_prob - log_prob_old.detach()
    ratio = log_ratio.exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantage)
    stats = {"ratio": ratio.mean().item(), "clip_fraction": ((ratio - 1).abs() > clip_ratio).float().mean().item(),
             "kl": kl.mean().item(), "log_ratio": log_ratio.abs().max().item()}
    return -(gain - beta * kl).mean(), stats


@torch.no_grad()
def routing(model, labels, generator, draws=8):
    """The factor on each prompt's exploration sigma [P], >= 1: for the half with the lower entropy H, 1 + route exp(-H)
    (MaskFocus, dynamic routing).

    H = max(0, mean over tokens and channels of log(std / sigma)), the std being that of one-step predictions of a
    wholly hidden image over `draws` of z. Differs from the paper, which gives each token the temperature
    T exp(-H / alpha) + T_min and routes the samples of a group step by step; ours are alike at first, having class,
    order and z in common, and prompts are routed."""
    s, (P,), L, D = model.settings, labels.shape, model.length, model.channels
    mask = torch.ones(P, L, dtype=torch.bool, device=labels.device)
    c = model.context(torch.zeros(P, L, D, device=labels.device), mask, labels)
    z = torch.randn(draws * P * L, D, generator=generator, device=labels.device)
    g = one_step(model.head, z, repeat(c, "p l w -> (n p l) w", n=draws), s.noise_ratio).view(draws, P, L, D)
    H = (g.var(0).clamp(min=1e-12).log() / 2 - math.log(s.explore)).mean((1, 2)).clamp(min=0)
    return torch.where(H.argsort().argsort() < P // 2, 1 + s.route * torch.exp(-H), 1.0)


def rollout(model, quality, labels, seed, full=True):
    """G rollouts of each class of `labels` [P], G consecutive rows a group: tokens, Trace, and of every row [P G] its
    label, quality and sigma.

    A group shares class, order and z, which leaves the gradient unbiased and quiets it; where routing heats a prompt,
    its rows explore with a larger sigma, and each shuffles the order a little. full: the Trace has predictions."""
    s, device, (P,) = model.settings, labels.device, labels.shape
    g = rng(seed, "shared", device=device)
    sort_key = torch.rand(P, 1, model.length, generator=g, device=device)
    z = torch.randn(P, model.length, model.channels, generator=g, device=device).repeat_interleave(s.group, 0)
    sort_key, sigma = sort_key.expand(-1, s.group, -1), torch.full((P,), s.explore, device=device)
    if s.route:
        heat = routing(model, labels, g)
        sigma = sigma * heat
        jitter = torch.randn(sort_key.shape, generator=g, device=device)
        sort_key = sort_key + 0.2 * (heat[:, None, None] - 1) * jitter  # 0.2: our choice
    order = sort_key.flatten(0, 1).argsort(1)
    labels, sigma = labels.repeat_interleave(s.group), sigma.repeat_interleave(s.group)
    tokens, trace = generate(model, labels, denoise_steps=1, explore=sigma, order=order, z=z, seed=seed,
                             trace=full or "steps")
    return tokens, trace, labels, quality(to_images(tokens, s), labels), sigma


def optimised_steps(trace, tokens, s, mean_image, generator):
    """Which steps of each rollout are optimised [B, T]: K_c (critical_steps) of its own by --rl-steps, or all."""
    valid = trace.counts > 0
    if s.rl_steps == "all":
        return valid
    if s.rl_steps == "critical":
        score = information_gain(trace.predictions, tokens, valid, mean_image)
    elif s.rl_steps == "random":
        score = torch.rand(valid.shape, generator=generator).to(tokens).masked_fill(~valid, -math.inf)
    else:
        score = -torch.arange(valid.shape[1]).to(tokens).expand(valid.shape).masked_fill(~valid, math.inf)
    return critical_steps(score, s.critical_steps)


def schedule_update(schedule, trace, advantage, s, optimizer):
    """`schedule_epochs` updates of the schedule policy on all its choices in a Trace, advantage [B]; the clip fraction.

    It starts from nothing, so there is no base model to hold it to by a KL."""
    row, step = ((trace.counts > 0) & (advantage != 0)[:, None]).nonzero(as_tuple=True)
    states, hidden, actions = trace.states[row, step], trace.hidden()[row, step], trace.actions[row, step, None]
    log_prob = lambda: schedule.log_probs(states, hidden).gather(1, actions).squeeze(1)
    log_old = log_prob().detach()
    for epoch in range(s.schedule_epochs):
        loss, terms = policy_loss(log_prob(), log_old, advantage[row], clip_ratio=s.clip_ratio)
        descend(loss, optimizer)
    return terms["clip_fraction"]


def rl_update(model, reference, quality, labels, mean_image, optimizers, seed):
    """G rollouts of each class in `labels` [P], then `rl_epochs` updates on them; {name: float} to log.

    Generator: the tokens of the optimised steps. This is the exact policy gradient (up to 1/D, (G - 1)/G and each
    group's 1/std) with --rl-tokens revealed, --rl-steps all, one update per rollout and no quality floor. Fewer steps
    are MaskFocus' choice, made on the finished image, and biased; `fresh` is its re-masking, and like `hidden` a
    surrogate, counting tokens that were not drawn from this context. Schedule: all its choices, by its own optimiser,
    so that the losses need no weighing. Both carry the advantage of reward = quality x speed^alpha. Whoever has A = 0
    takes no part: groups without spread and, as a filter (our choice), rollouts below the quality floor."""
    s, g = model.settings, rng(seed, "update")
    full = s.rl_steps == "critical" or s.rl_tokens == "hidden"
    tokens, trace, labels, q, sigma = rollout(model, quality, labels, seed, full)
    reward = total_reward(q, trace.steps, s)
    A = group_advantages(reward, s.group, q >= s.quality_floor, s.baseline, s.normalise)
    live = A != 0
    steps = optimised_steps(trace, tokens, s, mean_image, g)
    first = steps.float().cumprod(1).sum(1) == steps.sum(1)  # the optimised steps are simply the first ones
    stats = {"reward": float(reward.mean()), "quality": float(q.mean()), "steps": float(trace.steps.float().mean()),
             "spread": float(rearrange(reward, "(p g) -> p g", g=s.group).std(1).mean()),
             "filtered": 1 - float(live.float().mean()), "not_first": 1 - float(first.float().mean())}
    if not live.any():
        return stats

    row, step = (steps & live[:, None]).nonzero(as_tuple=True)
    mask, counted = (m[row, step] for m in trace.masks())  # [M, L]
    if s.rl_tokens == "hidden":
        counted = mask
    elif s.rl_tokens == "fresh":
        rank = torch.rand(mask.shape, generator=g).argsort(1).to(mask.device)
        mask = counted = rank < mask.sum(1, keepdim=True)
    # A revealed token never changes, so the state at any step is the final image under that step's mask.
    z, context = trace.z[row][counted], lambda net: net.context(tokens[row], mask, labels[row])[counted]
    means = lambda net: one_step(net.head, z, context(net), s.noise_ratio)
    spread_out = lambda rows: rows[row][:, None].expand(mask.shape)[counted]  # [B] -> one for each counted token
    x, A_token, sigma = tokens[row][counted], spread_out(A), spread_out(sigma)
    with torch.no_grad():
        g_ref = means(reference)
        if s.rl_tokens == "fresh":
            g_old = means(model)  # nobody has seen these masks before
        else:  # what the sampler predicted, so that the first ratio compares it with the learner
            g_old = (trace.means[row] if s.rl_tokens == "revealed" else trace.predictions[row, step])[counted]
        log_old = token_log_prob(x, g_old, sigma)
    for epoch in range(s.rl_epochs):
        g_mean = means(model)
        loss, terms = policy_loss(token_log_prob(x, g_mean, sigma), log_old, A_token,
                                  token_kl(g_mean, g_ref, sigma), s.clip_ratio, s.beta)
        terms["log_ratio"] = stats.get("log_ratio", terms["log_ratio"])  # the first: 0 if sampler and learner agree
        stats |= terms | {"loss": loss.item(), "grad_norm": descend(loss, optimizers["generator"])}
    if model.schedule is not None:
        stats["schedule_clipped"] = schedule_update(model.schedule, trace, A, s, optimizers["schedule"])
    return stats


def replay(model, reference, labels, trace, keep):
    """The generation of `trace` once more: tokens [B, L, D] with gradient through the steps keep [B, T], and a KL.

    At the other steps nothing is recorded: their tokens are constants to later contexts. The KL, an anchor, is of
    N(g, sigma^2) to the reference's at the kept steps, as in the policy gradient, mean over tokens."""
    s, tokens, kls = model.settings, torch.zeros_like(trace.z), []
    for k, (mask, reveal) in enumerate(zip(*(m.unbind(1) for m in trace.masks()))):
        for kept in (True, False):
            rows = (reveal.any(1) & (keep[:, k] == kept)).nonzero().squeeze(1)
            if not len(rows):
                continue
            shown, z = reveal[rows], trace.z[rows][reveal[rows]]
            context = lambda net: net.context(tokens[rows], mask[rows], labels[rows])[shown]
            mean = lambda net: one_step(net.head, z, context(net), s.noise_ratio)
            with torch.set_grad_enabled(kept):
                g = mean(model)
            if kept and s.beta:
                with torch.no_grad():
                    g_ref = mean(reference)
                kls.append(token_kl(g, g_ref, s.explore))
            row, place = shown.nonzero(as_tuple=True)
            tokens = tokens.index_put((rows[row], place), g)
    return tokens, torch.cat(kls).mean() if kls else torch.zeros((), device=tokens.device)


def backprop_update(model, reference, quality, labels, mean_image, optimizers, seed):
    """One update by the reward's gradient (MARVAL-RL, L = -E R(G(z, class, K))) on P x G images; {name: float} to log.

    With --rl-steps all the gradient passes through the whole generation, as in the paper; else, by default, through the
    optimised steps alone, which takes less memory. beta x KL anchors it. The number of steps is fixed."""
    s, labels = model.settings, labels.repeat_interleave(model.settings.group)
    full = s.rl_steps == "critical"
    tokens, trace = generate(model, labels, denoise_steps=1, seed=seed, trace=full or "steps")
    keep = optimised_steps(trace, tokens, s, mean_image, rng(seed, "update"))
    images, kl = replay(model, reference, labels, trace, keep)
    q = quality(to_images(images, s), labels)
    norm = descend(s.beta * kl - q.mean(), optimizers["generator"])
    return {"quality": q.mean().item(), "steps": trace.steps.float().mean().item(), "kl": kl.item(), "grad_norm": norm}


# 10 Checkpoints and scripts -----------------------------------------------------------------------------------------
# A checkpoint is MAR's own format, {"model": ..., "model_ema": ...}, and what it takes to use it: kind, settings,
# class names, step; while training, also what it takes to go on as if never interrupted.

KINDS = ("teacher", "student", "policy")


def save_checkpoint(path, kind, model, ema=None, step=0, training=None):
    """Write atomically: a crash leaves the old file or the new one, never half. `training`: state to resume from."""
    content = {"kind": kind, "settings": asdict(model.settings), "classes": model.classes, "step": step,
               "model": model.state_dict(), "model_ema": (ema or model).state_dict(), "training": training}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def read_checkpoint(path, kind=None, device="cpu"):
    """The content of a maskrl checkpoint, a dict; InputError if it is none, or of another kind."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}") from None
    except Exception as error:
        raise InputError(f"{path} is not a checkpoint that can be read safely ({type(error).__name__}); expected "
                         "teacher.pt, student.pt or policy.pt") from None
    if not isinstance(content, dict) or content.get("kind") not in KINDS:
        raise InputError(f"{path} is not a maskrl checkpoint")
    if unknown := set(content["settings"]) - {f.name for f in fields(Settings)}:
        raise InputError(f"{path} has settings that this version does not know: {', '.join(sorted(unknown))}")
    if kind and content["kind"] != kind:
        raise InputError(f"{path} is a {content['kind']}; a {kind} is needed here")
    return content


def add_schedule(model):
    model.schedule = SchedulePolicy(model.settings.width, model.length, model.settings.steps)
    return model


def load_checkpoint(path, kind=None, device="cpu"):
    """The EMA model of a checkpoint, ready to generate; its `settings`, `classes` and `kind` are attributes."""
    content = read_checkpoint(path, kind, device)
    model = MAR(Settings(**content["settings"]), content["classes"])
    if content["kind"] == "policy" and model.settings.has_schedule:
        add_schedule(model)
    model.load_state_dict(content["model_ema"])
    model.kind = content["kind"]
    return model.to(device).eval().requires_grad_(False)


def find_device(name="auto"):
    """torch.device of that name; `auto` takes cuda, mps or cpu, the first there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind, _, number = name.partition(":")
    if name != "auto" and not (there.get(kind) and (not number or kind == "cuda" and number.isdigit())):
        raise InputError(f"--device {name}: there is none here; there is {', '.join(k for k in there if there[k])}")
    return torch.device(next(k for k in there if there[k]) if name == "auto" else name)


def run(main):
    """Call main() as a script: wrong input ends in one line and exit code 2, a non-finite loss in one line and 1."""
    try:
        main()
    except (InputError, NonFinite) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
