"""The command line of the training scripts, and what is checked before long work."""

import json
import math
import os
import sys
from argparse import Namespace
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SHORT, random_model, tiny
from PIL import Image

import train_distill
import train_rl
from maskrl import MAR
from workbench import options
from workbench.data import Data, load_data
from workbench.errors import InputError
from workbench.files import read_checkpoint, write_checkpoint
from workbench.options import (
    add_device,
    add_settings,
    check_memory,
    clip_options,
    cpu_quota,
    describe,
    find_device,
    named_classes,
    prepare,
    settings_from,
    training_parser,
    usual_preset,
    usual_threads,
)
from workbench.settings import MODEL_SETTINGS, RunSettings, documented_fields, flag, preset
from workbench.summary import QUICK, shortened

CPU, GPU, APPLE = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
WRITTEN = ["student.pt", "teacher.pt"]


def parse(*argv):
    parser = training_parser("What the script does.")
    add_device(parser)
    add_settings(parser)
    return parser.parse_args([str(a) for a in argv])


# Device and threads -------------------------------------------------------------------------------


@pytest.fixture
def threads():
    """Puts back the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def machine(monkeypatch, reported=16, allowed=16, quota=math.inf, variable=None):
    """A machine that reports so many cores and lets this process use some of them."""
    monkeypatch.setattr(os, "cpu_count", partial(int, reported))
    cores = {reported - 1 - i for i in range(allowed)}
    monkeypatch.setattr(os, "sched_getaffinity", {0: cores}.get, raising=False)
    monkeypatch.setattr(options, "cpu_quota", partial(float, quota))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)


@pytest.mark.parametrize("cores, expected", [(1, 1), (2, 1), (8, 4), (16, 8), (96, 8)])
def test_a_script_takes_half_of_the_cores_and_at_most_eight(monkeypatch, threads, cores, expected):
    """On all cores of a large machine, small tensors once took several times as long."""
    machine(monkeypatch, reported=cores, allowed=cores)
    find_device("cpu")
    assert torch.get_num_threads() == expected
    find_device("cpu", threads=3)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    "limits, expected",
    [
        ({"allowed": 1}, 1),
        ({"allowed": 4}, 2),
        ({"quota": 1.0}, 1),
        ({"quota": 0.5}, 1),
        ({"quota": 5.5}, 3),
        ({"variable": "1"}, 1),
        ({"variable": "6", "allowed": 1}, 6),  # somebody wants it so
        ({"variable": "3,2"}, 3),
        *(({"variable": text}, 8) for text in ("", "0", "-1", "many", "1e3", "4096")),
    ],
)
def test_a_script_takes_no_more_threads_than_it_may_use(monkeypatch, threads, limits, expected):
    """In a container of one core it once took eight, and was half as fast."""
    machine(monkeypatch, **limits)
    assert usual_threads() == expected
    find_device("cpu")
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize("cores, expected", [(None, 1), (8, 4)])
def test_some_systems_do_not_say_which_cores_may_be_used(monkeypatch, threads, cores, expected):
    machine(monkeypatch)
    monkeypatch.delattr(os, "sched_getaffinity")

    def cpu_count():
        return cores

    monkeypatch.setattr(os, "cpu_count", cpu_count)
    assert usual_threads() == expected


@pytest.mark.parametrize(
    "text, expected",
    [("150000 100000\n", 1.5), ("max 100000\n", math.inf), ("", math.inf), (None, math.inf)],
)
def test_the_limit_of_a_container_is_a_number_of_cores(monkeypatch, tmp_path, text, expected):
    monkeypatch.setattr(options, "CPU_MAX", tmp_path / "cpu.max")
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota() == expected


@pytest.mark.parametrize("n", [0, -1, 2000])
def test_no_threads_or_too_many_are_refused(n):
    with pytest.raises(InputError, match=f"--threads {n} must lie in 1"):
        find_device("cpu", n)


@pytest.mark.parametrize("name", ["tpu", "cpu:0", "cuda:x", "cuda:99x", ""])
def test_a_device_that_is_not_there_is_refused(threads, name):
    with pytest.raises(InputError, match=f"--device {name}: there is none here; there is .*cpu"):
        find_device(name)


@pytest.mark.parametrize(
    "cuda, mps, expected",
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_first_of_cuda_mps_and_cpu_is_found(monkeypatch, threads, cuda, mps, expected):
    def cuda_is_available():
        return cuda

    def mps_is_available():
        return mps

    monkeypatch.setattr(torch.cuda, "is_available", cuda_is_available)
    monkeypatch.setattr(torch.backends.mps, "is_available", mps_is_available)
    assert find_device().type == expected
    assert find_device("cpu").type == "cpu"


# Options ------------------------------------------------------------------------------------------


def test_every_setting_is_an_option_in_a_group_and_its_default_is_said(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for name, value in vars(RunSettings()).items():
        assert flag(name) in text
        assert f"(default: {value})" in text
    for section, _ in documented_fields().values():
        assert f" {section}: --" in text


def test_settings_are_absent_unless_they_are_given():
    args = vars(parse("--steps", 8, "--no-learn-steps", "--alpha", 1, "--order", "random"))
    given = {field.name: args[field.name] for field in fields(RunSettings) if field.name in args}
    assert given == {"steps": 8, "learn_steps": False, "alpha": 1.0, "order": "random"}


@pytest.mark.parametrize("argv", [["--image", "8"], ["--order", "up"], ["--steps", "1.5"]])
def test_an_option_is_written_in_full_and_has_a_value_of_its_kind(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(*argv)


@pytest.mark.parametrize("text", ["-1e-3", "-0.001", "-.1e-2", "-1E-03", "-0.000_1e1"])
def test_a_negative_number_is_the_value_of_its_option(text):
    """Python before 3.14 takes -1e-3 for an option that there is not."""
    args = parse("--mean", text, "--scale=2", "--flip", "--alpha", "-1e2")
    assert (args.mean, args.scale, args.flip, args.alpha) == (-0.001, 2, True, -100)


def test_a_negative_number_that_is_no_number_is_refused_as_a_setting():
    args = parse("--mean", "-inf")
    with pytest.raises(InputError, match="--mean -inf must be a finite number"):
        settings_from(args, CPU, None, resume=False)


@pytest.mark.parametrize("argv", [["--flip", "-1e-3"], ["-1e-3"], ["--mean=1", "-1e-3"]])
def test_a_negative_number_without_an_option_is_refused(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(*argv)


def test_a_script_that_is_called_without_arguments_takes_none(monkeypatch):
    """In a notebook sys.argv is the kernel's, and main() once ended with "unrecognized"."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    for module in (train_distill, train_rl):
        assert module.parse() == module.parse([])
        assert module.parse().out == Path("runs/latest")


