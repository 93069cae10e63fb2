"""Softmax attention on packed tokens, with its backward written out.

Twice as fast on a CPU as torch's fused kernel at short rows, and in bf16 several times (docs/performance.md); the
plain twin is torch's own ``scaled_dot_product_attention`` on padded rows.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.train.packing import TokenPacking


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
        outs, saved = [], []
        for group in packing.groups:
            own = group.slots if every else group.rows[:, None]
            Q, K, V = _heads(q, own, heads), _heads(k, group.slots, heads), _heads(v, group.slots, heads)
            scores = torch.bmm(Q, K.mT).mul_(scale)
            by_row, bias = (len(own), heads, *scores.shape[1:]), group.bias(q.dtype)
            if bias is not None:
                scores.view(by_row).add_(bias[:, None])
            P = torch.softmax(scores, -1)
            if every and group.ended is not None:  # what an ended query finds counts for nothing, here and in backward
                P.view(by_row).masked_fill_(group.ended[:, None].mT, 0)
            outs.append(torch.bmm(P, V))
            saved += [Q, K, V, P]
        ctx.save_for_backward(*saved)
        ctx.packing, ctx.heads, ctx.scale, ctx.every = packing, heads, scale, every
        return _packed(outs, packing.back if every else packing.back_first, heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (g,), packing, saved = gradients, ctx.packing, ctx.saved_tensors
        dqs, dks, dvs = [], [], []
        for number, group in enumerate(packing.groups):
            Q, K, V, P = saved[4 * number : 4 * number + 4]
            G = _heads(g, group.slots if ctx.every else group.rows[:, None], ctx.heads)
            dP = torch.bmm(G, V.mT)
            dS = torch._softmax_backward_data(dP, P, -1, dP.dtype).mul_(ctx.scale)
            dqs.append(torch.bmm(dS, K))
            dks.append(torch.bmm(dS.mT, Q))
            dvs.append(torch.bmm(P.mT, G))
        dq = _packed(dqs, packing.back if ctx.every else packing.back_first, ctx.heads)
        return dq, _packed(dks, packing.back, ctx.heads), _packed(dvs, packing.back, ctx.heads), None, None


def _heads(x: Tensor, slots: Tensor, heads: int) -> Float[Tensor, "matrix token part"]:
    """Packed tokens as one small matrix per row and head; where a row has ended, its first token again."""
    rows, tokens = slots.shape
    picked = x.index_select(0, slots.flatten()).view(rows, tokens, heads, -1)
    return picked.transpose(1, 2).reshape(rows * heads, tokens, -1)


def _packed(groups: list[Tensor], back: Tensor, heads: int) -> Float[Tensor, "place width"]:
    """The way back: ``groups`` [matrix, token, part], laid end to end as [token, width], and of these the real ones."""
    width = heads * groups[0].shape[-1]
    laid, start = groups[0].new_empty(sum(part.numel() for part in groups) // width, width), 0
    for part in groups:
        matrices, tokens, _ = part.shape
        end = start + matrices // heads * tokens
        laid[start:end].view(-1, tokens, heads, part.shape[-1]).copy_(
            part.view(-1, heads, tokens, part.shape[-1]).transpose(1, 2)
        )
        start = end
    return laid.index_select(0, back)
