"""Every study runs from nothing to its JSON, table and picture, on a model that learns nothing."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny
from helpers_datasets import make_idx

import train_distill
import train_rl
from maskrl import PolicyGradient, Sampling, TeacherTraining, generate, rng
from workbench import bench
from workbench.errors import InputError
from workbench.files import load_checkpoint, write_checkpoint
from workbench.monitors import ValidationMetric
from workbench.precision import set_precision
from workbench.settings import preset
from workbench.studies import (
    action,
    budget,
    credit,
    folders,
    gpu_time,
    lab,
    make_checkpoints,
    official,
    records,
    schedule,
    study,
    tables,
)
from workbench.studies.__main__ import main
from workbench.studies.action import Action, HeadFrozen, Uncertain
from workbench.studies.cost import Cost
from workbench.studies.credit import Branching, Credit, Window, branched_rollout
from workbench.studies.critical import Critical, EqualNumbers
from workbench.studies.gsim import Gsim
from workbench.studies.heads import Heads, MnistHeads
from workbench.studies.official import Official
from workbench.studies.schedule import GivenCounts, Schedule, ascending
from workbench.studies.speed import Bench, Speed
from workbench.studies.study import Study
from workbench.studies.temperature import Temperature
from workbench.studies.variance import Variance

PROVENANCE = {
    *("study", "command", "commit", "hardware", "date", "versions", "minutes", "settings"),
}


def tiny_preset(name, seed=0, **overrides):
    return tiny(seed=seed, **{"scale": 0.0, "steps": 4} | overrides)


def cut_short(patch, folder):
    """The command, with everything cut short, writing into one folder."""
    patch.setattr(lab, "preset", tiny_preset)
    patch.setattr(bench, "preset", tiny_preset)
    patch.setattr(bench, "RELEASED", {})
    patch.setattr(records, "ASSETS", folder / "assets")
    patch.setattr(study, "time_in_turns", partial(study.time_in_turns, rounds=2))
    patch.setattr(train_distill, "ValidationMetric", partial(ValidationMetric, n=32))
    patch.setattr(Gsim, "settings", {"gsim_iters": 2})
    patch.setattr(Action, "settings", Action.settings | {"rl_iters": 2, "steps": 4})
    patch.setattr(Temperature, "temperatures", {"at 0.85": 0.85})
    patch.setattr(Critical, "settings", Critical.settings | {"rl_iters": 2, "steps": 4})
    patch.setattr(Critical, "lab_settings", {"teacher_iters": 3})
    patch.setattr(Critical, "more_steps", ())
    patch.setattr(Critical, "how", ("critical", "all"))
    patch.setattr(Credit, "settings", Credit.settings | {"rl_iters": 2})
    patch.setattr(Credit, "arms", dict(list(Credit.arms.items())[:2]))
    patch.setattr(Heads, "arms", {"heads alone": {"gsim_iters": 2, "heads_iters": 2}})
    patch.setattr(Variance, "trajectories", 4)
    patch.setattr(Variance, "draws", 2)
    patch.setattr(Variance, "steps", (4,))
    patch.setattr(Schedule, "searched", 9)
    patch.setattr(Schedule, "lengths", (3,))
    patch.setattr(Schedule, "seen_images", 45)
    patch.setattr(Schedule, "cosine", (4,))
    patch.setattr(Cost, "rounds", 2)
    patch.setattr(Speed, "settings", {"teacher_iters": 3, "gsim_iters": 2})
    patch.setattr(Speed, "iterations", (4,))
    patch.setattr(Speed, "random_steps", 4)
    patch.setattr(Speed, "sizes", {"mar_b": 2})
    patch.setattr(Bench, "batches", (1,))
    patch.setattr(Bench, "rounds", 2)
    patch.setattr(Bench, "steps", 2)
    patch.setattr(Bench, "random_steps", 2)
    patch.setattr(official, "preset", tiny_preset)
    patch.setattr(Official, "sizes", {"small": (4, 2)})
    return partial(run, folder / "out")


def run(out, *argv):
    argv = [*argv, "--peer", str(Path(__file__).parent / "data" / "official")]
    main([*argv, "--out", str(out), "--device", "cpu", "--threads", "1"])


LIKE_EMOJI = ("letters", "mnist")
BELOW = ("mnistheads",)  # has a test of its own
STUDIES = [name for name in tables.STUDIES if name not in LIKE_EMOJI + BELOW]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder in which every study was measured, seed 0; what the story left becomes a run of
    train_rl.py, and the one that the study of emoji reads."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        run = cut_short(patch, folder)
        run(*STUDIES[:-1], "--seeds", "0")
        story = folder / "out" / "seed0"
        train_rl.main(["--out", str(story), "--resume", "--threads", "1", "--device", "cpu"])
        (story / "emoji").mkdir()
        for name in ("metrics.json", "log.jsonl", "samples.png"):
            shutil.copy(story / name, story / "emoji" / name)
        run("emoji", "--seeds", "0")
    return folder


@pytest.fixture
def results(monkeypatch, measured):
    """The same folder, where results are read from."""
    cut_short(monkeypatch, measured)
    return measured


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_from_nothing(results, name):
    study, content = tables.STUDIES[name], records.read_result(name)
    assert content.keys() == PROVENANCE | {"rows"}
    rows = content["rows"]
    assert content["versions"].keys() == {"python", "torch", "torchvision", "numpy"}
    for row, runs in rows.items():
        assert {"minutes", "threads"} <= runs["0"].keys(), row
    figures = {key for runs in rows.values() for key in runs["0"]}
    assert set(study.columns) <= figures
    text = tables.section(study, content)
    assert content["command"] == f"python -m workbench.studies {name} --seeds 0"
    assert content["command"] in text and study.title in text
    if study.picture:
        assert (records.ASSETS / study.picture[0]).stat().st_size > 3000
        assert f"]({study.picture[0]})" in text


def test_without_a_name_results_md_and_the_blocks_of_the_readme_are_written(
    results, monkeypatch, tmp_path
):
    document = tmp_path / "README.md"
    monkeypatch.setattr(tables, "DOCUMENTS", (document,))
    document.write_text("a\n<!-- results -->\nold\n<!-- /results -->\nb\n")
    main([])
    text = document.read_text()
    assert text == f"a\n<!-- results -->\n{tables.readme_results()}\n<!-- /results -->\nb\n"
    assert "| policy | " in text and "old" not in text
    assert tables.with_tables(text) == text
    assert "## GSIM" in (records.ASSETS / "results.md").read_text()


def test_seed_0_of_the_story_is_a_run_of_train_rl(results):
    """--resume takes its folder: finished stages are kept, and judged as the study judged them."""
    out, rows = results / "out" / "seed0", records.read_result("story")["rows"]
    demo = json.loads((out / "metrics.json").read_text())
    assert demo["settings"] == json.loads((out / "settings.json").read_text())
    assert demo["minutes"] == {}
    for name in ("real", "teacher", "one-step start", "student", "policy"):
        row, again = rows[name]["0"], demo["rows"][name]
        for key in row.keys() & again.keys():
            assert row[key] == pytest.approx(again[key], abs=2e-6), (name, key)
    for name, again in {
        "policy": "after",
        "policy's generator, K = 4": "policy, fixed K = 4",
    }.items():
        for key in ("quality", "reward", "steps", "frechet"):
            assert rows[name]["0"][key] == pytest.approx(demo["rl"][again][key], abs=2e-6), key


def test_a_folder_is_trained_on_by_train_rl(monkeypatch, tmp_path):
    monkeypatch.setattr(lab, "preset", tiny_preset)
    monkeypatch.setattr(folders, "FOLDERS", tmp_path)
    calls, here = [], lab.Lab(tmp_path, 0, torch.device("cpu"))
    monkeypatch.setattr(train_rl, "main", calls.append)
    with pytest.raises(InputError, match="make_folders"):
        folders.Emoji().run(tmp_path / "out", here)
    (tmp_path / "emoji").mkdir()
    folders.Emoji().run(tmp_path / "out", here)
    args = train_rl.parse(calls[0])
    assert args.data == str(tmp_path / "emoji") and args.out == tmp_path / "out"
    assert args.resume and args.flip and args.seed == 0


def test_mnist_is_trained_on_by_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(lab, "preset", tiny_preset)
    monkeypatch.setattr(folders, "FOLDERS", tmp_path)
    calls, here = [], lab.Lab(tmp_path, 1, torch.device("cpu"))
    monkeypatch.setattr(train_rl, "main", calls.append)
    with pytest.raises(InputError, match="make_mnist"):
        folders.Mnist().run(tmp_path / "out", here)
    (tmp_path / "mnist").mkdir()
    folders.Mnist().run(tmp_path / "out", here)
    args = train_rl.parse(calls[0])
    assert args.data == "mnist" and args.cache == tmp_path / "mnist" and args.seed == 1


def test_heads_alone_are_trained_behind_mnists_teacher_and_judged_as_the_others(
    monkeypatch, tmp_path
):
    run = cut_short(monkeypatch, tmp_path)
    monkeypatch.setattr(folders, "FOLDERS", tmp_path)
    short = {"teacher": 2, "gsim": 2, "rl": 1, "schedule": 1, "judge": 5}
    short = [word for key, n in short.items() for word in (f"--{key}-iters", str(n))]
    small = ("--steps", "2", "--denoise-steps", "2", "--judge-n", "20", "--image-size", "8")
    monkeypatch.setattr(folders.Mnist, "options", (*short, *small))
    arms = {"heads alone": {"gsim-iters": 2, "heads-iters": 2}}
    monkeypatch.setattr(MnistHeads, "arms", arms)
    make_idx(tmp_path / "mnist")

    with pytest.raises(InputError, match="measure the study mnist first"):
        run("mnistheads", "--seeds", "1")
    run("mnist", "mnistheads", "--seeds", "1")
    rows = records.read_result("mnistheads")["rows"]
    assert rows.keys() == {"teacher", "whole", "heads alone"}
    assert rows["heads alone"]["1"]["frechet"] != rows["whole"]["1"]["frechet"]
    out = tmp_path / "out" / "seed1" / "mnist"
    teacher = load_checkpoint(out / "teacher.pt", "teacher")
    students = [load_checkpoint(out / arm / "student.pt", "student") for arm in (".", *arms)]
    moved = [
        {name.split(".")[0] for name, w in student.named_parameters() if differs(w, teacher, name)}
        for student in students
    ]
    assert moved[1] == {"head"} < moved[0]
    assert not (out / "heads alone" / "teacher.pt").exists()  # it was given
    judges = [(out / arm / "judge.pt").read_bytes() for arm in (".", *arms)]
    assert judges[0] == judges[1]


def differs(weights, teacher, name):
    return not torch.equal(weights, teacher.get_parameter(name))


class Coins(Study):
    """A study that takes no time."""

    title, columns, tossed = "Coins", ("ms",), 0

    def rows(self, lab):
        return {name: partial(lab.result, name, self.toss) for name in ("penny", "pound")}

    def toss(self):
        self.tossed += 1
        return {"ms": float(self.tossed)}


def test_what_exists_is_not_measured_again_and_seeds_are_merged(monkeypatch, tmp_path):
    run, coins = cut_short(monkeypatch, tmp_path), Coins()
    monkeypatch.setitem(tables.STUDIES, "coins", coins)
    run("coins", "--seeds", "0")
    first = records.read_result("coins")["rows"]["penny"]["0"]
    run("coins", "--seeds", "1", "--only", "pen")
    run("coins", "--seeds", "0")
    assert coins.tossed == 3
    content = records.read_result("coins")
    assert content["rows"]["penny"].keys() == {"0", "1"}
    assert content["rows"]["pound"].keys() == {"0"}
    assert content["rows"]["penny"]["0"] == first != content["rows"]["penny"]["1"]
    assert content["command"] == "python -m workbench.studies coins --seeds 0,1"
    with pytest.raises(InputError, match="--only"):
        run("coins", "--only", "no such row")


def test_a_folder_of_other_settings_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(lab, "preset", tiny_preset)
    lab.Lab(tmp_path, 0, torch.device("cpu"))
    lab.Lab(tmp_path, 0, torch.device("cpu"))
    with pytest.raises(InputError, match="other settings"):
        lab.Lab(tmp_path, 0, torch.device("cpu"), judge_iters=6)


# Tables -------------------------------------------------------------------------------------------

ROWS = {
    "a": {"0": {"ms": 1.0}, "1": {"ms": 2.0}, "2": {"ms": 6.0}},
    "b": {"0": {"ms": 4.0}, "1": {"ms": 1.0}},
}


@pytest.mark.parametrize(
    "template, text",
    [
        ("{0[a][ms]} ms", "2.0 ms"),
        ("{0[b / a][ms]} times", "1.2 times"),
        ("lower on {0[a < b][ms]} seeds", "lower on 1 of 2 seeds"),
        ("higher on {0[b > a][ms]} seeds", "higher on 1 of 2 seeds"),
    ],
)
def test_figures_of_a_verdict_come_from_the_rows(template, text):
    assert template.format(tables.Figures(ROWS)) == text


def test_a_sentence_without_its_rows_is_left_out(monkeypatch):
    monkeypatch.setattr(Cost, "verdict", ("A is {0[a][ms]}.", "C is {0[c][ms]}."))
    assert tables.sentences(Cost.verdict, ROWS) == ["A is 2.0."]
    assert tables.cell(ROWS["a"], "ms") == "2.0 (1.0–6.0)"
    assert tables.cell({"0": {"ms": 1.01}, "1": {"ms": 1.02}}, "ms") == "1.0"


def test_the_number_of_seeds_is_a_column_where_rows_differ_in_it():
    assert tables.table(ROWS, ["ms"]).splitlines()[0] == "| | seeds | ms |"
    assert tables.table({"a": ROWS["a"]}, ["ms"]).splitlines()[0] == "| | ms |"


def test_results_md_is_what_the_committed_json_gives():
    text = (records.ASSETS / "results.md").read_text()
    assert text == tables.results_markdown(), "python -m workbench.studies renews it"


MEASURED = [name for name in tables.STUDIES if records.read_result(name)]


@pytest.mark.parametrize("name", MEASURED)
def test_every_sentence_is_said_of_the_committed_json(name):
    study, rows = tables.STUDIES[name], records.read_result(name)["rows"]
    said = " ".join(tables.sentences(study.verdict, rows))
    for sentence in study.verdict:
        assert sentence.format(tables.Figures(rows)) in said


@pytest.mark.parametrize("name", MEASURED)
def test_every_committed_json_says_where_it_comes_from(name):
    content = records.read_result(name)
    assert content.keys() == PROVENANCE | {"rows"}
    assert all(content[key] for key in PROVENANCE - {"settings"})
    assert content["study"] == name and name in content["command"]


def test_a_figure_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.as_lines({"rows": {"a": {"0": {"reward": float("nan")}}}})


# Arms of the studies ------------------------------------------------------------------------------


def brightness(images, labels):
    return images.mean((1, 2, 3)) / 2 + 0.5


def test_equal_numbers_counts_as_many_tokens_but_of_any_step(student, monkeypatch):
    settings = tiny(rl_steps="critical", critical_steps=2, learn_steps=False, steps=8)
    training = EqualNumbers(student, settings, brightness, torch.zeros(1, 16, 12))
    given, counted = [], []

    def note(self, rollouts, A, tokens):
        counted.append(tokens)
        return {}

    def note_given(self, rollouts, A, tokens):
        given.append(tokens)
        return own_update(self, rollouts, A, tokens)

    own_update = EqualNumbers.noise_update
    monkeypatch.setattr(PolicyGradient, "noise_update", note)
    monkeypatch.setattr(EqualNumbers, "noise_update", note_given)
    training.update(0, torch.tensor([0, 1, 2, 0]), seed=0)
    assert torch.equal(given[0].sum(1), counted[0].sum(1))
    assert not torch.equal(given[0], counted[0])


def test_behind_a_frozen_head_the_transformer_learns(student):
    settings = tiny(action="x", rl_steps="all", learn_steps=False, steps=4)
    training = HeadFrozen(student, settings, brightness, torch.zeros(1, 16, 12))
    training.update(0, torch.tensor([0, 1, 2, 0]), seed=0)
    before = dict(training.reference.named_parameters())
    for name, weights in training.model.named_parameters():
        is_frozen = name.startswith("head.")
        assert torch.equal(weights, before[name]) == is_frozen or name == "fake_latent", name


def test_uncertain_tokens_are_those_whose_predictions_vary_most_with_z(student, monkeypatch):
    counted = []

    def note(self, rollouts, A, tokens):
        counted.append((rollouts.trace.contexts[..., 0].abs(), tokens))
        return {}

    monkeypatch.setattr(action, "one_step", lambda head, z, c, noise_ratio: c[:, :1] * z)
    monkeypatch.setattr(PolicyGradient, "generator_update", note)
    settings = tiny(action="x", rl_steps="all", learn_steps=False, steps=4)
    training = Uncertain(student, settings, brightness, torch.zeros(1, 16, 12))
    training.update(0, torch.tensor([0, 1, 2, 0]), seed=0)
    ((factor, tokens),) = counted
    assert (tokens.sum(1) == 5).all()  # of 16
    is_among_five = factor >= factor.topk(5, 1).values[:, -1:]
    assert torch.equal(tokens, is_among_five)


def test_branches_differ_in_the_optimised_tokens_alone(student, monkeypatch):
    """From the image that told which these are; every token of theirs counts."""
    seen = []

    def watched(*args, **kwargs):
        seen.append(branched_rollout(*args, **kwargs))
        return seen[-1]

    def note(self, rollouts, A, counted):
        seen.append(counted)
        return {}

    monkeypatch.setattr(credit, "branched_rollout", watched)
    monkeypatch.setattr(PolicyGradient, "noise_update", note)
    settings = tiny(rl_steps="critical", critical_steps=2, learn_steps=False, steps=8)
    training = Branching(student, settings, brightness, torch.zeros(1, 16, 12))
    labels = torch.tensor([0, 1, 2, 0])
    training.update(0, labels, seed=0)
    rollouts, counted = seen
    z = rollouts.trace.z.view(4, -1, 16, 12)
    varies = (z != z[:, :1]).any(3).any(1).repeat_interleave(z.shape[1], 0)
    assert torch.equal(varies, counted)
    assert 0 < counted.float().mean() < 1
    _, trace = training.one_image_each(labels, (0, "rollout", 0))
    assert torch.equal(trace.order, rollouts.trace.order.view(4, -1, 16)[:, 0])
    shared = ~counted.view(4, -1, 16)[:, 0]
    assert torch.equal(trace.z[shared], z[:, 0][shared])


def test_a_window_moves_from_the_first_step_to_the_last(student, monkeypatch):
    counted = []

    def note(self, rollouts, A, tokens):
        counted.append(rollouts.trace.masks()[1] & tokens[:, None])
        return {}

    monkeypatch.setattr(PolicyGradient, "noise_update", note)
    settings = tiny(rl_iters=8, rl_steps="all", learn_steps=False, steps=4)
    training = Window(student, settings, brightness, torch.zeros(1, 16, 12))
    for step in range(8):
        training.update(step, torch.tensor([0, 1]), seed=0)
    steps = [tokens.any(2).all(0).nonzero().flatten().tolist() for tokens in counted]
    assert steps == [[0], [0], [1], [1], [2], [2], [3], [3]]


def test_given_counts_are_what_a_generation_reveals(policy):
    counts = torch.tensor([[1, 7, 8], [4, 12, 0]])
    policy.schedule = GivenCounts(counts)
    _, trace = generate(policy, [0, 1], trace=True)
    assert torch.equal(trace.counts, counts)


def test_shuffled_images_differ_from_the_learned_ones_by_their_counts_alone(policy, monkeypatch):
    """With its own counts each image is the same, in order, z and temperature."""
    study, labels = Schedule(), torch.tensor([0, 1, 0, 1])
    here = SimpleNamespace(policy=policy, seed=0, settings=policy.settings)
    here.judge = SimpleNamespace(labels=labels)
    monkeypatch.setattr(schedule, "partners", lambda labels, generator: torch.arange(len(labels)))
    monkeypatch.setattr(Schedule, "figures", lambda self, lab, images, steps: (images, steps))
    learned = study.fixed(here, policy, Sampling())
    for a, b in zip(study.shuffled(here), learned):
        assert torch.equal(a, b)


class Choices(Schedule):
    """Of two vectors with known rewards: the first one's are higher, by 0.2 on average and by
    `gain` times the first number that is seen, a normal one."""

    seen_images = 3000

    def __init__(self, gain, noise, width=5):
        generator = rng("choices")
        self.state = torch.randn(3000, width, generator=generator)
        first = 0.2 + gain * self.state[:, 0]
        noise = noise * torch.randn(3000, 2, generator=generator)
        self.reward = torch.stack([first, torch.zeros(3000)], 1) + noise

    def best_vector(self, lab):
        return 1, 2, 13

    def highest(self, lab, vectors, n, keep):
        return [0, 1]

    def rewards(self, lab, vector, labels, name):
        return self.reward[:, vector]

    def seen(self, lab, first, labels, name):
        return self.state, self.state[:, 1:]  # in the second it does not show

    def margins(self):
        stand_in = SimpleNamespace(evenly=torch.arange, settings=SimpleNamespace(length=16), seed=0)
        rows = self.choices(stand_in)
        return [rows[n]["margin"] for n in ("hindsight", "foreseen", "foreseen, all contexts")]


def test_what_is_foreseen_is_what_the_state_tells_and_no_noise():
    """With g normal, to know it is worth E max(0.2 + g, 0) - 0.2 = 0.307."""
    assert Choices(gain=1.0, noise=0.0).margins() == pytest.approx([0.307, 0.307, 0], abs=0.03)
    hindsight, *foreseen = Choices(gain=1.0, noise=1.0).margins()
    assert foreseen == pytest.approx([0.307, 0], abs=0.06)
    assert hindsight > 0.6  # it knows the noise, too
    hindsight, *foreseen = Choices(gain=0.0, noise=0.5, width=800).margins()
    assert max(foreseen) < 0.01 and hindsight > 0.1  # what is learned is tested on other images


def test_what_is_seen_is_what_a_schedule_sees(policy):
    """After the first two iterations, on the same noise."""
    states = []

    class Watched(GivenCounts):
        def select(self, state, generator=None):
            states.append(state)
            return super().select(state, generator)

    settings, labels = policy.settings, torch.tensor([0, 1, 2])
    stand_in = SimpleNamespace(policy=policy, settings=settings, seed=0)
    state, contexts = Schedule().seen(stand_in, (1, 2), labels, "seen")
    policy.schedule = Watched(torch.tensor([[1, 2, 13]] * 3))
    generate(policy, labels, seed=("seen", 0, 0))
    torch.testing.assert_close(state, states[2])
    assert contexts.shape == (3, 16 * settings.width)


def test_ascending_counts_sum_to_the_tokens_and_do_not_decrease():
    found = ascending(6, (2, 3))
    assert sorted(found) == [(1, 1, 4), (1, 2, 3), (1, 5), (2, 2, 2), (2, 4), (3, 3)]


def test_a_small_checkpoint_makes_nearly_the_same_images(student, tmp_path):
    write_checkpoint(tmp_path / "student.pt", student)
    size = make_checkpoints.shrink(tmp_path / "student.pt", tmp_path / "small.pt")
    assert size == (tmp_path / "small.pt").stat().st_size
    assert size < 0.6 * (tmp_path / "student.pt").stat().st_size
    small = load_checkpoint(tmp_path / "small.pt", "student")
    torch.testing.assert_close(
        generate(small, [0, 1]), generate(student, [0, 1]), atol=0.1, rtol=0.1
    )


# Budget -------------------------------------------------------------------------------------------


def test_small_fits_24_GB_and_ends_overnight():
    computed = budget.Budget(preset("small"))
    assert all(peak < 24e9 for peak in computed.peak().values())
    assert 3 < sum(computed.hours().values()) < 10


@pytest.mark.parametrize("name, gigabytes", [("mar_b", 24), ("mar_l", 80)])
def test_released_sizes_are_distilled_and_rewarded_in_the_memory_promised(name, gigabytes):
    settings = preset(name, steps=64)
    assert settings.checkpointing
    peak = budget.ReleasedBudget(settings).peak()
    assert max(peak["GSIM"], peak["RL"]) < 0.85 * gigabytes * 1e9  # the rest is not counted


def test_networks_are_counted_with_their_gradients_optimisers_and_averages():
    computed = budget.Budget(tiny())
    computed.parameters = 10
    assert computed.weights() == {"teacher": 200, "GSIM": 40 + 240 + 160, "RL": 280}


def test_checkpointing_and_parts_of_the_batch_need_less():
    plain, checkpointed, halved = (
        budget.Budget(tiny(depth=4, batch=8, **how)).activations()
        for how in (
            {"micro_batch": 8},
            {"micro_batch": 8, "checkpointing": True},
            {"micro_batch": 4},
        )
    )
    assert checkpointed["GSIM"] < plain["GSIM"]
    assert 2 * halved["GSIM"] == pytest.approx(plain["GSIM"], rel=1e-6)


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_the_budget_of_activations_is_what_an_update_keeps(precision):
    """It is a bound: all tokens visible to the encoder and all denoised, where here half are."""
    no_null_class = {"label_dropout": 0.0, "guidance": 1.0}
    settings = tiny(precision=precision, depth=4, head_depth=4, micro_batch=8, **no_null_class)
    training = TeacherTraining(settings, ["a", "b", "c"])
    set_precision(training.model, precision)
    weights = {p.untyped_storage()._cdata for p in training.model.parameters()}
    kept = budget.SavedBytes()
    x, labels = torch.randn(8, 16, 12), torch.arange(8) % 3
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        training.update(0, x, labels, seed=0)
    measured = sum(size for key, size in kept.sizes.items() if key not in weights)
    bound = budget.Budget(settings).activations()["teacher"]
    assert 0.6 * bound < measured < bound


def test_hours_follow_from_the_products_of_matrices():
    settings = preset("mar_b", precision="bf16")
    computed, rows, W = budget.ReleasedBudget(settings), 64 + 256, settings.width
    block = rows * 2 * 12 * W**2 + 2 * 2 * rows**2 * W  # projections and MLP, attention
    context = 24 * block / (0.3 * 312e12) / 3600
    assert computed.hours_of(1000, 0) == pytest.approx(1000 * context, rel=1e-6)


def test_heads_alone_take_less_time_and_memory():
    settings = preset("mar_b", precision="bf16", steps=64)
    whole, alone = (
        budget.ReleasedBudget(replace(settings, heads_iters=n)) for n in (0, settings.gsim_iters)
    )
    contexts = 2 * (1 + 3) + 2 + 2  # of an image, with checkpointing; heads alone share two
    images, _ = whole.passes()["GSIM"]
    assert images == contexts * settings.batch
    assert alone.passes()["GSIM, heads alone"][0] == 2 * settings.batch
    assert alone.hours()["GSIM"] < whole.hours()["GSIM"] / 2
    saved = 24 * (whole.parameters - whole.head_parameters)  # gradients, and two states of Adam
    assert whole.weights()["GSIM"] - alone.weights()["GSIM"] == saved


def test_launches_are_those_of_every_block_and_of_every_part_of_a_batch():
    """Memory, too, grows with the depth; a wider model has more bytes and no more launches."""
    gpu_time.launches_of_iteration(tiny(batch=8, steps=4))  # which makes tables
    of_depths = [gpu_time.launches_of_iteration(tiny(depth=n, batch=8, steps=4)) for n in (1, 2, 3)]
    first, second = of_depths[1] - of_depths[0], of_depths[2] - of_depths[1]  # of two blocks
    assert second == pytest.approx(first, abs=4) and first > 15
    in_parts = [
        gpu_time.launches_of_update("teacher", tiny(batch=8, micro_batch=n)) for n in (8, 4, 2)
    ]
    assert in_parts[2] - in_parts[1] == pytest.approx(2 * (in_parts[1] - in_parts[0]), rel=0.2)
    wide, more = (gpu_time.moved_by_block(width, 2, 20, "fp32") for width in (32, 64))
    assert 1.5 * wide < more < 2.1 * wide


def test_a_block_of_linear_layers_moves_what_it_reads_and_writes():
    layer = torch.nn.Linear(10, 6)
    assert gpu_time.moved_by_row(layer, torch.randn(1, 10)) == 4 * (10 + 6)
