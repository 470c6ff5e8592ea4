"""Statements about Part II of maskrl.py, the workbench, in its order."""

import json
import math
import os
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import digits
import open_clip
import pytest
import torch
import torchvision
from conftest import SHORT, error_of, random_model, tiny
from PIL import Image, ImageFont
from torchvision.transforms import functional as TF

import maskrl
import train_rl
from maskrl import InputError, NonFinite


@pytest.fixture(scope="module")
def data():
    return maskrl.load_data(tiny())


@pytest.fixture(scope="module")
def critic(data):
    return maskrl.train_critic("reward", data.train, tiny(), "cpu")


def as_bytes(images):
    """Each image as something that a set can hold."""
    return [bytes(x.numpy().tobytes()) for x in images]


# 12 Data ------------------------------------------------------------------------------------------


def test_shapes_are_the_same_for_a_seed_and_differ_within_a_class(settings):
    a, b, c = (maskrl.load_data(settings(seed=seed)) for seed in (0, 0, 1))
    assert len(a.classes) == 9
    assert torch.equal(a.train.images, b.train.images)
    assert not torch.equal(a.train.images, c.train.images)
    first_class = as_bytes(a.train.images[a.train.labels == 0])
    assert len(set(first_class)) == len(first_class)


def test_shapes_have_their_colour_and_area():
    """Circle, square and triangle, by the mean of r^2."""
    labels = torch.arange(9).repeat_interleave(50)
    x = maskrl.draw_shapes(labels, 64, maskrl.rng(0)).float()
    bright = x.amax(1) > 100
    colour = torch.stack([x[i, :, bright[i]].mean(1).argmax() for i in range(len(x))])
    assert torch.equal(colour, labels // 3)
    share = bright.float().mean((1, 2)).view(9, 50).mean(1)
    r2 = 0.27**2 + 0.1**2 / 12
    expected = torch.tensor([math.pi, (2 * 0.88) ** 2, 3 * math.sqrt(3) * 0.6**2]) * r2
    torch.testing.assert_close(share.view(3, 3).mean(0), expected, rtol=0.08, atol=0)


def test_splits_are_disjoint_and_halves_balanced(settings):
    s = settings()
    data = maskrl.load_data(s)
    train, judge, test = (set(as_bytes(x.images)) for x in (data.train, data.judge, data.test))
    assert not (train & judge or train & test or judge & test)
    assert [len(x) for x in (data.train, data.judge, data.test)] == [9 * 18, 9 * 6, 9 * 6]
    a, b = data.test.balanced_halves(s.judge_n, maskrl.rng(1))
    assert torch.equal(a.labels.bincount(), b.labels.bincount())
    assert len(a.labels.bincount().unique()) == 1
    assert not set(as_bytes(a.images)) & set(as_bytes(b.images))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """200 real digits, and one file that is no image."""
    path = tmp_path_factory.mktemp("digits")
    digits.make(path, per_class=20)
    (path / "3" / "broken.png").write_bytes(b"not a picture")
    return path


def test_a_broken_image_is_named_skipped_and_counted(folder, capsys):
    data = maskrl.load_data(tiny(), str(folder))
    error = capsys.readouterr().err
    assert "broken.png" in error
    assert "skipped 1 of 201" in error
    assert len(data.train) + len(data.judge) + len(data.test) == 200
    assert data.classes == [str(i) for i in range(10)]


def test_the_parts_of_a_folder_do_not_move_with_the_seed(folder):
    """They once did: RL with another seed could have met what the judge of its student held out."""
    a, b = (maskrl.load_data(tiny(seed=seed), str(folder)) for seed in (0, 1))
    assert torch.equal(a.train.images, b.train.images)
    assert torch.equal(a.test.images, b.test.images)


def test_a_class_needs_twenty_images(folder, tmp_path):
    digits.make(tmp_path / "few", per_class=19)
    with pytest.raises(InputError, match="class '0' .* has 19 readable images; at least 20"):
        maskrl.load_data(tiny(), str(tmp_path / "few"))


def test_an_image_is_resized_and_its_middle_taken(tmp_path):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (8, 0, 24, 16))
    image.save(tmp_path / "image.png")
    image = maskrl.read_rgb(tmp_path / "image.png")
    assert maskrl.middle_square(image, 16).min() == 255
    assert maskrl.middle_square(image, 8).shape == (3, 8, 8)


def test_measured_tokens_have_mean_zero_and_variance_one(data, settings):
    """Uncentred tokens hid what varies behind a constant, and attention hardly learned to look."""
    s = data.measure(settings(scale=0.0))
    tokens = maskrl.to_tokens(data.train.spaced(), s)
    assert abs(float(tokens.mean())) < 1e-3
    assert abs(float(tokens.std()) - 1) < 1e-3
    given = settings(mean=0.3, scale=2.0)
    assert data.measure(given) == given


def test_a_batch_is_mirrored_only_on_request_and_then_half_of_it(data):
    plain, labels = data.train.batch(200, maskrl.rng(0))
    flipped, same_labels = data.train.batch(200, maskrl.rng(0), flip=True)
    assert torch.equal(labels, same_labels)
    known = {bytes(x.numpy().tobytes()) for x in maskrl.to_unit(data.train.images)}
    assert set(as_bytes(plain)) <= known
    mirrored = (flipped != plain).flatten(1).any(1)
    assert torch.equal(flipped[mirrored], plain[mirrored].flip(-1))
    assert 0.3 < mirrored.float().mean() < 0.7


