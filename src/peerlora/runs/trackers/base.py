"""Contract of a tracker, and what it is told of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Ending = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class TrackedRun:
    """One run, as a tracker knows it."""

    id: str
    """The same when the run is resumed; 16 hexadecimal digits."""
    name: str
    folder: Path
    project: str
    group: str | None
    config: Mapping[str, Any]
    """As plain JSON."""
    tags: Mapping[str, str]
    resumed: int | None = None
    """Finished rounds from which the run goes on; None: it begins."""


class Tracker(Protocol):
    """One run in one tool; called by one thread, which is not the one that trains.

    Any call may raise; then it is made again later, from the first call that failed.
    """

    def begin(self, run: TrackedRun) -> None:
        """Open the run in the tool, or the one with the same id again."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log one point of several series; ``step``: finished rounds."""
        ...

    def finish(self, ending: Ending, summary: Mapping[str, Any], adapters: Path | None) -> None:
        """Log the summary and upload a folder of adapters, where there are any, and close the run."""
        ...
