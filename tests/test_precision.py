"""Matrix products in bfloat16, checkpointing, and a batch in parts: none may change what is
learned."""

import shutil
from copy import deepcopy
from functools import partial

import pytest
import torch
from conftest import random_model, tiny

import maskrl
import workbench.precision
from workbench.precision import set_precision

PRECISIONS = ("fp32", "tf32", "bf16")


def images(B=8):
    """Tokens [B, 16, 12] and labels [B] of three classes: each has its pattern, with some noise."""
    patterns = torch.randn(3, 16, 12, generator=maskrl.rng("patterns"))
    labels = torch.arange(B) % 3
    return patterns[labels] + 0.3 * torch.randn(B, 16, 12, generator=maskrl.rng("noise")), labels


def random_mask(n, generator):
    """A mask [n, 16] that hides 1 to 16 tokens of each row."""
    return maskrl.random_mask(maskrl.hidden_counts(n, 16, generator), 16, generator)


def some_mask():
    return random_mask(8, maskrl.rng("mask"))


def gradients(network):
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def prepared(model, settings):
    """The model with new settings, computing as they say."""
    model.settings = settings
    set_precision(model, settings.precision, settings.checkpointing)
    return model


def outputs(model):
    """c [8, 16, W] and g(z, c) [128, 12] of the same images and noise."""
    torch.manual_seed(0)
    x, labels = images()
    c = model.context(x, some_mask(), labels)
    return c, maskrl.one_step(model.head, torch.randn(128, 12), c.flatten(0, 1), 5.0)


# A batch in parts ---------------------------------------------------------------------------------


def test_micro_batches_hold_every_row_once_and_pad_little():
    mask = random_mask(64, maskrl.rng(0))
    parts = maskrl.micro_batches(mask.sum(1), 12)
    assert [len(rows) for rows in parts] == [12] * 5 + [4]
    assert torch.cat(parts).sort().values.tolist() == list(range(64))
    visible = (~mask).sum(1)
    padded = sum(len(rows) * visible[rows].max() for rows in parts)
    assert visible.sum() <= padded < 1.3 * visible.sum() < 64 * visible.max()


def test_without_a_size_the_rows_are_one_part_in_their_order():
    (rows,) = maskrl.micro_batches(torch.tensor([5, 1, 3, 3, 2, 16, 1]), 0)
    assert rows.tolist() == list(range(7))


def test_losses_in_parts_are_one_step_on_their_sum():
    """A part is made when the one before it has gone backward, so that one graph is held."""
    weight, history = torch.nn.Parameter(torch.zeros(2)), []

    def parts():
        for loss in (weight[0] + 1, 2 * weight[1] - 4):
            history.append(None if weight.grad is None else weight.grad.tolist())
            yield loss

    optimizer = torch.optim.SGD([weight], 1.0)
    total, norm = maskrl.optimizer_step(parts(), optimizer, max_norm=10)
    assert history == [None, [1, 0]]
    assert (total, norm) == (-3, pytest.approx(5**0.5))
    assert weight.tolist() == [-1, -2]


def update_of_teacher(settings):
    training = maskrl.TeacherTraining(settings, ["a", "b", "c"])
    training.model.load_state_dict(random_model().state_dict())  # at its start the output is zero
    prepared(training.model, settings)
    metrics = training.update(0, *images(), seed=0)
    return metrics, training.model


def update_of_student(settings):
    training = maskrl.Distillation(prepared(random_model(), settings), settings)
    metrics = training.update(0, *images(), seed=0)
    return metrics, torch.nn.ModuleList([training.aux, training.model])


def redness(images, labels):
    return torch.sigmoid(images[:, 0].mean((1, 2)) + labels)


def update_of_policy(settings):
    method = maskrl.PolicyGradient if settings.method == "grpo" else maskrl.RewardBackpropagation
    student = prepared(random_model("student"), settings)
    training = method(student, settings, redness, torch.zeros(1, 16, 12))
    for p in training.reference.parameters():
        p.add_(0.01 * torch.randn(p.shape, generator=maskrl.rng(p.shape)))  # for a KL that counts
    return training.update(0, torch.arange(3), seed=0), training.model


RL = {"action": "x", "group": 4, "explore": 0.3, "beta": 0.5, "steps": 6, "critical_steps": 3}
UPDATES = {
    "teacher": (update_of_teacher, {}),
    "GSIM": (update_of_student, {}),
    "RL": (update_of_policy, RL),
    "RL, all steps": (update_of_policy, RL | {"rl_steps": "all"}),
    "backprop": (update_of_policy, RL | {"method": "backprop"}),
    "backprop, all steps": (update_of_policy, RL | {"method": "backprop", "rl_steps": "all"}),
}