# 13 Training loop ---------------------------------------------------------------------------------


def test_at_the_end_the_schedule_learns_alone_from_four_times_the_prompts(data, tmp_path):
    """At a learning rate that falls to 0, while the noise policy stays as it is."""
    settings = tiny(alpha=1.0, rl_iters=1)
    seen, rates = [], []
    student = maskrl.MAR(settings, data.classes, "student")
    step = torch.optim.AdamW.step

    def watched(optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args)

    def quality(images, labels):
        seen.append(len(labels))
        return images.mean((1, 2, 3)).sigmoid()

    def flat(module):
        return torch.cat([p.flatten() for p in module.parameters()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        policies = []
        for iters in (0, 2):
            short = replace(settings, schedule_iters=iters)
            out = tmp_path / str(iters)
            policies.append(maskrl.train_policy(student, short, quality, data, out).model)
    assert seen == [8, 8, 32, 32]  # G = 4 of P = 2, then of 4 P
    epochs = maskrl.PolicyGradient.policy_epochs
    assert rates[-2 * epochs :] == [3e-3] * epochs + [1.5e-3] * epochs
    (before, start), (after, end) = (
        (flat(policy.noise_policy), flat(policy.schedule)) for policy in policies
    )
    assert torch.equal(before, after)
    assert not torch.equal(start, end)


def test_training_keeps_the_weights_that_measured_best(tmp_path):
    """The yardstick is lowest after the fourth of ten updates; those weights come back, though
    training went on."""
    model = random_model("student")
    bias = model.decoder_norm.bias

    def update(step):
        bias.data.fill_(step)
        return {"loss": 0.0}

    def measure(ema):
        return {"progress": abs(ema.decoder_norm.bias[0].item() - 3.2)}

    training, path = SimpleNamespace(model=model, ema=model, state={}), tmp_path / "student.pt"
    assert maskrl.train(training, update, path, 10, measure=measure) is model
    assert (bias == 3).all()
    assert (maskrl.load_checkpoint(path).decoder_norm.bias == 3).all()
    assert sum("progress" in line for line in maskrl.read_log(tmp_path)) == 10


def test_a_finished_stage_keeps_no_state_to_resume_from(tmp_path, settings):
    training = maskrl.TeacherTraining(settings(), ["a", "b", "c"])

    def update(step):
        x, labels = torch.randn(4, 16, 12), torch.tensor([0, 1, 2, 0])
        return training.update(step, x, labels, maskrl.rng(step))

    def stop_after_four(step):
        if step == 4:
            raise KeyboardInterrupt
        return update(step)

    path = tmp_path / "teacher.pt"
    with pytest.raises(KeyboardInterrupt):
        maskrl.train(training, stop_after_four, path, 6, every=2)
    content = maskrl.read_checkpoint(path)
    assert content["step"] == 4
    assert set(content["training"]) == {*training.state, "record"}
    assert len(training.state) == 4  # two optimisers and their rates
    maskrl.train(training, update, path, 6, resume=True)
    content = maskrl.read_checkpoint(path)
    assert (content["step"], content["training"]) == (6, None)
    log = [line["step"] for line in maskrl.read_log(tmp_path)]
    assert log == list(range(6))


def test_a_student_goes_on_with_its_auxiliary_network(model, settings):
    """Which must follow the student's own samples; as the teacher it would know other ones."""
    state = maskrl.Distillation(model, settings()).state
    assert set(state) == {
        "aux",
        "aux_optimizer",
        "aux_rate",
        "student_optimizer",
        "student_rate",
    }


# 14 Reward network --------------------------------------------------------------------------------


EVERY_DAMAGE = (*maskrl.REWARD_DAMAGE, *maskrl.JUDGE_DAMAGE)


def done_to(x, make, strength=1.0, partner=None):
    """x [B, 3, 8, 8] after one kind of damage, in patches of 2 pixels."""
    partner = x.roll(1, 0) if partner is None else partner
    return make(x, torch.full((len(x), 1, 1, 1), strength), partner, 2, maskrl.rng(0))


@pytest.mark.parametrize("kinds", [maskrl.REWARD_DAMAGE, maskrl.JUDGE_DAMAGE])
def test_damage_leaves_half_alone_and_does_what_it_says(kinds):
    x, labels = torch.rand(1200, 3, 8, 8), torch.arange(3).repeat(400)
    out, kind = maskrl.damage(x, labels, 2, maskrl.rng(0), kinds)
    shares = kind.bincount(minlength=1 + len(kinds)) / len(kind)
    torch.testing.assert_close(
        shares, torch.tensor([0.5] + [0.125] * len(kinds)), rtol=0, atol=0.04
    )
    assert torch.equal(out[kind == 0], x[kind == 0])
    assert (out[kind > 0] != x[kind > 0]).flatten(1).any(1).all()


def test_reward_and_judge_learn_from_different_damage():
    assert not set(maskrl.REWARD_DAMAGE) & set(maskrl.JUDGE_DAMAGE)


@pytest.mark.parametrize("make", EVERY_DAMAGE)
def test_strong_damage_changes_more_than_weak(make):
    x = maskrl.to_unit(maskrl.draw_shapes(torch.arange(9).repeat(20), 8, maskrl.rng(0)))
    weak, strong = (float((done_to(x, make, a) - x).abs().mean()) for a in (0.1, 1.0))
    assert 0 < weak < strong


def test_shuffling_moves_patches_and_loses_none():
    x = torch.arange(5 * 16.0).view(5, 16, 1).expand(5, 16, 12)
    tokens = maskrl.patchify(done_to(maskrl.unpatchify(x, 2), maskrl.shuffled), 2)
    assert (tokens == tokens[..., :1]).all()  # whole patches
    assert torch.equal(tokens[..., 0].sort(1).values, x[..., 0])
    moved = (tokens != x).any(-1).float().mean()
    assert 0.2 < moved < 0.6


def test_what_is_swapped_or_pasted_comes_from_the_partner():
    x, partner = torch.zeros(50, 3, 8, 8), torch.ones(50, 3, 8, 8)
    for make, share in ((maskrl.swapped, 0.5), (maskrl.pasted, 0.7**2)):
        out = done_to(x, make, partner=partner)
        assert set(out.unique().tolist()) == {0.0, 1.0}
        assert abs(float(out.mean()) - share) < 0.1


def test_a_torn_image_has_the_same_pixels_in_every_row_or_in_every_column():
    x = torch.rand(1, 3, 8, 8)
    out = done_to(x, maskrl.torn)
    same_rows = torch.equal(out.sort(3).values, x.sort(3).values)
    same_columns = torch.equal(out.sort(2).values, x.sort(2).values)
    assert same_rows != same_columns
    assert not torch.equal(out, x)


def test_partners_are_of_the_same_class():
    labels = torch.randint(4, (200,), generator=maskrl.rng(0))
    partner = maskrl.partners(labels, maskrl.rng(1))
    assert torch.equal(labels[partner], labels)
    assert (partner != torch.arange(200)).float().mean() > 0.9
    assert len(set(partner.tolist())) == 200


def test_patches_that_were_swapped_with_the_same_are_no_damage():
    """Images of a class are equal here. The reward network was once taught that such whole images
    are damaged; and patches of another class would show."""
    labels = torch.arange(3).repeat(400)
    x = labels[:, None, None, None].float().expand(-1, 3, 8, 8) / 3
    out, kind = maskrl.damage(x, labels, 2, maskrl.rng(0))
    noise = 1 + maskrl.REWARD_DAMAGE.index(maskrl.noisy)
    assert set(kind.tolist()) == {0, noise}  # blurred or shuffled, a flat image is the same
    assert torch.equal(out[kind == 0], x[kind == 0])
    assert not torch.equal(out[kind == noise], x[kind == noise])


def test_quality_lies_between_zero_and_one_and_its_gradient_reaches_the_pixels():
    critic, x = maskrl.Critic("reward", 8, 3), torch.rand(5, 3, 8, 8, requires_grad=True)
    quality = critic.quality(x, torch.tensor([0, 1, 2, 0, 1]))
    assert quality.shape == (5,)
    assert ((quality > 0) & (quality <= 1)).all()
    gradient = torch.autograd.grad(quality.sum(), x)[0]
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


@torch.no_grad()
def test_quality_asks_for_the_class_and_for_an_undamaged_image():
    critic, x = maskrl.Critic("reward", 8, 2), torch.rand(5, 3, 8, 8)
    labels = torch.zeros(5, dtype=torch.long)
    critic.classify.bias[0] = critic.detect.bias[0] = 20.0
    assert critic.quality(x, labels).min() > 0.99
    assert critic.quality(x, 1 - labels).max() < 0.01
    critic.detect.bias[1] = 40.0
    assert critic.quality(x, labels).max() < 0.01


def test_colours_that_no_image_has_do_not_pay():
    """The policy was once paid for colours beyond [-1, 1]: clipped, its 0.62 were 0.57."""
    critic, labels = maskrl.Critic("reward", 8, 3), torch.zeros(5, dtype=torch.long)
    x = 4 * torch.rand(5, 3, 8, 8) - 2
    assert torch.equal(critic.quality(x, labels), critic.quality(x.clamp(-1, 1), labels))


def test_calibration_lifts_the_median_to_one_half_and_keeps_the_order():
    critic = maskrl.Critic("reward", 8, 10)
    x, labels = torch.randn(101, 3, 8, 8), torch.arange(101) % 10
    before = critic.quality(x, labels)
    assert before.median() < 0.1  # of ten classes and five kinds, untrained
    critic.calibrate(x, labels)
    after = critic.quality(x, labels)
    assert abs(float(after.median().detach()) - 0.5) < 1e-4
    assert torch.equal(after.argsort(), before.argsort())
    odds = critic.odds
    critic.calibrate(x, labels)  # from where it started, not on top
    assert critic.odds == odds


def test_a_reward_that_is_generous_enough_is_left_alone():
    critic, labels = maskrl.Critic("reward", 8, 1), torch.zeros(50, dtype=torch.long)
    with torch.no_grad():
        critic.detect.bias[0] = 10.0
    critic.calibrate(torch.randn(50, 3, 8, 8), labels)
    assert critic.odds == 1


def test_critics_are_frozen_and_know_classes_and_damage(data):
    for name in ("reward", "judge"):
        critic = maskrl.train_critic(name, data.train, tiny(), "cpu")
        _, classes, kinds = critic(torch.zeros(2, 3, 8, 8))
        assert classes.shape == (2, 9)
        assert kinds.shape == (2, 5)
        assert not any(p.requires_grad for p in critic.parameters())


# 15 Judge -----------------------------------------------------------------------------------------


def test_frechet_distance_of_two_gaussians():
    """|m|^2 + sum (s_a - s_b)^2 for independent features."""
    a = torch.randn(200_000, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5])
    b = torch.randn(200_000, 3, dtype=torch.float64) + torch.tensor([1.0, 0.0, -1.0])
    assert abs(maskrl.frechet_distance(a, b) - (2 + 1 + 0.25)) < 0.05
    assert maskrl.frechet_distance(a, a) < 1e-6


def test_precision_and_recall_tell_a_collapse_from_garbage():
    real, same, labels = torch.randn(600, 4), torch.randn(600, 4), torch.arange(600) % 3
    precision, recall = maskrl.precision_recall(real, same)
    assert precision > 0.9
    assert recall > 0.9
    # three images, again and again: all good, few covered
    collapsed = same[labels] + 0.01 * torch.randn(600, 4)
    precision, recall = maskrl.precision_recall(real, collapsed)
    assert precision > 0.6
    assert recall < 0.1
    # too wide: most are not real, but they surround all
    precision, _ = maskrl.precision_recall(real, 4 * same)
    assert precision < 0.4
    assert maskrl.diversity(collapsed, labels) < 0.02 * maskrl.diversity(same, labels)


def test_diversity_is_the_mean_distance_within_a_class():
    """Of the classes 0, 0, 1, 1: distances 1 and 3."""
    x = torch.tensor([[0.0], [1.0], [5.0], [8.0]])
    assert maskrl.diversity(x, torch.tensor([0, 0, 1, 1])) == 2


@pytest.fixture(scope="module")
def shapes_judge():
    """The judge of the preset tiny, trained for half as long."""
    settings = maskrl.Settings(scale=1.0, judge_iters=200)
    return maskrl.Judge(maskrl.load_data(settings), settings, torch.device("cpu"))


@pytest.fixture(scope="module")
def real_row(shapes_judge):
    return shapes_judge.real_row()


def test_the_judge_sees_damage_that_it_did_not_learn(shapes_judge, real_row):
    assert shapes_judge.blind == []
    for name, (weak, strong) in shapes_judge.examination.items():
        assert real_row["frechet"] < weak < strong, name


def test_blind_is_what_is_not_ordered(data):
    """Real images must come below weak damage, and that below strong."""

    class Examined(maskrl.Judge):
        def examine(self, settings):
            return {"seen": (1e6, 2e6), "turned round": (2e6, 1e6), "weak unseen": (-1.0, 1e6)}

    judge = Examined(data, tiny(), torch.device("cpu"))
    assert judge.blind == ["turned round", "weak unseen"]


def test_a_judge_says_what_it_is_blind_to(data, capsys):
    """Mean colours do not change when patches change places; they do when noise is clipped."""
    settings = tiny()

    def mean_colour(images):
        return images.mean((2, 3))

    judge = maskrl.Judge(data, settings, torch.device("cpu"), embed=mean_colour)
    assert "shuffled" in judge.blind
    assert "BLIND to " in capsys.readouterr().out
    row = judge.real_row() | {"nearest": 1.0}
    metrics = {"n": 9, "rows": {"real": row}, "hardware": "", "settings": {"seed": 0}}
    table = maskrl.report_table(metrics | {"blind": judge.blind})
    assert "? ±" in table
    assert "blind to images that are" in table
    assert "? ±" not in maskrl.report_table(metrics | {"blind": []})


def test_the_judge_knows_real_images(shapes_judge, real_row):
    assert len(shapes_judge.labels) >= 2000
    assert real_row["accuracy"] > 0.99
    assert real_row["precision"] > 0.9
    assert real_row["recall"] > 0.9
    assert 0.9 < real_row["diversity"] < 1.1


def test_the_judge_takes_bytes_and_floats_alike(shapes_judge):
    half = shapes_judge.halves[0][1].take(slice(0, 20))
    from_bytes, _ = shapes_judge.features(half.images)
    from_floats, _ = shapes_judge.features(maskrl.to_unit(half.images))
    assert torch.equal(from_bytes, from_floats)


def test_noise_and_seams_count_wherever_they_are(data, critic):
    """Progress once saw one pixel of every fourth token: noise in all the others left it alone."""
    settings = tiny(image_size=32, patch=4, steps=4)
    filters = maskrl.view_filters(32)
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    view = torch.nn.functional.conv2d(x, filters, stride=filters.shape[-1])
    assert view.shape == (1, 6, 8, 8)
    seen = torch.autograd.grad(view[:, 3:].square().sum() + view.sum(), x)[0]
    assert (seen != 0).all()
    average = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 32, 32, generator=maskrl.rng(0)), 4)
    image = average.repeat_interleave(4, 2).repeat_interleave(4, 3)
    view = torch.nn.functional.conv2d(image, filters, stride=4)
    torch.testing.assert_close(view[:, :3], average)
    norms = filters.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(6))
    assert settings.length == 64


