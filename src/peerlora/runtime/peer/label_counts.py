"""Label counts of the whole network: peers sum them before round 0, and keep the sum in their run folders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peerlora.config.train import NOT_POOLED, POOLED
from peerlora.errors import NotNow, RunError
from peerlora.exchange.gossip_sum import LARGEST, network_sum
from peerlora.exchange.schema import Schema
from peerlora.network.base import PeerId
from peerlora.network.protocol.control import PeerControl
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.network.protocol.neighbour_exchange import NeighbourExchange
from peerlora.runs.store import RunStore

FILE = "label_counts.json"
_ASKED = 3  # neighbours, at most, that are asked for the sum
COUNTS = "label counts"
"""The name of the sum in the state that a peer sends to one that asks for it."""


class StartupSum:
    """The sum of all clients' label counts, found once in the life of a run folder.

    By gossip where all neighbours start together; a peer whose neighbours have it behind them asks one of these.
    ``request`` asks a neighbour for its state, which must hold the vectors of a schema; None where none came.
    """

    def __init__(
        self,
        store: RunStore,
        control: PeerControl,
        thread: EventLoopThread,
        exchange: NeighbourExchange,
        join: float,
        request: Callable[[PeerId, Schema], dict[str, Tensor] | None],
    ):
        self.store, self.control, self.thread, self.exchange = store, control, thread, exchange
        self.join, self.request, self.bytes_sent = join, request, 0
        self.total = load_total(store)
        """[1, label]; None until it is known."""

    def __call__(self, own: Tensor) -> Tensor:
        """Return the sum, [1, label], and keep it.

        Raises NotNow unless all neighbours are there: an absent one would be missing in everybody's sum.  Raises
        RunError where the sum is not known, since links failed or a neighbour sent an impossible one.
        """
        if self.total is None:
            ahead = require_all(self.control, self.thread, self.join)
            self.total = self._requested(ahead, own) if ahead else self._gossiped(own)
            save_total(self.store, self.total)
        return self.total

    @property
    def vectors(self) -> dict[str, Tensor]:
        """What the own state holds for neighbours that ask."""
        return {} if self.total is None else {COUNTS: self.total}

    @property
    def schema(self) -> Schema:
        """What a neighbour's state holds of it."""
        return {} if self.total is None else counts_schema(self.total.shape[1])

    def _requested(self, ahead: list[PeerId], own: Tensor) -> Tensor:
        """The sum that neighbours tell, some of them, so that one alone cannot make it up."""
        totals: dict[PeerId, Tensor] = {}
        for peer in ahead[:_ASKED]:
            found = self.request(peer, counts_schema(own.shape[1]))
            if found is not None:
                totals[peer] = checked_total(found[COUNTS], own, peer)
        if not totals:
            raise NotNow(f"{ahead[0]} has begun its rounds and does not tell the network's label counts; try again")
        (first, total), *others = totals.items()
        for peer, other in others:
            if not torch.equal(other, total):
                raise RunError(
                    f"{first} and {peer} tell different label counts of the network, {total[0].tolist()} and "
                    f"{other[0].tolist()}; find out which of them is wrong, and start all sites with a new peer.run"
                )
        return total

    def _gossiped(self, own: Tensor) -> Tensor:
        patience = max(self.join, self.exchange.protocol.deadline)  # a neighbour may itself still wait for neighbours
        with self.exchange.extended_deadline(patience):
            total, self.bytes_sent = network_sum(own, self.exchange, self.exchange.topology)
        return total


def counts_schema(classes: int) -> Schema:
    """Return what comes with a state whose sender knows the sum."""
    return {COUNTS: ((1, classes), torch.float64)}


def load_total(store: RunStore) -> Tensor | None:
    """Read the sum that a folder's run has found, [1, label]; None where it has none yet, or one that cannot be."""
    found = store.read(FILE)
    try:
        total = None if found is None else torch.tensor([found["total"]], dtype=torch.float64)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return total if total is not None and _possible(total) else None


def save_total(store: RunStore, total: Tensor) -> None:
    """Keep the sum: a restarted peer finds nobody any more with whom to gossip it."""
    store.write(FILE, {"total": [int(count) for count in total[0]]})


def require_all(control: PeerControl, thread: EventLoopThread, join: float) -> list[PeerId]:
    """Greet all neighbours before the gossip; return those that have it behind them.

    Raises NotNow unless all answer.
    """
    handshake = thread.call(control.handshake(join))
    missing = [
        f"{peer} ({handshake.refused.get(peer, f'not there after {join:g} s')})"
        for peer in sorted(control.endpoint.peers.neighbours)
        if peer not in handshake.reached
    ]
    if missing:
        raise NotNow(
            f"label counts are summed over the network before round 0 ({POOLED}), and {', '.join(missing)} does not "
            f"take part; start all sites within peer.join seconds of each other, or use {NOT_POOLED}"
        )
    return sorted(peer for peer, step in control.endpoint.peers.last_step.items() if step.round >= 0)


def checked_total(total: Tensor, own: Tensor, peer: PeerId) -> Tensor:
    """Return a neighbour's sum; raise RunError for one that cannot be the network's."""
    if not _possible(total) or bool((total < own).any()):
        raise RunError(
            f"{peer} says that the network's label counts are {total[0].tolist()}, this site alone has "
            f"{own[0].tolist()}; start all sites again with a new peer.run"
        )
    return total


def _possible(total: Tensor) -> bool:
    """Whether these can be counts of rows: whole, not negative, and as many in all as a sum may be."""
    whole = total.isfinite() & (total >= 0) & (total == total.round())
    return total.ndim == 2 and bool(whole.all()) and float(total.sum()) <= LARGEST
