"""Parameters, memory, FLOPs and hours of training: computed, not measured.

    python tests/budget.py                  # MAR's released sizes by GSIM, at a batch of 64
    python tests/budget.py --batch 8
    python tests/budget.py --preset small   # all three stages of a preset, on one GPU

Weights, their gradients and the states of the optimisers are float32. Activations are what autograd
keeps for the backward pass, added up while one transformer block and the head run on the CPU in the
settings' precision, and scaled to the model. For memory, contexts are taken at their longest
(`buffer` + all tokens), which the images with the most visible tokens have. FLOPs are those of
matrix products and attention; hours follow from a share of the GPU's peak.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import maskrl

GB = 1e9
HEAD_ROWS = 64  # tokens for which the head is run
PEAK = {"bf16": 312e12, "tf32": 156e12}  # FLOPs per second of an A100
UTILISATION = 0.2  # of these peaks: small products, and much that is no product


@dataclass
class Cost:
    """Of a module: bytes kept for its backward pass, bytes of its input, forward FLOPs."""

    kept: int
    inputs: int
    flops: int


@torch.enable_grad()
def kept_bytes(module: nn.Module, precision: str, *inputs: torch.Tensor) -> int:
    """What autograd keeps of module(*inputs), as far as module and inputs require gradient."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that none is reused
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            module(*inputs)
    return sum(size for size, _ in kept.values())


def flops(function, *inputs: torch.Tensor) -> int:
    """FLOPs of function(*inputs), those of attention with them, of which a fused one tells none."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def cost(module: nn.Module, precision: str, *inputs: torch.Tensor) -> Cost:
    """What the rows of `inputs` add: twice as many less as many, for weights are kept in any case,
    and in bfloat16 a copy of them."""
    twice = [x.detach().repeat(2, *[1] * (x.ndim - 1)) for x in inputs]
    twice = [both.requires_grad_(x.requires_grad) for both, x in zip(twice, inputs)]
    kept = [kept_bytes(module, precision, *rows) for rows in (inputs, twice)]
    return Cost(kept[1] - kept[0], 4 * inputs[0].numel(), flops(module, *inputs))


def block_cost(settings: maskrl.Settings, tokens: int | None = None) -> Cost:
    """A transformer block's, of one image of so many tokens (None: all)."""
    block = maskrl.Block(settings.width, settings.heads)
    rows = settings.buffer + (settings.length if tokens is None else tokens)
    x = torch.randn(1, rows, settings.width, requires_grad=True)
    return cost(block, settings.precision, x)


def head_cost(settings: maskrl.Settings, frozen: bool, channels: int = 16) -> Cost:
    """The head's, of HEAD_ROWS tokens; frozen: with gradient to x_t alone."""
    width, depth = settings.head_width, settings.head_depth
    head = maskrl.Head(channels, settings.width, width, depth, settings.predicts)
    head.precision = settings.precision
    head.requires_grad_(not frozen)
    x = torch.randn(HEAD_ROWS, channels, requires_grad=True)
    c = torch.randn(HEAD_ROWS, settings.width, requires_grad=not frozen)
    return cost(head, "fp32", x, torch.zeros(HEAD_ROWS).long(), c)


def head_batches(settings: maskrl.Settings, batch: int) -> float:
    """How many times HEAD_ROWS tokens a GSIM update draws: half of the tokens are hidden, the mean
    of its uniform share."""
    return batch * settings.length / 2 * settings.draws / HEAD_ROWS


def decoder_depth(settings: maskrl.Settings) -> int:
    return settings.decoder_depth or settings.depth


def parameters(settings: maskrl.Settings, classes: int = 1000, channels: int = 16) -> int:
    """Parameters of a MAR; no memory is used for them."""
    with torch.device("meta"):
        model = maskrl.MAR(settings, maskrl.numbered(classes), image_channels=channels)
    return sum(p.numel() for p in model.parameters())


def fixed_bytes(count: int) -> dict[str, int]:
    """Bytes of weights, gradients, the two states of Adam and EMA in GSIM, of `count` parameters
    in each network."""
    copies = {"teacher": 1, "student": 1 + 1 + 2 + 1, "auxiliary": 1 + 1 + 2}
    return {network: 4 * count * n for network, n in copies.items()}


