"""Rounds: how the clients held here come from one round to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from peerlora.lora.adapters import Adapters
from peerlora.runs.events import Event
from peerlora.topology.storage import Matrix


@dataclass(frozen=True)
class RoundResult:
    """What one round cost and did."""

    losses: list[float]
    """[client], NaN for those that did not train."""
    sent: Adapters | None
    """What went into the mixing, where all clients mixed at once."""
    W: Matrix | None
    """None where no single matrix describes the round."""
    edges: list[tuple[int, int]]
    """Links of the clients held here that carried anything."""
    bytes_per_edge: int
    bytes_sent: int
    seconds_train: float
    seconds_mix: float
    measures: Mapping[str, float] = field(default_factory=dict)
    absent: list[int] = field(default_factory=list)
    received: Adapters | None = None
    """[sender] of a real peer: the adapters whose links counted, its own among them."""
    missing: Mapping[int, str] = field(default_factory=dict)
    """Of a real peer: neighbours whose link did not count, and why."""
    events: Sequence[Event] = ()
    """Evaluations and warnings of training loops of the user's own."""


class Rounds(Protocol):
    """Advances a run by one round; nothing else in a run depends on how."""

    stopped: set[int]
    """Clients that train no more, and go on exchanging; asynchronous methods have none."""

    @property
    def virtual_seconds(self) -> float:
        """Seconds since the start of the run, on the virtual clock; NaN without one."""
        ...

    def advance(self, t: int, state: Any) -> tuple[Any, RoundResult]:
        """Run round ``t``; return the new state and what the round cost and did."""
        ...

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint keeps between two rounds: tensors, and facts as JSON knows them."""
        ...

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], x: Adapters) -> None:
        """Restore what ``state_dict`` returned; ``x`` are the adapters of that moment, for their layout."""
        ...
