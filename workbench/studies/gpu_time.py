"""What an update takes of a GPU's time, and how long 30 epochs are: computed, not measured.

    python -m workbench.studies.gpu_time

Launches: operators, each of them about one kernel, counted on the CPU in a model as deep as the
real one, of a batch in as many parts, but narrow. Memory: what the operators of a block and of the
head read and write. Arithmetic: as in budget.py, at the peak. While the GPU computes, the host
launches what comes next, so that an update takes about the longer of launches and the other two.
"""

import math
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskrl import MAR, Block, Distillation, Head, Sampling, TeacherTraining, generate
from workbench.precision import InBFloat16, set_precision, wrap
from workbench.settings import RunSettings, preset
from workbench.studies.budget import A100, GB, H100, Budget, ReleasedBudget

LAUNCH = 6e-6  # seconds of the host for an operator: an assumption
OPTIMISER = 12  # float32 numbers that the step of a parameter moves: Adam's, clipping, EMA
IMAGENET, EPOCHS = 1_281_167, 30  # images; MARVAL's
UPDATES = (20_000, 100_000, 500_000)
aten = torch.ops.aten
NO_KERNEL = {  # beside views
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided),
    *(aten.detach, aten._unsafe_view, aten.lift_fresh, aten._local_scalar_dense),
}


class Operators(TorchDispatchMode):
    """Counts operators with a kernel, and the bytes of their inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or func.overloadpacket in NO_KERNEL):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.launches += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


# Launches -----------------------------------------------------------------------------------------


def narrow(settings: RunSettings) -> RunSettings:
    """As deep, and its batch in as many parts, of two images each."""
    parts = math.ceil(settings.batch / (settings.micro_batch or settings.batch))
    size = {"image_size": 4, "patch": 1, "width": 8, "heads": 2, "head_width": 8, "buffer": 1}
    return replace(
        settings, **size, scale=1.0, steps=4, batch=2 * parts, micro_batch=2 if parts > 1 else 0
    )


def network(settings: RunSettings, kind: str) -> MAR:
    model = MAR(settings, ["a", "b"], kind)
    set_precision(model, settings.precision, settings.checkpointing)
    return model.requires_grad_(False)


def launches_of_update(stage: str, settings: RunSettings) -> int:
    """Of a teacher, of GSIM or of GSIM of heads alone."""
    settings = narrow(replace(settings, heads_iters=10 if stage.endswith("alone") else 0))
    if stage == "teacher":
        training = TeacherTraining(settings, ["a", "b"])
    else:
        training = Distillation(network(settings, "teacher"), settings)
    for module in vars(training).values():
        if isinstance(module, MAR):
            set_precision(module, settings.precision, settings.checkpointing)
    x, labels = torch.randn(settings.batch, 16, 3), torch.arange(settings.batch) % 2
    training.update(0, x, labels, seed=0)  # makes the optimisers' states
    with Operators() as counted:
        training.update(1, x, labels, seed=0)
    return counted.launches


def launches_of_generation(kind: str, settings: RunSettings, sampling: Sampling) -> int:
    model = network(narrow(settings), kind)
    with Operators() as counted:
        generate(model, [0, 1], sampling)
    return counted.launches


def launches_of_iteration(settings: RunSettings) -> int:
    """Of a student."""
    two, one = (launches_of_generation("student", settings, Sampling(steps)) for steps in (2, 1))
    return two - one


def launches_of_denoising_step(settings: RunSettings) -> int:
    """Of a guided teacher's chain."""
    three, two = (
        launches_of_generation("teacher", settings, Sampling(1, guidance=2.0, denoise_steps=n))
        for n in (3, 2)
    )
    return three - two


# Memory -------------------------------------------------------------------------------------------


@cache
def moved_by_block(width: int, heads: int, rows: int, precision: str) -> int:
    """Bytes for one more image of `rows` in a block's forward pass."""
    with FakeTensorMode():
        block = Block(width, heads)
        wrap(block, "forward", InBFloat16 if precision == "bf16" else None)
        return moved_by_row(block, torch.randn(1, rows, width))


