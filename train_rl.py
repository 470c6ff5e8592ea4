"""RL on the one-step student: a quality reward, a speed reward, and only the critical steps (MaskFocus, Speed-RL).

    python train_rl.py                                    # everything from nothing: teacher, student, then RL
    python train_rl.py --student runs/demo/student.pt     # RL on a student that is there already
    python train_rl.py --student runs/demo/student.pt --alpha 0 --critical-steps 16 --out runs/quality
    python train_rl.py --student runs/demo/student.pt --method backprop --out runs/backprop
    python train_rl.py --student runs/demo/student.pt --reward clip:1,embedded:0.5 --out runs/clip

Where no --student is given, a teacher and a student are made first, as by train_distill.py with the same options.
Writes policy.pt (and teacher.pt, student.pt), log.jsonl, metrics.json and the pictures
samples.png, neighbours.png, curves.png and gain.png into --out.
"""

import csv
import importlib
import logging
import math
import os
import re
import sys
import time
import zlib
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torchvision.transforms import functional as TF
from tqdm import tqdm

import maskrl
import train_distill
from sample import read_image


def train_policy(s, data, student, quality, out, device, resume=False, measure=None):
    """The student as a policy: Gaussian over tokens, learned over the number of tokens to reveal. Returns it, and its start."""
    torch.manual_seed(s.seed)
    model = deepcopy(student).requires_grad_(True)
    model.settings = s
    optimizers = {"generator": torch.optim.AdamW(model.parameters(), lr=s.rl_lr, betas=(0.9, 0.95), weight_decay=0.0)}
    if s.has_schedule:
        maskrl.add_schedule(model).to(device)
        optimizers["schedule"] = torch.optim.AdamW(model.schedule.parameters(), lr=s.schedule_lr, betas=(0.9, 0.95), weight_decay=0.0)
    mean, start = mean_image(data, s, device), deepcopy(model).requires_grad_(False)
    policy_update = {"grpo": maskrl.rl_update, "backprop": maskrl.backprop_update}[s.method]

    def update(step):
        labels = torch.randint(len(data.classes), (s.prompts,), generator=maskrl.rng(s.seed, "rl", step)).to(device)
        return policy_update(model, start, quality, labels, mean, optimizers, (s.seed, "rollout", step))

    train_distill.train("policy", out / "policy.pt", s.rl_iters, update, model, state=optimizers, log=out / "log.jsonl",
                 resume=resume, every=25, measure=measure)
    return model.eval(), start


def mean_image(data, s, device):
    """Tokens of the mean training image [1, L, D], which the information gain subtracts."""
    return maskrl.to_tokens(data.some().mean(0, keepdim=True), s).to(device)


def watch(s, data, quality, held_out, judge, n=512):
    """measure(model) for the log, on fixed noise without exploration: the trained reward; and, to expose reward hacking, one that is
    not trained on and the judge's Fréchet distance (n is small: compare within a run)."""
    labels = judge.labels[torch.linspace(0, len(judge.labels) - 1, min(n, len(judge.labels))).long()]

    @torch.no_grad()
    def measure(model):
        images = maskrl.to_images(maskrl.generate(model, labels, denoise_steps=1, seed=(s.seed, "watch")), s)
        distance = train_distill.frechet_distance(judge.features(images)[0], judge.references[0])
        values = {"quality_mean": float(quality(images, labels).mean()), "judge": distance}
        return values | ({"held_out": float(held_out(images, labels).mean())} if held_out else {})

    return measure


@torch.no_grad()
def score(model, quality, judge, s, steps=None):
    """Quality and reward (means), unmasking iterations and the judge's Fréchet distance, without exploration.

    steps: None for the model's own schedule, else K of the fixed cosine schedule."""
    tokens, count = train_distill.in_batches(model, judge.labels, dict(steps=steps, denoise_steps=1), s.seed, "schedules")
    images = maskrl.to_images(tokens, s)
    q, count = quality(images, judge.labels), count.float()
    return {"quality": float(q.mean()), "reward": float(maskrl.total_reward(q, count, s).mean()),
            "steps": float(count.mean()), "steps_std": float(count.std()), "frechet": judge(images)["frechet"]}


