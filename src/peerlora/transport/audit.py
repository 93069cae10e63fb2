"""The audit log: who sent what size and hash, who was refused and why; JSON lines, bounded by rotation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Describe = Callable[[bytes], Mapping[str, Any]]
"""What a header says, for the log; must not raise."""


class Audit:
    """Appends to ``path``, which others cannot read; None for no log.

    A file that would pass ``most`` bytes becomes ``path.1``, that one ``path.2``, and so on; of these, ``keep`` stay.
    ``describe`` may add to a message's line what its header says, such as the body's SHA-256; a transport itself
    knows bytes only, and logs the header's.
    """

    def __init__(self, path: Path | None, describe: Describe | None = None, most: int = 10_000_000, keep: int = 5):
        self.path, self.describe, self.most, self.keep = path, describe, most, keep
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open(path)

    def message(self, what: str, peer: str, header: bytes, size: int) -> None:
        """A message was ``sent``, ``received``, or went ``unanswered``; ``size``: bytes of body."""
        if self._file is not None:
            self._write({"event": what, "peer": peer, "bytes": size} | self._about(header))

    def refused(self, peer: str, reason: str, detail: str, side: str, header: bytes = b"") -> None:
        """A message or session was refused ``here`` or ``there``."""
        if self._file is not None:
            line = {"event": "refused", "peer": peer, "reason": reason, "detail": detail[:500], "side": side}
            self._write(line | self._about(header))

    def event(self, kind: str, peer: str, detail: str) -> None:
        """An edge came up or went down."""
        if self._file is not None:
            self._write({"event": kind, "peer": peer} | ({"detail": detail[:500]} if detail else {}))

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _about(self, header: bytes) -> dict[str, Any]:
        if not header:
            return {}
        said = dict(self.describe(header)) if self.describe else {}
        return {"header_sha256": hashlib.sha256(header).hexdigest()} | said

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None and self.path is not None
        data = (json.dumps({"time": datetime.now(UTC).isoformat()} | dict(line)) + "\n").encode()
        if self._file.tell() + len(data) > self.most and self._file.tell():
            self._file.close()
            self._rotate(self.path)
            self._open(self.path)
        self._file.write(data)

    def _open(self, path: Path) -> None:
        self._file = open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab", buffering=0)

    def _rotate(self, path: Path) -> None:
        def old(number: int) -> Path:
            return path.with_name(f"{path.name}.{number}") if number else path

        for number in range(self.keep - 1, -1, -1):
            os.replace(old(number), old(number + 1)) if old(number).exists() else None
