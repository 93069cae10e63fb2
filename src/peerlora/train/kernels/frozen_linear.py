"""Linear layers with frozen weights: in a lower precision, and re-ordered once for oneDNN.

On x86 CPUs whose vendor BLAS does not pick its widest kernels this is 1.2 to 2.3 times as fast as ``F.linear`` in fp32
(docs/performance.md); where the operations are missing or slower (``speed``), the same layer uses ``F.linear``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlora.lora.base_weights import within

_ROWS = 2048  # rows that the re-ordered layout is tuned for; any number works


def packing_unavailable(weight: Tensor) -> str | None:
    """Why frozen weights like this one cannot be packed here, or None."""
    if weight.device.type != "cpu":
        return "packed weights are for CPUs"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"packed weights are for fp32 and bf16, the run uses {weight.dtype}"
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bf16 on this processor"
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch lacks the oneDNN linear operations"
    return None


def freeze_linears(model: nn.Module, skip: tuple[str, ...] = (), pack: bool = True) -> str | None:
    """Swap every nn.Linear outside ``skip`` for a FrozenLinear; returns why its weights can't be packed, or None.

    ``pack``: whether to pack those that can be.
    """
    frozen, others = [], []
    for name, module in list(model.named_modules()):
        if within(name, skip) or not isinstance(module, nn.Linear):
            continue
        if type(module) is nn.Linear:  # others compute in a way of their own, such as on weights of 4 bits
            frozen.append(FrozenLinear(module, pack))
            model.set_submodule(name, frozen[-1])
        else:
            others.append(type(module).__name__)
    if not frozen:
        return f"the model has {others[0]} layers only" if others else "the model has no linear layers"
    return packing_unavailable(frozen[0].weight)


def lower_precision(model: nn.Module, keep: tuple[str, ...]) -> None:
    """The weights of a frozen model in bf16, but for the modules named in ``keep``, which get their input as they are.

    Buffers stay: rotary frequencies lose too much in bf16.  Layers of 4 bits compute in it, too.
    """
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # of bitsandbytes
            module.compute_dtype = torch.bfloat16  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not within(name, keep):
            parameter.data = parameter.data.to(torch.bfloat16)
    for name in keep:
        model.get_submodule(name).register_forward_pre_hook(_in_fp32)


def _in_fp32(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (arguments[0].float(), *arguments[1:])


class FrozenLinear(nn.Module):
    """``F.linear(x, weight, bias)`` with a weight that never changes, packed for both directions where that works."""

    def __init__(self, linear: nn.Linear, pack: bool = True):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        weight = linear.weight.detach()
        self._packed = pack and packing_unavailable(weight) is None
        if self._packed:
            self._up = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
            self._back = torch.ops.mkldnn._reorder_linear_weight(weight.T.contiguous(), _ROWS)

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """``x W' + bias + plus``; its backward gives the gradients of x and plus only."""
        if not self._packed:
            return self.up(x, plus)
        return _Packed.apply(x, plus, self)  # pyright: ignore[reportReturnType]

    def up(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """The same, without a backward."""
        if not self._packed:
            y = F.linear(x, self.weight, self.bias)
            return y if plus is None else y + plus
        if plus is None:
            y = _one(x.contiguous(), self._up, self.bias, "none", [], "")
        else:
            y = _two(x.contiguous(), plus.contiguous(), self._up, self.bias, "add")
        return torch.ops.aten._unsafe_view(y, y.shape)  # no view of it: some models change it in place

    def back(self, g: Tensor) -> Tensor:
        """``g W``: the gradient of x."""
        if not self._packed:
            return g @ self.weight
        return _one(g.contiguous(), self._back, None, "none", [], "")


def _one(*arguments: Any) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(*arguments)  # naming the overload: choosing it takes longer


def _two(*arguments: Any) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(*arguments)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plus: Tensor | None, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear.up(x, plus)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        g = gradients[0]
        dx, dplus, _ = ctx.needs_input_grad
        return ctx.linear.back(g) if dx else None, g if dplus else None, None
