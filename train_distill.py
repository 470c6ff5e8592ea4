"""A teacher, then its one-step student by GSIM (MARVAL stage 1).

    python train_distill.py                                    # built-in shapes, minutes on a laptop
    python train_distill.py --data photos/ --out runs/photos   # a folder with one sub-folder of images per class
    python train_distill.py --teacher runs/demo/teacher.pt     # distil a teacher that is there already
    python train_distill.py --resume --out runs/photos         # go on after an interruption

Writes teacher.pt, student.pt, log.jsonl, samples.png, neighbours.png, curves.png and metrics.json into --out.
"""

import argparse
import json
import math
import platform
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision import datasets
from tqdm import tqdm

import maskrl
from maskrl import InputError
from sample import labelled_rows, read_image


# Teacher and student ------------------------------------------------------------------------------------


def train_teacher(s, data, out, device, resume=False):
    """MAR's own training: hide tokens, minimise the diffusion loss of the hidden ones. Returns the EMA model."""
    torch.manual_seed(s.seed)
    model = maskrl.MAR(s, data.classes).to(device)
    ema = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(weight_decay_groups(model), lr=s.teacher_lr, betas=(0.9, 0.95))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 50, 1, 4 * (1 - i / s.teacher_iters)))

    def update(step):
        g = maskrl.rng(s.seed, "teacher", step)
        x, labels = data.train.batch(s.batch, g, device, s.flip)
        x = maskrl.to_tokens(x, s)
        labels = torch.where((torch.rand(s.batch, generator=g) < s.label_dropout).to(device), model.num_classes, labels)
        mask = maskrl.random_mask(s.batch, s.length, "mixed", g, device)
        c = model.context(x, mask, labels)[mask].repeat(s.draws, 1)
        x_0 = x[mask].repeat(s.draws, 1)
        t = torch.randint(1000, (len(c),), generator=g).to(device)
        eps = torch.randn(x_0.shape, generator=g).to(device)
        loss = maskrl.denoising_loss(model.head, x_0, c, t, eps)
        norm = maskrl.descend(loss, optimizer)
        rate.step()
        update_ema(ema, model, step, s.ema)
        return {"loss": loss.item(), "grad_norm": norm}

    return train("teacher", out / "teacher.pt", s.teacher_iters, update, model, ema,
                        {"optimizer": optimizer, "rate": rate}, out / "log.jsonl", resume)


def train_student(s, data, teacher, out, device, resume=False, progress=None, distil=maskrl.gsim_update):
    """GSIM: student and auxiliary network both start as the teacher. Returns the EMA student, the best by `progress`.

    distil: the update, called as gsim_update is; another one is for rivals."""
    student = deepcopy(teacher).requires_grad_(True)
    student.settings = s
    aux, ema = deepcopy(student), deepcopy(student).requires_grad_(False)
    optimizers, rates = {}, {}
    for name, net, lr in (("student", student, s.student_lr), ("aux", aux, s.aux_lr)):
        optimizers[name] = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.0, 0.999))
        rates[name] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[name], s.gsim_iters)
    state = {"aux": aux} | {f"{k}_optimizer": v for k, v in optimizers.items()} | {f"{k}_rate": v for k, v in rates.items()}

    def update(step):
        g = maskrl.rng(s.seed, "gsim", step)
        x, labels = data.train.batch(s.gsim_batch, g, device, s.flip)
        metrics = distil(teacher, student, aux, maskrl.to_tokens(x, s), labels, optimizers, g)
        rates["student"].step(), rates["aux"].step()
        update_ema(ema, student, step, s.student_ema)
        return metrics

    return train("student", out / "student.pt", s.gsim_iters, update, student, ema, state, out / "log.jsonl", resume,
                 measure=progress)


# The training loop -----------------------------------------------------------------------------------------
# One for teacher, student and policy: progress bar, log, checkpoints, and going on where an interrupted run stopped.


@torch.no_grad()
def update_ema(ema, model, step, limit):
    """ema <- d ema + (1 - d) model with d = min(limit, (1 + i) / (10 + i)): short at first, so that it never lags."""
    d = min(limit, (1 + step) / (10 + step))
    for a, b in zip(ema.state_dict().values(), model.state_dict().values()):
        a.lerp_(b, 1 - d) if a.is_floating_point() else a.copy_(b)


