"""What gpu.py measures on a GPU, part by part.

A part is a function of a Meter, which writes each figure into the part's file at once.
"""

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import train_rl
from maskrl import (
    MAR,
    Diffusion,
    Distillation,
    PolicyGradient,
    RewardBackpropagation,
    TeacherTraining,
    draw_noise,
    generate,
    one_step,
    rng,
)
from workbench.bench import bench_arms
from workbench.files import as_json, load_checkpoint, write_text
from workbench.precision import set_precision
from workbench.settings import RELEASED, RunSettings, flag, preset
from workbench.studies import records
from workbench.timing import clock

SIZES = {"tiny": {}, "small": {}, "mar_b": {"steps": 64, "precision": "bf16"}}
DRY = {  # of every size, on a CPU
    **{"image_size": 4, "patch": 2, "width": 16, "depth": 1, "heads": 1, "buffer": 1},
    **{"head_width": 16, "head_depth": 1, "steps": 2, "denoise_steps": 2, "batch": 2},
    **{"prompts": 2, "group": 2, "precision": "fp32", "micro_batch": 0},
}
STAGES = ("teacher", "GSIM", "RL, z", "RL, x", "backprop, z", "GSIM, heads alone")
ARMS = ("student", "student + cache", "student + schedule", "all together", "teacher, 100 steps")


BATCHES = (1, 64)  # images at a time


class Meter:
    """The figures of one part, in a file from the first of them on."""

    def __init__(self, device: torch.device, seconds: float, path: Path):
        self.device, self.path, self.rows = device, path, {}
        self.until = time.monotonic() + seconds
        self.dry = device.type == "cpu"

    def left(self) -> float:
        return self.until - time.monotonic()

    def measure(self, calls: dict[str, Callable]) -> None:
        """The rows {name: call(seconds) -> figures}, which share the time that is left."""
        for i, (name, call) in enumerate(calls.items()):
            if self.left() <= 0 and not self.dry:  # a dry run tries every row
                self.keep(name, {"skipped": "no time left"})
                continue
            try:
                self.keep(name, call(self.left() / (len(calls) - i)))
            except Exception as error:  # of a kind that nobody has met yet
                self.keep_error(name, error)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def keep_error(self, name: str, error: Exception) -> None:
        self.keep(name, {"error": f"{type(error).__name__}: {error}".split("\n")[0][:300]})

    def keep(self, name: str, figures: dict) -> None:
        self.rows[name] = records.rounded(figures)
        write_text(self.path, as_json(self.rows, indent=1))


def per_second(call: Callable, device: torch.device, seconds: float) -> dict:
    """How often `call` runs in a second, after once, which is not counted unless it takes all of
    the time: then kernels are chosen, and memory is reserved."""
    start = clock(device)
    call()
    first, n, spent = clock(device) - start, 0, 0.0
    start = clock(device)
    while first + spent + spent / max(n, 1) < seconds:
        call()
        n, spent = n + 1, clock(device) - start
    return {"per_second": n / spent if n else 1 / first, "calls": n, "first_seconds": first}


def on_the_gpu(call: Callable, device: torch.device) -> dict:
    """Of one call on CUDA: how often the host waited, and kernels launched."""
    if device.type != "cuda":
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        call()
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(warning.message) for warning in caught)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize(device)
    launches = sum(e.count for e in profiled.key_averages() if "LaunchKernel" in e.key)
    return {"host_waits": waits, "launches": launches}


# Models of random weights -------------------------------------------------------------------------


def settings_of(size: str, dry: bool, **overrides) -> RunSettings:
    fitting = SIZES[size] | (DRY if dry else {}) | overrides
    return preset(size, scale=1.0, **fitting)


def random_model(size: str, kind: str, meter: Meter, **overrides) -> MAR:
    """Weights with which images differ: at their start most of the head's are zero."""
    settings = settings_of(size, meter.dry, **overrides)
    torch.manual_seed(0)
    model = MAR(settings, ["a", "b"], kind, 16 if size in RELEASED else 3)
    for p in model.head.parameters():
        nn.init.normal_(p, std=0.05)
    set_precision(model, settings.precision, settings.checkpointing)
    return model.to(meter.device).eval().requires_grad_(False)


def brightness(images: Tensor, labels: Tensor) -> Tensor:
    return images.mean((1, 2, 3)).sigmoid()


def update_of(size: str, stage: str, meter: Meter, **overrides) -> tuple[Callable, nn.Module]:
    """update(), on one batch of noise, and the model that learns."""
    name, _, how = stage.partition(", ")
    if name == "GSIM" and how:
        overrides["heads_iters"] = 1
    elif how:
        overrides["action"] = how
    teacher = random_model(size, "teacher", meter, **overrides)
    settings, device = teacher.settings, meter.device
    x = torch.randn(settings.batch, settings.length, teacher.channels, device=device)
    labels = torch.arange(settings.batch, device=device) % 2
    if name == "teacher":
        channels = teacher.channels // settings.patch**2
        training = TeacherTraining(settings, teacher.classes, device, channels)
    elif name == "GSIM":
        training = Distillation(teacher, settings)
    else:
        method = {"RL": PolicyGradient, "backprop": RewardBackpropagation}[name]
        student = random_model(size, "student", meter, **overrides)
        training = method(student, settings, brightness, x.mean(0, keepdim=True))
        labels = torch.arange(training.prompts(0), device=device) % 2
    for network in vars(training).values():
        if isinstance(network, MAR):
            set_precision(network, settings.precision, settings.checkpointing, settings.compile)
    inputs = [x, labels] if name in ("teacher", "GSIM") else [labels]
    return partial(training.update, 0, *inputs, seed=0), training.model


