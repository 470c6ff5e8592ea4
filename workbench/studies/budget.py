"""Memory and hours of training on a GPU: computed, not measured.

    python -m workbench.studies.budget              # the README's two tables
    python -m workbench.studies.budget --batch 8    # instead of the presets'

Weights, their gradients and the states of the optimisers are float32. Activations are what autograd
keeps for the backward pass, added up while one transformer block and the head run on the CPU, and
scaled to the model. They are bounds: all tokens visible to the encoder, and all denoised. FLOPs are
those of matrix products, attention and convolutions, without Muon's, some 4 %; hours follow from a
share of an A100's peak. RL is that of --action x on critical steps, which needs more than z.
"""

import argparse
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskrl import MAR, Block, Head, micro_batches, random_mask, rng
from workbench.kl16 import KL16
from workbench.precision import InBFloat16, wrap
from workbench.settings import RELEASED, RunSettings, preset

GB = 1e9
HEAD_ROWS = 64  # tokens for which the head is run
PEAK = {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}  # FLOPs per second of an A100
IMAGENET = 1_281_167  # training images


# One module ---------------------------------------------------------------------------------------


class SavedBytes:
    """Counts what autograd keeps for a backward pass, every storage once.

    Use as torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)."""

    def __init__(self):
        self.sizes = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @staticmethod
    def unpack(tensor):
        return tensor

    def total(self) -> int:
        return sum(self.sizes.values())


@torch.enable_grad()
def kept_bytes(module: nn.Module, *inputs: torch.Tensor) -> int:
    """What autograd keeps of module(*inputs), as far as module and inputs require gradient."""
    saved = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        module(*inputs)
    return saved.total()


def flops(function, *inputs: torch.Tensor) -> int:
    """FLOPs of function(*inputs), attention included, of which a fused one reports none."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


@dataclass
class Cost:
    """Of a module: bytes kept for its backward pass, bytes of its input, forward FLOPs."""

    kept: int
    inputs: int
    flops: int


def cost(module: nn.Module, *inputs: torch.Tensor) -> Cost:
    """What the rows of `inputs` add: twice as many less as many, because weights are kept in any
    case, and in bfloat16 a copy of them."""
    twice = [x.detach().repeat(2, *[1] * (x.ndim - 1)) for x in inputs]
    twice = [both.requires_grad_(x.requires_grad) for both, x in zip(twice, inputs)]
    kept = kept_bytes(module, *twice) - kept_bytes(module, *inputs)
    return Cost(kept, 4 * inputs[0].numel(), flops(module, *inputs))


@cache
def cost_of_block(width: int, heads: int, rows: int, precision: str) -> Cost:
    """Of one image's `rows`."""
    block = Block(width, heads)
    wrap(block, "forward", InBFloat16 if precision == "bf16" else None)
    return cost(block, torch.randn(1, rows, width, requires_grad=True))


@cache
def cost_of_head(precision: str, frozen: bool, channels: int, width: int, *shape) -> Cost:
    """Of HEAD_ROWS tokens; frozen: with gradient to x_t alone."""
    head = Head(channels, width, *shape)
    wrap(head, "hidden", InBFloat16 if precision == "bf16" else None)
    head.requires_grad_(not frozen)
    x = torch.randn(HEAD_ROWS, channels, requires_grad=True)
    c = torch.randn(HEAD_ROWS, width, requires_grad=not frozen)
    return cost(head, x, torch.zeros(HEAD_ROWS).long(), c)


@cache
def mean_visible(length: int, micro_batch: int, batch: int) -> int:
    """Tokens of an image that the encoder computes under uniform masks, padding included: the mean
    of 50 batches."""
    generator, visible = rng("budget"), 0
    for _ in range(50):
        mask = random_mask(torch.rand(batch, generator=generator), length, generator)
        for rows in micro_batches(mask, micro_batch):
            visible += len(rows) * int((~mask[rows]).sum(1).max())
    return round(visible / 50 / batch)


# All stages ---------------------------------------------------------------------------------------


