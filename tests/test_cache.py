"""Attention caching (sections 3 and 6): which tokens are computed, and against what."""

import pytest
import torch
from conftest import error_of, random_model
from torch.utils._python_dispatch import TorchDispatchMode

import maskrl
import sample
from maskrl import Cache, InputError, Sampling

LABELS = torch.tensor([0, 1, 2, 3])
SAMPLINGS = {
    "a student": ("student", Sampling(steps=8)),
    "a guided chain": ("teacher", Sampling(steps=8, denoise_steps=4, guidance=2.0)),
    "a learned schedule": ("policy", Sampling()),
}


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def generator_of(kind):
    """A model whose transformer has weights so large that tokens depend on each other."""
    model = random_model(kind, depth=2)
    for name, p in model.named_parameters():
        if not name.startswith("head."):
            p.data.mul_(3)
    if kind == "policy":
        maskrl.add_schedule(model)
    return model


def ragged_masks():
    """Tokens, the masks before and after some of them are revealed, and which ones are next."""
    tokens, rank = torch.randn(4, 16, 12), torch.rand(4, 16).argsort(1)
    before, after, last = torch.tensor([[16, 12, 7, 4], [15, 9, 5, 1], [14, 8, 1, 0]])[..., None]
    return tokens, rank < before, rank < after, (rank < after) & (rank >= last)


@torch.no_grad()
def frozen(model, tokens, before, after, computed):
    """c of the computed places when every layer's other inputs are those under the mask `before`:
    what a cache stands for, by whole passes over one image [L, ...] at a time and without one."""
    buffer = model.settings.buffer

    def embedded(label):
        classes = torch.cat([model.class_emb.weight, model.fake_latent])[label]
        x = torch.cat([classes.expand(buffer, -1), model.z_proj(tokens)])
        return model.z_proj_ln(x + model.encoder_pos_embed_learned[0])

    def through(blocks, x, old, keys, fresh):
        """x after the blocks, and the inputs of all; those that are not fresh come from old."""
        inputs = []
        for i, block in enumerate(blocks):
            if old is not None:
                x = torch.where(fresh[:, None], x, old[i])
            inputs.append(x)
            x = block(x[None], keys[None])[0]
        return x, inputs

    def whole(label, mask, fresh, old):
        visible = torch.cat([torch.ones(buffer).bool(), ~mask])
        everything = torch.ones_like(visible)
        x, encoder = through(model.encoder_blocks, embedded(label), old and old[0], visible, fresh)
        x = model.decoder_embed(model.encoder_norm(x))
        x = torch.where(visible[:, None], x, model.mask_token[0])
        x = x + model.decoder_pos_embed_learned[0]
        x, decoder = through(model.decoder_blocks, x, old and old[1], everything, fresh)
        c = model.decoder_norm(x)[buffer:] + model.diffusion_pos_embed_learned[0]
        return c, (encoder, decoder)

    def context(label):
        fresh = torch.cat([torch.zeros(buffer).bool(), computed])
        _, old = whole(label, before, None, None)
        return whole(label, after, fresh, old)[0]

    return context


@torch.no_grad()
def test_a_computed_token_attends_to_the_others_as_they_were():
    model = generator_of("student")
    tokens, before, after, following = ragged_masks()
    computed = (before & ~after) | following
    cache = Cache()
    model.context(tokens, before, LABELS, cache)
    c = model.context(tokens, after, LABELS, cache, computed)
    for i, label in enumerate(LABELS):
        by_hand = frozen(model, tokens[i], before[i], after[i], computed[i])(label)
        close(c[i][computed[i]], by_hand[computed[i]])
    exact = model.context(tokens, after, LABELS)
    assert not torch.allclose(c[computed], exact[computed], atol=1e-3)  # it is not the whole truth


@torch.no_grad()
def test_a_token_that_is_not_computed_keeps_its_context():
    model = generator_of("student")
    tokens, before, after, following = ragged_masks()
    cache, computed = Cache(), (before & ~after) | following
    c = model.context(tokens, before, LABELS, cache)
    again = model.context(tokens, after, LABELS, cache, computed)
    close(c, model.context(tokens, before, LABELS))  # a first pass computes everything
    assert torch.equal(again[~computed], c[~computed])


@torch.no_grad()
def test_images_of_a_batch_come_out_of_a_cache_as_if_alone():
    """Though one of them may have more tokens to compute, or none."""
    model = generator_of("student")
    tokens, before, after, following = ragged_masks()
    computed = (before & ~after) | following
    computed[3] = False

    def both_passes(rows):
        cache = Cache()
        model.context(tokens[rows], before[rows], LABELS[rows], cache)
        return model.context(tokens[rows], after[rows], LABELS[rows], cache, computed[rows])[:3]

    alone = torch.cat([both_passes([i]) for i in range(3)])
    close(both_passes([0, 1, 2, 3]), alone)


