"""What --reward and --held-out may name: functions quality(images [B, 3, S, S] in [-1, 1], labels
[B]) -> [B] in [0, 1], and how RL puts them on one scale and takes their mean. The ready-made ones
are all differentiable in the pixels."""

import math
import traceback
from collections.abc import Callable
from functools import partial

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
from workbench.run import Run
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

    def __init__(self, name: str, quality: Callable, option: str = "--reward"):
        self.name, self.quality, self.given = name, quality, f"{option} {name}"

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        # no graph for weights that somebody forgot to freeze
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            try:
                q = self.quality(images.clamp(-1, 1), labels.clone())
            except (Exception, SystemExit) as error:
                if is_out_of_memory(error):
                    raise
                kind = type(error).__name__
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{last.filename}, line {last.lineno}"
                raise FloatingPointError(
                    f"{self.given} raised {kind}: {error} ({where})"
                ) from error
        if not torch.is_tensor(q) or q.shape != labels.shape:
            got = list(q.shape) if torch.is_tensor(q) else type(q).__name__
            raise FloatingPointError(f"{self.given} gave {got}, not a tensor [{len(labels)}]")
        if not ((q >= 0) & (q < 1 + 1e-4)).all():  # NaN fails too; a little above 1 is rounding
            raise FloatingPointError(
                f"{self.given} gave values from {q.min():.4g} to {q.max():.4g}; they must lie in "
                "[0, 1]"
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
                f"{self.given} gave {q[0]:.4g} for all of {len(q)} images, half of them damaged: "
                "nothing to learn"
            )
        if differentiable and not q.requires_grad:
            raise InputError(
                f"--method backprop: the reward {self.name} gives no gradient in the pixels"
            )


class ScaledReward:
    """A reward r on the scale of a student's own images: sigmoid((r - median) / s) in (0, 1).

    s = (q90 - q10) / (2 ln 9) of the 10 % and 90 % quantiles, which become 0.1 and 0.9 if the
    median, which becomes 0.5, is halfway. CLIP, for one, gives nearly the same to all images, so
    that unscaled, in quality x speed^alpha, the speed alone would count.

    InputError if the quantiles of the images [N, 3, S, S] of labels [N] coincide."""

    def __init__(self, reward: CheckedReward, images: Tensor, labels: Tensor):
        parts = zip(images.split(64), labels.split(64))
        with torch.no_grad():
            r = torch.cat([reward(x, y) for x, y in parts])
        levels = torch.tensor([0.1, 0.5, 0.9], device=r.device)
        self.reward, self.quantiles = reward, r.quantile(levels).tolist()
        low, self.median, high = self.quantiles
        if high - low < 1e-6:
            raise InputError(
                f"{reward.given} gave {low:.4g} for 80 % of the student's images: nothing to "
                "learn; it must tell them apart"
            )
        self.s = (high - low) / (2 * math.log(9))
        print(
            f"{reward.given} is scaled: the 10 %, 50 % and 90 % quantiles of the student's images, "
            f"{low:.4g}, {self.median:.4g} and {high:.4g}, become about 0.1, 0.5 and 0.9"
        )

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        return ((self.reward(images, labels) - self.median) / self.s).sigmoid()


class MeanReward:
    """What RL climbs: the mean of rewards, by weights {name: weight} that add up to 1. All but
    `embedded`, which `calibrate` takes care of, become a ScaledReward of the student's images.

    raw: those that were scaled, {name: reward}, as they were."""

    def __init__(
        self,
        weights: dict[str, float],
        rewards: dict[str, CheckedReward],
        images: Tensor,
        labels: Tensor,
    ):
        self.weights, self.rewards = weights, dict(rewards)
        self.raw = {name: rewards[name] for name in weights if name != "embedded"}
        for name, reward in self.raw.items():
            self.rewards[name] = ScaledReward(reward, images, labels)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        return sum(w * self.rewards[name](images, labels) for name, w in self.weights.items())

    def described(self) -> dict[str, dict]:
        """{name: its weight, and if it was scaled its quantiles} for metrics.json."""
        scales = {name: {"quantiles": self.rewards[name].quantiles} for name in self.raw}
        return {name: {"weight": w} | scales.get(name, {}) for name, w in self.weights.items()}


def reward_weights(words: list[str]) -> dict[str, float]:
    """{name: weight} of the words of --reward, name or name=weight. The weights add up to 1.

    InputError for an unknown name, a name given twice, or a weight that is no positive number."""
    weights = {}
    for word in words:
        name, equals, weight = word.partition("=")
        check_reward_name(name)
        if name in weights:
            raise InputError(f"--reward {name} is given twice: give it once, as {name}=WEIGHT")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise InputError(f"--reward {word}: the weight must be a positive number, as in =0.5")
    total = sum(weights.values())
    return {name: weights[name] / total for name in sorted(weights)}


