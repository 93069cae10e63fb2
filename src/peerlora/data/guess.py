"""Guess from a table what it is for: its texts, its label, the task."""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions while it is imported, so pyright cannot see them.

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from peerlora.config.task_kinds import IMAGE_FORMS
from peerlora.data.columns import Columns, check_columns, is_text
from peerlora.data.files import class_names
from peerlora.data.image_files import IMAGE, LABEL, is_image_column
from peerlora.data.numerals import is_number, whole_number
from peerlora.data.roles import find_roles
from peerlora.data.row_forms import TOKENS_PER_WORD, find_form
from peerlora.data.text_files import Unreadable
from peerlora.errors import DataError

LABELS = (
    "label",
    "labels",
    "gold_label",
    "class",
    "category",
    "target",
    "topic",
    "intent",
    "sentiment",
    "polarity",
    "emotion",
    "stance",
    "diagnosis",
    "outcome",
    "stars",
    "star_rating",
    "score",
    "rating",
    "grade",
    "severity",
    "priority",
    "similarity",
    "categories",
    "topics",
    "genres",
    "y",
)
ASIDE = re.compile(  # columns about rows, which are labels only where there is no other
    r"(^|_)(id|ids|index|idx|split|fold|set|partition|site|hospital|client|source|origin|url|lang|language|locale"
    r"|country|date|time|year|month|day|author|user|version|verified|deleted|edited)($|_)"
)
FLAGS = ({"yes", "no"}, {"true", "false"}, {"y", "n"}, {"t", "f"})
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("query", "passage"),
)
NO_LABEL = "none"
CLASSES = 100  # more different labels than this are no classes, unless the file itself names them


@dataclass(frozen=True)
class Candidate:
    """A column that could be the label."""

    name: str
    different: int
    """How many different values it has."""
    counts: dict[str, int]
    """Rows of its most frequent values."""


@dataclass(frozen=True)
class Guess:
    """What a data file seems to be for."""

    text: list[str]
    """One column, or the two of a pair; of chats, those of ``columns``."""
    label: str | None
    kind: str
    """The ``task.kind``: classification, regression, multi-label, causal-lm, token-classification, chat or
    image-classification."""
    max_length: int
    """Tokens that hold nine texts out of ten."""
    clients: int
    reason: str = ""
    """Why this label, or none."""
    candidates: tuple[Candidate, ...] = ()
    """The columns that could be the label, the chosen one first."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column by role, of chats, of words with tags and of images."""


def guess_columns(table: pa.Table, source: str, label: str | None = None, text: Sequence[str] = ()) -> Guess:
    """Text, label and kind from the names, types and values of the columns; ``label`` and ``text``: what is known.

    A ``label`` of "none", where no column has this name, means that there is none.  Raises DataError where no column
    holds text, for columns that are not there, and for rows that no task reads.
    """
    unlabelled = label == NO_LABEL and NO_LABEL not in table.column_names
    given = None if unlabelled else label
    try:
        check_columns(table.column_names, Columns(tuple(text), given))
    except Unreadable as error:
        raise DataError(f"{source}: {error}") from None
    if not text and (image := _image_column(table)):
        return _guess_images(table, image, label, given, source)
    table = _with_numbers(table)
    usual = None if unlabelled else _named_label(table, text)
    if label is None and not text:
        few = [name for name in _plain_names(table) if _is_few(table, name)]
        if form := find_form(table, few, usual, source):
            texts, longest = [*form.columns.values()][:2], _rounded(form.tokens, 1024)
            return Guess(texts, None, form.kind, longest, _clients(table), form.reason, (), form.columns)
    found = list(text) or _text_columns(table, given or usual, source)
    chosen = None if unlabelled else given or usual or _few_values(table, found)
    kind = _kind(table, chosen) if chosen else "causal-lm"
    found = found if chosen or text else found[:1]
    candidates = _candidates(table, found, chosen)
    reason = "given by --label" if label is not None else _reason(table, chosen, usual, candidates)
    return Guess(found, chosen, kind, _max_length(table, found), _clients(table), reason, candidates)


