"""Scripts in processes of their own, which a test may kill.

They fork from a server that has torch loaded, so that they start within milliseconds."""

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import torch

import sample
import train_distill
import train_rl
from workbench import pictures, run
from workbench.errors import run_script

MAINS = {"sample": sample.main, "distill": train_distill.main, "rl": train_rl.main}
fork = multiprocessing.get_context("forkserver")
# what takes long to import; the server finds installed packages alone
fork.set_forkserver_preload(["torch", "torch._dynamo", "torchvision.transforms.functional", "tqdm"])

# A run of a second or two
QUICK = (
    "--image-size 8 --patch 4 --width 16 --depth 1 --heads 1 --buffer 1 --head-width 16 "
    "--head-depth 1 --steps 4 --teacher-iters 8 --gsim-iters 4 --rl-iters 4 --schedule-iters 2 "
    "--judge-iters 3 --judge-n 18 --per-class 20 --batch 7 --prompts 3 --group 3 "
    "--denoise-steps 2 --device cpu --threads 1"
).split()
FOREVER = [*QUICK, "--teacher-iters", "100000"]
EXITS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}


def no_matplotlib():
    """Curves take longer than the training of a short run."""
    return None


def work(script, argv, output, save_often, die_at, environ):
    """One script, its output in a file; save_often: a checkpoint every few steps; die_at: bytes
    that a file may have: who writes the next one is killed in the middle; environ: more variables
    of the environment."""
    torch.set_num_threads(1)
    os.environ |= environ or {}
    pictures.figure_class = no_matplotlib
    if save_often:
        run.SAVE_SECONDS, run.SAVE_COST = 0.02, 0.0
    if die_at:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (die_at, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    with open(output, "w") as file, contextlib.redirect_stdout(file):
        with contextlib.redirect_stderr(file):
            run_script(MAINS[script], [str(a) for a in argv])


def start(script, argv, output, save_often=False, die_at=None, environ=None):
    """The process of a script, at work."""
    args = (script, argv, output, save_often, die_at, environ)
    process = fork.Process(target=work, args=args, daemon=True)  # it ends when the test does
    Path(output).unlink(missing_ok=True)
    process.start()
    while process.is_alive() and not Path(output).exists():
        time.sleep(0.005)
    return process


def finish(script, argv, output, **options):
    """Its exit code, and what it wrote."""
    process = start(script, argv, output, **options)
    process.join()
    return process.exitcode, open(output).read()


def at_work(out, lines=3):
    """Wait until the run in this folder has logged something."""
    for _ in range(6000):  # two minutes, on a busy machine
        if len(run.read_log(out)) >= lines:
            return
        time.sleep(0.02)
    raise AssertionError(f"nothing happened in {out}")


def without_times(value):
    """A log line or metrics without what is never the same twice."""
    if isinstance(value, list):
        return [without_times(v) for v in value]
    if not isinstance(value, dict):
        return value
    times = ("seconds", "seconds_per_image", "minutes")
    return {key: without_times(v) for key, v in value.items() if key not in times}
