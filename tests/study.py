"""The measurements behind assets/results.md and the README's table.

    python tests/study.py story gsim --seeds 0,1     # measure, into assets/results/NAME.json
    python tests/study.py gsim --only "L1 alone"     # just the rows that begin so
    python tests/study.py                            # results.md, README.md's table and links

Models, logs and one small JSON per row lie in --out/seed<n>; what is there is not done again. So an
interrupted study goes on, and seeds can run beside each other in two shells. Models and data are
those of `make demo`, whose seed is 0, and every row is judged as the report of the scripts is.
"""

import argparse
import ast
import fcntl
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from unittest import mock

import numpy
import torch
import torchvision

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import maskrl  # noqa: E402
import train_rl  # noqa: E402
from maskrl import Sampling  # noqa: E402

ASSETS = ROOT / "assets"
FOLDERS = Path("runs/folders")  # what tests/folders.py makes
README = ROOT / "README.md"


# What the studies share ---------------------------------------------------------------------------


class Lab:
    """One seed's data, networks and models, each made when first asked for, as the scripts do it.

    The folder out/seed<n> is laid out as the --out of train_rl.py. data: the shapes, or a folder of
    images, whose settings are those of the preset `folder`."""

    def __init__(self, out, seed: int, device, data="shapes", **overrides):
        self.out, self.seed, self.device = Path(out) / f"seed{seed}", seed, device
        preset = "tiny" if data == "shapes" else "folder"
        settings = replace(maskrl.preset(preset, seed=seed), **overrides)
        self.data = maskrl.load_data(settings, str(data))
        self.settings = self.data.measure(settings)
        self.check_settings()

    def check_settings(self):
        """InputError where the folder holds what other settings made."""
        path, settings = self.out / "settings.json", asdict(self.settings)
        if path.exists() and json.loads(path.read_text()) != settings:
            raise maskrl.InputError(f"{self.out} was measured with other settings: another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))

    @cached_property
    def critic(self):
        return maskrl.train_critic("reward", self.data.train, self.settings, self.device)

    @cached_property
    def quality(self):
        maskrl.calibrate(self.critic, self.student, self.data)
        return maskrl.make_reward("embedded", self.settings, self.data, self.device, self.critic)

    @cached_property
    def held_out(self):
        """The reward that nothing is trained on; None for a folder, which has no exact one."""
        if self.data.name != "shapes":
            return None
        return maskrl.ShapeFit(self.settings.image_size, self.device)

    @cached_property
    def judge(self):
        return maskrl.Judge(self.data, self.settings, self.device)

    @cached_property
    def untrained(self):
        torch.manual_seed(self.seed + 1)
        return maskrl.MAR(self.settings, self.data.classes, "student").to(self.device)

    @cached_property
    def teacher(self):
        if not finished(self.out / "teacher.pt"):
            maskrl.train_teacher(self.settings, self.data, self.out, self.device, resume=True)
        return maskrl.load_checkpoint(self.out / "teacher.pt", "teacher", self.device)

    @cached_property
    def student(self):
        return self.distilled(maskrl.Distillation, self.out)

    @cached_property
    def policy(self):
        return self.reinforced(self.settings, self.out).model

    def distilled(self, method, out, **overrides):
        """The student in out/student.pt, the best by `progress`; method(teacher, settings)."""
        if not finished(out / "student.pt"):
            settings = replace(self.settings, **overrides)
            training = method(self.teacher, settings)
            progress = maskrl.Progress(self.critic, self.data, settings, self.device)
            maskrl.train_student(training, self.data, out, True, progress)
        return maskrl.load_checkpoint(out / "student.pt", "student", self.device)

    def reinforced(self, settings, out) -> maskrl.PolicyGradient:
        """RL on the student, in out/policy.pt."""
        watch = maskrl.Watch(settings, self.quality, self.held_out, self.judge)
        student = self.student_with(settings)
        return maskrl.train_policy(student, settings, self.quality, self.data, out, True, watch)

    def student_with(self, settings):
        student = deepcopy(self.student)
        student.settings = settings
        return student

    def train_minutes(self, stage: str) -> float:
        """Minutes that the updates of teacher, student or policy took."""
        seconds = [line["seconds"] for line in maskrl.read_log(self.out) if line["stage"] == stage]
        return seconds[-1] / 60

    # rows of tables

    def result(self, key: str, work) -> dict:
        """The figures called `key`: from their file, else from work()."""
        path = self.path(key)
        if not path.exists():
            start = time.perf_counter()
            figures = work() | {"minutes": (time.perf_counter() - start) / 60}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rounded(figures | provenance(self.device))))
        return json.loads(path.read_text())

    def path(self, key: str) -> Path:
        return self.out / "rows" / f"{key}.json"

    def judged(self, kind: str, **how) -> dict:
        """The row of the teacher, student, policy or untrained model; how: of Sampling."""
        key = ", ".join([kind, *(f"{name} {value}" for name, value in how.items())])
        if not self.path(key).exists():
            getattr(self, kind)  # trained here: its minutes are not those of the row
        return self.result(key, partial(self.judge_kind, kind, how))

    def judge_kind(self, kind, how):
        return self.judge_model(getattr(self, kind), Sampling(**how))

    def judge_model(self, model, sampling=None) -> dict:
        """All figures of the model, without exploration, as report and score have them."""
        sampling = sampling or Sampling()
        labels, seed = self.judge.labels, self.settings.seed
        images, steps = maskrl.generate_many(model, labels, sampling, seed, model.kind)
        quality = self.rewards(self.quality, images)
        figures = {
            **self.judge(images),
            "nearest": self.distance_to_training(images) / self.distance_to_training(),
            "quality": float(quality.mean()),
            "steps": float(steps.float().mean()),
            "steps_std": float(steps.float().std()),
        }
        if steps.max() <= model.settings.steps:  # beyond them there is no speed
            reward = maskrl.total_reward(quality, steps.cpu(), model.settings)
            figures["reward"] = float(reward.mean())
        if self.held_out:
            figures["held_out"] = float(self.rewards(self.held_out, images).mean())
        return figures

    def real(self) -> dict:
        """The row of real images."""
        images = self.judge.real_images
        return {
            **self.judge.real_row(),
            "nearest": 1.0,
            "quality": float(self.rewards(self.quality, images).mean()),
            "held_out": float(self.rewards(self.held_out, images).mean()),
        }

    @torch.no_grad()
    def rewards(self, reward, images):
        pairs = zip(images.split(500), self.judge.labels.split(500))
        return torch.cat([reward(x.to(self.device), labels).cpu() for x, labels in pairs])

    def distance_to_training(self, images=None) -> float:
        """Median distance to the nearest training image, of images [n, ...] or of real ones."""
        images = self.judge.real_images if images is None else images
        sample = images[:: max(1, len(images) // 500)]  # of every class, as in the report
        return float(maskrl.nearest(sample, self.data)[1].median())

    def evenly(self, n: int):
        """n of the judge's labels, every class in its share."""
        labels = self.judge.labels
        return labels[torch.linspace(0, len(labels) - 1, n).long()]

    def reinforcement(self, name: str, **overrides) -> dict:
        """The row of RL with some settings replaced; with none, it is the demo's own policy."""
        return self.result(f"RL, {name}", partial(self.reinforce, name, overrides))

    def reinforce(self, name, overrides):
        settings = replace(self.settings, **overrides)
        out = self.out if settings == self.settings else self.out / "RL" / name
        policy = self.reinforced(settings, out).model
        watch = maskrl.Watch(settings, self.quality, self.held_out, self.judge)
        before = {"step": -1, "seconds": 0.0} | watch(self.student_with(settings))
        return self.judge_model(policy) | rl_log(out, before)


@contextmanager
def seconds_of_the_cpu(device):
    """On one CPU thread maskrl's clock counts what this process has of the core, so that other work
    of the machine is not counted; elsewhere it counts all seconds."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        with mock.patch.object(maskrl, "clock", lambda device: time.process_time()):
            yield
    else:
        yield


def finished(path) -> bool:
    """Whether the checkpoint is there, and the last one of its training."""
    return path.exists() and not maskrl.read_checkpoint(path)["training"]


WATCHED = {  # by Watch, and the titles of their panels
    "quality_mean": "trained reward",
    "held_out": "held-out reward",
    "judge": "Fréchet distance, 512 images",
}


def rl_log(out, before: dict) -> dict:
    """What log.jsonl tells of RL: `curve`, what Watch saw, and figures of the updates."""
    lines = [line for line in maskrl.read_log(out) if line["stage"] == "policy"]
    watched = {line["step"]: line for line in [before, *lines] if "judge" in line}
    updates = {line["step"]: line for line in lines if "kl" in line}
    seen = [key for key in ("seconds", *WATCHED) if key in before]
    curve = {key: [line[key] for line in watched.values()] for key in seen}
    curve["updates"] = [step + 1 for step in watched]
    curve["kl_updates"] = [step + 1 for step in updates]
    curve["kl"] = [line["kl"] for line in updates.values()]
    figures = {"curve": curve, "kl": curve["kl"][-1]}
    for key in ("not_first", "clip_fraction"):
        values = [line[key] for line in updates.values() if key in line]
        figures |= {key: statistics.mean(values)} if values else {}
    figures["seconds_per_update"] = curve["seconds"][-1] / (1 + max(updates))
    return figures


def rounded(value):
    """The same JSON with six decimals."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 6) if isinstance(value, float) else value


def provenance(device) -> dict:
    return {
        "threads": torch.get_num_threads(),
        "hardware": hardware(device),
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def hardware(device) -> str:
    """The name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    names = re.findall(r"model name\s*: (.+)", text) or [platform.machine()]
    return f"{names[0]}, {torch.multiprocessing.cpu_count()} cores"


def commit() -> str:
    """The checkout's short hash, with a + where a Python file differs from it."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    head = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changed = git(["git", "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    return head + "+" * bool(changed)


class Study:
    """A table: rows to measure, columns to show, and sentences that quote them.

    verdict: each sentence is formatted with {0[row][figure]}; see Figures. A sentence that quotes
    rows which are not measured is left out."""

    title = question = ""
    seeds = "0"
    settings: dict = {}  # those of all rows that differ from preset tiny
    columns: tuple = ()
    verdict: tuple = ()
    picture = None  # a file in assets/, with its caption
    rows_key = "rows"  # what its JSON calls them

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def rows(self, lab: Lab) -> dict:
        """{row name: function that gives its figures}; not asked for by a `measure` of its own."""
        return {}

    def measure(self, lab: Lab, only=()) -> dict:
        """{row name: figures} of one seed; only: beginnings of row names."""
        rows = self.rows(lab).items()
        return {name: work() for name, work in rows if not only or name.startswith(only)}

    def draw(self, rows: dict, path):
        """The picture of {row name: {seed: figures}}."""


class Generators(Study):
    """A study of models that are there: arms {row name: (kind, how to sample)}, timed in turns."""

    arms: dict = {}

    def rows(self, lab):
        return {name: partial(lab.judged, kind, **how) for name, (kind, how) in self.arms.items()}

    def measure(self, lab, only=()):
        rows = super().measure(lab, only)
        timed = [name for name in rows if name in self.arms]
        key = f"ms, {self.name}, {len(timed)} arms"
        times = lab.result(key, partial(self.milliseconds, lab, timed))
        for name in timed:
            rows[name]["image_ms"] = times[name]
        return rows

    def milliseconds(self, lab, names):
        arms = {}
        for name in names:
            kind, how = self.arms[name]
            arms[name] = (getattr(lab, kind), Sampling(**how))
        times = maskrl.time_in_turns(arms, lab.evenly(32))
        return {name: 1000 * seconds for name, seconds in times.items()}


def subplots(path, titles, rows=1):
    """Titled panels, and a function that saves their figure; None without pyplot."""
    plt = maskrl.pyplot()
    if not plt:
        return None
    columns = len(titles) // rows
    size = (3.6 * columns, 3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    for axis, title in zip(axes.flat, titles):
        axis.set_title(title, fontsize=9)
    return axes.flat, partial(save_figure, plt, figure, axes, path)


def save_figure(plt, figure, axes, path):
    axes.flat[0].legend(fontsize=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_curves(axis, runs: list, x: str, y: str, label: str):
    """The mean of the seeds' curves, and their range."""
    across = list(zip(*(run["curve"][x] for run in runs)))
    up = list(zip(*(run["curve"][y] for run in runs)))
    at = [statistics.mean(values) for values in across]
    axis.plot(at, [statistics.mean(values) for values in up], ".-", linewidth=1, label=label)
    axis.fill_between(at, [min(v) for v in up], [max(v) for v in up], alpha=0.1)
    axis.set_xlabel(x.removeprefix("kl_"))


# The studies --------------------------------------------------------------------------------------

FIXED = (16, 8, 6, 4)  # K of the schedules that a learned one must beat


class Story(Generators):
    title = "The whole of it: `make demo`"
    question = (
        "Teacher, one-step student and policy, each made by the functions of the scripts at "
        "`make demo`'s settings (seed 0 is `make demo`); and both generators under fixed schedules "
        "of K iterations, which the learned one must beat."
    )
    seeds = "0,1,2"
    columns = (
        *("frechet", "accuracy", "precision", "recall", "diversity", "nearest", "quality"),
        *("reward", "held_out", "steps", "image_ms", "train_minutes"),
    )
    arms = {
        "untrained": ("untrained", {}),
        "teacher": ("teacher", {}),
        "one-step start": ("teacher", {"denoise_steps": 1}),
        "student": ("student", {}),
        "policy": ("policy", {}),
        **{f"student, K = {K}": ("student", {"steps": K}) for K in FIXED},
        **{f"policy's generator, K = {K}": ("policy", {"steps": K}) for K in FIXED},
    }
    verdict = (
        "The student takes one denoising step where the teacher takes its chain: its distance is "
        "{0[student][frechet]} against the teacher's {0[teacher][frechet]} and "
        "{0[one-step start][frechet]} before GSIM, in {0[student][image_ms]} instead of "
        "{0[teacher][image_ms]} ms per image, {0[teacher / student][image_ms]} times as fast.",
        "RL with a learned schedule takes {0[policy][steps]} iterations; its reward is "
        "{0[policy][reward]} against the student's {0[student][reward]}, its held-out reward "
        "{0[policy][held_out]} against {0[student][held_out]}, its distance {0[policy][frechet]}.",
        "With a fixed schedule the same generator has a reward of "
        "{0[policy's generator, K = 8][reward]} at K = 8, "
        "{0[policy's generator, K = 6][reward]} at K = 6 and "
        "{0[policy's generator, K = 4][reward]} at K = 4; the learned schedule's reward is above "
        "that of K = 8 on {0[policy > policy's generator, K = 8][reward]}, of K = 6 on "
        "{0[policy > policy's generator, K = 6][reward]}, of K = 4 on "
        "{0[policy > policy's generator, K = 4][reward]}.",
    )
    picture = ("samples.png", "the same classes and noise in the same places, seed 0")

    def rows(self, lab):
        return {"real": partial(lab.result, "real", lab.real), **super().rows(lab)}

    def measure(self, lab, only=()):
        rows = super().measure(lab, only)
        for kind in ("teacher", "student", "policy"):
            if kind in rows:
                rows[kind]["train_minutes"] = lab.train_minutes(kind)
        if lab.seed == 0 and not only:
            self.draw_samples(lab, rows)
        return rows

    def draw_samples(self, lab, rows):
        """samples.png and neighbours.png of the scripts, of two images per class."""
        labels = torch.arange(len(lab.data.classes), device=lab.device).repeat(2)
        pairs = [(lab.judge.labels == y).nonzero().flatten()[:2] for y in labels.unique()]
        images = {"real": lab.judge.real_images[torch.stack(pairs, 1).flatten().cpu()]}
        captions = {"real": {}}
        for name in ("teacher", "one-step start", "student", "policy"):
            kind, how = self.arms[name]
            model, sampling = getattr(lab, kind), Sampling(**how)
            images[name], _ = maskrl.generate_many(model, labels, sampling, lab.seed, name)
            captions[name] = {
                "steps": rows[name]["steps"],
                "denoise_steps": sampling.resolve(model).denoise_steps,
                "seconds_per_image": rows[name]["image_ms"] / 1000,
            }
        maskrl.samples_picture(ASSETS, images, captions, labels, lab.data)


README_ROWS = (
    *("real", "teacher", "one-step start", "student", "policy"),
    *(f"policy's generator, K = {K}" for K in (8, 6, 4)),
)
README_COLUMNS = ("frechet", "precision", "quality", "held_out", "reward", "steps", "image_ms")


def L1_alone(*args):
    L1, _ = maskrl.gsim_terms(*args)
    return L1


def L2_alone(*args):
    _, L2 = maskrl.gsim_terms(*args)
    return L2


def squared(y):
    """d(y) = |y|^2 [N] and d'(y) [N, D]."""
    return y.square().sum(-1), 2 * y


def weight_of_ones(t):
    """Leaves y_t and the residual in units of eps."""
    return torch.ones(len(t), 1, device=t.device)


def with_loss(loss):
    return partial(maskrl.Distillation, loss=loss)


class Regression(maskrl.Distillation):
    """The rival that GSIM replaces: |g(z, c) - x_0|^2, x_0 from the teacher's chain begun at z."""

    def update(self, step, x, labels, generator):
        teacher, student, settings = self.teacher, self.model, self.model.settings
        ratio = torch.rand(len(x), generator=generator)
        mask = maskrl.random_mask(ratio, student.length, generator).to(x.device)
        z = torch.randn(int(mask.sum()), student.channels, generator=generator).to(x.device)
        with torch.no_grad():
            c, c_null = maskrl.class_and_null_context(teacher, x, mask, labels)
            scale = maskrl.guidance_scale(settings.guidance, mask.sum(1) - 1, student.length)
            head = maskrl.chain_head(teacher.head, c, c_null, scale, mask.nonzero(as_tuple=True))
            noise = maskrl.rng(settings.seed, "regression", step, device=x.device)
            limits = maskrl.token_limits(settings)
            x_0 = maskrl.Diffusion(25).sample(head, z, noise, limits=limits)
        c = student.context(x, mask, labels)[mask]
        loss = (maskrl.one_step(student.head, z, c, settings.noise_ratio) - x_0).square().mean()
        loss, norm = maskrl.descend([loss], self.optimizers["student"])
        self.rates["student"].step()
        maskrl.update_ema(self.ema, student, step, settings.student_ema)
        return {"loss": loss, "grad_norm": norm}


class Gsim(Study):
    title = "GSIM and its rivals"
    question = (
        "Are both terms of the loss needed, and is it better than regression on the ends of the "
        "teacher's chain (25 steps)? Every arm starts from the same teacher and is judged at its "
        "last weights, none selected. Rows of one seed are a screening."
    )
    seeds = "0,1,2"
    settings = {"gsim_iters": 400}
    columns = ("frechet", "accuracy", "precision", "recall", "diversity", "held_out")
    arms = {  # name -> method, settings replaced
        "L1 + L2": (maskrl.Distillation, {}),
        "L1 alone": (with_loss(L1_alone), {}),
        "regression": (Regression, {}),
    }
    screening = {  # the same, seed 0 alone
        "L2 alone": (with_loss(L2_alone), {}),
        "squared distance": (with_loss(partial(maskrl.gsim_loss, distance=squared)), {}),
        "eps units": (with_loss(partial(maskrl.gsim_loss, weight=weight_of_ones)), {}),
        "noise ratio 2.5": (maskrl.Distillation, {"noise_ratio": 2.5}),
        "noise ratio 10": (maskrl.Distillation, {"noise_ratio": 10.0}),
        "no guidance, s = 1": (maskrl.Distillation, {"guidance": 1.0}),
    }
    verdict = (
        "The distance is {0[L1 + L2][frechet]} with both terms, {0[L1 alone][frechet]} with L1 "
        "alone and {0[regression][frechet]} by regression; the teacher's is "
        "{0[teacher][frechet]}.",
        "Both terms are closer than L1 alone on {0[L1 + L2 < L1 alone][frechet]}, and than "
        "regression on {0[L1 + L2 < regression][frechet]}.",
        "Screening: the distance is {0[L2 alone][frechet]} with L2 alone, "
        "{0[squared distance][frechet]} with d(y) = |y|², {0[eps units][frechet]} in units of eps.",
    )

    def rows(self, lab):
        arms = self.arms | (self.screening if lab.seed == 0 else {})
        rows = {"teacher": partial(lab.judged, "teacher")}
        for name, (method, overrides) in arms.items():
            work = partial(self.distil, lab, name, method, overrides)
            rows[name] = partial(lab.result, f"GSIM, {name}", work)
        return rows

    def distil(self, lab, name, method, overrides):
        """The row of a student at its last weights."""
        settings, out = replace(lab.settings, **self.settings | overrides), lab.out / "GSIM" / name
        maskrl.train_student(method(lab.teacher, settings), lab.data, out, resume=True)
        student = maskrl.load_checkpoint(out / "student.pt", "student", lab.device)
        student.load_state_dict(maskrl.read_checkpoint(out / "student.pt")["model"])
        return lab.judge_model(student)


class Longer(Study):
    title = "A student trained longer"
    question = "What do more updates of GSIM than the demo's bring?"
    settings = {"gsim_iters": 2000}
    columns = ("frechet", "accuracy", "precision", "recall", "diversity", "nearest", "held_out")
    verdict = (
        "The longer training comes to a distance of {0[trained longer][frechet]} and a recall of "
        "{0[trained longer][recall]}, the demo's to {0[student][frechet]} and "
        "{0[student][recall]}; the teacher has {0[teacher][frechet]} and {0[teacher][recall]}.",
    )

    def rows(self, lab):
        return {
            "teacher": partial(lab.judged, "teacher"),
            "student": partial(lab.judged, "student"),
            "trained longer": partial(lab.result, "longer", partial(self.distil, lab)),
        }

    def distil(self, lab):
        out = lab.out / "longer"
        return lab.judge_model(lab.distilled(maskrl.Distillation, out, **self.settings))


class Rivals(Generators):
    title = "The teacher with shorter chains"
    question = (
        "A shorter denoising chain needs no training at all. At equal time per image, is the "
        "student better? DiSA (2505.20297) anneals the chain from the first iteration to the last."
    )
    columns = ("frechet", "accuracy", "precision", "recall", "diversity", "image_ms")
    arms = {
        "teacher": ("teacher", {}),
        **{f"{n} steps": ("teacher", {"denoise_steps": n}) for n in (50, 25, 10, 5)},
        "50 annealed to 5": ("teacher", {"denoise_steps": (50, 5)}),
        "student": ("student", {}),
    }
    verdict = (
        "Ten steps come to {0[10 steps][frechet]} in {0[10 steps][image_ms]} ms, five to "
        "{0[5 steps][frechet]} in {0[5 steps][image_ms]} ms, 50 annealed to 5 to "
        "{0[50 annealed to 5][frechet]} in {0[50 annealed to 5][image_ms]} ms; the student to "
        "{0[student][frechet]} in {0[student][image_ms]} ms, the whole chain to "
        "{0[teacher][frechet]} in {0[teacher][image_ms]} ms.",
    )


class Distil(Generators):
    title = "Student against teacher, three seeds"
    question = "The story's teacher and student, judged once more on their own."
    seeds = "0,1,2"
    rows_key = "arms"
    columns = ("frechet", "precision", "recall", "quality", "held_out", "iterations")
    arms = {
        "teacher": ("teacher", {}),
        "student": ("student", {}),
        "student, random order": ("student", {"order": "random"}),
    }
    verdict = (
        "The student's distance is {0[student][frechet]}, the teacher's {0[teacher][frechet]}: "
        "lower on {0[student < teacher][frechet]}. In random orders, MAR's own, the student's is "
        "{0[student, random order][frechet]}: at one token an iteration the order does not matter.",
    )


class Variance(Study):
    title = "Where the reward's variance comes from"
    question = (
        "The action of a policy can be the noise z that a token starts from, or Gaussian noise "
        "around the token, x ~ N(g(z, c), 0.1^2). *Re-noised*: the noise that a student distilled "
        "for it adds to its token, sigma / alpha = 1, before it cleans it up. One step's actions "
        "are drawn anew, everything else is kept: how much does the reward vary within the draws, "
        "step by step? Beside it the information gain of MaskFocus, which is to tell the steps "
        "that matter: `correlation` is Spearman's, within a trajectory, and the shares are those "
        "of the variance, summed over the steps, which a quarter of them holds: the critical ones, "
        "the first, random ones, and the best there are."
    )
    seeds = "0,1,2"
    columns = (
        *("total", "correlation", "critical", "first", "random", "best", "tokens"),
        *("held_out_correlation", "held_out_critical", "held_out_first"),
    )
    trajectories, draws = 96, 12
    steps = (8, 16)
    verdict = (
        "With z the correlation is {0[z, K = 16][correlation]}, and a quarter of the steps, the "
        "critical ones, hold {0[z, K = 16][critical]} of the variance (the first "
        "{0[z, K = 16][first]}, random ones {0[z, K = 16][random]}, the best "
        "{0[z, K = 16][best]}); with x it is {0[x, K = 16][correlation]}, and they hold "
        "{0[x, K = 16][critical]} (the first {0[x, K = 16][first]}). K = 16.",
        "With the noise of re-noising it is {0[re-noised, K = 16][correlation]}, and they hold "
        "{0[re-noised, K = 16][critical]} (the first {0[re-noised, K = 16][first]}).",
        "All actions of z together vary the quality by {0[z, K = 8][total]} (variance), those of x "
        "by {0[x, K = 8][total]}, those of re-noising by {0[re-noised, K = 8][total]}. K = 8.",
    )
    picture = ("variance.png", "the reward's variance due to each step, and information gain")

    def rows(self, lab):
        return {
            f"{action}, K = {K}": partial(
                lab.result, f"variance, {action}, K = {K}", partial(self.arm, lab, action, K)
            )
            for action in (*maskrl.ACTIONS, "re-noised")
            for K in self.steps
        }

    def arm(self, lab, action, K):
        model, settings, n = lab.student, lab.settings, self.trajectories
        if action == "re-noised":
            model = renoising_student(lab)
        rewards_of = (lab.quality, lab.held_out)
        generator = maskrl.rng(lab.seed, "variance", device=lab.device)
        labels = torch.arange(n, device=lab.device) % len(lab.data.classes)
        noise = maskrl.draw_noise(model, n, generator, "random")
        eps = gaussian(lab.seed, "variance, eps", device=lab.device)(noise.z)
        noise = TwoNoises(noise.order, noise.z, eps=eps)
        with noise.renoising(action, masks_of(noise, K, settings)[0]):
            start, trace = maskrl.generate(
                model, labels, Sampling(K), noise, trace="predictions", seed=lab.seed
            )
        mean = maskrl.mean_image(lab.data, settings).to(lab.device)
        gain = maskrl.information_gain(trace.predictions, start, mean=mean)
        reveals = trace.masks()[1]
        every = reveals.any(1, keepdim=True)
        variances = []
        for anew in torch.cat([reveals, every], 1).unbind(1):  # each step's actions, and all
            rewards = self.rewards(rewards_of, model, labels, noise, anew, action, K, generator)
            variances.append(rewards.var(2))
        trained, held_out = torch.stack(variances, -1)[..., :-1]
        total = variances[-1][0].mean()
        figures = {"total": float(total)}
        figures |= shares(gain, trained)
        figures |= {f"held_out_{name}": value for name, value in shares(gain, held_out).items()}
        critical = maskrl.critical_steps(gain, K // 4)
        figures["tokens"] = float((trace.counts * critical).sum(1).float().mean())
        figures["per_step"] = trained.mean(0).tolist()
        figures["gain"] = gain.mean(0).tolist()
        return figures

    @torch.no_grad()
    def rewards(self, rewards_of, model, labels, noise, anew, action, K, generator):
        """Trained and held-out rewards [2, n, draws] of generations whose tokens `anew` [n, L] have
        other actions in each draw."""
        settings = model.settings
        rows = torch.arange(len(labels), device=labels.device).repeat_interleave(self.draws)
        order, z, anew = noise.order[rows], noise.z[rows], anew[rows, :, None]
        fresh = torch.randn(z.shape, generator=generator, device=z.device)
        varied = TwoNoises(order, z, eps=noise.eps[rows])
        if action == "z":
            varied.z = torch.where(anew, fresh, z)
        elif action == "x":
            varied.sigma = settings.explore * anew
        else:
            varied.eps = torch.where(anew, fresh, varied.eps)
        with varied.renoising(action, masks_of(varied, K, settings)[1]):
            tokens = maskrl.generate(model, labels[rows], Sampling(K), varied, seed=settings.seed)
        images = maskrl.to_images(tokens, settings)
        both = [reward(images, labels[rows]) for reward in rewards_of]
        return torch.stack(both).view(2, len(labels), self.draws).cpu()

    def draw(self, rows, path):
        drawing = subplots(path, tuple(rows), max(1, len(rows) // len(self.steps)))
        if not drawing:
            return
        axes, save = drawing
        for axis, runs in zip(axes, rows.values()):
            for key, label in (("per_step", "variance"), ("gain", "information gain")):
                curves = torch.tensor([run[key] for run in runs.values()])
                curves = curves / curves.sum(1, keepdim=True)
                at = range(1, curves.shape[1] + 1)
                axis.plot(at, curves.mean(0), ".-", linewidth=1, label=label)
                axis.fill_between(at, curves.amin(0), curves.amax(0), alpha=0.15)
            axis.set_xlabel("step")
            axis.set_ylabel("share of the sum")
            axis.xaxis.get_major_locator().set_params(integer=True)
        save()


@dataclass
class TwoNoises(maskrl.Noise):
    """What a generation starts from, and the noise eps [B, L, D] of re-noising."""

    eps: torch.Tensor | None = None

    def renoising(self, action, places):
        """Where that is the action: eps of the places [B, K, L] that each iteration computes."""
        if action != "re-noised":
            return nullcontext()
        iterations = iter(places.unbind(1))

        def eps(z):
            return self.eps[next(iterations)]

        return cleaned_up(1.0, eps)


def masks_of(noise, K, settings):
    """The mask before each of K iterations, and what it reveals, [B, K, L] each."""
    counts = torch.tensor(Sampling(K).counts(settings.length, settings), device=noise.z.device)
    counts = counts.expand(len(noise.z), -1)
    return maskrl.Trace(noise.order, noise.z, None, None, counts, None, None, None).masks()


def shares(gain, variance) -> dict:
    """How well the gain [n, K] of a step tells the reward's variance [n, K] due to it."""
    k = gain.shape[1] // 4
    ranks = [(x.argsort(1).argsort(1).float() - (x.shape[1] - 1) / 2) for x in (gain, variance)]
    correlation = torch.nn.functional.cosine_similarity(*ranks, dim=1)
    chosen = {
        "critical": maskrl.critical_steps(gain, k),
        "first": torch.arange(gain.shape[1]).expand_as(gain) < k,
        "random": torch.full_like(gain, k / gain.shape[1]),
        "best": maskrl.critical_steps(variance, k),
    }
    held = {name: float((variance * mask).sum() / variance.sum()) for name, mask in chosen.items()}
    return {"correlation": float(correlation.mean()), **held}


class Reinforcements(Study):
    """A study of RL runs, whose course it draws."""

    rows_key = "arms"

    def draw(self, rows, path):
        trained = {
            name: list(runs.values())
            for name, runs in rows.items()
            if all("curve" in run for run in runs.values())
        }
        every_run = [run for runs in trained.values() for run in runs]
        watched = [key for key in WATCHED if all(key in run["curve"] for run in every_run)]
        drawing = subplots(path, [WATCHED[key] for key in watched])
        if not drawing:
            return
        axes, save = drawing
        for axis, key in zip(axes, watched):
            for name, runs in trained.items():
                plot_curves(axis, runs, "updates", key, name)
        save()


class Action(Reinforcements):
    title = "Which action? (RL at a fixed number of steps)"
    question = (
        "Quality alone is the reward, K = 8, all steps are optimised, and every arm has as many "
        "rollouts: the action z or x, by the policy gradient or by the reward's own gradient "
        "(MARVAL-RL), or *in turn*: an update of z, which decides what is drawn, then one of x, "
        "which finishes it; graph: what autograd keeps for an update. *Re-noised*: the student's "
        "token is noised to a sigma / alpha and cleaned by the same head. *Distilled*: after 400 "
        "more updates of GSIM whose samples are those cleaned tokens; *one step*: the same weights "
        "without noise and clean-up; *RL*: then the noised token is the action, which the "
        "clean-up follows, in as many updates as the others."
    )
    seeds = "0,1,2"
    settings = {"steps": 8, "rl_steps": "all", "learn_steps": False, "alpha": 0.0, "rl_iters": 40}
    columns = (
        *("quality", "held_out", "frechet", "precision", "recall", "kl", "graph_mb", "seconds"),
    )
    arms = {
        "z": {},
        "x": {"action": "x"},
        "in turn": {},
        "backprop, z": {"method": "backprop"},
        "backprop, x": {"method": "backprop", "action": "x"},
    }
    ratios = (0.5, 1.0, 2.0, 5.0)
    verdict = (
        "The noise policy brings the quality from {0[start][quality]} to {0[z][quality]}, the "
        "held-out reward from {0[start][held_out]} to {0[z][held_out]} and the distance from "
        "{0[start][frechet]} to {0[z][frechet]}; noise around the token to {0[x][quality]}, "
        "{0[x][held_out]} and {0[x][frechet]}, in {0[x / z][seconds]} times the time.",
        "The held-out reward of z is above that of x on {0[z > x][held_out]}, its precision on "
        "{0[z > x][precision]}, its quality on {0[z > x][quality]}.",
        "By the reward's own gradient z comes to {0[backprop, z][quality]}, "
        "{0[backprop, z][held_out]} and {0[backprop, z][frechet]}, x to "
        "{0[backprop, x][quality]}, {0[backprop, x][held_out]} and {0[backprop, x][frechet]}; the "
        "graph takes {0[backprop, x][graph_mb]} MB, that of the policy gradient on x "
        "{0[x][graph_mb]}, on z {0[z][graph_mb]}.",
        "In turn they come to {0[in turn][quality]}, {0[in turn][held_out]} and "
        "{0[in turn][frechet]}: the quality is above that of x on {0[in turn > x][quality]}, the "
        "held-out reward on {0[in turn > x][held_out]}, and above that of z on "
        "{0[in turn > z][held_out]}.",
        "The student as it is cannot clean up: re-noised to 1, its distance is "
        "{0[re-noised, 1][frechet]}, to 5, where it starts, {0[re-noised, 5][frechet]}.",
        "Distilled for it, it can: {0[re-noised, 1, distilled][frechet]}, and "
        "{0[re-noised, 1, distilled, one step][frechet]} in one step of the same weights, at a "
        "quality of {0[re-noised, 1, distilled][quality]} and "
        "{0[re-noised, 1, distilled, one step][quality]}.",
        "RL with the noised token as the action brings it to a quality of "
        "{0[re-noised, 1, distilled, RL][quality]}, a held-out reward of "
        "{0[re-noised, 1, distilled, RL][held_out]} (before: "
        "{0[re-noised, 1, distilled][held_out]}) and a distance of "
        "{0[re-noised, 1, distilled, RL][frechet]}: its quality is above that of z on "
        "{0[re-noised, 1, distilled, RL > z][quality]}, of x on "
        "{0[re-noised, 1, distilled, RL > x][quality]}, its held-out reward on "
        "{0[re-noised, 1, distilled, RL > z][held_out]} and "
        "{0[re-noised, 1, distilled, RL > x][held_out]}, its distance on "
        "{0[re-noised, 1, distilled, RL < z][frechet]} and "
        "{0[re-noised, 1, distilled, RL < x][frechet]} below.",
    )
    picture = ("action.png", "the course of RL")

    def rows(self, lab):
        K = self.settings["steps"]
        rows = {"start": partial(lab.judged, "student", steps=K)}
        for name, overrides in self.arms.items():
            rows[name] = partial(self.arm, lab, name, self.settings | overrides)
        for ratio in self.ratios:
            name = f"re-noised, {ratio:g}"
            rows[name] = partial(lab.result, name, partial(self.as_it_is, lab, ratio, K))
        works = {"": self.distilled, ", one step": self.one_step, ", RL": self.reinforced}
        for suffix, work in works.items():
            name = f"re-noised, 1, distilled{suffix}"
            rows[name] = partial(lab.result, name, partial(work, lab, K))
        return rows

    def arm(self, lab, name, overrides):
        if name == "in turn":
            with mock.patch.object(maskrl, "PolicyGradient", InTurn):
                return lab.reinforcement(f"action {name}", **overrides)
        graph = lab.result(f"graph, {name}", partial(self.graph, lab, overrides))
        return lab.reinforcement(f"action {name}", **overrides) | {"graph_mb": graph["graph_mb"]}

    @staticmethod
    def graph(lab, overrides):
        """MB that autograd keeps for one update, weights included."""
        training, labels = rl_training(lab, overrides)
        sizes = {}

        def count(x):
            storage = x.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return x

        def unchanged(x):
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, unchanged):
            training.update(labels, 0)
        return {"graph_mb": sum(sizes.values()) / 2**20}

    @staticmethod
    def renoised(lab, student, ratio, K):
        with cleaned_up(ratio, gaussian(lab.seed, "re-noised", device=lab.device)):
            return lab.judge_model(student, Sampling(K))

    def as_it_is(self, lab, ratio, K):
        return self.renoised(lab, lab.student, ratio, K)

    def distilled(self, lab, K):
        return self.renoised(lab, renoising_student(lab), 1.0, K)

    @staticmethod
    def one_step(lab, K):
        return lab.judge_model(renoising_student(lab), Sampling(K))

    def reinforced(self, lab, K):
        inner, settings = copy(lab), self.settings | {"action": "x"}
        inner.quality = lab.quality  # which is calibrated on the student as it was
        inner.student, inner.out = renoising_student(lab), lab.out / "re-noised"
        with (
            mock.patch.object(maskrl, "PolicyGradient", Renoised),
            cleaned_up(1.0, gaussian(lab.seed, "re-noised", device=lab.device)),
        ):
            return inner.reinforce("re-noised", settings)


RENOISING = {"gsim_iters": 400}  # of the student, distilled once more for re-noising to 1
ONE_STEP = maskrl.one_step


def renoising_student(lab):
    """A student that was distilled for sigma / alpha = 1."""
    out = lab.out / "re-noised"
    if not finished(out / "student.pt"):
        training = maskrl.Distillation(lab.teacher, replace(lab.settings, **RENOISING))
        for network in (training.model, training.ema):
            network.load_state_dict(lab.student.state_dict())
        with cleaned_up(1.0, gaussian(lab.seed, "cleaned", device=lab.device)):
            maskrl.train_student(training, lab.data, out)
    return maskrl.load_checkpoint(out / "student.pt", "student", lab.device)


def gaussian(*names, device):
    """eps(z): noise of the shape of z, from the generator of these names."""
    generator = maskrl.rng(*names, device=device)

    def eps(z):
        return torch.randn(z.shape, generator=generator, device=z.device)

    return eps


def noise_time(ratio: float) -> tuple[int, float, float]:
    """The first timestep at which sigma / alpha >= ratio, with its alpha and sigma."""
    base = maskrl.BASE
    t = int(torch.searchsorted(base.sigma / base.alpha, ratio))
    return t, float(base.alpha[t]), float(base.sigma[t])


@contextmanager
def cleaned_up(ratio: float, eps, drawn: list | None = None):
    """Meanwhile the student's token g is noised to sigma / alpha = ratio, and denoised once more.

    eps(z) gives the noise. drawn: a list that takes (g, x_t / alpha) of every call."""
    t, alpha, sigma = noise_time(ratio)

    def two_steps(head, z, c, noise_ratio):
        g = ONE_STEP(head, z, c, noise_ratio)
        x_t = alpha * g + sigma * eps(z)
        if drawn is not None:
            drawn.append((g, x_t / alpha))
        time = torch.full((len(z),), t, device=z.device)
        return (x_t - sigma * head.eps(x_t, time, c)) / alpha

    with mock.patch.object(maskrl, "one_step", two_steps):
        yield


class Renoised(maskrl.PolicyGradient):
    """RL whose action is the noised token x_t / alpha ~ N(g(z, c), (sigma / alpha)^2).

    The clean-up that follows is a part of the environment: of its own dependence on the weights
    the gradient knows nothing."""

    def update(self, labels, seed):
        """One update on all steps, with `log_ratio` 0 if sampler and learner agree."""
        model, settings, drawn = self.model, self.model.settings, []
        with cleaned_up(1.0, gaussian(seed, "re-noise", device=labels.device), drawn):
            rollouts = maskrl.rollout(model, self.quality, labels, seed, False, explore=False)
        A, metrics = self.advantages_of(rollouts)
        masks, reveals = rollouts.trace.masks()
        _, alpha, sigma = noise_time(1.0)
        seen = []

        def g(network, k):  # of the tokens that step k revealed
            c = network.context(rollouts.tokens, masks[:, k], rollouts.labels)[reveals[:, k]]
            return ONE_STEP(network.head, rollouts.trace.z[reveals[:, k]], c, settings.noise_ratio)

        def loss_of(k):
            g_old, action = drawn[k]
            with torch.no_grad():
                g_ref = g(self.reference, k)
            mean, std = g(model, k), sigma / alpha
            loss, figures = maskrl.policy_loss(
                maskrl.token_log_prob(action, mean, std),
                maskrl.token_log_prob(action, g_old, std),
                A[reveals[:, k].nonzero()[:, 0]],
                maskrl.token_kl(mean, g_ref, std),
                settings.clip_ratio,
                settings.beta,
            )
            share = len(action) / reveals.sum().item()
            seen.append((share, figures))
            return loss * share

        _, norm = maskrl.descend(map(loss_of, range(len(drawn))), self.optimizers["generator"])
        metrics["log_ratio"] = max(figures["log_ratio"] for _, figures in seen)
        for name in ("kl", "clip_fraction"):
            metrics[name] = sum(share * figures[name] for share, figures in seen)
        return metrics | {"grad_norm": norm}


class InTurn(maskrl.PolicyGradient):
    """Updates of z and of x in turn: the noise policy's, then the generator's, by what it makes of
    the noise that the policy has moved."""

    def __init__(self, student, settings, quality, mean_image):
        super().__init__(student, settings, quality, mean_image)
        self.model.requires_grad_(True)
        generator = [p for name, p in self.model.named_parameters() if "noise_policy" not in name]
        self.optimizers["generator"] = self.adamw(generator, settings.rl_lr)

    def update(self, labels, seed):
        step, settings = seed[-1], self.model.settings
        if step % 2 == 0:
            return super().update(labels, seed)
        self.model.settings = replace(settings, action="x")
        rollouts = maskrl.rollout(self.model, self.quality, labels, seed, predictions=False)
        (A, metrics), trace = self.advantages_of(rollouts), rollouts.trace
        with torch.no_grad():
            moved = trace.z + self.model.noise_policy(trace.contexts)
        rollouts.trace = replace(trace, z=moved)
        if A.any():
            metrics |= self.generator_update(rollouts, A, trace.counts > 0, None)
        self.model.settings = settings
        return metrics


class Critical(Reinforcements):
    title = "RL on which steps? (MaskFocus)"
    question = (
        "64 tokens (`--patch 2`), quality alone as the reward, the action z, and three fixed "
        "schedules: in 6 iterations the student leaves the reward something to gain, in 16 and 32 "
        "its images are nearly as good as real ones. Each arm optimises two of the 6 steps, a "
        "quarter of the 16 or 32, or all. *Equal numbers*: of random tokens, as many as the "
        "critical steps reveal. *gained*: quality, over the student in as many iterations; "
        "tokens: how many of an image's count in an update; seconds: of the process, with the "
        "rollouts."
    )
    seeds = "0,1,2"
    lab_settings = {"patch": 2, "teacher_iters": 2000}
    settings = {
        "steps": 6,
        "critical_steps": 2,
        "learn_steps": False,
        "alpha": 0.0,
        "rl_iters": 40,
    }
    more_steps = ({"steps": 16, "critical_steps": 4}, {"steps": 32, "critical_steps": 8})
    columns = (
        *("quality", "gained", "held_out", "frechet", "drift", "precision", "recall", "kl"),
        *("tokens", "not_first", "seconds"),
    )
    verdict = (
        "In 6 iterations and as many updates RL gains {0[critical][gained]} on the critical "
        "steps, {0[first][gained]} on the first, {0[random][gained]} on random ones, "
        "{0[equal numbers][gained]} on as many tokens of any step and "
        "{0[all][gained]} on all.",
        "Critical steps gain more than random ones on "
        "{0[critical > random][gained]}, than as many tokens of any step on "
        "{0[critical > equal numbers][gained]}, than all on "
        "{0[critical > all][gained]}, and than the first on "
        "{0[critical > first][gained]}.",
        "In half of the updates they gain {0[critical, halfway / all][gained]} times as much as "
        "all steps, in {0[critical, halfway / all][seconds]} times the seconds, and more than all "
        "on {0[critical, halfway > all][gained]}.",
        "Quality costs distance: {0[critical][drift]} times the student's on the critical steps, "
        "{0[critical, halfway][drift]} after half of the updates, {0[first][drift]} on the first "
        "and {0[all][drift]} on all.",
        "In 16 iterations, where the student's quality is {0[start, K = 16][quality]}, RL gains "
        "{0[critical, K = 16][gained]} on the critical steps "
        "({0[critical, halfway, K = 16][gained]} after half of the updates), "
        "{0[first, K = 16][gained]} on the first, {0[random, K = 16][gained]} on random ones and "
        "{0[all, K = 16][gained]} on all; critical steps gain more than all on "
        "{0[critical, K = 16 > all, K = 16][gained]}, at {0[critical, K = 16][drift]} times the "
        "student's distance, {0[critical, halfway, K = 16][drift]} halfway.",
        "In 32 iterations the quality is {0[start, K = 32][quality]}, and it gains "
        "{0[critical, K = 32][gained]} on the critical steps, {0[first, K = 32][gained]} on the "
        "first, {0[random, K = 32][gained]} on random ones and {0[all, K = 32][gained]} on all; "
        "critical steps gain more than all on {0[critical, K = 32 > all, K = 32][gained]}, than "
        "the first on {0[critical, K = 32 > first, K = 32][gained]}.",
    )
    picture = ("critical.png", "the course of RL in 6 iterations")

    def measure(self, lab, only=()):
        return super().measure(self.own_lab(lab), only)

    def own_lab(self, lab):
        """The Lab of small tokens that belongs to the seed of `lab`."""
        return Lab(lab.out.parent / "patch2", lab.seed, lab.device, **self.lab_settings)

    def rows(self, lab):
        rows = self.arms(lab, {})
        for overrides in self.more_steps:
            rows |= self.arms(lab, overrides, f", K = {overrides['steps']}")
        return rows

    def arms(self, lab, overrides, suffix=""):
        settings = self.settings | {"rl_steps": "critical"} | overrides
        arms = {how: {"rl_steps": how} for how in maskrl.RL_STEPS}
        arms |= {"equal numbers": {}, "critical, halfway": {"rl_iters": settings["rl_iters"] // 2}}
        rows = {f"start{suffix}": partial(lab.judged, "student", steps=settings["steps"])}
        for name, own in arms.items():
            method = EqualNumbers if name == "equal numbers" else maskrl.PolicyGradient
            name += suffix
            rows[name] = partial(self.arm, lab, name, settings | own, method)
        return rows

    def arm(self, lab, name, overrides, method):
        counted = lab.result(f"tokens, {name}", partial(self.tokens, lab, overrides))
        start = lab.judged("student", steps=overrides["steps"])
        with mock.patch.object(maskrl, "PolicyGradient", method):
            figures = lab.reinforcement(name, **overrides)
        return figures | {
            "gained": figures["quality"] - start["quality"],
            "drift": figures["frechet"] / start["frechet"],
            "tokens": counted["tokens"],
        }

    @staticmethod
    def tokens(lab, overrides):
        """Tokens per image that the first update counts."""
        settings = replace(lab.settings, **overrides)
        training, labels = rl_training(lab, overrides)
        rollouts = maskrl.rollout(training.model, lab.quality, labels, "tokens")
        generator = maskrl.rng(settings.seed, "tokens")
        trace = rollouts.trace
        steps = maskrl.optimised_steps(
            trace, rollouts.tokens, settings, training.mean_image, generator
        )
        return {"tokens": float((trace.counts * steps).sum(1).float().mean())}

    def draw(self, rows, path):
        arms = (*maskrl.RL_STEPS, "equal numbers")
        super().draw({name: rows[name] for name in arms if name in rows}, path)


class OnLetters(Critical):
    title = "RL on which steps? (a folder: letters)"
    question = (
        "The same on images that nobody drew for us: letters as in the study above, of 1,587 fonts "
        "and with a teacher and a student of their own, 64 tokens in 16 fixed iterations, of which "
        "each arm optimises four, or all. There is no exact reward to hold out; the judge's class "
        "accuracy is what nothing trains on."
    )
    seeds = "0"
    lab_settings = {"teacher_iters": 6000, "gsim_iters": 600}
    settings = Critical.settings | {"steps": 16, "critical_steps": 4}
    more_steps = ()
    columns = (
        *("quality", "gained", "accuracy", "frechet", "drift", "precision", "recall", "kl"),
        *("tokens", "not_first", "seconds"),
    )
    verdict = (
        "From a quality of {0[start][quality]} RL gains {0[critical][gained]} on the critical "
        "steps, {0[first][gained]} on the first, {0[random][gained]} on random ones, "
        "{0[equal numbers][gained]} on as many tokens of any step and {0[all][gained]} on all.",
        "In half of the updates critical steps gain {0[critical, halfway / all][gained]} times as "
        "much as all steps, in {0[critical, halfway / all][seconds]} times the seconds.",
        "The distance is {0[critical][drift]} times the student's on the critical steps, "
        "{0[first][drift]} on the first and {0[all][drift]} on all.",
        "In the course of RL the quality swings by as much as the arms differ: one seed does not "
        "decide.",
    )
    picture = ("onletters.png", "the course of RL on letters")

    def own_lab(self, lab):
        out, folder = lab.out.parent / "letters", folder_of("letters")
        return Lab(out, lab.seed, lab.device, folder, **self.lab_settings)


class EqualNumbers(maskrl.PolicyGradient):
    """The control of critical steps: as many tokens of every rollout, but of any step."""

    def noise_update(self, rollouts, A, steps):
        counted = (steps[..., None] & rollouts.trace.masks()[1]).any(1)
        rank = torch.rand(counted.shape, generator=maskrl.rng("equal", counted.sum())).argsort(1)
        chosen = rank.to(counted.device) < counted.sum(1, keepdim=True)
        # a Trace of one step that reveals the chosen tokens, which is all that the update reads
        return super().noise_update(Chosen(rollouts, chosen), A, torch.ones_like(steps[:, :1]))


class Chosen:
    """Rollouts whose chosen tokens [B, L] count as revealed in one step."""

    def __init__(self, rollouts, chosen):
        self.sigma, self.trace = rollouts.sigma, self
        self.contexts, self.z = rollouts.trace.contexts, rollouts.trace.z
        self.chosen = chosen

    def masks(self):
        return None, self.chosen[:, None]


class Schedule(Study):
    title = "A learned schedule against the best fixed one (Speed-RL)"
    question = (
        "The demo's policy, whose schedule was learned from clean rollouts, and fixed schedules of "
        "the same generator: the cosine ones, and the best of all count vectors of 3 to 8 "
        "iterations that do not decrease, searched by reward on images of other noise. *Shuffled*: "
        "each image gets the schedule that was chosen for another one of its class. *Drawn*: "
        "counts are drawn from the policy, not the most probable ones. `margin`: mean difference "
        "of the reward from the best vector's on the same classes, orders and z, with its standard "
        "error."
    )
    seeds = "0,1,2"
    rows_key = "arms"
    columns = (
        *("reward", "margin", "margin_error", "quality", "held_out", "frechet", "precision"),
        *("iterations", "vector"),
    )
    cosine = (8, 6, 5, 4)
    searched = 225  # images of each candidate; the best ten are compared on six times as many
    verdict = (
        "The learned schedule's reward is {0[learned][reward]} at {0[learned][iterations]} "
        "iterations, the best fixed vector's {0[vector][reward]} at {0[vector][iterations]}: a "
        "margin of {0[learned][margin]}, with a standard error of {0[learned][margin_error]}; "
        "shuffled within the classes it is {0[shuffled][margin]}.",
        "The student takes {0[student / learned][iterations]} times as many iterations, and the "
        "schedule at its start {0[untrained / learned][iterations]} times; the learned one's "
        "distance is {0[learned / student][frechet]} times the student's, its quality is above "
        "the student's on {0[learned > student][quality]}, its held-out reward on "
        "{0[learned > student][held_out]}.",
        "Its margin is {0[learned, drawn][margin]} where counts are drawn. In random orders the "
        "same policy comes to a distance of "
        "{0[learned, random order][frechet]} instead of {0[learned][frechet]}.",
    )

    def rows(self, lab):
        rows = {
            "student": partial(self.fixed, lab, lab.student, Sampling()),
            "untrained": partial(self.untrained, lab),
            "learned": partial(self.learned, lab, Sampling()),
            "learned, drawn": partial(self.learned, lab, Sampling(greedy=False)),
            "learned, random order": partial(self.learned, lab, Sampling(order="random")),
            "shuffled": partial(self.shuffled, lab),
            "vector": partial(self.vector, lab),
        }
        for K in self.cosine:
            rows[f"cosine, K = {K}"] = partial(self.fixed, lab, lab.policy, Sampling(K))
        return {name: partial(lab.result, f"schedule, {name}", f) for name, f in rows.items()}

    def fixed(self, lab, model, sampling):
        return self.figures(lab, *self.images(lab, model, sampling))

    def learned(self, lab, sampling):
        return self.fixed(lab, lab.policy, sampling)

    def untrained(self, lab):
        model = deepcopy(lab.policy)
        maskrl.add_schedule(model)
        return self.fixed(lab, model, Sampling(greedy=False))

    def vector(self, lab):
        counts = self.best_vector(lab)
        return self.fixed(lab, lab.policy, Sampling(counts)) | {"vector": str(counts)}

    def shuffled(self, lab):
        """Each image with the counts that were chosen for another one of its class."""
        labels, parts = lab.judge.labels, []
        for i, (y, part) in enumerate(self.batches(lab, labels)):
            _, trace = maskrl.generate(lab.policy, y, Sampling(), seed=part, trace=True)
            donor = maskrl.partners(y, maskrl.rng(lab.seed, "shuffled", i))
            noise = maskrl.Noise(trace.order, trace.z)
            with counts_of(trace.counts[donor], lab.policy):
                parts.append(maskrl.generate(lab.policy, y, Sampling(), noise, trace=True))
        return self.figures(lab, *self.together(lab, parts))

    def images(self, lab, model, sampling, labels=None, name="schedule"):
        """Images and iterations of `labels`, on noise that is the same for every model."""
        labels = lab.judge.labels if labels is None else labels
        parts = [
            maskrl.generate(model, y, sampling, seed=(name, *part), trace=True)
            for y, part in self.batches(lab, labels)
        ]
        return self.together(lab, parts)

    @staticmethod
    def batches(lab, labels):
        return [(y, (lab.seed, i)) for i, y in enumerate(labels.split(450))]

    @staticmethod
    def together(lab, parts):
        tokens = torch.cat([tokens for tokens, _ in parts])
        steps = torch.cat([trace.steps for _, trace in parts])
        return maskrl.to_images(tokens, lab.settings).cpu(), steps.cpu()

    def figures(self, lab, images, steps):
        quality = lab.rewards(lab.quality, images)
        reward = maskrl.total_reward(quality, steps, lab.settings)
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

    def reward_of_best(self, lab):
        """The reward of each image by the best vector [n]."""
        if not hasattr(lab, "reward_of_best"):
            images, steps = self.images(lab, lab.policy, Sampling(self.best_vector(lab)))
            quality = lab.rewards(lab.quality, images)
            lab.reward_of_best = maskrl.total_reward(quality, steps, lab.settings)
        return lab.reward_of_best

    def best_vector(self, lab) -> tuple[int, ...]:
        return tuple(lab.result("schedule, search", partial(self.search, lab))["counts"])

    def search(self, lab):
        """The counts of highest reward on noise that no row is measured on."""
        candidates = list(ascending(lab.settings.length, range(3, 9)))

        def mean_reward(counts, n):
            labels = lab.evenly(n)
            images, steps = self.images(lab, lab.policy, Sampling(counts), labels, "search")
            pairs = zip(images.split(500), labels.split(500))
            quality = torch.cat([lab.quality(x.to(lab.device), y).cpu() for x, y in pairs])
            return float(maskrl.total_reward(quality, steps, lab.settings).mean())

        with torch.no_grad():
            best = sorted(candidates, key=lambda counts: -mean_reward(counts, self.searched))[:10]
            counts = max(best, key=lambda counts: mean_reward(counts, 6 * self.searched))
        return {"counts": list(counts), "candidates": len(candidates)}


@contextmanager
def counts_of(counts, model):
    """Meanwhile the model's schedule reveals counts [B, T], whatever it sees."""
    step = iter(counts.T)

    def replayed(actions, hidden):
        return torch.minimum(next(step, hidden), hidden)

    with mock.patch.object(model.schedule, "count", replayed):
        yield


def ascending(total: int, lengths, least: int = 1) -> list[tuple[int, ...]]:
    """The ways to write total as a sum of numbers that do not decrease, as many as in lengths."""
    found = [(total,)] if 1 in lengths and total >= least else []
    shorter = [n - 1 for n in lengths if n > 1]
    for first in range(least, total // 2 + 1) if shorter else ():
        found += [(first, *rest) for rest in ascending(total - first, shorter, first)]
    return found


def rl_training(lab, overrides):
    """A PolicyGradient or RewardBackpropagation at its start, and prompts for an update."""
    settings = replace(lab.settings, **overrides)
    backprop = settings.method == "backprop"
    method = maskrl.RewardBackpropagation if backprop else maskrl.PolicyGradient
    mean = maskrl.mean_image(lab.data, settings).to(lab.device)
    labels = torch.arange(settings.prompts, device=lab.device) % len(lab.data.classes)
    return method(lab.student_with(settings), settings, lab.quality, mean), labels


class Temperature(Study):
    title = "A third of the iterations: the temperature of z"
    question = (
        "Tokens that are revealed in the same iteration do not know of each other, and the more "
        "they vary, the less they fit together. The temperature is a factor on the z that a token "
        "starts from. *1-2-2-3-8*: these counts, five iterations, in the order of Halton's "
        "sequence; we found them by hand on seed 0, and 0.75 on seeds 0 and 1. *Policy*: the "
        "demo's, with its learned schedule. Nothing is trained for a temperature. *Start*: the "
        "student in 16 iterations at a temperature of 1."
    )
    seeds = "0,1,2"
    counts = (1, 2, 2, 3, 8)
    temperatures = (1.0, 0.85, 0.75, 0.65)
    columns = (
        *("frechet", "drift", "quality", "held_out", "precision", "recall", "diversity"),
        "steps",
    )
    verdict = (
        "In 16 iterations the student's distance goes from {0[K = 16][frechet]} to "
        "{0[K = 16 at 0.85][frechet]} at a temperature of 0.85: lower on "
        "{0[K = 16 at 0.85 < K = 16][frechet]} (at 0.75 on "
        "{0[K = 16 at 0.75 < K = 16][frechet]}), at a held-out reward of "
        "{0[K = 16 at 0.85][held_out]} instead of {0[K = 16][held_out]}, a precision of "
        "{0[K = 16 at 0.85][precision]} instead of {0[K = 16][precision]}, and a recall of "
        "{0[K = 16 at 0.85][recall]} instead of {0[K = 16][recall]}.",
        "In the five iterations of the cosine schedule it is {0[K = 5][drift]} times as long as "
        "in 16, both at a temperature of 1, with the counts 1-2-2-3-8 {0[1-2-2-3-8][drift]} times, "
        "with these {0[1-2-2-3-8 at 0.85][drift]} times at 0.85 and "
        "{0[1-2-2-3-8 at 0.75][drift]} times at 0.75, where quality and held-out reward are above "
        "those of 16 iterations at 1 on {0[1-2-2-3-8 at 0.75 > K = 16][quality]} and "
        "{0[1-2-2-3-8 at 0.75 > K = 16][held_out]}.",
        "The policy, at {0[policy][steps]} iterations, comes from {0[policy][frechet]} to "
        "{0[policy at 0.85][frechet]} at 0.85, lower on "
        "{0[policy at 0.85 < policy][frechet]}, at a held-out reward of "
        "{0[policy at 0.85][held_out]} instead of {0[policy][held_out]}.",
    )

    def rows(self, lab):
        name = "-".join(map(str, self.counts))
        arms = {"K = 16": ("student", {}), "K = 5": ("student", {"steps": 5})}
        arms |= {name: ("student", {"steps": self.counts}), "policy": ("policy", {})}
        rows = {}
        for arm, (kind, how) in arms.items():
            for factor in self.temperatures:
                at = {} if factor == 1 else {"temperature": factor}
                row = arm if factor == 1 else f"{arm} at {factor:g}"
                rows[row] = partial(self.arm, lab, kind, how | at)
        return rows

    @staticmethod
    def arm(lab, kind, how):
        figures, start = lab.judged(kind, **how), lab.judged("student")
        return figures | {"drift": figures["frechet"] / start["frechet"]}


class Cost(Study):
    title = "What an update costs"
    question = (
        "Milliseconds of an update of GSIM, by part, and of RL at the demo's settings with a fixed "
        "schedule of 16 iterations, by its action and on four critical steps or on all; all in "
        "turns, the median of the rounds."
    )
    settings = {"learn_steps": False}
    columns = ("ms",)
    rounds = 8
    parts = (
        "GSIM: student's and auxiliary contexts, auxiliary loss",
        "GSIM: auxiliary network, backward and step",
        "GSIM: frozen contexts (auxiliary; teacher, with and without class)",
        "GSIM: the loss, through three heads",
        "GSIM: student, backward and step",
    )
    verdict = (
        "An update of GSIM takes {0[GSIM update][ms]} ms. One of RL takes "
        "{0[RL update, x, critical][ms]} ms on the critical steps and {0[RL update, x, all][ms]} "
        "ms on all with the action x, {0[RL update, z, critical][ms]} and "
        "{0[RL update, z, all][ms]} ms with z.",
    )

    def measure(self, lab, only=()):
        times = lab.result("cost", partial(self.times, lab))
        rows = {name: times | {"ms": ms, "minutes": 0.0} for name, ms in times["ms"].items()}
        rows["GSIM update"]["minutes"] = times["minutes"]
        return rows

    def times(self, lab):
        rl = {}
        for action in maskrl.ACTIONS:
            for how in ("critical", "all"):
                overrides = {"action": action, "rl_steps": how}
                rl[f"RL update, {action}, {how}"] = rl_training(lab, self.settings | overrides)
        rounds = {name: [] for name in ("GSIM update", *self.parts, *rl)}
        for i in range(self.rounds):
            for name, ms in zip(self.parts, self.gsim_parts(lab, i)):
                rounds[name].append(ms)
            rounds["GSIM update"].append(sum(rounds[name][i] for name in self.parts))
            for name, (training, labels) in rl.items():
                start = time.perf_counter()
                training.update(labels, i)
                rounds[name].append(1000 * (time.perf_counter() - start))
        return {"ms": {name: statistics.median(ms[1:]) for name, ms in rounds.items()}}

    @staticmethod
    def gsim_parts(lab, i):
        """Milliseconds of the five parts: an update stops the clock around its two losses and
        where it has descended."""
        marks = []

        def marked(function):
            def call(*args):
                marks.append(time.perf_counter())
                result = function(*args)
                marks.append(time.perf_counter())
                return result

            return call

        training = maskrl.Distillation(lab.teacher, lab.settings, marked(maskrl.gsim_loss))
        generator = maskrl.rng(lab.seed, "cost", i)
        images, labels = lab.data.train.batch(lab.settings.batch, generator, lab.device)
        x = maskrl.to_tokens(images, lab.settings)
        functions = ("descend", "denoising_loss")
        with mock.patch.multiple(maskrl, **{f: marked(getattr(maskrl, f)) for f in functions}):
            start = time.perf_counter()
            training.update(0, x, labels, generator)
        _, _, aux_loss, aux_end, _, loss_start, loss_end, end = marks
        ends = (aux_loss, aux_end, loss_start, loss_end, end)
        return [1000 * (stop - begin) for begin, stop in zip((start, *ends), ends)]


class Threads(Study):
    title = "Threads"
    question = (
        "How many CPU threads are worth it, on an idle machine and beside one other process that "
        "is always busy? Updates per second of the teacher, and ms per image of the student for "
        "one image at a time; all in turns."
    )
    columns = ("updates_idle", "updates_busy", "ms_idle", "ms_busy")
    numbers = (1, 2, 4, 8)
    rounds = 3
    updates = 5
    verdict = (
        "On one thread the teacher makes {0[1 threads][updates_idle]} updates per second on an "
        "idle machine and {0[1 threads][updates_busy]} beside a busy process; an image takes "
        "{0[1 threads][ms_idle]} and {0[1 threads][ms_busy]} ms.",
        "On two threads there are {0[2 threads][updates_idle]} updates per second, and "
        "{0[2 threads][updates_busy]} beside the busy process.",
        "On four there are {0[4 threads][updates_idle]} and {0[4 threads][updates_busy]}.",
    )

    def measure(self, lab, only=()):
        work = partial(self.times, lab, lab.student)  # which is made before the clock runs
        times = lab.result("threads", work)
        shared = {name: times[name] for name in ("hardware", "commit", "date")}
        shared["minutes"] = times["minutes"] / len(self.numbers)
        return {f"{n} threads": shared | {"threads": n} | times[str(n)] for n in self.numbers}

    def times(self, lab, student):
        before = torch.get_num_threads()
        try:
            idle = self.in_turns(lab, student, "idle")
            with busy_process():
                busy = self.in_turns(lab, student, "busy")
        finally:
            torch.set_num_threads(before)
        return {str(n): idle[n] | busy[n] for n in self.numbers}

    def in_turns(self, lab, student, suffix):
        training = maskrl.TeacherTraining(lab.settings, lab.data.classes, lab.device)
        generator = maskrl.rng(lab.seed, "threads")
        images, labels = lab.data.train.batch(lab.settings.batch, generator, lab.device)
        x = maskrl.to_tokens(images, lab.settings)
        rates, seconds = {n: [] for n in self.numbers}, {n: [] for n in self.numbers}
        for _ in range(self.rounds):
            for n in self.numbers:
                torch.set_num_threads(n)
                training.update(0, x, labels, generator)  # warms up
                start = time.perf_counter()
                for _ in range(self.updates):
                    training.update(0, x, labels, generator)
                rates[n].append(self.updates / (time.perf_counter() - start))
                one = {"student": (student, Sampling())}
                seconds[n].append(maskrl.time_in_turns(one, lab.evenly(1))["student"])
        return {
            n: {
                f"updates_{suffix}": statistics.median(rates[n]),
                f"ms_{suffix}": 1000 * statistics.median(seconds[n]),
            }
            for n in self.numbers
        }


class TrainSpeed(Study):
    name = "train_speed"
    title = "Speed of training"
    question = (
        "Updates per second of every stage, from random weights: Adam one weight at a time (plain) "
        "or fused, the batch whole or in parts of like masks (--micro-batch), products in float32 "
        "or bf16; all in turns, medians of the rounds after the first. `tiny` is the demo's, in "
        "parts of 16; `small` is cut down to what a CPU can do: batches of 4 in parts of 1, RL of "
        "2 rollouts in 8 steps. *Loader*: the share of an update that drawing its batch takes."
    )
    columns = ("updates", "speedup", "loader")
    stages = ("teacher", "GSIM", "RL")
    switches = {
        "plain": {"precision": "fp32", "micro_batch": 0},
        "fused": {"precision": "fp32", "micro_batch": 0},
        "fused, in parts": {"precision": "fp32"},
        "fused, in parts, bf16": {"precision": "bf16"},
    }
    sizes = {
        "tiny": {"micro_batch": 16, "learn_steps": False},
        "small": {
            **{"micro_batch": 1, "learn_steps": False, "batch": 4, "per_class": 20},
            **{"prompts": 1, "group": 2, "steps": 8, "critical_steps": 2},
        },
    }
    rounds = {"tiny": 5, "small": 3}
    verdict = (
        "Fused Adam makes an update {0[tiny teacher, fused][speedup]} (teacher), "
        "{0[tiny GSIM, fused][speedup]} (GSIM) and {0[tiny RL, fused][speedup]} (RL) times as fast "
        "at the size of the demo; in parts of 16 images it is "
        "{0[tiny teacher, fused, in parts][speedup]}, {0[tiny GSIM, fused, in parts][speedup]} and "
        "{0[tiny RL, fused, in parts][speedup]} times as fast as plain.",
        "At the size of `small` parts of 1 out of 4 make it "
        "{0[small teacher, fused, in parts][speedup]}, {0[small GSIM, fused, in parts][speedup]} "
        "and {0[small RL, fused, in parts][speedup]} times as fast, and bf16 besides "
        "{0[small teacher, fused, in parts, bf16][speedup]}, "
        "{0[small GSIM, fused, in parts, bf16][speedup]} and "
        "{0[small RL, fused, in parts, bf16][speedup]} times, on this CPU.",
    )

    def measure(self, lab, only=()):
        rows = {}
        for size in self.sizes:
            for stage in self.stages:
                name = f"{size} {stage}"
                if not only or name.startswith(only):
                    work = partial(self.in_turns, size, stage, lab)
                    result = lab.result(f"speed of {name}", work)
                    figures = result.pop("switches")
                    result["minutes"] /= len(figures)
                    rows |= {f"{name}, {switch}": result | figures[switch] for switch in figures}
        return rows

    def in_turns(self, size, stage, lab):
        settings = replace(maskrl.preset(size, seed=lab.seed), **self.sizes[size])
        data = maskrl.load_data(settings)
        settings = data.measure(settings)
        trainings = {}
        for name, switch in self.switches.items():
            training = self.training(stage, replace(settings, **switch), data, lab.device)
            optimizers = training.optimizers
            for optimizer in optimizers.values() if isinstance(optimizers, dict) else optimizers:
                for group in optimizer.param_groups:
                    group["fused"] = name != "plain"
            trainings[name] = training
        seconds, loading = ({name: [] for name in trainings} for _ in range(2))
        for i in range(self.rounds[size]):
            for name, training in trainings.items():
                start = time.perf_counter()
                inputs = self.inputs(stage, settings, data, lab.device, i)
                loading[name].append(time.perf_counter() - start)
                training.update(*inputs)
                seconds[name].append(time.perf_counter() - start)
        median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        switches = {
            name: {
                "updates": 1 / median[name],
                "speedup": median["plain"] / median[name],
                "loader": 100 * statistics.median(loading[name][1:]) / median[name],
            }
            for name in trainings
        }
        return {"switches": switches}

    @staticmethod
    def training(stage, settings, data, device):
        torch.manual_seed(settings.seed)
        if stage == "teacher":
            return maskrl.TeacherTraining(settings, data.classes, device)
        model = maskrl.MAR(settings, data.classes).to(device)
        if stage == "GSIM":
            return maskrl.Distillation(model.requires_grad_(False), settings)
        student = maskrl.student_of(model, settings)
        reward = maskrl.ShapeFit(settings.image_size, device)
        mean = maskrl.mean_image(data, settings).to(device)
        return maskrl.PolicyGradient(student, settings, reward, mean)

    @staticmethod
    def inputs(stage, settings, data, device, i):
        """What the stage's update number i takes."""
        if stage == "RL":
            return torch.arange(settings.prompts, device=device) % len(data.classes), i
        generator = maskrl.rng(settings.seed, "speed", i)
        images, labels = data.train.batch(settings.batch, generator, device)
        return i, maskrl.to_tokens(images, settings), labels, generator


@contextmanager
def busy_process():
    """A process beside this one that keeps a core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def folder_of(name: str) -> Path:
    """A folder of images that tests/folders.py makes."""
    folder = FOLDERS / name
    if not folder.is_dir():
        raise maskrl.InputError(f"there is no {folder}: tests/folders.py says how it is made")
    return folder


class Folder(Study):
    """train_rl.py on a folder of images that tests/folders.py makes, under FOLDERS."""

    columns = (
        *("frechet", "accuracy", "precision", "recall", "diversity", "nearest", "quality"),
        *("reward", "steps", "image_ms", "train_minutes"),
    )
    options: tuple = ()

    def measure(self, lab, only=()):
        folder, out = folder_of(self.name), lab.out / self.name
        if not (out / "metrics.json").exists():  # which a run writes last
            where = ("--data", folder, "--out", out, "--resume", "--seed", lab.seed)
            machine = ("--device", lab.device, "--threads", torch.get_num_threads())
            train_rl.main([str(word) for word in (*where, *machine, *self.options)])
        metrics = json.loads((out / "metrics.json").read_text())
        if lab.seed == 0:
            for picture in ("samples", "neighbours"):
                shutil.copy(out / f"{picture}.png", ASSETS / f"{self.name}_{picture}.png")
        at_most = f"student, fixed K = {metrics['settings']['steps']}"
        rewards = {"student": metrics["rl"][at_most], "policy": metrics["rl"]["after"]}
        seconds = {line["stage"]: line["seconds"] for line in maskrl.read_log(out)}
        rows = {}
        for name, row in metrics["rows"].items():
            rows[name] = row | {"minutes": 0.0} | provenance(lab.device)
            if name in rewards:
                rows[name] |= {key: rewards[name][key] for key in ("quality", "reward")}
            if name in seconds:
                rows[name]["train_minutes"] = seconds[name] / 60
            if "seconds_per_image" in row:
                rows[name]["image_ms"] = 1000 * row["seconds_per_image"]
        rows["real"] |= {"examination": metrics["examination"], "blind": metrics["blind"]}
        for name, row in metrics["rl"].items():
            if name.startswith("policy, fixed K") and row["steps"] >= 8:
                name = name.replace("policy, fixed", "policy's generator,")
                rows[name] = row | {"minutes": 0.0} | provenance(lab.device)
        return rows


class Emoji(Folder):
    title = "A folder: emoji"
    question = (
        "3,160 emoji of two vendors in five classes, by `python train_rl.py --data "
        "runs/folders/emoji --flip`, at the defaults for a folder without a GPU: 32×32 pixels, 64 "
        "tokens. 1,895 images are trained on, and each row of the judge has 100, so that distances "
        "are rough."
    )
    options = ("--flip",)
    verdict = (
        "The student's distance is {0[student][frechet]}, the teacher's {0[teacher][frechet]}, "
        "{0[one-step start][frechet]} before GSIM and {0[untrained][frechet]} untrained, where "
        "other real images have {0[real][frechet]}. Its precision is {0[student][precision]}, the "
        "teacher's {0[teacher][precision]}.",
        "After RL the learned schedule takes {0[policy][steps]} instead of {0[student][steps]} "
        "iterations, at a quality of {0[policy][quality]} against {0[student][quality]}, a reward "
        "of {0[policy][reward]} against {0[student][reward]}, and a distance of "
        "{0[policy][frechet]}; the same generator in 16 fixed iterations has a reward of "
        "{0[policy's generator, K = 16][reward]}.",
    )
    picture = ("emoji_samples.png", "animals, faces, flags, hands and people, seed 0")


class Eyes(Study):
    title = "The same emoji, seen through ImageNet features"
    question = (
        "The images of the study before, by the 1,280 features of a network that was trained on "
        "ImageNet (`tests/lite_features.py`) in place of the judge's own 64. *Examination*: the "
        "distances of real images that were damaged weakly and strongly."
    )
    columns = ("frechet", "precision", "recall", "diversity", "weak", "strong")
    features = "lite_features:embed"
    verdict = (
        "Real images have {0[real][frechet]}, the teacher's {0[teacher][frechet]}, the student's "
        "{0[student][frechet]}, the policy's {0[policy][frechet]} and the blurred averages of the "
        "one-step start {0[one-step start][frechet]}; to our eye, too, these are the worst. "
        "Our own judge, which minds seams and noise more than blur, puts the one-step start first. "
        "With 100 images a row these features do not order weak blur, "
        "{0[damage: blurred][weak]}, above undamaged images.",
    )

    def measure(self, lab, only=()):
        run = lab.out / "emoji"
        if not (run / "metrics.json").exists():
            raise maskrl.InputError(f"there is no finished run in {run}: first measure emoji")
        start = time.perf_counter()
        models = {kind: maskrl.load_checkpoint(run / f"{kind}.pt") for kind in maskrl.KINDS}
        settings = replace(models["teacher"].settings, judge_iters=1)  # its own eyes are not used
        data = maskrl.load_data(settings, str(FOLDERS / "emoji"), cache=lab.out / "cache")
        embed = maskrl.pretrained_features(self.features, maskrl.ClipOptions(), lab.device)
        judge = maskrl.Judge(data, settings, lab.device, embed, draws=3)
        arms = {kind: (model, Sampling()) for kind, model in models.items()}
        arms["one-step start"] = (models["teacher"], Sampling(denoise_steps=1))
        rows = {"real": judge.real_row()}
        for name, (model, sampling) in arms.items():
            images, _ = maskrl.generate_many(model, judge.labels, sampling, lab.seed, name)
            rows[name] = judge(images)
        for kind, (weak, strong) in judge.examination.items():
            rows[f"damage: {kind}"] = {"weak": weak, "strong": strong}
        for row in rows.values():
            row |= {"minutes": 0.0} | provenance(lab.device)
            row.pop("accuracy", None)
        rows["real"]["minutes"] = (time.perf_counter() - start) / 60
        return rows


class Letters(Folder):
    title = "A folder: letters"
    question = (
        "The letters A, B, E, G, K, M, R and S of 1,582 fonts, 12,656 images, by `python "
        "train_rl.py --data runs/folders/letters --teacher-iters 6000 --gsim-iters 600 --rl-iters "
        "25`, half of what the defaults for a folder without a GPU are."
    )
    options = (
        *("--teacher-iters", "6000", "--gsim-iters", "600"),
        *("--rl-iters", "25", "--schedule-iters", "25"),
    )
    verdict = Emoji.verdict
    picture = ("letters_samples.png", "the eight letters, seed 0")


class Speed(Study):
    title = "Attention caching"
    question = (
        "What does it save to compute only the tokens just revealed and those about to be, between "
        "refreshes in every Nth iteration and the first few, and what does it cost? *Quality*: "
        "models of 64 tokens, by `python train_distill.py --patch 2 --teacher-iters 2000`, in K "
        "iterations, the teacher with chains of 25 steps. *Speed*: random weights of the sizes of "
        "`small` and MAR-B in float32, 256 tokens, 64 iterations of the student, one image at a "
        "time, all in turns, in milliseconds of one CPU core; lowest and highest beside the "
        "median. A refresh of 1 is without a cache."
    )
    seeds = "0,1,2"
    settings = {"patch": 2, "teacher_iters": 2000}
    columns = ("frechet", "precision", "recall", "image_ms", "lowest_ms", "highest_ms")
    trained = {"student": {}, "teacher": {"denoise_steps": 25}}  # and how to sample
    iterations, kept = (16, 32, 64), (1, 4, 8)  # of the trained
    refreshes = (1, 4, 8, 16)  # of the random
    sizes = {"small": 4, "mar_b": 2}  # and rounds, of which the first warms up; of seed 0
    random_steps = 64
    verdict = (
        "In 16 iterations, each of which reveals 4 of 64 tokens, the student's distance is "
        "{0[student, K = 16, refresh 1][frechet]} without a cache, "
        "{0[student, K = 16, refresh 4][frechet]} with a refresh in every 4th and "
        "{0[student, K = 16, refresh 8][frechet]} in every 8th.",
        "In 32 iterations it is {0[student, K = 32, refresh 1][frechet]}, "
        "{0[student, K = 32, refresh 4][frechet]} and {0[student, K = 32, refresh 8][frechet]}.",
        "In 64, one token at a time and so the share of an image that 64 iterations reveal of 256 "
        "tokens, it is {0[student, K = 64, refresh 1][frechet]} without a cache and "
        "{0[student, K = 64, refresh 8][frechet]} in every 8th.",
        "The teacher's is {0[teacher, K = 16, refresh 1][frechet]}, "
        "{0[teacher, K = 16, refresh 4][frechet]} and {0[teacher, K = 16, refresh 8][frechet]} in "
        "16 iterations, and {0[teacher, K = 32, refresh 1][frechet]}, "
        "{0[teacher, K = 32, refresh 4][frechet]} and {0[teacher, K = 32, refresh 8][frechet]} in "
        "32.",
        "An image by the size `small` comes {0[small, refresh 1 / small, refresh 4][image_ms]}, "
        "{0[small, refresh 1 / small, refresh 8][image_ms]} and "
        "{0[small, refresh 1 / small, refresh 16][image_ms]} times as fast at 4, 8 and 16.",
        "By the size of MAR-B: {0[mar_b, refresh 1 / mar_b, refresh 4][image_ms]}, "
        "{0[mar_b, refresh 1 / mar_b, refresh 8][image_ms]} and "
        "{0[mar_b, refresh 1 / mar_b, refresh 16][image_ms]} times.",
    )

    def measure(self, lab, only=()):
        small_tokens = Lab(lab.out.parent / "speed", lab.seed, lab.device, **self.settings)
        rows = {}
        for kind, how in self.trained.items():
            for steps, n in product(self.iterations, self.kept):
                row = f"{kind}, K = {steps}, refresh {n}"
                if not only or row.startswith(only):
                    sampling = Sampling(steps, refresh=n, **how)
                    work = partial(self.judge, small_tokens, kind, sampling)
                    rows[row] = small_tokens.result(row, work)
        for size, rounds in self.sizes.items():
            if lab.seed == 0 and (not only or size.startswith(only)):
                times = lab.result(f"speed, {size}", partial(self.times, size, rounds, lab.device))
                shared = {name: times[name] for name in ("hardware", "commit", "date", "threads")}
                shared["minutes"] = times["minutes"] / len(self.refreshes)
                for n in self.refreshes:
                    rows[f"{size}, refresh {n}"] = shared | times[str(n)]
        return rows

    def judge(self, lab, kind, sampling):
        model, seed = getattr(lab, kind), lab.settings.seed
        images, steps = maskrl.generate_many(model, lab.judge.labels, sampling, seed, kind)
        return {**lab.judge(images), "steps": float(steps.float().mean())}

    def times(self, size, rounds, device):
        """{refresh: milliseconds per image} of random weights."""
        models, decode = maskrl.random_models(size, device, vae=None)
        calls = {}
        for n in self.refreshes:
            sampling = Sampling(self.random_steps, refresh=n)
            calls[str(n)] = partial(maskrl.generate, models["student"], [0], sampling)
        with seconds_of_the_cpu(device):
            seconds = maskrl.seconds_in_turns(calls, rounds, device)
        return {
            n: {
                "image_ms": 1000 * maskrl.lower_median(times),
                "lowest_ms": 1000 * times[0],
                "highest_ms": 1000 * times[-1],
            }
            for n, times in seconds.items()
        }


class Bench(Study):
    title = "Which idea makes an image how much faster"
    question = (
        "What `sample.py --bench` tells, in milliseconds of one CPU core: one image at a time, "
        "median and range; the best of the batches of 1, 8 and 32; where the time of one image "
        "goes; and the Fréchet distance. *demo*: the checkpoints of `make demo` or, if there are "
        "none in --out, those of the tutorial. *mar_b*: random weights of MAR-B's size on a CPU, "
        "256 tokens, 64 iterations, before the autoencoder, for speed only; each student once, and "
        "of the teachers, who take minutes for an image, every 16th iteration. *Times as fast*: as "
        "the teacher of 100 steps; of a factor: what it does alone."
    )
    columns = (
        *("image_ms", "lowest_ms", "highest_ms", "best_ms", "best_batch", "steps", "transformer"),
        *("head", "decoding", "faster", "frechet"),
    )
    batches, rounds = (1, 8, 32), 5
    size, random_steps, stride = "mar_b", 64, 16
    verdict = tuple(
        name
        + ": the one step makes an image {0[X, factor: one step][faster]} times as fast, the "
        "cache {0[X, factor: cache][faster]} and the schedule {0[X, factor: schedule][faster]} "
        "times; their product is {0[X, factor: product][faster]}, and measured all together they "
        "make {0[X, all together][faster]}.".replace("X", key)
        for key, name in (("demo", "Of the demo"), ("mar_b", "Of MAR-B's size"))
    ) + (
        "The factors do not simply multiply: behind a cache, whose contexts are those of the "
        "iteration before, the demo's policy takes {0[demo, all together][steps]} iterations "
        "instead of {0[demo, student + schedule][steps]}, and in any case the first three "
        "iterations compute everything.",
    )

    def measure(self, lab, only=()):
        rows = {}
        for key, work in (("demo", self.demo), (self.size, self.random)):
            if not only or key.startswith(only):
                with seconds_of_the_cpu(lab.device):
                    result = lab.result(f"bench, {key}", partial(work, lab))
                figures = result.pop("rows")
                result["minutes"] /= len(figures)
                rows |= {f"{key}, {name}": result | row for name, row in figures.items()}
        return rows

    def demo(self, lab):
        """The bench of the checkpoints in the lab's folder, or of the tutorial's."""
        folder = lab.out if (lab.out / "policy.pt").exists() else ASSETS / "tutorial"
        models, decode = maskrl.bench_models(folder / "teacher.pt", lab.device, vae=None)
        return bench_rows(maskrl.bench(models, decode, lab.judge, None, self.batches, self.rounds))

    def random(self, lab):
        """The same of random weights; a teacher of this size takes minutes for an image, so that
        only every `stride`-th of its iterations is timed."""
        models, _ = maskrl.random_models(self.size, lab.device, vae=None)
        arms = maskrl.bench_arms(models, self.random_steps)
        maskrl.make_images(*arms["all together"], 1, maskrl.unchanged, iter([0]))  # warms up
        rows = {}
        for name, (model, sampling) in arms.items():
            teacher = model.kind == "teacher"
            seconds_of = self.teacher_seconds if teacher else self.student_seconds
            seconds, shares = seconds_of(model, sampling)
            rows[name] = {"seconds": {1: [seconds] * 3}, "shares": shares, "steps": sampling.steps}
        return bench_rows({"rows": rows, "factors": maskrl.factors(rows, 1)})

    @staticmethod
    def student_seconds(model, sampling) -> tuple[float, dict]:
        """Seconds of one image, and the shares of its parts."""
        start = maskrl.clock(model.device)
        shares, _ = maskrl.shares(model, sampling, 1, maskrl.unchanged)
        return maskrl.clock(model.device) - start, shares

    @torch.no_grad()
    def teacher_seconds(self, model, sampling) -> tuple[float, dict]:
        """The same, of contexts and chains, from one real iteration of every `stride`."""
        chains, hidden = sampling.chains(sampling.steps), model.length
        label = torch.zeros(1, dtype=torch.long, device=model.device)
        tokens = torch.randn(1, model.length, model.channels, device=model.device)
        place = torch.arange(model.length, device=model.device)[None]
        spent = dict.fromkeys(maskrl.PARTS, 0.0)
        for k, count in enumerate(maskrl.reveal_counts(model.length, sampling.steps)):
            if k % self.stride == self.stride // 2:
                start = maskrl.clock(model.device)
                c, c_null = maskrl.class_and_null_context(model, tokens, place < hidden, label)
                middle = maskrl.clock(model.device)
                head = maskrl.guided(model.head, c[0, :count], c_null[0, :count], 2.0)
                chains[k].sample(head, torch.randn_like(tokens[0, :count]), None)
                spent["transformer"] += self.stride * (middle - start)
                spent["head"] += self.stride * (maskrl.clock(model.device) - middle)
            hidden -= count
        total = sum(spent.values())
        return total, {part: seconds / total for part, seconds in spent.items()}


def bench_rows(result: dict) -> dict:
    """{"rows": {arm or factor: figures}} of what maskrl.bench gives, one image at a time."""
    rows = {}
    _, slowest, _ = result["rows"]["teacher, 100 steps"]["seconds"][1]
    for name, row in result["rows"].items():
        low, middle, high = row["seconds"][1]
        medians = {batch: seconds[1] for batch, seconds in row["seconds"].items()}
        best = min(medians, key=medians.get)
        rows[name] = {
            "image_ms": 1000 * middle,
            "steps": row["steps"],
            "faster": slowest / middle,
            **{part: 100 * share for part, share in row["shares"].items()},
            **({"frechet": row["frechet"]} if "frechet" in row else {}),
        }
        if len(medians) > 1:  # timed more than once
            rows[name] |= {"lowest_ms": 1000 * low, "highest_ms": 1000 * high}
            rows[name] |= {"best_ms": 1000 * medians[best], "best_batch": best}
    for name in ("one step", "cache", "schedule", "product"):
        rows[f"factor: {name}"] = {"faster": result["factors"][name]}
    return {"rows": rows}


class Scaling(Study):
    title = "Time and memory against tokens, iterations and batch"
    question = (
        "How do the time of a generation and its peak memory grow? A student of the size of "
        "`small` with random weights, without a cache: one image of 16 iterations with 16 to 1024 "
        "tokens; of 256 tokens with 4 to 64 iterations; and 1 to 8 images. Milliseconds per "
        "generation are medians, all in turns; memory is what a fresh process adds to its models. "
        "Exponents are slopes of log against log, from the row above, and fitted to all."
    )
    columns = ("generation_ms", "peak_mb", "time_exponent", "memory_exponent")
    axes = {
        "tokens": (16, 64, 256, 1024),
        "iterations": (4, 16, 64),
        "images": (1, 2, 4, 8),
    }
    rounds = 3  # of which the first warms up
    verdict = (
        "From the fewest tokens to the most, time grows as their number to the power "
        "{0[tokens, fitted][time_exponent]} and memory to the power "
        "{0[tokens, fitted][memory_exponent]}.",
        "From 256 to 1024 tokens the exponents are {0[1024 tokens][time_exponent]} and "
        "{0[1024 tokens][memory_exponent]}.",
        "Time grows as the iterations to the power {0[iterations, fitted][time_exponent]}, and as "
        "the images to the power {0[images, fitted][time_exponent]}; memory as the images to the "
        "power {0[images, fitted][memory_exponent]}.",
    )
    picture = ("scaling.png", "time and peak memory of a generation, both axes logarithmic")

    def measure(self, lab, only=()):
        points = {
            f"{size} {axis}": self.point(axis, size)
            for axis, sizes in self.axes.items()
            for size in sizes
        }
        figures = lab.result("scaling", partial(self.figures, points, lab.device))
        shared = {name: figures[name] for name in ("hardware", "commit", "date", "threads")}
        shared["minutes"] = figures["minutes"] / len(points)
        rows = {}
        for axis, sizes in self.axes.items():
            seen = []
            for size in sizes:
                row = figures[f"{size} {axis}"]
                seen.append((size, row))
                rows[f"{size} {axis}"] = shared | row | exponents(seen[-2:])
            rows[f"{axis}, fitted"] = shared | {"minutes": 0.0} | exponents(seen)
        return rows

    def point(self, axis, size):
        """Settings and number of the images that are generated."""
        what = {"tokens": 256, "iterations": 16, "images": 1} | {axis: size}
        shape = {"image_size": 4 * int(what["tokens"] ** 0.5), "patch": 4, "scale": 1.0}
        shape["precision"] = "fp32"  # bfloat16 would be emulated
        small = replace(maskrl.preset("small"), steps=what["iterations"], **shape)
        return small, what["images"]

    def figures(self, points, device):
        calls = {name: generation_of(*point, device) for name, point in points.items()}
        seconds = maskrl.seconds_in_turns(calls, self.rounds, device)
        return {
            name: {
                "generation_ms": 1000 * maskrl.lower_median(seconds[name]),
                "peak_mb": peak_megabytes(*point, device),
            }
            for name, point in points.items()
        }

    def draw(self, rows, path):
        drawn = subplots(
            path, [f"{what} against {axis}" for what in ("ms", "MB") for axis in self.axes], 2
        )
        if not drawn:
            return
        axes, save = drawn
        keys = ("generation_ms", "peak_mb")
        for panel, (key, axis) in zip(axes, [(key, axis) for key in keys for axis in self.axes]):
            sizes = self.axes[axis]
            values = [median(rows[f"{size} {axis}"], key) for size in sizes]
            panel.loglog(sizes, values, "o-", label="measured")
            line = [values[-1] * size / sizes[-1] for size in sizes]
            panel.loglog(sizes, line, ":", color="grey", label="proportional")
            panel.set_xlabel(axis)
        save()


def exponents(points: list) -> dict[str, float]:
    """Slopes of log time and of log memory against log size, of [(size, figures), ...]."""
    if len(points) < 2:
        return {}
    sizes = numpy.log([size for size, _ in points])

    def slope(key):
        return float(numpy.polyfit(sizes, numpy.log([row[key] for _, row in points]), 1)[0])

    return {"time_exponent": slope("generation_ms"), "memory_exponent": slope("peak_mb")}


def generation_of(settings, images: int, device):
    """A function that generates with random weights."""
    model = maskrl.MAR(settings, ["a"], "student").to(device).eval()
    return partial(maskrl.generate, model, [0] * images)


def peak_megabytes(settings, images: int, device) -> float:
    """What a generation adds to the memory of a process of its own."""
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(added_megabytes, (settings, images, device))


def added_megabytes(settings, images, device) -> float:
    torch.set_num_threads(1)
    generate = generation_of(settings, images, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        generate()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak, VmHWM, starts anew
    before = status_megabytes("VmRSS")
    generate()
    return status_megabytes("VmHWM") - before


def status_megabytes(name: str) -> float:
    """An entry of Linux' account of this process."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s*(\d+) kB", text)[1]) * 1024 / 1e6


STUDIES = {
    study.name: study
    for study in (
        *(Story(), Distil(), Gsim(), Longer(), Rivals()),
        *(Variance(), Action(), Critical(), Schedule(), Temperature(), Cost(), Threads()),
        *(Emoji(), Eyes(), Letters(), OnLetters(), TrainSpeed(), Speed(), Bench(), Scaling()),
    )
}


# Results ------------------------------------------------------------------------------------------
# assets/results/NAME.json, and what is made of it: assets/results.md, a block of README.md.

FIGURES = {  # key -> title of the column, decimals (None: text)
    "frechet": ("Fréchet distance", 2),
    "weak": ("weak", 1),
    "strong": ("strong", 1),
    "accuracy": ("class accuracy", 3),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "diversity": ("diversity", 3),
    "nearest": ("nearest", 2),
    "quality": ("quality", 3),
    "gained": ("gained", 3),
    "drift": ("times the distance at the start", 2),
    "reward": ("reward", 3),
    "held_out": ("held-out reward", 3),
    "steps": ("iterations", 1),
    "image_ms": ("ms per image", 2),
    "lowest_ms": ("lowest", 2),
    "highest_ms": ("highest", 2),
    "best_ms": ("ms in the best batch", 2),
    "best_batch": ("batch", 0),
    "transformer": ("transformer, %", 0),
    "head": ("head, %", 0),
    "decoding": ("decoding, %", 0),
    "faster": ("times as fast", 2),
    "generation_ms": ("ms", 1),
    "peak_mb": ("peak memory, MB", 0),
    "time_exponent": ("exponent of time", 2),
    "memory_exponent": ("exponent of memory", 2),
    "ms": ("ms", 1),
    "train_minutes": ("minutes of training", 1),
    "kl": ("KL", 3),
    "not_first": ("not the first", 2),
    "tokens": ("tokens", 1),
    "seconds_per_update": ("s per update", 2),
    "graph_mb": ("graph, MB", 0),
    "seconds": ("seconds of RL", 0),
    "iterations": ("iterations", 1),
    "vector": ("counts", None),
    "margin": ("margin", 4),
    "margin_error": ("its error", 4),
    "total": ("variance, all steps", 4),
    "correlation": ("correlation", 2),
    "critical": ("critical", 2),
    "first": ("first", 2),
    "random": ("random", 2),
    "best": ("best", 2),
    "held_out_correlation": ("held-out: correlation", 2),
    "held_out_critical": ("critical", 2),
    "held_out_first": ("first", 2),
    "updates": ("updates/s", 2),
    "speedup": ("times as fast as plain", 2),
    "loader": ("loader, %", 1),
    "updates_idle": ("updates/s, idle", 1),
    "updates_busy": ("updates/s, beside a busy process", 1),
    "ms_idle": ("ms, idle", 1),
    "ms_busy": ("ms, beside a busy process", 1),
}
HEADER = """# Results

Made by `python tests/study.py` from `assets/results/*.json`; do not edit. `python tests/study.py
NAME` measures a study again. Figures are medians, with the range in brackets where there is more
than one seed; data, judge, weights and noise all differ between seeds.

*Fréchet distance*: FID's formula on the features of a classifier that nothing trains on, so that
only numbers of this table compare; *precision* and *recall* by 3 nearest neighbours; *diversity*
within classes and *nearest*, the distance to the nearest training image: 1 is as real held-out
images. *Quality*: by the reward network, which RL climbs; *held-out reward*: the exact fit to a
shape of the class, on which nothing trains. *ms per image*: in batches of 32.

The tables on GSIM and its rivals were measured with an earlier judge, which learned the classes
alone, and a reward network that knew fewer kinds of damage: compare within each table only. They
were not repeated under the judge of the others.
"""


def median(runs: dict, key: str) -> float:
    """The median of a figure over {seed: figures}; KeyError if there is none."""
    values = [figures[key] for figures in runs.values() if key in figures]
    if not values:
        raise KeyError(key)
    return statistics.median(values)


class Figures:
    """What a verdict may quote of rows {row name: {seed: figures}}, as text:

    {0[A][ms]}      the median, with the decimals of the table
    {0[A / B][ms]}  the ratio of the medians
    {0[A < B][ms]}  on how many seeds it is lower in A than in B; {0[A > B][ms]}: higher"""

    def __init__(self, rows: dict):
        self.rows = rows

    def __getitem__(self, name: str) -> dict[str, str]:
        for sign, compare in ((" / ", self.ratio), (" < ", self.lower), (" > ", self.higher)):
            if sign in name:
                a, b = name.split(sign)
                return self.each(compare, self.rows[a], self.rows[b])
        return self.each(self.single, self.rows[name])

    @staticmethod
    def each(function, *rows) -> dict[str, str]:
        """{figure: text}, of the figures that all of these rows have."""
        numbers = {key for key, (_, decimals) in FIGURES.items() if decimals is not None}
        common = numbers.intersection(*(run for runs in rows for run in runs.values()))
        return {key: function(key, *rows) for key in common}

    @staticmethod
    def single(key, runs):
        _, decimals = FIGURES[key]
        return f"{median(runs, key):.{decimals}f}"

    @staticmethod
    def ratio(key, a, b):
        below = median(b, key)
        return f"{median(a, key) / below:.1f}" if below else "many"

    @staticmethod
    def lower(key, a, b):
        seeds = a.keys() & b.keys()
        count = sum(a[seed][key] < b[seed][key] for seed in seeds)
        return f"{count} of {len(seeds)} seeds"

    @classmethod
    def higher(cls, key, a, b):
        return cls.lower(key, b, a)


def table(rows: dict, columns, with_seeds=True) -> str:
    """Markdown: median and range over the seeds of {row name: {seed: figures}}."""
    seeds = ["seeds"] if with_seeds else []
    titles = [*seeds, *(FIGURES[key][0] for key in columns)]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (1 + len(titles)) + "|"]
    for name, runs in rows.items():
        number = "one seed" if len(runs) == 1 else str(len(runs))
        cells = [name, *([number] if with_seeds else []), *(cell(runs, key) for key in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(runs: dict, key: str) -> str:
    values = [figures[key] for figures in runs.values() if key in figures]
    if not values:
        return ""
    _, decimals = FIGURES[key]
    if decimals is None:
        return "; ".join(values)
    text = f"{statistics.median(values):.{decimals}f}"
    if len(values) > 1:
        text += f" ({min(values):.{decimals}f}–{max(values):.{decimals}f})"
    return text


def result_file(name: str) -> Path:
    return ASSETS / "results" / f"{name}.json"


def save_result(study: Study, seed: int, measured: dict) -> dict:
    """Merge {row name: figures} of a seed into the study's JSON, and return all of its rows."""
    path = result_file(study.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text())[study.rows_key] if path.exists() else {}
    for name, figures in measured.items():
        if study.rows_key == "arms":
            figures = as_arm(figures)
        rows.setdefault(name, {})[str(seed)] = rounded(figures)
    runs = [figures for seeds in rows.values() for figures in seeds.values()]
    every_seed = sorted({int(seed) for seeds in rows.values() for seed in seeds})
    content = {
        "study": study.name,
        "command": f"python tests/study.py {study.name} --seeds {','.join(map(str, every_seed))}",
        **{key: distinct(runs, key) for key in ("commit", "hardware", "date")},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
        },
        "minutes": round(sum(run["minutes"] + run.get("train_minutes", 0) for run in runs), 1),
        "settings": study.settings,
        study.rows_key: rows,
    }
    path.write_text(as_lines(content) + "\n")
    return rows


def as_arm(figures: dict) -> dict:
    """Figures with `iterations` for `steps`, and the `seconds` that RL took, if there was any."""
    seconds = figures["curve"]["seconds"][-1] if "curve" in figures else 0.0
    return figures | {"iterations": figures["steps"], "seconds": seconds}


def distinct(runs, key) -> str:
    return "; ".join(sorted({run[key] for run in runs}))


def as_lines(content, depth=0) -> str:
    """JSON with the figures of a row and seed on one line."""
    if depth == 3 or not isinstance(content, dict):
        return json.dumps(content, ensure_ascii=False, allow_nan=False)
    space = " " * (depth + 1)
    lines = [f'{space}"{key}": {as_lines(value, depth + 1)}' for key, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


@contextmanager
def locked(out):
    """No other process that measures into `out` merges its results meanwhile."""
    with open(Path(out) / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_results() -> dict:
    """{study name: content} of every JSON that there is."""
    paths = {name: result_file(name) for name in STUDIES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def sentences(study: Study, rows: dict) -> str:
    """The verdict, figures filled in."""
    said = []
    for sentence in study.verdict:
        try:
            said.append(sentence.format(Figures(rows)))
        except KeyError:
            continue
    return " ".join(said)


def as_option(name: str, value) -> str:
    """A setting as one gives it on the command line."""
    flag = maskrl.flag(name)
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    return f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}"


def section(study: Study, content: dict) -> str:
    """A study in results.md."""
    rows, settings = content[study.rows_key], content["settings"]
    threads = {run.get("threads", 1) for runs in rows.values() for run in runs.values()}
    made = [
        f"`{content['command']}`",
        content["hardware"],
        "threads: " + ", ".join(map(str, sorted(threads))),
        f"torch {content['versions']['torch']}",
        f"commit {content['commit']}",
        content["date"],
        f"{content['minutes']:.0f} minutes",
    ]
    different = ", ".join(f"`{as_option(name, value)}`" for name, value in settings.items())
    parts = [f"## {study.title}", study.question, " · ".join(made)]
    parts += [f"Not as in the demo: {different}."] if different else []
    parts += [table(rows, study.columns), sentences(study, rows)]
    if study.picture and (ASSETS / study.picture[0]).exists():
        file, caption = study.picture
        parts.append(f"![{study.title}]({file})\n\n*{caption[0].upper()}{caption[1:]}.*")
    return "\n\n".join(part for part in parts if part)


def results_markdown() -> str:
    """All of results.md."""
    results = read_results()
    sections = [section(STUDIES[name], content) for name, content in results.items()]
    return "\n\n".join([HEADER.strip(), *sections]) + "\n"


def readme_table() -> str:
    """The README's one table of results; empty before the story is measured."""
    if "story" not in read_results():
        return ""
    rows = read_results()["story"]["rows"]
    shown = {name: rows[name] for name in README_ROWS if name in rows}
    return table(shown, README_COLUMNS, with_seeds=False)


# README.md ----------------------------------------------------------------------------------------

BEGIN, END = "<!-- results -->\n", "<!-- /results -->"
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w/]+\.py)#L(\d+)\)")


def line_of(name: str, file: str) -> int:
    """Number of the line that defines `name`: a function, class, constant or Class.method."""
    scope, line = parsed(ROOT / file), None
    for part in name.split("."):
        scope = next((node for node in scope.body if part in names_of(node)), None)
        if scope is None:
            raise maskrl.InputError(f"{file} defines no {name}")
        line = scope.lineno
    return line


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def names_of(node) -> list[str]:
    """What a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def renewed_link(match) -> str:
    name, file, _ = match.groups()
    return f"[`{name}`]({file}#L{line_of(name, file)})"


def with_table(readme: str) -> str:
    """README.md with the table of results as the JSON gives it."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    block = readme_table()
    return before + BEGIN + block + "\n" * bool(block) + END + after


def with_links(readme: str) -> str:
    """README.md with the line numbers of its links as they now are."""
    return LINK.sub(renewed_link, readme)


def render():
    (ASSETS / "results.md").write_text(results_markdown())
    README.write_text(with_links(with_table(README.read_text())))
    print(f"{ASSETS / 'results.md'}, and table and links of {README}")


# Command line -------------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(
        usage="%(prog)s [STUDY...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    add("--seeds", help="comma-separated (default: those of the study, 0 or 0,1,2)")
    add("--out", type=Path, default=Path("runs/study"), help="default: %(default)s")
    add("--only", nargs="+", default=[], metavar="ROW", help="beginnings of row names")
    maskrl.add_device(parser)
    args = parser.parse_args(argv)
    for name in args.studies:
        if name not in STUDIES:
            parser.error(f"there is no study {name}; there are {', '.join(STUDIES)}")
    return args


def main(argv=None):
    args = parse(argv)
    if not args.studies:
        render()
        return
    device = maskrl.find_device(args.device, args.threads)
    labs = {}
    for name in args.studies:
        study = STUDIES[name]
        for seed in map(int, (args.seeds or study.seeds).split(",")):
            if seed not in labs:
                labs[seed] = Lab(args.out, seed, device)
            measured = study.measure(labs[seed], tuple(args.only))
            if not measured:
                raise maskrl.InputError(f"--only {' '.join(args.only)}: no row of {name}")
            with locked(args.out):
                rows = save_result(study, seed, measured)
                study.draw(rows, ASSETS / f"{name}.png")
        print(f"\n{study.title}\n\n{table(rows, study.columns)}\n\n{sentences(study, rows)}")


if __name__ == "__main__":
    maskrl.run(main)
