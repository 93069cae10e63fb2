"""From the config's data section to tokenised training and evaluation rows."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import task_kind
from peerlora.data.dataset import Dataset
from peerlora.data.files import class_names, read_table
from peerlora.data.labels import Classes, class_ids, collected_classes, declared_classes, numbers
from peerlora.data.tokens import default_cache, tokenise
from peerlora.errors import DataError, nearest
from peerlora.randomness import numpy_generator


@dataclass(frozen=True)
class _Rows:
    """The rows of one source that are used, before they are tokenised."""

    source: str
    table: pa.Table
    labels: np.ndarray  # of all rows of the table
    names: tuple[str, ...]
    chosen: np.ndarray  # row numbers, ascending

    def classes(self) -> np.ndarray:
        """[chosen row] what "per class" means: without classes, all rows are one."""
        return self.labels[self.chosen] if self.names else np.zeros(len(self.chosen), dtype=np.int64)


def load_datasets(
    config: RunConfig, tokenizer: Any, cache: Path | Literal["default"] | None = "default"
) -> tuple[Dataset, Dataset]:
    """The training and the evaluation rows of a run, tokenised by a transformers tokenizer.

    Every random choice depends on ``config.seed`` only. Labels get the same ids in both. For causal-lm, rows with
    fewer than 2 tokens have nothing to predict; they are left out, and a log line says how many.
    ``cache``: the folder for tokens; "default" is the user's cache folder, None keeps nothing.
    Raises DataError: missing files, columns, texts and labels; labels that do not fit the task. ConfigError: bad
    task.labels.
    """
    data = config.data
    train = _read(config, data.train, "train", None)
    if data.eval is None:
        train, evaluation = _hold_out(train, data.holdout, config.seed)
    else:
        known = Classes(train.names, declared=_declared(config, train.table) is not None)
        evaluation = _read(config, data.eval, "validation", known)
    train = _at_most(train, data.train_per_class, config.seed, "rows per class of train")
    evaluation = _at_most(evaluation, data.eval_per_class, config.seed, "rows per class of eval")
    folder = default_cache() if cache == "default" else cache
    kept = config.partition.column if config.partition.kind == "column" else None
    return _tokenised(config, train, tokenizer, folder, kept), _tokenised(config, evaluation, tokenizer, folder, None)


def _read(config: RunConfig, source: str, split: str, known: Classes | None) -> _Rows:
    """One source with its labels; ``known``: the classes of the training rows, None while these are read."""
    data, kind = config.data, task_kind(config.task.kind)
    table = read_table(source, split, strings=data.text)
    everything = np.arange(table.num_rows)
    if not kind.has_label:
        return _Rows(source, table, np.zeros(table.num_rows, dtype=np.int64), (), everything)
    where = f"data.label={data.label} in {source}"
    column = _column(table, str(data.label), "data.label", source)
    if kind.target == "number":
        return _Rows(source, table, numbers(column, where), (), everything)
    classes = known or _declared(config, table) or collected_classes(column, where)
    if len(classes.names) < 2:
        raise DataError(f"{where}: only one class, {''.join(classes.names)!r}; classification needs at least 2")
    return _Rows(source, table, class_ids(column, classes, where), classes.names, everything)


def _declared(config: RunConfig, table: pa.Table) -> Classes | None:
    names = config.task.labels or class_names(table, str(config.data.label))
    return declared_classes(names) if names else None


def _hold_out(rows: _Rows, share: float, seed: int) -> tuple[_Rows, _Rows]:
    """Set aside ``share`` of every class, at least one row in all; no class loses its last row."""
    generator = numpy_generator(seed, "holdout")
    classes = rows.classes()
    members = [generator.permutation(np.flatnonzero(classes == label)) for label in np.unique(classes)]
    sizes = [min(round(share * len(own)), len(own) - 1) for own in members]
    if not any(sizes):
        largest = max(range(len(members)), key=lambda label: len(members[label]))
        sizes[largest] = min(1, len(members[largest]) - 1)
    if not any(sizes):
        raise DataError(f"{rows.source}: too few rows to set some aside for evaluation; name a file in data.eval")
    held = np.sort(np.concatenate([own[:size] for own, size in zip(members, sizes, strict=True)]))
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
    return _Rows(rows.source, rows.table, rows.labels, rows.names, rows.chosen[places])


def _tokenised(config: RunConfig, rows: _Rows, tokenizer: Any, cache: Path | None, kept: str | None) -> Dataset:
    data, kind = config.data, task_kind(config.task.kind)
    if len(data.text) > kind.texts:
        raise DataError(f"data.text={data.text}: {kind.name} reads one column of text; name one")
    texts = [_texts(rows, name) for name in data.text]
    predicts_tokens = kind.target == "tokens"
    tokens = tokenise(texts, tokenizer, data.max_length, predicts_tokens, cache)
    columns = {kept: _values(rows, kept)} if kept else {}
    found = Dataset(*tokens, labels=rows.labels[rows.chosen], names=rows.names, columns=columns)
    return _without_short(found, rows, kind.tokens, drop=predicts_tokens)


def _without_short(found: Dataset, rows: _Rows, least: int, drop: bool) -> Dataset:
    """Leave out, or refuse, rows of fewer than ``least`` tokens."""
    short = np.flatnonzero(found.lengths < least)
    if not len(short):
        return found
    first = f"{rows.source}: {len(short)} of {len(found)} rows have fewer than {least} tokens, the first is row "
    first += str(rows.chosen[short[0]] + 1)
    if not drop:
        raise DataError(f"{first}; remove these rows")
    if len(short) == len(found):
        raise DataError(f"{first}; expected texts")
    logging.getLogger(__name__).warning("%s; they are left out", first)
    return found.take(np.setdiff1d(np.arange(len(found)), short))


def _texts(rows: _Rows, name: str) -> list[str]:
    column = _column(rows.table, name, "data.text", rows.source)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DataError(f"{rows.source}: data.text={name} holds {column.type}; expected text")
    _refuse_null(column, f"{rows.source}: data.text={name}")
    return column.take(pa.array(rows.chosen)).to_pylist()


def _values(rows: _Rows, name: str) -> np.ndarray:
    """A column as numbers where it holds numbers, else as words."""
    column = _column(rows.table, name, "partition.column", rows.source)
    _refuse_null(column, f"{rows.source}: partition.column={name}")
    column = column.take(pa.array(rows.chosen))
    number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    return column.to_numpy() if number else np.array([str(value) for value in column.to_pylist()])


def _column(table: pa.Table, name: str, setting: str, source: str) -> pa.ChunkedArray:
    found = table.schema.get_all_field_indices(name)
    if len(found) == 1:
        return table.column(found[0])
    if found:
        raise DataError(f"{source}: has {len(found)} columns named {name!r}; rename all but one")
    raise DataError(
        f"{source}: has no column {name!r} for {setting}{nearest(name, table.column_names)}; "
        f"its columns are {', '.join(table.column_names)}"
    )


def _refuse_null(column: pa.ChunkedArray, where: str) -> None:
    if column.null_count:
        first = int(column.is_null().to_numpy().argmax()) + 1
        raise DataError(
            f"{where} is missing in {column.null_count} of {len(column)} rows, the first is row {first}; "
            "remove or fill these rows"
        )
