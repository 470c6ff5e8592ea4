import contextlib
import resource

import pytest
import torch

import maskrl
from workbench.errors import run_script
from workbench.settings import RunSettings

# Tensors of a test are small: spread over all threads, these wait for each other longer than they
# work, and on a busy machine every step takes many times as long.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


SMALL = {
    "image_size": 8,
    "patch": 2,
    "width": 32,
    "depth": 1,
    "heads": 2,
    "buffer": 2,
    "head_width": 32,
    "head_depth": 1,
    "scale": 2.0,
    "temperature": 1.0,
    "per_class": 30,
    "judge_n": 36,
    "judge_iters": 5,
    "batch": 8,
    "teacher_iters": 6,
    "gsim_iters": 4,
    "rl_iters": 2,
    "schedule_iters": 1,
    "prompts": 2,
    "group": 4,
    "denoise_steps": 5,
}


def tiny(**overrides):
    """Settings of a model small enough for a test: 16 tokens of 12 channels, unless told so."""
    return RunSettings(**{**SMALL, **overrides})


def random_model(kind="teacher", **overrides):
    """A MAR of three classes with random weights, so that its output is not zero."""
    model = maskrl.MAR(tiny(**overrides), ["a", "b", "c"], kind)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.fixture
def settings():
    return tiny


@pytest.fixture
def model():
    """A random teacher."""
    return random_model()


@pytest.fixture
def student():
    """A random student."""
    return random_model("student")


@pytest.fixture
def policy():
    """A random policy with a schedule policy as it starts."""
    policy = random_model("policy")
    maskrl.add_schedule(policy)
    return policy


# Options of the scripts for a run of seconds
SHORT = (
    "--image-size 8 --patch 2 --width 32 --depth 1 --heads 2 --head-width 32 --head-depth 1 "
    "--steps 8 --teacher-iters 6 --gsim-iters 4 --rl-iters 2 --schedule-iters 1 "
    "--judge-iters 5 --judge-n 90 --per-class 20 --batch 16 --prompts 2 --group 4 "
    "--denoise-steps 3 --device cpu --threads 1"
).split()


def error_of(main, argv, capsys, code=2):
    """The last line that a script, called with wrong input, ends with."""
    with pytest.raises(SystemExit) as stop:
        run_script(main, [str(a) for a in argv])
    assert stop.value.code == code
    return capsys.readouterr().err.strip().splitlines()[-1]


@contextlib.contextmanager
def full_disk(left):
    """No file of this process grows beyond `left` bytes: writing more fails, as it really does.

    Not a fixture, for pytest itself may write into a file when a test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
