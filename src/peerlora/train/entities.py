"""Entities in sequences of tags (BIO, IOB or BIOES), and how many of them a model finds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

ENTITY_COUNTS = 3
"""Numbers per type of entity: true ones, predicted ones, those that are both."""
_OUTSIDE = "O"
_BEGIN_OR_GO_ON, _END_OR_STAND_ALONE = ("B-", "I-"), ("E-", "S-")
_PREFIXES = (*_BEGIN_OR_GO_ON, *_END_OR_STAND_ALONE)
_ROWS = 1 << 14  # of which the entities are kept: those of the true tags are asked for by every client

Entity = tuple[str, int, int]
"""Type, first word, last word."""


def find_entities(tags: Sequence[str], prefixes: tuple[str, ...] = _PREFIXES) -> set[Entity]:
    """The entities of one sequence of tags, as conlleval counts them: types, too, must go on.

    An I of another type than the tag before it begins an entity.  A tag without a prefix, such as a part of speech, is
    an entity of its own; O is none.  ``prefixes``: those that the tags' names have, see `prefixes_of`.
    Source: Tjong Kim Sang and Buchholz 2000 (conlleval); seqeval's default mode.
    """
    found: set[Entity] = set()
    begun, kind, open_ = 0, "", False
    for place, tag in enumerate([*tags, _OUTSIDE]):
        prefix, own = _divided(tag, prefixes)
        if open_ and (prefix in "BSO" or own != kind):
            found.add((kind, begun, place - 1))
            open_ = False
        if prefix != "O" and not open_:
            begun, kind, open_ = place, own, True
        if open_ and prefix in "ES":
            found.add((kind, begun, place))
            open_ = False
    return found


def prefixes_of(names: Sequence[str]) -> tuple[str, ...]:
    """The prefixes of tags of these names: where none begins or goes on, E-MAIL is a type, not the end of a MAIL."""
    return _PREFIXES if any(name.startswith(_BEGIN_OR_GO_ON) for name in names) else ()


def _divided(tag: str, prefixes: tuple[str, ...]) -> tuple[str, str]:
    """Prefix and type of a tag; B and I alone are of a type without a name."""
    if tag.startswith(prefixes) or tag in ("B", "I"):
        return tag[0], tag[2:]
    return (_OUTSIDE, "") if tag == _OUTSIDE else ("S", tag)


@lru_cache(maxsize=64)
def entity_types(names: tuple[str, ...]) -> tuple[str, ...]:
    """The types of entities that tags of these names can make, sorted."""
    prefixes = prefixes_of(names)
    return tuple(sorted({_divided(name, prefixes)[1] for name in names if name != _OUTSIDE}))


@lru_cache(maxsize=_ROWS)
def _entities(tags: tuple[int, ...], names: tuple[str, ...]) -> frozenset[Entity]:
    return frozenset(find_entities([names[tag] for tag in tags], prefixes_of(names)))


def count_entities(
    true: Int[np.ndarray, " word"], predicted: Int[np.ndarray, " word"], names: tuple[str, ...]
) -> Float[np.ndarray, " count"]:
    """For every type of entity the true ones, the predicted ones and those that are both, of one row of tag ids."""
    types = entity_types(names)
    places = {kind: place for place, kind in enumerate(types)}
    counts = np.zeros((len(types), ENTITY_COUNTS))
    theirs, ours = (_entities(tuple(row.tolist()), names) for row in (true, predicted))
    for column, some in enumerate((theirs, ours, theirs & ours)):
        for kind, _, _ in some:
            counts[places[kind], column] += 1
    return counts.reshape(-1)
