"""Table: one quantity of every client over the rounds, as the page draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peerlora.runs.events import SPREAD

FEW_CLIENTS = 60
"""Clients; above, the page gets quantiles over clients, and the curves of one client when it asks for them."""
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Row = list[float | None]


class Table:
    """One quantity of every client over the rounds: round -> [client].

    A round of more clients than an event lists has its spread in place of them.
    """

    def __init__(self, clients: int):
        self.clients = clients
        self.rows: dict[int, np.ndarray] = {}
        self.spreads: dict[int, dict[str, Any]] = {}
        """Round -> the entry of a round without a row."""
        self._entries: dict[int, dict[str, Any]] = {}

    @property
    def rounds(self) -> list[int]:
        """The rounds of which something is known."""
        return sorted({*self.rows, *self.spreads})

    def put(self, round: int, held: Sequence[int], values: Sequence[float | None]) -> None:
        """Enter the values of some clients; what is none of them is left out."""
        row = self.rows.setdefault(round, np.full(self.clients, np.nan, np.float32))
        self._entries.pop(round, None)
        found = np.array(values, np.float32)  # None becomes NaN
        places = np.array(held, np.int64)[: len(found)]
        inside = places < self.clients
        row[places[inside]] = found[: len(places)][inside]

    def put_spread(self, round: int, name: str, measures: Mapping[str, float | None], higher: bool) -> None:
        """Enter what ``client_spread.spread`` told in place of the clients' values; nothing where it told nothing."""
        mean, band = measures.get(f"{name}_mean"), [measures.get(f"{name}_{each}") for each in SPREAD]
        if mean is None:
            return
        shown = [None if each is None else known(each) for each in band]
        found = {"mean": known(mean), "worst": shown[0 if higher else -1], "who": None}
        self.spreads[round] = {"x": round, **found, "band": shown, "whole": True}

    def column(self, client: int) -> dict[str, Row]:
        """The curve of one client."""
        rounds = sorted(self.rows)
        return {"x": list(map(float, rounds)), "y": [known(self.rows[each][client]) for each in rounds]}

    def entry(self, round: int, higher: bool) -> dict[str, Any]:
        """Mean, worst client and spread of one round, and every client's value where they are few.

        ``whole``: the spread reaches from the lowest to the highest client, else it is the middle 90 % of them.
        """
        if round not in self.rows:
            return self.spreads[round]
        if round not in self._entries:
            self._entries[round] = self._entry(round, higher)
        return self._entries[round]

    def _entry(self, round: int, higher: bool) -> dict[str, Any]:
        row = self.rows[round]
        finite = row[np.isfinite(row)]
        found: dict[str, Any] = {"x": round, "mean": None, "worst": None, "who": None}
        if finite.size:
            worst = int(np.nanargmin(row) if higher else np.nanargmax(row))
            found |= {"mean": known(finite.mean()), "worst": known(row[worst]), "who": worst}
        if self.clients <= FEW_CLIENTS:
            return found | {"all": [known(each) for each in row]}
        return found | {"band": [known(each) for each in np.quantile(finite, _QUANTILES)] if finite.size else None}

    def latest(self) -> Row:
        """Every client's latest value; empty where none was told."""
        if not self.rows:
            return []
        last = np.full(self.clients, np.nan, np.float32)
        for round in sorted(self.rows)[-3:]:  # a client may be absent, or report later than others
            row = self.rows[round]
            last = np.where(np.isfinite(row), row, last)
        return [known(each) for each in last]


def known(value: float | np.floating) -> float | None:
    """Four digits of a number; None where there is none."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
