"""Sparse mixing matrices, for numbers of nodes at which a dense [client, client] table does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, eigsh

from peerlora.errors import TopologyError

Links = Int[np.ndarray, "link 2"]
"""Undirected links (i, j), each once."""
_TOLERANCE = 1e-12  # of the eigenvalue, relative
_VECTORS = 60  # that Lanczos keeps: eigenvalues of large graphs lie close together


def sparse_metropolis(links: Links, nodes: int) -> csr_array:
    """Metropolis weights of undirected links, as ``weights.metropolis``: ``1 / (1 + larger degree)`` on each.

    Rows are receivers; they and the columns sum to 1.  Raises TopologyError for links from a node to itself, or twice.
    """
    ends = np.concatenate([links, links[:, ::-1]])
    degrees = np.bincount(ends[:, 0], minlength=nodes)
    share = 1.0 / (1.0 + np.maximum(degrees[ends[:, 0]], degrees[ends[:, 1]]))
    W = csr_array((share, (ends[:, 0], ends[:, 1])), shape=(nodes, nodes))
    if W.nnz < len(ends) or (links[:, 0] == links[:, 1]).any():
        raise TopologyError("links from a node to itself, or twice, given; expected each pair of different nodes once")
    rest = 1.0 - W.sum(axis=1)
    return (W + csr_array((rest, (np.arange(nodes), np.arange(nodes))), shape=(nodes, nodes))).tocsr()


def ring_links(nodes: int) -> Links:
    """Each node and the next one."""
    here = np.arange(nodes)
    return np.stack([here, (here + 1) % nodes], axis=1)


def torus_links(side: int) -> Links:
    """Each node of a square grid with ``side`` rows, its right and its lower neighbour, wrapped around."""
    place = np.arange(side * side).reshape(side, side)
    pairs = [np.stack([place.ravel(), np.roll(place, -1, axis).ravel()], axis=1) for axis in (0, 1)]
    return np.concatenate(pairs)


def random_regular_links(nodes: int, degree: int, generator: np.random.Generator) -> Links:
    """The union of ``degree / 2`` random rings: a connected graph in which nearly every node has that degree.

    Rings that share a link give it once.  Raises TopologyError for an odd degree.
    """
    if degree % 2 or degree < 2:
        raise TopologyError(f"degree={degree} given; a union of rings has an even one, from 2 on")
    rings = []
    for _ in range(degree // 2):
        order = generator.permutation(nodes)
        rings.append(np.sort(np.stack([order, np.roll(order, -1)], axis=1), axis=1))
    return np.unique(np.concatenate(rings), axis=0)


def sparse_rho(W: csr_array) -> float:
    """``|| W - J ||``, the factor by which a round shrinks the disagreement norm at worst; see ``weights.rho``."""
    return float(np.sqrt(largest_off_mean(lambda x: W.T @ (W @ x), len(W.indptr) - 1)))


def largest_off_mean(
    apply: Callable[[Float[np.ndarray, " client"]], Float[np.ndarray, " client"]], clients: int
) -> float:
    """The largest eigenvalue of ``M - J`` for a symmetric M with ``M 1 = 1``, by Lanczos from products alone.

    ``apply`` multiplies by M.
    """

    def deflated(x: np.ndarray) -> np.ndarray:
        return apply(x.ravel()) - x.mean()

    start = np.random.default_rng(0).standard_normal(clients)  # the same for all: the answer must not depend on a seed
    operator = LinearOperator((clients, clients), matvec=deflated, dtype=float)  # pyright: ignore[reportCallIssue]
    vectors = min(clients - 1, _VECTORS)
    lanczos: Any = eigsh  # whose stub has a tolerance that is a whole number
    found = lanczos(operator, k=1, which="LA", v0=start, ncv=vectors, tol=_TOLERANCE, return_eigenvectors=False)
    return max(0.0, float(found[0]))


def rounds_to_agree(
    W: csr_array, x: Float[np.ndarray, "client scalar"], left: float, most: int
) -> tuple[int | None, Float[np.ndarray, "client scalar"]]:
    """How many rounds ``x <- W x`` leave this share of the disagreement norm, and ``x`` then; None: not in ``most``."""
    started = np.linalg.norm(x - x.mean(axis=0))
    for done in range(most + 1):
        if np.linalg.norm(x - x.mean(axis=0)) <= left * started:
            return done, x
        x = W @ x
    return None, x
