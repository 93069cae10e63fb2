"""The time that a run takes, against ``train.max_seconds``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any


class WallClock:
    """Counts a run's seconds, those before a resumption included; not those of rounds that are run again.

    It begins when it is made.  ``now`` returns seconds; without a ``limit`` it never ends a run.
    """

    def __init__(self, limit: float | None, now: Callable[[], float] = time.monotonic):
        self.limit, self._now, self._began = limit, now, now()
        self.ended = False
        """Whether the limit has passed when it was looked at."""

    @property
    def seconds(self) -> float:
        """Since the start of the run."""
        return self._now() - self._began

    def look(self) -> bool:
        """Whether the limit has passed since it was last looked at."""
        before, self.ended = self.ended, self.ended or (self.limit is not None and self.seconds >= self.limit)
        return self.ended and not before

    def describe(self, done: int, rounds: int) -> str:
        """Say that the run ends here."""
        return f"train.max_seconds={self.limit:.15g} have passed after {done} of {rounds} rounds: the run ends here"

    def state_dict(self) -> dict[str, Any]:
        """Return facts for a checkpoint; none without a limit."""
        return {} if self.limit is None else {"seconds": self.seconds, "ended": self.ended}

    def load_state_dict(self, facts: Mapping[str, Any]) -> None:
        """Go on counting from there; a run that had ended has."""
        self._began -= facts.get("seconds", 0.0)
        self.ended = facts.get("ended", False)
