"""The real scripts, briefly: on a folder of real images, with wrong input, interrupted, and diverging."""

import json

import digits
import pytest
import torch
from conftest import tiny
from PIL import Image

import maskrl
import sample
import train_distill
import train_rl

SHORT = ("--image-size 8 --patch 2 --width 32 --depth 1 --heads 2 --head-width 32 --head-depth 1 --teacher-iters 6 --gsim-iters 4 "
         "--rl-iters 2 --judge-iters 5 --judge-n 90 --per-class 20 --batch 16 --gsim-batch 8 --prompts 2 --group 4 "
         "--denoise-steps 3 --device cpu").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """200 real digits, and one file that is no image."""
    path = tmp_path_factory.mktemp("digits")
    digits.make(path, per_class=20)
    (path / "3" / "broken.png").write_bytes(b"not a picture")
    return path


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """All three stages on the digits, with guidance."""
    out = tmp_path_factory.mktemp("run")
    metrics = train_rl.main([*SHORT, "--data", str(folder), "--out", str(out), "--guidance", "1.5"])
    return out, metrics


def error_of(main, argv, capsys):
    """The one line that `main` ends with on wrong input, whose exit code must be 2."""
    with pytest.raises(SystemExit) as stop:
        maskrl.run(lambda: main([str(a) for a in argv]))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_a_folder_goes_through_all_scripts(run, capsys):
    out, metrics = run
    assert {"teacher.pt", "student.pt", "policy.pt", "log.jsonl", "samples.png", "neighbours.png", "curves.png", "metrics.json"} <= {p.name for p in out.iterdir()}
    assert json.loads((out / "metrics.json").read_text())["rows"].keys() == metrics["rows"].keys()
    assert set(metrics["rows"]) == {"real", "untrained", "teacher", "one-step start", "student", "policy"}
    assert {"before", "after", "student, fixed K = 16", "policy, fixed K = 1"} <= set(metrics["rl"])
    assert metrics["rl"]["policy, fixed K = 1"]["steps"] == 1
    assert metrics["rows"]["student"]["denoise_steps"] == 1 and metrics["rows"]["teacher"]["denoise_steps"] == 3
    assert all(row["seconds_per_image"] > 0 for name, row in metrics["rows"].items() if name != "real")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines if "loss" in line] == ["teacher"] * 6 + ["student"] * 4 + ["policy"] * 2
    assert {line["stage"] for line in lines if "progress" in line} == {"student"}
    for kind in maskrl.KINDS:
        picture = out / f"{kind}.png"
        sample.main([str(out / f"{kind}.pt"), "--n", "6", "--classes", "3,7", "--out", str(picture), "--device", "cpu"])
        assert Image.open(picture).size[0] > 100
        assert maskrl.load_checkpoint(out / f"{kind}.pt").classes == [str(i) for i in range(10)]


def test_films_and_completions(run, tmp_path, capsys):
    policy, gif, strip, mask = str(run[0] / "policy.pt"), tmp_path / "film.GIF", tmp_path / "film.png", tmp_path / "mask.png"
    Image.new("L", (8, 8), 0).save(mask)
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), "red").save(photo)
    Image.new("L", (80, 60), 0).save(mask)
    common = [policy, "--n", "4", "--device", "cpu", "--out", str(tmp_path / "o.png")]
    assert "no white pixel" in error_of(sample.main, [*common, "--inpaint", photo, "--mask", mask], capsys)
    assert "belong together" in error_of(sample.main, [*common, "--inpaint", photo], capsys)
    half = Image.new("L", (80, 60), 0)
    half.paste(255, (0, 0, 40, 60))
    half.save(mask)
    assert "--inpaint nothing.png" in error_of(sample.main, [*common, "--inpaint", "nothing.png", "--mask", mask], capsys)
    assert "is not of the shape" in error_of(sample.main, [*common, "--inpaint", run[0] / "samples.png", "--mask", mask], capsys)
    sample.main([*common, "--inpaint", str(photo), "--mask", str(mask), "--film", str(gif)])
    sample.main([*common, "--film", str(strip)])
    assert Image.open(gif).n_frames > 3 and Image.open(strip).size[1] > 150


