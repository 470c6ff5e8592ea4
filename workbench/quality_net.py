"""Two networks that rate images: the reward model that RL climbs by default, and the judge's.

Both learn from real images alone, to tell their classes and what was done to them: an image is
whole, or damaged in one of four ways (damage.py). To see these a network must look at edges, at
structure, and at what belongs together. The two differ in architecture, seed, images and kinds of
damage, so what RL finds to fool the one need not fool the other; nothing trains on the judge."""

import zlib
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from maskrl import optimizer_step, rng
from workbench.damage import JUDGE_DAMAGE, REWARD_DAMAGE, damage, patch_in_pixels
from workbench.data import Split
from workbench.distributed import agreed, rank, share_weights
from workbench.errors import InputError
from workbench.files import build_and_load, load_safely, save_safely, tensors_of
from workbench.settings import RunSettings

# stem channels, width, kernel of the stem, kernel of the other layers, activation, kinds of damage
DESIGNS = {
    "reward": (32, 64, 3, 3, nn.ReLU, REWARD_DAMAGE),
    "judge": (48, 48, 5, 4, nn.GELU, JUDGE_DAMAGE),
}


class QualityNet(nn.Module):
    """The network `name` (reward or judge) for images [B, 3, size, size] in [-1, 1].

    It gives features [B, 64], logits of the classes [B, classes], and logits of what was done to
    the image [B, 5] (0: nothing). Convolutions halve the image until it is 4 pixels wide, then
    comes a dense layer."""

    def __init__(self, name: str, size: int, classes: int):
        super().__init__()
        channels, width, stem_kernel, kernel, activation, self.kinds = DESIGNS[name]
        layers = [nn.Conv2d(3, channels, stem_kernel, padding=stem_kernel // 2), activation()]
        while size > 4:
            layers.append(nn.Conv2d(channels, width, kernel, stride=2, padding=1))
            layers += [nn.GroupNorm(8, width), activation()]
            channels, size = width, size // 2
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, 64)]
        self.body = nn.Sequential(*layers, activation())
        self.classify = nn.Linear(64, classes)
        self.detect = nn.Linear(64, 1 + len(self.kinds))
        self.odds = 1.0  # factor on the odds of the quality, see `calibrate`

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # colours that no image has must not pay; of 256 x 256 pixels 64 images at a time
        parts = images.clamp(-1, 1).split(max(1, 2**22 // images[0, 0].numel()))
        features = torch.cat([self.body(part) for part in parts])
        return features, self.classify(features), self.detect(features)

    def quality(self, images: Tensor, labels: Tensor) -> Tensor:
        """p = p(its class) p(undamaged) in (0, 1] [B], with its odds p / (1 - p) times `odds`.

        Differentiable in the pixels."""
        _, class_logits, damage_logits = self(images)
        p_class = class_logits.softmax(-1).gather(1, labels[:, None]).squeeze(1)
        p = p_class * damage_logits.softmax(-1)[:, 0]
        return self.odds * p / (1 + (self.odds - 1) * p)

    @torch.no_grad()
    def calibrate(self, images: Tensor, labels: Tensor) -> None:
        """Choose `odds` such that half of a generator's images have a quality above 0.5, if fewer
        have: a reward that gives nothing to all of them cannot tell them apart."""
        self.odds = 1.0
        parts = zip(images.split(256), labels.split(256))
        p = torch.cat([self.quality(x, y) for x, y in parts])
        median = p.median().clamp(1e-6, 0.5)
        self.odds = float((1 - median) / median)


def train_quality_net(name: str, split: Split, settings: RunSettings, device) -> QualityNet:
    """The network `name` (reward or judge), trained on the images of `split`, then frozen.

    Of several processes the first trains it for all: each alone would get another one."""
    torch.manual_seed(zlib.crc32(f"{name} {settings.seed}".encode()))
    net = QualityNet(name, split.size, number_of_classes(split)).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=settings.judge_iters)
    for step in tqdm(range(settings.judge_iters), name, leave=False):
        if step % 100 == 0:
            share_weights(net)  # now and then, so that no process waits for long
        if rank():
            continue
        generator = rng(settings.seed, name, step)
        x, labels = split.batch(128, generator, device, settings.flip)
        x, kind = damage(x, labels, patch_in_pixels(x, settings), generator, net.kinds)
        _, class_logits, damage_logits = net(x)
        loss = F.cross_entropy(class_logits, labels) + F.cross_entropy(damage_logits, kind)
        optimizer_step([loss], optimizer)
        rate.step()
    share_weights(net)
    return net.eval().requires_grad_(False)


def number_of_classes(split: Split) -> int:
    """At least as many as there are labels: a checkpoint may know classes that do not occur."""
    return int(split.labels.max()) + 1


def kept_quality_net(
    path, name: str, split: Split, settings: RunSettings, device, resume: bool
) -> QualityNet:
    """The network `name` as `train_quality_net` makes it, kept in the file `path`.

    With `resume` the file is used in place of training. Where it is missing or damaged, or its
    network was trained in another way, the network is trained again, which is always right: it
    costs time, and depends on nothing but its arguments."""
    trained_with = {
        "name": name,
        "size": split.size,
        "classes": number_of_classes(split),
        "images": len(split),
        "patch": patch_in_pixels(split.stored, settings),
        "flip": settings.flip,
        "seed": settings.seed,
        "judge_iters": settings.judge_iters,
    }
    net = None
    if resume and Path(path).exists():
        try:
            net = read_quality_net(path, trained_with).to(device)
        except InputError as error:
            print(f"the {name} network is trained again: {error}")
    if agreed(int(net is None), device):  # also where only another process cannot read it
        net = train_quality_net(name, split, settings, device)
        save_safely(path, {"trained_with": trained_with, "model": net.state_dict()})
    return net


def read_quality_net(path, trained_with: dict) -> QualityNet:
    """The network of a file, on the CPU and frozen; InputError unless it was trained like this."""
    content = load_safely(path)
    if not isinstance(content, dict) or content.get("trained_with") != trained_with:
        raise InputError(f"{path} is of another network, or of other images or settings")
    name, size, classes = (trained_with[key] for key in ("name", "size", "classes"))
    weights = tensors_of(path, content, "model")
    net = build_and_load(path, partial(QualityNet, name, size, classes), weights)
    return net.eval().requires_grad_(False)