def test_a_pattern_that_averages_to_nothing_is_seen():
    stripes = torch.ones(1, 3, 32, 32)
    stripes[..., ::2] = -1
    view = torch.nn.functional.conv2d(stripes, maskrl.view_filters(32), stride=4)
    assert view[:, :3].abs().max() < 1e-6
    assert view[:, 3:].abs().min() > 1e-3


# Pretrained features


@pytest.fixture(scope="module")
def torchvision_file(tmp_path_factory):
    """Random weights in the format and under the name that torchvision's come in."""
    path = tmp_path_factory.mktemp("weights") / "mobilenet_v3_small-047dcff4.pth"
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small()
    torch.save(model.state_dict(), path)
    return path, model.eval()


def features_of(name, clip=None):
    return maskrl.pretrained_features(str(name), clip or maskrl.ClipOptions(), torch.device("cpu"))


def test_own_features_are_none():
    assert features_of("own") is None


@torch.no_grad()
def test_features_of_a_torchvision_file_are_those_before_its_last_layer(torchvision_file):
    path, model = torchvision_file
    images = torch.rand(2, 3, 16, 16, generator=maskrl.rng(0)) * 2 - 1
    found = features_of(path)(images)
    assert found.shape == (2, 1024)
    transform = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT.transforms()
    pixels = TF.resize((images + 1) / 2, [224, 224], antialias=True)
    expected = model(TF.normalize(pixels, transform.mean, transform.std))
    torch.testing.assert_close(model.classifier[-1](found), expected, rtol=1e-3, atol=1e-4)


