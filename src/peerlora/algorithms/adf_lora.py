"""ADF-LoRA: train one factor a round, mix both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peerlora.algorithms.gossip import Scheduled
from peerlora.algorithms.traits import Traits

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.lora.adapters import Adapters
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class ADFLoRA(Scheduled):
    """Only the active factor trains in a round; both are mixed, so the frozen one keeps moving towards consensus.

    Source: Wang, Li, Zhou, Li, Liu 2025, arXiv 2511.18291 (principle as in the paper).
    Differs: B first is our reading, forced by B = 0 at the start, where A has no gradient; a client with several
    contacts in one round mixes by the topology's weights, since the paper's rule for that was not found.
    """

    interval: int = 5
    """T, rounds between two switches of the active factor."""
    traits: ClassVar = Traits(
        source="ADF-LoRA, arXiv 2511.18291",
        trains="B and A in turn, `interval` rounds each",
        sends="adapters",
    )

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round: the mixing of the frozen factor is the point."""
        return peers.mix(learner.fit(x, self.active(t)))
