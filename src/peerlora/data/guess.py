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

from peerlora.config.task_kinds import IMAGE_FORMS, TaskKind
from peerlora.data.columns import Columns, is_text, refuse_objects, select_columns
from peerlora.data.files import class_names
from peerlora.data.image_files import IMAGE, LABEL, SUFFIXES, holds_images, is_image_column
from peerlora.data.label_columns import (
    CLASSES,
    NO_LABEL,
    Candidate,
    count_distinct,
    explain_label,
    find_few_values,
    find_named_label,
    has_few_values,
    is_list_of_labels,
    is_number_type,
    label_candidates,
    plain_names,
    with_numbers,
)
from peerlora.data.roles import find_roles, no_columns
from peerlora.data.row_forms import TOKENS_PER_WORD, RowForm, find_form, find_form_for
from peerlora.data.text_files import Unreadable
from peerlora.errors import DataError

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("query", "passage"),
)


_LOOKED_AT = 10  # cells
_TEXT = 2  # words on average, of a column that is a text rather than a number or a name


@dataclass(frozen=True)
class Guess:
    """What a data file seems to be for."""

    text: list[str]
    """One column, or the two of a pair; of chats, those of ``columns``."""
    label: str | None
    kind: str
    """The ``task.kind``."""
    max_length: int
    """Tokens that hold nine texts out of ten."""
    clients: int
    reason: str = ""
    """Why this label, or none."""
    candidates: tuple[Candidate, ...] = ()
    """The columns that could be the label, the chosen one first."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column by role, of chats, of words with tags and of images."""


def guess_columns(
    table: pa.Table,
    source: str,
    label: str | None = None,
    text: Sequence[str] = (),
    task: TaskKind | None = None,
    writes: bool = False,
) -> Guess:
    """Text, label and kind from the names, types and values of the columns.

    ``label``, ``text`` and ``task``: what is known.  A ``label`` of "none", where no column has this name, means that
    there is none.  ``writes``: whether the model has an encoder and a decoder.  Raises DataError where no column holds
    text, for columns that are not there, and for rows that no task reads, or not this one.
    """
    unlabelled = (label == NO_LABEL and NO_LABEL not in table.column_names) or (task and not task.has_label)
    given, target = (None if unlabelled else label), task.target if task else None
    try:
        asked = select_columns(table, Columns(tuple(text), given))
    except Unreadable as error:
        raise DataError(f"{source}: {error}") from None
    if given is not None and not is_list_of_labels(kind := asked.schema.field(given).type):
        refuse_objects(kind, f"{source}: data.label={given}", "a word or a whole number per row, or a list of such")
    if not text and (task is None or task.reads_images) and (image := _image_column(table, source)):
        return _guess_images(table, image, label, given, source)
    if task and task.reads_images:
        raise DataError(f"{source}: {no_columns(table.column_names, task)}")
    as_read, table = table, with_numbers(table)
    usual = None if unlabelled else find_named_label(table, text, target)
    few = [name for name in plain_names(table) if has_few_values(table, name)]
    if form := _find_form(as_read, few, usual, source, task, writes) if label is None and not text else None:
        texts, longest = [*form.columns.values()][:2], _rounded(form.tokens, 1024)
        return Guess(texts, None, form.kind, longest, _clients(table), form.reason, (), form.columns)
    found = list(text) or _text_columns(table, given or usual, source)
    chosen = None if unlabelled else given or usual or find_few_values(table, found, target)
    if chosen is None and task and task.has_label:
        raise DataError(f"{source}: has no column that could be the label of task.kind={task.name}; give --label NAME")
    kind = task.name if task else _kind(table, chosen) if chosen else "causal-lm"
    found = found if chosen or text else found[:1]
    candidates = label_candidates(table, found, chosen)
    reason = "given by --label" if label is not None else explain_label(table, chosen, usual, candidates)
    reason += _about_unread(table, found) if chosen is None and label is None and not text else ""
    reason = f"--task {task.name} has none" if task and not task.has_label else reason
    return Guess(found, chosen, kind, _max_length(table, found), _clients(table), reason, candidates)


def _find_form(
    table: pa.Table, few: Sequence[str], usual: str | None, source: str, task: TaskKind | None, writes: bool
) -> RowForm | None:
    """The form of rows that are no texts with a label, in the table as a run reads it, where numbers may be texts.

    ``few``: columns with few enough values for classes; ``usual``: one with a label's usual name.
    """
    if task is None:
        return find_form(table, few, usual, source, writes)
    return find_form_for(task, table, source) if task.forms else None


