"""The command that measures a GPU, tried without one: who has one may have it for minutes."""

import json
import subprocess

import pytest
import torch
from conftest import error_of
from helpers_child import no_matplotlib
from helpers_pretend_device import HAS_GPU, pretend_gpu

from workbench import pictures
from workbench.studies import gpu, gpu_parts, records, tables

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Results lie in a folder of the test."""
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "tutorial").symlink_to(records.ASSETS / "tutorial")
    monkeypatch.setattr(records, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr(pictures, "figure_class", no_matplotlib)


def command(out, device, seconds):
    gpu.main(["--device", device, "--seconds", str(seconds), "--threads", "1", "--out", str(out)])


@pytest.mark.skipif(HAS_GPU, reason="there is one")
def test_a_machine_without_a_gpu_says_so_in_one_line(tmp_path, capsys):
    assert "no CUDA GPU here" in error_of(gpu.main, ["--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_measures_every_part_and_writes_no_result(tmp_path, capsys):
    command(tmp_path / "out", "cpu", 1)
    content = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert content.keys() == gpu_parts.PARTS.keys()
    rows = [row for part in content.values() for row in part.values()]
    assert not [row for row in rows if "error" in row]
    assert content["updates"]["tiny, teacher"]["per_second"] > 0
    assert content["agreement"]["student of the tutorial"] == {"context": 0, "one step": 0}
    assert content["precision"]["bf16"]["difference"] > content["precision"]["fp32"]["difference"]
    assert content["shapes"]["policy"]["frechet"] > 0
    assert "| teacher |" in capsys.readouterr().out
    assert not records.result_file("gpu").exists() and tables.BLOCKS["GPU"]() == ""


@pytest.mark.skipif(HAS_GPU, reason="the real one is measured by the command")
def test_on_a_gpu_the_result_is_written_and_makes_a_table(tmp_path, monkeypatch):
    """On the pretend one, of tiny models."""
    monkeypatch.setattr(gpu, "measure_apart", gpu.measure)
    dry = dict.fromkeys(gpu_parts.SIZES, gpu_parts.DRY)
    monkeypatch.setattr(gpu_parts, "SIZES", dry)
    monkeypatch.setattr(gpu_parts, "on_the_gpu", no_counts)
    parts = ["about", "agreement", "updates", "images", "precision"]
    argv = ["--device", "cuda", "--seconds", "6", "--threads", "1", "--out", str(tmp_path / "out")]
    with pretend_gpu():
        gpu.main([*argv, "--parts", *parts])
    content = json.loads(records.result_file("gpu").read_text())
    assert list(content) == parts and content["about"]["about"]["capability"] == "8.0"
    rows = {f"{part}, {name}": row for part in content for name, row in content[part].items()}
    assert not {name: row["error"] for name, row in rows.items() if "error" in row}
    assert content["updates"]["tiny, teacher"]["peak_gb"] == 0
    assert tables.BLOCKS["GPU"]().startswith("a pretend GPU")


def no_counts(call, device):
    return {}


def test_an_error_of_a_part_becomes_a_row(tmp_path, monkeypatch):
    def broken(meter):
        meter.keep("before", {"per_second": 1.0})
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setitem(gpu_parts.PARTS, "images", (broken, 1.0))
    gpu.measure("images", CPU, 1.0, tmp_path)
    rows = json.loads((tmp_path / "images.json").read_text())
    expected = {"error": "RuntimeError: CUDA error: an illegal memory access"}
    assert rows == {"before": {"per_second": 1.0}, "the rest": expected}


def test_a_part_whose_time_is_over_ends_and_the_next_one_begins(tmp_path, monkeypatch, capsys):
    limits = []

    def ended(command, timeout, **_):
        limits.append(timeout)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu.subprocess, "run", ended)
    with pretend_gpu():
        command(tmp_path, "cuda", 540)
    assert len(limits) == len(gpu_parts.PARTS) and limits[-1] == pytest.approx(540, abs=5)
    shares = [share for _, share in gpu_parts.PARTS.values()]
    assert sum(shares) == pytest.approx(1) and limits[0] == pytest.approx(540 * shares[0], abs=1)
    assert capsys.readouterr().out.count("its time is over") == len(limits)


def test_without_time_rows_are_left_out(tmp_path):
    meter = gpu_parts.Meter(torch.device("cuda"), 0.0, tmp_path / "rows.json")
    meter.measure({"late": pytest.fail})
    assert meter.rows == {"late": {"skipped": "no time left"}}
