"""FedHL: clients train what their own rank holds of a reference, to which only what they learned is added."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import Traits
from peerlora.errors import ConfigError
from peerlora.exchange.combine import Combined, Received
from peerlora.exchange.product_average import cut_to_rank
from peerlora.lora.merged import Merged, Update
from peerlora.lora.product import Decomposition, decompose
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peerlora.exchange.base import Exchange
    from peerlora.exchange.schema import Schema
    from peerlora.lora.adapters import Adapters
    from peerlora.train.base import Learner

_EPS = 1e-6  # as in a re-implementation


@dataclass(frozen=True)
class FedHLState:
    """The adapters that clients train and use, and the updates from which those were cut."""

    adapters: Adapters
    reference: Merged
    """As balanced factors, largest direction first: their first r columns are the best approximation of rank r."""


@dataclass(frozen=True)
class FedHL(FactorGossip):
    """Client i holds a reference F_i and starts from its best approximation S_i of its own rank r_i.  K local steps on
    A and B make ``T_i = s_i B_i A_i``.  Then ``F_i <- sum_j W_ij F_j + sum_j v_ij (T_j - S_j)``: what the truncation
    dropped stays in the reference.  ``v_ij ~ W_ij / (e_j^2 + 1e-6)``, none above ``cap * W_ij``, with the truncation
    error ``e_j = ||F_j - S_j||^2`` over all layers.

    Source: "FedHL", arXiv 2505.18494: truncated start, reference-corrected aggregation and weights from truncation
    errors, as notes on a re-implementation describe them.  The server is the complete graph.
    Differs (ours): the cap (a client whose rank holds all of the reference has e = 0 and would take nearly all the
    weight); every client has its own reference of a bounded rank, and sends it beside its trained factors, since
    references that are never mixed never agree; what a neighbour started from follows from its reference.  Directions
    that the reference lacks keep the client's rows of A and get B = 0.  A client without contact goes on training.
    """

    weighting: Literal["squared", "plain", "equal"] = "squared"
    """1 / (e^2 + 1e-6), 1 / (e + 1e-6), or none."""
    cap: float = 2.0
    """No weight exceeds this times the neighbour's entry of W; equal weights never do."""
    growth: int = 4
    """The rank of the references, as a multiple of the largest adapter's."""
    traits: ClassVar = Traits(
        source="FedHL, arXiv 2505.18494",
        trains="A and B, cut from the client's reference",
        mixes="the references, and what training added, as products",
        operator="sum-product",
        sends="merges",
        sends_gradients=False,
        requires=Properties(row_stochastic=True, column_stochastic=True, neighbours_only=True),
        unequal_ranks=None,
        fresh_optimizer="the factors are cut anew from the reference after every exchange",
        own_gauge=True,
        merges_into="reference",
    )

    def __post_init__(self):
        if self.cap < 1 or self.growth < 1:
            raise ConfigError(f"algorithm.cap={self.cap}, algorithm.growth={self.growth} given; expected at least 1")

    def merged_columns(self, rank: int, senders: int, rounds: int) -> int:
        """The references, which never grow."""
        return self.growth * rank

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """A, B, a mixed head and a full reference."""
        full = {}
        for layer in x.spec.layers:
            rank = min(self.growth * x.spec.rank, layer.d_out, layer.d_in)
            full[f"left:{layer.name}"] = ((layer.d_out, rank), x.flat.dtype)
            full[f"right:{layer.name}"] = ((rank, layer.d_in), x.flat.dtype)
        return x.message() | full

    def start(self, x: Adapters, peers: Exchange) -> FedHLState:
        """References are zero, or the adapter that the run starts from."""
        rank, scaling = self.growth * x.spec.rank, x.scaling.double()[:, None, None]
        found = {name: decompose(scaling * B.double(), x.A[name].double()) for name, B in x.B.items()}
        return FedHLState(x, Merged({name: balanced(own, rank, x.flat) for name, own in found.items()}))

    def model(self, state: FedHLState) -> Adapters:
        """What a client's rank holds of its reference, trained."""
        return state.adapters

    def round(self, t: int, state: FedHLState, learner: Learner, peers: Exchange) -> FedHLState:
        """One round."""
        trained = replace(learner.fit(state.adapters, "AB"), merged=state.reference)
        rule = partial(corrected_reference, weighting=self.weighting, cap=self.cap)
        x = peers.combine(trained, rule, merged=True)
        assert x.merged is not None
        return FedHLState(replace(x, merged=None), x.merged)