def _image_column(table: pa.Table, source: str) -> str | None:
    """The column with images, by its usual name or else the only one; of files in folders, their paths.

    Raises DataError for a table of paths, which are followed nowhere else.
    """
    names = [name for name in plain_names(table) if is_image_column(table.schema.field(name).type)]
    usual = find_roles(names, IMAGE_FORMS)
    if table.column_names in ([IMAGE], [IMAGE, LABEL]) and is_text(table.schema.field(IMAGE).type):
        if source.startswith("folder:"):
            return IMAGE
        cells = [str(cell) for cell in table.column(IMAGE)[:_LOOKED_AT]]
        if all(cell.lower().endswith(SUFFIXES) for cell in cells):
            raise DataError(
                f"{source}: holds paths of images ({cells[0]}), which are not followed; put the images into a folder "
                "for each class and give folder:PATH, or write their bytes into a parquet file"
            )
    if usual:
        return usual["image"]
    return names[0] if len(names) == 1 and holds_images(table.column(names[0])) else None


def _guess_images(table: pa.Table, image: str, asked: str | None, label: str | None, source: str) -> Guess:
    """Classes of images: the label is the given one, or has a usual name, or few different values."""
    others = with_numbers(table.drop_columns([image]))
    usual = find_named_label(others, ())
    chosen = label or (None if asked == NO_LABEL else usual or find_few_values(others, ()))
    if chosen is None or chosen not in others.column_names:
        raise DataError(f"{source}: holds images in column {image} and no column for their classes; give --label NAME")
    if (kind := _kind(others, chosen)) != "classification":
        raise DataError(
            f"{source}: holds images in column {image}, and {chosen} is for {kind}; expected one class for each image: "
            "name such a column by --label"
        )
    candidates = label_candidates(others, (), chosen)
    reason = "given by --label" if label is not None else explain_label(others, chosen, usual, candidates)
    columns = {"image": image}
    return Guess([image], chosen, "image-classification", 64, _clients(table), reason, candidates, columns)


def _kind(table: pa.Table, label: str) -> str:
    column = table.column(label)
    if is_list_of_labels(column.type):
        return "multi-label"
    if not is_number_type(column.type) or pa.types.is_boolean(column.type) or class_names(table, label):
        return "classification"
    whole = pa.types.is_integer(column.type)  # of which float64 cannot hold all
    if not whole:
        values = pc.cast(pc.drop_null(column), pa.float64())
        whole = pc.all(pc.equal(values, pc.floor(values))).as_py()
    return "classification" if whole and count_distinct(table, label) <= CLASSES else "regression"


def _text_columns(table: pa.Table, label: str | None, source: str) -> list[str]:
    """The column with the longest texts; with its partner where their names say that they are a pair."""
    strings = [name for name in plain_names(table) if name != label and is_text(table.column(name).type)]
    if not strings:
        shown = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
        raise DataError(
            f"{source}: no column holds text beside the label; expected at least one; its columns are {shown}"
        )
    pair = _pair(strings)
    longest = max(strings, key=lambda name: pc.mean(pc.utf8_length(_texts(table, name))).as_py() or 0)
    return pair if pair and longest in pair else [longest]


def _about_unread(table: pa.Table, found: Sequence[str]) -> str:
    """What to add where no label is found and other columns hold texts: these may be what is to be written."""
    others = [name for name in plain_names(table) if name not in found and is_text(table.column(name).type)]
    texts = [name for name in others if (pc.mean(_words(table, name)).as_py() or 0) >= _TEXT]
    if not texts:
        return ""
    return (
        f"; {', '.join(texts)}: texts, too, and not read: where one is to be written for the other, set task.kind=chat "
        f"and data.columns={{prompt: {found[0]}, completion: {texts[0]}}}"
    )


def _words(table: pa.Table, name: str) -> pa.ChunkedArray:
    """How many words stand in each row."""
    return pc.list_value_length(pc.utf8_split_whitespace(_texts(table, name)))


def _pair(strings: Sequence[str]) -> list[str] | None:
    by_name = {name.lower(): name for name in strings}
    numbered = [(one, re.sub("1$", "2", re.sub("a$", "b", one))) for one in by_name if re.search(r"(1|_a)$", one)]
    for first, second in (*PAIRS, *numbered):
        if first in by_name and second in by_name:
            return [by_name[first], by_name[second]]
    return None


def _max_length(table: pa.Table, text: Sequence[str]) -> int:
    """Tokens for nine rows out of ten, in steps of 16 from 16 to 256."""
    words = sum(_words(table, name).to_numpy() for name in text)
    return _rounded(float(np.percentile(words, 90)) * TOKENS_PER_WORD, 256)


def _rounded(tokens: float, most: int) -> int:
    return min(most, max(16, math.ceil(tokens / 16) * 16))


def _clients(table: pa.Table) -> int:
    return max(2, min(10, table.num_rows // 8))


def _texts(table: pa.Table, name: str) -> pa.ChunkedArray:
    return pc.fill_null(pc.cast(table.column(name), pa.large_string()), "")
