"""A column of labels -> class ids or numbers, by one mapping for training and evaluation rows."""

import math
from collections.abc import Callable, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from peerlora.data.columns import is_text, refuse_objects, short, shown
from peerlora.data.numerals import is_number, whole_number
from peerlora.errors import ConfigError, DataError, nearest

MISSING_WORDS = {"na", "n/a", "#n/a", "nan", "null", "none", "nil", "missing", "-", "?"}  # in lower case
_EXACT = 2**53  # the least whole number that a float64 may have rounded
_COMPARED = 1000  # names that a message looks through for one that is spelled almost alike


class Label(NamedTuple):
    """One of the different labels of a column."""

    spellings: tuple[str, ...]
    """What a class of this label may be called."""
    number: int | None
    """The whole number that it is, where a class may be meant by its place."""


class Labels(NamedTuple):
    """A column of labels."""

    different: list[Label]
    rows: np.ndarray
    """int64 [row], its place among the different labels"""
    numeric: bool
    """Whether the labels are numbers in the file."""
    own_names: tuple[str, ...] | None
    """The names that the file itself has for its numbers."""
    places: list[str]
    """Where each different label stands first, for messages."""


class Classes(NamedTuple):
    """The class names in order of their ids, and what the training rows mean by a whole number."""

    names: tuple[str, ...]
    source: str
    """Who says so, for messages."""
    codes: tuple[str, ...] | None = None
    """The names that whole numbers stand for, in order; None where a number is a name, or nothing."""


