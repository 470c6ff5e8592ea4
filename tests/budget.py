"""Parameters, memory, FLOPs and hours of training: computed, not measured.

    python tests/budget.py                  # MAR's released sizes: GSIM, RL, reports
    python tests/budget.py --batch 8        # instead of the presets'
    python tests/budget.py --preset small   # all three stages of a generator of pixels

Weights, their gradients and the states of the optimisers are float32. Activations are what autograd
keeps for the backward pass, added up while one transformer block and the head run on the CPU in the
settings' precision, and scaled to the model. For memory, contexts are taken at their longest
(`buffer` + all tokens), which the images with the most visible tokens have. FLOPs are those of
matrix products, attention and convolutions; hours follow from a share of an A100's peak.
"""

import argparse
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import maskrl

GB = 1e9
HEAD_ROWS = 64  # tokens for which the head is run
PEAK = {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}  # FLOPs per second of an A100
UTILISATION = 0.2  # of these peaks: an assumption; small products, and much that is no product
UTILISATION_OF_RELEASED = 0.3  # whose products are larger: an assumption


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
        kept[storage._cdata] = (storage.nbytes(), tensor)  # held, so that none is reused
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


def hours(flops: float, precision: str, utilisation: float) -> float:
    return flops / (PEAK[precision] * utilisation) / 3600


def cost(module: nn.Module, precision: str, *inputs: torch.Tensor) -> Cost:
    """What the rows of `inputs` add: twice as many less as many, for weights are kept in any case,
    and in bfloat16 a copy of them."""
    twice = [x.detach().repeat(2, *[1] * (x.ndim - 1)) for x in inputs]
    twice = [both.requires_grad_(x.requires_grad) for both, x in zip(twice, inputs)]
    kept = [kept_bytes(module, precision, *rows) for rows in (inputs, twice)]
    return Cost(kept[1] - kept[0], 4 * inputs[0].numel(), flops(module, *inputs))


@cache
def cost_of_block(width: int, heads: int, rows: int, precision: str) -> Cost:
    x = torch.randn(1, rows, width, requires_grad=True)
    return cost(maskrl.Block(width, heads), precision, x)


def block_cost(settings: maskrl.Settings, tokens: int | None = None) -> Cost:
    """A transformer block's, of one image of so many tokens (None: all)."""
    rows = settings.buffer + (settings.length if tokens is None else tokens)
    return cost_of_block(settings.width, settings.heads, rows, settings.precision)


@cache
def cost_of_head(precision: str, frozen: bool, channels: int, width: int, *shape) -> Cost:
    head = maskrl.Head(channels, width, *shape)
    head.precision = precision
    head.requires_grad_(not frozen)
    x = torch.randn(HEAD_ROWS, channels, requires_grad=True)
    c = torch.randn(HEAD_ROWS, width, requires_grad=not frozen)
    return cost(head, "fp32", x, torch.zeros(HEAD_ROWS).long(), c)


def head_cost(settings: maskrl.Settings, frozen: bool, channels: int = 16) -> Cost:
    """The head's, of HEAD_ROWS tokens; frozen: with gradient to x_t alone."""
    shape = settings.width, settings.head_width, settings.head_depth, settings.predicts
    return cost_of_head(settings.precision, frozen, channels, *shape)


def head_batches(settings: maskrl.Settings, batch: int, hidden=0.5) -> float:
    """How many times HEAD_ROWS tokens an update of teacher or GSIM draws; hidden: the share that is
    hidden, by default its mean."""
    return batch * settings.length * hidden * settings.draws / HEAD_ROWS


def decoder_depth(settings: maskrl.Settings) -> int:
    return settings.decoder_depth or settings.depth


def blocks(settings: maskrl.Settings) -> int:
    """Transformer blocks of encoder and decoder."""
    return settings.depth + decoder_depth(settings)


def at_a_time(settings: maskrl.Settings, rows: int) -> int:
    """How many of so many rows (images, or pairs of image and step) are on the graph at a time."""
    return min(settings.micro_batch or rows, rows)


