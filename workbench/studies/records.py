"""assets/results/NAME.json: the figures of a study by row and seed, and where they come from."""

import json
import platform
import subprocess
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision

from workbench.report import hardware

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets"


def provenance(device) -> dict:
    """Where and when a row was measured, and by which code."""
    return {
        "threads": torch.get_num_threads(),
        "hardware": hardware(device),
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def commit() -> str:
    """The checkout's short hash, with a + if a Python file differs from it."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    head = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changed = git(["git", "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    return head + "+" * bool(changed)


def rounded(value) -> Any:
    """The same JSON with six decimals."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 6) if isinstance(value, float) else value


def result_file(name: str) -> Path:
    return ASSETS / "results" / f"{name}.json"


def read_result(name: str) -> dict | None:
    """The content of a study's JSON; None if it is not measured."""
    path = result_file(name)
    return json.loads(path.read_text()) if path.exists() else None


def save_result(study, seed: int, measured: dict) -> dict:
    """Merge {row name: figures} of a seed into the study's JSON, and return all of its rows."""
    path, earlier = result_file(study.name), read_result(study.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = earlier["rows"] if earlier else {}
    for name, figures in measured.items():
        rows.setdefault(name, {})[str(seed)] = rounded(figures)
    runs = [figures for seeds in rows.values() for figures in seeds.values()]
    content = {
        "study": study.name,
        "command": command(study.name, rows),
        **{key: distinct(runs, key) for key in ("commit", "hardware", "date")},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
        },
        "minutes": round(sum(run["minutes"] + run.get("train_minutes", 0) for run in runs), 1),
        "settings": study.settings,
        "rows": rows,
    }
    path.write_text(as_lines(content) + "\n")
    return rows


def command(name: str, rows: dict) -> str:
    """What measures these rows."""
    seeds = sorted({int(seed) for runs in rows.values() for seed in runs})
    return f"python -m workbench.studies {name} --seeds {','.join(map(str, seeds))}"


def distinct(runs: list, key: str) -> str:
    return "; ".join(sorted({run[key] for run in runs}))


def as_lines(content, depth=0) -> str:
    """JSON with the figures of a row and seed on one line."""
    if depth == 3 or not isinstance(content, dict):
        return json.dumps(content, ensure_ascii=False, allow_nan=False)
    space = " " * (depth + 1)
    lines = [f'{space}"{key}": {as_lines(value, depth + 1)}' for key, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"
