"""How often the host waits for a GPU, and how many operators it launches, at most.

Counted on a pretend GPU (see helpers_pretend_device), in bfloat16: generations at the depth of the
preset `small`, updates of one block of each kind. An operator is about one kernel. Whoever makes a
number smaller writes the smaller one here."""

from functools import partial

import pytest
import torch
from helpers_methods import brightness
from helpers_pretend_device import GPU, HAS_GPU, pretend_gpu
from helpers_rewards import shapes

import maskrl
from maskrl import Distillation, PolicyGradient, RewardBackpropagation, Sampling, TeacherTraining
from workbench.precision import set_precision
from workbench.settings import preset

pytestmark = pytest.mark.skipif(HAS_GPU, reason="counted on a pretend GPU")
NARROW = {"image_size": 32, "width": 48, "heads": 6, "head_width": 48, "scale": 1.0, "steps": 4}
FLAT = {"depth": 1, "head_depth": 1}
RL = {"prompts": 2, "group": 2, "rl_steps": "all", "learn_steps": False}
AT_MOST = {  # waits, launches
    "teacher": (1, 595),
    "GSIM": (2, 1097),
    "RL, z": (9, 936),
    "RL, x": (13, 1168),
    "backprop, z": (25, 1390),
    "backprop, x": (29, 2392),
    "an iteration of a student": (0, 250),
    "a generation of a learned schedule, 4 iterations": (5, 1312),
    "a generation of fixed counts, beside its iterations": (1, 27),
    "a denoising step of a guided chain": (0, 94),
    "a batch of mirrored images": (2, 3),
}


@pytest.fixture(scope="module")
def gpu():
    with pretend_gpu() as gpu:
        maskrl.alpha_sigma(torch.zeros(1, dtype=torch.long, device=GPU))  # makes its table
        yield gpu


def narrow(**overrides):
    return preset("small", **{**NARROW, **overrides})


def counted(gpu, function, *args, **kwargs):
    """(waits, launches) of a call, and its result."""
    gpu.waits.clear()
    gpu.launches.clear()
    result = function(*args, **kwargs)
    return sum(gpu.waits.values()), sum(gpu.launches.values()), result


def check(gpu, name, waits, launches):
    most_waits, most_launches = AT_MOST[name]
    places = ", ".join(f"{n} x {' '.join(where)}" for where, n in gpu.waits.most_common())
    assert waits <= most_waits, f"{name}: {waits} waits in all: {places}"
    assert launches <= most_launches, f"{name}: {gpu.launches.most_common(20)}"


def model(kind, **overrides):
    network = maskrl.MAR(narrow(**overrides), ["a", "b"], kind)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    set_precision(network, "bf16")
    return network.to("cuda").requires_grad_(False)


def training(name):
    """A training, and what its updates get."""
    stage, _, action = name.partition(", ")
    settings = narrow(**FLAT, **RL, action=action or "z")
    x, labels = torch.randn(4, settings.length, 48, device=GPU), torch.arange(4, device=GPU) % 2
    mean_image = x.mean(0, keepdim=True)
    if stage == "teacher":
        made = TeacherTraining(settings, ["a", "b"], "cuda")
    elif stage == "GSIM":
        made = Distillation(model("teacher", **FLAT), settings)
    elif stage == "RL":
        made = PolicyGradient(model("student", **FLAT), settings, brightness, mean_image)
    else:
        made = RewardBackpropagation(model("student", **FLAT), settings, brightness, mean_image)
    set_precision(made.model, "bf16")
    return made, (x, labels) if stage in ("teacher", "GSIM") else (labels[:2],)


@pytest.mark.parametrize("name", [name for name in AT_MOST if not name.startswith("a")])
def test_an_update_waits_and_launches(gpu, name):
    made, inputs = training(name)
    made.update(0, *inputs, seed=0)  # it makes tables, and the states of optimisers
    waits, launches, _ = counted(gpu, made.update, 1, *inputs, seed=0)
    check(gpu, name, waits, launches)


def test_a_generation_of_fixed_counts_waits_and_launches(gpu):
    student, labels = model("student"), torch.arange(4, device=GPU) % 2
    maskrl.generate(student, labels)  # makes tables, and casts the weights
    of_4 = counted(gpu, maskrl.generate, student, labels, Sampling(steps=4))
    of_2 = counted(gpu, maskrl.generate, student, labels, Sampling(steps=2))
    each = [(a - b) / 2 for a, b in zip(of_4[:2], of_2[:2])]
    check(gpu, "an iteration of a student", *each)
    beside = [a - 2 * b for a, b in zip(of_2[:2], each)]
    check(gpu, "a generation of fixed counts, beside its iterations", *beside)


def test_a_generation_of_a_learned_schedule_waits_and_launches(gpu):
    policy, labels = model("policy"), torch.arange(4, device=GPU) % 2
    maskrl.add_noise_policy(policy)
    maskrl.add_schedule(policy)
    maskrl.generate(policy, labels)
    waits, launches, (_, trace) = counted(gpu, maskrl.generate, policy, labels, trace=True)
    assert trace.counts.shape[1] == 4
    check(gpu, "a generation of a learned schedule, 4 iterations", waits, launches)


def test_a_denoising_step_of_a_guided_chain_does_not_wait(gpu):
    teacher, labels = model("teacher"), torch.arange(4, device=GPU) % 2
    maskrl.generate(teacher, labels, Sampling(steps=1, denoise_steps=2))
    of_4 = counted(gpu, maskrl.generate, teacher, labels, Sampling(steps=2, denoise_steps=4))
    of_2 = counted(gpu, maskrl.generate, teacher, labels, Sampling(steps=2, denoise_steps=2))
    each = [(a - b) / 4 for a, b in zip(of_4[:2], of_2[:2])]
    check(gpu, "a denoising step of a guided chain", *each)


def test_a_batch_of_images_waits_for_its_copies(gpu):
    batch = partial(shapes().train.batch, 4, maskrl.rng(0), GPU, flip=True)
    waits, launches, _ = counted(gpu, batch)
    check(gpu, "a batch of mirrored images", waits, launches)