def test_the_judge_looks_through_given_features(data):
    def two_colours(images):
        return images.mean((2, 3))[:, :2] + images[:, :2, 0, 0]

    judge = maskrl.Judge(data, tiny(), torch.device("cpu"), embed=two_colours)
    assert judge.references[0].shape[1] == 2
    x = judge.real_images
    expected = maskrl.frechet_distance(two_colours(x), judge.references[1])
    distances = [maskrl.frechet_distance(two_colours(x), r) for r in judge.references]
    assert distances[1] == expected
    assert judge(x)["frechet"] == pytest.approx(sum(distances) / len(distances), rel=1e-5)


@pytest.mark.parametrize(
    "name, said",
    [
        ("resnet18", "expected own, clip, module:function, or a file"),
        ("nowhere:embed", "--features nowhere:embed: ModuleNotFoundError"),
        ("math:sqrt", "--features math:sqrt"),
        ("weights.pth", "starts with that of no torchvision model"),
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


# 16 Rewards: of the shapes ------------------------------------------------------------------------


def test_shape_fit_knows_a_perfect_image():
    labels = torch.arange(9).repeat(4)
    fit = maskrl.ShapeFit(16)
    x = maskrl.to_unit(maskrl.draw_shapes(labels, 16, maskrl.rng(0))).requires_grad_()
    real, blurred, wrong = fit(x, labels), fit(maskrl.blur(x), labels), fit(x, labels.roll(1))
    assert (real > blurred).all()
    assert (blurred > wrong).float().mean() > 0.9
    assert 0.3 < real.min() <= real.max() <= 1
    gradient = torch.autograd.grad(real.sum(), x)[0]
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_shape_fit_of_one_of_its_own_shapes_is_one():
    """One of its own places and sizes, on its own kind of ground."""
    middle, radius = torch.tensor([0.5]), torch.tensor([0.27])
    inside = maskrl.shape_masks(middle, middle, radius, 16)[0, 0]
    red = torch.tensor(maskrl.COLOURS["red"])[:, None, None] / 255
    exact = inside * red + (1 - inside) * 0.1
    assert maskrl.ShapeFit(16)(2 * exact[None] - 1, torch.tensor([0])) > 0.99


def test_shape_fit_sees_seams():
    """Tokens swapped in from other images of the class lower it, the more the lower."""
    labels, fit = torch.zeros(64, dtype=torch.long), maskrl.ShapeFit(16)
    tokens = maskrl.patchify(maskrl.to_unit(maskrl.draw_shapes(labels, 16, maskrl.rng(0))), 4)
    rank = torch.rand(64, 16, generator=maskrl.rng(1)).argsort(1)[..., None]

    def quality(n):
        swapped = torch.where(rank < n, tokens.roll(1, 0), tokens)
        return float(fit(maskrl.unpatchify(swapped, 4), labels).mean())

    curve = [quality(n) for n in (0, 2, 4, 8)]
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] < 0.7 * curve[0]


# 16 Rewards: their names --------------------------------------------------------------------------


@pytest.fixture
def make(data, critic):
    """make(name, clip, **settings) -> the checked reward of that name."""

    def make(name, clip=None, **settings):
        device = torch.device("cpu")
        return maskrl.make_reward(name, tiny(**settings), data, device, critic, clip)

    return make


@pytest.mark.parametrize("name", ["embedded", "fit", "clip", "mine:f", "my.module:function"])
def test_what_reward_may_name(name):
    maskrl.check_reward_name(name)


WRONG_NAMES = "clp|clip,|clip:|:f|module:|a.csv|embedded:2,clip|a:b:c|a-b:c|a..b:c|../a:b|"


@pytest.mark.parametrize("name", WRONG_NAMES.split("|"))
def test_what_reward_may_not_name(name):
    with pytest.raises(InputError, match=f"^--reward {name}: expected embedded, fit, clip or mod"):
        maskrl.check_reward_name(name)


def test_embedded_is_the_critic(make, critic, data):
    x, labels = maskrl.to_unit(data.test.images[::9]), data.test.labels[::9]
    assert torch.equal(make("embedded")(x, labels), critic.quality(x, labels))


def test_fit_is_for_the_shapes_alone(make, critic, data, folder):
    x, labels = maskrl.to_unit(data.test.images[::9]), data.test.labels[::9]
    assert torch.equal(make("fit")(x, labels), maskrl.ShapeFit(8)(x, labels))
    other = maskrl.load_data(tiny(), str(folder))
    with pytest.raises(InputError, match="--reward fit .* only --data shapes"):
        maskrl.make_reward("fit", tiny(), other, "cpu", critic)


# 16 Rewards: CLIP ---------------------------------------------------------------------------------

SMALL = "ViT-S-32-alt"  # for what does not depend on the model; a random ViT-B-32 takes longer


def random_clip(name, path, **keys):
    """A CLIP with random weights, and these in a file, in half precision, as it loads faster."""
    clip = open_clip.create_model(name).eval().half()
    weights = clip.state_dict()
    torch.save({**keys, "state_dict": weights} if keys else weights, path)
    return clip.float()


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """The file of a random small CLIP."""
    path = tmp_path_factory.mktemp("clip") / "small.pt"
    torch.manual_seed(0)
    random_clip(SMALL, path, epoch=1)
    yield path
    path.unlink()


def blocks_of_colour(n, size=16):
    """uint8 [n, 3, size, size]: resizing has edges and flat places to get right."""
    coarse = torch.randint(256, (n, 3, 4, 4), generator=maskrl.rng("pictures")).to(torch.uint8)
    return coarse.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3)


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
    ours = maskrl.clip_pixels(maskrl.to_unit(images), **vars(cfg))
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
    options = maskrl.ClipOptions(weights=str(path))
    quality = maskrl.clip_reward(options, ["red circle", "green_square"], torch.device("cpu"))
    path.unlink()  # 300 MB
    images, labels = blocks_of_colour(3), torch.tensor([1, 0, 0])
    x = maskrl.to_unit(images).requires_grad_()
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
    assert by_hand.std() > 2e-3, "too alike for the line above to mean anything"

    gradient = torch.autograd.grad(q.sum(), x)[0]
    norm = gradient.flatten(1).norm(dim=1)[:, None, None, None]
    assert (norm > 0).all()
    with torch.no_grad():
        assert (quality(x + 1e-2 * gradient / norm, labels) > q).all()


