"""Several processes train like one; none of them is started by accident, or survives another."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import helpers_child as child
import pytest
import torch
import torch.distributed as dist
from conftest import random_model, tiny
from helpers_child import FOREVER, QUICK, at_work, without_times
from helpers_rewards import shapes

import maskrl
from maskrl import MAR, Head, Sampling, generate
from workbench import distributed, quality_net
from workbench.distributed import (
    TORCHRUN,
    agreed,
    average_gradients,
    divided,
    join_processes,
    of_first_process,
    several_processes,
)
from workbench.quality_net import train_quality_net
from workbench.run import read_log


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("size", ["4", "", "2 "])
def test_a_variable_of_some_other_launcher_starts_no_process(monkeypatch, size):
    """WORLD_SIZE alone, which clusters set, once ended in a traceback."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "3")  # of a GPU that this process does not have
    assert not several_processes()
    assert join_processes(torch.device("cpu")) == torch.device("cpu")
    assert not dist.is_initialized()


def test_a_divided_method_takes_keywords(model, alone):
    """A teacher without guidance is partial(model.head, c=c), which once ended in a TypeError."""
    divided_head = divided(Head.network)
    x, t, c = torch.randn(5, 12), torch.randint(1000, (5,)), torch.randn(5, 32)
    expected = model.head.network(x, t, c)
    torch.testing.assert_close(divided_head(model.head, x, t, c=c), expected)
    torch.testing.assert_close(partial(divided_head, model.head, c=c)(x, t=t), expected)


def test_a_teacher_without_guidance_makes_the_same_images(model, alone, monkeypatch):
    sampling = Sampling(steps=3, guidance=1.0)
    expected = generate(model, [0, 1, 2], sampling)
    monkeypatch.setattr(Head, "network", divided(Head.network))
    monkeypatch.setattr(MAR, "context", divided(MAR.context))
    torch.testing.assert_close(generate(model, [0, 1, 2], sampling), expected)


@pytest.mark.parametrize("kind, calls", [("teacher", 3 * 5), ("student", 3)])
def test_all_that_heads_compute_is_divided(kind, calls, alone, monkeypatch):
    """The work of teachers' chains and of students' one steps: no call goes around it."""
    rows, network = [], divided(Head.network)

    def counted(head, x_t, t, c):
        rows.append(len(x_t))
        return network(head, x_t, t, c)

    monkeypatch.setattr(Head, "network", counted)
    model = random_model(kind, denoise_steps=5)
    generate(model, [0, 1], Sampling(steps=3, guidance=1.0))
    assert len(rows) == calls and sum(rows) == 2 * 16 * calls // 3


def test_processes_that_join_divide_transformer_and_heads(monkeypatch):
    """Results would be the same if they did not, only no faster."""
    for owner, name in ((MAR, "context"), (Head, "network")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # as it is again afterwards
    monkeypatch.setattr(distributed, "several_processes", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
    join_processes(torch.device("cpu"))
    assert hasattr(MAR.context, "__wrapped__") and hasattr(Head.network, "__wrapped__")


def test_hooks_that_average_gradients_end_with_the_stage(model, alone):
    """They once stayed, and each stage added others."""
    model.head.requires_grad_(False)
    training = SimpleNamespace(model=model)

    def hooks():
        return [len(p._post_accumulate_grad_hooks or ()) for p in training.model.parameters()]

    with average_gradients([model]):
        assert hooks() == [int(p.requires_grad) for p in model.parameters()]
    assert not any(hooks())
    with contextlib.suppress(KeyboardInterrupt), average_gradients([model]):
        raise KeyboardInterrupt
    assert not any(hooks())


def test_a_second_process_takes_the_networks_of_the_first(monkeypatch):
    """Each once trained its own, and on GPUs these differ."""
    train = partial(train_quality_net, "reward", shapes().train, tiny(), "cpu")
    first = train()
    sent = itertools.cycle(first.state_dict().values())

    def received(value):
        return next(sent)

    monkeypatch.setattr(quality_net, "rank", partial(int, 1))
    monkeypatch.setattr(quality_net, "optimizer_step", pytest.fail)
    monkeypatch.setattr(distributed, "of_first_process", received)
    for name, value in train().state_dict().items():
        assert torch.equal(value, first.state_dict()[name])


def test_what_processes_agree_on_keeps_its_type(alone):
    assert agreed(0.1, "cpu") == 0.1
    assert agreed(15, "cpu") == 15 and isinstance(agreed(15, "cpu"), int)
    x = torch.rand(3, requires_grad=True)
    assert torch.equal(of_first_process(x), x) and not of_first_process(x).requires_grad


# Two processes on this machine --------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """uninterrupted(*options) -> the folder of a run of train_rl.py that nobody stops."""
    runs = {}

    def run(*options):
        if options not in runs:
            out = tmp_path_factory.mktemp("whole")
            code, said = child.finish("rl", [*QUICK, *options, "--out", out], out / "output")
            assert code == 0, said
            runs[options] = out
        return runs[options]

    return run


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def side_by_side(script, argv, folder, n=2):
    """The processes that torchrun would start on this machine, and the file each writes."""
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": str(n)}
    return [
        child.start(
            script,
            argv,
            folder / f"output {i}",
            save_often=True,
            environ=world | {"RANK": str(i), "LOCAL_RANK": str(i)},
        )
        for i in range(n)
    ]


def assert_close(a, b):
    """Two logs say the same up to times and rounding."""
    assert len(a) == len(b) > 0
    for one, other in zip(without_times(a), without_times(b)):
        assert one.pop("stage") == other.pop("stage")
        assert one == pytest.approx(other, rel=1e-3, abs=3e-4)  # losses of RL nearly cancel


@pytest.mark.parametrize("action", ["z", "x"])
def test_two_processes_train_like_one(uninterrupted, tmp_path, action):
    """Teacher, GSIM and RL, on batches that two do not divide: the same losses. A signal to one of
    them stops both, and one process finishes what they began."""
    whole, out = uninterrupted("--action", action), tmp_path / "out"
    options = [*QUICK, "--action", action]
    processes = side_by_side("rl", [*options, "--out", out], tmp_path)
    before_rl = [line for line in read_log(whole) if line["stage"] != "policy"]
    at_work(out, lines=len(before_rl) + 1)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join()
    said = (tmp_path / "output 0").read_text() + (tmp_path / "output 1").read_text()
    assert [process.exitcode for process in processes] == [143, 143], said
    begun = read_log(out)
    code, said = child.finish("rl", [*options, "--out", out, "--resume"], tmp_path / "output")
    assert code == 0, said
    log = read_log(out)
    assert log[: len(begun)] == begun
    assert_close(log, read_log(whole))


@pytest.mark.long
def test_two_processes_train_and_report_like_one(uninterrupted, tmp_path):
    """Also of a teacher without guidance."""
    options = ["--guidance", "1"]
    whole, out = uninterrupted(*options), tmp_path / "out"
    processes = side_by_side("rl", [*QUICK, *options, "--out", out], tmp_path)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert_close(read_log(out), read_log(whole))
    two, one = (json.loads((path / "metrics.json").read_text()) for path in (out, whole))
    for name, row in without_times(one["rows"]).items():
        assert without_times(two["rows"])[name] == pytest.approx(row, rel=1e-2, abs=1e-3)


def test_a_process_that_dies_ends_the_others_with_a_message(tmp_path):
    processes = side_by_side("distill", [*FOREVER, "--out", tmp_path / "out"], tmp_path)
    at_work(tmp_path / "out", lines=1)
    processes[1].kill()
    processes[0].join(60)
    assert processes[0].exitcode == 1
    assert "error: process 0 lost another one" in (tmp_path / "output 0").read_text()


# torchrun itself ----------------------------------------------------------------------------------


@contextlib.contextmanager
def torchrun(script, argv, output):
    """The command: its process, and the numbers of the two that it started."""
    root = Path(maskrl.__file__).parent
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", free_port()]
    with open(output, "w") as file:
        launcher = subprocess.Popen(
            [sys.executable, *command, root / script, *map(str, argv)], stdout=file, stderr=file
        )
    try:
        at_work(argv[argv.index("--out") + 1], lines=1)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
        yield launcher, [int(number) for number in children.split()]
        launcher.wait(60)
    finally:
        launcher.terminate()
        launcher.wait()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_torchrun_began_and_was_stopped_one_process_finishes(uninterrupted, tmp_path, number):
    out, longer = tmp_path / "out", ["--teacher-iters", 100]
    argv = [*QUICK, *longer, "--out", out]
    with torchrun("train_rl.py", argv, tmp_path / "output") as (launcher, _):
        launcher.send_signal(number)
    assert f"teacher is saved in {out}/teacher.pt after" in (tmp_path / "output").read_text()
    assert len(read_log(out)) < 100
    code, said = child.finish("rl", [*argv, "--resume"], tmp_path / "output")
    assert code == 0, said
    assert_close(read_log(out), read_log(uninterrupted(*longer)))


@pytest.mark.long
@pytest.mark.parametrize("dead", [0, 1])
def test_torchrun_ends_within_a_minute_if_one_of_its_processes_is_killed(tmp_path, dead):
    argv, output = [*FOREVER, "--out", tmp_path / "out"], tmp_path / "output"
    with torchrun("train_distill.py", argv, output) as (launcher, workers):
        os.kill(workers[dead], signal.SIGKILL)
    assert launcher.returncode == 1
    assert "train_distill.py FAILED" in output.read_text()
    assert not any(Path(f"/proc/{number}").exists() for number in workers)
