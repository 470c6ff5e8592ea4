"""A pretend CUDA GPU, for tests on a machine without one.

    with pretend_gpu() as gpu:
        train_rl.main(["--device", "cuda", ...])
    gpu.waits  # {(what, "maskrl.py:567 context"): how often the host waited for the GPU there}
    gpu.launches  # {operator: how often it was launched}

Its tensors, `OnGpu`, say that they are on cuda:0, and hold a tensor of the CPU. They are seen by
every operator below autograd and autocast, so that backward passes, fused optimisers and the
insides of composite functions count, and CUDA's own rules of autocast hold. An operator must obey
CUDA's rules: operands of two devices, a generator of the other one, and numpy are refused as a GPU
refuses them. Not shown: kernels and their rounding, memory, speed, and streams."""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ROOT = str(Path(__file__).parent.parent) + "/"
OURS = tuple(ROOT + name for name in ("maskrl.py", "train_", "sample.py", "workbench/"))
HostGenerator = torch.Generator

# Operators whose result has a shape or is a number that the host must know: it waits for the GPU
WAITS = {
    aten._local_scalar_dense,  # item, tolist of one number, bool, int, float
    *(aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.multinomial),
}
# Operators that may have operands of two devices, beside the numbers of pointwise ones
MOVES = {aten._to_copy, aten.copy_, aten._copy_from, aten._foreach_copy_}
TAKES_NUMBERS = {aten.where, aten.masked_fill, aten.masked_fill_, aten.index_put, aten.index_put_}
NO_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}
NO_KERNEL |= {aten.new_empty_strided, aten._unsafe_view, aten.detach, aten._local_scalar_dense}
NO_KERNEL |= {aten._fused_sdp_choice, aten._to_copy, aten.lift_fresh, aten.resize_}


class OnGpu(Tensor):
    """host: the tensor of the CPU that has the numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        return Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=GPU,
        )

    def __init__(self, host):
        self.host = host

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Gpu.now.run(func, args, kwargs or {})

    def __tensor_flatten__(self):  # with it, Module.to puts tensors of this class into parameters
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OnGpu(inner["host"])

    def __repr__(self, **_):
        return f"OnGpu({self.host})"

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = OnGpu(self.host.clone()).requires_grad_(self.requires_grad)
            memo[id(self)] = copy
            if hasattr(self, "_is_param"):
                copy._is_param = True
        return memo[id(self)]

    def __reduce_ex__(self, protocol):  # in a file it is a tensor as any other
        return self.host.detach().__reduce_ex__(protocol)


class GpuGenerator(HostGenerator):
    device = GPU


class AnyGenerator(HostGenerator):
    """torch.Generator, which makes those of the GPU, too."""

    def __new__(cls, device="cpu"):
        return GpuGenerator() if on_gpu(device) else HostGenerator(device)


def on_gpu(x) -> bool:
    named = isinstance(x, (str, torch.device)) and torch.device(x).type == "cuda"
    return named or isinstance(x, (OnGpu, GpuGenerator))


def leaves(x) -> list:
    """The tensors in the arguments of an operator."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        x = x.values()
    elif not isinstance(x, (list, tuple)):
        return []
    return [tensor for part in x for tensor in leaves(part)]


def on_host(x):
    """Arguments of an operator, as the CPU gets them."""
    if isinstance(x, OnGpu):
        return x.host
    if isinstance(x, torch.device):
        return CPU
    if isinstance(x, (list, tuple)):
        return [on_host(part) for part in x]
    return x


def wrapped(x):
    """What an operator of the CPU returned, on the GPU."""
    if isinstance(x, Tensor):
        return x if isinstance(x, OnGpu) else OnGpu(x)
    if isinstance(x, (list, tuple)):
        return type(x)(map(wrapped, x))
    return x


def refuse(func, why):
    raise RuntimeError(f"{func}: expected all tensors on one device, {why}")


