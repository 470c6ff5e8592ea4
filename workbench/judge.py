"""The judge, which rates the images of reports.

FID's formula and the k-nearest-neighbour precision and recall, on the features of a network that
nothing trains on: the judge's own, or a pretrained one. First its sensitivity is checked: a judge
that does not see a fault has no say about it."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maskrl import rng
from workbench.damage import REWARD_DAMAGE, partners, patch_in_pixels
from workbench.data import Data, to_unit
from workbench.quality_net import QualityNet, train_quality_net
from workbench.settings import RunSettings


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) of features a [N, F], b [M, F].

    FID's formula, in float64. With S_a = A^T A, A being centred and divided by sqrt(N - 1), the
    last trace is the sum of the singular values of A B^T, or of their QR factors, which are small
    where there are fewer images than features, and where there are more. FloatingPointError if a
    feature is infinite or NaN."""
    a, b = a.cpu().double(), b.cpu().double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise FloatingPointError("features of images are infinite or NaN")
    A, B = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    R_A, R_B = (torch.linalg.qr(X, mode="r").R for X in (A, B))
    cross = torch.linalg.svdvals(R_A @ R_B.T).sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + A.square().sum() + B.square().sum() - 2 * cross)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Fraction of `fake` features [M, F] inside the manifold of `real` [N, F], and of real inside
    fake's (1904.06991)."""
    return fraction_inside(fake, real, k), fraction_inside(real, fake, k)


def fraction_inside(points: Tensor, centres: Tensor, k: int) -> float:
    """Fraction of `points` [N, F] in a union of balls, each of which reaches from one of the
    `centres` [M, F] to its k-th nearest neighbour among them."""
    nearest_first = torch.cdist(centres, centres).sort(1).values  # the nearest one is itself
    radius = nearest_first[:, min(k, len(centres) - 1)]
    return float((torch.cdist(points, centres) <= radius).any(1).float().mean())


def diversity(features: Tensor, labels: Tensor) -> float:
    """Mean distance between two images of a class in feature space, averaged over the classes."""
    within = [F.pdist(features[labels == y].cpu()).mean() for y in labels.unique()]
    return float(torch.stack(within).nanmean())


class Judge:
    """Judges n class-balanced images of the classes `labels` [n].

    Every set of images is compared with several draws of n real held-out images, and the row `real`
    compares each of these draws with as many other real images.
    embed: pretrained features, a function of images [B, 3, S, S] in [-1, 1] -> [B, F], in place of
    those of the judge's own network, which tells the class accuracy in any case.
    net: that network, if it has been trained before.

    `sensitivity` is {kind of damage: (weak, strong)}: Fréchet distances of held-out images that
    were damaged in ways that the judge did not learn from. `insensitive_to` lists the kinds that it
    does not order, real images below weak damage below strong."""

    def __init__(
        self,
        data: Data,
        settings: RunSettings,
        device,
        embed: Callable | None = None,
        draws: int = 5,
        net: QualityNet | None = None,
    ):
        self.net = net or train_quality_net("judge", data.judge, settings, device)
        self.embed, self.device, self.decode = embed, device, data.decode
        self.halves = [
            data.test.balanced_halves(settings.judge_n, rng(settings.seed, "halves", i))
            for i in range(draws)
        ]
        self.labels = self.halves[0][0].labels.to(device)
        self.references = [self.features(half.images)[0] for half, _ in self.halves]
        real = self.real_row()
        self.sensitivity = self.measure_sensitivity(settings)
        self.insensitive_to = [
            kind
            for kind, (weak, strong) in self.sensitivity.items()
            if not real["frechet"] < weak < strong or strong < real["frechet"] + real["frechet_std"]
        ]
        print(self.describe_sensitivity(real))

    @property
    def real_images(self) -> Tensor:
        """The first draw of real images [n, 3, S, S] in [-1, 1], of the classes `labels`."""
        return to_unit(self.halves[0][0].images)

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, F] and class logits of images [n, 3, S, S] in [-1, 1], or of bytes."""
        if images.dtype == torch.uint8:
            images = to_unit(images)
        features, logits = [], []
        for part in images.split(512):
            part = part.to(self.device)
            own, class_logits, _ = self.net(part)
            # a function of the user's may answer on the CPU
            features.append(self.embed(part).to(self.device) if self.embed else own)
            logits.append(class_logits)
        return torch.cat(features), torch.cat(logits)

    def __call__(self, images: Tensor) -> dict[str, float]:
        """The row of images [n, 3, S, S]: class accuracy; frechet and its std over the draws;
        precision, recall and within-class diversity (1: as diverse as real images)."""
        return self.row([self.features(images)] * len(self.references))

    def real_row(self) -> dict[str, float]:
        """The row of real against real: what a perfect generator would get."""
        return self.row([self.features(other.images) for _, other in self.halves])

    def row(self, draws: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """The row of (features, logits), one pair for each of the references."""
        pairs = zip(draws, self.references)
        distances = torch.tensor([frechet_distance(f, reference) for (f, _), reference in pairs])
        hits = torch.stack([(logits.argmax(1) == self.labels).float() for _, logits in draws])
        features, real = draws[0][0], self.references[0]
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

    def measure_sensitivity(self, settings: RunSettings) -> dict[str, tuple[float, float]]:
        """Distances of real images that are not in the first draw, after every REWARD_DAMAGE."""
        half = self.halves[0][1]
        x, patch = to_unit(half.images), patch_in_pixels(half.images, settings)
        partner = x[partners(half.labels, rng(settings.seed, "partners"))]
        sensitivity = {}
        for make in REWARD_DAMAGE:
            distances = []
            for strength in (0.25, 1.0):
                amount = torch.full((len(x), 1, 1, 1), strength)
                damaged = make(x, amount, partner, patch, rng(settings.seed, make.__name__))
                distances.append(self.mean_distance(damaged.clamp(-1, 1)))
            sensitivity[make.__name__] = tuple(distances)
        return sensitivity

    def mean_distance(self, images: Tensor) -> float:
        """Mean Fréchet distance of images to the draws of real ones."""
        features, _ = self.features(images)
        distances = [frechet_distance(features, reference) for reference in self.references]
        return sum(distances) / len(distances)

    def describe_sensitivity(self, real: dict[str, float]) -> str:
        kinds = [f"{kind} {a:.2f}, {b:.2f}" for kind, (a, b) in self.sensitivity.items()]
        verdict = "it sees them all"
        if self.insensitive_to:
            names = ", ".join(self.insensitive_to)
            verdict = f"it is INSENSITIVE to {names}: its distances say nothing about that"
        return (
            f"the judge's distances to real images, damaged weakly and strongly: "
            f"{' · '.join(kinds)}; undamaged {real['frechet']:.2f} ± {real['frechet_std']:.2f}: "
            f"{verdict}"
        )
