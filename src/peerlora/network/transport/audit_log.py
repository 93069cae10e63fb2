"""Audit log of messages, with size and hash, and of refusals; JSON lines, kept for some days, within bounds."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from peerlora.display import format_now

Describe = Callable[[bytes], Mapping[str, Any]]
"""Extracts the facts of a header for the log; must not raise."""

TOTAL_BYTES = 1_000_000_000
"""Bytes of all files of a log."""
_DAY = 86_400.0  # seconds
_WINDOW = 3600.0  # seconds in which what repeats itself is written a few times and then counted
_FIRST = 4  # times that it is written in a window
_KINDS = 1000  # kinds of what repeats itself that are told apart; beyond, all others count as one
_OTHERS = "others"


class Kind(NamedTuple):
    """What makes two lines repeats of each other."""

    event: str
    peer: str
    reason: str = ""
    side: str = ""


class AuditLog:
    """Appends to ``path``, which other users cannot read; None for no log.

    A line stays for ``days``.  So that nobody can push the lines about others out, each of ``peers`` may cause its
    share of ``total_bytes`` in that time, as may all others together; beyond, its lines are counted.  What moves no
    vectors (refusals, failed dials, probes, sessions that come and go) is written a few times an hour and counted
    then; the number follows in a line ``repeated``.

    A file that would pass ``file_bytes`` becomes ``path.1``, that one ``path.2``, and so on.  ``describe`` adds facts
    of its header to a message's line, such as the body's SHA-256; a transport itself knows bytes only, and logs the
    header's hash.  A file that cannot be written, as on a full disk, delays no message: one warning is given, and lines
    are missing until the file can be written again.  ``clock``: seconds that only grow.
    """

    def __init__(
        self,
        path: Path | None,
        describe: Describe | None = None,
        *,
        days: float = 90.0,
        peers: Collection[str] = (),
        file_bytes: int = 10_000_000,
        total_bytes: int = TOTAL_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.path, self.describe, self.clock = path, describe, clock
        self.days, self.file_bytes, self.total_bytes = days, file_bytes, total_bytes
        share = total_bytes / 2 / (len(peers) + 1)  # half: it may be used up, and then fill again within the time
        self._others = _Budget(_OTHERS, share, share / (days * _DAY), clock())
        self._budgets = {peer: _Budget(peer, share, share / (days * _DAY), clock()) for peer in peers}
        self._repeats: dict[Kind, _Repeats] = {}
        self._swept = clock()
        self._file: IO[bytes] | None = None
        self._on, self._warned = path is not None, False
        if self._on:
            self._try(b"")
            self._drop_old()

    def message(self, event: str, peer: str, header: bytes, size: int, moved: bool = True) -> None:
        """Log a message that was ``sent``, ``received``, ``broken-off`` on its way here, or went ``unanswered``.

        ``size``: bytes of body.  ``moved``: whether any of them may have left this site, or reached it.
        """
        if self._on:
            about = self._about(header)
            line = {"event": event, "peer": peer, "bytes": size} | about
            if size and moved:
                self._write(peer, line)
            else:
                self._limited(Kind(event, peer, str(about.get("kind", ""))), line)

    def refused(self, peer: str, reason: str, detail: str, side: str, header: bytes = b"", count: int = 1) -> None:
        """Log messages or sessions, ``count`` of them, that were refused ``here`` or ``there``."""
        if self._on:
            line = {"event": "refused", "peer": peer, "reason": reason, "detail": detail[:500], "side": side}
            line |= {"count": count} if count > 1 else {}
            self._limited(Kind("refused", peer, reason, side), line | self._about(header), count)

    def event(self, kind: str, peer: str, detail: str) -> None:
        """Log that an edge came up or went down."""
        if self._on:
            line = {"event": kind, "peer": peer} | ({"detail": detail[:500]} if detail else {})
            self._limited(Kind(kind, peer), line)

    def close(self) -> None:
        """Write what was only counted so far, and close the file; later messages are not logged."""
        if self._on:
            self._sweep(everything=True)
        self._on = False
        self._close_file()

    def _about(self, header: bytes) -> dict[str, Any]:
        if not header:
            return {}
        facts = dict(self.describe(header)) if self.describe else {}
        return {"header_sha256": hashlib.sha256(header).hexdigest()} | facts

    def _limited(self, kind: Kind, line: Mapping[str, Any], count: int = 1) -> None:
        """Write a line, or count it where its like was written a few times already."""
        if self.clock() - self._swept > _WINDOW / 10:
            self._sweep()
        if kind not in self._repeats and len(self._repeats) >= _KINDS:
            kind, line = Kind(kind.event, _OTHERS), {**line, "peer": _OTHERS}
        found = self._repeats.setdefault(kind, _Repeats(self.clock()))
        if found.written < _FIRST:
            found.written += 1
            self._write(kind.peer, line)
        else:
            found.left_out += count

    def _write(self, peer: str, line: Mapping[str, Any]) -> None:
        data = _encode(line)
        if self._budgets.get(peer, self._others).spend(len(data), self.clock()):
            self._try(data)

    def _sweep(self, everything: bool = False) -> None:
        """Write the numbers of what was left out in windows that are over."""
        now = self._swept = self.clock()
        for kind, found in list(self._repeats.items()):
            if everything or now - found.since > _WINDOW:
                del self._repeats[kind]
                if found.left_out:
                    facts = {name: value for name, value in kind._asdict().items() if value}
                    line = facts | {"event": "repeated", "of": kind.event, "count": found.left_out}
                    self._write(kind.peer, line)
        for budget in (*self._budgets.values(), self._others):
            if budget.left_out:
                self._try(_encode({"event": "left-out", "peer": budget.peer, "count": budget.left_out}))
                budget.left_out = 0

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
        if file.tell() + len(data) > self.file_bytes and file.tell():
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
        """Number the files one higher, and remove those that are too old or too many."""
        self._drop_old()
        for number in reversed(range(self._files())):
            os.replace(self._numbered(number), self._numbered(number + 1))

    def _drop_old(self) -> None:
        """Remove files whose last line is older than ``days``, and the oldest beyond ``total_bytes``."""
        most = max(1, self.total_bytes // self.file_bytes - 1)
        for number in reversed(range(1, self._files())):
            with suppress(OSError):
                age = time.time() - self._numbered(number).stat().st_mtime
                if number < most and age <= self.days * _DAY:
                    break
                self._numbered(number).unlink()

    def _files(self) -> int:
        """How many there are, the one that is written to included."""
        number = 0
        while self._numbered(number).exists():
            number += 1
        return number

    def _numbered(self, number: int) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path


@dataclass
class _Repeats:
    """How often one kind of line was written in its window, and how often not."""

    since: float
    written: int = 0
    left_out: int = 0


@dataclass
class _Budget:
    """Bytes that may be written about a peer: at most ``most`` at once, ``rate`` more every second."""

    peer: str
    most: float
    rate: float
    at: float
    spent: float = 0.0
    left_out: int = 0
    """Lines that were not written."""

    def spend(self, count: int, now: float) -> bool:
        """Whether so many bytes may be written now."""
        self.spent, self.at = max(0.0, self.spent - (now - self.at) * self.rate), now
        if self.spent + count > self.most:
            self.left_out += 1
            return False
        self.spent += count
        return True


def _encode(line: Mapping[str, Any]) -> bytes:
    return (json.dumps({"time": format_now("auto")} | dict(line)) + "\n").encode()
