"""The measurements behind the README's tables: short loops over settings, nothing more.

    python tests/study.py distil               # teacher, student, a student trained longer; three seeds
    python tests/study.py ablations            # GSIM and its rivals; three seeds for three arms, one for the rest
    python tests/study.py rivals               # the teacher with shorter chains, which need no training
    python tests/study.py speed grid           # iterations x denoising steps: milliseconds, then Fréchet distances
    python tests/study.py guidance             # teacher and student at the same s
    python tests/study.py teacher              # what the teacher needs (velocity, centred tokens)
    python tests/study.py cost                 # time and memory of a GSIM update, by part
    python tests/study.py cost rates           # RL on critical, random, the first and all steps, at three learning rates; three seeds
    python tests/study.py tokens               # RL on revealed, hidden and freshly masked tokens; several updates; routing
    python tests/study.py drift                # the demo's RL with beta from 0 to 1
    python tests/study.py backprop             # the reward's own gradient, through two steps or all, with and without anchor
    python tests/study.py drift frontier       # the demo's RL with alpha from 0.1 to 1, longer, fixed schedules, K -> K/2; three seeds
    python tests/study.py rates drift frontier story    # teacher, student, RL on critical steps, learned schedule; three seeds

Every result is a small JSON file under --out/seed<n>/; what is there is not done again, so an interrupted study goes on,
seeds can run beside each other (--seeds 0 in one shell, --seeds 1 in another), and the table is of all that is there.
Every row is judged as in train_distill.py: 2,250 class-balanced images, a judge that nothing trains on.
"""

import argparse
import copy
import json
import math
import resource
import statistics
import sys
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import maskrl
import train_distill
import train_rl

RL = dict(steps=8, critical_steps=2, learn_steps=False, alpha=0.0, rl_iters=40, rl_lr=1e-4, beta=0.03)  # of the RL arms: quality alone, K = 8 fixed
DEMO = {k: getattr(maskrl.preset("tiny"), k) for k in RL}  # the same settings as the demo has them
LONGER = 600  # RL updates, four times the demo's
HALVING = dict(gsim_iters=300, student_lr=1e-4)
LONG = dict(gsim_iters=2000)
KS, CHAINS = (16, 8, 4, 2, 1), (100, 50, 25, 10, 5)  # of the grid: unmasking iterations, denoising steps
TEACHER = dict(teacher_iters=1500)
SHORT = dict(gsim_iters=400, aux_updates=2)  # of every arm of the ablations, judged at its last weights