@torch.no_grad()
def test_clip_takes_many_images_in_parts_each_alone(make, small_clip):
    quality = make("clip", maskrl.ClipOptions(SMALL, str(small_clip)))
    x, labels = maskrl.to_unit(blocks_of_colour(66)), torch.arange(66) % 9
    ends = (0, 63, 64, 65)
    alone = torch.cat([quality(x[i : i + 1], labels[i : i + 1]) for i in ends])
    torch.testing.assert_close(quality(x, labels)[list(ends)], alone)


@torch.no_grad()
def test_clips_prompt_is_the_users(small_clip):
    x, label = maskrl.to_unit(blocks_of_colour(1)), torch.tensor([0])
    prompts = "a {class}", "no {class}"
    options = [maskrl.ClipOptions(SMALL, str(small_clip), prompt) for prompt in prompts]
    a, b = (maskrl.clip_reward(o, ["red circle"], "cpu")(x, label) for o in options)
    assert abs(a - b) > 1e-4


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def clip_error(tmp_path, capsys):
    """clip_error(*options) -> the line that RL on CLIP with these options ends with."""

    def clip_error(*options):
        argv = [*SHORT, "--reward", "clip", "--out", tmp_path / "new", *options]
        return error_of(train_rl.main, argv, capsys)

    return clip_error