def test_options_of_clip_need_something_that_asks_clip():
    assert clip_options(parse()).model == "ViT-B-32"
    assert clip_options(parse("--features", "clip", "--clip-model", "RN50")).model == "RN50"
    with pytest.raises(InputError, match="only --reward clip and --features clip ask CLIP"):
        clip_options(parse("--clip-model", "RN50"))


# Settings from options and checkpoints ------------------------------------------------------------


@pytest.mark.parametrize("device", [CPU, GPU, APPLE], ids=str)
def test_the_shapes_have_their_own_preset_on_every_device(device):
    """On a GPU they once got that of a folder: hours of training for nine shapes."""
    assert usual_preset("shapes", device) == "tiny"
    assert settings_from(parse(), device, None, resume=False) == preset("tiny")


def test_a_folder_has_a_larger_preset_on_a_gpu():
    assert usual_preset("photos", GPU) == "small"
    assert usual_preset("photos", CPU) == usual_preset("photos", APPLE) == "folder"
    args = parse("--data", "photos", "--steps", 8)
    assert settings_from(args, GPU, None, resume=False) == preset("small", steps=8)
    args = parse("--data", "photos", "--preset", "tiny")
    assert settings_from(args, GPU, None, resume=False) == preset("tiny")


def test_memory_settings_may_change_on_resume():
    """A run that was out of memory continues with less of it; what is learned may not change."""
    content = {"kind": "teacher", "settings": tiny()}
    given = Namespace(preset=None, micro_batch=4, precision="bf16", checkpointing=True)
    expected = tiny(micro_batch=4, precision="bf16", checkpointing=True)
    assert settings_from(given, CPU, content, resume=True) == expected
    with pytest.raises(InputError, match="--batch is fixed by the checkpoint: 8. Another --out"):
        settings_from(Namespace(preset=None, batch=4), CPU, content, resume=True)


