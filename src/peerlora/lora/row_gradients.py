"""Gradients of single rows, of all trained weights, collected in one backward pass of a stacked graph.

The gradient of a row is ``sum_t left_t right_t'`` over its tokens, of the gradients that a product's outputs get and of
the inputs that it has.  Norms need only the small Gram matrices of both sides, as in ghost clipping (Li et al. 2022,
arXiv 2110.05679), or the product itself where a low rank makes that the smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class RowGradients:
    """The row gradients of one backward pass, by trained tensor; rows are client-major.

    A layer that runs twice in a forward pass has the sum of both.
    """

    def __init__(self, clients: int, rows: int):
        self.clients, self.rows = clients, rows
        self._found: dict[int, _Pair | _Product] = {}

    def add(self, weight: int, left: Float[Tensor, "row token m"], right: Float[Tensor, "row token n"]) -> None:
        """Add ``left' right`` of every row to the gradient of the tensor with this ``id``."""
        pair = _Pair(left.detach(), right.detach())  # saved inputs would bring their graph along
        before = self._found.get(weight)
        if before is None:
            self._found[weight] = pair if pair.is_smaller else pair.product()
        else:
            self._found[weight] = _Product(before.product().values + pair.product().values)

    def squared_norms(self) -> Float[Tensor, " row"]:
        """Each row's squared norm over all tensors."""
        return torch.stack([each.squared_norms() for each in self._found.values()]).sum(0)

    def weighted_sums(
        self, weights: Float[Tensor, "client row"], tensors: Sequence[Tensor]
    ) -> list[Float[Tensor, "client ..."]]:
        """Per tensor and client the sum of its rows' gradients, each times its weight; zeros for an unused tensor."""
        found = []
        for tensor in tensors:
            own = self._found.get(id(tensor))
            found.append(torch.zeros_like(tensor) if own is None else own.weighted_sum(weights).view(tensor.shape))
        return found


class _Pair:
    """Row gradients as both sides of a product, for weights larger than the tokens' Gram matrices."""

    def __init__(self, left: Float[Tensor, "row token m"], right: Float[Tensor, "row token n"]):
        self.left, self.right = left, right

    @property
    def is_smaller(self) -> bool:
        """Whether Gram matrices take fewer multiplications than the product."""
        tokens, m, n = self.left.shape[1], self.left.shape[2], self.right.shape[2]
        return tokens * (m + n) < m * n

    def product(self) -> _Product:
        return _Product(torch.bmm(self.left.mT, self.right))

    def squared_norms(self) -> Float[Tensor, " row"]:
        """Each row's squared norm, from Gram matrices in fp64.

        Their products cancel where tokens do, as gradients that sum to 0 on inputs with a large mean: in fp32 that
        left norms wrong by some percent, and so rows longer than they may be.
        """
        left, right = (torch.bmm(side, side.mT) for side in (self.left.double(), self.right.double()))
        return (left * right).sum((1, 2)).clamp_min(0).to(self.left.dtype)  # below zero by rounding only

    def weighted_sum(self, weights: Float[Tensor, "client row"]) -> Float[Tensor, "client m n"]:
        scaled = self.left * weights.reshape(-1, 1, 1)
        left, right = (side.reshape(len(weights), -1, side.shape[2]) for side in (scaled, self.right))
        return torch.bmm(left.mT, right)


class _Product:
    """Row gradients themselves."""

    def __init__(self, values: Float[Tensor, "row m n"]):
        self.values = values

    def product(self) -> _Product:
        return self

    def squared_norms(self) -> Float[Tensor, " row"]:
        return self.values.square().sum((1, 2))

    def weighted_sum(self, weights: Float[Tensor, "client row"]) -> Float[Tensor, "client m n"]:
        by_client = self.values.view(*weights.shape, -1)
        return torch.bmm(weights[:, None], by_client).view(len(weights), *self.values.shape[1:])


def client_product(
    x: Float[Tensor, "client input n"],
    weight: Float[Tensor, "client m n"],
    rows: RowGradients | None,
    of: Tensor | None = None,
) -> Float[Tensor, "client input m"]:
    """``x W'`` for each client, in the precision of ``x``; with ``rows``, its backward gives the gradients of rows.

    ``of``: the trained tensor that ``weight`` is a view of; by default it is itself.
    """
    if rows is None:
        return torch.bmm(x, weight.mT.to(x.dtype))
    y = _RowProduct.apply(x, weight, id(weight if of is None else of), rows)
    return y  # pyright: ignore[reportReturnType]


class _RowProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, number: int, rows: RowGradients) -> Tensor:
        used = weight.to(x.dtype)
        ctx.save_for_backward(x, used)
        ctx.number, ctx.rows, ctx.like = number, rows, weight
        return torch.bmm(x, used.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, used) = gradients, ctx.saved_tensors
        want_x, want_weight, *_ = ctx.needs_input_grad
        if want_weight:
            ctx.rows.add(ctx.number, *(_by_row(side, ctx.rows, ctx.like.dtype) for side in (g, x)))
        return torch.bmm(g, used) if want_x else None, no_gradient(ctx.like) if want_weight else None, None, None


def _by_row(x: Float[Tensor, "client input width"], rows: RowGradients, dtype: torch.dtype) -> Tensor:
    return x.reshape(rows.rows, -1, x.shape[-1]).to(dtype)


def no_gradient(weight: Tensor) -> Tensor:
    """Zeros that take no memory, where a backward has to give the gradient of a weight that nobody asks for."""
    return weight.new_zeros(()).expand_as(weight)
