"""Statements about section 6 of maskrl.py: generation."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from conftest import random_model
from helpers_methods import always_one, class_sensitive_teacher

import maskrl
from maskrl import Noise, Sampling, draw_noise, generate, halton_order, reveal_counts, rng

# Guidance and clipping ----------------------------------------------------------------------------


def test_guidance_of_one_is_none_and_of_zero_drops_the_class(model):
    x, t, c, null = torch.randn(5, 12), torch.arange(5), torch.randn(5, 32), torch.randn(5, 32)
    of_class, of_null = model.head(x, t, c), model.head(x, t, null)
    with_one = maskrl.guided(model.head, c, null, 1.0)(x, t)
    with_zero = maskrl.guided(model.head, c, null, 0.0)(x, t)
    torch.testing.assert_close(with_one, of_class, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(with_zero[:, :12], of_null[:, :12], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("predicts", ["x_0", "eps"])
def test_one_time_stands_for_those_of_all_rows(predicts):
    head = random_model(predicts=predicts).head
    x, c, null = torch.randn(5, 12), torch.randn(5, 32), torch.randn(5, 32)
    guided = maskrl.guided(head, c, null, 3.0)
    one, each = torch.tensor([300]), torch.full((5,), 300)
    torch.testing.assert_close(head(x, one, c), head(x, each, c))
    torch.testing.assert_close(guided(x, one), guided(x, each))


def test_the_chains_limits_are_those_of_pixels_a_little_beyond_white(settings):
    low, high = maskrl.x_0_limits(settings(mean=-0.5, scale=3.0, x_0_limit=1.3))
    white = maskrl.to_tokens(torch.full((1, 3, 8, 8), 1.3), settings(mean=-0.5, scale=3.0))
    torch.testing.assert_close(white, torch.full_like(white, high))
    torch.testing.assert_close(-white - low, torch.full_like(white, -3.0))  # about the mean
    assert maskrl.x_0_limits(settings(x_0_limit=0.0)) is None


# Orders and counts --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 3, 4, 8])
def test_a_halton_order_reveals_every_token_once_and_differs_from_image_to_image(side):
    order = halton_order(side, 50, rng("order"))
    assert torch.equal(order.sort(1).values, torch.arange(side**2).expand(50, -1))
    assert len(order.unique(dim=0)) > min(20, 2 * side**2 - 2)


def test_halton_spreads_the_tokens_of_an_iteration():
    """Of an 8x8 grid, 8 tokens in turn are farther apart than 8 random ones, in the mean."""

    def nearest(order):
        position = torch.stack([order // 8, order % 8], -1).float()
        distance = torch.cdist(position, position) + 99 * torch.eye(8)
        return distance.min(-1).values.mean()

    halton = halton_order(8, 200, rng("order"))
    random = torch.rand(200, 64, generator=rng("order")).argsort(1)
    halton_turns, random_turns = halton.view(200, 8, 8), random.view(200, 8, 8)
    assert nearest(halton_turns) > 1.15 * nearest(random_turns)
    assert nearest(halton_turns[:, -1]) > 1.3 * nearest(random_turns[:, -1])  # revealed first


def test_radical_inverse_mirrors_the_digits():
    expected = [Fraction(1, 2), Fraction(1, 4), Fraction(3, 4), Fraction(3, 8)]
    assert [maskrl.radical_inverse(i, 2) for i in (1, 2, 3, 6)] == expected
    assert maskrl.radical_inverse(5, 3) == Fraction(7, 9)  # 12 in base 3 gives 0.21


def halton_cell(i, side):
    """The cell of Halton's point i, in whole numbers: floor(side x mirrored digits / base^n)."""
    cell = []
    for base in (2, 3):
        mirrored, size, rest = 0, 1, i
        while rest:
            rest, digit = divmod(rest, base)
            mirrored, size = mirrored * base + digit, size * base
        cell.append(side * mirrored // size)
    return side * cell[0] + cell[1]


@pytest.mark.parametrize("side", [9, 18, 27])
def test_halton_points_on_an_edge_of_the_grid_fall_into_the_right_cell(side):
    """In base 3, 1/9 x 9 is exactly 1; rounded numbers fall into the cell before."""
    cells = maskrl.halton_cells(side, "cpu").tolist()
    assert sorted(cells) == list(range(side**2))
    i, visited = 0, {}
    while len(visited) < side**2:
        i += 1
        visited.setdefault(halton_cell(i, side))
    assert cells == list(visited)


def test_steps_may_be_the_counts_themselves(student):
    counts = (1, 2, 3, 4, 6)
    _, trace = generate(student, [0, 1], Sampling(counts), trace=True)
    assert trace.counts.tolist() == [list(counts)] * 2


def test_the_order_is_the_models_unless_another_is_asked_for(student, settings):
    def revealed(**kwargs):
        return generate(student, [0, 1], Sampling(**kwargs), trace=True)[1].order

    halton = revealed()
    assert torch.equal(halton, revealed(order="halton"))
    assert not torch.equal(halton, revealed(order="random"))
    student.settings = settings(order="random")
    assert torch.equal(revealed(), revealed(order="random"))


# Against a generation written out by hand ---------------------------------------------------------


def by_hand(model, labels, counts, draw):
    """Tokens that a generation with these counts must give; draw(c, c_null, z, hidden_after,
    generator) -> tokens [N, D] at the positions that an iteration reveals."""
    generator = rng(0, "generate")
    noise = draw_noise(model, len(labels), generator, model.settings.order)
    rank, hidden = noise.order.argsort(1), model.length
    tokens = torch.zeros_like(noise.z)
    for count in counts:
        mask = rank < hidden
        hidden = hidden - count
        reveal = mask & (rank >= hidden)
        c = model.context(tokens, mask, labels)[reveal]
        c_null = model.context(tokens, mask, model.null(labels))[reveal]
        tokens[reveal] = draw(c, c_null, noise.z[reveal], hidden, generator)
    return tokens


@torch.no_grad()
def test_generate_alone_walks_a_teachers_chain_under_its_guidance():
    overrides = {"steps": 4, "guidance": 3.0, "denoise_steps": 6, "x_0_limit": 0.3}  # that clips
    model = class_sensitive_teacher(**overrides)
    labels, head = torch.tensor([0, 1, 2]), model.head
    limit = model.settings.x_0_limit * model.settings.scale  # the mean is 0

    def draw(c, c_null, z, hidden_after, generator):
        scale = 1 + (3.0 - 1) * (16 - max(hidden_after, 1)) / 16

        def guided_head(x, t):
            eps, variance = head(x, t, c).chunk(2, 1)
            eps_null = head.eps(x, t, c_null)
            return torch.cat([eps_null + scale * (eps - eps_null), variance], 1)

        chain = maskrl.Diffusion(6)
        return chain.sample(guided_head, z, generator, limits=(-limit, limit))

    expected = by_hand(model, labels, reveal_counts(16, 4), draw)
    torch.testing.assert_close(generate(model, labels), expected, atol=1e-4, rtol=1e-4)
    unguided = generate(model, labels, Sampling(guidance=1.0))
    assert not torch.allclose(unguided, expected, atol=1e-2)


@torch.no_grad()
def test_generate_alone_takes_a_students_one_step_without_guidance():
    student, labels = random_model("student", steps=4, guidance=3.0), torch.tensor([0, 1, 2])

    def draw(c, c_null, z, hidden_after, generator):
        return maskrl.one_step(student.head, z, c, student.settings.noise_ratio)

    expected = by_hand(student, labels, reveal_counts(16, 4), draw)
    torch.testing.assert_close(generate(student, labels), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_noise_policy_starts_as_the_student_and_moves_the_noise(student):
    """z = eps + mu(c), with the context of the moment when the token is revealed."""
    before, labels = generate(student, [0, 1]), torch.tensor([0, 1])
    maskrl.add_noise_policy(student)
    assert torch.equal(generate(student, labels), before)
    student.noise_policy.net[-1].bias.fill_(0.5)

    def draw(c, c_null, z, hidden_after, generator):
        return maskrl.one_step(student.head, z + 0.5, c, student.settings.noise_ratio)

    expected = by_hand(student, labels, reveal_counts(16, student.settings.steps), draw)
    torch.testing.assert_close(generate(student, labels), expected, atol=1e-4, rtol=1e-4)


# Every kind of model ------------------------------------------------------------------------------

SAMPLINGS = {
    "a student's steps": ("student", Sampling(steps=4)),
    "a guided chain": ("teacher", Sampling(steps=3, denoise_steps=4, guidance=2.0)),
    "a learned schedule": ("policy", Sampling()),
}


@pytest.mark.parametrize("kind, sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_same_seed_same_samples(kind, sampling):
    model, labels = random_model(kind), torch.tensor([0, 1, 2, 0])
    if kind == "policy":
        maskrl.add_schedule(model)
    a, trace = generate(model, labels, sampling, seed=5, trace=True)
    assert torch.equal(a, generate(model, labels, sampling, seed=5))
    assert not torch.equal(a, generate(model, labels, sampling, seed=6))
    assert trace.counts.sum(1).tolist() == [16] * 4


def test_every_model_starts_from_the_same_noise(model, student, policy):
    traces = [generate(m, [0, 1], seed=4, trace=True)[1] for m in (model, student, policy)]
    for trace in traces[1:]:
        assert torch.equal(trace.z, traces[0].z)
        assert torch.equal(trace.order, traces[0].order)


def test_labels_may_be_a_list_of_integers(student):
    tensor = torch.tensor([0, 1, 2])
    assert torch.equal(generate(student, [0, 1, 2]), generate(student, tensor))
    assert generate(student, [3]).isfinite().all()  # the null class


def test_labels_may_be_bytes_as_mnist_has_them(student):
    """Which PyTorch takes for a mask where they index."""
    numbers = [2, 0, 1, 1]
    of_bytes = generate(student, torch.tensor(numbers, dtype=torch.uint8))
    assert torch.equal(of_bytes, generate(student, numbers))


def test_labels_may_be_names_of_classes(student):
    numbers = [2, 0]
    names = [student.classes[y] for y in numbers]
    assert torch.equal(generate(student, names), generate(student, numbers))


def test_classes_may_be_named_by_integers():
    model = maskrl.MAR(maskrl.Settings(), range(3, 6), "student")
    assert model.classes == ["3", "4", "5"]
    assert torch.equal(model.labels(["5", "3"]), torch.tensor([2, 0]))
    with pytest.raises(ValueError, match="0...3 or of class names, such as 3, 4, 5"):
        model.labels(["6"])


@pytest.mark.parametrize("kind", ["student", "policy"])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(guidance=2.0), Sampling(denoise_steps=5), Sampling(denoise_steps=(5, 2))],
)
def test_a_one_step_generator_refuses_what_only_a_chain_has(kind, sampling):
    with pytest.raises(ValueError, match="one denoising step"):
        generate(random_model(kind), [0], sampling)


def test_a_teacher_refuses_guidance_in_one_step(model):
    with pytest.raises(ValueError, match="one denoising step"):
        generate(model, [0], Sampling(denoise_steps=1, guidance=2.0))


@pytest.mark.parametrize("kind", ["teacher", "student", "policy"])
def test_the_temperature_of_one_step_is_the_standard_deviation_of_z(kind):
    one_step, sampling = random_model(kind), Sampling(steps=4, guidance=1.0, denoise_steps=1)
    if kind == "policy":
        maskrl.add_noise_policy(one_step)  # which moves the mean of z, whatever its temperature
        torch.nn.init.ones_(one_step.noise_policy.net[-1].bias)
    noise = draw_noise(one_step, 3, rng("warm"), "random")
    cooler = Noise(noise.order, 0.5 * noise.z)
    expected, trace = generate(one_step, [0, 1, 2], sampling, cooler, trace=True)
    cool = replace(sampling, temperature=0.5)
    tokens, same = generate(one_step, [0, 1, 2], cool, noise, trace=True)
    assert torch.equal(tokens, expected) and torch.equal(same.z, trace.z)
    assert not torch.equal(tokens, generate(one_step, [0, 1, 2], sampling, noise))


@pytest.mark.parametrize("kind", ["student", "policy"])
def test_a_temperature_is_annealed_along_the_cosine_schedule(kind):
    """For a policy to its setting, where nothing else is asked for."""
    one_step = random_model(kind, temperature=0.5)
    noise = draw_noise(one_step, 3, rng("warm"), "random")
    annealed = Sampling(steps=4, temperature=(1.0, 0.5))
    tokens, trace = generate(one_step, [0, 1, 2], annealed, noise, trace=True)
    assert torch.equal(trace.z, trace.temperature[..., None] * noise.z)
    of_steps = torch.tensor([1, 0.875, 0.75, 0.625])  # k / K of the way; the floor is a little off
    expected = (trace.masks()[1] * of_steps[:, None]).sum(1)
    torch.testing.assert_close(trace.temperature, expected, atol=0.04, rtol=0)
    by_default = generate(one_step, [0, 1, 2], Sampling(steps=4), noise)
    assert torch.equal(by_default, tokens) == (kind == "policy")


@torch.no_grad()
def test_a_teacher_asked_for_one_step_is_the_start_of_its_student(model):
    labels = torch.tensor([0, 1, 2])
    student = maskrl.student_of(model, model.settings)
    one_step = generate(model, labels, Sampling(denoise_steps=1))
    assert torch.equal(one_step, generate(student, labels))


def test_denoising_steps_are_annealed_from_the_first_iteration_to_the_last(model, monkeypatch):
    lengths, Diffusion = [], maskrl.Diffusion

    def watched(n):
        lengths.append(n)
        return Diffusion(n)

    monkeypatch.setattr(maskrl, "Diffusion", watched)
    generate(model, [0], Sampling(steps=4, denoise_steps=(8, 2)))
    assert lengths == [8, 6, 4, 2]


@pytest.mark.parametrize("kind", ["student", "policy"])
def test_completing_an_image_keeps_what_is_known_and_sees_it(kind):
    model, known, labels = random_model(kind), torch.randn(3, 16, 12), torch.tensor([0, 1, 2])
    mask = torch.arange(16) % 3 == 0
    if kind == "policy":
        maskrl.add_schedule(model)

    def complete(known):
        return generate(model, labels, known=(known, mask), trace=True)

    tokens, trace = complete(known)
    by_numbers = generate(model, labels, known=(known, mask.long()))
    assert torch.equal(tokens, by_numbers)
    assert torch.equal(tokens[:, ~mask], known[:, ~mask])
    assert not torch.isclose(tokens[:, mask], known[:, mask]).any(-1).all()
    assert (trace.counts.sum(1) == mask.sum()).all()
    assert torch.equal(trace.masks()[0][:, 0], mask.expand(3, -1))
    other_visible = torch.where(mask[:, None], known, -known)
    assert not torch.allclose(complete(other_visible)[0][:, mask], tokens[:, mask])
    other_hidden = torch.where(mask[:, None], 7.0, known)
    assert torch.equal(complete(other_hidden)[0], tokens)


# Learned schedules --------------------------------------------------------------------------------


def test_generate_alone_takes_a_policys_learned_counts(policy):
    """Unless the number of steps is asked for."""
    labels = torch.arange(12) % 3
    _, trace = generate(policy, labels, Sampling(greedy=False), trace=True)
    assert (trace.counts.sum(1) == 16).all()
    assert trace.states.shape == (*trace.counts.shape, 34)
    assert len(set(trace.steps.tolist())) > 1
    _, fixed = generate(policy, labels, Sampling(steps=4), trace=True)
    assert fixed.counts.tolist() == [reveal_counts(16, 4)] * 12
    assert fixed.states is None


def test_a_learned_schedule_takes_its_median_count_and_explores_in_rollouts(policy):
    torch.nn.init.normal_(policy.schedule.net[-1].weight)
    labels = torch.arange(12) % 3
    rollouts = maskrl.rollout(policy, always_one, labels, 0)
    greedy = generate(policy, labels, trace=True)[1]
    for trace, is_greedy in ((greedy, True), (rollouts.trace, False)):
        taken = trace.counts > 0
        pi = policy.schedule.log_probs(trace.states[taken]).exp()
        n = trace.counts[taken, None]
        half_are_at_most_n = pi.cumsum(1).gather(1, n - 1) >= 0.5
        half_are_at_least_n = pi.flip(1).cumsum(1).flip(1).gather(1, n - 1) >= 0.499
        assert (half_are_at_most_n & half_are_at_least_n).all() == is_greedy


# Traces -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_trace_agrees_with_what_was_generated(policy):
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    sampling = Sampling(greedy=False)
    tokens, trace = generate(policy, labels, sampling, seed=1, trace="predictions")
    mask, revealed = trace.masks()
    assert len(set(trace.steps.tolist())) > 1  # rows differ in their number of steps
    assert torch.equal(revealed.sum(2), trace.counts)
    assert torch.equal(revealed.sum(1), torch.ones(6, 16, dtype=torch.long))  # every token once
    assert torch.equal(trace.means, tokens)  # there was no exploration
    for k in range(trace.counts.shape[1]):  # a token keeps the value it was revealed with
        now = revealed[:, k]
        assert torch.equal(trace.predictions[:, k][now], tokens[now])
        c = policy.context(tokens, mask[:, k], labels)[now]
        torch.testing.assert_close(c, trace.contexts[now], atol=1e-4, rtol=1e-4)
        again = maskrl.one_step(policy.head, trace.z[now], c, policy.settings.noise_ratio)
        torch.testing.assert_close(again, tokens[now], atol=1e-4, rtol=1e-4)


def test_predictions_are_traced_only_on_request_and_change_no_image(policy):
    labels = torch.tensor([0, 1, 2])
    tokens, trace = generate(policy, labels, trace=True)
    again, with_predictions = generate(policy, labels, trace="predictions")
    assert trace.predictions is None
    assert with_predictions.predictions.shape == (3, trace.counts.shape[1], 16, 12)
    torch.testing.assert_close(tokens, again, atol=1e-5, rtol=1e-4)


# Wrong calls, which would silently give other images ----------------------------------------------


LABELS = [[0, -1], [0, 4], [0.5], 1, "red", ["no such class"], [[0]], [True, False, True]]


@pytest.mark.parametrize("labels", LABELS)
def test_labels_that_name_no_class_are_refused(student, labels):
    """A negative index would silently be another class."""
    with pytest.raises(ValueError, match=r"integers in 0\.\.\.3 or of class names"):
        generate(student, labels)


@pytest.mark.parametrize("steps", [0, -3, 17, (), (8, 7), (17, -1), (16, 0)])
def test_steps_that_do_not_reveal_every_token_are_refused(student, steps):
    with pytest.raises(ValueError, match="16"):
        generate(student, [0, 1], Sampling(steps))


def test_a_schedule_that_is_given_too_few_steps_is_refused(policy):
    """The tokens that it leaves would silently be zeros."""
    policy.settings = replace(policy.settings, steps=1)
    with pytest.raises(ValueError, match="tokens are left after 1 steps"):
        generate(policy, [0, 1])


@pytest.mark.parametrize("sampling", [Sampling(order="up"), Sampling(denoise_steps=0)])
def test_a_sampling_that_means_nothing_is_refused(model, sampling):
    """Not taken for the Halton order, or for the settings' denoising steps."""
    with pytest.raises(ValueError, match="up|0"):
        generate(model, [0], sampling)
