"""A CUDA GPU measured with one command, in at most nine minutes, into assets/results/gpu.json.

    python -m workbench.studies.gpu
    python -m workbench.studies.gpu --parts compiled --seconds 120   # one part again
    python -m workbench.studies.gpu --device cpu --seconds 20        # a dry run, of tiny models

Every part is a process of its own, which is ended when its time is over: what it has measured until
then is kept, and an error, which is kept as text, does not reach the others. A dry run does
everything in one process, and writes into --out alone.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from workbench.errors import InputError, run_script
from workbench.files import as_json, write_text
from workbench.options import add_device, find_device
from workbench.studies import records
from workbench.studies.gpu_parts import ARMS, BATCHES, PARTS, SIZES, STAGES, Meter

START_UP = 15.0  # seconds, at most, until a process measures


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m workbench.studies.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seconds", type=float, default=540.0, help="for all parts (default: 540)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--out", type=Path, default=Path("runs/gpu"), help="default: %(default)s")
    add("--here", action="store_true", help="in this process, and without a summary")
    add_device(parser)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args, began = parse(argv), time.monotonic()
    device = find_device(args.device, args.threads)
    if device.type != "cuda" and args.device != "cpu":
        raise InputError("no CUDA GPU here: --device cpu --seconds 20 tries the script without one")
    args.out.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(args.parts):
        left = args.seconds - (time.monotonic() - began)
        later = sum(PARTS[other][1] for other in args.parts[i + 1 :])
        seconds = left * PARTS[name][1] / (PARTS[name][1] + later)
        if args.here or device.type == "cpu":
            measure(name, device, seconds, args.out)
        else:
            measure_apart(name, device, seconds, args.out)
    if not args.here:
        report(args.out, device)


def measure(name: str, device: torch.device, seconds: float, out: Path) -> None:
    """One part, in this process; an error becomes a row."""
    meter = Meter(device, seconds, out / f"{name}.json")
    try:
        PARTS[name][0](meter)
    except Exception as error:
        meter.keep_error("the rest", error)


def measure_apart(name: str, device: torch.device, seconds: float, out: Path) -> None:
    """One part, in a process that is ended after so many seconds; what it says is in a file."""
    print(f"{name}: at most {seconds:.0f} seconds", flush=True)
    command = [sys.executable, "-m", "workbench.studies.gpu", "--here", "--parts", name]
    options = {"seconds": max(seconds - START_UP, 1.0), "out": out.resolve(), "device": device}
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    with open(out / f"{name}.txt", "w") as file:
        try:
            subprocess.run(command, stdout=file, stderr=file, cwd=records.ROOT, timeout=seconds)
        except subprocess.TimeoutExpired:
            print(f"{name}: its time is over")


def report(out: Path, device: torch.device) -> None:
    """All parts in one file; of a GPU in assets/results/gpu.json."""
    paths = {name: out / f"{name}.json" for name in PARTS}
    content = {name: json.loads(p.read_text()) for name, p in paths.items() if p.exists()}
    path = out / "gpu.json" if device.type == "cpu" else records.result_file("gpu")
    write_text(path, as_json(content, indent=1))
    for part, rows in content.items():
        for name, row in rows.items():
            if "error" in row:
                print(f"{part}, {name}: {row['error']}")
    print(f"{path}\n\n{tables(content)}")


def tables(content: dict) -> str:
    """Markdown: updates and images a second."""
    updates, images = (content.get(part, {}) for part in ("updates", "images"))
    rates = {name: row.get("per_second") for name, row in updates.items()}
    lines = [line("updates a second", SIZES), "|---" * (1 + len(SIZES)) + "|"]
    for stage in STAGES:
        lines.append(line(stage, [rates.get(f"{size}, {stage}") for size in SIZES]))
    rates = {name: row.get("images_per_second") for name, row in images.items()}
    columns = [(size, n) for size in ("small", "mar_b") for n in BATCHES]
    lines += ["", line("images a second", [f"{size}, batch {n}" for size, n in columns])]
    lines.append("|---" * (1 + len(columns)) + "|")
    for arm in ARMS:
        lines.append(line(arm, [rates.get(f"{size}, {arm}, batch {n}") for size, n in columns]))
    return "\n".join(lines)


def line(name: str, values) -> str:
    """A row of a table; empty where there is no figure."""
    cells = ["" if v is None else v if isinstance(v, str) else f"{v:.3g}" for v in values]
    return f"| {name} | {' | '.join(cells)} |"


def gpu_table() -> str:
    """The tables of assets/results/gpu.json; empty before a GPU was measured."""
    content = records.read_result("gpu")
    if not content:
        return ""
    return f"{content['about']['about']['hardware']}:\n\n{tables(content)}"


if __name__ == "__main__":
    run_script(main)
