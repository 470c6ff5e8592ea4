"""A pretend CUDA GPU, for tests on a machine without one.

    with pretend_gpu() as gpu:
        train_rl.main(["--device", "cuda", ...])
    gpu.waits  # {(what, "maskrl.py context"): how often the host waited for the GPU there}
    gpu.launches  # {operator: how often it was launched}

Its tensors, `OnGpu`, say that they are on cuda:0 and keep their numbers in a tensor of the CPU.
Every operator that has one of them, or device="cuda", is seen here, those of backward passes, of
fused optimisers and of the insides of functions too, and must obey CUDA's rules: operands of two
devices, a generator of the other one, and numpy are refused as a GPU refuses them. Not shown:
kernels and their rounding, memory, speed, and streams."""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import maskrl

HAS_GPU = torch.cuda.is_available()
aten = torch.ops.aten
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ROOT = str(Path(__file__).parent.parent) + "/"
OURS = tuple(ROOT + name for name in ("maskrl.py", "train_", "sample.py", "workbench/"))
REAL = SimpleNamespace(
    Generator=torch.Generator,
    autocast=torch.autocast,
    tensor=torch.tensor,
    as_tensor=torch.as_tensor,
    to=Tensor.to,
    backward=torch.autograd.backward,
    grouped=torch._C._group_tensors_by_device_and_dtype,
)

# Operators whose result is a number, or has a shape, that the host must know: it waits for the GPU
WAITS = {
    *(aten._local_scalar_dense, aten.is_nonzero, aten.equal),  # the first is .item()
    *(aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive),
    *(aten.bincount, aten.histc, aten.repeat_interleave, aten.multinomial),
}
# Operators that take operands of two devices; pointwise ones take numbers, tensors without shape
MOVES = {aten._to_copy, aten.copy_, aten._foreach_copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
TAKES_NUMBERS = INDEXING | {aten.where, aten.masked_fill, aten.masked_fill_, aten.fill_}
NO_KERNEL = {  # beside views
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided),
    *(aten.detach, aten._unsafe_view, aten.lift_fresh, aten._local_scalar_dense),
}


class OnGpu(Tensor):
    """host: the tensor of the CPU that has the numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = GPU, True, False

    @staticmethod
    def __new__(cls, host):
        return Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=Gpu.now.inner_device,
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

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self, **_):
        return f"OnGpu({self.host})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = OnGpu(self.host.detach().clone()).requires_grad_(self.requires_grad)
            if hasattr(self, "_is_param"):
                copy._is_param = True
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol):  # in a file it is a tensor as any other
        return self.host.detach().__reduce_ex__(protocol)


class Move(torch.autograd.Function):
    """A tensor on the other device."""

    @staticmethod
    def forward(ctx, x, non_blocking=False):
        if on_gpu(x):
            Gpu.now.count_wait("copy from the GPU")
            return x.host.clone()
        if not non_blocking:  # else CUDA copies from a buffer of its own, while the host goes on
            Gpu.now.count_wait("copy to the GPU")
        return OnGpu(x.clone())

    @staticmethod
    def backward(ctx, gradient):
        return Move.apply(gradient), None


class GpuGenerator(REAL.Generator):
    device = GPU
    alive = WeakValueDictionary()  # by their addresses: operators get them as any other

    def __init__(self):
        self.alive[self._cdata] = self


class AnyGenerator(REAL.Generator):
    """torch.Generator, which makes those of the GPU, too."""

    def __new__(cls, device="cpu"):
        return GpuGenerator() if on_gpu(device) else REAL.Generator(device)


class CpuAutocast(REAL.autocast):
    """torch.autocast, which on the GPU does what it does on the CPU."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def on_gpu(x) -> bool:
    """Of a tensor, a generator, or a device or its name."""
    if isinstance(x, (str, torch.device)):
        return torch.device(x).type == "cuda"
    if isinstance(x, REAL.Generator):
        return x._cdata in GpuGenerator.alive
    return isinstance(x, OnGpu)


