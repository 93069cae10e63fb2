"""Columns by their roles, for rows that are no texts with a label: chats, instructions, words with tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from peerlora.config.task_kinds import Form, Names, TaskKind
from peerlora.data.columns import Columns, select_columns, shown
from peerlora.data.files import read_table
from peerlora.data.text_files import Unreadable
from peerlora.errors import DataError


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
    if given is not None:
        table = read_table(source, split, Columns(label=label, roles=tuple(given.values()), owner=owner))
        return table, given, {role: table.column(name) for role, name in given.items()}
    table = read_table(source, split)
    found = find_roles_for(kind, table.column_names, source)
    if found is None:
        raise DataError(f"{source}: {no_columns(table.column_names, kind)}")
    try:
        table = select_columns(table, Columns(label=label, roles=tuple(found.values()), owner=owner))
    except Unreadable as error:
        raise DataError(f"{source}: {error}") from None
    return table, found, {role: table.column(name) for role, name in found.items()}


def find_roles(names: Sequence[str], forms: Sequence[Form]) -> dict[str, str] | None:
    """The columns by role of the first form whose needed columns are there by their usual names, in any case."""
    for form in forms:
        found = add_roles(add_roles({}, form.needed, names), form.optional, names)
        if form.fits(found):
            return found
    return None


def add_roles(roles: Mapping[str, str], usual: Names, names: Sequence[str]) -> dict[str, str]:
    """The columns by role with those of further roles that are there by their usual names, in any case."""
    there = {name.lower(): name for name in reversed(names) if list(names).count(name) == 1}
    found = dict(roles)
    for role, words in usual.items():
        name = next((there[word] for word in words if word in there and there[word] not in found.values()), None)
        if name is not None:
            found[role] = name
    return found


def find_roles_for(kind: TaskKind, names: Sequence[str], source: str) -> dict[str, str] | None:
    """`find_roles` of a kind of task.  Raises DataError for columns that hold more of its rows and are not read."""
    found = find_roles(names, kind.forms)
    if found is not None:
        form = next(form for form in kind.forms if form.fits(found))
        check_pair(found, [name for name in names if name.lower() in form.unread], source)
    return found


def check_pair(roles: Mapping[str, str], others: Sequence[str], source: str) -> None:
    """Raise DataError where rows of prompts and completions have ``others``, columns that nothing would read."""
    others = [name for name in others if name not in roles.values()]
    if others:
        columns = ", ".join([*roles.values(), *others])
        raise DataError(
            f"{source}: rows are chats, by {columns}; task.kind=sequence-to-sequence reads one prompt and its "
            "completion: write them into two columns, name the two in data.columns, or give a model that decodes only"
        )


def no_columns(names: Sequence[str], kind: TaskKind) -> str:
    """What to say where a table of these columns has none for a kind of task."""
    wanted = "; or ".join(str(form) for form in kind.forms)
    return (
        f"has no columns for task.kind={kind.name}; expected {wanted}; its columns are {shown(names)}; name yours in "
        f"data.columns, e.g. {_example(kind.forms[-1])}"
    )


def _example(form: Form) -> str:
    return "{" + ", ".join(f"{role}: NAME" for role in form.needed) + "}"
