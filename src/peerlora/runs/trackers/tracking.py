"""Tracking: the sink that hands a run's events to trackers, each on a thread of its own."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from peerlora.config.run import RunConfig
from peerlora.environment import need_extra
from peerlora.errors import RunError, Stopped
from peerlora.runs.events import Evaluated, Event, Resumed, RoundDone, RunFinished, RunStarted
from peerlora.runs.json_files import read_json, write_json
from peerlora.runs.metrics import find_start
from peerlora.runs.privacy_summary import UNCOVERED
from peerlora.runs.store import TRACKING_FILE, read_events
from peerlora.runs.trackers.base import Ending, TrackedRun, Tracker
from peerlora.runs.trackers.feed import TrackerFeed

_ID = re.compile(r"[0-9a-f]{16}")
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
        self.begun = False
        self._rows = 0  # of the evaluations so far; 0: not known
        self.summary: Mapping[str, Any] | None = None

    def __enter__(self) -> Tracking:
        return self

    def __call__(self, event: Event) -> None:
        """Take one event; returns at once."""
        if isinstance(event, RunStarted | Resumed):
            if not self.begun:  # a resumed run tells how it had started after that it is resumed
                self._begin(event)
        elif isinstance(event, RoundDone) or (isinstance(event, Evaluated) and self._goes_on(event)):
            for feed in self.feeds:
                feed.put(event)
        elif isinstance(event, RunFinished):
            self.summary = event.summary
        for feed in self.feeds if self.summary is None else ():
            if message := feed.news():
                self.tell(message)

    def _goes_on(self, event: Evaluated) -> bool:
        """Whether an evaluation is one more of its series.

        The last one, on all rows, is none where the others were on a sample; its values are in the run's summary.
        """
        other = event.final and event.rows and self._rows not in (0, event.rows)
        self._rows = self._rows if other else event.rows
        return not other

    def _begin(self, event: RunStarted | Resumed) -> None:
        self.begun = True
        before = read_events(self.folder) if isinstance(event, Resumed) else []
        self.start = event if isinstance(event, RunStarted) else find_start(before)
        self._rows = next((each.rows for each in before if isinstance(each, Evaluated) and not each.final), 0)
        if self.config.privacy:
            self.tell(UNCOVERED.format(" and ".join(self.config.track.to)))
        id = self._run_id()
        run = _tracked(self.config, self.folder, id, self.start, event.round if isinstance(event, Resumed) else None)
        for feed in self.feeds:
            feed.begin(run, self.start)

    def _run_id(self) -> str:
        """The id by which trackers know the run of a folder: drawn once, it stays in ``tracking.json``.

        Where that cannot be read or written, this is told, and the run goes on with another one.
        """
        path = self.folder / TRACKING_FILE
        fresh = secrets.token_hex(8)
        try:
            if path.is_file():
                found = str(read_json(path).get("id"))
                if _ID.fullmatch(found):
                    return found
                raise RunError("no id of 16 hexadecimal digits in it")
        except (RunError, OSError) as error:
            reason = "damaged" if isinstance(error, RunError) else f"unreadable ({error.strerror})"
            self.tell(f"{path} is {reason}; trackers have the rest of this run as another one")
        try:
            write_json(path, {"id": fresh})
        except OSError as error:
            self.tell(f"{path} cannot be written ({error.strerror}); resumed, the run is another one for trackers")
        return fresh

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


def _tracked(config: RunConfig, folder: Path, id: str, start: RunStarted | None, resumed: int | None) -> TrackedRun:
    held = start.held if start else []
    site = start.names.get(str(held[0])) if start and held else None
    tags = {"method": config.algorithm.name, "topology": config.topology.kind, **({"site": site} if site else {})}
    return TrackedRun(
        id=id,
        name=site or folder.resolve().name,
        folder=folder,
        project=config.track.project,
        group=config.track.group or (config.peer.run if held else None),
        config=config.model_dump(mode="json"),
        tags=tags,
        resumed=resumed,
    )
