"""From the config's data section to tokenised training and evaluation rows."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from peerlora.config.data import DataConfig
from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import task_kind
from peerlora.data.chat_rows import read_chats
from peerlora.data.chat_tokens import chat_dataset
from peerlora.data.columns import Columns, is_text, refuse_objects, short
from peerlora.data.dataset import UNLEARNED, Dataset
from peerlora.data.files import EVAL_SPLIT, TRAIN_SPLIT, class_names, read_table
from peerlora.data.holdout import draw_holdout
from peerlora.data.image_files import read_images
from peerlora.data.images import ImageReader
from peerlora.data.label_checks import warn_of_labels, warn_of_owners
from peerlora.data.label_lists import as_indicators, read_label_lists
from peerlora.data.labels import Classes, class_ids, numbers, read_labels, training_classes
from peerlora.data.numerals import whole_number
from peerlora.data.pair_tokens import pair_dataset, read_pairs
from peerlora.data.roles import read_roles
from peerlora.data.row_names import row_name, with_files
from peerlora.data.tag_rows import TaggedRows, read_tagged, tagged_dataset
from peerlora.data.tokens import default_cache, tokenise
from peerlora.errors import DataError
from peerlora.randomness import numpy_generator


@dataclass(frozen=True)
class _Rows:
    """The rows of one source that are used, before they are tokenised."""

    source: str
    table: pa.Table
    labels: np.ndarray  # of all rows of the table; [row, label] where a row has several
    meaning: Classes | None  # None where labels are no classes
    chosen: np.ndarray  # row numbers, ascending
    roles: Mapping[str, pa.ChunkedArray] = field(default_factory=dict)  # columns by role, for kinds with forms
    tagged: TaggedRows | None = None  # words with their tags, of all rows of the table

    @property
    def names(self) -> tuple[str, ...]:
        return self.meaning.names if self.meaning else ()

    def classes(self) -> np.ndarray:
        """[chosen row] what "per class" means: without classes, all rows are one."""
        return (
            self.labels[self.chosen]
            if self.names and self.labels.ndim == 1
            else np.zeros(len(self.chosen), dtype=np.int64)
        )


def load_datasets(
    config: RunConfig, tokenizer: Any, cache: Path | Literal["default"] | None = "default"
) -> tuple[Dataset, Dataset]:
    """The training and the evaluation rows of a run, tokenised by a transformers tokenizer, or an ``ImageReader``'s.

    Every random choice depends on ``config.seed`` only. Labels get the same ids in both. Rows with nothing to
    predict (of causal-lm those with fewer than 2 tokens, of chat those without an answer, of words those of which none
    is a token) are left out, and a log line says how many.
    ``cache``: the folder for tokens; "default" is the user's cache folder, None keeps nothing.
    Raises DataError: missing files, columns, texts and labels; labels that do not fit the task. ConfigError: bad
    task.labels.
    """
    data = config.data
    train = _read(config, data.train, TRAIN_SPLIT, None)
    if data.eval is None:
        train, evaluation = _hold_out(train, data.holdout, config.seed)
    else:
        evaluation = _read(config, data.eval, EVAL_SPLIT, train)
    train = _at_most(train, data.train_per_class, config.seed, "rows per class of train")
    evaluation = _at_most(evaluation, data.eval_per_class, config.seed, "rows per class of eval")
    folder = default_cache() if cache == "default" else cache
    kept = _owner(config)
    return _tokenised(config, train, tokenizer, folder, kept), _tokenised(config, evaluation, tokenizer, folder, None)


def _read(config: RunConfig, source: str, split: str, train: _Rows | None) -> _Rows:
    """One source with its labels; ``train``: the training rows, None while these are read."""
    data, kind = config.data, task_kind(config.task.kind)
    label, owner = data.label if kind.has_label else None, _owner(config) if train is None else None
    if kind.forms and label is None:
        return _read_roles(config, source, split, train, owner)
    table, roles = _read_columns(config, source, split, label, owner)
    source = with_files(source, table)
    everything, place = np.arange(table.num_rows), partial(row_name, source)
    if label is None:
        return _Rows(source, table, np.zeros(table.num_rows, dtype=np.int64), None, everything)
    where, column = f"data.label={label} in {source}", table.column(label)
    if kind.target == "number":
        return _Rows(source, table, numbers(column, where, place), None, everything)
    if kind.target == "labels":
        wanted = train.meaning if train else config.task.labels
        several, classes = read_label_lists(column, class_names(table, label), wanted, where, place)
        return _Rows(source, table, as_indicators(several, len(classes.names)), classes, everything)
    labels = read_labels(column, class_names(table, label), where, place)
    classes = train.meaning if train else training_classes(labels, config.task.labels, where)
    assert classes is not None
    if len(classes.names) < 2:
        raise DataError(f"{where}: only one class, {short(''.join(classes.names))!r}; classification needs at least 2")
    ids = class_ids(labels, classes, where)
    warn_of_labels(labels, classes, ids, first=train is None, own_rows=config.partition.kind == "own", where=where)
    return _Rows(source, table, ids, classes, everything, roles)


def _read_columns(
    config: RunConfig, source: str, split: str, label: str | None, owner: str | None
) -> tuple[pa.Table, Mapping[str, pa.ChunkedArray]]:
    """The table of a source whose rows have a label, or none, and its columns with roles."""
    kind = task_kind(config.task.kind)
    if not kind.forms:
        return read_table(source, split, Columns(tuple(config.data.text), label, owner)), {}
    table, _, roles = read_roles(source, split, config.data.columns, kind, owner, label)
    return table, roles


def _read_roles(config: RunConfig, source: str, split: str, train: _Rows | None, owner: str | None) -> _Rows:
    """A source whose columns have roles; its rows have no class of their own."""
    table, names, roles = read_roles(source, split, config.data.columns, task_kind(config.task.kind), owner)
    source = with_files(source, table)
    nobody = np.zeros(table.num_rows, dtype=np.int64), np.arange(table.num_rows)
    if task_kind(config.task.kind).target != "tags":
        return _Rows(source, table, nobody[0], None, nobody[1], roles)
    wanted = train.meaning if train else config.task.labels
    tagged, meaning = read_tagged(roles, class_names(table, names["tags"]), wanted, source)
    return _Rows(source, table, nobody[0], meaning, nobody[1], roles, tagged)


def _owner(config: RunConfig) -> str | None:
    return config.partition.column if config.partition.kind == "column" else None


def _hold_out(rows: _Rows, share: float, seed: int) -> tuple[_Rows, _Rows]:
    """Set aside ``share`` of every class, at least one row in all; no class loses its last row."""
    classes = rows.classes()
    held = draw_holdout(classes, share, numpy_generator(seed, "holdout"))
    if not len(held):
        raise DataError(f"{rows.source}: too few rows to set some aside for evaluation; name a file in data.eval")
    kept = np.setdiff1d(np.arange(len(classes)), held)
    return _only(rows, kept), _only(rows, held)


def _at_most(rows: _Rows, limit: int | None, seed: int, purpose: str) -> _Rows:
    """A random subset of at most ``limit`` rows per class, in the old order."""
    if limit is None:
        return rows
    generator = numpy_generator(seed, purpose)
    classes = rows.classes()
    kept = [generator.permutation(np.flatnonzero(classes == label))[:limit] for label in np.unique(classes)]
    return _only(rows, np.sort(np.concatenate(kept)))


def _only(rows: _Rows, places: np.ndarray) -> _Rows:
    return replace(rows, chosen=rows.chosen[places])


def _tokenised(config: RunConfig, rows: _Rows, tokenizer: Any, cache: Path | None, kept: str | None) -> Dataset:
    data, kind = config.data, task_kind(config.task.kind)
    if kind.is_chat:
        return _chats(data, rows, tokenizer, kept)
    if kind.target == "text":
        found = pair_dataset(*read_pairs(rows.roles, rows.chosen, rows.source), data.max_length, tokenizer, rows.source)
        found = _without_short(found, rows, kind.tokens, drop=False)
        return _without_unlearned(replace(found, columns={kept: _values(rows, kept)} if kept else {}), rows)
    if kind.reads_images:
        found = _image_rows(rows, tokenizer)
        return replace(found, columns={kept: _values(rows, kept)} if kept else {})
    if rows.tagged is not None:
        found = tagged_dataset(rows.tagged, rows.chosen, rows.names, data.max_length, tokenizer, rows.source)
        return _without_unlearned(replace(found, columns={kept: _values(rows, kept)} if kept else {}), rows)
    texts = [_texts(rows, name) for name in data.text]
    predicts_tokens = kind.target == "tokens"
    tokens = tokenise(texts, tokenizer, data.max_length, predicts_tokens, cache)
    columns = {kept: _values(rows, kept)} if kept else {}
    found = Dataset(*tokens, labels=rows.labels[rows.chosen], names=rows.names, columns=columns)
    return _without_short(found, rows, kind.tokens, drop=predicts_tokens)


def _chats(data: DataConfig, rows: _Rows, tokenizer: Any, kept: str | None) -> Dataset:
    found = chat_dataset(data, read_chats(rows.roles, rows.chosen, rows.source), rows.chosen, rows.source, tokenizer)
    columns = {kept: _values(rows, kept)[found.labels]} if kept else {}
    return replace(found, labels=np.zeros(len(found), dtype=np.int64), columns=columns)


def _image_rows(rows: _Rows, reader: ImageReader) -> Dataset:
    images = read_images(rows.roles["image"], rows.chosen, rows.source)
    return reader.dataset(reader.read(images, len(rows.chosen), rows.source), rows.labels[rows.chosen], rows.names)


def _without_short(found: Dataset, rows: _Rows, least: int, drop: bool) -> Dataset:
    """Leave out, or refuse, rows of fewer than ``least`` tokens."""
    short = np.flatnonzero(found.lengths < least)
    if not len(short):
        return found
    first = f"{rows.source}: {len(short)} of {len(found)} rows have fewer than {least} tokens, the first is "
    first += row_name(rows.source, int(rows.chosen[short[0]]))
    if not drop:
        raise DataError(f"{first}; remove these rows")
    if len(short) == len(found):
        raise DataError(f"{first}; expected texts")
    logging.getLogger(__name__).warning("%s; they are left out", first)
    return found.take(np.setdiff1d(np.arange(len(found)), short))


def _without_unlearned(found: Dataset, rows: _Rows) -> Dataset:
    """Leave out rows without a token of which something is learned, whose mean loss would be no number."""
    assert found.targets is not None
    learned = np.concatenate([[0], np.cumsum(found.targets != UNLEARNED)])
    starts = found.starts if found.target_starts is None else found.target_starts
    empty = np.flatnonzero(np.diff(learned[starts]) == 0)
    if not len(empty):
        return found
    first = f"{rows.source}: {len(empty)} of {len(found)} rows have no token to learn, the first is "
    first += row_name(rows.source, int(rows.chosen[empty[0]]))
    if len(empty) == len(found):
        raise DataError(f"{first}; expected words that the base model's tokenizer knows")
    logging.getLogger(__name__).warning("%s; they are left out", first)
    return found.take(np.setdiff1d(np.arange(len(found)), empty))


def _texts(rows: _Rows, name: str) -> list[str]:
    column = rows.table.column(name)
    if not is_text(column.type):
        raise DataError(f"{rows.source}: data.text={name} holds {column.type}; expected text")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    _refuse_null(column, rows.source, f"data.text={name}")
    texts = column.take(pa.array(rows.chosen)).to_pylist()
    empty = [row for row, text in enumerate(texts) if not text.strip()]
    if empty:
        logging.getLogger(__name__).warning(
            "%s: data.text=%s is empty in %d of %d rows, the first is %s",
            *(rows.source, name, len(empty), len(texts), row_name(rows.source, int(rows.chosen[empty[0]]))),
        )
    return texts


def _values(rows: _Rows, name: str) -> np.ndarray:
    """A column as numbers where it holds numbers, or text that is all whole numbers; else as words."""
    column, where = rows.table.column(name), f"{rows.source}: partition.column={name}"
    refuse_objects(column.type, where)
    _refuse_null(column, rows.source, f"partition.column={name}")
    column = column.take(pa.array(rows.chosen))
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column.to_numpy()
    words = [str(value) for value in column.to_pylist()]
    empty = next((row for row, word in enumerate(words) if not word.strip()), None)
    if empty is not None:
        raise DataError(f"{where} is empty in {row_name(rows.source, int(rows.chosen[empty]))}; fill or remove the row")
    whole = [whole_number(word) for word in words]
    fits = all(number is not None and abs(number) < 2**63 for number in whole)
    if fits:
        return np.array(whole, dtype=np.int64)
    warn_of_owners(words, where)
    return np.array(words)


def _refuse_null(column: pa.ChunkedArray, source: str, what: str) -> None:
    if column.null_count:
        first = row_name(source, int(column.is_null().to_numpy().argmax()))
        raise DataError(
            f"{source}: {what} is missing in {column.null_count} of {len(column)} rows, the first is {first}; "
            "remove or fill these rows"
        )
