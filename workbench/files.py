"""Files that are whole or absent, and checkpoints that are what they say.

A checkpoint is MAR's own layout, {"model": weights, "model_ema": weights}, with what it takes to
use them (kind, settings, class names) and, during training, to continue as if there had been no
interruption (step, training). `maskrl.save` writes the same without the last two.
"""

import argparse
import json
import math
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from torch import Tensor, nn

from maskrl import MAR, add_noise_policy, add_schedule, checkpoint
from workbench.devices import possible_precision
from workbench.distributed import rank
from workbench.errors import InputError, abbreviate
from workbench.precision import set_precision
from workbench.settings import RunSettings

KINDS = ("teacher", "student", "policy")
OLD_FORMAT = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)  # of torch.save before 1.6
FOREIGN = {  # how other files begin that are given for weights
    b"version https://git-lfs": "a git-lfs pointer to the file, which `git lfs pull` downloads",
    b"\x1f\x8b": "compressed (gzip): unpack it first",
    b"7z\xbc\xaf": "compressed (7z): unpack it first",
    b"\xfd7zXZ": "compressed (xz): unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed (zstd): unpack it first",
    b"\x89HDF": "in the HDF5 format, as Keras writes it",
    b"GGUF": "in the GGUF format",
    b"\x80": "a pickle that torch.save did not write",
}
CUT_OFF = "is cut off: its end is missing. Copy or download it again"
PARTS = {"kind": str, "settings": dict, "classes": list, "step": int}  # and the weights


@contextmanager
def writing(path) -> Iterator[BinaryIO]:
    """A file that takes the name `path` when it is complete: an interruption leaves the old file
    or the new one, never half of one. InputError, naming the path, if it cannot be written."""
    path = Path(path)
    if rank():  # the first of several processes writes for all
        with open(os.devnull, "wb") as file:
            yield file
        return
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the old one's name
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # it has its name
            unfinished.unlink()


def check_writable(path) -> None:
    """InputError, before long work, where `writing` would fail."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} cannot be written: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None


def write_text(path, text: str) -> None:
    with writing(path) as file:
        file.write(text.encode())


def as_json(value, **options) -> str:
    """JSON, in which a number that is infinite or NaN is null; options: of json.dumps."""
    return json.dumps(without_nan(value), allow_nan=False, **options)


def without_nan(value) -> Any:
    """The value, with None for every number in it that is infinite or NaN."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def save_safely(path, content: dict) -> None:
    """torch.save, by way of `writing`."""
    with writing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # what torch makes of an error of the file, or of Ctrl-C while it is written
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                raise error.__context__ from None
            raise


def write_checkpoint(path, model: MAR, ema: MAR | None = None, step=0, training=None) -> None:
    """step: how many updates the model has had; training: the state to resume from, None once the
    training is finished."""
    save_safely(path, checkpoint(model, ema) | {"step": step, "training": training})


def load_safely(path, lazily=False) -> Any:
    """What torch.save wrote to `path`, on the CPU; no code in the file is ever run.

    InputError if torch.save did not write it, or if a bit of it has changed, which only files from
    before torch 1.6 hide. An argparse.Namespace, which MAR's own files hold, is read as data; any
    other class is refused by its name. lazily: leave weights on the disk until they are used."""
    if not os.path.exists(path):
        raise InputError(f"there is no checkpoint {path}")
    try:
        problem = problem_of(path)
        if not problem:
            with torch.serialization.safe_globals([argparse.Namespace]):
                lazily = lazily and is_zipfile(path)
                content = torch.load(path, "cpu", weights_only=True, mmap=lazily)
            unwrap_names(content)
            return content
    except Exception as error:
        problem = CUT_OFF
        if not (isinstance(error, EOFError) or "unexpected EOF" in str(error)):
            reason = ", ".join([type(error).__name__, *unsafe_globals(path, error)])
            problem = f"is not a checkpoint that can be read safely ({reason})"
    raise InputError(f"{path} {problem}")


def problem_of(path) -> str | None:
    """What the bytes of a file say against its being one of torch.save, if anything."""
    if os.path.isdir(path):
        return "is a folder; a file in it is needed"
    with open(path, "rb") as file:
        start = file.read(1000)
    if start.startswith(OLD_FORMAT):
        return None
    if not start.startswith(b"PK"):
        return f"is not a checkpoint: it is {foreign_format(start)}"
    if not is_zipfile(path):
        return CUT_OFF
    stat = os.stat(path)
    return damage_of(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)