class Gpu(TorchDispatchMode):
    now = None

    def __init__(self):
        super().__init__()
        self.waits, self.launches = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def count(self, what):
        """A wait of the host, at the line of ours that asked for it."""
        frame = sys._getframe(2)
        while frame and not frame.f_code.co_filename.startswith(OURS):
            frame = frame.f_back
        place = "elsewhere"
        if frame:
            file = frame.f_code.co_filename.removeprefix(ROOT)
            place = f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        self.waits[what, place] += 1

    def run(self, func, args, kwargs):
        tensors, op = leaves(args) + leaves(kwargs), func.overloadpacket
        there = any(isinstance(x, OnGpu) for x in tensors)
        target = there if kwargs.get("device") is None else on_gpu(kwargs["device"])
        if not (there or target):
            return func(*args, **kwargs)
        self.check(func, op, args, kwargs, tensors, target)
        if target and not func.is_view and op not in NO_KERNEL:
            self.launches[str(op).removeprefix("aten.")] += 1
        on_cpu = ON_CPU.get(op, func)
        out = on_cpu(*map(on_host, args), **{k: on_host(v) for k, v in kwargs.items()})
        if func._schema.is_mutable and func._schema.name.endswith("_"):
            return args[0]
        if op == aten._to_copy and out is args[0]:
            out = out.clone()
        return wrapped(out) if target else out

    def check(self, func, op, args, kwargs, tensors, target):
        """Raise what CUDA raises, and count what waits for it."""
        generator = kwargs.get("generator")
        if generator is not None and on_gpu(generator) != target:
            refuse(func, "and the generator's is another")
        if op in WAITS:
            self.count(func._schema.name.removeprefix("aten::"))
        if op in MOVES:
            source = tensors[-1]
            if on_gpu(source) != target:
                self.count("copy to the GPU" if target else "copy from the GPU")
            return
        if op in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            tensors = self.check_index(func, *args[:3])
        numbers = torch.Tag.pointwise in func.tags or op in TAKES_NUMBERS
        for i, x in enumerate(tensors):
            written = i == 0 and func._schema.is_mutable
            if not isinstance(x, OnGpu) and (x.ndim or written or not numbers):
                refuse(func, "found cpu and cuda:0")

    def check_index(self, func, own, indices, value=None):
        """The operands that must be on one device: an index may come from the CPU."""
        for x in indices:
            if on_gpu(x) and not on_gpu(own):
                refuse(func, "found indices on cuda:0 of a tensor on cpu")
            if isinstance(x, Tensor) and on_gpu(own) and not on_gpu(x):
                self.count("copy to the GPU")
            elif isinstance(x, Tensor) and x.dtype == torch.bool:
                self.count("mask as index")
        return [own] if value is None else [own, value]


def attention(q, k, v, bias, log_sumexp, dropout=0.0, causal=False, *, scale=None):
    """CUDA's memory-efficient attention, which is one kernel for every mask, by the CPU's."""
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout, causal, attn_mask=bias, scale=scale
    )
    return out, lse, torch.zeros(()), torch.zeros(())


def attention_backward(grad, q, k, v, bias, out, lse, seed, offset, *rest, scale=None):
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale
    )
    return *grads, None


def efficient(*_, **__):
    return 2  # torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION


ON_CPU = {
    aten._fused_sdp_choice: efficient,
    aten._scaled_dot_product_efficient_attention: attention,
    aten._scaled_dot_product_efficient_attention_backward: attention_backward,
}


@contextmanager
def pretend_gpu(memory=80 * 2**30, capability=(8, 0)):
    """For as long as it lasts there is one GPU; gives the Gpu with what was counted."""
    about = SimpleNamespace(
        total_memory=memory, name="a pretend GPU", major=capability[0], minor=capability[1]
    )
    fakes = {
        "torch.Generator": AnyGenerator,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_properties": lambda *_: about,
        "torch.cuda.get_device_capability": lambda *_: capability,
        "torch.cuda.get_device_name": lambda *_: about.name,
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda.is_current_stream_capturing": lambda: False,
        "torch.accelerator.synchronize": lambda *_: None,
        "torch.optim.Optimizer._accelerator_graph_capture_health_check": lambda _: None,
        "torch.utils._foreach_utils._foreach_supported_types": [Tensor, torch.nn.Parameter, OnGpu],
    }
    torch._C._ensureCUDADeviceGuardSet()
    lift = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(patch(name, fake))
        stack.callback(torch._C._set_only_lift_cpu_tensors, lift)
        torch._C._set_only_lift_cpu_tensors(True)
        Gpu.now = Gpu()
        yield stack.enter_context(Gpu.now)
