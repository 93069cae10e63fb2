"""Message exchange of one peer in one round, on one event loop; the vectors' meaning is the caller's.

A link is used in an exchange by the end that got the other's message and whose own message the other acknowledged;
where links go one way, by the sender with the acknowledgement, by the receiver with the message.
A message is acknowledged only while it would still be used: one that comes early waits, with the sender's call open,
until its exchange begins here; one that comes after the exchange was closed is refused as ``late``.  So both ends
agree, except where the very last acknowledgement is lost.  Then one end used a link that the other did not: every
message says whether the latest exchanges used its link, and the end with another record reports it as ``half-used``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from typing import Protocol

import msgspec

from peerlora.network.base import DeadlineMissed, PeerDown, PeerId, Refused
from peerlora.network.protocol.admission import Admission
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.event_loop import run_off_loop
from peerlora.network.protocol.link_history import ExchangeStep
from peerlora.network.protocol.pending_exchange import Decoder, ExchangeResult, OutgoingMessage, PendingExchange
from peerlora.network.protocol.wire import EXCHANGED, Header, Kind, check_length, encode_header, with_checksum

Bounds = Callable[[Kind], int]
"""Bytes of body that a message of a kind may have now."""

Provider = Callable[[PeerId], Awaitable[tuple[Header, OutgoingMessage] | None]]
"""Makes the message for a receiver, with its header, when that one is ready for it; None where it wants none."""

_GIVE_UP = 0.8  # of the deadline: then the missing message of a one-sided link is given up
_GRACE = 0.1  # of the deadline: a link stays one-sided at least so long, since its two messages come one by one
_RETRY = 0.1  # seconds before a message to a peer that went down is sent once more
_MAX_RETRY = 1.0  # seconds, at most, between two tries of a message to a peer that is behind


class Handler(Protocol):
    """Takes all messages that do not belong to an exchange."""

    def admit(self, peer: PeerId, header: Header) -> int:
        """The bytes of body that a message may have; raises Refused for one that is not expected."""
        ...

    async def take(self, peer: PeerId, header: Header, body: bytearray) -> None:
        """Take a message; raises Refused."""
        ...


class NoControl:
    """Handler that refuses every message."""

    def admit(self, peer: PeerId, header: Header) -> int:
        """See Handler."""
        raise Refused("unexpected", header.kind)

    async def take(self, peer: PeerId, header: Header, body: bytearray) -> None:
        """See Handler."""
        raise Refused("unexpected", header.kind)


class RoundProtocol:
    """One peer's exchanges over a transport; it is the transport's receiver.

    ``deadline``: seconds that an early message waits for its exchange; longer while an exchange with a later deadline
    is in progress.  ``on_control`` takes every kind of message that belongs to no exchange.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        deadline: float,
        bounds: Bounds,
        on_control: Handler | None = None,
        admission: Admission | None = None,
    ):
        self.endpoint, self.deadline, self.bounds = endpoint, deadline, bounds
        self.on_control, self.admission = on_control or NoControl(), admission or Admission(endpoint)
        self._open: PendingExchange | None = None

    # --- the transport's receiver

    def admit(self, peer: PeerId, header: bytes) -> int:
        """The bytes of body that a message may have; raises Refused for one that could not be used."""
        found = self.admission.read(peer, header)
        exchanged = found.kind in EXCHANGED
        most = self.bounds(found.kind) if exchanged else self.on_control.admit(peer, found)
        check_length(found, most)
        if exchanged:
            self._note(peer, found)  # even if late or early: so a peer that is behind learns where the others are
            self.admission.check_timely(peer, ExchangeStep(found.round, found.step))
        return most

    async def deliver(self, peer: PeerId, header: bytes, body: bytearray) -> None:
        """Take a message, once it can be used."""
        found = self.admission.read(peer, header)
        if found.kind in EXCHANGED:
            await self._take(peer, found, body)
        else:
            await self.on_control.take(peer, found, body)
            self._note(peer, found)

    def _note(self, peer: PeerId, header: Header) -> None:
        self.admission.note(peer, header)
        if self._open is not None and self._open.one_way:
            self.endpoint.changed.notify()

    async def _take(self, peer: PeerId, header: Header, body: bytearray) -> None:
        step = ExchangeStep(header.round, header.step)
        pending = await self._begun(peer, step)
        if peer not in pending.senders:
            raise Refused("not-a-neighbour", f"in round {step.round}")
        if header.kind != pending.kind:
            raise Refused("unexpected", f"{header.kind} in an exchange of {pending.kind}")
        values = await run_off_loop(len(body), pending.decode, header, body)
        self.admission.check_timely(peer, step)
        if peer in pending.received:
            raise Refused("replay", f"round {step.round}, exchange {step.number}")
        pending.received[peer] = values
        self.endpoint.changed.notify()

    async def _begun(self, peer: PeerId, step: ExchangeStep) -> PendingExchange:
        """Wait until the exchange ``step`` has begun; the transport lets one message per peer wait."""
        came, patience = asyncio.get_running_loop().time(), self.deadline
        with suppress(TimeoutError):
            while step != self.endpoint.at or self._open is None:
                self.admission.check_timely(peer, step)
                patience = max(patience, self._open.deadline if self._open else 0)
                async with asyncio.timeout_at(came + patience):
                    await self.endpoint.changed.wait()
            return self._open
        raise Refused("late", f"it waited for {patience:g} s")

    # --- one exchange

    async def exchange(
        self,
        receivers: Collection[PeerId],
        message: OutgoingMessage | bytes | Mapping[PeerId, OutgoingMessage] | Provider,
        decode: Decoder,
        deadline: float,
        senders: Collection[PeerId] | None = None,
        kind: Kind = "mix",
        all_or_none: bool = False,
    ) -> ExchangeResult:
        """Send to all neighbours and take their messages, until all have answered or ``deadline`` seconds are over.

        ``message``: one for all receivers, or one for each, or what provides one when its receiver is ready for it.
        With ``senders`` links go one way: their messages are taken, the own ones go to ``receivers``; with
        ``all_or_none`` those messages are used together or not at all.  Only a ``mix`` says who is there: what fails in
        another exchange costs its message, and no later one.
        """
        provide = message if callable(message) else await self._prepared(_addressed(message, receivers), kind)
        one_way, senders = senders is not None, receivers if senders is None else senders
        step, peers = self.endpoint.at, self.endpoint.peers
        pending = PendingExchange(receivers, senders, decode, one_way, deadline, kind, all_or_none)
        if one_way:  # a cancelled send may still be delivered, and then be used by the receiver only
            pending.failed |= {peer: "absent" for peer in receivers if peer in peers.absent}
        pending.failed |= {peer: "wrong-config" for peer in pending.peers if peer in peers.mismatched}
        self._open = pending
        self.endpoint.changed.notify()
        remaining = [peer for peer in receivers if peer not in pending.failed]
        sends = [asyncio.create_task(self._send_provided(pending, peer, provide)) for peer in remaining]
        try:
            await self._wait(pending, step)
            return self._close(step, pending)
        finally:
            self._open, self.endpoint.at = None, ExchangeStep(step.round, step.number + 1)
            self.endpoint.changed.notify()
            for send in sends:
                send.cancel()
            ends = await asyncio.gather(*sends, return_exceptions=True)
            for end in ends:
                if isinstance(end, Exception):
                    raise end

    async def _prepared(self, messages: Mapping[PeerId, OutgoingMessage], kind: Kind) -> Provider:
        """Provide messages that exist already, with their headers."""
        headers = await run_off_loop(max(map(_size, messages.values()), default=0), self.headers, kind, messages)

        async def provide(peer: PeerId) -> tuple[Header, OutgoingMessage]:
            return headers[peer], messages[peer]

        return provide

    def headers(self, kind: Kind, messages: Mapping[PeerId, OutgoingMessage]) -> dict[PeerId, Header]:
        """The header of every receiver's message; a body that several get is hashed once."""
        made: dict[int, Header] = {}
        for message in messages.values():
            if id(message) not in made:
                header = msgspec.structs.replace(self.endpoint.header(kind, **message.facts), codec=message.codec)
                made[id(message)] = with_checksum(header, message.body)
        return {peer: made[id(message)] for peer, message in messages.items()}

    async def _wait(self, pending: PendingExchange, step: ExchangeStep) -> None:
        """Wait until all links are settled or the deadline has come.

        A one-sided link is given up some time before: the neighbour is in this exchange, so the missing message is
        lost.  Peers that wait for this one in their next exchange began to wait at the same time, and would lose
        patience at the same moment, and so would those that wait for them.
        """
        clock = asyncio.get_running_loop().time
        begun = clock()
        end = begun + pending.deadline
        limits: dict[PeerId, float] = {}
        while True:
            now = clock()
            for peer in pending.peers:
                if pending.one_sided(peer) and peer not in limits:
                    limit = max(begun + _GIVE_UP * pending.deadline, now + _GRACE * pending.deadline)
                    limits[peer] = min(end, limit)
            waits = [limits.get(peer, end) for peer in pending.peers if not self._settled(pending, peer, step)]
            if max(waits, default=now) <= now:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout_at(max(waits)):
                    await self.endpoint.changed.wait()

    def _settled(self, pending: PendingExchange, peer: PeerId, step: ExchangeStep) -> bool:
        return self.endpoint.peers.excluded(peer) or pending.settled(peer, self._passed(pending, peer, step))

    def _passed(self, pending: PendingExchange, peer: PeerId, step: ExchangeStep) -> bool:
        """Whether a peer that sends one way is known to have closed this exchange."""
        return pending.one_way and self.endpoint.peers.last_step.get(peer, step) > step

    async def _send_provided(self, pending: PendingExchange, peer: PeerId, provide: Provider) -> None:
        """Send a message once it is there; a receiver for whom there is none has no part in the exchange."""
        try:
            provided = await provide(peer)
        except Refused as refusal:
            pending.failed[peer] = refusal.reason
        else:
            if provided is not None:
                return await self._send(pending, peer, *provided)
            pending.failed[peer] = "not asked"
        self.endpoint.changed.notify()

    async def _send(self, pending: PendingExchange, peer: PeerId, common: Header, message: OutgoingMessage) -> None:
        """Send the message to one neighbour, again where that can help; the deadline ends this task."""
        body, outcomes = message.body, self.endpoint.last_outcomes(peer)
        header = encode_header(msgspec.structs.replace(common, facts={**common.facts, **outcomes}))
        down, pause = 0, _RETRY
        while True:
            try:
                await self.endpoint.transport.send(peer, header, body, deadline=pending.deadline)
                pending.acknowledged.add(peer)
            except Refused as refusal:
                if refusal.reason == "from-the-future":
                    pending.behind.add(peer)
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _MAX_RETRY)
                    continue
                if refusal.reason == "no-replica" and message.full_replica and peer not in pending.full_replicas:
                    common, body = await asyncio.to_thread(_full_replica, common, message.full_replica)
                    outcomes = self.endpoint.last_outcomes(peer)
                    header = encode_header(msgspec.structs.replace(common, facts=outcomes))
                    pending.full_replicas[peer] = len(body)
                    continue
                if refusal.reason == "replay":  # an earlier attempt got through
                    pending.acknowledged.add(peer)
                else:
                    pending.failed[peer] = refusal.reason
            except DeadlineMissed:
                pending.failed[peer] = "no acknowledgement"
            except PeerDown:
                down += 1
                if down == 1:
                    await asyncio.sleep(_RETRY)
                    continue
                pending.failed[peer] = "down"
            break
        self.endpoint.changed.notify()

    def _close(self, step: ExchangeStep, pending: PendingExchange) -> ExchangeResult:
        """Decide which links are used, and remember it."""
        peers, missing = self.endpoint.peers, {}
        pending.give_up()
        for peer in pending.peers:
            used = pending.used(peer)
            if not used:
                missing[peer] = pending.reason(peer, peer in peers.absent, self._passed(pending, peer, step))
                unheard = pending.silent(peer) and missing[peer] in ("no acknowledgement", "no message", "down")
                if unheard and pending.kind == "mix":
                    peers.mark_silent([peer])
            self.endpoint.history.close(peer, step, used, self.endpoint.at)
        received, delivered = pending.outcome()
        if pending.peers and pending.kind == "mix":
            peers.record_exchange(bool(received or delivered))
        return ExchangeResult(received, delivered, missing, pending.full_replicas)


def _addressed(
    message: OutgoingMessage | bytes | Mapping[PeerId, OutgoingMessage], receivers: Collection[PeerId]
) -> Mapping[PeerId, OutgoingMessage]:
    """The message for each receiver."""
    if isinstance(message, Mapping):
        assert set(message) == set(receivers), "every receiver needs a message"
        return message
    return dict.fromkeys(receivers, message if isinstance(message, OutgoingMessage) else OutgoingMessage(message))


def _size(message: OutgoingMessage) -> int:
    return len(message.body)


def _full_replica(header: Header, encode: Callable[[], bytes]) -> tuple[Header, bytes]:
    """Header and body that take the place of a difference."""
    body = encode()
    return with_checksum(msgspec.structs.replace(header, codec="identity", facts={}), body), body
