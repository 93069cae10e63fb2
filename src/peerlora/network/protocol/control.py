"""Control messages beside the exchanges: handshakes, probes of absent neighbours, state for returning peers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from torch import Tensor

from peerlora.network.base import DeadlineMissed, PeerDown, PeerId, Receiver, Refused, refused_for
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.round_protocol import Bounds
from peerlora.network.protocol.sender_sets import SenderSets
from peerlora.network.protocol.wire import Fact, Header, Kind, encode_body, encode_header, with_checksum

_PROBE = 0.5  # seconds between two probes of a neighbour that is absent
_RETRY = 0.2  # seconds between two handshakes with a neighbour that cannot be reached yet
_EXPECTED = ("late", "replay", "from-the-future", "no-replica")  # refusals that are part of an exchange
_LATE = "late, there"  # refusal of a neighbour that has gone on: in which round it is, it says when it is asked
_MAY_END = refused_for("wrong-run")  # a run that may be over soon, so it is worth to try again
_SETTING = "setting "  # prefix of the facts of a ``hello`` that hold a config section's hash


@dataclass(frozen=True)
class StateReply:
    """A neighbour's state as it was received, still unchecked."""

    peer: PeerId
    header: Header
    body: bytearray


@dataclass
class HandshakeResult:
    """Result of the handshakes with all neighbours."""

    reached: set[PeerId] = field(default_factory=set)
    refused: dict[PeerId, str] = field(default_factory=dict)


