"""Should rollouts differ only where they are optimised?"""

from functools import partial
from unittest import mock

import torch
from torch import Tensor

import train_rl
from maskrl import (
    Noise,
    PolicyGradient,
    Rollouts,
    Sampling,
    Trace,
    as_numbers,
    draw_noise,
    generate,
    rng,
    select_steps,
    to_images,
)
from workbench.studies.study import Reinforcements


class Branching(PolicyGradient):
    """The rollouts of a group differ in the z of the optimised tokens alone, as in TempFlow-GRPO
    (2508.04324), so that the reward's variance is due to them.

    One image of each prompt, made first, tells which steps these are; a fixed schedule reveals the
    same tokens in all rollouts of the group."""

    def policy_update(self, labels, seed) -> dict[str, float]:
        settings, generator = self.model.settings, rng(seed, "update", device=labels.device)
        tokens, trace = self.one_image_each(labels, seed)
        steps = select_steps(trace, tokens, settings, self.mean_image, generator)
        varying = (steps[..., None] & trace.masks()[1]).any(1)  # [P, L]
        rollouts = branched_rollout(self.model, self.quality, labels, seed, varying)
        A, metrics = self.advantages(rollouts)
        counted = varying.repeat_interleave(settings.group, 0)
        return as_numbers(metrics) | self.noise_update(rollouts, A, counted)

    def one_image_each(self, labels, seed) -> tuple[Tensor, Trace]:
        """Tokens and Trace of the image that the rollouts of each prompt branch from."""
        generator = rng(seed, "shared", device=labels.device)  # as in `rollout`
        shared = draw_noise(self.model, len(labels), generator, self.model.settings.order)
        return generate(self.model, labels, noise=shared, trace="predictions")


@torch.no_grad()
def branched_rollout(model, quality, labels, seed, varying) -> Rollouts:
    """`maskrl.rollout` for action z, of which a group shares z but at the tokens varying [P, L]."""
    G, generator = model.settings.group, rng(seed, "shared", device=labels.device)
    shared = draw_noise(model, len(labels), generator, model.settings.order)
    order, z = (v.repeat_interleave(G, 0) for v in (shared.order, shared.z))
    own = torch.randn(z.shape, generator=generator, device=labels.device)
    z = torch.where(varying.repeat_interleave(G, 0)[..., None], own, z)
    labels, sampling = labels.repeat_interleave(G), Sampling(greedy=False)
    tokens, trace = generate(model, labels, sampling, Noise(order, z), seed=seed, trace=True)
    Q = quality(to_images(tokens, model.settings), labels)
    return Rollouts(tokens, trace, labels, Q, trace.temperature)


class Window(PolicyGradient):
    """Optimises one step at a time, from the first to the last, as MixGRPO's window moves
    (2507.21802)."""

    def update(self, step, labels, seed) -> dict[str, float]:
        self.now = step * self.model.settings.steps // self.iters
        return super().update(step, labels, seed)

    def noise_update(self, rollouts, A, counted) -> dict[str, float]:
        return super().noise_update(rollouts, A, rollouts.trace.masks()[1][:, self.now])


class Credit(Reinforcements):
    title = "Exploring only where one optimises"
    question = (
        "Four iterations, where the student leaves something to gain; one step is optimised, or "
        "all; quality alone is the reward. *Explored there*: the rollouts of a group share z "
        "everywhere but at the optimised tokens. *Window*: the step moves from the first to the "
        "last. *KL of the image*: the mean over all tokens of an image, which unlike the KL of the "
        "counted tokens compares between rows."
    )
    seeds = "0,1,2"
    settings = {
        "steps": 4,
        "critical_steps": 1,
        "learn_steps": False,
        "alpha": 0.0,
        "temperature": 1.0,  # as the start
        "rl_iters": 40,
    }
    arms = {  # {row name: (method, rl_steps)}
        "critical": (PolicyGradient, "critical"),
        "critical, explored there": (Branching, "critical"),
        "first": (PolicyGradient, "first"),
        "first, explored there": (Branching, "first"),
        "window": (Window, "all"),
        "all": (PolicyGradient, "all"),
    }
    columns = (
        *("quality", "gained", "held_out", "frechet", "drift", "precision", "recall", "image_kl"),
        "seconds",
    )
    verdict = (
        "With exploration at the critical step alone the quality differs from that with "
        "exploration everywhere by {0[critical, explored there - critical][quality]}, from that "
        "on the first step, explored there, by "
        "{0[critical, explored there - first, explored there][quality]}, and on all by "
        "{0[critical, explored there - all][quality]}; the distance by "
        "{0[critical, explored there - critical][frechet]}, "
        "{0[critical, explored there - first, explored there][frechet]} and "
        "{0[critical, explored there - all][frechet]}.",
    )
    picture = ("credit.png", "the course of RL in four iterations, by what is optimised")

    def rows(self, lab) -> dict:
        rows = {"start": partial(lab.judged, "student", steps=self.settings["steps"])}
        for name, (method, rl_steps) in self.arms.items():
            rows[name] = partial(self.arm, lab, name, method, rl_steps)
        return rows

    def arm(self, lab, name, method, rl_steps) -> dict:
        start = lab.judged("student", steps=self.settings["steps"])
        name, overrides = f"credit, {name}", self.settings | {"rl_steps": rl_steps}
        with mock.patch.dict(train_rl.METHODS, grpo=method):
            figures = lab.reinforcement(name, **overrides)
            measured = lab.result(f"KL, {name}", partial(self.image_kl, lab, name, overrides))
        return figures | {
            "gained": figures["quality"] - start["quality"],
            "drift": figures["frechet"] / start["frechet"],
            "image_kl": measured["image_kl"],
        }

    @staticmethod
    @torch.no_grad()
    def image_kl(lab, name, overrides) -> dict:
        """Mean over all tokens of the KL of their noise policy from the student's N(0, 1)."""
        policy = lab.reinforced(lab.run(f"RL/{name}", **overrides)).model
        _, trace = generate(policy, lab.evenly(450), seed="kl", trace=True)
        mu = policy.noise_policy(trace.contexts)
        return {"image_kl": float(mu.square().mean() / 2)}
