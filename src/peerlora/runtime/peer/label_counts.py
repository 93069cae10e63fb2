"""The label counts of the whole network: peers sum them before round 0, and keep the sum in their run folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peerlora.errors import NotNow, RunError
from peerlora.exchange.gossip_sum import network_sum
from peerlora.exchange.schema import Schema

if TYPE_CHECKING:
    from peerlora.network.base import PeerId
    from peerlora.network.protocol.control import PeerControl
    from peerlora.network.protocol.event_loop import EventLoopThread
    from peerlora.network.protocol.neighbour_exchange import NeighbourExchange
    from peerlora.runs.store import RunStore

FILE = "label_counts.json"
COUNTS = "label counts"
"""The name of the sum in the state that a peer sends to one that asks for it."""


def counts_schema(classes: int) -> Schema:
    """What comes with such a state."""
    return {COUNTS: ((1, classes), torch.float64)}


def kept(store: RunStore) -> Tensor | None:
    """The sum that this folder's run has come to know, [1, label]."""
    found = store.read(FILE)
    return None if found is None else torch.tensor([found["total"]], dtype=torch.float64)


def keep(store: RunStore, total: Tensor) -> None:
    """Remember the sum: a restarted peer finds nobody any more with whom to gossip it."""
    store.write(FILE, {"total": [int(count) for count in total[0]]})


def meet_everybody(control: PeerControl, thread: EventLoopThread, join: float) -> list[PeerId]:
    """Greet all neighbours before the gossip; those who have it behind them.

    Raises NotNow unless all are there: who is away would be missing in everybody's sum.
    """
    greeted = thread.call(control.greet(join))
    missing = [
        f"{peer} ({greeted.refused.get(peer, f'not there after {join:g} s')})"
        for peer in sorted(control.peers)
        if peer not in greeted.reached
    ]
    if missing:
        raise NotNow(
            f"train.label_prior=pooled sums label counts over the network before round 0, and {', '.join(missing)} "
            "does not take part; start all sites within peer.join seconds of each other, or use label_prior=uniform"
        )
    return sorted(peer for peer, round in control.protocol.heard.items() if round >= 0)


def gossiped(own: Tensor, exchange: NeighbourExchange, thread: EventLoopThread, join: float) -> Tensor:
    """The sum over the network, [1, label].  Raises RunError where it is not known, since links failed."""
    protocol = exchange.protocol
    deadline, patience = protocol.deadline, max(join, protocol.deadline)
    thread.ask(setattr, protocol, "deadline", patience)  # a neighbour may itself still wait for its neighbours
    try:
        return network_sum(own, exchange, exchange.topology)
    finally:
        thread.ask(setattr, protocol, "deadline", deadline)


def check_told(total: Tensor, own: Tensor, peer: PeerId) -> Tensor:
    """The sum that a neighbour told; raises RunError for one that cannot be the network's."""
    if bool((total != total.round()).any()) or bool((total < own).any()):
        raise RunError(
            f"{peer} says that the network's label counts are {total[0].tolist()}, this site alone has "
            f"{own[0].tolist()}; start all sites again with a new peer.run"
        )
    return total
