"""Statements about section 5 of maskrl.py: training a teacher."""

import math

import pytest
import torch
from helpers_methods import flatten

import maskrl
from maskrl import (
    MaskedBatch,
    Muon,
    TeacherTraining,
    hidden_counts,
    optimizer_step,
    random_mask,
    rng,
)


def test_every_number_of_tokens_is_hidden_equally_often_and_never_none():
    hidden = hidden_counts(20000, 16, rng(0))
    assert torch.equal(random_mask(hidden, 16, rng(1)).sum(1), hidden)
    assert hidden.min() == 1
    fraction = hidden.bincount(minlength=17)[1:] / 20000
    torch.testing.assert_close(fraction, torch.full((16,), 1 / 16), atol=0.008, rtol=0)


def test_a_fraction_of_zero_hides_one_token(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.zeros(n))
    assert hidden_counts(3, 16, rng(0)).tolist() == [1, 1, 1]


def test_a_mask_hides_every_position_equally_often():
    fraction = random_mask(torch.full((20000,), 4), 16, rng(0)).float().mean(0)
    torch.testing.assert_close(fraction, torch.full((16,), 0.25), atol=0.015, rtol=0)


def test_a_flat_batch_has_the_hidden_tokens_of_every_draw_in_one_order():
    x, mask = torch.randn(3, 4, 5), torch.rand(3, 4) < 0.5
    t, eps = torch.randint(1000, (3, 2, 4)), torch.randn(3, 2, 4, 5)
    batch = MaskedBatch(x, mask, mask.sum(1), torch.arange(3), t, eps)
    index = [(b, d, n) for b in range(3) for d in range(2) for n in range(4) if mask[b, n]]
    assert torch.equal(batch.flat_repeated(x), torch.stack([x[b, n] for b, _, n in index]))
    assert torch.equal(batch.flat(t), torch.stack([t[b, d, n] for b, d, n in index]))
    assert torch.equal(batch.flat(eps), torch.stack([eps[b, d, n] for b, d, n in index]))
    assert batch.N == len(index)
    rows = torch.tensor([2, 0])
    assert torch.equal(batch[rows].eps, eps[rows]) and batch[rows].z is None
    assert batch[rows].labels.tolist() == [2, 0]
    assert torch.equal(batch[rows].hidden, mask[rows].sum(1))


class Enough(Exception):
    """Ends an update as soon as it is known what it trains on."""


def mask_and_labels_of_an_update(settings, B=1000):
    """What a new teacher meets in an update on B images of class 1."""
    training, calls = TeacherTraining(settings, ["a", "b", "c"]), []

    def context(tokens, mask, labels, hidden):
        calls.append((mask, labels))
        raise Enough

    training.model.context = context
    with pytest.raises(Enough):
        training.update(0, torch.randn(B, 16, 12), torch.ones(B).long(), 0)
    return calls[0]


def test_the_teacher_meets_every_number_of_hidden_tokens_equally_often(settings):
    """Also few: MAR hides 70 to 100 %, and a small model then knows the late iterations badly."""
    mask, _ = mask_and_labels_of_an_update(settings(), B=4000)
    fraction = mask.sum(1).bincount(minlength=17)[1:] / 4000
    torch.testing.assert_close(fraction, torch.full((16,), 1 / 16), atol=0.015, rtol=0)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_teacher_trains_a_fraction_of_the_images_without_their_class(settings, fraction):
    """Guidance needs a null class that was trained: without it eps_null would be random."""
    _, labels = mask_and_labels_of_an_update(settings(label_dropout=fraction))
    assert set(labels.tolist()) == {1, 3}
    assert abs(float((labels == 3).float().mean()) - fraction) < 0.05


def test_without_label_dropout_no_label_is_dropped(settings):
    _, labels = mask_and_labels_of_an_update(settings(label_dropout=0.0, guidance=1.0))
    assert set(labels.tolist()) == {1}


def test_the_teachers_rates_warm_up_and_fall_to_zero_over_the_second_half(settings):
    """And stay there: a rate below 0 would climb the loss."""
    training = TeacherTraining(settings(teacher_iters=200, teacher_lr=0.1, muon_lr=0.2), ["a"])
    for p in training.model.parameters():
        p.grad = torch.zeros_like(p)
    rates = []
    for _ in range(210):
        rates.append([rate.get_last_lr()[0] for rate in training.rates.values()])
        for optimizer, rate in zip(training.optimizers.values(), training.rates.values()):
            optimizer.step()
            rate.step()
    adamw, muon = (list(rate) for rate in zip(*rates))
    assert muon == pytest.approx([2 * rate for rate in adamw])
    assert adamw[0] == pytest.approx(0.1 / 50)
    assert adamw[24] == pytest.approx(0.1 / 2)
    assert adamw[50:100] == pytest.approx([0.1] * 50)
    assert adamw[150] == pytest.approx(0.1 / 2)
    assert adamw[199] == pytest.approx(0.1 / 100)
    assert adamw[200:] == [0.0] * 10


def test_every_weight_of_a_teacher_has_one_optimizer_and_hidden_matrices_have_muon(model):
    optimizers = maskrl.teacher_optimizers(model)
    assert isinstance(optimizers["muon"], Muon)
    adamw, muon = (
        [p for group in optimizers[name].param_groups for p in group["params"]]
        for name in ("adamw", "muon")
    )
    assert len(adamw) + len(muon) == len(list(model.parameters()))
    assert {id(p) for p in adamw + muon} == {id(p) for p in model.parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for p in muon}
    assert {"encoder_blocks.0.attn.qkv.weight", "head.res_blocks.0.mlp.0.weight"} <= matrices
    outer = {"class_emb.weight", "z_proj.weight", "head.input_proj.weight", "mask_token"}
    assert not matrices & (outer | {"head.final_layer.linear.weight", "fake_latent"})


