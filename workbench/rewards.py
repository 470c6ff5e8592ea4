"""What --reward may name: functions quality(images [B, 3, S, S] in [-1, 1], labels [B]) -> [B] in
[0, 1]. The ready-made ones are all differentiable in the pixels."""

from collections.abc import Callable

import torch
from torch import Tensor

from maskrl import MAR, generate, rng, to_images
from workbench.damage import damage, patch_in_pixels
from workbench.data import COLOURS, Data, display_names, shape_masks
from workbench.distributed import of_first_process
from workbench.errors import InputError, is_out_of_memory
from workbench.plugins import named_function, names_function
from workbench.pretrained import ClipOptions, ClipReward
from workbench.quality_net import QualityNet
from workbench.settings import RunSettings


class ShapeFit:
    """--reward fit: how well an image is *some* shape of its class, exp(-e / 0.04) in (0, 1].

    e is the root mean square difference, in units of the pixels' 0...1, to the nearest of 4,851
    shapes of the right form and colour (21 x 21 centres, 11 radii), each on the flat dark grey that
    suits the image best, found in closed form. Nothing is learned."""

    def __init__(self, size: int, device="cpu"):
        centre = 0.5 + 0.1 * torch.linspace(-1, 1, 21, device=device)
        radius = torch.linspace(0.22, 0.32, 11, device=device)
        x, y, r = torch.cartesian_prod(centre, centre, radius).T
        self.masks = shape_masks(x, y, r, size).flatten(2).permute(1, 2, 0)  # [3, pixels, 4851]
        self.colours = torch.tensor(list(COLOURS.values()), device=device) / 255

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        pixels = (images.clamp(-1, 1) + 1).flatten(2) / 2  # [B, 3, pixels]
        e = torch.zeros(len(images), device=images.device)
        for form, masks in enumerate(self.masks):
            rows = (labels % 3 == form).nonzero().squeeze(1)
            colour = self.colours[labels[rows] // 3][:, :, None]  # [b, 3, 1]
            error = self.squared_error(pixels[rows], masks, colour)  # [b, 4851]
            e = e.index_put((rows,), error.min(1).values.clamp(min=1e-8).sqrt())
        return torch.exp(-e / 0.04)

    @staticmethod
    def squared_error(x: Tensor, m: Tensor, colour: Tensor) -> Tensor:
        """Mean of |x - (m colour + (1 - m) background)|^2 [b, n] for pixels x [b, 3, p], masks m
        [p, n] and colour [b, 3, 1], at the background in 0...0.2 that makes it least."""
        ones = torch.ones_like(m[:, :1])
        outside = x @ (ones - m)  # sum of (1 - m) x, [b, 3, n]
        mixed = (m * (1 - m)).sum(0)  # [n]
        outside_area = (1 - m).square().sum(0)
        background = ((outside - colour * mixed) / outside_area).clamp(0, 0.2)
        error = (
            x.square().sum(2, keepdim=True)
            - 2 * colour * (x @ m)
            + colour**2 * m.square().sum(0)
            - 2 * background * (outside - colour * mixed)
            + background**2 * outside_area
        )
        return error.sum(1) / (3 * len(m))


class CheckedReward:
    """The reward `quality` on images clamped to [-1, 1], its answers checked: [B], finite, in
    [0, 1]. It may change its images and labels, which are copies.

    FloatingPointError if a check fails or the reward raises an error or exits, so that a training
    stops where it is and says at which step. Too little memory stays the error that it is."""

    def __init__(self, name: str, quality: Callable):
        self.name, self.quality = name, quality

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        # no graph for weights that somebody forgot to freeze
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            try:
                q = self.quality(images.clamp(-1, 1), labels.clone())
            except (Exception, SystemExit) as error:
                if is_out_of_memory(error):
                    raise
                kind = type(error).__name__
                raise FloatingPointError(f"--reward {self.name} raised {kind}: {error}") from error
        if not torch.is_tensor(q) or q.shape != labels.shape:
            got = list(q.shape) if torch.is_tensor(q) else type(q).__name__
            raise FloatingPointError(
                f"--reward {self.name} gave {got}, not a tensor [{len(labels)}]"
            )
        if not ((q >= 0) & (q < 1 + 1e-4)).all():  # NaN fails too; a little above 1 is rounding
            raise FloatingPointError(
                f"--reward {self.name} gave values from {q.min():.4g} to {q.max():.4g}; they "
                "must lie in [0, 1]"
            )
        q = q.to(images)
        return q if q.requires_grad else of_first_process(q)  # all processes must decide alike

    def try_out(self, images: Tensor, labels: Tensor, differentiable: bool = False) -> None:
        """InputError if a check already fails on these images [B, 3, S, S] of labels [B], if all of
        them get the same, or if there is no gradient where it has to be differentiable."""
        try:
            q = self(images.clone().requires_grad_(differentiable), labels)
        except FloatingPointError as error:
            raise InputError(str(error)) from error.__cause__
        if q.min() == q.max():
            raise InputError(
                f"--reward {self.name} gave {q[0]:.4g} for all of {len(q)} images, half of them "
                "damaged: nothing to learn"
            )
        if differentiable and not q.requires_grad:
            raise InputError(
                f"--method backprop: the reward {self.name} gives no gradient in the pixels"
            )


def check_reward_name(name: str) -> None:
    """InputError unless --reward accepts `name`."""
    if name not in ("embedded", "fit", "clip") and not names_function(name):
        raise InputError(f"--reward {name}: expected embedded, fit, clip or module:function")


def make_reward(
    name: str,
    settings: RunSettings,
    data: Data,
    device,
    net: QualityNet | None = None,
    clip: ClipOptions | None = None,
) -> CheckedReward:
    """The reward `name`, tried out on 32 images; net: the reward network, for `embedded` only.

    InputError if there is no such reward, or if it does not work."""
    check_reward_name(name)
    if name == "fit" and data.name != "shapes":
        raise InputError(
            "--reward fit knows what a perfect image is, which only --data shapes can "
            f"say, not {data.name}"
        )
    if name == "embedded":
        quality = net.quality
    elif name == "fit":
        quality = ShapeFit(data.train.size, device)
    elif name == "clip":
        classes = display_names(data.classes, data.names)
        quality = ClipReward(clip or ClipOptions(), classes, device)
    else:
        quality = named_function("--reward", name)
    reward = CheckedReward(name, quality)
    generator = rng(settings.seed, "reward check")
    x, labels = data.train.batch(32, generator, device)
    x, _ = damage(x, labels, patch_in_pixels(x, settings), generator)  # a reward tells them apart
    reward.try_out(x, labels, differentiable=settings.method == "backprop")
    return reward


def calibrate(net: QualityNet, student: MAR, data: Data, role: str = "the reward") -> None:
    """QualityNet.calibrate on 512 images of the student, with which RL starts.

    role: what the network is there for, which is printed."""
    evenly = torch.linspace(0, len(data.train) - 1, 512).long()
    labels = data.train.labels[evenly].to(student.device)
    parts = [
        generate(student, y, seed=(student.settings.seed, "calibrate", i))
        for i, y in enumerate(labels.split(256))
    ]
    net.calibrate(data.decode(to_images(torch.cat(parts), student.settings)), labels)
    if net.odds > 1:
        print(
            f"{role} (embedded) is calibrated: its odds x {net.odds:.3g} give half of the "
            "student's images a quality above 0.5"
        )
