"""train_distill.py and train_rl.py, briefly: on real images, with wrong input, interrupted,
diverging."""

import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from argparse import Namespace

import helpers_child as child
import pytest
import torch
from conftest import SHORT, error_of, tiny
from helpers_child import EXITS, FOREVER, QUICK, at_work, no_matplotlib, without_times
from helpers_images import make_folder, make_shapes_folder
from PIL import Image

import maskrl
import sample
import train_distill
import train_rl
from workbench import pictures, quality_net
from workbench import run as run_module
from workbench.data import load_data
from workbench.files import KINDS, load_checkpoint, read_checkpoint, write_checkpoint
from workbench.quality_net import QualityNet
from workbench.rewards import ShapeFit, default_held_out
from workbench.run import read_log

CPU = ("--device", "cpu", "--threads", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """180 images of the built-in shapes, as files."""
    return make_shapes_folder(tmp_path_factory.mktemp("shapes"), per_class=20)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """All three stages on the folder, with guidance: the folder of the run, and its metrics."""
    out = tmp_path_factory.mktemp("run")
    argv = [*SHORT, "--data", str(folder), "--out", str(out), "--guidance", "1.5"]
    return out, train_rl.main(argv)


def no_monitor(model):
    return {}


def no_validation(*_, n):
    return one_for_all


def one_for_all(model):
    return {"validation": 1.0}


# A whole run --------------------------------------------------------------------------------------


def test_a_folder_goes_through_all_stages_and_leaves_their_files(run):
    out, metrics = run
    networks, images = "teacher student policy reward judge", "samples neighbours curves gain"
    files = {f"{name}.pt" for name in networks.split()} | {f"{n}.png" for n in images.split()}
    files |= {"choices.json", "settings.json", "log.jsonl", "metrics.json", "cache"}
    assert files == {path.name for path in out.iterdir()} - {".lock"}
    assert json.loads((out / "metrics.json").read_text())["rows"].keys() == metrics["rows"].keys()


def test_the_report_has_a_row_for_every_generator(run):
    rows = run[1]["rows"]
    assert set(rows) == {"real", "untrained", "teacher", "one-step start", "student", "policy"}
    assert rows["student"]["denoise_steps"] == rows["one-step start"]["denoise_steps"] == 1
    assert rows["teacher"]["denoise_steps"] == 3
    assert all(row["seconds_per_image"] > 0 for name, row in rows.items() if name != "real")


def test_rl_is_compared_with_fixed_schedules(run):
    rl = run[1]["rl"]
    assert {"before", "after", "student, fixed K = 8", "policy, fixed K = 1"} <= set(rl)
    assert rl["policy, fixed K = 1"]["steps"] == 1
    assert rl["policy, fixed K = 8"]["steps_std"] == 0


def test_the_log_has_every_update_of_a_short_run(run):
    lines = read_log(run[0])
    stages = [line["stage"] for line in lines if "loss" in line]
    assert stages == ["teacher"] * 6 + ["student"] * 4 + ["policy"] * 2
    assert {line["stage"] for line in lines if "validation" in line} == {"student"}
    assert {line["stage"] for line in lines if "quality_mean" in line} == {"policy"}


@pytest.fixture
def more(run, folder):
    """more(main, *options) -> metrics of another run on the same images."""

    def more(main, *options):
        return main([str(a) for a in (*options, "--data", folder, *CPU)])

    return more


def test_rl_goes_on_from_a_given_student_and_only_with_it(run, folder, more, tmp_path, capsys):
    student, new = run[0] / "student.pt", ("--out", tmp_path / "rl")
    how = ("--rl-iters", 1, "--critical-steps", 1)
    metrics = more(train_rl.main, "--student", student, *new, *how)
    assert metrics["settings"]["critical_steps"] == 1
    assert "teacher" in metrics["rows"]  # it lies next to the student
    error = error_of(train_rl.main, [*new, "--resume", "--data", folder, *CPU], capsys)
    assert "give it again by --student" in error


def test_a_teacher_of_other_classes_is_not_that_of_the_student(run, folder, more, tmp_path, capsys):
    """Its null class would be another number, and the report would end in a traceback."""
    for name in ("student.pt", "teacher.pt"):
        shutil.copy(run[0] / name, tmp_path)
    teacher = load_checkpoint(tmp_path / "teacher.pt")
    teacher.classes = [f"another {name}" for name in teacher.classes]
    write_checkpoint(tmp_path / "teacher.pt", teacher)
    student, new = ("--student", tmp_path / "student.pt"), ("--out", tmp_path / "rl")
    how = ("--rl-iters", 1, "--critical-steps", 1, "--data", folder, *CPU)
    given = (*student, *new, "--teacher", tmp_path / "teacher.pt", *how)
    assert "is not a teacher of" in error_of(train_rl.main, given, capsys)
    assert "teacher" not in more(train_rl.main, *student, *new, *how[:4])["rows"]


def test_rl_says_that_its_student_is_unfinished(run, more, tmp_path, capsys):
    student = load_checkpoint(run[0] / "student.pt")
    write_checkpoint(tmp_path / "student.pt", student, step=3, training={"record": {}})
    out = ("--out", tmp_path / "rl", "--rl-iters", 1, "--critical-steps", 1)
    more(train_rl.main, "--student", tmp_path / "student.pt", *out)
    assert "student is unfinished, after 3 of" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_reward_and_images(run, folder, tmp_path, capsys):
    """--resume without --reward once went on, silently, under another reward."""
    out = ("--out", run[0], "--resume", *CPU)
    with_fit = [*out, "--data", folder, "--reward", "fit"]
    assert "was begun with --reward embedded, not fit" in error_of(train_rl.main, with_fit, capsys)
    copy = shutil.copytree(folder, tmp_path / "copy")
    first, second, *_ = sorted(copy.rglob("*.png"))
    first.write_bytes(second.read_bytes())
    others = error_of(train_rl.main, [*out, "--data", copy], capsys)
    assert (
        f"begun with other images than those of --data {copy}: class {first.parent.name}" in others
    )


def test_a_resumed_run_trains_neither_judge_nor_reward_network_again(run, more, monkeypatch):
    """They once were, at every --resume."""
    monkeypatch.setattr(quality_net, "train_quality_net", pytest.fail)
    before = json.loads((run[0] / "metrics.json").read_text())
    after = more(train_rl.main, "--out", run[0], "--resume")
    assert without_times(after["rows"]) == without_times(before["rows"])


def test_a_given_teacher_is_distilled_and_not_written_again(run, more, tmp_path):
    teacher = run[0] / "teacher.pt"
    metrics = more(train_distill.main, "--teacher", teacher, "--out", tmp_path, "--gsim-iters", 1)
    assert not (tmp_path / "teacher.pt").exists()
    assert (tmp_path / "student.pt").exists()
    assert "policy" not in metrics["rows"]


def test_backpropagation_runs_on_a_given_student(run, more, tmp_path):
    how = ("--method", "backprop", "--rl-iters", 1, "--out", tmp_path)
    metrics = more(train_rl.main, "--student", run[0] / "student.pt", *how)
    assert metrics["rl"]["after"]["steps_std"] == 0
    (line,) = [line for line in read_log(tmp_path) if "kl" in line]
    assert math.isfinite(line["quality"])


def test_the_schedule_can_learn_alone(run, more, tmp_path):
    """With --rl-iters 0 the generator stays the student."""
    student = run[0] / "student.pt"
    more(train_rl.main, "--student", student, "--rl-iters", 0, "--out", tmp_path)
    assert {line["step"] for line in read_log(tmp_path)} == {0}
    policy, before = maskrl.load(tmp_path / "policy.pt"), maskrl.load(student)
    assert policy.noise_policy.net[-1].weight.count_nonzero() == 0
    assert policy.schedule.net[-1].weight.count_nonzero() > 0
    assert torch.equal(policy.head.input_proj.weight, before.head.input_proj.weight)


def test_what_is_held_out_is_not_what_is_trained(run):
    """Or reward hacking would go unseen."""
    device = torch.device("cpu")
    shapes = load_data(tiny())
    reward_net = QualityNet("reward", 8, 10)

    def held_out(data, *names):
        return default_held_out(dict.fromkeys(names, 1.0), data, reward_net, device)

    assert isinstance(held_out(shapes, "embedded"), ShapeFit)
    assert isinstance(held_out(shapes, "clip", "embedded"), ShapeFit)
    assert held_out(shapes, "fit") == reward_net.quality
    assert held_out(shapes, "embedded", "fit") is None
    shapes.name = "photos/"
    assert held_out(shapes, "embedded") is None
    assert held_out(shapes, "clip") == reward_net.quality


def test_what_is_drawn_for_one_step_is_never_drawn_from_the_same_numbers(tmp_path, monkeypatch):
    """Two generators with one seed would tie the label that is dropped to the image that is
    drawn."""
    seeds, manual_seed = [], torch.Generator.manual_seed

    class Watched(torch.Generator):
        def manual_seed(self, seed):
            seeds.append(seed)
            return manual_seed(self, seed)

    def quality(images, labels):
        return images.mean((1, 2, 3)).sigmoid()

    settings = tiny(batch=4, teacher_iters=1, gsim_iters=1, rl_iters=1)
    args = Namespace(out=tmp_path, resume=False)
    run = run_module.Run(args, settings, load_data(settings), torch.device("cpu"))
    monkeypatch.setattr(train_distill, "ValidationMetric", no_validation)
    monkeypatch.setattr(torch, "Generator", Watched)
    teacher = train_distill.train_teacher(run)
    student = train_distill.train_student(run, teacher, None)
    train_rl.train_policy(run, student, quality, no_monitor)
    assert len(seeds) == len(set(seeds)) > 8


def test_a_class_whose_name_is_no_utf_8_goes_through_all_stages(tmp_path):
    folder = os.fsencode(tmp_path / "photos") + b"/caf\xe9"
    os.makedirs(folder)
    for i in range(20):
        Image.effect_noise((8, 8), 50).save(os.fsdecode(folder + b"/%d.png" % i))
    argv = [*QUICK, "--data", tmp_path / "photos", "--out", tmp_path / "out"]
    code, said = child.finish("distill", argv, tmp_path / "output")
    assert code == 0, said
    to = ["--out", tmp_path / "a.png", "--files", tmp_path / "files", "--n", 2, "--device", "cpu"]
    code, said = child.finish("sample", [tmp_path / "out" / "student.pt", *to], tmp_path / "output")
    assert code == 0, said
    assert len(list((tmp_path / "files").iterdir())) == 2


# The last phase of RL -----------------------------------------------------------------------------


def test_at_the_end_the_schedule_learns_alone_from_four_times_the_prompts(tmp_path, monkeypatch):
    """At a learning rate that falls to 0, while the noise policy stays as it is."""
    data, seen, rates = load_data(tiny()), [], []
    student = maskrl.MAR(tiny(), data.classes, "student")
    step = torch.optim.AdamW.step

    def watched(optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args)

    def quality(images, labels):
        seen.append(len(labels))
        return images.mean((1, 2, 3)).sigmoid()

    def flat(module):
        return torch.cat([p.flatten() for p in module.parameters()])

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    policies = []
    for iters in (0, 2):
        settings = tiny(alpha=1.0, rl_iters=1, schedule_iters=iters)
        args = Namespace(out=tmp_path / str(iters), resume=False)
        run = run_module.Run(args, settings, data, torch.device("cpu"))
        training = train_rl.train_policy(run, student, quality, no_monitor)
        policies.append(training.model)
    assert seen == [8, 8, 32, 32]  # G = 4 of P = 2, then of 4 P
    epochs = settings.policy_epochs
    assert rates[-2 * epochs :] == [1e-2] * epochs + [5e-3] * epochs
    (before, start), (after, end) = (
        (flat(policy.noise_policy), flat(policy.schedule)) for policy in policies
    )
    assert torch.equal(before, after)
    assert not torch.equal(start, end)


# Wrong input --------------------------------------------------------------------------------------


def test_wrong_input_to_training_ends_in_one_line_and_exit_code_2(run, tmp_path, capsys):
    out, junk, empty = run[0], tmp_path / "junk.pt", tmp_path / "empty"
    student, teacher = out / "student.pt", out / "teacher.pt"
    junk.write_bytes(b"junk")
    empty.mkdir()
    foxes = make_folder(tmp_path / "foxes", ["fox"])
    new = ["--out", tmp_path / "new", "--device", "cpu"]
    rl, distill = train_rl.main, train_distill.main
    cases = [
        (rl, ["--data", tmp_path / "missing", *new], "missing"),
        (rl, ["--data", empty, *new], "empty"),
        (distill, ["--image-size", 10, *new], "--image-size 10 must be a multiple of --patch 4"),
        (distill, ["--steps", 17, *new], "--steps 17"),
        (distill, ["--denoise-steps", 1, *new], "--denoise-steps 1"),
        (distill, ["--label-dropout", 2, *new], "--label-dropout 2.0 must be below 1"),
        (distill, ["--teacher-lr", -1, *new], "--teacher-lr -1.0 must be above 0"),
        (distill, ["--teacher-lr", "inf", *new], "--teacher-lr inf must be a finite number"),
        (distill, ["--threads", 0, *new], "--threads 0 must lie in 1"),
        (distill, ["--teacher", student, *new], "is a student; a teacher is needed"),
        (
            distill,
            ["--teacher", teacher, "--width", 64, *new],
            "--width is fixed by the checkpoint",
        ),
        (distill, ["--teacher", teacher, "--preset", "tiny", *new], "--preset tiny: the settings"),
        (
            distill,
            ["--teacher", teacher, "--data", foxes, "--cache", tmp_path / "cache", *new],
            f"--data {foxes} has classes that the checkpoint does not know: fox",
        ),
        (distill, ["--out", out, "--device", "cpu"], "exists: --resume"),
        (rl, ["--student", junk, *new], "junk.pt is not a checkpoint"),
        (
            rl,
            ["--student", student, "--guidance", 3, *new],
            "--guidance is fixed by the checkpoint",
        ),
        (rl, ["--student", student, "--teacher", tmp_path / "typo.pt", *new], "no checkpoint"),
        (rl, ["--out", out, "--resume", "--teacher-lr", 1, *CPU], "--teacher-lr is fixed"),
        (rl, ["--group", 1, *new], "--group 1 must be at least 2"),
        (rl, ["--rl-iters", -1, *new], "--rl-iters -1 must be at least 0"),
        (rl, ["--rl-iters", 0, "--no-learn-steps", *new], "leaves nothing to learn"),
        (rl, ["--rl-iters", 0, "--method", "backprop", *new], "leaves nothing to learn"),
        (rl, ["--reward", "clp", *new], "--reward clp: expected"),
        (rl, ["--reward", "clip", "--features", "clip", *new], "the judge must not look as"),
        (rl, ["--reward", "clip=2", "fit", "--features", "clip", *new], "must not look as"),
        (rl, ["--reward", "clip=0.7", "fit=no", *new], "--reward fit=no: the weight must be"),
        (rl, ["--held-out", "embedded", *new], "--held-out embedded: --reward names it, too"),
    ]
    for main, argv, expected in cases:
        assert expected in error_of(main, argv, capsys), argv
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options, said",
    [
        ("--width 16384 --depth 200", "to train this model takes at least 2"),
        (
            "--image-size 4096 --per-class 1000000",
            "out of memory: try --checkpointing or a smaller",
        ),
        ("--depth 201", "--depth 201 must be at most 200"),
        ("--out setup.py/out", "--out setup.py/out cannot be written: Not a directory"),
        ("--clip-weights nope.pt", "only --reward clip and --features clip ask CLIP"),
    ],
)
def test_what_cannot_be_is_refused_before_long_work(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.py").write_text("")
    code = 1 if "out of memory" in said else 2
    argv = ["--out", "out", "--device", "cpu", "--heads", 1, "--judge-iters", 1, *options.split()]
    assert said in error_of(train_rl.main, argv, capsys, code)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reward", ["os:system", "evil:function"])
def test_a_checkpoint_makes_no_script_import_anything(run, tmp_path, monkeypatch, capsys, reward):
    """The reward was once a setting, and every checkpoint carries its settings: a checkpoint from
    the network could have named a module and a function, to be imported and called."""
    imported = []
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib, "import_module", imported.append)
    content = torch.load(run[0] / "student.pt", weights_only=True)
    content["settings"]["reward"] = reward
    torch.save(content, tmp_path / "student.pt")
    said = "student.pt has settings that this version does not know: reward"
    assert said in error_of(sample.main, ["student.pt", *CPU], capsys)
    assert said in error_of(train_rl.main, ["--student", "student.pt", *CPU], capsys)
    (tmp_path / "run").mkdir()
    (tmp_path / "student.pt").rename(tmp_path / "run" / "student.pt")
    argv = ["--out", "run", "--teacher", run[0] / "teacher.pt", "--resume", *CPU]
    assert said in error_of(train_distill.main, argv, capsys)
    assert not imported
    assert "evil" not in sys.modules


