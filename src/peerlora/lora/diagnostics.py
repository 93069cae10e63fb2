"""How far clients disagree and what an exchange costs, each round."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from peerlora.lora import merged
from peerlora.lora.adapters import Adapters
from peerlora.lora.product import cross_term2, deviation, norms2

_RECEIVERS = 32  # clients, beyond which the local cross-term is averaged over an even sample of receivers
_CLIENTS = 64  # clients in one piece, where each is computed alone: 2.5 times as fast as 1000 at once
_SENDERS = 256  # senders whose factors are gathered at once, for some receivers: 50 MB at width 384 and rank 8, in fp64
_COLUMNS, _SCALARS = 32, 2**19  # columns and scalars of all clients' products in one piece: 4 MB fit a cache

LeftFactors = Float[Tensor, "client d_out rank"]
RightFactors = Float[Tensor, "client rank d_in"]
Weights = Float[Tensor, "receiver sender"]
if TYPE_CHECKING:
    Sparse = Any  # whose stubs know neither the number of its axes nor its arithmetic
else:
    Sparse = csr_array
MixingMatrix = Float[np.ndarray, "receiver sender"] | Sparse
"""Sparse where clients are many."""


@dataclass(frozen=True)
class Agreement:
    """Summed over layers.  Consensus distances are squared norms, cross-terms are norms.

    Where clients merge into their bases, the product is the whole update: what was merged and the factors.
    """

    consensus_A: float
    consensus_B: float
    consensus_product: float
    cross_term: float


@dataclass(frozen=True)
class Mismatch:
    """How far an exchange moved the clients: means over clients of squared norms, summed over layers.

    Client i put its factors (B_i, A_i) into the exchange and got (P_i, Q_i) out.  Where a server gives everybody one
    pair, these are the two measures of arXiv 2508.01348, as others describe it.
    """

    weak_mismatch: float
    """``mean_i || P_i Q_i - B_i A_i ||^2``.  No common product comes below the consensus distance of the products that
    went in; the averages of both factors exceed it by their squared cross-term."""
    strong_mismatch: float
    """``mean_i (|| P_i - B_i ||^2 + || Q_i - A_i ||^2)``.  No common pair comes below the averages of both factors,
    whose value is the consensus distance of A plus that of B, of what went in.  FLoRA's new factors count as moved."""


@dataclass(frozen=True)
class Diagnostics(Agreement, Mismatch):
    """Everything about one round, under the names that its event has."""

    local_cross_term: float


def diagnose(after: Adapters, sent: Adapters | None, W: MixingMatrix) -> Diagnostics:
    """Everything about one round: the clients ``after`` it, and what they ``sent`` into the exchange, if anything.

    Where rows of W don't sum to 1, clients sent shares of a sum, not models: what compares the two is NaN.
    """
    disagreement = vars(agreement(after))
    if sent is not None and not np.allclose(W.sum(axis=1), 1):
        return Diagnostics(**disagreement, weak_mismatch=np.nan, strong_mismatch=np.nan, local_cross_term=np.nan)
    if sent is None:
        return Diagnostics(**disagreement, weak_mismatch=0.0, strong_mismatch=0.0, local_cross_term=0.0)
    moved = mismatch(before_exchange(after, sent), after)
    return Diagnostics(**disagreement, **vars(moved), local_cross_term=local_cross_term(sent, W, after))


def neighbourhood(
    after: Adapters, sent: Adapters | None, met: Adapters | None, row: Float[np.ndarray, "1 sender"]
) -> Diagnostics:
    """What one client can know of a round: how far apart those were who met, itself too, before they mixed.

    ``after`` and ``sent`` hold the client alone, ``met`` all who met, ``row`` the client's weights for them.  What was
    not exchanged, and all where nobody was met, is not known: NaN.  Merged parts are left out.
    """
    nan = float("nan")
    unknown = Diagnostics(nan, nan, nan, nan, nan, nan, nan)
    if sent is None or met is None or met.clients == 1:  # alone it would be 0, as where all agree
        return unknown
    moved = mismatch(before_exchange(after, sent), after)
    known = {"A", "B"} & set(met.spec.blocks)
    if len(known) == 2:
        met = replace(met, merged=None)
        return Diagnostics(**vars(agreement(met)), **vars(moved), local_cross_term=local_cross_term(met, row))
    disagreement = {
        f"consensus_{block}": sum(_norm2(deviation(factor.double())) for factor in getattr(met, block).values())
        / met.clients
        for block in known
    }
    return replace(unknown, **vars(moved), **disagreement)


