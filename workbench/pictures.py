"""Pictures: grids, labelled rows, films of the unmasking, and curves of what was logged."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms import functional as TF
from torchvision.utils import make_grid

from maskrl import (
    PolicyGradient,
    Settings,
    Trace,
    critical_steps,
    information_gain,
    rollout,
    to_images,
)
from workbench.data import identity
from workbench.files import writing
from workbench.images import EXTENSIONS
from workbench.run import read_log


def picture(images: Tensor, columns: int, pixels: int = 64, padding: int = 4) -> Image.Image:
    """A grid of images [N, 3, S, S] in [-1, 1], small ones enlarged to about `pixels`."""
    scale = max(1, round(pixels / images.shape[-1]))
    images = images.clamp(-1, 1).cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid((images + 1) / 2, columns, padding=padding, pad_value=1.0)
    return TF.to_pil_image((grid * 255).round().to(torch.uint8))


def grid_columns(n: int, classes: int) -> int:
    """Columns of a grid of n images whose classes take turns: one for each class if that fills all
    rows, else as many as leave the fewest places empty."""
    if n <= 8:
        return n
    if 3 <= classes <= 32 and n % classes == 0:
        return classes
    empty = {columns: -n % columns for columns in (8, 9, 7, 10, 6, 11, 12)}
    return min(empty, key=empty.get)  # of several the first


def save_picture(path, image: Image.Image, **options) -> None:
    """Write an image in the format that the name ends with; options as of Pillow's `save`."""
    with writing(path) as file:
        image.save(file, EXTENSIONS[Path(path).suffix.lower()], **options)


def write_files(folder, images: Tensor, names: list[str], first: int = 0) -> None:
    """Every image [N, 3, S, S] as folder/<number> <name>.png, numbered from `first`."""
    for i, (image, name) in enumerate(zip(images, names), first):
        path = Path(folder) / f"{i:05} {as_file_name(name)}.png"
        save_picture(path, picture(image[None], 1, pixels=1, padding=0))


def as_file_name(name: str, most: int = 200) -> str:
    """The name without slashes, and cut to so many bytes: a file's may have 255."""
    name = name.replace("/", "_")
    encoded = os.fsencode(name)
    return name if len(encoded) <= most else encoded[:most].decode(errors="ignore")


def labelled_rows(path, rows: dict[str, Tensor], columns: int) -> None:
    """Save a picture of {label: images}, each block of images under its label."""
    font, space = ImageFont.load_default(size=15), 26
    blocks = {label: picture(images, columns) for label, images in rows.items()}
    width = max(max(b.width, 12 + math.ceil(font.getlength(label))) for label, b in blocks.items())
    height = sum(block.height + space for block in blocks.values())
    sheet = Image.new("RGB", (width, height), "white")
    y = 0
    for label, block in blocks.items():
        ImageDraw.Draw(sheet).text((6, y + 4), label, fill="black", font=font)
        sheet.paste(block, (0, y + space))
        y += block.height + space
    save_picture(path, sheet)


def two_of_each_class(labels: Tensor, most: int = 12) -> tuple[list[int], int]:
    """Where the first image of each class is in labels [N], then the second; and how many classes.

    Of `most` classes at most, and only of those that occur."""
    per_class = [(labels == y).nonzero().flatten().tolist()[:2] for y in labels.unique()[:most]]
    return [i for row in zip(*per_class) for i in row], len(per_class)


def samples_picture(path, images: dict, rows: dict, labels: Tensor) -> None:
    """Two images of each class of every arm but the untrained one, under its name and speed.

    images: {arm: images [N, 3, S, S]} of the classes labels [N]; rows: {arm: its figures}."""
    chosen, columns = two_of_each_class(labels)
    captioned = {}
    for name, row in rows.items():
        if name == "untrained":
            continue
        caption = name
        if "steps" in row:
            caption += (
                f": {row['steps']:.1f} x {row['denoise_steps']} steps, "
                f"{1000 * row['seconds_per_image']:.1f} ms per image"
            )
        captioned[caption] = images[name][chosen]
    labelled_rows(path, captioned, columns)


