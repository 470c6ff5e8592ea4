"""The report of a run: a table by the judge, metrics.json, and the pictures."""

import json
import math
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from maskrl import MAR, PolicyGradient, Sampling, generate, to_images, total_reward
from workbench.data import Data, display_names, identity
from workbench.files import as_json, write_text
from workbench.judge import Judge
from workbench.pictures import curves, labelled_rows, samples_picture, two_of_each_class
from workbench.settings import RunSettings
from workbench.timing import time_in_turns


@torch.no_grad()
def generate_many(
    model: MAR, labels: Tensor, sampling: Sampling, seed, name: str, decode: Callable = identity
) -> tuple[Tensor, Tensor]:
    """Images [N, 3, S, S], on the CPU, and unmasking iterations [N] of many labels.

    name: what the progress bar calls them."""
    images, steps = [], []
    for i, part in enumerate(tqdm(labels.split(256), f"judging {name}", leave=False)):
        tokens, trace = generate(model, part, sampling, seed=(seed, i), trace=True)
        images.append(decode(to_images(tokens, model.settings)).cpu())
        steps.append(trace.steps)
    return torch.cat(images), torch.cat(steps)


def nearest(images: Tensor, data: Data) -> tuple[Tensor, Tensor]:
    """The training image nearest to each of `images` [N, 3, S, S] in [-1, 1], and its distance [N]
    (root mean square, in pixels)."""
    train = data.train.spaced()
    distance, index = torch.cdist(images.clamp(-1, 1).flatten(1), train.flatten(1)).min(1)
    return train[index], distance / images[0].numel() ** 0.5


# The table ----------------------------------------------------------------------------------------


def arms_of_report(models: dict[str, MAR], settings: RunSettings, data: Data) -> dict:
    """{name: (model, Sampling)}: besides `models` an untrained one, and the one-step start, which
    is the teacher's weights asked for one step, before GSIM."""
    torch.manual_seed(settings.seed + 1)
    student = models["student"]
    image_channels = student.channels // settings.patch**2
    untrained = MAR(settings, data.classes, "student", image_channels).to(student.device)
    arms = {"untrained": (untrained, Sampling())}
    if "teacher" in models:
        arms["teacher"] = (models["teacher"], Sampling())
        arms["one-step start"] = (models["teacher"], Sampling(denoise_steps=1))
    for name in ("student", "policy"):
        if name in models:
            arms[name] = (models[name], Sampling())
    return arms


def report(
    out,
    settings: RunSettings,
    data: Data,
    judge: Judge,
    models: dict[str, MAR],
    extra: dict | None = None,
) -> dict:
    """Judge every generator on the same classes and noise, time them in turns, print the table,
    and write metrics.json and the pictures into the folder `out`. Returns the metrics.

    models: {"student": ..., and perhaps "teacher" and "policy"}; extra: more entries of metrics."""
    out, arms = Path(out), arms_of_report(models, settings, data)
    rows, images = judge_arms(arms, settings, judge)
    evenly = torch.linspace(0, len(judge.labels) - 1, 32).long()
    for name, seconds in time_in_turns(arms, judge.labels[evenly]).items():
        rows[name]["seconds_per_image"] = seconds
    for name, distance in distances_to_training(images, data).items():
        rows[name]["nearest"] = distance
    metrics = {
        "n": len(judge.labels),
        "rows": rows,
        "hardware": hardware(judge.device),
        "settings": asdict(settings),
        "sensitivity": judge.sensitivity,
        "insensitive_to": judge.insensitive_to,
    } | (extra or {})
    metrics = with_earlier(out / "metrics.json", metrics)
    write_text(out / "metrics.json", as_json(metrics, indent=1))
    print(report_table(metrics))
    samples_picture(out / "samples.png", images, rows, judge.labels)
    last = list(arms)[-1]
    neighbours_picture(out / "neighbours.png", last, images[last], judge.labels, data)
    curves(out)
    columns = [data.classes[y] for y in data.labels[:12]]
    print(
        f"\nPictures: {out / 'samples.png'}, neighbours.png, curves.png; "
        f"figures: {out / 'metrics.json'}\n"
        f"Their columns: {', '.join(display_names(columns, data.names))}"
    )
    return metrics


def judge_arms(arms: dict, settings: RunSettings, judge: Judge) -> tuple[dict, dict]:
    """{name: figures by the judge} and {name: images [n, 3, S, S]} of the arms, and of real images.

    arms: {name: (model, Sampling)}."""
    rows, images = {"real": judge.real_row()}, {"real": judge.real_images}
    for name, (model, sampling) in arms.items():
        images[name], steps = generate_many(
            model, judge.labels, sampling, settings.seed, name, judge.decode
        )
        rows[name] = judge(images[name]) | {
            "steps": float(steps.float().mean()),
            "steps_std": float(steps.float().std()),
            "denoise_steps": sampling.resolve(model).denoise_steps,
        }
    return rows, images


