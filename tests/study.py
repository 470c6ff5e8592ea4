"""The measurements behind the README's tables: short loops over settings, nothing more.

    python tests/study.py distil               # teacher, student, a student trained longer; three seeds
    python tests/study.py ablations            # GSIM and its rivals; three seeds for three arms, one for the rest
    python tests/study.py rivals               # the teacher with shorter chains, which need no training
    python tests/study.py grid                 # iterations x denoising steps
    python tests/study.py guidance             # teacher and student at the same s
    python tests/study.py teacher              # what the teacher needs (velocity, centred tokens)

Every result is a small JSON file under --out/seed<n>/; what is there is not done again, so an interrupted study goes on,
seeds can run beside each other (--seeds 0 in one shell, --seeds 1 in another), and the table is of all that is there.
Every row is judged as in train_distill.py: 2,250 class-balanced images, a judge that nothing trains on.
"""

import argparse
import json
import statistics
import sys
import time
from functools import cached_property
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import maskrl
import train_distill

SHORT = dict(gsim_iters=400)  # of every arm of the ablations


class Lab:
    """One seed's data, teacher, judge and yardstick, each made when first asked for."""

    def __init__(self, out, seed, device):
        self.out, self.device = Path(out) / f"seed{seed}", device
        s = maskrl.preset("tiny", seed=seed)
        self.data = maskrl.load_data(s)
        self.s = self.data.measure(s)

    @cached_property
    def progress(self):
        return maskrl.Progress(maskrl.train_critic("reward", self.data.train, self.s, self.device), self.data, self.s, self.device)

    @cached_property
    def judge(self):
        return maskrl.Judge(self.data, self.s, self.device)

    @cached_property
    def teacher(self):
        return self.made("teacher", lambda: train_distill.train_teacher(self.s, self.data, self.out, self.device, True))

    def made(self, kind, train, folder=""):
        path = self.out / folder / f"{kind}.pt"
        if not path.exists() or maskrl.read_checkpoint(path)["training"]:
            train()
        return maskrl.load_checkpoint(path, kind, self.device)

    def student(self, name, distil=maskrl.gsim_update, **overrides):
        """A student of the teacher, with settings replaced."""
        s = maskrl.replace(self.s, **overrides)
        return self.made("student", lambda: train_distill.train_student(s, self.data, self.teacher, self.out / name, self.device,
                                                                        True, self.progress, distil), name)

    def judged(self, model, **how):
        """The judge's row, with seconds per image in batches of 256."""
        start = time.perf_counter()
        tokens, _ = train_distill.in_batches(model, self.judge.labels, {"steps": self.s.steps} | how, self.s.seed, "")
        seconds = (time.perf_counter() - start) / len(tokens)
        return self.judge(maskrl.to_images(tokens, self.s)) | {"seconds_per_image": seconds}

    def result(self, name, work):
        """The JSON of `name`, from the file or else from work()."""
        path = self.out / f"{name}.json"
        if not path.exists():
            start = time.perf_counter()
            row = work() | {"minutes": (time.perf_counter() - start) / 60, "threads": torch.get_num_threads()}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row))
        return json.loads(path.read_text())


def regression(teacher, student, aux, x, labels, optimizers, generator):
    """The rival that GSIM replaces: |g(z, c) - sample of the teacher's chain begun at z|^2, chain of 25 steps."""
    s, (B, L, D) = student.settings, x.shape
    mask = maskrl.random_mask(B, L, s.gsim_masks, generator, x.device)
    null = torch.full_like(labels, teacher.num_classes)
    z = torch.randn(int(mask.sum()), D, generator=generator).to(x.device)
    with torch.no_grad():
        c_p, c_null = (c[mask] for c in teacher.context(x.repeat(2, 1, 1), mask.repeat(2, 1), torch.cat([labels, null])).chunk(2))
        scale = maskrl.guidance_scale(s.guidance, mask.sum(1) - 1, L)[:, None].expand(B, L)[mask][:, None]
        target = maskrl.Diffusion(25).sample(maskrl.guided(teacher.head, c_p, c_null, scale), z, generator, clip=s.clip_range)
    loss = (maskrl.one_step(student.head, z, student.context(x, mask, labels)[mask], s.noise_ratio) - target).square().mean()
    return {"loss": loss.item(), "grad_norm": maskrl.descend(loss, optimizers["student"])}


# The studies: each gives {row name: JSON} of one seed --------------------------------------------------------


def distil(lab):
    yield "real", lambda: lab.judge.real()
    yield "teacher, 100 steps", lambda: lab.judged(lab.teacher, guidance=lab.s.guidance)
    yield "one-step start", lambda: lab.judged(lab.teacher, denoise_steps=1)
    yield "student", lambda: lab.judged(lab.student("student"), denoise_steps=1)
    yield "student, --gsim-iters 2400", lambda: lab.judged(lab.student("long", gsim_iters=2400), denoise_steps=1)


