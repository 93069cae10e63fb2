"""What stands for a list of all clients where they are too many to list."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from peerlora.runs.events import SPREAD, RoundDone


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean and the percentiles of ``SPREAD`` of the finite values, as ``name_mean``, ``name_median``, ...

    NaN where there are none.
    """
    known = np.array(values, dtype=float)
    known = known[np.isfinite(known)]
    if not known.size:
        return {f"{name}_{each}": math.nan for each in ("mean", *SPREAD)}
    found = np.percentile(known, list(SPREAD.values())).tolist()
    named = zip(("mean", *SPREAD), (float(known.mean()), *found), strict=True)
    return {f"{name}_{each}": value for each, value in named}


def spread_lines(name: str, done: Sequence[RoundDone]) -> dict[str, tuple[list[int], list[float]]]:
    """Lines of a figure: what ``spread`` told after each round."""
    rounds = [each.round + 1 for each in done]
    return {
        each.replace("_", " "): (rounds, [event.measures.get(f"{name}_{each}", math.nan) for event in done])
        for each in ("mean", *SPREAD)
    }
