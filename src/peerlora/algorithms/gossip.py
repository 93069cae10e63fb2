"""What the methods that mix the factors of Adapters with the neighbours have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from peerlora.algorithms.base import Operator
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.exchange.schema import Schema
    from peerlora.lora.adapters import Adapters


class FactorGossip:
    """State = the adapters; message = both factors and a head that is not private."""

    requires: ClassVar = Properties(row_stochastic=True, column_stochastic=True)
    mixes: ClassVar = "A and B"
    operator: ClassVar[Operator] = "product-sum"
    unequal_ranks: ClassVar = "it averages factors entry by entry, which needs one shape"

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """A, B and a mixed head."""
        return x.message()

    def start(self, x: Adapters, peers: Exchange) -> Adapters:
        """The common initial adapters."""
        return x

    def model(self, x: Adapters) -> Adapters:
        """The state is the model."""
        return x
