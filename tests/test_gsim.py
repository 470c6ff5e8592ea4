"""Statements about section 7 of maskrl.py: GSIM, the distillation into one step."""

from copy import deepcopy

import pytest
import torch
from conftest import random_model
from helpers_methods import class_sensitive_teacher, distance_between, gaussian_eps

import maskrl
from maskrl import (
    Distillation,
    alpha_sigma,
    eps_weight,
    gsim_loss,
    gsim_terms,
    rng,
    velocity_weight,
)

# The gradient equivalence theorem, for a Gaussian student -----------------------------------------


def guided_eps(x_t, t):
    """eps_null + s (eps_class - eps_null) of two Gaussians, s = 2."""
    eps_class, eps_null = gaussian_eps(0.3, 0.5)(x_t, t), gaussian_eps(-0.2, 0.9)(x_t, t)
    return eps_null + 2 * (eps_class - eps_null)


def mixture_eps(x_t, t):
    """Of a mixture of two Gaussians of scale s: sigma (x_t - alpha E[m | x_t]) / variance."""
    weights, means, s = torch.tensor([[0.3, 0.7]]), torch.tensor([[-0.8, 0.9]]).double(), 0.35
    alpha, sigma = (v.double() for v in alpha_sigma(t))
    variance = alpha**2 * s**2 + sigma**2
    posterior = (weights.log() - (x_t - alpha * means) ** 2 / (2 * variance)).softmax(1)
    return sigma * (x_t - alpha * (posterior * means).sum(1, keepdim=True)) / variance


def squared(y):
    """d(y) = |y|^2 [N] and d'(y) = 2 y [N, D]."""
    return y.square().sum(-1), 2 * y


def pseudo_huber(y):
    """With an r at which it is neither |y| nor its square."""
    return maskrl.pseudo_huber(y, 0.5)


TIMES = (150, 400, 650)
TEACHERS = {"gaussian": gaussian_eps(0.3, 0.5), "guided": guided_eps, "mixture": mixture_eps}
DISTANCES = {"squared": squared, "huber": pseudo_huber}
WEIGHTS = {"velocity": velocity_weight, "eps": eps_weight}


def student_parameters():
    """Mean and scale of the student N(theta_0, theta_1^2)."""
    return torch.tensor([-0.1, 0.8], dtype=torch.float64, requires_grad=True)


def quadrature(n=121, width=7.0):
    """Two independent standard normals: points u, v [n^2, 1] and weights that sum to one."""
    x = torch.linspace(-width, width, n, dtype=torch.float64)
    w = torch.exp(-(x**2) / 2)
    u, v = torch.meshgrid(x, x, indexing="ij")
    return u.reshape(-1, 1), v.reshape(-1, 1), (w[:, None] * w / w.sum() ** 2).flatten()


def divergence(theta, eps_p, distance, weight=velocity_weight):
    """sum over t of E d(weight sigma_t (s_q - s_p)), s_q the student's exact score."""
    u, v, w = quadrature()
    total = 0.0
    for t in TIMES:
        t = torch.full((len(u),), t)
        alpha, sigma = (x.double() for x in alpha_sigma(t))
        x_t = alpha * (theta[0] + theta[1] * u) + sigma * v
        difference = eps_p(x_t, t) - gaussian_eps(*theta)(x_t, t)
        total = total + (w * distance(weight(t) * difference)[0]).sum()
    return total


def exact_gradient(eps_p, distance, weight=velocity_weight):
    theta = student_parameters()
    return torch.autograd.grad(divergence(theta, eps_p, distance, weight), theta)[0]


def gsim_gradient(
    eps_p,
    distance,
    weight=velocity_weight,
    loss=gsim_loss,
    through_the_students_score=False,
):
    """Gradient in theta of the very gsim_loss that training uses, expectations by quadrature."""
    theta = student_parameters()
    eps_q = gaussian_eps(*(theta if through_the_students_score else theta.detach()))
    u, v, w = quadrature()
    total = 0.0
    for t in TIMES:
        x_0, t = theta[0] + theta[1] * u, torch.full((len(u),), t)
        total = total + (w * loss(x_0, t, v, eps_q, eps_p, distance, weight)).sum()
    return torch.autograd.grad(total, theta)[0]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_gradient_equivalence_theorem(teacher, distance, weight):
    """The gradient of L1 + L2 is that of the divergence, although no gradient enters the student's
    score function."""
    parts = TEACHERS[teacher], DISTANCES[distance], WEIGHTS[weight]
    exact = exact_gradient(*parts)
    assert (gsim_gradient(*parts) - exact).norm() < 1e-2 * exact.norm()