def context_bytes(settings: maskrl.Settings, images: int, checkpointing: bool) -> int:
    """Kept of the contexts of so many images at a time; checkpointing: the inputs of the blocks,
    and what one block at a time computes again."""
    depth, block = settings.depth + decoder_depth(settings), block_cost(settings)
    return images * (depth * block.inputs + block.kept if checkpointing else depth * block.kept)


def activation_bytes(
    settings: maskrl.Settings, batch: int, checkpointing: bool, channels: int = 16
) -> int:
    """Peak bytes that autograd keeps in a GSIM update: at the student's loss, when the student's
    context, and the heads of student, auxiliary network and teacher are on the graph, or at the
    auxiliary network's, when there are two contexts and one head."""
    context = context_bytes(settings, batch, checkpointing)
    head, frozen = (
        head_cost(settings, frozen, channels).kept * head_batches(settings, batch)
        for frozen in (False, True)
    )
    student_loss = context + head + 3 * frozen  # guidance: two rows for a token of the teacher
    return round(max(student_loss, 2 * context + head))


def context_flops(settings: maskrl.Settings, batch: int) -> float:
    """Forward FLOPs of the contexts of a batch under uniform masks, the encoder's padding with
    them: the mean of 50 batches."""
    generator, visible = maskrl.rng("budget"), 0
    for _ in range(50):
        mask = maskrl.random_mask(
            torch.rand(batch, generator=generator), settings.length, generator
        )
        for rows in maskrl.micro_batches(mask, settings.micro_batch):
            visible += len(rows) * int((~mask[rows]).sum(1).max())
    encoder = block_cost(settings, round(visible / 50 / batch)).flops
    decoder = block_cost(settings).flops
    return batch * (settings.depth * encoder + decoder_depth(settings) * decoder)


def update_flops(settings: maskrl.Settings, batch: int, channels: int = 16) -> int:
    """FLOPs of a GSIM update without checkpointing; a backward pass costs two forward ones, or one
    where the weights are frozen.

    Contexts: the student's and the auxiliary network's, forward and backward; the auxiliary
    network's once more and the teacher's two, forward alone; in parts the student's once more.
    Heads: the student's forward twice and backward once, the auxiliary network's forward twice,
    and backward to its weights once and to its input once, the teacher's (two rows for every token)
    forward and backward to its input."""
    contexts = 3 + 3 + 1 + 2 + (0 < settings.micro_batch < batch)
    heads = (2 + 2) + (2 + 2 + 1) + (2 + 2)
    head = head_cost(settings, False, channels).flops * head_batches(settings, batch)
    return round(contexts * context_flops(settings, batch) + heads * head)


