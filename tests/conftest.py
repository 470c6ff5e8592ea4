import pytest
import torch

import maskrl


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def tiny(**overrides):
    """Settings of a model small enough for a test: 16 tokens of 12 channels unless told otherwise."""
    small = dict(image_size=8, patch=2, width=32, depth=1, heads=2, buffer=2, head_width=32, head_depth=1, scale=2.0,
                 per_class=30, judge_n=36, judge_iters=5, batch=8, gsim_batch=8, teacher_iters=6, gsim_iters=4, rl_iters=2,
                 prompts=2, group=4, denoise_steps=5)
    return maskrl.Settings(**{**small, **overrides})


@pytest.fixture
def settings():
    return tiny


@pytest.fixture
def model():
    """A random MAR whose output is not zero."""
    model = maskrl.MAR(tiny(), ["a", "b", "c"])
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()