@cache
def moved_by_head(precision: str, channels: int, width: int, *shape) -> int:
    """Bytes for one more token in the head's forward pass."""
    with FakeTensorMode():
        head = Head(channels, width, *shape, predicts="eps")
        wrap(head, "hidden", InBFloat16 if precision == "bf16" else None)
        time = torch.zeros(1).long()
        return moved_by_row(head, torch.randn(1, channels), time, torch.randn(1, width))


@torch.no_grad()
def moved_by_row(module, *inputs: Tensor) -> int:
    totals = []
    for n in (8, 9):
        rows = [x.repeat(n, *[1] * (x.ndim - 1)) for x in inputs]
        with Operators() as counted:
            module(*rows)
        totals.append(counted.bytes)
    return totals[1] - totals[0]


def seconds_of_memory(budget: Budget, stage: str) -> float:
    """Of an update, at the bandwidth of the budget's GPU."""
    s, (contexts, tokens) = budget.settings, budget.passes()[stage]
    block = moved_by_block(s.width, s.heads, budget.rows, s.precision)
    head = moved_by_head(s.precision, budget.channels, s.width, s.head_width, s.head_depth)
    trained = budget.parameters * (1 if stage == "teacher" else 2)
    if stage.endswith("alone"):
        trained = 2 * budget.head_parameters
    moved = contexts * budget.blocks * block + tokens * head + 4 * OPTIMISER * trained
    return moved / budget.gpu["memory"]


# Tables -------------------------------------------------------------------------------------------


def on(gpu: dict, budget: Budget) -> Budget:
    budget.gpu = gpu
    return budget


def budgets() -> dict:
    """{what it is called: a function that makes its Budget}"""
    small, mar_b = preset("small"), preset("mar_b", steps=64, precision="bf16")
    return {
        "small": partial(Budget, small),
        "small, `--micro-batch 0`": partial(Budget, replace(small, micro_batch=0)),
        "MAR-B": partial(ReleasedBudget, mar_b),
    }


def time_table() -> str:
    """Milliseconds of an update, by what they are for; then launches of generations."""
    lines = [
        "| an update of | launches | ms: launches | A100: memory | arithmetic | H100: memory "
        "| arithmetic |",
        "|---" * 7 + "|",
    ]
    for name, make in budgets().items():
        for stage in make().passes():
            if stage == "teacher" and name == "MAR-B":  # which is given
                continue
            launches = launches_of_update(stage, make().settings)
            seconds = [launches * LAUNCH]
            for gpu in (A100, H100):
                budget = on(gpu, make())
                seconds += [seconds_of_memory(budget, stage)]
                seconds += [budget.seconds_at_peak(*budget.passes()[stage])]
            cells = [f"{launches:,}", *(f"{1000 * value:.1f}" for value in seconds)]
            lines.append(f"| {name}: {stage} | {' | '.join(cells)} |")
    lines += ["", "| launches of | an iteration of a student | a denoising step of a teacher |"]
    lines.append("|---" * 3 + "|")
    for name in ("small", "MAR-B"):
        settings = budgets()[name]().settings
        counts = launches_of_iteration(settings), launches_of_denoising_step(settings)
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def epochs_table() -> str:
    """Hours of GSIM of MAR-B on one GPU, and gigabytes."""
    settings = budgets()["MAR-B"]().settings
    lines = [
        "| updates of MAR-B | epochs | whole models: A100, hours | H100 | heads alone: A100, hours "
        "| H100 |",
        "|---" * 6 + "|",
    ]
    whole_epochs = round(EPOCHS * IMAGENET / settings.batch)
    for updates in (*UPDATES, whole_epochs):
        epochs = updates * settings.batch / IMAGENET
        cells = [f"{updates:,}", f"{epochs:.2g}"]
        for heads in (0, updates):
            for gpu in (A100, H100):
                given = replace(settings, gsim_iters=updates, heads_iters=heads)
                budget = on(gpu, ReleasedBudget(given))
                cells.append(f"{budget.hours()['GSIM']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    peaks = [
        ReleasedBudget(replace(settings, heads_iters=n)).peak()["GSIM"] / GB
        for n in (0, settings.gsim_iters)
    ]
    lines.append(f"| GB | | {peaks[0]:.1f} | | {peaks[1]:.1f} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"{time_table()}\n\n{epochs_table()}")