def to(x, *args, **kwargs):
    """Tensor.to"""
    places = [p for p in (*args, *kwargs.values()) if isinstance(p, (str, torch.device, Tensor))]
    if not places or on_gpu(places[0]) == on_gpu(x):
        if on_gpu(x):  # its device has another name inside
            here = Gpu.now.inner_device
            args = [here if isinstance(a, (str, torch.device)) else a for a in args]
            kwargs = {k: here if k == "device" else a for k, a in kwargs.items()}
        return REAL.to(x, *args, **kwargs)
    x = Move.apply(x, kwargs.get("non_blocking", False))
    dtypes = [p for p in (*args, *kwargs.values()) if isinstance(p, torch.dtype)]
    dtypes += [p.dtype for p in places if isinstance(p, Tensor)]
    return REAL.to(x, dtypes[0]) if dtypes else x


def to_cpu(x):
    """Tensor.cpu"""
    return to(x, CPU)


def to_gpu(x):
    """Tensor.cuda"""
    return to(x, GPU)


def tensor(data, *, device=None, **kwargs):
    """torch.tensor"""
    x = REAL.tensor(data, **kwargs)
    return x if device is None else to(x, device)


def as_tensor(data, dtype=None, device=None):
    """torch.as_tensor"""
    x = REAL.as_tensor(data, dtype=dtype)
    return x if device is None else to(x, device)


def backward(tensors, *args, **kwargs):
    """torch.autograd.backward"""
    Gpu.now.goes_back = any(map(on_gpu, tensors_in([tensors])))
    try:
        REAL.backward(tensors, *args, **kwargs)
    finally:
        Gpu.now.goes_back = False


def grouped(lists, indices=False):
    """What optimisers do with their parameters."""
    device = GPU if any(map(on_gpu, tensors_in(lists))) else CPU
    return {(device, kind): group for (_, kind), group in REAL.grouped(lists, indices).items()}


def answered(value, *_):
    """What a function of torch.cuda says."""
    return value


def synchronize(*_):
    Gpu.now.count_wait("synchronize")


def tensors_in(x) -> list:
    """Those in nested lists."""
    if isinstance(x, (list, tuple)):
        return [tensor for part in x for tensor in tensors_in(part)]
    return [x] if isinstance(x, Tensor) else []


def on_host(x, tensors: list):
    """An argument of an operator as the CPU gets it; the tensors in it go to the list."""
    kind = type(x)
    if kind is OnGpu:
        tensors.append(x)
        return x.host
    if kind is list or kind is tuple:
        return [on_host(part, tensors) for part in x]
    if isinstance(x, Tensor):
        tensors.append(x)
    return x


def wrapped(x):
    """A result of the CPU on the GPU."""
    if isinstance(x, Tensor):
        return OnGpu(x)
    if isinstance(x, (list, tuple)):
        return type(x)(map(wrapped, x))
    return x


def refuse(func, why):
    raise RuntimeError(f"{func}: expected all tensors on one device, {why}")


@cache
def about(func) -> SimpleNamespace:
    """What the rules of an operator depend on."""
    op, schema = func.overloadpacket, func._schema
    return SimpleNamespace(
        name=op.__name__,
        waits=op in WAITS,
        moves=op in MOVES,
        indexes=op in INDEXING,
        launches=not (func.is_view or op in NO_KERNEL),
        takes_numbers=torch.Tag.pointwise in func.tags or op in TAKES_NUMBERS,
        in_place=schema.is_mutable and schema.name.endswith("_"),
        writes=schema.is_mutable,
    )


