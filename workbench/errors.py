"""Errors that a person can do something about end a script in one line, without a traceback."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

import torch

from workbench.distributed import is_lost_process, leave_processes, rank

WORK_IS_SAFE = "the files written so far are whole; --resume continues a training"


class InputError(ValueError):
    """The user gave something that cannot work; the message says what, and how to fix it."""


class Stopped(KeyboardInterrupt):
    """args: the signal that stopped a script, and what becomes of its work."""


def run_script(main: Callable, argv: list[str] | None = None) -> None:
    """main(argv) as a script, argv being the command line unless it is given: an error ends it in
    one line on stderr, with the exit code

    2 for wrong input or a file that cannot be read or written; 1 for a loss that is infinite or
    NaN, too little memory, or another process that was lost; 130 for Ctrl-C and 143 for SIGTERM.
    Any other error is a fault of the program and keeps its traceback."""
    if argv is None:
        argv = sys.argv[1:]
    sys.stdout, sys.stderr = usable(sys.stdout), usable(sys.stderr)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:  # only that one gets signals
        handler = signal.signal(signal.SIGTERM, raise_stopped)
    try:
        main(argv)
        leave_processes()
    except (InputError, OSError) as error:
        fail(error, 2)
    except FloatingPointError as error:
        fail(error, 1)
    except (MemoryError, RuntimeError) as error:
        if is_lost_process(error):
            fail(f"process {rank()} lost another one: {error}", 1)
        if not is_out_of_memory(error):
            raise
        fail("out of memory: try --checkpointing or a smaller --micro-batch, --batch or model", 1)
    except KeyboardInterrupt as stopped:
        number, work = stopped.args or (signal.SIGINT, WORK_IS_SAFE)
        print(f"stopped: {work}", file=sys.stderr)
        sys.exit(128 + number)
    finally:
        if in_main_thread:  # a notebook goes on
            signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)


def usable(stream) -> TextIO:
    """The stream as scripts can write to it; one that keeps nothing where it is None or closed, as
    under cron or in a daemon. A notebook's is left alone."""
    with suppress(ValueError):  # detached
        if stream is not None and not getattr(stream, "closed", False):
            with suppress(AttributeError):
                stream.reconfigure(errors="backslashreplace")  # folder names need not be UTF-8
            return stream
    return open(os.devnull, "w")


def raise_stopped(number: int, _) -> None:
    """The handler of a signal outside of a training."""
    raise Stopped(number, WORK_IS_SAFE)


def fail(error, code: int) -> None:
    """End with one line, whatever characters the names in it have."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python was refused memory, on the CPU or on a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # the CPU, CUDA, cuBLAS
    return any(text in str(error) for text in said)


def abbreviate(texts: list[str], most: int = 10) -> str:
    """The first of `texts`, and how many there are if these are not all."""
    more = f", ... ({len(texts)} in all)" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