def distances_to_training(images: dict[str, Tensor], data: Data) -> dict[str, float]:
    """{name: median distance to the nearest training image}; 1 is that of the `real` ones.

    images: {name: images [n, 3, S, S]}, of which about 500 of all classes are taken."""
    subset = slice(None, None, max(1, len(images["real"]) // 500))
    distances = {name: float(nearest(x[subset], data)[1].median()) for name, x in images.items()}
    real = max(distances["real"], 1e-6)
    return {name: distance / real for name, distance in distances.items()}


def with_earlier(path: Path, metrics: dict) -> dict:
    """`metrics`, and what else the file at `path` has if it is of the same settings: a report of
    teacher and student alone does not lose what RL had reported."""
    try:
        earlier = json.loads(path.read_text())
        if earlier["settings"] != metrics["settings"] or earlier["n"] != metrics["n"]:
            return metrics
        rows = {
            name: {key: math.nan if value is None else value for key, value in row.items()}
            for name, row in earlier["rows"].items()
        }
        minutes = earlier["minutes"] | metrics["minutes"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return metrics
    return earlier | metrics | {"rows": rows | metrics["rows"], "minutes": minutes}


def report_table(metrics: dict) -> str:
    """The judge's table as text."""
    mark = "?" if metrics["insensitive_to"] else " "
    lines = [
        f"\nBy the judge, n = {metrics['n']} per row, seed {metrics['settings']['seed']}, "
        f"{metrics['hardware']}:",
        f"{'':16}{'class accuracy':>15}{'Fréchet distance':>18}{'precision':>11}{'recall':>8}"
        f"{'diversity':>11}{'nearest':>9}{'steps':>14}{'ms/image':>10}",
        *(table_line(name, row, mark) for name, row in metrics["rows"].items()),
        "diversity: within classes; nearest: distance to the nearest training image. Both are 1 "
        "for real held-out images",
    ]
    if metrics["insensitive_to"]:
        lines.append(
            f"?: the judge is insensitive to images that are {', '.join(metrics['insensitive_to'])}"
            ": a lower distance need not be a better image. Pretrained --features help"
        )
    return "\n".join(lines)


def table_line(name: str, row: dict, mark: str) -> str:
    """One row of the table; mark: what stands behind the Fréchet distance."""
    line = (
        f"{name:16}{row['accuracy']:15.3f}{row['frechet']:10.2f}{mark} ± {row['frechet_std']:4.2f}"
        f"{row['precision']:11.3f}{row['recall']:8.3f}{row['diversity']:11.3f}"
        f"{row['nearest']:9.2f}"
    )
    if "steps" in row:
        steps = f"{row['steps']:8.1f} x {row['denoise_steps']:<4}"
        line += f"{steps}{1000 * row['seconds_per_image']:9.2f}"
    return line


def neighbours_picture(path, name: str, images: Tensor, labels: Tensor, data: Data) -> None:
    """An image of each class from `images` [N, 3, S, S] of the arm `name`, whose classes are labels
    [N], above the training images nearest to them."""
    chosen, columns = two_of_each_class(labels)
    generated = images[chosen[:columns]]
    rows = {name: generated, "its nearest training images": nearest(generated, data)[0]}
    labelled_rows(path, rows, columns)


# RL -----------------------------------------------------------------------------------------------


@torch.no_grad()
def score(
    model: MAR, quality: Callable, judge: Judge, steps: int | None = None
) -> dict[str, float]:
    """Means of quality and reward, unmasking iterations and the judge's distance, without
    exploration. steps: None for the model's own schedule, else K of the cosine schedule."""
    settings = model.settings
    images, count = generate_many(
        model, judge.labels, Sampling(steps), settings.seed, "schedules", judge.decode
    )
    q = quality(images.to(judge.device), judge.labels)
    reward = total_reward(q, count, settings)
    return {
        "quality": float(q.mean()),
        "reward": float(reward.mean()),
        "steps": float(count.float().mean()),
        "steps_std": float(count.float().std()),
        "frechet": judge(images)["frechet"],
    }


def compare_schedules(
    training: PolicyGradient, quality: Callable, judge: Judge
) -> dict[str, dict[str, float]]:
    """Rows before and after RL, and of both generators under fixed schedules, which a learned one
    must beat. Prints them."""
    start, policy, K_max = training.reference, training.model, training.model.settings.steps
    rows = {"before": score(start, quality, judge), "after": score(policy, quality, judge)}
    fixed = {max(1, K_max >> i) for i in range(5)} | {max(1, round(rows["after"]["steps"]))}
    for K in sorted(fixed, reverse=True):
        rows[f"student, fixed K = {K}"] = score(start, quality, judge, K)
        rows[f"policy, fixed K = {K}"] = score(policy, quality, judge, K)
    print(
        f"\nRL, without exploration:\n{'':24}{'quality':>8}{'reward':>8}{'steps':>13}"
        f"{'Fréchet distance':>18}"
    )
    for name, row in rows.items():
        print(
            f"{name:24}{row['quality']:8.3f}{row['reward']:8.3f}{row['steps']:7.1f} ± "
            f"{row['steps_std']:3.1f}{row['frechet']:18.2f}"
        )
    return rows


def hardware(device: torch.device) -> str:
    """Name of the GPU or CPU, threads, and version of torch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        models = [line.split(":")[1] for line in cpu.splitlines() if line.startswith("model name")]
        name = models[0].strip() if models else platform.machine()
        name += f", {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"
