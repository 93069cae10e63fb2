"""Chooses settings of methods as rates are chosen: on rows set aside, with the search's seeds, growing at an edge.

Every value is tried at all rates of the grid, and the best mean client of any counts.  The runs are those that the
search of the rates needs anyway for the value that is taken, so they are not made twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peerlora.experiments.comparison import MAIN, Comparison
from study_base import Tree, Tuned

MOST = 6
"""Values that a setting may come to."""


def tuned_grids(
    grids: Sequence[Tree], tuned: Mapping[str, Tuned], run: Callable[[Tree], Comparison]
) -> tuple[list[Tree], dict[str, Tree]]:
    """Return the grids with the chosen values in the rows' labels and settings, and per row what each value reached."""
    found, scores = [copy.deepcopy(tree) for tree in grids], {}
    for tree in found:
        systems = tree["axes"]["system"]
        for label in [each for each in systems if each in tuned]:
            scores[label] = try_values(tree, label, tuned[label], run)
            chosen = best_value(scores[label])
            change = with_value(systems[label], tuned[label].setting, chosen)
            name = f"{label} ({tuned[label].setting.rpartition('.')[2]} = {chosen:g})"
            tree["axes"]["system"] = systems = {
                (name if key == label else key): (change if key == label else old) for key, old in systems.items()
            }
    return found, scores


def try_values(tree: Tree, label: str, tuned: Tuned, run: Callable[[Tree], Comparison]) -> dict[float, float]:
    """Return value -> the best mean client of any rate; further values where the best is at an edge."""
    scores: dict[float, float] = {}
    values = list(tuned.values)
    while values:
        scores |= score_values(run(tuning_grid(tree, label, tuned.setting, values)), values)
        values = next_values(scores, tuned)
    return scores


def tuning_grid(tree: Tree, label: str, setting: str, values: Sequence[float]) -> Tree:
    """One row per value and rate, scored on the rows that the search sets aside."""
    aside = {**tree["base"]["data"], "eval": None, "holdout": tree["search"]["holdout"]}
    return {
        "base": {**tree["base"], "data": aside},
        "axes": {
            "tried": {f"{value:g}": with_value(tree["axes"]["system"][label], setting, value) for value in values},
            "train.lr": list(tree["search"]["rates"]),
        },
        "seeds": tree["search"]["seeds"],
        "share_prefix": True,
    }


def score_values(result: Comparison, values: Sequence[float]) -> dict[float, float]:
    """Return value -> its best rate's mean client; minus infinity where every rate diverged."""
    found = dict.fromkeys(values, float("-inf"))
    by_name = {f"{value:g}": value for value in values}
    for line in result.lines:
        if MAIN in line.estimates and not line.diverged:
            value = by_name[line.labels["tried"]]
            found[value] = max(found[value], line.estimates[MAIN].mean)
    return found


def best_value(scores: Mapping[float, float]) -> float:
    """Return the value with the best score, the lowest of equals."""
    return max(sorted(scores), key=lambda value: scores[value])


def next_values(scores: Mapping[float, float], tuned: Tuned) -> list[float]:
    """Return the value beyond the edge at which the best lies; empty where it lies inside, or enough were tried."""
    tried, best = sorted(scores), best_value(scores)
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
