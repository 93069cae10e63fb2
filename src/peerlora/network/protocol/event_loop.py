"""An event loop in a thread of its own, so that algorithms stay synchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any, TypeVar

from peerlora.errors import Stopped

Answer = TypeVar("Answer")
_POLL = 0.1  # seconds between two looks whether a call shall be given up
_OFF_LOOP = 1 << 18  # bytes of a message from which decoding it would block the event loop too long


class EventLoopThread:
    """Runs coroutines for synchronous code until ``close``; also a context manager."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="peerlora network", daemon=True)
        self._thread.start()
        self._waiting = threading.local()  # several peers may share a loop, each on a thread of its own

    def call(self, coroutine: Coroutine[Any, Any, Answer]) -> Answer:
        """Run a coroutine in the thread and return its result.  Raises Stopped within ``interruptible``."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        stop: Callable[[], bool] | None = getattr(self._waiting, "stop", None)
        while stop is not None and not wait([future], _POLL).done:
            if stop():
                future.cancel()
                raise Stopped("stopped while waiting for the neighbours")
        return future.result()

    @contextmanager
    def interruptible(self, stop: Callable[[], bool]) -> Iterator[None]:
        """Within the block a call of this thread ends with Stopped soon after ``stop`` has become true."""
        self._waiting.stop = stop
        try:
            yield
        finally:
            self._waiting.stop = None

    def ask(self, function: Callable[..., Answer], *arguments: Any) -> Answer:
        """Call a function in the thread, between two steps of its coroutines, and return its result."""

        async def asked() -> Answer:
            return function(*arguments)

        return self.call(asked())

    def close(self) -> None:
        """Cancel all tasks and end the thread."""
        if self._thread.is_alive():
            self.call(_end_all())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()

    def __enter__(self) -> EventLoopThread:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class Signal:
    """Wakes all tasks that wait for a change."""

    def __init__(self):
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake every waiting task."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Wait for the next ``notify``."""
        await self._event.wait()


async def _end_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()


async def run_off_loop(size: int, work: Callable[..., Answer], *arguments: Any) -> Answer:
    """Run ``work`` on a message of ``size`` bytes, a large one in another thread, and return its result."""
    return await asyncio.to_thread(work, *arguments) if size >= _OFF_LOOP else work(*arguments)