def balanced(found: Decomposition, rank: int, like: Float[Tensor, "client parameter"]) -> Update:
    """The best approximation of a rank for every client of ``like``, in as many columns."""
    B, A = (factor.to(like).expand(len(like), -1, -1).contiguous() for factor in found.factors(rank))
    return Update(B, A, B.new_zeros(*B.shape[:2], 0))


def corrected_reference(received: Received, weighting: str, cap: float) -> Combined:
    """New references, and the adapters cut from them; measures what either cut off, squared."""
    own, sent, W = received.own, received.all_adapters, received.weights
    assert sent.merged is not None
    references, ranks = sent.merged.layers, own.ranks.to(W.device)
    width = next(iter(references.values())).left.shape[2]
    kept = torch.arange(width, device=W.device) < sent.ranks.to(W.device)[received.senders][..., None]
    V = capped(W, scores(truncation_errors(references, received, kept), weighting), cap)
    # W F + V (T - S): of a sender's reference, S are the columns that its rank keeps.
    shares = torch.where(kept, (W - V)[..., None], W[..., None])
    measures = {name: W.new_zeros(own.clients) for name in ("truncation_tail", "reference_tail")}
    factors, updates = {}, {}
    for layer, reference in references.items():
        F_left, F_right = (part[received.senders].double() for part in (reference.left, reference.right))
        T_left = (V * received.scaling)[..., None, None] * received.B(layer)
        left = torch.cat([shares[..., None, :] * F_left, T_left], -1).transpose(-3, -2).flatten(-2)
        found = decompose(left, torch.cat([F_right, received.A(layer)], -2).flatten(-3, -2))
        updates[layer] = balanced(found, width, own.flat)
        factors[layer] = cut_to_rank(found, own, layer)
        measures["truncation_tail"] += found.tail(ranks)
        measures["reference_tail"] += found.tail(torch.full_like(ranks, width))
    combined = received.with_factors(factors, measures)
    return replace(combined, adapters=replace(combined.adapters, merged=Merged(updates)))


def truncation_errors(
    references: Mapping[str, Update], received: Received, kept: Bool[Tensor, "receiver sender column"]
) -> Float[Tensor, "receiver sender"]:
    """``||F_j - S_j||^2`` over all layers: the balanced columns that a sender's rank does not keep."""
    error = torch.zeros(kept.shape[:2], dtype=torch.float64, device=kept.device)
    for reference in references.values():
        size2 = reference.left.double().square().sum(1) * reference.right.double().square().sum(2)
        error += (size2[received.senders] * ~kept).sum(-1)
    return error


def scores(error: Float[Tensor, "receiver sender"], weighting: str) -> Float[Tensor, "receiver sender"]:
    """What a sender's weight is multiplied by, before it is capped."""
    if weighting == "equal":
        return torch.ones_like(error)
    return 1 / ((error.square() if weighting == "squared" else error) + _EPS)


def capped(
    W: Float[Tensor, "receiver sender"], scores: Float[Tensor, "receiver sender"], cap: float
) -> Float[Tensor, "receiver sender"]:
    """W times the scores, with rows that sum to 1 and no entry above cap * W: the others share what was cut off."""
    wanted, most = W * scores, cap * W
    V = wanted / wanted.sum(1, keepdim=True)
    for _ in range(W.shape[1]):  # every pass but the last holds one sender more
        held = V >= most
        left = (1 - (most * held).sum(1, keepdim=True)).clamp_min(0.0)
        free = (wanted * ~held).sum(1, keepdim=True)
        V = torch.where(held, most, wanted * left / free.clamp_min(torch.finfo(V.dtype).tiny))
    return V / V.sum(1, keepdim=True)