@dataclass
class Budget:
    """Bytes and hours of a model in its three stages: teacher, GSIM, RL.

    utilisation: of an A100's peak, an assumption; there are small products, and much that is no
    product."""

    settings: RunSettings
    image_channels: int = 3
    classes: int = 10
    utilisation: float = 0.2

    # a context, and the head for HEAD_ROWS tokens

    @property
    def channels(self) -> int:
        return self.image_channels * self.settings.patch**2

    @property
    def decoder_depth(self) -> int:
        return self.settings.decoder_depth or self.settings.depth

    def block(self, tokens: int) -> Cost:
        s = self.settings
        return cost_of_block(s.width, s.heads, s.buffer + tokens, s.precision)

    def head(self, frozen=False) -> Cost:
        s = self.settings
        shape = s.width, s.head_width, s.head_depth, s.predicts
        return cost_of_head(s.precision, frozen, self.channels, *shape)

    def context_bytes(self, images: int) -> int:
        """With checkpointing the inputs of the blocks, and what one block computes again."""
        depth, block = self.settings.depth + self.decoder_depth, self.block(self.settings.length)
        kept = depth * block.kept
        if self.settings.checkpointing:
            kept = depth * block.inputs + block.kept
        return images * kept

    def context_flops(self, visible: int | None = None) -> int:
        """Of an image, with so many visible tokens (None: all)."""
        s = self.settings
        encoder = self.block(s.length if visible is None else visible).flops
        return s.depth * encoder + self.decoder_depth * self.block(s.length).flops

    # bytes

    @cached_property
    def parameters(self) -> int:
        with torch.device("meta"):
            names = [str(i) for i in range(self.classes)]
            model = MAR(self.settings, names, image_channels=self.image_channels)
        return sum(p.numel() for p in model.parameters())

    def network_bytes(self, copies: int) -> int:
        """So many float32 copies of a network's parameters, and in bf16 a low copy of weights."""
        return self.parameters * (4 * copies + 2 * (self.settings.precision == "bf16"))

    def weights(self) -> dict[str, int]:
        """Networks, gradients, the two states of Adam, EMA."""
        gsim = (1, 1 + 1 + 2 + 1 + 1, 1 + 1 + 2)  # teacher; student, with the best EMA; auxiliary
        return {
            "teacher": self.network_bytes(1 + 1 + 2 + 1),
            "GSIM": sum(map(self.network_bytes, gsim)),
            "RL": self.network_bytes((1 + 1 + 2) + 3),  # policy; reference, student and teacher
        }

    def activations(self) -> dict[str, int]:
        """What autograd keeps of the parts of a batch that are on the graph at a time."""
        s, own, frozen = self.settings, self.head().kept, self.head(frozen=True).kept
        images = min(s.micro_batch or s.batch, s.batch)
        context, heads = self.context_bytes(images), images * s.length * s.draws / HEAD_ROWS
        pairs = s.prompts * s.group * s.critical_steps  # of rollout and learned step
        part = min(s.micro_batch or pairs, pairs)
        values = 4 * 4 * pairs * s.length * self.channels  # of each: tokens, z and two means
        return {
            "teacher": context + round(heads * own),
            # of the auxiliary network, and two rows of the teacher (guidance), only towards x_t
            "GSIM": context + round(heads * (own + 3 * frozen)),
            "RL": self.context_bytes(part) + round(own * part * s.length / HEAD_ROWS) + values,
        }

    def peak(self) -> dict[str, int]:
        activations = self.activations()
        return {stage: weights + activations[stage] for stage, weights in self.weights().items()}

    # hours

    @property
    def updates(self) -> dict[str, int]:
        s = self.settings
        rl = s.rl_iters + s.schedule_iters
        return {"teacher": s.teacher_iters, "GSIM": s.gsim_iters, "RL": rl}

    def hours(self) -> dict[str, float]:
        """Of all updates. In forward passes; a backward pass costs two, with checkpointing three
        for contexts."""
        s, backward = self.settings, 2 + self.settings.checkpointing
        tokens = s.length / 2 * s.draws  # an image's, half of them being hidden
        visible = mean_visible(s.length, s.micro_batch, s.batch)
        # GSIM: contexts of student and auxiliary network, with gradient and once more without, and
        # the teacher's two. Heads: the student's twice, and its gradient; the auxiliary network's
        # twice, and the gradients of its weights and of its input (one pass); two of the teacher's
        # rows, and the gradient of their input
        gsim_contexts = 2 * (1 + backward) + 2 + 2
        gsim_heads = (2 + 2) + (2 + 2 + 1) + (2 + 2)
        teacher, gsim = s.teacher_iters * s.batch, s.gsim_iters * s.batch
        # RL: the sampler, with the predictions that the information gain needs; the policy with
        # gradient, and the reference; at the end the schedule alone
        images = s.prompts * s.group
        pairs, alone = images * s.critical_steps, 4 * s.schedule_iters * images
        rl_contexts = images * s.steps + (1 + backward + 1) * pairs
        rl_tokens = images * s.length * (1 + s.steps / 2) + (3 + 1) * pairs * s.length / s.steps
        return {
            "teacher": self.hours_of(teacher * (1 + backward), teacher * 3 * tokens, visible),
            "GSIM": self.hours_of(gsim * gsim_contexts, gsim * gsim_heads * tokens, visible),
            "RL": self.hours_of(
                s.rl_iters * rl_contexts + alone * s.steps, s.rl_iters * rl_tokens + alone * s.length
            ),
        }

    def hours_of(self, contexts: float, tokens: float, visible: int | None = None) -> float:
        """Of so many contexts, and tokens through the head, whose outer layers are float32."""
        s = self.settings
        outer = tokens * 2 * 3 * self.channels * s.head_width
        inner = contexts * self.context_flops(visible) + tokens * self.head().flops / HEAD_ROWS
        seconds = (inner - outer) / PEAK[s.precision] + outer / PEAK["fp32"]
        return seconds / self.utilisation / 3600