def L1_dropped(*args):
    return gsim_terms(*args)[1]


def L2_dropped(*args):
    return gsim_terms(*args)[0]


def sign_of_L1_flipped(*args):
    L1, L2 = gsim_terms(*args)
    return L2 - L1


def x_t_detached(x_0, *args):
    return gsim_loss(x_0.detach(), *args) + 0 * x_0.sum()


def d_prime_detached(x_0, t, eps, eps_q, eps_p, distance, weight):
    def detached(y):
        d, d_prime = distance(y)
        return d, d_prime.detach()

    return gsim_loss(x_0, t, eps, eps_q, eps_p, detached, weight)


WRONG = [L1_dropped, L2_dropped, sign_of_L1_flipped, x_t_detached, d_prime_detached]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("wrong", WRONG)
def test_the_theorem_notices(wrong, weight):
    parts = mixture_eps, squared, WEIGHTS[weight]
    exact = exact_gradient(*parts)
    assert (gsim_gradient(*parts, loss=wrong) - exact).norm() > 0.05 * exact.norm()


def test_gradient_into_an_exact_student_score_makes_L1_vanish_while_the_sum_stays_right():
    parts = TEACHERS["gaussian"], squared
    exact = exact_gradient(*parts)
    both = gsim_gradient(*parts, through_the_students_score=True)
    L1 = gsim_gradient(*parts, loss=L2_dropped, through_the_students_score=True)
    assert (both - exact).norm() < 1e-2 * exact.norm()
    assert L1.norm() < 1e-2 * exact.norm()


def test_the_terms_of_gsim_are_what_the_paper_prints():
    """L1 = -d'(y)^T (s_q - grad log p(x_t | x_0)) and L2 = d(y), y = s_q - s_p; written in scores,
    with the weight that turns sigma_t (s_q - s_p) back into scores."""
    x_0, eps, t = torch.randn(3, 2).double(), torch.randn(3, 2).double(), torch.tensor(TIMES)
    alpha, sigma = (v.double() for v in alpha_sigma(t))
    eps_q, eps_p = gaussian_eps(-0.1, 0.8), gaussian_eps(0.3, 0.5)

    def weight(t):
        return 1 / sigma

    x_t = alpha * x_0 + sigma * eps
    s_q, s_p = -eps_q(x_t, t) / sigma, -eps_p(x_t, t) / sigma
    gradient_of_log_p = -(x_t - alpha * x_0) / sigma**2
    d, d_prime = pseudo_huber(s_q - s_p)
    L1, L2 = gsim_terms(x_0, t, eps, eps_q, eps_p, pseudo_huber, weight)
    torch.testing.assert_close(L1, -(d_prime * (s_q - gradient_of_log_p)).sum(1))
    torch.testing.assert_close(L2, d)
    torch.testing.assert_close(gsim_loss(x_0, t, eps, eps_q, eps_p, pseudo_huber, weight), L1 + L2)


@pytest.mark.parametrize("distance", [squared, pseudo_huber, maskrl.pseudo_huber])
def test_a_distance_gives_its_own_derivative(distance):
    y = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    d, d_prime = distance(y)
    torch.testing.assert_close(torch.autograd.grad(d.sum(), y)[0], d_prime)


def test_the_weight_makes_differences_of_eps_differences_of_velocities():
    """Of two predictions for the same x_t: eps = sigma_t x_t + alpha_t v."""
    t, x_t, v = torch.tensor(TIMES), torch.randn(3, 12), torch.randn(2, 3, 12)
    alpha, sigma = alpha_sigma(t)
    eps = sigma * x_t + alpha * v
    difference = velocity_weight(t) * (eps[0] - eps[1])
    torch.testing.assert_close(difference, v[0] - v[1], atol=1e-5, rtol=1e-4)


def test_gsim_loss_lowers_the_divergence_between_two_gaussians():
    """A student N(mean, scale^2) in 8 channels, by samples alone, with the paper's r = 1e-5."""
    theta = torch.tensor([-0.5, 1.2], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.03)
    teacher = gaussian_eps(0.3, 0.5)
    before = divergence(theta, teacher, squared)
    for _ in range(150):
        z, eps = torch.randn(2, 256, 8, dtype=torch.float64)
        t, eps_q = torch.randint(20, 985, (256,)), gaussian_eps(*theta.detach().clone())
        loss = gsim_loss(theta[0] + theta[1] * z, t, eps, eps_q, teacher)
        maskrl.optimizer_step([loss.mean()], optimizer)
    assert divergence(theta, teacher, squared) < 0.02 * before
    expected = torch.tensor([0.3, 0.5], dtype=torch.float64)
    torch.testing.assert_close(theta.detach().abs(), expected, atol=0.06, rtol=0)


