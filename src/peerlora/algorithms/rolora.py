"""RoLoRA: train one factor a round, mix only that one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peerlora.algorithms.adf_lora import ADFLoRA
from peerlora.algorithms.traits import ONE_FACTOR, Traits
from peerlora.lora.adapters import parse_blocks

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.exchange.schema import Schema
    from peerlora.lora.adapters import Adapters
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class RoLoRA(ADFLoRA):
    """Alternate as ADF-LoRA does, by default every round, but send only the factor that trained: half the bytes.

    With a server everybody holds the same frozen factor, so averaging the active one averages the products.  Over a
    sparse graph clients come to hold different ones, and what is not sent stops moving towards agreement.

    Source: "RoLoRA", arXiv 2409.02346 and 2502.01755 (NeurIPS 2025), for the server, as others describe it: B first,
    a switch every round; that is this method on the complete graph.
    Differs: equal client weights.  Over a graph it is the variant that the ADF-LoRA and TAD-LoRA papers compare with.
    A head that is not frozen trains in every round, so it gets twice the updates of a factor; in the RoLoRA baseline
    of FedRot-LoRA's code nothing but the active factor trains (``adapter.head=frozen``).  An interval above 1 is ours,
    to tell the effect of the phases from that of mixing the frozen factor.
    """

    interval: int = 1
    traits: ClassVar = Traits(
        source="RoLoRA, arXiv 2502.01755",
        trains="B and A in turn, `interval` rounds each",
        mixes="the factor that trained",
        sends="adapters",
        refuses={"relay": ONE_FACTOR},
    )

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """The active factor and a mixed head."""
        return x.select(*parse_blocks(self.active(t)), "head").message()

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round: the frozen factor stays at home."""
        x = learner.fit(x, self.active(t))
        return x.with_blocks(peers.mix(x.select(*parse_blocks(self.active(t)), "head")))
