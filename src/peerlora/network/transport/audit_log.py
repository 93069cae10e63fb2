"""The audit log: who sent what size and hash, who was refused and why; JSON lines, bounded by rotation."""

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
"""What a header says, for the log; must not raise."""


class AuditLog:
    """Appends to ``path``, which others cannot read; None for no log.

    A file that would pass ``most`` bytes becomes ``path.1``, that one ``path.2``, and so on; of these, ``keep`` stay.
    ``describe`` may add to a message's line what its header says, such as the body's SHA-256; a transport itself
    knows bytes only, and logs the header's.  A file that cannot be written, as on a full disk, never holds up what is
    logged: a warning tells it once, lines are missing until it can be written again.
    """

    def __init__(self, path: Path | None, describe: Describe | None = None, most: int = 10_000_000, keep: int = 5):
        self.path, self.describe, self.most, self.keep = path, describe, most, keep
        self._file: IO[bytes] | None = None
        self._on, self._told = path is not None, False
        if self._on:
            self._try(b"")

    def message(self, what: str, peer: str, header: bytes, size: int) -> None:
        """A message was ``sent``, ``received``, or went ``unanswered``; ``size``: bytes of body."""
        if self._on:
            self._write({"event": what, "peer": peer, "bytes": size} | self._about(header))

    def refused(self, peer: str, reason: str, detail: str, side: str, header: bytes = b"") -> None:
        """A message or session was refused ``here`` or ``there``."""
        if self._on:
            line = {"event": "refused", "peer": peer, "reason": reason, "detail": detail[:500], "side": side}
            self._write(line | self._about(header))

    def event(self, kind: str, peer: str, detail: str) -> None:
        """An edge came up or went down."""
        if self._on:
            self._write({"event": kind, "peer": peer} | ({"detail": detail[:500]} if detail else {}))

    def close(self) -> None:
        """Let go of the file; what comes later is not logged."""
        self._on = False
        self._let_go()

    def _about(self, header: bytes) -> dict[str, Any]:
        if not header:
            return {}
        said = dict(self.describe(header)) if self.describe else {}
        return {"header_sha256": hashlib.sha256(header).hexdigest()} | said

    def _write(self, line: Mapping[str, Any]) -> None:
        self._try((json.dumps({"time": utc_now("auto")} | dict(line)) + "\n").encode())

    def _try(self, data: bytes) -> None:
        try:
            self._append(data)
        except OSError as error:
            self._let_go()
            if not self._told:
                logging.getLogger(__name__).warning("the audit log has lines missing from now on: %s", error)
            self._told = True

    def _append(self, data: bytes) -> None:
        file = self._opened()
        if file.tell() + len(data) > self.most and file.tell():
            self._let_go()
            self._rotate()
            file = self._opened()
        before = file.tell()
        if file.write(data) < len(data):
            file.truncate(before)  # half a line, which the next one would go on with
            raise OSError(errno.ENOSPC, "a line was cut off", str(self.path))

    def _opened(self) -> IO[bytes]:
        assert self.path is not None
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            self._file = open(os.open(self.path, flags, 0o600), "ab", buffering=0)
        return self._file

    def _let_go(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        self._file = None

    def _rotate(self) -> None:
        path = self.path
        assert path is not None

        def old(number: int) -> Path:
            return path.with_name(f"{path.name}.{number}") if number else path

        for number in range(self.keep - 1, -1, -1):
            os.replace(old(number), old(number + 1)) if old(number).exists() else None
