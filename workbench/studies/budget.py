"""Memory and hours of training on a GPU: computed, not measured. Prints two tables.

    python -m workbench.studies.budget --batch 64 --micro-batch 16    # instead of the presets'

Weights, their gradients and the states of the optimisers are float32. Activations are what autograd
keeps for the backward pass, of one transformer block and of the head, scaled to the model. FLOPs
are those of matrix products, attention and convolutions; hours follow from a share of an A100's
peak. Contexts are taken at their longest, with all tokens visible to the encoder; RL is that of
--action x on critical steps, which needs more than z.
"""

import argparse
from functools import cache, cached_property

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskrl import MAR, Block, Head, teacher_optimizers
from workbench.kl16 import KL16
from workbench.precision import InBFloat16, wrap
from workbench.settings import RELEASED, RunSettings, preset

GB = 1e9
# FLOPs per second at a GPU's peak, and bytes per second of its memory
A100 = {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12, "memory": 2.0e12}
H100 = {"bf16": 989e12, "tf32": 495e12, "fp32": 67e12, "memory": 3.35e12}


class SavedBytes:
    """Counts what autograd keeps for a backward pass, every storage once.

    Use as torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)."""

    def __init__(self):
        self.sizes = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.sizes[storage._cdata] = storage.nbytes()
        return tensor

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    def total(self) -> int:
        return sum(self.sizes.values())


def kept_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """What autograd keeps for the rows of `inputs`, as far as module and inputs require gradient.

    Twice as many rows less as many, because weights, and in bf16 copies of them, are kept in any
    case."""
    totals = []
    for n in (1, 2):
        rows = [x.detach().repeat(n, *[1] * (x.ndim - 1)) for x in inputs]
        rows = [some.requires_grad_(x.requires_grad) for some, x in zip(rows, inputs)]
        saved = SavedBytes()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            result = module(*rows)  # while it lives, what is kept for it does
        totals.append(saved.total())
        del result
    return totals[1] - totals[0]


@cache
def kept_of_block(width: int, heads: int, rows: int, precision: str) -> int:
    """Of an image's `rows`. Fake tensors have shapes and storages, but no numbers."""
    with FakeTensorMode():
        block = Block(width, heads)
        wrap(block, "forward", InBFloat16 if precision == "bf16" else None)
        return kept_bytes(block, torch.randn(1, rows, width, requires_grad=True))


@cache
def kept_of_head(precision: str, frozen: bool, channels: int, width: int, *shape) -> float:
    """Of a token; frozen: with gradient to x_t alone."""
    rows = 64
    with FakeTensorMode():
        head = Head(channels, width, *shape, predicts="eps")
        wrap(head, "hidden", InBFloat16 if precision == "bf16" else None)
        head.requires_grad_(not frozen)
        x = torch.randn(rows, channels, requires_grad=True)
        c = torch.randn(rows, width, requires_grad=not frozen)
        return kept_bytes(head, x, torch.zeros(rows).long(), c) / rows


@cache
def cost_of_autoencoder() -> tuple[int, int, int]:
    """FLOPs of KL-16's encoder and decoder for an image of 256 x 256; bytes kept in decoding."""
    with torch.device("meta"):
        vae, image, latents = KL16(), torch.empty(1, 3, 256, 256), torch.empty(1, 16, 16, 16)
    counts = []
    for module, x in ((vae.encoder, image), (vae.decoder, latents)):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(x)  # fused attention would report nothing
        counts.append(counter.get_total_flops())
    with FakeTensorMode():
        decoder = KL16().requires_grad_(False).decoder
        kept = kept_bytes(decoder, torch.randn(1, 16, 16, 16, requires_grad=True))
    return *counts, kept


