"""A column of labels -> class ids or numbers, by one mapping for training and evaluation rows."""

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from peerlora.errors import ConfigError, DataError, nearest


class Classes(NamedTuple):
    """The class names in order of their ids."""

    names: tuple[str, ...]
    declared: bool
    """True where somebody wrote the names down (task.labels, the file itself), False where they were collected."""


def declared_classes(names: Sequence[str]) -> Classes:
    """Classes that were written down. Raises ConfigError for a name that is there twice."""
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise ConfigError(f"task.labels lists {twice[0]!r} twice; give every class once")
    return Classes(tuple(names), declared=True)


def collected_classes(column: pa.ChunkedArray, where: str) -> Classes:
    """The distinct labels of a column, sorted: numbers by value, words by alphabet.

    Raises DataError for missing labels, and for labels that are not classes.
    """
    values, _ = _distinct(column, where)
    return Classes(tuple(str(value) for value in sorted(values)), declared=False)  # type: ignore[type-var]


def class_ids(column: pa.ChunkedArray, classes: Classes, where: str) -> np.ndarray:
    """The class id of every row, int64 [row].

    A label is looked up by its name. Whole numbers index into declared names, unless those are numbers themselves.
    Raises DataError for missing labels, labels that are not classes, and labels that are not among ``classes``.
    """
    values, codes = _distinct(column, where)
    by_place = classes.declared and not all(_is_whole(name) for name in classes.names)
    ids = {name: place for place, name in enumerate(classes.names)}
    found = []
    for value in values:
        if by_place and isinstance(value, int):
            found.append(_in_range(value, classes, where))
        elif str(value) in ids:
            found.append(ids[str(value)])
        else:
            raise DataError(_unknown(str(value), classes, where))
    return np.array(found, dtype=np.int64)[codes]


def numbers(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """The label of every row for regression, float32 [row]. Raises DataError for anything but finite numbers."""
    kind = column.type
    _refuse_missing(column, where)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise DataError(f"{where}: holds {kind}, regression needs numbers; use task.kind=classification for classes")
    with np.errstate(over="ignore"):
        labels = np.array(column.to_pylist(), dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(labels))
    if len(bad):
        raise DataError(f"{where}: row {bad[0] + 1} holds {column[int(bad[0])]}; expected a finite float32")
    return labels


def _distinct(column: pa.ChunkedArray, where: str) -> tuple[list[int] | list[str], np.ndarray]:
    """The different labels, all whole numbers or all words, and for every row its place among them."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    elif pa.types.is_nested(kind):
        raise DataError(f"{where}: holds {kind}; expected one word or whole number per row")
    _refuse_missing(column, where)
    encoded = pa.concat_arrays(column.chunks).dictionary_encode()
    values = [_plain(value, where) for value in encoded.dictionary.to_pylist()]
    return values, encoded.indices.to_numpy(zero_copy_only=False)  # type: ignore[return-value]


def _plain(value: object, where: str) -> int | str:
    if isinstance(value, str):
        return value
    if not isinstance(value, (bool, int, float, Decimal)):
        raise DataError(f"{where}: holds {value!r}, a {type(value).__name__}; expected a word or a whole number")
    if not math.isfinite(value) or value != int(value):
        raise DataError(f"{where}: holds {value}, which is not a class; use task.kind=regression for real numbers")
    return int(value)


def _refuse_missing(column: pa.ChunkedArray, where: str) -> None:
    missing = column.is_null(nan_is_null=pa.types.is_floating(column.type)).to_numpy()
    if missing.any():
        raise DataError(
            f"{where}: {missing.sum()} of {len(column)} rows have no label, the first is row {missing.argmax() + 1}; "
            "remove these rows"
        )


def _is_whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _in_range(value: int, classes: Classes, where: str) -> int:
    if 0 <= value < len(classes.names):
        return value
    raise DataError(
        f"{where}: label {value} is out of range; {len(classes.names)} labels are named ({_some(classes.names)}), "
        f"so expected 0 to {len(classes.names) - 1}"
    )


def _unknown(word: str, classes: Classes, where: str) -> str:
    source = "task.labels" if classes.declared else "the training labels"
    return (
        f"{where}: label {word!r} is not among {source}{nearest(word, classes.names)}; expected "
        f"{_some(classes.names)}. Correct the row, or name every class in task.labels"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
