"""Matrix products in bfloat16, and a batch in parts: neither may change what is learned."""

from argparse import Namespace
from functools import partial

import budget
import pytest
import torch
from conftest import random_model, tiny

import maskrl
from maskrl import PRECISIONS


def images(B=8):
    """Tokens [B, 16, 12] and labels [B] of three classes: each has its pattern, with some noise."""
    patterns = torch.randn(3, 16, 12, generator=maskrl.rng("patterns"))
    labels = torch.arange(B) % 3
    return patterns[labels] + 0.3 * torch.randn(B, 16, 12, generator=maskrl.rng("noise")), labels


def gradients(network):
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


# A batch in parts ---------------------------------------------------------------------------------


def test_micro_batches_hold_every_row_once_and_pad_little():
    mask = maskrl.random_mask(torch.rand(64), 16, None)
    parts = maskrl.micro_batches(mask, 12)
    assert [len(rows) for rows in parts] == [12] * 5 + [4]
    assert torch.cat(parts).sort().values.tolist() == list(range(64))
    visible = (~mask).sum(1)
    padded = sum(len(rows) * visible[rows].max() for rows in parts)
    assert visible.sum() <= padded < 1.3 * visible.sum() < 64 * visible.max()


def test_without_a_size_the_rows_are_one_part_in_their_order():
    (rows,) = maskrl.micro_batches(maskrl.random_mask(torch.rand(7), 16, None), 0)
    assert rows.tolist() == list(range(7))


def test_losses_in_parts_are_one_step_on_their_sum():
    """A part is made when the one before it has gone backward, so that one graph is held."""
    weight, seen = torch.nn.Parameter(torch.zeros(2)), []

    def parts():
        for loss in (weight[0] + 1, 2 * weight[1] - 4):
            seen.append(None if weight.grad is None else weight.grad.tolist())
            yield loss

    total, norm = maskrl.descend(parts(), torch.optim.SGD([weight], 1.0), max_norm=10)
    assert seen == [None, [1, 0]]
    assert (total, norm) == (-3, pytest.approx(5**0.5))
    assert weight.tolist() == [-1, -2]


def test_what_memory_is_used_may_change_on_resume():
    """Who runs out of it goes on where it happened; what is learned may not change."""
    content, device = {"kind": "teacher", "settings": tiny()}, torch.device("cpu")
    given = Namespace(preset=None, micro_batch=4, precision="bf16", checkpointing=True)
    expected = tiny(micro_batch=4, precision="bf16", checkpointing=True)
    assert maskrl.settings_from(given, device, content, resume=True) == expected
    with pytest.raises(maskrl.InputError, match="--batch is fixed"):
        maskrl.settings_from(Namespace(preset=None, batch=4), device, content, resume=True)


def update_of_teacher(settings):
    training = maskrl.TeacherTraining(settings, ["a", "b", "c"])
    training.model.load_state_dict(random_model().state_dict())  # at its start the output is zero
    metrics = training.update(0, *images(), maskrl.rng("update"))
    return metrics, training.model


def update_of_student(settings):
    teacher = random_model()
    teacher.settings = settings
    training = maskrl.Distillation(teacher, settings)
    metrics = training.update(0, *images(), maskrl.rng("update"))
    return metrics, torch.nn.ModuleList([training.aux, training.model])


def redness(images, labels):
    return torch.sigmoid(images[:, 0].mean((1, 2)) + labels)


def update_of_policy(settings):
    method = maskrl.PolicyGradient if settings.method == "grpo" else maskrl.RewardBackpropagation
    training = method(random_model("student"), settings, redness, torch.zeros(1, 16, 12))
    for p in training.reference.parameters():
        p.add_(0.01 * torch.randn(p.shape, generator=maskrl.rng(p.shape)))  # for a KL that counts
    return training.update(torch.arange(3), seed=0), training.model


