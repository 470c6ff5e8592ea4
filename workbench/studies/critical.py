"""Which steps should RL optimise?"""

from functools import partial
from unittest import mock

import torch

import train_rl
from maskrl import PolicyGradient, rng, rollout, select_steps
from workbench.studies.lab import Lab
from workbench.studies.study import Reinforcements


class Critical(Reinforcements):
    title = "RL on which steps? (MaskFocus)"
    question = (
        "64 tokens (`--patch 2`), the action z, and quality alone as the reward. In 6 iterations "
        "the student leaves the reward something to gain; in 16 and 32 its images are nearly as "
        "good as real ones. Two of the 6 steps are optimised, a quarter of the 16 or 32, or all. "
        "*Equal numbers*: as many tokens as the critical steps reveal, but random ones. *gained*: "
        "quality, over the student in as many iterations. *tokens*: how many of an image's tokens "
        "count in an update."
    )
    seeds = "0,1,2"
    lab_settings = {"patch": 2, "teacher_iters": 2000}
    how = ("critical", "random", "first", "all")
    settings = {
        "steps": 6,
        "critical_steps": 2,
        "learn_steps": False,
        "alpha": 0.0,
        "temperature": 1.0,  # as the start
        "rl_iters": 40,
    }
    more_steps = ({"steps": 16, "critical_steps": 4}, {"steps": 32, "critical_steps": 8})
    columns = (
        *("quality", "gained", "held_out", "frechet", "drift", "precision", "recall", "kl"),
        *("tokens", "frac_not_prefix", "seconds"),
    )
    verdict = (
        "In 6 iterations critical steps gain more than random ones on "
        "{0[critical > random][gained]} seeds, than as many tokens of any step on "
        "{0[critical > equal numbers][gained]}, than all on {0[critical > all][gained]}, and than "
        "the first, which need no look at the finished image, on {0[critical > first][gained]}.",
        "In half of the updates they gain more than all steps on "
        "{0[critical, halfway > all][gained]} seeds.",
        "It is not free: the distance becomes {0[critical][drift]} times the student's, on all "
        "steps {0[all][drift]} times. In 16 and 32 iterations there is little to gain.",
    )
    picture = ("critical.png", "the course of RL in 6 iterations")

    def measure(self, lab, only=()) -> dict:
        small_tokens = Lab(lab.out.parent / "patch2", lab.seed, lab.device, **self.lab_settings)
        return super().measure(small_tokens, only)

    def rows(self, lab) -> dict:
        rows = self.arms(lab, {})
        for overrides in self.more_steps:
            rows |= self.arms(lab, overrides, f", K = {overrides['steps']}")
        return rows

    def arms(self, lab, overrides, suffix="") -> dict:
        settings = self.settings | {"rl_steps": "critical"} | overrides
        arms = {how: {"rl_steps": how} for how in self.how}
        arms |= {"equal numbers": {}, "critical, halfway": {"rl_iters": settings["rl_iters"] // 2}}
        rows = {f"start{suffix}": partial(lab.judged, "student", steps=settings["steps"])}
        for name, own in arms.items():
            method = EqualNumbers if name == "equal numbers" else PolicyGradient
            rows[name + suffix] = partial(self.arm, lab, name + suffix, settings | own, method)
        return rows

    def arm(self, lab, name, overrides, method) -> dict:
        counted = lab.result(f"tokens, {name}", partial(self.tokens, lab, overrides))
        start = lab.judged("student", steps=overrides["steps"])
        with mock.patch.dict(train_rl.METHODS, grpo=method):
            figures = lab.reinforcement(name, **overrides)
        return figures | {
            "gained": figures["quality"] - start["quality"],
            "drift": figures["frechet"] / start["frechet"],
            "tokens": counted["tokens"],
        }

    @staticmethod
    def tokens(lab, overrides) -> dict:
        """Tokens per image that count in the first update."""
        training, labels = lab.rl_training(**overrides)
        settings, generator = training.model.settings, rng(lab.seed, "tokens", device=lab.device)
        rollouts = rollout(training.model, lab.quality, labels, "tokens")
        trace, mean_image = rollouts.trace, training.mean_image
        steps = select_steps(trace, rollouts.tokens, settings, mean_image, generator)
        return {"tokens": float((trace.counts * steps).sum(1).float().mean())}

    def draw(self, rows, path) -> None:
        arms = (*self.how, "equal numbers")
        super().draw({name: rows[name] for name in arms if name in rows}, path)


class EqualNumbers(PolicyGradient):
    """The control of critical steps: as many tokens of every rollout, but of any step."""

    def noise_update(self, rollouts, A, counted) -> dict[str, float]:
        count = counted.sum(1, keepdim=True)
        generator = rng("equal", int(count.sum()), device=count.device)
        rank = torch.rand(counted.shape, generator=generator, device=count.device).argsort(1)
        return super().noise_update(rollouts, A, rank < count)
