"""Matrix products in bfloat16, and blocks that are computed twice to save memory, for any MAR.

With bf16, all matrix products inside MAR.context are in bfloat16, including the projection of the
tokens (`z_proj`), and so are all inside Head.hidden. The two layers of the head that touch x_t and
the prediction, `input_proj` and `final_layer.linear`, stay in float32, because eps is computed from
the difference of the two. Weights, residuals, norms, gradients, optimisers and EMA are float32 in
any case.
"""

import torch
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


class Checkpointed(Wrapper):
    """The method, whose backward pass keeps only the inputs and computes everything else again."""

    def __call__(self, *args, **kwargs) -> Tensor:
        if torch.is_grad_enabled():
            return checkpoint(self.method, *args, use_reentrant=False, **kwargs)
        return self.method(*args, **kwargs)


def set_precision(model: MAR, precision: str = "fp32", checkpointing: bool = False) -> None:
    """Let `model` compute in "fp32" or "bf16", its blocks with or without checkpointing.

    Deep copies that are made later compute in the same way. Another call replaces this one."""
    in_precision = {"fp32": None, "bf16": InBFloat16}[precision]
    wrap(model, "context", in_precision)
    wrap(model.head, "hidden", in_precision)
    for block in (*model.encoder_blocks, *model.decoder_blocks):
        wrap(block, "forward", Checkpointed if checkpointing else None)


def wrap(module: nn.Module, name: str, wrapper: type[Wrapper] | None) -> None:
    """Put a wrapper around a method of this instance (None: take it away)."""
    if wrapper is None:
        vars(module).pop(name, None)
    else:
        setattr(module, name, wrapper(module, name))
