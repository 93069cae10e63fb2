"""Rows of CSV, TSV and Orange's files.  All cells are text: nothing is guessed from how a cell looks."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from peerlora.data.columns import Columns, check_columns
from peerlora.data.numerals import is_number
from peerlora.data.swallowed_rows import LabelColumn, looks_swallowed
from peerlora.data.text_files import Unreadable, base_suffix, read_lines

_LARGEST_CELL = 1 << 27  # letters
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_CLOSE = 'close it, or write "" for a quotation mark inside a cell that begins and ends with one'
_UNKNOWN = ("", "?")  # Orange's signs for a value that is not known


def read_csv(path: Path, columns: Columns | None) -> pa.Table:
    """Read a file with a header line; cells are separated by commas, in a .tsv by tabs.

    Quotation marks must be paired as RFC 4180 says, except in a .tsv whose every line is a row: there they are letters.
    Raises Unreadable, naming the line.
    """
    delimiter = "\t" if base_suffix(path.name) == ".tsv" else ","
    label = columns.label if columns else None
    try:
        with closing(read_lines(path)) as lines:
            rows = _read_rows(_records(lines, delimiter), delimiter, columns)
        swallowed = _swallowed(rows, delimiter, label)
        if swallowed is None:
            return rows.table()
        trouble = Unreadable(swallowed.message)
    except Unreadable as error:
        rows, swallowed, trouble = None, None, error
    if (letters := _lines_as_rows(path, delimiter, columns)) is not None:
        return letters.table()
    if rows is None or swallowed is None:
        raise trouble
    swallowed.tell(path)
    return rows.table()


class _Record(NamedTuple):
    """One row of a file."""

    cells: list[str]
    line: int
    """Number of its first line, from 1."""
    lines: list[str] | None
    """Where it is longer than one line, these."""

    def about_quotes(self) -> str:
        """What a quotation mark has done."""
        assert self.lines is not None
        return (
            f"a cell that a quotation mark opens in line {self.line} runs to line {self.line + len(self.lines) - 1} "
            f"and seems to take in rows; {_CLOSE}"
        )


class _Rows(NamedTuple):
    """The needed columns of a file."""

    header: list[str]
    names: list[str]
    cells: list[list[str]]
    """[column][row]"""
    long: list[_Record]
    """The rows that are longer than one line."""

    def table(self) -> pa.Table:
        """All cells as text."""
        arrays = [pa.array(cells, pa.large_string()) for cells in self.cells]
        return pa.Table.from_arrays(arrays, names=self.names)


class _Swallowed(NamedTuple):
    """A quotation mark that seems to have taken in rows."""

    message: str
    sure: bool

    def tell(self, path: Path) -> None:
        """Raise Unreadable where it is sure, else warn."""
        if self.sure:
            raise Unreadable(self.message)
        logging.getLogger(__name__).warning("%s: %s", path, self.message)


def _records(
    lines: Iterable[str], delimiter: str, quoting: int = csv.QUOTE_MINIMAL, first: int = 1
) -> Iterator[_Record]:
    """The rows of a file, the header line among them; ``first``: the number of the first line."""
    kept: list[str] = []

    def remembered() -> Iterator[str]:
        for line in lines:
            kept.append(line)
            yield line

    before, line = csv.field_size_limit(_LARGEST_CELL), first
    try:
        reader = csv.reader(remembered(), delimiter=delimiter, strict=True, quoting=quoting)  # type: ignore[arg-type]
        for cells in reader:
            if cells:
                yield _Record(cells, line, list(kept) if len(kept) > 1 else None)
            line = reader.line_num + first
            kept.clear()
    except csv.Error as error:
        raise Unreadable(_about_error(str(error), line, len(kept))) from None
    finally:
        csv.field_size_limit(before)


def _about_error(error: str, line: int, lines: int) -> str:
    if "expected after" in error or "unexpected end" in error:
        reach = f"runs to line {line + lines - 1}" if lines > 1 else "does not end at a delimiter"
        return f"a quotation mark that opens a cell in line {line} is not closed: the cell {reach}; {_CLOSE}"
    return f"line {line}: {error}"


def _read_rows(records: Iterator[_Record], delimiter: str, columns: Columns | None) -> _Rows:
    first = next(records, None)
    if first is None:
        raise Unreadable("is empty; expected a header line and rows")
    header = first.cells
    if header[0].lower().startswith("sep="):
        raise Unreadable(f"its first line, {header[0]!r}, names a delimiter; remove this line")
    others = [other for other in _DELIMITERS if other != delimiter and other in header[0]] if len(header) == 1 else []
    names = header if columns is None or others else check_columns(header, columns)
    places = range(len(header)) if names is header else [header.index(name) for name in names]
    rows = _Rows(header, names, [[] for _ in places], [])
    for record in records:
        if others and len(record.cells) > 1:
            raise _other_delimiter(others[0], delimiter)
        _check_record(record, header, delimiter)
        for cells, place in zip(rows.cells, places, strict=True):
            cells.append(record.cells[place])
        if record.lines is not None:
            rows.long.append(record)
    for other in others:
        if all(other in cell for cell in rows.cells[0]):
            raise _other_delimiter(other, delimiter)
    if columns is not None:
        check_columns(header, columns)
    return rows


def _other_delimiter(other: str, delimiter: str) -> Unreadable:
    here = _DELIMITERS[delimiter]
    usual = {",": "name it .csv", "\t": "name it .tsv"}.get(other, f"save it with {here}")
    return Unreadable(f"its cells are separated by {_DELIMITERS[other]}, expected {here}; {usual}")


def _check_record(record: _Record, header: Sequence[str], delimiter: str) -> None:
    if record.cells == header:
        raise Unreadable(f"line {record.line} repeats the header line; remove it")
    if len(record.cells) != len(header):
        quotes = f"; {record.about_quotes()}" if record.lines else ""
        raise Unreadable(
            f"line {record.line} has {len(record.cells)} cells, the header line has {len(header)}; a cell that holds a "
            f"{'tab' if delimiter == chr(9) else 'comma'} needs quotation marks around it{quotes}"
        )


def _swallowed(rows: _Rows, delimiter: str, label: str | None) -> _Swallowed | None:
    """The first cell over several lines that are rows of their own, as far as one can see."""
    if len(rows.header) < 2:
        return _in_one_column(rows)
    labels = None
    if label is not None:
        labels = LabelColumn.of(rows.header.index(label), rows.cells[rows.names.index(label)])
    doubtful = None
    for record in rows.long:
        assert record.lines is not None
        sure = looks_swallowed(record.lines, record.cells, delimiter, labels)
        if sure:
            return _Swallowed(record.about_quotes(), sure)
        if sure is not None:
            doubtful = doubtful or _Swallowed(record.about_quotes(), sure)
    return doubtful


def _in_one_column(rows: _Rows) -> _Swallowed | None:
    """The first cell over several lines, where most have one line: nothing but their number tells rows there."""
    few = rows.long and 2 * len(rows.long) < len(rows.cells[0])
    return _Swallowed(rows.long[0].about_quotes(), sure=False) if few and rows.cells else None


def _lines_as_rows(path: Path, delimiter: str, columns: Columns | None) -> _Rows | None:
    """Every line as one row with quotation marks as letters; None unless the file has tabs, as many in every line."""
    if delimiter != "\t":
        return None
    try:
        with closing(read_lines(path)) as lines:
            return _read_rows(_records(lines, delimiter, csv.QUOTE_NONE), delimiter, columns)
    except Unreadable:
        return None


def read_tab(path: Path, columns: Columns | None) -> pa.Table:
    """Read Orange's format: tab-separated, with three header lines: names, types, roles.

    Empty cells and question marks are null, except in columns of text.  Raises Unreadable.
    """
    with closing(read_lines(path)) as lines:
        names, types, roles = (next(lines, "").rstrip("\r\n").split("\t") for _ in range(3))
        if not len(names) == len(types) == len(roles):
            raise Unreadable(
                f"its three header lines (names, types, roles) have {len(names)}, {len(types)} and {len(roles)} columns"
            )
        # Some files end their headers with a line of empty cells.
        records = (record for record in _records(lines, "\t", first=4) if any(record.cells))
        rows = _read_rows(chain([_Record(names, 1, None)], records), "\t", columns)
    if swallowed := _swallowed(rows, "\t", columns.label if columns else None):
        swallowed.tell(path)
    table = rows.table()
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
