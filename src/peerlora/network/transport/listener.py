"""Dialled end of an edge: one port, mutual TLS 1.3, every call checked against the member list."""

from __future__ import annotations

import asyncio
import hmac
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import grpc

from peerlora.errors import IdentityError
from peerlora.network.base import PeerDown, PeerId, Refused
from peerlora.network.identity.identity import Identity, certificate_fingerprint, read_certificates
from peerlora.network.identity.proof import NONCE, TOKEN, prove
from peerlora.network.identity.roster import Roster
from peerlora.network.transport import frames
from peerlora.network.transport.connections import PER_ADDRESS, Connections, Handshakes, most_connections
from peerlora.network.transport.dialler import live
from peerlora.network.transport.heartbeat import Session, Timing, give_up
from peerlora.network.transport.links import REPLACED, Link, LinkTable
from peerlora.network.transport.server import TlsServer

Got = TypeVar("Got")
STRANGER = "unknown"
"""Name of an unauthenticated caller in events and the audit log."""
CALLS = 8
"""Calls that one key may have open at once; an honest dialler has three, and some just cancelled."""


class AnsweredLink(Link):
    """Session seen from the dialled side: it sends over calls that the dialler keeps open for it."""

    def __init__(self, token: bytes, connection: str):
        super().__init__()
        self.token, self.connection = token, connection
        self.ways: asyncio.Queue[_Way] = asyncio.Queue()

    async def push(self, header: bytes, body: memoryview) -> None:
        """Use up one call of the dialler: write the message, read the answer."""
        way = await self.ways.get()
        while way.over.done():
            way = await self.ways.get()
        try:
            await way.during(frames.say(header, body, frames.writer(way.context), frames.reader(way.context)))
        finally:
            way.end("used")


class _Way(Session):
    """One call of the dialler, over which one message can be sent back."""

    def __init__(self, context: Any):
        super().__init__()
        self.context, self.over = context, self.ended


class Caller(NamedTuple):
    """Certificate of a call's sender."""

    fingerprint: str
    expires: datetime

    @property
    def name(self) -> str:
        """Name for events, where the key is not on the member list."""
        return f"{STRANGER} {self.fingerprint[:16]}"


