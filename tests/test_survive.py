"""What happens to a run happens to people: it is killed, its disk is full, its files rot. What is
left then. `make test-long` kills and breaks more of the same."""

import contextlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from copy import deepcopy
from functools import partial
from pathlib import Path

import child
import pytest
import released
import torch
import torch.distributed as dist
from conftest import error_of, random_model, tiny
from PIL import Image

import maskrl
import sample
import train_rl
from maskrl import InputError, NonFinite

QUICK = (
    "--image-size 8 --patch 4 --width 16 --depth 1 --heads 1 --buffer 1 --head-width 16 "
    "--head-depth 1 --steps 4 --teacher-iters 8 --gsim-iters 4 --rl-iters 4 --schedule-iters 2 "
    "--judge-iters 3 --judge-n 18 --per-class 20 --batch 7 --prompts 3 --group 3 "
    "--denoise-steps 2 --device cpu --threads 1"
).split()


# Killed and started again -------------------------------------------------------------------------


def without_times(value):
    """A log line or metrics without what is never the same twice."""
    if isinstance(value, list):
        return [without_times(v) for v in value]
    if not isinstance(value, dict):
        return value
    times = ("seconds", "seconds_per_image", "minutes")
    return {key: without_times(v) for key, v in value.items() if key not in times}


def results(out):
    """All that a run leaves behind but times and pictures: weights, log and metrics."""
    found = {"log": without_times(maskrl.read_log(out))}
    found["metrics"] = without_times(json.loads((out / "metrics.json").read_text()))
    for path in sorted(out.glob("*.pt")):
        content = torch.load(path, weights_only=True)
        for part in ("model", "model_ema"):
            found |= {(path.name, part, k): v.tolist() for k, v in content[part].items()}
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
            code, output = child.finish(
                script, [*QUICK, *options, "--out", out], out / "output", every=2
            )
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
        process = child.start(script, argv, out.parent / "output", every=2)
        process.join(share * seconds)
        if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        codes.append(process.exitcode)
    code, output = child.finish(script, argv, out.parent / "output", every=2)
    assert code == 0, output
    return codes


EXITS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}


def check_kills(script, moments, uninterrupted, tmp_path, *options):
    whole, seconds = uninterrupted(script, *options)
    codes = stop_and_go_on(script, moments, tmp_path / "out", seconds, *options)
    for (number, _), code in zip(moments, codes):
        assert code in (0, EXITS[number]), codes  # 0: it was faster
    assert results(tmp_path / "out") == results(whole)
    assert not list((tmp_path / "out").glob("*.tmp"))
    return codes


