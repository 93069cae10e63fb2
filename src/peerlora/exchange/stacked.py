"""The exchange of a simulation: all clients lie in one buffer, so gossip is one matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor

from peerlora.exchange.combine import CombineRule, apply_rule
from peerlora.exchange.payload import message
from peerlora.exchange.plain import PlainExchange, operator
from peerlora.exchange.replicas import Difference
from peerlora.exchange.schema import encoded_bytes
from peerlora.lora.adapters import Adapters
from peerlora.topology.schedule import Topology
from peerlora.tree import tree_map

Payload = TypeVar("Payload")


class StackedExchange(PlainExchange):
    """Mixes the rows held here with those of everybody.

    ``gather`` turns the rows held here into the rows of all clients, in the order of their numbers.  In a plain
    simulation that is the identity; shards of one run pass a collective.
    """

    def __init__(
        self, topology: Topology, clients: Sequence[int], gather: Callable[[Tensor], Tensor] = lambda rows: rows
    ):
        self.topology, self.clients, self.gather = topology, clients, gather
        self.t = 0
        self.begin(0)

    def begin(self, t: int, absent: Sequence[int] = ()) -> None:
        """Set the round, in which nobody has a link to those who are ``absent``; forget what the last one sent.

        What rounds before 0 sent counts in round 0.
        """
        opening = t <= 0 and self.t < 0
        self.t, self.graph = t, self.topology.at(t, absent)
        self.bytes_per_edge = 0
        self.bytes_sent = self.bytes_sent if opening else 0
        self.seconds = 0.0
        self.mixed: Adapters | None = None
        """What went into this round's mixing, for the diagnostics."""
        self.measured: dict[str, Float[Tensor, " client"]] = {}
        """What this round's rules measured, by name."""

    def mix(self, x: Payload) -> Payload:
        """``x_i <- sum_j W_ij x_j`` for every leaf of ``x``."""
        began = time.perf_counter()
        self._count(x)
        mixed = tree_map(lambda _, leaf: self._leaf(leaf), x, leaf=(Adapters, Tensor))
        self.seconds += time.perf_counter() - began
        return mixed

    def aim_at(self, c: Float[Tensor, " client"]) -> None:
        """Put Metropolis-Hastings weights for the target c in the place of this round's W."""
        everybody = self._gathered(c).double().cpu().numpy()
        self.graph = replace(self.graph, W=self.topology.aimed(self.graph.adjacency, everybody))

    def mix_differences(self, x: Adapters, sent: Difference) -> Float[Tensor, "client scalar"]:
        """``s + sum_j W_ij q_j``: as long as W stays the same, that is the sum over the replicas."""
        began = time.perf_counter()
        self._count(sent.message)
        self.mixed = x
        mixed = sent.s + self._rows(sent.decode(sent.message))
        self.seconds += time.perf_counter() - began
        return mixed

    def combine(self, x: Adapters, rule: CombineRule, merged: bool = False) -> Adapters:
        """``x_i <- rule(what reached i)``; those whom nobody reached keep what they have."""
        began = time.perf_counter()
        self._count(x, *([x.merged] if merged else []))
        self.mixed = x
        sent = x.only("AB") if x.spec.private_head else x
        others = tree_map(lambda _, leaf: self._gathered(leaf), x.merged) if merged else None
        everybody = replace(sent, flat=self._gathered(sent.flat), ranks=self._gathered(sent.ranks), merged=others)
        mixed, measured = apply_rule(sent, everybody, self.graph.W[self.clients], rule)
        self.measured.update(measured)
        self.seconds += time.perf_counter() - began
        return replace(x.merge(mixed), merged=mixed.merged)

    def _leaf(self, x: Adapters | Tensor) -> Adapters | Tensor:
        """Of Adapters, everything but a private head."""
        if isinstance(x, Tensor):
            return self._rows(x)
        self.mixed = x
        return x.sharing(self._rows(x.flat[:, x.spec.shared]))

    def _rows(self, x: Float[Tensor, "client ..."]) -> Float[Tensor, "client ..."]:
        everybody = self.gather(x.reshape(len(x), -1))
        return (operator(self.graph.W[self.clients], everybody) @ everybody).view_as(x)

    def _gathered(self, x: Tensor) -> Tensor:
        """The rows of all clients."""
        everybody = self.gather(x.flatten(1) if x.ndim > 1 else x[:, None])
        return everybody.view(len(everybody), *x.shape[1:])

    def _count(self, *payload: object) -> None:
        """Add what this mixing sends: every linked client's encoded message to each of its receivers."""
        degrees = self.graph.out_degrees[self.clients]
        sizes = [encoded_bytes(message(payload, row)) for row in range(len(self.clients))]
        self.bytes_per_edge += max(sizes)
        self.bytes_sent += int(sum(size * int(degree) for size, degree in zip(sizes, degrees, strict=True)))
