"""Common part of all transports: sessions per edge, order of sending, reception of a message, events."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
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
"""Bytes of one chunk of a body."""
EVENTS = 1000
"""Events that wait to be read; beyond, the oldest are dropped."""
REPLACED = "replaced by a new session"
_MOMENT = 0.2  # seconds between two tries of a message over a session that takes none while it is being replaced

Read = Callable[[], Awaitable[bytes | None]]
"""Reads the next chunk of a message; None after the last."""


class NoSession(PeerDown):
    """There was no session to send over, so nothing of the message has left this site."""


class Link(Session, ABC):
    """Session that carries messages."""

    def __init__(self) -> None:
        super().__init__()
        self.outdated = asyncio.Event()
        """Set when the session shall be opened anew."""

    @abstractmethod
    async def push(self, header: bytes, body: memoryview) -> None:
        """Send one message and wait for the answer; raises Refused or PeerDown."""


class Guard(Protocol):
    """Access control of a transport."""

    def check(self, site: PeerId) -> None:
        """Raise Refused unless ``site`` may talk to this one."""
        ...


class PeerLinks:
    """This peer's end of the edge to one neighbour."""

    def __init__(self, peer: PeerId):
        self.peer = peer
        self.link: Link | None = None
        self.changed = asyncio.Event()
        """Set, and cleared, whenever a session has opened or ended."""
        self.sending, self.taking = asyncio.Lock(), asyncio.Lock()
        self.reported_down = False
        """Whether the lack of a session was reported since the last one."""

    def replace(self, link: Link | None) -> None:
        """Change the session."""
        self.link = link
        self.changed.set()
        self.changed.clear()

    async def wait_for_another(self, link: Link) -> None:
        """Wait a moment for the session that replaces ``link``, which takes no messages any more, or not yet."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_MOMENT):
                while self.link is link:
                    await self.changed.wait()


class LinkTable:
    """One site's ends of all its edges, for every transport."""

    def __init__(self, me: PeerId, guard: Guard, audit: AuditLog | None = None):
        self.me, self.guard, self.audit = me, guard, audit or AuditLog(None)
        self.receiver: Receiver | None = None
        self.closed = False
        self.edges: dict[PeerId, PeerLinks] = {}
        self._events: deque[PeerEvent] = deque(maxlen=EVENTS)
        self._queued = asyncio.Event()

    def edge(self, peer: PeerId) -> PeerLinks:
        """The edge to ``peer``."""
        return self.edges.setdefault(peer, PeerLinks(peer))

    async def send(self, to: PeerId, header: bytes, body: bytes | memoryview, *, deadline: float) -> None:
        """See Transport; without a session it raises PeerDown at once."""
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
        except PeerDown as down:
            self.audit.message("unanswered", to, header, len(view), moved=not isinstance(down, NoSession))
            raise
        except Refused as refusal:
            if refusal.reason == "no-session":  # it ended while the message was in flight
                raise PeerDown(f"{to} has ended the session") from None
            self.refused(to, refusal, "there", header)
            raise
        self.audit.message("sent", to, header, len(view))

    async def _push(self, to: PeerId, header: bytes, body: memoryview) -> None:
        """Send over the session; a message that a new session has cut off is sent again over that one.

        So it may arrive twice; what must not is refused as ``replay`` by the receiver.
        """
        edge, kind = self.edge(to), NoSession
        while True:
            link = edge.link
            if self.closed or link is None or not link.open:
                raise kind(f"there is no session with {to}")
            kind = PeerDown
            try:
                return await link.during(link.push(header, body))
            except PeerDown:
                if edge.link is None or edge.link is link and not link.open:
                    raise
            except Refused as refusal:
                if refusal.reason != "no-session":
                    raise
            await edge.wait_for_another(link)

    async def take(self, peer: PeerId, header: bytes, length: int, read: Read) -> None:
        """Receive one message and hand it over; raises Refused, and reports it here as well.

        Raises PeerDown where the call ends within the message: its sender is gone, and nothing was refused.
        """
        try:
            async with self.edge(peer).taking:
                await self._take(peer, header, length, read)
        except PeerDown:
            self.audit.message("broken-off", peer, header, length, moved=False)
            raise
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

    def opened(self, peer: PeerId, link: Link, anew: bool = False) -> None:
        """Register a new session, which replaces an earlier one with the same peer.

        ``anew``: the same process has opened it, to show a renewed certificate; no event, nobody was away.
        """
        edge = self.edge(peer)
        old, edge.reported_down = edge.link, False
        edge.replace(link)
        if old is not None:
            old.end(REPLACED)
        if anew and old is not None:
            self.audit.event("anew", peer, "")
            return
        if old is not None:
            self.report(PeerEvent("down", peer, REPLACED))
        self.report(PeerEvent("up", peer))

    def lost(self, peer: PeerId, link: Link, why: str) -> None:
        """End a session and report it."""
        link.end(why)
        edge = self.edge(peer)
        if edge.link is link:
            edge.replace(None)
            self.report(PeerEvent("down", peer, why))

    def unreachable(self, peer: PeerId, why: str) -> None:
        """Report that no session could be opened; once until the next one is."""
        edge = self.edge(peer)
        if edge.link is None and not edge.reported_down:
            self.report(PeerEvent("down", peer, why))
            edge.reported_down = True

    def health(self, peer: PeerId, health: Health) -> None:
        """Report that an edge became suspect, or recovered; DOWN is reported when the session ends."""
        if health != "down":
            self.report(PeerEvent("suspect" if health == "suspect" else "up", peer))

    def refused(self, peer: PeerId, refusal: Refused, side: str, header: bytes = b"", count: int = 1) -> None:
        """Report that ``side`` (here or there) refused, so many times."""
        detail = f"{refusal.reason}, {side}" + (f": {refusal.detail}" if refusal.detail else "")
        self._put(PeerEvent("refused", peer, detail))
        self.audit.refused(peer, refusal.reason, refusal.detail, side, header, count)

    def report(self, event: PeerEvent) -> None:
        """Queue an event and log it."""
        self.audit.event(event.kind, event.peer, event.detail)
        self._put(event)

    def _put(self, event: PeerEvent) -> None:
        self._events.append(event)
        self._queued.set()

    async def events(self) -> AsyncIterator[PeerEvent]:
        """See Transport; for one listener."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self.closed:
                return
            self._queued.clear()
            await self._queued.wait()

    def shut(self) -> None:
        """End all sessions and the events."""
        self.closed = True
        for edge in self.edges.values():
            if edge.link is not None:
                edge.link.end(f"{self.me} is closing")
        self._queued.set()


async def _assemble(length: int, read: Read) -> bytearray:
    """Read a body of exactly ``length`` bytes from its chunks; raises Refused, and PeerDown where they end before."""
    body, filled = bytearray(length), 0
    while filled < length:
        chunk = await read()
        if chunk is None:
            raise PeerDown(f"the call broke off after {filled} of {length} bytes")
        if not 0 < len(chunk) <= min(CHUNK, length - filled):
            raise Refused("bad-frame", f"a chunk of {len(chunk)} bytes after {filled} of {length}")
        body[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return body


class LinkTransport:
    """What every transport hands to its table of links; see Transport."""

    ends: LinkTable

    async def send(self, to: PeerId, header: bytes, body: bytes | memoryview, *, deadline: float) -> None:
        """See Transport."""
        await self.ends.send(to, header, body, deadline=deadline)

    def report_refusal(self, peer: PeerId, refusal: Refused, header: bytes) -> None:
        """See Transport."""
        self.ends.refused(peer, refusal, "here", header)

    def events(self) -> AsyncIterator[PeerEvent]:
        """See Transport; for one listener."""
        return self.ends.events()
