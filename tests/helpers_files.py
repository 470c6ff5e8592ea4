"""Damage to the bytes of a file, and checkpoints in which one value is something else."""

import math
from copy import deepcopy

import torch


def flipped(data, dice):
    i = dice.randrange(len(data))
    return data[:i] + bytes([data[i] ^ 1 << dice.randrange(8)]) + data[i + 1 :]


def overwritten(data, dice):
    i, n = dice.randrange(len(data)), dice.choice([1, 4, 100, 4000])
    return data[:i] + dice.randbytes(len(data[i : i + n])) + data[i + n :]


def cut(data, dice):
    return data[: dice.choice([0, 1, 100, dice.randrange(len(data))])]


def with_a_gap(data, dice):
    i = dice.randrange(len(data))
    return data[:i] + data[i + dice.choice([1, 64, 1000]) :]


def stretched(data, dice):
    i = dice.randrange(len(data))
    return data[:i] + dice.randbytes(dice.choice([1, 64, 1000])) + data[i:]


DAMAGE = (flipped, overwritten, cut, with_a_gap, stretched)  # of (bytes, random.Random)

NUMBERS = (True, -1, 0, 3, 10**6, 2**63, 10**30, 0.5, math.nan, math.inf, -1e30)
CONTAINERS = ([], [1], {}, {"a": 1}, (), {3: 4}, ["a"] * 3)
TENSORS = (
    torch.zeros(()),
    torch.zeros(0),
    torch.zeros(3, 32),
    torch.full((2, 2), math.nan),
    torch.zeros(1).expand(2**20, 2**20),
    torch.zeros(2, 2, dtype=torch.int64),
    torch.zeros(2, 2).to_sparse(),
    torch.zeros(2).bool(),
)
VALUES = (None, *NUMBERS, "", "x", "\udcff", *CONTAINERS, *TENSORS)


def paths_in(value, path=()):
    """Paths to everything in nested dictionaries and lists."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from paths_in(value[key], (*path, key))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from paths_in(v, (*path, i))


def changed(content, dice):
    """A copy of the content with one value replaced, deleted or added; and which one."""
    content = deepcopy(content)
    *above, last = dice.choice([path for path in paths_in(content) if path])
    holder = content
    for key in above:
        holder = holder[key]
    action = dice.choice(["replace", "replace", "replace", "delete", "add"])
    if action == "delete":
        del holder[last]
    elif action == "add" and isinstance(holder, dict):
        holder[dice.choice(["x", 3, "schedule.counts", "training"])] = dice.choice(VALUES)
    else:
        holder[last] = dice.choice(VALUES)
    return content, (action, *above, last)
