"""Ctrl-C, SIGTERM and SIGHUP, which let a training step be finished and saved."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from workbench.distributed import rank
from workbench.errors import Stopped


class HeldSignals:
    """Meanwhile Ctrl-C, SIGTERM and the end of the terminal are noted, for a training step to be
    finished and saved; the same one once more stops at once, unless there are several processes:
    torchrun passes on to each what all had got already."""

    def __init__(self):
        self.noted, self.raises = [], False

    def __enter__(self) -> "HeldSignals":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # only that one gets signals
            for number in stopping_signals():
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @property
    def first(self) -> int:
        """The first signal, or 0."""
        return self.noted[0] if self.noted else 0

    def note(self, number: int, _) -> None:
        if number in self.noted and not dist.is_initialized():
            raise Stopped(number, "at once, by the second signal; --resume repeats a few steps")
        if not self.noted and rank() == 0:
            with suppress(RuntimeError, OSError):  # in the middle of another line
                print("\nstopping after this step; once more stops at once", file=sys.stderr)
        self.noted.append(number)
        if self.raises and not dist.is_initialized():
            raise Stopped(number)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Meanwhile a signal raises Stopped at once; of several processes none is alone in that."""
        self.raises = True
        try:
            yield
        finally:
            self.raises = False


def stopping_signals() -> list[int]:
    """Those that stop a run; SIGHUP, the end of its terminal, unless nohup ignores it."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers
