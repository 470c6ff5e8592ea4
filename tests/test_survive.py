"""What happens to a run happens to people: it is killed, its disk is full, its files rot. What is
left then. `make test-long` kills and breaks more of the same."""

import json
import os
import random
import signal
import socket
import time

import child
import pytest
import torch

import maskrl

QUICK = (
    "--image-size 8 --patch 4 --width 16 --depth 1 --heads 1 --buffer 1 --head-width 16 "
    "--head-depth 1 --steps 4 --teacher-iters 12 --gsim-iters 5 --rl-iters 6 --judge-iters 3 "
    "--judge-n 18 --per-class 20 --batch 8 --prompts 2 --group 4 --denoise-steps 2 --device cpu "
    "--threads 1"
).split()


# Killed and started again -------------------------------------------------------------------------


def without_times(value):
    """A log line or metrics without what is never the same twice."""
    if isinstance(value, list):
        return [without_times(v) for v in value]
    if not isinstance(value, dict):
        return value
    times = ("seconds", "seconds_per_image", "minutes")
    return {key: without_times(v) for key, v in value.items() if key not in times}


def results(out):
    """All that a run leaves behind but times and pictures: weights, log and metrics."""
    found = {"log": without_times(maskrl.read_log(out))}
    found["metrics"] = without_times(json.loads((out / "metrics.json").read_text()))
    for path in sorted(out.glob("*.pt")):
        content = torch.load(path, weights_only=True)
        for part in ("model", "model_ema"):
            found |= {(path.name, part, k): v.tolist() for k, v in content[part].items()}
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """uninterrupted(script) -> the folder of a run that nobody stops, and the seconds it took."""
    runs = {}

    def run(script):
        if script not in runs:
            out = tmp_path_factory.mktemp(script)
            child.finish("sample", ["--help"], out / "output")  # starts the server
            began = time.perf_counter()
            code, output = child.finish(script, [*QUICK, "--out", out], out / "output", every=2)
            assert code == 0, output
            runs[script] = out, time.perf_counter() - began
        return runs[script]

    return run


def stop_and_go_on(script, moments, out, seconds):
    """A run that gets a signal (number, share of its time) for each of the `moments`, and is
    started again by the same command each time, and then until it is finished: the exit codes."""
    codes = []
    argv = [*QUICK, "--out", out, "--resume"]
    for number, share in moments:
        process = child.start(script, argv, out.parent / "output", every=2)
        process.join(share * seconds)
        if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        codes.append(process.exitcode)
    code, output = child.finish(script, argv, out.parent / "output", every=2)
    assert code == 0, output
    return codes


EXITS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}


def check_kills(script, moments, uninterrupted, tmp_path):
    whole, seconds = uninterrupted(script)
    codes = stop_and_go_on(script, moments, tmp_path / "out", seconds)
    for (number, _), code in zip(moments, codes):
        assert code in (0, EXITS[number]), codes  # 0: it was faster
    assert results(tmp_path / "out") == results(whole)
    assert not list((tmp_path / "out").glob("*.tmp"))
    return codes


def test_a_run_that_is_stopped_three_times_ends_like_one_that_is_not(uninterrupted, tmp_path):
    """Bit-identical weights, and log and metrics but for times."""
    moments = [(signal.SIGKILL, 0.25), (signal.SIGTERM, 0.35), (signal.SIGINT, 0.4)]
    check_kills("rl", moments, uninterrupted, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("script", ["distill", "rl"])
def test_a_run_that_is_stopped_at_random_ends_like_one_that_is_not(
    uninterrupted, tmp_path, script, seed
):
    """Two stops each. A checkpoint is written after every second step, so that some of them come
    while one is."""
    dice = random.Random(seed)
    numbers = dice.choices(list(EXITS), k=2)
    moments = [(number, dice.uniform(0.02, 0.9)) for number in numbers]
    codes = check_kills(script, moments, uninterrupted, tmp_path)
    print(f"{script}: {codes}")


# Several processes --------------------------------------------------------------------------------


def side_by_side(script, argv, folder, n=2):
    """The processes that torchrun would start on this machine, and the file each writes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    return [
        child.start(
            script,
            argv,
            folder / f"output {i}",
            every=2,
            environ=world | {"RANK": str(i), "LOCAL_RANK": str(i)},
        )
        for i in range(n)
    ]


def assert_close(a, b):
    """Two logs say the same but for times and rounding."""
    assert len(a) == len(b) > 0
    for one, other in zip(without_times(a), without_times(b)):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_two_processes_train_like_one(uninterrupted, tmp_path):
    """Teacher, GSIM and RL, by log and last weights. The first process stops them all by a signal
    that it alone gets, and one process finishes what two have begun."""
    whole, _ = uninterrupted("rl")
    argv = [*QUICK, "--out", tmp_path / "out"]
    processes = side_by_side("rl", argv, tmp_path)
    for process in processes:
        process.join()
    output = (tmp_path / "output 0").read_text() + (tmp_path / "output 1").read_text()
    assert [process.exitcode for process in processes] == [0, 0], output
    assert_close(maskrl.read_log(tmp_path / "out"), maskrl.read_log(whole))
