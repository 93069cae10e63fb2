"""Bounds on the values that a neighbour may send, relative to this site's own; no honest neighbour comes near them.

One message of huge, finite values would else end the run of everybody who mixes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from peerlora.exchange.gossip_sum import LARGEST, SUM
from peerlora.network.base import Refused

_RATIO = 1e3  # of the largest value that this site itself has, or of 1 where all are smaller
_CEILING = 1e6  # for the same, or twice the own where these are larger: else it could be raised round by round
_MASS = (1e-12, 1e12)  # of a mass or confidence, which is within e^-20 and e^20, or a sum of such
_STATE = 1e12  # for the values of a whole state, which may be weighted by such a mass


def check_values(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], positive: Collection[str] = (), weighted: bool = False
) -> None:
    """Raise Refused (``out-of-range``) for values that are far from the own ones.

    ``positive``: vectors above zero, which have bounds of their own.  ``weighted``: whether the other vectors have been
    multiplied by the first of these.
    """
    for name in positive:
        _check_between(name, given[name], *_MASS)
    if SUM in given:
        _check_between(SUM, given[SUM], 0.0, LARGEST)
    excluded = {SUM, *positive}
    mine, theirs = ({name: each for name, each in some.items() if name not in excluded} for some in (own, given))
    weight = next(iter(positive)) if weighted and positive else None
    own_weight, weight = (float(some[weight].max()) if weight else 1.0 for some in (own, given))
    check_largest(theirs, weight * allowed(largest(mine.values()) / own_weight))


def check_largest(given: Mapping[str, Tensor], most: float) -> None:
    """Raise Refused for a value that is larger than ``most`` in size."""
    for name, vector in given.items():
        if (size := largest([vector])) > most:
            raise Refused("out-of-range", f"{name} has a value of {size:.3g}; at most {most:.3g}")


def check_state(own: Iterable[Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise Refused for a state that nobody could train on."""
    check_largest(given, max(_STATE, 2 * largest(own)))


def allowed(own: float) -> float:
    """The largest size of a value of a neighbour, where that of the own ones is ``own``."""
    return max(min(_RATIO * max(1.0, own), _CEILING), 2 * own)


def largest(vectors: Iterable[Tensor]) -> float:
    """The largest size of a value in floating-point vectors; 0 where there is none."""
    sizes = [0.0]
    for vector in vectors:
        if vector.dtype.is_floating_point and vector.numel():
            sizes += [abs(float(end)) for end in vector.aminmax()]
    return max(sizes)


def _check_between(name: str, vector: Tensor, low: float, high: float) -> None:
    least, most = (float(end) for end in vector.aminmax())
    if least < low or most > high:
        raise Refused("out-of-range", f"{name} is between {least:.3g} and {most:.3g}; expected {low:g} to {high:g}")
