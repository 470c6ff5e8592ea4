"""What a CUDA GPU would refuse on a machine without one: methods, scripts, and faults of old.

helpers_pretend_device says what its pretend GPU shows and what it does not. Where there is a real
one, the tests of methods and scripts run on that."""

import json
import shutil
from argparse import Namespace
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, tiny
from helpers_child import QUICK, no_matplotlib
from helpers_methods import brightness, flatten
from helpers_pretend_device import GPU, HAS_GPU, pretend_gpu
from helpers_released import small_mar, small_vae
from helpers_rewards import SMALL_CLIP, Refused, random_clip, shapes
from PIL import Image
from torch.utils.checkpoint import checkpoint
from torchvision.models import shufflenet_v2_x0_5
from torchvision.transforms.functional import to_pil_image

import maskrl
import sample
import train_distill
import train_rl
from maskrl import Distillation, PolicyGradient, RewardBackpropagation, Sampling, TeacherTraining
from workbench import devices, pictures, pretrained
from workbench.data import draw_shapes
from workbench.devices import check_processes
from workbench.errors import InputError
from workbench.files import load_checkpoint, write_checkpoint
from workbench.judge import Judge
from workbench.lazymar import LazyContexts
from workbench.monitors import ValidationMetric
from workbench.options import find_device, prepare
from workbench.precision import InBFloat16, set_precision
from workbench.pretrained import ClipOptions
from workbench.quality_net import QualityNet
from workbench.released import save_mar
from workbench.rewards import CheckedReward
from workbench.run import Run, restore

ROOT = Path(maskrl.__file__).parent
CUDA = ["--device", "cuda", "--threads", "1"]
SHORT = [*QUICK[: QUICK.index("--device")], *"--steps 2 --batch 4 --prompts 2 --group 2".split()]
SHORT += "--teacher-iters 2 --gsim-iters 2 --rl-iters 2 --schedule-iters 1 --judge-iters 2".split()
only_pretended = pytest.mark.skipif(HAS_GPU, reason="a real GPU draws other noise, and rounds")


@pytest.fixture
def gpu():
    with pretend_gpu() as gpu:
        yield gpu


# The pretend GPU itself ---------------------------------------------------------------------------


def test_it_refuses_what_a_gpu_refuses(gpu):
    there, here, row = torch.ones(3, device=GPU), torch.ones(3), torch.zeros(1, dtype=torch.long)
    with pytest.raises(RuntimeError):
        there + here
    with pytest.raises(RuntimeError):
        torch.zeros(()).add_(there.sum())
    with pytest.raises(RuntimeError):
        F.linear(there, torch.ones(2, 3))
    with pytest.raises(RuntimeError):
        torch.cat([there, here])
    with pytest.raises(RuntimeError):
        here[row.to(GPU)]
    with pytest.raises(RuntimeError):
        there.gather(0, row)
    with pytest.raises(RuntimeError):
        torch.randn(2, generator=maskrl.rng(0), device=GPU)
    with pytest.raises(RuntimeError):
        torch.randn(2, generator=maskrl.rng(0, device=GPU))
    with pytest.raises(TypeError):
        there.numpy()


def test_it_takes_what_a_gpu_takes(gpu):
    there = torch.arange(3.0, device=GPU)
    assert there.device.type == "cuda" and there.is_cuda and not there.cpu().is_cuda
    assert (there + torch.tensor(1.0)).is_cuda  # a number may come from the CPU
    assert there[torch.tensor([2, 0])].tolist() == [2, 0]  # and so may an index
    there[torch.tensor([True, False, False])] = 5.0
    assert there.tolist() == [5, 1, 2] and float(there.sum()) == 8
    assert torch.as_tensor(there, device="cuda").sum() == 8
    assert torch.rand(2, generator=maskrl.rng(0, device=GPU), device=GPU).is_cuda


