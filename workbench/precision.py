"""Matrix products in bfloat16, and blocks that are computed twice to save memory, for any MAR.

With bf16, all matrix products inside MAR.context are in bfloat16, including the projection of the
tokens (`z_proj`), and so are all inside Head.hidden. The two layers of the head that touch x_t and
the prediction, `input_proj` and `final_layer.linear`, stay in float32, because eps is computed from
the difference of the two. Weights, residuals, norms, gradients, optimisers and EMA are float32 in
any case; of frozen weights, those of a generation, copies in bfloat16 are kept beside them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskrl import MAR


class Wrapper:
    """Called in place of a method of one module, as an attribute of that instance.

    It keeps the module and not the bound method, so that the wrapper in a deep copy of the module
    calls the method of the copy."""

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name

    def method(self, *args, **kwargs) -> Tensor:
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)


class InBFloat16(Wrapper):
    """The method with its matrix products in bfloat16; it returns float32."""

    def __call__(self, *args, **kwargs) -> Tensor:
        device = next(self.module.parameters()).device
        with torch.autocast(device.type, torch.bfloat16):
            return self.method(*args, **kwargs).float()


class CastOnce(Wrapper):
    """The forward pass of a Linear in bfloat16, for which frozen weights are cast once, not at each
    call, and again after they changed."""

    def __init__(self, module: nn.Module, name: str):
        super().__init__(module, name)
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


class Checkpointed(Wrapper):
    """The method, whose backward pass keeps only the inputs and computes everything else again."""

    def __call__(self, *args, **kwargs) -> Tensor:
        if torch.is_grad_enabled():
            return checkpoint(self.method, *args, use_reentrant=False, **kwargs)
        return self.method(*args, **kwargs)


OUTER = ("head.input_proj", "head.final_layer.linear", "noise_policy", "schedule")  # in float32


def set_precision(model: MAR, precision: str = "fp32", checkpointing: bool = False) -> None:
    """Let `model` compute in "fp32" or "bf16", its blocks with or without checkpointing.

    Deep copies that are made later compute in the same way. Another call replaces this one."""
    in_precision = {"fp32": None, "bf16": InBFloat16}[precision]
    wrap(model, "context", in_precision)
    wrap(model.head, "hidden", in_precision)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not name.startswith(OUTER):
            wrap(layer, "forward", CastOnce if precision == "bf16" else None)
    for block in (*model.encoder_blocks, *model.decoder_blocks):
        wrap(block, "forward", Checkpointed if checkpointing else None)


def wrap(module: nn.Module, name: str, wrapper: type[Wrapper] | None) -> None:
    """Put a wrapper around a method of this instance (None: take it away)."""
    if wrapper is None:
        vars(module).pop(name, None)
    else:
        setattr(module, name, wrapper(module, name))