def weight_decay_groups(model, decay=0.02):
    """Parameter groups with MAR's rule: no weight decay on 1-D tensors, biases and the diffusion head."""
    named = [(p.ndim > 1 and not name.startswith("head."), p) for name, p in model.named_parameters()]
    return [{"params": [p for d, p in named if d], "weight_decay": decay},
            {"params": [p for d, p in named if not d], "weight_decay": 0.0}]


def train(kind, path, iters, update, model, ema=None, state=None, log=None, resume=False, every=250, measure=None):
    """Run update(step) -> {name: float} for `iters` steps, with a progress bar, log lines and checkpoints at `path`.

    state: {name: object with state_dict()}, saved beside the model so that a resumed run equals an uninterrupted one.
    measure: function ema -> {name: float} to log, asked ten times; where it gives `progress`, the EMA weights for which that was
    lowest are kept at the end. The log's `seconds` are those of the updates alone.
    A non-finite loss stops with the step, and leaves a checkpoint of the last finite weights."""
    path, ema, state, start = Path(path), ema or model, state or {}, 0
    best = {"value": math.inf, "weights": {}, "seconds": 0.0}  # and the seconds of all updates so far
    path.parent.mkdir(parents=True, exist_ok=True)
    if resume and path.exists():
        content = maskrl.read_checkpoint(path, kind)
        model.load_state_dict(content["model"])
        ema.load_state_dict(content["model_ema"])
        start = content["step"]
        for name, value in (content["training"] or {}).items():
            best.update(value) if name == "best" else state[name].load_state_dict(value)

    def write(step, metrics):
        if log:
            with open(log, "a") as file:
                values = {k: round(v, 6) for k, v in ({"seconds": best["seconds"]} | metrics).items()}
                file.write(json.dumps({"stage": kind, "step": step, **values}) + "\n")

    def save(step):
        training = None if step == iters else {name: value.state_dict() for name, value in state.items()} | {"best": best}
        maskrl.save_checkpoint(path, kind, model, ema, step, training)

    bar = tqdm(range(start, iters), kind, iters, initial=start, mininterval=1)
    for step in bar:
        began = time.perf_counter()
        try:
            metrics = update(step)
        except maskrl.NonFinite as error:
            save(step)
            raise maskrl.NonFinite(f"{kind}, step {step}: {error}. The last finite weights are in {path}. If training diverged, "
                                   "start afresh in another --out with a lower learning rate") from None
        best["seconds"] += time.perf_counter() - began
        if step % max(1, iters // 200) == 0 or step == iters - 1:
            bar.set_postfix({k: f"{v:.3g}" for k, v in list(metrics.items())[:3]})
            write(step, metrics)
        if measure and (step + 1) * 10 // iters > step * 10 // iters:
            values = measure(ema)
            write(step, values)
            if values.get("progress", math.inf) < best["value"]:
                best |= {"value": values["progress"], "weights": deepcopy(ema.state_dict())}
            if step + 1 == iters and best["weights"]:
                ema.load_state_dict(best["weights"])
        if (step + 1) % every == 0 or step + 1 == iters:
            save(step + 1)
    return ema


# Data -----------------------------------------------------------------------------------------------------
# Either shapes that anybody can draw, or a folder of images per class. Both end as uint8 tensors in memory, in
# three parts: `train` (generator and reward), `judge` (the judge alone), `test` (reference of the judge's table).

COLOURS = {"red": (220, 50, 50), "green": (50, 200, 70), "blue": (60, 90, 230), "yellow": (230, 210, 60)}
FORMS = ["circle", "square", "triangle", "ring"]


@dataclass
class Split:
    images: torch.Tensor  # uint8 [N, 3, S, S]
    labels: torch.Tensor  # [N]

    def __len__(self):
        return len(self.labels)

    def take(self, index):
        return Split(self.images[index], self.labels[index])

    def batch(self, n, generator, device="cpu", flip=False):
        """n random images in [-1, 1] [n, 3, S, S] and their labels [n]."""
        index = torch.randint(len(self), (n,), generator=generator)
        x = self.images[index].to(device).float() / 127.5 - 1
        if flip:
            x = torch.where(torch.rand(n, 1, 1, 1, generator=generator).to(device) < 0.5, x.flip(-1), x)
        return x, self.labels[index].to(device)

    def balanced_halves(self, most, generator):
        """Two disjoint class-balanced halves with the same number of images, at most `most` each, but at least 2 of each class."""
        classes = self.labels.unique().tolist()
        rows = [(self.labels == y).nonzero().squeeze(1) for y in classes]
        m = max(2, min(min(map(len, rows)) // 2, most // len(classes)))
        rows = [r[torch.randperm(len(r), generator=generator)] for r in rows]
        return self.take(torch.cat([r[:m] for r in rows])), self.take(torch.cat([r[m:2 * m] for r in rows]))


@dataclass
class Data:
    classes: list
    train: Split
    judge: Split
    test: Split

    def some(self):
        """10,000 to 20,000 training images if there are as many, each class in its share, in [-1, 1] [N, 3, S, S]."""
        return self.train.images[:: max(1, len(self.train) // 10_000)].float() / 127.5 - 1

    def measure(self, s):
        """The Settings with mean and scale measured on the training images, unless scale is given.

        Uncentred tokens hide what varies behind a constant, and attention then hardly learns to look at them (README)."""
        x = self.some()
        return s if s.scale else replace(s, mean=round(float(x.mean()), 4), scale=round(float(1 / x.std().clamp(min=1e-3)), 4))


def shape_masks(x, y, r, size):
    """Share of every pixel inside each of the FORMS [N, 4, size, size], for centres x, y and radii r [N] as shares of the image."""
    grid = (torch.arange(size, device=x.device) + 0.5) / size
    dx, dy, r = grid - x[:, None, None], grid[:, None] - y[:, None, None], r[:, None, None]
    circle = (dx**2 + dy**2).sqrt() - r  # signed distances, negative inside
    square = torch.maximum(dx.abs(), dy.abs()) - 0.88 * r
    triangle = torch.maximum(dy + 0 * dx, 0.866 * dx.abs() - 0.5 * dy) - 0.6 * r
    ring = (circle + 0.25 * r).abs() - 0.25 * r
    return (0.5 - torch.stack([circle, square, triangle, ring], 1) * size).clamp(0, 1)


def draw_shapes(labels, size, difficulty=0, generator=None):
    """Draw shape `labels % n_forms` in colour `labels // n_forms`: uint8 [N, 3, size, size], antialiased.

    Difficulty 0: circle, square, triangle x 3 colours, dark grey backgrounds, centres within +-0.1 of the middle.
    Difficulty 1: ring and yellow too, coloured backgrounds, centres within +-0.2."""
    n, forms = len(labels), 3 + difficulty
    u = torch.rand(n, 6, generator=generator)
    x, y = 0.5 + 0.1 * (1 + difficulty) * (2 * u[:, :2] - 1).T
    inside = shape_masks(x, y, 0.22 + 0.10 * u[:, 2], size)[torch.arange(n), labels % forms][:, None]
    paint = torch.tensor(list(COLOURS.values())).float()[labels // forms][:, :, None, None]
    ground = 51 * (u[:, 3:] if difficulty else u[:, 3:4])[:, :, None, None]
    return (inside * paint + (1 - inside) * ground).round().to(torch.uint8)


def load_data(s):
    """Data for the Settings: splits of 60 / 20 / 20 % within every class; those of a folder are the same for every seed.

    A broken image is named, skipped and counted. Raises InputError if the folder is missing or has no images."""
    if s.image_channels != 3:
        raise InputError(f"--image-channels {s.image_channels}: images have 3; 16 is for latents, which are not loaded yet")
    if s.data == "shapes":
        forms = 3 + s.difficulty
        classes = [f"{colour} {form}" for colour in list(COLOURS)[:forms] for form in FORMS[:forms]]
        labels = torch.arange(len(classes)).repeat_interleave(s.per_class)
        g = maskrl.rng(s.seed, "shapes")
        images = torch.cat([draw_shapes(part, s.image_size, s.difficulty, g) for part in labels.split(4096)])
    else:
        classes, images, labels = load_folder(s.data, s.image_size)
    parts = ([], [], [])
    g = maskrl.rng("split")  # the same for every seed, so that no stage meets what another held out
    for y in range(len(classes)):
        rows = (labels == y).nonzero().squeeze(1)
        if len(rows) < 20:
            raise InputError(f"class {classes[y]!r} in {s.data} has {len(rows)} readable images; at least 20 are needed")
        rows = rows[torch.randperm(len(rows), generator=g)]
        a, b = int(0.6 * len(rows)), int(0.8 * len(rows))
        for part, chosen_rows in zip(parts, (rows[:a], rows[a:b], rows[b:])):
            part.append(chosen_rows)
    return Data(classes, *(Split(images[i], labels[i]) for i in map(torch.cat, parts)))


def load_folder(folder, size):
    """Class names, images resized and centre-cropped to uint8 [N, 3, size, size], labels [N] of an image folder."""
    try:
        found = datasets.ImageFolder(folder)
    except OSError as error:
        raise InputError(f"--data {folder}: {error}. Expected one sub-folder of images per class") from None

    def read(sample):
        try:
            return read_image(sample[0], size), sample[1]
        except (OSError, SyntaxError, ValueError) as error:
            tqdm.write(f"skipped {sample[0]}: {error}", file=sys.stderr)

    with ThreadPoolExecutor() as pool:
        work = tqdm(pool.map(read, found.samples), "images", len(found.samples), leave=False)
        read_ok = [pair for pair in work if pair is not None]
    if len(read_ok) < len(found.samples):
        print(f"skipped {len(found.samples) - len(read_ok)} of {len(found.samples)} images in {folder}", file=sys.stderr)
    if not read_ok:
        raise InputError(f"--data {folder}: none of its images could be read")
    return found.classes, torch.stack([x for x, _ in read_ok]), torch.tensor([y for _, y in read_ok])


# Reward network, judge and yardstick ----------------------------------------------------------------------
# Two networks of different architecture, seed and data. The reward is what RL climbs unless --reward says otherwise; the
# judge is what reports are written by, and nothing trains on it. Both learn from real images alone: the judge to tell the
# classes, the reward also to tell images from damaged ones (blurred, with patches of another, noisy), so that it sees seams.


def damage(x, labels, patch, generator):
    """x [B, 3, H, W] in [-1, 1] with about half of the images damaged by a random amount, and what was done [B]:
    0 nothing, 1 blur, 2 patches swapped in from another image of the class, 3 noise."""
    B = len(x)
    kind = (torch.randint(6, (B,), generator=generator) - 2).clamp(min=0).to(x.device)
    amount = torch.rand(B, generator=generator).to(x.device)[:, None, None, None]
    shuffled = torch.randperm(B, generator=generator).to(x.device)
    own, other = labels.argsort(stable=True), shuffled[labels[shuffled].argsort(stable=True)]  # both sorted by class
    partner = torch.empty_like(own).scatter(0, own, other)
    tokens = maskrl.patchify(x, patch)
    swap = torch.rand(tokens.shape[:2], generator=generator).to(x.device) < 0.1 + 0.4 * amount.flatten()[:, None]
    swapped = maskrl.unpatchify(torch.where(swap[..., None], tokens[partner], tokens), patch)
    noisy = x + 0.2 * amount * torch.randn(x.shape, generator=generator).to(x.device)
    done = torch.stack([x, x + (0.2 + 0.8 * amount) * (blur(x) - x), swapped, noisy])
    out = done[kind, torch.arange(B, device=x.device)].clamp(-1, 1)
    return out, kind * (out != x).flatten(1).any(1)  # swapped with itself is not damaged


def blur(x):
    """Binomial blur by one pixel, [B, C, H, W]."""
    kernel = torch.tensor([1.0, 2.0, 1.0], device=x.device, dtype=x.dtype) / 4
    kernel = (kernel[:, None] * kernel).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])


class Critic(nn.Module):
    """images [B, 3, S, S] in [-1, 1] -> features [B, 64] and logits. The reward has one more class: `damaged`.

    Convolutions halve until 4 pixels wide, then a dense layer; of `reward` and `judge`, no two layers are alike."""

    def __init__(self, name, size, outputs):
        super().__init__()
        stem, width, k_stem, k, act = {"reward": (32, 64, 3, 3, nn.ReLU), "judge": (48, 48, 5, 4, nn.GELU)}[name]
        layers, channels = [nn.Conv2d(3, stem, k_stem, padding=k_stem // 2), act()], stem
        while size > 4:
            layers += [nn.Conv2d(channels, width, k, stride=2, padding=1), nn.GroupNorm(8, width), act()]
            channels, size = width, size // 2
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, 64), act())
        self.classify = nn.Linear(64, outputs)

    def forward(self, images):
        features = self.body(images.clamp(-1, 1))  # no pay for colours that no image has
        return features, self.classify(features)

    def quality(self, images, labels):
        """p(an undamaged image of its class) in (0, 1], differentiable in the pixels [B]."""
        return self(images)[1].softmax(-1).gather(1, labels[:, None]).squeeze(1)


def train_critic(name, split, s, device):
    """The network `name` (reward or judge), trained on the images of `split`; returns it in eval mode, frozen."""
    torch.manual_seed(zlib.crc32(f"{name} {s.seed}".encode()))
    classes = int(split.labels.max()) + 1
    damaged = classes if name == "reward" or classes == 1 else None  # one class alone would teach the judge nothing
    critic = Critic(name, s.image_size, classes + (damaged is not None)).to(device)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=s.judge_iters)
    for step in tqdm(range(s.judge_iters), name, leave=False):
        g = maskrl.rng(s.seed, name, step)
        x, labels = split.batch(128, g, device, s.flip)
        if damaged is not None:
            x, kind = damage(x, labels, s.patch, g)
            labels = torch.where(kind > 0, damaged, labels)
        maskrl.descend(F.cross_entropy(critic(x)[1], labels), optimizer)
        rate.step()
    return critic.eval().requires_grad_(False)


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) of features a [N, F], b [M, F], in float64: FID's formula."""
    a, b = a.cpu().double(), b.cpu().double()
    S_a, S_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(S_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ S_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + S_a.trace() + S_b.trace() - 2 * cross)


def precision_recall(real, fake, k=3):
    """Share of `fake` features [M, F] inside the manifold of `real` [N, F], and of real inside fake's (1904.06991).

    A manifold is the union of balls around its points, each reaching to the k-th nearest other point."""
    reach = lambda b: torch.cdist(b, b).kthvalue(min(k + 1, len(b))).values  # the nearest point of all is itself
    inside = lambda a, b: float((torch.cdist(a, b) <= reach(b)).any(1).float().mean())
    return inside(fake, real), inside(real, fake)


def diversity(features, labels):
    """Mean distance between two images of the same class in feature space, averaged over the classes: 0 = one image a class."""
    return float(torch.stack([F.pdist(features[labels == y]).mean() for y in labels.unique()]).nanmean())


class Judge:
    """What reports are written by, on the features of a network that nothing trains on.

    Every row has the same number n of class-balanced images, and is compared with `halves` reference draws of n
    real held-out images; the row `real` compares each with the other half of its draw."""

    def __init__(self, data, s, device, halves=5):
        self.critic = train_critic("judge", data.judge, s, device)
        self.device, self.seed = device, s.seed
        self.halves = [data.test.balanced_halves(s.judge_n, maskrl.rng(s.seed, "halves", i)) for i in range(halves)]
        self.labels = self.halves[0][0].labels.to(device)  # of the images to be judged, in this order
        self.references = [self.features(half.images)[0] for half, _ in self.halves]

    @torch.no_grad()
    def features(self, images):
        if images.dtype == torch.uint8:
            images = images.float() / 127.5 - 1
        out = [self.critic(part.to(self.device)) for part in images.split(512)]
        return torch.cat([f for f, _ in out]), torch.cat([y for _, y in out])

    def row(self, pairs):
        """Class accuracy, frechet and its spread (std) of [(features, class logits), ...], one for each reference draw;
        precision, recall and within-class diversity (1 = as diverse as real images) against the first draw."""
        distances = torch.tensor([frechet_distance(features, ref) for (features, _), ref in zip(pairs, self.references)])
        accuracy = torch.stack([(logits.argmax(1) == self.labels).float().mean() for _, logits in pairs]).mean()
        features, real = pairs[0][0], self.references[0]
        precision, recall = precision_recall(real, features)
        as_real = diversity(features, self.labels) / max(diversity(real, self.labels), 1e-12)
        return {"accuracy": float(accuracy), "frechet": float(distances.mean()), "frechet_std": float(distances.std()),
                "precision": precision, "recall": recall, "diversity": as_real}

    def __call__(self, images):
        """The row of images [n, 3, S, S] of classes `self.labels`."""
        return self.row([self.features(images)] * len(self.references))

    def real(self):
        """The row of real against real: what a perfect generator would get."""
        return self.row([self.features(other.images) for _, other in self.halves])


class Progress:
    """A yardstick for training that is not the judge, on n images of fixed labels, order and noise: {name: Fréchet distance}.

    `reward_features` is on the reward network's features, `progress` on the pixels of a grid of about 8x8. Weights are
    kept by the latter: the former prefers clean, alike images to diverse ones, and chose worse weights than the last (README)."""

    def __init__(self, critic, data, s, device, n=1024):
        self.critic, self.s = critic, s
        self.labels = data.train.labels[torch.linspace(0, len(data.train) - 1, n).long()].to(device)  # classes in their shares
        self.reference = [torch.cat(parts) for parts in zip(*(self.views(x.to(device)) for x in data.some().split(512)))]

    def views(self, images):
        stride = max(2, images.shape[-1] // 8)
        return images[..., ::stride, ::stride].flatten(1), self.critic(images)[0]

    def __call__(self, model, denoise_steps=1, **how):
        parts = [maskrl.generate(model, y, denoise_steps=denoise_steps, **how, seed=(self.s.seed, "progress", i))
                 for i, y in enumerate(self.labels.split(256))]
        views = self.views(maskrl.to_images(torch.cat(parts), self.s))
        return dict(zip(("progress", "reward_features"), map(frechet_distance, views, self.reference)))


# The report: one table by the judge, three pictures -----------------------------------------------------


def report(out, s, data, judge, models, extra=None):
    """Judge every generator on the same classes and noise, time them side by side, write metrics.json and the pictures.

    models: student, and perhaps teacher and policy. Adds real images, an untrained model, and the one-step start: the
    teacher's weights asked for one step, before GSIM."""
    device = judge.device
    torch.manual_seed(s.seed + 1)
    chain = dict(steps=s.steps, guidance=s.guidance, denoise_steps=s.denoise_steps)
    ways = {"untrained": (maskrl.MAR(s, data.classes).to(device), dict(steps=s.steps, denoise_steps=1))}
    if "teacher" in models:
        ways["teacher"] = (models["teacher"], chain)
        ways["one-step start"] = (models["teacher"], dict(steps=s.steps, denoise_steps=1))
    ways["student"] = (models["student"], dict(steps=s.steps, denoise_steps=1))
    if "policy" in models:
        ways["policy"] = (models["policy"], dict(steps=None, denoise_steps=1))

    rows, images = {"real": judge.real()}, {"real": judge.halves[0][0].images.float() / 127.5 - 1}
    for name, (model, how) in ways.items():
        tokens, steps = in_batches(model, judge.labels, how, s.seed, name)
        images[name], steps = maskrl.to_images(tokens, s).cpu(), steps.float()
        rows[name] = judge(images[name]) | {"steps": float(steps.mean()), "steps_std": float(steps.std()),
                                            "denoise_steps": how["denoise_steps"]}
    times = {name: [] for name in ways}
    labels = judge.labels[torch.linspace(0, len(judge.labels) - 1, 32).long()]
    for _ in range(4):  # in turns, so that a busy moment of the machine hits all alike; the first round warms up
        for name, (model, how) in ways.items():
            start = time.perf_counter()
            maskrl.generate(model, labels, **how, seed=s.seed)
            times[name].append((time.perf_counter() - start) / len(labels))
    for name in ways:
        rows[name]["seconds_per_image"] = sorted(times[name][1:])[1]

    rows["real"]["nearest"], some = 1.0, slice(None, None, max(1, len(judge.labels) // 500))  # of every class
    typical = nearest(images["real"][some], data)[1].median().clamp(min=1e-6)  # from held-out images to the training image next to them
    for name in ways:
        rows[name]["nearest"] = float(nearest(images[name][some], data)[1].median() / typical)

    metrics = {"n": len(judge.labels), "rows": rows, "hardware": hardware(device), "settings": asdict(s)} | (extra or {})
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    shown = [(judge.labels == y).nonzero().flatten().tolist()[:2] for y in judge.labels.unique()[:12]]
    pick = [i for row in zip(*shown) for i in row]
    captions = {"real": "real"} | {name: f"{name}: {row['steps']:.1f} x {row['denoise_steps']} steps, "
                                   f"{1000 * row['seconds_per_image']:.1f} ms per image" for name, row in rows.items() if name in ways}
    labelled_rows(out / "samples.png", {captions[k]: images[k][pick] for k in captions if k != "untrained"}, len(shown))
    last = list(ways)[-1]
    first = images[last][pick[: len(shown)]]
    labelled_rows(out / "neighbours.png", {last: first, "its nearest training images": nearest(first, data)[0]}, len(shown))
    curves(out)

    print(f"\nBy the judge, n = {metrics['n']} per row, seed {s.seed}, {metrics['hardware']}:")
    print(f"{'':16}{'class accuracy':>15}{'Fréchet distance':>18}{'precision':>11}{'recall':>8}{'diversity':>11}{'nearest':>9}"
          f"{'steps':>14}{'ms/image':>10}")
    for name, row in rows.items():
        cost = f"{row['steps']:8.1f} x {row['denoise_steps']:<4}{1000 * row['seconds_per_image']:9.2f}" if name in ways else ""
        print(f"{name:16}{row['accuracy']:15.3f}{row['frechet']:11.2f} ± {row['frechet_std']:4.2f}{row['precision']:11.3f}"
              f"{row['recall']:8.3f}{row['diversity']:11.3f}{row['nearest']:9.2f}{cost}")
    print("diversity: within classes; nearest: distance to the nearest training image; of both, 1 = as real held-out images")
    print(f"\nPictures: {out / 'samples.png'}, neighbours.png, curves.png; figures: {out / 'metrics.json'}")
    return metrics


def nearest(images, data):
    """The training image next to each of `images` [N, 3, S, S] in [-1, 1], and its distance (root mean square, in pixels)."""
    train = data.some()
    distance, index = torch.cdist(images.clamp(-1, 1).flatten(1), train.flatten(1)).min(1)
    return train[index], distance / images[0].numel() ** 0.5


def pyplot():
    """matplotlib's pyplot, drawing into files; None, with a word, where it is not installed: nothing else needs it."""
    try:
        import matplotlib
    except ImportError:
        return print("curves are not drawn: pip install matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def curves(out):
    """curves.png from log.jsonl: what was logged of every stage, one row a stage."""
    plt = pyplot()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] if (out / "log.jsonl").exists() else []
    keys = {"teacher": ["loss"], "student": ["aux_loss", "progress", "reward_features"],
            "policy": ["reward", "quality", "steps", "kl", "quality_mean", "held_out", "judge", "grad_norm"]}
    titles = {"progress": "Fréchet distance, pixels", "reward_features": "Fréchet distance, reward's features",
              "quality_mean": "quality, no exploration", "held_out": "held-out reward", "judge": "Fréchet distance, judge"}
    stages = [stage for stage in keys if any(line["stage"] == stage for line in lines)]
    if not plt or not stages:
        return
    panels = [(stage, key) for stage in stages for key in keys[stage] if any(line["stage"] == stage and key in line for line in lines)]
    rows = math.ceil(len(panels) / 4)
    figure, axes = plt.subplots(rows, 4, figsize=(13, 2.4 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    for (stage, key), axis in zip(panels, axes.flat):
        points = {line["step"]: line[key] for line in lines if line["stage"] == stage and key in line}  # resumed: the last counts
        axis.plot(points.keys(), points.values(), ".-" if key in titles else "-", markersize=5, linewidth=1)
        axis.set_title(f"{stage}: {titles.get(key, key)}", fontsize=9)
    figure.savefig(out / "curves.png", dpi=80)
    plt.close(figure)


def in_batches(model, labels, how, seed, name, size=256):
    """Tokens of many images, and the unmasking iterations of each."""
    parts = []
    for i, part in enumerate(tqdm(labels.split(size), f"judging {name}", leave=False)):
        tokens, trace = maskrl.generate(model, part, **how, seed=(seed, i), trace="steps")
        parts.append((tokens, trace.steps))
    return [torch.cat(column) for column in zip(*parts)]


def hardware(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


# The script ---------------------------------------------------------------------------------------------


# What a checkpoint fixes: what its weights depend on; for a student also what was distilled into it.
SHAPE = "image_size image_channels patch mean scale width depth heads buffer velocity head_width head_depth".split()
STUDENT_SHAPE = SHAPE + ["noise_ratio", "guidance"]


def chosen(args, device, content=None, resume=False):
    """Settings from parsed `args`: the preset's with the options that were given; or those of a checkpoint's `content`,
    with the options that it leaves free (none, when resuming what it began)."""
    given = {f.name: getattr(args, f.name) for f in fields(maskrl.Settings) if hasattr(args, f.name)}
    if content is None:
        return maskrl.preset(args.preset or ("small" if device.type == "cuda" else "tiny"), **given)
    base = maskrl.Settings(**content["settings"])
    if args.preset and not resume:
        raise InputError(f"--preset {args.preset}: the settings come from the {content['kind']}; leave it out")
    for name in asdict(base) if resume else SHAPE if content["kind"] == "teacher" else STUDENT_SHAPE:
        if given.get(name, getattr(base, name)) != getattr(base, name):
            raise InputError(f"--{name.replace('_', '-')} is fixed by the checkpoint: {getattr(base, name)}"
                             + (". Another --out starts afresh" if resume else ""))
    return replace(base, **given)


def options(doc):
    """The options that both training scripts share: a few, --preset and every field of Settings (absent where not given)."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/latest"), help="folder to write into (default: %(default)s)")
    parser.add_argument("--teacher", type=Path, help="a teacher.pt to start from, instead of training one; beside --student, for the report")
    parser.add_argument("--resume", action="store_true", help="continue what is in --out: finished stages are kept, an "
                        "interrupted one goes on")
    small = ", ".join(f"{k}={v}" for k, v in maskrl.PRESETS["small"].items())
    parser.add_argument("--preset", choices=maskrl.PRESETS, help="settings to start from (default: small on a CUDA GPU, else "
                        f"tiny). tiny: the defaults below; small: {small}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    begins = {"data": "data", "mean": "model", "steps": "generation", "batch": "teacher", "gsim_batch": "student (GSIM)",
              "rl_iters": "RL (train_rl.py; a student keeps them for it)", "reward": "reward (of RL, too) and judge"}
    for f in fields(maskrl.Settings):
        if f.name in begins:
            group = parser.add_argument_group(begins[f.name])
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, choices=f.metadata["choices"])
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                           help=f"{f.metadata['help']} (default: {f.default})".replace("%", "%%"), **kind)
    return parser


def begin(args, names, base=None):
    """What can go wrong, before any long work: device, settings, folder, data. Returns s, data, device.

    names: checkpoints that the script writes, the last stage first; base: content of the checkpoint it starts from."""
    device = maskrl.find_device(args.device)
    there = [name for name in names if (args.out / name).exists()]
    lost = [name for name in names[names.index(there[0]):] if name not in there] if there else []
    if args.resume and lost and not args.teacher:
        raise InputError(f"{args.out} was begun with another {lost[0]}: give it again by --{lost[0].removesuffix('.pt')}")
    if args.resume and there:
        base = maskrl.read_checkpoint(args.out / there[0])
    s = chosen(args, device, base, args.resume and bool(there))
    if there and not args.resume:
        raise InputError(f"{args.out / there[0]} exists: --resume continues it, another --out starts afresh")
    print("settings: " + ", ".join(f"{k}={v}" for k, v in asdict(s).items()))
    data = load_data(s)
    s = data.measure(s)
    print(f"{len(data.classes)} classes; images: {len(data.train)} to train on, {len(data.judge)} for the judge, "
          f"{len(data.test)} held out; on {hardware(device)}")
    if base and base["classes"] != data.classes:
        raise InputError(f"the classes in {s.data} ({', '.join(data.classes[:5])}...) are not the checkpoint's "
                         f"({', '.join(base['classes'][:5])}...); --data names another folder")
    if args.resume and not there:
        print(f"nothing to resume in {args.out}: starting afresh")
    args.out.mkdir(parents=True, exist_ok=True)
    return s, data, device


def make(args, s, data, device, critic=None):
    """Teacher (unless one is given), student and reward network (the same); {name: model}, the network, the minutes that each took."""
    start = time.perf_counter()
    critic = critic or train_critic("reward", data.train, s, device)
    progress = Progress(critic, data, s, device)
    minutes, start = {"reward": (time.perf_counter() - start) / 60}, time.perf_counter()
    if args.teacher:
        teacher = maskrl.load_checkpoint(args.teacher, "teacher", device)
        teacher.settings = s  # which may differ in what a checkpoint leaves free
    else:
        teacher = train_teacher(s, data, args.out, device, args.resume)
        minutes["teacher"] = (time.perf_counter() - start) / 60
    start = time.perf_counter()
    student = train_student(s, data, teacher, args.out, device, args.resume, progress)
    minutes["student"] = (time.perf_counter() - start) / 60
    return {"teacher": teacher, "student": student}, critic, minutes


def main(argv=None):
    args = options(__doc__).parse_args(argv)
    base = maskrl.read_checkpoint(args.teacher, "teacher") if args.teacher else None
    s, data, device = begin(args, ["student.pt", "teacher.pt"], base)
    models, _, minutes = make(args, s, data, device)
    judge = Judge(data, s, device)
    return report(args.out, s, data, judge, models, {"minutes": minutes})


if __name__ == "__main__":
    maskrl.run(main)
