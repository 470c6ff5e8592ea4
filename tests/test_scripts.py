"""The real scripts, briefly: on real images, with wrong input, interrupted, diverging."""

import ast
import importlib
import json
import math
import sys
from pathlib import Path

import digits
import pytest
import torch
from conftest import SHORT, error_of, tiny
from PIL import Image

import maskrl
import sample
import train_distill
import train_rl

CPU = ("--device", "cpu", "--threads", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """200 real digits."""
    path = tmp_path_factory.mktemp("digits")
    digits.make(path, per_class=20)
    return path


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """All three stages on the digits, with guidance: the folder of the run, and its metrics."""
    out = tmp_path_factory.mktemp("run")
    argv = [*SHORT, "--data", str(folder), "--out", str(out), "--guidance", "1.5"]
    return out, train_rl.main(argv)


# A whole run --------------------------------------------------------------------------------------


def test_a_folder_goes_through_all_stages_and_leaves_their_files(run):
    out, metrics = run
    models, pictures = "teacher student policy", "samples neighbours curves gain"
    files = {f"{name}.pt" for name in models.split()} | {f"{n}.png" for n in pictures.split()}
    files |= {".lock", "choices.json", "log.jsonl", "metrics.json"}
    assert files == {path.name for path in out.iterdir()}
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
    lines = maskrl.read_log(run[0])
    stages = [line["stage"] for line in lines if "loss" in line]
    assert stages == ["teacher"] * 6 + ["student"] * 4 + ["policy"] * 2
    assert {line["stage"] for line in lines if "progress" in line} == {"student"}
    assert {line["stage"] for line in lines if "quality_mean" in line} == {"policy"}


@pytest.mark.parametrize("kind", maskrl.KINDS)
def test_every_checkpoint_can_be_sampled(run, tmp_path, kind, capsys):
    checkpoint, picture = run[0] / f"{kind}.pt", tmp_path / "picture.png"
    sample.main([str(checkpoint), "--n", "6", "--classes", "3,7", "--out", str(picture), *CPU])
    assert Image.open(picture).size[0] > 100
    assert f"6 images of a {kind}" in capsys.readouterr().out
    assert maskrl.load_checkpoint(checkpoint).classes == [str(i) for i in range(10)]


@pytest.fixture
def more(run, folder):
    """more(main, *options) -> metrics of another run on the same digits."""

    def more(main, *options):
        return main([str(a) for a in (*options, "--data", folder, *CPU)])

    return more


def test_rl_goes_on_from_a_given_student_and_only_with_it(run, folder, more, tmp_path, capsys):
    student, new = run[0] / "student.pt", ("--out", tmp_path / "rl")
    how = ("--rl-iters", 1, "--critical-steps", 1)
    metrics = more(train_rl.main, "--student", student, *new, *how)
    assert metrics["settings"]["critical_steps"] == 1
    assert "teacher" in metrics["rows"]  # it lies beside the student
    error = error_of(train_rl.main, [*new, "--resume", "--data", folder, *CPU], capsys)
    assert "give it again by --student" in error


def test_a_resumed_run_keeps_its_reward_and_data(run, folder, capsys):
    """--resume without --reward once went on, silently, under another reward."""
    out = ("--out", run[0], "--resume", *CPU)
    with_fit = [*out, "--data", folder, "--reward", "fit"]
    assert "was begun with --reward embedded, not fit" in error_of(train_rl.main, with_fit, capsys)
    copy = run[0].parent / "copy"
    if not copy.exists():
        copy.symlink_to(folder)
    elsewhere = error_of(train_rl.main, [*out, "--data", copy], capsys)
    assert f"was begun with --data {folder}, not {copy}" in elsewhere


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
    (line,) = [line for line in maskrl.read_log(tmp_path) if "kl" in line]
    assert math.isfinite(line["quality"])


def test_what_is_held_out_is_not_what_is_trained(run):
    """Or reward hacking would go unseen."""
    device = torch.device("cpu")
    shapes = maskrl.load_data(tiny())
    critic = maskrl.Critic("reward", 8, 10)

    def held_out(name, data):
        return train_rl.held_out_reward(name, data, critic, device)

    assert isinstance(held_out("embedded", shapes), maskrl.ShapeFit)
    assert held_out("fit", shapes) == critic.quality
    shapes.name = "photos/"
    assert held_out("embedded", shapes) is None
    assert held_out("clip", shapes) == critic.quality


# sample.py ----------------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path):
    """A red photo, and a mask of its shape with a white left half."""
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.new("RGB", (40, 30), "red").save(photo)
    half = Image.new("L", (80, 60), 0)
    half.paste(255, (0, 0, 40, 60))
    half.save(mask)
    return photo, mask


def test_films_and_completions(run, photo, tmp_path):
    gif, strip = tmp_path / "film.GIF", tmp_path / "film.png"
    common = [run[0] / "policy.pt", "--n", 4, "--out", tmp_path / "o.png", *CPU]

    def draw(*options):
        sample.main([str(a) for a in (*common, *options)])

    draw("--inpaint", photo[0], "--mask", photo[1], "--film", gif)
    draw("--film", strip)
    assert Image.open(gif).n_frames > 2
    assert Image.open(strip).size[1] > 150


def test_a_completion_that_cannot_be_says_why(run, photo, tmp_path, capsys):
    black = tmp_path / "black.png"
    Image.new("L", (80, 60), 0).save(black)
    cases = {
        ("--inpaint", photo[0], "--mask", black): "no white pixel",
        ("--inpaint", photo[0]): "belong together",
        ("--mask", black): "belong together",
        ("--inpaint", "nothing.png", "--mask", photo[1]): "--inpaint nothing.png",
        ("--inpaint", run[0] / "samples.png", "--mask", photo[1]): "is not of the shape",
    }
    common = [run[0] / "policy.pt", "--n", 4, "--out", tmp_path / "o.png", *CPU]
    for options, expected in cases.items():
        assert expected in error_of(sample.main, [*common, *options], capsys), options
    assert not (tmp_path / "o.png").exists()


def test_a_token_is_drawn_where_any_pixel_of_a_larger_mask_is_white(tmp_path):
    """A mask larger than the model was once shrunk first, which lost its single pixels. Of an
    image of 120 x 80 the middle 80 x 80 pixels count."""
    settings = tiny(scale=1.0)
    image, mask = Image.new("RGB", (120, 80), "red"), Image.new("L", (120, 80), 0)
    mask.putpixel((20 + 79, 0), 255)
    image.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    tokens, drawn = sample.to_complete(tmp_path / "image.png", tmp_path / "mask.png", settings)
    assert drawn.nonzero().flatten().tolist() == [3]  # the last of the first row
    red = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 8, 8)
    assert torch.equal(tokens, maskrl.to_tokens(red, settings))


