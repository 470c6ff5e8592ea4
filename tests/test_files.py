"""Files are whole or absent, and a checkpoint is what it says or is refused.

`make test-long` damages more of the same."""

import gzip
import io
import json
import math
import os
import pickle
import random
import signal
import zipfile
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import full_disk, random_model
from helpers_files import DAMAGE, changed, flipped
from helpers_released import official, small_vae
from PIL import Image

import maskrl
from workbench.errors import InputError, Stopped
from workbench.files import (
    KINDS,
    as_json,
    load_checkpoint,
    load_safely,
    read_checkpoint,
    save_safely,
    write_checkpoint,
    write_text,
    writing,
)
from workbench.kl16 import load_kl16
from workbench.precision import set_precision
from workbench.pretrained import TorchvisionFeatures
from workbench.released import load_mar, load_model
from workbench.settings import RunSettings

TUTORIAL = Path(maskrl.__file__).parent / "assets" / "tutorial"

# Writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 100, 20_000])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(model, tmp_path, left):
    path, text, picture = (tmp_path / name for name in ("teacher.pt", "a.txt", "a.png"))
    write_checkpoint(path, model, step=1)
    with full_disk(left):
        with pytest.raises(InputError, match=f"{path} cannot be written: File too large"):
            write_checkpoint(path, model, step=2)
        with pytest.raises(InputError, match=f"{text} cannot be written: File too large"):
            write_text(text, 20_001 * "x")
        with pytest.raises(InputError, match=f"{picture} cannot be written: File too large"):
            with writing(picture) as file:
                Image.effect_noise((200, 200), 50).save(file, "png")
    assert read_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["teacher.pt"]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(
        InputError, match="a/b.txt cannot be written: (Not a directory|File exists)"
    ):
        write_text(tmp_path / "a" / "b.txt", "text")


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped(signal.SIGTERM, "")])
def test_who_is_stopped_while_a_file_is_written_leaves_the_old_one_alone(tmp_path, error):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt):
        with writing(tmp_path / "a.txt") as file:
            file.write(b"ne")
            raise error
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


NOT_OF_THE_FILE = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("can't allocate memory"),
    MemoryError(),
    FloatingPointError("the loss is nan"),
)


@pytest.mark.parametrize("error", NOT_OF_THE_FILE, ids=repr)
def test_an_error_that_is_not_of_the_file_stays_what_it_is(model, tmp_path, monkeypatch, error):
    """All of them once became "a.txt cannot be written"."""
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(type(error)) as caught:
        with writing(path):
            raise error
    assert caught.value is error

    def failing(content, file):
        raise error

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(type(error)) as caught:
        write_checkpoint(path, model)
    assert caught.value is error
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped(signal.SIGTERM, "")])
def test_ctrl_c_inside_of_torch_save_is_no_fault_of_the_file(model, tmp_path, monkeypatch, error):
    """torch makes a RuntimeError of it, which once ended as "cannot be written"."""

    class Interrupted(io.FileIO):
        def write(self, data):
            if self.tell() > 1000:
                raise error
            return super().write(data)

    def open_interrupted(path, mode):
        return Interrupted(path, mode)

    monkeypatch.setattr("builtins.open", open_interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "teacher.pt", model)
    assert list(tmp_path.iterdir()) == []


def test_a_saved_checkpoint_leaves_no_other_file(model, tmp_path):
    """It is moved to its name, not copied: a half-written copy would be a torn checkpoint."""
    write_checkpoint(tmp_path / "new" / "teacher.pt", model)
    write_checkpoint(tmp_path / "new" / "teacher.pt", model, step=2)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["teacher.pt"]


