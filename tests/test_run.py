"""Training loop, log and folder of a run: interrupted, stopped, started again, diverging."""

import importlib.util
import json
import math
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import full_disk, random_model, tiny
from helpers_child import without_times
from helpers_files import changed

from maskrl import MAR, Distillation, PolicyGradient, TeacherTraining, rng
from workbench import run as run_module
from workbench.data import load_data
from workbench.errors import InputError, Stopped
from workbench.files import read_checkpoint
from workbench.progress import report_work, work
from workbench.run import Run, append_log, lock_run_dir, read_log, trim_log
from workbench.signals import HeldSignals

CLASSES = ["a", "b", "c"]


@cache
def shapes():
    return load_data(tiny())


def a_run(out, resume=False, **args):
    """A Run in the folder `out`."""
    options = {"vae": None, "features": "own", "held_out": None, "teacher": None, "student": None}
    options |= {"preset": None, "quick": False}
    data = shapes()
    return Run(
        Namespace(out=out, resume=resume, **options | args), tiny(), data, torch.device("cpu")
    )


@pytest.fixture
def save_every_step(monkeypatch):
    monkeypatch.setattr(run_module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(run_module, "SAVE_COST", 0.0)


def update_teacher(training, step):
    x, labels = torch.randn(4, 16, 12, generator=rng(step)), torch.tensor([0, 1, 2, 0])
    return training.update(step, x, labels, 0)


def train(training, out, resume=False, update=update_teacher, measure=None, **args):
    """The loop of the scripts, on random tokens."""
    with a_run(out, resume, **args).stage(training, measure) as stage:
        for step in stage:
            stage.log(update(training, step))
    return training


def a_teacher(**overrides):
    torch.manual_seed(0)
    return TeacherTraining(tiny(**overrides), CLASSES)


def interrupted_at(last, steps=None):
    """An update that is interrupted before the step `last`, as if the power went off; `steps`
    collects those that it did."""

    def update(training, step):
        if step == last:
            raise KeyboardInterrupt
        if steps is not None:
            steps.append(step)
        return update_teacher(training, step)

    return update


# Checkpoints --------------------------------------------------------------------------------------


def test_training_keeps_the_weights_with_the_best_validation(tmp_path):
    """The metric is lowest after the fourth of ten updates; those weights come back, though
    training went on."""
    model = random_model("student")
    training = SimpleNamespace(model=model, ema=model, state={}, iters=10)
    bias = model.decoder_norm.bias

    def update(_, step):
        bias.data.fill_(step)
        return {"loss": 0.0}

    def measure(ema):
        return {"validation": abs(ema.decoder_norm.bias[0].item() - 3.2)}

    train(training, tmp_path, update=update, measure=measure)
    assert (bias == 3).all()
    saved = read_checkpoint(tmp_path / "student.pt")
    assert (saved["model_ema"]["decoder_norm.bias"] == 3).all()
    assert sum("validation" in line for line in read_log(tmp_path)) == 10


def test_a_finished_stage_keeps_no_state_to_resume_from(tmp_path, save_every_step):
    with pytest.raises(KeyboardInterrupt):
        train(a_teacher(), tmp_path, update=interrupted_at(4))
    content = read_checkpoint(tmp_path / "teacher.pt")
    assert content["step"] == 4
    assert set(content["training"]) == {*a_teacher().state, "record"}
    assert len(a_teacher().state) == 4  # two optimizers and their learning rates
    train(a_teacher(), tmp_path, resume=True)
    content = read_checkpoint(tmp_path / "teacher.pt")
    assert (content["step"], content["training"]) == (6, None)
    assert [line["step"] for line in read_log(tmp_path)] == list(range(6))


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_training_ends_with_the_very_same_weights(tmp_path, save_every_step):
    whole = train(a_teacher(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(a_teacher(), tmp_path / "cut", update=interrupted_at(3))
    steps, other = [], TeacherTraining(tiny(), CLASSES)  # of other first weights
    resumed = train(other, tmp_path / "cut", True, interrupted_at(None, steps))
    assert steps == [3, 4, 5]
    assert same_weights(resumed.model, whole.model)
    assert same_weights(resumed.ema, whole.ema)


def test_a_student_goes_on_with_its_auxiliary_network_and_a_policy_with_its_optimizers(settings):
    """The former must follow the student's own samples; as the teacher it would know others."""
    state = Distillation(random_model(), settings()).state
    assert len(state) == 5
    assert sum(isinstance(value, MAR) for value in state.values()) == 1
    training = PolicyGradient(random_model("student"), settings(), None, torch.zeros(()))
    assert set(training.state) == {"noise", "schedule"}


@contextmanager
def clock_of(monkeypatch, seconds_per_save):
    """A clock that only `advance` and saving move on, and the steps at which files are written."""
    now, saved = [0.0], []

    def write_checkpoint(path, model, ema, step, training):
        saved.append(step)
        now[0] += seconds_per_save

    def advance(seconds):
        now[0] += seconds

    monkeypatch.setattr(run_module, "write_checkpoint", write_checkpoint)
    monkeypatch.setattr(run_module.time, "monotonic", lambda: now[0])
    yield advance, saved


@pytest.mark.parametrize(
    "seconds_per_save, expected",
    [(0.1, [7, 14, 21, 28, 30]), (5.0, [7, 18, 29, 30]), (1e3, [7, 30])],
)
def test_checkpoints_are_written_by_time_and_cost_a_twentieth_of_it(
    tmp_path, monkeypatch, seconds_per_save, expected
):
    """Once one was written every 250 steps, whatever that cost: of MAR-H 30 GB each time."""
    with clock_of(monkeypatch, seconds_per_save) as (advance, saved):

        def update(training, step):
            advance(10)  # a minute is over after the seventh, 100 seconds after the eleventh
            return {"loss": 0.0}

        train(a_teacher(teacher_iters=30), tmp_path, update=update)
    assert saved == expected


def test_some_200_steps_of_a_stage_are_logged_and_the_last(tmp_path):
    def update(training, step):
        return {"loss": float(step)}

    train(a_teacher(teacher_iters=1001), tmp_path, update=update)
    assert [line["step"] for line in read_log(tmp_path)] == list(range(0, 1001, 5))
    (tmp_path / "teacher.pt").unlink()
    train(a_teacher(teacher_iters=1003), tmp_path, update=update)
    assert read_log(tmp_path)[-1] == read_log(tmp_path)[-1] | {"step": 1002, "loss": 1002.0}


def refused_states(tmp_path, dice, n):
    """Resume from n checkpoints whose training state was changed; how many were refused."""
    path, refused = tmp_path / "teacher.pt", 0
    with pytest.raises(KeyboardInterrupt):
        train(a_teacher(teacher_iters=4), tmp_path, update=interrupted_at(2))
    content = torch.load(path, weights_only=True)
    for _ in range(n):
        other, what = changed({"training": content["training"]}, dice)
        torch.save(content | {"training": None} | other, path)
        try:
            train(a_teacher(teacher_iters=4), tmp_path, resume=True)
        except (InputError, FloatingPointError):
            refused += 1
        except Exception as error:
            raise AssertionError(what) from error
    return refused


def test_a_training_resumes_from_its_own_state_alone(tmp_path, save_every_step):
    assert refused_states(tmp_path, random.Random(0), 20) > 10


@pytest.mark.long
def test_a_training_resumes_from_no_changed_state(tmp_path, save_every_step):
    print(f"{refused_states(tmp_path, random.Random(1), 300)} of 300 refused")


def test_a_checkpoint_of_more_steps_than_the_stage_has_is_refused(tmp_path):
    train(a_teacher(), tmp_path)
    with pytest.raises(InputError, match="teacher.pt is of step 6 of 5: --resume cannot go on"):
        train(a_teacher(teacher_iters=5), tmp_path, resume=True)


# What is not finite -------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_is_named_and_what_led_to_it_is_saved(
    tmp_path, save_every_step
):
    training, calls = a_teacher(), []

    def spoilt(gradient):
        calls.append(0)
        return gradient * (math.inf if len(calls) == 4 else 1.0)

    training.model.decoder_norm.bias.register_hook(spoilt)
    with pytest.raises(FloatingPointError) as error:
        train(training, tmp_path)
    said, path = str(error.value), tmp_path / "teacher.pt"
    assert said.startswith("teacher, step 3: the loss")
    assert "the gradient of decoder_norm.bias" in said
    assert f"{path} holds the good weights after 3 steps, and --resume repeats" in said

    again, steps = a_teacher(), []
    with pytest.raises(KeyboardInterrupt):
        train(again, tmp_path, True, interrupted_at(3, steps))
    assert steps == []  # it goes on with step 3
    assert same_weights(again.model, training.model)  # those that met the gradient


def test_what_led_to_a_non_finite_loss_is_saved_though_no_checkpoint_was_due(tmp_path):
    def nan_at_three(training, step):
        if step == 3:
            raise FloatingPointError("the loss is nan")
        return update_teacher(training, step)

    training = a_teacher()
    with pytest.raises(FloatingPointError, match="step 3: the loss is nan.*after 3 steps"):
        train(training, tmp_path, update=nan_at_three)
    saved = read_checkpoint(tmp_path / "teacher.pt")
    assert saved["step"] == 3
    assert all(torch.equal(v, saved["model"][k]) for k, v in training.model.state_dict().items())


@pytest.mark.parametrize("every_step, saved", [(False, 0), (True, 2)])
def test_what_half_of_a_step_changed_is_not_saved(tmp_path, monkeypatch, every_step, saved):
    """Resumed, it would not repeat what led to the error."""

    def half_a_step(training, step):
        if step == 2:
            training.optimizers["adamw"].step()
            raise FloatingPointError("the loss is nan")
        return update_teacher(training, step)

    monkeypatch.setattr(run_module, "SAVE_SECONDS", 0.0 if every_step else 60.0)
    monkeypatch.setattr(run_module, "SAVE_COST", 0.0)
    path = tmp_path / "teacher.pt"
    said = f"after {saved} steps" if saved else "Nothing was saved; the same command repeats"
    with pytest.raises(FloatingPointError, match=said):
        train(a_teacher(), tmp_path, update=half_a_step)
    assert path.exists() == bool(saved)
    assert not saved or read_checkpoint(path)["step"] == saved


def test_weights_that_are_not_finite_are_never_saved(tmp_path, save_every_step):
    """After a step that is too large, of a gradient that is not."""
    training = a_teacher()
    training.optimizers = {"sgd": torch.optim.SGD(training.model.parameters(), 3e38, 0, 0, 10.0)}
    with pytest.raises(FloatingPointError, match=r"teacher, step 0: .* \(fake_latent"):
        train(training, tmp_path)
    assert not all(p.isfinite().all() for p in training.model.parameters())
    assert not (tmp_path / "teacher.pt").exists()


# Signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_step_finish_saves_it_and_says_so(tmp_path, number):
    """The end of the terminal, too."""

    def stopped_at_two(training, step):
        if step == 2:
            signal.raise_signal(number)
        return update_teacher(training, step)

    before = [signal.getsignal(n) for n in (signal.SIGINT, number)]
    with pytest.raises(Stopped) as stopped:
        train(a_teacher(), tmp_path, update=stopped_at_two)
    noted, work = stopped.value.args
    assert noted == number
    assert work.startswith(f"teacher is saved in {tmp_path}/teacher.pt after 3 steps")
    assert work.endswith("the same command with --resume continues")
    assert read_checkpoint(tmp_path / "teacher.pt")["step"] == 3
    assert [signal.getsignal(n) for n in (signal.SIGINT, number)] == before


def test_under_nohup_the_end_of_the_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with HeldSignals() as held:
            signal.raise_signal(signal.SIGHUP)
        assert not held.first
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_does_not_wait_but_several_processes_do(tmp_path):
    """These may get each signal twice, from the machine and from torchrun."""
    with pytest.raises(Stopped, match="the second signal"):
        with HeldSignals() as held:
            signal.raise_signal(signal.SIGTERM)
            assert held.noted == [signal.SIGTERM]
            signal.raise_signal(signal.SIGTERM)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with HeldSignals() as held:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
    finally:
        dist.destroy_process_group()
    assert held.noted == [signal.SIGTERM, signal.SIGTERM]


def stopped_in(out, resume, signals_at, measured):
    """Ten updates of a student, each measured; a signal in the measurements `signals_at`."""
    student = random_model("student")
    training = SimpleNamespace(model=student, ema=student, state={}, iters=10)

    def update(_, step):
        student.decoder_norm.bias.data.fill_(step)
        return {"loss": 0.0}

    def measure(ema):
        step = int(ema.decoder_norm.bias[0])
        measured.append(step)
        if step in signals_at:
            signal.raise_signal(signal.SIGINT)
        return {"validation": abs(step - 8.2)}

    return train(training, out, resume, update, measure)


@pytest.mark.parametrize("at", [4, 8, 9])
def test_a_signal_ends_a_measurement_and_the_resumed_run_makes_up_for_it(tmp_path, capsys, at):
    """A due measurement once came first, and Ctrl-C took two minutes without a word."""
    stopped_in(tmp_path / "whole", False, [], [])
    with pytest.raises(Stopped, match=f"student is saved in .* after {at + 1} steps"):
        stopped_in(tmp_path / "cut", False, [at], [])
    assert "stopping after this step" in capsys.readouterr().err
    assert sum("validation" in line for line in read_log(tmp_path / "cut")) == at
    again = []
    training = stopped_in(tmp_path / "cut", True, [], again)
    assert again == list(range(at, 10))
    assert (training.ema.decoder_norm.bias == 8).all()
    whole, cut = (without_times(read_log(tmp_path / name)) for name in ("whole", "cut"))
    assert cut == whole and sum("validation" in line for line in cut) == 10
    assert read_checkpoint(tmp_path / "cut" / "student.pt")["training"] is None


def test_a_signal_before_a_measurement_leaves_it_to_the_resumed_run(tmp_path):
    measured = []

    def update(training, step):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return update_teacher(training, step)

    def measure(ema):
        measured.append(0)
        return {"validation": 1.0}

    with pytest.raises(Stopped, match="after 2 steps"):
        train(a_teacher(teacher_iters=2), tmp_path, update=update, measure=measure)
    assert len(measured) == 1
    train(a_teacher(teacher_iters=2), tmp_path, True, measure=measure)
    assert len(measured) == 2


def test_a_stage_leaves_no_hooks_behind(tmp_path):
    """Those of the optimizers once stayed, and with them all that they held."""
    training = train(a_teacher(), tmp_path)
    for optimizer in training.optimizers.values():
        assert not optimizer._optimizer_step_post_hooks


def test_a_run_knows_the_minutes_of_the_stages_that_it_trained(tmp_path):
    run = a_run(tmp_path)
    with run.stage(a_teacher()) as stage:
        for _ in stage:
            stage.log({"loss": 0.0})
            time.sleep(0.01)
    assert 6 * 0.01 / 60 < run.minutes["teacher"] < 1
    again = a_run(tmp_path, resume=True)
    with again.stage(a_teacher()) as stage:
        assert list(stage) == []
    assert again.minutes == {}


def test_a_run_says_once_how_long_it_will_take(tmp_path, monkeypatch, capsys):
    """After its first minute; with seven seconds for each of the teacher's updates."""
    run, settings = a_run(tmp_path), tiny(teacher_iters=30)
    run.settings = settings
    with clock_of(monkeypatch, 0.0) as (advance, _):
        run.began = 0.0
        with run.stage(a_teacher(teacher_iters=30)) as stage:
            for _ in stage:
                advance(7)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "about" in line]
    images = work("teacher", settings) + work("student", settings)
    images += report_work(9 * shapes().test.balanced_half(settings.judge_n), settings, False)
    minutes = 7 * images / settings.batch / 60
    assert said.startswith(f"this run will take about {minutes:.0f} minutes in all: a rough")
    assert 5 < minutes < 15


def test_the_rest_of_a_stage_costs_what_is_left_of_it():
    settings = tiny(rl_iters=3, schedule_iters=2, teacher_iters=4)
    for stage, iters in {"teacher": 4, "student": 4, "policy": 5}.items():
        left = [work(stage, settings, step) for step in range(iters + 1)]
        assert left == sorted(left, reverse=True) and left[-1] == 0
    per_update = [work("policy", settings, i) - work("policy", settings, i + 1) for i in range(5)]
    assert per_update[3] == pytest.approx(4 * per_update[0])


# TensorBoard --------------------------------------------------------------------------------------

has_tensorboard = importlib.util.find_spec("tensorboard") is not None


@pytest.mark.skipif(has_tensorboard, reason="TensorBoard is installed")
def test_without_tensorboard_its_option_says_what_to_install(tmp_path):
    with pytest.raises(InputError, match="--tensorboard: it is not installed: pip install tensorb"):
        a_run(tmp_path, tensorboard=True)


@pytest.mark.skipif(not has_tensorboard, reason="TensorBoard is not installed")
def test_tensorboard_shows_every_point_once_though_a_run_was_resumed(tmp_path, save_every_step):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def cut(training, step):
        if step == 4:
            raise KeyboardInterrupt
        return {"loss": float(step)}

    def whole(training, step):
        return {"loss": float(step)}

    with pytest.raises(KeyboardInterrupt):
        train(a_teacher(), tmp_path, update=cut, tensorboard=True)
    content = torch.load(tmp_path / "teacher.pt", weights_only=True)
    torch.save(content | {"step": 2}, tmp_path / "teacher.pt")  # as if steps had been lost
    train(a_teacher(), tmp_path, True, whole, tensorboard=True)
    shown = EventAccumulator(str(tmp_path / "tensorboard" / "teacher")).Reload().Scalars("loss")
    assert [(point.step, point.value) for point in shown] == [(i, float(i)) for i in range(6)]


# Log ----------------------------------------------------------------------------------------------


def test_the_log_reads_back(tmp_path):
    assert read_log(tmp_path) == []
    line = {"stage": "teacher", "step": 3, "loss": 0.5}
    append_log(tmp_path, line)
    assert read_log(tmp_path) == [line]


def test_a_damaged_line_of_the_log_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'null\n\xff\n{"step": 3}\n')
    assert read_log(tmp_path) == [{"step": 3}]


