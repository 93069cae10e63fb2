"""Work of the rows of a comparison: gradients of rows, in which a row must equal its baseline to be ranked with it."""

from __future__ import annotations

from collections.abc import Mapping

UNEQUAL = 0.01
"""Share of the baseline's row gradients by which a row must differ, either way, to be of unequal work."""
JUDGED = "row gradients"
"""Training rows, each as often as a local step takes its gradient: what is computed, whatever the batches."""


def with_row_gradients(measures: Mapping[str, float], method: str) -> Mapping[str, float]:
    """Return a run's measures with its row gradients, which outcomes that were stored earlier lack.

    There they follow from the training rows; a step of a method that is not known here takes one gradient.
    """
    from peerlora.algorithms import find_method

    if JUDGED in measures or "training rows" not in measures:
        return measures
    kind = find_method(method)
    return {**measures, JUDGED: measures["training rows"] * (1 if kind is None else kind.traits.gradients)}


def compare_work(own: float | None, base: float | None) -> str:
    """Say how many row gradients a row took beside its baseline; empty within 1 %, or where one is not known."""
    if own is None or not base or abs(own / base - 1) <= UNEQUAL:
        return ""
    return f"{own:,.0f} {JUDGED}, the baseline {base:,.0f} ({own / base:.2f} times)"
