"""The exchange of a real peer: one client, whose neighbours are somewhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from peerlora.errors import CompositionError
from peerlora.exchange.combine import Rule, apply_rule
from peerlora.exchange.loop import LoopThread
from peerlora.exchange.messages import Payload, everybody, expected, message, named, vectors
from peerlora.exchange.rendezvous import Rendezvous
from peerlora.exchange.stacked import operator
from peerlora.exchange.uncoded import Uncoded
from peerlora.exchange.wire import Header, claimed, encode_body, read_body
from peerlora.lora.adapters import Adapters
from peerlora.topology.schedule import RoundGraph, Topology
from peerlora.topology.weights import remove_links
from peerlora.transport.base import PeerId
from peerlora.tree import tree_map

Tree = TypeVar("Tree")


class NeighbourExchange(Uncoded):
    """Sends the own row, collects the neighbours' until the deadline, and combines them by the own row of W.

    What is summed, is summed in the order of client numbers.  The weight of an edge that does not count goes to the
    diagonal of both its ends, so W stays doubly stochastic.  ``names``: client -> peer, for all neighbours of the run.
    """

    def __init__(
        self, topology: Topology, client: int, names: Mapping[int, PeerId], rendezvous: Rendezvous, thread: LoopThread
    ):
        self.topology, self.clients, self.names = topology, [client], names
        self.rendezvous, self.thread = rendezvous, thread
        self._set(0)

    def begin(self, t: int, absent: Sequence[int] = ()) -> None:
        """Set the round, here and for what neighbours send; forget what the last one sent."""
        self._set(t, absent)
        self.thread.loop.call_soon_threadsafe(self.rendezvous.enter, t)

    def _set(self, t: int, absent: Sequence[int] = ()) -> None:
        self.t, self.graph = t, self.topology.at(t, absent)
        self.bytes_per_edge = 0
        self.bytes_sent = 0
        self.seconds = 0.0
        self.mixed: Adapters | None = None
        """What this client put into this round's mixing."""
        self.met: Adapters | None = None
        """[sender] the same of all whose edge counted, itself too, in the order of their numbers."""
        self.measured: dict[str, Float[Tensor, " client"]] = {}
        """What this round's rules measured, by name."""
        self.missed: dict[int, str] = {}
        """Neighbours whose edge did not count in this round, and why."""

    def mix(self, x: Tree) -> Tree:
        """``x_i <- sum_j W_ij x_j`` for every leaf of ``x``."""
        began = time.perf_counter()
        (met,), W = self._meet((x,))
        others = named((met,), (Adapters, Tensor))
        mixed = tree_map(lambda name, leaf: self._leaf(leaf, others[name], W), x, leaf=(Adapters, Tensor))
        self.seconds += time.perf_counter() - began
        return mixed

    def mix_encoded(self, x: Adapters, message: dict[str, Tensor], decode: Any) -> Tensor:
        """Refused: compressed messages cross in simulations only."""
        raise CompositionError("choco and exchange.codec run in simulations only; use dec-lora without a codec")

    def combine(self, x: Adapters, rule: Rule, merged: bool = False) -> Adapters:
        """``x_i <- rule(what reached i)``; without any contact ``x`` stays as it is."""
        began = time.perf_counter()
        sent = x.only("AB") if x.spec.private_head else x
        (met, *parts), W = self._meet((x, *([x.merged] if merged else [])))
        self.mixed, self.met = x, met
        others = met.only("AB") if x.spec.private_head else met
        combined, measured = apply_rule(sent, replace(others, merged=parts[0] if parts else None), W, rule)
        self.measured.update(measured)
        self.seconds += time.perf_counter() - began
        return replace(x.merge(combined), merged=combined.merged)

    def _leaf(self, x: Any, others: Any, W: Float[np.ndarray, "1 sender"]) -> Any:
        """The average of one leaf; of Adapters, of everything but a private head."""
        if isinstance(x, Tensor):
            rows = others.reshape(len(others), -1)
            return (operator(W, rows) @ rows).view_as(x)
        self.mixed, self.met = x, others
        flat = x.flat.clone()
        rows = others.flat[:, x.spec.shared]
        flat[:, x.spec.shared] = operator(W, rows) @ rows
        return replace(x, flat=flat)

    def _meet(self, payload: Payload) -> tuple[Payload, Float[np.ndarray, "1 sender"]]:
        """The payloads of all whose edge counts, and the own row of W for them."""
        (me,) = self.clients
        linked = self.topology.at(self.t).neighbours(me)
        planned = {self.names[j]: j for j in linked if j in self.names}
        own = vectors(payload)
        body = encode_body(own)
        outcome = self.thread.call(self.rendezvous.meet(tuple(planned), body, partial(_check, payload)))
        self._count(message(payload), len(body), len(outcome.got))
        self.missed |= {planned[peer]: reason for peer, reason in outcome.missing.items()}
        self.missed |= {j: "not on the member list" for j in linked if j not in self.names}
        reached = {planned[peer]: found for peer, found in outcome.got.items()}
        self.graph = without(self.topology.at(self.t), [(me, j) for j in linked if j not in reached])
        reached[me] = own
        senders = sorted(reached)
        return everybody(payload, [reached[j] for j in senders]), self.graph.W[[me]][:, senders]

    def _count(self, schema: Any, size: int, edges: int) -> None:
        if schema:
            self.bytes_per_edge += size
            self.bytes_sent += size * edges


def _check(payload: Payload, header: Header, body: bytearray) -> dict[str, Tensor]:
    """A neighbour's vectors, which have the names, shapes and dtypes that this client's own exchange asks for."""
    return read_body(header, body, expected(payload, claimed(body)))


def without(graph: RoundGraph, missing: list[tuple[int, int]]) -> RoundGraph:
    """A round's graph without some links, whose weight goes to the diagonal of both ends."""
    if not missing:
        return graph
    gone = np.zeros_like(graph.adjacency)
    for i, j in missing:
        gone[i, j] = gone[j, i] = True
    return RoundGraph(graph.adjacency & ~gone, remove_links(graph.W, gone))
