"""What all studies have in common: rows to measure, columns to show, sentences, a picture."""

import statistics
from functools import partial

from maskrl import Sampling
from workbench.pictures import figure_class, save_figure
from workbench.studies.lab import MONITORED, Lab
from workbench.timing import time_in_turns


class Study:
    """A table: rows to measure, columns to show, and sentences that quote them.

    verdict: each sentence is formatted with {0[row][figure]}; see tables.Figures. A sentence that
    quotes rows which are not measured is left out. note: a paragraph without such figures."""

    title = question = note = ""
    seeds = "0"
    settings: dict = {}  # those of all rows that differ from the preset tiny
    columns: tuple = ()
    verdict: tuple = ()
    picture = None  # a file in assets/, with its caption

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def rows(self, lab: Lab) -> dict:
        """{row name: function that returns its figures}."""
        return {}

    def measure(self, lab: Lab, only=()) -> dict:
        """{row name: figures} of one seed; only: beginnings of row names."""
        rows = self.rows(lab).items()
        return {name: measure() for name, measure in rows if not only or name.startswith(only)}

    def draw(self, rows: dict, path) -> None:
        """The picture of {row name: {seed: figures}}."""


class Generators(Study):
    """A study of trained models: arms {row name: (kind, Sampling's arguments)}, timed in turns."""

    arms: dict = {}

    def rows(self, lab) -> dict:
        return {
            name: partial(lab.judged, kind, **sampling)
            for name, (kind, sampling) in self.arms.items()
        }

    def measure(self, lab, only=()) -> dict:
        rows = super().measure(lab, only)
        timed = [name for name in rows if name in self.arms]
        key = f"ms, {self.name}, {len(timed)} arms"
        times = lab.result(key, partial(self.milliseconds, lab, timed))
        for name in timed:
            rows[name]["image_ms"] = times[name]
        return rows

    def milliseconds(self, lab, names) -> dict:
        arms = {}
        for name in names:
            kind, sampling = self.arms[name]
            arms[name] = (getattr(lab, kind), Sampling(**sampling))
        times = time_in_turns(arms, lab.evenly(32))
        return {name: 1000 * seconds for name, seconds in times.items()}


class Reinforcements(Study):
    """A study of RL runs, whose course it draws: changes since the start, which differs between
    seeds."""

    titles = dict(zip(MONITORED, ("Δ trained reward", "Δ held-out reward", "Δ Fréchet distance")))

    def draw(self, rows, path) -> None:
        trained = {
            name: [run["curve"] for run in runs.values()]
            for name, runs in rows.items()
            if all("curve" in run for run in runs.values())
        }
        figure, axes = subplots(self.titles.values())
        if not figure:
            return
        for axis, key in zip(axes, self.titles):
            for name, curves in trained.items():
                values = [[v - curve[key][0] for v in curve[key]] for curve in curves]
                plot_range(axis, curves[0]["updates"], values, name)
            axis.set_xlabel("updates")
        axes[0].legend(fontsize=7)
        save_figure(path, figure)


def subplots(titles) -> tuple:
    """A figure with titled panels, and these panels; (None, []) without matplotlib."""
    new_figure, n = figure_class(), len(titles)
    if not new_figure:
        return None, []
    figure = new_figure(figsize=(3.6 * n, 3), layout="constrained")
    axes = figure.subplots(1, n, squeeze=False)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    return figure, list(axes[0])


def plot_range(axis, x, curves: list, label: str) -> None:
    """The mean of the seeds' curves over x, and their range."""
    of_point = list(zip(*curves))
    axis.plot(x, [statistics.mean(v) for v in of_point], ".-", linewidth=1, label=label)
    axis.fill_between(x, [min(v) for v in of_point], [max(v) for v in of_point], alpha=0.12)
