"""A frozen linear with every client's low-rank update, on packed tokens, with its backward written out.

The plain twin is ``StackedLinear.forward`` on padded rows.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.lora.layer import StackedLinear, Step
from peerlora.lora.row_gradients import RowGradients, no_gradient
from peerlora.train.kernels.frozen_linear import FrozenLinear
from peerlora.train.kernels.packing import TokenPacking, TokenPositions


def adapted_linear(
    linear: StackedLinear,
    x: Float[Tensor, "token d_in"],
    packing: TokenPacking,
    positions: TokenPositions,
    plus: Float[Tensor, "token d_out"] | None = None,
) -> Float[Tensor, "token d_out"]:
    """An adapted layer on the tokens at ``positions``, with what its clients have merged, plus ``plus``."""
    if linear.merged is not None:
        update = positions.packed(linear.merged.apply(positions.by_client(x)))
        plus = update if plus is None else plus + update
    rows = None if linear.step.row_gradients is None else packing.by_row(positions)
    return lora_linear(linear, x, positions, keep(linear.step, linear.p, x, packing, positions), plus, rows)


def keep(
    step: Step, p: float, x: Float[Tensor, "token width"], packing: TokenPacking, positions: TokenPositions
) -> Float[Tensor, "token width"] | None:
    """What dropout multiplies these tokens by, from the draws of the padded forward; None where nothing drops."""
    found = step.keep((*packing.shape, x.shape[1]), p, x)
    return None if found is None else found.flatten(0, 1).index_select(0, positions.padded)


def lora_linear(
    layer: StackedLinear,
    x: Float[Tensor, "token d_in"],
    positions: TokenPositions,
    keep: Float[Tensor, "token d_in"] | None = None,
    plus: Float[Tensor, "token d_out"] | None = None,
    rows: TokenPositions | None = None,
) -> Float[Tensor, "token d_out"]:
    """``base(x) + scaling * B A (keep * x) + plus``, client i's factors on its own tokens.

    ``rows``: the same tokens by row, where the step collects the gradients of rows.
    """
    by_row = None if rows is None else _ByRow(layer, rows)
    y = _LoraLinear.apply(x, plus, layer.A, layer.B, keep, layer.base, positions, layer.step.scaling, by_row)
    return y  # pyright: ignore[reportReturnType]


class _ByRow:
    """Where the backward of one layer leaves its row gradients."""

    def __init__(self, layer: StackedLinear, positions: TokenPositions):
        assert layer.step.row_gradients is not None
        self.found: RowGradients = layer.step.row_gradients
        self.A, self.B, self.positions = id(layer.A), id(layer.B), positions

    def add(self, weight: int, left: Tensor, right: Tensor) -> None:
        """Add both sides on packed tokens; where a row has ended, the narrow one is zero, since that costs a pass."""
        sides = [self.positions.by_client(side) for side in (left, right)]
        self.positions.only_tokens(min(sides, key=lambda side: side.shape[-1]))
        self.found.add(weight, *sides)


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
        rows: _ByRow | None,
    ) -> Tensor:
        down, up = A.to(x.dtype), (B * scaling).to(x.dtype)
        z = positions.by_client(x if keep is None else x * keep)
        u = positions.only_tokens(torch.bmm(z, down.mT))
        y = base.up(x, plus).add_(positions.packed(torch.bmm(u, up.mT)))
        ctx.save_for_backward(z, u, down, up, keep, scaling)
        ctx.base, ctx.positions, ctx.rows, ctx.A, ctx.B = base, positions, rows, A, B
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, u, down, up, keep, scaling = ctx.saved_tensors
        want_x, want_plus, want_A, want_B, *_ = ctx.needs_input_grad
        packed, dtype, rows = ctx.positions.packed, ctx.A.dtype, ctx.rows
        # u and du are zero in the positions that are no token, so no gradient comes from there.
        g = ctx.positions.by_client(gradients[0])
        du = ctx.positions.only_tokens(torch.bmm(g, up))
        if rows is None:
            dA = torch.bmm(du.mT, z).to(dtype) if want_A else None
            dB = torch.bmm(g.mT, u).to(dtype) * scaling if want_B else None
        else:
            dA, dB = (no_gradient(weight) if want else None for weight, want in ((ctx.A, want_A), (ctx.B, want_B)))
            if want_A:
                rows.add(rows.A, packed(du).to(dtype), packed(z).to(dtype))
            if want_B:
                rows.add(rows.B, gradients[0].to(dtype), packed(u.to(dtype) * scaling))
        dx = None
        if want_x:
            low = packed(torch.bmm(du, down))
            dx = ctx.base.back(gradients[0]).add_(low if keep is None else low * keep)
        return dx, gradients[0] if want_plus else None, dA, dB, None, None, None, None, None
