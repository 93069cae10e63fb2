"""Rows that workers swap: each sends its own to the others' inboxes, and takes theirs from its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from peerlora.errors import WorkersLost
from peerlora.runtime.cluster.placement import Placement, plan_transfers
from peerlora.topology.storage import Adjacency

Values = np.ndarray
Send = Callable[[int, Sequence[int], Values], None]
"""Sends an array of an exchange of this number to some workers."""


class RowsMissing(WorkersLost):
    """Raised by a worker whose neighbours in an exchange are gone; the reason stands elsewhere."""


class Inbox:
    """Arrays that reached a worker, by exchange and sender; filled by one thread, emptied by another."""

    def __init__(self):
        self._arrived: dict[tuple[int, int], Values] = {}
        self._news = threading.Condition()
        self._closed: str | None = None

    def put(self, number: int, sender: int, values: Values) -> None:
        """Keep what a sender sent in the exchange of this number."""
        with self._news:
            self._arrived[number, sender] = values
            self._news.notify_all()

    def take(self, number: int, senders: Iterable[int], timeout: float) -> dict[int, Values]:
        """Return what these senders sent, as soon as all of it is here.

        Raises RowsMissing where something is not after ``timeout`` seconds, or the inbox was closed.
        """
        wanted, end = [(number, sender) for sender in senders], time.monotonic() + timeout
        with self._news:
            while not all(key in self._arrived for key in wanted):
                left = end - time.monotonic()
                if self._closed is not None or left <= 0 or not self._news.wait(left):
                    missing = [sender for _, sender in wanted if (number, sender) not in self._arrived]
                    reason = self._closed or f"nothing came for {timeout:g} s"
                    raise RowsMissing(f"workers {missing} sent no rows in exchange {number}: {reason}")
            return {sender: self._arrived.pop((number, sender)) for _, sender in wanted}

    def close(self, reason: str) -> None:
        """Wake up whoever waits: nothing will come any more."""
        with self._news:
            self._closed = reason
            self._news.notify_all()


class SwappedRows:
    """The ``RowExchange`` of one worker.

    All workers call the same methods in the same order, so a number tells exchanges apart.
    """

    def __init__(self, index: int, placement: Placement, nodes: int, inbox: Inbox, send: Send, timeout: float):
        self.index, self.placement, self.nodes = index, placement, nodes
        self.inbox, self.send, self.timeout = inbox, send, timeout
        self.blocks = [torch.tensor(block) for block in placement.blocks]
        self.others = [worker for worker in range(len(self.blocks)) if worker != index]
        self.number = 0

    def all_rows(self, own: Float[Tensor, "client scalar"]) -> Float[Tensor, "all_clients scalar"]:
        """Return the rows of all clients, in the order of their numbers."""
        number = self._next()
        if self.others:
            self.send(number, self.others, _values(own))
        return self._placed(own, {worker: self.blocks[worker] for worker in self.others}, number)

    def rows_for(self, own: Float[Tensor, "client scalar"], links: Adjacency) -> Float[Tensor, "all_clients scalar"]:
        """Return the rows of those from whom clients held here hear, and their own; the others are zero.

        Where an all-gather moves less, they are there too.
        """
        transfers = plan_transfers(links, self.placement, self.nodes)
        if transfers.gathers:
            return self.all_rows(own)
        number, needed, mine = self._next(), torch.from_numpy(transfers.needed), self.blocks[self.index]
        for worker in self.others:
            places = needed[worker, mine].nonzero()[:, 0]
            if len(places):
                self.send(number, [worker], _values(own[places.to(own.device)]))
        wanted = {worker: self.blocks[worker][needed[self.index, self.blocks[worker]]] for worker in self.others}
        return self._placed(own, {worker: rows for worker, rows in wanted.items() if len(rows)}, number)

    def columns(
        self, own: Float[Tensor, "client scalar"], shares: Sequence[Int[Tensor, " column"]]
    ) -> Float[Tensor, "all_clients column"]:
        """Return all clients' values in this worker's share of the columns; ``shares`` has one for every worker."""
        number = self._next()
        for worker in self.others:
            self.send(number, [worker], _values(own[:, shares[worker].to(own.device)]))
        mine = own[:, shares[self.index].to(own.device)]
        return self._placed(mine, {worker: self.blocks[worker] for worker in self.others}, number)

    def to_one(self, worker: int, own: Float[Tensor, " column"]) -> list[Float[Tensor, " column"]]:
        """Bring one vector of every worker to one of them, in their order; the others get nothing."""
        number = self._next()
        if worker != self.index:
            self.send(number, [worker], _values(own))
            return []
        came = self.inbox.take(number, self.others, self.timeout)
        return [own if each == worker else _tensor(came[each], own) for each in range(len(self.blocks))]

    def _next(self) -> int:
        self.number += 1
        return self.number

    def _placed(
        self, own: Float[Tensor, "client scalar"], expected: dict[int, Int[Tensor, " client"]], number: int
    ) -> Float[Tensor, "all_clients scalar"]:
        found = own.new_zeros(self.placement.clients, own.shape[1])
        found[self.blocks[self.index].to(own.device)] = own
        for worker, values in self.inbox.take(number, expected, self.timeout).items():
            found[expected[worker].to(own.device)] = _tensor(values, own)
        return found


def _tensor(values: Values, like: Tensor) -> Tensor:
    """What came, where the own rows are; copied, since arrays of an object store are read-only."""
    return torch.from_numpy(values.copy()).to(like.device)


def _values(x: Tensor) -> Values:
    return x.detach().cpu().contiguous().numpy()
