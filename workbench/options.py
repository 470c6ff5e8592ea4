"""The command line of the training scripts, and all that is checked before long work begins."""

import argparse
import math
import os
import re
from argparse import BooleanOptionalAction, Namespace
from collections import Counter
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path

import torch

import maskrl
from workbench.data import Data, is_folder, load_data, usual_cache, usual_preset
from workbench.datasets import DATASETS
from workbench.devices import check_processes, possible_precision
from workbench.distributed import join_processes, several_processes
from workbench.errors import InputError
from workbench.files import read_checkpoint
from workbench.images import class_folders, class_paths
from workbench.latents import autoencoder_for, with_latents
from workbench.pretrained import ClipOptions
from workbench.report import hardware
from workbench.run import Run, lock_run_dir
from workbench.settings import (
    LIMITS,
    MEMORY_SETTINGS,
    MODEL_SETTINGS,
    PRESETS,
    RELEASED,
    STUDENT_SETTINGS,
    RunSettings,
    documented_fields,
    flag,
    preset,
)
from workbench.summary import describe, describe_settings, shortened

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # of the container that we are in
CLIP = ClipOptions()  # the defaults
TRAINING_OPTIONS = {
    "--data": {
        "default": "shapes",
        "metavar": "FOLDER",
        "help": "a folder with one sub-folder of images per class, or one of "
        f"{', '.join(DATASETS)}, which are downloaded (default: the built-in shapes)",
    },
    "--classes": {
        "nargs": "+",
        "metavar": "CLASS",
        "help": "classes to use, separated by spaces or commas, or a file with one per line "
        "(default: all)",
    },
    "--class-names": {
        "metavar": "FILE",
        "help": "a file that says what the classes are called, in lines such as n01440764 tench",
    },
    "--out": {
        "type": Path,
        "default": Path("runs/latest"),
        "help": "folder to write into (default: %(default)s)",
    },
    "--cache": {
        "type": Path,
        "metavar": "FOLDER",
        "help": "where decoded images and downloads of --data are kept, for several runs to share; "
        "it may be deleted (default: cache in --out; for downloads ~/.cache/torch/datasets)",
    },
    "--resume": {
        "action": "store_true",
        "help": "continue the run in --out: finished stages are kept, an interrupted one goes on",
    },
    "--preset": {
        "choices": PRESETS,
        "help": "settings to start from (default: tiny for the shapes, mnist for 28 x 28 pixels; "
        "on a CUDA GPU cifar_gpu for CIFAR and small for a folder, elsewhere cifar and folder)",
    },
    "--quick": {
        "action": "store_true",
        "help": "smaller images and shorter training, to see all stages within minutes; other "
        "options still count",
    },
    "--tensorboard": {
        "action": "store_true",
        "help": "also log for TensorBoard, into the folder tensorboard in --out",
    },
    "--teacher": {
        "type": Path,
        "metavar": "teacher.pt",
        "help": "a teacher to start from, instead of training one; also a file in MAR's own format",
    },
    "--vae": {
        "type": Path,
        "metavar": "kl16.ckpt",
        "help": "an autoencoder whose latents are generated instead of pixels (MAR's released "
        "models need it)",
    },
    "--features": {
        "default": "own",
        "help": "what the judge compares images by: own (a network trained here), clip, the file "
        "of a torchvision model's weights, or module:function (default: %(default)s)",
    },
    "--clip-model": {
        "default": CLIP.model,
        "help": "the model of --reward clip and --features clip, as open_clip names it "
        "(default: %(default)s; OpenAI's weights need ViT-B-32-quickgelu)",
    },
    "--clip-weights": {
        "default": CLIP.weights,
        "help": "a file, or the name of weights that open_clip downloads (default: %(default)s)",
    },
    "--clip-prompt": {
        "default": CLIP.prompt,
        "help": "the text of --reward clip (default: %(default)s)",
    },
}


class ArgumentParser(argparse.ArgumentParser):
    """Called without arguments it takes none: sys.argv, which `run_script` passes on, is not that
    of the script where a notebook calls main(). And it takes any negative number, such as -1e-3,
    for the value of the option before it; Python's own takes some for options."""

    def parse_known_args(self, args=None, namespace=None) -> tuple[Namespace, list[str]]:
        words = []
        for word in args or ():
            if words and is_negative(word) and re.fullmatch("--[^=]+", words[-1]):
                word = f"{words.pop()}={word}"
            words.append(word)
        return super().parse_known_args(words, namespace)


def is_negative(text: str) -> bool:
    """Whether the text is a number with a minus, as `float` reads it."""
    try:
        float(text)
    except ValueError:
        return False
    return text.startswith("-")