def test_files_writes_every_image_into_a_file_of_its_own(run, tmp_path):
    argv = [run[0] / "student.pt", "--classes", 3, 7, "--n", 5, "--out", tmp_path / "grid.png"]
    sample.main([str(a) for a in (*argv, "--files", tmp_path / "files", *CPU)])
    files = sorted((tmp_path / "files").iterdir())
    names = ["00000 3.png", "00001 7.png", "00002 3.png", "00003 7.png", "00004 3.png"]
    assert [path.name for path in files] == names
    assert all(Image.open(path).size == (8, 8) for path in files)
    assert len({path.read_bytes() for path in files}) == 5  # five images, not one five times


def test_the_single_files_are_the_images_of_the_grid(run, tmp_path):
    argv = [run[0] / "student.pt", "--classes", 3, 7, 8, "--n", 3, "--out", tmp_path / "grid.png"]
    sample.main([str(a) for a in (*argv, "--files", tmp_path, *CPU)])
    grid = Image.open(tmp_path / "grid.png")
    for i, label in enumerate((3, 7, 8)):
        tile = grid.crop((4 + 68 * i, 4, 68 + 68 * i, 68)).resize((8, 8), Image.NEAREST)
        assert tile.tobytes() == Image.open(tmp_path / f"{i:05} {label}.png").tobytes()


NAMES = ["red circle", "red, like wine", "a/b"]


@pytest.mark.parametrize(
    "texts, labels, columns",
    [
        (None, [0, 1, 2, 0, 1], 3),
        (["red circle"], [0] * 5, 1),
        (["red circle", "a/b"], [0, 2, 0, 2, 0], 2),
        (["red circle, a/b"], [0, 2, 0, 2, 0], 2),
        (["red, like wine"], [1] * 5, 1),  # commas in a name do not part it
        (["a/b,", "red, like wine"], [2, 1, 2, 1, 2], 2),
    ],
)
def test_classes_are_parted_by_spaces_or_commas_unless_a_name_has_commas(texts, labels, columns):
    model = maskrl.MAR(tiny(), NAMES)
    chosen, number = sample.labels_of(texts, model, {}, 5)
    assert chosen.tolist() == labels
    assert number == columns


@pytest.mark.parametrize(
    "texts, said", [(["red"], "no class 'red'"), ([","], "no class"), ([""], "no class")]
)
def test_a_class_that_there_is_not_is_named(texts, said):
    with pytest.raises(maskrl.InputError, match=said):
        sample.labels_of(texts, maskrl.MAR(tiny(), NAMES), {}, 5)