@pytest.mark.parametrize("kind, sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_cache_that_is_refreshed_in_every_iteration_changes_nothing(kind, sampling, monkeypatch):
    model = generator_of(kind)
    exact, trace = maskrl.generate(model, LABELS, sampling, trace=True)
    assert sampling.refresh == 1
    monkeypatch.setattr(maskrl, "WARM_UP", 16)
    sampling = maskrl.replace(sampling, refresh=99)
    cached, other = maskrl.generate(model, LABELS, sampling, trace=True)
    assert torch.equal(other.counts, trace.counts)
    close(cached, exact)


@torch.no_grad()
def test_generate_computes_what_was_just_revealed_and_what_is_next_and_all_at_a_refresh():
    model, hidden, revealed = generator_of("student"), 16, None
    noise = maskrl.draw_noise(model, 4, maskrl.rng("test"))
    rank, tokens = noise.order.argsort(1), torch.zeros(4, 16, 12)
    for k, count in enumerate(maskrl.reveal_counts(16, 12)):
        mask = rank < hidden
        hidden = hidden - count
        following = mask & (rank >= hidden)
        if k in (0, 1, 2, 4, 8):
            cache = Cache()
            c = model.context(tokens, mask, LABELS, cache)
        else:
            c = model.context(tokens, mask, LABELS, cache, revealed | following)
        drawn = maskrl.one_step(
            model.head, noise.z[following], c[following], model.settings.noise_ratio
        )
        tokens[following], revealed = drawn, following
    sampling = Sampling(steps=12, refresh=4)
    close(maskrl.generate(model, LABELS, sampling, noise), tokens)
    exact = maskrl.generate(model, LABELS, Sampling(steps=12), noise)
    assert not torch.allclose(exact, tokens, atol=1e-3)


@torch.no_grad()
def test_class_and_null_class_share_a_cache_as_if_each_had_its_own():
    model = generator_of("teacher")
    tokens, before, after, following = ragged_masks()
    computed = (before & ~after) | following

    def both_passes(context):
        cache = Cache()
        context(model, tokens, before, LABELS, cache)
        return context(model, tokens, after, LABELS, cache, computed)

    def of_null(model, tokens, mask, labels, *cached):
        return model.context(tokens, mask, model.null(labels), *cached)

    c, c_null = both_passes(maskrl.class_and_null_context)
    close(c, both_passes(maskrl.MAR.context))
    close(c_null, both_passes(of_null))


def test_a_policy_with_a_cache_looks_at_the_contexts_of_the_iteration_before(policy):
    """Its choice decides what is computed next."""
    _, trace = maskrl.generate(policy, LABELS, Sampling(refresh=99), trace=True)
    long = trace.steps.argmax()
    assert trace.steps[long] > 4
    share = trace.states[long, 3:5, -1]
    assert share[0] > share[1]  # a state knows how many tokens are hidden, whatever is cached
    chosen = policy.schedule.count(trace.actions[long], trace.hidden()[long])
    assert torch.equal(chosen, trace.counts[long])


def test_finished_images_are_left_out_from_the_next_refresh_on(policy, monkeypatch):
    sizes, context = [], maskrl.MAR.context

    def watched(model, tokens, *inputs):
        sizes.append(len(tokens))
        return context(model, tokens, *inputs)

    monkeypatch.setattr(maskrl.MAR, "context", watched)
    sampling = Sampling(refresh=2, greedy=False)
    _, trace = maskrl.generate(policy, LABELS.repeat(8), sampling, trace=True)
    unfinished = (trace.counts > 0).sum(0).tolist()
    assert unfinished[-1] < 32
    at_refresh = [unfinished[k if k < 3 else k - k % 2] for k in range(len(unfinished))]
    assert sizes == at_refresh


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_only_visible_tokens_are_encoded_and_only_revealed_ones_denoised(kind):
    """Class and null class in one batch; the chain calls the head in every step of its own."""
    model, encoded, denoised = generator_of(kind), [], []
    model.encoder_blocks[0].register_forward_pre_hook(lambda _, x: encoded.append(x[0].shape[:2]))
    model.head.input_proj.register_forward_pre_hook(lambda _, x: denoised.append(len(x[0])))
    chain = 1 if kind == "student" else 3
    sampling = Sampling(8, denoise_steps=chain)
    _, trace = maskrl.generate(model, LABELS, sampling, trace=True)
    passes = 1 if kind == "student" else 2
    visible = 16 - trace.hidden()[0]
    buffer = model.settings.buffer
    assert encoded == [(passes * 4, buffer + n) for n in visible.tolist()]
    assert denoised == (passes * trace.counts.sum(0)).repeat_interleave(chain).tolist()


class Reads(TorchDispatchMode):
    """Counts what makes a GPU's host wait for the size of a result: places of true values."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else ()
        masks = [i for i in indices if i is not None and i.dtype == torch.bool]
        self.count += len(masks) + (name == "nonzero")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind, most", [("student", 1), ("teacher", 1), ("policy", 2)])
def test_an_iteration_looks_for_places_once_and_a_policy_also_for_unfinished_images(kind, most):
    model = generator_of(kind)
    with Reads() as reads:
        _, trace = maskrl.generate(model, LABELS, trace=True)
    assert 0 < reads.count <= most * int(trace.steps.max())


@pytest.mark.parametrize("refresh", [0, -1])
def test_a_refresh_below_one_is_refused(student, refresh):
    with pytest.raises(InputError, match=f"--refresh {refresh} must be at least 1"):
        maskrl.generate(student, [0], Sampling(refresh=refresh))


def test_sample_py_hands_its_refresh_on(tmp_path, capsys):
    maskrl.save_checkpoint(tmp_path / "student.pt", random_model("student"))
    argv = [tmp_path / "student.pt", "--refresh", "0", "--device", "cpu", "--threads", "1"]
    assert "--refresh 0 must be at least 1" in error_of(sample.main, argv, capsys)
