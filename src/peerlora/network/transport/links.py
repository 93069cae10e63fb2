"""What all transports do alike: one end of an edge, order of sending, taking a message in, telling what happened."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from peerlora.network.base import (
    HEADER_BYTES,
    DeadlineMissed,
    PeerDown,
    PeerEvent,
    PeerId,
    Receiver,
    Refused,
    TransportError,
)
from peerlora.network.transport.audit_log import AuditLog
from peerlora.network.transport.heartbeat import Health, Session

CHUNK = 1 << 20
"""Bytes of a piece of a body."""
EVENTS = 1000
REPLACED = "replaced by a new session"

Read = Callable[[], Awaitable[bytes | None]]
"""The next piece of a message; None when there are no more."""


class Link(Session, ABC):
    """A session that can carry messages."""

    @abstractmethod
    async def push(self, header: bytes, body: memoryview) -> None:
        """Carry one message to the other side and wait for its answer; raises Refused or PeerDown."""


class Guard(Protocol):
    """Who may talk now."""

    def check(self, site: PeerId) -> None:
        """Raise Refused unless ``site`` may talk to this one."""
        ...


class PeerLinks:
    """One end of the way to a neighbour."""

    def __init__(self, peer: PeerId):
        self.peer = peer
        self.link: Link | None = None
        self.sending, self.taking = asyncio.Lock(), asyncio.Lock()
        self.told = False
        """Whether it was told that there is no session."""


class LinkTable:
    """One site's ends of all its edges, whatever carries the bytes."""

    def __init__(self, me: PeerId, guard: Guard, audit: AuditLog | None = None):
        self.me, self.guard, self.audit = me, guard, audit or AuditLog(None)
        self.receiver: Receiver | None = None
        self.closed = False
        self.edges: dict[PeerId, PeerLinks] = {}
        self._events: deque[PeerEvent] = deque(maxlen=EVENTS)
        self._news = asyncio.Event()

    def edge(self, peer: PeerId) -> PeerLinks:
        """The edge to ``peer``."""
        return self.edges.setdefault(peer, PeerLinks(peer))

    async def send(self, to: PeerId, header: bytes, body: bytes | memoryview, *, deadline: float) -> None:
        """See Transport.send.  Without a session it raises PeerDown at once; wait for the event ``up`` before."""
        if len(header) > HEADER_BYTES:
            raise TransportError(f"header of {len(header)} bytes given; at most {HEADER_BYTES}")
        view = memoryview(body).cast("B")
        try:
            self.guard.check(to)
        except Refused as refusal:
            self.refused(to, refusal, "here", header)
            raise
        try:
            async with asyncio.timeout(deadline):
                async with self.edge(to).sending:
                    await self._push(to, header, view)
        except TimeoutError:
            self.audit.message("unanswered", to, header, len(view))
            raise DeadlineMissed(f"{to} did not answer within {deadline:g} s") from None
        except PeerDown:
            self.audit.message("unanswered", to, header, len(view))
            raise
        except Refused as refusal:
            if refusal.reason == "no-session":  # it ended while the message was on its way
                raise PeerDown(f"{to} has ended the session") from None
            self.refused(to, refusal, "there", header)
            raise
        self.audit.message("sent", to, header, len(view))

    async def _push(self, to: PeerId, header: bytes, body: memoryview) -> None:
        link = self.edge(to).link
        if self.closed or link is None or not link.open:
            raise PeerDown(f"there is no session with {to}")
        await link.during(link.push(header, body))

    async def take(self, peer: PeerId, header: bytes, length: int, read: Read) -> None:
        """Take one message in; returns when the receiver has it.  Raises Refused, told here as well."""
        try:
            async with self.edge(peer).taking:
                await self._take(peer, header, length, read)
        except Refused as refusal:
            self.refused(peer, refusal, "here", header)
            raise
        except Exception:
            logging.getLogger(__name__).exception("a message by %s failed here", peer)
            refusal = Refused("internal")
            self.refused(peer, refusal, "here", header)
            raise refusal from None
        self.audit.message("received", peer, header, length)

    async def _take(self, peer: PeerId, header: bytes, length: int, read: Read) -> None:
        if self.receiver is None or self.closed:
            raise Refused("no-session", "not started, or closing")
        self.guard.check(peer)
        if len(header) > HEADER_BYTES:
            raise Refused("oversize", f"header of {len(header)} bytes")
        allowed = self.receiver.admit(peer, header)
        if length > allowed:
            raise Refused("oversize", f"{length} bytes announced, {allowed} allowed")
        await self.receiver.deliver(peer, header, await _assemble(length, read))

    def opened(self, peer: PeerId, link: Link) -> None:
        """A session stands; one with the same peer that stood before is replaced by it."""
        edge = self.edge(peer)
        old, edge.link, edge.told = edge.link, link, False
        if old is not None:
            old.end(REPLACED)
            self.tell(PeerEvent("down", peer, REPLACED))
        self.tell(PeerEvent("up", peer))

    def lost(self, peer: PeerId, link: Link, why: str) -> None:
        """A session ended."""
        link.end(why)
        edge = self.edge(peer)
        if edge.link is link:
            edge.link = None
            self.tell(PeerEvent("down", peer, why))

    def unreachable(self, peer: PeerId, why: str) -> None:
        """No session could be opened; told once until one stood again."""
        edge = self.edge(peer)
        if edge.link is None and not edge.told:
            self.tell(PeerEvent("down", peer, why))
            edge.told = True

    def health(self, peer: PeerId, health: Health) -> None:
        """Tell that an edge became suspect, or recovered; DOWN is told when the session ends."""
        if health != "down":
            self.tell(PeerEvent("suspect" if health == "suspect" else "up", peer))

    def refused(self, peer: PeerId, refusal: Refused, side: str, header: bytes = b"") -> None:
        """Tell that ``side`` (here or there) refused."""
        detail = f"{refusal.reason}, {side}" + (f": {refusal.detail}" if refusal.detail else "")
        self._put(PeerEvent("refused", peer, detail))
        self.audit.refused(peer, refusal.reason, refusal.detail, side, header)

    def tell(self, event: PeerEvent) -> None:
        """Put an event where ``events`` finds it."""
        self.audit.event(event.kind, event.peer, event.detail)
        self._put(event)

    def _put(self, event: PeerEvent) -> None:
        self._events.append(event)
        self._news.set()

    async def events(self) -> AsyncIterator[PeerEvent]:
        """See Transport.events; for one listener."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self.closed:
                return
            self._news.clear()
            await self._news.wait()

    def shut(self) -> None:
        """End all sessions and the events."""
        self.closed = True
        for edge in self.edges.values():
            if edge.link is not None:
                edge.link.end(f"{self.me} is closing")
        self._news.set()


async def _assemble(length: int, read: Read) -> bytearray:
    """A body of exactly ``length`` bytes from its pieces."""
    body, filled = bytearray(length), 0
    while filled < length:
        piece = await read()
        if piece is None or not 0 < len(piece) <= min(CHUNK, length - filled):
            raise Refused("bad-frame", f"broken after {filled} of {length} bytes")
        body[filled : filled + len(piece)] = piece
        filled += len(piece)
    return body
