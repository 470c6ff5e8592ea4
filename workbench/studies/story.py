"""The whole of it: teacher, student and policy, and the README's table."""

from functools import partial

import torch

from maskrl import Sampling
from workbench.pictures import samples_picture
from workbench.report import generate_many
from workbench.studies import records
from workbench.studies.study import Generators

FIXED = (16, 8, 6, 4)  # K of the schedules that a learned one must beat


class Story(Generators):
    title = "The whole of it: `make demo`"
    question = (
        "Teacher, one-step student and policy as the scripts make them at the demo's settings, and "
        "both generators under fixed schedules of K iterations, which the learned one must beat. "
        "Seed 0 is `make demo`."
    )
    seeds = "0,1,2"
    columns = (
        *("frechet", "precision", "recall", "diversity", "nearest", "quality", "held_out"),
        *("reward", "steps", "image_ms"),
    )
    arms = {
        "untrained": ("untrained", {}),
        "teacher": ("teacher", {}),
        "one-step start": ("teacher", {"denoise_steps": 1}),
        "student": ("student", {}),
        "policy": ("policy", {}),
        **{f"student, K = {K}": ("student", {"steps": K}) for K in FIXED},
        "student, K = 8, as cool": ("student", {"steps": 8, "temperature": (1.0, 0.4)}),
        **{f"policy's generator, K = {K}": ("policy", {"steps": K}) for K in FIXED},
    }
    verdict = (
        "One step in place of a chain of 100 makes an image {0[teacher / student][image_ms]} times "
        "as fast. The student's distance is below the teacher's on "
        "{0[student < teacher][frechet]} seeds, its precision and its held-out reward are on "
        "{0[student < teacher][precision]} and {0[student < teacher][held_out]}.",
        "The learned schedule's reward is above that of the same generator in 8, 6 and 4 fixed "
        "iterations on {0[policy > policy's generator, K = 8][reward]}, "
        "{0[policy > policy's generator, K = 6][reward]} and "
        "{0[policy > policy's generator, K = 4][reward]} seeds.",
        "In 8 fixed iterations that generator has a higher quality than the student in 16 on "
        "{0[policy's generator, K = 8 > student][quality]} seeds.",
    )
    picture = ("samples.png", "the same classes and noise in the same places, seed 0")
    shown = ("teacher", "one-step start", "student", "policy")

    def rows(self, lab) -> dict:
        return {"real": partial(lab.result, "real", lab.real), **super().rows(lab)}

    def measure(self, lab, only=()) -> dict:
        rows = super().measure(lab, only)
        for kind in ("teacher", "student", "policy"):
            if kind in rows:
                rows[kind]["train_minutes"] = lab.train_minutes(kind)
        if lab.seed == 0 and not only:
            self.draw_samples(lab, rows)
        return rows

    def draw_samples(self, lab, rows) -> None:
        """samples.png of the scripts, of two images per class."""
        labels = torch.arange(len(lab.data.classes), device=lab.device).repeat(2)
        pairs = [(lab.judge.labels == y).nonzero().flatten()[:2] for y in labels.unique()]
        images = {"real": lab.judge.real_images[torch.stack(pairs, 1).flatten().cpu()]}
        captions = {"real": {}}
        for name in self.shown:
            kind, sampling = self.arms[name]
            model, sampling = getattr(lab, kind), Sampling(**sampling)
            images[name], _ = generate_many(model, labels, sampling, lab.seed, name)
            captions[name] = {
                "steps": rows[name]["steps"],
                "denoise_steps": sampling.resolve(model).denoise_steps,
                "seconds_per_image": rows[name]["image_ms"] / 1000,
            }
        samples_picture(records.ASSETS / "samples.png", images, captions, labels)


class Distil(Generators):
    title = "Student against teacher"
    question = "The story's teacher and student once more, the student also in random orders."
    seeds = "0,1,2"
    columns = ("frechet", "precision", "recall", "quality", "held_out", "steps")
    arms = {
        "teacher": ("teacher", {}),
        "student": ("student", {}),
        "student, random order": ("student", {"order": "random"}),
    }
    verdict = (
        "At one token an iteration the order hardly matters: the distance is "
        "{0[student][frechet]} in Halton's and {0[student, random order][frechet]} in random ones.",
    )
