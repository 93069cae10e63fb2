"""Chooses settings of methods as rates are chosen: on rows set aside, with the search's seeds, growing at an edge.

Every value has a search of rates of its own, which grow as those of the study do, and the best mean client of any rate
counts.  The runs are those that the search of the study needs anyway for the value that is taken, so they are not made
twice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peerlora.experiments.rate_search import RateSearch, first_of_best
from study_base import Tree, Tuned

MOST = 6
"""Values that a setting may come to."""
Tried = dict[str, dict[float, RateSearch]]
"""Row -> value of its tuned setting -> the search of its rate."""


def tuned_grids(
    grids: Sequence[Tree], tuned: Mapping[str, Tuned], search: Callable[[Tree], Sequence[RateSearch]]
) -> tuple[list[Tree], Tried]:
    """Return the grids with the chosen values in the rows' labels and settings, and per row what each value reached.

    ``search`` runs the search of a grid.  SystemExit where every run of a row diverged.
    """
    found, tried = [copy.deepcopy(tree) for tree in grids], {}
    for tree in found:
        systems = tree["axes"]["system"]
        for label in [each for each in systems if each in tuned]:
            tried[label] = try_values(tree, label, tuned[label], search)
            chosen = best_value({value: score(each) for value, each in tried[label].items()}, label, tuned[label])
            tree["axes"]["system"] = systems = with_chosen(systems, label, tuned[label], chosen)
    return found, tried


def with_chosen(systems: Mapping[str, Tree], label: str, tuned: Tuned, value: float) -> dict[str, Tree]:
    """Return the rows, the tuned one with a value in its settings and its label."""
    change = with_value(systems[label], tuned.setting, value)
    return {
        (f"{key} ({tuned.word} = {value:g})" if key == label else key): (change if key == label else old)
        for key, old in systems.items()
    }


def try_values(
    tree: Tree, label: str, tuned: Tuned, search: Callable[[Tree], Sequence[RateSearch]]
) -> dict[float, RateSearch]:
    """Return value -> the search of its rate; further values where the best is at an edge."""
    found: dict[float, RateSearch] = {}
    values = list(tuned.values)
    while values:
        by_label = {tried_label(label, tuned, value): value for value in values}
        found |= {by_label[each.labels["tried"]]: each for each in search(tuning_grid(tree, label, tuned, values))}
        values = next_values({value: score(each) for value, each in found.items()}, label, tuned)
    return found


def tuning_grid(tree: Tree, label: str, tuned: Tuned, values: Sequence[float]) -> Tree:
    """Return a grid whose search has one row per value; nothing of it is reported."""
    change = tree["axes"]["system"][label]
    rows = {tried_label(label, tuned, value): with_value(change, tuned.setting, value) for value in values}
    search = {**tree["search"], "each": [*tree["search"]["each"], tuned.setting], "ties": "best"}
    return {**tree, "axes": {"tried": rows}, "search": search}


def tried_label(label: str, tuned: Tuned, value: float) -> str:
    """Return what a row is called with a value of its tuned setting."""
    return f"{label}, {tuned.word} = {value:g}"


def score(search: RateSearch) -> float:
    """Return what the best rate reached; minus infinity where every rate diverged."""
    best = next(each.estimate for each in search.rates if each.rate == search.best)
    return -math.inf if best is None else best.mean


def best_value(scores: Mapping[float, float], label: str, tuned: Tuned) -> float:
    """Return the value with the best score, the lowest of equals; SystemExit where every run diverged."""
    if all(math.isinf(each) for each in scores.values()):
        values = ", ".join(f"{value:g}" for value in sorted(scores))
        raise SystemExit(
            f"{label}: every run with {tuned.setting} = {values} diverged at every rate; give it other values in "
            "Tuned(...), or lower rates"
        )
    return first_of_best(scores)


def next_values(scores: Mapping[float, float], label: str, tuned: Tuned) -> list[float]:
    """Return the value beyond the edge at which the best lies; empty where it lies inside, or enough were tried."""
    tried, best = sorted(scores), best_value(scores, label, tuned)
    if len(tried) >= MOST or best not in (tried[0], tried[-1]):
        return []
    low = best == tried[0]
    near, next_to = (tuned.values[0], tuned.values[1]) if low else (tuned.values[-1], tuned.values[-2])
    beyond = min(float(f"{best * near / next_to:.6g}"), tuned.at_most)
    return [] if beyond in scores else [beyond]


def with_value(change: Tree, setting: str, value: float) -> Tree:
    """Return a row's change with one more setting."""
    found: dict[str, Any] = copy.deepcopy(change)
    *path, last = setting.split(".")
    node = found
    for key in path:
        node = node.setdefault(key, {})
    node[last] = value
    return found
