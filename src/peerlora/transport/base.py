"""The byte contract: a transport knows who talks, and bytes; never what tensors mean."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

from peerlora.errors import PeerloraError

PeerId = str
"""A site's name, always taken from the authenticated channel, never from a message."""

HEADER_BYTES = 64 * 1024
"""The largest header that anybody accepts."""


class TransportError(PeerloraError):
    """A message did not get through."""


class Refused(TransportError):
    """The receiver said no.  ``reason`` is one of a fixed list of words, such as ``not-a-member`` or ``wrong-run``."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"refused: {reason}" + (f" ({detail})" if detail else ""))
        self.reason, self.detail = reason, detail


class PeerDown(TransportError):
    """The peer cannot be reached, or went away before it acknowledged."""


class DeadlineMissed(TransportError):
    """The acknowledgement did not come in time; whether the peer used the message is not known."""


@dataclass(frozen=True)
class PeerEvent:
    """Something that happened to an edge."""

    kind: Literal["up", "suspect", "down", "refused"]
    peer: PeerId
    detail: str = ""
    """For ``refused``: the reason and which side refused."""


class Receiver(Protocol):
    """What a transport hands messages to.  It runs on the transport's event loop."""

    def admit(self, peer: PeerId, header: bytes) -> int:
        """The bytes of body that may follow, from the header alone; raises Refused before any body is read."""
        ...

    async def deliver(self, peer: PeerId, header: bytes, body: bytearray) -> None:
        """Take a complete message.  Returning acknowledges it, raising Refused tells the sender why not.

        Awaiting here is back-pressure: the sender's call stays open, and no more than one message per edge is held.
        """
        ...


class Transport(Protocol):
    """One peer's end of all its edges."""

    me: PeerId

    async def start(self, receiver: Receiver) -> None:
        """Open the port (where it has one) and dial the neighbours that can be dialled."""
        ...

    async def send(self, to: PeerId, header: bytes, body: bytes | memoryview, *, deadline: float) -> None:
        """Send one message and wait, at most ``deadline`` seconds, until the receiver took it.

        Messages to one peer arrive in the order of the calls.  Raises Refused, PeerDown or DeadlineMissed.
        """
        ...

    def events(self) -> AsyncIterator[PeerEvent]:
        """What happens to the edges, for as long as the transport is open; bounded, the oldest go first."""
        ...

    async def close(self) -> None:
        """End all sessions; calls in flight raise PeerDown."""
        ...