class Budget:
    """Bytes and hours of a model of pixels in its three stages: teacher, GSIM, RL."""

    image_channels, classes = 3, 10
    utilisation = 0.2  # of a GPU's peak: an assumption; small products, and much that is none
    gpu = A100

    def __init__(self, settings: RunSettings):
        self.settings = settings
        self.channels = self.image_channels * settings.patch**2
        self.blocks = settings.depth + (settings.decoder_depth or settings.depth)
        self.rows = settings.buffer + settings.length

    @cached_property
    def model(self) -> MAR:
        """Without memory."""
        with torch.device("meta"):
            names = [str(i) for i in range(self.classes)]
            return MAR(self.settings, names, image_channels=self.image_channels)

    @cached_property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def head_parameters(self) -> int:
        return sum(p.numel() for p in self.model.head.parameters())

    @property
    def heads_alone(self) -> bool:
        """Whether GSIM trains heads alone, all the time."""
        return self.settings.heads_iters >= self.settings.gsim_iters

    def network_bytes(self, copies: int) -> int:
        """So many float32 copies of a network's parameters, and in bf16 a low copy of weights."""
        return self.parameters * (4 * copies + 2 * (self.settings.precision == "bf16"))

    def weights(self) -> dict[str, int]:
        """Networks, gradients, the two states of Adam, EMA."""
        gsim = (1, 1 + 1 + 1, 1)  # teacher; student, with its EMA and the best one; auxiliary
        trained = 2 * (1 + 2) * 4 * (self.head_parameters if self.heads_alone else self.parameters)
        return {
            "teacher": self.network_bytes(1 + 1 + 2 + 1),
            "GSIM": sum(map(self.network_bytes, gsim)) + trained,
            "RL": self.network_bytes((1 + 1 + 2) + 3),  # policy; reference, student and teacher
        }

    def context_bytes(self) -> int:
        """What autograd keeps of an image's context; with checkpointing the inputs of the blocks,
        and what one block computes again."""
        s = self.settings
        kept = kept_of_block(s.width, s.heads, self.rows, s.precision)
        inputs = 4 * self.rows * s.width
        return self.blocks * inputs + kept if s.checkpointing else self.blocks * kept

    def head_bytes(self, frozen=False) -> float:
        """Of a token in the head."""
        s = self.settings
        shape = s.width, s.head_width, s.head_depth
        return kept_of_head(s.precision, frozen, self.channels, *shape)

    def activations(self) -> dict[str, int]:
        """What autograd keeps of the part of a batch that is on the graph at a time."""
        s, own, frozen = self.settings, self.head_bytes(), self.head_bytes(frozen=True)
        images = min(s.micro_batch or s.batch, s.batch)
        # images that hide about as many tokens go together, so that one part hides nearly all
        tokens = images * s.length * s.draws * (1 if s.micro_batch else 0.5)
        pairs = s.prompts * s.group * s.critical_steps  # of rollout and learned step
        part = min(s.micro_batch or pairs, pairs)
        values = 4 * 4 * pairs * s.length * self.channels  # of each: tokens, z and two means
        context = self.context_bytes()
        return {
            "teacher": images * context + round(tokens * own),
            # of the auxiliary network, and two rows of the teacher (guidance), only towards x_t
            "GSIM": images * context * (not self.heads_alone) + round(tokens * (own + 3 * frozen)),
            "RL": part * context + round(part * s.length / s.steps * own) + values,
        }

    def peak(self) -> dict[str, int]:
        activations = self.activations()
        return {stage: weights + activations[stage] for stage, weights in self.weights().items()}

    def updates(self) -> dict[str, int]:
        s = self.settings
        rl = s.rl_iters + s.schedule_iters
        return {"teacher": s.teacher_iters, "GSIM": s.gsim_iters, "RL": rl}

    def passes(self) -> dict[str, tuple[float, float]]:
        """Contexts, and tokens through a head, in one update, as forward passes. A backward pass
        costs two of them, with checkpointing three for contexts."""
        s, backward = self.settings, 2 + self.settings.checkpointing
        tokens = s.batch * s.length / 2 * s.draws  # half of them being hidden
        # GSIM: contexts of student and auxiliary network, with gradient and once more without, and
        # the teacher's two, which heads alone share. Heads: the student's twice, and its gradient;
        # the auxiliary network's twice, and the gradients of its weights and of its input (one
        # pass); two of the teacher's rows, and the gradient of their input
        gsim_heads = (2 + 2) + (2 + 2 + 1) + (2 + 2)
        return {
            "teacher": (s.batch * (1 + backward), 3 * tokens),
            "GSIM": (s.batch * (2 * (1 + backward) + 2 + 2), gsim_heads * tokens),
            "GSIM, heads alone": (s.batch * 2, gsim_heads * tokens),
        }

    def hours(self) -> dict[str, float]:
        """Of all updates."""
        s, passes = self.settings, self.passes()
        hours = {stage: self.hours_of(*passes[stage]) for stage in passes}
        alone = min(s.heads_iters, s.gsim_iters)
        whole = s.gsim_iters - alone
        return {
            "teacher": s.teacher_iters * hours["teacher"] + self.hours_of_muon(),
            "GSIM": whole * hours["GSIM"] + alone * hours["GSIM, heads alone"],
            "RL": self.hours_of(*self.passes_of_rl()),
        }

    def passes_of_rl(self) -> tuple[float, float]:
        """Of all updates: the sampler, with the predictions that the information gain needs; the
        policy with gradient, and the reference; at the end the schedule alone."""
        s, backward = self.settings, 2 + self.settings.checkpointing
        images = s.prompts * s.group
        pairs, alone = images * s.critical_steps, 4 * s.schedule_iters * images
        contexts = images * s.steps + (1 + backward + 1) * pairs
        drawn = images * s.length * (1 + s.steps / 2) + (3 + 1) * pairs * s.length / s.steps
        return s.rl_iters * contexts + alone * s.steps, s.rl_iters * drawn + alone * s.length

    def hours_of(self, contexts: float, tokens: float) -> float:
        return self.seconds_at_peak(contexts, tokens) / self.utilisation / 3600

    def seconds_at_peak(self, contexts: float, tokens: float) -> float:
        """Of so many contexts, and tokens through the head, whose outer layers are float32."""
        s = self.settings
        # the weights of projections and MLP, then attention
        block = 2 * self.rows * 12 * s.width**2 + 2 * 2 * self.rows**2 * s.width
        outer = 2 * 3 * self.channels * s.head_width
        inner = contexts * self.blocks * block + tokens * (self.head_flops() - outer)
        return inner / self.gpu[s.precision] + tokens * outer / self.gpu["fp32"]

    def head_flops(self) -> int:
        """Of a token, which meets every weight once."""
        return sum(2 * p.numel() for p in self.model.head.parameters() if p.ndim == 2)

    def hours_of_muon(self) -> float:
        """Five iterations of three products, in bfloat16 on this GPU, for each of its matrices."""
        muon = teacher_optimizers(self.model).get("muon")
        shapes = [sorted(p.shape) for p in muon.param_groups[0]["params"]] if muon else []
        total = sum(5 * (2 * 2 * n**2 * m + 2 * n**3) for n, m in shapes)
        return self.settings.teacher_iters * total / self.gpu["bf16"] / self.utilisation / 3600


