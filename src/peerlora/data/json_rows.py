"""Rows of JSONL files and of JSON arrays."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from peerlora.data.columns import Columns, check_columns
from peerlora.data.text_files import Unreadable, read_lines

_WORDS = {str: "text", bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list"}


def read_json(path: Path, columns: Columns | None) -> pa.Table:
    """Read one object per line, or one array of objects, into columns; a key that a row lacks is null.

    Only ``columns`` are looked at, so others may hold anything; without ``columns`` those of one type are kept.
    Raises Unreadable, naming the line or the row.
    """
    needed = None if columns is None else columns.keys()
    seen: dict[str, None] = {}
    rows = []
    for row in _rows(read_lines(path)):
        if not row.keys() <= seen.keys():
            seen.update(dict.fromkeys(row))
        rows.append(row if needed is None else {name: row.get(name) for name in needed})
    if not rows:
        raise Unreadable("has no rows; expected at least one")
    names = [*seen] if columns is None else check_columns([*seen], columns)
    cells = {name: [row.get(name) for row in rows] for name in names}
    mixed = {name: flaw for name in names if (flaw := _flaw(cells[name]))}
    if mixed and columns is not None:
        raise Unreadable("; ".join(f"column {name}: {flaw}" for name, flaw in mixed.items()))
    for name, flaw in mixed.items():
        logging.getLogger(__name__).warning("%s: column %s is not looked at: %s", path, name, flaw)
    return pa.table({name: _array(cells[name]) for name in names if name not in mixed})


def _rows(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    filled = ((number, line) for number, line in enumerate(lines, 1) if not line.isspace())
    for place, (number, line) in enumerate(filled):
        if place == 0 and line.lstrip().startswith("["):
            whole = "".join([line, *lines])
            for row, found in enumerate(_parsed(whole, f"the array that begins in line {number}"), 1):
                yield _checked(found, f"row {row}")
            return
        yield _checked(_parsed(line, f"line {number}"), f"line {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise Unreadable(f"{where} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise Unreadable(
            f"{where} is not valid JSON: {error.msg} (column {error.colno}); expected one object per line, or one "
            "array of objects"
        ) from None
    except ValueError as error:  # a key that is there twice, or a number of thousands of digits
        raise Unreadable(f"{where}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _checked(row: Any, where: str) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    raise Unreadable(f'{where} is {_WORDS.get(type(row), "null")}; expected an object such as {{"text": ...}}')


def _flaw(cells: Sequence[Any]) -> str | None:
    """Where a column's values are of more than one kind; null for none.  Whole and other numbers are one kind."""
    kinds = [_WORDS.get(type(cell)) for cell in cells]
    first = next((kind for kind in kinds if kind), None)
    other = next((row for row, kind in enumerate(kinds) if kind and kind != first), None)
    if other is not None:
        return f"row {other + 1} is {kinds[other]} ({_short(cells[other])}), rows before it are {first}"
    if first in ("an object", "a list"):
        try:
            pa.array(cells)
        except (pa.ArrowException, OverflowError) as error:
            return str(error).splitlines()[0]
    return None


def _array(cells: Sequence[Any]) -> pa.Array:
    """Whole numbers that do not fit 64 bits become text, so that no two of them are taken for one."""
    if any(isinstance(cell, str) for cell in cells):
        return pa.array(cells, pa.large_string())
    if any(isinstance(cell, int) and not -(2**63) <= cell < 2**63 for cell in cells):
        return pa.array([_text(cell) for cell in cells], pa.large_string())
    return pa.array(cells)


def _text(cell: int | float | None) -> str | None:
    return None if cell is None else str(cell)


def _short(cell: Any) -> str:
    text = repr(cell)
    return text if len(text) <= 40 else f"{text[:40]}..."
