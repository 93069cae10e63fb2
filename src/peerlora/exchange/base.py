"""The one thing that differs between runtimes: how values cross from client to client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.exchange.combine import CombineRule
from peerlora.exchange.relay import RelayCaches
from peerlora.exchange.relayed_average import RelayedModels
from peerlora.exchange.replicas import Difference
from peerlora.exchange.schema import Schema
from peerlora.lora.adapters import Adapters
from peerlora.topology.schedule import RoundGraph, Topology

Payload = TypeVar("Payload")


@dataclass
class ExchangeStats:
    """The costs and measures of one round's exchanges, seen from the clients held here."""

    sent: Adapters | None = None
    """[client] the adapters that went into the mixing; None where none did."""
    received: Adapters | None = None
    """[sender] of a real peer: the adapters whose links counted, its own among them, in the order of client numbers;
    with a codec the replicas, which are all that receivers know."""
    bytes_per_edge: int = 0
    bytes_sent: int = 0
    seconds: float = 0.0
    missing: dict[int, str] = field(default_factory=dict)
    """Of a real peer: neighbours whose link did not count, and why."""
    measures: dict[str, Float[Tensor, " client"]] = field(default_factory=dict)
    """What combine rules measured, by name."""
    cached: bool = False
    """Whether clients averaged the newest adapters that they hold of all clients, in place of mixing by W."""


@runtime_checkable
class Exchange(Protocol):
    """Gossip among all clients of the run, seen from the clients that are held here."""

    clients: Sequence[int]
    """Their numbers: the leading axis of everything that is mixed."""
    graph: RoundGraph
    """Who is linked in this round, and the weights."""

    def begin(self, t: int, absent: Sequence[int] = ()) -> ExchangeStats:
        """Begin a round in which no client has a link to the ``absent`` ones; the stats count what it sends."""
        ...

    def mix(self, x: Payload, target: str | None = None) -> Payload:
        """``x_i <- sum_j W_ij x_j`` for every leaf; of Adapters, everything but a private head.

        ``target`` names the leaf [client] that holds c: then W is replaced by Metropolis-Hastings weights, which keep
        ``sum_i c_i x_i / sum_i c_i``; lazy ones, (I + W)/2, where the topology is lazy.  Both ends of a link need each
        other's c, so it crosses with the rest.
        """
        ...

    def combine(self, x: Adapters, rule: CombineRule, merged: bool = False) -> Adapters:
        """``x_i <- rule(x_i, the adapters of i and its neighbours, their weights)``; costs the messages of one ``mix``.

        What a rule makes of a receiver's own merged parts is kept.  Those of senders cross, and count, with ``merged``
        only; all clients must then have equally many columns.  A client without contact keeps what it has, to the bit;
        a private head stays.
        """
        ...

    def mix_cached(self, x: Adapters) -> Adapters:
        """``x_i <- sum_j alpha_ij (the newest x_j that i holds)``, which goes on through the round's contacts.

        For a method whose ``cache`` gives its settings; once a round.  Costs the messages of one ``mix``, and what the
        ends of each link lack of each other's cache; see ``exchange.relay``.  A private head stays.
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
    """An exchange as a runtime sees it: with its costs, its wire format and its state."""

    topology: Topology
    stats: ExchangeStats
    """Of the present round: what ``begin`` returned."""

    relayed: RelayCaches | None
    """What the clients held here know of all others' adapters; None where nothing is relayed."""

    secure: bool
    """Whether receivers get the weighted sum of their neighbours' vectors only."""

    def relayed_models(self, x: Adapters) -> RelayedModels | None:
        """Return what the clients held here, whose models are ``x``, deploy; None without ``exchange.relay``."""
        ...

    def relay(self) -> None:
        """Swap relayed adapters over the links of this round, after its mixing; their cost joins the stats."""
        ...

    def wire_schema(self, vectors: Schema) -> Schema:
        """Map the named vectors that a method mixes to those that cross in their place."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps."""
        ...

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned."""
        ...


class DifferenceExchange(Exchange, Protocol):
    """An exchange that compressed gossip can use: messages are differences from replicas."""

    def mix_differences(self, x: Adapters, sent: Difference) -> Float[Tensor, "client scalar"]:
        """Send the differences, which stand for ``x``; return ``sum_j W_ij xhat_j`` of the replicas after them."""
        ...
