"""What sample.py is asked for, checked before it draws: an InputError names the option. And random
numbers that every image has of its own, so that it is the same whatever is drawn with it."""

import math
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from maskrl import MAR, Diffusion, Noise, Sampling, draw_noise, rng
from workbench.data import find_classes
from workbench.errors import InputError
from workbench.files import check_writable, load_safely
from workbench.images import EXTENSIONS
from workbench.lazymar import LazyContexts
from workbench.released import is_mar_file
from workbench.settings import check_guidance


def class_labels(
    texts: list[str] | None, model: MAR, names: dict[str, str], n: int
) -> tuple[Tensor, int]:
    """Labels [n] that go through the classes named by --classes, or all if texts is None; and how
    many classes these are. names: {class: what it is called}."""
    chosen = range(len(model.classes))
    if texts:
        try:
            chosen = find_classes(texts, model.classes, names)
        except InputError as error:
            raise InputError(f"{error}{quoting_hint(texts, model.classes)}") from None
    labels = torch.tensor([chosen[i % len(chosen)] for i in range(n)])
    return labels.to(model.device), len(chosen)


def quoting_hint(texts: list[str], classes: list[str]) -> str:
    """How to write a class of several words, if `texts` has these as separate ones."""
    words = f" {' '.join(texts)} "
    parted = [name for name in classes if " " in name and f" {name} " in words]
    return f'. Put a name of several words in quotes: "{parted[0]}"' if parted else ""


def free_name(path: Path) -> Path:
    """The path, or where that exists <stem>-2, <stem>-3 and so on."""
    names = (path.with_stem(f"{path.stem}-{i}") for i in count(2))
    return next(name for name in chain([path], names) if not name.exists())


def warn_if_unfinished(path) -> None:
    """Say so of a checkpoint whose training was interrupted; nothing of any other."""
    content = load_safely(path, lazily=True)
    if is_mar_file(content) or content.get("training") is None:
        return
    kind, settings = content["kind"], content["settings"]
    fields = {
        "teacher": ["teacher_iters"],
        "student": ["gsim_iters"],
        "policy": ["rl_iters", "schedule_iters"],
    }
    iters = sum(settings[name] for name in fields[kind])
    print(
        f"{path}: the {kind} is unfinished, after {content['step']} of {iters} updates; its "
        "training continues with --resume",
        file=sys.stderr,
    )


def warn_of_other_images(folder) -> None:
    """Say so if the folder of --files has images already: only those of the same name go."""
    n = len(list(Path(folder).glob("[0-9]*.png")))
    if n:
        print(f"--files {folder} has {n} images already, some of which may stay", file=sys.stderr)


def checked_sampling(
    model: MAR, sampling: Sampling, refresh: int = 1, mask: Tensor | None = None
) -> Sampling:
    """`sampling` resolved for the model. InputError where the two do not go together.

    refresh: contexts are all computed in every refresh-th iteration; 1 is exact. mask: true for the
    tokens [L] to be drawn (None: all)."""
    check_steps(sampling.steps, model.length if mask is None else int(mask.sum()))
    check_chain(model, sampling)
    if not all(0 <= v < math.inf for v in (sampling.temperature or 0, sampling.guidance or 0)):
        raise InputError("--temperature and --guidance must be numbers from 0 up")
    if refresh < 1:
        raise InputError(f"--refresh {refresh} must be at least 1, which is exact")
    if refresh > 1:
        sampling = replace(sampling, contexts=partial(LazyContexts, every=refresh))
    return sampling.resolve(model)


def check_steps(steps: int | tuple[int, ...] | None, to_draw: int) -> None:
    """InputError unless `to_draw` tokens can be revealed in so many steps, or by these counts."""
    if isinstance(steps, tuple):
        if min(steps) < 1 or sum(steps) != to_draw:
            raise InputError(f"--steps {steps} must be counts that sum to {to_draw}")
    elif steps is not None and not 1 <= steps <= to_draw:
        raise InputError(f"--steps {steps} must lie in 1...{to_draw}, the number of tokens to draw")


