"""A learned schedule against the best fixed one."""

from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from maskrl import Noise, Sampling, add_schedule, generate, rng, to_images, total_reward
from workbench.damage import partners
from workbench.studies.study import Study


class Schedule(Study):
    title = "A learned schedule against the best fixed one (Speed-RL)"
    question = (
        "Fixed schedules of the demo's policy: the cosine ones, and the best of all count vectors "
        "of 3 to 8 iterations that do not decrease, searched by reward on other noise. `margin`: "
        "mean difference of the reward from that vector's on the same classes, orders and z, with "
        "its standard error. *Shuffled*: each image gets the schedule of another one of its class. "
        "*Drawn*: counts are drawn from the policy, not its medians."
    )
    seeds = "0,1,2"
    columns = (
        *("reward", "margin", "margin_error", "quality", "held_out", "frechet", "precision"),
        *("steps", "vector"),
    )
    cosine = (8, 6, 5, 4)
    lengths = range(3, 9)  # of the count vectors
    searched = 225  # images of each candidate; the best ten are compared on six times as many
    verdict = (
        "The learned schedule's reward differs from the best vector's by "
        "{0[learned - vector][reward]}. It adapts to the image: shuffled within a class it differs "
        "by {0[shuffled - vector][reward]}.",
        "Four iterations are not free: the distance is {0[learned / student][frechet]} times the "
        "student's in 16. In random orders it is {0[learned, random order / learned][frechet]} "
        "times that in Halton's.",
    )

    def rows(self, lab) -> dict:
        rows = {
            "student": partial(self.fixed, lab, lab.student, Sampling()),
            "untrained": partial(self.untrained, lab),
            "learned": partial(self.fixed, lab, lab.policy, Sampling()),
            "learned, drawn": partial(self.fixed, lab, lab.policy, Sampling(greedy=False)),
            "learned, random order": partial(self.fixed, lab, lab.policy, Sampling(order="random")),
            "shuffled": partial(self.shuffled, lab),
            "vector": partial(self.vector, lab),
        }
        for K in self.cosine:
            rows[f"cosine, K = {K}"] = partial(self.fixed, lab, lab.policy, Sampling(K))
        return {name: partial(lab.result, f"schedule, {name}", f) for name, f in rows.items()}

    def fixed(self, lab, model, sampling) -> dict:
        return self.figures(lab, *self.images(lab, model, sampling))

    def untrained(self, lab) -> dict:
        model = deepcopy(lab.policy)
        add_schedule(model)
        return self.fixed(lab, model, Sampling(greedy=False))

    def vector(self, lab) -> dict:
        counts = self.best_vector(lab)
        return self.fixed(lab, lab.policy, Sampling(counts)) | {"vector": str(counts)}

    def shuffled(self, lab) -> dict:
        """Each image with the counts that were chosen for another one of its class."""
        model, parts = deepcopy(lab.policy), []
        for i, (labels, seed) in enumerate(self.batches(lab, lab.judge.labels)):
            _, trace = generate(lab.policy, labels, Sampling(), seed=seed, trace=True)
            donor = partners(labels, rng(lab.seed, "shuffled", i))
            model.schedule = GivenCounts(trace.counts[donor])
            noise = Noise(trace.order, trace.z)
            parts.append(generate(model, labels, Sampling(), noise, trace=True))
        return self.figures(lab, *self.together(lab, parts))

    def images(self, lab, model, sampling, labels=None, name="schedule") -> tuple[Tensor, Tensor]:
        """Images and iterations of `labels`, on noise that is the same for every model."""
        labels = lab.judge.labels if labels is None else labels
        parts = [
            generate(model, y, sampling, seed=(name, *seed), trace=True)
            for y, seed in self.batches(lab, labels)
        ]
        return self.together(lab, parts)

    @staticmethod
    def batches(lab, labels) -> list:
        """The labels in parts, and a seed for each part."""
        return [(y, (lab.seed, i)) for i, y in enumerate(labels.split(450))]

    @staticmethod
    def together(lab, parts) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([tokens for tokens, _ in parts])
        steps = torch.cat([trace.steps for _, trace in parts])
        return to_images(tokens, lab.settings).cpu(), steps.cpu()

    def figures(self, lab, images, steps) -> dict:
        quality = lab.rewards(lab.quality, images)
        reward = total_reward(quality, steps, lab.settings)
        margin = reward - self.reward_of_best(lab)
        return {
            **lab.judge(images),
            "quality": float(quality.mean()),
            "held_out": float(lab.rewards(lab.held_out, images).mean()),
            "reward": float(reward.mean()),
            "margin": float(margin.mean()),
            "margin_error": float(margin.std() / len(margin) ** 0.5),
            "steps": float(steps.float().mean()),
            "steps_std": float(steps.float().std()),
        }

    def reward_of_best(self, lab) -> Tensor:
        """The reward of each image by the best vector [n]."""
        images, steps = self.images(lab, lab.policy, Sampling(self.best_vector(lab)))
        return total_reward(lab.rewards(lab.quality, images), steps, lab.settings)

    def best_vector(self, lab) -> tuple[int, ...]:
        return tuple(lab.result("schedule, search", partial(self.search, lab))["counts"])

    def search(self, lab) -> dict:
        """The counts of highest reward on noise that no row is measured on."""
        candidates = ascending(lab.settings.length, self.lengths)
        for n, keep in ((self.searched, 10), (6 * self.searched, 1)):
            rewards = {counts: self.mean_reward(lab, counts, n) for counts in candidates}
            candidates = sorted(candidates, key=rewards.get, reverse=True)[:keep]
        return {"counts": list(candidates[0])}

    @torch.no_grad()
    def mean_reward(self, lab, counts, n: int) -> float:
        labels = lab.evenly(n)
        images, steps = self.images(lab, lab.policy, Sampling(counts), labels, "search")
        pairs = zip(images.split(500), labels.split(500))
        quality = torch.cat([lab.quality(x.to(lab.device), y).cpu() for x, y in pairs])
        return float(total_reward(quality, steps, lab.settings).mean())


class GivenCounts(nn.Module):
    """A schedule that reveals counts [B, T], whatever it sees."""

    def __init__(self, counts):
        super().__init__()
        self.steps = iter(counts.T)

    def select(self, states, generator=None) -> Tensor:
        return next(self.steps)


def ascending(total: int, lengths, least: int = 1) -> list[tuple[int, ...]]:
    """The ways to write total as a sum of numbers that do not decrease, as many as in lengths."""
    found = [(total,)] if 1 in lengths and total >= least else []
    shorter = [n - 1 for n in lengths if n > 1]
    for first in range(least, total // 2 + 1) if shorter else ():
        found += [(first, *rest) for rest in ascending(total - first, shorter, first)]
    return found
