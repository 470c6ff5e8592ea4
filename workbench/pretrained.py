"""Pretrained networks: CLIP as a reward, and CLIP or a torchvision model as features of the judge.

Weights are downloaded by open_clip, or read from a file."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms import functional as TF

from maskrl import rng
from workbench.errors import InputError, is_out_of_memory
from workbench.files import load_safely, problem_of
from workbench.plugins import named_function, names_function


@dataclass
class ClipOptions:
    """Which CLIP is used by --reward clip and --features clip, and the prompt of the reward."""

    model: str = "ViT-B-32"
    weights: str = "laion2b_s34b_b79k"
    prompt: str = "a high-quality and harmonious picture of {class}"


def load_clip(options: ClipOptions, classes: list[str], device) -> tuple[nn.Module, Tensor]:
    """open_clip's frozen model and its tokenised prompts, one per class.

    InputError if open_clip is not installed, if it does not have the model or its weights, or if
    they cannot be read or downloaded."""
    try:
        import open_clip
    except ImportError:
        raise InputError("clip needs open_clip: pip install open_clip_torch") from None
    name, weights = options.model, options.weights
    if name not in open_clip.list_models():
        raise InputError(
            f"--clip-model {name}: open_clip has no such model; "
            "open_clip.list_models() has their names"
        )
    is_file = os.path.isfile(weights)
    known = open_clip.list_pretrained_tags_by_model(name)
    if not is_file and weights not in known:
        raise InputError(
            f"--clip-weights {weights}: neither a file nor weights that open_clip has "
            f"for {name}: {', '.join(known[:6]) or 'none'}"
        )
    logging.disable()  # downloads complain at length; here is one line for all of it
    try:
        source = os.path.abspath(weights) if is_file else weights
        model = open_clip.create_model(name, source, device=device).eval().requires_grad_(False)
        prompts = [options.prompt.replace("{class}", c.replace("_", " ")) for c in classes]
        return model, open_clip.get_tokenizer(name)(prompts)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if is_file and not weights.endswith(".safetensors") and problem_of(weights):
            raise InputError(f"--clip-weights {weights} {problem_of(weights)}") from None
        failure = "downloaded; without a network, give a file of weights"
        if is_file:
            failure = f"loaded safely as weights of --clip-model {name}"
        raise InputError(
            f"--clip-weights {weights} could not be {failure} ({type(error).__name__})"
        ) from None
    finally:
        logging.disable(logging.NOTSET)


def clip_pixels(images: Tensor, size, mean, std, interpolation="bicubic", **_) -> Tensor:
    """Square images [B, 3, S, S] in [-1, 1] as CLIP takes them [B, 3, side, side].

    open_clip's own transform, in tensors; the keywords are those of its preprocess_cfg."""
    side = size if isinstance(size, int) else min(size)
    x = (images + 1) / 2
    # first the width, then the height: bicubic overshoots, and PIL clips after each
    for shape in ((x.shape[-2], side), (side, side)):
        x = TF.resize(x, shape, TF.InterpolationMode(interpolation), antialias=True).clamp(0, 1)
    return TF.normalize(x, mean, std)


def clip_embedding(clip: nn.Module, images: Tensor) -> Tensor:
    """CLIP's embeddings [B, E], of length 1, of images [B, 3, S, S] in [-1, 1]."""
    embedded = [
        clip.encode_image(clip_pixels(part, **clip.visual.preprocess_cfg), normalize=True)
        for part in images.split(64)
    ]
    return torch.cat(embedded)


class ClipReward:
    """--reward clip: (1 + c) / 2, c being the cosine of the angle between CLIP's embeddings of the
    image and of the prompt with the name of its class."""

    def __init__(self, options: ClipOptions, classes: list[str], device):
        self.clip, prompts = load_clip(options, classes, device)
        parts = prompts.to(device).split(256)
        text = [self.clip.encode_text(part, normalize=True) for part in parts]
        self.text = torch.cat(text)  # [classes, E]

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        return (1 + (clip_embedding(self.clip, images) * self.text[labels]).sum(-1)) / 2


class TorchvisionFeatures:
    """Features [B, F] of images [B, 3, S, S] in [-1, 1] before the last layer of the torchvision
    classifier that a file of weights is named after."""

    def __init__(self, path, device):
        known = torchvision.models.list_models(module=torchvision.models)
        fitting = [name for name in known if Path(path).name.startswith(name)]
        if not fitting:
            raise InputError(
                f"--features {path}: its name starts with that of no torchvision model; keep the "
                "name that it was downloaded under, such as resnet50-11ad3fa6.pth"
            )
        name = max(fitting, key=len)
        model = torchvision.models.get_model(name)
        try:
            model.load_state_dict(load_safely(path))
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"--features {path}: not weights of {name}: {reason}") from None
        linear = [part for part, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise InputError(f"--features {path}: {name} has no last layer that could be taken off")
        model.set_submodule(linear[-1], nn.Identity())
        self.model = model.to(device).eval().requires_grad_(False)
        self.transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        self.transform.resize_size = self.transform.crop_size  # nothing is cropped

    def __call__(self, images: Tensor) -> Tensor:
        parts = [self.model(self.transform((part + 1) / 2)) for part in images.split(64)]
        return torch.cat(parts)


def on_a_copy(function: Callable, images: Tensor) -> Tensor:
    """function(images), which may change its images."""
    return function(images.clone())


def pretrained_features(name: str, clip: ClipOptions, device) -> Callable | None:
    """The features that --features asks for, images [B, 3, S, S] in [-1, 1] -> [B, F].

    None for `own`, CLIP's for `clip`, those before the last layer of a torchvision model for its
    FILE of weights, or the user's own function for module:function. InputError unless they are
    finite and differ between images."""
    if name == "own":
        return None
    if name == "clip":
        embed = partial(clip_embedding, load_clip(clip, [], device)[0])
    elif os.path.exists(name):
        embed = TorchvisionFeatures(name, device)
    elif names_function(name):
        embed = partial(on_a_copy, named_function("--features", name))
    else:
        raise InputError(
            f"--features {name}: expected own, clip, module:function, or a file of a torchvision "
            "model's weights under torchvision's own name, such as resnet50-11ad3fa6.pth"
        )
    x = torch.rand(4, 3, 32, 32, generator=rng("features")).to(device) * 2 - 1
    try:
        with torch.no_grad():
            features = embed(x)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"--features {name}: {type(error).__name__}: {error}") from None
    if not torch.is_tensor(features) or features.ndim != 2 or len(features) != 4:
        got = list(features.shape) if torch.is_tensor(features) else type(features).__name__
        raise InputError(f"--features {name} gave {got} for 4 images, not a tensor [4, F]")
    if not features.isfinite().all() or torch.equal(features[0], features[1]):
        raise InputError(f"--features {name}: not finite, or the same for different images")
    return embed