def check_chain(model: MAR, sampling: Sampling) -> None:
    """InputError unless the model can take so many denoising steps, under this guidance."""
    steps = sampling.denoise_steps
    if model.kind != "teacher" and steps not in (None, 1):
        raise InputError(
            f"--denoise-steps {steps}: a {model.kind} takes one step; only a teacher walks a chain"
        )
    if steps is not None and not 1 <= steps <= 1000:
        raise InputError(
            f"--denoise-steps {steps}: a denoising chain has 2...1000 steps (1 is the one-step "
            "generator)"
        )
    if (model.kind != "teacher" or steps == 1) and sampling.guidance not in (None, 1):
        raise InputError(
            "--guidance needs a teacher's chain: a one-step student has its guidance baked in"
        )
    if sampling.guidance is not None:
        check_guidance(sampling.guidance, model.settings.label_dropout)


@dataclass
class PerImageSampling(Sampling):
    """Sampling in which a teacher's chains draw the noise of each image from its own generator."""

    generators: tuple[torch.Generator, ...] = ()

    def chains(self, iterations: int) -> list[Diffusion | None]:
        chains = super().chains(iterations)
        return [chain and PerImageChain(len(chain.times), self.generators) for chain in chains]


class PerImageChain(Diffusion):
    """A chain for tokens of several images, equally many of each, one image after the other."""

    def __init__(self, n: int, generators: tuple[torch.Generator, ...]):
        super().__init__(n)
        self.generators = generators

    def sample(self, head: Callable, x: Tensor, generator, temperature=1.0, limits=None) -> Tensor:
        """As Diffusion.sample; the batch's generator is not asked."""
        shape = len(self.times), len(x) // len(self.generators), x.shape[1]
        noise = torch.cat([torch.randn(shape, generator=g) for g in self.generators], 1)
        noise = noise.to(x.device)  # [n, N, D]
        for i in reversed(range(len(self.times))):
            t = torch.full((1,), int(self.times[i]), device=x.device)
            x = self.step(i, x, head(x, t), noise[i], temperature, limits)
        return x


def per_image(
    model: MAR, sampling: Sampling, seed: int, numbers: range
) -> tuple[PerImageSampling, Noise]:
    """What `generate` needs to draw the images of these numbers of a seed.

    Up to rounding, image i is the same however many others are drawn with it, and on any device."""
    generators = tuple(rng(seed, "image", i) for i in numbers)
    drawn = [draw_noise(model, 1, generator, sampling.order) for generator in generators]
    order, z = (torch.cat([getattr(one, name) for one in drawn]) for name in ("order", "z"))
    noise = Noise(order.to(model.device), z.to(model.device))
    return PerImageSampling(**vars(sampling), generators=generators), noise


def check_request(args: Namespace, shown: int) -> None:
    """InputError for options of sample.py that do not go together, or that --out has no room for.

    shown: images that --out has room for. --out and --film must be pictures that can be written,
    and must not replace each other, --inpaint or --mask."""
    if not 1 <= args.n <= 10**7:
        raise InputError(f"--n {args.n} must be at least 1 and at most {10**7}")
    if args.n > shown and not args.files:
        raise InputError(
            f"--n {args.n}: a picture shows at most {shown}; more of them need --files"
        )
    if bool(args.inpaint) != bool(args.mask):
        raise InputError("--inpaint and --mask belong together")
    pictures = [path for path in (args.out, args.film) if path is not None]
    for path in pictures:
        if EXTENSIONS.get(Path(path).suffix.lower()) not in Image.SAVE:
            raise InputError(f"{path}: the name must end in .png, .jpg or another image format")
        check_writable(path)
    paths = pictures + [path for path in (args.inpaint, args.mask) if path]
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise InputError(
            f"--out {args.out} would overwrite --film, --inpaint or --mask, or they "
            "name the same file"
        )
