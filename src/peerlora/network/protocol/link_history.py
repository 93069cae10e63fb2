"""What became of each exchange on each edge, here and by the neighbour's word; where they differ, it is half used."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

from peerlora.network.base import PeerId

LAST = re.compile(r"(-?\d{1,12}\.\d{1,6}[+-]( -?\d{1,12}\.\d{1,6}[+-]){0,15})?")
"""What a message says of its edge's last exchanges."""
_ONE = re.compile(r"(-?\d+)\.(\d+)([+-])")
_REMEMBERED = 16  # exchanges of an edge whose outcome is remembered
_TOLD = 8  # of them that every message tells
_KNOWN = 10_000  # half-used edges that are not told twice


class ExchangeStep(NamedTuple):
    """One exchange: the round, and which one within it."""

    round: int
    number: int = 0


class LinkHistory:
    """One peer's memory of its edges.  ``differs`` is called for each exchange that only one end used."""

    def __init__(self, differs: Callable[[PeerId, ExchangeStep, bool], None]):
        self.differs = differs
        self.born = ExchangeStep(0)
        """With which exchange this process began."""
        self.half_used = 0
        """Edges so far that one end used and the other did not."""
        self._past: dict[PeerId, dict[ExchangeStep, bool]] = {}
        self._claims: dict[PeerId, dict[ExchangeStep, bool]] = {}
        self._first: dict[PeerId, ExchangeStep] = {}
        """The first exchange of this process that each neighbour was to be in."""
        self._earlier: Counter[PeerId] = Counter()
        """Edges of each neighbour that it used with an earlier process, which died before it did."""
        self._known: deque[tuple[PeerId, ExchangeStep]] = deque(maxlen=_KNOWN)

    def used(self, peer: PeerId, step: ExchangeStep) -> bool:
        """Whether an edge is known to have counted."""
        return self._past.get(peer, {}).get(step, False)

    def told(self, peer: PeerId) -> str:
        """What became of the last exchanges with a neighbour, for a header."""
        past = sorted(self._past.get(peer, {}).items())[-_TOLD:]
        return " ".join(f"{step.round}.{step.number}{'+' if used else '-'}" for step, used in past)

    def close(self, peer: PeerId, step: ExchangeStep, used: bool, at: ExchangeStep) -> None:
        """Remember whether an edge counted; the neighbour may have closed the exchange, and said so, earlier."""
        self._first.setdefault(peer, step)
        past = self._past.setdefault(peer, {})
        past[step] = used
        if len(past) > _REMEMBERED:
            del past[min(past)]
        self._reconcile(peer, at)

    def claimed(self, peer: PeerId, told: str, at: ExchangeStep) -> None:
        """Note what a neighbour says of the last exchanges on the edge, and look whether it was so here too.

        ``at``: the exchange that goes on here, or comes next.
        """
        claims = self._claims.setdefault(peer, {})
        for round, number, sign in _ONE.findall(told):
            claims[ExchangeStep(int(round), int(number))] = sign == "+"
        for step in sorted(claims)[:-_REMEMBERED]:
            del claims[step]
        self._reconcile(peer, at)

    def _reconcile(self, peer: PeerId, at: ExchangeStep) -> None:
        past, claims = self._past.get(peer, {}), self._claims.get(peer, {})
        for step, used in list(claims.items()):
            own = past.get(step)
            if own is None and step >= at:
                continue  # it is still to come here
            if own is not None and own != used and (peer, step) in self._known:
                continue
            del claims[step]
            if own is None and self._died_in(peer, step, at):
                own, self._earlier[peer] = False, self._earlier[peer] + used
            if own is not None and own != used:
                self._known.append((peer, step))
                self.half_used += 1
                self.differs(peer, step, used)

    def _died_in(self, peer: PeerId, step: ExchangeStep, at: ExchangeStep) -> bool:
        """Whether an earlier process may have been in an exchange of which this one knows nothing.

        It then died before it used it.  A neighbour tells of so many, and of none after this process was in one: all
        else that it says of exchanges that are not known here is invented.
        """
        begun = self._first.get(peer, at)
        return self.born <= step < begun and self._earlier[peer] < _TOLD and (peer, step) not in self._known
