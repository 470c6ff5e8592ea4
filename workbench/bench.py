"""Which idea makes an image how much faster: the one step, the cache, the schedule, each alone and
all together, timed in turns in one run."""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from maskrl import MAR, Sampling, Trace, generate, to_images
from workbench.data import identity, load_data
from workbench.devices import possible_precision
from workbench.files import load_checkpoint
from workbench.judge import Judge
from workbench.kl16 import KL16
from workbench.lazymar import LazyContexts
from workbench.precision import set_precision
from workbench.released import load_model
from workbench.report import generate_many
from workbench.settings import PRESETS, RELEASED, preset
from workbench.timing import Stopwatch, clock, lower_median, seconds_in_turns

CACHED = partial(LazyContexts, every=8)  # the contexts of the arms with a cache
PARTS = ("transformer", "head", "decoding")


def bench_arms(models: dict[str, MAR], steps: int | tuple | None) -> dict:
    """{name: (model, Sampling)} of what `models`, {kind: model}, allow: each idea alone, and all.

    steps: as in Sampling (None: the checkpoint's). The schedule is the learned one of a policy or,
    without a policy, a quarter of the student's iterations."""
    teacher, student, policy = (models.get(kind) for kind in ("teacher", "student", "policy"))
    arms = {}
    if teacher:
        arms["teacher, 100 steps"] = teacher, Sampling(steps, denoise_steps=100)
        arms["teacher, 25 steps"] = teacher, Sampling(steps, denoise_steps=25)
        arms["annealed teacher"] = teacher, Sampling(steps, denoise_steps=(50, 5))
    if student:
        arms["student"] = student, Sampling(steps)
        arms["student + cache"] = student, Sampling(steps, contexts=CACHED)
    if policy:
        arms["student + schedule"] = policy, Sampling()
        arms["all together"] = policy, Sampling(contexts=CACHED)
    elif student:
        fewer = max(1, len(Sampling(steps).counts(student.length, student.settings)) // 4)
        arms["student + schedule"] = student, Sampling(fewer)
        arms["all together"] = student, Sampling(fewer, contexts=CACHED)
    return arms


def bench(
    models: dict[str, MAR],
    decode: Callable = identity,
    judge: Judge | None = None,
    steps: int | tuple | None = None,
    batches: tuple[int, ...] = (1, 8, 32),
    rounds: int = 5,
) -> dict:
    """Every arm's seconds per image in every batch size, where they go, and with a judge its
    Fréchet distance; and what each idea contributes. {"rows": {arm: figures}, "factors": of the
    first batch size, "factor_ranges": {batch: {idea: [lowest, of the medians, highest]}}}.

    seconds: {batch: [lowest, median, highest]} of rounds - 1 rounds, all arms in turns. Every round
    has its own noise, since a learned schedule takes longer for one image than for another."""
    arms = bench_arms(models, steps)
    rows, ranges = {name: {"seconds": {}} for name in arms}, {}
    print(
        f"timing {len(arms)} ways to make an image, {rounds} rounds in batches of "
        f"{', '.join(map(str, batches))}"
    )
    for batch in batches:
        calls = {
            name: partial(make_images, *arm, batch, decode, iter(range(rounds)))
            for name, arm in arms.items()
        }
        device = next(iter(models.values())).device
        seconds = seconds_in_turns(calls, rounds, device, f"batch {batch}")
        for name, times in seconds.items():
            per_image = [t / batch for t in (min(times), lower_median(times), max(times))]
            rows[name]["seconds"][batch] = per_image
        ranges[batch] = factor_ranges(seconds)
    if judge:
        print(f"drawing {len(judge.labels)} images in each way: {drawing_time(rows, judge)}")
    for name, (model, sampling) in arms.items():
        rows[name]["shares"], rows[name]["steps"] = shares(model, sampling, batches[0], decode)
        if judge:
            images, steps_taken = generate_many(
                model, judge.labels, sampling, model.settings.seed, name, decode
            )
            rows[name]["frechet"] = judge(images)["frechet"]
            rows[name]["steps"] = float(steps_taken.float().mean())
    first = {name: middle for name, (_, middle, _) in ranges[batches[0]].items()}
    return {"rows": rows, "factors": first, "factor_ranges": ranges}


def drawing_time(rows: dict, judge: Judge) -> str:
    """How long it takes to draw the judge's images in all ways, by the largest batch timed."""
    per_image = [list(row["seconds"].values())[-1][1] for row in rows.values()]
    return f"about {sum(per_image) * len(judge.labels) / 60:.1f} minutes"


def factor_ranges(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """{idea: [lowest in a round, that of the median seconds, highest]} of `factors`.

    seconds: {arm: of every round}."""
    middle = factors({name: lower_median(times) for name, times in seconds.items()})
    rounds = [factors(dict(zip(seconds, times))) for times in zip(*seconds.values())]
    of_rounds = {name: [one[name] for one in rounds] for name in middle}
    return {name: [min(of), middle[name], max(of)] for name, of in of_rounds.items()}


def factors(seconds: dict[str, float]) -> dict[str, float]:
    """How many times as fast each idea alone makes an image; their product, and all together.

    seconds: {arm: seconds}; no factors without a teacher and a student."""
    if not {"teacher, 100 steps", "student"} <= seconds.keys():
        return {}
    one_step = seconds["teacher, 100 steps"] / seconds["student"]
    cache = seconds["student"] / seconds["student + cache"]
    schedule = seconds["student"] / seconds["student + schedule"]
    return {
        "one step": one_step,
        "cache": cache,
        "schedule": schedule,
        "product": one_step * cache * schedule,
        "all together": seconds["teacher, 100 steps"] / seconds["all together"],
    }


@torch.no_grad()
def make_images(model: MAR, sampling: Sampling, batch: int, decode, seeds: Iterator[int]) -> Trace:
    """Draw and decode `batch` images of the next seed, whose classes count on from that number."""
    seed = next(seeds)
    labels = (seed + torch.arange(batch, device=model.device)) % model.num_classes
    tokens, trace = generate(model, labels, sampling, seed=seed, trace=True)
    decode(to_images(tokens, model.settings))
    return trace


def shares(model: MAR, sampling: Sampling, batch: int, decode: Callable) -> tuple[dict, float]:
    """Fraction of a generation's seconds that each of PARTS takes, and its unmasking iterations.

    The rest is the loop's own: which tokens, noise, guidance and the steps of the chain."""
    watch = Stopwatch(model.device)
    hooks = [
        model.z_proj.register_forward_pre_hook(partial(watch.start, "transformer")),
        model.decoder_norm.register_forward_hook(partial(watch.stop, "transformer")),
        model.head.input_proj.register_forward_pre_hook(partial(watch.start, "head")),
        model.head.final_layer.linear.register_forward_hook(partial(watch.stop, "head")),
    ]
    try:
        start = clock(model.device)
        timed_decode = partial(watch.call, "decoding", decode)
        trace = make_images(model, sampling, batch, timed_decode, iter([0]))
        total = clock(model.device) - start
    finally:
        for hook in hooks:
            hook.remove()
    return {part: watch.spent[part] / total for part in PARTS}, float(trace.steps.float().mean())


def bench_models(name, device, vae: KL16 | None, num_heads=None) -> tuple[dict, Callable]:
    """{kind: model} of a checkpoint, and of teacher.pt, student.pt and policy.pt in its folder that
    make the same images; or, of a preset's name, random weights. And what decodes."""
    if name in PRESETS:
        return random_models(name, device, vae)
    models = [load_model(name, None, device, num_heads)]
    for kind in ("teacher", "student", "policy"):
        path = Path(name).parent / f"{kind}.pt"
        if path.exists() and kind != models[0].kind:
            models.append(load_checkpoint(path, kind, device))
    first = models[0]
    same = [m for m in models if (m.classes, m.length) == (first.classes, first.length)]
    return {model.kind: model for model in same}, vae.decode if vae else identity


def bench_judge(models: dict[str, MAR], name: str, vae: KL16 | None, device) -> Judge | None:
    """A judge of the data called `name`; None, with a message, if the models make other classes."""
    model = next(iter(models.values()))
    data = load_data(model.settings, name, stride=vae.stride if vae else 1)
    if data.classes != model.classes:
        print("no Fréchet distance: these are not the classes of --data")
        return None
    print(f"training a judge: {model.settings.judge_iters} updates (--judge)")
    return Judge(data, model.settings, device)


def random_models(name: str, device, vae: KL16 | None) -> tuple[dict, Callable]:
    """Teacher and student of a preset's size, of the same random weights, and what decodes; in
    float32 on a CPU, most of which only emulate bfloat16."""
    image_channels = 16 if name in RELEASED else 3
    settings = preset(name, scale=1.0)
    if device.type == "cpu":
        settings = replace(settings, precision="fp32")
    classes = [str(i) for i in range(1000)]
    teacher = MAR(settings, classes, "teacher", image_channels).to(device).eval()
    set_precision(teacher, possible_precision(settings.precision, device))
    student = copy(teacher)
    student.kind = "student"
    if name in RELEASED:
        vae = vae or KL16().to(device).eval()
    return {"teacher": teacher, "student": student}, vae.decode if vae else identity


def bench_table(result: dict) -> str:
    """bench.json as text."""
    first = next(iter(next(iter(result["rows"].values()))["seconds"]))
    header = f"{'seconds per image':20}{f'batch {first}':>10}{'(spread)':>18}{'best batch':>12}"
    header += f"{'(of)':>7}{'iterations':>12}" + "".join(f"{part:>13}" for part in PARTS)
    lines = [header + f"{'Fréchet':>10}"]
    for name, row in result["rows"].items():
        low, middle, high = row["seconds"][first]
        medians = {batch: times[1] for batch, times in row["seconds"].items()}
        best = min(medians, key=medians.get)
        line = f"{name:20}{middle:10.4g}{f'({low:.4g}-{high:.4g})':>18}"
        line += f"{medians[best]:12.4g}{f'({best})':>7}{row['steps']:12.1f}"
        line += "".join(f"{row['shares'][part]:13.0%}" for part in PARTS)
        line += f"{row['frechet']:10.2f}" if "frechet" in row else f"{'-':>10}"
        lines.append(line)
    for batch, ranges in result["factor_ranges"].items():
        said = {
            name: f"{middle:.3g} ({low:.3g}-{high:.3g})"
            for name, (low, middle, high) in ranges.items()
        }
        if said:
            lines.append(
                "times as fast, batch {}: one step {one step} x cache {cache} x schedule "
                "{schedule} = {product}; measured all together {all together}".format(batch, **said)
            )
    if any(result["factor_ranges"].values()):
        lines.append(
            "in brackets: lowest and highest of single rounds. Factors depend on batch, processor "
            "and what else it does; only those of one table compare"
        )
    return "\n".join(lines)
