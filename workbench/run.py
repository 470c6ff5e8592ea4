"""A run: a folder that belongs to one process at a time, and the stages of training in it.

A stage is interrupted at any moment and loses little: Ctrl-C and SIGTERM let a step finish and save
it, a checkpoint is written every minute or so, and --resume goes on from the last one to the very
same weights, because every step draws its noise from (seed, stage, step).
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

from maskrl import MAR
from workbench.choices import check_settings, save_run_args
from workbench.distributed import agreed, average_gradients, rank
from workbench.errors import InputError, Stopped, abbreviate, is_out_of_memory
from workbench.files import as_json, read_checkpoint, write_checkpoint, write_text
from workbench.precision import set_precision
from workbench.progress import estimated_time, summary_writer
from workbench.settings import RunSettings
from workbench.signals import HeldSignals
from workbench.timing import clock

SAVE_SECONDS = 60.0  # from one checkpoint to the next, at least,
SAVE_COST = 20.0  # and so many times as long as it took to write the last one: MAR-H has 30 GB
ESTIMATE_AFTER = 60.0  # seconds of a run, before it says how long it will take


class Run:
    """What the stages of a training share: folder, settings, data and device.

    A context manager: meanwhile no other process trains in the folder `out`."""

    def __init__(self, args, settings: RunSettings, data, device: torch.device):
        self.args, self.settings, self.data, self.device = args, settings, data, device
        self.out, self.resume = args.out, args.resume
        self.minutes = {}  # {stage: minutes that it took here}
        self.began, self.is_estimated = time.monotonic(), False
        self.tensorboard = summary_writer() if getattr(args, "tensorboard", False) else None

    def __enter__(self) -> "Run":
        self.lock = lock_run_dir(self.out)
        try:
            save_run_args(self.args, self.data)
            if self.resume and any(self.out.glob("*.pt")):
                check_settings(self.out / "settings.json", self.settings)
            write_text(self.out / "settings.json", as_json(asdict(self.settings), indent=1))
        except BaseException:  # also Ctrl-C
            self.lock.release()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.lock.release()

    def stage(self, training, measure: Callable | None = None, times: int = 10) -> "Stage":
        """training: a TeacherTraining, Distillation, PolicyGradient or RewardBackpropagation.

        measure(model) -> values to log, so many times in the stage; with a `validation` among them,
        the stage ends with the weights for which that was lowest."""
        return Stage(self, training, measure, times)


class Stage:
    """One training of a run, which writes out/<kind of model>.pt and out/log.jsonl.

        with run.stage(training, measure, times) as stage:
            for step in stage:
                stage.log(training.update(step, ...))

    After Ctrl-C or SIGTERM it raises Stopped when the step is finished and saved; a measurement
    that was due is left to --resume. To a FloatingPointError in the block it adds the stage, the
    step and the tensors, and it leaves a checkpoint from before the step or, if half of the step is
    done, the last one: from there --resume repeats what led to it. InputError if --resume finds a
    checkpoint of another training."""

    def __init__(self, run: Run, training, measure: Callable | None, times: int):
        self.run, self.training, self.measure, self.times = run, training, measure, times
        self.networks = [value for value in vars(training).values() if isinstance(value, MAR)]
        self.name, self.iters = training.model.kind, training.iters
        self.path = Path(run.out) / f"{self.name}.pt"
        # seconds of all updates so far; the lowest validation, and the EMA weights that it is of;
        # whether the last step is still to be measured
        self.record = {"seconds": 0.0, "lowest": math.inf, "weights": {}, "unmeasured": False}
        self.start = 0

    def __enter__(self) -> "Stage":
        if self.run.resume and self.path.exists():
            self.start = restore(self.training, self.path, self.record, self.iters)
        self.saved = self.start
        self.step = max(0, self.start - 1)
        self.weights_changed = False  # by a step that is not complete
        self.path.parent.mkdir(parents=True, exist_ok=True)
        trim_log(self.run.out, self.name, self.start)
        self.writer = None
        if self.run.tensorboard and rank() == 0:
            folder = Path(self.run.out) / "tensorboard" / self.name
            # which shows no point from the step on that is now done again
            self.writer = self.run.tensorboard(folder, purge_step=self.start)
        settings = self.run.settings
        for network in self.networks:
            set_precision(network, settings.precision, settings.checkpointing, settings.compile)
        self.bar = tqdm(
            range(self.start, self.iters), self.name, self.iters, initial=self.start, mininterval=1
        )
        with ExitStack() as stack:
            stack.callback(self.bar.close)
            if self.writer:
                stack.callback(self.writer.close)
            stack.enter_context(average_gradients(self.networks))
            for value in self.training.state.values():
                if isinstance(value, torch.optim.Optimizer):
                    stack.callback(value.register_step_post_hook(self.note_change).remove)
            self.signals = stack.enter_context(HeldSignals())
            self.undo = stack.pop_all()
        self.began = self.saved_at = time.monotonic()
        self.save_seconds = 0.0
        return self

    def __exit__(self, _, error, traceback) -> None:
        with self.undo:
            if isinstance(error, FloatingPointError):
                self.save_and_explain(error)
        if self.start < self.iters:
            self.run.minutes[self.name] = (time.monotonic() - self.began) / 60

    def __iter__(self) -> Iterator[int]:
        if self.record["unmeasured"]:
            self.measure_step()
            self.save_if_due(self.start)
        for step in self.bar:
            self.step, self.weights_changed = step, False
            self.step_began = time.perf_counter()
            yield step
            if self.is_due:
                self.measure_step()
            self.estimate()
            self.save_if_due(step + 1)
        stop = self.agreed_signal()
        if stop:  # it arrived while the last file was written
            where = f"{self.name} is complete in {self.path}"
            raise Stopped(stop, f"{where}; the same command with --resume continues")

    def save_if_due(self, done: int) -> None:
        """Save at the end, from time to time, and before Stopped, which a signal raises."""
        stop, complete = self.agreed_signal(), self.is_complete(done)
        if complete and self.record["weights"]:
            self.training.ema.load_state_dict(self.record["weights"])
        if complete or stop or self.time_to_save():
            self.save(done)
        if stop and not complete:
            self.agreed_signal()  # no process ends before the file is written
            where = f"{self.name} is saved in {self.path} after {done} steps"
            raise Stopped(stop, f"{where}; the same command with --resume continues")

    def is_complete(self, done: int) -> bool:
        return done == self.iters and not self.record["unmeasured"]

    def agreed_signal(self) -> int:
        """The signal that stops all processes, or 0."""
        return agreed(self.signals.first, self.training.model.device)

    def note_change(self, *_) -> None:
        self.weights_changed = True

    @property
    def is_due(self) -> bool:
        """Whether a measurement is due after this step."""
        if not self.measure:
            return False
        return (self.step + 1) * self.times // self.iters > self.step * self.times // self.iters

    def measure_step(self) -> None:
        """Measure and log what the last step left, unless a signal comes before or meanwhile."""
        self.record["unmeasured"] = True
        if self.agreed_signal():
            return
        try:
            with self.signals.raised():
                values = self.measure(self.training.ema)
        except Stopped:  # noted, and dealt with when this step is saved
            return
        self.log_measured(values)
        if "validation" in values:
            self.keep_best(values["validation"])
        self.record["unmeasured"] = False

    def estimate(self) -> None:
        """Say, a minute after the run began, how long all of it will take."""
        done, now = self.step + 1 - self.start, time.monotonic()
        if self.run.is_estimated or now - self.run.began < ESTIMATE_AFTER or done < 3:
            return
        self.run.is_estimated = True
        seconds = now - self.began, now - self.run.began
        self.bar.write(estimated_time(self.run, self.name, self.step + 1, done, *seconds))

    def log(self, metrics: dict[str, float]) -> None:
        """Log the metrics of this step's update; of some 200 steps in a stage, and the last."""
        logged = self.step % max(1, self.iters // 200) == 0 or self.step == self.iters - 1
        # a GPU is waited for where its time is read or other work begins; what is left of the
        # other updates counts in the next one
        waits = logged or self.is_due
        now = clock(self.training.model.device) if waits else time.perf_counter()
        self.record["seconds"] += now - self.step_began
        if logged:
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in list(metrics.items())[:3]})
            self.log_measured(metrics)

    def log_measured(self, values: dict[str, float]) -> None:
        """Log values at any step."""
        values = {"seconds": self.record["seconds"]} | values
        rounded = {name: round(value, 6) for name, value in values.items()}
        append_log(self.run.out, {"stage": self.name, "step": self.step, **rounded})
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, self.step)

    def keep_best(self, validation: float) -> None:
        """In the end `ema` gets the weights that had the lowest validation."""
        validation = agreed(validation, self.training.model.device)
        if validation < self.record["lowest"]:
            weights = deepcopy(self.training.ema.state_dict())
            self.record |= {"lowest": validation, "weights": weights}

    def time_to_save(self) -> bool:
        waited = time.monotonic() - self.saved_at
        return waited > max(SAVE_SECONDS, SAVE_COST * self.save_seconds)

    def save(self, step: int) -> None:
        """Write the checkpoint; FloatingPointError, and no file, if a weight is infinite or NaN."""
        began, training = time.monotonic(), self.training
        weights = [p for network in self.networks for p in network.parameters()]
        if not torch.stack([p.isfinite().all() for p in weights]).all():  # asked of a GPU once
            raise FloatingPointError("the weights are infinite or NaN")
        state = {name: value.state_dict() for name, value in training.state.items()}
        state["record"] = self.record
        unfinished = None if self.is_complete(step) else state
        write_checkpoint(self.path, training.model, training.ema, step, unfinished)
        self.saved, self.saved_at = step, time.monotonic()
        self.save_seconds = self.saved_at - began

    def save_and_explain(self, error: FloatingPointError) -> None:
        """Raise the error with where it happened and how to go on."""
        if not self.weights_changed and self.step > self.saved:
            with suppress(FloatingPointError):  # if an earlier step spoilt the weights
                self.save(self.step)
        repeats = "Nothing was saved; the same command repeats what led here"
        if self.saved:
            good = f"{self.path} holds the good weights after {self.saved} steps"
            repeats = f"{good}, and --resume repeats what led here"
        where = f"{self.name}, step {self.step}: {error}{non_finite_tensors(self.training)}"
        raise FloatingPointError(
            f"{where}. {repeats}. If training diverged, start afresh in another --out with a "
            "lower learning rate"
        ) from None