# Distillation -------------------------------------------------------------------------------------


def test_a_distillation_trains_student_and_auxiliary_but_not_the_teacher(model, settings):
    teacher = deepcopy(model)
    distillation = Distillation(teacher, settings(guidance=2.0))
    for network in (distillation.model, distillation.aux, distillation.ema):
        assert distance_between(network, model) == 0
    distillation.update(0, torch.randn(4, 16, 12), torch.tensor([0, 1, 2, 0]), 0)
    assert distance_between(teacher, model) == 0
    assert distance_between(distillation.model, model) > 0
    assert distance_between(distillation.aux, model) > 0
    assert distance_between(distillation.ema, model) > 0
    assert distillation.model.kind == distillation.ema.kind == "student"
    assert teacher.kind == "teacher"


def test_a_distillation_freezes_its_teacher(model, settings):
    """Otherwise every update would also compute, and add up, the gradient of the teacher's head."""
    assert any(p.requires_grad for p in model.parameters())
    distillation = Distillation(model, settings())
    distillation.update(0, torch.randn(4, 16, 12), torch.tensor([0, 1, 2, 0]), 0)
    assert not any(p.requires_grad for p in distillation.teacher.parameters())
    assert all(p.grad is None for p in distillation.teacher.parameters())
    for network in (distillation.model, distillation.aux):
        assert all(p.requires_grad for p in network.parameters())


def test_the_first_updates_of_a_distillation_may_train_the_heads_alone(model, settings):
    """Afterwards all weights learn, and the optimisers have states of heads alone until then."""
    x, labels = torch.randn(4, 16, 12), torch.tensor([0, 1, 2, 0])
    distillation = Distillation(model, settings(guidance=2.0, heads_iters=2))
    networks = [distillation.model, distillation.aux, distillation.ema]

    def moved():
        names = [
            {name for name, p in network.named_parameters() if not torch.equal(p, weights[name])}
            for network in networks
        ]
        return set.union(*names), names

    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        distillation.update(step, x, labels, 0)
    all_names, names = moved()
    assert all(names) and all(name.startswith("head.") for name in all_names)
    for network, optimizer in zip(networks, distillation.optimizers.values()):
        assert optimizer.state.keys() == set(network.head.parameters())
    distillation.update(2, x, labels, 0)
    assert {name for name in moved()[0] if not name.startswith("head.")}


