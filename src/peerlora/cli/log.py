"""Logs of a real peer: lines for people with the time before each, or JSON for programs."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import AbstractContextManager
from typing import IO, Any, Protocol

from peerlora.cli.progress import Progress, describe_event
from peerlora.display import format_now
from peerlora.errors import ConfigError, PeerloraError, Stopped
from peerlora.runs.events import Evaluated, Event, NeighbourChanged, RoundDone, RunFinished, RunStarted, Warned, plain

FORMS = ("plain", "json")


class Log(AbstractContextManager[Any], Protocol):
    """An event sink that writes a log until its block ends."""

    def __call__(self, event: Event) -> None:
        """Write one event."""
        ...


def open_log(form: str) -> Log:
    """Open the log of a peer, on stderr, for its events and for the warnings of the network.

    Raises ConfigError for a form that is none of ``FORMS``.
    """
    if form not in FORMS:
        raise ConfigError(f"--log {form} given; expected {' or '.join(FORMS)}")
    return JsonLog() if form == "json" else Progress(timestamps=True)


class JsonLog:
    """Writes events and logging records as JSON, one object a line: time, level, event, message, and numbers.

    An error that ends the block is its last line.
    """

    def __init__(self, out: IO[str] | None = None):
        self.out = out or sys.stderr
        self.names: dict[str, str] = {}
        self.handler = _Records(self)

    def __enter__(self) -> JsonLog:
        logging.getLogger().addHandler(self.handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        logging.getLogger().removeHandler(self.handler)
        if error is not None:
            known = isinstance(error, PeerloraError)
            level = "info" if isinstance(error, Stopped) else "error"
            self.write(level, type(error).__name__, str(error) if known else repr(error))

    def __call__(self, event: Event) -> None:
        """Write one event."""
        if isinstance(event, RunStarted):
            self.names = event.names
        lines = describe_event(event, lambda client: self.names.get(str(client)) or f"client {client}", "run")
        level = "warning" if isinstance(event, Warned) or _worrying(event) else "info"
        text = "; ".join(lines).removeprefix("warning: ")
        self.write(level, type(event).__name__, text, **_numbers(event))

    def write(self, level: str, event: str, message: str, **facts: Any) -> None:
        """Write one line."""
        head = {"time": format_now("milliseconds"), "level": level, "event": event}
        tree = plain({**head, **({"message": message} if message else {}), **facts})
        print(json.dumps(tree, allow_nan=False), file=self.out, flush=True)


class _Records(logging.Handler):
    """Hands logging records to a JSON log."""

    def __init__(self, log: JsonLog):
        super().__init__(logging.WARNING)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.log.write(record.levelname.lower(), record.name, record.getMessage())
        except Exception:
            self.handleError(record)


def _worrying(event: Event) -> bool:
    return isinstance(event, NeighbourChanged) and event.kind != "up"


def _numbers(event: Event) -> dict[str, Any]:
    """The facts of an event that a program may want to filter by or to plot."""
    if isinstance(event, RoundDone):
        facts = ("loss", "contacts", "missed", "behind", "bytes_sent", "seconds_train", "seconds_mix")
        return {"round": event.round + 1, **{name: getattr(event, name) for name in facts}}
    if isinstance(event, Evaluated):
        return {"round": event.round, "rows": event.rows, "own": event.own, "final": event.final}
    if isinstance(event, NeighbourChanged):
        return {"round": event.round, "client": event.client, "kind": event.kind}
    if isinstance(event, RunFinished):
        return {"rounds": event.summary.get("rounds"), "run": event.summary.get("run")}
    return {"round": found} if (found := getattr(event, "round", None)) is not None else {}
