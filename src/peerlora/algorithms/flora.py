"""FLoRA: stack the adapters of all, merge the stack into the base, start anew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch

from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import Traits
from peerlora.exchange.combine import Combined, Received
from peerlora.lora.adapter_init import redrawn
from peerlora.lora.adapters import mask_ranks
from peerlora.lora.product import joined
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.lora.adapters import Adapters
    from peerlora.topology.schedule import Topology
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class FLoRA(FactorGossip):
    """K local steps on A and B, then ``weight_i += sum_j W_ij s_j B_j A_j``; A is drawn anew, B is zero.

    The sum is kept as it is, ``[W_i1 s_1 B_1, W_i2 s_2 B_2, ...] [A_1; A_2; ...]``: exact for adapters of any rank.

    Source: "FLoRA", arXiv 2409.05976, and its code (ATP-1010/FederatedLLM), as others describe them: stacking with the
    weights on one factor, merge, fresh factors.  The server is the complete graph with equal weights.
    Differs: clients of unequal rank have the scaling alpha / rank each; their code has alpha = 2 rank, so that it is
    the same for all.  Clients count equally.  On another graph (ours) every receiver merges what its row of W gives.
    Clients then own different bases, whose mean is exact while their differences are never mixed away, and grow where W
    has negative eigenvalues: this form pays only where nearly everybody meets nearly everybody.  A client without
    contact merges nothing and goes on training its factors.  A new A is the same for all clients, entries as in PEFT's
    start.
    """

    traits: ClassVar = Traits(
        source="FLoRA, arXiv 2409.05976",
        trains="A and B, drawn anew every round",
        mixes="A and B, as products, into the base",
        operator="sum-product",
        sends="merges",
        sends_gradients=False,
        requires=Properties(row_stochastic=True, column_stochastic=True, neighbours_only=True),
        unequal_ranks=None,
        fresh_optimizer="A is drawn anew after every exchange",
        merges_into="base",
        quiet="every exchange ends with B = 0, so a round without training would mix nothing",
    )

    def prepared(self, topology: Topology, rounds: int) -> tuple[FLoRA, tuple[str, ...]]:
        """The method as it is, with a note where there is no server."""
        return self, drift_notes("flora", topology, growth(topology))

    def merged_columns(self, rank: int, senders: int, rounds: int) -> int:
        """All that was ever received, side by side."""
        return rank * senders * rounds

    def start(self, x: Adapters, peers: Exchange) -> Adapters:
        """Nothing is merged yet."""
        return x.with_empty_merges()

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round."""
        blank = replace(x, flat=x.flat[:1], ranks=torch.tensor([x.spec.rank]), merged=None)
        fresh = redrawn(blank, "A", peers.shared_random("factors"))
        return peers.combine(learner.fit(x, "AB"), partial(stacked_merge, fresh=fresh))


def stacked_merge(received: Received, fresh: Adapters) -> Combined:
    """Every receiver's weighted sum of products joins what it has merged; its factors are the fresh ones."""
    assert received.own.merged is not None
    weights = received.weights * received.scaling
    sums = {layer: joined(received.B(layer), received.A(layer), weights) for layer in received.layers}
    x = received.average()
    for layer, A in fresh.A.items():
        x.A[layer].copy_(A)
        x.B[layer].zero_()
    return Combined(replace(mask_ranks(x), merged=received.own.merged.plus(sums)))


def drift_notes(name: str, topology: Topology, risk: str = "") -> tuple[str, ...]:
    """What is to be said of a method that merges what it receives, where not everybody meets everybody."""
    if topology.averages_all:
        return ()
    return (
        f"{name} merges what a client receives, and merged parts are never mixed again: on "
        f"{topology.config.kind} the clients' bases drift apart for good; with topology=complete they stay "
        f"equal{risk}",
    )


def growth(topology: Topology) -> str:
    """A warning where the differences of merged parts can grow without bound.

    Merging W times what each client lacks changes its distance to its own optimum by ``I - c W``, which expands along
    eigenvectors of W with a negative eigenvalue.
    """
    if topology.config.weights == "laplacian":
        return ""
    if topology.properties.static and topology.smallest_eigenvalue > -1e-9:
        return ""
    return "; where W has negative eigenvalues they run away from each other: topology.weights=laplacian has none"