RL = {"action": "x", "group": 4, "explore": 0.3, "beta": 0.5, "steps": 6, "critical_steps": 3}
UPDATES = {
    "teacher": (update_of_teacher, {}),
    "GSIM": (update_of_student, {}),
    **{
        f"RL, {tokens}": (update_of_policy, RL | {"rl_tokens": tokens})
        for tokens in maskrl.RL_TOKENS
    },
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


# bfloat16 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["teacher", "GSIM", "RL, all steps", "backprop, all steps"])
def test_gradients_in_bfloat16_are_those_of_float32(name, checkpointing):
    """Within 2 %, also those of weights that are used with and without a graph in one update."""
    update, overrides = UPDATES[name]
    results = []
    for precision in PRECISIONS:
        torch.manual_seed(0)
        settings = tiny(**overrides, precision=precision, checkpointing=checkpointing)
        results.append(gradients(update(settings)[1]))
    fp32, bf16 = results
    assert fp32.shape == bf16.shape
    assert 0 < (bf16 - fp32).norm() < 0.02 * fp32.norm()


def test_muon_is_as_good_in_bfloat16():
    """Singular values about 1, as five iterations leave them, in the same directions."""
    x = torch.randn(64, 32)
    low, high = maskrl.orthogonalise(x.bfloat16()).float(), maskrl.orthogonalise(x)
    assert (low - high).norm() < 0.05 * high.norm()
    assert (torch.linalg.svdvals(low) - 1).abs().max() < 0.4


def test_hidden_products_are_bfloat16_and_results_float32():
    """The layers of the head that touch x_t and what is predicted stay float32."""
    model, dtypes = random_model(precision="bf16"), {}

    def remember(name, module, inputs, out):
        dtypes[name] = out.dtype

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(partial(remember, name))
    x, labels = images()
    c = model.context(x, maskrl.random_mask(torch.rand(8), 16, None), labels).flatten(0, 1)
    g = maskrl.one_step(model.head, torch.randn(len(c), 12), c, 5.0)
    assert c.dtype == g.dtype == torch.float32
    outer = {"head.input_proj", "head.final_layer.linear"}
    assert {name for name in dtypes if dtypes[name] == torch.float32} == outer
    assert {dtypes[name] for name in dtypes.keys() - outer} == {torch.bfloat16}


def test_what_is_made_of_a_prediction_is_not_rounded():
    """eps = (x_t - alpha x_0) / sigma: where x_0 is 0, all 24 bits of x_t / sigma are right."""
    head = random_model(precision="bf16").head
    torch.nn.init.zeros_(head.final_layer.linear.weight)
    torch.nn.init.zeros_(head.final_layer.linear.bias)
    x_t, t = torch.randn(100, 12), torch.arange(0, 1000, 10)
    _, sigma = maskrl.BASE.alpha_sigma(t)
    assert (head.eps(x_t, t, torch.randn(100, 32)) == x_t / sigma).all()


def test_the_precision_of_new_settings_holds_for_the_head_too():
    model = random_model()
    assert (model.precision, model.head.precision) == ("fp32", "fp32")
    model.settings = tiny(precision="bf16")
    for network in (model, maskrl.student_of(model, model.settings)):
        assert (network.precision, network.head.precision) == ("bf16", "bf16")


def test_weights_gradients_averages_and_optimisers_stay_float32():
    training = maskrl.TeacherTraining(tiny(precision="bf16"), ["a", "b", "c"])
    training.update(0, *images(), maskrl.rng("update"))
    tensors = [*training.model.parameters(), *training.ema.parameters()]
    tensors += [p.grad for p in training.model.parameters() if p.grad is not None]
    for optimizer in training.optimizers:
        tensors += [v for state in optimizer.state.values() for v in state.values()]
    assert len(tensors) > 150 and {v.dtype for v in tensors} == {torch.float32}


def curve(training, updates, key="loss"):
    """A metric over the updates."""
    x, labels = images(12)
    return torch.tensor(
        [training.update(i, x, labels, maskrl.rng("curve", i))[key] for i in range(updates)]
    )


def teacher_and_losses(precision, updates=60):
    torch.manual_seed(0)
    settings = tiny(precision=precision, teacher_iters=updates)
    training = maskrl.TeacherTraining(settings, ["a", "b", "c"])
    return training.ema, curve(training, updates)


def test_the_teacher_learns_in_bfloat16_as_it_does_in_float32():
    """The mean loss of each third of the training is within 0.02 %, and falls to two thirds."""
    fp32, bf16 = (teacher_and_losses(precision)[1].view(3, -1).mean(1) for precision in PRECISIONS)
    assert fp32[2] < fp32[0] / 1.5
    torch.testing.assert_close(bf16, fp32, rtol=2e-4, atol=0)


def test_gsim_learns_in_bfloat16_as_it_does_in_float32():
    """Students differ by less than 2 % of what GSIM changed in them, from the same teacher."""
    teacher, _ = teacher_and_losses("fp32")
    (x, labels), z = images(12), torch.randn(12 * 16, 12)
    mask = torch.ones(12, 16, dtype=torch.bool)

    def tokens(model):
        model.settings = tiny()
        with torch.no_grad():
            c = model.context(x, mask, labels).flatten(0, 1)
            return maskrl.one_step(model.head, z, c, 5.0)

    students, losses = [], []
    for precision in PRECISIONS:
        teacher.settings = settings = tiny(precision=precision, gsim_iters=25)
        distillation = maskrl.Distillation(teacher, settings)
        losses.append(curve(distillation, 25, "aux_loss").mean())
        students.append(tokens(distillation.model))
    fp32, bf16 = students
    assert 0 < (bf16 - fp32).norm() < 0.02 * (fp32 - tokens(teacher)).norm()
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-4, atol=0)


@pytest.mark.parametrize("rl_steps", ["critical", "all"])
def test_sampler_and_learner_agree_on_log_pi_in_bfloat16(rl_steps):
    """Their batches differ, and so does the rounding: |log r| < 0.01, where 0.18 is clipped."""
    settings = tiny(precision="bf16", steps=6, explore=0.1, rl_steps=rl_steps, action="x")
    student = random_model("student")
    training = maskrl.PolicyGradient(student, settings, redness, torch.zeros(1, 16, 12))
    assert training.update(torch.arange(3), seed=0)["log_ratio"] < 0.01


# What one GPU can do ------------------------------------------------------------------------------


def test_small_fits_24_GB_and_ends_overnight():
    """All three stages, by what tests/budget.py computes."""
    stages = budget.stages(maskrl.preset("small"))
    assert all(stage.weights + stage.activations < 24e9 for stage in stages.values())
    assert 3 < sum(stages[name].hours for name in ("teacher", "GSIM", "RL, all")) < 10


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_budget_of_activations_is_what_an_update_keeps(precision):
    """It is a bound: all tokens visible to the encoder and all denoised, where here half are."""
    settings = tiny(precision=precision, depth=4, head_depth=4, label_dropout=0.0)
    training = maskrl.TeacherTraining(settings, ["a", "b", "c"])
    weights = {p.untyped_storage().data_ptr() for p in training.model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that none is reused
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        training.update(0, *images(), maskrl.rng("update"))
    measured = sum(size for size, _ in kept.values())
    bound = budget.stages(settings)["teacher"].activations
    assert 0.6 * bound < measured < bound