def foreign_format(start: bytes) -> str:
    """What a file is that begins like this, and was given for one of torch.save."""
    for magic, what in FOREIGN.items():
        if start.startswith(magic):
            return what
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return "in the safetensors format, which holds no settings; torch.save's is needed"
    text = start.decode(errors="replace").strip("\ufeff \t\r\n")
    if text.startswith("<"):
        return "a page for a browser (HTML or XML), as servers answer: download the file again"
    line = " ".join(text.partition("\n")[0][:50].split())
    if line.isprintable() and "\ufffd" not in line:
        return f"a text that begins with {line!r}" if line else "empty"
    return "no file of torch.save"


@cache
def damage_of(path: str, size: int, mtime: int) -> str | None:
    """What is wrong with the zip archive that torch.save makes, if anything, by its checksums,
    which torch.load does not compare. size, mtime: of the file, which is read once per change."""
    with ZipFile(path) as archive:
        parts = archive.infolist()
        names = [Path(part.filename).name for part in parts]
        if "constants.pkl" in names:
            return "is not a checkpoint: it is a TorchScript program"
        if "data.pkl" not in names:
            return "is not a checkpoint: it is a zip archive that torch.save did not write"
        if any(part.compress_type != ZIP_STORED for part in parts):
            return "is damaged: it is compressed, which torch.save never does"
        if sum(part.file_size for part in parts) > size:
            return "is damaged: its parts are larger than the file"
        damaged = archive.testzip()
    return damaged and f"is damaged: the checksum of {damaged} is wrong. Copy or download it again"


def unsafe_globals(path, error: Exception) -> list[str]:
    """The classes and functions that unpickling a file would call, as far as it can be read; of a
    file from before torch 1.6 the first, which the error of torch.load names."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not torch.save's, or old
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
    return sorted(f"it holds a {name}" for name in names if name != "argparse.Namespace")


def unwrap_names(content) -> None:
    """Give weights the names that they have outside of torch.compile and
    DistributedDataParallel."""
    parts = [content, *content.values()] if isinstance(content, dict) else []
    for weights in [part for part in parts if isinstance(part, dict)]:
        for name in [name for name in weights if isinstance(name, str)]:
            own = name.replace("_orig_mod.", "").removeprefix("module.")
            if own not in weights:
                weights[own] = weights.pop(name)


def read_checkpoint(path, kind: str | None = None, lazily=False) -> dict:
    """The content of a checkpoint on the CPU, its "settings" as RunSettings.

    InputError if it is not a checkpoint, if it is of another kind, or if its settings are out of
    range. lazily: as in `load_safely`."""
    content = load_safely(path, lazily)
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a maskrl checkpoint")
    content = {"step": 0, "training": None} | content
    for name, accepted in PARTS.items():
        if not isinstance(content.get(name), accepted):
            raise InputError(
                f"{path} is not a maskrl checkpoint: its {name} must be of type {accepted.__name__}"
            )
    if content["kind"] not in KINDS or content["step"] < 0:
        raise InputError(f"{path} is not a maskrl checkpoint")
    if not all(isinstance(name, str) for name in content["classes"]):
        raise InputError(f"{path}: its classes must be a list of names")
    for part in ("model", "model_ema"):
        tensors_of(path, content, part)
    if kind and content["kind"] != kind:
        raise InputError(f"{path} is a {content['kind']}; a {kind} is needed here")
    return content | {"settings": settings_of(path, content["settings"])}


def settings_of(path, values: dict) -> RunSettings:
    """The RunSettings in a checkpoint; InputError for unknown ones and wrong values."""
    unknown = {str(name) for name in values} - {f.name for f in fields(RunSettings)}
    if unknown:
        names = abbreviate(sorted(unknown), 3)
        raise InputError(f"{path} has settings that this version does not know: {names}")
    try:
        settings = RunSettings(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if settings.scale == 0:
        raise InputError(f"{path}: its --scale is 0, which only a new training can measure")
    return settings


def load_checkpoint(path, kind: str | None = None, device="cpu") -> MAR:
    """The EMA model of a checkpoint, ready for `generate`; InputError if the file is not sound."""
    content = read_checkpoint(path, kind, lazily=True)
    shape_of(path, content["model_ema"], "z_proj.weight", 2)
    model = build_and_load(path, partial(untrained, content), content["model_ema"])
    return frozen(model, device)


def untrained(content: dict) -> MAR:
    """A MAR with the parts that a checkpoint's model has, with new weights."""
    settings, weights = content["settings"], content["model_ema"]
    image_channels = weights["z_proj.weight"].shape[1] // settings.patch**2
    model = MAR(settings, content["classes"], content["kind"], image_channels)
    if model.kind == "policy" and "noise_policy.norm.weight" in weights:
        add_noise_policy(model)
    if model.kind == "policy" and "schedule.norm.weight" in weights:
        add_schedule(model)
    return model


