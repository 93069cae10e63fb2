"""Over how many clients a model averages the noise of training steps: what a graph does for the learning rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peerlora.topology.schedule import Topology

MOST = 500  # clients, up to which products of W are affordable


def noise_averaged_over(topology: Topology, rates: Sequence[float]) -> float:
    """Count the clients over which a model after the last round averages the noise of steps.

    ``rates``: those of the rounds, up to a factor.  With ``x <- W_t (x + rates[t] e_t)``, and noise e that is
    independent between clients and rounds and of one size, client i is left with the noise
    ``sum over t, j of (rates[t] P_t[i, j])^2``, where P_t is the product of all W from round t on; a client alone has
    ``sum over t of rates[t]^2``.  This is the one over the other, in the mean over clients: 1 without exchange, and the
    number of clients where all are averaged in every round.  Of push-sum j counts by its mass, as its model does.
    """
    masses = [np.ones(topology.clients)]
    for t in range(len(rates) - 1):
        masses.append(topology.at(t).W @ masses[-1])  # stays 1 where rows sum to 1
    P, left = np.eye(topology.clients), 0.0
    for t in reversed(range(len(rates))):
        W = topology.at(t).W
        P = P @ W if isinstance(W, np.ndarray) else (W.T @ P.T).T
        shares = P * masses[t]
        shares /= shares.sum(1, keepdims=True)
        left += rates[t] ** 2 * float((shares**2).sum()) / topology.clients
    return sum(rate**2 for rate in rates) / left
