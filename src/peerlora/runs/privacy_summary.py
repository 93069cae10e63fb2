"""What a run has spent of its privacy: in summaries, in words and on model cards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from peerlora.runs.events import Evaluated, RunStarted

UNCOVERED = (
    "privacy covers adapters and not numbers: losses and the scores of clients, on rows that may be private, go to {} "
    "without noise; keep it at the site (docs/privacy.md)"
)
"""Warning of a run that promises privacy, where its numbers leave it."""


def privacy_facts(start: RunStarted | None, score: Evaluated | None) -> dict[str, Any] | None:
    """Tell what clients were promised and what they have spent; None for a run without privacy.

    Keys: unit, accountant, generator, guarantee, clip, planned and spent with [client] epsilon, delta and releases;
    planned also has noise, rate and rows.  An epsilon without a bound is None.
    """
    if start is None or start.privacy is None:
        return None
    promised = start.privacy
    spent = score.privacy if score is not None and score.privacy else {"epsilon": [], "releases": []}
    known = [value if math.isfinite(value) else None for value in spent["epsilon"]]
    releases = [int(each) for each in spent["releases"]]
    return {**promised, "spent": {"epsilon": known, "delta": promised["planned"]["delta"], "releases": releases}}


def largest_epsilon(score: Evaluated) -> float:
    """What the client that spent most has spent; NaN where that has no bound, or nothing is counted."""
    spent = score.privacy.get("epsilon", [])
    return math.nan if not spent or any(map(math.isnan, spent)) else max(spent)


def describe_privacy(facts: Mapping[str, Any] | None) -> list[str]:
    """Say in a line or two what was spent, of what, and whether it is a guarantee."""
    if facts is None:
        return []
    spent, planned = facts["spent"]["epsilon"], facts["planned"]["epsilon"]
    used = f"spent epsilon {_range(spent)} of " if spent else "epsilon "
    budget = f"{used}{_range(planned)} planned"
    return [
        f"privacy of each {facts['unit']}: {budget}, delta {_range(facts['planned']['delta'])}, noise "
        f"{_range(facts['planned']['noise'])}, clip {facts['clip']:g}, by {facts['accountant']} ({facts['guarantee']})"
    ]


def privacy_card(summary: Mapping[str, Any], row: int | None) -> dict[str, str]:
    """Tell the same on the card of one client's model; None: of the average, which the largest values are for."""
    facts = summary.get("privacy")
    if facts is None:
        return {}

    def shown(part: str, name: str) -> str:
        values = facts[part][name]
        chosen = values if row is None else values[row : row + 1]
        return _number(None if None in chosen or not chosen else max(chosen))

    return {
        "privacy": f"differential, of each {facts['unit']} ({facts['guarantee']})",
        "epsilon spent": f"{shown('spent', 'epsilon')} of {shown('planned', 'epsilon')} planned",
        "delta": shown("planned", "delta"),
    }


def spent_range(facts: Mapping[str, Any] | None) -> str:
    """The epsilon spent, from the least to the most of all clients; nothing where there is none."""
    return "" if facts is None or not facts["spent"]["epsilon"] else _range(facts["spent"]["epsilon"])


def _range(values: Sequence[float | None]) -> str:
    """From the least to the most; a value without a bound comes last."""
    known = [value for value in values if value is not None]
    ends = [_number(min(known)), _number(max(known)) if len(known) == len(values) else _number(None)] if known else []
    return " to ".join(dict.fromkeys(ends or [_number(None)]))


def _number(value: float | None) -> str:
    return "without bound" if value is None else f"{value:.3g}"
