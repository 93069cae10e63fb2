"""Warnings about labels that may not mean what was meant."""

import logging
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from peerlora.data.columns import short, shown
from peerlora.data.labels import MISSING_WORDS, Classes, Labels, takes_places
from peerlora.data.numerals import is_number, whole_number

_SEPARATORS = "|;,"
_MANY = 20  # classes, from which on as many classes as half of the rows are strange
_SHOWN = 5  # names in a warning


def warn_of_labels(
    labels: Labels, classes: Classes, ids: np.ndarray, *, first: bool, where: str, own_rows: bool = False
) -> None:
    """Log what is strange about the labels of a source.

    ``ids``: class ids [row], of lists [label].  ``first``: these are the training rows.  ``own_rows``: other sites have
    other files.
    """
    notes = [*_about_names(classes, ids)] if first and classes.source == "the training labels" else []
    if takes_places(labels, classes):
        places = ", ".join(f"{number} = {name}" for number, name in enumerate((classes.codes or ())[:_SHOWN]))
        sites = "; all sites must mean the same" if own_rows else ""
        notes.append(f"numbers are taken as places among {classes.source}: {places}{sites}")
    for sentence in notes:
        logging.getLogger(__name__).warning("%s: %s", where, sentence)


def _about_names(classes: Classes, ids: np.ndarray) -> Iterator[str]:
    names, counts = classes.names, np.bincount(ids, minlength=len(classes.names))
    missing = [place for place, name in enumerate(names) if name.strip().lower() in MISSING_WORDS]
    if missing:
        rows = ", ".join(f"{names[place]!r} in {counts[place]} rows" for place in missing[:_SHOWN])
        yield f"{rows}: a class here; if the label is missing, remove these rows"
    blank = [name for name in names if name != name.strip()]
    if blank:
        yield f"{_some(blank)} have blanks around them, which belong to the class here; remove them if they should not"
    alike = _look_alikes(names)
    if alike and not blank:
        both = " and ".join(repr(short(name)) for name in alike)
        yield f"{both} are different classes here; spell them alike if they are one"
    joined = [name for name in names if _is_joined(name, set(names))]
    if joined:
        yield (
            f"{_some(joined)} are classes of their own here; of several labels of one row make a list, for "
            "task.kind=multi-label"
        )
    if _is_minus_one_strange(names):
        rows = counts[names.index("-1")]
        yield f"'-1' in {rows} rows: a class here, and no other is below 0; if the label is missing, remove these rows"
    if all(map(is_number, names)) and any(whole_number(name) is None and "." in name for name in names):
        yield f"{_some(names)} are classes here; for numbers use task.kind=regression"
    elif len(names) > _MANY and 2 * len(names) > len(ids):
        yield f"{len(names)} classes in {len(ids)} rows; is data.label the right column?"


def warn_of_owners(words: Sequence[str], where: str) -> None:
    """Log words that divide rows between clients and are spelled almost alike."""
    alike = _look_alikes(list(dict.fromkeys(words)))
    if alike:
        both = " and ".join(repr(short(name)) for name in alike)
        logging.getLogger(__name__).warning("%s: %s are different clients here; spell them alike if not", where, both)


def _look_alikes(names: Sequence[str]) -> tuple[str, str] | None:
    """The first two names that differ in case, blanks or the coding of letters alone."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(_plain(name), name)
        if other != name:
            return other, name
    return None


def _plain(name: str) -> str:
    seen = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")  # zero-width letters, say
    return " ".join(unicodedata.normalize("NFKC", seen).casefold().split())


def _is_minus_one_strange(names: Sequence[str]) -> bool:
    """Whether -1 stands beside classes that count from 0, as where test rows have no labels."""
    others = [whole_number(name) for name in names if name != "-1"]
    return "-1" in names and 0 in others and all(number is not None and number >= 0 for number in others)


def _is_joined(name: str, names: set[str]) -> bool:
    parts = next((name.split(mark) for mark in _SEPARATORS if mark in name), [])
    return len(parts) > 1 and all(part.strip() in names for part in parts)


def _some(names: Sequence[str]) -> str:
    return shown([repr(name) for name in names], _SHOWN)