def agreement(x: Adapters) -> Agreement:
    """Consensus of A, of B and of their product, and the global cross-term."""
    D_A = D_B = D_product = cross2 = 0.0
    scale, unit = _relative_scaling(x), _unit(x)
    for layer, A in x.A.items():
        A, B = A.double(), x.B[layer].double()
        D_A += _norm2(deviation(A)) / x.clients
        D_B += _norm2(deviation(B)) / x.clients
        B = B * scale
        lost2 = float(cross_term2(B, A))
        if x.merged is None:
            D_product += max(0.0, float(distances2(B, A, _mean(B), _mean(A)).mean()) - lost2)
        else:
            D_product += float(merged.consensus(merged.whole(x.merged.layers[layer], unit * B, A))) / unit**2
        cross2 += lost2
    return Agreement(D_A, D_B, D_product, cross2**0.5)


def mismatch(before: Adapters, after: Adapters) -> Mismatch:
    """How far every client moved from ``before`` to ``after`` the exchange."""
    weak = strong = 0.0
    scales = _relative_scaling(before), _relative_scaling(after)
    merges = after.merged is not None and before.merged is not after.merged
    for layer, A in before.A.items():
        factors = (before.B[layer], A, after.B[layer], after.A[layer])
        if merges:
            weak += _moved_with_merges(before, after, layer, scales)
        for some in zip(*(each.split(_CLIENTS) for each in (*factors, *scales)), strict=True):
            B, A, P, Q, was, now = (each.double() for each in some)
            strong += (_norm2(P - B) + _norm2(Q - A)) / after.clients
            if not merges:
                weak += float(distances2(B * was, A, P * now, Q).sum()) / after.clients
    return Mismatch(weak, strong)


def _moved_with_merges(before: Adapters, after: Adapters, layer: str, scales: tuple[Tensor, Tensor]) -> float:
    """The mean square of how far every client's whole update of a layer moved, merged parts included."""
    B, A, P, Q = (each.double() for each in (before.B[layer], before.A[layer], after.B[layer], after.A[layer]))
    earlier, unit = (before.merged or before.with_empty_merges().merged), _unit(after)
    assert earlier is not None and after.merged is not None  # with_empty_merges() gives one
    was = merged.whole(earlier.layers[layer], unit * scales[0] * B, A)
    now = merged.whole(after.merged.layers[layer], unit * scales[1] * P, Q)
    return float(merged.distances2(was, now).mean()) / unit**2


def before_exchange(after: Adapters, sent: Adapters) -> Adapters:
    """The clients just before an exchange: what they sent, and, where that was one factor, the other as it still is."""
    return sent if {"A", "B"} <= set(sent.spec.blocks) else after.with_blocks(sent)


def local_cross_term(sent: Adapters, W: MixingMatrix, after: Adapters | None = None) -> float:
    """What mixing the factors of ``sent`` loses against mixing their products, averaged over receivers.

    Of many receivers an even sample is taken.  Where one factor alone was sent, the receiver keeps its own other one,
    which is taken from ``after``; without that the answer is NaN.  It is what factor-wise mixing would have lost where
    a method mixed products instead.
    """
    return float(local_cross_terms2(sent, W, after).sqrt().mean())


