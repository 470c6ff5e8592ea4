"""Seconds, read when a GPU has done what it was asked, and of several calls in turns."""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from maskrl import MAR, Sampling, generate


def clock(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Seconds `spent` in each of some parts of a program, read by `clock`."""

    def __init__(self, device: torch.device):
        self.device, self.spent, self.started = device, Counter(), {}

    def start(self, part: str, *_) -> None:
        """Also a hook that runs before a module."""
        self.started[part] = clock(self.device)

    def stop(self, part: str, *_) -> None:
        """Also a hook that runs after a module."""
        self.spent[part] += clock(self.device) - self.started[part]

    def call(self, part: str, function: Callable, *inputs) -> None:
        """function(*inputs), as that part."""
        self.start(part)
        function(*inputs)
        self.stop(part)


def seconds_in_turns(
    calls: dict[str, Callable], rounds: int, device, title: str = "timing"
) -> dict[str, list[float]]:
    """Seconds of every call {name: function} in all rounds but the first, which warms up.

    The calls take turns, so that a busy moment of the machine slows all of them. title: what the
    progress bar says."""
    seconds = {name: [] for name in calls}
    with tqdm(total=rounds * len(calls), desc=title, leave=False) as bar:
        for _ in range(rounds):
            for name, call in calls.items():
                start = clock(device)
                call()
                seconds[name].append(clock(device) - start)
                bar.update()
    return {name: times[1:] for name, times in seconds.items()}


def lower_median(numbers: list[float]) -> float:
    """The middle one in size; of an even count the lower of the middle two."""
    return sorted(numbers)[(len(numbers) - 1) // 2]


def time_in_turns(
    arms: dict[str, tuple[MAR, Sampling]], labels: Tensor, rounds: int = 4
) -> dict[str, float]:
    """Median seconds per image of every arm {name: (model, Sampling)}, for images of `labels`."""
    calls = {
        name: partial(generate, model, labels, sampling) for name, (model, sampling) in arms.items()
    }
    times = seconds_in_turns(calls, rounds, labels.device)
    return {name: lower_median(seconds) / len(labels) for name, seconds in times.items()}
