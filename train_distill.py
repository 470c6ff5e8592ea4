"""A teacher, then its one-step student by GSIM (MARVAL stage 1).

    python train_distill.py                                    # built-in shapes, minutes on a laptop
    python train_distill.py --data photos/ --out runs/photos   # a folder with one sub-folder of images per class
    python train_distill.py --teacher runs/demo/teacher.pt     # distil a teacher that is there already
    python train_distill.py --resume --out runs/photos         # go on after an interruption

Writes teacher.pt, student.pt, log.jsonl, samples.png, neighbours.png, curves.png and metrics.json into --out.
"""

import argparse
import json
import math
import platform
import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import maskrl
from maskrl import InputError
from sample import labelled_rows


def train_teacher(s, data, out, device, resume=False):
    """MAR's own training: hide tokens, minimise the diffusion loss of the hidden ones. Returns the EMA model."""
    torch.manual_seed(s.seed)
    model = maskrl.MAR(s, data.classes).to(device)
    ema = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(maskrl.weight_decay_groups(model), lr=s.teacher_lr, betas=(0.9, 0.95))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 50, 1, 4 * (1 - i / s.teacher_iters)))

    def update(step):
        g = maskrl.rng(s.seed, "teacher", step)
        x, labels = data.train.batch(s.batch, g, device, s.flip)
        x = maskrl.to_tokens(x, s)
        labels = torch.where((torch.rand(s.batch, generator=g) < s.label_dropout).to(device), model.num_classes, labels)
        mask = maskrl.random_mask(s.batch, s.length, "mixed", g, device)
        c = model.context(x, mask, labels)[mask].repeat(s.draws, 1)
        x_0 = x[mask].repeat(s.draws, 1)
        t = torch.randint(1000, (len(c),), generator=g).to(device)
        eps = torch.randn(x_0.shape, generator=g).to(device)
        loss = maskrl.denoising_loss(model.head, x_0, c, t, eps)
        norm = maskrl.descend(loss, optimizer)
        rate.step()
        maskrl.update_ema(ema, model, step, s.ema)
        return {"loss": loss.item(), "grad_norm": norm}

    return maskrl.train("teacher", out / "teacher.pt", s.teacher_iters, update, model, ema,
                        {"optimizer": optimizer, "rate": rate}, out / "log.jsonl", resume)


def train_student(s, data, teacher, out, device, resume=False, progress=None, distil=maskrl.gsim_update):
    """GSIM: student and auxiliary network both start as the teacher. Returns the EMA student, the best by `progress`.

    distil: the update, called as gsim_update is; another one is for rivals."""
    student = deepcopy(teacher).requires_grad_(True)
    student.settings = s
    aux, ema = deepcopy(student), deepcopy(student).requires_grad_(False)
    optimizers, rates = {}, {}
    for name, net, lr in (("student", student, s.student_lr), ("aux", aux, s.aux_lr)):
        optimizers[name] = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.0, 0.999))
        rates[name] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[name], s.gsim_iters)
    state = {"aux": aux} | {f"{k}_optimizer": v for k, v in optimizers.items()} | {f"{k}_rate": v for k, v in rates.items()}

    def update(step):
        g = maskrl.rng(s.seed, "gsim", step)
        x, labels = data.train.batch(s.gsim_batch, g, device, s.flip)
        metrics = distil(teacher, student, aux, maskrl.to_tokens(x, s), labels, optimizers, g)
        rates["student"].step(), rates["aux"].step()
        maskrl.update_ema(ema, student, step, s.student_ema)
        return metrics

    return maskrl.train("student", out / "student.pt", s.gsim_iters, update, student, ema, state, out / "log.jsonl", resume,
                        measure=progress and (lambda ema: progress(ema, denoise_steps=1)))


# The report: one table by the judge, three pictures -----------------------------------------------------


