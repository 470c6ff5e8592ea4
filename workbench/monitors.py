"""What is logged during training about the images that the model makes by then."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from maskrl import MAR, Sampling, generate, rng, to_images
from workbench.data import Data
from workbench.judge import Judge, frechet_distance
from workbench.quality_net import QualityNet
from workbench.settings import RunSettings


def measurements(affordable: int, existing: int, most: int) -> tuple[int, int]:
    """How many times a stage is measured, and on how many images, where it has time for
    `affordable` images in all: ten times, on at most `most` images.

    In short stages first on fewer images, but 128 or as many as are `existing` to compare with;
    then fewer times. It depends on nothing but settings and data, since what is measured decides
    which weights are kept."""
    n = max(2, min(most, existing, max(128, affordable // 10)))
    return min(10, max(1, affordable // n)), n


def student_measurements(settings: RunSettings, existing: int) -> tuple[int, int]:
    """`measurements` that take about a tenth of GSIM's time, against `existing` training images."""
    updates = settings.gsim_iters * settings.batch * settings.draws
    return measurements(updates // settings.steps, existing, most=1024)


def policy_measurements(settings: RunSettings, existing: int) -> tuple[int, int]:
    """`measurements` that take about a tenth of RL's time, against `existing` images of a judge."""
    updates = settings.rl_iters + (4 * settings.schedule_iters if settings.learn_steps else 0)
    return measurements(updates * settings.prompts * settings.group // 10, existing, most=512)


def view_filters(size: int) -> Tensor:
    """Three filters [6, 3, side, side] that average a colour over a cell of an 8x8 grid, and three
    random ones of the same norm."""
    side = max(1, size // 8)
    average = torch.eye(3)[:, :, None, None].expand(3, 3, side, side) / side**2
    random = torch.randn(average.shape, generator=rng("views"))
    random = random / random.flatten(1).norm(dim=1)[:, None, None, None] / side
    return torch.cat([average, random])


class ValidationMetric:
    """Fréchet distances to the training images, of n images of fixed labels, order and noise.

    `validation` is taken on views of the pixels, and the weights with the lowest are kept;
    `reward_features`, on the features of the reward network, prefers clean images that all look the
    same to diverse ones. A view has, for each cell of a grid of 8x8, the average colour and three
    fixed random projections of all its pixels, so that noise and seams count wherever they are."""

    def __init__(self, net: QualityNet, data: Data, settings: RunSettings, device, n: int = 1024):
        self.net, self.settings, self.decode = net, settings, data.decode
        evenly = torch.linspace(0, len(data.train) - 1, n).long()
        self.labels = data.train.labels[evenly].to(device)  # classes in their proportions
        self.filters = view_filters(data.train.size).to(device)
        views = [self.views(x.to(device)) for x in data.train.spaced().split(512)]
        self.reference = [torch.cat(parts) for parts in zip(*views)]

    @torch.no_grad()
    def views(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Views [B, 384] and features [B, 64] of images [B, 3, S, S] in [-1, 1]."""
        view = F.conv2d(images, self.filters, stride=self.filters.shape[-1])
        return view.flatten(1), self.net(images)[0]

    def __call__(self, model: MAR, sampling: Sampling | None = None) -> dict[str, float]:
        sampling = replace(sampling or Sampling(), order="random")  # the masks of training
        parts = [
            generate(model, labels, sampling, seed=(self.settings.seed, "validation", i))
            for i, labels in enumerate(self.labels.split(256))
        ]
        views = self.views(self.decode(to_images(torch.cat(parts), self.settings)))
        distances = [frechet_distance(a, b) for a, b in zip(views, self.reference)]
        return {"validation": distances[0], "reward_features": distances[1]}


class RLMonitor:
    """What RL logs about a model, on fixed noise without exploration.

    `quality_mean` is the trained reward. To expose reward hacking there are `held_out`, a reward
    that is not trained on (if there is one), and `judge`, the judge's Fréchet distance. n is small:
    compare within a run. A policy that collapses is told of once in a line: when it takes one step
    for all images, and when its distance is twice that of the student, of which `start` is told.

    raw: rewards {name: r} that the trained one scales, which are logged as they are."""

    def __init__(
        self,
        settings: RunSettings,
        quality: Callable,
        held_out: Callable | None,
        judge: Judge,
        n: int = 512,
        raw: dict[str, Callable] | None = None,
    ):
        evenly = torch.linspace(0, len(judge.labels) - 1, min(n, len(judge.labels))).long()
        self.labels = judge.labels[evenly]
        self.settings, self.quality, self.held_out, self.judge = settings, quality, held_out, judge
        self.raw = raw or {}
        self.distance_at_start, self.said = math.inf, set()

    def start(self, student: MAR) -> None:
        """Measures the student that RL begins with."""
        self.distance_at_start = self(student)["judge"]

    @torch.no_grad()
    def __call__(self, model: MAR) -> dict[str, float]:
        seed = self.settings.seed, "monitor"
        tokens, trace = generate(model, self.labels, seed=seed, trace=True)
        images = self.judge.decode(to_images(tokens, self.settings))
        features, _ = self.judge.features(images)
        metrics = {
            "quality_mean": float(self.quality(images, self.labels).mean()),
            "judge": frechet_distance(features, self.judge.references[0]),
        }
        if self.held_out:
            metrics["held_out"] = float(self.held_out(images, self.labels).mean())
        for name, reward in self.raw.items():
            metrics[f"raw {name}"] = float(reward(images, self.labels).mean())
        if model.schedule is not None and trace.steps.max() == 1:
            self.say_once(
                "one step",
                "the policy has gone to one step: this reward does not fall with fewer steps. "
                "--no-learn-steps learns without a schedule",
            )
        if metrics["judge"] > 2 * self.distance_at_start:
            self.say_once(
                "distance",
                f"the judge's distance has risen to {metrics['judge']:.3g} from the student's "
                f"{self.distance_at_start:.3g}: RL may be hacking the reward, or --alpha be too "
                "large. A larger --beta holds the policy to the student",
            )
        return metrics

    def say_once(self, what: str, warning: str) -> None:
        if what not in self.said:
            print(f"warning: {warning}")
        self.said.add(what)
