"""FedRot-LoRA: turn each neighbour's factors towards the own ones, then average."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import Traits
from peerlora.errors import ConfigError
from peerlora.exchange.combine import Combined, Received
from peerlora.lora.product import nearest_rotation
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.lora.adapters import Adapters
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class FedRotLoRA(FactorGossip):
    """K local steps on A and B, then ``A_i <- sum_j W_ij R_ij^T A_j`` and ``B_i <- sum_j W_ij B_j R_ij``.

    R_ij turns j's factor towards i's; it leaves j's product as it is.  A and B are aligned in alternate rounds.

    Source: "FedRot-LoRA", arXiv 2602.23638 and the authors' code (alignment, alternation, the soft rotation with its
    determinant fix, no rotation in round 0: as in the code).
    Differs (ours): the paper's reference is the server's last average; here each receiver is the reference for its
    neighbours, so no server is needed, but the mean of the raw factors is no longer kept.  Neighbours are weighed by
    W, where the code's server weighs clients by their rows.  The determinant is fixed at full strength too (the paper
    asks for rotations, the code's hard path does not check).
    """

    strength: float = 0.5
    """Lambda: 0 averages the factors as they are, 1 turns them all the way."""
    first: Literal["A", "B"] = "A"
    """The factor that is aligned in odd rounds, the other one in even ones; of no effect with strength 0."""
    traits: ClassVar = Traits(
        source="FedRot-LoRA, arXiv 2602.23638",
        mixes="A and B, turned towards the receiver",
        sends="models",
        sends_gradients=False,
        requires=Properties(row_stochastic=True, column_stochastic=True, neighbours_only=True),
        unequal_ranks="a rotation needs factors of one common shape",
        fresh_optimizer="the factors are turned in every exchange",
        own_gauge=True,
    )

    def __post_init__(self):
        if not 0 <= self.strength <= 1:
            raise ConfigError(f"algorithm.strength: {self.strength} given; expected a number from 0 to 1")

    def aligned(self, t: int) -> Literal["A", "B"]:
        """The factor by which round ``t`` aligns."""
        return self.first if t % 2 == 1 else ("B" if self.first == "A" else "A")

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round."""
        x = learner.fit(x, "AB")
        if t == 0 or self.strength == 0:
            return peers.mix(x)
        return peers.combine(x, partial(aligned_average, on=self.aligned(t), strength=self.strength))


def aligned_average(received: Received, on: str, strength: float) -> Combined:
    """The weighted average of factors turned towards the receiver's; measures squared distances before and after."""
    own, W = received.own, received.weights
    before = after = torch.zeros(own.clients, dtype=torch.float64, device=own.flat.device)
    factors = {}
    for layer in received.layers:
        B, A = received.B(layer), received.A(layer)
        B_own, A_own = own.B[layer].double(), own.A[layer].double()
        if on == "A":
            M = torch.einsum("ijad,ibd->ijab", A, A_own)
            squares = A.square().sum((2, 3)) + A_own.square().sum((1, 2))[:, None]
        else:
            M = torch.einsum("ijda,idb->ijab", B, B_own)
            squares = B.square().sum((2, 3)) + B_own.square().sum((1, 2))[:, None]
        R = nearest_rotation(M, strength)
        before = before + (W * (squares - 2 * M.diagonal(dim1=-2, dim2=-1).sum(-1))).sum(1)
        after = after + (W * (squares - 2 * (R * M).sum((2, 3)))).sum(1)
        turned = W[..., None, None] * R
        factors[layer] = torch.einsum("ijdb,ijbc->idc", B, turned), torch.einsum("ijba,ijbd->iad", turned, A)
    return received.with_factors(factors, {"alignment_before": before, "alignment_after": after})
