"""Rate limit of the events about neighbours that reach the user."""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

from peerlora.display import format_now
from peerlora.network.base import PeerId

_QUEUE = 10_000  # events that wait to be fetched; beyond, the oldest are dropped
_PER_ROUND = 16  # events that one neighbour may cause in a round; beyond, they are counted


class NeighbourEvent(NamedTuple):
    """An event about a neighbour that the user should see."""

    time: str
    """ISO 8601, UTC."""
    kind: str
    """up, suspect, down, refused, half-used"""
    peer: PeerId
    detail: str


class EventLimiter:
    """Queue of events, of which one neighbour can cause only so many.

    At most one refusal event per neighbour, round and reason, and ``_PER_ROUND`` events in all; when the round is over
    one event gives the number of those left out.  So a neighbour that keeps sending invalid messages fills no disk.
    """

    def __init__(self):
        self.waiting: deque[NeighbourEvent] = deque(maxlen=_QUEUE)
        self._passed: dict[PeerId, Counter[str]] = {}
        self._left_out: dict[PeerId, Counter[tuple[str, str]]] = {}

    def add(self, kind: str, peer: PeerId, detail: str) -> None:
        """Queue an event, or count it where the neighbour has caused too many."""
        reason = detail.partition(":")[0] if kind == "refused" else ""
        passed = self._passed.setdefault(peer, Counter())
        repeated = bool(reason) and reason in passed
        if repeated or passed.total() >= _PER_ROUND:
            self._left_out.setdefault(peer, Counter())[kind, reason if repeated else ""] += 1
            return
        passed[reason] += 1
        self._put(kind, peer, detail)

    def next_round(self, round: int) -> None:
        """Queue the numbers of events left out in ``round``, which is over."""
        for peer, left_out in self._left_out.items():
            for (kind, reason), count in left_out.items():
                self._put(kind, peer, f"{reason and reason + ': '}{count} more in round {round}")
        self._passed, self._left_out = {}, {}

    def _put(self, kind: str, peer: PeerId, detail: str) -> None:
        self.waiting.append(NeighbourEvent(format_now("milliseconds"), kind, peer, detail))
