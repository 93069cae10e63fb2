"""What a page can show: a run, the peers that were launched together, or the runs of a comparison or a demo."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peerlora.errors import PeerloraError, RunError, first_line
from peerlora.runs.live.follow import EventTail
from peerlora.runs.live.process import holder_of, usage_of
from peerlora.runs.live.state import MOST_CLIENTS, LiveRun

_LOOK = 0.2  # seconds between two looks for a folder
_IDLE = 30.0  # seconds after its last event that a run without a lock to look at counts as running


class RunSource:
    """The run of one folder, or the peers' runs below it as one federation."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tails: dict[Path, EventTail] = {}
        self.live = LiveRun()
        self.lock = threading.Lock()
        """Held while the state changes."""
        self.version = 0
        """Grows when the state was built anew."""
        self.trouble = ""
        """Why the latest look at the folder failed, if it did."""

    def poll(self) -> bool:
        """Read what is new; whether there was anything."""
        found = {run: self.tails.setdefault(run, EventTail(run)).poll() for run in runs_of(self.folder)}
        if any(anew for anew, _ in found.values()):
            self.live, self.tails, self.version = LiveRun(), {}, self.version + 1
            return self.poll()
        with self.lock:
            for run, (_, events) in found.items():
                held = held_of(run) if events else []
                for event in events:
                    self.live.add(event, held)
        return any(events for _, events in found.values())

    def standing(self) -> dict[str, Any]:
        """Whether the run is running, stopped or finished, and what its processes use."""
        runs = runs_of(self.folder)
        used = [usage for run in runs if (pid := holder_of(run)) and (usage := usage_of(pid))]
        return {
            "state": standing_of(runs),
            "trouble": self.trouble,
            "processes": len(used),
            "memory": sum(each.memory for each in used),
            "cpu": sum(each.cpu_seconds for each in used),
        }


class GridSource:
    """The trials of a comparison, or the runs right below a folder, as those of a demo.

    ``planned``: the folders of all trials, those that have not begun included; ``lacking``: why they are not known.
    """

    def __init__(self, folder: Path, planned: Sequence[str] = (), lacking: str = ""):
        self.folder, self.lacking = folder, lacking
        self.pattern = "*/*/run.json" if is_comparison(folder) else "*/run.json"
        self.planned = list(planned)
        self.cells: dict[str, dict[str, Any]] = {}
        self.trouble = ""
        """Why the latest look at the folder failed, if it did."""
        self._stamps: dict[str, Any] = {}
        self._sources: dict[str, RunSource] = {}

    def poll(self) -> bool:
        """Read what is new; whether there was anything.

        Raises the first error of a trial's folder, after all others were read.
        """
        names = [*self.planned]
        there = [run.parent for run in self.folder.glob(self.pattern)]
        names += sorted(run.relative_to(self.folder).as_posix() for run in there)
        before = {name: dict(cell) for name, cell in self.cells.items()}
        failures = []
        for name in dict.fromkeys(names):
            try:
                self._read(name)
            except OSError as error:
                self._stamps.pop(name, None)
                failures.append(error)
        if failures:
            raise failures[0]
        return before != self.cells

    def _read(self, name: str) -> None:
        run = self.folder / name
        log = run / "events.jsonl"
        stamp = (log.stat().st_size if log.is_file() else -1, (run / "summary.json").is_file(), holder_of(run))
        if self._stamps.get(name) == stamp:
            return
        self._stamps[name] = stamp
        source = self._sources.setdefault(name, RunSource(run))
        while source.poll():
            pass
        live, state = source.live, standing_of([run]) if stamp[0] >= 0 else "planned"
        if state != "running":
            del self._sources[name]  # a grid may have hundreds
        last = live.score.entry(max(live.score.rounds), live.meta.get("higher", True)) if live.score.rounds else {}
        self.cells[name] = {
            "name": name,
            "state": state,
            "done": max(live.rounds, default=0),
            "rounds": live.meta.get("rounds"),
            "metric": live.meta.get("metric"),
            "higher": live.meta.get("higher", True),
            "mean": last.get("mean"),
            "worst": last.get("worst"),
        }


def runs_of(folder: Path) -> list[Path]:
    """The run of a folder, or those of the peers that were launched in it."""
    if (folder / "run.json").is_file():
        return [folder]
    return sorted(each.parent for each in folder.glob("peer-*/run.json"))


def is_comparison(folder: Path) -> bool:
    """Whether a folder holds a comparison."""
    return (folder / "grid.yaml").is_file()


def is_watchable(folder: Path) -> bool:
    """Whether a folder has something to show, now or soon: a launch begins with its config.

    Raises RunError where it cannot be looked into.
    """
    try:
        return is_comparison(folder) or bool(runs_of(folder)) or _is_launch(folder) or _has_runs(folder)
    except OSError as error:
        raise RunError(f"{folder} cannot be read ({error.strerror}); give a folder that can be") from None


def _is_launch(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _has_runs(folder: Path) -> bool:
    return any(folder.glob("*/run.json"))


def wait_for(folder: Path) -> None:
    """Wait until there is something to show: a run makes its folder when all is loaded."""
    while not is_watchable(folder):
        time.sleep(_LOOK)


def source_of(folder: Path, planned: Callable[[Path], Sequence[str]] = lambda folder: ()) -> RunSource | GridSource:
    """The source of a folder; ``planned`` tells the trials of a comparison, and raises a PeerloraError where it cannot.

    Raises RunError unless there is something to show.
    """
    if not is_watchable(folder):
        raise RunError(
            f"{folder} holds no run (run.json), no launched peers (config.yaml), no comparison (grid.yaml) and no runs "
            "right below it, as a demo does; give the --out of one"
        )
    if is_comparison(folder):
        try:
            return GridSource(folder, planned(folder))
        except PeerloraError as error:
            return GridSource(folder, lacking=f"trials to come, since grid.yaml cannot be read ({first_line(error)})")
    return RunSource(folder) if runs_of(folder) or _is_launch(folder) else GridSource(folder)


def held_of(run: Path) -> list[int]:
    """The clients that a run trains; empty: all."""
    try:
        held = json.loads((run / "run.json").read_bytes())["held"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return []
    whole = isinstance(held, list) and all(isinstance(each, int) and 0 <= each < MOST_CLIENTS for each in held)
    return held if whole else []


def standing_of(runs: Sequence[Path]) -> str:
    """waiting, running, stopped or finished."""
    if not runs:
        return "waiting"
    if all((run / "summary.json").is_file() for run in runs):
        return "finished"
    return "running" if any(_is_running(run) for run in runs) else "stopped"


def _is_running(run: Path) -> bool:
    if Path("/proc/locks").is_file():
        return holder_of(run) is not None
    log = run / "events.jsonl"
    return log.is_file() and time.time() - log.stat().st_mtime < _IDLE
