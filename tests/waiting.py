"""Waiting of tests for what other threads and processes do."""

import time
from collections.abc import Callable

MINUTES = 10  # after which something hangs, however busy a machine is; a thread that waits ends, too


def until(reached: Callable[[], object], going: Callable[[], object] = lambda: True, every: float = 0.02) -> None:
    """Return once ``reached()``; fail where that cannot come any more, since ``going()`` has become false."""
    end = time.monotonic() + MINUTES * 60
    while not reached():
        assert going() or reached(), "what is waited for has ended without"
        assert time.monotonic() < end, f"not reached within {MINUTES} minutes"
        time.sleep(every)