def pixel_mask(mask: Tensor, size: int) -> Tensor:
    """mask [..., L] of tokens -> of pixels [..., 1, S, S], S being `size`."""
    side = math.isqrt(mask.shape[-1])
    mask = mask.cpu().unflatten(-1, (side, side))[..., None, :, :]
    return mask.repeat_interleave(size // side, -1).repeat_interleave(size // side, -2)


def film(path, tokens: Tensor, trace: Trace, settings: Settings, decode=identity) -> None:
    """The unmasking of up to 8 images, hidden tokens grey: a .gif moves, else one row an image."""
    hidden = trace.masks()[0][:8]  # [8, T, L]
    hidden = torch.cat([hidden, torch.zeros_like(hidden[:, :1])], 1)  # and at the end none
    images = decode(to_images(tokens[:8], settings)).cpu()  # a revealed token never changes
    hidden_pixels = pixel_mask(hidden, images.shape[-1])
    frames = torch.where(hidden_pixels, 0.0, images[:, None])  # [8, T + 1, 3, S, S]
    if Path(path).suffix.lower() != ".gif":
        save_picture(path, picture(frames.flatten(0, 1), frames.shape[1], 48))
        return
    pictures = [picture(frame, 4) for frame in frames.transpose(0, 1)]
    rest = pictures[1:] + [pictures[-1]] * 6
    save_picture(path, pictures[0], save_all=True, append_images=rest, duration=250, loop=0)


def figure_class() -> Any:
    """matplotlib's Figure, for files; None, with a message, where matplotlib is not installed.

    pyplot, which would draw on the screen, is left to the notebook that may call us."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("curves are not drawn: pip install matplotlib")
        return None
    return Figure


def save_figure(path, figure) -> None:
    """Write a figure of matplotlib as PNG."""
    with writing(path) as file:
        figure.savefig(file, dpi=80)


CURVES = {  # {stage: {key in the log: title of its panel}}
    "teacher": {"loss": "loss"},
    "student": {
        "aux_loss": "auxiliary loss",
        "validation": "Fréchet distance, pixels",
        "reward_features": "Fréchet distance, reward's features",
    },
    "policy": {
        "reward": "reward",
        "quality": "quality",
        "steps": "steps",
        "kl": "KL",
        "quality_mean": "quality, no exploration",
        "held_out": "held-out reward",
        "judge": "Fréchet distance, judge",
        "grad_norm": "gradient norm",
    },
}


def panels(lines: list[dict]) -> dict[str, dict[int, float]]:
    """{title: {step: value}} of all that CURVES names and a log has; of a repeated step the last
    value counts."""
    found = {}
    for stage, titles in CURVES.items():
        logged = [line for line in lines if line["stage"] == stage]
        for key, title in titles.items():
            points = {line["step"]: line[key] for line in logged if key in line}
            if points:
                found[f"{stage}: {title}"] = points
    return found


def curves(out) -> None:
    """curves.png: what was logged of every stage of the run in the folder `out`."""
    new_figure, found = figure_class(), panels(read_log(out))
    if not new_figure or not found:
        return
    rows = math.ceil(len(found) / 4)
    figure = new_figure(figsize=(13, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for (title, points), axis in zip(found.items(), axes.flat):
        style = ".-" if len(points) < 20 else "-"
        axis.plot(points.keys(), points.values(), style, markersize=5, linewidth=1)
        axis.set_title(title, fontsize=9)
    save_figure(Path(out) / "curves.png", figure)


def quality_one(images: Tensor, labels: Tensor) -> Tensor:
    """A quality [B] for rollouts whose reward does not matter."""
    return torch.ones_like(labels, dtype=torch.float32)


def gain_picture(out, training: PolicyGradient, occurring: Tensor) -> None:
    """gain.png in the folder `out`: information gain along the rollouts of 16 prompts, the labels
    `occurring` in turn, and how often each step is critical."""
    new_figure, model = figure_class(), training.model
    if not new_figure:
        return
    labels = occurring[torch.arange(16) % len(occurring)].to(model.device)
    rollouts = rollout(model, quality_one, labels, "gain")
    valid = rollouts.trace.counts > 0
    gain = information_gain(rollouts.trace.predictions, rollouts.tokens, valid, training.mean_image)
    critical = critical_steps(gain, model.settings.critical_steps)
    gain = gain.masked_fill(~valid, math.nan).cpu()
    steps = range(1, gain.shape[1] + 1)
    figure = new_figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, gain[::4].T.numpy(), color="tab:blue", alpha=0.15, linewidth=0.8)
    left.plot(steps, gain.nanmean(0).numpy(), color="black", marker="o", markersize=3)
    left.set(xlabel="step k", title="information gain V_k, and its mean")
    right.bar(steps, critical.float().mean(0).tolist())
    right.set(xlabel="step k", title="fraction of rollouts in which step k is critical")
    save_figure(Path(out) / "gain.png", figure)
