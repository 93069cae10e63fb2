"""MATCHA: a random part of a graph's matchings every round, the important ones more often."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from peerlora.randomness import numpy_generator
from peerlora.topology.storage import Adjacency, Matrix, linked_pairs
from peerlora.topology.weight_sequence import WeightSequence

Laplacians = Float[np.ndarray, "matching client client"]
_STEPS, _DIGITS = 300, 3


@dataclass(frozen=True)
class Matcha:
    """Matching m is used with probability ``p[m]``: ``W_t = I - a sum_m B_m L_m``, with B drawn anew every round.

    Source: Wang, Sahu, Yang, Joshi, Kar 2019, arXiv 1905.09435; E[W'W] as in the authors' code.
    Differs: greedy matchings; p by projected ascent and a by ternary search in place of a semidefinite solver; p is
    rounded to three digits, so that all machines draw the same matchings.
    """

    L: Laplacians
    p: Float[np.ndarray, " matching"]
    a: float

    def W(self, seed: int, t: int) -> Matrix:
        """The matchings of round ``t``; with a large ``a`` diagonal entries may be below zero."""
        used = numpy_generator(seed, "graph", round=t).random(len(self.p)) < self.p
        return np.eye(self.L.shape[1]) - self.a * self.L[used].sum(axis=0)

    @property
    def plan(self) -> WeightSequence:
        """For the schedule."""
        return WeightSequence(self.W, symmetric=True)


def matcha(adjacency: Adjacency, budget: float) -> Matcha:
    """The matchings of a graph, of which a round uses the share ``budget`` on average."""
    clients = adjacency.shape[0]
    found = matchings(adjacency)
    L = np.stack([_laplacian(pairs, clients) for pairs in found]) if found else np.zeros((0, clients, clients))
    p = probabilities(L, budget)
    return Matcha(L, p, best_weight(L, p))


def matchings(adjacency: Adjacency) -> list[list[tuple[int, int]]]:
    """The links, each in the first matching in which both its ends are free: at most 2 x the largest degree - 1."""
    found: list[list[tuple[int, int]]] = []
    busy: list[set[int]] = []
    for i, j in linked_pairs(adjacency, upper=True):
        m = next((m for m, taken in enumerate(busy) if i not in taken and j not in taken), len(found))
        if m == len(found):
            found.append([])
            busy.append(set())
        found[m].append((i, j))
        busy[m] |= {i, j}
    return found


def probabilities(L: Laplacians, budget: float) -> Float[np.ndarray, " matching"]:
    """The p in [0, 1] with mean ``budget`` for which the second smallest eigenvalue of ``sum_m p_m L_m`` is largest.

    A concave problem, solved by supergradients; where that eigenvalue is multiple, by the mean over its eigenspace.
    """
    p = np.full(len(L), float(budget))
    best, most = p, -1.0
    for step in range(_STEPS if len(L) > 1 and budget < 1 else 0):
        values, vectors = np.linalg.eigh(np.tensordot(p, L, 1))
        if values[1] > most + 1e-12:
            best, most = p, values[1]
        space = vectors[:, 1:][:, np.abs(values[1:] - values[1]) < 1e-9]
        slope = np.einsum("ie,mij,je->m", space, L, space) / space.shape[1]
        p = _onto_budget(p + 0.5 / (1 + step) ** 0.5 * (slope - slope.mean()) / max(1e-12, np.abs(slope).max()), budget)
    return best.round(_DIGITS)


def mean_square(L: Laplacians, p: Float[np.ndarray, " matching"], a: float) -> Matrix:
    """``E[W'W] = I - 2 a Lbar + a^2 (Lbar^2 + 2 sum_m p_m (1 - p_m) L_m)`` with ``Lbar = sum_m p_m L_m``."""
    mean, spread = np.tensordot(p, L, 1), np.tensordot(p * (1 - p), L, 1)
    return np.eye(L.shape[1]) - 2 * a * mean + a**2 * (mean @ mean + 2 * spread)


def contraction(L: Laplacians, p: Float[np.ndarray, " matching"], a: float) -> float:
    """``|| E[W'W] - J ||_2``: what a round leaves of the squared disagreement."""
    return float(np.linalg.eigvalsh(mean_square(L, p, a) - 1 / L.shape[1])[-1])


def best_weight(L: Laplacians, p: Float[np.ndarray, " matching"]) -> float:
    """The a with the smallest contraction, by ternary search: it is convex in a."""
    if not p.any():
        return 0.0
    low, high = 0.0, 2.0
    for _ in range(60):
        one, other = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, other) if contraction(L, p, one) < contraction(L, p, other) else (one, high)
    return round((low + high) / 2, 9)


def _laplacian(pairs: list[tuple[int, int]], clients: int) -> Matrix:
    L = np.zeros((clients, clients))
    for i, j in pairs:
        L[i, i] = L[j, j] = 1
        L[i, j] = L[j, i] = -1
    return L


def _onto_budget(p: Float[np.ndarray, " matching"], budget: float) -> Float[np.ndarray, " matching"]:
    """The nearest point of [0, 1]^M with mean ``budget``: p shifted by the number that bisection finds, and clipped."""
    low, high = -1 - p.max(), 1 - p.min()
    for _ in range(60):
        shift = (low + high) / 2
        low, high = (shift, high) if np.clip(p + shift, 0, 1).mean() < budget else (low, shift)
    return np.clip(p + (low + high) / 2, 0, 1)