def test_heads_alone_get_the_gradient_that_they_have_in_whole_models(model, settings):
    """Up to the first update all networks are the teacher, and their contexts are its own."""
    x, labels = torch.randn(4, 16, 12), torch.tensor([0, 1, 2, 0])
    mask, gradients = torch.arange(16) < torch.full((4, 1), 9), []
    for shares_contexts in (False, True):
        whole = Distillation(deepcopy(model), settings(guidance=2.0))
        shared = whole.teacher_contexts(x, mask, labels) if shares_contexts else ()
        batch = whole.draw((x, mask, mask.sum(1), labels), rng(0), *shared)
        (whole.student_loss(batch) + whole.aux_loss(batch)).backward()
        heads = whole.model.head, whole.aux.head
        gradients.append([p.grad for head in heads for p in head.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("predicts, weight", [("x_0", velocity_weight), ("eps", eps_weight)])
def test_a_distillation_compares_what_the_heads_predict_best(predicts, weight, settings):
    """For heads of eps 1 / alpha, up to 43, would blow up the error of their eps at high noise."""
    given = []

    def watched_loss(*args, weight):
        given.append(weight)
        return gsim_loss(*args, weight=weight)

    teacher = random_model(predicts=predicts)
    distillation = Distillation(teacher, settings(predicts=predicts), watched_loss)
    distillation.update(0, torch.randn(4, 16, 12), torch.tensor([0, 1, 2, 0]), 0)
    assert given == [weight]


@pytest.mark.parametrize("draws", [1, 3])
def test_a_distillation_compares_the_guided_teacher_with_the_auxiliary_network(draws, monkeypatch):
    """The guidance is that of an iteration that reveals one token of what is hidden; each score
    has the context of its own network, for the masks that the update drew, and so has the student,
    whose tokens are compared."""
    model = class_sensitive_teacher(guidance=3.0, draws=draws)
    student_calls, loss_calls, one_step = [], [], maskrl.one_step

    def watched_student(head, z, c, noise_ratio):
        x_0 = one_step(head, z, c, noise_ratio)
        student_calls.append((c, x_0))
        return x_0

    def watched_loss(x_0, t, eps, eps_q, eps_p, weight):
        x_t = maskrl.q_sample(x_0, t, eps).detach()
        loss_calls.append((x_0, x_t, t, eps_q(x_t, t), eps_p(x_t, t)))
        return gsim_loss(x_0, t, eps, eps_q, eps_p, weight=weight)

    monkeypatch.setattr(maskrl, "one_step", watched_student)
    x, labels = torch.randn(6, 16, 12), torch.tensor([0, 1, 2, 0, 1, 2])
    distillation = Distillation(model, model.settings, watched_loss)
    distillation.update(0, x, labels, 5)
    ((x_0, x_t, t, eps_q, eps_p),) = loss_calls

    generator = rng(5, "gsim", 0)
    mask = maskrl.random_mask(maskrl.hidden_counts(6, 16, generator), 16, generator)
    assert len(set(mask.sum(1).tolist())) > 2
    tokens = [(b, n) for b in range(6) for _ in range(draws) for n in range(16) if mask[b, n]]
    image, position = torch.tensor(tokens).T
    c = model.context(x, mask, labels)[image, position]
    of_aux, of_student = student_calls  # which starts as the teacher
    assert torch.equal(of_student[1], x_0)
    for c_student, _ in (of_aux, of_student):
        torch.testing.assert_close(c_student, c, atol=1e-4, rtol=1e-4)
    c_null = model.context(x, mask, model.null(labels))[image, position]
    eps_class, eps_null = model.head.eps(x_t, t, c), model.head.eps(x_t, t, c_null)
    hidden_after = (mask.sum(1) - 1).clamp(min=1)
    scale = (1 + (3.0 - 1) * (16 - hidden_after) / 16)[image, None]
    expected = eps_null + scale * (eps_class - eps_null)
    torch.testing.assert_close(eps_p, expected, atol=1e-4, rtol=1e-4)

    aux = distillation.aux  # as its own update left it
    expected = aux.head.eps(x_t, t, aux.context(x, mask, labels)[image, position])
    torch.testing.assert_close(eps_q, expected, atol=1e-4, rtol=1e-4)


def test_the_rates_of_a_distillation_fall_to_zero_and_stay_there(model, settings):
    """torch's own cosine would climb again."""
    distillation = Distillation(model, settings(gsim_iters=20, student_lr=0.1, aux_lr=0.2))
    rates = []
    for _ in range(45):
        rates.append([rate.get_last_lr()[0] for rate in distillation.rates.values()])
        for name, optimizer in distillation.optimizers.items():
            optimizer.step()  # on no gradient
            distillation.rates[f"{name}_rate"].step()
    student, aux = (list(rate) for rate in zip(*rates))
    assert aux == pytest.approx([2 * rate for rate in student])
    assert (student[0], student[10]) == pytest.approx((0.1, 0.05))
    assert student[:21] == sorted(student[:21], reverse=True)
    assert student[20:] == pytest.approx([0.0] * 25, abs=1e-12)


def test_times_of_gsim_avoid_both_ends():
    t = maskrl.gsim_times((20, 1000), rng(0))
    assert t.shape == (20, 1000)
    assert (t.min(), t.max()) == (20, 984)


def test_guidance_in_gsim_is_mars_linear_one_or_constant(model, settings):
    """Linear: as if an iteration that hides n of L tokens revealed one, 1 + (s - 1)(L - n + 1) / L;
    constant: MARVAL's s."""
    x, labels = torch.randn(2, 16, 12), torch.tensor([0, 1])
    mask = torch.arange(16) < torch.tensor([[4], [16]])
    linear = Distillation(model, settings(guidance=3.0))
    batch = linear.draw((x, mask, mask.sum(1), labels), rng(0))
    draws = linear.model.settings.draws
    expected = [1 + 2 * 13 / 16] * 4 * draws + [1 + 2 * 1 / 16] * 16 * draws
    torch.testing.assert_close(linear.guidance(batch), torch.tensor(expected)[:, None])
    constant = Distillation(model, settings(guidance=3.0, gsim_guidance="constant"))
    assert constant.guidance(batch) == 3.0
    assert constant.student_loss(batch) != linear.student_loss(batch)
