"""What a peer without common rounds has to send: in order for each neighbour, and without anybody waiting for it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from peerlora.network.base import DeadlineMissed, PeerDown, PeerId, Refused, Transport
from peerlora.network.protocol.push_messages import PushMessage
from peerlora.network.transport.heartbeat import give_up

_AGAIN = 0.1  # seconds before a letter to a peer that went away is tried once more


class SendStats(NamedTuple):
    """What became of letters."""

    total: int
    """Bytes of all bodies that neighbours have taken."""
    largest: int
    """Bytes of the largest of them."""
    failed: dict[PeerId, str]
    """Neighbours that a letter did not reach, and why the latest did not."""


class SendQueue:
    """Sends letters, one at a time to each neighbour; lives on one event loop.

    ``seconds``: how long a letter may be on its way.  ``most``: letters that may wait for one neighbour; beyond, the
    oldest gives way, so that a neighbour that is slow or gone holds up nobody and costs no memory.
    """

    def __init__(self, transport: Transport, seconds: float, most: int):
        self.transport, self.seconds, self.most = transport, seconds, most
        self._waiting: dict[PeerId, deque[PushMessage]] = {}
        self._sending: dict[PeerId, asyncio.Task[None]] = {}
        self._taken = SendStats(0, 0, {})

    def put(self, letters: Sequence[PushMessage]) -> None:
        """Put letters on their way."""
        for letter in letters:
            waiting = self._waiting.setdefault(letter.to, deque(maxlen=self.most))
            if len(waiting) == self.most > 1:  # with room for the newest alone, giving way is what it is for
                self._taken.failed[letter.to] = "too many letters waiting"
            waiting.append(letter)
            if letter.to not in self._sending:
                self._sending[letter.to] = asyncio.ensure_future(self._send_all(letter.to, waiting))

    async def flush(self, seconds: float) -> None:
        """Wait until nothing is on its way any more, at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._sending:
                    await asyncio.wait(list(self._sending.values()))

    def sent(self) -> SendStats:
        """What became of the letters since the last call."""
        told, self._taken = self._taken, SendStats(0, 0, {})
        return told

    async def close(self) -> None:
        """Give up what is still on its way."""
        await give_up(*self._sending.values())

    async def _send_all(self, peer: PeerId, waiting: deque[PushMessage]) -> None:
        try:
            while waiting:
                letter = waiting.popleft()
                reason = await self._send(letter)
                told = self._taken
                if reason is None:
                    size = len(letter.body)
                    self._taken = told._replace(total=told.total + size, largest=max(told.largest, size))
                else:
                    told.failed[peer] = reason
        finally:
            del self._sending[peer]

    async def _send(self, letter: PushMessage) -> str | None:
        """Why a letter was not taken; None where it was."""
        for attempt in range(2):
            try:
                await self.transport.send(letter.to, letter.header, letter.body, deadline=self.seconds)
                return None
            except Refused as refusal:
                return None if refusal.reason == "replay" else refusal.reason  # it got through before
            except DeadlineMissed:
                return "no acknowledgement"
            except PeerDown:
                await asyncio.sleep(0 if attempt else _AGAIN)
        return "down"