class PeerControl:
    """Handler of control messages; see ``round_protocol.Handler``.

    ``settings``: by section of the config the hash of what all peers must have in common.  ``deadline``: seconds that
    a probe or a state may take to a neighbour.  ``shared_state`` gives the state that a neighbour may request, None
    for none.  ``bounds``: bytes that a requested ``state`` may have.  ``sender_sets``: those of secure sums, if any.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        settings: Mapping[str, str],
        deadline: float,
        shared_state: Callable[[], Mapping[str, Tensor] | None] = lambda: None,
        bounds: Bounds = lambda kind: 0,
        sender_sets: SenderSets | None = None,
    ):
        self.endpoint, self.settings, self.deadline = endpoint, settings, deadline
        self.shared_state, self.bounds, self.sender_sets = shared_state, bounds, sender_sets
        self._answered: dict[PeerId, asyncio.Event] = {peer: asyncio.Event() for peer in endpoint.peers.neighbours}
        self._requested: dict[PeerId, asyncio.Future[StateReply]] = {}
        self._tasks: dict[tuple[str, PeerId], asyncio.Task[None]] = {}
        self.skew: dict[PeerId, float] = {}
        """Seconds by which a neighbour's clock was ahead of this one at its handshake, not corrected for the time that
        the message took."""
        self._background: set[asyncio.Task[None]] = set()

    async def start(self, receiver: Receiver) -> None:
        """Open the transport for ``receiver`` and watch the neighbours."""
        await self.endpoint.transport.start(receiver)
        of_sums = [self.sender_sets.keep_sending] if self.sender_sets else []
        for forever in (self._watch, self._probe_absent, *of_sums):
            self._background.add(asyncio.create_task(forever()))

    async def close(self) -> None:
        """Stop watching and close the transport."""
        tasks = [*self._background, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.endpoint.transport.close()

    async def handshake(self, seconds: float) -> HandshakeResult:
        """Shake hands with all neighbours, until each has answered or refused, or the time is over.

        A neighbour that has answered and is gone again is not waited for: a run may be over before a slower neighbour
        has begun it.
        """
        result, peers = HandshakeResult(), self.endpoint.peers
        await asyncio.gather(*(self._handshake(peer, seconds, result.reached) for peer in peers.neighbours))
        result.refused = {peer: why for peer, why in peers.refused.items() if peer not in result.reached}
        peers.mark_silent(set(peers.neighbours) - result.reached)
        return result

    async def _handshake(self, peer: PeerId, seconds: float, reached: set[PeerId]) -> None:
        peers, answered = self.endpoint.peers, self._answered[peer]
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        await self._send_hello(peer, seconds, answer=1)
                        await answered.wait()
                        reached.add(peer)
                        return
                    except Refused as refusal:
                        peers.record_refusal(peer, refusal)
                    except (PeerDown, DeadlineMissed):
                        if answered.is_set():
                            reached.add(peer)
                            return
                    if not peers.refused.get(peer, _MAY_END).startswith(_MAY_END):
                        return
                    await asyncio.sleep(_RETRY)

    async def request_state(self, peer: PeerId, seconds: float) -> StateReply | None:
        """Request a neighbour's newest state; None where it did not come in time."""
        self._requested[peer] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(seconds):
                await self._send("ask", peer, b"", seconds)
                return await self._requested[peer]
        except (TimeoutError, Refused, PeerDown, DeadlineMissed):
            return None
        finally:
            self._requested.pop(peer, None)

    # --- handler of received messages

    def admit(self, peer: PeerId, header: Header) -> int:
        """See Handler; only a requested state has a body."""
        if header.kind == "state" and peer in self._requested:
            return self.bounds("state")
        if header.kind in ("hello", "ask"):
            return 0
        if header.kind == "senders" and self.sender_sets:
            return self.sender_sets.admit(peer, header)
        raise Refused("unexpected", header.kind)

    async def take(self, peer: PeerId, header: Header, body: bytearray) -> None:
        """See Handler; takes ``hello``, ``ask``, ``state`` and ``senders``."""
        if header.kind == "hello":
            self._take_hello(peer, header)
        elif header.kind == "ask":
            self._send_in_background("state", peer, self._send_state)
        elif header.kind == "state" and peer in self._requested and not self._requested[peer].done():
            self._requested[peer].set_result(StateReply(peer, header, body))
        elif header.kind == "senders" and self.sender_sets:
            self.sender_sets.take(peer, header, body)
        else:
            raise Refused("unexpected", header.kind)

    def _take_hello(self, peer: PeerId, header: Header) -> None:
        self._check_settings(header)
        if self.sender_sets:
            self.sender_sets.take_hello(peer, header)
        self.endpoint.peers.record_handshake(peer)
        clock = header.facts.get("clock")
        if isinstance(clock, int):
            self.skew[peer] = clock / 1000 - time.time()
        self._answered[peer].set()
        if header.facts.get("answer"):
            self._send_in_background("hello", peer, self._probe)

    def _check_settings(self, header: Header) -> None:
        """Refuse a peer that runs with other settings, by the names of the sections."""
        theirs = {
            name.removeprefix(_SETTING): value for name, value in header.facts.items() if name.startswith(_SETTING)
        }
        other = sorted(name for name in theirs | dict(self.settings) if theirs.get(name) != self.settings.get(name))
        if other:
            refusal = Refused("wrong-config", f"other {', '.join(other)}")
            self.endpoint.peers.record_refusal(header.sender, refusal)
            raise refusal

    # --- sending

    async def _probe(self, peer: PeerId) -> None:
        """Send a ``hello`` that asks for no answer: a neighbour that takes it is present."""
        try:
            await self._send_hello(peer, self.deadline, answer=0)
        except Refused as refusal:
            if refusal.reason == "wrong-config":
                self.endpoint.peers.record_refusal(peer, refusal)
            raise
        self.endpoint.peers.mark_present(peer)

    async def _locate(self, peer: PeerId) -> None:
        """Ask a neighbour for a ``hello`` of its own, whose header says in which round it is.

        Its next message may be long in coming, and this peer train rounds meanwhile that are over for all others.
        """
        await self._send_hello(peer, self.deadline, answer=1)

    async def _send_hello(self, peer: PeerId, deadline: float, answer: int) -> None:
        facts = {f"{_SETTING}{name}": value for name, value in self.settings.items()}
        of_sums = self.sender_sets.hello_facts if self.sender_sets else {}
        clock = int(time.time() * 1000)
        await self._send("hello", peer, b"", deadline, answer=answer, clock=clock, **facts, **of_sums)

    async def _send_state(self, peer: PeerId) -> None:
        state = self.shared_state()
        if state is not None:
            body = await asyncio.to_thread(encode_body, state)
            await self._send("state", peer, body, self.deadline)

    async def _send(self, kind: Kind, peer: PeerId, body: bytes, deadline: float, **facts: Fact) -> None:
        header = self.endpoint.header(kind, **facts, **self.endpoint.last_outcomes(peer))
        header = encode_header(with_checksum(header, body))
        await self.endpoint.transport.send(peer, header, body, deadline=deadline)

    def _send_in_background(self, kind: str, peer: PeerId, send: Callable[[PeerId], Awaitable[None]]) -> None:
        """Run ``send`` as a task, one at a time of a kind to a peer.  The transport reports failures."""

        async def suppressed() -> None:
            with suppress(Refused, PeerDown, DeadlineMissed):
                await send(peer)

        if (kind, peer) not in self._tasks:
            task = self._tasks[kind, peer] = asyncio.create_task(suppressed())
            task.add_done_callback(lambda _: self._tasks.pop((kind, peer), None))

    # --- background tasks

    async def _watch(self) -> None:
        """Follow the transport's events; one that repeats, such as a failing dial, is reported once."""
        latest: dict[PeerId, str] = {}
        async for event in self.endpoint.transport.events():
            if event.peer not in self._answered:
                continue
            refused = event.kind == "refused"
            if not (event.detail.startswith(_EXPECTED) if refused else latest.get(event.peer) == event.kind):
                self.endpoint.events.add(event.kind, event.peer, event.detail)
            if not refused:
                latest[event.peer] = event.kind
            if event.kind in ("suspect", "down"):
                self.endpoint.peers.mark_absent(event.peer)
            elif event.kind == "up":
                self._send_in_background("hello", event.peer, self._probe)
            elif event.detail.startswith(_LATE) and not self.sender_sets:  # of whose sets some are late in any round
                self._send_in_background("locate", event.peer, self._locate)

    async def _probe_absent(self) -> None:
        """Probe absent peers every ``_PROBE`` seconds."""
        while True:
            await asyncio.sleep(_PROBE)
            for peer in sorted(self.endpoint.peers.absent):
                self._send_in_background("hello", peer, self._probe)