# Interruptions ------------------------------------------------------------------------------------


def weights(path):
    content = read_checkpoint(path)
    values = [v for name in ("model", "model_ema") for v in content[name].values()]
    return torch.cat([v.flatten().float() for v in values])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "figure_class", no_matplotlib)
        train_rl.main([*SHORT, "--out", str(out)])
    return out


@pytest.mark.parametrize("kind, step", [("teacher", 5), ("student", 3), ("policy", 1)])
def test_an_interrupted_run_resumes_to_the_very_same_weights(
    whole, tmp_path, monkeypatch, kind, step
):
    """The power goes off in the middle of a stage, some steps after a checkpoint; the settings
    come from the run."""
    log, every = run_module.Stage.log, 1 if kind == "policy" else 2

    def interrupted(stage, metrics):
        if stage.name == kind and stage.step == step:
            raise KeyboardInterrupt
        log(stage, metrics)

    def every_other_step(stage):
        return (stage.step + 1) % every == 0

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Stage, "log", interrupted)
        patch.setattr(run_module.Stage, "time_to_save", every_other_step)
        with pytest.raises(KeyboardInterrupt):
            train_rl.main([*SHORT, "--out", str(tmp_path)])
    monkeypatch.setattr(pictures, "figure_class", no_matplotlib)
    last = read_checkpoint(tmp_path / f"{kind}.pt")
    assert 0 < last["step"] <= step
    assert last["training"]
    train_rl.main(["--out", str(tmp_path), "--resume", *CPU])
    for name in KINDS:
        assert torch.equal(weights(whole / f"{name}.pt"), weights(tmp_path / f"{name}.pt")), name


