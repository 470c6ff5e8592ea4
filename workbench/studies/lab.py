"""One seed's data, networks and models, for all studies."""

import json
import statistics
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

import train_rl
from maskrl import MAR, PolicyGradient, Sampling, to_tokens, total_reward
from train_distill import make_judge, make_reward_net, train_student, train_teacher
from train_rl import train_policy
from workbench.data import load_data
from workbench.errors import InputError
from workbench.judge import Judge
from workbench.monitors import RLMonitor
from workbench.quality_net import QualityNet
from workbench.report import generate_many, nearest
from workbench.rewards import CheckedReward, ShapeFit, calibrate, make_reward, student_images
from workbench.run import Run, read_log
from workbench.settings import preset
from workbench.studies.records import provenance, rounded
from workbench.timing import clock


class Lab:
    """One seed of the demo: data, networks and models, each made when it is first asked for.

    The folder out/seed<n> is laid out like the --out of train_rl.py; what exists there is not made
    again. overrides: settings that differ from the preset `tiny`."""

    def __init__(self, out, seed: int, device, **overrides):
        self.out, self.seed, self.device = Path(out) / f"seed{seed}", seed, device
        settings = preset("tiny", seed=seed, **overrides)
        self.data = load_data(settings)
        self.settings = self.data.measure(settings)
        self.check_settings()

    def check_settings(self) -> None:
        """InputError if the folder holds what other settings made."""
        path, settings = self.out / "settings.json", asdict(self.settings)
        if path.exists() and json.loads(path.read_text()) != settings:
            raise InputError(f"{self.out} was measured with other settings: give another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))

    def run(self, folder=".", **overrides) -> Run:
        """A run in a folder of the lab, with some settings replaced; it continues what exists."""
        out = self.out / folder
        out.mkdir(parents=True, exist_ok=True)
        args = train_rl.parse(["--out", str(out), "--resume"])
        return Run(args, replace(self.settings, **overrides), self.data, self.device)

    # networks and models

    @cached_property
    def reward_net(self) -> QualityNet:
        return make_reward_net(self.run())

    @cached_property
    def quality(self) -> CheckedReward:
        """The reward, by the reward network."""
        calibrate(self.reward_net, *student_images(self.student, self.data))
        return make_reward("embedded", self.settings, self.data, self.device, self.reward_net)

    @cached_property
    def held_out(self) -> ShapeFit:
        """The reward that nothing is trained on."""
        return ShapeFit(self.settings.image_size, self.device)

    @cached_property
    def judge(self) -> Judge:
        return make_judge(self.run())

    @cached_property
    def untrained(self) -> MAR:
        torch.manual_seed(self.seed + 1)
        return MAR(self.settings, self.data.classes, "student").to(self.device)

    @cached_property
    def teacher(self) -> MAR:
        return train_teacher(self.run())

    @cached_property
    def student(self) -> MAR:
        return train_student(self.run(), self.teacher, self.reward_net)

    @cached_property
    def policy(self) -> MAR:
        return self.reinforced(self.run()).model

    def reinforced(self, run: Run) -> PolicyGradient:
        """RL on the student, in a folder of its own."""
        return train_policy(run, self.student_with(run.settings), self.quality, self.monitor(run))

    def monitor(self, run: Run) -> RLMonitor:
        return RLMonitor(run.settings, self.quality, self.held_out, self.judge)

    def student_with(self, settings) -> MAR:
        student = deepcopy(self.student)
        student.settings = settings
        return student

    def rl_training(self, **overrides) -> tuple[PolicyGradient, Tensor]:
        """A PolicyGradient or RewardBackpropagation at its start, and labels for an update."""
        settings = replace(self.settings, **overrides)
        method = train_rl.METHODS[settings.method]
        mean_image = to_tokens(self.data.learned.spaced().mean(0, keepdim=True), settings)
        student, mean_image = self.student_with(settings), mean_image.to(self.device)
        training = method(student, settings, self.quality, mean_image)
        labels = torch.arange(settings.prompts, device=self.device) % len(self.data.classes)
        return training, labels

    def train_minutes(self, stage: str) -> float:
        """Minutes that the updates of teacher, student or policy took."""
        seconds = [line["seconds"] for line in read_log(self.out) if line["stage"] == stage]
        return seconds[-1] / 60

    def evenly(self, n: int) -> Tensor:
        """n of the judge's labels, classes in their proportions."""
        labels = self.judge.labels
        return labels[torch.linspace(0, len(labels) - 1, n).long()]

    # rows of tables

    def result(self, key: str, measure) -> dict:
        """The figures called `key`: from their file, or else from measure()."""
        path = self.path(key)
        if not path.exists():
            start = clock(self.device)
            figures = measure() | {"minutes": (clock(self.device) - start) / 60}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rounded(figures | provenance(self.device))))
        return json.loads(path.read_text())

    def path(self, key: str) -> Path:
        return self.out / "rows" / f"{key}.json"

    def judged(self, kind: str, **sampling) -> dict:
        """The row of the teacher, student, policy or untrained model; sampling: of Sampling."""
        key = ", ".join([kind, *(f"{name} {value}" for name, value in sampling.items())])
        if not self.path(key).exists():
            getattr(self, kind)  # if it is trained here, that is not counted as the row's minutes
        return self.result(key, partial(self.judge_kind, kind, sampling))

    def judge_kind(self, kind: str, sampling: dict) -> dict:
        return self.judge_model(getattr(self, kind), Sampling(**sampling))

    def judge_model(self, model: MAR, sampling: Sampling | None = None) -> dict:
        """All figures of the model, without exploration, as in the report of the scripts."""
        sampling = sampling or Sampling()
        labels, seed = self.judge.labels, self.settings.seed
        images, steps = generate_many(model, labels, sampling, seed, model.kind)
        quality = self.rewards(self.quality, images)
        figures = {
            **self.judge(images),
            "nearest": self.distance_to_training(images) / self.distance_to_training(),
            "quality": float(quality.mean()),
            "held_out": float(self.rewards(self.held_out, images).mean()),
            "steps": float(steps.float().mean()),
            "steps_std": float(steps.float().std()),
        }
        if steps.max() <= model.settings.steps:  # beyond them speed is not defined
            reward = total_reward(quality, steps.cpu(), model.settings)
            figures["reward"] = float(reward.mean())
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
    def rewards(self, reward, images) -> Tensor:
        """The reward of images [n, 3, S, S] of the judge's labels: [n], on the CPU."""
        pairs = zip(images.split(500), self.judge.labels.split(500))
        return torch.cat([reward(x.to(self.device), labels).cpu() for x, labels in pairs])

    def distance_to_training(self, images=None) -> float:
        """Median distance to the nearest training image, of images [n, ...] or of real ones."""
        images = self.judge.real_images if images is None else images
        sample = images[:: max(1, len(images) // 500)]  # of every class, as in the report
        return float(nearest(sample, self.data)[1].median())

    def reinforcement(self, name: str, **overrides) -> dict:
        """The row of RL with some settings replaced."""
        return self.result(f"RL, {name}", partial(self.reinforce, name, overrides))

    def reinforce(self, name: str, overrides: dict) -> dict:
        run = self.run(f"RL/{name}", **overrides)
        training = self.reinforced(run)
        start = {"step": -1, "seconds": 0.0} | self.monitor(run)(training.reference)
        return self.judge_model(training.model) | rl_log(run.out, start)


MONITORED = ("quality_mean", "held_out", "judge")


def rl_log(out, start: dict) -> dict:
    """What log.jsonl tells of RL: `curve`, what RLMonitor saw, and figures of the updates."""
    lines = [line for line in read_log(out) if line["stage"] == "policy"]
    monitored = {line["step"]: line for line in [start, *lines] if "judge" in line}
    updates = {line["step"]: line for line in lines if "kl" in line}
    curve = {key: [line[key] for line in monitored.values()] for key in ("seconds", *MONITORED)}
    curve["updates"] = [step + 1 for step in monitored]
    curve["kl_updates"] = [step + 1 for step in updates]
    curve["kl"] = [line["kl"] for line in updates.values()]
    figures = {"curve": curve, "kl": curve["kl"][-1], "seconds": curve["seconds"][-1]}
    for key in ("frac_not_prefix", "clip_fraction"):
        values = [line[key] for line in updates.values() if key in line]
        figures |= {key: statistics.mean(values)} if values else {}
    return figures