def gain_curves(out, model, labels, mean_image):
    """gain.png: information gain along trajectories [P G of them], and how often each step is among the K_c critical ones."""
    plt = train_distill.pyplot()
    if not plt:
        return
    tokens, trace, *_ = maskrl.rollout(model, lambda images, labels: torch.ones(len(labels)), labels, "gain")
    valid = trace.counts > 0
    gain = maskrl.information_gain(trace.predictions, tokens, valid, mean_image)
    critical = maskrl.critical_steps(gain, model.settings.critical_steps)
    gain = gain.masked_fill(~valid, math.nan).cpu()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot(range(1, gain.shape[1] + 1), gain[::4].T.numpy(), color="tab:blue", alpha=0.15, linewidth=0.8)
    left.plot(range(1, gain.shape[1] + 1), gain.nanmean(0).numpy(), color="black", marker="o", markersize=3)
    left.set(xlabel="step k", title="information gain V_k, and its mean")
    right.bar(range(1, gain.shape[1] + 1), critical.float().mean(0).tolist())
    right.set(xlabel="step k", title=f"share of rollouts in which k is among the {model.settings.critical_steps} critical")
    figure.savefig(out / "gain.png", dpi=80)
    plt.close(figure)


def compare_schedules(start, policy, quality, judge, s):
    """Rows before and after RL, and of both generators under fixed schedules: those that a learned one must beat."""
    rows = {"before": score(start, quality, judge, s), "after": score(policy, quality, judge, s)}
    lengths = {max(1, s.steps >> i) for i in range(5)} | {max(1, round(rows["after"]["steps"]))}
    for K in sorted(lengths, reverse=True):
        rows[f"student, fixed K = {K}"] = score(start, quality, judge, s, K)
        rows[f"policy, fixed K = {K}"] = score(policy, quality, judge, s, K)
    print(f"\nRL, without exploration:\n{'':24}{'quality':>8}{'reward':>8}{'steps':>13}{'Fréchet distance':>18}")
    for name, r in rows.items():
        print(f"{name:24}{r['quality']:8.3f}{r['reward']:8.3f}{r['steps']:7.1f} ± {r['steps_std']:3.1f}{r['frechet']:18.2f}")
    return rows


# --reward: what may stand there -------------------------------------------------------------------------
# Each is a function quality(images [B, 3, S, S] in [-1, 1], labels [B]) -> [B] in [0, 1]; all but a function of your own
# are differentiable in the pixels.


def parse_reward(text):
    """--reward as [(source, weight)]: "clip:0.5,my.rewards:sharp" -> [("clip", 0.5), ("my.rewards:sharp", 1.0)]."""
    found = [re.fullmatch(r"\s*(embedded|fit|clip|.+\.csv|[\w.]+:[a-zA-Z_]\w*)(?::(\d*\.?\d+))?\s*", term) for term in text.split(",")]
    terms = [(match[1], float(match[2] or 1)) for match in found if match]
    if len(terms) < len(found) or not all(weight for _, weight in terms):
        raise maskrl.InputError(f"--reward {text}: expected embedded, fit, clip, FILE.csv or module:function, or several with commas between; "
                         "each may have a weight above 0 behind it, as in clip:0.5")
    return terms


def make_reward(s, data, device, critic=None):
    """--reward as a function quality(images [B, 3, S, S], labels [B]) -> [B] in [0, 1], checked; and the embedded critic.

    The critic, Progress' yardstick under any reward, is trained unless given; last, so that a wrong --reward shows soon."""
    kind = lambda name: {"clip": clip_reward, "fit": fit_reward}.get(name, pairs_reward if name.endswith(".csv") else function_reward)
    terms = parse_reward(s.reward)
    sources = {name: kind(name)(name, s, data.classes, device) for name, _ in terms if name != "embedded"}
    critic = critic or train_distill.train_critic("reward", data.train, s, device)
    sources["embedded"] = critic.quality
    g = maskrl.rng(s.seed, "reward check")
    x, labels = data.train.batch(32, g, device)
    x, _ = train_distill.damage(x, labels, s.patch, g)  # images that a reward should tell apart
    parts, total = [(checked(name, sources[name], x, labels), weight) for name, weight in terms], sum(weight for _, weight in terms)
    for (name, _), (part, _) in zip(terms, parts):
        if s.method == "backprop" and not part(x.clone().requires_grad_(), labels).requires_grad:
            raise maskrl.InputError(f"--method backprop: the reward {name} gives no gradient in the pixels")
    return lambda images, labels: sum(part(images, labels) * weight for part, weight in parts) / total, critic


