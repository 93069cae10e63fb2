"""Rows for served models whose columns have roles: chats to answer, words to tag."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from peerlora.config.task_kinds import TaskKind
from peerlora.data.chat_rows import ANSWER_ROLES, read_prompts
from peerlora.data.chat_template import ChatTemplate
from peerlora.data.dataset import UNLEARNED, Dataset
from peerlora.data.roles import read_roles
from peerlora.data.row_names import row_name, with_files
from peerlora.data.tag_rows import TaggedRows, check_words, tagged_dataset
from peerlora.errors import DataError

_EXPECTED = (*ANSWER_ROLES, "tags")
"""Roles of what a model is to say: needed to train, not to ask."""
_Value = TypeVar("_Value")


def read_asked(rows: str, kind: TaskKind, given: Mapping[str, str] | None) -> tuple[str, dict[str, pa.ChunkedArray]]:
    """Read a source: what messages call it, and by role the columns that a task's models need to answer its rows.

    ``given``: their names by role; None finds them by their usual names.  Raises DataError.
    """
    forms = tuple(replace(form, needed=_asked(form.needed), optional=_asked(form.optional)) for form in kind.forms)
    columns = None if given is None else _asked(given)
    if columns is not None and not any(form.fits(columns) for form in forms):
        wanted = "; or ".join(map(str, forms))
        raise DataError(
            f"{rows}: columns are to be {', '.join(columns) or 'none'}; task.kind={kind.name} wants {wanted}; mend "
            "columns in peerlora.json, or give --text NAME"
        )
    table, _, found = read_roles(rows, "train", columns, replace(kind, forms=forms), None)
    return with_files(rows, table), found


def _asked(roles: Mapping[str, _Value]) -> dict[str, _Value]:
    return {role: value for role, value in roles.items() if role not in _EXPECTED}


def render_prompts(rows: str, columns: dict[str, pa.ChunkedArray], tokenizer: Any) -> list[str]:
    """The text of every chat up to where its answer begins; an answer that a row of messages ends with is left out.

    Raises ConfigError for a tokenizer without a chat template, DataError for rows that are no chats.
    """
    template, everything = ChatTemplate(tokenizer, None), np.arange(len(next(iter(columns.values()))))
    chats = read_prompts(columns, everything, rows)
    return [template.render_prompt(chat, f"{rows}: {row_name(rows, number)}") for number, chat in enumerate(chats)]


def read_words(rows: str, columns: dict[str, pa.ChunkedArray]) -> list[list[str]]:
    """The words of every row.  Raises DataError for rows without a list of words."""
    words = columns["tokens"].to_pylist()
    for row, own in enumerate(words):
        check_words(own, f"{rows}: {row_name(rows, row)}")
    return words


def tokenise_words(
    rows: str, words: list[list[str]], tokenizer: Any, max_length: int
) -> tuple[Dataset, list[np.ndarray]]:
    """Tokenised words, and for each row the places of its tokens that stand for the words 0, 1, ... that it holds."""
    numbered = TaggedRows(words, [np.arange(len(own)) for own in words])
    data = tagged_dataset(numbered, np.arange(len(words)), (), max_length, tokenizer, rows)
    assert data.targets is not None
    own = [data.targets[start:end] for start, end in zip(data.starts[:-1], data.starts[1:], strict=True)]
    return data, [np.where(places != UNLEARNED, places, -1) for places in own]


def tell_tags(
    words: list[str], places: np.ndarray, predicted: np.ndarray, labels: tuple[str, ...]
) -> dict[str, list[str | None]]:
    """The words of one row with their tags, None for words that the model did not see.

    ``places``: by token the number of the word that begins there, or -1; ``predicted``: by token the id of its tag.
    """
    tags: list[str | None] = [None] * len(words)
    for token in np.flatnonzero(places >= 0).tolist():
        tags[places[token]] = labels[int(predicted[token])]
    return {"tokens": list(words), "tags": tags}


def warn_of_long_prompts(lengths: list[int], room: int, rows: str) -> None:
    """Say how many prompts lose their beginnings."""
    if long := [length for length in lengths if length > room]:
        logging.getLogger(__name__).warning(
            "%s: %d of %d prompts have more than %d tokens, the longest %d; their beginnings are cut off",
            *(rows, len(long), len(lengths), room, max(long)),
        )
