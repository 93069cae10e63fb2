"""Inference from differences that are paired by seed: intervals, tests, a correction, and what a design can show.

Sources: the paired t interval and test, Student 1908; the exact sign-flip test, Fisher 1935; the step-down correction,
Holm 1979.  The t methods assume that differences over seeds are roughly normal, the sign-flip test that they are as
likely to be turned round where there is no difference.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from scipy import optimize, stats

LEVEL = 0.05
"""Adjusted p above which two settings are not distinguishable; intervals cover 1 - LEVEL."""
POWER = 0.8
"""Chance of finding a difference that is called detectable."""
FEWEST = 3  # seeds below which an interval over seeds would say nothing
ROUNDING = 1e-12
"""Share of the size of what was added up below which two sums differ by rounding only."""
_EXACT = 12  # differences up to which all patterns of signs are tried
_PATTERNS = 10_000  # drawn for more differences than that
_CONSTANT = 1e-9  # spread over mean, below which it is rounding and no spread

Key = TypeVar("Key", bound=Hashable)


def t_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Compute the 95 % t interval of the mean difference.

    None for fewer than 3 differences, and where they are constant but not zero: they show no spread to infer from.
    Differences that are all zero, of runs that are the same, have the point zero.
    """
    error = _standard_error(differences)
    if error is None:
        return None
    half = float(stats.t.ppf(1 - LEVEL / 2, len(differences) - 1)) * error
    mean = float(np.mean(differences))
    return mean - half, mean + half


def t_test(differences: Sequence[float]) -> float | None:
    """Compute the two-sided p of the paired t test, that the mean difference is zero; None as in ``t_interval``."""
    error = _standard_error(differences)
    if error is None:
        return None
    if error == 0:
        return 1.0
    return float(2 * stats.t.sf(abs(np.mean(differences)) / error, len(differences) - 1))


def _standard_error(differences: Sequence[float]) -> float | None:
    """The standard error of the mean, where something can be inferred from it."""
    if len(differences) < FEWEST:
        return None
    mean, deviation = float(np.mean(differences)), float(np.std(differences, ddof=1))
    if deviation <= _CONSTANT * abs(mean):
        return None if mean else 0.0
    return deviation / math.sqrt(len(differences))


def sign_flip_test(differences: Sequence[float]) -> float:
    """Compute the two-sided permutation p: the share of sign patterns with a mean at least as far from zero.

    Exact, over all 2^n patterns, for up to 12 differences; for more a Monte Carlo estimate from 10,000 seeded patterns
    and the observed one, which is never zero.
    """
    values = np.asarray(differences, float)
    # Patterns that differ from it by rounding only must count, also where what cancels out leaves next to nothing.
    observed = abs(values.sum()) - ROUNDING * np.abs(values).sum()
    if len(values) <= _EXACT:
        return float((np.abs(_all_signs(len(values)) @ values) >= observed).mean())
    signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(_PATTERNS, len(values)))
    hits = int((np.abs(signs @ values) >= observed).sum())
    return (1 + hits) / (1 + _PATTERNS)


def subtract_scores(own: float, other: float) -> float:
    """Compute the difference of two scores, which is zero where they differ by rounding only."""
    return 0.0 if is_same(own, other) else own - other


def is_same(own: float, other: float) -> bool:
    """Whether two scores differ by rounding only, as means of the same values in another order do."""
    return math.isclose(own, other, rel_tol=ROUNDING)


@lru_cache(maxsize=_EXACT)
def _all_signs(count: int) -> Float[np.ndarray, "pattern difference"]:
    return np.array(list(product((-1.0, 1.0), repeat=count)))


def smallest_sign_flip_p(count: int) -> float:
    """Return the smallest p that ``sign_flip_test`` can give for so many differences: 2/2^n where it is exact."""
    return 2.0 ** (1 - count) if count <= _EXACT else 1 / (1 + _PATTERNS)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Adjust the p values of one family by Holm's step-down method, which bounds the chance of any false finding.

    The k-th smallest of m is multiplied by m - k + 1, is at least the adjusted one before it, and at most 1.
    """
    adjusted, before = {}, 0.0
    for place, key in enumerate(sorted(p_values, key=lambda each: p_values[each])):
        before = max(before, min(1.0, (len(p_values) - place) * p_values[key]))
        adjusted[key] = before
    return {key: adjusted[key] for key in p_values}


def detectable_difference(deviation: float, count: int, level: float = LEVEL, power: float = POWER) -> float | None:
    """Compute the mean difference that a two-sided paired t test at ``level`` finds with probability ``power``.

    ``deviation``: the standard deviation of the differences, in the unit of the answer; ``count``: seeds.  None for
    fewer than 3 seeds.
    """
    return deviation * _detectable_effect(count, level, power) if count >= FEWEST else None


@lru_cache(maxsize=1024)
def _detectable_effect(count: int, level: float, power: float) -> float:
    """The same in standard deviations of the differences.  Findings of the wrong sign are too rare to count."""
    freedom = count - 1
    cut = float(stats.t.ppf(1 - level / 2, freedom))

    def lacking(shift: float) -> float:
        return float(stats.nct.sf(cut, freedom, shift)) - power

    most = 1.0
    while lacking(most) < 0:
        most *= 2
    return float(optimize.root_scalar(lacking, bracket=(0.0, most)).root) / math.sqrt(count)


def detectable_table(counts: Sequence[int], deviations: Sequence[float], tests: int = 1) -> str:
    """Write, as Markdown, the differences that designs can show: a line per number of seeds, a column per deviation.

    ``tests``: how many rows of a table are set against its baseline, which divides the level (Holm's first).
    """
    lines = [
        "| seeds | " + " | ".join(f"sd {deviation:g}" for deviation in deviations) + " |",
        "|" + " --- |" * (len(deviations) + 1),
    ]
    for count in counts:
        found = [detectable_difference(deviation, count, LEVEL / tests) for deviation in deviations]
        lines.append(f"| {count} | " + " | ".join("–" if each is None else f"{each:.3f}" for each in found) + " |")
    return "\n".join(lines) + "\n"
