"""Delays, losses and failures of the links between processes in memory, as tests inject them."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from typing import Literal

from peerlora.network.base import PeerId

What = Literal["message", "ack"]


class FaultyLinks:
    """Links whose messages are late, lost, repeated or cut off, and processes that hang.

    Delays are seconds one way.  Everything random comes from ``seed``.
    """

    def __init__(self, seed: int):
        self._draw = random.Random(seed)
        self._delay: dict[tuple[PeerId, PeerId], float] = defaultdict(float)
        self._loss: dict[tuple[PeerId, PeerId, What], float] = defaultdict(float)
        self._lost: dict[tuple[PeerId, PeerId, What], int] = defaultdict(int)
        self._twice: dict[tuple[PeerId, PeerId], int] = defaultdict(int)
        self._cut: set[tuple[PeerId, PeerId]] = set()
        self._awake: dict[PeerId, asyncio.Event] = {}

    def delay(self, one: PeerId, other: PeerId, seconds: float) -> None:
        """Set the delay between two sites, each way, from now on."""
        self._delay[one, other] = self._delay[other, one] = seconds

    def loss(self, source: PeerId, target: PeerId, probability: float, what: What = "message") -> None:
        """Drop messages from ``source`` to ``target`` (or the acks that answer them) at random from now on."""
        self._loss[source, target, what] = probability

    def lose(self, source: PeerId, target: PeerId, times: int = 1, what: What = "message") -> None:
        """Drop the next ``times`` messages from ``source`` to ``target``, or the acks that answer them."""
        self._lost[source, target, what] += times

    def repeat(self, source: PeerId, target: PeerId, times: int = 1) -> None:
        """Deliver the next ``times`` messages from ``source`` to ``target`` twice."""
        self._twice[source, target] += times

    def cut(self, source: PeerId, target: PeerId, both: bool = True) -> None:
        """Deliver nothing from ``source`` to ``target`` any more; with ``both``, nor the other way."""
        self._cut |= {(source, target), (target, source)} if both else {(source, target)}

    def heal(self, one: PeerId, other: PeerId) -> None:
        """Undo ``cut``, in both directions."""
        self._cut -= {(one, other), (other, one)}

    def hang(self, site: PeerId) -> None:
        """Stop the process of ``site``, as SIGSTOP does: connections stay, nothing is read or sent."""
        self._awake.setdefault(site, asyncio.Event()).clear()

    def wake(self, site: PeerId) -> None:
        """Let a stopped process continue."""
        self._awake.pop(site, asyncio.Event()).set()

    async def carry(self, source: PeerId, target: PeerId) -> None:
        """Wait for the delay from ``source`` to ``target``; for ever where nothing arrives."""
        await self.awake(source)
        await asyncio.sleep(self._delay[source, target])
        if (source, target) in self._cut:
            await asyncio.get_running_loop().create_future()
        await self.awake(target)

    async def message(self, source: PeerId, target: PeerId, what: What) -> None:
        """``carry`` for a message of ``source`` or its ack; some are lost."""
        key = (source, target, what)
        lost = self._lost[key] > 0 or self._draw.random() < self._loss[key]
        self._lost[key] -= self._lost[key] > 0
        await (self.carry(source, target) if what == "message" else self.carry(target, source))
        if lost:
            await asyncio.get_running_loop().create_future()

    def copies(self, source: PeerId, target: PeerId) -> int:
        """How many times the next message arrives."""
        twice = self._twice[source, target] > 0
        self._twice[source, target] -= twice
        return 1 + twice

    async def awake(self, site: PeerId) -> None:
        """Wait while the process of ``site`` is stopped."""
        while site in self._awake:
            await self._awake[site].wait()
