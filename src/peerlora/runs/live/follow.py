"""Follow an event log that another process writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LineFacts = dict[str, Any]
"""One event as its JSON object: a page of a thousand clients has no time for the checks of ``events.from_json``."""

_MOST_BYTES = 4_000_000  # read at once; the rest follows at the next call
_LONGEST_LINE = 64_000_000  # bytes; a longer one is left out


class EventTail:
    """Reads the whole lines that were added to ``events.jsonl`` since the last call; damaged ones are left out.

    In place of a line that is too long there is a warning.
    """

    def __init__(self, folder: Path):
        self.path = folder / "events.jsonl"
        self._begin()

    def _begin(self) -> None:
        self._read, self._end, self._skipping = 0, b"", False

    def poll(self) -> tuple[bool, list[LineFacts]]:
        """(whether the log was cut back, as a resumed run does, and begins anew; its new events)."""
        try:
            with open(self.path, "rb") as log:
                anew = self._cut_back(log)
                log.seek(self._read)
                data = log.read(_MOST_BYTES)
                while data and b"\n" not in data and len(data) < _LONGEST_LINE and (more := log.read(_MOST_BYTES)):
                    data += more
        except FileNotFoundError:
            return False, []
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.split(b"\n")
        if self._skipping and whole:
            lines, self._skipping = lines[1:], False  # the end of the line that is too long
        found = [facts for line in lines if (facts := _facts(line)) is not None]
        if not whole and (self._skipping or len(data) >= _LONGEST_LINE):
            found += [] if self._skipping else [_too_long()]
            whole, self._skipping = data, True
        self._read += len(whole)
        self._end = (self._end + whole)[-64:]
        return anew, found

    def _cut_back(self, log: Any) -> bool:
        """Whether what was read is not there any more; then all is read again."""
        log.seek(max(0, self._read - len(self._end)))
        if log.read(len(self._end)) == self._end:
            return False
        self._begin()
        return True


def _too_long() -> LineFacts:
    return {"type": "Warned", "message": f"a line of more than {_LONGEST_LINE:,} bytes in the log was left out"}


def _facts(line: bytes) -> LineFacts | None:
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) and isinstance(tree.get("type"), str) else None
