"""Mixing matrices W (rows are receivers) from a graph, and how fast they make clients agree.

``neighbours`` of a client never include itself; every W is float64 [client, client], dense or sparse as its graph is
(see ``storage``).  Those of an undirected graph are doubly stochastic, but for the ones that say what else they keep:
``metropolis_target``, ``push_sum``, ``row_average``.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float

from peerlora.errors import TopologyError
from peerlora.topology.spectrum import largest_eigenvalue, second_modulus
from peerlora.topology.storage import (
    Adjacency,
    Matrix,
    add_to_diagonal,
    column_counts,
    entries_like,
    identity_like,
    linked_pairs,
    row_counts,
)

Row = np.ndarray | dict[int, float]
"""A row of a matrix that is filled step by step: dense, or its entries by column."""


def weights(adjacency: Adjacency, rule: str) -> Matrix:
    """W by one of ``RULES``, only between neighbours."""
    return RULES[rule](adjacency)


def metropolis(adjacency: Adjacency) -> Matrix:
    """1 / (1 + the larger of the two degrees) on a link, the rest of each row on the diagonal.

    Source: Xiao, Boyd, Lall 2005, "A scheme for robust distributed sensor fusion based on average consensus".
    """
    degrees, (i, j) = row_counts(adjacency), adjacency.nonzero()
    return _fill_diagonal(entries_like(adjacency, i, j, 1 / (1.0 + np.maximum(degrees[i], degrees[j]))))


def laplacian(adjacency: Adjacency) -> Matrix:
    """I - 2 L / (3 lambda_max(L)), where L is the graph Laplacian; the identity without links.

    The diagonal stays at or above 1/3, because no degree exceeds lambda_max(L).
    Source: Dec-LoRA 2025, arXiv 2501.15361, for its Erdos-Renyi graph.
    """
    i, j = adjacency.nonzero()
    if not len(i):
        return identity_like(adjacency)
    L = add_to_diagonal(entries_like(adjacency, i, j, -1.0), row_counts(adjacency).astype(float))
    return _fill_diagonal(entries_like(adjacency, i, j, 2 / (3 * largest_eigenvalue(L))))


def uniform(adjacency: Adjacency) -> Matrix:
    """1 / (1 + the largest degree of the graph) on every link: 1/3 on a ring, 1/clients on the complete graph."""
    i, j = adjacency.nonzero()
    return _fill_diagonal(entries_like(adjacency, i, j, 1 / (1.0 + row_counts(adjacency).max())))


def metropolis_target(adjacency: Adjacency, c: Float[np.ndarray, " client"]) -> Matrix:
    """``w_ij = min(1 / (1 + d_i), (c_j / c_i) / (1 + d_j))``, the rest of each row on the diagonal.

    Rows sum to 1 and ``c_i w_ij = c_j w_ji``, so repeated mixing ends at ``sum_i c_i x_i / sum_i c_i`` exactly, where
    rows that are reweighted by c and renormalised do not.  Each end of a link needs the other's c and degree alone.

    Raises TopologyError unless every ``c`` is a positive number.
    Source: Hastings 1970, with a uniform proposal over the closed neighbourhood.
    """
    if not (np.isfinite(c).all() and (c > 0).all()):
        raise TopologyError(f"target weights {np.asarray(c).tolist()} given; each client needs a positive number")
    share, (i, j) = 1.0 / (1.0 + row_counts(adjacency)), adjacency.nonzero()
    return _fill_diagonal(entries_like(adjacency, i, j, np.minimum(share[i], (1 / c)[i] * (c * share)[j])))


def lazy(W: Matrix) -> Matrix:
    """``(I + W) / 2``: half as fast, and without negative eigenvalues where W is symmetric."""
    return (identity_like(W) + W) / 2


def push_sum(adjacency: Adjacency) -> Matrix:
    """Senders split their mass evenly: ``1 / (1 + out-degree of j)`` in column j, its diagonal included.

    ``adjacency[i, j]``: i hears from j.  Columns sum to 1; rows do too where all have equally many neighbours each way.
    Source: Kempe, Dobra, Gehrke 2003, "Gossip-based computation of aggregate information".
    """
    here = np.arange(adjacency.shape[0])
    i, j = (np.concatenate([ends, here]) for ends in adjacency.nonzero())
    return entries_like(adjacency, i, j, 1 / (1.0 + column_counts(adjacency))[j])


def row_average(adjacency: Adjacency) -> Matrix:
    """Receivers take the plain average of what reaches them: rows sum to 1, and the limit is a weighted mean."""
    turned = push_sum(adjacency.T).T
    return np.ascontiguousarray(turned) if isinstance(turned, np.ndarray) else turned.tocsr()


def pairwise_weights(adjacency: Adjacency, generator: np.random.Generator) -> Matrix:
    """The product of half/half averages, one contact after another in a random order.

    Not symmetric, and it reaches beyond neighbours: what a client got in an early contact it passes on in a later one.
    Source: Boyd, Ghosh, Prabhakar, Shah 2006, "Randomized gossip algorithms", for one contact.
    """
    contacts = np.array(linked_pairs(adjacency, upper=True), dtype=int).reshape(-1, 2)
    dense = isinstance(adjacency, np.ndarray)
    rows: list[Row] = list(np.eye(len(adjacency))) if dense else [{i: 1.0} for i in range(adjacency.shape[0])]
    for i, j in generator.permutation(contacts).tolist():
        rows[i] = rows[j] = _half_of_each(rows[i], rows[j])
    if dense:
        return np.stack([np.asarray(row) for row in rows])
    filled = [dict(sorted(row.items())) for row in rows if isinstance(row, dict)]
    receivers = np.repeat(np.arange(len(filled)), [len(row) for row in filled])
    senders, values = (np.array([each for row in filled for each in part(row)]) for part in (dict.keys, dict.values))
    return entries_like(adjacency, receivers, senders, values)


def _half_of_each(one: Row, other: Row) -> Row:
    if isinstance(one, dict) and isinstance(other, dict):
        return {column: (one.get(column, 0.0) + other.get(column, 0.0)) / 2 for column in one | other}
    assert isinstance(one, np.ndarray) and isinstance(other, np.ndarray)
    return (one + other) / 2


def remove_links(W: Matrix, missing: Adjacency, sender_keeps: bool = False) -> Matrix:
    """W without the ``missing`` links; what W_ij weighed goes to W_ii, or to W_jj where the sender keeps it.

    The first keeps the sums of rows, the second those of columns: what was not sent is not lost.  A symmetric W without
    links both ways stays symmetric, and both are the same.
    """
    lost = W * missing
    return add_to_diagonal(W - lost, lost.sum(axis=0 if sender_keeps else 1))


def rho(second_moment: Matrix) -> float:
    """The factor by which a round shrinks the disagreement norm (root mean square, worst case): 0 agrees at once.

    ``second_moment`` is E[W^T W]; rho^2 is the largest eigenvalue of E[W^T W] - J, with J = 1/clients everywhere.
    """
    clients = len(second_moment)
    return rho_of_eigenvalue(largest_eigenvalue(second_moment - 1 / clients), clients)


def rho_of_eigenvalue(largest: float, clients: int, connected: bool = False) -> float:
    """rho from the largest eigenvalue of E[W^T W] - J, without the rounding that this comes with.

    ``connected``: the clients are known to come to agree, so rho is below 1, however close: a ring of a million clients
    has 1 - 1.3e-11, which would else be taken for the 1 of several groups that never agree.
    """
    # Without this, rounding of 1e-16 would read as rho 1e-8, and a disconnected graph as one that slowly agrees.
    rounding = 10 * clients * np.finfo(float).eps
    if largest <= rounding:
        return 0.0
    if connected:
        return math.sqrt(min(largest, 1 - np.finfo(float).eps))
    return 1.0 if largest >= 1 - rounding else math.sqrt(largest)


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
        x = generator.normal(size=W.shape[0]) if x is None else x
        x = (W if columns else W.T) @ (x - x.mean())
        size = float(np.linalg.norm(x))
        if size < 1e-14:
            return 0.0
        x = x / size
        logs.append(math.log(size))
    return min(1.0, math.exp(np.mean(logs[len(logs) // 10 :])))


def static_rho(W: Matrix) -> float:
    """``long_run_rho`` of one W: the second largest modulus of its eigenvalues."""
    return second_modulus(W)


def mean_over_permutations(diagonal: float, total: float, clients: int) -> float:
    """The largest eigenvalue off the mean of a matrix averaged over all renumberings of the clients.

    That average has one value on the diagonal, whose sum here is ``diagonal``, and one elsewhere; ``total``: the sum of
    all entries.
    """
    if clients == 1:
        return 0.0
    return diagonal / clients - (total - diagonal) / (clients * (clients - 1))


RULES: dict[str, Callable[[Adjacency], Matrix]] = {
    "metropolis": metropolis,
    "laplacian": laplacian,
    "uniform": uniform,
    "push-sum": push_sum,
    "row-average": row_average,
}


def _fill_diagonal(W: Matrix) -> Matrix:
    """Rows that sum to 1, whatever the links leave going to the diagonal, which is empty."""
    return add_to_diagonal(W, 1 - W.sum(axis=1))
