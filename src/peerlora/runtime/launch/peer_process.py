"""The process of one peer, and its progress as its events show it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peerlora.runs.events import CaughtUp, Evaluated, Event, Joined, NeighbourChanged, RoundDone, from_json
from peerlora.runs.write_failures import describe_write_failures

_LAST = 4000  # bytes of a log that are looked at


@dataclass
class PeerProcess:
    """One peer's process, and its progress as its events show it."""

    client: int
    folder: Path
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    killed: bool = False
    """Whether a fault killed or stopped it for good."""
    state: str = "starting"
    round: int = 0
    """Finished rounds."""
    metric: float | None = None
    loss: float | None = None
    missed: int = 0
    """Planned links that were not used, over all rounds so far."""
    skipped: int = 0
    """Rounds left out after falling behind."""
    notices: list[str] = field(default_factory=list)
    _read: int = 0

    @property
    def log(self) -> Path:
        """The file with the process's output."""
        return self.folder.with_suffix(".log")

    def start(self, environment: Mapping[str, str]) -> None:
        """Start the process, again after a kill.

        In a session of its own, so that a terminal's Ctrl-C reaches `launch` alone: a second signal would end a peer
        without its checkpoint.
        """
        with describe_write_failures(self.log.parent, lambda: "launch again with another --out"):
            opened = open(self.log, "ab")
        with opened as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.starts += 1
        self.state = "starting"

    def last_words(self) -> str:
        """Read the last line that the process has written, which says why it failed; empty where there is none."""
        if not self.log.is_file():
            return ""
        with open(self.log, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    @property
    def failed(self) -> bool:
        """Whether it ended by itself, and not well."""
        return self.state.startswith("failed")

    @property
    def alive(self) -> bool:
        """Whether the process exists, stopped or not."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it exists."""
        if self.process is not None and self.alive:
            self.process.send_signal(number)

    def new_events(self) -> list[Event]:
        """Read the events since the last call; a resumed run truncates its log first."""
        path = self.folder / "events.jsonl"
        if not path.is_file():
            return []
        with open(path, "rb") as log:
            self._read = min(self._read, log.seek(0, os.SEEK_END))
            log.seek(self._read)
            whole, newline, _ = log.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        return [from_json(line.decode()) for line in whole.split(b"\n") if line.startswith(b"{")]

    def record(self, event: Event) -> None:
        """Update the progress by one event."""
        if isinstance(event, Joined):
            self.state = "running"
        elif isinstance(event, RoundDone):
            self.round, self.loss = event.round + 1, event.loss[0]
            self.missed += len(event.missed)
        elif isinstance(event, Evaluated):
            self.metric = event.own[0]
        elif isinstance(event, CaughtUp):
            self.skipped += event.to - event.round
            self.notices.append(f"caught up from round {event.round} to {event.to}")
        elif isinstance(event, NeighbourChanged) and event.kind != "up":
            self.notices.append(f"{event.kind}: peer {event.client} {event.detail}".strip())
