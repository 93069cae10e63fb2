"""The exchange of a simulation: all clients lie in one buffer, so gossip is one matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.exchange.wire import encoded_bytes
from peerlora.lora.adapters import Adapters
from peerlora.topology.schedule import Topology
from peerlora.tree import leaves, tree_map

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
        if isinstance(x, Adapters):
            self.mixed = x
            flat = x.flat.clone()
            flat[:, x.spec.shared] = self._rows(x.flat[:, x.spec.shared])
            mixed = replace(x, flat=flat)
        else:
            mixed = tree_map(lambda _, leaf: self._rows(leaf), x)
        self.seconds += time.perf_counter() - began
        return mixed  # pyright: ignore[reportReturnType]

    def _rows(self, x: Float[Tensor, "client ..."]) -> Float[Tensor, "client ..."]:
        everybody = self.gather(x.flatten(1))
        W = torch.from_numpy(self.graph.W[self.clients]).to(everybody.dtype)
        return (W @ everybody).view_as(x)

    def _count(self, x: object) -> None:
        """Add what this mixing sends: every linked client's encoded message to each of its neighbours."""
        degrees = self.graph.degrees[self.clients]
        if isinstance(x, Adapters):
            sizes = [encoded_bytes(x.spec.row_shapes(rank), x.flat.dtype) for rank in x.ranks.tolist()]
        else:
            named = leaves(x)
            sizes = [encoded_bytes({name: tuple(leaf.shape[1:]) for name, leaf in named.items()}, torch.float32)]
            sizes *= len(self.clients)
        self.bytes_per_edge += max(sizes)
        self.bytes_sent += int(sum(size * int(degree) for size, degree in zip(sizes, degrees, strict=True)))
