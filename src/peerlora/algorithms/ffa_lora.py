"""FFA-LoRA: A is common and never trained, B is trained and mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import Traits

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.exchange.schema import Schema
    from peerlora.lora.adapters import Adapters
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class FFALoRA(FactorGossip):
    """K local steps on B, then ``B_i <- sum_j W_ij B_j``; A stays what it was at the start, the same for all.

    The product is linear in B, so this mixes the products exactly on every graph, with half the bytes.

    Source: "FFA-LoRA", arXiv 2403.12313 (ICLR 2024), for the server, as others describe it: the complete graph here.
    ConLoRA (the authors' code in LuYuPromax/DFL-LORA) and DLoRA-FA (arXiv 2505.21382) are the same over a graph.
    Differs: equal client weights; A is Kaiming-uniform, one of the starts that the paper tries.  ConLoRA's code keeps
    Adam's memory for the whole run and trains whole local epochs; here ``train.optimizer_state`` decides, by default
    afresh every round, and a round has ``train.local_steps``.
    """

    traits: ClassVar = Traits(
        source="FFA-LoRA, arXiv 2403.12313",
        trains="B",
        mixes="B",
        operator="both",
        sends="adapters",
    )

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """B and a mixed head."""
        return x.select("B", "head").message()

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round."""
        x = learner.fit(x, "B")
        return x.with_blocks(peers.mix(x.select("B", "head")))