# MAR's released sizes -----------------------------------------------------------------------------


class ReleasedBudget(Budget):
    """Budget of a generator of KL-16's latents of 256 x 256 pixels, with K unmasking iterations.

    Reading images, and networks other than MAR and KL-16, cost nothing here."""

    def __init__(self, settings: RunSettings, K: int = 64):
        super().__init__(replace(settings, steps=K), 16, 1000, utilisation=0.3)
        with torch.device("meta"):  # without memory
            self.vae = KL16().requires_grad_(False)
            self.image = torch.empty(1, 3, 256, 256)
            self.latents = torch.empty(1, 16, 16, 16, requires_grad=True)

    def hours_of_vae(self, module, x) -> float:
        """PyTorch's convolutions use TF32."""
        return flops(module, x) / PEAK["tf32"] / self.utilisation / 3600

    def peak(self):
        """For RL with four decoded images at a time, as --method backprop needs them."""
        return super().peak() | {"RL": super().peak()["RL"] + 4 * self.decoding.kept}

    @cached_property
    def decoding(self) -> Cost:
        return cost(self.vae.decoder, self.latents)

    def image_hours(self) -> dict[str, float]:
        """Of one image of the teacher, under guidance, and of the student."""
        s, decode = self.settings, self.hours_of_vae(self.vae.decoder, self.latents)
        teacher = self.hours_of(2 * s.steps, 2 * s.denoise_steps * s.length)
        return {
            "teacher": teacher + decode,
            "student": self.hours_of(s.steps, s.length) + decode,
        }

    def hours(self):
        """latents: of 60 % of ImageNet, both flips; with the reports of distilling and of RL."""
        s, own, image = self.settings, super().hours(), self.image_hours()
        encode, decode = (
            self.hours_of_vae(self.vae.encoder, self.image),
            self.hours_of_vae(self.vae.decoder, self.latents),
        )
        validated, judged = 10 * 1024, 2000  # images; of 1000 classes in each row of the judge
        decoded = (s.rl_iters + 4 * s.schedule_iters) * s.prompts * s.group
        schedules = sum(max(1, s.steps >> i) for i in range(5)) / s.steps  # that RL must beat
        return {
            "latents": 2 * 0.6 * IMAGENET * encode,
            "GSIM": own["GSIM"],
            "report": judged * image["teacher"] + (validated + 3 * judged) * image["student"],
            "RL": own["RL"] + decoded * decode + 2 * judged * schedules * image["student"],
        }


# The README's tables ------------------------------------------------------------------------------


def small_table(**overrides) -> str:
    budget = Budget(preset("small", **overrides))
    hours, peak = budget.hours(), budget.peak()
    lines = ["| | updates | hours, computed | GB, computed |", "|---|---|---|---|"]
    for stage, updates in budget.updates.items():
        lines.append(f"| {stage} | {updates:,} | {hours[stage]:.1f} | {peak[stage] / GB:.1f} |")
    return "\n".join(lines)


def released_table(**overrides) -> str:
    lines = [
        "| | GB, GSIM | GB, RL | hours: latents | GSIM, 20,000 updates | its report "
        "| RL, 150 + 100 updates, and report |",
        "|---" * 7 + "|",
    ]
    for name in RELEASED:
        budget = ReleasedBudget(preset(name, **{"precision": "bf16"} | overrides))
        peak = budget.peak()
        cells = [peak["GSIM"] / GB, peak["RL"] / GB, *budget.hours().values()]
        size = name.upper().replace("_", "-")
        lines.append(f"| {size} | {' | '.join(f'{value:.1f}' for value in cells)} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, help="images per update, instead of the presets'")
    parser.add_argument("--micro-batch", type=int, help="instead of the presets'")
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    print(f"small, pixels:\n\n{small_table(**given)}\n\nlatents:\n\n{released_table(**given)}")


if __name__ == "__main__":
    main()