def report(out, s, data, judge, models, extra=None):
    """Judge every generator on the same classes and noise, time them side by side, write metrics.json and the pictures.

    models: any of teacher, student, policy. Adds real images, an untrained model, and the one-step start: the
    teacher's weights asked for one step, before GSIM."""
    device = judge.device
    torch.manual_seed(s.seed + 1)
    chain = dict(steps=s.steps, guidance=s.guidance, denoise_steps=s.denoise_steps)
    ways = {"untrained": (maskrl.MAR(s, data.classes).to(device), dict(steps=s.steps, denoise_steps=1))}
    if "teacher" in models:
        ways["teacher"] = (models["teacher"], chain)
        ways["one-step start"] = (models["teacher"], dict(steps=s.steps, denoise_steps=1))
    ways["student"] = (models["student"], dict(steps=s.steps, denoise_steps=1))
    if "policy" in models:
        ways["policy"] = (models["policy"], dict(steps=None, denoise_steps=1))

    rows, images = {"real": judge.real()}, {"real": judge.halves[0][0].images.float() / 127.5 - 1}
    for name, (model, how) in ways.items():
        tokens, steps = in_batches(model, judge.labels, how, s.seed, name)
        images[name], steps = maskrl.to_images(tokens, s).cpu(), steps.float()
        rows[name] = judge(images[name]) | {"steps": float(steps.mean()), "steps_std": float(steps.std()),
                                            "denoise_steps": how["denoise_steps"]}
    times = {name: [] for name in ways}
    labels = judge.labels[torch.linspace(0, len(judge.labels) - 1, 32).long()]
    for _ in range(4):  # in turns, so that a busy moment of the machine hits all alike; the first round warms up
        for name, (model, how) in ways.items():
            start = time.perf_counter()
            maskrl.generate(model, labels, **how, seed=s.seed)
            times[name].append((time.perf_counter() - start) / len(labels))
    for name in ways:
        rows[name]["seconds_per_image"] = sorted(times[name][1:])[1]

    rows["real"]["nearest"], some = 1.0, slice(None, None, max(1, len(judge.labels) // 500))  # of every class
    typical = nearest(images["real"][some], data)[1].median().clamp(min=1e-6)  # from held-out images to the training image next to them
    for name in ways:
        rows[name]["nearest"] = float(nearest(images[name][some], data)[1].median() / typical)

    metrics = {"n": len(judge.labels), "rows": rows, "hardware": hardware(device), "settings": asdict(s)} | (extra or {})
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    shown = [(judge.labels == y).nonzero().flatten().tolist()[:2] for y in judge.labels.unique()[:12]]
    pick = [i for row in zip(*shown) for i in row]
    captions = {"real": "real"} | {name: f"{name}: {row['steps']:.1f} x {row['denoise_steps']} steps, "
                                   f"{1000 * row['seconds_per_image']:.1f} ms per image" for name, row in rows.items() if name in ways}
    labelled_rows(out / "samples.png", {captions[k]: images[k][pick] for k in captions if k != "untrained"}, len(shown))
    last = list(ways)[-1]
    first = images[last][pick[: len(shown)]]
    labelled_rows(out / "neighbours.png", {last: first, "its nearest training images": nearest(first, data)[0]}, len(shown))
    curves(out)

    print(f"\nBy the judge, n = {metrics['n']} per row, seed {s.seed}, {metrics['hardware']}:")
    print(f"{'':16}{'class accuracy':>15}{'Fréchet distance':>18}{'precision':>11}{'recall':>8}{'diversity':>11}{'nearest':>9}"
          f"{'steps':>14}{'ms/image':>10}")
    for name, row in rows.items():
        cost = f"{row['steps']:8.1f} x {row['denoise_steps']:<4}{1000 * row['seconds_per_image']:9.2f}" if name in ways else ""
        print(f"{name:16}{row['accuracy']:15.3f}{row['frechet']:11.2f} ± {row['frechet_std']:4.2f}{row['precision']:11.3f}"
              f"{row['recall']:8.3f}{row['diversity']:11.3f}{row['nearest']:9.2f}{cost}")
    print("diversity: within classes; nearest: distance to the nearest training image; of both, 1 = as real held-out images")
    print(f"\nPictures: {out / 'samples.png'}, neighbours.png, curves.png; figures: {out / 'metrics.json'}")
    return metrics


def nearest(images, data):
    """The training image next to each of `images` [N, 3, S, S] in [-1, 1], and its distance (root mean square, in pixels)."""
    train = data.some()
    distance, index = torch.cdist(images.clamp(-1, 1).flatten(1), train.flatten(1)).min(1)
    return train[index], distance / images[0].numel() ** 0.5


def pyplot():
    """matplotlib's pyplot, drawing into files; None, with a word, where it is not installed: nothing else needs it."""
    try:
        import matplotlib
    except ImportError:
        return print("curves are not drawn: pip install matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def curves(out):
    """curves.png from log.jsonl: what was logged of every stage, one row a stage."""
    plt = pyplot()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] if (out / "log.jsonl").exists() else []
    keys = {"teacher": ["loss"], "student": ["aux_loss", "progress", "reward_features"],
            "policy": ["reward", "quality", "steps", "kl", "quality_mean", "held_out", "judge", "grad_norm"]}
    titles = {"progress": "Fréchet distance, pixels", "reward_features": "Fréchet distance, reward's features", "quality_mean": "quality, no exploration", "held_out": "held-out reward",
              "judge": "Fréchet distance, judge"}
    stages = [stage for stage in keys if any(line["stage"] == stage for line in lines)]
    if not plt or not stages:
        return
    panels = [(stage, key) for stage in stages for key in keys[stage] if any(line["stage"] == stage and key in line for line in lines)]
    figure, axes = plt.subplots(math.ceil(len(panels) / 4), 4, figsize=(13, 2.4 * math.ceil(len(panels) / 4)), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    for (stage, key), axis in zip(panels, axes.flat):
        points = {line["step"]: line[key] for line in lines if line["stage"] == stage and key in line}  # resumed: the last counts
        axis.plot(points.keys(), points.values(), ".-" if key in titles else "-", markersize=5, linewidth=1)
        axis.set_title(f"{stage}: {titles.get(key, key)}", fontsize=9)
    figure.savefig(out / "curves.png", dpi=80)
    plt.close(figure)


def in_batches(model, labels, how, seed, name, size=256):
    """Tokens of many images and the unmasking iterations of each; only a policy's differ from image to image."""
    tokens, steps = [], []
    for i, part in enumerate(tqdm(labels.split(size), f"judging {name}", leave=False)):
        x = maskrl.generate(model, part, **how, seed=(seed, i), trace="steps" if how["steps"] is None else False)
        x, count = (x[0], x[1].steps) if how["steps"] is None else (x, torch.full_like(part, how["steps"]))
        tokens.append(x), steps.append(count)
    return torch.cat(tokens), torch.cat(steps)


def hardware(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


# The script ---------------------------------------------------------------------------------------------


def options(doc):
    """The options that both training scripts share."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/latest"), help="folder to write into (default: runs/latest)")
    parser.add_argument("--teacher", type=Path, help="a teacher.pt to start from, instead of training one")
    parser.add_argument("--resume", action="store_true", help="continue what is in --out: finished stages are kept, an interrupted one goes on")
    maskrl.add_options(parser)
    return parser


def begin(args, names, base=None):
    """Everything that can go wrong, before any long work: device, settings, folder, data. Returns s, data, device.

    names: checkpoints that the script writes, the last stage first; base: content of the checkpoint it starts from."""
    device = maskrl.find_device(args.device)
    there = [name for name in names if (args.out / name).exists()]
    lost = [name for name in names[names.index(there[0]):] if name not in there] if there else []
    if args.resume and lost and not args.teacher:
        raise InputError(f"{args.out} was begun with another {lost[0]}: give it again by --{lost[0].removesuffix('.pt')}")
    if args.resume and there:
        base = maskrl.read_checkpoint(args.out / there[0])
    s = maskrl.chosen(args, device, base, args.resume and bool(there))
    if there and not args.resume:
        raise InputError(f"{args.out / there[0]} exists: --resume continues it, another --out starts afresh")
    print("settings: " + ", ".join(f"{k}={v}" for k, v in asdict(s).items()))
    data = maskrl.load_data(s)
    s = data.measure(s)
    print(f"{len(data.classes)} classes; images: {len(data.train)} to train on, {len(data.judge)} for the judge, "
          f"{len(data.test)} held out; on {hardware(device)}")
    if base and base["classes"] != data.classes:
        raise InputError(f"the classes in {s.data} ({', '.join(data.classes[:5])}...) are not the checkpoint's "
                         f"({', '.join(base['classes'][:5])}...); --data names another folder")
    if args.resume and not there:
        print(f"nothing to resume in {args.out}: starting afresh")
    args.out.mkdir(parents=True, exist_ok=True)
    return s, data, device


def make(args, s, data, device, critic=None):
    """Teacher (unless one is given), student and reward network (the same); {name: model}, the network, the minutes that each took."""
    start = time.perf_counter()
    critic = critic or maskrl.train_critic("reward", data.train, s, device)
    progress = maskrl.Progress(critic, data, s, device)
    minutes, start = {"reward": (time.perf_counter() - start) / 60}, time.perf_counter()
    if args.teacher:
        teacher = maskrl.load_checkpoint(args.teacher, "teacher", device)
        teacher.settings = s  # which may differ in what a checkpoint leaves free
    else:
        teacher = train_teacher(s, data, args.out, device, args.resume)
        minutes["teacher"] = (time.perf_counter() - start) / 60
    start = time.perf_counter()
    student = train_student(s, data, teacher, args.out, device, args.resume, progress)
    minutes["student"] = (time.perf_counter() - start) / 60
    return {"teacher": teacher, "student": student}, critic, minutes


def main(argv=None):
    args = options(__doc__).parse_args(argv)
    base = maskrl.read_checkpoint(args.teacher, "teacher") if args.teacher else None
    s, data, device = begin(args, ["student.pt", "teacher.pt"], base)
    models, _, minutes = make(args, s, data, device)
    judge = maskrl.Judge(data, s, device)
    return report(args.out, s, data, judge, models, {"minutes": minutes})


if __name__ == "__main__":
    maskrl.run(main)
