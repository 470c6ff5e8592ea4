"""MAR's released weights.

MAR's authors publish three models of ImageNet at 256 x 256 pixels, which make latents. A file in
MAR's format is {"model": weights, "model_ema": weights}; its settings are read off the shapes.
"""

import math
from functools import partial

from torch import Tensor

from maskrl import MAR
from workbench.errors import InputError
from workbench.files import (
    build_and_load,
    count_blocks,
    frozen,
    load_checkpoint,
    load_safely,
    read_checkpoint,
    save_safely,
    shape_of,
    tensors_of,
)
from workbench.kl16 import KL16_SCALE
from workbench.settings import MAR_SETTINGS, RELEASED, RunSettings

LATENT_CHANNELS = 16


def numbered(n: int) -> list[str]:
    """Names of n classes of which only the number is known."""
    return [str(i) for i in range(n)]


def mar_name(name: str) -> str:
    """The name in MAR's files of a weight of our MAR."""
    return "diffloss.net." + name.removeprefix("head.") if name.startswith("head.") else name


def is_mar_file(content) -> bool:
    """Whether the content of a file is in MAR's format: weights under MAR's names, and no kind."""
    if not isinstance(content, dict) or "kind" in content:
        return False
    parts = [content.get(part) for part in ("model", "model_ema")]
    names = [str(name) for part in parts if isinstance(part, dict) for name in part]
    return any(name.startswith(("diffloss.net.", "z_proj.")) for name in names)


def mar_settings(path, weights: dict[str, Tensor], num_heads: int | None) -> RunSettings:
    """The settings of MAR's weights, from their shapes; the rest as in the released size of the
    same width. InputError for shapes that MAR cannot have."""
    width, channels = shape_of(path, weights, "z_proj.weight", 2)
    length = shape_of(path, weights, "diffusion_pos_embed_learned", 3)[1]
    rows = shape_of(path, weights, "encoder_pos_embed_learned", 3)[1]
    side, patch = math.isqrt(length), math.isqrt(channels // LATENT_CHANNELS)
    if side**2 != length or LATENT_CHANNELS * patch**2 != channels:
        raise InputError(
            f"{path}: {length} tokens of {channels} channels are not the square patches of a "
            f"square of {LATENT_CHANNELS}-channel latents"
        )
    known = {size["width"]: size for size in RELEASED.values()}
    heads = num_heads or known.get(width, {}).get("heads")
    if heads is None:
        raise InputError(
            f"{path}: width {width} is none of the released ones, and the number of attention "
            "heads cannot be read off the weights: give num_heads (--heads)"
        )
    from_shapes = {
        "image_size": side * patch,
        "patch": patch,
        "scale": KL16_SCALE,
        "width": width,
        "depth": count_blocks(weights, "encoder_blocks"),
        "decoder_depth": count_blocks(weights, "decoder_blocks"),
        "heads": heads,
        "buffer": rows - length,
        "head_width": shape_of(path, weights, "diffloss.net.input_proj.weight", 2)[0],
        "head_depth": count_blocks(weights, "diffloss.net.res_blocks"),
        "steps": min(length, MAR_SETTINGS["steps"]),
    }
    try:
        return RunSettings(**(known.get(width, MAR_SETTINGS) | from_shapes))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_mar(path, ema=True, num_heads=None, classes=None) -> dict:
    """A file in MAR's format as `read_checkpoint` would give it, with MAR's names of the weights.

    classes_counted: whether the classes are mere numbers. InputError if it is not such a file, or
    if no settings fit its shapes."""
    content = load_safely(path, lazily=True)
    if not is_mar_file(content):
        raise InputError(f"{path} is not a file in MAR's format")
    weights = tensors_of(path, content, "model_ema" if ema else "model")
    number = shape_of(path, weights, "class_emb.weight", 2)[0]
    if classes is not None and len(classes) != number:
        raise InputError(f"{path} has {number} classes, and {len(classes)} names are given")
    return {
        "kind": "teacher",
        "settings": mar_settings(path, weights, num_heads),
        "classes": list(classes or numbered(number)),
        "classes_counted": classes is None,
        "model_ema": weights,
    }


def load_mar(path, ema=True, num_heads=None, device="cpu", classes=None) -> MAR:
    """A teacher from a file in MAR's official format, ready for `generate`.

    ema: the averaged weights, which MAR is evaluated with, else those under "model". num_heads:
    needed where the width is not a released one. classes: names (default "0", "1", ...).
    InputError names what is missing, unexpected or of the wrong shape; no code in the file is
    run."""
    content = read_mar(path, ema, num_heads, classes)
    build = partial(MAR, content["settings"], content["classes"], image_channels=LATENT_CHANNELS)
    return frozen(build_and_load(path, build, content["model_ema"], mar_name), device)


def save_mar(path, model: MAR, ema: MAR | None = None) -> None:
    """Write a teacher in MAR's official format; `ema` (default: the model) goes to "model_ema".

    InputError for what that format cannot hold: a student, a head that predicts anything but eps,
    and tokens that are not latents x 0.2325."""
    settings = model.settings
    if model.kind != "teacher":
        raise InputError(f"{path}: MAR's format is for teachers, not for a {model.kind}")
    if settings.predicts != "eps":
        raise InputError(f"{path}: in MAR's format the head predicts eps (--predicts eps)")
    if (settings.mean, settings.scale) != (0, KL16_SCALE):
        raise InputError(
            f"{path}: in MAR's format tokens are latents x {KL16_SCALE}, with mean 0; this model "
            f"has --mean {settings.mean} and --scale {settings.scale}"
        )
    content = {}
    for part, network in (("model", model), ("model_ema", ema or model)):
        content[part] = {mar_name(name): value for name, value in network.state_dict().items()}
    save_safely(path, content)


def read_model(path, kind: str | None = None, num_heads: int | None = None) -> dict:
    """`read_checkpoint` or `read_mar`, depending on the format of the file."""
    if not is_mar_file(load_safely(path, lazily=True)):
        return read_checkpoint(path, kind)
    if kind not in (None, "teacher"):
        raise InputError(f"{path} is a teacher; a {kind} is needed here")
    return read_mar(path, num_heads=num_heads)


def load_model(path, kind: str | None = None, device="cpu", num_heads: int | None = None) -> MAR:
    """`load_checkpoint` or `load_mar`, depending on the format of the file."""
    if is_mar_file(load_safely(path, lazily=True)):
        return load_mar(path, num_heads=num_heads, device=device)
    return load_checkpoint(path, kind, device)
