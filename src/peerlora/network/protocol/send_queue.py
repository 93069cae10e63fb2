"""Send queue of a peer without common rounds: messages leave in order for each neighbour, and nobody waits for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from peerlora.network.base import DeadlineMissed, PeerDown, PeerId, Refused, Transport
from peerlora.network.protocol.push_messages import PushMessage
from peerlora.network.transport.heartbeat import give_up

_RETRY = 0.1  # seconds before a message to a peer that went down is sent once more


class SendStats(NamedTuple):
    """Messages sent since the last call of ``sent``."""

    total: int
    """Bytes of all bodies that neighbours have taken."""
    largest: int
    """Bytes of the largest of them."""
    failed: dict[PeerId, str]
    """Neighbours that a message did not reach, and why the latest did not."""


class SendQueue:
    """Sends messages, one at a time to each neighbour; lives on one event loop.

    ``seconds``: deadline of one message.  ``most``: messages that may wait for one neighbour; beyond, the oldest is
    dropped, so that a neighbour that is slow or gone delays nobody and costs no memory.
    """

    def __init__(self, transport: Transport, seconds: float, most: int):
        self.transport, self.seconds, self.most = transport, seconds, most
        self._waiting: dict[PeerId, deque[PushMessage]] = {}
        self._sending: dict[PeerId, asyncio.Task[None]] = {}
        self._stats = SendStats(0, 0, {})

    def put(self, messages: Sequence[PushMessage]) -> None:
        """Queue messages for sending."""
        for message in messages:
            waiting = self._waiting.setdefault(message.to, deque(maxlen=self.most))
            if len(waiting) == self.most > 1:  # in a queue of length one, replacing the old message is intended
                self._stats.failed[message.to] = "too many messages waiting"
            waiting.append(message)
            if message.to not in self._sending:
                self._sending[message.to] = asyncio.ensure_future(self._send_all(message.to, waiting))

    async def flush(self, seconds: float) -> None:
        """Wait until the queue is empty, at most ``seconds``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._sending:
                    await asyncio.wait(list(self._sending.values()))

    def sent(self) -> SendStats:
        """The messages sent since the last call."""
        stats, self._stats = self._stats, SendStats(0, 0, {})
        return stats

    async def close(self) -> None:
        """Drop everything that is not sent yet."""
        await give_up(*self._sending.values())

    async def _send_all(self, peer: PeerId, waiting: deque[PushMessage]) -> None:
        try:
            while waiting:
                message = waiting.popleft()
                reason = await self._send(message)
                stats = self._stats
                if reason is None:
                    size = len(message.body)
                    self._stats = stats._replace(total=stats.total + size, largest=max(stats.largest, size))
                else:
                    stats.failed[peer] = reason
        finally:
            del self._sending[peer]

    async def _send(self, message: PushMessage) -> str | None:
        """Send one message; why it was not taken, None where it was."""
        for attempt in range(2):
            try:
                await self.transport.send(message.to, message.header, message.body, deadline=self.seconds)
                return None
            except Refused as refusal:
                return None if refusal.reason == "replay" else refusal.reason  # replay: an earlier attempt got through
            except DeadlineMissed:
                return "no acknowledgement"
            except PeerDown:
                await asyncio.sleep(0 if attempt else _RETRY)
        return "down"
