"""What the user hears about neighbours, and how much of it one neighbour may cause."""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

from peerlora.display import utc_now
from peerlora.network.base import PeerId

_WAITING = 10_000  # notices that nobody fetched; the oldest go first
_EACH = 16  # notices that one neighbour may cause in a round; what goes beyond is counted


class NeighbourEvent(NamedTuple):
    """Something that the user should hear about a neighbour."""

    time: str
    """ISO 8601, UTC."""
    kind: str
    """up, suspect, down, refused, half-used"""
    peer: PeerId
    detail: str


class EventLimiter:
    """Notices that wait for whoever tells the user.

    Of one neighbour a refusal is told once in a round, whatever its details, and other things up to a bound; what went
    untold is told as a number when the round is over.  So a neighbour that sends rubbish without end fills no disk.
    """

    def __init__(self):
        self.waiting: deque[NeighbourEvent] = deque(maxlen=_WAITING)
        self._told: dict[PeerId, Counter[str]] = {}
        self._untold: dict[PeerId, Counter[tuple[str, str]]] = {}

    def add(self, kind: str, peer: PeerId, detail: str) -> None:
        """Note something."""
        told, word = self._told.setdefault(peer, Counter()), detail.partition(":")[0] if kind == "refused" else ""
        again = bool(word) and word in told
        if again or told.total() >= _EACH:
            self._untold.setdefault(peer, Counter())[kind, word if again else ""] += 1
            return
        told[word] += 1
        self._put(kind, peer, detail)

    def next_round(self, round: int) -> None:
        """Say how much went untold in ``round``, which is over."""
        for peer, untold in self._untold.items():
            for (kind, word), count in untold.items():
                self._put(kind, peer, f"{word and word + ': '}{count} more in round {round}")
        self._told, self._untold = {}, {}

    def _put(self, kind: str, peer: PeerId, detail: str) -> None:
        self.waiting.append(NeighbourEvent(utc_now("milliseconds"), kind, peer, detail))