class Gpu(TorchDispatchMode):
    """waits, launches: see above.

    inner_device: what autograd and autocast take the tensors for. As those of the CPU they have
    backward passes, and autocast is the CPU's; as those of cuda autocast follows CUDA's rules, and
    there are no backward passes."""

    now = None

    def __init__(self, inner_device):
        super().__init__()
        self.inner_device = inner_device
        self.waits, self.launches = Counter(), Counter()
        self.goes_back = False  # in the backward pass of a tensor on the GPU

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # nothing is compiled here, and to skip it takes time

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def count_wait(self, what):
        """With the function of ours that asked for it."""
        frame, place = sys._getframe(), "elsewhere"
        while frame and not frame.f_code.co_filename.startswith(OURS):
            frame = frame.f_back
        if frame:
            file = frame.f_code.co_filename.removeprefix(ROOT)
            place = f"{file} {frame.f_code.co_name}"
        self.waits[what, place] += 1

    def run(self, func, args, kwargs):
        tensors = []
        own = [on_host(x, tensors) for x in args]
        options = {name: on_host(x, tensors) for name, x in kwargs.items()}
        there, device = any(type(x) is OnGpu for x in tensors), kwargs.get("device")
        target = there if device is None else device.type == "cuda"
        if self.inner_device == CPU and (there or self.goes_back and not tensors):
            target = True  # autograd names the CPU for what is on the GPU, and makes zeros there
        generator = kwargs.get("generator")
        if generator is not None and on_gpu(generator) != target:
            refuse(func, "and the generator is of another")
        if not (there or target):
            return func(*args, **kwargs)
        op = about(func)
        if op.name == "copy_":
            target = on_gpu(args[0])
        if device is not None:
            options["device"] = CPU
        self.check(func, op, args, kwargs, tensors, target)
        moves = op.moves and not all(type(x) is OnGpu for x in tensors)
        if target and op.launches and not moves:
            self.launches[op.name] += 1
        out = func(*own, **options)
        if op.in_place and isinstance(args[0], Tensor):
            return args[0]
        return wrapped(out) if target else out

    def check(self, func, op, args, kwargs, tensors, target):
        """Raise what CUDA raises, and count what waits for it."""
        if op.waits and kwargs.get("output_size") is None:
            self.count_wait(op.name)
        if op.moves:
            if on_gpu(tensors[-1]) != target:
                self.count_wait("copy to the GPU" if target else "copy from the GPU")
            return
        if op.indexes:
            tensors = self.check_index(func, *args[:3])
        for i, x in enumerate(tensors):
            is_number = op.takes_numbers and x.ndim == 0 and not (op.writes and i == 0)
            if type(x) is not OnGpu and not is_number:
                refuse(func, "found cpu and cuda:0")

    def check_index(self, func, own, indices, value=None):
        """The operands that must be on one device: an index may come from the CPU."""
        for x in indices:
            if on_gpu(x) and not on_gpu(own):
                refuse(func, "found indices on cuda:0 of a tensor on cpu")
            if isinstance(x, Tensor) and not on_gpu(x):
                self.count_wait("copy to the GPU")
            elif isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8):
                self.count_wait("mask as index")
        return [own] if value is None else [own, value]


@contextmanager
def pretend_gpu(memory=80 * 2**30, capability=(8, 0), inner_device=CPU):
    """For as long as it lasts there is one GPU; gives the Gpu with what was counted.

    Where there is a real one it takes that, and counts nothing."""
    if HAS_GPU:
        yield SimpleNamespace(waits=Counter(), launches=Counter())
        return
    properties = SimpleNamespace(
        total_memory=memory, name="a pretend GPU", major=capability[0], minor=capability[1]
    )
    fakes = {
        "torch.Generator": AnyGenerator,
        "torch.autograd.backward": backward,
        "torch.tensor": tensor,
        "torch.as_tensor": as_tensor,
        "torch.Tensor.to": to,
        "torch.Tensor.cpu": to_cpu,
        "torch.Tensor.cuda": to_gpu,
        "torch._C._group_tensors_by_device_and_dtype": grouped,
        "torch.accelerator.synchronize": synchronize,
        "torch.cuda.synchronize": synchronize,
    }
    answers = {
        "_lazy_init": None,
        "current_device": 0,
        "device_count": 1,
        "empty_cache": None,
        "get_device_capability": capability,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "is_available": True,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
    }
    fakes |= {f"torch.cuda.{name}": partial(answered, value) for name, value in answers.items()}
    if inner_device.type == "cpu":
        fakes["torch.autocast"] = CpuAutocast
    else:
        torch._C._ensureCUDADeviceGuardSet()
    for name in dir(torch.optim.Optimizer):
        if name.endswith("capture_health_check"):
            fakes[f"torch.optim.Optimizer.{name}"] = answered
    maskrl.alpha_sigma_table.cache_clear()  # of another pretend GPU
    maskrl.halton_cells.cache_clear()
    foreach = torch.utils._foreach_utils._foreach_supported_types
    with ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(patch(name, fake))
        foreach.append(OnGpu)
        stack.callback(foreach.remove, OnGpu)
        Gpu.now = Gpu(inner_device)
        yield stack.enter_context(Gpu.now)
