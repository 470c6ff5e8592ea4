"""The settings of a run: those of the methods, and of data, training and judge; their limits.

Every field of RunSettings is an option of the training scripts, whose help is the comment behind
the field in the source. PRESETS are sets of settings to start from.
"""

import inspect
import math
import operator
import re
from dataclasses import Field, dataclass, fields

import maskrl
from workbench.errors import InputError


@dataclass
class RunSettings(maskrl.Settings):
    """All settings of a model and its training; the defaults are the preset `tiny`.

    Raises InputError, naming the option, for a value of the wrong type or outside its LIMITS."""

    # tokens
    scale: float = 0.0  # 0: scale and mean are measured on the training images
    # data
    per_class: int = 3000  # images of each built-in shape
    flip: bool = False  # mirror training images at random (not for digits or letters)
    seed: int = 0  # seed of the shapes, weights and noise
    # memory and speed
    precision: str = "fp32"  # number format of the hidden layers' matrix products
    checkpointing: bool = False  # recompute blocks in the backward pass, to save memory
    compile: bool = False  # compile blocks and head by torch.compile, which takes minutes
    # training the teacher
    batch: int = 64  # images per update of teacher and student
    # RL
    method: str = "grpo"  # grpo: policy gradient; backprop: the reward's own gradient
    # reward network and judge
    judge_iters: int = 400  # updates of the reward network and of the judge
    judge_n: int = 2250  # images for each row of the judge's table

    def __post_init__(self):
        for field in fields(self):
            check_value(field, getattr(self, field.name))
        if self.image_size % self.patch:
            raise InputError(
                f"--image-size {self.image_size} must be a multiple of --patch {self.patch}"
            )
        if self.width % 4 or self.width % self.heads:
            raise InputError(
                f"--width {self.width} must be a multiple of 4 and of --heads {self.heads}"
            )
        if self.steps > self.length:
            raise InputError(
                f"--steps {self.steps} must lie in 1...{self.length}, the number of tokens"
            )
        if self.rl_iters == 0 and (self.method == "backprop" or not self.learn_steps):
            raise InputError("--rl-iters 0 leaves nothing to learn without a learned schedule")
        check_guidance(self.guidance, self.label_dropout)


COUNT = {"at_least": 1}
BATCH = {"at_least": 1, "at_most": 10**5}
WIDTH = {"at_least": 1, "at_most": 2**14}
DEPTH = {"at_least": 1, "at_most": 200}
RATE = {"above": 0, "at_most": 1000}
FRACTION = {"at_least": 0, "below": 1}
LIMITS = {
    "image_size": {"at_least": 2, "at_most": 4096},  # damage needs two pixels
    "patch": COUNT,
    "mean": {"at_least": -1000, "at_most": 1000},
    "scale": {"at_least": 0, "at_most": 1000},
    "per_class": {"at_least": 20, "at_most": 10**6},
    "seed": {"at_least": 0, "below": 2**63},
    "width": WIDTH | {"at_least": 4},
    "depth": DEPTH,
    "decoder_depth": DEPTH | {"at_least": 0},
    "heads": COUNT,
    "buffer": {"at_least": 1, "at_most": 4096},
    "head_width": WIDTH,
    "head_depth": DEPTH,
    "predicts": {"choices": ("x_0", "eps")},
    "precision": {"choices": ("fp32", "tf32", "bf16")},  # not fp16: losses would leave its range
    "steps": COUNT,
    "order": {"choices": ("random", "halton")},
    "denoise_steps": {"at_least": 2, "at_most": 1000},
    "guidance": {"at_least": 0},
    "x_0_limit": {"at_least": 0},
    "batch": BATCH,
    "micro_batch": {"at_least": 0},
    "teacher_iters": COUNT,
    "teacher_lr": RATE,
    "muon_lr": {"at_least": 0, "at_most": 1000},
    "draws": {"at_least": 1, "at_most": 1000},
    "label_dropout": FRACTION,
    "ema": FRACTION,
    "gsim_iters": COUNT,
    "heads_iters": {"at_least": 0},
    "student_lr": RATE,
    "aux_lr": RATE,
    "student_ema": FRACTION,
    "gsim_guidance": {"choices": ("linear", "constant")},
    "noise_ratio": {"above": 0, "below": 1e4},
    "method": {"choices": ("grpo", "backprop")},
    "rl_iters": {"at_least": 0},
    "noise_lr": RATE,
    "rl_lr": RATE,
    "prompts": BATCH,
    "group": BATCH | {"at_least": 2},
    "action": {"choices": ("z", "x")},
    "rl_steps": {"choices": ("critical", "random", "first", "all")},
    "critical_steps": COUNT,
    "explore": {"above": 0},
    "route": {"at_least": 0},
    "temperature": {"above": 0, "at_most": 10},
    "policy_epochs": COUNT,
    "clip_ratio": {"above": 0},
    "beta": {"at_least": 0},
    "schedule_lr": RATE,
    "schedule_iters": {"at_least": 0},
    "alpha": {"at_least": 0},
    "judge_iters": COUNT,
    "judge_n": {"at_least": 2, "at_most": 10**6},
}
COMPARISONS = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


def flag(name: str) -> str:
    """The command-line option of a field of RunSettings."""
    return "--" + name.replace("_", "-")