def test_wrong_clip_weights_end_in_one_line(clip_error, small_clip, tmp_path):
    junk, attack, hacked = tmp_path / "junk.pt", tmp_path / "attack.pt", tmp_path / "hacked"
    junk.write_bytes(b"junk")
    torch.save({"state_dict": Attack(hacked)}, attack)
    small = ("--clip-model", SMALL, "--clip-weights")
    cases = {
        ("--clip-weights", tmp_path / "none.pt"): "none.pt: neither a file nor weights that "
        "open_clip has for ViT-B-32: openai",
        ("--clip-weights", ""): "--clip-weights : neither",
        (*small, "laion2b_s34b_b79k"): f"{SMALL}: none",
        (*small, junk): f"junk.pt could not be loaded safely as weights of --clip-model {SMALL}",
        (*small, attack): "attack.pt could not be loaded safely",
        ("--clip-model", "ViT-S-32", "--clip-weights", small_clip): "small.pt could not be loaded "
        "safely as weights of --clip-model ViT-S-32",
        ("--clip-model", "ViT-Z"): "--clip-model ViT-Z",
    }
    for options, expected in cases.items():
        assert expected in clip_error(*options), options
    assert not hacked.exists()


def test_without_a_network_clip_ends_in_one_line(tmp_path, monkeypatch, capsys, caplog):
    def offline(*args, **kwargs):
        raise OSError("no network\nin two lines")

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", offline)
    monkeypatch.setattr(open_clip.pretrained.urllib.request, "urlopen", offline)
    with pytest.raises(SystemExit):
        argv = [*SHORT, "--reward", "clip", "--out", str(tmp_path / "new")]
        maskrl.run(lambda: train_rl.main(argv))
    lines = capsys.readouterr().err.strip().splitlines()  # progress bars, and the error
    assert not caplog.records
    assert not any("no network" in line for line in lines)
    assert "laion2b_s34b_b79k could not be downloaded; without a network, give a file" in lines[-1]


