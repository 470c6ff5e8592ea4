"""Scripts in processes of their own, which a test may kill.

They fork from a server that has torch and maskrl loaded, so that they start within milliseconds."""

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from functools import partial
from pathlib import Path

import torch

import maskrl
import sample
import train_distill
import train_rl

MAINS = {"sample": sample.main, "distill": train_distill.main, "rl": train_rl.main}
fork = multiprocessing.get_context("forkserver")
# what takes long to import; the server finds installed packages alone
fork.set_forkserver_preload(["torch", "torch._dynamo", "torchvision.transforms.functional", "tqdm"])


def no_matplotlib():
    """Curves take longer than the training of a short run."""
    return None


def work(script, argv, output, every, die_at, environ):
    """One script, its output in a file; every: steps from checkpoint to checkpoint; die_at: bytes
    that a file may have: who writes the next one is killed in the middle; environ: more variables
    of the environment."""
    torch.set_num_threads(1)
    os.environ |= environ or {}
    maskrl.pyplot = no_matplotlib
    if every:
        train = maskrl.train
        maskrl.train = lambda *args, **given: train(*args, **given | {"every": every})
    if die_at:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (die_at, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    with open(output, "w") as file, contextlib.redirect_stdout(file):
        with contextlib.redirect_stderr(file):
            maskrl.run(partial(MAINS[script], [str(a) for a in argv]))


def start(script, argv, output, every=None, die_at=None, environ=None):
    """The process of a script, at work."""
    args = (script, argv, output, every, die_at, environ)
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