def test_a_token_is_drawn_where_any_pixel_of_a_larger_mask_is_white(tmp_path):
    s = tiny(scale=1.0)
    image, mask = Image.new("RGB", (120, 80), "red"), Image.new("L", (120, 80), 0)
    mask.putpixel((20 + 79, 0), 255)  # the middle 80 x 80 pixels count
    image.save(tmp_path / "image.png"), mask.save(tmp_path / "mask.png")
    tokens, chosen = sample.to_complete(tmp_path / "image.png", tmp_path / "mask.png", s, "cpu")
    side = s.image_size // s.patch
    assert chosen.nonzero().flatten().tolist() == [side - 1]
    assert torch.equal(tokens, maskrl.to_tokens(torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, s.image_size, s.image_size), s))


def test_a_broken_image_is_named_skipped_and_counted(folder, capsys):
    data = train_distill.load_data(tiny(data=str(folder)))
    err = capsys.readouterr().err
    assert "broken.png" in err and "skipped 1 of 201" in err
    assert len(data.train) + len(data.judge) + len(data.test) == 200


def test_rl_on_a_given_student_and_distilling_a_given_teacher(run, tmp_path, capsys):
    out, _ = run
    metrics = train_rl.main(["--student", str(out / "student.pt"), "--out", str(tmp_path / "rl"), "--rl-iters", "1", "--critical-steps", "1",
                             "--device", "cpu"])
    assert metrics["settings"]["critical_steps"] == 1 and "teacher" in metrics["rows"]
    assert "give it again by --student" in error_of(train_rl.main, ["--out", tmp_path / "rl", "--resume", "--device", "cpu"], capsys)
    metrics = train_distill.main(["--teacher", str(out / "teacher.pt"), "--out", str(tmp_path / "d"), "--gsim-iters", "1", "--device", "cpu"])
    assert not (tmp_path / "d" / "teacher.pt").exists() and "policy" not in metrics["rows"]


def test_wrong_input_ends_in_one_line_and_exit_code_2(run, tmp_path, capsys):
    out, _ = run
    student, junk, empty = out / "student.pt", tmp_path / "junk.pt", tmp_path / "empty"
    junk.write_bytes(b"junk")
    empty.mkdir()
    new = ["--out", tmp_path / "new", "--device", "cpu"]
    cases = [
        (train_rl.main, ["--data", tmp_path / "missing", *new], "missing"),
        (train_rl.main, ["--data", empty, *new], "empty"),
        (train_distill.main, ["--image-size", 10, *new], "--image-size 10 must be a multiple of --patch 4"),
        (train_distill.main, ["--steps", 17, *new], "--steps 17"),
        (train_distill.main, ["--teacher", student, *new], "is a student; a teacher is needed"),
        (train_distill.main, ["--teacher", out / "teacher.pt", "--width", 64, *new], "--width is fixed by the checkpoint"),
        (train_distill.main, ["--out", out, "--device", "cpu"], "exists: --resume"),
        (train_rl.main, ["--student", junk, *new], "junk.pt is not a checkpoint"),
        (sample.main, [tmp_path / "none.pt"], "there is no checkpoint"),
        (sample.main, [out / "metrics.json"], "metrics.json is not a checkpoint"),
        (sample.main, [student, "--classes", "3,eleven"], "no class 'eleven'"),
        (sample.main, [student, "--guidance", 2, "--out", tmp_path / "a.png"], "--guidance"),
        (sample.main, [student, "--denoise-steps", 0, "--out", tmp_path / "a.png"], "--denoise-steps 0: a student takes one step"),
        (sample.main, [out / "teacher.pt", "--denoise-steps", 0, "--out", tmp_path / "a.png"], "must lie in 1...1000"),
        (sample.main, [out / "teacher.pt", "--denoise-steps", 1, "--temperature", 0.5, "--out", tmp_path / "a.png"], "--temperature"),
        (sample.main, [out / "teacher.pt", "--guidance", "nan", "--out", tmp_path / "a.png"], "--temperature and --guidance must be numbers"),
        (sample.main, [student, "--film", tmp_path / "a.png", "--out", tmp_path / "a.png"], "would overwrite --out"),
        (sample.main, [student, "--out", tmp_path / "a.psd"], "a.psd: the name must end"),
        (sample.main, [student, "--out", junk / "a.png", "--n", 1], "cannot be written"),
        (sample.main, [student, "--device", "cpu:0"], "--device cpu:0"),
        (sample.main, [student, "--steps", 0, "--out", tmp_path / "a.png"], "--steps 0"),
        (train_rl.main, ["--student", student, "--guidance", 3, *new], "--guidance is fixed by the checkpoint: 1.5"),
        (train_rl.main, ["--student", student, "--teacher", tmp_path / "typo.pt", *new], "no checkpoint"),
        (train_rl.main, ["--out", out, "--resume", "--teacher-lr", 1, "--device", "cpu"], "--teacher-lr is fixed"),
        (train_rl.main, ["--group", 1, *new], "--group 1 must be at least 2"),
        (train_rl.main, ["--rl-iters", 0, *new], "--rl-iters 0 must be at least 1"),
        (train_distill.main, ["--denoise-steps", 1, *new], "--denoise-steps 1"),
        (sample.main, [student, "--steps", 99, "--out", tmp_path / "a.png"], "--steps 99"),
        (sample.main, [student, "--out", tmp_path / "a.xyz"], "a.xyz: the name must end"),
        (sample.main, [student, "--film", tmp_path / "film.mov"], "film.mov: the name must end"),
        (train_distill.main, ["--label-dropout", 2, *new], "--label-dropout 2.0 must lie in [0, 1)"),
        (train_distill.main, ["--teacher-lr", -1, *new], "--teacher-lr -1.0 must be above 0"),
        (train_rl.main, ["--reward", "clp", *new], "--reward clp: expected"),
    ]
    if not torch.cuda.is_available():
        cases.append((sample.main, [student, "--device", "cuda"], "--device cuda"))
    for main, argv, expected in cases:
        assert expected in error_of(main, argv, capsys), argv
    assert not (tmp_path / "new").exists()