def test_without_open_clip_its_package_is_named(clip_error, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "pip install open_clip_torch" in clip_error()


# 16 Rewards: functions of one's own ---------------------------------------------------------------

MODULE = """
import torch
weight = torch.nn.Parameter(torch.tensor(0.1))  # not frozen, as somebody may forget
calls = []
def bright(images, labels):
    calls.append(images.detach())
    return 0.5 + weight * images.mean((1, 2, 3))
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
def above_one(images, labels):
    return 1 + bright(images, labels)
def constant(images, labels):
    return 0.3 + 0 * bright(images, labels)
def counted(images, labels):
    return (images > 0).float().mean((1, 2, 3))
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


def test_a_function_gets_clamped_images_and_lets_gradient_through(make, module):
    quality, labels = make(f"{module}:bright"), torch.tensor([0, 1])
    torch.testing.assert_close(quality(3 * torch.ones(2, 3, 8, 8), labels), torch.full((2,), 0.6))
    x = torch.zeros(2, 3, 8, 8, requires_grad=True)
    assert torch.autograd.grad(quality(x, labels).sum(), x)[0].min() > 0


def test_weights_that_somebody_forgot_to_freeze_get_no_graph(make, module):
    """Without gradient in the pixels there is nothing to differentiate, and memory to lose."""
    quality = make(f"{module}:bright")
    assert not quality(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])).requires_grad


@pytest.mark.parametrize("function", ["none", "calls"])
def test_a_function_that_is_missing_or_none_is_named(make, module, function):
    with pytest.raises(InputError, match=f"--reward {module}:{function}: "):
        make(f"{module}:{function}")


def test_a_module_that_is_missing_is_named(make):
    with pytest.raises(InputError, match="--reward no_such_module:f: ModuleNotFoundError"):
        make("no_such_module:f")


@pytest.mark.parametrize(
    "function, said",
    [
        ("nan", "gave values from nan"),
        ("matrix", r"gave \[32, 1\], not a tensor \[32\]"),
        ("number", "gave float, not a tensor"),
        ("negative", "gave values from -0"),
        ("above_one", "gave values from 1"),
        ("constant", "gave 0.3 for all"),
    ],
)
def test_a_broken_reward_is_reported_before_training(make, module, function, said):
    with pytest.raises(InputError, match=f"--reward {module}:{function} {said}"):
        make(f"{module}:{function}")


def test_backpropagation_refuses_a_reward_without_gradient(make, module):
    make(f"{module}:counted")
    make(f"{module}:bright", method="backprop")
    with pytest.raises(InputError, match=f"backprop: the reward {module}:counted gives no grad"):
        make(f"{module}:counted", method="backprop")


def test_a_reward_that_breaks_later_is_no_input_error(data):
    """Wrong input has no effect; a reward that breaks after an hour has a policy to save."""
    broken = []

    def quality(images, labels):
        return images.mean((1, 2, 3)).sigmoid() * (float("nan") if broken else 1)

    images, labels = data.train.batch(8, maskrl.rng(0))
    checked = maskrl.checked_reward("mine", quality, images, labels)
    assert torch.equal(checked(images, labels), quality(images, labels))
    broken.append(True)
    with pytest.raises(NonFinite, match="--reward mine gave values from nan"):
        checked(images, labels)


def test_rl_climbs_a_function_and_trains_the_critic_once(module, tmp_path, monkeypatch):
    train_critic, trained = maskrl.train_critic, []

    def watched(name, *rest):
        trained.append(name)
        return train_critic(name, *rest)

    monkeypatch.setattr(maskrl, "train_critic", watched)
    argv = [*SHORT, "--reward", f"{module}:bright", "--out", str(tmp_path / "run")]
    metrics = train_rl.main(argv)
    assert trained == ["judge", "reward"]
    assert set(metrics["minutes"]) == {"teacher", "student", "policy"}
    seen = sys.modules[module].calls
    assert len(seen) > 3
    assert min(x.min() for x in seen) >= -1
    assert max(x.max() for x in seen) <= 1
    # by Watch, then by compare_schedules
    judged = [float(0.5 + 0.1 * x.mean()) for x in seen if len(x) == metrics["n"]]
    before = metrics["rl"]["before"]["quality"]
    assert any(before == pytest.approx(q, abs=1e-5) for q in judged)


def test_a_reward_that_breaks_later_stops_the_training(module, tmp_path, capsys):
    new = ["--reward", f"{module}:nan_later", "--out", tmp_path / "run"]
    error = error_of(train_rl.main, [*SHORT, "--rl-iters", 4, *new], capsys, code=1)
    assert f"policy, step 2: --reward {module}:nan_later gave values from nan" in error
    assert maskrl.read_checkpoint(tmp_path / "run" / "policy.pt")["step"] == 2


# 17 Report and pictures ---------------------------------------------------------------------------


def test_a_caption_wider_than_its_images_is_not_cut_off(tmp_path):
    """It once was, where a block had few columns."""
    caption = "its nearest training images, a long story: 16.0 x 100 steps, 123.4 ms per image"
    maskrl.labelled_rows(tmp_path / "rows.png", {caption: torch.zeros(2, 3, 8, 8)}, columns=2)
    sheet = Image.open(tmp_path / "rows.png").convert("L")
    text = ImageFont.load_default(size=15).getlength(caption)
    assert sheet.width >= 6 + text
    last_letter = sheet.crop((int(text) - 8, 0, sheet.width, 24))
    assert last_letter.getextrema()[0] < 128


def test_a_picture_has_its_images_in_rows_and_enlarges_small_ones():
    images = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 3, 8, 8)
    grid = maskrl.picture(images, columns=3, pixels=16, padding=0)
    assert grid.size == (3 * 16, 2 * 16)
    levels = [grid.getpixel((16 * (i % 3) + 15, 16 * (i // 3)))[0] for i in range(6)]
    assert levels == [0, 51, 102, 153, 204, 255]


def test_the_nearest_training_image_of_a_training_image_is_itself(data):
    images = data.train.spaced()[[3, 50]]
    found, distance = maskrl.nearest(images, data)
    assert torch.equal(found, images)
    assert distance.max() < 0.01
    _, distance = maskrl.nearest(0.5 * images, data)
    assert distance.min() > 0.05


def test_timing_takes_the_median_and_leaves_out_the_first_round(student, monkeypatch):
    """The first round of each arm is its warm-up."""
    clock = iter([0, 9, 0, 3, 0, 1, 0, 2])
    monkeypatch.setattr(maskrl.time, "perf_counter", lambda: next(clock))
    arms = {"student": (student, maskrl.Sampling(steps=1))}
    assert maskrl.time_in_turns(arms, torch.tensor([0, 1])) == {"student": 2 / 2}


def test_a_film_ends_with_the_image_and_starts_grey(student, tmp_path):
    tokens, trace = maskrl.generate(student, [0, 1], maskrl.Sampling(steps=4), trace=True)
    maskrl.film(tmp_path / "film.png", tokens, trace, student.settings)
    strip = Image.open(tmp_path / "film.png")
    tile, columns = 48 + 4, 5
    assert strip.size == (4 + columns * tile, 4 + 2 * tile)
    first = strip.crop((4, 4, 52, 52))
    assert first.getextrema() == ((128, 128),) * 3
    last = strip.crop((4 + 4 * tile, 4, 52 + 4 * tile, 52))
    image = maskrl.to_images(tokens[:1], student.settings)
    assert last.tobytes() == maskrl.picture(image, 1, pixels=48, padding=0).tobytes()


# 18 Command line ----------------------------------------------------------------------------------


@pytest.fixture
def threads():
    """Puts back the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("cores, expected", [(None, 1), (1, 1), (2, 1), (8, 4), (16, 8), (96, 8)])
def test_a_script_takes_half_of_the_cores_and_at_most_eight(monkeypatch, threads, cores, expected):
    """On all cores of a large machine, small tensors once took several times as long."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    maskrl.find_device("cpu")
    assert torch.get_num_threads() == expected
    maskrl.find_device("cpu", threads=3)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("n", [0, -1, 2000])
def test_no_threads_or_too_many_are_refused(n):
    with pytest.raises(InputError, match=f"--threads {n} must lie in 1"):
        maskrl.find_device("cpu", n)


@pytest.mark.parametrize("name", ["tpu", "cpu:0", "cuda:x", "cuda:99x", ""])
def test_a_device_that_is_not_there_is_refused(threads, name):
    with pytest.raises(InputError, match=f"--device {name}: there is none here; there is .*cpu"):
        maskrl.find_device(name)


def ended(main, capsys):
    """Exit code and lines of a script."""
    with pytest.raises(SystemExit) as stop:
        maskrl.run(main)
    return stop.value.code, capsys.readouterr().err.strip().splitlines()


def test_ctrl_c_ends_a_script_in_one_line_and_code_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    code, (line,) = ended(interrupted, capsys)
    assert code == 130
    assert "--resume" in line


def test_wrong_input_ends_with_code_2_and_a_broken_loss_with_code_1(capsys):
    def wrong_input():
        raise InputError("what was wrong")

    def broken_loss():
        raise NonFinite("the loss is nan")

    assert ended(wrong_input, capsys) == (2, ["error: what was wrong"])
    assert ended(broken_loss, capsys) == (1, ["error: the loss is nan"])


def test_an_error_of_our_own_making_keeps_its_traceback():
    def bug():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        maskrl.run(bug)


def test_every_setting_is_an_option_in_a_group_and_its_default_is_said(capsys):
    with pytest.raises(SystemExit):
        train_rl.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, value in vars(maskrl.Settings()).items():
        assert maskrl.flag(name) in text
        assert f"(default: {value})" in text


def test_the_log_reads_back(tmp_path):
    assert maskrl.read_log(tmp_path) == []
    line = {"stage": "teacher", "step": 3, "loss": 0.5}
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    assert maskrl.read_log(tmp_path) == [line]
