"""Rows that are no texts with a label: chats, instructions, pairs to choose from, files without a header line."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from peerlora.data.columns import is_text
from peerlora.data.numerals import is_number
from peerlora.errors import DataError

_ADVICE = (
    "training on chats, or on answers alone, is not supported; write each row as one text (docs/data.md shows how) and "
    "give its column by --text, which trains on all of its tokens; or name a label by --label"
)
_ANSWERS = ("output", "response", "answer", "completion", "chosen")
_FORMS = (  # what rows are; columns of the first tuple; and one of the second, if any
    ("chats", ("messages",), ()),
    ("chats", ("conversations",), ()),
    ("chats", ("conversation",), ()),
    ("answers to choose from", ("chosen", "rejected"), ()),
    ("instructions with answers", ("instruction",), _ANSWERS),
    ("prompts with answers", ("prompt",), _ANSWERS),
    ("words with a label each", ("tokens",), ("ner_tags", "pos_tags", "tags", "labels")),
)
_PAIRS = (  # the same where the second column has too many values for a label
    ("questions with answers", ("question", "query", "input"), ("answer", "answers", "response", "output")),
    ("texts with translations or targets", ("source", "input"), ("target", "output")),
    ("texts with summaries", ("article", "document", "dialogue", "text"), ("summary", "highlights")),
)


def refuse_other_rows(table: pa.Table, labels: Sequence[str], named: str | None, source: str) -> None:
    """Raise DataError for rows of a form that no task reads.

    ``labels``: columns with few enough values for classes; ``named``: one with a label's usual name.
    """
    names = {name.lower(): name for name in reversed(table.column_names)}
    for form, needed, answers in _FORMS:
        found = [name for name in answers if name in names]
        if all(name in names for name in needed) and (found or not answers):
            _refuse(source, form, [names[name] for name in (*needed, *found[:1])])
    for form, firsts, seconds in _PAIRS if named is None else ():
        first = next((names[name] for name in firsts if name in names), None)
        second = next((names[name] for name in seconds if name in names), None)
        numbers = second is not None and _is_number(table.schema.field(second).type)
        if first and second and second not in labels and not numbers:
            _refuse(source, form, [first, second])


def refuse_missing_header(table: pa.Table, source: str) -> None:
    """Raise DataError where the header line of a CSV file is a row: its cells occur, or are numbers, like those below.

    ``table``: all columns as text.
    """
    names = [name for name in table.column_names if name.strip()]
    if names == [str(place) for place in range(len(names))]:  # as pandas numbers columns without names
        return
    for name, column in zip(table.column_names, table.columns, strict=True):
        cells = column.to_pylist() if name.strip() and is_text(column.type) else []
        if name in cells or (is_number(name) and cells and all(map(is_number, cells))):
            raise DataError(
                f"{source}: the first line is a row like the others ({name!r} is such a cell); expected a header line, "
                "such as text,label; add one"
            )


def _refuse(source: str, form: str, columns: Sequence[str]) -> None:
    raise DataError(f"{source}: rows are {form} (columns {', '.join(columns)}); {_ADVICE}")


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)
