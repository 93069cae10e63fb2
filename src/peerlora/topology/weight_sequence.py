"""What a topology that comes with its own W hands to the schedule."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from peerlora.topology.storage import Matrix, from_entries


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
    here, parts = np.arange(clients), [np.array(group, dtype=int) for group in groups]
    i = np.concatenate([here, *(np.repeat(group, len(group)) for group in parts)])
    j = np.concatenate([here, *(np.tile(group, len(group)) for group in parts)])
    shares = np.repeat([1 / len(group) for group in parts], [len(group) ** 2 for group in parts])
    return from_entries(clients, i, j, np.concatenate([np.ones(clients), shares]))
