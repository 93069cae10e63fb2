"""Columns by their roles, for rows that are no texts with a label: chats, instructions, words with tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from peerlora.config.task_kinds import Form, TaskKind
from peerlora.data.columns import Columns, check_columns, shown
from peerlora.data.files import read_table
from peerlora.data.text_files import Unreadable
from peerlora.errors import DataError, nearest


def read_roles(
    source: str,
    split: str,
    given: Mapping[str, str] | None,
    kind: TaskKind,
    owner: str | None,
    label: str | None = None,
) -> tuple[pa.Table, Mapping[str, str], dict[str, pa.ChunkedArray]]:
    """Read a source: its table, and by role the names of its columns and the columns.

    ``given``: ``data.columns``, None to find the columns by their usual names; a name with dots is a field inside a
    column of objects.  ``owner``, ``label``: as in ``Columns``.  Raises DataError, also where no form of ``kind`` fits.
    """
    if source.startswith("folder:") and not kind.reads_images:  # paths of files are no texts
        raise DataError(f"{source}: holds images; task.kind={kind.name} reads none, use task.kind=image-classification")
    plain = [name for name in (given or {}).values() if "." not in name]
    if given is not None and len(plain) == len(given):
        table = read_table(source, split, Columns(label=label, roles=tuple(plain), owner=owner))
    else:
        table = read_table(source, split)
        _require(source, table.column_names, Columns(label=label, owner=owner))
    found = given if given is not None else find_roles(table.column_names, kind.forms)
    if found is None:
        wanted = "; or ".join(str(form) for form in kind.forms)
        raise DataError(
            f"{source}: has no columns for task.kind={kind.name}; expected {wanted}; its columns are "
            f"{shown(table.column_names)}; name yours in data.columns, e.g. {_example(kind.forms[-1])}"
        )
    return table, found, {role: _column(source, table, name) for role, name in found.items()}


def find_roles(names: Sequence[str], forms: Sequence[Form]) -> dict[str, str] | None:
    """The columns by role of the first form whose needed columns are there by their usual names, in any case."""
    there = {name.lower(): name for name in reversed(names) if list(names).count(name) == 1}
    for form in forms:
        usual = {**form.needed, **form.optional}
        found: dict[str, str] = {}
        for role, words in usual.items():
            name = next((there[word] for word in words if word in there and there[word] not in found.values()), None)
            if name is not None:
                found[role] = name
        if form.fits(found):
            return found
    return None


def _example(form: Form) -> str:
    return "{" + ", ".join(f"{role}: NAME" for role in form.needed) + "}"


def _require(source: str, names: Sequence[str], columns: Columns) -> None:
    try:
        check_columns(names, columns)
    except Unreadable as error:
        raise DataError(f"{source}: {error}") from None


def _column(source: str, table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column, or a field inside a column of objects, whose names are joined by dots."""
    first, _, path = (name, "", "") if name in table.column_names else name.partition(".")
    if first not in table.column_names:
        raise DataError(
            f"{source}: has no column {first!r} for data.columns{nearest(first, table.column_names)}; its columns are "
            f"{shown(table.column_names)}"
        )
    column = table.column(first)
    for part in path.split(".") if path else ():
        if not pa.types.is_struct(column.type) or column.type.get_field_index(part) < 0:
            raise DataError(f"{source}: data.columns={name}: there is no field {part!r} in {column.type}; correct it")
        column = pc.struct_field(column, part)  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    return column
