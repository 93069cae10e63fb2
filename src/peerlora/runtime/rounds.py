"""How the run comes from one round to the next: all clients together, with or without a virtual clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from peerlora.lora.adapters import Adapters
from peerlora.topology.weights import Matrix


@dataclass(frozen=True)
class RoundResult:
    """What a round leaves behind for its event."""

    losses: list[float]
    """[client], NaN for those that did not train."""
    sent: Adapters | None
    """What went into the mixing, where all clients mixed at once."""
    W: Matrix | None
    """None where no one matrix describes what the round did."""
    edges: list[tuple[int, int]]
    bytes_per_edge: int
    bytes_sent: int
    seconds_train: float
    seconds_mix: float
    measures: Mapping[str, float] = field(default_factory=dict)
    absent: list[int] = field(default_factory=list)


class Rounds(Protocol):
    """Advances a run by one round; everything else about a run does not depend on how that is done."""

    @property
    def virtual_seconds(self) -> float:
        """Since the start of the run, on the virtual clock; NaN without one."""
        ...

    def advance(self, t: int, state: Any) -> tuple[Any, RoundResult]:
        """Round ``t``."""
        ...

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What must be saved between two rounds to go on to the bit: tensors, and facts as JSON knows them."""
        ...

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what ``saved`` gave."""
        ...