class ReleasedBudget(Budget):
    """Budget of a size of MAR's released models, for latents of 256 x 256 pixels.

    Reading images, and networks other than MAR and KL-16, cost nothing here."""

    image_channels, classes = 16, 1000
    utilisation = 0.3  # products are larger

    def peak(self) -> dict[str, int]:
        """In RL with four decoded images at a time, as --method backprop needs them."""
        peak, (_, _, kept) = super().peak(), cost_of_autoencoder()
        return peak | {"RL": peak["RL"] + 4 * kept}

    def hours(self) -> dict[str, float]:
        """latents: of 60 % of ImageNet, both flips; and with the reports of distilling and RL."""
        s, own = self.settings, super().hours()
        encode, decode = (  # PyTorch's convolutions use TF32
            n / self.gpu["tf32"] / self.utilisation / 3600 for n in cost_of_autoencoder()[:2]
        )
        teacher = self.hours_of(2 * s.steps, 2 * s.denoise_steps * s.length) + decode  # an image
        student = self.hours_of(s.steps, s.length) + decode
        validated, judged = 10 * 1024, 2000  # images; of 1000 classes in each row of the judge
        decoded = (s.rl_iters + 4 * s.schedule_iters) * s.prompts * s.group
        schedules = sum(max(1, s.steps >> i) for i in range(5)) / s.steps  # that RL must beat
        return {
            "latents": 2 * 0.6 * 1_281_167 * encode,
            "GSIM": own["GSIM"],
            "report": judged * teacher + (validated + 3 * judged) * student,
            "RL": own["RL"] + decoded * decode + 2 * judged * schedules * student,
        }


def small_table(**overrides) -> str:
    """Also with batches in one part."""
    budget = Budget(preset("small", **overrides))
    hours, peak = budget.hours(), budget.peak()
    whole = Budget(preset("small", **overrides | {"micro_batch": 0})).peak()
    lines = ["| | updates | hours | GB | GB, `--micro-batch 0` |", "|---" * 5 + "|"]
    for stage, updates in budget.updates().items():
        gigabytes = f"{peak[stage] / GB:.1f} | {whole[stage] / GB:.1f}"
        lines.append(f"| {stage} | {updates:,} | {hours[stage]:.1f} | {gigabytes} |")
    gigabytes = f"{max(peak.values()) / GB:.1f} | {max(whole.values()) / GB:.1f}"
    lines.append(f"| all | | {sum(hours.values()):.1f} | {gigabytes} |")
    return "\n".join(lines)


def released_table(**overrides) -> str:
    """In bfloat16, with 64 unmasking iterations."""
    lines = [
        "| | GB, GSIM | GB, RL | hours: latents | GSIM, 20,000 updates | its report "
        "| RL, 150 + 100 updates, and report |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in RELEASED:
        budget = ReleasedBudget(preset(name, precision="bf16", steps=64, **overrides))
        peak = budget.peak()
        cells = [peak["GSIM"] / GB, peak["RL"] / GB, *budget.hours().values()]
        size = name.upper().replace("_", "-")
        lines.append(f"| {size} | {' | '.join(f'{value:.1f}' for value in cells)} |")
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, help="images per update, instead of the presets'")
    parser.add_argument("--micro-batch", type=int, help="instead of the presets'")
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    print(f"small, pixels:\n\n{small_table(**given)}\n\nlatents:\n\n{released_table(**given)}")


if __name__ == "__main__":
    main()
