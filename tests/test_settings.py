"""Settings: limits, presets, and what the help says about them."""

import math
from dataclasses import asdict, fields

import pytest
from conftest import tiny

import maskrl
from workbench.errors import InputError
from workbench.settings import (
    LIMITS,
    MEMORY_SETTINGS,
    PRESETS,
    RELEASED,
    STUDENT_SETTINGS,
    RunSettings,
    documented_fields,
    flag,
    preset,
)

FIELDS = fields(RunSettings)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_setting_of_the_wrong_type_is_refused_by_its_option(field):
    wrong = {int: ["8", 8.0, True, None], float: ["0.1", True, None], bool: [1, "yes"], str: [3]}
    for value in wrong[field.type]:
        with pytest.raises(InputError, match=rf"^{flag(field.name)} .* must be of type"):
            tiny(**{field.name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [field.name for field in FIELDS if field.type is float])
def test_no_setting_may_be_infinite_or_nan(name, value):
    with pytest.raises(InputError, match=rf"^{flag(name)} .* must be a finite number"):
        tiny(**{name: value})


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("image_size", 0, "--image-size 0 must be at least 2"),
        ("image_size", 1, "--image-size 1 must be at least 2"),  # a traceback in the judge, once
        ("image_size", 9, "--image-size 9 must be a multiple of --patch 2"),
        ("per_class", 19, "--per-class 19 must be at least 20"),
        ("width", 30, "--width 30 must be a multiple of 4"),
        ("heads", 3, "of --heads 3"),
        ("steps", 17, r"--steps 17 must lie in 1\.\.\.16"),
        ("steps", 0, "--steps 0 must be at least 1"),
        ("denoise_steps", 1, "--denoise-steps 1 must be at least 2"),
        ("denoise_steps", 1001, "--denoise-steps 1001 must be at most 1000"),
        ("guidance", -0.1, "--guidance -0.1 must be at least 0"),
        ("teacher_lr", 0.0, "--teacher-lr 0.0 must be above 0"),
        ("label_dropout", 1.0, "--label-dropout 1.0 must be below 1"),
        ("label_dropout", -0.1, "--label-dropout -0.1 must be at least 0"),
        ("ema", 1, "--ema 1 must be below 1"),
        ("noise_ratio", 1e4, "--noise-ratio 10000.0 must be below"),
        ("group", 1, "--group 1 must be at least 2"),
        ("explore", 0, "--explore 0 must be above 0"),
        ("judge_n", 1, "--judge-n 1 must be at least 2"),
        ("method", "ppo", "--method ppo must be one of grpo, backprop"),
        ("predicts", "v", "--predicts v must be one of x_0, eps"),
        ("precision", "fp16", "--precision fp16 must be one of fp32, tf32, bf16"),
        ("rl_steps", "foo", "--rl-steps foo must be one of critical, random, first, all"),
        ("order", "up", "--order up must be one of random, halton"),
        ("action", "y", "--action y must be one of z, x"),
    ],
)
def test_a_setting_outside_its_limits_is_refused_by_its_option(name, value, said):
    with pytest.raises(InputError, match=said):
        tiny(**{name: value})


@pytest.mark.parametrize("guidance", [0.0, 0.9, 1.2, 3])
def test_guidance_needs_a_null_class_that_is_trained(guidance):
    """It once ran on random weights."""
    expected = f"--guidance {guidance:g} needs the null class, which --label-dropout 0"
    with pytest.raises(InputError, match=expected):
        tiny(label_dropout=0.0, guidance=guidance)
    with pytest.raises(InputError, match="--guidance 1.2 needs the null class"):
        tiny(label_dropout=0)
    assert tiny(label_dropout=0.0, guidance=1).label_dropout == 0
    assert tiny(label_dropout=0.01, guidance=guidance).guidance == guidance


def test_every_setting_but_a_switch_has_limits():
    assert set(LIMITS) == {field.name for field in FIELDS if field.type is not bool}


def test_presets_are_sound_and_single_fields_can_be_replaced():
    assert preset("tiny") == RunSettings()
    assert preset("small").length == 256
    assert preset("small", guidance=2, steps=8).steps == 8  # a whole number is a float, too
    assert all(preset(name).length == 256 for name in RELEASED)
    assert set(RELEASED) < set(PRESETS)
    with pytest.raises(InputError, match="no preset 'huge'; there are tiny, folder, small"):
        preset("huge")


def test_a_run_has_the_settings_of_the_methods_with_their_defaults():
    """All but the scale, which a run measures."""
    methods, run = asdict(maskrl.Settings()), asdict(RunSettings())
    assert run.pop("scale") == 0 and methods.pop("scale") == 1
    assert methods.items() <= run.items()
    assert isinstance(RunSettings(), maskrl.Settings)


def test_names_of_settings_are_those_of_fields():
    names = {field.name for field in FIELDS}
    assert {*STUDENT_SETTINGS, *MEMORY_SETTINGS} < names
    assert all(given.keys() <= names for given in PRESETS.values())


def test_every_setting_has_a_comment_which_is_its_help():
    texts = {name: comment for name, (_, comment) in documented_fields().items()}
    assert set(texts) == {field.name for field in FIELDS}
    assert texts["judge_n"] == "images for each row of the judge's table"
    assert texts["scale"] == "0: scale and mean are measured on the training images"
    assert all(len(text) > 3 for text in texts.values())


def test_settings_are_grouped_by_the_headings_in_the_source():
    sections = {name: section for name, (section, _) in documented_fields().items()}
    assert sections["width"] == "model" and sections["seed"] == "data"
    assert sections["batch"] == sections["teacher_iters"] == "training the teacher"
    assert sections["method"] == sections["rl_iters"] == "RL"
    assert len(set(sections.values())) == 9
