"""--reward: what it may be, that it gives what it says, and that a broken one is reported and never trained on."""

import os
import sys

import open_clip
import pytest
import torch
from conftest import tiny
from test_scripts import SHORT, error_of
from torchvision.transforms import functional as TF

import maskrl
import train_distill
import train_rl

SMALL = "ViT-S-32-alt"  # for what does not depend on the model; a random ViT-B-32 takes longer to build and to run

MODULE = """
import torch
weight = torch.nn.Parameter(torch.tensor(0.1))  # not frozen, as in a network that somebody forgot to freeze
calls = []
def bright(images, labels):
    calls.append(images.detach())
    return 0.5 + weight * images.mean((1, 2, 3))
def dark(images, labels):
    return 0.5 - weight * images.mean((1, 2, 3))
def nan(images, labels):
    return bright(images, labels) * float("nan")
def nan_later(images, labels):
    return nan(images, labels) if len(calls) >= 5 else bright(images, labels)
def matrix(images, labels):
    return bright(images, labels)[:, None]
def number(images, labels):
    return 0.5
def negative(images, labels):
    return -bright(images, labels)
def constant(images, labels):
    return 0.3 + 0 * bright(images, labels)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of rewards in the folder that we are in; its name is new in every test."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
    monkeypatch.chdir(tmp_path)
    name = f"mine_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    yield name
    sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data():
    return train_distill.load_data(tiny())


@pytest.fixture(scope="module")
def critic(data):
    return train_distill.train_critic("reward", data.train, tiny(), "cpu")


@pytest.fixture
def make(data, critic):
    """make(spec, **settings) -> quality."""
    return lambda spec, **settings: train_rl.make_reward(tiny(reward=spec, **settings), data, torch.device("cpu"), critic)[0]


def random_clip(name, path, **keys):
    """A CLIP with random weights, and the same weights in a file, in half precision, as it loads faster."""
    clip = open_clip.create_model(name).eval().half()
    torch.save({**keys, "state_dict": clip.state_dict()} if keys else clip.state_dict(), path)
    return clip.float()


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "small.pt"
    torch.manual_seed(0)
    yield random_clip(SMALL, path, epoch=1), path
    path.unlink()


def pictures(n, size=16):
    """uint8 [n, 3, size, size]: blocks of colour, so that resizing has edges and flat places to get right."""
    coarse = torch.randint(256, (n, 3, 4, 4), generator=maskrl.rng("pictures")).to(torch.uint8)
    return coarse.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3)


# The grammar --------------------------------------------------------------------------------------------


def test_the_grammar_of_reward():
    assert train_rl.parse_reward("embedded") == [("embedded", 1.0)]
    assert train_rl.parse_reward("clip:1, embedded:.5") == [("clip", 1.0), ("embedded", 0.5)]
    assert train_rl.parse_reward("mymodule:function") == [("mymodule:function", 1.0)]
    assert train_rl.parse_reward("my.module:function:0.5,clip:2") == [("my.module:function", 0.5), ("clip", 2.0)]
    assert train_rl.parse_reward("a/b c.csv,d.csv:3,C:\\pairs.csv") == [("a/b c.csv", 1.0), ("d.csv", 3.0), ("C:\\pairs.csv", 1.0)]
    for wrong in ("", "clp", "clip,", "clip:0", "clip:-1", "clip:1:2", "pairs.txt", "module:", ":function", "embedded:0.0"):
        with pytest.raises(maskrl.InputError, match="--reward"):
            train_rl.parse_reward(wrong)


def test_embedded_is_the_critic_and_a_sum_is_the_weighted_mean(make, critic, data, module):
    x, y = data.test.images[::9].float() / 127.5 - 1, data.test.labels[::9]
    assert torch.equal(make("embedded")(x, y), critic.quality(x, y))
    light = x.mean((1, 2, 3))
    mean = (2 * critic.quality(x, y) + 0.5 * (0.5 + 0.1 * light) + 1.5 * (0.5 - 0.1 * light)) / 4
    torch.testing.assert_close(make(f"embedded:2,{module}:bright:0.5,{module}:dark:1.5")(x, y), mean)


# CLIP ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, size", [("noise", 16), ("noise", 224), ("noise", 300), ("blocks", 16), ("blocks", 64), ("blocks", 448)])
def test_clip_pixels_equal_open_clips_transform(kind, size):
    """In levels of 255, up to the bytes that PIL rounds to after each of its two passes: at most 0.5 after the first, which
    bicubic weights, up to 1.3 in absolute sum, may amplify, and 0.5 after the second. On average it is less than 0.5.
    Another filter, no antialiasing, no clipping or a shift by half a pixel is off by ten levels and more."""
    images = torch.randint(256, (2, 3, size, size)).to(torch.uint8) if kind == "noise" else pictures(2, size)
    cfg = open_clip.transform.PreprocessCfg(size=(224, 224))
    transform = open_clip.transform.image_transform_v2(cfg, is_train=False)
    theirs = torch.stack([transform(TF.to_pil_image(x)) for x in images])
    ours = train_rl.clip_pixels(images.float() / 127.5 - 1, **vars(cfg))
    levels = 255 * (ours - theirs).abs() * torch.tensor(cfg.std)[:, None, None]
    assert ours.shape == (2, 3, 224, 224) and levels.max() < 1.3 and levels.mean() < 0.5


def test_clip_reward_on_a_random_vit_b_32_from_a_file(tmp_path):
    """Through the file, the prompts, the batches and the pixels: what encode_image and encode_text give by hand."""
    path = tmp_path / "vit_b_32.pt"
    clip = random_clip("ViT-B-32", path)
    quality = train_rl.clip_reward("clip", tiny(clip_weights=str(path)), ["red circle", "green_square"], torch.device("cpu"))
    path.unlink()  # 300 MB
    images, labels = pictures(3), torch.tensor([1, 0, 0])
    x = (images.float() / 127.5 - 1).requires_grad_()
    q = quality(x, labels)

    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(size=224), is_train=False)
    prompts = [f"a high-quality and harmonious picture of {c}" for c in ("red circle", "green square")]
    with torch.no_grad():
        image = clip.encode_image(torch.stack([transform(TF.to_pil_image(i)) for i in images]))
        text = clip.encode_text(open_clip.get_tokenizer("ViT-B-32")(prompts))
        by_hand = (1 + torch.cosine_similarity(image, text[labels])) / 2
        torch.testing.assert_close(q, by_hand, atol=2e-4, rtol=0)  # bytes again, see above
        assert by_hand.std() > 2e-3, "too alike for the line above to mean anything"
    assert q.shape == (3,) and (q > 0).all() and (q <= 1).all()

    gradient, = torch.autograd.grad(q.sum(), x)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    with torch.no_grad():
        step = 1e-2 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
        assert (quality(x + step, labels) > q).all()


def test_clip_takes_many_images_in_parts_each_alone(make, small_clip):
    small = dict(clip_model=SMALL, clip_weights=str(small_clip[1]))
    quality = make("clip", **small)
    x, labels = pictures(66).float() / 127.5 - 1, torch.arange(66) % 9
    with torch.no_grad():
        q = quality(x, labels)
        ends = torch.tensor([0, 63, 64, 65])
        torch.testing.assert_close(q[ends], torch.cat([quality(x[i:i + 1], labels[i:i + 1]) for i in ends]))
        other = train_rl.clip_reward("clip", tiny(clip_prompt="no {class}", **small), ["red circle"], "cpu")
        assert abs(other(x[:1], labels[:1]) - q[0]) > 1e-4


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_wrong_clip_weights_end_in_one_line(make, small_clip, tmp_path, monkeypatch, capsys, caplog):
    junk, attack, hacked = tmp_path / "junk.pt", tmp_path / "attack.pt", tmp_path / "hacked"
    junk.write_bytes(b"junk")
    torch.save({"state_dict": Attack(hacked)}, attack)
    new = [*SHORT, "--reward", "clip", "--out", tmp_path / "new"]
    small = ["--clip-model", SMALL, "--clip-weights"]
    cases = [
        (["--clip-weights", tmp_path / "none.pt"], "none.pt: neither a file nor weights that open_clip has for ViT-B-32: openai"),
        (["--clip-weights", ""], "--clip-weights : neither"),
        ([*small, "laion2b_s34b_b79k"], f"{SMALL}: none"),
        ([*small, junk], f"junk.pt could not be loaded safely as weights of --clip-model {SMALL}"),
        ([*small, attack], "attack.pt could not be loaded safely"),
        (["--clip-model", "ViT-S-32", "--clip-weights", small_clip[1]], "small.pt could not be loaded safely as weights of --clip-model ViT-S-32"),
        (["--clip-model", "ViT-Z"], "--clip-model ViT-Z"),
    ]
    for argv, expected in cases:
        assert expected in error_of(train_rl.main, new + argv, capsys), argv
    assert not hacked.exists()

    def offline(*args, **kwargs):
        raise OSError("no network\nin two lines")

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", offline)
    monkeypatch.setattr(open_clip.pretrained.urllib.request, "urlopen", offline)
    with pytest.raises(SystemExit):
        maskrl.run(lambda: train_rl.main([str(a) for a in new]))
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and not caplog.records and "laion2b_s34b_b79k could not be downloaded; without a network, give a file of weights" in errors[0]

    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "pip install open_clip_torch" in error_of(train_rl.main, new, capsys)


# Functions of one's own ---------------------------------------------------------------------------------


def test_a_function_gets_clamped_images_and_a_missing_one_is_named(make, module, data):
    quality = make(f"{module}:bright")
    q = quality(3 * torch.ones(2, 3, 8, 8), torch.tensor([0, 1]))
    torch.testing.assert_close(q, torch.tensor([0.6, 0.6]))
    x = torch.zeros(2, 3, 8, 8, requires_grad=True)
    assert torch.autograd.grad(quality(x, torch.tensor([0, 1])).sum(), x)[0].min() > 0
    for wrong in (f"{module}:none", f"{module}:calls", "no_such_module:f"):
        with pytest.raises(maskrl.InputError, match=wrong):
            make(wrong)


@pytest.mark.parametrize("name, said", [("nan", "values from nan"), ("matrix", r"\[32, 1\], not a tensor \[32\]"), ("number", "float, not a tensor"),
                                        ("negative", "values from -0"), ("constant", "gave 0.3 for all")])
def test_a_broken_reward_is_reported_before_training(make, module, name, said):
    with pytest.raises(maskrl.InputError, match=f"{module}:{name} gave .*{said}|{module}:{name} {said}"):
        make(f"embedded,{module}:{name}")


def test_rl_climbs_a_function_and_trains_the_critic_once(module, tmp_path, monkeypatch):
    real, trained = train_distill.train_critic, []
    monkeypatch.setattr(train_distill, "train_critic", lambda name, *rest: trained.append(name) or real(name, *rest))
    metrics = train_rl.main([*SHORT, "--reward", f"{module}:bright", "--out", str(tmp_path / "run")])
    assert trained == ["reward", "judge"]
    assert metrics["settings"]["reward"] == f"{module}:bright" and {"reward", "teacher", "student", "policy"} <= set(metrics["minutes"])
    seen = sys.modules[module].calls
    assert len(seen) > 3 and min(x.min() for x in seen) >= -1 and max(x.max() for x in seen) <= 1
    judged = [float(0.5 + 0.1 * x.mean()) for x in seen if len(x) == metrics["n"]]  # by watch, then by compare_schedules
    assert any(metrics["rl"]["before"]["quality"] == pytest.approx(q, abs=1e-5) for q in judged)


def test_a_reward_that_breaks_later_stops_the_training(module, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        maskrl.run(lambda: train_rl.main([*SHORT, "--rl-iters", "4", "--reward", f"{module}:nan_later", "--out", str(tmp_path / "run")]))
    assert stop.value.code == 1
    assert f"policy, step 2: --reward {module}:nan_later gave values from nan" in capsys.readouterr().err
    assert maskrl.read_checkpoint(tmp_path / "run" / "policy.pt")["step"] == 2


# Preferences --------------------------------------------------------------------------------------------


def write_pairs(folder, better, worse, classes=None, size=12):
    """A CSV and PNGs of random colours, brightness better [N] and worse [N] of 255."""
    (folder / "images").mkdir(parents=True)
    lines = ["better,worse" + (",class" if classes else "")]
    for i, pair in enumerate(zip(better, worse)):
        names = [f"images/{i}_{kind}.png" for kind in ("a", "b")]
        for name, light in zip(names, pair):
            x = (light + 60 * torch.rand(3, size, size + 2, generator=maskrl.rng(i, name)) - 30).clamp(0, 255).to(torch.uint8)
            TF.to_pil_image(x).save(folder / name)
        lines.append(",".join(names + ([classes[i]] if classes else [])))
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "pairs.csv")


def lights(n, gap=20):
    """Brightness of n better and n worse images, at least `gap` apart."""
    low = 30 + 120 * torch.rand(n, generator=maskrl.rng("low"))
    return (low + gap + 60 * torch.rand(n, generator=maskrl.rng("gap"))).clamp(max=225).tolist(), low.tolist()


def test_brighter_is_better_is_learned_from_pairs(make, tmp_path, capsys):
    """Rather than the 48 training pairs by heart: of 200 new pairs 95 % are ordered (without the noise in training, 88 %)."""
    quality = make(write_pairs(tmp_path / "p", *lights(60)), judge_iters=100)
    assert "pairs.csv: 60 pairs; about" in capsys.readouterr().out
    light = torch.tensor([-0.6, -0.3]).repeat(200) + torch.linspace(0, 0.6, 200).repeat_interleave(2)  # worse, better, worse, ...
    x = (light[:, None, None, None] + 60 / 127.5 * (torch.rand(400, 3, 8, 8) - 0.5)).requires_grad_()
    q = quality(x, torch.zeros(400, dtype=torch.long))
    assert (q[1::2] > q[::2]).float().mean() > 0.91
    assert 0 < q.min() and q.max() < 0.999 and q.max() - q.min() > 0.5
    assert (torch.autograd.grad(q.sum(), x)[0].mean((1, 2, 3)) > 0).float().mean() > 0.8


def test_pairs_with_classes_may_prefer_differently(tmp_path):
    """Five classes in turn: holding out every fifth line would leave one of them, here the last, without a pair to learn from."""
    better, worse = lights(90, gap=40)
    swapped = [(w, b) if i % 5 == 4 else (b, w) for i, (b, w) in enumerate(zip(better, worse))]  # of class e the dark is better
    path = write_pairs(tmp_path / "p", *zip(*swapped), ["abcde"[i % 5] for i in range(90)])
    quality = train_rl.pairs_reward(path, tiny(judge_iters=100), list("abcde"), torch.device("cpu"))
    x = torch.tensor([-0.5, 0.5])[:, None, None, None].expand(2, 3, 8, 8)
    for y in range(5):
        dark, light = quality(x, torch.tensor([y, y]))
        assert (light < dark) if y == 4 else (light > dark), y


def test_wrong_pairs_are_named(make, tmp_path):
    good = write_pairs(tmp_path / "p", [200, 200], [50, 50])
    (tmp_path / "p" / "images" / "junk.png").write_bytes(b"junk")

    def wrong(text, said, encoding="utf-8"):
        (tmp_path / "p" / "wrong.csv").write_text(text, encoding=encoding)
        with pytest.raises(maskrl.InputError, match=said) as error:
            make(str(tmp_path / "p" / "wrong.csv"))
        assert "wrong.csv" in str(error.value)

    image = "images/0_a.png"
    wrong("", "expected a header")
    wrong("better,worse\n", "a line for every pair")
    wrong(f"left,right\n{image},{image}\n", "expected a header `better,worse`")
    wrong(f"better,worse,label\n{image},{image},0\n", "`better,worse,class`")
    wrong(f"better,worse\n{image},images/none.png\n", "images/none.png")
    wrong(f"better,worse\n{image},images/junk.png\n", "images/junk.png")
    wrong(f"better,worse\n{image}\n", "p'|directory")
    wrong(f"better,worse\n{image},{image},{image}\n", "expected a header")
    wrong(f"better,worse,class\n{image},{image},red circle\n{image},{image},cat\n", "see .*cat")
    wrong(f"better,worse\n{image},\xe9\n", "decode", "latin-1")
    with pytest.raises(maskrl.InputError, match="none.csv"):
        make(str(tmp_path / "none.csv"))
    make(good)
