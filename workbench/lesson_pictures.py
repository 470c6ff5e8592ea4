"""The pictures of tutorial.ipynb: rows of images, curves, clouds, and its diagrams."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

STYLE = {
    "figure.dpi": 90,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "image.interpolation": "nearest",  # blur is a topic, and must not come from the screen
}


def pixels(image: Tensor) -> Tensor:
    """An image [3, S, S] in [-1, 1] as matplotlib wants it, [S, S, 3] in [0, 1]."""
    return (image.clamp(-1, 1).permute(1, 2, 0) + 1) / 2


def show(rows: dict, titles=None, frames=None, size=0.62) -> None:
    """Draw {label: images [N, 3, S, S] in [-1, 1]}, a row each.

    titles {label: texts} go above the images of a row, frames {label: colours} around them."""
    titles, frames = titles or {}, frames or {}
    columns = max(len(images) for images in rows.values())
    lines = max([text.count("\n") + 1 for texts in titles.values() for text in texts], default=0)
    height = (size + 0.06) * len(rows) + 0.16 * lines * len(titles)
    shape = {"figsize": (size * columns + 1.1, height), "squeeze": False}
    _, axes = plt.subplots(len(rows), columns, **shape)
    for line, (label, images) in zip(axes, rows.items()):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axis in line:
            axis.set(xticks=[], yticks=[])
        for axis in line[len(images) :]:
            axis.axis("off")
        for k, (axis, image) in enumerate(zip(line, images)):
            axis.imshow(pixels(image))
            if label in titles:
                axis.set_title(titles[label][k], fontsize=7, pad=2)
            if label in frames:
                plt.setp(axis.spines.values(), color=frames[label][k], linewidth=3)
    plt.show()


def subplots(n: int, width: float, height=2.1, **kwargs) -> np.ndarray:
    """n axes side by side, as an array."""
    return plt.subplots(1, n, figsize=(width * n, height), squeeze=False, **kwargs)[1][0]


def curves(panels: dict, xlabel: str, width=3.6, marker="o", **axis_settings) -> None:
    """Draw {title of a panel: {label: (xs, values)}}; values [n], or [n, repeats] of which mean and
    standard deviation are drawn. axis_settings: ylabel, ylim, yscale, ..."""
    for axis, (title, lines) in zip(subplots(len(panels), width), panels.items()):
        for (label, (xs, values)), style in zip(lines.items(), ("-", "--", ":", "-.") * 3):
            values = torch.as_tensor(values, dtype=torch.float64)
            mean, std = (values.mean(1), values.std(1)) if values.ndim == 2 else (values, None)
            drawn = {"marker": marker, "markersize": 3, "capsize": 2, "linestyle": style}
            axis.errorbar(xs, mean, std, label=label or None, **drawn)
        axis.set(title=title, xlabel=xlabel, **axis_settings)
        if all(float(x).is_integer() for xs, _ in lines.values() for x in xs):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if any(lines):
            axis.legend()
    plt.show()


def columns(panels: dict, xlabel: str, width=3.0, first=1) -> None:
    """Draw {title of a panel: values [n], or [repeats, n] of which mean and standard error are
    drawn} as bars, numbered from `first`."""
    for axis, (title, values) in zip(subplots(len(panels), width), panels.items()):
        values = torch.as_tensor(values, dtype=torch.float64)
        mean, error = values, None
        if values.ndim == 2:
            mean, error = values.mean(0), values.std(0) / len(values) ** 0.5
        axis.bar(range(first, first + len(mean)), mean, yerr=error, capsize=2)
        axis.set(title=title, xlabel=xlabel)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    plt.show()


def dots(arms: dict, xlabel: str, **axis_settings) -> None:
    """A point for every repeat of {arm: values}, a line for every arm."""
    axis = subplots(1, 5, 0.5 + 0.28 * len(arms))[0]
    for i, values in enumerate(arms.values()):
        axis.plot(values, [i] * len(values), "o", alpha=0.7, color=f"C{i % 10}")
    axis.set(yticks=range(len(arms)), yticklabels=list(arms), xlabel=xlabel, **axis_settings)
    axis.set_ylim(len(arms) - 0.5, -0.5)
    plt.show()


def clouds(panels: dict, behind: Tensor, arrows: dict | None = None, width=2.6) -> None:
    """Draw {title: points [N, 2]} over the points `behind`, with arrows {title: field [N, 2]}."""
    for axis, (title, points) in zip(
        subplots(len(panels), width, 2.3, sharex=True, sharey=True), panels.items()
    ):
        axis.scatter(*behind.T, s=3, color="C1", alpha=0.35)
        axis.scatter(*points.T, s=3, color="C0", marker="x", linewidth=0.5)
        if arrows:
            axis.quiver(*points.T, *arrows[title].T, width=0.006, color="C0")
        axis.set(title=title, xlabel="channel 1")
    plt.show()


def paths(panels: dict, behind: Tensor) -> None:
    """Draw {title: paths [steps, N, 2]} over the points `behind`."""
    axes = subplots(len(panels), 3.2, 2.4, sharex=True, sharey=True)
    for axis, (title, lines) in zip(axes, panels.items()):
        axis.scatter(*behind.T, s=4, color="silver")
        for k in range(lines.shape[1]):
            axis.plot(*lines[:, k].T, linewidth=0.7, marker="x" if len(lines) == 1 else None)
        axis.set(title=title, xlabel="first direction", ylabel="second direction")
    plt.show()


def token_picture(image: Tensor, patches: Tensor, token: Tensor, number: int) -> None:
    """An image, its patches [L, 3, p, p], and the numbers [D] of one of its tokens."""
    left, middle, right = subplots(3, 2.8, 1.9, width_ratios=(1, 1, 2))
    side, D = int(len(patches) ** 0.5), len(token)
    left.imshow(pixels(image))
    left.set_title(f"{image.shape[-1]} × {image.shape[-1]} pixels")
    left.axis("off")
    middle.set_title(f"{len(patches)} tokens")
    middle.axis("off")
    for i, patch in enumerate(patches):
        row, column = divmod(i, side)
        corner = ((column + 0.04) / side, 1 - (row + 0.96) / side)
        inset = middle.inset_axes([*corner, 0.92 / side, 0.92 / side])
        inset.imshow(pixels(patch))
        inset.set(xticks=[], yticks=[])
    for i, name in enumerate(("red", "green", "blue")):
        third = slice(i * D // 3, (i + 1) * D // 3)
        right.bar(range(D)[third], token[third], label=name, hatch=("", "//", "..")[i])
    right.set(title=f"token {number}: its {D} numbers", xlabel="channel", ylabel="value")
    right.legend()
    plt.show()


def framed(images: dict, counted: dict, patch: int) -> None:
    """Draw {title: image [3, S, S]}, with frames around the tokens counted {title: [L]}."""
    for axis, (title, image) in zip(subplots(len(images), 2.1, 2.2), images.items()):
        axis.imshow(pixels(image))
        side = image.shape[-1] // patch
        for token in counted[title].nonzero().flatten().tolist():
            row, column = divmod(token, side)
            corner = (column * patch - 0.5, row * patch - 0.5)
            axis.add_patch(Rectangle(corner, patch, patch, fill=False, edgecolor="C1", linewidth=2))
        axis.set(xticks=[], yticks=[], title=title)
    plt.show()


def architecture(hidden=(1, 3, 4), tokens=6) -> None:
    """MAR's encoder, decoder and head, for an image of six tokens of which three are hidden."""
    axis = subplots(1, 9, 3.2)[0]
    axis.set(xlim=(0, 22.5), ylim=(0, 8.2))
    axis.axis("off")
    colours = {"class": "C1", "visible": "C0", "hidden": "white", "context": "silver"}

    def cell(column, row, kind, text) -> None:
        style = {"edgecolor": "black", "linestyle": "--" if kind == "hidden" else "-"}
        axis.add_patch(Rectangle((column, row), 0.9, 0.8, facecolor=colours[kind], **style))
        colour = "white" if kind in ("visible", "class") else "black"
        axis.text(column + 0.45, row + 0.4, text, ha="center", va="center", color=colour)

    def block(left, width, text) -> None:
        style = {"facecolor": "whitesmoke", "edgecolor": "black"}
        axis.add_patch(Rectangle((left, 0.4), width, 6.6, **style))
        axis.text(left + width / 2, 3.7, text, ha="center", va="center")

    def arrow(left, right, row) -> None:
        ends = (left, row + 0.4), (right, row + 0.4)
        axis.add_patch(FancyArrowPatch(*ends, arrowstyle="->", mutation_scale=9))

    for i in range(tokens + 2):  # two rows of the buffer, then the tokens
        row, token = 0.5 + 0.8 * (tokens + 1 - i), i - 2
        kind = "class" if token < 0 else "hidden" if token in hidden else "visible"
        cell(0.2, row, kind, "class" if token < 0 else f"$x_{token + 1}$")
        if kind != "hidden":
            arrow(1.2, 3, row)
            arrow(5.8, 7.2, row)
        cell(7.3, row, kind, "mask" if kind == "hidden" else "")
        arrow(8.3, 9.6, row)
        if token >= 0:
            arrow(12.4, 13.6, row)
            cell(13.7, row, "context", f"$c_{token + 1}$")
        if kind == "hidden":
            arrow(14.7, 16.2, row)
            axis.text(18.3, row + 0.4, rf"$\hat\varepsilon(x_t, t, c_{token + 1})$", va="center")
            axis.text(21, row + 0.4, "loss", va="center", weight="bold")
    block(3, 2.8, "encoder\n\nclass and\nvisible\ntokens only")
    block(9.6, 2.8, "decoder\n\nall positions,\nbidirectional\nattention")
    block(16.2, 1.8, "head,\nan MLP,\ntoken\nby token")
    for x, text in ((0.65, "input"), (7.75, "with mask\ntokens"), (14.15, "contexts")):
        axis.text(x, 7.2, text, ha="center", va="bottom")
    axis.text(19.6, 7.2, "hidden positions only", ha="center", va="bottom")
    plt.show()


def clip_picture(epsilon=0.2) -> None:
    """GRPO's clipped objective, for a good action and a bad one."""
    r = np.linspace(0.4, 1.6, 200)
    for axis, A in zip(subplots(2, 3.5), (1.0, -1.0)):
        clipped = r.clip(1 - epsilon, 1 + epsilon) * A
        axis.plot(r, r * A, ":", color="grey", label="r A")
        axis.plot(r, clipped, "--", color="C1", label="clip(r) A")
        axis.plot(r, np.minimum(r * A, clipped), color="C0", label="the minimum")
        axis.set(xlabel=r"ratio r = $\pi_\theta / \pi_{old}$", title=f"A = {A:+.0f}")
        axis.legend()
    plt.show()
