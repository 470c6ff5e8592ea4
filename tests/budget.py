"""Parameters, bytes, FLOPs and hours of MAR's released sizes: computed, not measured.

    python tests/budget.py            # the tables at the presets' own batch
    python tests/budget.py --batch 8

Everything is float32. Weights and optimiser states are counted. Activations are what autograd keeps
for the backward pass, added up while one transformer block and the head run on the CPU, and scaled
to the model. Contexts are taken at their longest (`buffer` + all tokens), because a batch is padded
to its image with the most visible tokens; half of the tokens are hidden, the mean of GSIM's uniform
share.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import maskrl

GB = 1e9
HEAD_ROWS = 64  # tokens for which the head is run


@dataclass
class Cost:
    """Of a module: bytes kept for its backward pass, bytes of its input, forward FLOPs."""

    kept: int
    inputs: int
    flops: int


@torch.enable_grad()
def cost(module: nn.Module, *inputs: torch.Tensor) -> Cost:
    """Run module(*inputs) once and count, as far as module and inputs require gradient."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}  # on `meta` no data has a place
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # held, so that none is reused
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        with FlopCounterMode(display=False) as counter:
            module(*inputs)
    total = sum(size for size, _ in kept.values())
    return Cost(total, 4 * inputs[0].numel(), counter.get_total_flops())


def block_cost(settings: maskrl.Settings) -> Cost:
    """A transformer block's, of one image."""
    block = maskrl.Block(settings.width, settings.heads)
    rows = settings.buffer + settings.length
    return cost(block, torch.randn(1, rows, settings.width, requires_grad=True))


def head_cost(settings: maskrl.Settings, frozen: bool) -> Cost:
    """The head's, of HEAD_ROWS tokens; frozen: with gradient to x_t alone."""
    width, depth = settings.head_width, settings.head_depth
    head = maskrl.Head(16, settings.width, width, depth, settings.predicts)
    head.requires_grad_(not frozen)
    x = torch.randn(HEAD_ROWS, 16, requires_grad=True)
    c = torch.randn(HEAD_ROWS, settings.width, requires_grad=not frozen)
    return cost(head, x, torch.zeros(HEAD_ROWS).long(), c)


def head_batches(settings: maskrl.Settings, batch: int) -> float:
    """How many times HEAD_ROWS tokens a GSIM update draws."""
    return batch * settings.length / 2 * settings.draws / HEAD_ROWS


def blocks(settings: maskrl.Settings) -> int:
    """Transformer blocks of encoder and decoder."""
    return settings.depth + (settings.decoder_depth or settings.depth)


def parameters(settings: maskrl.Settings, classes: int = 1000) -> int:
    """Parameters of a MAR of latents; no memory is used for them."""
    with torch.device("meta"):
        model = maskrl.MAR(settings, maskrl.numbered(classes), image_channels=16)
    return sum(p.numel() for p in model.parameters())


def fixed_bytes(count: int) -> dict[str, int]:
    """Bytes of weights, gradients, the two states of Adam, EMA, and the EMA of the lowest progress,
    in GSIM, of `count` parameters in each network."""
    copies = {"teacher": 1, "student": 1 + 1 + 2 + 1 + 1, "auxiliary": 1 + 1 + 2}
    return {network: 4 * count * n for network, n in copies.items()}


def activation_bytes(settings: maskrl.Settings, batch: int, checkpointing: bool) -> int:
    """Peak bytes that autograd keeps in a GSIM update: at the student's loss, when the student's
    context, and the heads of student, auxiliary network and teacher are on the graph, or at the
    auxiliary network's, when there are two contexts and one head."""
    block = block_cost(settings)
    context = batch * blocks(settings) * block.kept
    recomputed = 0
    if checkpointing:
        context = batch * blocks(settings) * block.inputs
        recomputed = batch * block.kept  # one block at a time
    head = head_cost(settings, frozen=False).kept * head_batches(settings, batch)
    frozen_head = head_cost(settings, frozen=True).kept * head_batches(settings, batch)
    student_loss = context + head + 3 * frozen_head  # guidance: two rows for a token of the teacher
    auxiliary_loss = 2 * context + head
    return round(max(student_loss, auxiliary_loss) + recomputed)


def update_flops(settings: maskrl.Settings, batch: int) -> int:
    """FLOPs of a GSIM update without checkpointing; a backward pass costs two forward ones, or one
    where the weights are frozen.

    Contexts: the student's and the auxiliary network's, forward and backward; the auxiliary
    network's once more and the teacher's two, forward alone. Heads: the student's forward twice and
    backward once, the auxiliary network's forward twice, and backward to its weights once and to
    its input once, the teacher's (two rows for every token) forward and backward to its input."""
    context = batch * blocks(settings) * block_cost(settings).flops
    head = head_cost(settings, frozen=False).flops * head_batches(settings, batch)
    contexts = 3 + 3 + 1 + 2
    heads = (2 + 2) + (2 + 2 + 1) + (2 + 2)
    return round(contexts * context + heads * head)