def parameters(settings: maskrl.Settings, classes: int = 1000, channels: int = 16) -> int:
    """Parameters of a MAR; no memory is used for them."""
    with torch.device("meta"):
        model = maskrl.MAR(settings, maskrl.numbered(classes), image_channels=channels)
    return sum(p.numel() for p in model.parameters())


def network_bytes(count: int, copies: int, precision: str) -> int:
    """Bytes of so many float32 copies of `count` parameters, and in bf16 a low copy of weights."""
    return count * (4 * copies + 2 * (precision == "bf16"))


def fixed_bytes(count: int, precision: str = "fp32") -> dict[str, int]:
    """Bytes of weights, gradients, the two states of Adam, EMA, and the EMA of the lowest progress,
    in GSIM, of `count` parameters in each network."""
    copies = {"teacher": 1, "student": 1 + 1 + 2 + 1 + 1, "auxiliary": 1 + 1 + 2}
    return {network: network_bytes(count, n, precision) for network, n in copies.items()}


RL_COPIES = (1 + 1 + 2) + 3  # policy, gradients, Adam; reference, student and teacher


def context_bytes(settings: maskrl.Settings, images: int, checkpointing: bool) -> int:
    """Kept of the contexts of so many images at a time; checkpointing: the inputs of the blocks,
    and what one block at a time computes again."""
    depth, block = blocks(settings), block_cost(settings)
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
    costs two, and with checkpointing three. The student's and the auxiliary network's, forward and
    backward; the auxiliary network's once more and the teacher's two, forward alone; in parts the
    student's once more."""
    in_parts = at_a_time(settings, batch) < batch
    return 2 * (3 + settings.checkpointing) + 1 + 2 + in_parts


# And the heads: the student's forward twice and backward once, the auxiliary network's forward
# twice, and backward to its weights once and to its input once (which costs one forward pass), the
# teacher's (two rows for every token) forward and backward to its input.
HEAD_PASSES = (2 + 2) + (2 + 2 + 1) + (2 + 2)


def update_flops(settings: maskrl.Settings, batch: int) -> int:
    """FLOPs of a GSIM update."""
    contexts = context_passes(settings, batch) * context_flops(settings, batch)
    heads = HEAD_PASSES * head_batches(settings, batch) * head_cost(settings, False).flops
    return round(contexts + heads)


def rollouts(settings: maskrl.Settings) -> int:
    return settings.prompts * settings.group


def learned_steps(settings: maskrl.Settings, how: str) -> int:
    """Of a rollout; --rl-steps all: --steps iterations, as many as the schedule may learn."""
    return {"critical": settings.critical_steps, "all": settings.steps}[how]


def rl_passes(settings: maskrl.Settings, how: str) -> tuple[int, float]:
    """Contexts, and tokens through the head, of an RL update by --rl-steps `how`, in forward
    passes: of the sampler, with the predictions that the information gain needs, and of the
    learner, which is the policy forward and backward, and the reference forward."""
    K, L, images = settings.steps, settings.length, rollouts(settings)
    pairs = images * learned_steps(settings, how)
    predicted = images * L * (1 + K / 2 * (how == "critical"))
    contexts = images * K + (3 + 1 + settings.checkpointing) * pairs
    return contexts, predicted + (3 + 1) * pairs * L / K


def rl_stage(settings: maskrl.Settings, how: str) -> tuple[int, float, float]:
    """Updates, contexts and tokens of RL with what its schedule then learns alone: from the
    rollouts of four times the prompts."""
    contexts, tokens = rl_passes(settings, how)
    alone = 4 * settings.schedule_iters * rollouts(settings)
    return (
        settings.rl_iters + settings.schedule_iters,
        settings.rl_iters * contexts + alone * settings.steps,
        settings.rl_iters * tokens + alone * settings.length,
    )


def rl_activation_bytes(
    settings: maskrl.Settings, how: str, tokens: float, channels: int = 16
) -> int:
    """Bytes that autograd keeps of so many tokens denoised in each pair of rollout and learned
    step, and of each pair: its tokens, z and two means."""
    pairs = rollouts(settings) * learned_steps(settings, how)
    images, head = at_a_time(settings, pairs), head_cost(settings, False, channels)
    context = context_bytes(settings, images, settings.checkpointing)
    values = 4 * 4 * pairs * settings.length * channels
    return round(context + head.kept * images * tokens / HEAD_ROWS + values)


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
        return self.updates * sum(hours(n, p, UTILISATION) for p, n in self.flops.items())