@pytest.mark.parametrize("name", UPDATES)
def test_a_batch_in_parts_has_the_gradient_of_the_whole(name):
    """With the same noise, and though the parts differ in their number of tokens."""
    update, overrides = UPDATES[name]
    results = []
    for micro_batch in (0, 3):
        torch.manual_seed(0)
        metrics, network = update(tiny(**overrides, micro_batch=micro_batch))
        results.append((metrics, gradients(network)))
    (metrics, whole), (metrics_in_parts, parts) = results
    assert whole.norm() > 0.1
    assert (parts - whole).norm() < 1e-4 * whole.norm()
    for key, value in metrics.items():
        assert metrics_in_parts[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


# The wrappers -------------------------------------------------------------------------------------


def test_float32_computes_what_a_model_does_by_itself():
    model = random_model()
    before = outputs(model)
    set_precision(model, "fp32")
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model)))


def test_bfloat16_is_close_and_not_equal():
    model = random_model()
    before = outputs(model)
    set_precision(model, "bf16")
    for exact, low in zip(before, outputs(model)):
        assert 0 < (low - exact).norm() < 0.02 * exact.norm()


def test_tf32_is_allowed_in_the_products_of_a_model_alone():
    """There and back; not in the reward, nor afterwards. On a CPU it changes nothing."""
    model, allowed = random_model(), {}
    expected = outputs(model)
    set_precision(model, "tf32")
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(model)))

    def note(name, *_):
        allowed[name] = torch.backends.cuda.matmul.allow_tf32

    for name in ("head.res_blocks.0.mlp.0", "decoder_blocks.0.mlp.fc1", "z_proj"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(partial(note, f"{name}, forward"))
        layer.weight.register_hook(partial(note, f"{name}, backward"))
    model.head.input_proj.register_forward_hook(partial(note, "outside"))
    _, g = outputs(model)
    reward = g.square()
    reward.register_hook(partial(note, "reward, backward"))
    note("reward")
    reward.mean().backward()
    note("afterwards")
    exact = {"outside", "reward", "reward, backward", "afterwards"}
    assert allowed == {name: name not in exact for name in allowed} and len(allowed) == 10


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_model_computes_the_same_and_is_compiled_a_few_times(
    monkeypatch, precision, checkpointing
):
    """Whatever the numbers of images and of visible tokens; here without a C++ compiler."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()  # it compiles the code of a method only so often
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    workbench.precision.compiled.cache_clear()
    model, results = random_model(depth=3), []
    for is_compiled in (False, True):
        set_precision(model, precision, checkpointing, is_compiled)
        model.zero_grad()
        for n, hidden in ((8, 0.5), (5, 0.3), (3, 0.9)):
            x, labels = images(n)
            few = (hidden * maskrl.hidden_counts(n, 16, maskrl.rng(n))).ceil()
            mask = maskrl.random_mask(few, 16, maskrl.rng(n))
            c = model.context(x, mask, labels)
            z = torch.randn(n * 16, 12, generator=maskrl.rng(n))
            maskrl.one_step(model.head, z, c.flatten(0, 1), 5.0).square().mean().backward()
        results.append(gradients(model))
    workbench.precision.compiled.cache_clear()
    plain, with_compiler = results
    torch.testing.assert_close(with_compiler, plain)
    assert 3 <= len(graphs) <= 7  # encoder, decoder and head, not 3 times each of their blocks


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_torch_compile_with_its_own_compiler_computes_the_same():
    model = random_model(depth=2)
    expected = outputs(model)
    set_precision(model, is_compiled=True)
    for exact, here in zip(expected, outputs(model)):
        torch.testing.assert_close(here, exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_precision_can_be_set_again_and_taken_back(precision, checkpointing):
    model = random_model()
    before, attributes = outputs(model), {name: set(vars(m)) for name, m in model.named_modules()}
    weights = {name: v.clone() for name, v in model.state_dict().items()}
    for _ in range(2):
        set_precision(model, precision, checkpointing)
        assert list(model.state_dict()) == list(weights)
    set_precision(model)
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model)))
    assert all(torch.equal(v, weights[name]) for name, v in model.state_dict().items())


def test_a_copy_computes_with_its_own_weights_in_the_same_precision():
    model = random_model()
    set_precision(model, "bf16", checkpointing=True)
    copies = [deepcopy(model), maskrl.student_of(model, model.settings)]
    expected = outputs(model)
    for p in model.parameters():
        p.data.zero_()
    for copied in copies:
        assert all(torch.equal(a, b) for a, b in zip(expected, outputs(copied)))
    set_precision(model)
    c, _ = outputs(copies[0])
    c.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(c, expected[0])


def test_a_method_that_is_replaced_later_is_the_one_that_is_called(monkeypatch):
    """As several processes replace MAR.context."""

    def replacement(self, tokens, mask, labels):
        return tokens.half()

    model = random_model()
    set_precision(model, "bf16")
    monkeypatch.setattr(maskrl.MAR, "context", replacement)
    c = model.context(*images()[:1], None, labels=None)
    assert c.dtype == torch.float32 and c.shape == (8, 16, 12)


def test_an_unknown_precision_is_refused():
    with pytest.raises(KeyError, match="fp16"):
        set_precision(random_model(), "fp16")


# Checkpointing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_checkpointing_changes_no_gradient(precision):
    model, (x, labels) = random_model(depth=2), images()
    mask = some_mask()
    results = []
    for checkpointing in (False, True):
        set_precision(model, precision, checkpointing)
        model.zero_grad()
        model.context(x, mask, labels).square().sum().backward()
        blocks = (*model.encoder_blocks, *model.decoder_blocks)
        results.append(torch.cat([p.grad.flatten() for b in blocks for p in b.parameters()]))
    plain, checkpointed = results
    assert plain.norm() > 0.1
    torch.testing.assert_close(checkpointed, plain)


def test_checkpointing_is_used_by_the_student_and_the_auxiliary_network(monkeypatch):
    """In their backward passes alone: a block without a graph is computed once."""
    calls = []

    def counted(method, *args, **kwargs):
        calls.append(method.__self__.module)
        return torch.utils.checkpoint.checkpoint(method, *args, **kwargs)

    monkeypatch.setattr(workbench.precision, "checkpoint", counted)
    settings = tiny(checkpointing=True)
    training = maskrl.Distillation(prepared(random_model(), settings), settings)
    training.update(0, *images(), seed=0)
    trained = [
        id(block)
        for network in (training.model, training.aux)
        for block in (*network.encoder_blocks, *network.decoder_blocks)
    ]
    assert sorted(id(block) for block in calls) == sorted(trained)


def kept_bytes(model):
    """Bytes, but for weights, that the backward pass of a context keeps."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that none is reused
        return tensor

    def unpack(tensor):
        return tensor

    x, labels = images()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        model.context(x, torch.ones(8, 16, dtype=torch.bool), labels)
    return sum(size for size, _ in kept.values())


def test_checkpointing_saves_memory():
    model = random_model(depth=4)
    plain = kept_bytes(model)
    set_precision(model, checkpointing=True)
    assert kept_bytes(model) < 0.25 * plain


# bfloat16 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["teacher", "GSIM", "RL, all steps", "backprop, all steps"])
def test_gradients_in_bfloat16_are_those_of_float32(name, checkpointing):
    """Within 2 %, also those of weights that are used with and without a graph in one update."""
    update, overrides = UPDATES[name]
    results = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        settings = tiny(**overrides, precision=precision, checkpointing=checkpointing)
        results.append(gradients(update(settings)[1]))
    fp32, bf16 = results
    assert fp32.shape == bf16.shape
    assert 0 < (bf16 - fp32).norm() < 0.02 * fp32.norm()


def test_hidden_products_are_bfloat16_and_results_float32():
    """The layers of the head that touch x_t and what is predicted stay float32."""
    model, dtypes = random_model(), {}
    set_precision(model, "bf16")

    def remember(name, module, inputs, out):
        dtypes[name] = out.dtype

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(partial(remember, name))
    c, g = outputs(model)
    assert c.dtype == g.dtype == torch.float32
    outer = {"head.input_proj", "head.final_layer.linear"}
    assert {name for name in dtypes if dtypes[name] == torch.float32} == outer
    assert {dtypes[name] for name in dtypes.keys() - outer} == {torch.bfloat16}


def as_generated(model):
    """`outputs` without a graph, of frozen weights."""
    with torch.no_grad():
        return outputs(model.requires_grad_(False))


def uncached(model):
    """What bfloat16 computes when every weight is cast at every call."""
    plain = deepcopy(model)
    set_precision(plain, "fp32")
    for module, name in ((plain, "context"), (plain.head, "hidden")):
        workbench.precision.wrap(module, name, workbench.precision.InBFloat16)
    return as_generated(plain)


def move_by_adamw(model):
    """One fused step, as of RL between two generations."""
    model.requires_grad_(True)
    sum(out.square().sum() for out in outputs(model)).backward()
    torch.optim.AdamW(model.parameters(), 0.1, fused=True).step()


def move_as_an_average(model):
    maskrl.update_ema(model, random_model("student"), 0, 0.98)


def load_others(model):
    model.load_state_dict(random_model("student").state_dict())


@pytest.mark.parametrize("change", [move_by_adamw, move_as_an_average, load_others])
def test_frozen_weights_are_cast_once_and_again_when_they_changed(change):
    model = random_model("student")
    set_precision(model, "bf16")
    before = as_generated(model)
    kept = model.encoder_blocks[0].attn.qkv.forward.kept
    again = as_generated(model)
    assert model.encoder_blocks[0].attn.qkv.forward.kept is kept
    assert all(torch.equal(a, b) for a, b in zip(before, again))
    assert all(torch.equal(a, b) for a, b in zip(before, uncached(model)))
    change(model)
    after = as_generated(model)
    assert not any(torch.equal(a, b) for a, b in zip(before, after))
    assert all(torch.equal(a, b) for a, b in zip(after, uncached(model)))


def test_what_is_made_of_a_prediction_is_not_rounded():
    """eps = (x_t - alpha x_0) / sigma: where x_0 is 0, all 24 bits of x_t / sigma are right."""
    model = random_model()
    set_precision(model, "bf16")
    torch.nn.init.zeros_(model.head.final_layer.linear.weight)
    torch.nn.init.zeros_(model.head.final_layer.linear.bias)
    x_t, t = torch.randn(100, 12), torch.arange(0, 1000, 10)
    _, sigma = maskrl.alpha_sigma(t)
    assert (model.head.eps(x_t, t, torch.randn(100, 32)) == x_t / sigma).all()


def test_weights_gradients_averages_and_optimisers_stay_float32():
    training = maskrl.TeacherTraining(tiny(), ["a", "b", "c"])
    set_precision(training.model, "bf16")
    training.update(0, *images(), seed=0)
    tensors = [*training.model.parameters(), *training.ema.parameters()]
    tensors += [p.grad for p in training.model.parameters() if p.grad is not None]
    for value in training.state.values():
        if isinstance(value, torch.optim.Optimizer):
            tensors += [v for state in value.state.values() for v in state.values()]
    assert len(tensors) > 150 and {v.dtype for v in tensors} == {torch.float32}


def curve(training, updates, key="loss"):
    """A metric over the updates."""
    x, labels = images(12)
    return torch.tensor([training.update(i, x, labels, seed=0)[key] for i in range(updates)])


def teacher_and_losses(precision, updates=60):
    torch.manual_seed(0)
    training = maskrl.TeacherTraining(tiny(teacher_iters=updates), ["a", "b", "c"])
    set_precision(training.model, precision)
    return training.ema, curve(training, updates)


def test_the_teacher_learns_in_bfloat16_as_it_does_in_float32():
    """The mean loss of each third of the training is within 0.02 %, and falls to two thirds."""
    losses = (teacher_and_losses(name)[1].view(3, -1).mean(1) for name in ("fp32", "bf16"))
    fp32, bf16 = losses
    assert fp32[2] < fp32[0] / 1.5
    torch.testing.assert_close(bf16, fp32, rtol=2e-4, atol=0)


def test_gsim_learns_in_bfloat16_as_it_does_in_float32():
    """Students differ by less than 2 % of what GSIM changed in them, from the same teacher; losses
    by at most 0.03 % with any of five seeds."""
    teacher, _ = teacher_and_losses("fp32")
    (x, labels), z = images(12), torch.randn(12 * 16, 12)
    mask = torch.ones(12, 16, dtype=torch.bool)

    def tokens(model):
        set_precision(model, "fp32")
        with torch.no_grad():
            c = model.context(x, mask, labels).flatten(0, 1)
            return maskrl.one_step(model.head, z, c, 5.0)

    students, losses = [], []
    for precision in ("fp32", "bf16"):
        set_precision(teacher, precision)
        distillation = maskrl.Distillation(teacher, tiny(gsim_iters=25))
        losses.append(curve(distillation, 25, "aux_loss").mean())
        students.append(tokens(distillation.model))
    fp32, bf16 = students
    assert 0 < (bf16 - fp32).norm() < 0.02 * (fp32 - tokens(teacher)).norm()
    torch.testing.assert_close(losses[1], losses[0], rtol=5e-4, atol=0)


@pytest.mark.parametrize("rl_steps", ["critical", "all"])
def test_sampler_and_learner_agree_on_log_pi_in_bfloat16(rl_steps):
    """Their batches differ, and so does the rounding: |log r| < 0.01, where 0.18 is clipped."""
    settings = tiny(steps=6, explore=0.1, rl_steps=rl_steps, action="x")
    student = random_model("student")
    set_precision(student, "bf16")
    training = maskrl.PolicyGradient(student, settings, redness, torch.zeros(1, 16, 12))
    assert training.update(0, torch.arange(3), seed=0)["log_ratio"] < 0.01
