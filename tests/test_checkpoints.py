"""Statements about section 11 of maskrl.py: files that carry their own settings."""

import os
import pickle
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import SMALL, random_model

import maskrl
from maskrl import Settings, add_noise_policy, add_schedule, generate

TUTORIAL = Path(maskrl.__file__).parent / "assets" / "tutorial"


@pytest.fixture
def trained_policy():
    """A policy whose policies are not as they start."""
    policy = random_model("policy")
    add_noise_policy(policy)
    add_schedule(policy)
    for network in (policy.noise_policy, policy.schedule):
        torch.nn.init.normal_(network.net[-1].weight)
    return policy


def test_a_loaded_policy_generates_what_was_saved(trained_policy, tmp_path):
    maskrl.save(tmp_path / "policy.pt", trained_policy)
    again = maskrl.load(tmp_path / "policy.pt")
    assert (again.kind, again.classes) == ("policy", ["a", "b", "c"])
    assert type(again.settings) is Settings
    known = asdict(again.settings)
    assert known == {k: v for k, v in asdict(trained_policy.settings).items() if k in known}
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(generate(again, [0, 1, 2]), generate(trained_policy, [0, 1, 2]))


@pytest.mark.parametrize("kind, channels", [("teacher", 3), ("student", 16)])
def test_a_file_of_plain_settings_needs_no_more_than_maskrl(kind, channels, tmp_path):
    """Also for latents, whose channels follow from the weights."""
    known = asdict(Settings())
    settings = Settings(**{k: v for k, v in SMALL.items() if k in known})
    model = maskrl.MAR(settings, ["a", "b"], kind, channels)
    torch.nn.init.normal_(model.head.final_layer.linear.weight)  # or all tokens would be zero
    maskrl.save(tmp_path / "model.pt", model)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["settings"].keys() == known.keys()
    again = maskrl.load(tmp_path / "model.pt")
    assert again.settings == settings
    assert again.channels == 4 * channels
    assert torch.equal(generate(again, [0, 1, 2]), generate(model, [0, 1, 2]))


def test_what_a_checkpoint_is_used_for_are_its_averaged_weights(model):
    ema = deepcopy(model)
    torch.nn.init.ones_(ema.mask_token)
    content = maskrl.checkpoint(model, ema)
    assert torch.equal(content["model"]["mask_token"], model.mask_token)
    assert (maskrl.from_checkpoint(content).mask_token == 1).all()


@pytest.mark.parametrize("kind", ["teacher", "student", "policy"])
def test_the_checkpoints_of_the_tutorial_still_load(kind):
    """They were written by an earlier version, with settings that there no longer are."""
    model = maskrl.load(TUTORIAL / f"{kind}.pt")
    assert model.kind == kind
    with torch.no_grad():
        sampling = maskrl.Sampling(steps=2, denoise_steps=2 if kind == "teacher" else None)
        assert generate(model, [0], sampling).isfinite().all()


class MakesAFolder:
    """What it does when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_reading_a_checkpoint_runs_no_code_in_it(student, tmp_path):
    content = maskrl.checkpoint(student) | {"training": MakesAFolder(tmp_path / "hacked")}
    torch.save(content, tmp_path / "student.pt")
    with pytest.raises(pickle.UnpicklingError):
        maskrl.load(tmp_path / "student.pt")
    assert not (tmp_path / "hacked").exists()