def checked(name, quality, images, labels):
    """`quality` on images clamped to [-1, 1], its answers checked: [B], finite, in [0, 1]. NonFinite stops training if one fails;
    InputError says now if it fails on these images [B, 3, S, S], labels [B], or cannot tell any two of them apart."""

    def call(images, labels, error=maskrl.NonFinite):
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):  # no graph for weights that somebody forgot to freeze
            q = quality(images.clamp(-1, 1), labels)
        if not torch.is_tensor(q) or q.shape != labels.shape:
            raise error(f"--reward {name} gave {list(q.shape) if torch.is_tensor(q) else type(q).__name__}, not a tensor [{len(labels)}]")
        if not ((q >= 0) & (q < 1 + 1e-4)).all():  # NaN fails too; a little above 1 is rounding
            raise error(f"--reward {name} gave values from {q.min():.4g} to {q.max():.4g}; they must lie in [0, 1]")
        return q.to(images)

    first = call(images, labels, maskrl.InputError)
    if first.min() == first.max():
        raise maskrl.InputError(f"--reward {name} gave {first[0]:.4g} for all of {len(first)} images, half of them damaged: nothing to learn")
    return call


class ShapeFit:
    """A reward that nobody has to learn: how well an image is *some* shape of its class, exp(-e / 0.04) in (0, 1].

    e: root mean square difference, in units of the 0...1 pixel range, to the nearest of 4,851 shapes of the right form and colour
    (21 x 21 places, 11 sizes), each on the flat dark background that suits the image best, found in closed form. Differentiable."""

    def __init__(self, size, difficulty, device):
        self.forms = 3 + difficulty
        place = 0.5 + 0.1 * (1 + difficulty) * torch.linspace(-1, 1, 21, device=device)
        x, y, r = torch.cartesian_prod(place, place, torch.linspace(0.22, 0.32, 11, device=device)).T
        self.masks = train_distill.shape_masks(x, y, r, size).flatten(2).permute(1, 2, 0)  # [4, pixels, N]
        self.paint = torch.tensor(list(train_distill.COLOURS.values()), device=device) / 255

    def __call__(self, images, labels):
        """Quality [B] of images [B, 3, S, S] in [-1, 1] of the classes `labels` [B]."""
        pixels, e = (images.clamp(-1, 1) + 1).flatten(2) / 2, torch.zeros(len(images), device=images.device)
        for form in range(self.forms):
            m, rows = self.masks[form], (labels % self.forms == form).nonzero().squeeze(1)
            p = self.paint[labels[rows] // self.forms][:, :, None]  # [b, 3, 1]
            x = pixels[rows]
            x_m, x_1, x_x = x @ m, x.sum(2, keepdim=True), x.square().sum(2, keepdim=True)  # [b, 3, N or 1]
            m_m, m_1, area = m.square().sum(0), m.sum(0), len(m)
            ground = ((x_1 - x_m - p * (m_1 - m_m)) / (area - 2 * m_1 + m_m)).clamp(0, 0.2)  # least squares
            error = (x_x - 2 * p * x_m + p**2 * m_m - 2 * ground * (x_1 - x_m - p * (m_1 - m_m)) + ground**2 * (area - 2 * m_1 + m_m))
            e = e.index_put((rows,), (error.sum(1).min(1).values / (3 * area)).clamp(min=1e-8).sqrt())
        return torch.exp(-e / 0.04)


def fit_reward(_, s, classes, device):
    if s.data != "shapes":
        raise maskrl.InputError(f"--reward fit knows what a perfect image is, which only --data shapes can say, not {s.data}")
    return ShapeFit(s.image_size, s.difficulty, device)


def function_reward(name, *_):
    """The function that "module:function" names; the module may lie in the folder that the script was started from."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, function = name.split(":")
    try:
        found = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise TypeError("it cannot be called")
        return found
    except Exception as error:
        raise maskrl.InputError(f"--reward {name}: {type(error).__name__}: {error}") from None


def clip_pixels(images, size, mean, std, interpolation="bicubic", **_):
    """Square images [B, 3, S, S] in [-1, 1] as CLIP takes them [B, 3, side, side]: open_clip's own transform, in tensors."""
    side, x = size if isinstance(size, int) else min(size), (images + 1) / 2
    for shape in ((x.shape[-2], side), (side, side)):  # first the width, then the height: bicubic overshoots, and PIL clips after each
        x = TF.resize(x, shape, TF.InterpolationMode(interpolation), antialias=True).clamp(0, 1)
    return TF.normalize(x, mean, std)


def clip_reward(_, s, classes, device):
    """(1 + c) / 2, c the cosine of CLIP's embeddings of the image and of --clip-prompt with the class's name in it."""
    try:
        import open_clip
    except ImportError:
        raise maskrl.InputError("--reward clip needs open_clip: pip install open_clip_torch") from None
    model, weights, known = s.clip_model, s.clip_weights, open_clip.list_pretrained_tags_by_model(s.clip_model)
    local = os.path.isfile(weights)
    if model not in open_clip.list_models():
        raise maskrl.InputError(f"--clip-model {model}: open_clip has no such model; open_clip.list_models() has their names")
    if not local and weights not in known:
        raise maskrl.InputError(f"--clip-weights {weights}: neither a file nor weights that open_clip has for {model}: "
                                + (", ".join(known[:6]) or "none"))
    logging.disable()  # downloads complain at length; here is one line for all of it
    try:
        clip = open_clip.create_model(model, os.path.abspath(weights) if local else weights, device=device).eval().requires_grad_(False)
        prompts = open_clip.get_tokenizer(model)([s.clip_prompt.replace("{class}", c.replace("_", " ")) for c in classes])
    except Exception as error:
        raise maskrl.InputError(f"--clip-weights {weights} could not be " + (f"loaded safely as weights of --clip-model {model}" if local else
                         "downloaded; without a network, give a file of weights") + f" ({type(error).__name__})") from None
    finally:
        logging.disable(logging.NOTSET)
    text = torch.cat([clip.encode_text(part, normalize=True) for part in prompts.to(device).split(256)])  # [classes, E]

    def quality(images, labels):
        pixels = (clip_pixels(part, **clip.visual.preprocess_cfg) for part in images.split(64))
        image = torch.cat([clip.encode_image(x, normalize=True) for x in pixels])  # [B, E]
        return (1 + (image * text[labels]).sum(-1)) / 2

    return quality


def read_pairs(path, size, classes):
    """Preferences from a CSV with a header: `better` and `worse`, images named relative to the file, and perhaps `class`, of both.

    Returns a Split of images uint8 [N, 6, S, S], the better one's channels first, and labels [N]: the class, or 0."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        if not rows or set(rows[0]) - {"class"} != {"better", "worse"}:
            raise ValueError("expected a header `better,worse` or `better,worse,class`, and then a line for every pair")
        names, given = classes if "class" in rows[0] else [None], {row.get("class") for row in rows}
        if set(names) != given:
            raise ValueError(f"every class needs pairs, and no other name may stand there; see {', '.join(map(str, set(names) ^ given))}")
        images = [torch.cat([read_image(Path(path).parent / (row[k] or ""), size) for k in ("better", "worse")]) for row in rows]
    except (OSError, SyntaxError, ValueError, csv.Error) as error:
        raise maskrl.InputError(f"--reward {path}: {error}") from None
    return train_distill.Split(torch.stack(images), torch.tensor([names.index(row.get("class")) for row in rows]))


def pairs_reward(path, s, classes, device):
    """sigmoid(r) of a score r(image, class) learned from pairs by -log sigmoid(r(better) - r(worse))   (Bradley and Terry).

    0.01 r^2 keeps scores around 0 and off the flat ends of the sigmoid; a little noise keeps a few pairs from being learned by
    heart. Every fifth pair, class by class, is held out, to say what was learned."""
    pairs = read_pairs(path, s.image_size, classes)
    order, outputs = pairs.labels.argsort(stable=True), int(pairs.labels.max()) + 1
    held_out = torch.zeros(len(pairs), dtype=torch.bool).index_fill(0, order[4::5], True)
    torch.manual_seed(zlib.crc32(f"pairs {s.seed}".encode()))
    critic = train_distill.Critic("reward", s.image_size, outputs).to(device)
    score = lambda x, labels: critic(x)[1].gather(1, labels.clamp(max=outputs - 1)[:, None]).squeeze(1)  # no classes: one output
    scores = lambda x, labels: score(rearrange(x, "n (k c) h w -> (k n) c h w", k=2), labels.repeat(2)).chunk(2)  # better, worse
    optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-3, weight_decay=0.01)
    for step in tqdm(range(s.judge_iters), "pairs", leave=False):
        g = maskrl.rng(s.seed, "pairs", step)
        x, labels = pairs.take(~held_out).batch(64, g, device, s.flip)
        better, worse = scores(x + 0.1 * torch.randn(x.shape, generator=g).to(device), labels)
        maskrl.descend(0.005 * (better.square() + worse.square()).mean() - F.logsigmoid(better - worse).mean(), optimizer)
    critic.eval().requires_grad_(False)
    if held_out.any():
        better, worse = scores(*pairs.take(held_out).batch(1000, maskrl.rng("held out"), device))
        print(f"{path}: {len(pairs)} pairs; about {float((better > worse).float().mean()):.0%} of those held out are ordered as there")
    return lambda images, labels: score(images, labels).sigmoid()


# The script ---------------------------------------------------------------------------------------------


def main(argv=None):
    parser = train_distill.options(__doc__)
    parser.add_argument("--student", type=Path, help="a student.pt to start from, instead of making one")
    args = parser.parse_args(argv)
    parse_reward(getattr(args, "reward", "embedded"))  # a wrong one shows before any work
    contents = [maskrl.read_checkpoint(path, kind) for path, kind in ((args.student, "student"), (args.teacher, "teacher")) if path]
    base = contents[0] if contents else None
    s, data, device = train_distill.begin(args, ["policy.pt"] + ([] if args.student else ["student.pt", "teacher.pt"]), base)
    models = {}
    if args.student:
        models["student"] = maskrl.load_checkpoint(args.student, "student", device)
        beside = args.teacher or args.student.with_name("teacher.pt")  # for the report alone
        if beside.exists():
            teacher = maskrl.load_checkpoint(beside, "teacher", device)
            if all(getattr(teacher.settings, name) == getattr(s, name) for name in train_distill.SHAPE):
                models["teacher"], teacher.settings = teacher, s
            elif args.teacher:
                raise maskrl.InputError(f"{beside} is not a teacher of {args.student}")
    clock = time.perf_counter()
    quality, critic = make_reward(s, data, device)
    minutes = {"reward": (time.perf_counter() - clock) / 60}
    if not args.student:
        print("no --student given: making " + ("a student" if args.teacher else "a teacher and a student") + " first")
        models, _, made = train_distill.make(args, s, data, device, critic)
        minutes = made | minutes

    judge = train_distill.Judge(data, s, device)
    trained = [name for name, _ in parse_reward(s.reward)]
    held_out = critic.quality if "embedded" not in trained else (
        ShapeFit(s.image_size, s.difficulty, device) if s.data == "shapes" and "fit" not in trained else None)
    clock = time.perf_counter()
    models["policy"], start = train_policy(s, data, models["student"], quality, args.out, device, args.resume,
                                           watch(s, data, quality, held_out, judge))
    minutes["policy"] = (time.perf_counter() - clock) / 60
    gain_curves(args.out, models["policy"], torch.arange(16, device=device) % len(data.classes), mean_image(data, s, device))
    rl = compare_schedules(start, models["policy"], quality, judge, s)
    return train_distill.report(args.out, s, data, judge, models, {"rl": rl, "minutes": minutes})


if __name__ == "__main__":
    maskrl.run(main)
