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

import math
import time
from copy import deepcopy
from pathlib import Path

import torch

import maskrl
import train_distill


def train_policy(s, data, student, quality, out, device, resume=False, measure=None):
    """The student as a policy: Gaussian over tokens, learned over the number of tokens to reveal. Returns it, and its start."""
    torch.manual_seed(s.seed)
    model = deepcopy(student).requires_grad_(True)
    model.settings = s
    generator_parameters = list(model.parameters())
    reference = deepcopy(student).requires_grad_(False)
    optimizers = {"generator": torch.optim.AdamW(generator_parameters, lr=s.rl_lr, betas=(0.9, 0.95), weight_decay=0.0)}
    if s.learn_steps:
        maskrl.add_schedule(model).to(device)
        optimizers["schedule"] = torch.optim.AdamW(model.schedule.parameters(), lr=s.schedule_lr, betas=(0.9, 0.95), weight_decay=0.0)
    mean = mean_image(data, s, device)
    policy_update = {"grpo": maskrl.rl_update, "backprop": maskrl.backprop_update}[s.method]

    def update(step):
        labels = torch.randint(len(data.classes), (s.prompts,), generator=maskrl.rng(s.seed, "rl", step)).to(device)
        return policy_update(model, reference, quality, labels, mean, optimizers, (s.seed, "rollout", step))

    start = deepcopy(model).requires_grad_(False)
    maskrl.train("policy", out / "policy.pt", s.rl_iters, update, model, state=optimizers, log=out / "log.jsonl",
                 resume=resume, every=25, measure=measure)
    return model.eval(), start


def mean_image(data, s, device):
    """Tokens of the mean training image [1, L, D], which the information gain subtracts."""
    return maskrl.to_tokens(data.some().mean(0, keepdim=True), s).to(device)


def watch(s, data, quality, held_out, judge, n=512):
    """measure(model) for the log: the trained reward on fixed noise without exploration, and beside it what shows whether it is
    hacked, a reward that is not trained on and the judge's Fréchet distance (n is small: compare within a run)."""
    labels = judge.labels[torch.linspace(0, len(judge.labels) - 1, min(n, len(judge.labels))).long()]

    @torch.no_grad()
    def measure(model):
        images = maskrl.to_images(maskrl.generate(model, labels, denoise_steps=1, seed=(s.seed, "watch")), s)
        distance = maskrl.frechet_distance(judge.features(images)[0], judge.references[0])
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
    return {"quality": float(q.mean()), "reward": float((q * maskrl.speed(count, s.steps) ** s.alpha).mean()),
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


def main(argv=None):
    parser = train_distill.options(__doc__)
    parser.add_argument("--student", type=Path, help="a student.pt to start from, instead of making one")
    args = parser.parse_args(argv)
    contents = [maskrl.read_checkpoint(path, kind) for path, kind in ((args.student, "student"), (args.teacher, "teacher")) if path]
    base = contents[0] if contents else None
    s, data, device = train_distill.begin(args, ["policy.pt"] + ([] if args.student else ["student.pt", "teacher.pt"]), base)
    clock = time.perf_counter()
    quality, critic = maskrl.make_reward(s, data, device)
    minutes = {"reward": (time.perf_counter() - clock) / 60}
    if args.student:
        beside = args.teacher or args.student.with_name("teacher.pt")
        models = {"student": maskrl.load_checkpoint(args.student, "student", device)}
        if args.teacher or beside.exists():  # for the report alone
            models["teacher"] = maskrl.load_checkpoint(beside, "teacher", device)
            if any(getattr(models["teacher"].settings, name) != getattr(s, name) for name in maskrl.SHAPE):
                raise maskrl.InputError(f"{beside} is not a teacher of {args.student}")
            models["teacher"].settings = s
    else:
        print("no --student given: making " + ("a student" if args.teacher else "a teacher and a student") + " first")
        models, _, made = train_distill.make(args, s, data, device, critic)
        minutes = made | minutes

    judge = maskrl.Judge(data, s, device)
    trained = [name for name, _ in maskrl.parse_reward(s.reward)]
    held_out = critic.quality if "embedded" not in trained else (
        maskrl.ShapeFit(s.image_size, s.difficulty, device) if s.data == "shapes" and "fit" not in trained else None)
    clock = time.perf_counter()
    models["policy"], start = train_policy(s, data, models["student"], quality, args.out, device, args.resume,
                                           watch(s, data, quality, held_out, judge))
    minutes["policy"] = (time.perf_counter() - clock) / 60
    gain_curves(args.out, models["policy"], torch.arange(16, device=device) % len(data.classes), mean_image(data, s, device))
    rl = compare_schedules(start, models["policy"], quality, judge, s)
    return train_distill.report(args.out, s, data, judge, models, {"rl": rl, "minutes": minutes})


if __name__ == "__main__":
    maskrl.run(main)
