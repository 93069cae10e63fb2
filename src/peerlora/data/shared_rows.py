"""Whether evaluation rows lie where training rows do, found by the places of two sources, without reading rows."""

from __future__ import annotations

import os
from pathlib import Path

from peerlora.data.files import EVAL_SPLIT, TRAIN_SPLIT, hub_place, locate_files, parse_source
from peerlora.data.image_files import list_images
from peerlora.data.text_files import Unreadable
from peerlora.errors import DataError

_DEFAULT_CONFIG = "default"  # what `datasets` calls the only one of a data set that names none
_ALL = "all"  # what `datasets` calls all splits together


def find_shared_rows(train: str, evaluation: str) -> str | None:
    """Name a file, or a split of a hub data set, of which both sources have rows; None where there is none.

    A slice of a split counts as the split.  Copies, and a hub data set read as files, are not noticed.
    """
    own, other = _hub_splits(train, TRAIN_SPLIT), _hub_splits(evaluation, EVAL_SPLIT)
    if own is None and other is None:
        return min(_files(train) & _files(evaluation), default=None)
    if own is None or other is None or own[0] != other[0]:
        return None
    shared = own[1] | other[1] if _ALL in own[1] | other[1] else own[1] & other[1]
    return f"split {min(shared - {_ALL}, default=_ALL)} of {own[0][0]}" if shared else None


def _hub_splits(source: str, split: str) -> tuple[tuple[str, str], set[str]] | None:
    """Data set and config, and the splits that are read; ``split``: where none is named.  None: no hub source."""
    kind, place = _parsed(source)
    if kind != "hub":
        return None
    name, config, chosen = hub_place(place)
    name = os.path.realpath(name) if os.path.isabs(name) else name.lower()  # the hub's names differ in more than case
    return (name, config or _DEFAULT_CONFIG), {each.partition("[")[0].strip() for each in (chosen or split).split("+")}


def _parsed(source: str) -> tuple[str, str]:
    """Kind and place; of what is no source, which loading will tell of, it is the place."""
    try:
        return parse_source(source)
    except DataError:
        return "", source


def _files(source: str) -> set[str]:
    """The files of a source by their real paths; its own where it cannot be found, which loading will tell of."""
    kind, place = _parsed(source)
    try:
        found = list_images(Path(place).expanduser())[0] if kind == "folder" else locate_files(source, kind, place)
    except (DataError, Unreadable, OSError):
        found = [Path(place).expanduser()]
    return {os.path.realpath(each) for each in found}
