"""Which columns of a table could be its label: by their names, types and numbers of different values."""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions while it is imported, so pyright cannot see them.

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from peerlora.config.task_kinds import TAG_FORMS, Target
from peerlora.data.columns import is_text
from peerlora.data.files import class_names
from peerlora.data.labels import MISSING_WORDS
from peerlora.data.numerals import is_number, whole_number

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
    r"(^|[_.])(id|ids|index|idx|split|fold|set|partition|site|hospital|client|source|origin|url|lang|language|locale"
    r"|country|date|time|year|month|day|author|user|version|verified|deleted|edited)($|[_.])"
)
FLAGS = (
    *({"yes", "no"}, {"true", "false"}, {"y", "n"}, {"t", "f"}, {"on", "off"}),
    *({"ja", "nein"}, {"j", "n"}, {"oui", "non"}, {"si", "no"}, {"s\u00ed", "no"}, {"sim", "n\u00e3o"}, {"ja", "nee"}),
)
_BITS = {"0", "1", "0.0", "1.0"}  # a flag only beside a column of more classes
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


def explain_label(table: pa.Table, label: str | None, usual: str | None, candidates: Sequence[Candidate]) -> str:
    """Say why this column is taken for the label, or none; ``usual``: one with a label's usual name."""
    if label is None:
        return "no column has few enough different values to be a label"
    if label == usual:
        return "labels usually have this name"
    if is_list_of_labels(table.schema.field(label).type):
        return "it is the only column of lists of labels"
    if len(candidates) == 1:
        return "no other column has so few different values"
    if _is_aside(table, label):
        return "no better column has so few different values"
    return "it has the fewest different values"


def with_numbers(table: pa.Table) -> pa.Table:
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


def plain_names(table: pa.Table) -> list[str]:
    """The columns that a config can name: those whose name is there once."""
    return [name for name in table.column_names if table.column_names.count(name) == 1]


def _by_usual_name(table: pa.Table) -> list[str]:
    """Columns, or fields of one, with a label's usual name and values that can be labels; the most usual name first."""
    names = plain_names(table)[::-1]
    by_name = {name.rpartition(".")[2].lower(): name for name in names} | {name.lower(): name for name in names}
    found = [by_name[word] for word in LABELS if word in by_name]
    return [name for name in found if _could_be_label(table, name)]


def find_named_label(table: pa.Table, text: Sequence[str], target: Target | None = None) -> str | None:
    """The column with the most usual name of a label, beside those of text; ``target``: what it is to hold."""
    return next((name for name in _by_usual_name(table) if name not in text and _suits(table, name, target)), None)


def _suits(table: pa.Table, name: str, target: Target | None) -> bool:
    """Whether a column can hold what a task's model predicts of a row; None: of some task."""
    kind = table.schema.field(name).type
    if target is None or is_list_of_labels(kind):
        return target in (None, "labels")
    return target == "class" or (target == "number" and is_number_type(kind))


def _could_be_label(table: pa.Table, name: str) -> bool:
    kind = table.schema.field(name).type
    if is_list_of_labels(kind):
        return 2 <= count_distinct(table, name) <= CLASSES
    if is_text(kind):
        return 2 <= count_distinct(table, name) <= max(CLASSES, table.num_rows // 4)
    return is_number_type(kind) and count_distinct(table, name) >= 2


def has_few_values(table: pa.Table, name: str) -> bool:
    """Whether a column has few enough different values to be classes."""
    kind = table.schema.field(name).type
    return (is_text(kind) or is_number_type(kind)) and 2 <= count_distinct(table, name) <= min(
        CLASSES, table.num_rows // 4
    )


def find_few_values(table: pa.Table, text: Sequence[str], target: Target | None = None) -> str | None:
    """The column with the fewest different values, of equals the last; then the only one of lists of labels.

    Those about rows, or of yes and no, come last.  ``target``: what the column is to hold.
    """
    names = [name for name in reversed(plain_names(table)) if name not in text and _suits(table, name, target)]
    found = [name for name in names if has_few_values(table, name)] + _lists_of_labels(table, names)
    order = {name: (_is_aside(table, name), _is_list(table, name), count_distinct(table, name)) for name in found}
    return min(order, key=order.__getitem__, default=None)


def _lists_of_labels(table: pa.Table, names: Sequence[str]) -> list[str]:
    """The only one of these columns that holds lists of labels, which come again; [] where there is none, or more."""
    words = TAG_FORMS[0].needed["tokens"]
    lists = [name for name in names if _is_list(table, name) and name.lower() not in words]
    found = [name for name in lists if _could_be_label(table, name)]
    again = [name for name in found if 2 * count_distinct(table, name) <= len(_plain(table, name))]
    return again if len(found) == 1 else []


def _is_list(table: pa.Table, name: str) -> bool:
    return is_list_of_labels(table.schema.field(name).type)


def _is_aside(table: pa.Table, name: str) -> bool:
    words = {str(word).strip().lower() for word in _values(table, name).to_pylist()} - MISSING_WORDS - {""}
    if ASIDE.search(name.lower()) or any(words <= flag for flag in FLAGS):
        return True
    return words <= _BITS and any(
        has_few_values(table, other) and count_distinct(table, other) > 2 and not ASIDE.search(other.lower())
        for other in plain_names(table)
    )


def label_candidates(table: pa.Table, text: Sequence[str], label: str | None) -> tuple[Candidate, ...]:
    """The columns that could be the label, ``label`` first."""
    others = [name for name in plain_names(table) if name not in text and name != label]
    found = [name for name in others if has_few_values(table, name)] + _lists_of_labels(table, others)
    return tuple(_candidate(table, name) for name in ([label] if label else []) + found)


def _candidate(table: pa.Table, name: str) -> Candidate:
    counted = sorted(pc.value_counts(_plain(table, name)).to_pylist(), key=lambda each: -each["counts"])
    known = class_names(table, name) or ()
    words = {
        known[value] if isinstance(value, int) and 0 <= value < len(known) else str(value): each["counts"]
        for each in counted[:5]
        for value in [each["values"]]
    }
    return Candidate(name, len(counted), words)


def _plain(table: pa.Table, name: str) -> pa.ChunkedArray:
    column = table.column(name)
    column = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    column = pc.list_flatten(column) if is_list_of_labels(column.type) else column
    return pc.drop_null(column)


def _values(table: pa.Table, name: str) -> pa.Array:
    return pc.unique(_plain(table, name))


def count_distinct(table: pa.Table, name: str) -> int:
    """How many different values a column has."""
    return len(_values(table, name))


def is_list_of_labels(kind: pa.DataType) -> bool:
    """Whether a column holds lists of words or of whole numbers."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    return is_text(kind.value_type) or pa.types.is_integer(kind.value_type)


def is_number_type(kind: pa.DataType) -> bool:
    """Whether a column of this type holds numbers, or true and false."""
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    return any(test(kind) for test in tests)
