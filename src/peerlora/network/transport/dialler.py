"""Dialling end of an edge: opens the session, sends over it, and takes the other side's messages over it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import grpc
from grpc import aio

from peerlora.network.base import PeerDown, PeerId, Refused
from peerlora.network.identity.identity import Identity, host_name
from peerlora.network.identity.proof import check_proof, new_nonce
from peerlora.network.identity.roster import Roster
from peerlora.network.transport import frames
from peerlora.network.transport.heartbeat import Heartbeat, Timing, give_up, watch
from peerlora.network.transport.links import REPLACED, Link, LinkTable, Read


class DialledLink(Link):
    """Session seen from the dialling side."""

    def __init__(self, channel: aio.Channel, token: bytes, outdated: asyncio.Event):
        super().__init__()
        self.token, self.outdated = token, outdated
        self.metadata = ((frames.TOKEN_KEY, token),)
        self._send = channel.stream_stream(f"/{frames.SERVICE}/{frames.SEND}")
        self.take = channel.stream_stream(f"/{frames.SERVICE}/{frames.TAKE}")

    async def push(self, header: bytes, body: memoryview) -> None:
        """One call: the message streams out, one ack comes back."""
        try:
            call = self._send(metadata=self.metadata)
        except aio.UsageError:
            raise PeerDown("the connection is closed") from None
        try:
            await frames.say(header, body, call.write, frames.reader(call))
        except aio.AioRpcError as error:
            raise failure(error) from None
        finally:
            call.cancel()


def failure(error: aio.AioRpcError) -> Refused | PeerDown:
    """Translate a failed call: the other side refused, or is gone."""
    for key, value in error.trailing_metadata() or ():
        if key == frames.ANSWER_KEY and isinstance(value, bytes):
            return frames.read_refusal(value)
    return PeerDown(f"{error.code().name.lower().replace('_', ' ')}: {(error.details() or 'no details')[:300]}")


async def dial_for_ever(
    ends: LinkTable,
    roster: Roster,
    identity: Callable[[], Identity],
    peer: PeerId,
    timing: Timing,
    anew: asyncio.Event,
) -> None:
    """Keep a session with ``peer`` while it is a member: open it, and again whenever it ends.

    When ``anew`` is set, or the other side asks for it, another session is opened first; it replaces the one before.
    """
    wait, running = None, set[asyncio.Future[float]]()
    try:
        while True:
            anew.clear()
            session = _Session(ends, roster, identity(), peer, timing, anew)
            task = asyncio.ensure_future(session.run(wait))
            running.add(task)
            task.add_done_callback(running.discard)
            await _either(task, session.opened)
            if session.opened.is_set():
                await _either(task, anew)
            wait = task.result() if task.done() else None
            await asyncio.sleep(wait or 0)
    finally:
        await give_up(*running)


async def _either(task: asyncio.Future, event: asyncio.Event) -> None:
    """Wait until a task has ended or an event is set."""
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await give_up(waiting)


@dataclass
class _Session:
    """One channel to a site and the one session over it."""

    ends: LinkTable
    roster: Roster
    identity: Identity
    peer: PeerId
    timing: Timing
    anew: asyncio.Event
    """Set when another session is to replace this one."""
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    link: DialledLink | None = None

    async def run(self, waited: float | None) -> float:
        """Run it to its end; the seconds to wait before the next, after having waited ``waited`` for this one."""
        side = "here"
        try:
            self.roster.check(self.peer)
            side = "there"
            await self._hold()
            return self.timing.next_wait(None if self.opened.is_set() else waited)
        except Refused as refusal:
            self.ends.refused(self.peer, refusal, "here" if refusal.reason == "wrong-proof" else side)
        except Exception:  # a fault of this code must not cost the edge for the rest of the run
            logging.getLogger(__name__).exception("dialling %s failed here", self.peer)
        return self.timing.refused

    async def _hold(self) -> None:
        """Open it, keep it, and report why it ended; raises Refused."""
        ends, peer, member = self.ends, self.peer, self.roster.members.member(self.peer)
        assert member.address is not None
        nonce, before = new_nonce(), ends.edge(peer).link
        metadata = [(frames.NONCE_KEY, nonce)]
        metadata += [(frames.TOKEN_KEY, before.token)] if isinstance(before, DialledLink) else []
        channel = self._channel(member.address)
        call = channel.stream_stream(f"/{frames.SERVICE}/{frames.SESSION}")(metadata=tuple(metadata))
        try:
            async with asyncio.timeout(self.timing.handshake):
                self.link, expires = await self._open(channel, call, nonce, member.fingerprint)
            ends.lost(peer, self.link, await self._live(self.link, call, expires))
        except PeerDown as down:
            ends.unreachable(peer, str(down))
        except TimeoutError:
            ends.unreachable(peer, f"no answer from {member.address} within {self.timing.handshake:g} s")
        except (aio.AioRpcError, asyncio.InvalidStateError) as error:
            reason = failure(error) if isinstance(error, aio.AioRpcError) else await _reason(call)
            if self.link is not None:
                ends.lost(peer, self.link, str(reason))
            if isinstance(reason, Refused):
                raise reason from None
            ends.unreachable(peer, str(reason))
        finally:
            if self.link is not None:
                ends.lost(peer, self.link, f"{ends.me} ended the session")
            call.cancel()
            await channel.close()

    def _channel(self, address: str) -> aio.Channel:
        own = self.identity
        credentials = grpc.ssl_channel_credentials(own.roots, own.key, own.certificate)
        named = ("grpc.ssl_target_name_override", host_name(self.peer))
        target = f"dns:///{address}"  # without a scheme, gRPC takes a host named unix, ipv4 or xds for one
        return aio.secure_channel(target, credentials, options=[*frames.options(self.timing), named])

    async def _open(
        self, channel: aio.Channel, call: Any, nonce: bytes, fingerprint: str
    ) -> tuple[DialledLink, datetime]:
        """The link, and when the certificate at its other end expires."""
        answer = await frames.reader(call)()
        if answer is None:
            raise await _reason(call)
        own = self.identity
        token, expires = check_proof(answer, nonce, self.peer, fingerprint, own.site, own.fingerprint)
        if expires <= self.roster.clock():
            raise PeerDown(_expired(expires))
        return DialledLink(channel, token, self.anew), expires

    async def _live(self, link: DialledLink, call: Any, expires: datetime) -> str:
        """Use the link until it ends; why it did."""
        ends, peer = self.ends, self.peer
        ends.opened(peer, link, anew=ends.edge(peer).link is not None)
        self.opened.set()
        seconds = (expires - self.roster.clock()).total_seconds()
        end = asyncio.get_running_loop().call_later(seconds, link.end, _expired(expires))
        taking = asyncio.ensure_future(_take_all(ends, peer, link))
        try:
            reader, linger = frames.reader(call), self.timing.handshake
            return await live(ends, peer, link, self.timing, call.write, reader, linger=linger)
        finally:
            end.cancel()
            await give_up(taking)


def _expired(end: datetime) -> str:
    return f"its certificate expired on {end:%Y-%m-%d %H:%M} UTC"


async def _reason(call: Any) -> Refused | PeerDown:
    metadata, code, details = await call.trailing_metadata(), await call.code(), await call.details()
    return failure(aio.AioRpcError(code, await call.initial_metadata(), metadata, details))


async def _take_all(ends: LinkTable, peer: PeerId, link: DialledLink) -> None:
    """Take messages of the other side one after the other, one call each."""
    while link.open:
        call = link.take(metadata=link.metadata)
        task = asyncio.ensure_future(_take_one(ends, peer, call))
        call.add_done_callback(_canceller(task))
        try:
            await asyncio.wait({task})
        finally:
            await give_up(task)
            call.cancel()
        if not task.cancelled() and task.exception() is not None:
            await asyncio.sleep(0.05)  # seconds: the session is about to end; don't spin until then


def _canceller(task: asyncio.Future) -> Callable[[Any], None]:
    def cancel(_: Any) -> None:
        task.cancel()

    return cancel


async def _take_one(ends: LinkTable, peer: PeerId, call: Any) -> None:
    async def answer(data: bytes) -> None:
        await call.write(data)
        await call.done_writing()

    await frames.hear(ends, peer, answer, frames.reader(call))


async def live(
    ends: LinkTable,
    peer: PeerId,
    link: Link,
    timing: Timing,
    write: Callable[[bytes], Awaitable[Any]],
    read: Read,
    ask_anew: asyncio.Event | None = None,
    linger: float = 0.0,
) -> str:
    """Send and receive heartbeats until the session ends; return why it did.

    Once ``ask_anew`` is set, heartbeats ask the other side to open the session anew.  A replaced session may last
    ``linger`` seconds more, until the other side ends it: the new one has opened there, too, by then.
    """
    loop = asyncio.get_running_loop()
    heartbeat = Heartbeat(timing, loop.time())

    async def beat() -> None:
        while True:
            asking = ask_anew is not None and ask_anew.is_set()
            await write(frames.ANEW if asking else frames.BEAT)
            with suppress(TimeoutError):
                async with asyncio.timeout(timing.beat):
                    await (asyncio.sleep(timing.beat) if asking or ask_anew is None else ask_anew.wait())

    async def hear() -> None:
        while (heard := await read()) is not None:
            heartbeat.heard(loop.time())
            if heard == frames.ANEW:
                link.outdated.set()

    hearing = asyncio.ensure_future(hear())
    watching = asyncio.ensure_future(watch(heartbeat, lambda health: ends.health(peer, health)))
    beating = asyncio.ensure_future(beat())
    try:
        await asyncio.wait({hearing, watching, beating, link.ended}, return_when=asyncio.FIRST_COMPLETED)
        if link.ended.done():
            if link.ended.result() == REPLACED and linger:
                await asyncio.wait({hearing}, timeout=linger)
            return link.ended.result()
        if watching.done():
            return "no heartbeat"
        for task in (hearing, beating):
            if task.done():
                await task  # raises what went wrong
        return "ended by the other side"
    finally:
        await give_up(hearing, watching, beating)
