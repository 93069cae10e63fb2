"""The exchange of one block of clients, whose other clients other workers hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from peerlora.exchange.stacked import StackedExchange
from peerlora.topology.schedule import RoundGraph, Topology
from peerlora.topology.storage import Adjacency


@runtime_checkable
class RowExchange(Protocol):
    """How the workers of a run swap rows: every call is made by all of them, in the same order."""

    def all_rows(self, own: Float[Tensor, "client scalar"]) -> Float[Tensor, "all_clients scalar"]:
        """Return the rows of all clients, in the order of their numbers."""
        ...

    def rows_for(self, own: Float[Tensor, "client scalar"], links: Adjacency) -> Float[Tensor, "all_clients scalar"]:
        """Return the rows of those from whom clients held here hear, and their own; the others may be zero."""
        ...


class BlockExchange(StackedExchange):
    """Mixes a block's rows with those of the neighbours that other workers hold.

    Mixing asks for the rows of a block's neighbours; numbers of clients, and what is relayed, go to all workers.
    """

    def __init__(self, topology: Topology, clients: Sequence[int], rows: RowExchange):
        self.rows = rows
        super().__init__(topology, clients, rows.all_rows)

    def _reached(self, x: Float[Tensor, "client scalar"]) -> Float[Tensor, "all_clients scalar"]:
        """The rows of all clients, of which those are zero that have no link to a client held here."""
        return self.rows.rows_for(x, links_of(self.graph))


def links_of(graph: RoundGraph) -> Adjacency:
    """Who may need whose rows: a method may replace the weights of links, not the links."""
    return graph.adjacency + (graph.W != 0)  # of bools: either