def weights(path):
    content = maskrl.read_checkpoint(path)
    return torch.cat([v.flatten().float() for name in ("model", "model_ema") for v in content[name].values()])


def test_an_interrupted_run_resumes_to_the_very_same_weights(tmp_path, monkeypatch):
    train_rl.main([*SHORT, "--out", str(tmp_path / "whole")])
    real = train_distill.train

    def interrupted(kind, path, iters, update, *args, **kwargs):
        """The power goes off in the middle of the student, after a checkpoint."""

        def failing(step):
            if kind == "student" and step == 3:
                raise KeyboardInterrupt
            return update(step)

        return real(kind, path, iters, failing, *args, **kwargs, every=2)

    monkeypatch.setattr(train_distill, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_distill.main([*SHORT, "--out", str(tmp_path / "parts")])
    monkeypatch.setattr(train_distill, "train", real)
    assert maskrl.read_checkpoint(tmp_path / "parts" / "student.pt")["step"] == 2
    train_rl.main(["--out", str(tmp_path / "parts"), "--resume", "--device", "cpu"])  # settings come from the run
    for kind in maskrl.KINDS:
        assert torch.equal(weights(tmp_path / "whole" / f"{kind}.pt"), weights(tmp_path / "parts" / f"{kind}.pt")), kind


def test_a_non_finite_loss_stops_with_the_step_and_keeps_the_last_good_weights(tmp_path, monkeypatch, capsys):
    real = maskrl.denoising_loss
    calls = iter(range(100))
    monkeypatch.setattr(maskrl, "denoising_loss", lambda *a: real(*a) * (float("nan") if next(calls) == 3 else 1.0))
    with pytest.raises(SystemExit) as stop:
        maskrl.run(lambda: train_distill.main([*SHORT, "--out", str(tmp_path)]))
    assert stop.value.code == 1
    assert "teacher, step 3: the loss is nan" in capsys.readouterr().err
    assert maskrl.read_checkpoint(tmp_path / "teacher.pt")["step"] == 3
    assert weights(tmp_path / "teacher.pt").isfinite().all()


def test_saving_is_atomic(model, tmp_path, monkeypatch):
    path = tmp_path / "teacher.pt"
    maskrl.save_checkpoint(path, "teacher", model, step=1)

    def torn(content, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError):
        maskrl.save_checkpoint(path, "teacher", model, step=2)
    assert maskrl.read_checkpoint(path)["step"] == 1


def test_a_loaded_checkpoint_generates_what_was_saved(model, tmp_path):
    maskrl.add_schedule(model)
    maskrl.save_checkpoint(tmp_path / "policy.pt", "policy", model)
    again = maskrl.load_checkpoint(tmp_path / "policy.pt")
    assert again.kind == "policy" and again.settings == model.settings and again.classes == model.classes
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(maskrl.generate(again, labels, denoise_steps=1), maskrl.generate(model, labels, denoise_steps=1))


def test_presets_and_help(capsys):
    assert maskrl.preset("small").length == 256
    for main in (train_distill.main, train_rl.main, sample.main):
        with pytest.raises(SystemExit) as stop:
            main(["--help"])
        assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--critical-steps" in text and "eps = eps_null + s (eps_class - eps_null)" in " ".join(text.split())