def test_without_a_rate_for_muon_adamw_trains_the_matrices_too(settings):
    model = maskrl.MAR(settings(muon_lr=0.0), ["a"])
    optimizers = maskrl.teacher_optimizers(model)
    assert set(optimizers) == {"adamw"}
    assert isinstance(optimizers["adamw"], torch.optim.AdamW)
    groups = optimizers["adamw"].param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


SHAPES = pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])


@SHAPES
def test_orthogonalise_keeps_the_singular_vectors_and_evens_their_values(shape):
    """Of each matrix of a batch, whatever its size is."""
    x = torch.randn(2, *shape)
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    sizes = torch.tensor([1.0, 1e3])[:, None, None]
    x = sizes * U * torch.linspace(0.1, 2, S.shape[1]) @ Vh
    values = U.mT @ maskrl.orthogonalise(x) @ Vh.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert 0.6 < diagonal.min() <= diagonal.max() < 1.3
    torch.testing.assert_close(values, diagonal.diag_embed(), atol=1e-3, rtol=0)


@SHAPES
def test_a_step_of_muon_is_as_large_as_one_of_adam_whatever_the_gradient(shape):
    """A root mean square of 0.2 lr, against the gradient."""
    for scale in (1e-3, 1e3):
        weight = torch.nn.Parameter(torch.zeros(shape))
        gradient = scale * torch.randn(shape)
        weight.grad = gradient.clone()
        Muon([weight], lr=0.1).step()
        rms = weight.detach().square().mean().sqrt()
        assert 0.7 < rms / (0.2 * 0.1) < 1.2
        assert (weight * gradient).sum() < 0


def test_muon_updates_many_matrices_as_if_each_were_alone():
    shapes = [(16, 48), (32, 32), (16, 48), (48, 16), (32, 32)]
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [torch.nn.Parameter(weight.detach().clone()) for weight in together]
    optimizers = [Muon(together, lr=0.1), *(Muon([weight], lr=0.1) for weight in alone)]
    for _ in range(3):
        for weight, other in zip(together, alone):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for weight, other in zip(together, alone):
        torch.testing.assert_close(weight, other, atol=1e-5, rtol=1e-4)


def test_norms_biases_and_the_head_have_no_weight_decay(settings):
    model = maskrl.MAR(settings(muon_lr=0.0), ["a"])
    groups = maskrl.teacher_optimizers(model)["adamw"].param_groups
    decay, no_decay = (group["params"] for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.02, 0.0]
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decay) + len(no_decay) == len(names)
    assert all(p.ndim > 1 and not names[id(p)].startswith("head.") for p in decay)
    expected = {"head.input_proj.weight", "encoder_norm.weight", "z_proj.bias"}
    assert expected <= {names[id(p)] for p in no_decay}


def test_a_teacher_memorises_one_image(settings):
    """The loss of a head that says nothing is the variance of what it should predict, 1."""
    s = settings(teacher_iters=40, teacher_lr=6e-3, label_dropout=0.0, guidance=1.0, draws=1)
    training, x = TeacherTraining(s, ["a"]), torch.randn(1, 16, 12).repeat(16, 1, 1)
    labels = torch.zeros(16).long()
    losses = [training.update(i, x, labels, i)["loss"] for i in range(40)]
    assert losses[0] > 0.8
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


def test_an_update_is_a_function_of_weights_data_step_and_seed(settings):
    """A resumed run repeats what the interrupted one would have done, since no random state is
    kept."""

    x, labels = torch.randn(4, 16, 12), torch.zeros(4).long()

    def updated(step, seed, global_seed=0):
        torch.manual_seed(0)  # the same first weights
        training = TeacherTraining(settings(), ["a"])
        torch.manual_seed(global_seed)
        training.update(step, x, labels, seed)
        return flatten(training.model.parameters())

    first = updated(0, 5)
    assert torch.equal(first, updated(0, 5, global_seed=1))
    assert not torch.equal(first, updated(1, 5))
    assert not torch.equal(first, updated(0, 6))


def test_ema_follows_at_once_and_then_ever_more_slowly():
    net, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.ones_(net.weight)
    torch.nn.init.zeros_(ema.weight)
    maskrl.update_ema(ema, net, 0, 0.995)
    assert abs(float(ema.weight.detach()) - 0.9) < 1e-6  # d = 1 / 10
    torch.nn.init.zeros_(ema.weight)
    maskrl.update_ema(ema, net, 10**6, 0.995)
    assert abs(float(ema.weight.detach()) - 0.005) < 1e-6


def test_a_step_that_is_not_finite_changes_no_weight():
    """Both a loss that is NaN and, though the loss is finite, an infinite gradient."""
    weight = torch.nn.Parameter(torch.tensor([0.0, 1.0]))
    optimizer = torch.optim.SGD([weight], 0.1)
    for loss in (weight.sum() * math.nan, weight.sqrt().sum()):
        with pytest.raises(FloatingPointError, match="loss or its gradient is infinite or NaN"):
            optimizer_step([loss], optimizer)
        assert weight.tolist() == [0.0, 1.0]


def test_a_step_clips_the_gradient_and_returns_its_norm_before():
    weight = torch.nn.Parameter(torch.zeros(2))
    loss = 1 + weight @ torch.tensor([3.0, 4.0])
    total, norm = optimizer_step([loss], torch.optim.SGD([weight], 1.0))
    assert (total, norm) == (1, pytest.approx(5))
    torch.testing.assert_close(weight.detach(), -torch.tensor([0.6, 0.8]))
