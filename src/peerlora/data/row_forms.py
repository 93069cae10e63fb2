"""Rows that are no texts with a label: chats, instructions, pairs to choose from, files without a header line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from peerlora.config.task_kinds import CHAT_FORMS, TAG_FORMS
from peerlora.data.columns import is_text
from peerlora.data.numerals import is_number
from peerlora.data.roles import find_roles
from peerlora.errors import DataError

_ADVICE = (
    "training on them as such is not supported; give a column of text by --text, which trains on all of its tokens; or "
    "name a label by --label"
)
_FORMS = (  # what rows are; columns of the first tuple; and one of the second, if any
    ("answers to choose from", ("chosen", "rejected"), ()),
)
_PAIRS = (  # what rows are where the second column has too many values for a label
    ("questions with answers", ("question", "query", "input"), ("answer", "answers", "response", "output")),
    ("texts with translations or targets", ("source", "input"), ("target", "output")),
    ("texts with summaries", ("article", "document", "dialogue", "text"), ("summary", "highlights")),
)


def find_form(
    table: pa.Table, labels: Sequence[str], named: str | None, source: str
) -> tuple[str, dict[str, str]] | None:
    """``task.kind`` and columns by role where rows are words with tags, chats or questions with answers; else None.

    ``labels``: columns with few enough values for classes; ``named``: one with a label's usual name.  Raises DataError
    for rows of a form that no task reads.
    """
    names = {name.lower(): name for name in reversed(table.column_names)}
    for form, needed, others in _FORMS:
        found = [name for name in others if name in names]
        if all(name in names for name in needed) and (found or not others):
            _refuse(source, form, [names[name] for name in (*needed, *found[:1])])
    if tags := find_roles(table.column_names, TAG_FORMS):
        if all(_is_list(table.schema.field(name).type) for name in tags.values()):
            return "token-classification", tags
    roles = find_roles(table.column_names, CHAT_FORMS)
    if roles is not None and (roles.keys() & {"messages", "instruction"} or roles["prompt"].lower() == "prompt"):
        return "chat", roles
    pair = _find_pair(table, names, labels, source) if named is None else None
    return pair and ("chat", pair)


def _find_pair(table: pa.Table, names: Mapping[str, str], labels: Sequence[str], source: str) -> dict[str, str] | None:
    """Two columns, of which the second is to be written for the first, by names that mean something else as well."""
    for form, firsts, seconds in _PAIRS:
        first = next((names[name] for name in firsts if name in names), None)
        second = next((names[name] for name in seconds if name in names), None)
        if not first or not second or second in labels or _is_number(table.schema.field(second).type):
            continue
        if not all(is_text(table.schema.field(name).type) for name in (first, second)):
            _refuse(source, form, [first, second])
        return {"prompt": first, "completion": second}
    return None


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


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)
