"""Several processes: `torchrun --nproc_per_node=N train_rl.py ...` trains on N GPUs.

All processes run the same program on the same whole batch, with the same random numbers, and hold
the same weights. Only two calls, which are nearly all of the work, are divided: in `MAR.context`
and `Head.network` each process computes 1 / N of the rows, and then all of them gather all rows. So
every other line (losses, groups, advantages, judges) sees the batch as if there were one process,
and the results agree up to rounding for any N.
"""

import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partialmethod, wraps

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from maskrl import MAR, Head

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets


def rank() -> int:
    """The number of this process; 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def several_processes() -> bool:
    """Whether torchrun started this process and others. A cluster sets some of its variables."""
    return all(os.environ.get(name) for name in TORCHRUN) and os.environ["WORLD_SIZE"] != "1"


def join_processes(device: torch.device) -> torch.device:
    """The device of this process, if torchrun started several; else `device`."""
    if not several_processes() or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    MAR.context, Head.network = divided(MAR.context), divided(Head.network)
    if rank():  # one of them speaks for all
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    return device


def divided(method: Callable) -> Callable:
    """A method whose first tensor has a row for each of B things, as its output has: every process
    computes some of the rows, from those rows of every tensor that has B."""
    signature = inspect.signature(method)

    @wraps(method)
    def call(self, *args, **kwargs):
        inputs = signature.bind(self, *args, **kwargs).args[1:]
        B, N = len(inputs[0]), dist.get_world_size()
        if B == 0:
            return method(self, *inputs)
        n = math.ceil(B / N)
        rows = (torch.arange(n, device=inputs[0].device) + n * rank()) % B  # some twice
        own_rows = (
            hooked(x, mean_over_processes)[rows] if torch.is_tensor(x) and len(x) == B else x
            for x in inputs
        )
        own = method(self, *own_rows)
        parts = [torch.empty_like(own) for _ in range(N)]
        dist.all_gather(parts, own.detach())
        parts[rank()] = hooked(own, times_processes)
        return torch.cat(parts)[:B]

    return call


def hooked(x: Tensor, hook: Callable) -> Tensor:
    """x, whose gradient passes through `hook` on its way back."""
    x = x.view_as(x)  # so that other uses of x do not
    if x.requires_grad:
        x.register_hook(hook)
    return x


def times_processes(gradient: Tensor) -> Tensor:
    """So that the mean over the processes, each of which has its rows', is the whole gradient."""
    return gradient * dist.get_world_size()


def mean_over_processes(x: Tensor) -> Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


@contextmanager
def average_gradients(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Meanwhile every gradient of the networks' weights is the mean over all processes."""
    weights = [p for network in networks for p in network.parameters() if p.requires_grad]
    several = dist.is_initialized()
    handles = [p.register_post_accumulate_grad_hook(average) for p in weights if several]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def average(p: nn.Parameter) -> None:
    p.grad = mean_over_processes(p.grad)


def agreed(number: float, device) -> float:
    """The largest `number` of all processes."""
    if not dist.is_initialized():
        return number
    largest = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return type(number)(largest)


def of_first_process(x: Tensor) -> Tensor:
    """x as process 0 has it: on several GPUs the same network need not give the same numbers."""
    if dist.is_initialized():
        x = x.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(x, 0)
    return x


@torch.no_grad()
def share_weights(network: nn.Module) -> None:
    """Give all processes the weights of process 0."""
    for value in network.state_dict().values():
        value.copy_(of_first_process(value))


def is_lost_process(error: Exception) -> bool:
    """Whether another process ended, or did not answer in time."""
    named = any(name in str(error) for name in ("gloo", "NCCL", "Connection"))
    return dist.is_initialized() and (isinstance(error, dist.DistError) or named)


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
