"""Softmax attention on packed tokens, with its backward written out.

Twice as fast on a CPU as torch's fused kernel at short rows, and in bf16 several times (docs/performance.md); the
plain twin is torch's own ``scaled_dot_product_attention`` on padded rows.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.train.kernels.packing import TokenPacking


def attend(
    q: Float[Tensor, "query width"],
    k: Float[Tensor, "token width"],
    v: Float[Tensor, "token width"],
    packing: TokenPacking,
    heads: int,
) -> Float[Tensor, "query width"]:
    """Every row's queries attend to its own tokens.  The queries are all tokens, or each row's first one."""
    return _Attend.apply(q, k, v, packing, heads)  # pyright: ignore[reportReturnType]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packing: TokenPacking, heads: int) -> Tensor:
        every = len(q) == len(k)  # rows of one token only are the same either way
        scale = (q.shape[1] // heads) ** -0.5
        out = torch.empty_like(q)
        saved = []
        for group in packing.groups:
            own = group.slots if every else group.rows[:, None]
            Q, K, V = _heads(q, own, heads), _heads(k, group.slots, heads), _heads(v, group.slots, heads)
            bias = packing.scores_bias(group, q.dtype)
            scores = torch.bmm(Q, K.mT).mul_(scale)
            if bias is not None:
                scores.view(len(own), heads, *scores.shape[1:]).add_(bias[:, None])
            P = torch.softmax(scores, -1)
            _scatter(out, own, group.ended if every else None, torch.bmm(P, V), heads)
            saved += [Q, K, V, P]
        ctx.save_for_backward(*saved)
        ctx.packing, ctx.heads, ctx.scale, ctx.every, ctx.shapes = packing, heads, scale, every, (q.shape, k.shape)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
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
            _scatter(dk, group.slots, group.ended, torch.bmm(dS.mT, Q), ctx.heads)
            _scatter(dv, group.slots, group.ended, torch.bmm(P.mT, G), ctx.heads)
        return dq, dk, dv, None, None


def _heads(x: Tensor, slots: Tensor, heads: int, ended: Tensor | None = None) -> Float[Tensor, "matrix token part"]:
    """Packed tokens as one small matrix per row and head; zeros where a row has ended, if asked for."""
    picked = x.index_select(0, slots.flatten())
    if ended is not None:
        picked.masked_fill_(ended.reshape(-1, 1), 0)  # else a gradient would reach padding
    rows, tokens = slots.shape
    return picked.view(rows, tokens, heads, -1).transpose(1, 2).reshape(rows * heads, tokens, -1)


def _scatter(out: Tensor, slots: Tensor, ended: Tensor | None, parts: Tensor, heads: int) -> None:
    """Write each real token's numbers to its packed position: the inverse of ``_heads``."""
    rows, tokens = slots.shape
    flat = parts.view(rows, heads, tokens, -1).transpose(1, 2).reshape(rows * tokens, -1)
    positions = slots.flatten()
    if ended is not None:
        real = (~ended).flatten().nonzero()[:, 0]
        flat, positions = flat.index_select(0, real), positions.index_select(0, real)
    out.index_copy_(0, positions, flat)