def test_a_non_finite_loss_stops_with_the_step_and_keeps_the_last_good_weights(
    tmp_path, monkeypatch, capsys
):
    denoising_loss, calls = maskrl.denoising_loss, []

    def broken_at_the_fourth(*args):
        calls.append(args)
        return denoising_loss(*args) * (math.nan if len(calls) == 4 else 1.0)

    monkeypatch.setattr(maskrl, "denoising_loss", broken_at_the_fourth)
    error = error_of(train_distill.main, [*SHORT, "--out", tmp_path], capsys, code=1)
    assert "teacher, step 3: the loss" in error
    assert read_checkpoint(tmp_path / "teacher.pt")["step"] == 3
    assert weights(tmp_path / "teacher.pt").isfinite().all()


def test_rl_that_diverges_says_so_whatever_its_schedule_draws_from(tmp_path, capsys):
    absurd = "--action", "x", "--rl-lr", "1000", "--rl-iters", "12"
    error = error_of(train_rl.main, [*SHORT, *absurd, "--out", tmp_path], capsys, code=1)
    assert "policy, step" in error and "from nan to nan" in error
    assert "with a lower learning rate" in error


def results(out):
    """All that a run leaves behind except times and pictures: weights, log and metrics."""
    found = {"log": without_times(read_log(out))}
    found["metrics"] = without_times(json.loads((out / "metrics.json").read_text()))
    for kind in KINDS:
        if (out / f"{kind}.pt").exists():
            content = torch.load(out / f"{kind}.pt", weights_only=True)
            for part in ("model", "model_ema"):
                found |= {(kind, part, k): v.tolist() for k, v in content[part].items()}
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """uninterrupted(script, *options) -> the folder of a run that nobody stops, and the seconds it
    took."""
    runs = {}

    def run(script, *options):
        if (script, options) not in runs:
            out = tmp_path_factory.mktemp(script)
            child.finish("sample", ["--help"], out / "output")  # starts the server
            began = time.perf_counter()
            argv = [*QUICK, *options, "--out", out]
            code, output = child.finish(script, argv, out / "output", save_often=True)
            assert code == 0, output
            runs[script, options] = out, time.perf_counter() - began
        return runs[script, options]

    return run


