"""Every study runs from nothing to its JSON, table and picture, on a model that learns nothing."""

from functools import partial

import pytest
import torch
from conftest import SHORT, tiny

import train_distill
from workbench import bench
from workbench.data import draw_shapes, to_unit
from workbench.monitors import ValidationMetric
from workbench.pictures import write_files
from workbench.studies import folders, lab, records, study, tables
from workbench.studies.__main__ import main
from workbench.studies.action import Action
from workbench.studies.cost import Cost
from workbench.studies.critical import Critical
from workbench.studies.gsim import Gsim
from workbench.studies.schedule import Schedule
from workbench.studies.speed import Bench, Speed
from workbench.studies.variance import Variance

PROVENANCE = {
    *("study", "command", "commit", "hardware", "date", "versions", "minutes", "settings"),
}


def tiny_preset(name, seed=0, **overrides):
    return tiny(seed=seed, **{"scale": 0.0} | overrides)


def make_folder(folder):
    """20 images of each of three classes."""
    for y, name in enumerate("abc"):
        images = draw_shapes(torch.full((20,), y), 8, torch.Generator().manual_seed(y))
        write_files(folder / name, to_unit(images), [name] * 20)


def cut_short(patch, folder):
    """The command, with everything cut short, writing into one folder."""
    patch.setattr(lab, "preset", tiny_preset)
    patch.setattr(bench, "preset", tiny_preset)
    patch.setattr(records, "ASSETS", folder / "assets")
    patch.setattr(study, "time_in_turns", partial(study.time_in_turns, rounds=2))
    patch.setattr(train_distill, "ValidationMetric", partial(ValidationMetric, n=32))
    patch.setattr(Gsim, "settings", {"gsim_iters": 2})
    patch.setattr(Action, "settings", Action.settings | {"rl_iters": 2})
    patch.setattr(Critical, "settings", Critical.settings | {"rl_iters": 2})
    patch.setattr(Critical, "lab_settings", {"teacher_iters": 3})
    patch.setattr(Critical, "more_steps", ())
    patch.setattr(Critical, "how", ("critical", "all"))
    patch.setattr(Variance, "trajectories", 4)
    patch.setattr(Variance, "draws", 2)
    patch.setattr(Schedule, "searched", 9)
    patch.setattr(Schedule, "lengths", (3,))
    patch.setattr(Cost, "rounds", 2)
    patch.setattr(Speed, "settings", {"teacher_iters": 3, "gsim_iters": 2})
    patch.setattr(Speed, "iterations", (16,))
    patch.setattr(Speed, "random_steps", 8)
    patch.setattr(Speed, "sizes", {"small": 2})
    patch.setattr(Bench, "batches", (1, 2))
    patch.setattr(Bench, "rounds", 2)
    patch.setattr(Bench, "random_steps", 8)
    patch.setattr(Bench, "size", "small")
    patch.setattr(folders, "FOLDERS", folder / "folders")
    for each in (folders.Emoji, folders.Letters):
        patch.setattr(each, "options", SHORT)
    return partial(run, folder / "out")


def run(out, *argv):
    main([*argv, "--out", str(out), "--device", "cpu", "--threads", "1"])


@pytest.fixture
def small(monkeypatch, tmp_path):
    return cut_short(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder in which every study was measured, seed 0."""
    folder = tmp_path_factory.mktemp("measured")
    for name in ("emoji", "letters"):
        make_folder(folder / "folders" / name)
    with pytest.MonkeyPatch.context() as patch:
        cut_short(patch, folder)(*tables.STUDIES, "--seeds", "0")
    return folder


@pytest.fixture
def results(monkeypatch, measured):
    """The same folder, where results are read from."""
    cut_short(monkeypatch, measured)
    return measured


@pytest.mark.parametrize("name", tables.STUDIES)
def test_every_study_runs_from_nothing(results, name):
    study, content = tables.STUDIES[name], records.read_result(name)
    assert content.keys() == PROVENANCE | {"rows"}
    rows = content["rows"]
    assert content["versions"].keys() == {"python", "torch", "torchvision", "numpy"}
    for row, runs in rows.items():
        assert {"minutes", "threads"} <= runs["0"].keys(), row
    figures = {key for runs in rows.values() for key in runs["0"]}
    assert set(study.columns) <= figures
    text = tables.section(study, content)
    assert content["command"] == f"python -m workbench.studies {name} --seeds 0"
    assert content["command"] in text and study.title in text
    assert len(tables.sentences(study, rows)) > 60
    if study.picture:
        assert (records.ASSETS / study.picture[0]).stat().st_size > 3000
        assert f"]({study.picture[0]})" in text
