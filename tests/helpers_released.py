"""Small files in the official formats: MAR's and the autoencoder's."""

from pathlib import Path

import pytest
import torch
from conftest import tiny

from maskrl import MAR
from workbench.errors import InputError
from workbench.kl16 import KL16, KL16_SCALE
from workbench.released import numbered

DATA = Path(__file__).parent / "data"


def with_wave_weights(module: torch.nn.Module) -> torch.nn.Module:
    """The module with weights that are not random: the same with every version of torch, and in
    whatever order the parts are created."""
    for i, (_, p) in enumerate(sorted(module.named_parameters())):
        wave = torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + i).view(p.shape)
        scale = 2 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1
        p.data.copy_(scale * wave)
    for layer in module.modules():
        if isinstance(layer, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            layer.weight.data += 1
    return module.eval().requires_grad_(False)


def small_vae(multipliers=(1, 1), channels=16) -> KL16:
    return with_wave_weights(KL16(32, multipliers, channels))


def small_mar(classes=3, **settings) -> MAR:
    """A teacher of latents that MAR's format can hold: 16 tokens, 2 heads."""
    of_latents = {
        "image_size": 4,
        "patch": 1,
        "scale": KL16_SCALE,
        "predicts": "eps",
        "x_0_limit": 0.0,
        "flip": True,
    }
    model = MAR(tiny(**(of_latents | settings)), numbered(classes), image_channels=16)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def official() -> dict:
    """The reference checkpoint as the authors' code writes them, with an EMA = 1.01 x model."""
    content = torch.load(DATA / "mar_A.pth", weights_only=True)
    ema = {name: 1.01 * value for name, value in content["model"].items()}
    return {"model": dict(content["model"]), "model_ema": ema}


def refusal(path, function, *args, **kwargs) -> str:
    """The message of the InputError of function(*args, **kwargs), which names the path, in one
    line."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def without(weights, name) -> dict:
    return {key: value for key, value in weights.items() if key != name}
