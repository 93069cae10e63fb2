"""Scores of single labels and types of entities, as a part of a run's report."""

from __future__ import annotations

from collections.abc import Sequence

from peerlora.display import Cell
from peerlora.runs.events import Event
from peerlora.runs.metrics import evaluations

HEAD = ("F1 of", "in the rows", "mean client", "averaged model")


def by_name_rows(events: Sequence[Event]) -> list[tuple[Cell, ...]]:
    """Of each label or type of entity its name, how often it is true, and F1, at the last evaluation; [] if none."""
    last = evaluations(events)[-1:]
    found = last[0].by_name if last else {}
    return [
        (name or "entity", *(own.get(which) for which in ("true", "own", "averaged"))) for name, own in found.items()
    ]
