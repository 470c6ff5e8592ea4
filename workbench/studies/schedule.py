"""A learned schedule against the best fixed one."""

from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from maskrl import (
    Sampling,
    add_schedule,
    generate,
    rng,
    schedule_state,
    to_images,
    total_reward,
)
from workbench.damage import partners
from workbench.studies.study import Study


class Schedule(Study):
    title = "A learned schedule against the best fixed one (Speed-RL)"
    question = (
        "Fixed schedules of the demo's policy: the cosine ones, and the best of all count vectors "
        "of 3 to 8 iterations that do not decrease, searched by reward on other noise. `margin`: "
        "mean difference of the reward from that vector's on the same classes, orders and z, with "
        "its standard error. *Shuffled*: each image gets the schedule of another one of its class. "
        "*Drawn*: counts are drawn from the policy, not its medians. *Hindsight*: each image gets "
        "the best for it of the twelve best vectors whose first two counts are the best one's. "
        "*Foreseen*: it gets the one of highest expected reward, by a ridge regression (4,000 "
        "images) on what the schedule sees after these two iterations, or on all contexts of the "
        "image; on 2,000 others."
    )
    seeds = "0,1,2"
    columns = (
        *("reward", "margin", "margin_error", "quality", "held_out", "frechet", "precision"),
        *("steps", "vector"),
    )
    cosine = (8, 6, 5, 4)
    lengths = range(3, 9)  # of the count vectors
    searched = 225  # images of each candidate; the best ten are compared on six times as many
    among = 12  # vectors between which one chooses
    seen_images = 6000  # images of each of these: two thirds to learn the choice, the rest to test
    verdict = (
        "The learned schedule's reward differs from the best vector's by "
        "{0[learned - vector][reward]}. To choose between twelve vectors after two iterations "
        "would be worth {0[hindsight - vector][margin]} in hindsight; of that "
        "{0[foreseen - vector][margin]} is foreseen from what the schedule sees, and "
        "{0[foreseen, all contexts - vector][margin]} from all contexts: the rest is decided by "
        "noise that no context shows yet.",
        "Four iterations are not free: the distance is {0[learned / student][frechet]} times the "
        "student's in 16. In random orders it is {0[learned, random order / learned][frechet]} "
        "times that in Halton's.",
    )
    note = (
        "The row *shuffled* is missing: it had been measured on other noise than *learned*, which "
        "was cooled twice."
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
        for name in ("hindsight", "foreseen", "foreseen, all contexts"):
            rows[name] = partial(self.choice, lab, name)
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
            noise = {"seed": ("schedule", *seed), "trace": True}  # as in `images`
            _, trace = generate(lab.policy, labels, **noise)
            donor = partners(labels, rng(lab.seed, "shuffled", i))
            model.schedule = GivenCounts(trace.counts[donor])
            parts.append(generate(model, labels, **noise))
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
        return {
            **lab.judge(images),
            "quality": float(quality.mean()),
            "held_out": float(lab.rewards(lab.held_out, images).mean()),
            **compared(reward, self.reward_of_best(lab)),
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
        candidates = self.highest(lab, candidates, self.searched, 10)
        return {"counts": list(*self.highest(lab, candidates, 6 * self.searched, 1))}

    def highest(self, lab, candidates, n: int, keep: int) -> list[tuple[int, ...]]:
        """The counts of highest reward, the mean over n images."""
        labels = lab.evenly(n)
        rewards = {counts: self.rewards(lab, counts, labels, "search") for counts in candidates}
        means = {counts: float(reward.mean()) for counts, reward in rewards.items()}
        return sorted(candidates, key=means.get, reverse=True)[:keep]

    @torch.no_grad()
    def rewards(self, lab, counts, labels, name) -> Tensor:
        """The reward of an image of each label by these counts [n]."""
        images, steps = self.images(lab, lab.policy, Sampling(counts), labels, name)
        pairs = zip(images.split(500), labels.split(500))
        quality = torch.cat([lab.quality(x.to(lab.device), y).cpu() for x, y in pairs])
        return total_reward(quality, steps, lab.settings)

    def choice(self, lab, name: str) -> dict:
        """A row of `choices`."""
        return lab.result("schedule, choices", partial(self.choices, lab))[name]

    def choices(self, lab) -> dict:
        """Rows of what it is worth to choose the counts after two iterations."""
        first = self.best_vector(lab)[:2]
        vectors = [v for v in ascending(lab.settings.length, self.lengths) if v[:2] == first]
        vectors = self.highest(lab, vectors, self.searched, self.among)
        labels = lab.evenly(self.seen_images)
        labels = labels[torch.randperm(len(labels), generator=rng(lab.seed, "choices"))]
        reward = torch.stack([self.rewards(lab, v, labels, "choices") for v in vectors], 1)
        state, contexts = self.seen(lab, first, labels, "choices")

        learned_on = 2 * len(labels) // 3
        known, test = reward[:learned_on], reward[learned_on:]
        expected = {"hindsight": test}
        for name, x in (("foreseen", state), ("foreseen, all contexts", contexts)):
            expected[name] = ridge(x[:learned_on], known, x[learned_on:])
        best_fixed = test[:, known.mean(0).argmax()]
        row = torch.arange(len(test))
        return {
            name: compared(test[row, of_vectors.argmax(1)], best_fixed)
            for name, of_vectors in expected.items()
        }

    @torch.no_grad()
    def seen(self, lab, first, labels, name) -> tuple[Tensor, Tensor]:
        """What the schedule sees, and all contexts, after two iterations of these counts."""
        model, settings, states, contexts = lab.policy, lab.settings, [], []
        sampling = Sampling((*first, settings.length - sum(first)))
        for y, seed in self.batches(lab, labels):
            tokens, trace = generate(model, y, sampling, seed=(name, *seed), trace=True)
            mask = trace.masks()[0][:, 2]
            c = model.context(torch.where(mask[..., None], 0, tokens), mask, y)
            states.append(schedule_state(c, mask, 1 - 2 / settings.steps))
            contexts.append(c.flatten(1))
        return torch.cat(states), torch.cat(contexts)


class GivenCounts(nn.Module):
    """A schedule that reveals counts [B, T], whatever it sees."""

    def __init__(self, counts):
        super().__init__()
        self.steps = iter(counts.T)

    def select(self, states, generator=None) -> Tensor:
        return next(self.steps)


def compared(reward: Tensor, other: Tensor) -> dict:
    """The mean of reward [n], and of its difference from another one of the same images."""
    margin = reward - other
    return {
        "reward": float(reward.mean()),
        "margin": float(margin.mean()),
        "margin_error": float(margin.std() / len(margin) ** 0.5),
    }


def ridge(x: Tensor, y: Tensor, x_new: Tensor, weight: float = 1000.0) -> Tensor:
    """Ridge regression of y [n, m] on x [n, F], standardised: the expected y of x_new."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    A, bias = (x - mean) / std, y.mean(0)
    solution = torch.linalg.solve(A.T @ A + weight * torch.eye(A.shape[1]), A.T @ (y - bias))
    return (x_new - mean) / std @ solution + bias


def ascending(total: int, lengths, least: int = 1) -> list[tuple[int, ...]]:
    """The ways to write total as a sum of numbers that do not decrease, as many as in lengths."""
    found = [(total,)] if 1 in lengths and total >= least else []
    shorter = [n - 1 for n in lengths if n > 1]
    for first in range(least, total // 2 + 1) if shorter else ():
        found += [(first, *rest) for rest in ascending(total - first, shorter, first)]
    return found
