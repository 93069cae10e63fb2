"""Bookkeeping of one exchange between a peer and its neighbours: message, progress, result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from peerlora.network.base import PeerId
from peerlora.network.protocol.wire import Header, Kind

Decoder = Callable[[Header, bytearray], Any]
"""Decodes a message's body into the values that are used; raises Refused.  It may run in another thread."""


class OutgoingMessage(NamedTuple):
    """The message that a peer sends in one exchange, to all neighbours or to one of them."""

    body: bytes
    codec: Literal["identity", "difference"] = "identity"
    facts: Mapping[str, str | int] = {}
    """For the header."""
    full_replica: Callable[[], bytes] | None = None
    """Of a difference: encodes the body for receivers that lack the replica it builds on (``no-replica``)."""


class ExchangeResult(NamedTuple):
    """Result of one exchange."""

    received: dict[PeerId, Any]
    """Decoded messages of the neighbours whose link is used."""
    delivered: set[PeerId]
    """Neighbours that use the own message: the same, unless links go one way."""
    missing: dict[PeerId, str]
    """The other neighbours, and why."""
    full_replicas: dict[PeerId, int]
    """Neighbours that were sent a full replica in place of a difference, and its bytes."""


@dataclass
class PendingExchange:
    """One exchange in progress; ``deadline`` in seconds."""

    receivers: Collection[PeerId]
    senders: Collection[PeerId]
    decode: Decoder
    one_way: bool
    """Whether each direction of a link is used by itself."""
    deadline: float
    kind: Kind = "mix"
    all_or_none: bool = False
    """Whether the messages of the senders are of use together only, as those of a secure sum."""
    received: dict[PeerId, Any] = field(default_factory=dict)
    acknowledged: set[PeerId] = field(default_factory=set)
    failed: dict[PeerId, str] = field(default_factory=dict)
    behind: set[PeerId] = field(default_factory=set)
    """Neighbours that had not reached this round when they last answered."""
    full_replicas: dict[PeerId, int] = field(default_factory=dict)
    """Bytes of the full replicas that were sent after a refused difference."""

    @property
    def peers(self) -> list[PeerId]:
        """All receivers and senders, each once."""
        return list(dict.fromkeys([*self.receivers, *self.senders]))

    def complete(self, peer: PeerId) -> bool:
        """Whether no message of this peer is missing."""
        return peer in self.received or peer not in self.senders

    def used(self, peer: PeerId) -> bool:
        """Whether the link is used, in each direction that it has."""
        return self.complete(peer) and (peer in self.acknowledged or peer not in self.receivers)

    def one_sided(self, peer: PeerId) -> bool:
        """Whether one of a link's two messages came across and the other has not yet."""
        return not self.one_way and (peer in self.received) != (peer in self.acknowledged)

    def silent(self, peer: PeerId) -> bool:
        """Whether neither a message nor, where links go both ways, an acknowledgement came."""
        return peer not in self.received and (self.one_way or peer not in self.acknowledged)

    def settled(self, peer: PeerId, passed: bool) -> bool:
        """Whether nothing more can come; where both directions are used together, one failure settles both.

        ``passed``: the peer is known to be in a later exchange, so its message of this one will never come.
        """
        if self.used(peer):
            return True
        sent = peer in self.acknowledged or peer not in self.receivers
        return (peer in self.failed or sent and passed) and (self.complete(peer) or passed or not self.one_way)

    def give_up(self) -> None:
        """Drop what came, where the messages are of use together only and one is missing."""
        if self.all_or_none and not all(self.complete(peer) for peer in self.senders):
            self.failed |= dict.fromkeys(self.received, "sum given up")
            self.received.clear()

    def outcome(self) -> tuple[dict[PeerId, Any], set[PeerId]]:
        """The received messages that are used, and the neighbours that use the own one."""
        if self.one_way:
            return dict(self.received), set(self.acknowledged)
        both = [peer for peer in self.peers if self.used(peer)]
        return {peer: self.received[peer] for peer in both}, set(both)

    def reason(self, peer: PeerId, absent: bool, passed: bool) -> str:
        """Why a link is not used."""
        silence = "no acknowledgement" if self.complete(peer) else "ahead" if passed else "no message"
        silence = "behind" if peer in self.behind else silence
        return self.failed.get(peer, "absent" if absent else silence)
