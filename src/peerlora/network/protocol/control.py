"""Beside the exchanges: greetings that compare settings, signs of life, the state that a returning peer takes over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from torch import Tensor

from peerlora.network.base import DeadlineMissed, PeerDown, PeerId, Refused
from peerlora.network.protocol.round_protocol import RoundProtocol, Service
from peerlora.network.protocol.wire import Header, encode_body, encode_header, with_checksum

_KNOCK = 0.5  # seconds between two signs of life to a neighbour that is not waited for
_RETRY = 0.2  # seconds between two greetings to a neighbour that is not there yet
_USUAL = ("late", "replay", "from-the-future", "no-replica")  # refusals that are part of an exchange
_SETTING = "setting "  # before the name of a section whose hash a greeting carries


@dataclass(frozen=True)
class StateReply:
    """A neighbour's state as it came, still unchecked."""

    peer: PeerId
    header: Header
    body: bytearray


@dataclass
class HandshakeResult:
    """What greeting the neighbours came to."""

    reached: set[PeerId] = field(default_factory=set)
    refused: dict[PeerId, str] = field(default_factory=dict)


class PeerControl(Service):
    """The neighbours of one peer.

    ``settings``: by section of the config the hash of what all peers must have in common.  ``snapshot`` gives the
    state that a neighbour may ask for; ``largest_state``: bytes that one may have.
    """

    def __init__(
        self,
        protocol: RoundProtocol,
        peers: Collection[PeerId],
        settings: Mapping[str, str],
        snapshot: Callable[[], Mapping[str, Tensor] | None] = lambda: None,
        largest_state: int = 0,
    ):
        self.protocol, self.peers, self.settings = protocol, tuple(peers), settings
        self.snapshot, self.largest_state = snapshot, largest_state
        self._answered: dict[PeerId, asyncio.Event] = {peer: asyncio.Event() for peer in peers}
        self._refused: dict[PeerId, str] = {}
        self._pulling: dict[PeerId, asyncio.Future[StateReply]] = {}
        self._tasks: dict[tuple[str, PeerId], asyncio.Task[None]] = {}
        self.skew: dict[PeerId, float] = {}
        """Seconds that a neighbour's clock was ahead of this one when it greeted, less the way."""
        self._background: set[asyncio.Task[None]] = set()
        protocol.service, protocol.neighbours = self, frozenset(peers)

    async def start(self) -> None:
        """Open the transport and watch the neighbours."""
        await self.protocol.transport.start(self.protocol)
        for forever in (self._watch, self._knock):
            self._background.add(asyncio.create_task(forever()))

    async def close(self) -> None:
        """Stop watching and close the transport."""
        tasks = [*self._background, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.protocol.transport.close()

    async def greet(self, seconds: float) -> HandshakeResult:
        """Greet all neighbours, until each has greeted back or refused, or the time is over.

        Who has greeted and is gone again is not waited for: a run may be over before a slower neighbour has begun it.
        """
        greeted = HandshakeResult()

        async def one(peer: PeerId) -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while True:
                        try:
                            await self._hello(peer, answer=True, deadline=seconds)
                            await self._answered[peer].wait()
                            greeted.reached.add(peer)
                            return
                        except Refused as refusal:
                            self.disagrees(peer, refusal)
                        except (PeerDown, DeadlineMissed):
                            if self._answered[peer].is_set():
                                greeted.reached.add(peer)
                                return
                        if peer in self._refused and "wrong-run" not in self._refused[peer]:  # it may end that one soon
                            return
                        await asyncio.sleep(_RETRY)

        await asyncio.gather(*(one(peer) for peer in self.peers))
        greeted.refused = {peer: why for peer, why in self._refused.items() if peer not in greeted.reached}
        self.protocol.absent |= set(self.peers) - greeted.reached
        return greeted

    async def pull(self, peer: PeerId, seconds: float) -> StateReply | None:
        """A neighbour's newest state; None where it did not come in time."""
        self._pulling[peer] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(seconds):
                await self._send("ask", peer, b"", seconds)
                return await self._pulling[peer]
        except (TimeoutError, Refused, PeerDown, DeadlineMissed):
            return None
        finally:
            self._pulling.pop(peer, None)

    # --- what the rendezvous calls

    def largest(self, peer: PeerId, header: Header) -> int:
        """Only a state that was asked for has a body."""
        if header.kind == "state" and peer in self._pulling:
            return self.largest_state
        if header.kind in ("hello", "ask"):
            return 0
        raise Refused("unexpected", header.kind)

    def disagrees(self, peer: PeerId, refusal: Refused) -> None:
        """Remember it, whichever side said so first; with one that has other settings nothing is exchanged."""
        self._refused[peer] = str(refusal)
        if refusal.reason == "wrong-config":
            self.protocol.disagreeing[peer] = refusal.detail

    async def take(self, peer: PeerId, header: Header, body: bytearray) -> None:
        """A greeting, a question for the state, or the answer to one."""
        if header.kind == "hello":
            self._compare(header)
            self._refused.pop(peer, None)
            self.protocol.disagreeing.pop(peer, None)
            clock = header.facts.get("clock")
            if isinstance(clock, int):
                self.skew[peer] = clock / 1000 - time.time()
            self._answered[peer].set()
            if header.facts.get("answer"):
                self._task("greet", peer, self._greet_again)
        elif header.kind == "ask":
            self._task("state", peer, self._state)
        elif header.kind == "state" and peer in self._pulling and not self._pulling[peer].done():
            self._pulling[peer].set_result(StateReply(peer, header, body))
        else:
            raise Refused("unexpected", header.kind)

    def _compare(self, header: Header) -> None:
        """Refuse a peer that runs with other settings, by the names of the sections."""
        theirs = {
            name.removeprefix(_SETTING): value for name, value in header.facts.items() if name.startswith(_SETTING)
        }
        other = sorted(name for name in theirs | dict(self.settings) if theirs.get(name) != self.settings.get(name))
        if other:
            refusal = Refused("wrong-config", f"other {', '.join(other)}")
            self.disagrees(header.sender, refusal)
            raise refusal

    # --- what goes out

    async def _hello(self, peer: PeerId, answer: bool, deadline: float) -> None:
        facts = {f"{_SETTING}{name}": value for name, value in self.settings.items()}
        await self._send("hello", peer, b"", deadline, answer=int(answer), clock=int(time.time() * 1000), **facts)

    async def _state(self, peer: PeerId) -> None:
        snapshot = self.snapshot()
        if snapshot is not None:
            body = await asyncio.to_thread(encode_body, snapshot)
            await self._send("state", peer, body, self.protocol.deadline)

    async def _send(self, kind: str, peer: PeerId, body: bytes, deadline: float, **facts: int | str) -> None:
        header = with_checksum(self.protocol.header(kind, **facts, **self.protocol.last(peer)), body)
        await self.protocol.transport.send(peer, encode_header(header), body, deadline=deadline)

    # --- what goes on in the background

    async def _watch(self) -> None:
        """Take the transport's word on who is there; what it repeats, such as failing to dial, is told once."""
        told: dict[PeerId, str] = {}
        async for event in self.protocol.transport.events():
            if event.peer in self._answered:
                refused = event.kind == "refused"
                if not (event.detail.startswith(_USUAL) if refused else told.get(event.peer) == event.kind):
                    self.protocol.notice(event.kind, event.peer, event.detail)
                if not refused:
                    told[event.peer] = event.kind
                if event.kind in ("suspect", "down"):
                    self.protocol.leave(event.peer)
                elif event.kind == "up":
                    self._task("greet", event.peer, self._greet_again)

    async def _knock(self) -> None:
        """Give those who are not waited for a chance to be heard: who takes a greeting is there."""
        while True:
            await asyncio.sleep(_KNOCK)
            for peer in sorted(self.protocol.absent):
                self._task("greet", peer, self._greet_again)

    async def _greet_again(self, peer: PeerId) -> None:
        try:
            await self._hello(peer, False, self.protocol.deadline)
        except Refused as refusal:
            if refusal.reason == "wrong-config":
                self.disagrees(peer, refusal)
            raise
        self.protocol.back(peer)

    def _task(self, kind: str, peer: PeerId, send: Callable[[PeerId], Awaitable[None]]) -> None:
        """Send in the background; of one kind to one peer only one at a time.  Failures are told by the transport."""

        async def quietly() -> None:
            with suppress(Refused, PeerDown, DeadlineMissed):
                await send(peer)

        if (kind, peer) not in self._tasks:
            task = self._tasks[kind, peer] = asyncio.create_task(quietly())
            task.add_done_callback(lambda _: self._tasks.pop((kind, peer), None))
