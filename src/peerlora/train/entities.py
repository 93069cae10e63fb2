"""Entities in sequences of tags (BIO, IOB or BIOES), and how many of them a model finds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

ENTITY_COUNTS = 3
"""Numbers per type of entity: true ones, predicted ones, those that are both."""
_OUTSIDE = "O"
_PREFIXES = ("B-", "I-", "E-", "S-")

Entity = tuple[str, int, int]
"""Type, first word, last word."""


def find_entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of one sequence of tags, as conlleval counts them: types, too, must go on.

    An I of another type than the tag before it begins an entity.  A tag without a prefix, such as a part of speech, is
    an entity of its own; O is none.  Source: Tjong Kim Sang and Buchholz 2000 (conlleval); seqeval's default mode.
    """
    found: set[Entity] = set()
    begun, kind, open_ = 0, "", False
    for place, tag in enumerate([*tags, _OUTSIDE]):
        prefix, own = _divided(tag)
        if open_ and (prefix in "BSO" or own != kind):
            found.add((kind, begun, place - 1))
            open_ = False
        if prefix != "O" and not open_:
            begun, kind, open_ = place, own, True
        if open_ and prefix in "ES":
            found.add((kind, begun, place))
            open_ = False
    return found


def _divided(tag: str) -> tuple[str, str]:
    """Prefix and type of a tag; B and I alone are of a type without a name."""
    if tag.startswith(_PREFIXES) or tag in ("B", "I"):
        return tag[0], tag[2:]
    return (_OUTSIDE, "") if tag == _OUTSIDE else ("S", tag)


def entity_types(names: Sequence[str]) -> tuple[str, ...]:
    """The types of entities that tags of these names can make, sorted."""
    return tuple(sorted({_divided(name)[1] for name in names if name != _OUTSIDE}))


def count_entities(
    true: Int[np.ndarray, " word"], predicted: Int[np.ndarray, " word"], names: Sequence[str]
) -> Float[np.ndarray, " count"]:
    """For every type of entity the true ones, the predicted ones and those that are both, of one row of tag ids."""
    types = {kind: place for place, kind in enumerate(entity_types(names))}
    counts = np.zeros((len(types), ENTITY_COUNTS))
    theirs, ours = (find_entities([names[int(tag)] for tag in row]) for row in (true, predicted))
    for column, some in enumerate((theirs, ours, theirs & ours)):
        for kind, _, _ in some:
            counts[types[kind], column] += 1
    return counts.reshape(-1)
