"""The exchange of a simulation: all clients lie in one buffer, so gossip is one matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.exchange.wire import Schema, encoded_bytes
from peerlora.lora.adapters import Adapters
from peerlora.topology.schedule import Topology
from peerlora.tree import tree_map

Payload = TypeVar("Payload")


class StackedExchange:
    """Mixes the rows held here with those of everybody.

    ``gather`` turns the rows held here into the rows of all clients, in the order of their numbers.  In a plain
    simulation that is the identity; shards of one run pass a collective.
    """

    def __init__(
        self, topology: Topology, clients: Sequence[int], gather: Callable[[Tensor], Tensor] = lambda rows: rows
    ):
        self.topology, self.clients, self.gather = topology, clients, gather
        self.begin(0)

    def begin(self, t: int) -> None:
        """Set the round; forget what the last one sent."""
        self.graph = self.topology.at(t)
        self.bytes_per_edge = 0
        self.bytes_sent = 0
        self.seconds = 0.0
        self.mixed: Adapters | None = None
        """What went into this round's mixing, for the diagnostics."""

    def mix(self, x: Payload) -> Payload:
        """``x_i <- sum_j W_ij x_j`` for every leaf of ``x``."""
        began = time.perf_counter()
        self._count(x)
        mixed = tree_map(lambda _, leaf: self._leaf(leaf), x, leaf=(Adapters, Tensor))
        self.seconds += time.perf_counter() - began
        return mixed

    def _leaf(self, x: Adapters | Tensor) -> Adapters | Tensor:
        """Of Adapters, everything but a private head."""
        if isinstance(x, Tensor):
            return self._rows(x)
        self.mixed = x
        flat = x.flat.clone()
        flat[:, x.spec.shared] = self._rows(x.flat[:, x.spec.shared])
        return replace(x, flat=flat)

    def _rows(self, x: Float[Tensor, "client ..."]) -> Float[Tensor, "client ..."]:
        everybody = self.gather(x.reshape(len(x), -1))
        W = torch.from_numpy(self.graph.W[self.clients]).to(everybody.dtype)
        return (W @ everybody).view_as(x)

    def _count(self, x: object) -> None:
        """Add what this mixing sends: every linked client's encoded message to each of its neighbours."""
        degrees = self.graph.degrees[self.clients]
        sizes = [encoded_bytes(_message(x, row)) for row in range(len(self.clients))]
        self.bytes_per_edge += max(sizes)
        self.bytes_sent += int(sum(size * int(degree) for size, degree in zip(sizes, degrees, strict=True)))


def _message(x: object, row: int) -> Schema:
    """What the client in this row sends: the name, shape (at its real rank) and dtype of every vector."""
    found: Schema = {}

    def note(name: str, leaf: Adapters | Tensor) -> Adapters | Tensor:
        if isinstance(leaf, Tensor):
            found[name] = (tuple(leaf.shape[1:]), leaf.dtype)
        else:
            found.update({name + part: what for part, what in leaf.message(row).items()})
        return leaf

    tree_map(note, x, leaf=(Adapters, Tensor))
    return found
