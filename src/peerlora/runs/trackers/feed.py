"""What one tracker is still to log, and the thread that hands it over."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from peerlora.errors import first_line
from peerlora.runs.events import Evaluated, RoundDone, RunStarted
from peerlora.runs.trackers.base import Ending, TrackedRun, Tracker
from peerlora.runs.trackers.series import series

WAITING = 10_000
"""Points that wait for one tracker; the oldest are dropped beyond."""
TRIES = 3
"""Times that a point fails before later ones are tried in its place."""
PROBED = 10
"""Later points that are tried then; where the tracker takes one of them, those before it are dropped."""
_AGAIN = 10.0  # seconds between two tries of a tracker that failed


@dataclass(eq=False)
class Call:
    """One call of the tracker."""

    make: Callable[[], None]
    point: bool = False
    """Whether the others mean something without it."""


class TrackerFeed:
    """Calls one tracker, in order, on a thread of its own.

    A call that fails is made again, so that a tracker that is away for a while lacks nothing.  A point that fails while
    the tracker takes a later one is dropped: it would never be taken, and would keep all others waiting.
    """

    def __init__(self, name: str, tracker: Tracker, again: float = _AGAIN):
        self.name, self.tracker, self.again = name, tracker, again
        self._calls: deque[Call] = deque()
        self._under_way = 1  # so many first calls are being made
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ended = False
        self._dropped = 0
        self._failures = 0  # of the first call
        self._failure = ""
        self.refusal = ""
        """Why the tracker does not take a point while it takes others, if so."""
        self._reported: set[str] = set()

    def begin(self, run: TrackedRun, start: RunStarted | None) -> None:
        """Open the run in the tracker, on a new thread."""
        self.start = start
        self._calls.append(Call(lambda: self.tracker.begin(run)))
        self._thread = threading.Thread(target=self._work, name=f"track-{self.name}", daemon=True)
        self._thread.start()

    def put(self, event: RoundDone | Evaluated) -> None:
        """Let one event be logged."""
        with self._changed:
            if len(self._calls) > max(WAITING, self._under_way):
                del self._calls[self._under_way]
                self._dropped += 1
            self._calls.append(Call(lambda: self.tracker.log(*series(event, self.start)), point=True))
            self._changed.notify()

    def end(self, ending: Ending, summary: Mapping[str, Any], adapters: Path | None) -> None:
        """Let the tracker finish after all that waits."""
        with self._changed:
            self._calls.append(Call(lambda: self.tracker.finish(ending, summary, adapters)))
            self._ended = True
            self._changed.notify()

    def news(self) -> str:
        """Return what is wrong with the tracker, where that has not been told yet, else an empty string."""
        if self.refusal and "refusal" not in self._reported:
            self._reported |= {"refusal", "failure"}
            return f"{self.name} takes others but not some of this run's points ({self.refusal}); it goes on without"
        if self._failure and "failure" not in self._reported:
            self._reported.add("failure")
            return (
                f"{self.name} does not take this run's numbers ({self._failure}); the run goes on, and tries it again"
            )
        return ""

    def join(self, seconds: float) -> str:
        """Wait so long at most for the thread; return what is missing in the tracker, or an empty string."""
        if self._thread is None:
            return ""
        self._thread.join(seconds)
        missing = len(self._calls) + self._dropped
        if not missing:
            return ""
        reason = self._failure or f"not done after {seconds:.0f} s"
        return f"{self.name} lacks {missing} of this run's points ({reason}); the run folder has them all"

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._ended)
                if not self._calls:
                    return
                calls, last = self._next(), self._ended
                self._under_way = len(calls)
            taken = next((call for call in calls if self._make(call)), None)
            late = [call for call in calls[: calls.index(taken)] if self._make(call)] if taken else []
            with self._changed:
                self._under_way = 1
                if taken is not None:
                    self._go_on(taken, late)
                elif last:
                    return
                else:
                    self._failures += 1
                    self._changed.wait_for(lambda: self._ended, self.again)

    def _next(self) -> list[Call]:
        """The first call; of a point that failed several times, or at the end, also those that may be taken instead."""
        first = self._calls[0]
        if not first.point or (self._failures < TRIES and not self._ended):
            return [first]
        points = [call for call in islice(self._calls, PROBED + 1) if call.point]
        return [*points, *([self._calls[-1]] if self._ended else [])]

    def _make(self, call: Call) -> bool:
        """Make a call; whether the tracker takes it."""
        try:
            call.make()
        except Exception as error:  # of any library, of any kind: none may cost a run
            self._failure = first_line(error)
            return False
        return True

    def _go_on(self, taken: Call, late: list[Call]) -> None:
        """Go on behind a call that was taken; of those before it, all but those that were taken after it are lost."""
        lost = 0
        while (call := self._calls.popleft()) is not taken:
            lost += call not in late
        self._failures = 0
        if lost:
            self.refusal = self._failure
            self._dropped += lost