class Lab:
    """One seed's data, teacher, judge and yardstick, each made when first asked for."""

    def __init__(self, out, seed, device):
        self.out, self.device = Path(out) / f"seed{seed}", device
        s = maskrl.preset("tiny", seed=seed)
        self.data = train_distill.load_data(s)
        self.s = self.data.measure(s)

    @cached_property
    def critic(self):
        return train_distill.train_critic("reward", self.data.train, self.s, self.device)

    @cached_property
    def progress(self):
        return train_distill.Progress(self.critic, self.data, self.s, self.device)

    @cached_property
    def judge(self):
        return train_distill.Judge(self.data, self.s, self.device)

    @cached_property
    def teacher(self):
        return self.made("teacher", lambda: train_distill.train_teacher(self.s, self.data, self.out, self.device, True))

    def made(self, kind, train, folder=""):
        path = self.out / folder / f"{kind}.pt"
        if not path.exists() or maskrl.read_checkpoint(path)["training"]:
            train()
        return maskrl.load_checkpoint(path, kind, self.device)

    def student(self, name, distil=maskrl.gsim_update, progress=True, teacher=None, **overrides):
        """A student of the teacher (or of another), with settings replaced: the best by Progress, or (progress=False) simply the last weights."""
        s, out = replace(self.s, **overrides), self.out / name
        student = self.made("student", lambda: train_distill.train_student(
            s, self.data, teacher or self.teacher, out, self.device, True, self.progress if progress else None, distil), name)
        if not progress:
            student.load_state_dict(maskrl.read_checkpoint(out / "student.pt")["model"])
        return student

    def policy(self, name, **overrides):
        """RL on the student with settings replaced, its log, and the judge's row of the end, without exploration."""
        student, out = self.student("student"), self.out / name
        s = replace(self.s, **RL | overrides)
        quality, held_out = self.critic.quality, train_rl.ShapeFit(s.image_size, s.difficulty, self.device)
        (out / "log.jsonl").unlink(missing_ok=True)
        measure = train_rl.watch(s, self.data, quality, held_out, self.judge)
        student.settings = s
        before = measure(student)
        policy, _ = train_rl.train_policy(s, self.data, student, quality, out, self.device, False, measure)
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        curve = [{"step": -1, "seconds": 0.0} | before] + [line for line in log if "judge" in line]
        values = {k: [line[k] for line in log if k in line] for k in ("kl", "not_first", "clip_fraction", "filtered", "spread", "grad_norm")}
        stats = {k: statistics.mean(v) for k, v in values.items() if v}
        row = train_rl.score(policy, quality, self.judge, s) | {"held_out": curve[-1]["held_out"], "kl_end": [x for x in log if "kl" in x][-1]["kl"]}
        return {"curve": curve, "kl_curve": [line for line in log if "kl" in line], "seconds": curve[-1]["seconds"]} | stats | row

    def judged(self, model, **how):
        tokens, _ = train_distill.in_batches(model, self.judge.labels, {"steps": self.s.steps} | how, self.s.seed, "")
        return self.judge(maskrl.to_images(tokens, self.s))

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


def halving(teacher, student, aux, x, labels, optimizers, generator):
    """The rival of Speed-RL: what a one-step student reveals in two iterations is asked of one; K -> K/2, from the same z."""
    s = student.settings  # steps = K/2
    tokens, trace = maskrl.generate(teacher, labels, 2 * s.steps, denoise_steps=1, seed=float(torch.rand((), generator=generator)), trace="steps")
    mask, reveal = trace.masks()
    row, k = torch.arange(len(x)), 2 * torch.randint(s.steps, (len(x),), generator=generator)
    both = reveal[row, k] | reveal[row, k + 1]
    g = maskrl.one_step(student.head, trace.z[both], student.context(tokens, mask[row, k], labels)[both], s.noise_ratio)
    loss = (g - tokens[both]).square().mean()
    return {"loss": loss.item(), "grad_norm": maskrl.descend(loss, optimizers["student"])}


# The studies: each gives {row name: JSON} of one seed --------------------------------------------------------


def distil(lab):
    yield "real", lambda: lab.judge.real()
    yield "teacher, 100 steps", lambda: lab.judged(lab.teacher, guidance=lab.s.guidance)
    yield "one-step start", lambda: lab.judged(lab.teacher, denoise_steps=1)
    yield "student", lambda: lab.judged(lab.student("student"), denoise_steps=1)
    yield "longer, --gsim-iters 2000", lambda: lab.judged(lab.student("long", **LONG), denoise_steps=1)


def arm(lab, name, distil=maskrl.gsim_update, **overrides):
    return name, lambda: lab.judged(lab.student(name, distil, False, **SHORT | overrides), denoise_steps=1)


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
    for steps in (*CHAINS, (50, 5)):
        name = f"teacher, {steps} steps" if isinstance(steps, int) else "teacher, 50 annealed to 5 (DiSA)"
        yield name, lambda steps=steps: lab.judged(lab.teacher, guidance=lab.s.guidance, denoise_steps=steps)
    yield "student", lambda: lab.judged(lab.student("student"), denoise_steps=1)


