"""Every client alone: the baseline that shows what exchanging bought."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peerlora.algorithms.base import Method
from peerlora.algorithms.traits import Traits
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.exchange.schema import Schema
    from peerlora.lora.adapters import Adapters
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class Local(Method):
    """Train both factors on the own data, never exchange anything."""

    traits: ClassVar = Traits(
        source="baseline",
        mixes="nothing",
        operator="none",
        sends="nothing",
        requires=Properties(),
        unequal_ranks=None,
    )

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """Nothing is sent."""
        return {}

    def start(self, x: Adapters, peers: Exchange) -> Adapters:
        """The common initial adapters."""
        return x

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """K local steps."""
        return learner.fit(x, "AB")

    @property
    def training_end_refusal(self) -> str | None:
        """None: a client that trains no more stays as it is."""
        return None

    def model(self, x: Adapters) -> Adapters:
        """The state is the model."""
        return x
