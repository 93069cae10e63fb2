"""EquiTopo: random cyclic shifts, whose mixing speed does not depend on the number of clients."""

import math

import numpy as np

from peerlora.errors import TopologyError
from peerlora.randomness import numpy_generator
from peerlora.topology.weight_sequence import WeightSequence
from peerlora.topology.weights import Matrix


def shift_basis(clients: int, u: int) -> Matrix:
    """``A^(u) = I / N + (N - 1) / N P^u``, P^u hands everything on by u places; its mean over u = 1 ... N - 1 is J."""
    return (np.eye(clients) + (clients - 1) * np.roll(np.eye(clients), u, axis=0)) / clients


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
    W = np.mean([shift_basis(clients, int(u)) for u in shifts], axis=0)
    W = (W + W.T) / 2 if kind == "u-equistatic" else W
    return WeightSequence(lambda seed, t: W, symmetric=bool((W == W.T).all()), period=1)


def equidyn(kind: str, clients: int, eta: float) -> WeightSequence:
    """``W = (1 - eta) I + eta A^(u)`` with a new shift u every round; ou-equidyn: with undirected pairs i, i + u.

    The pairs are taken from a random client on; each client is in one pair at most.
    Source: as ``equistatic``; eta = 1/2 because 1 leaves ``1 - 2/N`` of the squared disagreement a round.
    """
    shifted = _random_shift if kind == "od-equidyn" else _random_pairs

    def W(seed: int, t: int) -> Matrix:
        if clients == 1:
            return np.eye(1)
        generator = numpy_generator(seed, "graph", round=t)
        return (1 - eta) * np.eye(clients) + eta * shifted(clients, generator)

    return WeightSequence(W, symmetric=kind == "ou-equidyn")


def _random_shift(clients: int, generator: np.random.Generator) -> Matrix:
    return shift_basis(clients, int(generator.integers(1, clients)))


def _random_pairs(clients: int, generator: np.random.Generator) -> Matrix:
    u, first = int(generator.integers(1, clients)), int(generator.integers(clients))
    W, free = np.eye(clients), np.ones(clients, dtype=bool)
    for i in (first + np.arange(clients)) % clients:
        j = (i + u) % clients
        if free[i] and free[j]:
            free[[i, j]] = False
            W[i, j] = W[j, i] = (clients - 1) / clients
            W[i, i] = W[j, j] = 1 / clients
    return W
