"""The official MAR code against ours: the same random weights, in turns, one image at a time."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from maskrl import MAR, Sampling, class_and_null_context, draw_noise, generate, rng
from workbench import timing
from workbench.errors import InputError
from workbench.released import mar_name, numbered
from workbench.settings import RELEASED, preset
from workbench.studies.speed import refreshed, seconds_of_one_core
from workbench.studies.study import Study

CLASSES = 10
CLOSE = 1e-4  # root mean square of a difference, relative to the standard deviation


class Official(Study):
    title = "Against the official MAR code"
    question = (
        "The authors' code ([LTH14/mar](https://github.com/LTH14/mar), in the folder `--peer`) and "
        "ours with the same random weights, in float32: one image of 256 tokens at a time, "
        "guidance 2.9, linear, 100 denoising steps; in milliseconds of one core, in turns. "
        "*small*, *mar_b*: the sizes of these presets, with heads that predict eps. *fewer*: a "
        "quarter of the iterations. *cache*: a refresh in every 4th. Before anything is timed, "
        "contexts and heads are found to be the same but for rounding."
    )
    columns = ("image_ms", "steps", "faster")
    sizes = {"small": (64, 4), "mar_b": (8, 3)}  # iterations; rounds, of which the first warms up
    peer = Path("runs/mar")  # the command's --peer
    guidance, refresh = 2.9, 4
    verdict = (
        "At the size of `small` our teacher is {0[small, teacher][faster]} times as fast as the "
        "official code, the student {0[small, student][faster]} times, with cache and fewer "
        "iterations {0[small, student, fewer, cache][faster]} times.",
        "At MAR-B's the teacher is {0[mar_b, teacher][faster]} times as fast, the student "
        "{0[mar_b, student][faster]} times.",
    )

    def measure(self, lab, only=()) -> dict:
        rows = {}
        for size, (steps, rounds) in self.sizes.items():
            if not only or size.startswith(only):
                measure = partial(self.times, size, steps, rounds, lab.device)
                result = lab.result(f"official, {size}, {steps} iterations", measure)
                measured = result.pop("rows")
                result["minutes"] /= len(measured)
                rows |= {f"{size}, {name}": result | row for name, row in measured.items()}
        return rows

    def times(self, size: str, steps: int, rounds: int, device) -> dict:
        """{"rows": {arm: figures}} of random weights of a preset's size."""
        teacher = random_teacher(size, device, self.guidance)
        with running_on(device):
            model = official_model(self.peer, teacher)
            difference = compare(model, teacher)
            calls = {"official": partial(official_image, model, steps, self.guidance)}
            for name, (model, sampling) in self.arms(teacher, steps).items():
                calls[name] = partial(generate, model, [0], sampling)
            with seconds_of_one_core(device):
                seconds = timing.seconds_in_turns(calls, rounds, device)
        official = timing.lower_median(seconds["official"])
        rows = {}
        for name, times in seconds.items():
            middle = timing.lower_median(times)
            rows[name] = {
                "image_ms": 1000 * middle,
                "lowest_ms": 1000 * min(times),
                "highest_ms": 1000 * max(times),
                "faster": official / middle,
                "steps": fewer(steps) if "fewer" in name else steps,
            }
        return {"rows": rows, "difference": difference}

    def arms(self, teacher: MAR, steps: int) -> dict:
        """{name: (model, Sampling)} of ours."""
        student, cache = copy(teacher), refreshed(self.refresh)
        student.kind = "student"
        return {
            "teacher": (teacher, Sampling(steps, denoise_steps=100)),
            "student": (student, Sampling(steps)),
            "student, cache": (student, Sampling(steps, contexts=cache)),
            "student, fewer": (student, Sampling(fewer(steps))),
            "student, fewer, cache": (student, Sampling(fewer(steps), contexts=cache)),
        }


def fewer(steps: int) -> int:
    return max(1, steps // 4)


def random_teacher(size: str, device, guidance: float) -> MAR:
    """A teacher of a preset's size as MAR's format can hold it, with random weights."""
    as_in_mar = {"predicts": "eps", "x_0_limit": 0.0, "order": "random", "guidance": guidance}
    settings = preset(size, scale=1.0, **as_in_mar)
    torch.manual_seed(0)
    model = MAR(settings, numbered(CLASSES), image_channels=16 if size in RELEASED else 3)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    return model.to(device).eval().requires_grad_(False)


def official_model(folder: Path, teacher: MAR) -> nn.Module:
    """The official code's model with the weights of ours; InputError if there is no such code."""
    settings = teacher.settings
    sizes = {
        **{"img_size": settings.image_size, "vae_stride": 1, "patch_size": settings.patch},
        **{"vae_embed_dim": teacher.channels // settings.patch**2, "class_num": CLASSES},
        **{"buffer_size": settings.buffer, "num_sampling_steps": "100"},
        **{"diffloss_d": settings.head_depth, "diffloss_w": settings.head_width},
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    }
    for part, depth in (("encoder", settings.depth), ("decoder", settings.decoder_depth)):
        sizes[f"{part}_embed_dim"], sizes[f"{part}_num_heads"] = settings.width, settings.heads
        sizes[f"{part}_depth"] = depth or settings.depth
    sys.path.insert(0, str(folder.resolve()))
    try:
        model = importlib.import_module("models.mar").MAR(**sizes)
    except ImportError as error:
        raise InputError(
            f"--peer {folder}: {error}; get the official code by git clone "
            f"https://github.com/LTH14/mar {folder}, and what it needs by pip install timm scipy"
        ) from None
    finally:
        sys.path.remove(str(folder.resolve()))
    model.load_state_dict({mar_name(name): p for name, p in teacher.state_dict().items()})
    return model.to(teacher.device).eval().requires_grad_(False)


@contextmanager
def running_on(device) -> Iterator[None]:
    """The official code says .cuda(), which on a CPU does nothing here."""
    on_cpu = mock.patch.object(Tensor, "cuda", stay)
    with nullcontext() if device.type == "cuda" else on_cpu, torch.no_grad():
        yield


def stay(x: Tensor) -> Tensor:
    return x


def official_image(model: nn.Module, steps: int, guidance: float) -> None:
    """One image of class 0 by the official code."""
    labels = torch.zeros(1, dtype=torch.long, device=model.fake_latent.device)
    model.sample_tokens(1, num_iter=steps, cfg=guidance, cfg_schedule="linear", labels=labels)


def compare(official: nn.Module, teacher: MAR) -> float:
    """The larger of the differences in contexts and in what the head makes of them; InputError if
    they are more than rounding."""
    noise = draw_noise(teacher, 1, rng("official", device=teacher.device), "random")
    labels, mask = torch.zeros_like(noise.order[:, 0]), noise.order < teacher.length // 2
    c = torch.cat(class_and_null_context(teacher, noise.z, mask, labels))
    x, t = noise.z[0], torch.full((teacher.length,), 500, device=teacher.device)
    tokens, hidden = noise.z.repeat(2, 1, 1), mask.float().repeat(2, 1)
    classes = torch.cat([official.class_emb(labels), official.fake_latent])
    encoded = official.forward_mae_encoder(tokens, hidden, classes)
    pairs = (
        (c, official.forward_mae_decoder(encoded, hidden)),
        (teacher.head(x, t, c[0]), official.diffloss.net(x, t, c[0])),
    )
    relative = [float((a - b).square().mean().sqrt() / b.std()) for a, b in pairs]
    if max(relative) > CLOSE:
        raise InputError(f"the official code computes something else: differences of {relative}")
    return max(relative)
