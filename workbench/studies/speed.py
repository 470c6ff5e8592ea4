"""Attention caching, and which idea makes an image how much faster."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from unittest import mock

import torch

from maskrl import Sampling, generate
from workbench import bench, timing
from workbench.lazymar import LazyContexts
from workbench.report import generate_many
from workbench.studies import records
from workbench.studies.lab import Lab
from workbench.studies.study import Study


@contextmanager
def seconds_of_one_core(device) -> Iterator[None]:
    """On one CPU thread the clock of the bench counts what this process has of the core, so that
    other work of the machine is not counted; elsewhere it counts all seconds."""
    if device.type != "cpu" or torch.get_num_threads() > 1:
        yield
        return
    with mock.patch.object(timing, "clock", process_seconds):
        with mock.patch.object(bench, "clock", process_seconds):
            yield


def process_seconds(device) -> float:
    return time.process_time()


def refreshed(every: int) -> Callable | None:
    """Sampling's contexts with a refresh in every so many iterations; 1: without a cache."""
    return None if every == 1 else partial(LazyContexts, every=every)


class Speed(Study):
    title = "Attention caching (LazyMAR)"
    question = (
        "Between refreshes, in every Nth iteration and the first few, only the tokens just "
        "revealed and those about to be are computed; a refresh of 1 is exact. *Quality*: students "
        "of 64 tokens in K iterations. *Speed*: random weights of the sizes of `small` and MAR-B "
        "in float32, 256 tokens, 64 iterations, one image at a time, in milliseconds of one core."
    )
    seeds = "0,1,2"
    settings = {"patch": 2, "teacher_iters": 2000}
    columns = ("frechet", "precision", "recall", "image_ms")
    iterations, kept = (16, 32, 64), (1, 4, 8)  # of the students
    refreshes = (1, 4, 8, 16)  # of the random weights
    sizes = {"small": 4, "mar_b": 2}  # and rounds, of which the first warms up; of seed 0
    random_steps = 64
    verdict = (
        "At a refresh in every 4th, 8th and 16th iteration an image by the size of MAR-B is "
        "{0[mar_b, refresh 1 / mar_b, refresh 4][image_ms]}, "
        "{0[mar_b, refresh 1 / mar_b, refresh 8][image_ms]} and "
        "{0[mar_b, refresh 1 / mar_b, refresh 16][image_ms]} times as fast. The fewer tokens an "
        "iteration reveals, the less it costs in distance.",
    )

    def measure(self, lab, only=()) -> dict:
        small_tokens = Lab(lab.out.parent / "speed", lab.seed, lab.device, **self.settings)
        rows = {}
        for K, n in product(self.iterations, self.kept):
            row = f"student, K = {K}, refresh {n}"
            if not only or row.startswith(only):
                rows[row] = small_tokens.result(row, partial(self.judge, small_tokens, K, n))
        for size, rounds in self.sizes.items():
            if lab.seed == 0 and (not only or size.startswith(only)):
                times = lab.result(f"speed, {size}", partial(self.times, size, rounds, lab.device))
                milliseconds = times.pop("milliseconds")
                times["minutes"] /= len(milliseconds)
                for n, ms in milliseconds.items():
                    rows[f"{size}, refresh {n}"] = times | {"image_ms": ms}
        return rows

    @staticmethod
    def judge(lab, K, n) -> dict:
        sampling = Sampling(K, contexts=refreshed(n))
        images, steps = generate_many(lab.student, lab.judge.labels, sampling, lab.seed, "student")
        return {**lab.judge(images), "steps": float(steps.float().mean())}

    def times(self, size, rounds, device) -> dict:
        """{"milliseconds": {refresh: per image}} of random weights."""
        models, _ = bench.random_models(size, device, vae=None)
        calls = {}
        for n in self.refreshes:
            sampling = Sampling(self.random_steps, contexts=refreshed(n))
            calls[n] = partial(generate, models["student"], [0], sampling)
        with seconds_of_one_core(device):
            seconds = timing.seconds_in_turns(calls, rounds, device)
        return {"milliseconds": {n: 1000 * timing.lower_median(s) for n, s in seconds.items()}}


class Bench(Study):
    title = "Which idea makes an image how much faster"
    question = (
        "`sample.py --bench`, in milliseconds of one core: one image at a time, and the best of "
        "the batches of 1, 8 and 32. *demo*: the checkpoints of `make demo` or, if there are none "
        "in --out, those of the tutorial. *mar_b*: random weights of MAR-B's size, 256 tokens, 64 "
        "iterations, before the autoencoder, timed once (here the teachers in every 16th iteration "
        "alone). *Times as fast*: as the teacher of 100 steps; of a factor: what it does alone."
    )
    columns = (
        *("image_ms", "best_ms", "best_batch", "steps", "transformer", "head", "faster"),
        "frechet",
    )
    batches, rounds = (1, 8, 32), 5
    steps, random_steps = None, 64  # of demo: the checkpoints'
    size = "mar_b"
    verdict = (
        "The factors do not simply multiply: behind a cache, whose contexts are those of the "
        "iteration before, the demo's policy takes {0[demo, all together][steps]} iterations "
        "instead of {0[demo, student + schedule][steps]}, and the first three iterations compute "
        "everything.",
    )

    def measure(self, lab, only=()) -> dict:
        rows = {}
        for key, measure in (("demo", self.demo), (self.size, self.random)):
            if not only or key.startswith(only):
                with seconds_of_one_core(lab.device):
                    result = lab.result(f"bench, {key}", partial(measure, lab))
                figures = result.pop("rows")
                result["minutes"] /= len(figures)
                rows |= {f"{key}, {name}": result | row for name, row in figures.items()}
        return rows

    def demo(self, lab) -> dict:
        """The bench of the checkpoints in the lab's folder, or of the tutorial's."""
        folder = lab.out if (lab.out / "policy.pt").exists() else records.ASSETS / "tutorial"
        models, decode = bench.bench_models(folder / "teacher.pt", lab.device, vae=None)
        measured = bench.bench(models, decode, lab.judge, self.steps, self.batches, self.rounds)
        return bench_rows(measured)

    def random(self, lab) -> dict:
        """The same of random weights, one image at a time; the first of two rounds warms up."""
        models, _ = bench.random_models(self.size, lab.device, vae=None)
        return bench_rows(bench.bench(models, steps=self.random_steps, batches=(1,), rounds=2))


def bench_rows(result: dict) -> dict:
    """{"rows": {arm or factor: figures}} of what bench.bench returns, one image at a time."""
    rows, slowest = {}, result["rows"]["teacher, 100 steps"]["seconds"][1][1]
    for name, row in result["rows"].items():
        medians = {batch: seconds[1] for batch, seconds in row["seconds"].items()}
        best = min(medians, key=medians.get)
        rows[name] = {
            "image_ms": 1000 * medians[1],
            "best_ms": 1000 * medians[best],
            "best_batch": best,
            "steps": row["steps"],
            "faster": slowest / medians[1],
            **{part: 100 * share for part, share in row["shares"].items()},
            **({"frechet": row["frechet"]} if "frechet" in row else {}),
        }
    for name in ("one step", "cache", "schedule", "product"):
        rows[f"factor: {name}"] = {"faster": result["factors"][name]}
    return {"rows": rows}
