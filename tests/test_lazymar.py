"""Attention caching: which tokens are computed, and what they attend to."""

import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import error_of, random_model, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import maskrl
import sample
from maskrl import MAR, Head, Noise, Sampling, generate
from workbench import lazymar
from workbench.distributed import divided
from workbench.errors import InputError
from workbench.files import write_checkpoint
from workbench.lazymar import LazyContexts, RowCache, lazy_context
from workbench.precision import set_precision
from workbench.studies.schedule import GivenCounts

LABELS = torch.tensor([0, 1, 2, 3])
SAMPLINGS = {
    "a student": ("student", {"steps": 8}),
    "a guided chain": ("teacher", {"steps": 8, "denoise_steps": 4, "guidance": 2.0}),
    "a learned schedule": ("policy", {}),
}


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def lazy(every, **options):
    return Sampling(contexts=partial(LazyContexts, every=every), **options)


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


def empty_cache(model):
    return RowCache(model.settings.buffer + model.length)


def context(model, tokens, mask, labels, cache, wanted=None):
    """`lazy_context` where tokens are wanted [B, L] (None: all of them, and the class)."""
    rows = torch.ones_like(model.visible(mask))
    if wanted is not None:
        rows = torch.cat([torch.zeros(len(mask), model.settings.buffer).bool(), wanted], 1)
    return lazy_context(model, tokens, mask, labels, rows, cache)


# Equal to what was measured -----------------------------------------------------------------------


def normal(name, shape):
    """Numbers that are the same with every version of torch."""
    draws = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(draws).float()


@torch.no_grad()
def model_of_the_record(kind):
    model = MAR(tiny(depth=2), ["a", "b", "c"], kind)
    for name, p in model.named_parameters():
        std = 0.25 if name.startswith("head.") else 0.3
        p.copy_(std * normal(name, p.shape))
    return model.eval()


RECORDED = {
    "student": {"steps": 12},
    "teacher": {"steps": 8, "denoise_steps": 4, "guidance": 2.0, "temperature": 0.0},
    "policy": {},
}


@pytest.mark.parametrize("kind", RECORDED)
def test_images_are_those_of_the_cache_that_was_inside_of_the_model(kind):
    """Whose code was part of Attention, Block and MAR; all figures in assets were made with it."""
    record = np.load(Path(__file__).parent / "data" / "lazymar.npz")
    model = model_of_the_record(kind)
    noise = Noise(normal("order", (4, 16)).argsort(1), normal("z", (4, 16, 12)))
    counts = torch.from_numpy(record[f"{kind}_counts"]).long()
    model.schedule = GivenCounts(counts) if kind == "policy" else None
    tokens, trace = generate(model, LABELS, lazy(4, **RECORDED[kind]), noise, trace=True)
    assert torch.equal(trace.counts, counts)
    close(tokens, torch.from_numpy(record[kind]), atol=1e-4)
    model.schedule = GivenCounts(counts) if kind == "policy" else None
    exact = generate(model, LABELS, Sampling(**RECORDED[kind]), noise)
    assert (exact - tokens).abs().max() > 0.01


# One context --------------------------------------------------------------------------------------


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

    def frozen_context(label):
        fresh = torch.cat([torch.zeros(buffer).bool(), computed])
        _, old = whole(label, before, None, None)
        return whole(label, after, fresh, old)[0]

    return frozen_context


@torch.no_grad()
def test_a_computed_token_attends_to_the_others_as_they_were():
    model = generator_of("student")
    tokens, before, after, following = ragged_masks()
    computed = (before & ~after) | following
    cache = empty_cache(model)
    context(model, tokens, before, LABELS, cache)
    c = context(model, tokens, after, LABELS, cache, computed)
    for i, label in enumerate(LABELS):
        by_hand = frozen(model, tokens[i], before[i], after[i], computed[i])(label)
        close(c[i][computed[i]], by_hand[computed[i]])
    exact = model.context(tokens, after, LABELS)
    assert not torch.allclose(c[computed], exact[computed], atol=1e-3)  # it is not the whole truth