def grid(lab):
    for K in KS:
        at = "" if K == 16 else f", K = {K}"
        for steps in CHAINS:
            yield f"teacher, {steps} steps{at}", lambda K=K, steps=steps: lab.judged(
                lab.teacher, steps=K, guidance=lab.s.guidance, denoise_steps=steps)
        yield f"student{at}", lambda K=K: lab.judged(lab.student("student"), steps=K, denoise_steps=1)


def in_turns(lab, cells, n=32):
    """Milliseconds per image of every cell {name: (model, how)}, in turns, so that a busy moment of the machine hits all alike."""
    labels, times = lab.judge.labels[torch.linspace(0, len(lab.judge.labels) - 1, n).long()], {name: [] for name in cells}
    for _ in range(4):
        for name, (model, how) in cells.items():
            start = time.perf_counter()
            maskrl.generate(model, labels, **how)
            times[name].append((time.perf_counter() - start) / n)
    return {"ms": {name: 1000 * statistics.median(t[1:]) for name, t in times.items()}}


def speed(lab):
    """Time per image of every cell of the grid."""
    student = lab.student("student")
    cells = {f"student, K = {K}": (student, dict(steps=K, denoise_steps=1)) for K in KS}
    cells |= {f"teacher, {m} steps, K = {K}": (lab.teacher, dict(steps=K, denoise_steps=m, guidance=lab.s.guidance))
              for K in KS for m in (*CHAINS, (50, 5))}
    yield "speed", lambda: in_turns(lab, cells)


def story(lab):
    """The whole of it: teacher, student, RL on the critical steps (K = 8, rate 3e-5), RL with a learned schedule, and longer."""
    cells = {"story: teacher": (lab.teacher, dict(steps=16, denoise_steps=100, guidance=lab.s.guidance)),
             "story: student": (lab.student("student"), dict(steps=16, denoise_steps=1)),
             "story: + RL on critical steps": (trained(lab, "critical 3e-05"), dict(steps=8, denoise_steps=1)),
             "story: + learned schedule": (trained(lab, "demo, beta 0.2"), dict(steps=None, denoise_steps=1)),
             f"story: the same, {LONGER} updates": (trained(lab, "longer"), dict(steps=None, denoise_steps=1))}

    def work(name):
        model, how = cells[name]
        tokens, steps = train_distill.in_batches(model, lab.judge.labels, how, lab.s.seed, name)
        images = maskrl.to_images(tokens, lab.s)
        q = lab.critic.quality(images, lab.judge.labels)
        return lab.judge(images) | {"quality": q.mean().item(), "reward": maskrl.total_reward(q, steps, lab.s).mean().item(),
                                    "steps": steps.float().mean().item(), "ms": lab.result("story ms", lambda: in_turns(lab, cells))["ms"][name]}

    for name in cells:
        yield name, lambda name=name: work(name)


def guidance(lab):
    for g in (1.0, 1.5, 3.0):
        yield "teacher, 100 steps" if g == 1.5 else f"teacher, s = {g:g}", lambda g=g: lab.judged(lab.teacher, guidance=g)
        yield arm(lab, {1.0: "s = 1", 1.5: "L1+L2"}.get(g, f"s = {g:g}"), guidance=g)


def teacher(lab):
    for name, overrides in {"teacher-1500": {}, "eps head": dict(velocity=False), "uncentred tokens": dict(mean=0.0, scale=1.0)}.items():
        def work(name=name, s=replace(lab.s, **TEACHER | overrides)):
            folder = lab.out / name
            model = lab.made("teacher", lambda: train_distill.train_teacher(s, lab.data, folder, lab.device, True), name)
            tokens, _ = train_distill.in_batches(model, lab.judge.labels, dict(steps=s.steps, guidance=s.guidance, denoise_steps=25), s.seed, name)
            return lab.judge(maskrl.to_images(tokens, s))
        yield name, work


def at(lab, model, K):
    return train_rl.score(model, lab.critic.quality, lab.judge, lab.s, K)


