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
PEAK = {"bf16": 312e12, "fp32": 19.5e12}  # FLOPs per second of an A100
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


def head_batches(settings: maskrl.Settings, batch: int, hidden=0.5) -> float:
    """How many times HEAD_ROWS tokens an update of teacher or GSIM draws; hidden: the share that is
    hidden, by default its mean."""
    return batch * settings.length * hidden * settings.draws / HEAD_ROWS


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
    settings: maskrl.Settings, batch: int, checkpointing: bool, channels: int = 16, hidden=0.5
) -> int:
    """Peak bytes that autograd keeps in a GSIM update: at the student's loss, when the student's
    context, and the heads of student, auxiliary network and teacher are on the graph, or at the
    auxiliary network's, when there are two contexts and one head."""
    context = context_bytes(settings, batch, checkpointing)
    head, frozen = (
        head_cost(settings, frozen, channels).kept * head_batches(settings, batch, hidden)
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


def context_passes(settings: maskrl.Settings, batch: int) -> int:
    """How often a GSIM update computes the batch's contexts, in forward passes: a backward pass
    costs two. The student's and the auxiliary network's, forward and backward; the auxiliary
    network's once more and the teacher's two, forward alone; in parts the student's once more."""
    return 3 + 3 + 1 + 2 + (0 < settings.micro_batch < batch)


# And the heads: the student's forward twice and backward once, the auxiliary network's forward
# twice, and backward to its weights once and to its input once (which costs one forward pass), the
# teacher's (two rows for every token) forward and backward to its input.
HEAD_PASSES = (2 + 2) + (2 + 2 + 1) + (2 + 2)


def update_flops(settings: maskrl.Settings, batch: int) -> int:
    """FLOPs of a GSIM update without checkpointing."""
    contexts = context_passes(settings, batch) * context_flops(settings, batch)
    heads = HEAD_PASSES * head_batches(settings, batch) * head_cost(settings, False).flops
    return round(contexts + heads)


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
    """updates: how many; weights and activations: peak bytes; flops: of an update, by the precision
    that they are computed in."""

    updates: int
    weights: int
    activations: int
    flops: dict[str, float]

    @property
    def hours(self) -> float:
        seconds = sum(n / PEAK[precision] for precision, n in self.flops.items()) / UTILISATION
        return self.updates * seconds / 3600


def muon_flops(settings: maskrl.Settings) -> int:
    with torch.device("meta"):
        model = maskrl.MAR(settings, maskrl.numbered(10))
    return sum(flops(maskrl.orthogonalise, p.data) for p in maskrl.hidden_matrices(model))


def stages(settings: maskrl.Settings) -> dict[str, Stage]:
    """Teacher, GSIM and RL by --rl-steps of a generator of pixels.

    Activations are bounds: parts of images whose tokens are all visible to the encoder and all
    denoised. RL takes --steps iterations, as many as it may learn."""
    channels, checkpointing = 3 * settings.patch**2, settings.checkpointing
    head, count = head_cost(settings, False, channels), parameters(settings, 10, channels)
    context = context_flops(settings, settings.batch) / settings.batch
    low_copy = 2 * count * (settings.precision == "bf16")  # of the weights on the graph
    one_network = 4 * count * (1 + 1 + 2 + 1) + low_copy  # gradients, Adam, EMA (RL: reference)

    def flops_of(contexts, head_batches, muon=0):  # forward passes
        outer = head_batches * HEAD_ROWS * 2 * 3 * channels * settings.head_width  # in fp32
        products = contexts * context + head_batches * head.flops - outer
        result = {"bf16": muon, "fp32": outer}
        result[settings.precision] += products
        return result

    images = settings.micro_batch or settings.batch
    heads = head_batches(settings, settings.batch)
    teacher_activations = head.kept * head_batches(settings, images, hidden=1)
    result = {
        "teacher": Stage(
            settings.teacher_iters,
            one_network,
            context_bytes(settings, images, checkpointing) + round(teacher_activations),
            flops_of(3 * settings.batch, 3 * heads, muon_flops(settings)),
        ),
        "GSIM": Stage(
            settings.gsim_iters,
            sum(fixed_bytes(count).values()) + 3 * low_copy,
            activation_bytes(settings, images, checkpointing, channels, hidden=1),
            flops_of(
                context_passes(settings, settings.batch) * settings.batch, HEAD_PASSES * heads
            ),
        ),
    }
    rollouts, K, L = settings.prompts * settings.group, settings.steps, settings.length
    for how, steps in (("critical", settings.critical_steps), ("all", K)):
        pairs = rollouts * steps
        images = min(settings.micro_batch or pairs, pairs)
        learner = 3 + 1  # policy, forward and backward; reference, forward
        predicted = rollouts * K * L / 2 * (how == "critical") + rollouts * L  # by the sampler
        result[f"RL, {how}"] = Stage(
            settings.rl_iters,
            one_network,
            context_bytes(settings, images, checkpointing)
            + head.kept * images * L // HEAD_ROWS
            + 4 * 4 * pairs * L * channels,  # tokens, z and two means of each pair
            flops_of(
                rollouts * K + learner * pairs,
                (predicted + learner * pairs * L / K) / HEAD_ROWS,
            ),
        )
    return result


def stage_table(settings: maskrl.Settings) -> str:
    lines = [
        "| | updates | TFLOP per update, bf16 | fp32 | hours | GB of weights, gradients and "
        "optimisers | of activations | in all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, stage in stages(settings).items():
        sizes = (stage.weights, stage.activations, stage.weights + stage.activations)
        cells = [
            f"{stage.updates:,}",
            *(f"{stage.flops[precision] / 1e12:.1f}" for precision in ("bf16", "fp32")),
            f"{stage.hours:.1f}",
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
