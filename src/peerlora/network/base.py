"""Contract of a transport: it carries bytes between authenticated peers and knows nothing of tensors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from peerlora.errors import PeerloraError

PeerId = str
"""Name of a site, always taken from the authenticated channel, never from a message."""

HEADER_BYTES = 64 * 1024
"""Bytes of the largest header that a receiver accepts."""


REASONS = {
    "not-a-member": "the certificate's key is not on the current member list",
    "not-a-neighbour": "the edge is not among those that the member list names, or not in the run's graph",
    "list-expired": "the member list has expired, so it admits nobody",
    "tls-failed": "no certificate, one of another CA, an expired one, or no TLS at all",
    "certificate-expired": "the certificate expired while the connection stood",
    "old-tls": "a TLS version before 1.3",
    "no-session": "a message outside the edge's session, or of a session that another has replaced",
    "too-many": "more calls at once than one member may have",
    "replaced": "another process of the same site has opened a newer session",
    "wrong-proof": "the dialled side does not hold the key that the member list names",
    "wrong-sender": "the message claims another name than the channel proved",
    "wrong-run": "the message belongs to another run",
    "wrong-base": "the sender trains another base model",
    "wrong-spec": "the sender's adapter has another spec",
    "wrong-config": "the sender's settings differ where all peers must have the same",
    "late": "the round is over here",
    "from-the-future": "the round is further ahead than any honest peer can be",
    "replay": "this message was taken before",
    "unexpected": "no message of this kind is expected from this peer",
    "oversize": "more bytes announced or sent than this message may have",
    "bad-header": "the header cannot be read, or has unknown fields or impossible values",
    "bad-body": "the body is damaged, or its names, shapes or dtypes are not those expected",
    "no-replica": "the difference builds on a replica that the receiver does not have; a full one is sent instead",
    "unknown-vector": "the body holds a vector that the method's message does not name",
    "not-finite": "the body holds NaN or infinite values",
    "out-of-range": "the body holds a value that is far from this site's own ones, or no possible count or mass",
    "bad-signature": "the signature of a relayed adapter is missing, or not its origin's over this adapter in this run",
    "unknown-origin": "a relayed adapter is by nobody whom the run and the current member list name",
    "few-senders": "a sum over fewer than two senders was asked for, which would show one of them",
    "second-set": "the sender has answered another sender set for the same sum, and answers one only",
    "other-set": "the message is masked for another sender set than the receiver asked for",
    "stale-version": "a relayed adapter is not newer than the one held here, or older than exchange.relay.max_age",
    "bad-frame": "the chunks of a message break the transport's rules",
    "internal": "the receiver failed on this message; see its log",
    "unknown-reason": "the other side gave a reason that is not in this list",
}
"""Reasons of refusals, and their meanings."""


LONGEST = 500
"""Characters of the longest text that another site can put into a message for the user."""


def printable(text: str, most: int = LONGEST) -> str:
    """Clean a text that another site may have written: one line without control characters, of bounded length."""
    cut = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(character if character.isprintable() else "?" for character in cut)


class TransportError(PeerloraError):
    """A message was not delivered, or the port cannot be opened; trying again may help.

    Its text may come from another site, which must not write into this one's terminal and logs.
    """

    exit_code = 1

    def __init__(self, text: str):
        super().__init__(printable(text))


def refused_for(reason: str) -> str:
    """Return how the text of a refusal for this reason begins; what follows may be the other site's words."""
    return f"refused: {reason}"


class Refused(TransportError):
    """The receiver refused.  ``reason`` is a key of ``REASONS``, such as ``not-a-member`` or ``wrong-run``."""

    def __init__(self, reason: str, detail: str = ""):
        assert reason in REASONS, reason
        self.reason, self.detail = reason, printable(detail, LONGEST - 100)
        super().__init__(refused_for(reason) + (f" ({self.detail})" if detail else ""))


class PeerDown(TransportError):
    """The peer cannot be reached, or went away before it acknowledged."""


class DeadlineMissed(TransportError):
    """The acknowledgement did not come in time; whether the peer used the message is not known."""


@dataclass(frozen=True)
class PeerEvent:
    """Change of an edge's state, or a refusal on it."""

    kind: Literal["up", "suspect", "down", "refused"]
    peer: PeerId
    detail: str = ""
    """For ``refused``: the reason and which side refused."""


class Signatures(Protocol):
    """Digital signatures of sites, for statements that reach their reader through third sites."""

    size: int
    """Bytes of every signature."""

    def sign(self, statement: bytes) -> bytes:
        """Sign a statement as this site."""
        ...

    def verify(self, site: PeerId, statement: bytes, signature: bytes) -> None:
        """Raise Refused unless ``site`` signed the statement: ``unknown-origin`` or ``bad-signature``."""
        ...

    def current(self, site: PeerId, signature: bytes) -> bool:
        """Whether a signature is by the key that the current member list names for ``site``; says nothing of what."""
        ...


class KeyAgreement(Protocol):
    """Keys that two sites have in common and no third one can compute."""

    session_key: bytes
    """Public key of this process, which the other site needs."""

    def pair_key(self, site: PeerId, session_key: bytes, context: bytes) -> bytes:
        """Return the key of this process and the one of ``site`` that has ``session_key``, for one purpose.

        Raises Refused where there can be none: ``not-a-member`` or ``bad-body``.
        """
        ...


@runtime_checkable
class Receiver(Protocol):
    """Takes the messages of a transport, on the transport's event loop."""

    def admit(self, peer: PeerId, header: bytes) -> int:
        """Decide by the header alone how many bytes of body may follow; raises Refused before any body is read."""
        ...

    async def deliver(self, peer: PeerId, header: bytes, body: bytearray) -> None:
        """Take a complete message.  Returning acknowledges it, raising Refused tells the sender why not.

        Awaiting here is back-pressure: the sender's call stays open, and no more than one message per edge is held.
        It is cancelled when the sender gives up or goes away meanwhile; the message then counts as not taken.
        """
        ...


@runtime_checkable
class Transport(Protocol):
    """One peer's connections to its neighbours."""

    me: PeerId
    signatures: Signatures | None
    """None where the transport authenticates nobody: then nothing is signed."""
    agreement: KeyAgreement | None
    """None where sites have no keys for it: then nothing can be summed secretly."""

    async def start(self, receiver: Receiver) -> None:
        """Open the port (where it has one) and dial the neighbours that can be dialled."""
        ...

    async def send(self, to: PeerId, header: bytes, body: bytes | memoryview, *, deadline: float) -> None:
        """Send one message and wait, at most ``deadline`` seconds, until the receiver took it.

        Messages to one peer arrive in the order of the calls.  Raises Refused, PeerDown or DeadlineMissed; PeerDown at
        once while there is no session with ``to``, that is before the event ``up`` and after ``down``.
        """
        ...

    def report_refusal(self, peer: PeerId, refusal: Refused, header: bytes) -> None:
        """Report and audit that a part of a message by ``peer``, which was taken, was refused here."""
        ...

    def events(self) -> AsyncIterator[PeerEvent]:
        """Iterate over the edges' events while the transport is open; bounded, the oldest are dropped first."""
        ...

    async def close(self) -> None:
        """End all sessions; calls in flight raise PeerDown."""
        ...
