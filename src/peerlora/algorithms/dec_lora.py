"""Dec-LoRA: train both factors, mix both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import Traits

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.lora.adapters import Adapters
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class DecLoRA(FactorGossip):
    """K local steps on A and B, then ``A_i <- sum_j W_ij A_j`` and ``B_i <- sum_j W_ij B_j``.

    Source: "Decentralized Low-Rank Fine-Tuning of Large Language Models", arXiv 2501.15361 (update as in the paper;
    optimiser, alpha and target modules are not given there and are our choice).
    """

    traits: ClassVar = Traits(
        source="Dec-LoRA, arXiv 2501.15361",
        sends="adapters",
    )

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round."""
        return peers.mix(learner.fit(x, "AB"))