def check_value(field: Field, value) -> None:
    """InputError unless `value` has the type of the field of RunSettings and is in its LIMITS."""
    limits, name = LIMITS.get(field.name, {}), flag(field.name)
    accepted = (int, float) if field.type is float else field.type
    if not isinstance(value, accepted) or (isinstance(value, bool) and field.type is not bool):
        raise InputError(f"{name} {value!r} must be of type {field.type.__name__}")
    if "choices" in limits and value not in limits["choices"]:
        raise InputError(f"{name} {value} must be one of {', '.join(limits['choices'])}")
    if field.type is float and not math.isfinite(value):
        raise InputError(f"{name} {value} must be a finite number")
    for kind, holds in COMPARISONS.items():
        if kind in limits and not holds(value, limits[kind]):
            raise InputError(f"{name} {value} must be {kind.replace('_', ' ')} {limits[kind]}")


def check_guidance(guidance: float, label_dropout: float) -> None:
    """InputError if guidance needs a null class and the teacher has not learned one."""
    if guidance != 1 and label_dropout == 0:
        raise InputError(
            f"--guidance {guidance:g} needs the null class, which --label-dropout 0 does not "
            "train: --guidance 1 is none"
        )


def documented_fields() -> dict[str, tuple[str, str]]:
    """{field: (section, comment)} of RunSettings, read from the source of the two dataclasses.

    A section is what a comment on a line of its own says above the fields."""
    found, section = {}, ""
    for settings in (maskrl.Settings, RunSettings):
        for line in inspect.getsource(settings).splitlines():
            if heading := re.fullmatch(r" {4}# (.+)", line):
                section = heading[1]
            elif field := re.fullmatch(r" {4}(\w+): \w+ = [^#]+# (.+)", line):
                found[field[1]] = (section, field[2])
    return found


# What a checkpoint's weights depend on
MODEL_SETTINGS = (
    *("image_size", "patch", "mean", "scale", "width", "depth", "decoder_depth", "heads"),
    *("buffer", "head_width", "head_depth", "predicts"),
)
STUDENT_SETTINGS = (*MODEL_SETTINGS, "noise_ratio", "guidance", "gsim_guidance")  # and GSIM
# How, not what, is computed
MEMORY_SETTINGS = ("checkpointing", "compile", "precision", "micro_batch")

# fmt: off
PRESETS = {
    "tiny": {},  # the built-in shapes
    "folder": {  # a folder of images, on a CPU
        "image_size": 32, "steps": 32, "batch": 32, "draws": 2, "teacher_iters": 12_000,
        "gsim_iters": 1200, "rl_iters": 50, "schedule_iters": 25, "judge_iters": 800,
        "temperature": 1.0,
    },
    "small": {  # a folder of images, on a GPU
        "image_size": 64, "patch": 4, "steps": 64, "width": 384, "depth": 6, "heads": 6,
        "buffer": 16, "head_width": 512, "head_depth": 4, "batch": 128, "teacher_iters": 100_000,
        "teacher_lr": 4e-4, "muon_lr": 8e-4, "ema": 0.9999, "gsim_iters": 20_000,
        "student_lr": 3e-5, "aux_lr": 6e-5, "critical_steps": 6, "judge_iters": 2000,
        "precision": "bf16", "micro_batch": 32, "temperature": 1.0,
    },
    "mnist": {  # MNIST and sets like it, 28 x 28 pixels: half an hour on one CPU thread
        "image_size": 28, "steps": 24, "batch": 32, "draws": 2, "teacher_iters": 6000,
        "teacher_lr": 1e-3, "muon_lr": 2e-3, "gsim_iters": 600, "rl_iters": 40,
        "schedule_iters": 20, "judge_iters": 800, "temperature": 1.0,
    },
    "cifar": {  # CIFAR, 32 x 32 pixels: not measured
        "image_size": 32, "flip": True, "steps": 32, "batch": 32, "draws": 2,
        "teacher_iters": 5000, "gsim_iters": 600, "rl_iters": 40, "schedule_iters": 20,
        "judge_iters": 800, "temperature": 1.0,
    },
}
# CIFAR on a GPU
PRESETS["cifar_gpu"] = PRESETS["small"] | {"image_size": 32, "patch": 2, "flip": True}
MAR_SETTINGS = PRESETS["small"] | {
    "image_size": 16, "patch": 1, "buffer": 64, "predicts": "eps", "steps": 256, "batch": 16,
    "denoise_steps": 100, "x_0_limit": 0.0, "flip": True, "muon_lr": 0.0, "checkpointing": True,
    "precision": "fp32", "micro_batch": 0, "prompts": 4, "order": "random",
    "gsim_guidance": "constant",
}  # trained as `small`, which nobody has tried at this size
RELEASED = {  # the sizes of MAR's released models
    "mar_b": MAR_SETTINGS | {
        "width": 768, "depth": 12, "heads": 12, "head_width": 1024, "head_depth": 6,
        "guidance": 2.9,
    },
    "mar_l": MAR_SETTINGS | {
        "width": 1024, "depth": 16, "heads": 16, "head_width": 1280, "head_depth": 8,
        "guidance": 3.0,
    },
    "mar_h": MAR_SETTINGS | {
        "width": 1280, "depth": 20, "heads": 16, "head_width": 1536, "head_depth": 12,
        "guidance": 3.2,
    },
}
# fmt: on
PRESETS |= RELEASED


def preset(name: str, **overrides) -> RunSettings:
    """The RunSettings of a preset, with single fields replaced; InputError if there is none."""
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return RunSettings(**PRESETS[name] | overrides)