def non_finite_tensors(training) -> str:
    """Names of the weights and gradients that are not finite, for a message."""
    modules = {f"{k}.": v for k, v in training.state.items() if isinstance(v, nn.Module)}
    names = []
    for prefix, network in ({"": training.model} | modules).items():
        for name, p in network.named_parameters():
            if not p.isfinite().all():
                names.append(prefix + name)
            elif p.grad is not None and not p.grad.isfinite().all():
                names.append(f"the gradient of {prefix}{name}")
    return f" ({abbreviate(names, 3)})" if names else ""


def restore(training, path: Path, record: dict, iters: int) -> int:
    """Put the checkpoint at `path` into `training` and `record`; returns the step to go on with.

    InputError if it does not fit them."""
    content = read_checkpoint(path, training.model.kind)
    step, state = content["step"], content["training"]
    if step > iters or (state is None and step < iters):
        raise InputError(f"{path} is of step {step} of {iters}: --resume cannot go on with it")
    try:
        load_state(training.model, content["model"])
        load_state(training.ema, content["model_ema"])
        if state is not None:
            check_same_form(dict.fromkeys([*training.state, "record"]), dict.fromkeys(state))
            weights = training.ema.state_dict() if state["record"]["weights"] else {}
            check_same_form(record | {"weights": weights}, state["record"])
            record.update(state["record"])
            for name, value in training.state.items():
                load_state(value, state[name])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
        raise InputError(
            f"{path} is not of this training, or of another version of torch: --resume cannot go "
            f"on with it ({reason})"
        ) from None
    return step


