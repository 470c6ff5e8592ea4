"""Matrix products in bfloat16, and blocks that are computed twice to save memory, for any MAR.

With bf16 all matrix products inside MAR.context are in bfloat16, the projection of the tokens
(`z_proj`) among them, and all inside Head.hidden. The two layers of the head that touch x_t and the
prediction, `input_proj` and `final_layer.linear`, stay in float32, for eps is made of the
difference of both. Weights, residuals, norms and gradients are float32 in any case, and so are
optimisers and EMA.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskrl import MAR


class Wrapper:
    """Stands in front of a method of one module, as an attribute of that instance.

    It keeps the module, not the bound method, so that in a deep copy of the module it is in front
    of the copy's method."""

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
    """The method, of which only the inputs are kept for the backward pass, which computes all else
    again."""

    def __call__(self, *args, **kwargs) -> Tensor:
        if torch.is_grad_enabled():
            return checkpoint(self.method, *args, use_reentrant=False, **kwargs)
        return self.method(*args, **kwargs)


def set_precision(model: MAR, precision: str = "fp32", checkpointing: bool = False) -> None:
    """Let `model` compute in "fp32" or "bf16", its blocks with or without checkpointing.

    Deep copies made later compute in the same way. Another call replaces what this one set."""
    in_precision = {"fp32": None, "bf16": InBFloat16}[precision]
    wrap(model, "context", in_precision)
    wrap(model.head, "hidden", in_precision)
    for block in (*model.encoder_blocks, *model.decoder_blocks):
        wrap(block, "forward", Checkpointed if checkpointing else None)


def wrap(module: nn.Module, name: str, wrapper: type[Wrapper] | None) -> None:
    """Put the wrapper in front of a method of this instance (None: the method as it is)."""
    if wrapper is None:
        vars(module).pop(name, None)
    else:
        setattr(module, name, wrapper(module, name))