# The parts ----------------------------------------------------------------------------------------


def about(meter: Meter) -> None:
    """Device and versions."""
    figures = records.provenance(meter.device) | {"python": sys.version.split()[0]}
    if meter.device.type == "cuda":
        properties = torch.cuda.get_device_properties(meter.device)
        figures |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": properties.total_memory / 1e9,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    meter.keep("about", figures)


def agreement(meter: Meter) -> None:
    """The GPU against the CPU in float32, and an update against its repetition."""
    calls = {f"{kind} of the tutorial": partial(differences, kind, meter) for kind in KINDS}
    for stage in ("teacher", "GSIM", "RL, x"):
        for precision in ("fp32", "bf16"):
            repeat = partial(repeated, stage, precision, meter)
            calls[f"two equal updates, {stage}, {precision}"] = repeat
    meter.measure(calls)


KINDS = ("teacher", "student")


@torch.no_grad()
def differences(kind: str, meter: Meter, seconds: float) -> dict:
    """Root mean square differences to the CPU, relative to the standard deviation there."""
    path = records.ASSETS / "tutorial" / f"{kind}.pt"
    results = []
    for device in (torch.device("cpu"), meter.device):
        model = load_checkpoint(path, kind, device)
        noise = draw_noise(model, 16, rng("gpu"), "random")  # of the CPU
        tokens, labels = noise.z.to(device), (torch.arange(16) % 9).to(device)
        mask = (noise.order < model.length // 2).to(device)
        c = model.context(tokens, mask, labels)
        g = one_step(model.head, tokens.flatten(0, 1), c.flatten(0, 1), 5.0)
        results.append({"context": c.cpu(), "one step": g.cpu()})
    here, there = results
    return {
        name: float((there[name] - here[name]).square().mean().sqrt() / here[name].std())
        for name in here
    }


def repeated(stage: str, precision: str, meter: Meter, seconds: float) -> dict:
    """Whether two updates from the same state give the same weights, bit for bit."""
    weights = []
    for _ in range(2):
        update, model = update_of("tiny", stage, meter, precision=precision)
        update()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return {"equal": torch.equal(*weights), "largest": float((weights[0] - weights[1]).abs().max())}


def updates(meter: Meter) -> None:
    """Updates a second of every stage, and what they need."""
    pairs = [(size, stage) for size in SIZES for stage in STAGES]
    meter.measure({f"{size}, {stage}": partial(rate, size, stage, meter) for size, stage in pairs})


def rate(size: str, stage: str, meter: Meter, seconds: float) -> dict:
    on_cuda = meter.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(meter.device)
    update, _ = update_of(size, stage, meter)
    figures = per_second(update, meter.device, seconds / 2)
    if on_cuda:
        figures["peak_gb"] = torch.cuda.max_memory_allocated(meter.device) / 1e9
    if 4 * figures["first_seconds"] < seconds:  # there is time for two more
        figures |= on_the_gpu(update, meter.device)
    return figures


def images(meter: Meter) -> None:
    """Images a second of every idea, one at a time and 64."""
    rows = [(size, name, n) for size in ("small", "mar_b") for n in BATCHES for name in ARMS]
    calls = {f"{size}, {name}, batch {n}": (size, name, n) for size, name, n in rows}
    meter.measure({row: partial(image_rate, *key, meter) for row, key in calls.items()})


def image_rate(size: str, name: str, batch: int, meter: Meter, seconds: float) -> dict:
    kind = "teacher" if name.startswith("teacher") else "student"
    model = random_model(size, kind, meter)
    steps = model.settings.steps
    model, sampling = bench_arms({kind: model}, steps)[name]
    labels = torch.arange(batch, device=meter.device) % 2
    figures = per_second(partial(generate, model, labels, sampling), meter.device, seconds)
    return figures | {"images_per_second": batch * figures["per_second"], "steps": steps}


def precision(meter: Meter) -> None:
    """float32, its products in TF32, and bfloat16: speed, and how far images move."""
    model = random_model("small", "student", meter, precision="fp32")
    labels = torch.arange(4 if meter.dry else 64, device=meter.device) % 2
    expected = generate(model, labels)
    figures = partial(in_precision, model, labels, expected, meter)
    meter.measure({how: partial(figures, how) for how in ("fp32", "TF32", "bf16")})


def in_precision(model, labels, expected, meter: Meter, how: str, seconds: float) -> dict:
    precision = how.lower()
    set_precision(model, precision)
    difference = (generate(model, labels) - expected).square().mean().sqrt()
    figures = per_second(partial(generate, model, labels), meter.device, seconds / 2)
    update, _ = update_of("small", "teacher", meter, precision=precision)
    trained = per_second(update, meter.device, seconds / 2)
    figures["images_per_second"] = len(labels) * figures["per_second"]
    figures["difference"] = float(difference / expected.std())
    return figures | {"updates_per_second": trained["per_second"]}


def compiled(meter: Meter) -> None:
    """The head in its chain, and a transformer block there and back: as they are, compiled, and in
    CUDA graphs; and updates with --compile."""
    ways = ("eager", "compiled", "CUDA graphs")
    calls = {f"chain of the head, {how}": partial(chain_rate, how, meter) for how in ways}
    calls |= {f"block, {how}": partial(block_rate, how, meter) for how in ways}
    for how, stage in product(ways[:2], ("teacher", "GSIM")):
        calls[f"update of {stage}, {how}"] = partial(update_rate, stage, how, meter)
    meter.measure(calls)


def in_way(how: str, module: nn.Module, meter: Meter) -> Callable:
    if how == "eager":
        return module
    if meter.dry:  # without a compiler
        return torch.compile(module, backend="eager")
    return torch.compile(module, mode="reduce-overhead" if how == "CUDA graphs" else None)


@torch.no_grad()
def chain_rate(how: str, meter: Meter, seconds: float) -> dict:
    """Chains of 20 steps for 64 tokens, a second."""
    model = random_model("small", "teacher", meter)
    head, chain = in_way(how, model.head, meter), Diffusion(20)
    c = torch.randn(64, model.settings.width, device=meter.device)
    x = torch.randn(64, model.channels, device=meter.device)
    generator = rng("gpu", device=meter.device)
    call = partial(chain.sample, partial(head, c=c), x, generator)
    return per_second(call, meter.device, seconds) | on_the_gpu(call, meter.device)


def block_rate(how: str, meter: Meter, seconds: float) -> dict:
    """Forward and backward passes of 8 images, a second."""
    model = random_model("small", "teacher", meter).requires_grad_(True)
    block = in_way(how, deepcopy(model.decoder_blocks[0]), meter)
    rows = model.settings.buffer + model.length
    x = torch.randn(8, rows, model.settings.width, device=meter.device, requires_grad=True)
    return per_second(partial(there_and_back, block, x), meter.device, seconds)


def update_rate(stage: str, how: str, meter: Meter, seconds: float) -> dict:
    """Updates of `small` a second; a dry run compiles nothing."""
    update, _ = update_of("small", stage, meter, compile=how == "compiled" and not meter.dry)
    return per_second(update, meter.device, seconds)


def there_and_back(module: Callable, x: Tensor) -> None:
    module(x).square().mean().backward()


def tests(meter: Meter) -> None:
    """The tests of what a GPU refuses, on this one."""
    if meter.dry:
        meter.keep("tests", {"skipped": "they are of a GPU"})
        return
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "tests/test_pretend_gpu.py"]
    done = subprocess.run(
        command, cwd=records.ROOT, capture_output=True, text=True, timeout=meter.left()
    )
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    meter.keep("tests", {"summary": lines[-1] if lines else done.stderr[-300:], "failed": failed})