def test_a_checkpoint_fixes_what_its_weights_depend_on():
    content = {"kind": "teacher", "settings": tiny()}
    args = parse("--guidance", 2, "--batch", 4, "--width", 32)
    assert settings_from(args, CPU, content, resume=False) == tiny(guidance=2.0, batch=4)
    with pytest.raises(InputError, match="^--width is fixed by the checkpoint: 32$"):
        settings_from(parse("--width", 64), CPU, content, resume=False)
    with pytest.raises(InputError, match="--guidance is fixed by the checkpoint: 1.2"):
        settings_from(args, CPU, content | {"kind": "student"}, resume=False)
    with pytest.raises(InputError, match="--preset tiny: the settings come from the teacher"):
        settings_from(parse("--preset", "tiny"), CPU, content, resume=False)
    assert settings_from(parse("--preset", "tiny"), CPU, content, resume=True) == tiny()


def test_quick_shortens_what_no_option_says(tmp_path, threads, capsys):
    run = run_of(tmp_path / "out", "--quick", short=["--device", "cpu", "--gsim-iters", 9999])
    said = capsys.readouterr().out
    assert "--teacher-iters 1500 in place of 2600" in said.partition("settings:")[0]
    assert "--gsim-iters" not in said.partition("settings:")[0]
    assert (run.settings.teacher_iters, run.settings.gsim_iters) == (1500, 9999)
    shorter = {name for name, value in QUICK.items() if getattr(run.settings, name) == value}
    assert shorter == QUICK.keys() - {"gsim_iters"}


def test_quick_leaves_a_given_model_as_it_is():
    given = preset("folder")
    assert shortened(given, parse(), MODEL_SETTINGS).image_size == 32
    assert shortened(given, parse(), ()).image_size == 16


def test_quick_lengthens_nothing(capsys):
    short = tiny(draws=2)
    assert shortened(short, parse(), ()) == short
    assert "saves on: nothing" in capsys.readouterr().out


def test_a_quick_run_is_resumed_with_or_without_its_option(tmp_path, threads, capsys):
    short = ["--device", "cpu", "--per-class", 20]
    run = run_of(tmp_path, "--quick", short=short)
    write_checkpoint(tmp_path / "teacher.pt", MAR(run.settings, run.data.classes))
    for again in ([], ["--quick"]):
        assert run_of(tmp_path, "--resume", *again, short=short).settings == run.settings
    assert "settings: those of the teacher (all" in capsys.readouterr().out


# Data ---------------------------------------------------------------------------------------------


def make_folder(path, classes, images=60):
    for i, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for j in range(images):
            Image.new("RGB", (8, 8), (40 * i, 4 * j, 0)).save(path / name / f"{j}.png")
    return str(path)


def test_few_images_come_with_what_that_means(tmp_path):
    data = load_data(tiny(), make_folder(tmp_path / "photos", ["a", "b"]))
    text = describe(data, tiny(judge_n=2250))
    assert "72 to train on, 24 for the judge, 24 held out, n = 12 in each row" in text
    assert "not --judge-n 2250: as many of every class, and at most half" in text
    assert "--judge-n" not in describe(data, tiny(judge_n=12))
    assert "distances are rough" in text and "resized to 8 x 8 pixels (--image-size" in text


def test_classes_that_are_only_counted_have_the_names_of_the_folder(tmp_path):
    """As in MAR's files. Numbers that are names stay names."""
    folder = make_folder(tmp_path / "photos", ["b", "a"], images=1)
    data = Data(folder, ["a"], {}, None, None, None)
    counted = {"classes": ["0", "1"], "classes_counted": True}
    assert named_classes(counted, data) == ["a", "b"]
    assert named_classes({"classes": ["0", "1"]}, data) == ["0", "1"]
    assert named_classes(counted | {"classes": ["0"]}, data) == ["0"]


def test_a_model_that_does_not_fit_the_memory_is_refused():
    data = SimpleNamespace(classes=["a"], learned=SimpleNamespace(channels=3))
    check_memory(tiny(), data, CPU)
    with pytest.raises(InputError, match=r"takes at least 2\d,\d{3} GiB .* cpu has .*: lower"):
        check_memory(tiny(width=2**14, depth=200), data, CPU)


# A run --------------------------------------------------------------------------------------------


def run_of(out, *argv, base=None, written=WRITTEN, short=SHORT):
    return prepare(parse(*short, "--out", out, *argv), written, base)


