"""Trackers among the sinks of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peerlora.config.run import RunConfig
from peerlora.runs.events import Warned
from peerlora.runs.store import RunStore
from peerlora.runs.trackers.tracking import Tracking
from peerlora.runtime.trainer import Sink


@contextmanager
def tracked_sinks(config: RunConfig, store: RunStore, sinks: Sequence[Sink]) -> Iterator[Sequence[Sink]]:
    """Add the trackers that a config names to the sinks of a run within the block; what they warn of is an event."""
    if not config.track.to:
        yield sinks
        return

    def tell(message: str) -> None:
        for sink in (store.emit, *sinks):
            sink(Warned(message))

    with Tracking(config, store.folder, tell) as tracking:
        yield (*sinks, tracking)
