"""Every study runs from nothing to its JSON, table and picture, on a model that learns nothing."""

import json
from dataclasses import replace
from functools import partial

import digits
import pytest
import study
import torch
from conftest import SHORT, tiny

import maskrl
import train_rl

PROVENANCE = {
    *("study", "command", "commit", "hardware", "date", "versions", "minutes", "settings"),
}


def tiny_preset(name, seed=0, **given):
    return tiny(**{"seed": seed, "scale": 0.0, **given})


def cut_short(patch, folder):
    """study.main with everything cut short, writing into one folder."""
    patch.setattr(maskrl, "preset", tiny_preset)
    patch.setattr(study, "ASSETS", folder / "assets")
    patch.setattr(maskrl, "time_in_turns", partial(maskrl.time_in_turns, rounds=2))
    patch.setattr(study.Gsim, "settings", {"gsim_iters": 2})
    patch.setattr(study.Longer, "settings", {"gsim_iters": 3})
    for each in (study.Action, study.Critical, study.OnLetters):
        patch.setattr(each, "settings", each.settings | {"rl_iters": 2})
    patch.setattr(study, "RENOISING", {"gsim_iters": 2})
    for each in (study.Critical, study.OnLetters):
        patch.setattr(each, "lab_settings", {"teacher_iters": 3})
    patch.setattr(study.Critical, "more_steps", study.Critical.more_steps[:1])  # of 16 tokens
    patch.setattr(study.Variance, "trajectories", 4)
    patch.setattr(study.Variance, "draws", 2)
    patch.setattr(study.Schedule, "searched", 9)
    patch.setattr(study.Cost, "rounds", 2)
    patch.setattr(study.Threads, "numbers", (1,))
    patch.setattr(study.Threads, "rounds", 1)
    patch.setattr(study.Threads, "updates", 1)
    patch.setattr(study, "FOLDERS", folder / "folders")
    patch.setattr(study.Eyes, "features", "own")
    for each in (study.Emoji, study.Letters):
        patch.setattr(each, "options", SHORT)
        digits.make(folder / "folders" / each().name, per_class=20)
    patch.setattr(study.TrainSpeed, "rounds", dict.fromkeys(study.TrainSpeed.sizes, 2))
    patch.setattr(study.Speed, "settings", {"teacher_iters": 3, "gsim_iters": 2})
    patch.setattr(study.Speed, "trained", {"student": {}})
    patch.setattr(study.Speed, "iterations", (16,))
    patch.setattr(study.Speed, "sizes", {"small": 2})
    patch.setattr(study.Speed, "random_steps", 8)
    patch.setattr(study.Bench, "batches", (1, 2))
    patch.setattr(study.Bench, "rounds", 2)
    patch.setattr(study.Bench, "size", "small")
    patch.setattr(study.Bench, "random_steps", 8)
    patch.setattr(study.Bench, "stride", 4)
    patch.setattr(study.Scaling, "axes", {"tokens": (16, 64)})
    patch.setattr(study.Scaling, "rounds", 2)

    def run(*args):
        study.main([*args, "--out", str(folder / "out"), "--device", "cpu", "--threads", "1"])

    return run


