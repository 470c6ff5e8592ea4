"""What a run was begun with, so that --resume goes on with the same."""

import hashlib
import json
import os
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from workbench.data import Data
from workbench.errors import InputError, abbreviate
from workbench.files import as_json, write_text
from workbench.settings import MEMORY_SETTINGS, RunSettings, flag


def save_run_args(args: Namespace, data: Data) -> None:
    """Keep a digest of each class's images, and --vae, --features, --teacher, --student, --reward,
    --held-out, --preset and --quick, in out/choices.json; InputError where a resumed run has
    others.

    What the images are counts, not where they lie: a folder may be moved, or have another path.
    The file names code: what it says is compared with what is given, and never used."""
    path = args.out / "choices.json"
    given = {"data": str(Path(data.name)), "vae": said_of(args.vae or "")}
    given["features"] = said_of(args.features)
    if "reward" in args:  # train_distill.py has none
        given["reward"] = said_of_weights(args.reward)
        given["held_out"] = args.held_out or ""
        given["student"] = said_of(args.student or "")
    if not given.get("student"):  # else it is for the report alone
        given["teacher"] = said_of(args.teacher or "")
    begun = args.resume and path.exists() and any(args.out.glob("*.pt"))
    kept = read_choices(path) if begun else {}
    changes = image_changes(kept.get("images", data.digests), data.digests)
    if changes:
        raise InputError(
            f"{args.out} was begun with other images than those of --data {data.name}: "
            f"{abbreviate(changes)}. Give the same again, or another --out"
        )
    for name in given:
        if name == "data" and "images" in kept:
            continue
        if content(kept.get(name, given[name])) != content(given[name]):
            raise InputError(
                f"{args.out} was begun with {flag(name)} {kept[name] or None}, not "
                f"{given[name] or None}: give it again, or another --out"
            )
    for name in ("preset", "quick"):  # where a checkpoint has the settings, they may be left out
        asked = str(getattr(args, name) or "")
        before = kept.get(name, asked)
        if asked and asked != before:
            how = f"with {flag(name)} {before}" if before else f"without {flag(name)}"
            raise InputError(f"{args.out} was begun {how}: give the same again, or another --out")
        if name in kept or not begun:
            given[name] = before
    write_text(path, as_json(kept | given | {"images": data.digests}))


def check_settings(path: Path, settings: RunSettings) -> None:
    """InputError if a run was begun with other settings, which the file at `path` keeps.

    As long as it has no checkpoint of a model, which fixes them, options say what they are."""
    try:
        begun = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError:
        raise InputError(f"{path} cannot be read: delete it") from None
    for name, value in asdict(settings).items():
        may_differ = name in (*MEMORY_SETTINGS, "mean", "scale")  # these two are measured
        if not may_differ and begun.get(name, value) != value:
            raise InputError(
                f"{path.parent} was begun with {flag(name)} {begun[name]}, not {value}: give the "
                "same options again, or another --out"
            )


def read_choices(path: Path) -> dict[str, Any]:
    """The content of choices.json; InputError if that is damaged."""
    try:
        kept = json.loads(path.read_bytes())
        images = dict(kept.pop("images")) if "images" in kept else None
        kept = {name: str(value) for name, value in kept.items()}
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it") from None
    return kept if images is None else kept | {"images": images}


def image_changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """How the images of classes differ, by their digests."""
    changes = [f"class {name} is missing" for name in before if name not in now]
    for name in now:
        if name not in before:
            changes.append(f"class {name} is new")
        elif before[name] != now[name]:
            changes.append(f"class {name} has other images")
    return changes


def said_of(value) -> str:
    """The value of an option; of a file its name, and a digest of its bytes."""
    if not os.path.isfile(value):
        return str(value)
    digest = hashlib.sha256()
    with open(value, "rb") as file:
        for part in iter(partial(file.read, 2**20), b""):
            digest.update(part)
    return f"{Path(value).name} (sha256 {digest.hexdigest()})"


def said_of_weights(weights: dict[str, float]) -> str:
    """Rewards and their weights, as --reward takes them."""
    if len(weights) == 1:
        return next(iter(weights))
    return " ".join(f"{name}={weight:g}" for name, weight in weights.items())


def content(said: str) -> str:
    """What counts of `said_of`: of a file its bytes, whatever it is called."""
    return said.rpartition("(sha256 ")[2]
