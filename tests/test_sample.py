"""sample.py: what it draws, what it refuses, and what is left when it is stopped."""

import os
import random
import signal
import time
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import error_of, random_model, tiny
from helpers_child import EXITS, finish, start
from PIL import Image
from torchvision.transforms import functional as TF

import sample
from maskrl import MAR, Sampling, add_schedule, rng, to_images, to_tokens
from workbench.errors import InputError
from workbench.files import load_checkpoint, write_checkpoint
from workbench.inpaint import read_inpainting
from workbench.sampling import checked_sampling, class_labels

CPU = ("--device", "cpu", "--threads", "1")
KINDS = ("teacher", "student", "policy")


def draw(*argv):
    sample.main([str(a) for a in (*argv, *CPU)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of random models of ten digits: teacher.pt, student.pt and policy.pt."""
    out = tmp_path_factory.mktemp("run")
    digits = [str(i) for i in range(10)]
    torch.manual_seed(0)
    for kind in KINDS:
        model = MAR(tiny(steps=8, denoise_steps=3, guidance=1.5), digits, kind)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        if kind == "policy":
            add_schedule(model)
        write_checkpoint(out / f"{kind}.pt", model)
    return out


# Pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_checkpoint_can_be_sampled(run, tmp_path, kind, capsys):
    draw(run / f"{kind}.pt", "--n", 6, "--classes", "3,7", "--out", tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").size[0] > 100
    assert f"6 images of a {kind}" in capsys.readouterr().out


def test_the_line_at_the_end_says_what_was_drawn_and_how(run, tmp_path, capsys):
    out, options = tmp_path / "a.png", ("--n", 2, "--steps", 4, "--denoise-steps", 2)
    draw(run / "teacher.pt", "--out", out, "--files", tmp_path / "files", *options)
    said = capsys.readouterr().out
    assert said.startswith(f"{out}, {tmp_path}/files: 2 images of a teacher, 4.0 unmasking ")
    assert "iterations x 2 denoising steps, guidance 1.5, " in said
    assert said.endswith(" ms per image on cpu\n")


def test_options_of_sampling_reach_the_generator(run, tmp_path, monkeypatch):
    calls, seeds = [], []

    def watched(model, labels, sampling, noise, known, trace):
        calls.append((labels.tolist(), sampling, known))
        seeds.extend(generator.initial_seed() for generator in sampling.generators)
        return generate(model, labels, sampling, noise, known, trace=trace)

    generate = sample.generate
    monkeypatch.setattr(sample, "generate", watched)
    options = "--steps 1,5,10 --guidance 2 --denoise-steps 4 --temperature 0.5 --order random"
    to = ("--out", tmp_path / "a.png", "--n", 3, "--seed", 7)
    draw(run / "teacher.pt", *options.split(), *to)
    expected = Sampling((1, 5, 10), 2.0, 4, 0.5, "random", progress=True)
    ((labels, sampling, known),) = calls
    assert (labels, known) == ([0, 1, 2], None)
    assert vars(expected) == {name: getattr(sampling, name) for name in vars(expected)}
    assert seeds == [rng(7, "image", i).initial_seed() for i in range(3)]


def test_a_second_picture_does_not_replace_the_first(run, tmp_path, monkeypatch, capsys):
    """The default once did, whatever the first had taken. A name that is given does."""
    monkeypatch.chdir(tmp_path)
    for options in ((), (), (), ("--out", "samples-2.png")):
        draw(run / "student.pt", "--n", 1, *options)
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["samples.png", "samples-2.png", "samples-3.png", "samples-2.png"]
    assert len(list(tmp_path.iterdir())) == 3


def test_an_unfinished_checkpoint_is_sampled_and_says_so(run, tmp_path, capsys):
    student = load_checkpoint(run / "student.pt")
    write_checkpoint(tmp_path / "student.pt", student, step=3, training={"record": {}})
    draw(tmp_path / "student.pt", "--n", 1, "--out", tmp_path / "a.png")
    assert "the student is unfinished, after 3 of 4 updates" in capsys.readouterr().err
    draw(run / "student.pt", "--n", 1, "--out", tmp_path / "a.png")
    assert "unfinished" not in capsys.readouterr().err


def test_a_completion_without_classes_says_that_it_goes_through_them(run, photo, tmp_path, capsys):
    given = ["--inpaint", photo[0], "--mask", photo[1], "--out", tmp_path / "a.png", "--n", 2]
    draw(run / "student.pt", *given)
    said = capsys.readouterr().err
    assert "no --classes: completed as each of 10 classes in turn" in said
    assert "8 of 16 tokens are drawn; its 80 x 60 pixels are laid on 40 x 30" in said
    draw(run / "student.pt", *given, "--classes", "3")
    assert "no --classes" not in capsys.readouterr().err


def test_films_and_completions(run, photo, tmp_path):
    gif, strip = tmp_path / "film.GIF", tmp_path / "film.png"
    common = [run / "policy.pt", "--n", 4, "--out", tmp_path / "o.png"]
    draw(*common, "--inpaint", photo[0], "--mask", photo[1], "--film", gif)
    assert Image.open(tmp_path / "o.png").size == (4 + 5 * 68, 4 + 68)  # the given one comes first
    draw(*common, "--film", strip)
    assert Image.open(gif).n_frames > 2
    assert Image.open(strip).size[1] > 150


def test_files_writes_every_image_into_a_file_of_its_own(run, tmp_path, capsys):
    to = ("--out", tmp_path / "grid.png", "--files", tmp_path / "files")
    draw(run / "student.pt", "--classes", 3, 7, "--n", 5, *to)
    files = sorted((tmp_path / "files").iterdir())
    names = ["00000 3.png", "00001 7.png", "00002 3.png", "00003 7.png", "00004 3.png"]
    assert [path.name for path in files] == names
    assert all(Image.open(path).size == (8, 8) for path in files)
    assert len({path.read_bytes() for path in files}) == 5  # five images, not one five times
    assert "already" not in capsys.readouterr().err
    draw(run / "student.pt", "--classes", 3, "--n", 1, *to)
    assert "has 5 images already, some of which may stay" in capsys.readouterr().err


def test_the_single_files_are_the_images_of_the_grid(run, tmp_path):
    to = ("--out", tmp_path / "grid.png", "--files", tmp_path)
    draw(run / "student.pt", "--classes", 3, 7, 8, "--n", 3, *to)
    grid = Image.open(tmp_path / "grid.png")
    for i, label in enumerate((3, 7, 8)):
        tile = grid.crop((4 + 68 * i, 4, 68 + 68 * i, 68)).resize((8, 8), Image.NEAREST)
        assert tile.tobytes() == Image.open(tmp_path / f"{i:05} {label}.png").tobytes()


def test_files_are_called_what_people_call_the_classes(run, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{i} digit {i}\n" for i in range(10)))
    to = ("--out", tmp_path / "a.png", "--files", tmp_path / "files", "--class-names", names)
    draw(run / "student.pt", "--classes", "digit 4", "--n", 1, *to)
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["00000 digit 4.png"]


def test_any_number_of_images_is_drawn_batch_by_batch(student, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "BATCH", 4)
    write_checkpoint(tmp_path / "student.pt", student)
    common = [tmp_path / "student.pt", "--out", tmp_path / "a.png", *CPU]
    draw(*common, "--files", tmp_path / "ten", "--n", 10)
    draw(*common, "--files", tmp_path / "four", "--n", 4)
    ten, four = (sorted((tmp_path / name).iterdir()) for name in ("ten", "four"))
    assert [path.name for path in ten] == [f"{i:05} {'abc'[i % 3]}.png" for i in range(10)]
    assert len({path.read_bytes() for path in ten}) == 10
    assert [path.read_bytes() for path in four] == [path.read_bytes() for path in ten[:4]]
    error = error_of(sample.main, [*common, "--n", 1025], capsys)
    assert "--n 1025: a picture shows at most 1024; more of them need --files" in error


HOW = {
    "teacher": ("teacher", ()),
    "annealed": ("teacher", ("--steps", "1,3,5,7", "--order", "random", "--guidance", 1)),
    "teacher in one step": ("teacher", ("--denoise-steps", 1, "--temperature", 0.8)),
    "student": ("student", ()),
    "student that refreshes": ("student", ("--refresh", 3, "--order", "random")),
    "policy": ("policy", ()),
}


@pytest.mark.parametrize("kind, options", HOW.values(), ids=HOW)
def test_an_image_does_not_depend_on_what_is_drawn_with_it(
    run, tmp_path, monkeypatch, kind, options
):
    """--n 8 could once not be extended to --n 32: all images changed. A level is rounding."""
    images = {}
    for n, batch in ((3, 256), (7, 256), (7, 2)):
        monkeypatch.setattr(sample, "BATCH", batch)
        to = ("--out", tmp_path / "a.png", "--files", tmp_path / f"{n} {batch}")
        draw(run / f"{kind}.pt", "--n", n, "--seed", 5, *options, *to)
        paths = sorted((tmp_path / f"{n} {batch}").iterdir())
        pixels = [TF.pil_to_tensor(Image.open(path)).int() for path in paths]
        images[n, batch] = torch.stack(pixels)
    all_at_once = images[7, 256]
    assert (images[3, 256] - all_at_once[:3]).abs().max() <= 1
    assert (images[7, 2] - all_at_once).abs().max() <= 1
    assert all((a - b).abs().max() > 9 for a, b in combinations(all_at_once, 2))


def test_a_completion_does_not_depend_on_what_is_drawn_with_it(run, photo, tmp_path):
    images = []
    for n in (1, 3):
        to = ("--out", tmp_path / "a.png", "--files", tmp_path / str(n))
        draw(run / "teacher.pt", "--n", n, "--inpaint", photo[0], "--mask", photo[1], *to)
        images.append(TF.pil_to_tensor(Image.open(tmp_path / str(n) / "00000 0.png")).int())
    assert (images[0] - images[1]).abs().max() <= 1


# Classes ------------------------------------------------------------------------------------------

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
    chosen, number = class_labels(texts, MAR(tiny(), NAMES), {}, 5)
    assert chosen.tolist() == labels
    assert number == columns


@pytest.mark.parametrize(
    "texts, said", [(["red"], "no class 'red'"), ([","], "no class"), ([""], "no class")]
)
def test_a_class_that_there_is_not_is_named(texts, said):
    with pytest.raises(InputError, match=said):
        class_labels(texts, MAR(tiny(), NAMES), {}, 5)


@pytest.mark.parametrize("texts", [["red", "circle"], ["a/b", "red", "circle"]])
def test_a_name_of_several_words_without_quotes_gets_a_hint(texts):
    with pytest.raises(InputError, match='Put a name of several words in quotes: "red circle"$'):
        class_labels(texts, MAR(tiny(), NAMES), {}, 5)
    with pytest.raises(InputError, match="no class 'circle'; there are: [^.]*$"):
        class_labels(["circle", "red"][:1], MAR(tiny(), NAMES), {}, 5)


# Completing an image ------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path):
    """A red photo, and a mask of its shape with a white left half."""
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.new("RGB", (40, 30), "red").save(photo)
    half = Image.new("L", (80, 60), 0)
    half.paste(255, (0, 0, 40, 60))
    half.save(mask)
    return photo, mask


def test_a_completion_that_cannot_be_says_why(run, photo, tmp_path, capsys):
    black = tmp_path / "black.png"
    Image.new("L", (80, 60), 0).save(black)
    Image.new("RGB", (90, 20), 0).save(tmp_path / "wide.png")
    given = ("--inpaint", photo[0], "--mask", photo[1])
    cases = {
        ("--inpaint", photo[0], "--mask", black): "no white pixel",
        ("--inpaint", photo[0]): "belong together",
        ("--mask", black): "belong together",
        ("--inpaint", "nothing.png", "--mask", photo[1]): "--inpaint nothing.png",
        ("--inpaint", photo[0], "--mask", "nothing.png"): "--mask nothing.png",
        ("--inpaint", tmp_path / "wide.png", "--mask", photo[1]): "is not of the shape",
        (*given, "--steps", 13): "--steps 13 must lie in 1...8, the number of tokens to draw",
        (*given, "--steps", "8,8"): "--steps (8, 8) must be counts that sum to 8",
    }
    common = [run / "policy.pt", "--n", 4, "--out", tmp_path / "o.png", *CPU]
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
    tokens, drawn = read_inpainting(tmp_path / "image.png", tmp_path / "mask.png", settings)
    assert drawn.nonzero().flatten().tolist() == [3]  # the last of the first row
    red = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 8, 8)
    assert torch.equal(tokens, to_tokens(red, settings))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_in_a_mask_is_not_drawn(photo, tmp_path, mode, capsys):
    """A mask painted on a transparent layer once hid all of the image, without a word."""
    white = Image.open(photo[1])
    mask = Image.merge("LA", [Image.new("L", white.size, 255), white])
    if mode == "P":
        mask = white.convert("P", palette=Image.Palette.ADAPTIVE)
        (index,) = (i for count, i in mask.getcolors() if mask.getpixel((79, 0)) == i)
        mask.putpalette(3 * 2 * [255])  # all white, but half of it transparent
        mask.info["transparency"] = index
    elif mode == "RGBA":
        mask = mask.convert(mode)
    mask.save(tmp_path / "painted.png")
    _, drawn = read_inpainting(photo[0], tmp_path / "painted.png", tiny())
    assert drawn.view(4, 4).any(0).tolist() == [True, True, False, False]
    assert "painted.png: 8 of 16 tokens are drawn" in capsys.readouterr().err


def test_an_image_is_completed_in_the_latents_of_an_autoencoder(photo):
    class Autoencoder:
        stride, device = 2, torch.device("cpu")

        def encode(self, images, generator):
            assert images.shape == (1, 3, 16, 16)
            assert generator.initial_seed() == rng("inpaint").initial_seed()
            return images[:, :1, ::2, ::2]

    settings = tiny(scale=1.0)
    tokens, drawn = read_inpainting(*photo, settings, Autoencoder())
    assert torch.equal(to_images(tokens, settings), torch.ones(1, 1, 8, 8))  # red
    assert drawn.view(4, 4).any(0).tolist() == [True, True, False, False]


def test_no_picture_is_written_over_a_given_one(student, tmp_path, capsys):
    """Whatever it is called."""
    write_checkpoint(tmp_path / "student.pt", student)
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    for path in (photo, mask):
        Image.new("RGB", (8, 8), "white").save(path)
    (tmp_path / "link.png").symlink_to(photo)
    for out in (photo, tmp_path / "link.png", tmp_path / "x" / ".." / "photo.png"):
        argv = [tmp_path / "student.pt", "--inpaint", photo, "--mask", mask, "--out", out]
        assert "would overwrite" in error_of(sample.main, argv, capsys)
    assert Image.open(photo).size == (8, 8)


# Wrong input --------------------------------------------------------------------------------------


def test_wrong_input_to_sample_ends_in_one_line_and_exit_code_2(run, tmp_path, capsys):
    junk, metrics = tmp_path / "junk", tmp_path / "metrics.json"
    junk.write_bytes(b"junk")
    metrics.write_text("{}")
    student, teacher, picture = run / "student.pt", run / "teacher.pt", tmp_path / "a.png"
    folder, before = tmp_path / "folder.png", student.read_bytes()
    folder.mkdir()
    to = ["--out", picture]
    cases = [
        ([tmp_path / "none.pt"], "there is no checkpoint"),
        ([metrics], "metrics.json is not a checkpoint"),
        ([student, "--classes", "3,eleven"], "no class 'eleven'"),
        ([student, "--guidance", 2, *to], "--guidance"),
        (
            [teacher, "--guidance", 2, "--denoise-steps", 1, *to],
            "--guidance needs a teacher's chain",
        ),
        ([student, "--denoise-steps", 0, *to], "--denoise-steps 0: a student takes one step"),
        ([teacher, "--denoise-steps", 0, *to], "a denoising chain has 2...1000"),
        ([teacher, "--denoise-steps", 1001, *to], "a denoising chain has 2...1000"),
        ([student, "--temperature", -1, *to], "--temperature and --guidance must be numbers"),
        ([teacher, "--guidance", "nan", *to], "--temperature and --guidance must be numbers"),
        ([teacher, "--guidance", -1, *to], "--temperature and --guidance must be numbers"),
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
        ([student, "--steps", "17,-1", *to], "--steps (17, -1) must be counts that sum to 16"),
        ([student, "--steps", "few", *to], "'few' is neither a number nor counts"),
        ([student, "--n", 0, *to], "--n 0 must be at least 1"),
        ([student, "--vae", junk, *to], "the generator makes pixels; leave it out"),
        ([student, "--refresh", 0, *to], "--refresh 0 must be at least 1"),
        ([student, "--out", folder], "cannot be written: it is a folder"),
        ([student, "--film", folder, *to], "cannot be written: it is a folder"),
        ([student, "--judge", *to], "--judge is for --bench alone"),
        ([student, "--bench", student], "the name must end in .json"),
        ([student, "--bench", junk / "b.json", "--rounds", 2], "cannot be written"),
        ([student, "--bench", "--film", "f.gif", "--n", 1, *to], "no use for --out, --film"),
    ]
    if not torch.cuda.is_available():
        cases.append(([student, "--device", "cuda"], "--device cuda"))
    for argv, expected in cases:
        assert expected in error_of(sample.main, argv, capsys), argv
    assert not picture.exists()
    assert student.read_bytes() == before


def test_a_teacher_may_take_one_step_without_guidance():
    teacher = random_model()
    sampling = checked_sampling(teacher, Sampling(denoise_steps=1, guidance=1.0))
    assert (sampling.denoise_steps, sampling.guidance) == (1, 1.0)
    assert checked_sampling(teacher, Sampling()) == Sampling().resolve(teacher)


def test_a_teacher_without_a_null_class_has_no_guidance():
    teacher = random_model(label_dropout=0.0, guidance=1.0)
    for guidance in (None, 1.0):
        assert checked_sampling(teacher, Sampling(guidance=guidance)).guidance == 1
    with pytest.raises(InputError, match="--guidance 2 needs the null class"):
        checked_sampling(teacher, Sampling(guidance=2.0))


def test_help_says_what_guidance_is(capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert sample.__doc__.splitlines()[0] in text
    assert "--device" in text
    assert "eps = eps_null + s (eps_class - eps_null)" in " ".join(text.split())


def test_it_can_be_called_from_a_notebook_and_then_again(run, tmp_path):
    """It leaves signals and streams as they are."""
    handler = signal.getsignal(signal.SIGTERM)
    for name in ("a.png", "b.png"):
        draw(run / "student.pt", "--n", 1, "--out", tmp_path / name)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# Stopped ------------------------------------------------------------------------------------------


def written(folder):
    """{path: bytes} of all whole files in a folder, and the paths of those not yet whole."""
    paths = {path for path in folder.rglob("*") if path.is_file()}
    unfinished = {path for path in paths if path.suffix == ".tmp"}
    return {path: path.read_bytes() for path in paths - unfinished}, unfinished


SAMPLE = {
    "a.png": "student.pt --n 1 --out {}/a.png",
    "film.gif": "student.pt --n 1 --film {}/film.gif --out {}/a.png",
    "00000 a.png": "student.pt --n 1 --files {} --out {}/a.png",
    "bench.json": "tiny --bench {}/bench.json --steps 1 --rounds 2 --batches 1",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_who_is_killed_while_a_file_is_written_leaves_the_old_one(tmp_path, name):
    """sample.py, killed by the system at the 1001st byte of a file."""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("old")
    write_checkpoint(tmp_path / "student.pt", random_model("student", image_size=32, patch=8))
    argv = [option.format(out, out) for option in SAMPLE[name].split()]
    if argv[0] == "student.pt":
        argv[0] = tmp_path / "student.pt"
    code, said = finish("sample", [*argv, *CPU], tmp_path / "output", die_at=1000)
    assert code == -signal.SIGXFSZ, said
    assert written(out) == ({out / name: b"old"}, {out / f"{name}.tmp"})


@pytest.mark.long
def test_pictures_of_runs_that_are_stopped_are_whole(student, tmp_path):
    """sample.py, stopped 24 times at random: every file is that of one run or of the other."""
    write_checkpoint(tmp_path / "student.pt", student)
    out, output, dice = tmp_path / "out", tmp_path / "output", random.Random(0)

    def argv(seed):
        to = ["--out", out / "a.png", "--film", out / "film.gif", "--files", out / "files"]
        return [tmp_path / "student.pt", *to, "--n", 100, "--steps", 2, *CPU, "--seed", seed]

    wholes = []
    for seed in (0, 1):
        code, said = finish("sample", argv(seed), output)
        assert code == 0, said
        wholes.append(written(out)[0])
    assert len(wholes[0]) == 102
    assert all(wholes[0][path] != wholes[1][path] for path in wholes[0])
    stops = []
    for seed in 12 * [0, 1]:
        number, watched = dice.choice(list(EXITS)), dice.choice(sorted(wholes[0]))
        before = watched.stat().st_ino
        process = start("sample", argv(seed), output)
        while process.is_alive() and watched.stat().st_ino == before:
            time.sleep(0.001)
        process.join(dice.uniform(0, 0.01))
        if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        assert process.exitcode in (0, EXITS[number]), output.read_text()
        files, unfinished = written(out)
        assert files.keys() == wholes[0].keys()
        assert all(content in (whole[path] for whole in wholes) for path, content in files.items())
        assert number == signal.SIGKILL or not unfinished
        for path in unfinished:
            path.unlink()
        stops.append((process.exitcode, len(unfinished)))
    print(f"exit codes, and files that were being written: {stops}")
    assert sum(code != 0 for code, _ in stops) > 12  # the others were faster


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_images(student, tmp_path):
    """20,000 small images take at most 50 MiB more than 2,000; a picture shows 1,024 of either."""
    write_checkpoint(tmp_path / "student.pt", student)
    peak = {}
    for n in (2_000, 20_000):
        to = ["--out", tmp_path / "a.png", "--files", tmp_path / "files", "--device", "cpu"]
        argv = [tmp_path / "student.pt", "--n", n, *to, "--steps", 1]
        process = start("sample", argv, tmp_path / "output")
        peak[n] = 0
        while process.is_alive():
            status = Path(f"/proc/{process.pid}/status").read_text()
            if "VmHWM" in status:
                peak[n] = int(status.split("VmHWM:")[1].split()[0]) // 1024
            time.sleep(0.02)
        assert process.exitcode == 0
    print(f"peak memory in MiB: {peak}")
    assert peak[20_000] < peak[2_000] + 50