def local_cross_terms2(sent: Adapters, W: MixingMatrix, after: Adapters | None = None) -> Float[Tensor, " measured"]:
    """The squared losses of which ``local_cross_term`` is the mean root, of the receivers that it looks at."""
    kept = tuple(block for block in ("A", "B") if block not in sent.spec.blocks)
    if kept and after is None:
        return torch.full((1,), torch.nan, dtype=torch.float64)
    x = before_exchange(after, sent) if after is not None else sent
    rows = W.shape[0]
    receivers = np.unique(np.linspace(0, rows - 1, min(rows, _RECEIVERS)).astype(int))
    weights = W[receivers]
    if not isinstance(weights, np.ndarray):  # of many clients, those that nobody here hears from are left out
        heard = np.union1d(weights.nonzero()[1], receivers)
        x, weights = x.rows(heard.tolist()), weights[:, heard].toarray()
        receivers = np.searchsorted(heard, receivers)
    weights, scale = torch.from_numpy(weights), _relative_scaling(x)
    total, different = torch.zeros(len(receivers), dtype=torch.float64), _different(weights)
    for layer, A in x.A.items():
        B, A = x.B[layer].double() * scale, A.double()
        total += _lost2(B, A, weights, different, kept, torch.from_numpy(receivers))
    return total


def distances2(B: LeftFactors, A: RightFactors, P: LeftFactors, Q: RightFactors) -> Float[Tensor, " client"]:
    """``|| P_i Q_i - B_i A_i ||_F^2`` of every client, from ``[P - B, B] [Q; Q - A]``.

    That form gives nearly equal pairs their digits: no small difference of two large numbers.
    """
    few = zip(*(factor.split(_CLIENTS) for factor in (B, A, P, Q)), strict=True)
    return torch.cat([norms2(torch.cat([P - B, B], dim=2), torch.cat([Q, Q - A], dim=1)) for B, A, P, Q in few])


def _lost2(
    B: LeftFactors,
    A: RightFactors,
    W: Weights,
    different: tuple[Float[Tensor, "row sender"], Int[Tensor, " receiver"]],
    kept: tuple[str, ...],
    receivers: Int[Tensor, " receiver"],
) -> Float[Tensor, " receiver"]:
    """``|| sum_j w_ij B_j A_j - P_i Q_i ||^2`` of every receiver, P and Q being its factors after the exchange.

    Identity 2, where both are averages: ``sum_j w_j B_j A_j - B+ A+ = sum_j w_j (B_j - B+)(A_j - A+)``.
    """
    left, right = _kept_part(B, A, W, kept, receivers)
    rows, place = different
    alone = rows if not kept else W
    if _cost_one_by_one(alone, B, A) > _cost_together(rows, B, A):
        return _lost2_together(B, A, rows, place, left, right)
    if not kept:
        return _lost2_alone(B, A, rows)[place]
    return _lost2_alone(B, A, W, left, right)


def _kept_part(
    B: LeftFactors, A: RightFactors, W: Weights, kept: tuple[str, ...], receivers: Int[Tensor, " receiver"]
) -> tuple[Float[Tensor, "receiver d_out wide"], Float[Tensor, "receiver wide d_in"]]:
    """What adds to identity 2 where a receiver keeps its own factor: ``B+ (A+ - A_i)``, ``(B+ - B_i) A+``, or both."""
    left, right = [B.new_zeros(len(W), B.shape[1], 0)], [A.new_zeros(len(W), 0, A.shape[2])]
    mixed_B, mixed_A = (torch.tensordot(W, factor, 1) for factor in (B, A)) if kept else (B, A)
    if "A" in kept:
        left.append(mixed_B)
        right.append(mixed_A - A[receivers])
    if "B" in kept:
        left.append(mixed_B - B[receivers])
        right.append(A[receivers] if "A" in kept else mixed_A)
    return torch.cat(left, dim=2), torch.cat(right, dim=1)