def arm(lab, name, distil=maskrl.gsim_update, **overrides):
    return name, lambda: lab.judged(lab.student(name, distil, **SHORT | overrides), denoise_steps=1)


def ablations(lab):
    yield "teacher, 100 steps", lambda: lab.judged(lab.teacher, guidance=lab.s.guidance)
    yield arm(lab, "L1+L2")
    yield arm(lab, "L1", gsim_terms="L1")
    yield arm(lab, "regression", regression)
    if lab.s.seed == 0:  # screening: one seed
        yield arm(lab, "L2", gsim_terms="L2")
        yield arm(lab, "squared distance", distance="squared")
        yield arm(lab, "eps units", gsim_units="eps")
        yield arm(lab, "1 auxiliary update", aux_updates=1)
        yield arm(lab, "4 auxiliary updates", aux_updates=4)
        yield arm(lab, "MAR's mask ratios", gsim_masks="mar")
        yield arm(lab, "noise ratio 2.5", noise_ratio=2.5)
        yield arm(lab, "noise ratio 10", noise_ratio=10.0)
        yield arm(lab, "s = 1", guidance=1.0)


def rivals(lab):
    for steps in (100, 50, 25, 10, 5, (50, 5)):
        name = f"teacher, {steps} steps" if isinstance(steps, int) else "teacher, 50 annealed to 5 (DiSA)"
        yield name, lambda steps=steps: lab.judged(lab.teacher, guidance=lab.s.guidance, denoise_steps=steps)
    yield "student", lambda: lab.judged(lab.student("student"), denoise_steps=1)


def grid(lab):
    for K in (16, 8, 4, 2, 1):
        at = "" if K == 16 else f", K = {K}"
        for steps in (100, 50, 25, 10, 5):
            yield f"teacher, {steps} steps{at}", lambda K=K, steps=steps: lab.judged(
                lab.teacher, steps=K, guidance=lab.s.guidance, denoise_steps=steps)
        yield f"student{at}", lambda K=K: lab.judged(lab.student("student"), steps=K, denoise_steps=1)


def guidance(lab):
    for g in (1.0, 1.5, 2.0, 3.0):
        yield "teacher, 100 steps" if g == 1.5 else f"teacher, s = {g:g}", lambda g=g: lab.judged(lab.teacher, guidance=g)
        yield arm(lab, {1.0: "s = 1", 1.5: "L1+L2"}.get(g, f"s = {g:g}"), guidance=g)


def teacher(lab):
    for name, overrides in {"teacher-1500": {}, "eps head": dict(velocity=False), "uncentred tokens": dict(mean=0.0, scale=1.0)}.items():
        def work(name=name, s=maskrl.replace(lab.s, teacher_iters=1500, **overrides)):
            folder = lab.out / name
            model = lab.made("teacher", lambda: train_distill.train_teacher(s, lab.data, folder, lab.device, True), name)
            tokens, _ = train_distill.in_batches(model, lab.judge.labels, dict(steps=s.steps, guidance=s.guidance, denoise_steps=25), s.seed, name)
            return lab.judge(maskrl.to_images(tokens, s))
        yield name, work


STUDIES = {f.__name__: f for f in (distil, ablations, rivals, grid, guidance, teacher)}
SEEDS = {"distil": "0,1,2", "ablations": "0,1,2", "rivals": "0,1,2"}


def table(rows):
    """Markdown from {row name: [JSON of every seed]}: median and range over the seeds."""
    columns = {"Fréchet distance": "frechet", "accuracy": "accuracy", "precision": "precision", "recall": "recall", "diversity": "diversity",
               "s/image": "seconds_per_image", "minutes": "minutes"}
    print("| | seeds | " + " | ".join(columns) + " |\n|---|---" + "|---" * len(columns) + "|")
    for name, runs in rows.items():
        cells = []
        for key in columns.values():
            values = [run[key] for run in runs if key in run]
            digits = 4 if key == "seconds_per_image" else 1 if key == "minutes" else 2 if key == "frechet" else 3
            spread = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 and key in ("frechet", "diversity") else ""
            cells.append(f"{statistics.median(values):.{digits}f}{spread}" if values else "")
        print(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", choices=STUDIES)
    parser.add_argument("--out", default="runs/study", help="default: runs/study")
    parser.add_argument("--seeds", help="comma-separated (default: 0,1,2 for distil, ablations and rivals, else 0)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    for study in args.studies:
        rows = {}
        for seed in (args.seeds or SEEDS.get(study, "0")).split(","):
            lab = Lab(args.out, int(seed), maskrl.find_device(args.device))
            for name, work in STUDIES[study](lab):
                rows.setdefault(name, []).append(lab.result(name, work))
        print(f"\n## {study}, {train_distill.hardware(maskrl.find_device(args.device))}\n")
        table(rows)


if __name__ == "__main__":
    maskrl.run(main)
