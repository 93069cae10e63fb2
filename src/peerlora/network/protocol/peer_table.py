"""Presence of a peer's neighbours: who is there, in which round, with which settings, and whom to follow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from peerlora.network.base import PeerId, Refused
from peerlora.network.protocol.link_history import ExchangeStep

_FOLLOW = 2  # rounds behind its neighbours from which a peer leaves rounds out; one round behind, it is waited for


class PeerTable:
    """One peer's record of its neighbours.

    ``neighbours``: all peers that it may exchange with in some round; of anybody else nothing is taken, and nothing
    remembered.  ``on_change`` is called when a neighbour becomes absent or present.
    """

    def __init__(self, neighbours: Collection[PeerId], on_change: Callable[[], None] = lambda: None):
        self.neighbours, self.on_change = tuple(neighbours), on_change
        self.last_step: dict[PeerId, ExchangeStep] = {}
        """The exchange that each neighbour was in, or before, when it sent its latest message."""
        self.absent: set[PeerId] = set()
        """Neighbours that are not waited for: they are down, or missed a deadline and have sent nothing since."""
        self.mismatched: dict[PeerId, str] = {}
        """Neighbours with other settings, and which: until a handshake agrees, nothing is exchanged with them."""
        self.refused: dict[PeerId, str] = {}
        """The latest refusal of each neighbour, by either side, since their last handshake."""
        self.connected = False
        """Whether any link was used in the latest exchange."""
        self.isolated = True
        """True after start, or after losing all neighbours, until one link is used again: meanwhile the others may have
        gone on without this peer."""

    def round_to_follow(self, round: int) -> tuple[int, PeerId] | None:
        """The neighbour to follow and its round, where a client that would begin ``round`` should leave rounds out.

        That holds where most neighbours are ahead: one that was cut off has nobody to wait for and runs ahead alone,
        and then it is the one to wait.  With more than two present, the middle one of those ahead is followed: the
        claim of a single neighbour, true or not, moves nobody who hears others.
        """
        present = {peer: step.round for peer, step in self.last_step.items() if not self.excluded(peer)}
        ahead = sorted((there, peer) for peer, there in present.items() if there >= round + _FOLLOW)
        if 2 * len(ahead) <= len(present):
            return None
        return ahead[(len(ahead) - 1) // 2] if len(present) > 2 else ahead[-1]

    def rounds_behind(self, round: int) -> int:
        """By how many rounds the foremost neighbour present is ahead of a client that would begin ``round``."""
        return max((step.round - round for peer, step in self.last_step.items() if not self.excluded(peer)), default=0)

    def excluded(self, peer: PeerId) -> bool:
        """Whether a neighbour is neither waited for nor followed."""
        return peer in self.absent or peer in self.mismatched

    def mark_absent(self, peer: PeerId) -> None:
        """Stop waiting for a neighbour until it is heard of again."""
        self.absent.add(peer)
        if self.connected and self.absent.issuperset(self.neighbours):  # also after this process itself stood still
            self.isolated = True
        self.on_change()

    def mark_silent(self, peers: Iterable[PeerId]) -> None:
        """Stop waiting for neighbours that did not answer; the exchange's end says whether this peer is isolated."""
        self.absent.update(peers)

    def mark_present(self, peer: PeerId) -> None:
        """Wait for a neighbour again."""
        if peer in self.absent:
            self.absent.discard(peer)
            self.on_change()

    def record_exchange(self, connected: bool) -> None:
        """Note whether an exchange that has ended used any link."""
        self.connected, self.isolated = connected, not connected

    def record_refusal(self, peer: PeerId, refusal: Refused) -> None:
        """Remember a refusal by either side; with a neighbour of other settings nothing more is exchanged."""
        self.refused[peer] = str(refusal)
        if refusal.reason == "wrong-config":
            self.mismatched[peer] = refusal.detail

    def record_handshake(self, peer: PeerId) -> None:
        """Forget earlier refusals: a neighbour has the same settings."""
        self.refused.pop(peer, None)
        self.mismatched.pop(peer, None)