def rl_arm(lab, name, **overrides):
    return name, lambda: lab.policy("rl " + name, **overrides)  # 0.0001 is the learning rate


def rates(lab):
    """Which of three learning rates suits which steps; and the updates on critical steps that take as long as 40 on all."""
    yield "student, fixed 8", lambda: at(lab, lab.student("student"), 8)
    for how in ("critical", "random", "first", "all"):
        for lr in (3e-5, 1e-4, 3e-4):
            yield rl_arm(lab, f"{how} {lr:g}", rl_steps=how, rl_lr=lr)
    yield rl_arm(lab, "100 updates, critical 0.0001", rl_iters=100)


def tokens(lab):
    for how in ("revealed", "hidden", "fresh"):
        yield rl_arm(lab, "critical 0.0001" if how == "revealed" else f"tokens {how}", rl_tokens=how)
    for how in ("revealed", "hidden", "fresh"):
        yield rl_arm(lab, f"4 updates per rollout, {how}", rl_tokens=how, rl_epochs=4, rl_iters=RL["rl_iters"] // 4)
    yield rl_arm(lab, "routing", route=1.0)
    yield rl_arm(lab, "leave-one-out, no std", baseline="others", normalise=False)


def trained(lab, name):
    return maskrl.load_checkpoint(lab.out / f"rl {name}" / "policy.pt", "policy", lab.device)


def drift(lab):
    for beta in (0.0, 0.03, 0.2, 1.0):
        yield rl_arm(lab, f"demo, beta {beta:g}", **DEMO | dict(beta=beta))


def backprop(lab):
    """MARVAL-RL: gradient in 2 critical steps of 8 or in all, anchored or not; beside the policy gradient."""
    yield rl_arm(lab, "critical 0.0001")
    for how in ("critical", "all"):
        for beta in (0.0, 0.03, 0.2):
            name = f"backprop, {how}, beta {beta:g}"
            yield name, lambda how=how, beta=beta, name=name: lab.policy("rl " + name, method="backprop", rl_steps=how, beta=beta) | {"graph_mb": kept(lab, how)}


def kept(lab, how):
    """MB that autograd keeps for one back-propagated update with gradient in the steps `how`."""
    policy, sizes = lab.student("student").requires_grad_(True), {}
    policy.settings = replace(lab.s, **RL | dict(method="backprop", rl_steps=how))
    count = lambda x: sizes.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        maskrl.backprop_update(policy, lab.student("student"), lab.critic.quality, torch.arange(lab.s.prompts) % len(lab.data.classes),
                               train_rl.mean_image(lab.data, lab.s, lab.device), {"generator": torch.optim.SGD(policy.parameters(), 0.0)}, 0)
    return sum(sizes.values()) / 2**20


def frontier(lab):
    """Quality and distance against the number of unmasking iterations."""
    for alpha in (0.1, 0.5, 1.0):
        yield rl_arm(lab, "demo, beta 0.2" if alpha == 0.5 else f"demo, alpha {alpha:g}", **DEMO | dict(alpha=alpha))
    for K in (16, 12, 8, 6, 5, 4, 3, 2, 1):
        yield f"student, fixed {K}", lambda K=K: at(lab, lab.student("student"), K)
        yield f"policy's generator, fixed {K}", lambda K=K: at(lab, trained(lab, "demo, beta 0.2"), K)
    yield rl_arm(lab, "longer", **DEMO | dict(rl_iters=LONGER))
    for K in (16, 8, 6, 5, 4, 3):
        yield f"longer's generator, fixed {K}", lambda K=K: at(lab, trained(lab, "longer"), K)
    if lab.s.seed == 0:  # screening: one seed
        yield rl_arm(lab, "additive", **DEMO | dict(additive=True))
        for K in (8, 4, 2):
            yield f"halved to {K}", lambda K=K: at(lab, halved(lab, K), K)


def halved(lab, K):
    """The student after K_max -> K_max/2 -> ... -> K."""
    if K == lab.s.steps:
        return lab.student("student")
    return lab.student(f"halved to {K}", halving, False, halved(lab, 2 * K), steps=K, **HALVING)


def cost(lab):
    """Milliseconds of GSIM and RL updates and of their parts, in turns; memory that the process grew by, or the GPU's peak."""
    class Nothing:
        num_classes = lab.teacher.num_classes
        head = staticmethod(lambda x, t, c: torch.cat([x, x], 1) * 0)
        context = staticmethod(lambda tokens, mask, labels: torch.zeros(*mask.shape, lab.s.width, device=mask.device))

    def work(rounds=15):
        x, labels = lab.data.train.batch(lab.s.gsim_batch, maskrl.rng(0), lab.device)
        x = maskrl.to_tokens(x, lab.s)
        nets = [copy.deepcopy(lab.teacher).requires_grad_(True) for _ in range(2)]
        optimizers = {name: torch.optim.Adam(net.parameters(), 1e-5) for name, net in zip(("student", "aux"), nets)}
        variants = {"update": {}, "one more auxiliary update": dict(aux_updates=lab.s.aux_updates + 1),
                    "no teacher": {}, "1 draw": dict(draws=1)}
        times = {name: [] for name in variants}
        memory = peak(lab.device)
        for i in range(rounds + 2):
            for name, overrides in variants.items():
                nets[0].settings = replace(lab.s, **overrides)
                start = time.perf_counter()
                maskrl.gsim_update(Nothing if name == "no teacher" else lab.teacher, *nets, x, labels, optimizers, maskrl.rng(i))
                times[name].append(1000 * (time.perf_counter() - start))
        student, critic = lab.student("student"), lab.critic.quality
        policy = copy.deepcopy(student).requires_grad_(True)
        optimizers, mean = {"generator": torch.optim.AdamW(policy.parameters(), 1e-6)}, train_rl.mean_image(lab.data, lab.s, lab.device)
        for i in range(rounds // 2 + 2):
            for how in ("critical", "random", "first", "all"):
                policy.settings = replace(lab.s, **RL | dict(rl_steps=how))
                start = time.perf_counter()
                maskrl.rl_update(policy, student, critic, torch.arange(lab.s.prompts) % len(lab.data.classes), mean, optimizers, i)
                times.setdefault(how, []).append(1000 * (time.perf_counter() - start))
        ms = {name: statistics.median(t[2:]) for name, t in times.items()}
        auxiliary = (ms["one more auxiliary update"] - ms["update"]) * lab.s.aux_updates
        teacher = ms["update"] - ms["no teacher"]
        return {"update ms": ms["update"], "auxiliary ms": auxiliary, "teacher ms": teacher, "student ms": ms["update"] - auxiliary - teacher,
                "with 1 draw instead of 4, ms": ms["1 draw"], "speed-up per draw": lab.s.draws * ms["1 draw"] / ms["update"],
                "memory MB": peak(lab.device) - memory} | {f"RL update, {how} steps, ms": ms[how] for how in ("critical", "random", "first", "all")}

    yield "cost", work


def peak(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


STUDIES = {f.__name__: f for f in (distil, ablations, rivals, grid, guidance, teacher, speed, cost, rates, tokens, drift, backprop, frontier, story)}
SEEDS = {study: "0,1,2" for study in ("distil", "ablations", "rivals", "rates", "drift", "frontier", "story")}


COLUMNS = {"Fréchet distance": "frechet", "accuracy": "accuracy", "precision": "precision", "recall": "recall", "diversity": "diversity",
           "quality": "quality", "reward": "reward", "ms per image": "ms", "held-out reward": "held_out", "KL": "kl_end", "not first": "not_first",
           "clipped": "clip_fraction", "steps": "steps", "graph, MB": "graph_mb"}


CURVES = {"quality_mean": "trained reward", "held_out": "held-out reward", "judge": "Fréchet distance (judge, n = 512)"}


def table(rows):
    """Markdown from {row name: [JSON of every seed]}: median and range over the seeds."""
    if rows.keys() & {"cost", "speed"}:
        return print(json.dumps(rows, indent=1))
    columns = {title: key for title, key in COLUMNS.items() if any(key in run for runs in rows.values() for run in runs)}
    print("| | seeds | " + " | ".join(columns) + " |\n|---|---" + "|---" * len(columns) + "|")
    for name, runs in rows.items():
        cells = []
        for key in columns.values():
            values = [run[key] for run in runs if key in run]
            digits = {"graph_mb": 0, "frechet": 2, "steps": 1, "ms": 1}.get(key, 3)
            spread = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 and key in ("frechet", "quality", "reward", "held_out", "steps", "ms") else ""
            cells.append(f"{statistics.median(values):.{digits}f}{spread}" if values else "")
        print(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")


def draw(study, rows, path):
    """The study's picture, if it has one."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    first = {name: runs[0] for name, runs in rows.items()}
    if study == "grid":
        Ks, chains = sorted(KS), [1] + sorted(CHAINS)
        name = lambda K, n: ("student" if n == 1 else f"teacher, {n} steps") + ("" if K == 16 else f", K = {K}")
        cells = [[first[name(K, n)] for n in chains] for K in Ks]
        ms = json.loads((path.parent / "seed0" / "speed.json").read_text())["ms"]
        ms = [[ms[("student" if n == 1 else f"teacher, {n} steps") + f", K = {K}"] for n in chains] for K in Ks]
        figure, axis = plt.subplots(figsize=(6.6, 3.6), layout="constrained")
        axis.imshow([[math.log(cell["frechet"]) for cell in row] for row in cells], cmap="viridis_r", aspect="auto")
        for i, row in enumerate(cells):
            for j, cell in enumerate(row):
                axis.text(j, i, f"{cell['frechet']:.2f}\n{ms[i][j]:.1f} ms", ha="center", va="center", fontsize=8,
                          color="black" if cell["frechet"] < 2 else "white")
        axis.set_xticks(range(len(chains)), ["1\n(student)"] + [str(n) for n in chains[1:]])
        axis.set_yticks(range(len(Ks)), Ks)
        axis.set(xlabel="denoising steps per iteration", ylabel="unmasking iterations K", title="Fréchet distance and ms per image")
    elif study == "guidance":
        figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
        scales = (1.0, 1.5, 3.0)
        for label, name in (("teacher, 100 steps", lambda s: "teacher, 100 steps" if s == 1.5 else f"teacher, s = {s:g}"),
                            ("student, 400 updates", lambda s: "L1+L2" if s == 1.5 else f"s = {s:g}")):
            axis.plot(scales, [first[name(s)]["frechet"] for s in scales], "o-", label=label)
        axis.set(xlabel="guidance s", ylabel="Fréchet distance", yscale="log")
        axis.legend()
    elif study in ("rates", "tokens", "backprop"):
        mean = lambda name, key: statistics.mean(run[key] for run in rows[name])
        arms = {name: name for name, runs in rows.items() if "curve" in runs[0]}
        if study == "rates":  # each arm at the rate with the highest quality at which it does not drift by more than a fifth
            drifts = lambda name: max(mean(name, "frechet"), 1.2 * mean("student, fixed 8", "frechet"))
            arms = {how: min((name for name in arms if name.startswith(how)), key=lambda name: (drifts(name), -mean(name, "quality")))
                    for how in ("critical", "random", "first", "all")}
            ms = json.loads((path.parent / "seed0" / "cost.json").read_text())
        panels = [(against, key) for against in ("updates", "seconds")[:1 + (study == "rates")] for key in CURVES]
        figure, axes = plt.subplots(len(panels) // 3, 3, figsize=(13, len(panels)), layout="constrained")
        for axis, (against, key) in zip(axes.flat, panels):
            for how, name in arms.items():
                curves = [{point["step"] + 1: point[key] for point in run["curve"]} for run in rows[name]]
                steps = sorted(curves[0])
                x = [i * ms[f"RL update, {how} steps, ms"] / 1000 for i in steps] if against == "seconds" else steps
                lines = [[curve[i] for i in steps] for curve in curves]
                axis.plot(x, [statistics.mean(y) for y in zip(*lines)], ".-", linewidth=1, label=name)
                axis.fill_between(x, [min(y) for y in zip(*lines)], [max(y) for y in zip(*lines)], alpha=0.1)
            axis.set(xlabel=against, title=CURVES[key])
        axes.flat[0].legend(fontsize=7)
    elif study == "frontier":
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
        for axis, key in zip(axes, ("quality", "frechet")):
            for kind in ("student, fixed", "policy's generator, fixed", "longer's generator, fixed", "halved to", "demo", "longer"):
                points = sorted((statistics.mean(run["steps"] for run in runs), statistics.mean(run[key] for run in runs))
                                for name, runs in rows.items() if name.startswith(kind) and (kind != "longer" or "'s" not in name))
                label = {"demo": "learned schedules", "longer": f"learned schedule, {LONGER} updates", "halved to": "distilled to half the steps",
                         "policy's generator, fixed": "generator of RL, fixed", "longer's generator, fixed": f"the same, {LONGER} updates"}.get(kind, kind)
                axis.plot(*zip(*points), {"demo": "o-", "longer": "*"}.get(kind, ".--"), markersize=10 if kind == "longer" else 5, label=label)
            axis.set(xlabel="mean unmasking iterations", title={"quality": "quality", "frechet": "Fréchet distance"}[key], xscale="log")
            axis.set_xticks((1, 2, 4, 8, 16), (1, 2, 4, 8, 16))
        axes[1].set_yscale("log")
        axes[0].legend(fontsize=8)
    elif study == "drift":
        keys = CURVES | {"kl": "KL per channel"}
        figure, axes = plt.subplots(1, 4, figsize=(15, 3), layout="constrained")
        for axis, key in zip(axes, keys):
            for name, runs in rows.items():
                curve = {point["step"] + 1: point[key] for run in runs[:1] for point in run["kl_curve" if key == "kl" else "curve"]}
                axis.plot(sorted(curve), [curve[i] for i in sorted(curve)], ".-", linewidth=1, label=name.removeprefix("demo, "))
            axis.set(xlabel="updates", title=keys[key])
        axes[0].legend(fontsize=7)
    else:
        return
    figure.savefig(path, dpi=80)
    print(f"\npicture: {path}")


def main(argv=None):
    parser = argparse.ArgumentParser(usage="%(prog)s STUDY... [options]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", choices=STUDIES)
    parser.add_argument("--out", default="runs/study", help="default: runs/study")
    parser.add_argument("--seeds", help='comma-separated (default: 0,1,2 for ' + ', '.join(SEEDS) + '; else 0)')
    parser.add_argument("--only", nargs="+", help="beginnings of row names: do just these")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    for study in args.studies:
        rows = {}
        for seed in (args.seeds or SEEDS.get(study, "0")).split(","):
            lab = Lab(args.out, int(seed), maskrl.find_device(args.device))
            for name, work in STUDIES[study](lab):
                if not args.only or name.startswith(tuple(args.only)):
                    rows.setdefault(name, []).append(lab.result(name, work))
        if not rows:
            raise maskrl.InputError(f"--only {' '.join(args.only)}: no row of {study} begins so")
        print(f"\n## {study}, {train_distill.hardware(maskrl.find_device(args.device))}\n")
        table(rows)
        if not args.only:
            draw(study, rows, Path(args.out) / f"{study}.png")


if __name__ == "__main__":
    maskrl.run(main)
