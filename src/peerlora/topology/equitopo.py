"""EquiTopo: random cyclic shifts, whose mixing speed does not depend on the number of clients."""

import math
from typing import Any

import numpy as np

from peerlora.errors import TopologyError
from peerlora.randomness import numpy_generator
from peerlora.topology.storage import Matrix, from_entries, identity, is_symmetric, stored
from peerlora.topology.weight_sequence import WeightSequence


def shift_basis(clients: int, u: int) -> Matrix:
    """``A^(u) = I / N + (N - 1) / N P^u``, P^u hands everything on by u places; its mean over u = 1 ... N - 1 is J."""
    return (identity(clients) + (clients - 1) * shift(clients, u)) / clients


def shift(clients: int, u: int) -> Matrix:
    """``P^u``: client i hands everything to i + u."""
    here = np.arange(clients)
    return from_entries(clients, (here + u) % clients, here, 1.0)


def equistatic(kind: str, clients: int, degree: int | None, seed: int) -> WeightSequence:
    """``W = mean of A^(u)`` over M random shifts u, drawn once; u-equistatic: the mean of that and its transpose.

    Source: Song, Li, Jin, Shi, Yan, Yin, Yuan 2022, arXiv 2210.07881.
    Differs: no shift is drawn twice; by default M is log2(N), rounded up.
    """
    M = degree or max(1, math.ceil(math.log2(clients)) if clients > 1 else 1)
    if M > max(1, clients - 1):
        raise TopologyError(
            f"{kind} with degree {M} and {clients} clients; there are {clients - 1} different shifts; lower "
            "topology.degree or use topology.kind=complete"
        )
    shifts = numpy_generator(seed, "graph").choice(max(1, clients - 1), M, replace=False) + 1
    mean: Any = sum(shift_basis(clients, int(u)) for u in shifts) / M
    W = stored((mean + mean.T) / 2 if kind == "u-equistatic" else mean, clients)
    return WeightSequence(lambda seed, t: W, symmetric=is_symmetric(W), period=1)


def equidyn(kind: str, clients: int, eta: float) -> WeightSequence:
    """``W = (1 - eta) I + eta A^(u)`` with a new shift u every round; ou-equidyn: with undirected pairs i, i + u.

    The pairs are taken from a random client on; each client is in one pair at most.
    Source: as ``equistatic``; eta = 1/2 because 1 leaves ``1 - 2/N`` of the squared disagreement a round.
    """
    shifted = _random_shift if kind == "od-equidyn" else _random_pairs

    def W(seed: int, t: int) -> Matrix:
        if clients == 1:
            return identity(1)
        generator = numpy_generator(seed, "graph", round=t)
        return (1 - eta) * identity(clients) + eta * shifted(clients, generator)

    return WeightSequence(W, symmetric=kind == "ou-equidyn")


def _random_shift(clients: int, generator: np.random.Generator) -> Matrix:
    return shift_basis(clients, int(generator.integers(1, clients)))


def _random_pairs(clients: int, generator: np.random.Generator) -> Matrix:
    u, first = int(generator.integers(1, clients)), int(generator.integers(clients))
    partner = np.arange(clients)  # of a client, itself where it has none
    for i in (first + np.arange(clients)) % clients:
        j = (i + u) % clients
        if partner[i] == i and partner[j] == j:
            partner[[i, j]] = j, i
    here, paired = np.arange(clients), np.flatnonzero(partner != np.arange(clients))
    i, j = np.concatenate([here, paired]), np.concatenate([here, partner[paired]])
    own = np.where(partner == here, 1.0, 1 / clients)
    return from_entries(clients, i, j, np.concatenate([own, np.full(len(paired), (clients - 1) / clients)]))
