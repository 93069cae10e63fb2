"""HetLoRA: clients of different rank average zero-padded factors, weighted by the size of their products."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import IN_STEP, Traits
from peerlora.errors import ConfigError
from peerlora.exchange.combine import Combined, Received
from peerlora.lora.adapters import Adapters
from peerlora.lora.product import norms2
from peerlora.topology.properties import Properties
from peerlora.train.schedule import rate_factor

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class HetLoRA(FactorGossip):
    """K local steps on A and B; a tail of ranks that training made smaller is cut; then, of zero-padded factors,
    ``A_i <- sum_j v_ij A_j`` and ``B_i <- sum_j v_ij (s_j / s_i) B_j``, cut to the own rank, with
    ``v_ij ~ W_ij ||s_j B_j A_j||`` (norm over all layers).

    The tail of a client of rank r are its ranks beyond ``gamma r``.

    Source: Cho et al. 2024, arXiv 2401.06432 (zero-padding, weights by norm, tail penalty and self-pruning: as others
    describe the paper).
    Differs (ours): the penalty ``||B_tail|| ||A_tail||`` is one step of its gradient after the local steps, as weight
    decay is in AdamW, not a term of the local loss; one rank for all layers of a client, decided on the sum over
    layers; a client that is cut scales B so that only the cut part of its product goes; the scaling s = alpha/rank,
    of which the paper's description says nothing; the server is each receiver with its row of W, so the mean over
    clients is not kept.  The head follows the same weights v.

    Mind: s grows by r/r' at a cut from r to r' ranks.  Under SGD the product then moves (r/r')^2 times as fast by steps
    on B, by steps on A as before: at a rate near the largest stable one, a cut that halves the rank can diverge.
    """

    gamma: float = 0.99
    """The share of the ranks that is not tail; 1 neither penalises nor cuts."""
    penalty: float = 1e-4
    """Step size of the tail penalty: learning rate times its weight; it follows ``train.schedule``."""
    smallest: int = 1
    """No client is cut below this rank."""
    traits: ClassVar = Traits(
        source="HetLoRA, arXiv 2401.06432",
        mixes="A and B, zero-padded, weighted by the norm of the product",
        sends="models",
        sends_gradients=False,
        requires=Properties(row_stochastic=True, column_stochastic=True, neighbours_only=True),
        unequal_ranks=None,
        training_end=IN_STEP,
        fresh_optimizer="its momentum would move ranks that were cut",
        own_loop="it cuts ranks, and a PEFT model keeps the one it has",
    )

    def __post_init__(self):
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"algorithm.gamma: {self.gamma} given; expected a number above 0, at most 1")
        if self.penalty < 0 or self.smallest < 1:
            raise ConfigError(
                f"algorithm.penalty={self.penalty}, algorithm.smallest={self.smallest} given; expected at least 0 and 1"
            )

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round."""
        penalty = self.penalty * rate_factor(learner.settings, t)
        trained = shrink_tail(learner.fit(x, "AB"), self.kept(x.ranks), penalty)
        return peers.combine(self.prune(x, trained), norm_weighted_average)

    def quiet_round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """Ranks stay: what training did not make smaller is not cut."""
        return peers.combine(x, norm_weighted_average)

    def kept(self, ranks: Int[Tensor, " client"]) -> Int[Tensor, " client"]:
        """The ranks without their tail."""
        whole = (self.gamma * ranks.double() + 1e-9).floor().long()  # 0.58 * 50 must be 29
        return torch.minimum(whole.clamp_min(self.smallest), ranks)

    def prune(self, before: Adapters, after: Adapters) -> Adapters:
        """Cut the tail of those clients whose ``||B_tail|| ||A_tail||`` training made smaller."""
        kept = self.kept(after.ranks)
        smaller = (tail_norm(after, kept) < tail_norm(before, kept)).to(kept.device)
        ranks = torch.where(smaller, kept, after.ranks)
        cut = replace(after, flat=after.flat.clone(), ranks=ranks)
        keep = after.scaling / cut.scaling
        for A, B, tail in _with_tails(cut, ranks):
            A.masked_fill_(tail[:, :, None], 0.0)
            B.mul_(keep[:, None, None]).masked_fill_(tail[:, None, :], 0.0)
        return cut


def _with_tails(x: Adapters, kept: Int[Tensor, " client"]) -> list[tuple[Tensor, Tensor, Bool[Tensor, "client rank"]]]:
    """(A, B, which ranks lie beyond ``kept``) of every layer; A and B are views into ``x``."""
    tail = torch.arange(x.spec.rank, device=x.flat.device) >= kept.to(x.flat.device)[:, None]
    return [(A, x.B[layer], tail) for layer, A in x.A.items()]


def _tail_norms(A: Tensor, B: Tensor, tail: Tensor) -> tuple[Float[Tensor, " client"], Float[Tensor, " client"]]:
    return (A * tail[:, :, None]).flatten(1).norm(dim=1), (B * tail[:, None, :]).flatten(1).norm(dim=1)


def tail_norm(x: Adapters, kept: Int[Tensor, " client"]) -> Float[Tensor, " client"]:
    """``||B_tail||_F ||A_tail||_F`` of every client, summed over layers."""
    norms = [_tail_norms(A.double(), B.double(), tail) for A, B, tail in _with_tails(x, kept)]
    return torch.stack([a * b for a, b in norms]).sum(0)


def shrink_tail(x: Adapters, kept: Int[Tensor, " client"], step: float) -> Adapters:
    """One gradient step on ``tail_norm``, stopped at zero: ``B_tail`` loses ``step ||A_tail||`` of its norm."""
    x = replace(x, flat=x.flat.clone())
    for A, B, tail in _with_tails(x, kept):
        a, b = _tail_norms(A, B, tail)
        tiny = torch.finfo(a.dtype).tiny
        for factor, own, other, where in ((A, a, b, tail[:, :, None]), (B, b, a, tail[:, None, :])):
            left = (1 - step * other / own.clamp_min(tiny)).clamp_min(0.0)
            factor.mul_(torch.where(where, left[:, None, None], 1.0))
    return x


def norm_weighted_average(received: Received) -> Combined:
    """Average zero-padded factors by weight times norm of the product, then cut to the receiver's rank."""
    size2 = sum(
        norms2(received.B(layer).flatten(0, 1), received.A(layer).flatten(0, 1)).view_as(received.weights)
        for layer in received.layers
    )
    own, sizes = received.own, received.scaling * torch.as_tensor(size2).clamp_min(0.0).sqrt()
    heavy = received.weights * sizes
    total = heavy.sum(1, keepdim=True)
    weights = torch.where(total > 0, heavy / total, received.weights)  # nobody has trained yet: plain averaging
    reweighed, factors = replace(received, weights=weights), {}
    for layer in received.layers:
        ours = torch.arange(own.spec.rank, device=own.flat.device) < own.ranks.to(own.flat.device)[:, None]
        scaled = (weights * received.scaling) / own.scaling.double()[:, None]
        B = torch.einsum("ij,ijdr->idr", scaled, received.B(layer))
        A = torch.einsum("ij,ijrd->ird", weights, received.A(layer))
        factors[layer] = B * ours[:, None, :], A * ours[:, :, None]
    return reweighed.with_factors(factors)