def check_held_out(name: str, weights: dict[str, float]) -> None:
    """InputError unless --held-out accepts `name` next to the rewards that RL climbs."""
    check_reward_name(name, "--held-out")
    if name in weights:
        raise InputError(f"--held-out {name}: --reward names it, too; hold out another one")


def check_reward_name(name: str, option: str = "--reward") -> None:
    """InputError unless `name` is that of a reward."""
    if name not in ("embedded", "fit", "clip") and not names_function(name):
        raise InputError(f"{option} {name}: expected embedded, fit, clip or module:function")


def make_reward(
    name: str,
    settings: RunSettings,
    data: Data,
    device,
    net: QualityNet | None = None,
    clip: ClipOptions | None = None,
    option: str = "--reward",
) -> CheckedReward:
    """The reward `name`, tried out on 32 images; net: the reward network, for `embedded` only.

    option: the one that named it, --reward or --held-out. InputError if there is no such reward,
    or if it does not work."""
    check_reward_name(name, option)
    if name == "fit" and data.name != "shapes":
        raise InputError(
            f"{option} fit knows what a perfect image is, which only --data shapes can say, "
            f"not {data.name}"
        )
    if name == "embedded":
        quality = net.quality
    elif name == "fit":
        quality = ShapeFit(data.train.size, device)
    elif name == "clip":
        classes = display_names(data.classes, data.names)
        quality = ClipReward(clip or ClipOptions(), classes, device)
    else:
        quality = named_function(option, name)
    reward = CheckedReward(name, quality, option)
    generator = rng(settings.seed, "reward check")
    x, labels = data.train.batch(32, generator, device)
    x, _ = damage(x, labels, patch_in_pixels(x, settings), generator)  # a reward tells them apart
    climbed = option == "--reward"
    reward.try_out(x, labels, differentiable=climbed and settings.method == "backprop")
    return reward


def student_images(student: MAR, data: Data) -> tuple[Tensor, Tensor]:
    """512 images [512, 3, S, S] of the student with which RL starts, and their labels: always the
    same, so that --resume finds the same scales."""
    evenly = torch.linspace(0, len(data.train) - 1, 512).long()
    labels = data.train.labels[evenly].to(student.device)
    parts = [
        generate(student, y, seed=(student.settings.seed, "calibrate", i))
        for i, y in enumerate(labels.split(256))
    ]
    return data.decode(to_images(torch.cat(parts), student.settings)), labels


def calibrate(net: QualityNet, images: Tensor, labels: Tensor, role: str = "the reward") -> None:
    """QualityNet.calibrate on a student's images; role: what the network is there for, which is
    printed."""
    net.calibrate(images, labels)
    if net.odds > 1:
        print(
            f"{role} (embedded) is calibrated: its odds x {net.odds:.3g} give half of the "
            "student's images a quality above 0.5"
        )


class RunRewards:
    """The rewards that --reward and --held-out of train_rl.py name, for a run.

    All that need no reward network are made at once, and so tried out."""

    def __init__(self, run: Run, clip: ClipOptions):
        weights, held_out = run.args.reward, run.args.held_out
        where = {"settings": run.settings, "data": run.data, "device": run.device}
        self.make = partial(make_reward, **where, clip=clip)
        self.weights, self.data, self.held_out = weights, run.data, None
        self.rewards = {name: self.make(name) for name in weights if name != "embedded"}
        if held_out not in (None, "embedded"):
            self.held_out = self.make(held_out, option="--held-out")

    def of_student(
        self, student: MAR, reward_net: QualityNet
    ) -> tuple[MeanReward, Callable | None]:
        """What RL on the student climbs, and the held-out reward if there is one."""
        images, labels = student_images(student, self.data)
        if "embedded" in self.weights:
            calibrate(reward_net, images, labels)
            self.rewards["embedded"] = self.make("embedded", net=reward_net)
        elif self.held_out is None:
            calibrate(reward_net, images, labels, "the held-out reward")
        quality = MeanReward(self.weights, self.rewards, images, labels)
        if self.held_out is None:
            self.held_out = default_held_out(self.weights, self.data, reward_net, student.device)
        return quality, self.held_out


def default_held_out(
    weights: dict[str, float], data: Data, reward_net: QualityNet, device
) -> Callable | None:
    """What --held-out is by default: a reward that is not trained on, to expose reward hacking;
    None if there is none. weights: of the rewards that are, {name: weight}."""
    if "embedded" not in weights:
        return reward_net.quality
    if data.name != "shapes" or "fit" in weights:
        return None
    return ShapeFit(data.train.size, device)