def test_a_run_that_is_stopped_twice_ends_like_one_that_is_not(uninterrupted, tmp_path):
    """Bit-identical weights, and log and metrics but for times."""
    moments = [(signal.SIGTERM, 0.3), (signal.SIGKILL, 0.4)]
    check_kills("rl", moments, uninterrupted, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("script", ["distill", "rl"])
def test_a_run_that_is_stopped_at_random_ends_like_one_that_is_not(
    uninterrupted, tmp_path, script, seed
):
    """Two stops each. A checkpoint is written after every second step, so that some of them come
    while one is."""
    dice = random.Random(seed)
    numbers = dice.choices(list(EXITS), k=2)
    moments = [(number, dice.uniform(0.02, 0.9)) for number in numbers]
    longer = "--teacher-iters 24 --gsim-iters 8 --rl-iters 8 --schedule-iters 4".split()
    codes = check_kills(script, moments, uninterrupted, tmp_path, *longer)
    print(f"{script}: {codes}")


def at_work(out, lines=3):
    """Wait until the run in this folder has logged something."""
    for _ in range(6000):  # two minutes, on a busy machine
        if len(maskrl.read_log(out)) >= lines:
            return
        time.sleep(0.02)
    raise AssertionError(f"nothing happened in {out}")


FOREVER = [*QUICK, "--teacher-iters", "100000"]


def test_a_signal_says_where_the_training_is_saved_and_how_it_goes_on(tmp_path):
    out = tmp_path / "out"
    process = child.start("distill", [*FOREVER, "--out", out], tmp_path / "output")
    at_work(out, lines=1)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    step = maskrl.read_checkpoint(out / "teacher.pt")["step"]
    said = (tmp_path / "output").read_text().splitlines()[-1]
    assert f"teacher is saved in {out}/teacher.pt after {step} steps" in said
    assert said.endswith("the same command with --resume continues")
    assert process.exitcode == 143
    assert step % 250  # at once, not only when it was time


def test_a_second_signal_does_not_wait_but_several_processes_do(tmp_path):
    """These may get each signal twice, from the machine and from torchrun."""
    with pytest.raises(maskrl.Stopped, match="the second signal"):
        with maskrl.held_signals() as noted:
            signal.raise_signal(signal.SIGTERM)
            assert noted == [signal.SIGTERM]
            signal.raise_signal(signal.SIGTERM)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with maskrl.held_signals() as noted:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
    finally:
        dist.destroy_process_group()
    assert noted == [signal.SIGTERM, signal.SIGTERM]


def test_a_folder_belongs_to_one_run_until_it_ends(tmp_path, capsys):
    """Two of them once overwrote each other's checkpoints and wrote one log. A killed one leaves no
    lock behind."""
    out = tmp_path / "out"
    process = child.start("distill", [*FOREVER, "--out", out], tmp_path / "output")
    at_work(out, lines=1)
    argv = [*QUICK, "--out", out, "--resume"]
    assert f"another run is at work in --out {out}" in error_of(train_rl.main, argv, capsys)
    process.kill()
    process.join()
    maskrl.claim(out)
    maskrl.claim(out)  # as the same process may


def test_a_log_loses_a_line_that_was_cut_and_those_that_come_again(tmp_path):
    lines = [{"stage": s, "step": i} for s in ("teacher", "student") for i in range(4)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"stage": "student", "st')
    assert maskrl.read_log(tmp_path) == lines
    maskrl.trim_log(tmp_path, "student", 2)
    assert maskrl.read_log(tmp_path) == lines[:6]
    maskrl.append_log(tmp_path, lines[6])
    assert (tmp_path / "log.jsonl").read_text() == text[: -len(json.dumps(lines[7])) - 1]


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    maskrl.append_log(tmp_path, {"stage": "teacher", "step": 0, "loss": math.nan})
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None
    rows = {"rows": {"real": {"recall": math.inf, "steps": 2.5}}}
    assert json.loads(maskrl.as_json(rows))["rows"]["real"] == {"recall": None, "steps": 2.5}


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
    assert after["rows"]["student"] != before["rows"]["student"]  # it was timed anew
    assert after["minutes"].keys() == before["minutes"].keys()


@contextlib.contextmanager
def full_disk(left):
    """No file of this process grows beyond `left` bytes: writing more fails, as it really does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("left", [0, 100, 20_000])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(model, tmp_path, left):
    path, log = tmp_path / "teacher.pt", tmp_path / "log.jsonl"
    maskrl.save_checkpoint(path, model, step=1)
    with full_disk(left):
        with pytest.raises(InputError, match=f"{path} cannot be written: File too large"):
            maskrl.save_checkpoint(path, model, step=2)
        with pytest.raises(InputError, match=f"{log} cannot be written: File too large"):
            maskrl.append_log(tmp_path, {"stage": "teacher", "text": 20_000 * "x"})
        picture = Image.effect_noise((200, 200), 50)
        with pytest.raises(InputError, match="a.png cannot be written: File too large"):
            maskrl.save_picture(tmp_path / "a.png", picture)
    assert maskrl.read_checkpoint(path)["step"] == 1
    assert {file.name for file in tmp_path.iterdir()} <= {"teacher.pt", "log.jsonl"}
    maskrl.trim_log(tmp_path, "teacher", 0)  # a cut line does not spoil the next one
    maskrl.append_log(tmp_path, {"stage": "teacher", "step": 0})
    assert maskrl.read_log(tmp_path) == [{"stage": "teacher", "step": 0}]


@pytest.mark.parametrize("error", [KeyboardInterrupt, maskrl.Stopped(signal.SIGTERM, "")])
def test_who_is_stopped_while_a_file_is_written_leaves_the_old_one_alone(tmp_path, error):
    maskrl.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt):
        with maskrl.writing(tmp_path / "a.txt") as file:
            file.write(b"ne")
            raise error
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# What is not finite -------------------------------------------------------------------------------


def steps_of(training):
    """update(step) of a teacher, on random tokens."""

    def update(step):
        x, labels = torch.randn(4, 16, 12, generator=maskrl.rng(step)), torch.tensor([0, 1, 2, 0])
        return training.update(step, x, labels, maskrl.rng(step))

    return update


def test_a_gradient_that_is_not_finite_is_named_and_what_it_came_from_is_saved(tmp_path):
    training, path = maskrl.TeacherTraining(tiny(), ["a", "b", "c"]), tmp_path / "teacher.pt"
    calls = []

    def spoilt(gradient):
        calls.append(0)
        return gradient * (math.inf if len(calls) == 4 else 1.0)

    training.model.decoder_norm.bias.register_hook(spoilt)
    with pytest.raises(NonFinite) as error:
        maskrl.train(training, steps_of(training), path, 6, every=2)
    assert "teacher, step 3: the gradient norm is" in str(error.value)
    assert "the gradient of decoder_norm.bias" in str(error.value)
    assert f"{path} holds the good weights after 3 steps, and --resume repeats" in str(error.value)

    again, steps = maskrl.TeacherTraining(tiny(), ["a", "b", "c"]), []

    def stop_at_3(step):
        steps.append(step)
        if step == 3:
            raise KeyboardInterrupt
        return steps_of(again)(step)

    with pytest.raises(KeyboardInterrupt):
        maskrl.train(again, stop_at_3, path, 6, resume=True)
    assert steps == [3]
    own, its = again.model.state_dict(), training.model.state_dict()
    assert all(torch.equal(own[name], its[name]) for name in own)  # what met the gradient


def test_weights_that_are_not_finite_never_reach_the_average(tmp_path):
    """A step that is too large, of a gradient that is not."""
    training, path = maskrl.TeacherTraining(tiny(), ["a", "b", "c"]), tmp_path / "teacher.pt"
    weights = training.model.parameters()
    training.state["sgd"] = torch.optim.SGD(weights, lr=3e38, weight_decay=10.0)
    training.optimizers = [training.state["sgd"]]
    with pytest.raises(NonFinite, match=r"step 0: the step made the norm .* \(fake_latent"):
        maskrl.train(training, steps_of(training), path, 100)
    assert not all(p.isfinite().all() for p in training.model.parameters())
    assert all(p.isfinite().all() for p in training.ema.parameters())
    assert not path.exists()


def test_a_reward_that_raises_names_itself(monkeypatch):
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)

    def first_fine(images, labels):
        if calls:
            raise ConnectionError("no server")
        calls.append(0)
        return images.mean((1, 2, 3))

    calls = []
    quality = maskrl.checked_reward("my:reward", first_fine, images, labels)
    with pytest.raises(NonFinite, match="--reward my:reward raised ConnectionError: no server"):
        quality(images, labels)
    with pytest.raises(InputError, match="--reward my:reward raised ConnectionError"):
        maskrl.checked_reward("my:reward", first_fine, images, labels)


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


# Broken files -------------------------------------------------------------------------------------


def flipped(data, dice):
    i = dice.randrange(len(data))
    return data[:i] + bytes([data[i] ^ 1 << dice.randrange(8)]) + data[i + 1 :]


def overwritten(data, dice):
    i, n = dice.randrange(len(data)), dice.choice([1, 4, 100, 4000])
    return data[:i] + dice.randbytes(len(data[i : i + n])) + data[i + n :]


def cut(data, dice):
    return data[: dice.choice([0, 1, 100, dice.randrange(len(data))])]


def with_a_gap(data, dice):
    i = dice.randrange(len(data))
    return data[:i] + data[i + dice.choice([1, 64, 1000]) :]


def stretched(data, dice):
    i = dice.randrange(len(data))
    return data[:i] + dice.randbytes(dice.choice([1, 64, 1000])) + data[i:]


DAMAGE = (flipped, overwritten, cut, with_a_gap, stretched)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """{how it is loaded: (function, bytes, weights)} of a sound file of each kind."""
    folder, policy = tmp_path_factory.mktemp("sound"), random_model("policy")
    maskrl.add_schedule(policy)
    maskrl.save_checkpoint(folder / "policy.pt", policy)
    torch.save(released.official(), folder / "mar.pth")
    torch.save({"model": released.small_vae().state_dict()}, folder / "kl16.ckpt")
    loads = {
        "policy.pt": maskrl.load_checkpoint,
        "mar.pth": partial(maskrl.load_mar, num_heads=4),
        "kl16.ckpt": maskrl.load_kl16,
    }
    files = {name: (folder / name).read_bytes() for name in loads}
    return {name: (load, files[name], load(folder / name)) for name, load in loads.items()}


def is_refused_or_the_same(path, load, sound_model):
    """Whether loading ends in the documented error; if not, no bit may differ."""
    try:
        loaded = load(path).state_dict()
    except InputError as error:
        assert str(path) in str(error)
        return True
    its = sound_model.state_dict()
    assert all(torch.equal(loaded[name], its[name]) for name in its)
    return False


def check_damaged_files(sound, tmp_path, name, dice, n):
    load, data, model = sound[name]
    path, refused = tmp_path / name, 0
    for i in range(n):
        path.write_bytes(DAMAGE[i % len(DAMAGE)](data, dice))
        refused += is_refused_or_the_same(path, load, model)
    return refused


KINDS_OF_FILES = ("policy.pt", "mar.pth", "kl16.ckpt")


@pytest.mark.parametrize("name", KINDS_OF_FILES)
def test_a_damaged_file_is_refused_or_does_no_harm(sound, tmp_path, name):
    refused = check_damaged_files(sound, tmp_path, name, random.Random(0), 30)
    assert refused > 20  # some bits mean nothing, such as times and padding


def test_every_flipped_bit_of_a_weight_is_noticed(sound, tmp_path):
    """Nearly all of them once loaded silently, as other weights."""
    load, data, model = sound["policy.pt"]
    weight = model.z_proj.weight.numpy().tobytes()
    start, dice = data.index(weight), random.Random(0)
    for _ in range(20):
        i = start + dice.randrange(len(weight))
        (tmp_path / "policy.pt").write_bytes(
            data[:i] + bytes([data[i] ^ 1 << dice.randrange(8)]) + data[i + 1 :]
        )
        with pytest.raises(InputError, match="policy.pt is damaged: the checksum of"):
            load(tmp_path / "policy.pt")


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS_OF_FILES)
@pytest.mark.parametrize("seed", range(1, 3))
def test_many_damaged_files_are_refused_or_do_no_harm(sound, tmp_path, name, seed):
    refused = check_damaged_files(sound, tmp_path, name, random.Random(seed), 400)
    print(f"{name}: {refused} of 400 refused")


VALUES = (
    *(
        None,
        True,
        -1,
        0,
        3,
        10**6,
        2**63,
        10**30,
        0.5,
        math.nan,
        math.inf,
        -1e30,
        "",
        "x",
        "\udcff",
    ),
    *([], [1], {}, {"a": 1}, (), {3: 4}, ["a"] * 3, torch.zeros(()), torch.zeros(0)),
    *(torch.zeros(3, 32), torch.full((2, 2), math.nan), torch.zeros(1).expand(2**20, 2**20)),
    *(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2).to_sparse(), torch.zeros(2).bool()),
)


def places(value, path=()):
    """Paths to everything in nested dictionaries and lists."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from places(v, (*path, i))


def changed(content, dice):
    """A content with one value replaced, deleted or added; which one."""
    content = deepcopy(content)
    *above, last = dice.choice([path for path in places(content) if path])
    holder = content
    for key in above:
        holder = holder[key]
    how = dice.choice(["replace", "replace", "replace", "delete", "add"])
    if how == "delete":
        del holder[last]
    elif how == "add" and isinstance(holder, dict):
        holder[dice.choice(["x", 3, "schedule.counts", "training"])] = dice.choice(VALUES)
    else:
        holder[last] = dice.choice(VALUES)
    return content, (how, *above, last)


def check_changed_contents(sound, tmp_path, name, dice, n):
    """Files that are sound archives of something else. What is loaded in spite of that can be
    used."""
    load, data, _ = sound[name]
    content = torch.load(io.BytesIO(data), weights_only=True)
    path = tmp_path / name
    for _ in range(n):
        other, what = changed(content, dice)
        torch.save(other, path)
        try:
            model = load(path)
        except InputError as error:
            assert str(path) in str(error), what
            continue
        assert all(p.isfinite().all() for p in model.parameters()), what
        if name == "kl16.ckpt":
            model.decode(torch.zeros(1, model.channels, 2, 2))
        else:
            tokens = maskrl.generate(model, [0], maskrl.Sampling(steps=1))
            assert tokens.shape == (1, model.length, model.channels), what


@pytest.mark.parametrize("name", KINDS_OF_FILES)
def test_a_file_of_something_else_is_refused_or_can_be_used(sound, tmp_path, name):
    check_changed_contents(sound, tmp_path, name, random.Random(0), 20)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS_OF_FILES)
def test_many_files_of_something_else_are_refused_or_can_be_used(sound, tmp_path, name):
    check_changed_contents(sound, tmp_path, name, random.Random(1), 250)


def changed_states(tmp_path, dice, n):
    """Resume from n checkpoints whose training state was changed; how many were refused."""
    path, refused = tmp_path / "teacher.pt", 0
    training = maskrl.TeacherTraining(tiny(teacher_iters=4), ["a", "b", "c"])

    def stop(step):
        if step == 2:
            raise KeyboardInterrupt
        return steps_of(training)(step)

    with pytest.raises(KeyboardInterrupt):
        maskrl.train(training, stop, path, 4, every=2)
    content = torch.load(path, weights_only=True)
    for _ in range(n):
        content_of_other, what = changed({"training": content["training"]}, dice)
        torch.save(content | {"training": None} | content_of_other, path)
        again = maskrl.TeacherTraining(tiny(teacher_iters=4), ["a", "b", "c"])
        try:
            maskrl.train(again, steps_of(again), path, 4, resume=True)
        except (InputError, NonFinite):
            refused += 1
        except Exception as error:
            raise AssertionError(what) from error
    return refused


def test_a_training_resumes_from_its_own_state_alone(tmp_path):
    assert changed_states(tmp_path, random.Random(0), 20) > 10


@pytest.mark.long
def test_a_training_resumes_from_no_changed_state(tmp_path):
    print(f"{changed_states(tmp_path, random.Random(1), 300)} of 300 refused")


# Broken images ------------------------------------------------------------------------------------

IMAGES = {
    "a.png": ("RGB", {}),
    "b.png": ("I;16", {}),
    "c.jpg": ("RGB", {}),
    "d.jpg": ("CMYK", {}),
    "e.gif": ("P", {"save_all": True}),
    "f.webp": ("RGBA", {}),
    "g.tiff": ("L", {"compression": "tiff_lzw"}),
    "h.bmp": ("RGB", {}),
    "i.jp2": ("RGB", {}),
    "j.ppm": ("RGB", {}),
}


def check_damaged_images(tmp_path, dice, n):
    for i in range(n):
        name = dice.choice(list(IMAGES))
        mode, options = IMAGES[name]
        image = Image.effect_noise((24, 16), 80)
        image = Image.new("I;16", (24, 16)) if mode == "I;16" else image.convert(mode)
        image.save(tmp_path / name, **options)
        data = DAMAGE[i % len(DAMAGE)]((tmp_path / name).read_bytes(), dice)
        (tmp_path / name).write_bytes(data)
        try:
            image = maskrl.read_rgb(tmp_path / name, 8)
        except InputError as error:
            assert name in str(error)
        else:
            assert maskrl.middle_square(image, 8).shape == (3, 8, 8)


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_image_is_refused_or_read(tmp_path):
    check_damaged_images(tmp_path, random.Random(0), 60)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_many_damaged_images_are_refused_or_read(tmp_path):
    check_damaged_images(tmp_path, random.Random(1), 1000)


def png_header(side):
    """A PNG that says it has side x side pixels, and has none."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


def test_a_folder_of_odd_things_is_read_as_far_as_it_can_be(tmp_path, monkeypatch):
    """Links in a circle, names that are no UTF-8, images of one pixel, and one that says it has 400
    million."""
    # as Python opens it for a process; pytest's own is stricter
    monkeypatch.setattr(sys, "stderr", open(tmp_path / "said", "w", errors="backslashreplace"))
    folder = os.fsencode(tmp_path / "photos") + b"/caf\xe9"
    os.makedirs(folder)
    for i in range(20):
        Image.new("RGB", (1, 1), (i, 0, 0)).save(os.fsdecode(folder + b"/\xff%d.png" % i))
    os.symlink(b"..", folder + b"/above")
    os.symlink(b".", folder + b"/here")
    os.symlink(b"itself", folder + b"/itself")
    os.symlink(b"me.png", folder + b"/me.png")
    (tmp_path / "photos" / "caf\udce9" / "huge.png").write_bytes(png_header(20_000))
    data = maskrl.load_data(tiny(), str(tmp_path / "photos"))
    assert len(data.train) + len(data.judge) + len(data.test) == 20
    assert data.classes == ["caf\udce9"]
    sys.stderr.flush()
    said = (tmp_path / "said").read_text()
    assert "1 itself (a broken link), 1 .png (a broken link)" in said
    assert "huge.png" in said
    assert "skipped 1 of 21" in said


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


# Many images --------------------------------------------------------------------------------------


def test_any_number_of_images_is_drawn_batch_by_batch(student, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "BATCH", 4)
    maskrl.save_checkpoint(tmp_path / "student.pt", student)
    to = ["--out", str(tmp_path / "a.png"), "--device", "cpu", "--threads", "1"]
    argv = [str(tmp_path / "student.pt"), *to, "--files"]
    sample.main([*argv, str(tmp_path / "ten"), "--n", "10"])
    sample.main([*argv, str(tmp_path / "four"), "--n", "4"])
    ten, four = (sorted((tmp_path / name).iterdir()) for name in ("ten", "four"))
    assert [path.name for path in ten] == [f"{i:05} {'abc'[i % 3]}.png" for i in range(10)]
    assert len({path.read_bytes() for path in ten}) == 10
    assert [path.read_bytes() for path in four] == [path.read_bytes() for path in ten[:4]]
    error = error_of(sample.main, [*argv[:-1], "--n", 1025], capsys)
    assert "--n 1025: a picture shows at most 1024; more of them need --files" in error


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
    maskrl.save_checkpoint(tmp_path / "student.pt", random_model("student", image_size=32, patch=8))
    argv = [option.format(out, out) for option in SAMPLE[name].split()]
    if argv[0] == "student.pt":
        argv[0] = tmp_path / "student.pt"
    argv += ["--device", "cpu", "--threads", "1"]
    code, said = child.finish("sample", argv, tmp_path / "output", die_at=1000)
    assert code == -signal.SIGXFSZ, said
    assert written(out) == ({out / name: b"old"}, {out / f"{name}.tmp"})


@pytest.mark.long
def test_pictures_of_runs_that_are_stopped_are_whole(student, tmp_path):
    """sample.py, stopped 24 times at random: every file is that of one run or of the other."""
    maskrl.save_checkpoint(tmp_path / "student.pt", student)
    out, output, dice = tmp_path / "out", tmp_path / "output", random.Random(0)

    def argv(seed):
        to = ["--out", out / "a.png", "--film", out / "film.gif", "--files", out / "files"]
        how = ["--n", 100, "--steps", 2, "--device", "cpu", "--threads", 1, "--seed", seed]
        return [tmp_path / "student.pt", *to, *how]

    wholes = []
    for seed in (0, 1):
        code, said = child.finish("sample", argv(seed), output)
        assert code == 0, said
        wholes.append(written(out)[0])
    assert len(wholes[0]) == 102
    assert all(wholes[0][path] != wholes[1][path] for path in wholes[0])
    stops = []
    for seed in 12 * [0, 1]:
        number, watched = dice.choice(list(EXITS)), dice.choice(sorted(wholes[0]))
        before = watched.stat().st_ino
        process = child.start("sample", argv(seed), output)
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
    maskrl.save_checkpoint(tmp_path / "student.pt", student)
    peak = {}
    for n in (2_000, 20_000):
        to = ["--out", tmp_path / "a.png", "--files", tmp_path / "files", "--device", "cpu"]
        argv = [tmp_path / "student.pt", "--n", n, *to, "--steps", 1]
        process = child.start("sample", argv, tmp_path / "output")
        peak[n] = 0
        while process.is_alive():
            status = Path(f"/proc/{process.pid}/status").read_text()
            if "VmHWM" in status:
                peak[n] = int(status.split("VmHWM:")[1].split()[0]) // 1024
            time.sleep(0.02)
        assert process.exitcode == 0
    print(f"peak memory in MiB: {peak}")
    assert peak[20_000] < peak[2_000] + 50


def test_no_picture_is_written_over_a_given_one(student, tmp_path, capsys):
    """Whatever it is called."""
    maskrl.save_checkpoint(tmp_path / "student.pt", student)
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    for path in (photo, mask):
        Image.new("RGB", (8, 8), "white").save(path)
    (tmp_path / "link.png").symlink_to(photo)
    for out in (photo, tmp_path / "link.png", tmp_path / "x" / ".." / "photo.png"):
        argv = [tmp_path / "student.pt", "--inpaint", photo, "--mask", mask, "--out", out]
        assert "would overwrite" in error_of(sample.main, argv, capsys)
    assert Image.open(photo).size == (8, 8)


# Several processes --------------------------------------------------------------------------------


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def side_by_side(script, argv, folder, n=2):
    """The processes that torchrun would start on this machine, and the file each writes."""
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": str(n)}
    return [
        child.start(
            script,
            argv,
            folder / f"output {i}",
            every=2,
            environ=world | {"RANK": str(i), "LOCAL_RANK": str(i)},
        )
        for i in range(n)
    ]


def assert_close(a, b):
    """Two logs say the same but for times and rounding."""
    assert len(a) == len(b) > 0
    for one, other in zip(without_times(a), without_times(b)):
        assert one.pop("stage") == other.pop("stage")
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("action", maskrl.ACTIONS)
def test_two_processes_train_like_one(uninterrupted, tmp_path, action):
    """Teacher, GSIM and RL, on batches that two do not divide: the same losses. A signal to one of
    them stops both, and one process finishes what they began."""
    (whole, _), out = uninterrupted("rl", "--action", action), tmp_path / "out"
    options = [*QUICK, "--action", action]
    processes = side_by_side("rl", [*options, "--out", out], tmp_path)
    before_rl = [line for line in maskrl.read_log(whole) if line["stage"] != "policy"]
    at_work(out, lines=len(before_rl) + 1)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join()
    said = (tmp_path / "output 0").read_text() + (tmp_path / "output 1").read_text()
    assert [process.exitcode for process in processes] == [143, 143], said
    begun = maskrl.read_log(out)
    argv = [*options, "--out", out, "--resume"]
    code, said = child.finish("rl", argv, tmp_path / "output", every=2)
    assert code == 0, said
    log = maskrl.read_log(out)
    assert log[: len(begun)] == begun
    assert_close(log, maskrl.read_log(whole))


@pytest.mark.long
def test_two_processes_train_and_report_like_one(uninterrupted, tmp_path):
    whole, out = uninterrupted("rl")[0], tmp_path / "out"
    for process in side_by_side("rl", [*QUICK, "--out", out], tmp_path):
        process.join()
        assert process.exitcode == 0
    assert_close(maskrl.read_log(out), maskrl.read_log(whole))
    two, one = (json.loads((path / "metrics.json").read_text()) for path in (out, whole))
    for name, row in without_times(one["rows"]).items():
        assert without_times(two["rows"])[name] == pytest.approx(row, rel=1e-2, abs=1e-3)


def test_a_process_that_dies_ends_the_others_with_a_message(tmp_path):
    processes = side_by_side("distill", [*FOREVER, "--out", tmp_path / "out"], tmp_path)
    at_work(tmp_path / "out", lines=1)
    processes[1].kill()
    processes[0].join(60)
    assert processes[0].exitcode == 1
    assert "error: process 0 lost another one" in (tmp_path / "output 0").read_text()


@contextlib.contextmanager
def torchrun(script, argv, output):
    """The command itself: its process, and the numbers of the two that it started."""
    root = Path(maskrl.__file__).parent
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", free_port()]
    with open(output, "w") as file:
        launcher = subprocess.Popen(
            [sys.executable, *command, root / script, *map(str, argv)], stdout=file, stderr=file
        )
    try:
        at_work(argv[argv.index("--out") + 1], lines=2)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
        yield launcher, [int(number) for number in children.split()]
        launcher.wait(60)
    finally:
        launcher.terminate()
        launcher.wait()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_torchrun_began_and_was_stopped_one_process_finishes(uninterrupted, tmp_path, number):
    out, longer = tmp_path / "out", ["--teacher-iters", 100]
    argv = [*QUICK, *longer, "--out", out]
    with torchrun("train_rl.py", argv, tmp_path / "output") as (launcher, _):
        launcher.send_signal(number)
    assert f"teacher is saved in {out}/teacher.pt after" in (tmp_path / "output").read_text()
    assert len(maskrl.read_log(out)) < 100
    code, said = child.finish("rl", [*argv, "--resume"], tmp_path / "output", every=2)
    assert code == 0, said
    assert_close(maskrl.read_log(out), maskrl.read_log(uninterrupted("rl", *longer)[0]))


@pytest.mark.long
@pytest.mark.parametrize("dead", [0, 1])
def test_torchrun_ends_within_a_minute_if_one_of_its_processes_is_killed(tmp_path, dead):
    argv, output = [*FOREVER, "--out", tmp_path / "out"], tmp_path / "output"
    with torchrun("train_distill.py", argv, output) as (launcher, workers):
        os.kill(workers[dead], signal.SIGKILL)
    assert launcher.returncode == 1
    assert "train_distill.py FAILED" in output.read_text()
    assert not any(Path(f"/proc/{number}").exists() for number in workers)