def stop_and_go_on(script, moments, out, seconds, *options):
    """A run that gets a signal (number, share of its time) for each of the `moments`, and is
    started again by the same command each time, and then until it is finished: the exit codes."""
    codes = []
    argv = [*QUICK, *options, "--out", out, "--resume"]
    for number, share in moments:
        process = child.start(script, argv, out.parent / "output", save_often=True)
        process.join(share * seconds)
        if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        codes.append(process.exitcode)
    code, output = child.finish(script, argv, out.parent / "output", save_often=True)
    assert code == 0, output
    return codes


def check_kills(script, moments, uninterrupted, tmp_path, *options):
    whole, seconds = uninterrupted(script, *options)
    codes = stop_and_go_on(script, moments, tmp_path / "out", seconds, *options)
    for (number, _), code in zip(moments, codes):
        assert code in (0, EXITS[number]), codes  # 0: it was faster
    assert results(tmp_path / "out") == results(whole)
    assert not list((tmp_path / "out").glob("*.tmp"))
    return codes


def test_a_run_that_is_stopped_twice_ends_like_one_that_is_not(uninterrupted, tmp_path):
    """Bit-identical weights, and log and metrics except times."""
    moments = [(signal.SIGTERM, 0.3), (signal.SIGKILL, 0.4)]
    check_kills("rl", moments, uninterrupted, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("script", ["distill", "rl"])
def test_a_run_that_is_stopped_at_random_ends_like_one_that_is_not(
    uninterrupted, tmp_path, script, seed
):
    """Two stops each. A checkpoint is written after nearly every step, so that some of them come
    while one is."""
    dice = random.Random(seed)
    numbers = dice.choices(list(EXITS), k=2)
    moments = [(number, dice.uniform(0.02, 0.9)) for number in numbers]
    longer = "--teacher-iters 24 --gsim-iters 8 --rl-iters 8 --schedule-iters 4".split()
    codes = check_kills(script, moments, uninterrupted, tmp_path, *longer)
    print(f"{script}: {codes}")


def test_a_signal_says_where_the_training_is_saved_and_how_it_goes_on(tmp_path):
    """At once, not only when it was time."""
    out = tmp_path / "out"
    process = child.start("distill", [*FOREVER, "--out", out], tmp_path / "output")
    at_work(out, lines=1)
    assert not (out / "teacher.pt").exists()
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    step = read_checkpoint(out / "teacher.pt")["step"]
    said = (tmp_path / "output").read_text().splitlines()[-1]
    assert f"teacher is saved in {out}/teacher.pt after {step} steps" in said
    assert said.endswith("the same command with --resume continues")
    assert process.exitcode == 143


def test_a_folder_belongs_to_one_run_until_it_ends(tmp_path, capsys):
    out = tmp_path / "out"
    process = child.start("distill", [*FOREVER, "--out", out], tmp_path / "output")
    at_work(out, lines=1)
    argv = [*QUICK, "--out", out, "--resume"]
    assert f"another run is at work in --out {out}" in error_of(train_rl.main, argv, capsys)
    process.kill()
    process.join()
    run_module.lock_run_dir(out).release()


def test_a_report_of_the_student_keeps_what_rl_had_reported(uninterrupted, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted("rl")[0], out)
    before = json.loads((out / "metrics.json").read_text())
    code, said = child.finish("distill", [*QUICK, "--out", out, "--resume"], tmp_path / "output")
    after = json.loads((out / "metrics.json").read_text())
    assert code == 0, said
    assert after["rl"] == before["rl"]
    assert after["rows"]["policy"] == before["rows"]["policy"]
    assert after["rows"]["student"]["frechet"] == before["rows"]["student"]["frechet"]
    assert after["rows"]["student"] != before["rows"]["student"]  # it was timed again
    assert after["minutes"] == before["minutes"]  # nothing was trained


# The files themselves -----------------------------------------------------------------------------

SCRIPTS = (train_distill, train_rl)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_script_has_help(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert script.__doc__.splitlines()[0] in text
    assert "--device" in text
    assert "eps = eps_null + s (eps_class - eps_null)" in " ".join(text.split())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_can_be_called_where_output_is_no_stream(script, monkeypatch, tmp_path):
    """As in a notebook, where `stream.reconfigure` once was an AttributeError."""

    class NotebookStream:
        def write(self, text):
            pass

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", NotebookStream())
    with pytest.raises(SystemExit) as stop:
        script.run_script(script.main, ["--help"])
    assert stop.value.code == 0