@torch.no_grad()
def test_a_token_that_is_not_computed_keeps_its_context():
    model = generator_of("student")
    tokens, before, after, following = ragged_masks()
    cache, computed = empty_cache(model), (before & ~after) | following
    c = context(model, tokens, before, LABELS, cache)
    again = context(model, tokens, after, LABELS, cache, computed)
    close(c, model.context(tokens, before, LABELS))  # a first pass computes everything
    assert torch.equal(again[~computed], c[~computed])


@torch.no_grad()
def test_images_of_a_batch_have_the_same_contexts_as_alone():
    """Though one of them may have more tokens to compute, or none."""
    model = generator_of("student")
    tokens, before, after, following = ragged_masks()
    computed = (before & ~after) | following
    computed[3] = False

    def both_passes(rows):
        cache = empty_cache(model)
        context(model, tokens[rows], before[rows], LABELS[rows], cache)
        c = context(model, tokens[rows], after[rows], LABELS[rows], cache, computed[rows])
        return c[:3]

    alone = torch.cat([both_passes([i]) for i in range(3)])
    close(both_passes([0, 1, 2, 3]), alone)


@torch.no_grad()
def test_class_and_null_class_share_a_cache_as_if_each_had_its_own():
    model = generator_of("teacher")
    tokens, before, after, following = ragged_masks()

    def both_passes(labels, guided):
        contexts = LazyContexts(model, labels, guided, every=99)
        contexts.before(0, tokens, before, before.sum(1).tolist())
        contexts.after(before & ~after)
        contexts.before(5, tokens, after, after.sum(1).tolist())
        return contexts.after(following)

    c, c_null = both_passes(LABELS, True)
    close(c, both_passes(LABELS, False)[0])
    close(c_null, both_passes(model.null(LABELS), False)[0])
    assert both_passes(LABELS, False)[1] is None