def frozen(model: MAR, device) -> MAR:
    """The model on the device, ready for `generate`, in the precision of its RunSettings if the
    device can."""
    precision = possible_precision(model.settings.precision, torch.device(device))
    set_precision(model, precision, model.settings.checkpointing)
    return model.to(device).eval().requires_grad_(False)


def tensors_of(path, content: dict, part: str) -> dict[str, Tensor]:
    """The weights under `part` of a file's content; InputError if they are not there."""
    weights = content.get(part) if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise InputError(f"{path} has no weights under {part!r}")
    for name, value in weights.items():
        if not (isinstance(name, str) and torch.is_tensor(value)):
            raise InputError(f"{path}: {name!r} under {part!r} is not a tensor with a name")
        if value.layout != torch.strided or value.is_meta or value.is_complex():
            raise InputError(f"{path}: {name} is not a plain tensor")
    if sum(value.nbytes for value in weights.values()) > os.path.getsize(path):
        raise InputError(f"{path}: its weights under {part!r} are larger than the file")
    for name, value in weights.items():
        if not value.isfinite().all():
            raise InputError(f"{path}: {name} under {part!r} has weights that are infinite or NaN")
    return weights


def build_and_load(
    path, build: Callable, weights: dict[str, Tensor], rename: Callable = str
) -> nn.Module:
    """The module build() on the CPU with the `weights` of a file, which calls them rename(name).

    Shapes are compared first, on a module without memory, so that weights that do not fit take
    none; InputError names them."""
    with torch.device("meta"):
        expected = build().state_dict()
    check_names_and_shapes(path, {rename(name): expected[name] for name in expected}, weights)
    module = build()
    weights = {name: weights[rename(name)] for name in expected}
    for name, own in module.state_dict().items():
        if not own.is_floating_point() and not torch.equal(own, weights[name]):
            raise InputError(f"{path}: {name} does not follow from its settings")
    module.load_state_dict(weights)
    return module


def check_names_and_shapes(path, module: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """InputError naming what is missing, unexpected or misshapen in weights of `path`."""
    wrong = [f"{name} is missing" for name in module if name not in weights]
    wrong += [f"{name} is unexpected" for name in weights if name not in module]
    for name, value in weights.items():
        if name in module and value.shape != module[name].shape:
            wrong.append(f"{name} is {list(value.shape)}, not {list(module[name].shape)}")
        elif name in module and value.is_floating_point() != module[name].is_floating_point():
            wrong.append(f"{name} is of type {value.dtype}, not {module[name].dtype}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(
            f"{path}: its weights do not fit its settings: {'; '.join(wrong[:5])}{more}"
        )


def shape_of(path, weights: dict[str, Tensor], name: str, dimensions: int) -> torch.Size:
    """The shape of one of the weights; InputError unless it is there and has the dimensions."""
    if name not in weights:
        raise InputError(f"{path}: {name} is missing")
    if weights[name].ndim != dimensions:
        raise InputError(f"{path}: {name} is {list(weights[name].shape)}: a wrong shape")
    return weights[name].shape


def count_blocks(weights: dict[str, Tensor], prefix: str) -> int:
    """How many blocks have weights called prefix.<number>.<...>."""
    start = prefix + "."
    return len({name[len(start) :].split(".")[0] for name in weights if name.startswith(start)})
