"""How long a large folder of images takes to open, and how much memory: prints a JSON.

    python tests/bench_folder.py --files 100000 --classes 1000

Draws JPEG and PNG files into --folder, loads them in memory, through a new cache and through the
one that is then there, each in a process of its own, and deletes them. Seconds of the CPU say more
than seconds where the machine has other work."""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import maskrl


def parse():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench_folder"))
    parser.add_argument("--arm", choices=("memory", "cache"), help="for the processes it starts")
    return parser.parse_args()


def make(folder, files, classes):
    """Smooth random images of 96 x 72 pixels, JPEG and PNG in turns."""
    generator = np.random.default_rng(0)
    for i in tqdm(range(files), "files", leave=False):
        path = folder / f"n{i % classes:08}" / f"{i}.{'png' if i // classes % 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 72), Image.Resampling.BICUBIC).save(path)


def resident(kind):
    """Megabytes of this process that are `RssAnon` (its own) or `RssFile` (mapped files)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


def measure(args):
    """What one run needs until its first update, and what batches then cost."""
    settings = maskrl.preset("small", image_size=args.image_size, judge_iters=1)
    imported = resident("RssAnon")
    start, start_cpu = time.perf_counter(), time.process_time()
    cache = args.folder / "cache" if args.arm == "cache" else None
    data = maskrl.load_data(settings, str(args.folder / "images"), cache=cache)
    opened, opened_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    own = resident("RssAnon") - imported
    data.measure(settings)
    start = time.process_time()
    for step in range(200):
        data.train.batch(128, maskrl.rng(step))
    batches = 200 * 128 / (time.process_time() - start)
    return {
        "seconds_to_open": round(opened, 2),
        "cpu_seconds_to_open": round(opened_cpu, 2),
        "own_memory_MB": round(own),
        "mapped_MB": round(resident("RssFile")),
        "ru_maxrss_MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "batch_images_per_cpu_second": round(batches),
    }


def main():
    args = parse()
    if args.arm:
        print(json.dumps(measure(args)))
        return
    make(args.folder / "images", args.files, args.classes)
    rows = {}
    for name, arm in (("in memory", "memory"), ("new cache", "cache"), ("cache", "cache")):
        command = [sys.executable, *sys.argv, "--arm", arm]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        rows[name] = json.loads(done.stdout)
    shutil.rmtree(args.folder)
    new, later = (rows[name]["cpu_seconds_to_open"] for name in ("new cache", "cache"))
    figures = {"files": args.files, "classes": args.classes, "image_size": args.image_size}
    print(
        json.dumps(
            figures | {"decoded_per_cpu_second": round(args.files / (new - later))} | rows, indent=1
        )
    )


if __name__ == "__main__":
    main()
