"""Cells over several lines that are rows of their own: a quotation mark that nobody closed has taken them in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peerlora.data.numerals import is_number


@dataclass(frozen=True)
class LabelColumn:
    """What the label column of a file is, by the rows that were read."""

    place: int
    """Its column."""
    known: frozenset[str]
    numeric: bool
    """Whether all are numbers."""

    @classmethod
    def of(cls, place: int, cells: Sequence[str]) -> LabelColumn:
        """Return the place of the label column and what the cells in it say."""
        known = frozenset(cells)
        return cls(place, known, all(map(is_number, known)))


def looks_swallowed(
    lines: Sequence[str], cells: Sequence[str], delimiter: str, labels: LabelColumn | None
) -> bool | None:
    """Whether the lines of one record are rows: True and False mean surely and perhaps, None that they are a text.

    A row that was taken in whole has as many cells as the record, and its label where that has its own.  Of the first
    and the last line, which may hold delimiters inside quotation marks, at least as many are expected.  ``labels``:
    None where no column is one.
    """
    split = [line.rstrip("\r\n").split(delimiter) for line in lines]
    first, *inner, last = split
    inner = [line for line in inner if any(cell.strip() for cell in line)]
    rows = [line for line in inner if len(line) == len(cells)]
    if min(len(first), len(last)) < len(cells) or (inner and 2 * len(rows) <= len(inner)):
        return None
    if labels is None:
        return False
    long = next((place for place, cell in enumerate(cells) if "\n" in cell or "\r" in cell), 0)
    if labels.place == long:  # no label runs over lines
        return len(rows) == len(inner) and len(first) == len(last) == len(cells)
    swallowed, its = (first, labels.place - len(cells)) if labels.place > long else (last, labels.place)
    words, end = [line[labels.place] for line in rows], swallowed[its]
    if labels.numeric:  # one line of a text may end in "4,5"
        return bool(rows) if all(map(is_number, [*words, end])) else None
    if not rows:
        return len(swallowed) == len(cells) if end in labels.known else None
    found = sum(word in labels.known for word in words)
    plain = all(word and word == word.strip() for word in (*words, end)) and not any(map(_is_prose, rows))
    if 2 * found > len(inner) or (found and plain and len(rows) == len(inner)):
        return True
    return False if plain else None


def _is_prose(cells: Sequence[str]) -> bool:
    """Whether blanks stand behind the delimiters, as behind the commas of a text."""
    return any(cell.startswith(" ") for cell in cells[1:])
