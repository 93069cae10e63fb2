"""The columns of a table that a config names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from peerlora.data.text_files import Unreadable
from peerlora.errors import DataError, nearest

_LONGEST = 80  # letters of a name in a message


@dataclass(frozen=True)
class Columns:
    """The columns that are needed of a source; others may hold anything."""

    text: tuple[str, ...] = ()
    """``data.text``"""
    label: str | None = None
    """``data.label``, where the task has one"""
    owner: str | None = None
    """``partition.column``, where rows are divided by it"""
    roles: tuple[str, ...] = ()
    """Those of ``data.columns``, or found by their usual names"""

    def settings(self) -> dict[str, str]:
        """By column the setting that names it."""
        others = {self.label: "data.label", self.owner: "partition.column"}
        named = {name: word for name, word in others.items() if name is not None}
        return named | dict.fromkeys(self.roles, "data.columns") | dict.fromkeys(self.text, "data.text")

    def keys(self) -> list[str]:
        """What the columns of a file are called that may hold these: their names, or the first parts of these."""
        return list(dict.fromkeys(each for name in self.settings() for each in (name, name.partition(".")[0])))


def check_columns(names: Sequence[str], columns: Columns) -> list[str]:
    """The needed ones among the ``names`` of a table; of a field inside a column of objects that column.

    Raises Unreadable for one that is not there, or more than once.
    """
    found = {name: name if name in names else name.partition(".")[0] for name in columns.settings()}
    for name, setting in reversed(columns.settings().items()):
        count = list(names).count(found[name])
        if count > 1:
            raise Unreadable(f"has {count} columns named {found[name]!r}; rename all but one")
        if not count:
            raise Unreadable(
                f"has no column {name!r} for {setting}{nearest(name, names)}; its columns are {shown(names)}"
            )
    return list(dict.fromkeys(found.values()))


def select_columns(table: pa.Table, columns: Columns) -> pa.Table:
    """A table of the needed columns; fields inside columns of objects, named with dots, are columns of their own.

    Raises Unreadable for one that is not there, or more than once.
    """
    check_columns(table.column_names, columns)
    found = {name: _find_column(table, name, setting) for name, setting in columns.settings().items()}
    return pa.table(found, metadata=table.schema.metadata)


def _find_column(table: pa.Table, name: str, setting: str) -> pa.ChunkedArray:
    if name in table.column_names:
        return table.column(name)
    first, _, path = name.partition(".")
    column = table.column(first)
    for part in path.split("."):
        if not pa.types.is_struct(column.type) or column.type.get_field_index(part) < 0:
            fields = [each.name for each in column.type] if pa.types.is_struct(column.type) else []
            inside = f"its fields are {shown(fields)}" if fields else f"it holds {column.type}, no objects"
            raise Unreadable(f"has no field {part!r} for {setting}={name}: {inside}; correct the name")
        column = pc.struct_field(column, part)  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    return column


def with_fields(table: pa.Table, whole: Callable[[pa.DataType], bool]) -> pa.Table:
    """The table with a column for each field of its columns of objects, named with dots.

    ``whole``: whether a column of this type stays as it is.
    """
    found: list[tuple[str, pa.ChunkedArray]] = []
    left = list(zip(table.column_names, table.columns, strict=True))[::-1]
    while left:
        name, column = left.pop()
        if not pa.types.is_struct(column.type) or whole(column.type):
            found.append((name, column))
            continue
        fields = [field.name for field in column.type]
        left += [
            (f"{name}.{field}", pc.struct_field(column, [place]))  # pyright: ignore[reportAttributeAccessIssue]
            for place, field in reversed(list(enumerate(fields)))
        ]
    names, columns = [name for name, _ in found], [column for _, column in found]
    return pa.Table.from_arrays(columns, names=names, metadata=table.schema.metadata)


def shown(names: Sequence[str], most: int = 20) -> str:
    """Some names, cut to what a message can hold."""
    words = ", ".join(short(name) for name in names[:most])
    return words if len(names) <= most else f"{words} and {len(names) - most} more"


def short(name: str) -> str:
    """A name as it stands, unless it is very long."""
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text; a dictionary of texts does."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def refuse_objects(kind: pa.DataType, where: str, expected: str = "one word or whole number per row") -> None:
    """Raise DataError for a column of lists, objects or bytes, such as images: it has no word or number per row."""
    if pa.types.is_nested(kind) or is_binary(kind):
        raise DataError(f"{where}: holds {kind}; expected {expected}; name another column")


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes."""
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def without_views(table: pa.Table) -> pa.Table:
    """The table with string views as plain strings, which all functions of pyarrow know."""
    for place, field in enumerate(table.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_string_view(kind):
            column = table.column(place)
            if pa.types.is_dictionary(field.type):
                column = pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], kind)
            table = table.set_column(place, field.name, column.cast(pa.large_string()))
    return table