def training_parser(doc: str) -> ArgumentParser:
    """A parser with the options that people use; `add_settings` adds all the others."""
    parser = ArgumentParser(
        usage="%(prog)s [options]",
        description=doc,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, kwargs in TRAINING_OPTIONS.items():
        parser.add_argument(name, **kwargs)
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads (default: OMP_NUM_THREADS, else half of the cores that this process may "
        "use, at most 8; more wait for each other)",
    )


def add_settings(parser: ArgumentParser) -> None:
    """Every field of RunSettings as an option, absent from the namespace if it is not given."""
    documented, groups = documented_fields(), {}
    for field in fields(RunSettings):
        section, comment = documented[field.name]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        text = f"{comment} (default: {field.default})".replace("%", "%%")
        kwargs = {"default": argparse.SUPPRESS, "help": text}
        if field.type is bool:
            kwargs["action"] = BooleanOptionalAction
        else:
            kwargs["type"] = field.type
            kwargs["choices"] = LIMITS[field.name].get("choices")
            kwargs["metavar"] = {int: "N", float: "X", str: None}[field.type]
        groups[section].add_argument(flag(field.name), **kwargs)
    others = [
        f"{name} has " + ", ".join(f"{field}={value}" for field, value in PRESETS[name].items())
        for name in ("folder", "small", "mnist", "cifar", "cifar_gpu")
    ]
    parser.epilog = (
        f"The defaults are those of --preset tiny; {'; '.join(others)}. The sizes of MAR's "
        f"released models, on latents (--vae), are {', '.join(RELEASED)}."
    )


def clip_options(args: Namespace) -> ClipOptions:
    """ClipOptions of the command line; InputError if they are given and nothing uses CLIP."""
    options = ClipOptions(args.clip_model, args.clip_weights, args.clip_prompt)
    rewards = [*getattr(args, "reward", ()), getattr(args, "held_out", None)]
    if options != CLIP and "clip" not in (args.features, *rewards):
        raise InputError(
            "--clip-model, --clip-weights, --clip-prompt: only --reward clip and "
            "--features clip ask CLIP, and --held-out clip"
        )
    return options


def find_device(name: str = "auto", threads: int | None = None) -> torch.device:
    """torch.device of that name; `auto` takes the first available of cuda, mps and cpu.

    Sets the number of CPU threads, by default `usual_threads`. InputError for a device that is not
    available here, or a number of threads outside of 1...1024."""
    if threads is None:
        threads = usual_threads()
    if not 1 <= threads <= 1024:
        raise InputError(f"--threads {threads} must lie in 1...1024")
    torch.set_num_threads(threads)
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise InputError(f"--device {name}: there is none here; there is {', '.join(available)}")
    return torch.device(name)


def usual_threads() -> int:
    """OMP_NUM_THREADS if it is a number of threads; else half of the cores, at most 8.

    These are the cores that this process may use: a container or a batch system gives some."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # "4,2": of nested regions
    if given.isdecimal() and 1 <= int(given) <= 1024:
        return int(given)
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cores = len(os.sched_getaffinity(0))
    return max(1, min(8, math.ceil(min(cores, cpu_quota())) // 2))


def cpu_quota() -> float:
    """How many CPUs a container's limit amounts to, as `docker run --cpus` sets it."""
    try:
        quota, period = CPU_MAX.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # there is none: no such file, or "max"
        return math.inf


MARVAL_GUIDANCE = 1.2  # what MARVAL distils MAR-B with, constant: FID 3.06; with 2 it is 7.98


def settings_from(args: Namespace, device, base: dict | None, resume: bool) -> RunSettings:
    """The RunSettings of the options that were given, on top of a preset or of a checkpoint.

    base: the content of the checkpoint, which fixes some of its settings: those that its weights
    depend on, or, to resume a run, all but MEMORY_SETTINGS. InputError names an option that
    contradicts it."""
    names = [field.name for field in fields(RunSettings)]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if base is None:
        return preset(args.preset or usual_preset(args.data, device), **given)
    if args.preset and not resume:
        raise InputError(
            f"--preset {args.preset}: the settings come from the {base['kind']}; leave it out"
        )
    if resume:
        fixed = [name for name in names if name not in MEMORY_SETTINGS]
    else:
        fixed = MODEL_SETTINGS if base["kind"] == "teacher" else STUDENT_SETTINGS
    for name in fixed:
        value = getattr(base["settings"], name)
        if given.get(name, value) != value:
            advice = ". Another --out starts afresh" if resume else ""
            raise InputError(f"{flag(name)} is fixed by the checkpoint: {value}{advice}")
    if "classes_counted" in base:  # a file of MAR's
        given.setdefault("guidance", MARVAL_GUIDANCE)
    return replace(base["settings"], **given)


def usual_settings(args: Namespace, base: dict | None) -> tuple[RunSettings, str]:
    """What the settings are without any option, and what to call them."""
    if base is not None:
        return base["settings"], f"those of the {base['kind']}"
    return preset(args.preset), f"preset {args.preset}"


def prepare(args: Namespace, written: list[str], base: dict | None = None) -> Run:
    """The run of a training script; everything that can go wrong does so here, before long work.

    written: the checkpoints that the script writes, the last stage first. base: the content of the
    checkpoint that it starts from."""
    device = find_device(args.device, args.threads)
    if several_processes():
        check_processes(device)
    device = join_processes(device)
    if args.out.exists():
        lock_run_dir(args.out).release()  # tells at once if another run is at work there
        check_out(args)
    begun = checkpoint_in_out(args, written)
    resume = begun is not None
    base = begun or base
    if base is None:
        args.preset = args.preset or usual_preset(args.data, device)
    settings = settings_from(args, device, base, resume)
    settings = replace(settings, precision=possible_precision(settings.precision, device))
    if args.quick and not resume:
        settings = shortened(settings, args, MODEL_SETTINGS if base else ())
    print(describe_settings(settings, *usual_settings(args, base)))
    data, settings = measured_data(args, settings, base, device)
    check_memory(settings, data, device)
    print(f"{describe(data, settings)}; on {hardware(device)}")
    if args.resume and not any(args.out.glob("*.pt")):  # a judge alone is kept, too
        print(f"nothing to resume in {args.out}: starting afresh")
    return Run(args, settings, data, device)


def check_out(args: Namespace) -> None:
    """InputError if --out is the folder of a class, which the run's pictures would join."""
    paths = class_paths(args.data, Counter()) if is_folder(args.data) else {}
    if any(os.path.samefile(args.out, path) for path in chain.from_iterable(paths.values())):
        raise InputError(f"--out {args.out} is a class of --data {args.data}: choose another one")


def checkpoint_in_out(args: Namespace, written: list[str]) -> dict | None:
    """The content of the latest stage's checkpoint in --out; None if the run has written none.

    written: the names of all stages' checkpoints, the last stage first. InputError if there is one
    and no --resume, or if an earlier stage's is missing."""
    existing = [name for name in written if (args.out / name).exists()]
    if not existing:
        return None
    latest = existing[0]
    if not args.resume:
        raise InputError(
            f"{args.out / latest} exists: --resume continues it, another --out starts afresh"
        )
    earlier = written[written.index(latest) :]
    missing = [name for name in earlier if name not in existing]
    if missing and not args.teacher:
        kind = missing[0].removesuffix(".pt")
        raise InputError(
            f"{args.out} was begun with another {missing[0]}: give it again by --{kind}"
        )
    return read_checkpoint(args.out / latest)


def measured_data(
    args: Namespace, settings: RunSettings, base: dict | None, device
) -> tuple[Data, RunSettings]:
    """The data, with latents if there is a --vae, and the settings with their mean and scale."""
    image_channels = None
    if base:
        image_channels = base["model_ema"]["z_proj.weight"].shape[1] // settings.patch**2
    elif args.preset in RELEASED:
        image_channels = 16
    vae = autoencoder_for(image_channels, args.vae, device)
    cache = args.cache or usual_cache(args.data, args.out)
    stride = vae.stride if vae else 1
    data = load_data(settings, args.data, args.classes, args.class_names, cache, stride)
    if base:
        data = data.labelled_as(named_classes(base, data))
    if vae:
        data = with_latents(data, vae, settings.flip)
        settings = replace(settings, scale=settings.scale or vae.scale)
    return data, data.measure(settings)


def named_classes(base: dict, data: Data) -> list[str]:
    """A checkpoint's classes.

    A file in MAR's format only counts them: then the folder's as they are sorted, which for
    ImageNet is the order that MAR was trained with."""
    existing = class_folders(data.name) if is_folder(data.name) else data.classes
    if base.get("classes_counted") and len(existing) == len(base["classes"]):
        return existing
    return base["classes"]


def check_memory(settings: RunSettings, data: Data, device: torch.device) -> None:
    """InputError if the device has too little memory to train the model.

    Weights, gradient, two averages of an optimiser and the EMA alone take 20 bytes a parameter."""
    with torch.device("meta"):
        model = maskrl.MAR(settings, data.classes, image_channels=data.learned.channels)
    needed = 20 * sum(p.numel() for p in model.parameters()) / 2**30
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory / 2**30
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    else:  # Windows does not say
        return
    if needed > available:
        raise InputError(
            f"to train this model takes at least {needed:,.0f} GiB of memory, and {device} has "
            f"{available:,.0f}: lower --width, --depth, --head-width, --head-depth or --image-size"
        )
