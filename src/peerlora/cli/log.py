"""Logs of a real peer: lines for people with the time before each, or JSON for programs."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import IO, Any, Protocol

from peerlora.cli.progress import Progress, describe_event
from peerlora.display import format_now
from peerlora.errors import ConfigError, PeerloraError, Stopped
from peerlora.runs.events import Evaluated, Event, NeighbourChanged, RoundDone, RunFinished, RunStarted, Warned, plain

FORMS = ("plain", "json")
LONGEST_LINE = 10_000
"""Characters; what is written to stderr without a line break is cut there."""


class Log(Protocol):
    """An event sink that writes a log."""

    def __call__(self, event: Event) -> None:
        """Write one event."""
        ...


@contextmanager
def open_log(form: str) -> Iterator[AbstractContextManager[Log]]:
    """Open the log of a command on stderr until the block ends; yield what shows a run's events in a block of its own.

    As JSON the log has everything that is written to stderr, see ``JsonLog``.
    Raises ConfigError for a form that is none of ``FORMS``.
    """
    if form not in FORMS:
        raise ConfigError(f"--log {form} given; expected {' or '.join(FORMS)}")
    if form == "plain":
        yield Progress(timestamps=True)
        return
    with JsonLog() as log:
        yield nullcontext(log)


class JsonLog:
    """Writes events and logging records as JSON, one object a line: time, level, event, message, and numbers.

    Within the block all else that Python code writes to stderr is such a line, too: warnings, failures of threads with
    their traceback, and what is printed.  An error that ends the block is its last line, and becomes SystemExit with
    the exit code, so that nobody tells it again.
    """

    def __init__(self, out: IO[str] | None = None):
        self.out = out or sys.stderr
        self.names: dict[str, str] = {}
        self.handler = _Records(self)
        self._lock = threading.RLock()
        self._waiting: deque[str] = deque()
        self._writing = False

    def __enter__(self) -> JsonLog:
        self._before = sys.stderr, threading.excepthook, sys.unraisablehook
        self._printed = _PrintedLines(self)
        sys.stderr = self._printed
        threading.excepthook = lambda failed: self._fail(failed.exc_value, getattr(failed.thread, "name", "thread"))
        sys.unraisablehook = lambda failed: self._fail(failed.exc_value, failed.err_msg or "ignored")
        logging.captureWarnings(True)
        logging.getLogger().addHandler(self.handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        logging.getLogger().removeHandler(self.handler)
        logging.captureWarnings(False)
        self._printed.end()
        sys.stderr, threading.excepthook, sys.unraisablehook = self._before
        if error is None or isinstance(error, SystemExit):
            return
        if isinstance(error, PeerloraError):
            self.write("info" if isinstance(error, Stopped) else "error", type(error).__name__, str(error))
            raise SystemExit(error.exit_code) from None
        if isinstance(error, KeyboardInterrupt):
            self.write("info", type(error).__name__, "stopped")
            raise SystemExit(130) from None
        self._fail(error, type(error).__name__)
        raise SystemExit(1) from None

    def __call__(self, event: Event) -> None:
        """Write one event."""
        if isinstance(event, RunStarted):
            self.names = event.names
        lines = describe_event(event, lambda client: self.names.get(str(client)) or f"client {client}", "run")
        level = "warning" if isinstance(event, Warned) or _worrying(event) else "info"
        text = "; ".join(lines).removeprefix("warning: ")
        self.write(level, type(event).__name__, text, **_numbers(event))

    def write(self, level: str, event: str, message: str, **facts: Any) -> None:
        """Write one line; a log that nobody reads any more costs no run."""
        head = {"time": format_now("milliseconds"), "level": level, "event": event}
        tree = plain({**head, **({"message": message} if message else {}), **facts})
        line = json.dumps(tree, allow_nan=False, default=str) + "\n"
        with self._lock:
            self._waiting.append(line)
            if self._writing:  # in the handler of a signal that came while this thread writes, and goes on then
                return
            self._writing = True
            try:
                while self._waiting:
                    self._put(self._waiting.popleft())
            finally:
                self._writing = False

    def _put(self, line: str) -> None:
        with suppress(OSError):
            self.out.write(line)
            self.out.flush()

    def _fail(self, error: BaseException | None, event: str) -> None:
        """Write an error that nobody expected."""
        self.write("error", event, repr(error), traceback=_traceback(error))


class _Records(logging.Handler):
    """Hands logging records to a JSON log."""

    def __init__(self, log: JsonLog):
        super().__init__(logging.WARNING)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level = "error" if record.levelno >= logging.ERROR else "warning"
            facts = {"traceback": _traceback(record.exc_info[1])} if record.exc_info else {}
            self.log.write(level, record.name, record.getMessage(), **facts)
        except Exception:
            self.handleError(record)


class _PrintedLines(io.TextIOBase):
    """Takes the place of stderr: each line that is printed becomes one of a JSON log."""

    encoding = "utf-8"

    def __init__(self, log: JsonLog):
        self.log = log
        self._ended = False
        self._begun = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        """Write the lines that are whole; after the log's block, whoever still holds this stream writes as before."""
        if self._ended:
            return self.log.out.write(text)
        with self._lock:
            *whole, rest = re.split(r"[\r\n]", self._begun + text)  # progress bars end their lines with \r
            while len(rest) > LONGEST_LINE:
                whole, rest = [*whole, rest[:LONGEST_LINE]], rest[LONGEST_LINE:]
            self._begun = rest
        for line in filter(str.strip, whole):
            self.log.write("info", "stderr", line.strip())
        return len(text)

    def writable(self) -> bool:
        """Whether it can be written to."""
        return True

    def fileno(self) -> int:
        """The number of the real stderr."""
        return self.log.out.fileno()

    def end(self) -> None:
        """Write what has no line break."""
        self.write("\n")
        self._ended = True


def _traceback(error: BaseException | None) -> str:
    return "".join(traceback.format_exception(error)) if error is not None else ""


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
