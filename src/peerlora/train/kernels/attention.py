"""Softmax attention on packed tokens, with its backward written out.

Twice as fast on a CPU as torch's fused kernel at short rows, and in bf16 several times (docs/performance.md); the
plain twin is torch's own ``scaled_dot_product_attention`` on padded rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from peerlora.train.kernels.packing import TokenPacking


def attend(
    q: Float[Tensor, "query width"],
    k: Float[Tensor, "token shared_width"],
    v: Float[Tensor, "token shared_width"],
    packing: TokenPacking,
    heads: int,
    *,
    shared: int | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "query width"]:
    """Every row's queries attend to its own tokens.  The queries are all tokens, or each row's first one.

    ``shared``: heads of keys and values, each for as many heads of queries; by default there are equally many.
    ``causal``: tokens attend to none behind them.  ``scale``: of the scores, by default ``width of a head ** -0.5``.
    """
    scale = (q.shape[1] // heads) ** -0.5 if scale is None else scale
    return _Attend.apply(q, k, v, packing, heads, shared or heads, causal, scale)  # pyright: ignore[reportReturnType]


def attend_long(
    q: Float[Tensor, "token width"],
    k: Float[Tensor, "token shared_width"],
    v: Float[Tensor, "token shared_width"],
    packing: TokenPacking,
    heads: int,
    shared: int,
    scale: float | None = None,
) -> Float[Tensor, "token width"]:
    """The same as causal ``attend`` by torch's own kernel, which keeps no scores: for rows whose scores are large."""
    out = torch.zeros_like(q)
    for group in packing.groups:
        slots, ended = group.slots, group.ended
        parts = [
            x[slots].unflatten(2, (count, -1)).transpose(1, 2) for x, count in ((q, heads), (k, shared), (v, shared))
        ]
        Q, K, V = parts[0], *(part.repeat_interleave(heads // shared, dim=1) for part in parts[1:])
        found = F.scaled_dot_product_attention(Q, K, V, is_causal=True, scale=scale).transpose(1, 2).flatten(2)
        real = torch.ones_like(slots, dtype=torch.bool) if ended is None else ~ended[:, 0]
        out = out.index_copy(0, slots[real], found[real])
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packing: TokenPacking,
        heads: int,
        shared: int,
        causal: bool,
        scale: float,
    ) -> Tensor:
        every = len(q) == len(k)  # rows of one token only are the same either way
        out = torch.empty_like(q)
        saved = []
        for group in packing.groups:
            own = group.slots if every else group.rows[:, None]
            Q = _heads(q, own, heads)
            K, V = (_repeated(_heads(x, group.slots, shared), heads, shared) for x in (k, v))
            scores = torch.bmm(Q, K.mT).mul_(scale)
            if causal:  # no real token then sees padding, which is behind
                scores.add_(packing.causal_bias(group, q.dtype))
            elif (bias := packing.scores_bias(group, q.dtype)) is not None:
                scores.view(len(own), heads, *scores.shape[1:]).add_(bias[:, None])
            P = torch.softmax(scores, -1)
            _scatter(out, own, group.ended if every else None, torch.bmm(P, V), heads)
            saved += [Q, K, V, P]
        ctx.save_for_backward(*saved)
        ctx.packing, ctx.heads, ctx.shared, ctx.scale, ctx.every = packing, heads, shared, scale, every
        ctx.shapes = (q.shape, k.shape)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g = gradients[0]
        dq, (dk, dv) = g.new_empty(ctx.shapes[0]), (g.new_empty(ctx.shapes[1]) for _ in range(2))
        saved = ctx.saved_tensors
        for number, group in enumerate(ctx.packing.groups):
            Q, K, V, P = saved[4 * number : 4 * number + 4]
            own, ended = (group.slots, group.ended) if ctx.every else (group.rows[:, None], None)
            G = _heads(g, own, ctx.heads, ended)
            dP = torch.bmm(G, V.mT)
            dS = torch._softmax_backward_data(dP, P, -1, dP.dtype).mul_(ctx.scale)
            _scatter(dq, own, ended, torch.bmm(dS, K), ctx.heads)
            for found, each in ((dk, torch.bmm(dS.mT, Q)), (dv, torch.bmm(P.mT, G))):
                _scatter(found, group.slots, group.ended, _summed(each, ctx.heads, ctx.shared), ctx.shared)
        return dq, dk, dv, *(None,) * 5


def _heads(x: Tensor, slots: Tensor, heads: int, ended: Tensor | None = None) -> Float[Tensor, "matrix token part"]:
    """Packed tokens as one small matrix per row and head; zeros where a row has ended, if asked for."""
    picked = x.index_select(0, slots.flatten())
    if ended is not None:
        picked.masked_fill_(ended.reshape(-1, 1), 0)  # else a gradient would reach padding
    rows, tokens = slots.shape
    return picked.view(rows, tokens, heads, -1).transpose(1, 2).reshape(rows * heads, tokens, -1)


def _repeated(x: Float[Tensor, "shared token part"], heads: int, shared: int) -> Float[Tensor, "matrix token part"]:
    """Each matrix of keys or values once for every head of queries that it serves."""
    return x if heads == shared else x.repeat_interleave(heads // shared, dim=0)


def _summed(x: Float[Tensor, "matrix token part"], heads: int, shared: int) -> Float[Tensor, "shared token part"]:
    """The gradient of what ``_repeated`` was given."""
    return x if heads == shared else x.unflatten(0, (-1, heads // shared)).sum(1)


def _scatter(out: Tensor, slots: Tensor, ended: Tensor | None, parts: Tensor, heads: int) -> None:
    """Write each real token's numbers to its packed position: the inverse of ``_heads``."""
    rows, tokens = slots.shape
    flat = parts.view(rows, heads, tokens, -1).transpose(1, 2).reshape(rows * tokens, -1)
    positions = slots.flatten()
    if ended is not None:
        real = (~ended).flatten().nonzero()[:, 0]
        flat, positions = flat.index_select(0, real), positions.index_select(0, real)
    out.index_copy_(0, positions, flat)
