"""The exchange of a simulation: all clients lie in one buffer, so gossip is one matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from peerlora.exchange.base import ExchangeStats
from peerlora.exchange.combine import CombineRule, apply_rule
from peerlora.exchange.fixed_point import weighted_sums
from peerlora.exchange.payload import message
from peerlora.exchange.plain import PlainExchange, is_sparse, operator
from peerlora.exchange.relay import relay_round
from peerlora.exchange.replicas import Difference
from peerlora.exchange.schema import encoded_bytes
from peerlora.lora.adapters import Adapters
from peerlora.topology.schedule import Topology
from peerlora.topology.storage import Matrix, as_dense
from peerlora.tree import leaves, tree_map

Payload = TypeVar("Payload")
_TOGETHER = 500  # clients whose rows one sparse product makes


class StackedExchange(PlainExchange):
    """Mixes the rows held here with those of everybody.

    ``gather`` turns the rows held here into the rows of all clients, in the order of their numbers.  In a plain
    simulation that is the identity; shards of one run pass a collective.
    """

    def __init__(
        self, topology: Topology, clients: Sequence[int], gather: Callable[[Tensor], Tensor] = lambda rows: rows
    ):
        self.topology, self.clients, self.gather = topology, clients, gather
        self.begin(0)

    def begin(self, t: int, absent: Sequence[int] = ()) -> ExchangeStats:
        """Begin a round in which no client has a link to the ``absent`` ones."""
        self.t, self.graph, self.absent = t, self.topology.at(t, absent), set(absent)
        self.stats = ExchangeStats()
        return self.stats

    def mix(self, x: Payload, target: str | None = None) -> Payload:
        """``x_i <- sum_j W_ij x_j`` for every leaf of ``x``; W for the leaf ``target`` where one is named."""
        began = time.perf_counter()
        self._require_open(target is not None)
        if target is not None:
            c = self._gathered(leaves(x)[f".{target}"]).double().cpu().numpy()
            self.graph = replace(self.graph, W=self.topology.aimed(self.graph.adjacency, c))
        self._count(x)
        mixed = tree_map(lambda _, leaf: self._leaf(leaf), x, leaf=(Adapters, Tensor))
        self.stats.seconds += time.perf_counter() - began
        return mixed

    def mix_differences(self, x: Adapters, sent: Difference) -> Float[Tensor, "client scalar"]:
        """``s + sum_j W_ij q_j``: as long as W stays the same, that is the sum over the replicas."""
        self._require_open()
        began = time.perf_counter()
        self._count(sent.message)
        self.stats.sent = x
        mixed = sent.s + self._rows(sent.decode(sent.message))
        self.stats.seconds += time.perf_counter() - began
        return mixed

    def combine(self, x: Adapters, rule: CombineRule, merged: bool = False) -> Adapters:
        """``x_i <- rule(what reached i)``; those whom nobody reached keep what they have."""
        self._require_open()
        began = time.perf_counter()
        self._count(x, *([x.merged] if merged else []))
        self.stats.sent = x
        sent = x.exchanged()
        others = tree_map(lambda _, leaf: self._gathered(leaf), x.merged) if merged else None
        all_adapters = replace(sent, flat=self._reached(sent.flat), ranks=self._gathered(x.ranks), merged=others)
        mixed, measured = apply_rule(sent, all_adapters, self.graph.W, rule, self.clients, self._largest)
        self.stats.measures.update(measured)
        self.stats.seconds += time.perf_counter() - began
        return replace(x.with_blocks(mixed), merged=mixed.merged)

    def _send(self, x: Adapters) -> None:
        """Count the messages: all clients' adapters are here."""
        self._require_open()
        began = time.perf_counter()
        self._count(x)
        self.stats.sent = x
        self.stats.seconds += time.perf_counter() - began

    def relay(self) -> None:
        """Swap over the links of this round what the clients know of others; see ``exchange.relay``."""
        if self.relayed is None or self.stats.sent is None:
            return
        began = time.perf_counter()
        all_adapters = self._all_adapters(self.stats.sent.exchanged())
        present = [client for client in range(all_adapters.clients) if client not in self.absent]
        counts = relay_round(self.relayed, self.t, all_adapters, as_dense(self.graph.adjacency), present)
        entries, sent_bytes = (int(each[self.clients].sum()) for each in (counts.entries, counts.sent_bytes))
        self.stats.bytes_sent += sent_bytes
        self._record_relay(began, relayed_entries=entries, relayed_bytes=sent_bytes)

    def _leaf(self, x: Adapters | Tensor) -> Adapters | Tensor:
        """Of Adapters, everything but a private head."""
        if isinstance(x, Tensor):
            return self._rows(x)
        self.stats.sent = x
        return x.with_shared(self._rows(x.flat[:, x.spec.shared]))

    def _rows(self, x: Float[Tensor, "client ..."]) -> Float[Tensor, "client ..."]:
        """``sum_j W_ij x_j``, to the same bits whoever else is held here.

        The rows of a sparse product do not depend on each other; a dense one is that of all rows.
        """
        rows, W = self._reached(x.reshape(len(x), -1)), self.graph.W
        if self.secure:
            mixed = weighted_sums(rows, W, self.clients)
        elif is_sparse(W):
            mixed = _sparse_product(W, rows, self.clients)
        elif len(self.clients) == W.shape[0]:
            mixed = operator(W, rows, self.clients) @ rows
        else:
            mixed = (operator(W, rows) @ rows)[self.clients]
        return mixed.view_as(x)

    def _reached(self, x: Float[Tensor, "client scalar"]) -> Float[Tensor, "all_clients scalar"]:
        """The rows of all clients, of which those may be zero that have no link to a client held here."""
        return self.gather(x)

    def _all_adapters(self, x: Adapters) -> Adapters:
        """The adapters of all clients, without merged parts."""
        return replace(x, flat=self._gathered(x.flat), ranks=self._gathered(x.ranks), merged=None)

    def _gathered(self, x: Tensor) -> Tensor:
        """The rows of all clients."""
        rows = self.gather(x.flatten(1) if x.ndim > 1 else x[:, None])
        return rows.view(len(rows), *x.shape[1:])

    def _largest(self, widths: Int[Tensor, "layer 2"]) -> Int[Tensor, "layer 2"]:
        """The largest widths among all clients."""
        return self.gather(widths.flatten().repeat(len(self.clients), 1)).amax(0).view_as(widths)

    def _count(self, *payload: object) -> None:
        """Add what this mixing sends: every linked client's encoded message to each of its receivers."""
        degrees = self.graph.out_degrees[self.clients]
        sizes = [encoded_bytes(self.wire_schema(message(payload, row))) for row in range(len(self.clients))]
        self.stats.bytes_per_edge += max(sizes)
        self.stats.bytes_sent += int(sum(size * int(degree) for size, degree in zip(sizes, degrees, strict=True)))


def _sparse_product(
    W: Matrix, rows: Float[Tensor, "all_clients scalar"], clients: Sequence[int]
) -> Float[Tensor, "client scalar"]:
    """These rows of ``W @ rows``, some at a time: the product holds its result twice, which of many is gigabytes."""
    if len(clients) <= _TOGETHER:
        return operator(W, rows, clients) @ rows
    mixed = rows.new_empty(len(clients), rows.shape[1])
    for first in range(0, len(clients), _TOGETHER):
        some = slice(first, first + _TOGETHER)
        mixed[some] = operator(W, rows, clients[some]) @ rows
    return mixed
