"""GSIM against what it could be replaced by."""

from functools import partial

import torch
from torch import Tensor

from maskrl import (
    Diffusion,
    Distillation,
    class_and_null_context,
    gsim_terms,
    guidance_scale,
    guided,
    hidden_counts,
    one_step,
    optimizer_step,
    random_mask,
    rng,
    rngs,
    to_tokens,
    update_ema,
    x_0_limits,
)
from workbench.studies.study import Study


def L1_alone(*args, **kwargs) -> Tensor:
    L1, _ = gsim_terms(*args, **kwargs)
    return L1


class Regression(Distillation):
    """What GSIM replaces: |g(z, c) - x_0|^2, with x_0 from the teacher's chain begun at z."""

    def update(self, step, x, labels, seed) -> dict[str, float]:
        teacher, student, settings = self.teacher, self.model, self.model.settings
        host, generator = rngs(seed, "regression", step, device=x.device)
        hidden = hidden_counts(len(x), student.length, host)
        mask = random_mask(hidden, student.length, generator)
        n = int(hidden.sum())
        z = torch.randn(n, student.channels, generator=generator, device=x.device)
        with torch.no_grad():
            both = class_and_null_context(teacher, x, mask, labels)
            hidden = mask.sum(1, keepdim=True).expand_as(mask)[mask]
            s = guidance_scale(settings.guidance, hidden - 1, student.length)
            head = guided(teacher.head, both[0][mask], both[1][mask], s[:, None])
            x_0 = Diffusion(25).sample(head, z, generator, limits=x_0_limits(settings))
        c = student.context(x, mask, labels)[mask]
        loss = (one_step(student.head, z, c, settings.noise_ratio) - x_0).square().mean()
        loss, norm = optimizer_step([loss], self.optimizers["student"])
        self.rates["student_rate"].step()
        update_ema(self.ema, student, step, settings.student_ema)
        return {"loss": loss, "grad_norm": norm}


class Gsim(Study):
    title = "GSIM: are both terms of the loss needed?"
    question = (
        "The loss without L2, which is SiD with alpha = 1, and regression on the ends of the "
        "teacher's chain of 25 steps. Every arm starts from the same teacher and is judged at its "
        "last weights. Measured with an earlier judge and reward network, which knew fewer kinds "
        "of damage: compare within this table only."
    )
    seeds = "0,1,2"
    settings = {"gsim_iters": 400}
    columns = ("frechet", "precision", "recall", "diversity", "held_out")
    arms = {  # {row name: (teacher, settings) -> training}
        "L1 + L2": Distillation,
        "L1 alone": partial(Distillation, loss=L1_alone),
        "regression": Regression,
    }
    verdict = (
        "Both terms are closer than L1 alone on {0[L1 + L2 < L1 alone][frechet]} seeds, and than "
        "regression, whose images are much alike, on {0[L1 + L2 < regression][frechet]}.",
    )

    def rows(self, lab) -> dict:
        rows = {"teacher": partial(lab.judged, "teacher")}
        for name in self.arms:
            rows[name] = partial(lab.result, f"GSIM, {name}", partial(self.distil, lab, name))
        return rows

    def distil(self, lab, name) -> dict:
        """The row of a student at its last weights."""
        run = lab.run(f"GSIM/{name}", **self.settings)
        settings = run.settings
        training = self.arms[name](lab.teacher, settings)
        with run.stage(training) as stage:
            for step in stage:
                generator = rng(settings.seed, "gsim", step)
                images, labels = run.data.learned.batch(settings.batch, generator, run.device)
                x = to_tokens(images, settings)
                stage.log(training.update(step, x, labels, settings.seed))
        return lab.judge_model(training.model)
