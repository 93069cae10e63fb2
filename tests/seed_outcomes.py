"""Cells of a comparison that ended, made of events."""

from peerlora.experiments.statistics import Outcome
from peerlora.runs.events import Evaluated, RoundDone, RunStarted


def outcome(method, seed, rounds=2, planned=2, rows=10):
    """``rounds``: after which the run ended, its last evaluation on so many ``rows``."""
    start = RunStarted("", method, 2, planned, "accuracy", True, seed, 1, {}, {}, {"kind": "ring"}, 5, [])
    numbers = [0.1, 0.1, 0.5, 0.25, 0, 0.5]
    happened = [start, Evaluated(0, 10, [0.25, 0.5], 0.5, [1.0, 1.0], 1.0, 0.1, False)]
    for t in range(rounds):
        happened.append(RoundDone(t, [1.0, 1.0], *numbers, [[0, 1]], 1, 50, 100, 1, 1, 0))
        last = t + 1 == rounds
        own = [0.5 + seed / 8, 0.75]
        happened.append(Evaluated(t + 1, rows if last else 10, own, 0.5, [1.0, 1.0], 1.0, 0.1, last))
    return Outcome.of_events(
        f"{method}_50%", {"method": f"{method}_50%"}, seed, 0.01, f"cells/{method}-{seed}", happened
    )
