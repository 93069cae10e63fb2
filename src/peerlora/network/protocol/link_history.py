"""Outcome of each exchange on each link, by the own record and by the neighbour's claim."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

from peerlora.network.base import PeerId

LAST = re.compile(r"(-?\d{1,12}\.\d{1,6}[+-]( -?\d{1,12}\.\d{1,6}[+-]){0,15})?")
"""Format of the header fact ``last``: round, exchange within it, and ``+`` where the link was used."""
_OUTCOME = re.compile(r"(-?\d+)\.(\d+)([+-])")
_REMEMBERED = 16  # exchanges of a link whose outcome is kept
_SENT = 8  # outcomes, the latest ones, that every message carries
_CONFLICTS = 10_000  # conflicts that are remembered so that none is reported twice


class ExchangeStep(NamedTuple):
    """One exchange: the round, and its number within the round."""

    round: int
    number: int = 0


class LinkHistory:
    """One peer's record of its links, compared with the claims of its neighbours.

    A claim (the neighbour says that it used, or did not use, a link in an exchange) meets one of four records:

    =====================================  ===========================================================================
    own record                             what is done with the claim
    =====================================  ===========================================================================
    none, the exchange is still to come    kept until the exchange is closed here
    none, an earlier process may have      that process died before it used the link: a claim of "used" is a conflict;
    been in it (see ``_by_predecessor``)   one of "not used" agrees
    none, and no process was in it         dropped: it is invented, or too old to be remembered
    used, or not used                      dropped where it agrees, else a conflict
    =====================================  ===========================================================================

    A conflict is a one-sided link: it is counted and ``on_conflict`` called with the neighbour's claim, once for each
    exchange.
    """

    def __init__(self, on_conflict: Callable[[PeerId, ExchangeStep, bool], None]):
        self.on_conflict = on_conflict
        self.first_step = ExchangeStep(0)
        """The exchange with which this process began."""
        self.one_sided = 0
        """Links so far that one end used and the other did not."""
        self._records: dict[PeerId, dict[ExchangeStep, bool]] = {}
        self._claims: dict[PeerId, dict[ExchangeStep, bool]] = {}
        self._first_with: dict[PeerId, ExchangeStep] = {}
        """The first exchange of this process that each neighbour was to be in."""
        self._predecessor: Counter[PeerId] = Counter()
        """Conflicts with each neighbour over exchanges of an earlier process."""
        self._reported: deque[tuple[PeerId, ExchangeStep]] = deque(maxlen=_CONFLICTS)

    def used(self, peer: PeerId, step: ExchangeStep) -> bool:
        """Whether a link is known to have been used."""
        return self._records.get(peer, {}).get(step, False)

    def encode(self, peer: PeerId) -> str:
        """Encode the outcomes of the last exchanges with a neighbour for a header."""
        records = sorted(self._records.get(peer, {}).items())[-_SENT:]
        return " ".join(f"{step.round}.{step.number}{'+' if used else '-'}" for step, used in records)

    def close(self, peer: PeerId, step: ExchangeStep, used: bool, at: ExchangeStep) -> None:
        """Record whether a link was used; the neighbour may have closed the exchange, and said so, earlier."""
        self._first_with.setdefault(peer, step)
        records = self._records.setdefault(peer, {})
        records[step] = used
        if len(records) > _REMEMBERED:
            del records[min(records)]
        self._reconcile(peer, at)

    def record_claim(self, peer: PeerId, encoded: str, at: ExchangeStep) -> None:
        """Record what a neighbour claims about the last exchanges on the link, and compare.

        ``at``: the exchange in progress here, or the next one.
        """
        claims = self._claims.setdefault(peer, {})
        for round, number, sign in _OUTCOME.findall(encoded):
            claims[ExchangeStep(int(round), int(number))] = sign == "+"
        for step in sorted(claims)[:-_REMEMBERED]:
            del claims[step]
        self._reconcile(peer, at)

    def _reconcile(self, peer: PeerId, at: ExchangeStep) -> None:
        records, claims = self._records.get(peer, {}), self._claims.get(peer, {})
        for step, claim in list(claims.items()):
            used = records.get(step)
            if used is None and step >= at:
                continue
            if used is not None and used != claim and (peer, step) in self._reported:
                continue
            del claims[step]
            if used is None and self._by_predecessor(peer, step, at):
                used, self._predecessor[peer] = False, self._predecessor[peer] + claim
            if used is not None and used != claim:
                self._reported.append((peer, step))
                self.one_sided += 1
                self.on_conflict(peer, step, claim)

    def _by_predecessor(self, peer: PeerId, step: ExchangeStep, at: ExchangeStep) -> bool:
        """Whether an earlier process may have been in an exchange that this one has no record of.

        Only from the checkpoint with which this process began (``first_step``) up to its first own exchange with the
        neighbour; and a neighbour can know of no more of these than one message carries.
        """
        begun = self._first_with.get(peer, at)
        return (
            self.first_step <= step < begun and self._predecessor[peer] < _SENT and (peer, step) not in self._reported
        )
