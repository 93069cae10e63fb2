"""Virtual clock for asyncio: waiting costs no time, and the same program always runs in the same order.

``virtual_run(main())`` is ``asyncio.run`` on a loop whose clock jumps to the next timer whenever no task is ready.
Work for other threads runs at once in this one, since a jumping clock cannot wait for them.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Got = TypeVar("Got")


class _Jump(selectors.DefaultSelector):
    """Selector that never waits: it advances the clock by the timeout instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list:
        """The ready files; where there are none, the clock advances by the timeout."""
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise RuntimeError("virtual clock: everything waits for something that can never happen")
        self.now += max(timeout, 0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Event loop on a virtual clock, which starts at 0 seconds."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        """Virtual seconds."""
        return self._jump.now

    def run_in_executor(self, executor: Any, func: Callable[..., Got], *args: Any) -> asyncio.Future[Got]:  # type: ignore[override]
        """The result of ``func``, computed at once in this thread."""
        done: asyncio.Future[Got] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


def virtual_run(main: Coroutine[Any, Any, Got]) -> Got:
    """Run a coroutine to its end on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