def test_a_module_moves_and_learns_there_as_here(gpu):
    """Through checkpointed blocks, attention with a mask, and a fused optimiser."""
    results, initial = [], maskrl.Block(8, 2)
    for device in ("cpu", "cuda"):
        block = deepcopy(initial).to(device)
        x = torch.ones(2, 3, 8, requires_grad=True)
        keys = torch.ones(2, 3, dtype=torch.bool, device=device)
        optimizer = torch.optim.AdamW(block.parameters(), fused=True)
        checkpoint(block, x.to(device), keys, use_reentrant=False).square().sum().backward()
        optimizer.step()
        assert not x.grad.is_cuda and block.mlp.fc1.weight.grad.device.type == device
        results.append([x.grad, *(p.cpu() for p in block.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@only_pretended
def test_it_counts_what_the_host_waits_for(gpu):
    x = torch.ones(4, device=GPU)
    (x + x).view(2, 2).mT.exp()
    assert dict(gpu.launches) == {"ones": 1, "add": 1, "exp": 1} and not gpu.waits
    x[x > 0], x.nonzero(), bool(x.sum()), x.to("cpu"), torch.ones(1).to(GPU)
    names = {what: n for (what, place), n in gpu.waits.items() if place == "elsewhere"}
    assert names == {
        "mask as index": 1,
        "nonzero": 1,
        "_local_scalar_dense": 1,
        "copy from the GPU": 1,
        "copy to the GPU": 1,
    }
    torch.ones(1).to(GPU, non_blocking=True)
    assert gpu.waits["copy to the GPU", "elsewhere"] == 1
    x.to("cpu", non_blocking=True)
    assert gpu.waits["copy from the GPU", "elsewhere"] == 2  # its numbers would not be there yet


@only_pretended
def test_it_says_which_function_of_ours_waits(gpu):
    maskrl.generate(random_model("student").to("cuda"), [0, 1], Sampling(steps=2))
    assert any(place.startswith("maskrl.py ") for _, place in gpu.waits)


# The methods --------------------------------------------------------------------------------------


def teacher_training(settings, device):
    return TeacherTraining(settings, ["a", "b", "c"], device)


def distillation(settings, device):
    return Distillation(random_model().to(device), settings)


def policy_gradient(settings, device):
    student = random_model("student").to(device)
    return PolicyGradient(student, settings, brightness, torch.zeros(1, 16, 12, device=device))


def backpropagation(settings, device):
    settings.learn_steps = False
    student, mean_image = random_model("student").to(device), torch.zeros(1, 16, 12, device=device)
    return RewardBackpropagation(student, settings, brightness, mean_image)


LOW = {"precision": "bf16", "checkpointing": True, "micro_batch": 5}
TRAININGS = {
    "teacher": (teacher_training, {}),
    "teacher, bf16": (teacher_training, LOW),
    "teacher of eps, random orders": (teacher_training, {"predicts": "eps", "muon_lr": 0.0}),
    "GSIM": (distillation, {}),
    "GSIM, bf16": (distillation, LOW),
    "RL, z, then its schedule alone": (policy_gradient, {"rl_iters": 1}),
    "RL, z, random steps, routed": (policy_gradient, {"rl_steps": "random", "route": 0.5}),
    "RL, x": (policy_gradient, {"action": "x"}),
    "RL, x, first steps, bf16": (policy_gradient, {"action": "x", "rl_steps": "first", **LOW}),
    "backprop, z": (backpropagation, {}),
    "backprop, x, all steps, bf16": (backpropagation, {"action": "x", "rl_steps": "all", **LOW}),
}


def trained(name, device):
    """The metrics and weights after two updates."""
    make, overrides = TRAININGS[name]
    settings = tiny(**{"steps": 3, "order": "random", **overrides})
    torch.manual_seed(0)
    training = make(settings, device)
    for network in (training.model, training.ema):
        set_precision(network, settings.precision, settings.checkpointing)
    labels = (torch.arange(8) % 3).to(device)
    x = torch.randn(8, 16, 12, generator=maskrl.rng("x")).to(device)
    inputs = [labels[:2]] if isinstance(training, PolicyGradient) else [x, labels]
    for step in range(2):
        metrics = training.update(step, *inputs, seed=0)
    return metrics, flatten(p.detach().cpu() for p in training.model.parameters())


@pytest.fixture
def drawing_as_there(monkeypatch):
    """A CPU, too, has one generator for the host and one for the device. (Those of the pretend GPU
    give the CPU's numbers.)"""

    def rngs(*names, device):
        return maskrl.rng(*names), maskrl.rng(*names, device=device)

    monkeypatch.setattr(maskrl, "rngs", rngs)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_does_there_what_it_does_here(name, drawing_as_there):
    with pretend_gpu():
        metrics, weights = trained(name, "cuda")
    assert all(isinstance(value, float) for value in metrics.values())
    if HAS_GPU:  # it draws other noise
        return
    metrics_here, weights_here = trained(name, "cpu")
    rounding = 0.02 if "bf16" in name else 1e-4
    assert metrics == pytest.approx(metrics_here, rel=rounding, abs=rounding)
    if "bf16" not in name:
        torch.testing.assert_close(weights, weights_here, rtol=1e-4, atol=1e-5)


@only_pretended
@pytest.mark.parametrize("kind", ["teacher", "teacher of eps", "student", "policy"])
def test_bfloat16_by_cudas_own_rules_changes_little(kind):
    """Which products are in bfloat16, and what is then cast back, is not the same on every device.
    Here there are no backward passes."""
    kind, _, of_eps = kind.partition(" of ")
    model = random_model(kind, predicts=of_eps or "x_0", steps=4)
    if kind == "policy":
        maskrl.add_noise_policy(model)
        maskrl.add_schedule(model)
    labels, sampling = torch.arange(3), Sampling(steps=(1, 3, 4, 8))
    expected = maskrl.generate(model, labels, sampling)
    set_precision(model, "bf16")
    with pretend_gpu(inner_device=GPU), torch.no_grad():
        model = model.to("cuda")
        low = maskrl.generate(model, labels, sampling)
        cached = replace(sampling, contexts=partial(LazyContexts, every=4))
        cached = maskrl.generate(model, labels, cached)
        x, t = low.flatten(0, 1), torch.arange(48, device=GPU) * 20
        c = model.context(low, torch.rand(3, 16, device=GPU) < 0.5, labels.to(GPU)).flatten(0, 1)
        loss = maskrl.denoising_loss(model.head, x, c, t, torch.randn(48, 12, device=GPU))
        assert {y.dtype for y in (low, cached, c, loss)} == {torch.float32}
        assert cached.isfinite().all() and loss.isfinite()
        error = (low.cpu() - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 0.1


# The scripts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    """script(main, *options): it runs on the GPU, without curves and much validation, which take
    long."""

    def script(main, *options):
        with pretend_gpu(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(pictures, "figure_class", no_matplotlib)
            patch.setattr(train_distill, "ValidationMetric", partial(ValidationMetric, n=18))
            return main([str(a) for a in (*options, *CUDA)])

    return script


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    """The folder of train_rl.py's three stages."""
    out = tmp_path_factory.mktemp("run")
    metrics = script(train_rl.main, *SHORT, "--out", out)
    assert {"real", "teacher", "student", "policy"} < set(metrics["rows"])
    return out


def test_a_finished_run_is_resumed(script, run):
    before = json.loads((run / "metrics.json").read_text())["rows"]
    rows = script(train_rl.main, "--out", run, "--resume")["rows"]
    assert rows["policy"]["frechet"] == pytest.approx(before["policy"]["frechet"], rel=1e-3)


@pytest.mark.parametrize("kind", ["teacher", "student", "policy"])
def test_every_checkpoint_is_sampled(script, run, tmp_path, kind):
    """A policy with a schedule once failed: its counts were compared on two devices."""
    script(sample.main, run / f"{kind}.pt", "--n", 4, "--out", tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_films_files_and_completions_are_drawn(script, run, tmp_path):
    film, files = ["--film", tmp_path / "a.gif"], ["--files", tmp_path / "files"]
    cached = ["--refresh", 2, "--out", tmp_path / "a.png", "--n", 3]
    script(sample.main, run / "teacher.pt", *film, *files, *cached)
    image = next((tmp_path / "files").iterdir())
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 8, 4))
    mask.save(tmp_path / "mask.png")
    given = ["--inpaint", image, "--mask", tmp_path / "mask.png", "--out", tmp_path / "b.png"]
    script(sample.main, run / "policy.pt", *given, "--n", 2, "--refresh", 2)
    assert (tmp_path / "a.gif").exists() and (tmp_path / "b.png").exists()


def test_the_bench_times_and_judges(script, run, tmp_path):
    shutil.copy(run / "policy.pt", tmp_path)
    how = ["--data", "shapes", "--batches", 1, "--rounds", 2, "--judge"]
    script(sample.main, tmp_path / "policy.pt", "--bench", tmp_path / "bench.json", *how)
    arms = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert all(arm["frechet"] >= 0 for arm in arms.values()) and "all together" in arms


def test_a_reward_is_propagated_through_a_given_student(script, run, tmp_path):
    how = ["--method", "backprop", "--action", "x", "--rl-iters", 1]
    student = ["--student", run / "student.pt", "--reward", "helpers_methods:brightness"]
    metrics = script(train_rl.main, *student, *how, "--out", tmp_path)
    assert metrics["rl"]["after"]["steps_std"] == 0


def test_latents_of_a_released_teacher_are_distilled(script, tmp_path):
    torch.manual_seed(0)
    save_mar(tmp_path / "mar.pth", small_mar(classes=2))
    torch.save({"model": small_vae().state_dict()}, tmp_path / "kl16.ckpt")
    for i, image in enumerate(draw_shapes(torch.arange(2).repeat(20), 8)):
        folder = tmp_path / "images" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(folder / f"{i}.png")
    teacher = ["--teacher", tmp_path / "mar.pth", "--heads", 2, "--vae", tmp_path / "kl16.ckpt"]
    how = "--gsim-iters 1 --batch 2 --steps 2 --denoise-steps 2 --judge-iters 1 --judge-n 8"
    data = ["--data", tmp_path / "images", "--out", tmp_path / "out"]
    metrics = script(train_distill.main, *teacher, *how.split(), *data)
    assert {"teacher", "student"} < set(metrics["rows"])


# What users give, and where it lies ---------------------------------------------------------------


def means_on_the_cpu(images):
    """Features of a user's function that knows nothing of GPUs."""
    return images.detach().cpu().double().mean((2, 3))


def brightness_on_the_cpu(images, labels):
    return images.cpu().double().mean((1, 2, 3)).sigmoid()


def test_features_and_rewards_may_answer_on_the_cpu(gpu):
    """They once mixed devices."""
    settings = tiny(judge_n=18)
    net = QualityNet("judge", 8, 9).to("cuda").eval().requires_grad_(False)
    judge = Judge(shapes(), settings, torch.device("cuda"), means_on_the_cpu, draws=2, net=net)
    assert set(judge.sensitivity) and judge(judge.real_images)["diversity"] > 0
    images = torch.rand(3, 3, 8, 8, device=GPU, requires_grad=True)
    labels = torch.arange(3, device=GPU)
    q = CheckedReward("mine", brightness_on_the_cpu)(images, labels)
    assert q.is_cuda and q.dtype == torch.float32
    q.sum().backward()
    assert images.grad.is_cuda and images.grad.min() > 0


def test_clip_and_torchvision_look_at_images_of_the_gpu(gpu, tmp_path, monkeypatch):
    images, labels = torch.rand(2, 3, 8, 8, device=GPU) * 2 - 1, torch.arange(2, device=GPU)
    clip = random_clip(SMALL_CLIP, tmp_path / "clip.pt").to("cuda")
    tokens = open_clip.get_tokenizer(SMALL_CLIP)(["a cat", "a dog"])
    monkeypatch.setattr(pretrained, "load_clip", partial(given, (clip, tokens)))
    assert pretrained.ClipReward(ClipOptions(), ["a", "b"], GPU)(images, labels).is_cuda
    weights = tmp_path / "shufflenet_v2_x0_5-random.pth"
    torch.save(shufflenet_v2_x0_5().state_dict(), weights)
    assert pretrained.TorchvisionFeatures(weights, GPU)(images).is_cuda


def given(answer, *_):
    return answer


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_known_tokens_may_lie_on_the_cpu(gpu, kind):
    model, mask = random_model(kind).to("cuda"), torch.arange(16) < 5
    known = torch.ones(2, 16, 12)
    tokens = maskrl.generate(model, [0, 1], Sampling(steps=2), known=(known, mask))
    assert (tokens[:, 5:] == 1).all() and not (tokens[:, :5] == 1).any()


def test_maskrls_own_files_load_there(gpu, tmp_path):
    """Also those of a policy with a schedule, and from a GPU without one."""
    policy = random_model("policy").to("cuda")
    maskrl.add_noise_policy(policy)
    maskrl.add_schedule(policy)
    maskrl.save(tmp_path / "policy.pt", policy)
    loaded = maskrl.load(tmp_path / "policy.pt", "cuda")
    assert loaded.device.type == "cuda" and maskrl.generate(loaded, [0]).is_cuda
    assert maskrl.load(tmp_path / "policy.pt").device.type == "cpu"


# A run that changes its device --------------------------------------------------------------------


def updated(training, steps, device="cpu"):
    labels, x = torch.arange(8) % 3, torch.randn(8, 16, 12, generator=maskrl.rng("x"))
    for step in steps:
        training.update(step, x.to(device), labels.to(device), seed=0)
    return training


def state_of(training):
    return {name: value.state_dict() for name, value in training.state.items()}


def restored(training, path):
    record = {"seconds": 0.0, "lowest": 0.0, "weights": {}}
    return restore(training, path, record, training.iters)


@pytest.mark.parametrize("fused", [True, False, None])
def test_a_run_of_the_cpu_goes_on_with_the_fused_optimisers_of_a_gpu(
    tmp_path, fused, drawing_as_there
):
    """The file's flag once made it as slow there as it was here."""
    path, settings = tmp_path / "teacher.pt", tiny(order="random")
    torch.manual_seed(0)
    training = updated(teacher_training(settings, "cpu"), range(2))
    state = state_of(training) | {"record": {"seconds": 1.0, "lowest": 1.0, "weights": {}}}
    for group in state["adamw"]["param_groups"]:
        group["fused"] = fused
    write_checkpoint(path, training.model, training.ema, 2, state)
    with pretend_gpu():
        there = teacher_training(settings, "cuda")
        assert restored(there, path) == 2
        assert all(group["fused"] for group in there.optimizers["adamw"].param_groups)
        states = there.optimizers["adamw"].state.values()
        assert {x.device.type for s in states for x in s.values()} == {"cuda"}
        updated(there, [2], "cuda")
        if HAS_GPU:
            return
        weights = flatten(p.detach().cpu() for p in there.model.parameters())
    before = flatten(p.detach() for p in training.model.parameters())
    here = flatten(p.detach() for p in updated(training, [2]).model.parameters())
    assert (weights - here).abs().sum() < 0.1 * (here - before).abs().sum()  # many are near 0


def test_too_little_memory_for_a_file_to_resume_stays_what_it_is(tmp_path, monkeypatch):
    """It once was a file of another training."""
    path, training = tmp_path / "teacher.pt", teacher_training(tiny(), "cpu")
    write_checkpoint(path, training.model, training.ema, training.iters)
    error = Refused(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    monkeypatch.setattr(training.model, "load_state_dict", error)
    with pytest.raises(torch.OutOfMemoryError):
        restored(training, path)


# Which GPUs there are -----------------------------------------------------------------------------


@only_pretended
def test_a_gpu_that_is_not_there_is_refused(gpu):
    assert find_device("cuda:0") == GPU
    with pytest.raises(InputError, match="cuda:9: there is none here; there is cuda, cuda:0, cpu"):
        find_device("cuda:9")


@only_pretended
@pytest.mark.parametrize("variable, value", [("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")])
def test_more_processes_than_gpus_are_refused(gpu, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match="processes here: 2, GPUs: 1; take --nproc_per_node=1"):
        check_processes(GPU)
    with pytest.raises(InputError, match="need CUDA GPUs, or --device cpu"):
        check_processes(torch.device("mps"))
    check_processes(torch.device("cpu"))


@pytest.fixture
def old_gpu():
    """Before Ampere."""
    devices.emulates_bfloat16.cache_clear()
    with pretend_gpu(capability=(7, 5)) as gpu:
        yield gpu
    devices.emulates_bfloat16.cache_clear()


@only_pretended
def test_an_old_gpu_computes_in_float32_and_says_so_once(old_gpu, tmp_path, capsys):
    """A T4 emulates bfloat16, slowly and without a word."""
    argv = [*SHORT, "--precision", "bf16", "--out", str(tmp_path / "out"), *CUDA]
    settings = prepare(train_distill.parse(argv), ["student.pt", "teacher.pt"]).settings
    write_checkpoint(tmp_path / "teacher.pt", random_model(precision="bf16"))
    loaded = load_checkpoint(tmp_path / "teacher.pt", device="cuda")
    assert settings.precision == "fp32" and "context" not in vars(loaded)
    assert capsys.readouterr().out.count("cuda only emulates bfloat16") == 1


def test_a_newer_gpu_computes_in_bfloat16(gpu, tmp_path):
    write_checkpoint(tmp_path / "teacher.pt", random_model(precision="bf16"))
    loaded = load_checkpoint(tmp_path / "teacher.pt", device="cuda")
    assert isinstance(loaded.context, InBFloat16)


# Times --------------------------------------------------------------------------------------------


@only_pretended
def test_times_are_read_when_the_gpu_is_done(gpu, tmp_path, capsys):
    """Of MPS they once were read before, and of an update of any GPU."""
    sources = [*ROOT.glob("*.py"), *(ROOT / "workbench").rglob("*.py")]
    readers = {path.name for path in sources if "perf_counter" in path.read_text()}
    assert readers == {"timing.py", "run.py"}
    student = random_model("student")
    write_checkpoint(tmp_path / "student.pt", student)
    sample.main([str(tmp_path / "student.pt"), "--out", str(tmp_path / "a.png"), "--n", "1", *CUDA])
    assert gpu.waits["synchronize", "workbench/timing.py clock"] == 2
    gpu.waits.clear()
    run = Run(Namespace(out=tmp_path, resume=False), tiny(teacher_iters=400), None, GPU)
    with run.stage(teacher_training(run.settings, "cuda")) as stage:
        for stage.step in range(9):  # of which every other is logged
            stage.step_began = 0.0
            stage.log({"loss": 1.0})
    assert gpu.waits["synchronize", "workbench/timing.py clock"] == 5
