"""Follow an event log that another process writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LineFacts = dict[str, Any]
"""One event as its JSON object: a page of a thousand clients has no time for the checks of ``events.from_json``."""

_MOST_BYTES = 4_000_000  # read at once; the rest follows at the next call


class EventTail:
    """Reads the whole lines that were added to ``events.jsonl`` since the last call; damaged ones are left out."""

    def __init__(self, folder: Path):
        self.path = folder / "events.jsonl"
        self._read, self._end = 0, b""

    def poll(self) -> tuple[bool, list[LineFacts]]:
        """(whether the log was cut back, as a resumed run does, and begins anew; its new events)."""
        try:
            with open(self.path, "rb") as log:
                anew = self._cut_back(log)
                log.seek(self._read)
                data = log.read(_MOST_BYTES)
        except FileNotFoundError:
            return False, []
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        self._end = (self._end + whole)[-64:]
        return anew, [facts for line in whole.split(b"\n") if (facts := _facts(line)) is not None]

    def _cut_back(self, log: Any) -> bool:
        """Whether what was read is not there any more; then all is read again."""
        log.seek(max(0, self._read - len(self._end)))
        if log.read(len(self._end)) == self._end:
            return False
        self._read, self._end = 0, b""
        return True


def _facts(line: bytes) -> LineFacts | None:
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) and isinstance(tree.get("type"), str) else None
