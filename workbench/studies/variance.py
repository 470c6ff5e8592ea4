"""Where the reward's variance comes from, and whether information gain finds it."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from maskrl import (
    Noise,
    Sampling,
    critical_steps,
    draw_noise,
    generate,
    information_gain,
    rng,
    to_images,
    to_tokens,
)
from workbench.pictures import save_figure
from workbench.studies.study import Study, plot_range, subplots


class Variance(Study):
    title = "Where the reward's variance comes from"
    question = (
        "One step's actions are drawn again, everything else is kept: how much does the reward "
        "vary? The action is the noise z of a token, or noise around it, x ~ N(g(z, c), 0.1²). "
        "`correlation`: Spearman's, of that variance with MaskFocus' information gain, within a "
        "trajectory; the shares are those of the variance in a quarter of the steps: the critical, "
        "the first, random ones, and the best there are."
    )
    seeds = "0,1,2"
    columns = (
        *("total", "correlation", "critical", "first", "random", "best", "held_out_critical"),
        "tokens",
    )
    trajectories, draws = 96, 12
    steps = (8, 16)
    verdict = (
        "With z the information gain tells which steps matter: the critical quarter of 16 steps "
        "holds {0[z, K = 16][critical]} of the variance, the first {0[z, K = 16][first]}, random "
        "ones {0[z, K = 16][random]}. With x the critical ones hold {0[x, K = 16][critical]}; of "
        "the held-out reward's, {0[x, K = 16][held_out_critical]}.",
    )
    picture = ("variance.png", "the reward's variance due to each step, and information gain")

    def rows(self, lab) -> dict:
        rows = {}
        for action in ("z", "x"):
            for K in self.steps:
                name = f"{action}, K = {K}"
                measure = partial(self.arm, lab, action, K)
                rows[name] = partial(lab.result, f"variance, {name}", measure)
        return rows

    def arm(self, lab, action, K) -> dict:
        model, settings, n = lab.student, lab.settings, self.trajectories
        generator = rng(lab.seed, "variance", device=lab.device)
        labels = torch.arange(n, device=lab.device) % len(lab.data.classes)
        noise = draw_noise(model, n, generator, settings.order)
        image, trace = generate(
            model, labels, Sampling(K), noise, trace="predictions", seed=lab.seed
        )
        mean = to_tokens(lab.data.train.spaced().mean(0, keepdim=True), settings)
        gain = information_gain(trace.predictions, image, mean=mean.to(lab.device))
        _, reveals = trace.masks()
        every = reveals.any(1, keepdim=True)
        variances = []
        for redrawn in torch.cat([reveals, every], 1).unbind(1):  # each step's actions, and all
            rewards = self.rewards(lab, labels, noise, redrawn, action, K, generator)
            variances.append(rewards.var(2))
        trained, held_out = torch.stack(variances, -1)[..., :-1]
        critical = critical_steps(gain, K // 4)
        figures = {"total": float(variances[-1][0].mean())} | shares(gain, trained)
        figures |= {f"held_out_{name}": value for name, value in shares(gain, held_out).items()}
        figures["tokens"] = float((trace.counts * critical).sum(1).float().mean())
        figures["per_step"] = trained.mean(0).tolist()
        figures["gain"] = gain.mean(0).tolist()
        return figures

    @torch.no_grad()
    def rewards(self, lab, labels, noise, redrawn, action, K, generator) -> Tensor:
        """Trained and held-out rewards [2, n, draws] of generations whose tokens `redrawn` [n, L]
        have other actions in each draw."""
        rows = torch.arange(len(labels), device=labels.device).repeat_interleave(self.draws)
        order, z, redrawn = noise.order[rows], noise.z[rows], redrawn[rows, :, None]
        varied = Noise(order, z, lab.settings.explore * redrawn)
        if action == "z":
            other = torch.randn(z.shape, generator=generator, device=z.device)
            varied = Noise(order, torch.where(redrawn, other, z))
        tokens = generate(lab.student, labels[rows], Sampling(K), varied, seed=lab.seed)
        images = to_images(tokens, lab.settings)
        both = [reward(images, labels[rows]) for reward in (lab.quality, lab.held_out)]
        return torch.stack(both).view(2, len(labels), self.draws)

    def draw(self, rows, path) -> None:
        figure, axes = subplots(rows)
        if not figure:
            return
        for axis, runs in zip(axes, rows.values()):
            for key, label in (("per_step", "variance"), ("gain", "information gain")):
                curves = torch.tensor([run[key] for run in runs.values()])
                curves = curves / curves.sum(1, keepdim=True)
                plot_range(axis, range(1, curves.shape[1] + 1), curves.tolist(), label)
            axis.set(xlabel="step", ylabel="share of the sum")
        axes[0].legend(fontsize=7)
        save_figure(path, figure)


def shares(gain: Tensor, variance: Tensor) -> dict:
    """How well the gain [n, K] of steps tells the variance of the reward [n, K] due to them."""
    k = gain.shape[1] // 4
    ranks = [x.argsort(1).argsort(1) - (x.shape[1] - 1) / 2 for x in (gain, variance)]
    selected = {
        "critical": critical_steps(gain, k),
        "first": torch.arange(gain.shape[1], device=gain.device).expand_as(gain) < k,
        "random": torch.full_like(gain, k / gain.shape[1]),
        "best": critical_steps(variance, k),
    }
    held = {name: float((variance * w).sum() / variance.sum()) for name, w in selected.items()}
    return {"correlation": float(F.cosine_similarity(*ranks, dim=1).mean()), **held}
