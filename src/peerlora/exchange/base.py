"""The one thing that differs between runtimes: how values cross from client to client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.exchange.combine import CombineRule
from peerlora.exchange.replicas import Difference
from peerlora.exchange.schema import Schema
from peerlora.lora.adapters import Adapters
from peerlora.topology.schedule import RoundGraph, Topology

Payload = TypeVar("Payload")


@runtime_checkable
class Exchange(Protocol):
    """Gossip among all clients of the run, seen from the clients that are held here."""

    clients: Sequence[int]
    """Their numbers: the leading axis of everything that is mixed."""
    graph: RoundGraph
    """Who is linked in this round, and the weights."""

    def begin(self, t: int, absent: Sequence[int] = ()) -> None:
        """Set the round, in which nobody has a link to those who are ``absent``."""
        ...

    def mix(self, x: Payload) -> Payload:
        """``x_i <- sum_j W_ij x_j`` for every leaf; of Adapters, everything but a private head."""
        ...

    def aim_at(self, c: Float[Tensor, " client"]) -> None:
        """Mix by Metropolis-Hastings weights for this target in this round: ``sum_i c_i x_i / sum_i c_i`` is kept.

        Lazy ones, (I + W)/2, where the topology is lazy.
        Each end of a link needs the other's c and degree: mix c together with what is sent, so that it travels along.
        """
        ...

    def mix_differences(self, x: Adapters, sent: Difference) -> Float[Tensor, "client scalar"]:
        """``sum_j W_ij xhat_j`` of the replicas after this exchange: their differences cross, and count, for ``x``."""
        ...

    def combine(self, x: Adapters, rule: CombineRule, merged: bool = False) -> Adapters:
        """``x_i <- rule(x_i, the adapters of i and its neighbours, their weights)``; costs the messages of one ``mix``.

        What a rule makes of a receiver's own merged parts is kept.  Those of senders cross, and count, with ``merged``
        only; all clients must then have equally many columns.  A client without contact keeps what it has, to the bit;
        a private head stays.
        """
        ...

    def shared_random(self, purpose: str) -> torch.Generator:
        """A generator that gives every client of the run the same numbers in this round."""
        ...


Vectors = dict[str, Tensor]
"""What one asynchronous message carries, by name; without a client axis."""


@dataclass(frozen=True)
class Message:
    """What reached a client, once."""

    sender: int
    payload: Vectors
    version: int
    """Jobs that the sender had done when it sent this."""
    seen: int
    """The newest version of the receiver that the sender knew when its latest job began."""
    staleness: int = 0
    """The receiver's version when its own latest job began, less ``seen``; 0 where all keep step."""


class Mailbox(Protocol):
    """One client's post, for methods whose clients keep no common step."""

    client: int
    version: int
    """Jobs that this client has done."""
    weights: Float[np.ndarray, " client"]
    """Its row of W."""

    def push(self, payload: Vectors, to: Sequence[int] | None = None) -> None:
        """Send to some neighbours, by default to all."""
        ...

    def poll(self) -> list[Message]:
        """What has arrived since the last call, by sender; no message is ever returned twice."""
        ...

    def random(self, purpose: str) -> np.random.Generator:
        """A generator of this client's own, for its present version."""
        ...


class MeteredExchange(Exchange, Protocol):
    """An exchange that tells what its round cost and did; a runtime reads it after the round."""

    topology: Topology
    bytes_per_edge: int
    bytes_sent: int
    seconds: float
    mixed: Adapters | None
    """What the clients held here put into the mixing."""
    measured: dict[str, Float[Tensor, " client"]]
    """What the round's rules measured, by name."""

    def wire_schema(self, vectors: Schema) -> Schema:
        """What crosses in place of the named vectors that a method mixes."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What must be saved to go on, each leaf with the leading client axis."""
        ...

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Take up what ``state`` gave."""
        ...