@pytest.fixture
def small(monkeypatch, tmp_path):
    return cut_short(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder in which every study was measured, seed 0."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        cut_short(patch, folder)(*study.STUDIES, "--seeds", "0")
    return folder


@pytest.fixture
def there(monkeypatch, measured):
    """Every study measured, and study reading the results."""
    cut_short(monkeypatch, measured)
    return measured


def result(name):
    return json.loads(study.result_file(name).read_text())


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_study_runs_from_nothing(there, name):
    each, content = study.STUDIES[name], result(name)
    assert content.keys() == PROVENANCE | {each.rows_key}
    rows = content[each.rows_key]
    assert content["versions"].keys() == {"python", "torch", "torchvision", "numpy"}
    for row, runs in rows.items():
        assert {"minutes", "threads"} <= runs["0"].keys(), row
    shown = {key for runs in rows.values() for key in runs["0"]}
    assert set(each.columns) <= shown
    text = study.section(each, content)
    assert "one seed" in text and content["command"] in text
    assert len(study.sentences(each, rows)) > 100
    if each.picture:
        assert (study.ASSETS / each.picture[0]).stat().st_size > 3000
        assert f"]({each.picture[0]})" in text


def test_render_writes_results_md_and_the_block_of_the_readme(there, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "README", tmp_path / "README.md")
    links = "[`Judge`](maskrl.py#L1), [`Sampling.chains`](maskrl.py#L1)"
    study.README.write_text(f"a\n<!-- results -->\nold\n<!-- /results -->\n{links}\n")
    study.main([])
    text = study.README.read_text()
    assert f"<!-- results -->\n{study.readme_table()}\n<!-- /results -->" in text
    assert "| policy | " in text and "old" not in text
    assert f"[`Judge`](maskrl.py#L{study.line_of('Judge', 'maskrl.py')})" in text
    assert study.with_links(study.with_table(text)) == text
    assert "## GSIM and its rivals" in (study.ASSETS / "results.md").read_text()


def test_seed_0_of_the_story_is_make_demo(there, tmp_path):
    demo = train_rl.main(["--preset", "tiny", "--out", str(tmp_path), "--threads", "1"])
    rows = result("story")["rows"]
    for name in ("real", "teacher", "one-step start", "student", "policy"):
        row, again = rows[name]["0"], demo["rows"][name]
        for key in row.keys() & again.keys():
            assert row[key] == pytest.approx(again[key], abs=2e-6), (name, key)
    for name, again in {
        "policy": "after",
        "policy's generator, K = 8": "policy, fixed K = 8",
    }.items():
        for key in ("quality", "reward", "steps", "frechet"):
            assert rows[name]["0"][key] == pytest.approx(demo["rl"][again][key], abs=2e-6), key


def test_what_is_there_is_not_measured_again_and_seeds_are_merged(small, tmp_path):
    only = ["story", "--only", "real", "untrained"]
    small(*only, "--seeds", "0")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")}
    first = result("story")["rows"]["real"]["0"]
    small(*only, "--seeds", "1")
    small("story", "--only", "real", "--seeds", "0")
    after = {path: path.stat().st_mtime_ns for path in before if path.name != "settings.json"}
    assert after.items() <= before.items()
    rows = result("story")["rows"]
    assert rows["real"].keys() == rows["untrained"].keys() == {"0", "1"}
    assert rows["real"]["0"] == first != rows["real"]["1"]
    assert result("story")["command"] == "python tests/study.py story --seeds 0,1"
    with pytest.raises(maskrl.InputError, match="--only"):
        small("story", "--only", "no such row", "--seeds", "0")


def test_a_folder_of_other_settings_is_refused(small, monkeypatch):
    small("story", "--only", "real", "--seeds", "0")
    monkeypatch.setattr(maskrl, "preset", lambda name, seed: tiny(seed=seed, judge_iters=6))
    with pytest.raises(maskrl.InputError, match="other settings"):
        small("story", "--only", "real", "--seeds", "0")


ROWS = {
    "a": {"0": {"ms": 1.0}, "1": {"ms": 2.0}, "2": {"ms": 6.0}},
    "b": {"0": {"ms": 4.0}, "1": {"ms": 1.0}},
}


@pytest.mark.parametrize(
    "template, text",
    [
        ("{0[a][ms]} ms", "2.0 ms"),
        ("{0[b / a][ms]} times", "1.2 times"),
        ("lower on {0[a < b][ms]}", "lower on 1 of 2 seeds"),
        ("higher on {0[b > a][ms]}", "higher on 1 of 2 seeds"),
    ],
)
def test_figures_of_a_verdict_come_from_the_rows(template, text):
    assert template.format(study.Figures(ROWS)) == text


def test_a_sentence_without_its_rows_is_left_out(monkeypatch):
    monkeypatch.setattr(study.Cost, "verdict", ("A is {0[a][ms]}.", "C is {0[c][ms]}."))
    assert study.sentences(study.Cost(), ROWS) == "A is 2.0."
    assert study.cell(ROWS["a"], "ms") == "2.0 (1.0–6.0)"


def test_results_md_is_what_the_committed_json_gives():
    text = (study.ASSETS / "results.md").read_text()
    assert text == study.results_markdown(), "python tests/study.py renews it"


@pytest.mark.parametrize("name", study.read_results())
def test_every_committed_json_says_where_it_comes_from(name):
    content = result(name)
    assert content.keys() == PROVENANCE | {study.STUDIES[name].rows_key}
    assert all(content[key] for key in PROVENANCE - {"settings"})
    assert content["study"] == name and content["command"].startswith("python tests/study.py")


def test_a_figure_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        study.as_lines({"rows": {"a": {"0": {"reward": float("nan")}}}})


def test_in_turn_the_generator_starts_from_the_noise_that_the_policy_has_moved(student):
    still = {"noise_lr": 1e-9, "rl_lr": 1e-9, "learn_steps": False, "rl_steps": "all"}
    settings = tiny(action="z", explore=0.3, **still)
    training = study.InTurn(student, settings, brightness, torch.zeros(1, 16, 12))
    torch.nn.init.ones_(training.model.noise_policy.net[-1].bias)
    metrics = training.update(torch.tensor([0, 1, 2, 0]), ("in turn", 1))
    assert metrics["log_ratio"] < 1e-3  # sampler and learner agree
    assert training.model.settings == settings


def test_re_noised_sampler_and_learner_agree(student):
    training = study.Renoised(student, RENOISED, brightness, torch.zeros(1, 16, 12))
    before = maskrl.generate(training.model, [0, 1, 2])
    with study.cleaned_up(1.0, study.gaussian("watched", device="cpu")):  # as RL is watched
        metrics = training.update(torch.tensor([0, 1, 2, 0]), ("re-noised", 1))
    assert metrics["log_ratio"] < 1e-4 and metrics["kl"] == 0.0
    assert not torch.equal(maskrl.generate(training.model, [0, 1, 2]), before)


def test_the_gradient_of_re_noising_is_that_of_the_noised_token(student):
    """For a bandit of one step, A grad log N(x_t / alpha; g, (sigma / alpha)^2), by hand."""
    settings = replace(RENOISED, steps=1)
    training = study.Renoised(student, settings, brightness, torch.zeros(1, 16, 12))
    model, drawn, labels, seed = training.model, [], torch.tensor([0, 1]), ("by hand", 0)
    with study.cleaned_up(1.0, study.gaussian(seed, "re-noise", device="cpu"), drawn):
        rollouts = maskrl.rollout(model, brightness, labels, seed, False, explore=False)
    A = maskrl.group_advantages(rollouts.quality, settings.group)
    mask = torch.ones(len(A), 16, dtype=torch.bool)
    c = model.context(torch.zeros_like(rollouts.tokens), mask, rollouts.labels)
    g = maskrl.one_step(model.head, rollouts.trace.z[mask], c[mask], settings.noise_ratio)
    (_, action), (_, alpha, sigma) = drawn[0], study.noise_time(1.0)
    log_prob = -((action - g) * alpha / sigma).square().mean(-1) / 2
    loss = -(A.repeat_interleave(16) * log_prob).mean()
    by_hand = torch.autograd.grad(loss, model.head.parameters(), allow_unused=True)
    training.update(labels, seed)
    for p, gradient in zip(model.head.parameters(), by_hand):
        if gradient is not None and gradient.any():  # the update clips its norm
            cosine = torch.cosine_similarity(p.grad.flatten(), gradient.flatten(), 0)
            assert cosine > 0.9999


def test_re_noising_of_the_whole_image_and_of_what_is_revealed_is_the_same(student):
    noise = maskrl.draw_noise(student, 3, maskrl.rng("both"))
    noise = study.TwoNoises(noise.order, noise.z, eps=torch.randn(noise.z.shape))
    images = []
    for places, trace in zip(study.masks_of(noise, 4, student.settings), ("predictions", True)):
        with noise.renoising("re-noised", places):
            images.append(
                maskrl.generate(student, [0, 1, 2], maskrl.Sampling(4), noise, trace=trace)[0]
            )
    torch.testing.assert_close(*images)


RENOISED = tiny(action="x", learn_steps=False, rl_steps="all", alpha=0.0)


def brightness(images, labels):
    return images.mean((1, 2, 3)) / 2 + 0.5