def _image_column(table: pa.Table) -> str | None:
    """The column with images, by its usual name or else the only one; of files in folders, their paths."""
    names = [name for name in _plain_names(table) if is_image_column(table.schema.field(name).type)]
    usual = find_roles(names, IMAGE_FORMS)
    if table.column_names in ([IMAGE], [IMAGE, LABEL]) and is_text(table.schema.field(IMAGE).type):
        return IMAGE
    return usual["image"] if usual else names[0] if len(names) == 1 else None


def _guess_images(table: pa.Table, image: str, asked: str | None, label: str | None, source: str) -> Guess:
    """Classes of images: the label is the given one, or has a usual name, or few different values."""
    others = _with_numbers(table.drop_columns([image]))
    usual = _named_label(others, ())
    chosen = label or (None if asked == NO_LABEL else usual or _few_values(others, ()))
    if chosen is None or chosen == image:
        raise DataError(f"{source}: holds images in column {image} and no column for their classes; give --label NAME")
    candidates = _candidates(others, (), chosen)
    reason = "given by --label" if label is not None else _reason(others, chosen, usual, candidates)
    columns = {"image": image}
    return Guess([image], chosen, "image-classification", 64, _clients(table), reason, candidates, columns)


def _reason(table: pa.Table, label: str | None, usual: str | None, candidates: Sequence[Candidate]) -> str:
    if label is None:
        return "no column has few enough different values to be a label"
    if label == usual:
        return "labels usually have this name"
    if len(candidates) == 1:
        return "no other column has so few different values"
    if _is_aside(table, label):
        return "no better column has so few different values"
    return "it has the fewest different values"


def _with_numbers(table: pa.Table) -> pa.Table:
    """The table with columns of text as numbers where all cells are numbers, but not codes such as 007."""
    for place, each in enumerate(table.schema):
        if is_text(each.type) and not pa.types.is_dictionary(each.type):
            column = _numbers(table.column(place))
            table = table if column is None else table.set_column(place, each.name, column)
    return table


def _numbers(column: pa.ChunkedArray) -> pa.Array | None:
    cells = [cell or None for cell in column.to_pylist()]
    given = [cell for cell in cells if cell is not None]
    if not given or not all(is_number(cell) for cell in given):
        return None
    if all((number := whole_number(cell)) is not None and abs(number) < 2**63 for cell in given):
        return pa.array([cell and whole_number(cell) for cell in cells], pa.int64())
    if any(re.match(r"[+-]?0\d", cell) or cell.isdecimal() and len(cell) > 18 for cell in given):
        return None
    return pa.array([cell and float(cell) for cell in cells], pa.float64())


def _plain_names(table: pa.Table) -> list[str]:
    """The columns that a config can name: those whose name is there once."""
    return [name for name in table.column_names if table.column_names.count(name) == 1]


def _by_usual_name(table: pa.Table) -> list[str]:
    """Columns with a label's usual name and values that can be labels, the most usual name first."""
    by_name = {name.lower(): name for name in reversed(_plain_names(table))}
    found = [by_name[word] for word in LABELS if word in by_name]
    return [name for name in found if _could_be_label(table, name)]


def _named_label(table: pa.Table, text: Sequence[str]) -> str | None:
    return next((name for name in _by_usual_name(table) if name not in text), None)


