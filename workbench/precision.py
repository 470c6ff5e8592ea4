"""Matrix products in TF32 or bfloat16, blocks that are computed twice to save memory, and compiled
ones, for any MAR.

With tf32, products inside MAR.context and Head.hidden are TF32 on GPUs that have it (Ampere and
later), there and back; elsewhere they are those of fp32. Nothing else rounds: neither rewards nor
distances.

With bf16, all matrix products inside MAR.context are in bfloat16, including the projection of the
tokens (`z_proj`), and so are all inside Head.hidden. The two layers of the head that touch x_t and
the prediction, `input_proj` and `final_layer.linear`, stay in float32, because eps is computed from
the difference of the two. Weights, residuals, norms, gradients, optimisers and EMA are float32 in
any case; of frozen weights, those of a generation, copies in bfloat16 are kept beside them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskrl import MAR


class Wrapper:
    """Called in place of a method of one module, as an attribute of that instance.

    It keeps the module and not the bound method, so that the wrapper in a deep copy of the module
    calls the method of the copy."""

    def __init__(self, module: nn.Module, name: str, is_compiled: bool = False):
        self.module, self.name, self.is_compiled = module, name, is_compiled

    def method(self, *args, **kwargs) -> Tensor:
        function = getattr(type(self.module), self.name)
        if self.is_compiled:
            function = compiled(function)
        return function(self.module, *args, **kwargs)

    def __call__(self, *args, **kwargs) -> Tensor:
        return self.method(*args, **kwargs)


@cache
def compiled(function: Callable) -> Callable:
    """A method compiled once for all modules of a kind, and for any numbers of images and rows."""
    return torch.compile(function, dynamic=True)


class InBFloat16(Wrapper):
    """The method with its matrix products in bfloat16; it returns float32."""

    def precision(self) -> AbstractContextManager:
        device = next(self.module.parameters()).device
        return torch.autocast(device.type, torch.bfloat16)

    def __call__(self, *args, **kwargs) -> Tensor:
        with self.precision():
            return self.method(*args, **kwargs).float()


class CastOnce(Wrapper):
    """The forward pass of a Linear in bfloat16, for which frozen weights are cast once, not at each
    call, and again after they changed."""

    def __init__(self, module: nn.Module, name: str, is_compiled: bool = False):
        super().__init__(module, name, is_compiled)
        self.version = self.kept = None

    def __call__(self, x: Tensor) -> Tensor:
        weights = self.module.weight, self.module.bias
        if any(p.requires_grad for p in weights) or torch.compiler.is_compiling():
            self.version = self.kept = None  # fused optimisers change weights and not the version
            return self.method(x)
        version = [(id(p), p.device, p._version) for p in weights]
        if self.version != version:
            self.version, self.kept = version, [p.bfloat16() for p in weights]
        return F.linear(x.bfloat16(), *self.kept)


class InTF32(Wrapper):
    """The method with its matrix products in TF32, in the backward pass too."""

    @staticmethod
    @contextmanager
    def precision() -> Iterator[None]:
        allow_tf32(True)
        try:
            yield
        finally:
            allow_tf32(False)

    def __call__(self, *args, **kwargs) -> Tensor:
        with self.precision():
            result = self.method(*args, **kwargs)
        if result.requires_grad:
            result.register_hook(allow_tf32_in_backward)
        return result


def allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed


def allow_tf32_in_backward(gradient: Tensor) -> None:
    """A hook: from this gradient to the end of the backward pass. What was computed after the
    result, such as a reward, is behind it by then."""
    allow_tf32(True)
    torch.autograd.Variable._execution_engine.queue_callback(disallow_tf32)


def disallow_tf32() -> None:
    allow_tf32(False)


def in_precision_of(model: MAR) -> AbstractContextManager:
    """As `model.context` computes, for a context that is computed in another way."""
    wrapper = vars(model).get("context")
    return wrapper.precision() if wrapper else nullcontext()


class Checkpointed(Wrapper):
    """The method, whose backward pass keeps only the inputs and computes everything else again."""

    def __call__(self, *args, **kwargs) -> Tensor:
        if torch.is_grad_enabled():
            return checkpoint(self.method, *args, use_reentrant=False, **kwargs)
        return self.method(*args, **kwargs)


OUTER = ("head.input_proj", "head.final_layer.linear", "noise_policy", "schedule")  # in float32


def set_precision(
    model: MAR, precision: str = "fp32", checkpointing: bool = False, is_compiled: bool = False
) -> None:
    """Let `model` compute in "fp32", "tf32" or "bf16", its blocks with or without checkpointing;
    is_compiled: blocks and the head's hidden layers by torch.compile.

    Deep copies that are made later compute in the same way. Another call replaces this one."""
    in_precision = {"fp32": None, "tf32": InTF32, "bf16": InBFloat16}[precision]
    wrap(model, "context", in_precision)
    wrap(model.head, "hidden", in_precision, is_compiled)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not name.startswith(OUTER):
            wrap(layer, "forward", CastOnce if precision == "bf16" else None)
    for block in (*model.encoder_blocks, *model.decoder_blocks):
        wrap(block, "forward", Checkpointed if checkpointing else None, is_compiled)


def wrap(
    module: nn.Module, name: str, wrapper: type[Wrapper] | None, is_compiled: bool = False
) -> None:
    """Put a wrapper around a method of this instance (None: take it away)."""
    if wrapper is None and not is_compiled:
        vars(module).pop(name, None)
    else:
        setattr(module, name, (wrapper or Wrapper)(module, name, is_compiled))