def _lost2_alone(B: LeftFactors, A: RightFactors, W: Weights, *kept: Tensor) -> Float[Tensor, " receiver"]:
    """Of every receiver, from its senders alone; receivers that have as many are looked at together."""
    counts, lost = W.count_nonzero(dim=1), W.new_zeros(len(W))
    for count in counts.unique().tolist():
        for some in (counts == count).nonzero()[:, 0].split(max(1, _SENDERS // max(1, count))):
            linked = W[some].nonzero(as_tuple=True)[1].view(len(some), count)
            w, b, a = W[some].gather(1, linked)[..., None, None], B[linked], A[linked]
            b, a = w * (b - (w * b).sum(1, keepdim=True)), a - (w * a).sum(1, keepdim=True)
            left, right = b.transpose(1, 2).flatten(2), a.flatten(1, 2)
            if kept:
                left, right = torch.cat([left, kept[0][some]], dim=2), torch.cat([right, kept[1][some]], dim=1)
            lost[some] = norms2(left, right)
    return lost


def _lost2_together(
    B: LeftFactors,
    A: RightFactors,
    rows: Float[Tensor, "row sender"],
    place: Int[Tensor, " receiver"],
    left: Float[Tensor, "receiver d_out wide"],
    right: Float[Tensor, "receiver wide d_in"],
) -> Float[Tensor, " receiver"]:
    """Of all receivers of a dense graph: everybody's products, a few columns at a time, are formed once for all.

    Taken from the deviations from the overall average, which changes nothing in identity 2 and keeps the digits.
    """
    b, a = deviation(B), deviation(A)
    left = torch.cat([-torch.tensordot(rows, b, 1)[place], left], dim=2)
    right = torch.cat([torch.tensordot(rows, a, 1)[place], right], dim=1)
    lost, size = torch.zeros(len(place), dtype=torch.float64), max(1, _SCALARS // (B.shape[1] * _COLUMNS))
    for strip in (slice(start, start + _COLUMNS) for start in range(0, A.shape[2], _COLUMNS)):
        thin = right[..., strip]
        products = torch.zeros(len(rows), B.shape[1] * thin.shape[2], dtype=torch.float64)
        for some in (slice(start, start + size) for start in range(0, len(B), size)):
            products.addmm_(rows[:, some], torch.bmm(b[some], a[some, :, strip]).flatten(1))
        found = torch.baddbmm(products.view(len(rows), B.shape[1], -1)[place], left, thin)
        lost += torch.linalg.vector_norm(found, dim=(1, 2)).square()
    return lost


def _cost_one_by_one(rows: Float[Tensor, "row sender"], B: LeftFactors, A: RightFactors) -> float:
    """Multiplications of ``_lost2_alone``."""
    wide, d_out, d_in = rows.count_nonzero(dim=1).double() * B.shape[2], B.shape[1], A.shape[2]
    return float(torch.where(wide <= d_in, wide * wide * (d_out + d_in), wide * d_out * d_in).sum())


def _cost_together(rows: Float[Tensor, "row sender"], B: LeftFactors, A: RightFactors) -> float:
    """Multiplications of ``_lost2_together``."""
    return B.shape[1] * A.shape[2] * (len(B) * (B.shape[2] + len(rows)) + 0.0)


def _different(W: Weights) -> tuple[Float[Tensor, "row sender"], Int[Tensor, " receiver"]]:
    """The rows that differ by more than rounding, and which of them each row is: on a complete graph there is one."""
    _, first, place = np.unique(W.numpy().round(12), axis=0, return_index=True, return_inverse=True)
    return W[torch.from_numpy(first)], torch.from_numpy(place.reshape(-1))


def _norm2(x: Tensor) -> float:
    """Squared norm, without the temporary that squares would need: it took most of the time."""
    return float(torch.linalg.vector_norm(x)) ** 2


def _mean(x: Float[Tensor, "client ..."]) -> Float[Tensor, "client ..."]:
    """The average, once for every client."""
    return x.mean(0, keepdim=True).expand_as(x)


def _relative_scaling(x: Adapters) -> Float[Tensor, "client 1 1"]:
    """The scaling of every client relative to that of the largest rank: a client's product is what its model adds.

    All ones where ranks are equal, since the scaling is left out of all figures.
    """
    ratio = x.spec.rank / x.ranks.double()
    return (ratio.sqrt() if x.spec.rslora else ratio)[:, None, None]


def _unit(x: Adapters) -> float:
    """The scaling of a client of the largest rank."""
    return x.spec.scaling(x.spec.rank)
