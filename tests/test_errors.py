"""How a script ends: exit codes and last lines."""

import contextlib
import io
import os
import signal
import sys
import threading

import pytest
import torch
from tqdm import tqdm

from workbench.errors import InputError, Stopped, abbreviate, is_out_of_memory, run_script


def raising(error):
    """A script's main that raises `error`."""

    def main(argv):
        raise error

    return main


def end_of(main, capsys):
    """Exit code and lines on stderr of a script."""
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    return stop.value.code, capsys.readouterr().err.strip().splitlines()


def test_a_script_gets_its_arguments_and_ends_without_a_code(monkeypatch):
    given = []
    run_script(given.append, ["--seed", "1"])
    monkeypatch.setattr(sys, "argv", ["script.py", "--seed", "2"])
    run_script(given.append)
    assert given == [["--seed", "1"], ["--seed", "2"]]


@pytest.mark.parametrize("error", [None, InputError("wrong"), KeyboardInterrupt()], ids=repr)
def test_a_script_that_a_notebook_runs_leaves_sigterm_as_it_was(error):
    """The kernel once could not be ended in its own way any more."""

    def main(argv):
        if error:
            raise error

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(SystemExit):
        run_script(main)
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_IGN


def test_a_thread_can_run_a_script():
    """Python lets no other thread than the first handle signals."""
    given = []
    thread = threading.Thread(target=run_script, args=(given.append, ["--seed", "1"]))
    thread.start()
    thread.join()
    assert given == [["--seed", "1"]]


def test_ctrl_c_ends_a_script_in_one_line_and_code_130(capsys):
    code, (line,) = end_of(raising(KeyboardInterrupt()), capsys)
    assert code == 130
    assert line.startswith("stopped: ") and "--resume" in line


def test_sigterm_ends_a_script_in_one_line_and_code_143(capsys):
    def stopped_by_the_system(argv):
        os.kill(os.getpid(), signal.SIGTERM)

    code, (line,) = end_of(stopped_by_the_system, capsys)
    assert code == 143
    assert line.startswith("stopped: ") and "--resume" in line


def test_a_script_that_was_stopped_says_what_becomes_of_its_work(capsys):
    stopped = Stopped(signal.SIGTERM, "step 3 is saved")
    assert end_of(raising(stopped), capsys) == (143, ["stopped: step 3 is saved"])


@pytest.mark.parametrize(
    "error, code, line",
    [
        (InputError("what was wrong"), 2, "error: what was wrong"),
        (FileNotFoundError(2, "No such file", "x.pt"), 2, "error: [Errno 2] No such file: 'x.pt'"),
        (FloatingPointError("the loss is nan"), 1, "error: the loss is nan"),
    ],
)
def test_wrong_input_ends_with_code_2_and_a_broken_loss_with_code_1(error, code, line, capsys):
    assert end_of(raising(error), capsys) == (code, [line])


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_too_little_memory_ends_with_code_1_and_what_to_try(error, capsys):
    """Libraries on the GPU say ALLOC_FAILED."""
    assert is_out_of_memory(error)
    code, (line,) = end_of(raising(error), capsys)
    assert code == 1
    assert line.startswith("error: out of memory: try --checkpointing or a smaller --micro-batch")


def test_memory_that_cannot_be_had_is_noticed():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**55)
    assert is_out_of_memory(refused.value)


@pytest.mark.parametrize("error", [KeyError("a bug"), RuntimeError("shapes do not match")])
def test_an_error_of_our_own_making_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_script(raising(error))


def test_names_that_are_no_text_neither_break_nor_split_the_line(capsys):
    error = InputError("a\nb \x1b[31m c\udcff")
    assert end_of(raising(error), capsys) == (2, ["error: a b ?[31m c?"])


# Streams ------------------------------------------------------------------------------------------


def closed_stream():
    stream = io.TextIOWrapper(io.BytesIO())
    stream.close()
    return stream


def detached_stream():
    stream = io.TextIOWrapper(io.BytesIO())
    stream.detach()
    return stream


class Logger:
    """What a server may put in the place of a stream."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


UNUSABLE = {"closed": closed_stream, "detached": detached_stream, "none": type(None)}


@pytest.mark.parametrize("make_stream", UNUSABLE.values(), ids=UNUSABLE)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_script_without_a_stream_works_and_says_nothing(name, make_stream, monkeypatch):
    """As under cron or in a daemon. A progress bar once ended it in a traceback."""
    monkeypatch.setattr(sys, name, make_stream())
    done = []

    def main(argv):
        print("what it does", file=getattr(sys, name))
        done.extend(tqdm(argv, file=getattr(sys, name)))

    run_script(main, ["--help"])
    assert done == ["--help"]


@pytest.mark.parametrize("stream", [io.StringIO(), Logger()], ids=["notebook", "server"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_cannot_be_reconfigured_is_left_alone(name, stream, monkeypatch):
    called = []
    monkeypatch.setattr(sys, name, stream)
    run_script(called.append, ["--help"])
    assert getattr(sys, name) is stream and called == [["--help"]]


def test_names_that_are_no_utf_8_can_be_printed(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    run_script(print, "caf\udce9")
    stdout.flush()
    assert stdout.buffer.getvalue() == b"caf\\udce9\n"


# Lists --------------------------------------------------------------------------------------------


def test_a_long_list_is_abbreviated():
    assert abbreviate(["a", "b"]) == "a, b"
    assert abbreviate(list("abcdefghij")) == "a, b, c, d, e, f, g, h, i, j"
    assert abbreviate(list("abc"), most=2) == "a, b, ... (3 in all)"
