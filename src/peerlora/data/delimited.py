"""Rows of CSV, TSV and Orange's files.  All cells are text: nothing is guessed from how a cell looks."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from peerlora.data.columns import Columns, check_columns
from peerlora.data.numerals import is_number
from peerlora.data.text_files import Unreadable, base_suffix, read_lines

_LARGEST_CELL = 1 << 27  # letters
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_UNKNOWN = ("", "?")  # Orange's signs for a value that is not known


def read_csv(path: Path, columns: Columns | None) -> pa.Table:
    """Read a file with a header line; cells are separated by commas, in a .tsv by tabs.

    Quotation marks must be paired as RFC 4180 says, except in a .tsv whose every line is a row: there they are letters.
    Raises Unreadable, naming the line.
    """
    delimiter = "\t" if base_suffix(path.name) == ".tsv" else ","
    label = columns.label if columns else None
    try:
        records = list(_records(read_lines(path), delimiter))
        swallowed = _swallowed(records, delimiter, label)
    except Unreadable as trouble:
        letters = _lines_as_rows(path, delimiter)
        if letters is None:
            raise trouble from None
        records, swallowed = letters, None
    if swallowed is not None:
        letters = _lines_as_rows(path, delimiter)
        if letters is None and swallowed.sure:
            raise Unreadable(swallowed.message)
        if letters is None:
            logging.getLogger(__name__).warning("%s: %s", path, swallowed.message)
        records = letters or records
    return _table(records, delimiter, columns)


class _Record(NamedTuple):
    """One row with the lines that it was read from."""

    cells: list[str]
    line: int
    """Number of its first line, from 1."""
    lines: list[str] | None
    """Where it is longer than one line, these."""


class _Swallowed(NamedTuple):
    """A quotation mark that seems to have taken in rows."""

    message: str
    sure: bool
    """Whether one of the lines inside the cell holds a label of other rows where rows have theirs."""


def _records(lines: Iterable[str], delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> Iterator[_Record]:
    kept: list[str] = []

    def remembered() -> Iterator[str]:
        for line in lines:
            kept.append(line)
            yield line

    before = csv.field_size_limit(_LARGEST_CELL)
    try:
        reader = csv.reader(remembered(), delimiter=delimiter, strict=True, quoting=quoting)  # type: ignore[arg-type]
        line = 1
        for cells in reader:
            if cells:
                yield _Record(cells, line, list(kept) if len(kept) > 1 else None)
            line = reader.line_num + 1
            kept.clear()
    except csv.Error as error:
        raise Unreadable(_about_quotes(str(error), line, len(kept))) from None
    finally:
        csv.field_size_limit(before)


def _about_quotes(error: str, line: int, lines: int) -> str:
    if "expected after" in error or "unexpected end" in error:
        reach = f"runs to line {line + lines - 1}" if lines > 1 else "does not end at a delimiter"
        return (
            f"a quotation mark that opens a cell in line {line} is not closed: the cell {reach}; close it, or write "
            '"" for a quotation mark inside a cell that begins and ends with one'
        )
    return f"line {line}: {error}"


def _swallowed(records: Sequence[_Record], delimiter: str, label: str | None) -> _Swallowed | None:
    """The first cell over several lines that are rows of their own, as far as one can see."""
    if not records or all(record.lines is None for record in records):
        return None
    header = records[0].cells
    place = header.index(label) if label in header else None
    whole = [record.cells for record in records[1:] if len(record.cells) == len(header)]
    known = set() if place is None else {cells[place] for cells in whole}
    doubtful = None
    for record in records:
        if record.lines is None or len(header) < 2:
            continue
        rows = [next(csv.reader([line], delimiter=delimiter, quoting=csv.QUOTE_NONE), []) for line in record.lines]
        message = (
            f"a cell that a quotation mark opens in line {record.line} runs to line "
            f'{record.line + len(record.lines) - 1} and seems to take in rows; close it, or write "" for a quotation '
            "mark inside a cell that begins and ends with one"
        )
        if place is not None and _holds_labels(rows, record.cells, place, known):
            return _Swallowed(message, sure=True)
        if place is None and doubtful is None and all(len(row) == len(header) for row in rows):
            doubtful = _Swallowed(message, sure=False)
    return doubtful


def _holds_labels(rows: Sequence[Sequence[str]], cells: Sequence[str], place: int, known: set[str]) -> bool:
    """Whether a line that cannot hold the record's own label has a label of other rows at the label's place."""
    long = next((number for number, cell in enumerate(cells) if "\n" in cell or "\r" in cell), 0)
    if place == long:  # a label of several lines
        return any(len(row) == len(cells) for row in rows[1:])
    # Its own label stands in the last line if it comes behind the long cell, else in the first.
    others = rows[:-1] if place > long else rows[1:]
    numeric = all(is_number(word) for word in known)
    found = [row[place].strip("\r\n") for row in others if len(row) == len(cells)]
    return any(cell in known or (numeric and is_number(cell)) for cell in found)


def _lines_as_rows(path: Path, delimiter: str) -> list[_Record] | None:
    """Every line as one row with quotation marks as letters; None unless the file has tabs, as many in every line."""
    if delimiter != "\t":
        return None
    try:
        records = list(_records(read_lines(path), delimiter, csv.QUOTE_NONE))
    except Unreadable:
        return None
    return records if len({len(record.cells) for record in records}) == 1 else None


def _table(records: Sequence[_Record], delimiter: str, columns: Columns | None) -> pa.Table:
    if not records:
        raise Unreadable("is empty; expected a header line and rows")
    header, rows = records[0].cells, records[1:]
    _refuse_other_delimiter(records, delimiter)
    for record in rows:
        if len(record.cells) != len(header):
            raise Unreadable(
                f"line {record.line} has {len(record.cells)} cells, the header line has {len(header)}; a cell that "
                f"holds a {'tab' if delimiter == chr(9) else 'comma'} needs quotation marks around it"
            )
        if record.cells == header:
            raise Unreadable(f"line {record.line} repeats the header line; remove it")
    places = range(len(header)) if columns is None else [header.index(name) for name in check_columns(header, columns)]
    arrays = [pa.array([record.cells[place] for record in rows], pa.large_string()) for place in places]
    return pa.Table.from_arrays(arrays, names=[header[place] for place in places])


def _refuse_other_delimiter(records: Sequence[_Record], delimiter: str) -> None:
    first = records[0].cells[0]
    if first.lower().startswith("sep="):
        raise Unreadable(f"its first line, {first!r}, names a delimiter; remove this line")
    if len(records[0].cells) > 1:
        return
    for other, name in _DELIMITERS.items():
        if other != delimiter and other in first and all(other in record.cells[0] for record in records):
            here = _DELIMITERS[delimiter]
            usual = {",": "name it .csv", "\t": "name it .tsv"}.get(other, f"save it with {here}")
            raise Unreadable(f"its cells are separated by {name}, expected {here}; {usual}")


def read_tab(path: Path, columns: Columns | None) -> pa.Table:
    """Read Orange's format: tab-separated, with three header lines: names, types, roles.

    Empty cells and question marks are null, except in columns of text.  Raises Unreadable.
    """
    lines = read_lines(path)
    names, types, roles = (next(lines, "").rstrip("\r\n").split("\t") for _ in range(3))
    if not len(names) == len(types) == len(roles):
        raise Unreadable(
            f"its three header lines (names, types, roles) have {len(names)}, {len(types)} and {len(roles)} columns"
        )
    header = _Record(names, 1, None)
    # Some files end their headers with a line of empty cells.
    rows = [record for record in _records(lines, "\t") if any(record.cells)]
    table = _table([header, *(row._replace(line=row.line + 3) for row in rows)], "\t", columns)
    kinds = dict(zip(names, types, strict=True))
    for place, name in enumerate(table.column_names):
        typed = kinds[name] in ("c", "continuous", "d", "discrete") or (columns is not None and name == columns.label)
        if typed and not (columns is not None and name in columns.text):
            table = table.set_column(place, name, _typed(table.column(place), kinds[name].startswith("c")))
    return table


def _typed(column: pa.ChunkedArray, number: bool) -> pa.Array:
    cells = [None if cell in _UNKNOWN else cell for cell in column.to_pylist()]
    bad = next((row for row, cell in enumerate(cells) if number and cell and not is_number(cell)), None)
    if bad is not None:
        raise Unreadable(f"row {bad + 1} holds {cells[bad]!r} in a column of numbers")
    return pa.array([cell and float(cell) for cell in cells], pa.float64()) if number else pa.array(cells, pa.string())