def test_a_slash_in_a_class_name_makes_no_folder(tmp_path):
    sample.write_files(tmp_path, torch.zeros(1, 3, 8, 8), torch.tensor([2]), NAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["00000 a_b.png"]


# Wrong input --------------------------------------------------------------------------------------


def test_wrong_input_to_sample_ends_in_one_line_and_exit_code_2(run, tmp_path, capsys):
    out, junk = run[0], tmp_path / "junk"
    junk.write_bytes(b"junk")
    student, teacher, picture = out / "student.pt", out / "teacher.pt", tmp_path / "a.png"
    to = ["--out", picture]
    cases = [
        ([tmp_path / "none.pt"], "there is no checkpoint"),
        ([out / "metrics.json"], "metrics.json is not a checkpoint"),
        ([student, "--classes", "3,eleven"], "no class 'eleven'"),
        ([student, "--guidance", 2, *to], "--guidance"),
        ([student, "--denoise-steps", 0, *to], "--denoise-steps 0: a student takes one step"),
        ([teacher, "--denoise-steps", 0, *to], "a denoising chain has 2...1000"),
        ([student, "--temperature", -1, *to], "--temperature and --guidance must be numbers"),
        ([teacher, "--guidance", "nan", *to], "--temperature and --guidance must be numbers"),
        ([student, "--film", picture, *to], "would overwrite --film"),
        ([student, "--out", tmp_path / "a.psd"], "a.psd: the name must end"),
        ([student, "--out", tmp_path / "a.xyz"], "a.xyz: the name must end"),
        ([student, "--film", tmp_path / "film.mov"], "film.mov: the name must end"),
        ([student, "--out", junk / "a.png", "--n", 1], "cannot be written"),
        ([student, "--device", "cpu:0"], "--device cpu:0"),
        ([student, "--threads", 0, *to], "--threads 0 must lie in 1"),
        ([student, "--steps", 0, *to], "--steps 0"),
        ([student, "--steps", 99, *to], "--steps 99"),
        ([student, "--steps", "1,2", *to], "--steps (1, 2) must be counts that sum to 16"),
        ([student, "--steps", "few", *to], "'few' is neither a number nor counts"),
        ([student, "--n", 0, *to], "--n 0 must be at least 1"),
    ]
    if not torch.cuda.is_available():
        cases.append(([student, "--device", "cuda"], "--device cuda"))
    for argv, expected in cases:
        assert expected in error_of(sample.main, argv, capsys), argv
    assert not picture.exists()


def test_wrong_input_to_training_ends_in_one_line_and_exit_code_2(run, tmp_path, capsys):
    out, junk, empty = run[0], tmp_path / "junk.pt", tmp_path / "empty"
    student, teacher = out / "student.pt", out / "teacher.pt"
    junk.write_bytes(b"junk")
    empty.mkdir()
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
            ["--teacher", teacher, *new],
            "--data shapes has classes that the checkpoint has not",
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
        (rl, ["--rl-iters", 0, *new], "--rl-iters 0 must be at least 1"),
        (rl, ["--reward", "clp", *new], "--reward clp: expected"),
    ]
    for main, argv, expected in cases:
        assert expected in error_of(main, argv, capsys), argv
    assert not (tmp_path / "new").exists()


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
    content = maskrl.read_checkpoint(path)
    values = [v for name in ("model", "model_ema") for v in content[name].values()]
    return torch.cat([v.flatten().float() for v in values])


def no_matplotlib():
    """Curves take longer than the training of a short run."""
    return None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maskrl, "pyplot", no_matplotlib)
        train_rl.main([*SHORT, "--out", str(out)])
    return out


@pytest.mark.parametrize("kind, step", [("teacher", 5), ("student", 3), ("policy", 1)])
def test_an_interrupted_run_resumes_to_the_very_same_weights(
    whole, tmp_path, monkeypatch, kind, step
):
    """The power goes off in the middle of a stage, some steps after a checkpoint; the settings
    come from the run."""
    train = maskrl.train

    def interrupted(training, update, path, iters, resume, measure=None, every=None):
        def failing(i):
            if training.model.kind == kind and i == step:
                raise KeyboardInterrupt
            return update(i)

        every = 1 if kind == "policy" else 2
        return train(training, failing, path, iters, resume, measure, every)

    with monkeypatch.context() as patch:
        patch.setattr(maskrl, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_rl.main([*SHORT, "--out", str(tmp_path)])
    monkeypatch.setattr(maskrl, "pyplot", no_matplotlib)
    last = maskrl.read_checkpoint(tmp_path / f"{kind}.pt")
    assert 0 < last["step"] <= step
    assert last["training"]
    train_rl.main(["--out", str(tmp_path), "--resume", *CPU])
    for name in maskrl.KINDS:
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
    assert "teacher, step 3: the loss is nan" in error
    assert maskrl.read_checkpoint(tmp_path / "teacher.pt")["step"] == 3
    assert weights(tmp_path / "teacher.pt").isfinite().all()


# The files themselves -----------------------------------------------------------------------------

SCRIPTS = (sample, train_distill, train_rl)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_script_has_help(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    help = capsys.readouterr().out
    assert script.__doc__.splitlines()[0] in help
    assert "--device" in help


def test_help_says_what_guidance_is(capsys):
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            script.main(["--help"])
        help = " ".join(capsys.readouterr().out.split())
        assert "eps = eps_null + s (eps_class - eps_null)" in help


def imports(path):
    """Names of all modules that a file imports, also within functions."""
    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("module", [maskrl, *SCRIPTS], ids=lambda module: module.__name__)
def test_no_script_imports_another(module):
    """What two of them need belongs into maskrl.py."""
    scripts = {script.__name__ for script in SCRIPTS}
    imported = set(imports(module.__file__))
    assert not imported & scripts
    assert module is maskrl or "maskrl" in imported