def test_a_run_is_prepared_without_a_trace_in_its_folder(tmp_path, threads, capsys):
    run = run_of(tmp_path / "out", "--seed", 3)
    assert run.settings.seed == 3 and run.settings.scale > 0  # measured
    assert run.out == tmp_path / "out" and not run.out.exists()
    assert run.device == CPU and len(run.data.classes) == 9
    said = capsys.readouterr().out
    assert said.startswith("settings: preset tiny, but --image-size 8, --patch 2, --width 32")
    assert "--batch" in said.split("(all of them are in settings.json)")[0]
    assert "--heads 4" not in said and "9 classes; images: 108" in said
    assert max(map(len, said.splitlines()[:3])) <= 100
    with run:
        kept = json.loads((run.out / "settings.json").read_text())
        assert kept == asdict(run.settings)


def test_a_run_that_was_begun_is_continued_only_on_request(tmp_path, threads, capsys):
    out = tmp_path / "out"
    assert run_of(out, "--resume").resume
    assert f"nothing to resume in {out}: starting afresh" in capsys.readouterr().out
    out.mkdir()
    run = run_of(out)
    (out / "judge.pt").touch()  # which the run had come to
    run_of(out, "--resume")
    assert "nothing to resume" not in capsys.readouterr().out
    model = MAR(replace(run.settings, seed=5), run.data.classes)
    write_checkpoint(out / "teacher.pt", model)
    with pytest.raises(InputError, match="teacher.pt exists: --resume continues it, another --out"):
        run_of(out)
    run = run_of(out, "--resume", "--seed", 5)
    assert run.settings == model.settings
    assert "nothing to resume" not in capsys.readouterr().out
    with pytest.raises(InputError, match="--seed is fixed by the checkpoint: 5. Another --out"):
        run_of(out, "--resume", "--seed", 6)


def test_a_run_that_was_begun_with_a_given_teacher_needs_it_again(tmp_path, threads):
    out = tmp_path / "out"
    write_checkpoint(out / "student.pt", random_model("student"))
    with pytest.raises(InputError, match="begun with another teacher.pt: give it again by --teach"):
        run_of(out, "--resume")


def test_who_starts_from_a_checkpoint_has_its_settings_and_classes(tmp_path, threads):
    settings, classes = tiny(), [*load_data(tiny()).classes, "a class that is not in the data"]
    write_checkpoint(tmp_path / "teacher.pt", MAR(settings, classes))
    base = read_checkpoint(tmp_path / "teacher.pt")
    options = ["--out", tmp_path / "out", "--device", "cpu", "--threads", 1, "--gsim-iters", 7]
    run = prepare(parse(*options), WRITTEN, base)
    assert run.settings == replace(settings, gsim_iters=7)
    assert run.data.classes == classes and run.data.labels.tolist() == list(range(9))


def test_decoded_images_are_kept_in_the_run_or_where_it_is_said(tmp_path, threads):
    """They once lay next to --out, where no one looks, and for `--out out` in the data."""
    photos = make_folder(tmp_path / "photos", ["a", "b"], images=20)
    run_of(tmp_path / "some" / "out", "--data", photos)
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["out"]
    (kept,) = (tmp_path / "some" / "out" / "cache").iterdir()
    assert (kept / "images.bytes").stat().st_size == 40 * 3 * 8 * 8
    for out in ("first", "second"):
        run_of(tmp_path / out, "--data", photos, "--cache", tmp_path / "shared")
        assert not (tmp_path / out).exists()
    assert len(list((tmp_path / "shared").iterdir())) == 1


def test_a_run_may_lie_in_its_data_and_be_resumed(tmp_path, threads, monkeypatch):
    """Its folder and its cache were once two more classes: it could never be resumed."""
    monkeypatch.chdir(make_folder(tmp_path / "photos", ["a", "b"], images=20))
    for out in ("out", "runs/latest"):
        with run_of(Path(out), "--data", ".") as run:
            assert run.data.classes == ["a", "b"]
            write_checkpoint(run.out / "teacher.pt", MAR(run.settings, run.data.classes))
            Image.new("RGB", (8, 8)).save(run.out / "samples.png")
        with run_of(Path(out), "--data", ".", "--resume") as run:
            assert run.resume and run.data.classes == ["a", "b"]
    Path("made").mkdir()
    assert run_of(Path("made"), "--data", ".").data.classes == ["a", "b"]
    with pytest.raises(InputError, match="--out a is a class of --data .: choose another one"):
        run_of(Path("a"), "--data", ".")


def test_a_folder_at_which_another_run_is_at_work_is_refused_at_once(tmp_path, threads):
    with run_of(tmp_path / "out"):
        with pytest.raises(InputError, match="another run is at work in --out"):
            run_of(tmp_path / "out")
