"""What a run says before it begins: its settings and its images; and what --quick changes."""

import textwrap
from dataclasses import asdict, fields

from workbench.data import Data
from workbench.settings import RunSettings, flag

# from a folder to a policy and its pictures in minutes on one thread
QUICK = {
    "steps": 16,
    "teacher_iters": 1000,
    "gsim_iters": 120,
    "rl_iters": 20,
    "schedule_iters": 5,
    "judge_iters": 150,
    "judge_n": 100,
}


def quick_settings(settings: RunSettings, fixed=()) -> dict:
    """Those of QUICK that shorten a run of these settings, and are not `fixed` by a checkpoint."""
    return {
        name: value
        for name, value in QUICK.items()
        if name not in fixed and value < getattr(settings, name)
    }


def describe_quick(usual: RunSettings, settings: RunSettings) -> str:
    """What --quick saves on: what the settings would be without it, and are."""
    saved = [
        f"{flag(name)} {getattr(settings, name)} in place of {getattr(usual, name)}"
        for name in QUICK
        if getattr(settings, name) < getattr(usual, name)
    ]
    return wrapped(f"--quick saves on {', '.join(saved) or 'nothing'}; images will be rough")


def describe_settings(settings: RunSettings, usual: RunSettings, name: str) -> str:
    """The settings that differ from the usual ones, which are called `name`."""
    changed = [
        f"{flag(field.name)} {getattr(settings, field.name)}"
        for field in fields(settings)
        if getattr(settings, field.name) != getattr(usual, field.name)
    ]
    text = f"settings: {name}" + (f", but {', '.join(changed)}" if changed else "")
    return wrapped(f"{text} (all of them: metrics.json, or the checkpoint)")


def wrapped(text: str) -> str:
    """Lines of at most 100 columns; options stay whole."""
    return textwrap.fill(text, 100, subsequent_indent="  ", break_on_hyphens=False)
