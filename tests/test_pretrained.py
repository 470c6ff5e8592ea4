"""CLIP as a reward, and pretrained features of the judge."""

import re
import sys

import open_clip
import pytest
import torch
import torchvision
from helpers_rewards import (
    OUT_OF_MEMORY,
    SMALL_CLIP,
    Attack,
    Refused,
    blocks_of_colour,
    random_clip,
)
from torchvision.transforms import functional as TF

from maskrl import rng
from workbench import pretrained
from workbench.data import to_unit
from workbench.errors import InputError
from workbench.pretrained import (
    ClipOptions,
    ClipReward,
    clip_pixels,
    load_clip,
    pretrained_features,
)

CPU = torch.device("cpu")


# Features


@pytest.fixture(scope="module")
def torchvision_file(tmp_path_factory):
    """Random weights in the format and under the name that torchvision's come in."""
    path = tmp_path_factory.mktemp("weights") / "mobilenet_v3_small-047dcff4.pth"
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small()
    torch.save(model.state_dict(), path)
    return path, model.eval()


def features_of(name, clip=None):
    return pretrained_features(str(name), clip or ClipOptions(), CPU)


def test_own_features_are_none():
    assert features_of("own") is None


@torch.no_grad()
def test_features_of_a_torchvision_file_are_those_before_its_last_layer(torchvision_file):
    path, model = torchvision_file
    images = torch.rand(2, 3, 16, 16, generator=rng(0)) * 2 - 1
    features = features_of(path)(images)
    assert features.shape == (2, 1024)
    transform = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT.transforms()
    pixels = TF.resize((images + 1) / 2, [224, 224], antialias=True)
    expected = model(TF.normalize(pixels, transform.mean, transform.std))
    torch.testing.assert_close(model.classifier[-1](features), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name, said",
    [
        ("resnet18", "expected own, clip, module:function, or a file"),
        ("nowhere:embed", "--features nowhere:embed: ModuleNotFoundError"),
        ("math:sqrt", "--features math:sqrt"),
        ("weights.pth", "starts with that of no torchvision model"),
        ("retinanet_resnet50_fpn-1.pth", "starts with that of no torchvision model"),
        ("resnet18-1.pth", "not weights of resnet18"),
        ("squeezenet1_0-1.pth", "no last layer"),
    ],
)
def test_wrong_features_are_told(name, said, torchvision_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name.endswith(".pth"):
        (tmp_path / name).write_bytes(torchvision_file[0].read_bytes())
        if name.startswith("squeezenet"):
            torch.save(torchvision.models.squeezenet1_0().state_dict(), tmp_path / name)
    with pytest.raises(InputError, match=re.escape(said)):
        features_of(name)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_too_little_memory_for_features_stays_what_it_is(error, monkeypatch):
    monkeypatch.setattr(pretrained, "named_function", Refused(error))
    with pytest.raises(type(error)) as raised:
        features_of("my:embed")
    assert raised.value is error


def test_features_of_the_user_may_change_their_images(tmp_path, monkeypatch):
    """As those of many people do, when they normalise in place."""
    monkeypatch.chdir(tmp_path)
    text = "def embed(images):\n    return images.sub_(0.5).mean((2, 3))\n"
    (tmp_path / "my_features.py").write_text(text)
    images = torch.rand(2, 3, 8, 8)
    before = images.clone()
    torch.testing.assert_close(features_of("my_features:embed")(images), before.mean((2, 3)) - 0.5)
    assert torch.equal(images, before)
    sys.modules.pop("my_features", None)


@torch.no_grad()
def test_weights_of_torchvision_from_before_torch_1_6_are_read(torchvision_file, tmp_path):
    (path, model), images = torchvision_file, torch.rand(2, 3, 32, 32)
    old = tmp_path / path.name
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(weights, old, _use_new_zipfile_serialization=False)
    assert torch.equal(features_of(old)(images), features_of(path)(images))


# CLIP


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """The file of a random small CLIP."""
    path = tmp_path_factory.mktemp("clip") / "small.pt"
    torch.manual_seed(0)
    random_clip(SMALL_CLIP, path, epoch=1)
    yield path
    path.unlink()


def noise_of_colour(n, size):
    return torch.randint(256, (n, 3, size, size)).to(torch.uint8)


PICTURES = [(noise_of_colour, size) for size in (16, 224, 300)]
PICTURES += [(blocks_of_colour, size) for size in (16, 64, 448)]


@pytest.mark.parametrize("pictures, size", PICTURES)
def test_clip_pixels_equal_open_clips_transform(pictures, size):
    """In levels of 255, up to the bytes that PIL rounds to after each of its two passes: at most
    0.5 after the first, which bicubic weights, up to 1.3 in absolute sum, may amplify, and 0.5
    after the second. On average it is less than 0.5. Another filter, no antialiasing, no clipping
    or a shift by half a pixel is off by ten levels and more."""
    images = pictures(2, size)
    cfg = open_clip.transform.PreprocessCfg(size=(224, 224))
    transform = open_clip.transform.image_transform_v2(cfg, is_train=False)
    theirs = torch.stack([transform(TF.to_pil_image(x)) for x in images])
    ours = clip_pixels(to_unit(images), **vars(cfg))
    levels = 255 * (ours - theirs).abs() * torch.tensor(cfg.std)[:, None, None]
    assert ours.shape == (2, 3, 224, 224)
    assert levels.max() < 1.3
    assert levels.mean() < 0.5


def clip_by_hand(clip, images, prompts, labels):
    """(1 + cosine) / 2 by encode_image, encode_text and open_clip's own transform."""
    cfg = open_clip.transform.PreprocessCfg(size=224)
    transform = open_clip.transform.image_transform_v2(cfg, is_train=False)
    image = clip.encode_image(torch.stack([transform(TF.to_pil_image(i)) for i in images]))
    text = clip.encode_text(open_clip.get_tokenizer("ViT-B-32")(prompts))
    return (1 + torch.cosine_similarity(image, text[labels])) / 2


def test_clip_reward_on_a_random_vit_b_32_from_a_file(tmp_path):
    """Through the file, the prompts, the batches and the pixels; and up its gradient."""
    path = tmp_path / "vit_b_32.pt"
    clip = random_clip("ViT-B-32", path)
    quality = ClipReward(ClipOptions(weights=str(path)), ["red circle", "green_square"], CPU)
    path.unlink()  # 300 MB
    images, labels = blocks_of_colour(3), torch.tensor([1, 0, 0])
    x = to_unit(images).requires_grad_()
    q = quality(x, labels)
    assert q.shape == (3,)
    assert ((q > 0) & (q <= 1)).all()
    prompts = [
        f"a high-quality and harmonious picture of {name}"
        for name in ("red circle", "green square")
    ]
    with torch.no_grad():
        by_hand = clip_by_hand(clip, images, prompts, labels)
    torch.testing.assert_close(q, by_hand, atol=2e-4, rtol=0)  # bytes again, see above
    assert by_hand.std() > 2e-3, "too similar for the line above to mean anything"

    gradient = torch.autograd.grad(q.sum(), x)[0]
    norm = gradient.flatten(1).norm(dim=1)[:, None, None, None]
    assert (norm > 0).all()
    with torch.no_grad():
        assert (quality(x + 1e-2 * gradient / norm, labels) > q).all()


@torch.no_grad()
def test_clip_takes_many_images_in_parts_each_alone(small_clip):
    classes = [f"class {i}" for i in range(9)]
    quality = ClipReward(ClipOptions(SMALL_CLIP, str(small_clip)), classes, CPU)
    x, labels = to_unit(blocks_of_colour(66)), torch.arange(66) % 9
    ends = (0, 63, 64, 65)
    alone = torch.cat([quality(x[i : i + 1], labels[i : i + 1]) for i in ends])
    torch.testing.assert_close(quality(x, labels)[list(ends)], alone)


@torch.no_grad()
def test_clips_prompt_is_the_users(small_clip):
    x, label = to_unit(blocks_of_colour(1)), torch.tensor([0])
    prompts = "a {class}", "no {class}"
    options = [ClipOptions(SMALL_CLIP, str(small_clip), prompt) for prompt in prompts]
    a, b = (ClipReward(o, ["red circle"], CPU)(x, label) for o in options)
    assert abs(a - b) > 1e-4


@torch.no_grad()
def test_clips_features_are_its_embeddings(small_clip):
    options = ClipOptions(SMALL_CLIP, str(small_clip))
    x = to_unit(blocks_of_colour(3))
    clip, _ = load_clip(options, [], CPU)
    features = features_of("clip", options)(x)
    torch.testing.assert_close(features, pretrained.clip_embedding(clip, x))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def clip_error(model, weights):
    """The message, of one line, that ends a run on CLIP with these options."""
    with pytest.raises(InputError) as error:
        load_clip(ClipOptions(model, str(weights)), ["red circle"], CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_clip_weights_end_in_one_line(small_clip, tmp_path):
    junk, attack, hacked = tmp_path / "junk.pt", tmp_path / "attack.pt", tmp_path / "hacked"
    junk.write_bytes(b"junk")
    torch.save({"state_dict": Attack(hacked)}, attack)
    cases = {
        ("ViT-B-32", tmp_path / "none.pt"): "none.pt: neither a file nor weights that open_clip "
        "has for ViT-B-32: openai",
        ("ViT-B-32", ""): "--clip-weights : neither",
        (SMALL_CLIP, "laion2b_s34b_b79k"): f"{SMALL_CLIP}: none",
        (SMALL_CLIP, junk): "junk.pt is not a checkpoint: it is a text that begins with 'junk'",
        (SMALL_CLIP, attack): "attack.pt could not be loaded safely",
        ("ViT-S-32", small_clip): "small.pt could not be loaded safely as weights of --clip-model "
        "ViT-S-32",
        ("ViT-Z", ClipOptions.weights): "--clip-model ViT-Z",
    }
    for options, expected in cases.items():
        assert expected in clip_error(*options), options
    assert not hacked.exists()


def test_without_a_network_clip_ends_in_one_line(monkeypatch, capsys, caplog):
    offline = Refused(OSError("no network\nin two lines"))
    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", offline)
    monkeypatch.setattr(open_clip.pretrained.urllib.request, "urlopen", offline)
    error = clip_error("ViT-B-32", ClipOptions.weights)
    assert not caplog.records
    printed = capsys.readouterr()
    assert "no network" not in error + printed.out + printed.err
    assert "laion2b_s34b_b79k could not be downloaded; without a network, give a file" in error


def test_without_open_clip_its_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "pip install open_clip_torch" in clip_error("ViT-B-32", "none.pt")
