"""FedSA-LoRA: train both factors, share A, keep B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import ONE_FACTOR, Traits

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.exchange.schema import Schema
    from peerlora.lora.adapters import Adapters
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class FedSALoRA(FactorGossip):
    """K local steps on A and B, then ``A_i <- sum_j W_ij A_j``; every client keeps its own B.

    The models stay personal on purpose: judge them by every client's own accuracy, not by the averaged model.

    Source: Guo et al., arXiv 2410.01463 (ICLR 2025), for the server, which is the complete graph here; which tensors
    stay at home is as in the authors' code, Pengxin-Guo/FedSA-LoRA.
    Differs: equal client weights; on other graphs A is mixed with the neighbours.  The authors keep the head at home
    too: that is ``adapter.head=private``; a mixed head is mixed, as with every other method.
    """

    traits: ClassVar = Traits(
        source="FedSA-LoRA, arXiv 2410.01463",
        mixes="A",
        sends="adapters",
        refuses={"relay": ONE_FACTOR},
    )

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """A and a mixed head."""
        return x.select("A", "head").message()

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round."""
        x = learner.fit(x, "AB")
        return x.with_blocks(peers.mix(x.select("A", "head")))