def read_labels(
    column: pa.ChunkedArray, own_names: Sequence[str] | None, where: str, place: Callable[[int], str]
) -> Labels:
    """The different labels of a column; ``own_names``: the names that the file has for its class numbers.

    ``place``: what messages call a cell, counted from 0.  Text counts as whole numbers only if every row is written as
    one.  True and false are words.  Raises DataError for missing labels, and for what is no label.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    refuse_objects(kind, where)
    encoded = column.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    values = encoded.dictionary.to_pylist()
    rows = np.where(encoded.is_null(), -1, encoded.indices.fill_null(0).to_numpy(zero_copy_only=False))
    _refuse_missing(rows, [is_missing(value, own_names) for value in values], where, place)
    places = [place(int(first)) for first in np.unique(rows, return_index=True)[1]]
    at = [f"{where}: {each}" for each in places]
    if own_names is not None:
        numbers = [_in_range(value, own_names, "the file", its) for value, its in zip(values, at, strict=True)]
        return Labels([_named(number, own_names) for number in numbers], rows, True, tuple(own_names), places)
    if is_text(kind):
        whole = _all_whole(values)
        return Labels([_word(value, whole) for value in values], rows, whole, None, places)
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    found = [_typed(value, its) for value, its in zip(values, at, strict=True)]
    return Labels(found, rows, numeric, None, places)


def training_classes(labels: Labels, task_labels: Sequence[str] | None, where: str) -> Classes:
    """The classes of a run: those of ``task.labels``, of the training file itself, or else its different labels.

    Collected ones are sorted: numbers by value, words by alphabet.  Raises ConfigError for a name that is there twice,
    DataError for labels that are not classes.
    """
    own, source = labels.own_names, "task.labels" if task_labels else "the training file's own class names"
    names = tuple(task_labels or own or ())
    if not names:
        _refuse_fractions(labels, where)
        found = {label.number for label in labels.different if label.number is not None}
        words = {label.spellings[0] for label in labels.different}
        return Classes(tuple(map(str, sorted(found)) if labels.numeric else sorted(words)), "the training labels")
    _refuse_twice(names, source)
    if not labels.numeric or any(is_number(name) for name in names):
        return Classes(names, source)
    return Classes(names, source, names if own is None or _all_whole(own) else own)


def class_ids(labels: Labels, classes: Classes, where: str) -> np.ndarray:
    """The class id of every row, int64 [row].

    A label is looked up by its name; a whole number that is no name stands for one of ``classes.codes``.
    Raises DataError for labels that are not among ``classes``.
    """
    _refuse_from_one(labels, classes, where)
    ids = {name: place for place, name in enumerate(classes.names)}
    at = [f"{where}: {place}" for place in labels.places]
    found = [_id(label, labels, classes, ids, its) for label, its in zip(labels.different, at, strict=True)]
    return np.array(found, dtype=np.int64)[labels.rows]


def numbers(column: pa.ChunkedArray, where: str, place: Callable[[int], str]) -> np.ndarray:
    """The label of every row for regression, float32 [row].

    ``place``: what messages call a row, counted from 0.  Raises DataError for anything but finite numbers.
    """
    kind, values = column.type, column.to_pylist()
    text = is_text(kind)
    if not (text or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise DataError(f"{where}: holds {kind}, regression needs numbers; use task.kind=classification for classes")
    gone = [is_missing(value, None) or (text and value.strip().lower() in MISSING_WORDS) for value in values]
    _refuse_missing(np.arange(len(values)), gone, where, place)
    bad = next((row for row, value in enumerate(values) if text and not is_number(value.strip())), None)
    if bad is not None:
        raise DataError(
            f"{where}: {place(bad)} holds {values[bad]!r}, regression needs numbers such as 0.5; use "
            "task.kind=classification for classes"
        )
    with np.errstate(over="ignore"):
        found = np.array([float(value) for value in values]).astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(found))
    if len(wrong):
        raise DataError(f"{where}: {place(int(wrong[0]))} holds {values[wrong[0]]}; expected a finite float32")
    return found


def _word(value: str, whole: bool) -> Label:
    number = whole_number(value) if whole else None
    return Label((value,) if number is None else tuple(dict.fromkeys((value, str(number)))), number)


def _typed(value: object, where: str) -> Label:
    if isinstance(value, bool):
        word = str(value)
        return Label((word.lower(), word, word.upper()), None)
    if isinstance(value, (date, time)):
        return Label((str(value),), None)
    if not isinstance(value, (int, float, Decimal)):
        raise DataError(f"{where} holds {value!r}, a {type(value).__name__}; expected a word or a whole number")
    if not math.isfinite(value):
        raise DataError(f"{where} holds {value}, which is not a class")
    if value != int(value):
        return Label((str(value),), None)
    if isinstance(value, float) and abs(value) >= _EXACT:
        raise DataError(f"{where} holds {value:.0f}, which a float64 may have rounded; write such labels as text")
    return Label((str(value), str(int(value))), int(value))


def _named(number: int, own_names: Sequence[str]) -> Label:
    name = own_names[number]
    return Label((name,), whole_number(name) if _all_whole(own_names) else None)


def is_missing(value: Any, own_names: Sequence[str] | None) -> bool:
    """Whether this is no label: null, an empty cell, NaN; -1 where a file names its classes, as `datasets` writes it.

    ``own_names``: those that the file has for its numbers.
    """
    if isinstance(value, str):
        return not value.strip()
    return value is None or value != value or (own_names is not None and value == -1)


def _refuse_missing(rows: np.ndarray, missing: Sequence[bool], where: str, place: Callable[[int], str]) -> None:
    gone = np.append(missing, True)[rows].astype(bool)  # row -1, the last, is null
    if gone.any():
        raise DataError(
            f"{where}: {gone.sum()} of {len(rows)} rows have no label, the first is {place(int(gone.argmax()))}; "
            "remove these rows"
        )


def _refuse_fractions(labels: Labels, where: str) -> None:
    """Numbers of the file that are no whole ones are classes only where somebody wrote them down."""
    if not labels.numeric:
        return
    bad = next((which for which, label in enumerate(labels.different) if label.number is None), None)
    if bad is not None:
        raise DataError(
            f"{where}: {labels.places[bad]} holds {labels.different[bad].spellings[0]}, which is not a class; use "
            "task.kind=regression for real numbers, or name every class in task.labels"
        )


def takes_places(labels: Labels, classes: Classes) -> bool:
    """Whether the numbers of a column stand for classes by their places, from 0."""
    return labels.numeric and labels.own_names is None and classes.codes is not None


def _refuse_from_one(labels: Labels, classes: Classes, where: str) -> None:
    """Refuse numbers that count the classes from 1: as places, each would be the class behind its own."""
    found = {label.number for label in labels.different} if takes_places(labels, classes) else set()
    count = len(classes.codes or ())
    if found and None not in found and min(found) == 1 and max(found) == count:  # pyright: ignore[reportArgumentType]
        names = shown(classes.codes or (), 10)
        raise DataError(
            f"{where}: holds numbers from 1 to {count}, and {classes.source} has {count} names ({names}), whose places "
            f"are 0 to {count - 1}; subtract 1 in the file where 1 means the first of them, or write the names there"
        )


def _refuse_twice(names: Sequence[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"{where} lists {name!r} twice; give every class once")
        seen.add(name)


def _all_whole(names: Sequence[str]) -> bool:
    return all(whole_number(name) is not None for name in names)


def _id(label: Label, labels: Labels, classes: Classes, ids: dict[str, int], where: str) -> int:
    found = next((ids[word] for word in label.spellings if word in ids), None)
    if found is None and label.number is not None and classes.codes is not None:
        found = ids.get(classes.codes[_in_range(label.number, classes.codes, classes.source, where)])
    if found is None:
        raise DataError(_unknown(label.spellings[0], labels, classes, where))
    return found


def _in_range(value: Any, names: Sequence[str], source: str, where: str) -> int:
    if 0 <= value < len(names):
        return value
    raise DataError(
        f"{where}: label {value} is out of range; {source} has {len(names)} names ({shown(names, 10)}), "
        f"so expected 0 to {len(names) - 1}"
    )


def _unknown(word: str, labels: Labels, classes: Classes, where: str) -> str:
    near = nearest(word, classes.names[:_COMPARED])
    given = f"label {short(word)!r}" if labels.own_names is None else f"the file's own class {short(word)!r}"
    hint = "Correct the row, or name every class in task.labels"
    if word.strip() in classes.names:
        hint = "It has blanks around it; remove them"
    elif word.strip().lower() in MISSING_WORDS or word == "-1":
        hint = "If the label is missing, remove these rows; else name every class in task.labels"
    elif labels.numeric and labels.own_names is None and classes.codes is None:
        hint = "Where training labels are words or names are numbers, a number is no place among them; write names"
    return f"{where}: {given} is not among {classes.source}{near}; expected {shown(classes.names, 10)}. {hint}"
