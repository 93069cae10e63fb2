"""Rows of words with a tag each -> token ids, with the tag on the first token of every word."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from peerlora.data.dataset import UNLEARNED, Dataset
from peerlora.data.label_lists import read_label_lists
from peerlora.data.labels import Classes, is_missing
from peerlora.data.numerals import is_number
from peerlora.data.row_names import row_name
from peerlora.data.tokens import CHUNK, require_places
from peerlora.errors import ConfigError, DataError, first_line


@dataclass(frozen=True)
class TaggedRows:
    """Words and the ids of their tags, row by row."""

    words: list[list[str]]
    tags: list[np.ndarray]
    """int64 [word] of each row"""


def read_tagged(
    columns: Mapping[str, pa.ChunkedArray],
    own_names: Sequence[str] | None,
    wanted: Classes | Sequence[str] | None,
    source: str,
) -> tuple[TaggedRows, Classes]:
    """The words and tags of all rows, and what the tags mean.

    ``own_names``: those that the file has for its numbers.  ``wanted``: the tags of the training rows, or
    ``task.labels``.  Raises DataError, naming the row: no list, no words, lengths that differ, an empty word or tag;
    and for tags that are not among those of the training rows.
    """
    words, tags = (columns[role].to_pylist() for role in ("tokens", "tags"))
    place = partial(row_name, source)
    for row, (own, theirs) in enumerate(zip(words, tags, strict=True)):
        _check_row(own, theirs, own_names, f"{source}: {place(row)}")
    where = f"tags in {source}"
    ids, classes = read_label_lists(columns["tags"], own_names, wanted, where, place)
    if not isinstance(wanted, Classes) and all(map(is_number, classes.names)):
        logging.getLogger(__name__).warning(
            "%s: tags are numbers without names, so each counts as an entity; name them in order in task.labels", where
        )
    return TaggedRows(words, ids), classes


def check_words(words: Any, where: str) -> None:
    """Raise DataError, naming the row ``where``, unless this is a list of words."""
    _check_list("tokens", words, where)
    if not words:
        raise DataError(f"{where}: has no words; remove the row")
    for place, word in enumerate(words, 1):
        if not isinstance(word, str) or not word.strip():
            raise DataError(f"{where}: token {place} is {word!r}; expected a word; correct the row")


def _check_list(name: str, cell: Any, where: str) -> None:
    if not isinstance(cell, list):
        given = "empty" if cell is None else f"a {type(cell).__name__}"
        raise DataError(f"{where}: {name} is {given}; expected a list with one item per word")


def _check_row(words: Any, tags: Any, own_names: Sequence[str] | None, where: str) -> None:
    check_words(words, where)
    _check_list("tags", tags, where)
    if len(words) != len(tags):
        raise DataError(f"{where}: {len(words)} tokens and {len(tags)} tags; expected one tag per token; correct it")
    for place, tag in enumerate(tags, 1):
        if is_missing(tag, own_names):
            raise DataError(f"{where}: token {place} has no tag ({tag!r}); correct the row")


def tagged_dataset(
    rows: TaggedRows, chosen: np.ndarray, names: tuple[str, ...], max_length: int, tokenizer: Any, source: str
) -> Dataset:
    """Tokenise rows of words, each cut to ``max_length`` tokens; a log line tells how many words lost their tag.

    Targets are the ids of tags, on the first token of each word.  Raises ModelError for a tokenizer that does not tell
    where its tokens lie.
    """
    require_places(tokenizer, "token-classification")
    ids, types, targets, lost = [], [], [], 0
    for at in range(0, len(chosen), CHUNK):
        numbers = chosen[at : at + CHUNK].tolist()
        found = _tokenised(tokenizer, [rows.words[number] for number in numbers], max_length)
        for place, number in enumerate(numbers):
            ids.append(np.array(found["input_ids"][place], dtype=np.int32))
            own = _on_first_tokens(rows.tags[number], found.word_ids(place))
            lost += len(rows.tags[number]) - int((own != UNLEARNED).sum())
            targets.append(own)
            if "token_type_ids" in found:
                types.append(np.array(found["token_type_ids"][place], dtype=np.uint8))
    if lost:
        logging.getLogger(__name__).warning(
            "%s: %d of %d words lie beyond data.max_length=%d tokens, or are no token at all; their tags are left out",
            *(source, lost, sum(len(rows.tags[number]) for number in chosen.tolist()), max_length),
        )
    starts = np.concatenate([[0], np.cumsum([len(own) for own in ids], dtype=np.int64)])
    kept = np.concatenate(types) if types else None
    labels = np.zeros(len(ids), dtype=np.int64)
    return Dataset(np.concatenate(ids), starts, kept, labels, names, targets=np.concatenate(targets))


def _tokenised(tokenizer: Any, words: list[list[str]], max_length: int) -> Any:
    try:
        return tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length, padding=False)
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"the base model's tokenizer does not take words one by one ({first_line(error)}); give a model whose "
            "tokenizer does, or one saved with add_prefix_space=true in tokenizer_config.json"
        ) from None


def _on_first_tokens(tags: np.ndarray, word_ids: Sequence[int | None]) -> np.ndarray:
    """int32 [token]: the tag of a word on its first token, UNLEARNED on others."""
    found = np.full(len(word_ids), UNLEARNED, dtype=np.int32)
    before = None
    for place, word in enumerate(word_ids):
        if word is not None and word != before:
            found[place] = tags[word]
        before = word
    return found