def muon_flops(settings: maskrl.Settings) -> int:
    with torch.device("meta"):
        model = maskrl.MAR(settings, maskrl.numbered(10))
    return sum(flops(maskrl.orthogonalise, p.data) for p in maskrl.hidden_matrices(model))


def stages(settings: maskrl.Settings) -> dict[str, Stage]:
    """Teacher, GSIM and RL by --rl-steps of a generator of pixels.

    Activations are bounds: parts of images whose tokens are all visible to the encoder and all
    denoised."""
    channels, checkpointing = 3 * settings.patch**2, settings.checkpointing
    batch, precision = settings.batch, settings.precision
    images, heads = at_a_time(settings, batch), head_batches(settings, batch)
    head, count = head_cost(settings, False, channels), parameters(settings, 10, channels)
    context = context_flops(settings, batch) / batch

    def flops_of(contexts, head_batches, muon=0):  # forward passes
        outer = head_batches * HEAD_ROWS * 2 * 3 * channels * settings.head_width  # in fp32
        products = contexts * context + head_batches * head.flops - outer
        result = {"bf16": muon, "fp32": outer}
        result[precision] += products
        return result

    teacher_heads = head.kept * head_batches(settings, images, hidden=1)
    result = {
        "teacher": Stage(
            settings.teacher_iters,
            network_bytes(count, 1 + 1 + 2 + 1, precision),  # gradients, Adam, EMA
            context_bytes(settings, images, checkpointing) + round(teacher_heads),
            flops_of((3 + checkpointing) * batch, 3 * heads, muon_flops(settings)),
        ),
        "GSIM": Stage(
            settings.gsim_iters,
            sum(fixed_bytes(count, precision).values()),
            activation_bytes(settings, images, checkpointing, channels, hidden=1),
            flops_of(context_passes(settings, batch) * batch, HEAD_PASSES * heads),
        ),
    }
    for how in ("critical", "all"):
        updates, contexts, tokens = rl_stage(settings, how)
        result[f"RL, {how}"] = Stage(
            updates,
            network_bytes(count, RL_COPIES, precision),
            rl_activation_bytes(settings, how, settings.length, channels),
            flops_of(contexts / updates, tokens / updates / HEAD_ROWS),
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


# MAR's released sizes -----------------------------------------------------------------------------

IMAGENET = 1_281_167  # training images
JUDGED = 2000  # images in each row of the judge's table, of 1000 classes
WATCHED = 10 * 1024  # student's images for `progress`


def kl16() -> tuple[maskrl.KL16, torch.Tensor]:
    """The released autoencoder and the latents of an image of 256 x 256, without memory."""
    with torch.device("meta"):
        return maskrl.KL16().requires_grad_(False), torch.empty(1, 16, 16, 16, requires_grad=True)


def rl_bytes(settings: maskrl.Settings) -> dict[str, int]:
    """Bytes of GRPO on critical steps: of the weights; of what autograd keeps in learning; and of
    what it keeps in decoding, four images of 256 x 256 at a time, which only --method backprop
    needs and which is the most that decoding can take without a gradient."""
    vae, latents = kl16()
    tokens = settings.length / settings.steps
    return {
        "weights": network_bytes(parameters(settings), RL_COPIES, settings.precision),
        "learning": rl_activation_bytes(settings, "critical", tokens),
        "decoding": 4 * cost(vae.decoder, "fp32", latents).kept,
    }


def hours_of_released(settings: maskrl.Settings, K: int = 64) -> dict[str, float]:
    """Hours of an A100 for each stage of a released size, with K unmasking iterations.

    float32 is taken to be TF32, which PyTorch uses for convolutions, but for other products only
    after torch.set_float32_matmul_precision("high"): without, they take eight times as long.
    Contexts of a sampler and in RL at their longest. Reading images, networks other than MAR and
    KL-16, and all that is not a product cost nothing here."""
    settings = replace(settings, steps=K)
    precision = {"fp32": "tf32"}.get(settings.precision, settings.precision)

    def time_of(n, precision=precision):
        return hours(n, precision, UTILISATION_OF_RELEASED)

    vae, latents = kl16()
    image = torch.empty(1, 3, 256, 256, device="meta")
    context = time_of(blocks(settings) * block_cost(settings).flops)
    denoise = time_of(head_cost(settings, False).flops / HEAD_ROWS)
    encode, decode = (
        time_of(flops(module, x), "tf32")
        for module, x in ((vae.encoder, image), (vae.decoder, latents))
    )
    teacher = 2 * (K * context + settings.denoise_steps * settings.length * denoise) + decode
    student = K * context + settings.length * denoise + decode
    gsim = time_of(update_flops(settings, settings.batch))
    _, contexts, tokens = rl_stage(settings, "critical")
    decoded = (settings.rl_iters + 4 * settings.schedule_iters) * rollouts(settings)
    rl = contexts * context + tokens * denoise + decoded * decode
    fixed = [max(1, K >> i) for i in range(5)]  # schedules that a learned one must beat
    return {
        "1000 images of the teacher": 1000 * teacher,
        "1000 images of the student": 1000 * student,
        "latents of 60 % of ImageNet, both flips": 2 * 0.6 * IMAGENET * encode,
        "GSIM, --gsim-iters": settings.gsim_iters * gsim,
        "GSIM, 30 epochs as in the paper": 30 * IMAGENET / settings.batch * gsim,
        "progress and report of distilling": WATCHED * student + JUDGED * (teacher + 3 * student),
        "RL, --rl-iters": rl,
        "report of RL": 2 * JUDGED * sum(fixed) / K * student,
    }


def table(sizes: dict[str, maskrl.Settings]) -> str:
    """The budget of a GSIM update of every size {name: Settings} as a Markdown table."""
    lines = [
        "| | batch | parameters | weights: teacher | student, with gradients, Adam, EMA, best EMA "
        "| auxiliary, with gradients, Adam | fixed in all | activations | with --checkpointing "
        "| FLOPs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, settings in sizes.items():
        count, batch = parameters(settings), settings.batch
        fixed = fixed_bytes(count, settings.precision)
        images = at_a_time(settings, batch)
        cells = [n / GB for n in (*fixed.values(), sum(fixed.values()))]
        cells += [activation_bytes(settings, images, on) / GB for on in (False, True)]
        teraflops = update_flops(settings, batch) / 1e12
        cells = " | ".join(f"{value:.1f} GB" for value in cells)
        lines.append(f"| {name} | {batch} | {count / 1e6:.1f}M | {cells} | {teraflops:.0f}T |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", choices=("tiny", "small"), help="all stages of a generator of pixels")
    add("--batch", type=int, help="images per update, instead of the preset's")
    add("--micro-batch", type=int, help="instead of the preset's")
    add("--precision", choices=maskrl.PRECISIONS, help="instead of the preset's")
    args = parser.parse_args(argv)
    names = ("batch", "micro_batch", "precision")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.preset:
        settings = maskrl.preset(args.preset, **given)
        print(
            f"Preset {args.preset}, {settings.precision}, --micro-batch {settings.micro_batch}; "
            f"hours at {UTILISATION:.0%} of an A100's peak:\n"
        )
        print(stage_table(settings))
        return
    sizes = {name: maskrl.preset(name, **given) for name in maskrl.RELEASED}
    print(f"One GSIM update:\n\n{table(sizes)}\n")
    print(
        f"GB of RL; hours at {UTILISATION_OF_RELEASED:.0%} of an A100's peak, float32 as TF32, "
        "which has to be switched on:"
    )
    for name, settings in sizes.items():
        print(f"\n{name}, {settings.precision}")
        for part, n in rl_bytes(settings).items():
            print(f"{n / GB:8.1f} GB {part}")
        for stage, n in hours_of_released(settings).items():
            print(f"{n:8.2f} h  {stage}")


if __name__ == "__main__":
    main()
