"""What a run says before it begins: its settings and its images; and what --quick changes."""

import textwrap
from argparse import Namespace
from dataclasses import fields, replace

from workbench.data import Data, is_folder
from workbench.settings import RunSettings, flag

# from a folder to a policy and its pictures in minutes on one thread
QUICK = {
    "image_size": 16,
    "steps": 16,
    "batch": 32,
    "draws": 2,
    "teacher_iters": 1500,
    "gsim_iters": 200,
    "rl_iters": 25,
    "schedule_iters": 10,
    "judge_iters": 150,
    "judge_n": 200,
}


def shortened(settings: RunSettings, args: Namespace, fixed: tuple[str, ...]) -> RunSettings:
    """The settings with what QUICK shortens, except what options say or what is `fixed`. Prints
    what it is."""
    shorter = {
        name: value
        for name, value in QUICK.items()
        if not (hasattr(args, name) or name in fixed) and value < getattr(settings, name)
    }
    saved = [f"{flag(k)} {v} in place of {getattr(settings, k)}" for k, v in shorter.items()]
    print(wrapped(f"--quick, for a first look, saves on: {', '.join(saved) or 'nothing'}"))
    return replace(settings, **shorter)


def describe_settings(settings: RunSettings, usual: RunSettings, name: str) -> str:
    """The settings that differ from the usual ones, which are called `name`."""
    changed = [
        f"{flag(field.name)} {getattr(settings, field.name)}"
        for field in fields(settings)
        if getattr(settings, field.name) != getattr(usual, field.name)
    ]
    text = f"settings: {name}" + (f", but {', '.join(changed)}" if changed else "")
    return wrapped(f"{text} (all of them are in settings.json)")


def wrapped(text: str) -> str:
    """Lines of at most 100 columns; options stay whole."""
    return textwrap.fill(text, 100, subsequent_indent="  ", break_on_hyphens=False)


def describe(data: Data, settings: RunSettings) -> str:
    """How many images there are and what for, and what must not be expected of them."""
    n = len(data.labels) * data.test.balanced_half(settings.judge_n)
    text = (
        f"{len(data.labels)} classes; images: {len(data.train)} to train on, {len(data.judge)} "
        f"for the judge, {len(data.test)} held out, n = {n} in each row of the judge's table"
    )
    if n < settings.judge_n:
        text += (
            f", not --judge-n {settings.judge_n}: as many of every class, and at most half of "
            "those held out"
        )
    if n < 500:
        text += " (few: its distances are rough)"
    if is_folder(data.name):
        side = data.train.size
        text += f"; resized to {side} x {side} pixels (--image-size; larger ones need a GPU)"
    return text