def test_a_log_loses_a_line_that_was_cut_and_those_that_come_again(tmp_path):
    lines = [{"stage": s, "step": i} for s in ("teacher", "student") for i in range(4)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"stage": "student", "st')
    assert read_log(tmp_path) == lines
    trim_log(tmp_path, "student", 2)
    assert read_log(tmp_path) == lines[:6]
    append_log(tmp_path, lines[6])
    assert (tmp_path / "log.jsonl").read_text() == text[: -len(json.dumps(lines[7])) - 1]


def test_numbers_that_json_does_not_know_are_null_in_the_log(tmp_path):
    append_log(tmp_path, {"stage": "teacher", "step": 0, "loss": math.nan})
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None


@pytest.mark.parametrize("left", [0, 100, 20_000])
def test_a_full_disk_names_the_log_and_a_cut_line_does_not_spoil_the_next_one(tmp_path, left):
    log = tmp_path / "log.jsonl"
    with full_disk(left):
        with pytest.raises(InputError, match=f"{log} cannot be written: File too large"):
            append_log(tmp_path, {"stage": "teacher", "text": 20_000 * "x"})
    trim_log(tmp_path, "teacher", 0)
    append_log(tmp_path, {"stage": "teacher", "step": 0})
    assert read_log(tmp_path) == [{"stage": "teacher", "step": 0}]


# Folder -------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from workbench.run import lock_run_dir
lock = lock_run_dir(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(100)
"""


def test_a_folder_belongs_to_one_process_until_that_ends(tmp_path):
    """Two of them once overwrote each other's checkpoints and wrote one log. A killed one leaves no
    lock behind."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=f"another run is at work in --out {out}: wait"):
            lock_run_dir(out)
        other.kill()
    lock_run_dir(out).release()


def test_before_there_is_a_checkpoint_a_resumed_run_needs_the_same_settings(tmp_path):
    """A run stopped while its judge was trained once went on with any others."""
    with a_run(tmp_path):
        (tmp_path / "judge.pt").touch()
    run = a_run(tmp_path, resume=True)
    run.settings = replace(run.settings, checkpointing=True)
    with run:
        pass
    run.settings = replace(run.settings, gsim_iters=1234)
    begun_with = "was begun with --gsim-iters .*, not 1234: give the same options again"
    with pytest.raises(InputError, match=begun_with), run:
        pass
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(InputError, match="settings.json cannot be read: delete it"), run:
        pass


def test_the_lock_ends_with_the_run_and_not_with_the_process(tmp_path):
    """A notebook that had trained once blocked its folder for as long as it was open."""
    with a_run(tmp_path):
        with pytest.raises(InputError, match="another run is at work"):
            lock_run_dir(tmp_path)
    lock_run_dir(tmp_path).release()
    with pytest.raises(KeyboardInterrupt), a_run(tmp_path):
        raise KeyboardInterrupt
    with a_run(tmp_path):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_run_that_is_stopped_as_it_begins_keeps_no_lock(tmp_path, monkeypatch, error):
    def stopped(*_):
        raise error

    monkeypatch.setattr(run_module, "save_run_args", stopped)
    with pytest.raises(error), a_run(tmp_path):
        pass
    lock_run_dir(tmp_path).release()


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/out cannot be written: Not a directory"):
        lock_run_dir(tmp_path / "file" / "out")


def test_a_resumed_run_has_the_reward_with_which_it_was_begun(tmp_path):
    with a_run(tmp_path, reward={"embedded": 1.0}):
        pass
    (tmp_path / "teacher.pt").write_text("")
    with pytest.raises(InputError, match="was begun with --reward embedded, not fit"):
        with a_run(tmp_path, resume=True, reward={"fit": 1.0}):
            pass
    with a_run(tmp_path, resume=True):  # as train_distill.py, which has no reward
        pass
    kept = json.loads((tmp_path / "choices.json").read_text())
    assert kept["reward"] == "embedded"
    (tmp_path / "choices.json").write_text("[1]")
    with pytest.raises(InputError, match="choices.json cannot be read .*: delete it"):
        with a_run(tmp_path, resume=True):
            pass
    lock_run_dir(tmp_path).release()  # no error keeps the folder locked