def table(sizes: dict[str, maskrl.Settings], batch: int) -> str:
    """The budget of every size {name: Settings} as a Markdown table."""
    lines = [
        "| | parameters | weights: teacher | student, with gradients, Adam, EMA | auxiliary, with "
        "gradients, Adam | fixed in all | activations | with --checkpointing | FLOPs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, settings in sizes.items():
        count = parameters(settings)
        fixed = fixed_bytes(count)
        cells = [n / GB for n in (*fixed.values(), sum(fixed.values()))]
        cells += [activation_bytes(settings, batch, on) / GB for on in (False, True)]
        flops = update_flops(settings, batch) / 1e12
        cells = " | ".join(f"{value:.1f} GB" for value in cells)
        lines.append(f"| {name} | {count / 1e6:.1f}M | {cells} | {flops:.0f}T |")
    return "\n".join(lines)


# The three stages of a preset for pixels ----------------------------------------------------------


@dataclass
class Stage:
    """updates: how many; weights and activations: peak bytes; products and muon: FLOPs of an
    update in the settings' precision, and those of Muon, which are float32 (TF32 on a GPU)."""

    updates: int
    weights: int
    activations: int
    products: float
    muon: float = 0.0

    def hours(self, precision: str) -> float:
        peak = PEAK["bf16" if precision == "bf16" else "tf32"]
        seconds = self.products / peak + self.muon / PEAK["tf32"]
        return self.updates * seconds / UTILISATION / 3600


def muon_flops(settings: maskrl.Settings) -> int:
    with torch.device("meta"):
        model = maskrl.MAR(settings, maskrl.numbered(10))
    return sum(flops(maskrl.orthogonalise, p.data) for p in maskrl.hidden_matrices(model))


def stages(settings: maskrl.Settings) -> dict[str, Stage]:
    """Teacher, GSIM and RL by --rl-steps of a generator of pixels.

    Activations are those of the worst part of a batch: all tokens visible to the encoder and all of
    them denoised, which is more than any image has. RL learns as many steps as it may."""
    channels, L = 3 * settings.patch**2, settings.length
    count = parameters(settings, 10, channels)
    copy = 2 * count * (settings.precision == "bf16")  # of the weights on the graph
    images = settings.micro_batch or settings.batch
    heads = head_batches(settings, settings.batch)
    context = context_flops(settings, settings.batch)
    head = head_cost(settings, False, channels)
    on_graph = context_bytes(settings, images, settings.checkpointing)
    result = {
        "teacher": Stage(
            settings.teacher_iters,
            4 * count * (1 + 1 + 2 + 1) + copy,
            round(on_graph + 2 * head.kept * head_batches(settings, images)),
            3 * (context + head.flops * heads),
            muon_flops(settings) * (settings.muon_lr > 0),
        ),
        "GSIM": Stage(
            settings.gsim_iters,
            sum(fixed_bytes(count).values()) + 3 * copy,
            activation_bytes(settings, 2 * images, False, channels) - on_graph,
            update_flops(settings, settings.batch, channels),
        ),
    }
    rollouts = settings.prompts * settings.group
    for how, steps in (("critical", settings.critical_steps), ("all", settings.steps)):
        pairs = rollouts * steps
        images = min(settings.micro_batch or pairs, pairs)
        each = context / settings.batch  # forward, of one context
        contexts = rollouts * settings.steps + pairs * (3 + 1)  # reference: forward alone
        tokens = rollouts * settings.steps * L / 2 + pairs * 4 * L / settings.steps
        result[f"RL, {how}"] = Stage(
            settings.rl_iters,
            4 * count * (1 + 1 + 2 + 1) + copy,
            round(
                context_bytes(settings, images, settings.checkpointing)
                + head.kept * images * L / HEAD_ROWS
                + 4 * 4 * pairs * L * channels  # tokens, z and two means of each pair
            ),
            contexts * each + tokens / HEAD_ROWS * head.flops,
        )
    return result


def stage_table(settings: maskrl.Settings) -> str:
    lines = [
        "| | updates | TFLOP per update | of Muon | hours | weights, gradients, optimisers | "
        "activations | GB in all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, stage in stages(settings).items():
        sizes = (stage.weights, stage.activations, stage.weights + stage.activations)
        cells = [
            f"{stage.updates:,}",
            f"{stage.products / 1e12:.1f}",
            f"{stage.muon / 1e12:.1f}",
            f"{stage.hours(settings.precision):.1f}",
            *(f"{size / GB:.1f}" for size in sizes),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--batch", type=int, default=64, help="images per update (default: 64)")
    add("--preset", choices=("tiny", "small"), help="all stages of a generator of pixels")
    add("--micro-batch", type=int, help="instead of the preset's")
    add("--precision", choices=maskrl.PRECISIONS, help="instead of the preset's")
    args = parser.parse_args(argv)
    if args.preset is None:
        print(f"One GSIM update at a batch of {args.batch}, float32:\n")
        sizes = {name: maskrl.preset(name) for name in maskrl.RELEASED}
        print(table(sizes, args.batch))
        return
    names = ("micro_batch", "precision")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    settings = maskrl.preset(args.preset, **given)
    print(
        f"Preset {args.preset}, {settings.precision}, --micro-batch {settings.micro_batch}; hours "
        f"at {UTILISATION:.0%} of an A100's peak:\n"
    )
    print(stage_table(settings))


if __name__ == "__main__":
    main()