def test_an_interrupted_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "teacher.pt"
    write_checkpoint(path, model, step=1)

    def torn(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(path, model, step=2)
    assert read_checkpoint(path)["step"] == 1


def test_a_save_has_the_new_file_on_the_disk_before_it_takes_the_old_ones_name(
    model, tmp_path, monkeypatch
):
    """Otherwise a power failure could leave a name without its content."""
    path, order = tmp_path / "teacher.pt", []
    write_checkpoint(path, model, step=1)
    fsync, move = os.fsync, os.replace

    def watched_fsync(file):
        order.append("written")
        fsync(file)

    def watched_move(source, target):
        assert read_checkpoint(target)["step"] == 1
        assert read_checkpoint(source)["step"] == 2
        order.append("moved")
        move(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_move)
    write_checkpoint(path, model, step=2)
    assert order == ["written", "moved"]


def test_numbers_that_json_does_not_know_are_null():
    rows = {"rows": {"real": {"recall": math.inf, "steps": 2.5}}, "lists": [[math.nan], (1, 0.5)]}
    read = json.loads(as_json(rows, indent=1), parse_constant=pytest.fail)
    assert read["rows"]["real"] == {"recall": None, "steps": 2.5}
    assert read["lists"] == [[None], [1, 0.5]]


# Checkpoints --------------------------------------------------------------------------------------


def test_a_loaded_checkpoint_generates_what_was_saved(policy, tmp_path):
    write_checkpoint(tmp_path / "policy.pt", policy)
    again = load_checkpoint(tmp_path / "policy.pt")
    assert again.kind == "policy"
    assert again.settings == policy.settings
    assert again.classes == policy.classes
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert torch.equal(maskrl.generate(again, [0, 1, 2]), maskrl.generate(policy, [0, 1, 2]))


def test_what_a_checkpoint_is_used_for_are_its_averaged_weights(model, tmp_path):
    ema = deepcopy(model)
    torch.nn.init.ones_(ema.mask_token)
    write_checkpoint(tmp_path / "teacher.pt", model, ema)
    assert (load_checkpoint(tmp_path / "teacher.pt").mask_token == 1).all()
    content = read_checkpoint(tmp_path / "teacher.pt")
    assert torch.equal(content["model"]["mask_token"], model.mask_token)


def test_maskrl_and_the_workbench_read_each_others_files(policy, tmp_path):
    path = tmp_path / "policy.pt"
    write_checkpoint(path, policy, step=3, training={"optimizer": {}})
    models = [policy, maskrl.load(path)]
    maskrl.save(path, policy)
    content = read_checkpoint(path)
    assert (content["step"], content["training"]) == (0, None)
    models.append(load_checkpoint(path))
    images = [maskrl.generate(m, [0, 1]) for m in models]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_a_model_of_plain_settings_gets_those_of_a_run(tmp_path):
    maskrl.save(tmp_path / "a.pt", maskrl.MAR(maskrl.Settings(scale=1.5), ["a"]))
    assert load_checkpoint(tmp_path / "a.pt").settings == RunSettings(scale=1.5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tutorials_checkpoints_are_still_read(kind):
    for path in sorted(TUTORIAL.glob(f"*{kind}*.pt")):
        model = load_checkpoint(path, kind)
        assert maskrl.generate(model, [0], maskrl.Sampling(steps=1)).isfinite().all()


def test_a_checkpoint_is_loaded_to_the_cpu_and_the_model_alone_moved(policy, tmp_path, monkeypatch):
    """The state of the optimisers, three times as large, once went to the GPU as well."""
    path, locations, load = tmp_path / "policy.pt", [], torch.load
    write_checkpoint(path, policy, step=1, training={"adam": torch.zeros(1000)})

    def watched(path, map_location, **options):
        locations.append(map_location)
        return load(path, map_location, **options)

    monkeypatch.setattr(torch, "load", watched)
    model = load_checkpoint(path, device="meta")
    assert locations == ["cpu"]
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_holds_the_model_and_nothing_else_of_a_checkpoint(policy, tmp_path):
    path = tmp_path / "policy.pt"
    write_checkpoint(path, policy.cuda(), step=1, training={"adam": torch.zeros(10**7).cuda()})
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_checkpoint(path, device="cuda")
    assert torch.cuda.max_memory_allocated() - before < 10**7
    for name, value in policy.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_loaded_model_computes_in_the_precision_of_its_settings(tmp_path):
    model = random_model(precision="bf16")
    write_checkpoint(tmp_path / "teacher.pt", model)
    tokens, labels = torch.randn(2, 16, 12), torch.tensor([0, 1])
    mask = torch.rand(2, 16) < 0.5
    plain = model.context(tokens, mask, labels)
    again = load_checkpoint(tmp_path / "teacher.pt").context(tokens, mask, labels)
    assert not torch.equal(again, plain)
    set_precision(model, "bf16")
    assert torch.equal(again, model.context(tokens, mask, labels))


@pytest.fixture
def altered(student, tmp_path):
    """altered(change) -> path of a student.pt whose content was changed by change(content)."""

    def alter(change):
        path = tmp_path / "student.pt"
        write_checkpoint(path, student)
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
        return path

    return alter


def setting(**values):
    """A change of single settings."""

    def change(content):
        content["settings"].update(values)

    return change


def part(name, value):
    """A change of a whole part."""

    def change(content):
        content[name] = value

    return change


def without(name):
    def change(content):
        del content[name]

    return change


def weight(name, value):
    """A change of one weight; None takes it away."""

    def change(content):
        content["model_ema"][name] = value
        if value is None:
            del content["model_ema"][name]

    return change


UNSOUND = {
    "negative size": (setting(image_size=-8), "--image-size -8 must be at least 2"),
    "size not in tokens": (setting(image_size=9), "--image-size 9 must be a multiple"),
    "no scale": (setting(scale=0.0), "its --scale is 0"),
    "a size that is text": (setting(image_size="8"), "--image-size '8' must be of type int"),
    "unknown choice": (setting(rl_steps="foo"), "--rl-steps foo must be one of"),
    "nan": (setting(guidance=math.nan), "--guidance nan must be a finite number"),
    "unknown setting": (setting(colour="red"), "settings that this version does not know: colour"),
    "no settings": (without("settings"), "is not a maskrl checkpoint"),
    "settings that are none": (part("settings", None), "is not a maskrl checkpoint"),
    "unknown kind": (part("kind", "master"), "is not a maskrl checkpoint"),
    "more classes": (part("classes", list("abcd")), "weights do not fit its settings: .*class_emb"),
    "fewer classes": (part("classes", ["a"]), "weights do not fit its settings: .*class_emb"),
    "no classes": (part("classes", None), "its classes must be of type list"),
    "classes in one text": (part("classes", "abc"), "its classes must be of type list"),
    "classes that are numbers": (part("classes", [1, 2, 3]), "must be a list of names"),
    "a step that is text": (part("step", "1"), "its step must be of type int"),
    "a negative step": (part("step", -1), "is not a maskrl checkpoint"),
    "a key that is no text": (part("settings", {1: 2}), "does not know: 1"),
    "other width": (setting(width=64), "weights do not fit its settings"),
    "other patch": (setting(patch=1), "weights do not fit its settings"),
    "misshapen weight": (weight("mask_token", torch.zeros(3)), "do not fit .*mask_token"),
    "flat weight": (weight("z_proj.weight", torch.zeros(3)), r"z_proj.weight is \[3\]"),
    "missing weight": (weight("z_proj.weight", None), "z_proj.weight is missing"),
    "another missing weight": (weight("mask_token", None), "settings: mask_token is missing"),
    "no weights": (part("model_ema", None), "has no weights under 'model_ema'"),
    "nan in a weight": (weight("mask_token", torch.full((1, 1, 32), math.nan)), "infinite or NaN"),
    "integers": (weight("mask_token", torch.zeros(1, 1, 32).long()), "of type torch.int64"),
    "complex numbers": (weight("mask_token", torch.zeros(1, 1, 32).cfloat()), "not a plain tensor"),
    "sparse": (weight("mask_token", torch.zeros(1, 1, 32).to_sparse()), "not a plain tensor"),
    "a weight of a teaspoon": (
        weight("mask_token", torch.zeros(1).expand(10**6, 10**6)),
        "larger than the file",
    ),
    "huge depth": (setting(depth=10_000), "--depth 10000 must be at most 200"),
    "large depth": (setting(depth=200), "weights do not fit its settings: encoder_blocks.1"),
    "large width": (setting(width=2**14), "weights do not fit its settings"),
    "huge image": (setting(image_size=2**20), "--image-size 1048576 must be at most"),
    "large image": (setting(image_size=4096, patch=2), "weights do not fit its settings"),
}


@pytest.mark.parametrize("change, said", UNSOUND.values(), ids=UNSOUND)
def test_an_unsound_checkpoint_is_named_and_what_is_wrong_with_it(altered, change, said):
    path = altered(change)
    with pytest.raises(InputError, match=said) as error:
        load_checkpoint(path)
    assert "student.pt" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_kind_is_refused(altered):
    path = altered(setting(guidance=2.0))
    assert read_checkpoint(path, "student")["settings"].guidance == 2
    with pytest.raises(InputError, match="student.pt is a student; a teacher is needed here"):
        load_checkpoint(path, "teacher")


def test_a_policy_of_another_kind_of_schedule_is_refused(policy, tmp_path):
    """One of an earlier version chose among fewer counts."""
    policy.schedule.net[2] = torch.nn.Linear(64, 6)
    write_checkpoint(tmp_path / "policy.pt", policy)
    with pytest.raises(InputError, match="policy.pt.*schedule.net.2.weight"):
        load_checkpoint(tmp_path / "policy.pt")


# Other files --------------------------------------------------------------------------------------


def resaved(content, path, **options):
    """The content as another program might have written it."""
    torch.save(content, path, **options)
    return path


@pytest.fixture
def old(student, tmp_path):
    """student.pt in the format of torch before 1.6."""
    content = maskrl.checkpoint(student)
    return resaved(content, tmp_path / "student.pt", _use_new_zipfile_serialization=False)


def test_files_from_before_torch_1_6_are_read(old, student, tmp_path):
    """They were once refused."""
    again = load_checkpoint(old)
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in student.state_dict().items())
    old_format = {"_use_new_zipfile_serialization": False}
    load_mar(resaved(official(), tmp_path / "mar.pth", **old_format), num_heads=4)
    load_kl16(resaved({"model": small_vae().state_dict()}, tmp_path / "kl16.ckpt", **old_format))


@pytest.mark.parametrize("left", [1, 30, 1000, -5])
def test_an_old_file_that_is_cut_off_is_refused(old, left):
    old.write_bytes(old.read_bytes()[:left])
    with pytest.raises(InputError, match="student.pt (is cut off|is not a checkpoint)"):
        load_checkpoint(old)


def test_reading_an_old_file_runs_no_code_in_it(tmp_path):
    attack = {"model": Attack(tmp_path / "hacked")}
    path = resaved(attack, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"safely \(UnpicklingError, it holds a (posix|nt).mkdir"):
        load_safely(path)
    assert not (tmp_path / "hacked").exists()


def program(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", b"")
        archive.writestr("net/constants.pkl", b"")


def archive_of_a_checkpoint(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("student.pt", b"weights")


HEADER = b'{"z_proj.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
OTHER_FILES = {
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
        "git-lfs pointer",
    ),
    "page": (b"\n<!DOCTYPE html>\n<html><title>Sign in</title>", "it is a page for a browser"),
    "page with a mark": (b"\xef\xbb\xbf<html lang='de'>", "it is a page for a browser"),
    "error of a store": (b"<?xml version='1.0'?><Error><Code>AccessDenied", "it is a page for a"),
    "error": (b"Entry not found", "it is a text that begins with 'Entry not found'"),
    "json": (b'{"error": "Repository not found"}\n', "it is a text that begins with"),
    "safetensors": (len(HEADER).to_bytes(8, "little") + HEADER + bytes(4), "safetensors format"),
    "gzip": (gzip.compress(b"weights"), "it is compressed .gzip.: unpack it first"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "it is in the HDF5 format"),
    "pickle": (pickle.dumps({"model": 1}), "it is a pickle that torch.save did not write"),
    "empty": (b"", "it is empty"),
    "blank": (b" \n\n", "it is empty"),
    "zeros": (bytes(1000), "it is no file of torch.save"),
    "picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "it is no file of torch.save"),
    "program": (program, "it is a TorchScript program"),
    "archive": (archive_of_a_checkpoint, "it is a zip archive that torch.save did not write"),
}


@pytest.mark.parametrize("content, said", OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(tmp_path, content, said):
    """All were once "not a checkpoint that can be read safely (BadZipFile)"."""
    path = tmp_path / "teacher.pt"
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    for read in (load_checkpoint, load_model, load_kl16, TorchvisionFeatures):
        path = path.rename(tmp_path / ("resnet18.pth" if read == TorchvisionFeatures else path))
        with pytest.raises(InputError, match=f"{path.name} is not a checkpoint: .*{said}") as error:
            read(path, device="cpu")
        assert "\n" not in str(error.value)


def test_a_folder_or_half_of_a_file_is_called_what_it_is(student, tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} is a folder; a file in it is needed"):
        load_checkpoint(tmp_path)
    path = tmp_path / "student.pt"
    write_checkpoint(path, student)
    data = path.read_bytes()
    for left in (100, len(data) // 2, -1):
        path.write_bytes(data[:left])
        with pytest.raises(InputError, match="student.pt is cut off: its end is missing. Copy or"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_names_of_weights_are_those_without_their_wrapper(student, tmp_path, wrapper):
    """torch.compile and DistributedDataParallel put one in front."""
    content = maskrl.checkpoint(student)
    for part in ("model", "model_ema"):
        content[part] = {wrapper + name: value for name, value in content[part].items()}
    again = load_checkpoint(resaved(content, tmp_path / "student.pt"))
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in student.state_dict().items())
    mar = {
        part: {wrapper + name: value for name, value in weights.items()}
        for part, weights in official().items()
    }
    load_model(resaved(mar, tmp_path / "mar.pth"), num_heads=4)
    vae = {wrapper + name: value for name, value in small_vae().state_dict().items()}
    load_kl16(resaved({"model": vae}, tmp_path / "kl16.ckpt"))


def test_blocks_that_were_compiled_one_by_one_have_their_names(student, tmp_path):
    student.encoder_blocks[0] = torch.compile(student.encoder_blocks[0])
    content = maskrl.checkpoint(student)
    assert any("blocks.0._orig_mod." in name for name in content["model"])
    load_checkpoint(resaved(content, tmp_path / "student.pt"))


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_reading_a_checkpoint_runs_no_code_in_it(altered, tmp_path):
    path = altered(part("training", Attack(tmp_path / "hacked")))
    with pytest.raises(InputError, match="is not a checkpoint that can be read safely"):
        load_checkpoint(path)
    assert not (tmp_path / "hacked").exists()


def test_an_archive_that_torch_save_did_not_write_is_refused(altered, tmp_path):
    """Weights that are left on the disk would be read from its compressed bytes."""
    path = altered(part("step", 1))
    with zipfile.ZipFile(path) as stored:
        parts = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as compressed:
        for name, data in parts.items():
            compressed.writestr(name, data)
    with pytest.raises(InputError, match="student.pt is damaged: it is compressed"):
        load_checkpoint(path)


# Damaged files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """{file: (how it is loaded, bytes, weights)} of a sound file of each kind."""
    folder, policy = tmp_path_factory.mktemp("sound"), random_model("policy")
    maskrl.add_schedule(policy)
    write_checkpoint(folder / "policy.pt", policy)
    save_safely(folder / "mar.pth", official())
    save_safely(folder / "kl16.ckpt", {"model": small_vae().state_dict()})
    loads = {
        "policy.pt": load_checkpoint,
        "mar.pth": partial(load_mar, num_heads=4),
        "kl16.ckpt": load_kl16,
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
    end = start + len(weight)
    for _ in range(20):
        damaged = data[:start] + flipped(data[start:end], dice) + data[end:]
        (tmp_path / "policy.pt").write_bytes(damaged)
        with pytest.raises(InputError, match="policy.pt is damaged: the checksum of"):
            load(tmp_path / "policy.pt")


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS_OF_FILES)
@pytest.mark.parametrize("seed", range(1, 3))
def test_many_damaged_files_are_refused_or_do_no_harm(sound, tmp_path, name, seed):
    refused = check_damaged_files(sound, tmp_path, name, random.Random(seed), 400)
    print(f"{name}: {refused} of 400 refused")


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


def test_weights_may_stay_on_the_disk_until_they_are_used(model, tmp_path):
    path = tmp_path / "teacher.pt"
    write_checkpoint(path, model)
    eager, lazy = load_safely(path), load_safely(path, lazily=True)
    assert eager["model"].keys() == lazy["model"].keys()
    assert all(torch.equal(eager["model"][name], lazy["model"][name]) for name in eager["model"])
