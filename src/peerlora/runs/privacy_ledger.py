"""privacy.jsonl of a run folder: every noisy release that was ever begun, also of rounds that a resumed run repeats.

One line of JSON before each job of local steps, ``{"client": 3, "job": 7, "releases": 10}``; none is ever taken away.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from peerlora.errors import RunError
from peerlora.files import sync

FILE = "privacy.jsonl"
_BLOCK = 4096  # bytes read at a time from the end


@dataclass(frozen=True)
class Release:
    """The noisy releases of one client's job of local steps."""

    client: int
    job: int
    releases: int


class PrivacyLedger:
    """Append-only count of releases, on the disk before they are made."""

    def __init__(self, folder: Path):
        self.path = folder / FILE

    def append(self, jobs: Sequence[Release]) -> None:
        """Note the releases of jobs; they may be made once this returns."""
        lines = "".join(json.dumps(asdict(each), separators=(",", ":")) + "\n" for each in jobs)
        fresh = not self.path.exists()
        with open(self.path, "a+b") as file:
            file.truncate(_end_of_lines(file))
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            sync(self.path.parent)

    def entries(self) -> Iterator[tuple[int, int]]:
        """(client, releases) of every job; half a last line was cut off by a kill before its job began.

        Raises RunError for a damaged line, without which nobody knows what was spent.
        """
        if not self.path.is_file():
            return
        *whole, _torn = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(whole, start=1):
            yield self._read(line, number)

    def _read(self, line: bytes, number: int) -> tuple[int, int]:
        try:
            tree = json.loads(line)
            client, releases = tree["client"], tree["releases"]
            if type(client) is int and type(releases) is int and releases >= 0:
                return client, releases
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise RunError(
            f"{self.path}, line {number} is damaged, and it counts what the run has spent of its privacy; put the file "
            "back, or start anew with another --out and count this run as wholly spent"
        )


def _end_of_lines(file: BinaryIO) -> int:
    """Where the last whole line ends: a kill may have left half a line, whose job never began."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - _BLOCK)
        file.seek(begin)
        if (place := file.read(end - begin).rfind(b"\n")) >= 0:
            return begin + place + 1
        end = begin
    return 0
