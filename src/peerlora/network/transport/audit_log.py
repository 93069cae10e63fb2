"""Audit log of messages, with size and hash, and of refusals; JSON lines, bounded by rotation."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from peerlora.display import utc_now

Describe = Callable[[bytes], Mapping[str, Any]]
"""Extracts the facts of a header for the log; must not raise."""


class AuditLog:
    """Appends to ``path``, which other users cannot read; None for no log.

    A file that would pass ``most`` bytes becomes ``path.1``, that one ``path.2``, and so on; of these, ``keep`` stay.
    ``describe`` adds facts of its header to a message's line, such as the body's SHA-256; a transport itself knows
    bytes only, and logs the header's hash.  A file that cannot be written, as on a full disk, delays no message: one
    warning is given, and lines are missing until the file can be written again.
    """

    def __init__(self, path: Path | None, describe: Describe | None = None, most: int = 10_000_000, keep: int = 5):
        self.path, self.describe, self.most, self.keep = path, describe, most, keep
        self._file: IO[bytes] | None = None
        self._on, self._warned = path is not None, False
        if self._on:
            self._try(b"")

    def message(self, event: str, peer: str, header: bytes, size: int) -> None:
        """Log a message that was ``sent``, ``received``, or went ``unanswered``; ``size``: bytes of body."""
        if self._on:
            self._write({"event": event, "peer": peer, "bytes": size} | self._about(header))

    def refused(self, peer: str, reason: str, detail: str, side: str, header: bytes = b"") -> None:
        """Log a message or session that was refused ``here`` or ``there``."""
        if self._on:
            line = {"event": "refused", "peer": peer, "reason": reason, "detail": detail[:500], "side": side}
            self._write(line | self._about(header))

    def event(self, kind: str, peer: str, detail: str) -> None:
        """Log that an edge came up or went down."""
        if self._on:
            self._write({"event": kind, "peer": peer} | ({"detail": detail[:500]} if detail else {}))

    def close(self) -> None:
        """Close the file; later messages are not logged."""
        self._on = False
        self._close_file()

    def _about(self, header: bytes) -> dict[str, Any]:
        if not header:
            return {}
        facts = dict(self.describe(header)) if self.describe else {}
        return {"header_sha256": hashlib.sha256(header).hexdigest()} | facts

    def _write(self, line: Mapping[str, Any]) -> None:
        self._try((json.dumps({"time": utc_now("auto")} | dict(line)) + "\n").encode())

    def _try(self, data: bytes) -> None:
        try:
            self._append(data)
        except OSError as error:
            self._close_file()
            if not self._warned:
                logging.getLogger(__name__).warning("the audit log has lines missing from now on: %s", error)
            self._warned = True

    def _append(self, data: bytes) -> None:
        file = self._open_file()
        if file.tell() + len(data) > self.most and file.tell():
            self._close_file()
            self._rotate()
            file = self._open_file()
        before = file.tell()
        if file.write(data) < len(data):
            file.truncate(before)  # the next line would continue the incomplete one
            raise OSError(errno.ENOSPC, "a line was cut off", str(self.path))

    def _open_file(self) -> IO[bytes]:
        assert self.path is not None
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            self._file = open(os.open(self.path, flags, 0o600), "ab", buffering=0)
        return self._file

    def _close_file(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        self._file = None

    def _rotate(self) -> None:
        path = self.path
        assert path is not None

        def numbered(number: int) -> Path:
            return path.with_name(f"{path.name}.{number}") if number else path

        for number in range(self.keep - 1, -1, -1):
            os.replace(numbered(number), numbered(number + 1)) if numbered(number).exists() else None
