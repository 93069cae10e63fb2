"""An event loop in a thread of its own, so that algorithms stay synchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Answer = TypeVar("Answer")
_OFF_LOOP = 1 << 18  # bytes from which looking at a message would hold up all others


class EventLoopThread:
    """Runs coroutines for synchronous code until ``close``; also a context manager."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="peerlora network", daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, Answer]) -> Answer:
        """What the coroutine returns, or raises."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def ask(self, function: Callable[..., Answer], *arguments: Any) -> Answer:
        """What a function returns that must be called there."""

        async def asked() -> Answer:
            return function(*arguments)

        return self.call(asked())

    def close(self) -> None:
        """End all that still runs there, and the thread."""
        if self._thread.is_alive():
            self.call(_end_all())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()

    def __enter__(self) -> EventLoopThread:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


async def _end_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()


async def run_off_loop(size: int, work: Callable[..., Answer], *arguments: Any) -> Answer:
    """What ``work`` returns on a message of ``size`` bytes; for a large one it leaves the event loop to others."""
    return await asyncio.to_thread(work, *arguments) if size >= _OFF_LOOP else work(*arguments)
