"""What a topology that comes with its own W hands to the schedule."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from peerlora.topology.weights import Matrix


@dataclass(frozen=True)
class WeightSequence:
    """W of every round, doubly stochastic, before links drop; pure in (seed, t)."""

    W: Callable[[int, int], Matrix]
    """(seed, t) -> W; links are where it is not zero."""
    symmetric: bool
    period: int | None = None
    """Rounds after which the same matrices come again; None where every round draws."""


def averaging(clients: int, groups: list[list[int]]) -> Matrix:
    """The W of a round in which every group takes its plain mean and everybody else keeps what they have."""
    W = np.eye(clients)
    for group in groups:
        W[np.ix_(group, group)] = 1 / len(group)
    return W
