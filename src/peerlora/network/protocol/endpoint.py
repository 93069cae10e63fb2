"""A peer's end of a run: its transport, its position, its neighbours and what became of each link."""

from __future__ import annotations

from collections.abc import Collection

from peerlora.network.base import PeerId, Transport
from peerlora.network.protocol.event_limiter import EventLimiter
from peerlora.network.protocol.event_loop import Signal
from peerlora.network.protocol.link_history import ExchangeStep, LinkHistory
from peerlora.network.protocol.peer_table import PeerTable
from peerlora.network.protocol.wire import Expected, Fact, Header, Kind

_MAX_ROUNDS = 2**53  # rounds: the largest number that a header can hold


class Endpoint:
    """State that all parts of one peer's protocol share; it lives on one event loop.

    ``expected``: facts that every message of the run agrees with.  ``neighbours``: peers that this one may exchange
    with in some round.  ``rounds``: of the run; no message may be of a later one.
    """

    def __init__(
        self, transport: Transport, expected: Expected, neighbours: Collection[PeerId], rounds: int = _MAX_ROUNDS
    ):
        self.transport, self.expected, self.rounds = transport, expected, rounds
        self.at = ExchangeStep(0)
        """The exchange in progress, or the next one."""
        self.changed = Signal()
        self.peers = PeerTable(neighbours, self.changed.notify)
        self.events = EventLimiter()
        self.history = LinkHistory(self._on_conflict)

    def start_at(self, round: int) -> None:
        """Enter the first round of this process."""
        self.enter(round)
        self.history.first_step = self.at

    def enter(self, round: int) -> None:
        """Enter a round; every message of an earlier one is late from now on."""
        if round != self.at.round:
            self.events.next_round(self.at.round)
        self.at = ExchangeStep(round)
        self.changed.notify()

    def header(self, kind: Kind, **facts: Fact) -> Header:
        """A header for a message sent now."""
        (round, step), me = self.at, self.transport.me
        return Header(kind=kind, round=round, step=step, sender=me, facts=facts, **vars(self.expected))

    def last_outcomes(self, peer: PeerId) -> dict[str, Fact]:
        """The fact of a header that says which of the latest exchanges with a neighbour used their link."""
        encoded = self.history.encode(peer)
        return {"last": encoded} if encoded else {}

    def _on_conflict(self, peer: PeerId, step: ExchangeStep, used: bool) -> None:
        self.events.add("half-used", peer, f"round {step.round}: used {'there' if used else 'here'} only")
