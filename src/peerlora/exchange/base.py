"""The one thing that differs between runtimes: how values cross from client to client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from peerlora.topology.schedule import RoundGraph

Payload = TypeVar("Payload")


class Exchange(Protocol):
    """Gossip among all clients of the run, seen from the clients that are held here."""

    clients: Sequence[int]
    """Their numbers: the leading axis of everything that is mixed."""
    graph: RoundGraph
    """Who is linked in this round, and the weights."""

    def begin(self, t: int) -> None:
        """Set the round."""
        ...

    def mix(self, x: Payload) -> Payload:
        """``x_i <- sum_j W_ij x_j`` for every leaf; of Adapters, everything but a private head."""
        ...
