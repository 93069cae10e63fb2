"""Failure detection by heartbeats: timing of a transport, and the rule for SUSPECT and DOWN."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from peerlora.network.base import PeerDown

Health = Literal["alive", "suspect", "down"]
Got = TypeVar("Got")


@dataclass(frozen=True)
class Timing:
    """Timing of a transport, in seconds."""

    beat: float = 2.0
    """Between two heartbeats."""
    suspect: int = 3
    """Heartbeats missed until an edge is SUSPECT."""
    down: int = 5
    """Heartbeats missed until it is DOWN."""
    backoff: tuple[float, float] = (0.2, 0.5)
    """The first and the longest wait before dialling again; short, so that a peer that returns is found at once."""
    refused: float = 5.0
    """Wait before dialling again after a refusal: only a new member list helps."""
    handshake: float = 5.0
    """Limit for opening a session."""

    def next_wait(self, before: float | None) -> float:
        """The wait after an unsuccessful one of ``before`` seconds; None for the first."""
        return self.backoff[0] if before is None else min(2 * before, self.backoff[1])


class Heartbeat:
    """Heartbeats received in one session."""

    def __init__(self, timing: Timing, now: float):
        self.timing, self.heard_at, self.looked_at = timing, now, now

    def heard(self, now: float) -> None:
        """Note a sign of life of the other side."""
        self.heard_at = now

    def health(self, now: float) -> Health:
        """SUSPECT after ``suspect`` missed beats, DOWN after ``down``.

        Time in which this process itself was stopped, or its event loop blocked, is left out: heartbeats that came
        meanwhile have not been read yet.
        """
        if now - self.looked_at > 2 * self.timing.beat:
            self.heard_at = now
        self.looked_at = now
        missed = (now - self.heard_at) / self.timing.beat
        return "down" if missed >= self.timing.down else "suspect" if missed >= self.timing.suspect else "alive"


class Session:
    """Session of an edge, from its opening to its first failure; reconnecting opens another one."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def open(self) -> bool:
        """Whether messages can be sent."""
        return not self.ended.done()

    def end(self, why: str) -> None:
        """End the session; everything that waits on it raises PeerDown.  The first reason is kept."""
        if not self.ended.done():
            self.ended.set_result(why)

    async def during(self, work: Awaitable[Got]) -> Got:
        """Await ``work``; cancel it and raise PeerDown when the session ends first."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self.ended}, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not task.cancelled():
                return task.result()
            raise PeerDown(self.ended.result() if self.ended.done() else "the call was broken off")
        finally:
            await give_up(task)


async def give_up(*tasks: asyncio.Future) -> None:
    """Cancel tasks and wait until they have ended; their exceptions are dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def watch(
    heartbeat: Heartbeat, on_change: Callable[[Health], None], awake: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Check the health twice a beat and report each change; return when it is DOWN.

    ``awake`` returns when this process is not stopped; for simulated processes.
    """
    loop, last = asyncio.get_running_loop(), "alive"
    while last != "down":
        await asyncio.sleep(heartbeat.timing.beat / 2)
        if awake is not None:
            await awake()
        health = heartbeat.health(loop.time())
        if health != last:
            on_change(health)
        last = health
