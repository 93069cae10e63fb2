"""What the methods that mix the factors of Adapters with the neighbours have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from peerlora.algorithms.base import Method
from peerlora.algorithms.traits import IN_STEP
from peerlora.errors import ConfigError
from peerlora.lora.adapters import parse_blocks

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.exchange.schema import Schema
    from peerlora.lora.adapters import Adapters


IN_TURN = "A and B; with `interval` in turn"
"""For people: what a method trains whose schedule is ``Scheduled``."""


class FactorGossip(Method):
    """State = the adapters; message = both factors and a head that is not private."""

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """A, B and a mixed head."""
        return x.message()

    def start(self, x: Adapters, peers: Exchange) -> Adapters:
        """The common initial adapters."""
        return x

    def model(self, x: Adapters) -> Adapters:
        """The state is the model."""
        return x

    @property
    def training_end_refusal(self) -> str | None:
        """None where a round is local steps and mixing: a client without steps is then an ordinary neighbour."""
        return self.traits.quiet_refusal() or self.traits.training_end


@dataclass(frozen=True)
class Scheduled(FactorGossip):
    """Which factors train in which round: both in every one, or B and A in turn.

    The phase comes from the global round counter, so clients agree on it even when they had no contact.  Whatever a
    method remembers of a block that does not train in a round is held: neither decayed nor fed zeros.
    """

    interval: int | None = None
    """T, rounds between two switches of the active factor; null: both train in every round."""

    def __post_init__(self):
        if self.interval is not None and self.interval < 1:
            raise ConfigError(f"algorithm.interval: {self.interval} given; expected at least 1 round")

    @property
    def switches_every(self) -> int | None:
        """``interval``."""
        return self.interval

    def active(self, t: int) -> str:
        """The factors that train in round ``t``."""
        if self.interval is None:
            return "AB"
        return "B" if (t // self.interval) % 2 == 0 else "A"

    def changing(self, t: int, x: Adapters) -> Bool[Tensor, " parameter"]:
        """The columns that train in round ``t``: those of the active factors and of a head."""
        mask = torch.zeros(x.spec.parameters, dtype=torch.bool, device=x.flat.device)
        for block in x.spec.trained(parse_blocks(self.active(t))):
            mask[x.spec.columns(block)] = True
        return mask


class Stateful(Scheduled):
    """A method whose state holds the adapters, as ``x``, beside what it remembers."""

    def model(self, state: Any) -> Adapters:
        """The client's own."""
        return state.x

    @property
    def training_end_refusal(self) -> str | None:
        """There is one: what clients remember goes with the training of others."""
        return self.traits.quiet_refusal() or IN_STEP
