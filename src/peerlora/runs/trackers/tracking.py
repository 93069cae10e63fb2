"""Tracking: the sink that hands a run's events to trackers, each on a thread of its own."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from peerlora.config.run import RunConfig
from peerlora.environment import need_extra
from peerlora.errors import Stopped, first_line
from peerlora.runs.events import Evaluated, Event, Resumed, RoundDone, RunFinished, RunStarted
from peerlora.runs.json_files import read_json, write_json
from peerlora.runs.metrics import find_start
from peerlora.runs.store import read_events
from peerlora.runs.trackers.base import Ending, TrackedRun, Tracker
from peerlora.runs.trackers.series import series

WAITING = 10_000
"""Points that wait for one tracker; the oldest are dropped beyond."""
_AGAIN = 10.0  # seconds between two tries of a tracker that failed
_PATIENCE = 30.0  # seconds at the end of a run for what is still to be logged


def build_tracker(name: str) -> Tracker:
    """Build one of the trackers of ``track.to``; its library is imported when the run begins in it."""
    from peerlora.runs.trackers.mlflow_run import MLflow
    from peerlora.runs.trackers.tensorboard_run import TensorBoard
    from peerlora.runs.trackers.trackio_run import Trackio
    from peerlora.runs.trackers.wandb_run import Wandb

    return {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}[name]()


def check_trackers(config: RunConfig) -> None:
    """Raise ExtraMissing where a tracker that the config names is not installed."""
    for name in config.track.to:
        need_extra(name)


class Tracking:
    """An event sink, and a context manager that closes the trackers when the run is over, however it ends.

    A tracker that fails is told of once, through ``tell``, and tried again later; the run goes on in any case, and
    waits for nothing but, at its end, ``patience`` seconds for what is still to be logged.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        tell: Callable[[str], None],
        build: Callable[[str], Tracker] = build_tracker,
        patience: float | None = None,
    ):
        self.config, self.folder, self.tell = config, folder, tell
        self.patience = _PATIENCE if patience is None else patience
        self.feeds = [TrackerFeed(name, build(name)) for name in config.track.to]
        self.start: RunStarted | None = None
        self.summary: Mapping[str, Any] | None = None

    def __enter__(self) -> Tracking:
        return self

    def __call__(self, event: Event) -> None:
        """Take one event; returns at once."""
        if isinstance(event, RunStarted | Resumed):
            self._begin(event)
        elif isinstance(event, RoundDone | Evaluated):
            for feed in self.feeds:
                feed.put(event)
        elif isinstance(event, RunFinished):
            self.summary = event.summary
        for feed in self.feeds if self.summary is None else ():
            if message := feed.news():
                self.tell(message)

    def _begin(self, event: RunStarted | Resumed) -> None:
        self.start = event if isinstance(event, RunStarted) else find_start(read_events(self.folder))
        run = _tracked(self.config, self.folder, self.start, event.round if isinstance(event, Resumed) else None)
        for feed in self.feeds:
            feed.begin(run, self.start)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        stopped = kind is not None and issubclass(kind, Stopped | KeyboardInterrupt)
        ending: Ending = "finished" if kind is None else "stopped" if stopped else "failed"
        adapters = self.folder / "adapters" if self.config.track.adapters and ending == "finished" else None
        for feed in self.feeds:
            feed.end(ending, self.summary or {}, adapters)
        deadline = time.monotonic() + self.patience
        for feed in self.feeds:
            if message := feed.join(max(0.0, deadline - time.monotonic())):
                logging.getLogger(__name__).warning("%s", message)


class TrackerFeed:
    """What one tracker is still to log, and the thread that hands it over."""

    def __init__(self, name: str, tracker: Tracker, again: float = _AGAIN):
        self.name, self.tracker, self.again = name, tracker, again
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ended = False
        self._dropped = 0
        self._failure = ""
        self._told = False

    def begin(self, run: TrackedRun, start: RunStarted | None) -> None:
        """Open the run in the tracker, on a new thread."""
        self.start = start
        self._calls.append(lambda: self.tracker.begin(run))
        self._thread = threading.Thread(target=self._work, name=f"track-{self.name}", daemon=True)
        self._thread.start()

    def put(self, event: RoundDone | Evaluated) -> None:
        """Let one event be logged."""
        with self._changed:
            if len(self._calls) > WAITING:
                del self._calls[1]  # the first one may be under way, or open the run
                self._dropped += 1
            self._calls.append(lambda: self.tracker.log(*series(event, self.start)))
            self._changed.notify()

    def end(self, ending: Ending, summary: Mapping[str, Any], adapters: Path | None) -> None:
        """Let the tracker finish after all that waits."""
        with self._changed:
            self._calls.append(lambda: self.tracker.finish(ending, summary, adapters))
            self._ended = True
            self._changed.notify()

    def news(self) -> str:
        """Return why the tracker fails, where that has not been told yet, else an empty string."""
        if self._told or not self._failure:
            return ""
        self._told = True
        return f"{self.name} does not take this run's numbers ({self._failure}); the run goes on, and tries it again"

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
                call, last = self._calls[0], self._ended
            try:
                call()
            except Exception as error:  # of any library, of any kind: none may cost a run
                self._failure = first_line(error)
                if last:
                    return
                with self._changed:
                    self._changed.wait_for(lambda: self._ended, self.again)
            else:
                with self._changed:
                    self._calls.popleft()


def _tracked(config: RunConfig, folder: Path, start: RunStarted | None, resumed: int | None) -> TrackedRun:
    held = start.held if start else []
    site = start.names.get(str(held[0])) if start and held else None
    tags = {"method": config.algorithm.name, "topology": config.topology.kind, **({"site": site} if site else {})}
    return TrackedRun(
        id=_run_id(folder),
        name=site or folder.resolve().name,
        folder=folder,
        project=config.track.project,
        group=config.track.group or (config.peer.run if held else None),
        config=config.model_dump(mode="json"),
        tags=tags,
        resumed=resumed,
    )


def _run_id(folder: Path) -> str:
    """The id by which trackers know the run of a folder: drawn once, it stays in ``tracking.json``."""
    path = folder / "tracking.json"
    if not path.is_file():
        write_json(path, {"id": secrets.token_hex(8)})
    return str(read_json(path)["id"])
