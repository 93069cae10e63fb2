"""How alive an edge is: settings of time, and the one rule that turns missed heartbeats into SUSPECT and DOWN."""

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
    """Times of a transport, in seconds."""

    beat: float = 2.0
    """Between two heartbeats."""
    suspect: int = 3
    """Heartbeats missed until an edge is SUSPECT."""
    down: int = 5
    """Heartbeats missed until it is DOWN."""
    backoff: tuple[float, float] = (0.2, 0.5)
    """The first and the longest wait before dialling again: who comes back is heard within a second."""
    refused: float = 5.0
    """Wait before dialling again whoever refused us: only a new member list helps."""
    handshake: float = 5.0
    """The longest time that opening a session may take."""

    def next_wait(self, before: float | None) -> float:
        """The wait after one of ``before`` seconds, which did not help; None for the first."""
        return self.backoff[0] if before is None else min(2 * before, self.backoff[1])


class Heartbeat:
    """The heartbeats of one session."""

    def __init__(self, timing: Timing, now: float):
        self.timing, self.heard_at, self.looked_at = timing, now, now

    def heard(self, now: float) -> None:
        """Something came from the other side."""
        self.heard_at = now

    def health(self, now: float) -> Health:
        """SUSPECT after ``suspect`` beats without a sign, DOWN after ``down``.

        Where this process itself stood still since the last look (stopped, or a blocked event loop), the time does not
        count: what came meanwhile has not been read yet.
        """
        if now - self.looked_at > 2 * self.timing.beat:
            self.heard_at = now
        self.looked_at = now
        missed = (now - self.heard_at) / self.timing.beat
        return "down" if missed >= self.timing.down else "suspect" if missed >= self.timing.suspect else "alive"


class Session:
    """One contact of an edge, from its opening to its first failure; the next contact is another session."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def open(self) -> bool:
        """Whether messages may go."""
        return not self.ended.done()

    def end(self, why: str) -> None:
        """Close it; everything that waits on it raises PeerDown.  The first reason counts."""
        if not self.ended.done():
            self.ended.set_result(why)

    async def during(self, work: Awaitable[Got]) -> Got:
        """The result of ``work``, which is given up, with PeerDown, when the session ends first."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self.ended}, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not task.cancelled():
                return task.result()
            raise PeerDown(self.ended.result() if self.ended.done() else "the call was broken off")
        finally:
            await give_up(task)


async def give_up(*tasks: asyncio.Future) -> None:
    """Cancel tasks and wait until they are gone; what they raise meanwhile does not matter any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def watch(
    pulse: Heartbeat, tell: Callable[[Health], None], awake: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Look at a pulse twice a beat, telling each change; returns when it is DOWN.

    ``awake``: returns when this process is not stopped, for processes that are only played.
    """
    loop, last = asyncio.get_running_loop(), "alive"
    while last != "down":
        await asyncio.sleep(pulse.timing.beat / 2)
        if awake is not None:
            await awake()
        health = pulse.health(loop.time())
        if health != last:
            tell(health)
        last = health
