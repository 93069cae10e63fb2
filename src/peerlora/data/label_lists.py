"""A column of lists of labels -> class ids, by one mapping for training and evaluation rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from peerlora.data.columns import refuse_objects
from peerlora.data.label_checks import warn_of_labels
from peerlora.data.labels import Classes, class_ids, is_missing, read_labels, training_classes
from peerlora.errors import DataError


def read_label_lists(
    column: pa.ChunkedArray,
    own_names: Sequence[str] | None,
    wanted: Classes | Sequence[str] | None,
    where: str,
    place: Callable[[int], str],
) -> tuple[list[np.ndarray], Classes]:
    """The ids of every row's labels, int64 [label] each, and what they mean.

    ``own_names``: those that the file has for its numbers.  ``wanted``: the classes of the training rows, or
    ``task.labels``.  ``place``: what messages call a row, counted from 0.  Raises DataError, naming the row, for what
    is no list of labels; for labels that are not among those of the training rows; and for fewer than two different
    ones.
    """
    if pa.types.is_map(column.type):  # whose cells are lists, too: of pairs
        refuse_objects(column.type, where, "a list of labels in each row")
    cells = column.to_pylist()
    for row, cell in enumerate(cells):
        _check_list(cell, own_names, f"{where}: {place(row)}")
    ends = np.cumsum([len(cell) for cell in cells])
    flat = pa.array([label for cell in cells for label in cell], column.type.value_type)
    if not len(flat):
        raise DataError(f"{where}: no row has a label; expected at least 2 different ones")

    def place_in_list(label: int) -> str:
        row = bisect_right(ends, label)
        return f"{place(row)}, place {label - int(ends[row]) + len(cells[row]) + 1}"

    labels = read_labels(pa.chunked_array([flat]), own_names, where, place_in_list)
    classes = wanted if isinstance(wanted, Classes) else training_classes(labels, wanted, where)
    if len(classes.names) < 2:
        raise DataError(f"{where}: only one label, {''.join(classes.names)!r}; expected at least 2")
    ids = class_ids(labels, classes, where)
    warn_of_labels(labels, classes, ids, first=not isinstance(wanted, Classes), where=where)
    return np.split(ids, ends[:-1]), classes


def _check_list(cell: object, own_names: Sequence[str] | None, where: str) -> None:
    """Raise DataError, naming the row ``where``, unless this is a list of labels of which none is missing."""
    if not isinstance(cell, list):
        given = "nothing" if cell is None else f"a {type(cell).__name__}"
        raise DataError(f"{where} holds {given}; expected a list of labels, [] for none")
    missing = next((at for at, label in enumerate(cell, 1) if is_missing(label, own_names)), None)
    if missing is not None:
        raise DataError(
            f"{where} has an empty label in its list, place {missing} ({cell[missing - 1]!r}); correct the row"
        )


def as_indicators(rows: Sequence[np.ndarray], labels: int) -> np.ndarray:
    """float32 [row, label]: 1 for each label of a row, else 0."""
    found = np.zeros((len(rows), labels), dtype=np.float32)
    for row, own in enumerate(rows):
        found[row, own] = 1.0
    return found
