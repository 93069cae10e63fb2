"""Mixing matrices W (rows are receivers) from a graph, and how fast they make clients agree.

``neighbours`` of a client never include itself; every W is float64 [client, client].  Those of an undirected graph are
doubly stochastic, but for the ones that say what else they keep: ``metropolis_target``, ``push_sum``, ``row_average``.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, Float64

from peerlora.errors import TopologyError
from peerlora.topology.graphs import Adjacency

Matrix = Float64[np.ndarray, "client client"]


def weights(adjacency: Adjacency, rule: str) -> Matrix:
    """W by one of ``RULES``, only between neighbours."""
    return RULES[rule](adjacency)


def metropolis(adjacency: Adjacency) -> Matrix:
    """1 / (1 + the larger of the two degrees) on a link, the rest of each row on the diagonal.

    Source: Xiao, Boyd, Lall 2005, "A scheme for robust distributed sensor fusion based on average consensus".
    """
    degrees = adjacency.sum(axis=1)
    return _fill_diagonal(adjacency / (1.0 + np.maximum.outer(degrees, degrees)))


def laplacian(adjacency: Adjacency) -> Matrix:
    """I - 2 L / (3 lambda_max(L)), where L is the graph Laplacian; the identity without links.

    The diagonal stays at or above 1/3, because no degree exceeds lambda_max(L).
    Source: Dec-LoRA 2025, arXiv 2501.15361, for its Erdos-Renyi graph.
    """
    if not adjacency.any():
        return np.eye(len(adjacency))
    L = np.diag(adjacency.sum(axis=1, dtype=float)) - adjacency
    largest = np.linalg.eigvalsh(L)[-1]
    return _fill_diagonal(adjacency * (2 / (3 * largest)))


def uniform(adjacency: Adjacency) -> Matrix:
    """1 / (1 + the largest degree of the graph) on every link: 1/3 on a ring, 1/clients on the complete graph."""
    return _fill_diagonal(adjacency / (1.0 + adjacency.sum(axis=1).max()))


def metropolis_target(adjacency: Adjacency, c: Float[np.ndarray, " client"]) -> Matrix:
    """``w_ij = min(1 / (1 + d_i), (c_j / c_i) / (1 + d_j))``, the rest of each row on the diagonal.

    Rows sum to 1 and ``c_i w_ij = c_j w_ji``, so repeated mixing ends at ``sum_i c_i x_i / sum_i c_i`` exactly, where
    rows that are reweighted by c and renormalised do not.  Each end of a link needs the other's c and degree alone.

    Raises TopologyError unless every ``c`` is a positive number.
    Source: Hastings 1970, with a uniform proposal over the closed neighbourhood.
    """
    if not (np.isfinite(c).all() and (c > 0).all()):
        raise TopologyError(f"target weights {np.asarray(c).tolist()} given; each client needs a positive number")
    share = 1.0 / (1.0 + adjacency.sum(axis=1))
    return _fill_diagonal(np.where(adjacency, np.minimum(share[:, None], np.outer(1 / c, c * share)), 0.0))


def lazy(W: Matrix) -> Matrix:
    """``(I + W) / 2``: half as fast, and without negative eigenvalues where W is symmetric."""
    return (np.eye(len(W)) + W) / 2


def push_sum(adjacency: Adjacency) -> Matrix:
    """Senders split their mass evenly: ``1 / (1 + out-degree of j)`` in column j, its diagonal included.

    ``adjacency[i, j]``: i hears from j.  Columns sum to 1; rows do too where all have equally many neighbours each way.
    Source: Kempe, Dobra, Gehrke 2003, "Gossip-based computation of aggregate information".
    """
    linked = adjacency | np.eye(len(adjacency), dtype=bool)
    return linked / linked.sum(axis=0)


def row_average(adjacency: Adjacency) -> Matrix:
    """Receivers take the plain average of what reaches them: rows sum to 1, and the limit is a weighted mean."""
    return np.ascontiguousarray(push_sum(adjacency.T).T)


def pairwise_weights(adjacency: Adjacency, generator: np.random.Generator) -> Matrix:
    """The product of half/half averages, one contact after another in a random order.

    Not symmetric, and it reaches beyond neighbours: what a client got in an early contact it passes on in a later one.
    Source: Boyd, Ghosh, Prabhakar, Shah 2006, "Randomized gossip algorithms", for one contact.
    """
    W = np.eye(len(adjacency))
    contacts = np.argwhere(np.triu(adjacency))
    for i, j in generator.permutation(contacts).tolist():
        mean = (W[i] + W[j]) / 2
        W[i] = W[j] = mean
    return W


def remove_links(W: Matrix, missing: Adjacency, sender_keeps: bool = False) -> Matrix:
    """W without the ``missing`` links; what W_ij weighed goes to W_ii, or to W_jj where the sender keeps it.

    The first keeps the sums of rows, the second those of columns: what was not sent is not lost.  A symmetric W without
    links both ways stays symmetric, and both are the same.
    """
    kept = np.where(missing, 0.0, W)
    kept[np.diag_indices_from(kept)] += np.where(missing, W, 0.0).sum(axis=0 if sender_keeps else 1)
    return kept


def rho(second_moment: Matrix) -> float:
    """The factor by which a round shrinks the disagreement norm (root mean square, worst case): 0 agrees at once.

    ``second_moment`` is E[W^T W]; rho^2 is the largest eigenvalue of E[W^T W] - J, with J = 1/clients everywhere.
    """
    clients = len(second_moment)
    largest = np.linalg.eigvalsh(second_moment - 1 / clients)[-1]
    # Without this, rounding of 1e-16 would read as rho 1e-8, and a disconnected graph as one that slowly agrees.
    rounding = 10 * clients * np.finfo(float).eps
    if largest <= rounding:
        return 0.0
    return 1.0 if largest >= 1 - rounding else float(np.sqrt(largest))


def spectral_gap(second_moment: Matrix) -> float:
    """1 - rho."""
    return 1 - rho(second_moment)


def long_run_rho(matrices: Iterable[Matrix], columns: bool, generator: np.random.Generator) -> float:
    """The factor per round by which these W shrink the disagreement in the long run, where they keep one sum alone.

    Column-stochastic W (``columns``) map vectors with sum 0 to such: the growth of a random one is the rate at which
    push-sum's ratios agree.  Of row-stochastic W the transposes are taken.  The first rounds do not count.
    """
    x, logs = None, []
    for W in matrices:
        x = generator.normal(size=len(W)) if x is None else x
        x = (W if columns else W.T) @ (x - x.mean())
        size = float(np.linalg.norm(x))
        if size < 1e-14:
            return 0.0
        x = x / size
        logs.append(math.log(size))
    return min(1.0, math.exp(np.mean(logs[len(logs) // 10 :])))


def static_rho(W: Matrix) -> float:
    """``long_run_rho`` of one W: the second largest modulus of its eigenvalues."""
    return float(np.sort(np.abs(np.linalg.eigvals(W)))[-2]) if len(W) > 1 else 0.0


def over_permutations(matrix: Matrix) -> Matrix:
    """The mean of a matrix over all renumberings of the clients: one value on the diagonal, one elsewhere."""
    clients = len(matrix)
    if clients == 1:
        return matrix
    diagonal = np.trace(matrix) / clients
    elsewhere = (matrix.sum() - np.trace(matrix)) / (clients * (clients - 1))
    return np.where(np.eye(clients, dtype=bool), diagonal, elsewhere)


RULES: dict[str, Callable[[Adjacency], Matrix]] = {
    "metropolis": metropolis,
    "laplacian": laplacian,
    "uniform": uniform,
    "push-sum": push_sum,
    "row-average": row_average,
}


def _fill_diagonal(W: Matrix) -> Matrix:
    """Rows that sum to 1, whatever the links leave going to the diagonal."""
    np.fill_diagonal(W, 1 - W.sum(axis=1))
    return W