def load_state(value, saved) -> None:
    """value.load_state_dict(saved), of a network, an optimizer or a learning rate schedule.

    ValueError if `saved` has another form."""
    form = value.state_dict()
    if isinstance(value, torch.optim.Optimizer):  # which adds averages of gradients as it steps
        parameters = [p for group in value.param_groups for p in group["params"]]
        if len({frozenset(entries) for entries in saved["state"].values()}) > 1:
            raise ValueError("an optimizer that keeps less of some parameters than of others")
        form["state"] = {
            i: {key: torch.zeros(()) if key == "step" else parameters[i] for key in entries}
            for i, entries in saved["state"].items()
        }
        for own, group in zip(form["param_groups"], saved["param_groups"]):
            # how it computes is a matter of this device, not of where the file was written
            group |= {key: own[key] for key in ("foreach", "fused", "capturable") if key in own}
    check_same_form(form, saved)
    for own, group in zip(form.get("param_groups", []), saved.get("param_groups", [])):
        if own["params"] != group["params"]:
            raise ValueError("an optimizer of other parameters")
    value.load_state_dict(saved)


def check_same_form(own, saved) -> None:
    """ValueError unless `saved` has the keys, types and shapes of `own`, and finite tensors."""
    if isinstance(own, dict):
        same = isinstance(saved, dict) and own.keys() == saved.keys()
        pairs = [(own[key], saved[key]) for key in own] if same else []
    elif isinstance(own, (list, tuple)):
        same = isinstance(saved, (list, tuple)) and len(own) == len(saved)
        pairs = zip(own, saved) if same else []
    elif torch.is_tensor(own):
        same = torch.is_tensor(saved) and own.shape == saved.shape and saved.isfinite().all()
        pairs = []
    else:
        same, pairs = isinstance(saved, type(own)), []
    if not same:
        raise ValueError(f"an unexpected {type(saved).__name__}")
    for pair in pairs:
        check_same_form(*pair)


def lock_run_dir(out: Path) -> FileLock:
    """Make this process the only one that trains in the folder `out`, until the lock is released
    or the process ends in any way; InputError if another one does."""
    lock = FileLock(out / ".lock")
    if rank():  # the first of several processes holds it for all
        return lock
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another run is at work in --out {out}: wait for it, or stop it first"
        ) from None
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}") from None
    return lock


def read_log(out) -> list[dict]:
    """The lines of out/log.jsonl, except damaged ones, as a power failure cuts one short; none if
    there is no such file."""
    path, lines = Path(out) / "log.jsonl", []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def append_log(out, line: dict) -> None:
    """One more line in out/log.jsonl."""
    if rank():  # the first of several processes writes for all
        return
    path = Path(out) / "log.jsonl"
    try:
        with open(path, "a") as file:
            file.write(as_json(line) + "\n")
            file.flush()
            os.fsync(file.fileno())  # on the disk before the checkpoint that comes after it
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def trim_log(out, stage: str, start: int) -> None:
    """Take from out/log.jsonl the lines of a stage from step `start` on, which it logs again."""
    path = Path(out) / "log.jsonl"
    kept = [line for line in read_log(out) if line["stage"] != stage or line["step"] < start]
    if path.exists():
        write_text(path, "".join(as_json(line) + "\n" for line in kept))
