"""A frozen linear with every client's low-rank update, on packed tokens, with its backward written out.

The plain twin is ``StackedLinear.forward`` on padded rows.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.lora.layer import StackedLinear
from peerlora.train.kernels.frozen_linear import FrozenLinear
from peerlora.train.kernels.packing import TokenPositions


def lora_linear(
    layer: StackedLinear,
    x: Float[Tensor, "token d_in"],
    positions: TokenPositions,
    keep: Float[Tensor, "token d_in"] | None = None,
    plus: Float[Tensor, "token d_out"] | None = None,
) -> Float[Tensor, "token d_out"]:
    """``base(x) + scaling * B A (keep * x) + plus``, client i's factors on its own tokens."""
    y = _LoraLinear.apply(x, plus, layer.A, layer.B, keep, layer.base, positions, layer.step.scaling)
    return y  # pyright: ignore[reportReturnType]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plus: Tensor | None,
        A: Tensor,
        B: Tensor,
        keep: Tensor | None,
        base: FrozenLinear,
        positions: TokenPositions,
        scaling: Tensor,
    ) -> Tensor:
        down, up = A.to(x.dtype), (B * scaling).to(x.dtype)
        z = positions.by_client(x if keep is None else x * keep)
        u = positions.only_tokens(torch.bmm(z, down.mT))
        y = base.up(x, plus).add_(positions.packed(torch.bmm(u, up.mT)))
        ctx.save_for_backward(z, u, down, up, keep, scaling)
        ctx.base, ctx.positions, ctx.dtype = base, positions, A.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, u, down, up, keep, scaling = ctx.saved_tensors
        want_x, want_plus, want_A, want_B, *_ = ctx.needs_input_grad
        # u and du are zero in the positions that are no token, so no gradient comes from there.
        g = ctx.positions.by_client(gradients[0])
        du = ctx.positions.only_tokens(torch.bmm(g, up))
        dA = torch.bmm(du.mT, z).to(ctx.dtype) if want_A else None
        dB = torch.bmm(g.mT, u).to(ctx.dtype) * scaling if want_B else None
        dx = None
        if want_x:
            low = ctx.positions.packed(torch.bmm(du, down))
            dx = ctx.base.back(gradients[0]).add_(low if keep is None else low * keep)
        return dx, gradients[0] if want_plus else None, dA, dB, None, None, None, None