def _could_be_label(table: pa.Table, name: str) -> bool:
    kind = table.schema.field(name).type
    if _is_list_of_labels(kind):
        return 2 <= _distinct(table, name) <= CLASSES
    if is_text(kind):
        return 2 <= _distinct(table, name) <= max(CLASSES, table.num_rows // 4)
    return _is_number(kind) and _distinct(table, name) >= 2


def _is_few(table: pa.Table, name: str) -> bool:
    """Whether a column has few enough different values to be classes."""
    kind = table.schema.field(name).type
    return (is_text(kind) or _is_number(kind)) and 2 <= _distinct(table, name) <= min(CLASSES, table.num_rows // 4)


def _few_values(table: pa.Table, text: Sequence[str]) -> str | None:
    """The column with the fewest different values, of equals the last; those about rows, or of yes and no, last."""
    few = [name for name in reversed(_plain_names(table)) if name not in text and _is_few(table, name)]
    return min(few, key=lambda name: (_is_aside(table, name), _distinct(table, name)), default=None)


def _is_aside(table: pa.Table, name: str) -> bool:
    words = {str(word).strip().lower() for word in _values(table, name).to_pylist()}
    return bool(ASIDE.search(name.lower())) or any(words <= flag for flag in FLAGS)


def _candidates(table: pa.Table, text: Sequence[str], label: str | None) -> tuple[Candidate, ...]:
    names = [name for name in _plain_names(table) if name not in text and name != label and _is_few(table, name)]
    return tuple(_candidate(table, name) for name in ([label] if label else []) + names)


def _candidate(table: pa.Table, name: str) -> Candidate:
    counted = sorted(pc.value_counts(_plain(table, name)).to_pylist(), key=lambda each: -each["counts"])
    known = class_names(table, name) or ()
    words = {
        known[value] if isinstance(value, int) and 0 <= value < len(known) else str(value): each["counts"]
        for each in counted[:5]
        for value in [each["values"]]
    }
    return Candidate(name, len(counted), words)


def _kind(table: pa.Table, label: str) -> str:
    column = table.column(label)
    if _is_list_of_labels(column.type):
        return "multi-label"
    if not _is_number(column.type) or pa.types.is_boolean(column.type) or class_names(table, label):
        return "classification"
    values = pc.cast(pc.drop_null(column), pa.float64())
    whole = pc.all(pc.equal(values, pc.floor(values))).as_py()
    return "classification" if whole and _distinct(table, label) <= CLASSES else "regression"


def _text_columns(table: pa.Table, label: str | None, source: str) -> list[str]:
    """The column with the longest texts; with its partner where their names say that they are a pair."""
    strings = [name for name in _plain_names(table) if name != label and is_text(table.column(name).type)]
    if not strings:
        shown = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
        raise DataError(
            f"{source}: no column holds text beside the label; expected at least one; its columns are {shown}"
        )
    pair = _pair(strings)
    longest = max(strings, key=lambda name: pc.mean(pc.utf8_length(_texts(table, name))).as_py() or 0)
    return pair if pair and longest in pair else [longest]


def _pair(strings: Sequence[str]) -> list[str] | None:
    by_name = {name.lower(): name for name in strings}
    numbered = [(one, re.sub("1$", "2", re.sub("a$", "b", one))) for one in by_name if re.search(r"(1|_a)$", one)]
    for first, second in (*PAIRS, *numbered):
        if first in by_name and second in by_name:
            return [by_name[first], by_name[second]]
    return None


def _max_length(table: pa.Table, text: Sequence[str]) -> int:
    """Tokens for nine rows out of ten, in steps of 16 from 16 to 256."""
    words = sum(pc.list_value_length(pc.utf8_split_whitespace(_texts(table, name))).to_numpy() for name in text)
    return _rounded(float(np.percentile(words, 90)) * TOKENS_PER_WORD, 256)


def _rounded(tokens: float, most: int) -> int:
    return min(most, max(16, math.ceil(tokens / 16) * 16))


def _clients(table: pa.Table) -> int:
    return max(2, min(10, table.num_rows // 8))


def _texts(table: pa.Table, name: str) -> pa.ChunkedArray:
    return pc.fill_null(pc.cast(table.column(name), pa.large_string()), "")


def _plain(table: pa.Table, name: str) -> pa.ChunkedArray:
    column = table.column(name)
    column = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    column = pc.list_flatten(column) if _is_list_of_labels(column.type) else column
    return pc.drop_null(column)


def _values(table: pa.Table, name: str) -> pa.Array:
    return pc.unique(_plain(table, name))


def _distinct(table: pa.Table, name: str) -> int:
    return len(_values(table, name))


def _is_list_of_labels(kind: pa.DataType) -> bool:
    """Whether a column holds lists of words or of whole numbers."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    return is_text(kind.value_type) or pa.types.is_integer(kind.value_type)


def _is_number(kind: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    return any(test(kind) for test in tests)
