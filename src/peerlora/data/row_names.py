"""What messages call a row: its number, and its file where a source has several."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import pyarrow as pa

_NOTE = b"peerlora.files"


class ManyFiles(str):
    """The name of a source with several files, which knows how many rows each has."""

    files: tuple[tuple[str, int], ...] = ()

    def row(self, number: int) -> str:
        """A row, counted from 0 through all files, by its number in its own."""
        starts = [0, *accumulate(rows for _, rows in self.files)]
        place = bisect_right(starts, number) - 1
        return f"row {number - starts[place] + 1} of {self.files[place][0]}"


def row_name(source: str, number: int) -> str:
    """What a message calls a row of a source, counted from 0: by its number from 1."""
    return source.row(number) if isinstance(source, ManyFiles) else f"row {number + 1}"


def note_files(table: pa.Table, files: Sequence[tuple[str, int]]) -> pa.Table:
    """The table with a note of the files that its rows came from, in order: the name and the rows of each."""
    note = {_NOTE: json.dumps(list(files)).encode()}
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **note})


def with_files(source: str, table: pa.Table) -> str:
    """The name of a source, which knows its files where the table that was read from it does."""
    note = (table.schema.metadata or {}).get(_NOTE)
    if note is None:
        return source
    named = ManyFiles(source)
    named.files = tuple((str(name), int(rows)) for name, rows in json.loads(note))
    return named