class Listener:
    """Server on one port."""

    def __init__(self, ends: LinkTable, roster: Roster, identity: Callable[[], Identity], timing: Timing):
        self.ends, self.roster, self.identity, self.timing = ends, roster, identity, timing
        members = len(roster.members.members)
        handlers = {
            frames.SEND: grpc.stream_stream_rpc_method_handler(self._send),
            frames.TAKE: grpc.stream_stream_rpc_method_handler(self._take),
            frames.SESSION: grpc.stream_stream_rpc_method_handler(self._session),
        }
        self._server = TlsServer(handlers, timing, CALLS * members + 32, most_connections(members), self._began)
        self._handshakes = Handshakes(timing.handshake)
        self._connections = Connections(2 * timing.handshake, PER_ADDRESS + 2 * members)
        self._fresh = 0
        self._crowded = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task] = []
        self._calls: Counter[str] = Counter()

    @property
    def port(self) -> int:
        """Number of the open port; 0 for none."""
        return self._server.port

    async def start(self, address: str) -> None:
        """Open the port; raises TransportError where that fails."""
        self._loop = asyncio.get_running_loop()
        await self._server.start(address, self.identity())
        self._tasks.append(asyncio.ensure_future(self._watch_strangers()))

    async def renew(self) -> None:
        """Show the renewed certificate, and have every dialler open its session anew to see it."""
        await self._server.renew(self.identity())
        for edge in self.ends.edges.values():
            if isinstance(edge.link, AnsweredLink):
                edge.link.outdated.set()

    async def close(self) -> None:
        """Close the port and every call."""
        await give_up(*self._tasks)
        await self._server.close()

    def _began(self) -> None:
        """Note a new connection; gRPC calls this from its own threads."""
        self._handshakes.began()
        self._fresh += 1
        if self._fresh > self._connections.most and self._loop is not None:
            self._fresh = 0
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._crowded.set)

    async def _watch_strangers(self) -> None:
        """Close connections that make no call, and count those that never got to one."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.timing.handshake / 2):
                    await self._crowded.wait()
            self._crowded.clear()
            self._fresh = 0
            self._connections.trim(self.port)
            if failed := self._handshakes.failed():
                detail = f"{failed} connections" if failed > 1 else ""
                self.ends.refused(STRANGER, Refused("tls-failed", detail), "here", count=failed)

    @contextmanager
    def _calling(self, context: Any) -> Iterator[Caller]:
        """Authenticate the caller and count its calls; raises Refused, and reports it, for a key not on the list.

        A refused call is aborted at once: the number of all calls is limited, so none may go to strangers, nor more
        than its share to one member.
        """
        self._handshakes.passed(context.peer())
        try:
            caller = _caller(context.auth_context())
        except Refused as refusal:
            raise self._refused(STRANGER, refusal) from None
        key = caller.fingerprint
        if not self.roster.knows(key):
            raise self._refused(caller.name, Refused("not-a-member", f"key {key[:16]}"))
        if self._calls[key] >= CALLS:
            raise self._refused(caller.name, Refused("too-many", f"{CALLS} calls are open"))
        self._connections.prove(key, context.peer())
        self._calls[key] += 1
        try:
            yield caller
        finally:
            self._calls[key] -= 1
            if not self._calls[key]:
                del self._calls[key]

    def _refused(self, name: str, refusal: Refused) -> Refused:
        self.ends.refused(name, refusal, "here")
        return refusal

    def _admitted(self, caller: Caller) -> PeerId:
        """The calling member; raises Refused, and reports it, unless it may talk to this site now."""
        try:
            if self.roster.clock() > caller.expires:  # a connection may outlive it
                raise Refused("certificate-expired", f"on {caller.expires:%Y-%m-%d}")
            return self.roster.admit(caller.fingerprint)
        except Refused as refusal:
            raise self._refused(caller.name, refusal) from None

    def _in_session(self, caller: Caller, context: Any) -> tuple[PeerId, AnsweredLink]:
        """The caller and the session that its call belongs to; raises Refused, and reports it."""
        peer = self._admitted(caller)
        link, token = self.ends.edge(peer).link, _metadata(context, frames.TOKEN_KEY)
        if isinstance(link, AnsweredLink) and link.open and link.connection == context.peer():
            if hmac.compare_digest(link.token, token):
                return peer, link
        refusal = Refused("no-session")  # no event: it happens to honest peers whenever a session ends
        self.ends.audit.refused(peer, refusal.reason, "", "here")
        raise refusal

    async def _send(self, requests: Any, context: Any) -> None:
        """Handle a member's message."""
        try:
            with self._calling(context) as caller:
                await self._receive(caller, context)
        except Refused as refusal:
            await _abort(context, refusal)

    async def _receive(self, caller: Caller, context: Any) -> None:
        """Receive a message.  A refusal is an ordinary answer: a sender that still writes misses a failed call."""
        read, write = frames.reader(context), frames.writer(context)
        with suppress(PeerDown):  # the sender is gone, so there is nobody to answer
            try:
                peer, link = self._in_session(caller, context)
                await link.during(frames.hear(self.ends, peer, write, read))
            except PeerDown:
                await write(frames.refusal_bytes(Refused("no-session", "it ended meanwhile")))
            except Refused as refusal:
                await write(frames.refusal_bytes(refusal))
                await _within(self.timing.handshake, lambda: frames.throw_away(read))

    async def _take(self, requests: Any, context: Any) -> None:
        """Handle a member's offer to take the next message for it."""
        try:
            with self._calling(context) as caller:
                await self._wait_to_send(self._in_session(caller, context)[1], context)
        except Refused as refusal:
            await _abort(context, refusal)

    async def _wait_to_send(self, link: AnsweredLink, context: Any) -> None:
        way = _Way(context)
        try:
            if link.ways.qsize() < 4:
                link.ways.put_nowait(way)
                await asyncio.wait({way.ended, link.ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            way.end("the dialler gave its call up")

    async def _session(self, requests: Any, context: Any) -> None:
        """Handle a member's session, which lasts as long as this call."""
        try:
            with self._calling(context) as caller:
                await self._live(self._admitted(caller), caller.fingerprint, context)
        except Refused as refusal:
            await _abort(context, refusal)

    async def _live(self, peer: PeerId, fingerprint: str, context: Any) -> None:
        """Run a session from its opening to its end; raises Refused where it is refused, or replaced by another."""
        me = self.identity()
        try:
            token = await self._open_session(me, peer, fingerprint, context)
        except PeerDown:
            return  # it went away before the proof had reached it
        link, why = AnsweredLink(token, context.peer()), "the connection broke"
        before = self.ends.edge(peer).link
        anew = isinstance(before, AnsweredLink) and hmac.compare_digest(
            before.token, _metadata(context, frames.TOKEN_KEY)
        )
        self.ends.opened(peer, link, anew)
        if me is not self.identity():
            link.outdated.set()
        write, read = frames.writer(context), frames.reader(context)
        try:
            why = await live(self.ends, peer, link, self.timing, write, read, link.outdated)
        except PeerDown as down:
            why = str(down)
        finally:
            self.ends.lost(peer, link, why)
        if why == REPLACED:
            raise Refused("replaced")

    async def _open_session(self, me: Identity, peer: PeerId, fingerprint: str, context: Any) -> bytes:
        """Prove this site's identity; the token of the new session.  Raises Refused, and reports it."""
        nonce, token = _metadata(context, frames.NONCE_KEY), os.urandom(TOKEN)
        refusal = Refused("bad-frame", "another version of peerlora, or no session's opening")
        if len(nonce) == NONCE:
            await frames.writer(context)(prove(me, nonce, token, peer, fingerprint))
            if await _within(self.timing.handshake, frames.reader(context)):  # a heartbeat: the proof was accepted
                return token
            refusal = Refused("wrong-proof", "it went away after our proof")
        self.ends.refused(peer, refusal, "here" if refusal.reason == "bad-frame" else "there")
        raise refusal


def _metadata(context: Any, key: str) -> bytes:
    value = dict(context.invocation_metadata() or ()).get(key, b"")
    return value if isinstance(value, bytes) else b""


async def _within(seconds: float, do: Callable[[], Awaitable[Got]]) -> Got | None:
    try:
        async with asyncio.timeout(seconds):
            return await do()
    except TimeoutError:
        return None


async def _abort(context: Any, refusal: Refused) -> None:
    """Abort a call with a refusal that the caller can read."""
    answer = ((frames.ANSWER_KEY, frames.refusal_bytes(refusal)),)
    await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(refusal)[:300], answer)


def _caller(shown: dict[str, list[bytes]]) -> Caller:
    """Read a caller's certificate from its TLS connection; raises Refused."""
    if shown.get("ssl_tls_version") != [b"TLSv1.3"]:
        raise Refused("old-tls", b"".join(shown.get("ssl_tls_version", [])).decode(errors="replace"))
    try:
        return _certificate(shown["x509_pem_cert"][0])
    except (KeyError, IndexError, IdentityError):
        raise Refused("tls-failed", "no readable P-256 certificate") from None


@lru_cache(maxsize=1024)
def _certificate(pem: bytes) -> Caller:
    return Caller(certificate_fingerprint(pem), read_certificates(pem, "a certificate")[0].not_valid_after_utc)
