"""Over how many clients a model averages the noise of training steps: what a graph does for the learning rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from peerlora.topology.schedule import Topology
from peerlora.topology.storage import as_dense

MOST = 500  # clients, up to which products of W are affordable


def noise_averaged_over(topology: Topology, rates: Sequence[float]) -> float:
    """Count the clients over which a model after the last round averages the noise of steps.

    ``rates``: those of the rounds, up to a factor.  It is 1 without exchange, and the number of clients where all are
    averaged in every round; see ``noise_left``.
    """
    return average_over(noise_left(topology, len(rates)), rates)


def average_over(left: Sequence[float], rates: Sequence[float]) -> float:
    """Weigh what is left of the noise of each round, of ``noise_left``, by the round's rate; return the inverse."""
    squares = [rate**2 for rate in rates]
    return sum(squares) / sum(square * share for square, share in zip(squares, left, strict=True))


def noise_left(topology: Topology, rounds: int) -> list[float]:
    """Compute which share of the variance of a round's noise a model is left with after the last one, by round.

    With ``x <- W_t (x + e_t)``, and noise e that is independent between clients and rounds and of one size, client i
    has of round t the noise ``sum over j of P_t[i, j]^2``, where P_t is the product of all W from round t on; this is
    its mean over clients.  Of push-sum j counts by its mass, as its model does.
    """
    masses = None if topology.properties.row_stochastic else _masses(topology, rounds)
    P, left = np.eye(topology.clients), [0.0] * rounds
    for t in reversed(range(rounds)):
        P = P @ as_dense(topology.at(t).W)
        shares = P if masses is None else P * masses[t] / (P @ masses[t])[:, None]
        left[t] = float((shares**2).sum()) / topology.clients
    return left


def _masses(topology: Topology, rounds: int) -> list[Float[np.ndarray, " client"]]:
    """The masses of push-sum at the start of each round."""
    found = [np.ones(topology.clients)]
    for t in range(rounds - 1):
        found.append(topology.at(t).W @ found[-1])
    return found