def shapes(meter: Meter) -> None:
    """train_rl.py on the built-in shapes, with as many updates as there is time for."""
    share = min(1.0, 0.5 * meter.left() / seconds_of_training(meter.path.parent))
    iters = ("teacher_iters", "gsim_iters", "rl_iters", "schedule_iters", "judge_iters")
    few = {name: max(2, round(share * getattr(preset("tiny"), name))) for name in iters}
    if meter.dry:
        few = dict.fromkeys(iters, 2) | DRY | {"image_size": 8, "judge_n": 18, "per_class": 20}
    argv = [word for name, value in few.items() for word in (flag(name), str(value))]
    folder = Path(tempfile.mkdtemp(prefix="shapes-", dir=meter.path.parent))
    argv += ["--out", str(folder / "run"), "--device", str(meter.device)]
    meter.keep("share of the updates", {"share": share})
    metrics = train_rl.main(argv)
    meter.keep("minutes", metrics["minutes"])
    for name, row in metrics["rows"].items():
        meter.keep(name, row)


def seconds_of_training(out: Path) -> float:
    """An estimate for all updates of the preset tiny, from the rates in updates.json."""
    settings, path = preset("tiny"), out / "updates.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    rates = [rows.get(f"tiny, {stage}", {}).get("per_second", 5.0) for stage in STAGES[:3]]
    rl = settings.rl_iters + 4 * settings.schedule_iters
    return sum(n / r for n, r in zip((settings.teacher_iters, settings.gsim_iters, rl), rates))


PARTS = {  # and the share of the time that each may take, with all that those before it left over
    "about": (about, 0.02),
    "agreement": (agreement, 0.06),
    "updates": (updates, 0.26),
    "images": (images, 0.16),
    "precision": (precision, 0.08),
    "compiled": (compiled, 0.12),
    "tests": (tests, 0.12),
    "shapes": (shapes, 0.18),
}
