"""What the tests of quality_net, judge, monitors, rewards and pretrained share."""

import os
from functools import cache

import open_clip
import torch
from conftest import tiny

import maskrl
from workbench.data import Data, load_data
from workbench.quality_net import QualityNet, train_quality_net

SMALL_CLIP = "ViT-S-32-alt"  # for what does not depend on the model; a random ViT-B-32 takes longer


@cache
def shapes() -> Data:
    """Shapes of 8 x 8 pixels."""
    return load_data(tiny())


@cache
def reward_net() -> QualityNet:
    """A reward network that was trained for a moment."""
    return train_quality_net("reward", shapes().train, tiny(), "cpu")


def random_clip(name, path, **keys):
    """A CLIP with random weights, and these in a file, in half precision, as it loads faster."""
    clip = open_clip.create_model(name).eval().half()
    weights = clip.state_dict()
    torch.save({**keys, "state_dict": weights} if keys else weights, path)
    return clip.float()


def blocks_of_colour(n, size=16):
    """uint8 [n, 3, size, size]: resizing has edges and flat areas to get right."""
    coarse = torch.randint(256, (n, 3, 4, 4), generator=maskrl.rng("pictures")).to(torch.uint8)
    return coarse.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3)


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Refused:
    """A function of images and labels, or of images, that raises an error."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *inputs, **keywords):
        raise self.error


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
]