def rl_bytes(settings: maskrl.Settings) -> dict[str, int]:
    """Bytes of GRPO with checkpointing: of the weights, policy with gradients and Adam, reference,
    student and teacher; of what autograd keeps for all pairs of rollout and critical step; and of
    what it keeps in decoding, four images of 256 x 256 at a time, which only --method backprop
    needs and which is the most that decoding can take without a gradient."""
    pairs = settings.prompts * settings.group * settings.critical_steps
    block = block_cost(settings)
    vae, latents = kl16()
    return {
        "weights": 4 * parameters(settings) * (4 + 3),
        "learning": pairs * (blocks(settings) * block.inputs + block.kept),
        "decoding": 4 * cost(vae.decoder, latents).kept,
    }


def kl16() -> tuple[maskrl.KL16, torch.Tensor]:
    """The released autoencoder and the latents of an image of 256 x 256, without memory."""
    with torch.device("meta"):
        return maskrl.KL16().requires_grad_(False), torch.empty(1, 16, 16, 16, requires_grad=True)


PEAK = 156e12  # FLOPS of an A100 in TF32; in bfloat16 it has twice as many, in float32 an eighth
UTILISATION = 0.3  # of them: an assumption
IMAGENET = 1_281_167  # training images
JUDGED = 2000  # images in each row of the judge's table, of 1000 classes
WATCHED = 10 * 1024  # student's images for `progress`


def hours_of_released(settings: maskrl.Settings, K: int = 64) -> dict[str, float]:
    """Hours of an A100 for each stage of a released size, with K unmasking iterations.

    Forward FLOPs are counted by FlopCounterMode on the meta device; contexts at their longest,
    rollouts with the predictions that the information gain needs. Reading images, networks other
    than MAR and KL-16, and all that is not a matrix product cost nothing here."""
    vae, latents = kl16()
    with torch.device("meta"):
        image = torch.empty(1, 3, 256, 256)
        rows = torch.empty(1, settings.buffer + settings.length, settings.width)
        block = maskrl.Block(settings.width, settings.heads)
        head = maskrl.Head(16, settings.width, settings.head_width, settings.head_depth, "eps")
        token = torch.empty(1, 16), torch.zeros(1).long(), torch.empty(1, settings.width)

    def flops(module, *inputs):
        with FlopCounterMode(display=False) as counter:
            module(*inputs)
        return counter.get_total_flops()

    context, denoise = blocks(settings) * flops(block, rows), flops(head, *token)
    encode, decode = flops(vae.encoder, image), flops(vae.decoder, latents)
    teacher = 2 * (K * context + settings.denoise_steps * settings.length * denoise) + decode
    student = K * context + settings.length * denoise + decode
    rollout = K * context + K * settings.length / 2 * denoise + decode
    recomputed = 2 * settings.batch * context
    gsim = update_flops(settings, settings.batch) + recomputed
    learned = settings.critical_steps * (1 + 1 + 1 + 2) * context  # reference, policy; twice; back
    rl = settings.prompts * settings.group * (rollout + learned)
    fixed = [max(1, K >> i) for i in range(5)]  # schedules that a learned one must beat
    stages = {
        "1000 images of the teacher": 1000 * teacher,
        "1000 images of the student": 1000 * student,
        "latents of 60 % of ImageNet, both flips": 2 * 0.6 * IMAGENET * encode,
        "GSIM, --gsim-iters": settings.gsim_iters * gsim,
        "GSIM, 30 epochs as in the paper": 30 * IMAGENET / settings.batch * gsim,
        "progress and report of distilling": WATCHED * student + JUDGED * (teacher + 3 * student),
        "RL, --rl-iters": settings.rl_iters * rl,
        "report of RL": 2 * JUDGED * sum(fixed) / K * student,
    }
    return {stage: n / (PEAK * UTILISATION) / 3600 for stage, n in stages.items()}


def table(sizes: dict[str, maskrl.Settings]) -> str:
    """The memory of every size {name: Settings} as a Markdown table."""
    lines = [
        "| | batch | parameters | weights: teacher | student, with gradients, Adam, EMA, best EMA "
        "| auxiliary, with gradients, Adam | fixed in all | activations | with --checkpointing "
        "| FLOPs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, settings in sizes.items():
        count, batch = parameters(settings), settings.batch
        fixed = fixed_bytes(count)
        cells = [n / GB for n in (*fixed.values(), sum(fixed.values()))]
        cells += [activation_bytes(settings, batch, on) / GB for on in (False, True)]
        flops = update_flops(settings, batch) / 1e12
        cells = " | ".join(f"{value:.1f} GB" for value in cells)
        lines.append(f"| {name} | {batch} | {count / 1e6:.1f}M | {cells} | {flops:.0f}T |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, help="images per update (default: the preset's)")
    args = parser.parse_args()
    given = {"batch": args.batch} if args.batch else {}
    sizes = {name: maskrl.preset(name, **given) for name in maskrl.RELEASED}
    print(f"One GSIM update, float32:\n\n{table(sizes)}\n\nGB of RL, and hours of an A100:")
    for name, settings in sizes.items():
        print(f"\n{name}")
        for part, n in rl_bytes(settings).items():
            print(f"{n / GB:8.1f} GB {part}")
        for stage, hours in hours_of_released(settings).items():
            print(f"{hours:8.2f} h  {stage}")
