"""What CUDA GPUs there are, and what an older one cannot do."""

import os
from functools import cache

import torch

from workbench.errors import InputError


def check_processes(device: torch.device) -> None:
    """InputError if torchrun started processes that have no CUDA GPU of their own here, before
    they wait for each other."""
    size, number = (os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"))
    here = max(int(size) if size.isdecimal() else 1, int(number) + 1 if number.isdecimal() else 1)
    if here == 1 or device.type == "cpu":
        return
    if device.type != "cuda":
        raise InputError(f"--device {device}: {here} processes need CUDA GPUs, or --device cpu")
    gpus = torch.cuda.device_count()
    if here > gpus:
        raise InputError(f"processes here: {here}, GPUs: {gpus}; take --nproc_per_node={gpus}")


def possible_precision(precision: str, device: torch.device) -> str:
    """fp32 in place of bf16, and that is said once, on a GPU that only emulates bfloat16."""
    return "fp32" if precision == "bf16" and emulates_bfloat16(device) else precision


@cache
def emulates_bfloat16(device: torch.device) -> bool:
    """Whether it is a CUDA GPU older than Ampere, such as a T4."""
    emulates = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    if emulates:
        print(f"{device} only emulates bfloat16, slowly: --precision fp32 takes its place")
    return emulates
