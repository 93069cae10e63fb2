"""Names and values of the series that trackers show, from the rows of ``metrics.parquet``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from peerlora.runs.events import Evaluated, RoundDone, RunStarted
from peerlora.runs.metrics import rows

MANY_CLIENTS = 50
"""Clients; above, series of quantiles over clients take the place of one series per client."""
QUANTILES = (5, 25, 50, 75, 95)
"""Per cent."""
_GROUPS = {
    "consensus": ("consensus_", "cross_term", "local_cross_term", "weak_mismatch", "strong_mismatch", "rho"),
    "network": (
        "contacts",
        "bytes_",
        "absent",
        "relayed_age",
        "relayed_known",
        "relayed_entries",
        "relayed_bytes",
        "sums_given_up",
    ),
    "time": ("seconds_", "virtual_seconds", "eval_seconds"),
    "train": ("loss", "learning_rate"),
    "eval": ("own", "averaged", "relayed", "personal", "best", "eval_rows"),
}
"""Group of series -> how the names of its rows begin; any other is a measure of the method."""


def series(event: RoundDone | Evaluated, start: RunStarted | None) -> tuple[int, dict[str, float]]:
    """(finished rounds, name -> value) of one event; what is not finite is left out.

    A name is ``group/quantity``.  What each client has of its own is ``group/quantity`` for the mean over clients, and
    ``quantity_by_client/site`` each; the metric of the own models has a ``_worst``, too.
    """
    values: dict[str, float] = {}
    of_clients: dict[str, dict[int, float]] = {}
    for client, _, name, value in rows([*([start] if start else []), event]):
        if math.isfinite(value) and client is None:
            values[_name(name, start)] = value
        elif math.isfinite(value):
            assert client is not None
            of_clients.setdefault(name, {})[client] = value
    for name, found in of_clients.items():
        values[_name(name, start)] = sum(found.values()) / len(found)
        if len(found) > 1:
            values |= _spread(_name(name, start), name == "own", found, start)
    return event.round + isinstance(event, RoundDone), values


def _name(row: str, start: RunStarted | None) -> str:
    metric = start.metric if start else "metric"
    group = next((each for each, begins in _GROUPS.items() if row.startswith(begins)), "method")
    named = {"own": metric, "own_loss": "loss", "averaged": f"{metric}_averaged", "relayed": f"{metric}_relayed"}
    return f"{group}/{named.get(row, f'{metric}_personal' if row == 'personal' else row)}"


def _spread(name: str, worst: bool, found: dict[int, float], start: RunStarted | None) -> dict[str, float]:
    """The series of single clients, or of quantiles over many."""
    group, _, quantity = name.partition("/")
    values = list(found.values())
    spread = {}
    if worst:
        spread[f"{name}_worst"] = min(values) if start is None or start.higher_is_better else max(values)
    if len(found) > MANY_CLIENTS:
        return spread | quantiles(f"{group}_{quantity}_quantiles", values)
    return spread | {f"{group}_{quantity}_by_client/{_site(client, start)}": each for client, each in found.items()}


def quantiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """Quantiles over clients as one group of series."""
    return {f"{name}/{q:02d}": float(each) for q, each in zip(QUANTILES, np.percentile(values, QUANTILES), strict=True)}


def _site(client: int, start: RunStarted | None) -> str:
    digits = len(str((start.clients if start else client + 1) - 1))
    return (start.names.get(str(client)) if start else None) or f"{client:0{digits}d}"


def final_values(summary: Iterable[tuple[str, object]]) -> dict[str, float]:
    """The numbers of a flattened summary."""
    return {
        name: float(value)
        for name, value in summary
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
