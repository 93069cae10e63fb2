"""One exchange between a peer and its neighbours: what is sent, how far it has come, what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from peerlora.network.base import PeerId
from peerlora.network.protocol.wire import Header

Decoder = Callable[[Header, bytearray], Any]
"""Turns a message's body into what is used of it; raises Refused.  It may run in another thread."""


class OutgoingMessage(NamedTuple):
    """What a peer sends in one exchange, the same to everybody."""

    body: bytes
    codec: Literal["identity", "difference"] = "identity"
    facts: Mapping[str, str] = {}
    """For the header."""
    whole: Callable[[], bytes] | None = None
    """Of a difference: makes the body that those get who do not have what it builds on (``no-replica``)."""


class ExchangeResult(NamedTuple):
    """What came of one exchange."""

    got: dict[PeerId, Any]
    """What was made of the messages of those whose edge counts."""
    taken: set[PeerId]
    """Those to whom the edge counts: the same, unless links go one way."""
    missing: dict[PeerId, str]
    """The other neighbours, and why."""
    whole: dict[PeerId, int]
    """Those who got all in place of a difference, and its bytes."""


@dataclass
class PendingExchange:
    """One exchange that is going on."""

    receivers: Collection[PeerId]
    senders: Collection[PeerId]
    check: Decoder
    one_way: bool
    """Whether each way of a link counts by itself."""
    got: dict[PeerId, Any] = field(default_factory=dict)
    acknowledged: set[PeerId] = field(default_factory=set)
    failed: dict[PeerId, str] = field(default_factory=dict)
    behind: set[PeerId] = field(default_factory=set)
    """Those who were not yet so far when they last answered."""
    whole: dict[PeerId, int] = field(default_factory=dict)
    """Bytes of what was sent again as a whole."""

    @property
    def peers(self) -> list[PeerId]:
        """Everybody who is sent to or heard from."""
        return list(dict.fromkeys([*self.receivers, *self.senders]))

    def heard(self, peer: PeerId) -> bool:
        """Whether nothing is missing that this peer should send."""
        return peer in self.got or peer not in self.senders

    def counts(self, peer: PeerId) -> bool:
        """Whether the edge counts, each way that it goes."""
        return self.heard(peer) and (peer in self.acknowledged or peer not in self.receivers)

    def half(self, peer: PeerId) -> bool:
        """Whether one of the two messages of an edge came across and the other did not."""
        return not self.one_way and (peer in self.got) != (peer in self.acknowledged)

    def quiet(self, peer: PeerId) -> bool:
        """Whether neither a message nor, where links go both ways, an acknowledgement came."""
        return peer not in self.got and (self.one_way or peer not in self.acknowledged)

    def settled(self, peer: PeerId, passed: bool) -> bool:
        """Whether nothing is to be waited for; where both ways count together, one failure settles both.

        ``passed``: the peer was heard to be in a later exchange, so its message of this one will never come.
        """
        if self.counts(peer):
            return True
        sent = peer in self.acknowledged or peer not in self.receivers
        return (peer in self.failed or sent and passed) and (self.heard(peer) or passed or not self.one_way)

    def used(self) -> tuple[dict[PeerId, Any], set[PeerId]]:
        """What counts of what came, and with whom the own message counts."""
        if self.one_way:
            return dict(self.got), set(self.acknowledged)
        both = [peer for peer in self.peers if self.counts(peer)]
        return {peer: self.got[peer] for peer in both}, set(both)

    def reason(self, peer: PeerId, absent: bool, passed: bool) -> str:
        """Why an edge does not count."""
        quiet = "no acknowledgement" if self.heard(peer) else "ahead" if passed else "no message"
        quiet = "behind" if peer in self.behind else quiet
        return self.failed.get(peer, "absent" if absent else quiet)