# A generation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("every, warm_up", [(1, 3), (99, 16)])
@pytest.mark.parametrize("kind, options", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_refresh_in_every_iteration_is_exact(kind, options, every, warm_up, monkeypatch):
    model = generator_of(kind)
    exact, trace = generate(model, LABELS, Sampling(**options), trace=True)
    monkeypatch.setattr(lazymar, "WARM_UP", warm_up)
    cached, other = generate(model, LABELS, lazy(every, **options), trace=True)
    assert torch.equal(other.counts, trace.counts)
    close(cached, exact)


@torch.no_grad()
def test_generate_computes_what_was_just_revealed_and_what_is_next_and_all_at_a_refresh():
    model, hidden, revealed = generator_of("student"), 16, None
    noise = maskrl.draw_noise(model, 4, maskrl.rng("test"), "random")
    rank, tokens = noise.order.argsort(1), torch.zeros(4, 16, 12)
    for k, count in enumerate(maskrl.reveal_counts(16, 12)):
        mask = rank < hidden
        hidden = hidden - count
        following = mask & (rank >= hidden)
        if k in (0, 1, 2, 4, 8):
            cache = empty_cache(model)
            c = context(model, tokens, mask, LABELS, cache)
        else:
            c = context(model, tokens, mask, LABELS, cache, revealed | following)
        drawn = maskrl.one_step(
            model.head, noise.z[following], c[following], model.settings.noise_ratio
        )
        tokens[following], revealed = drawn, following
    close(generate(model, LABELS, lazy(4, steps=12), noise), tokens)
    exact = generate(model, LABELS, Sampling(steps=12), noise)
    assert not torch.allclose(exact, tokens, atol=1e-3)


def test_a_policy_with_a_cache_looks_at_the_contexts_of_the_iteration_before(policy):
    """Its choice decides what is computed next."""
    _, trace = generate(policy, LABELS, lazy(99), trace=True)
    long = trace.steps.argmax()
    assert trace.steps[long] > 4
    share = trace.states[long, 3:5, -2]
    assert share[0] > share[1]  # a state knows how many tokens are hidden, whatever is cached
    taken = trace.counts[long] > 0
    chosen = policy.schedule.select(trace.states[long][taken])
    assert torch.equal(chosen, trace.counts[long][taken])


def test_finished_images_are_left_out_from_the_next_refresh_on(policy):
    sizes = []

    def watch(module, inputs):
        sizes.append(len(inputs[0]))

    policy.z_proj.register_forward_pre_hook(watch)
    _, trace = generate(policy, LABELS.repeat(8), lazy(2, greedy=False), trace=True)
    unfinished = (trace.counts > 0).sum(0).tolist()
    assert unfinished[-1] < 32
    at_refresh = [unfinished[k if k < 3 else k - k % 2] for k in range(len(unfinished))]
    assert sizes == at_refresh


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_only_visible_tokens_are_encoded_and_only_revealed_ones_denoised(kind):
    """Class and null class in one batch; the chain calls the head in every step of its own."""
    model, encoded, denoised = generator_of(kind), [], []

    def watch_encoder(module, inputs):
        encoded.append(inputs[0].shape[:2])

    def watch_head(module, inputs):
        denoised.append(len(inputs[0]))

    model.encoder_blocks[0].register_forward_pre_hook(watch_encoder)
    model.head.input_proj.register_forward_pre_hook(watch_head)
    chain = 1 if kind == "student" else 3
    sampling = Sampling(8, denoise_steps=chain)
    _, trace = generate(model, LABELS, sampling, trace=True)
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


def test_a_search_for_true_values_is_noticed():
    with Reads() as reads:
        mask = torch.eye(3) > 0
        assert mask.nonzero().shape == (3, 2) and torch.zeros(3, 3)[mask].shape == (3,)
    assert reads.count == 2


@pytest.mark.parametrize("kind", ["student", "teacher", "policy"])
def test_a_generation_searches_for_no_true_values(kind):
    model = generator_of(kind)
    with Reads() as reads:
        generate(model, LABELS)
    assert reads.count == 0


# In a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, options", SAMPLINGS.values(), ids=SAMPLINGS)
def test_several_processes_generate_with_a_cache_as_one_does(kind, options, tmp_path, monkeypatch):
    """The cache was once an argument of `MAR.context`, which ended in an AttributeError there."""
    model = generator_of(kind)
    expected = generate(model, LABELS, lazy(4, **options))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(MAR, "context", divided(MAR.context))
        monkeypatch.setattr(Head, "network", divided(Head.network))
        close(generate(model, LABELS, lazy(4, **options)), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("kind", ["student", "teacher"])
@torch.no_grad()
def test_a_cache_computes_in_the_precision_of_the_model(kind, precision, dtype):
    model, dtypes = generator_of(kind), set()
    set_precision(model, precision)

    def watch(module, inputs, out):
        dtypes.add(out.dtype)

    handle = model.decoder_blocks[-1].attn.qkv.register_forward_hook(watch)
    _, trace = generate(model, LABELS, lazy(4, steps=8, denoise_steps=1), trace=True)
    assert dtypes == {dtype}
    assert trace.contexts.dtype == torch.float32
    handle.remove()
    tokens, before, _, _ = ragged_masks()
    c = context(model, tokens, before, LABELS, empty_cache(model))
    close(c, model.context(tokens, before, LABELS), atol=0.05 if precision == "bf16" else 1e-5)


@pytest.mark.parametrize("refresh", [0, -1])
def test_a_refresh_below_one_is_refused(student, refresh):
    with pytest.raises(InputError, match=f"--refresh {refresh} must be at least 1"):
        generate(student, [0], lazy(refresh))


def test_sample_py_hands_its_refresh_on(tmp_path, capsys):
    write_checkpoint(tmp_path / "student.pt", random_model("student"))
    argv = [tmp_path / "student.pt", "--refresh", "0", "--device", "cpu", "--threads", "1"]
    assert "--refresh 0 must be at least 1" in error_of(sample.main, argv, capsys)


def test_sample_py_draws_with_its_refresh(tmp_path, monkeypatch):
    """1, the default, is exact: without a cache."""
    write_checkpoint(tmp_path / "student.pt", random_model("student"))
    seen = []

    class Watched(LazyContexts):
        def __init__(self, *args, every):
            seen.append(every)
            super().__init__(*args, every=every)

    monkeypatch.setattr("workbench.sampling.LazyContexts", Watched)
    argv = [tmp_path / "student.pt", "--out", tmp_path / "a.png", "--device", "cpu", "--n", 2]
    sample.main([str(a) for a in (*argv, "--threads", 1)])
    assert seen == []
    sample.main([str(a) for a in (*argv, "--threads", 1, "--refresh", 4)])
    assert seen == [4]
