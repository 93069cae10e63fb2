"""Tables [client, client] of links and weights: dense arrays, and sparse ones where clients are many.

Functions of this package take both and return the kind that they were given.  ``+``, ``*``, ``>``, ``@``, ``.T``,
``.sum(axis)``, ``.nonzero()`` and ``.diagonal()`` mean the same of both; what does not is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from scipy.sparse import csr_array, diags_array

if TYPE_CHECKING:
    Sparse = Any  # whose stubs know neither the number of its axes nor its arithmetic
else:
    Sparse = csr_array

LARGE = 2000
"""Clients from which tables are sparse: a dense W of so many has 32 MB."""

Adjacency = Bool[np.ndarray, "client client"] | Sparse
Matrix = Float64[np.ndarray, "client client"] | Sparse


def is_large(clients: int) -> bool:
    """Whether tables of so many clients are sparse."""
    return clients >= LARGE


def from_entries(clients: int, rows: Any, columns: Any, values: Any) -> Any:
    """A table with these entries, sparse where ``is_large``; of an entry that is named twice the last value counts.

    ``values``: one per entry, or one for all.
    """
    dtype = np.asarray(values).dtype
    if is_large(clients):
        return _sparse(clients, rows, columns, np.broadcast_to(values, np.shape(rows)))
    table = np.zeros((clients, clients), dtype=dtype)
    table[rows, columns] = values
    return table


def entries_like(table: Any, rows: Any, columns: Any, values: Any) -> Any:
    """A table of the kind and size of ``table`` with these entries, each named once."""
    if isinstance(table, np.ndarray):
        made = np.zeros(table.shape, dtype=np.asarray(values).dtype)
        made[rows, columns] = values
        return made
    return _sparse(table.shape[0], rows, columns, np.broadcast_to(values, np.shape(rows)))


def _sparse(clients: int, rows: Any, columns: Any, values: Any) -> csr_array:
    places = np.asarray(rows, dtype=np.int64) * clients + columns
    kept, last = np.unique(places[::-1], return_index=True)
    values = np.asarray(values)[::-1][last]
    pointers = np.searchsorted(kept, np.arange(clients + 1, dtype=np.int64) * clients)
    return csr_array((values, kept % clients, pointers), shape=(clients, clients))


def identity(clients: int) -> Matrix:
    """The identity, sparse where ``is_large``."""
    return from_entries(clients, np.arange(clients), np.arange(clients), 1.0)


def identity_like(table: Any) -> Any:
    """The identity of the kind and size of ``table``."""
    here = np.arange(table.shape[0])
    return entries_like(table, here, here, 1.0)


def add_to_diagonal(table: Any, values: Float[np.ndarray, " client"]) -> Any:
    """A table with ``values`` added to its diagonal; a dense one is changed."""
    if isinstance(table, np.ndarray):
        table[np.diag_indices_from(table)] += values
        return table
    return (table + diags_array(values)).tocsr()


def stored(table: Any, clients: int) -> Any:
    """A table, dense or sparse, as those of so many clients are kept."""
    if is_large(clients):
        return csr_array(table)
    return as_dense(table)


def as_dense(table: Any) -> np.ndarray:
    """A table as a dense array."""
    return table if isinstance(table, np.ndarray) else table.toarray()


def dense_rows(table: Any, rows: Sequence[int] | Int[np.ndarray, " row"]) -> Any:
    """Some rows of a table as a dense array [row, client]."""
    return as_dense(table[np.asarray(rows, dtype=int)])


def columns_of(table: Any, row: int) -> list[int]:
    """The columns, in order, that are not zero in a row."""
    if isinstance(table, np.ndarray):
        return np.flatnonzero(table[row]).tolist()
    here = slice(table.indptr[row], table.indptr[row + 1])
    return np.sort(table.indices[here][table.data[here] != 0]).tolist()


def row_counts(table: Any) -> Int[np.ndarray, " client"]:
    """How many entries of each row are not zero."""
    return np.bincount(table.nonzero()[0], minlength=table.shape[0])


def column_counts(table: Any) -> Int[np.ndarray, " client"]:
    """How many entries of each column are not zero."""
    return np.bincount(table.nonzero()[1], minlength=table.shape[1])


def is_symmetric(table: Any) -> bool:
    """Whether a table equals its transpose."""
    if isinstance(table, np.ndarray):
        return bool((table == table.T).all())
    return (table != table.T).nnz == 0


def linked_pairs(adjacency: Any, upper: bool) -> list[tuple[int, int]]:
    """The entries (row, column) in order; ``upper``: those above the diagonal alone."""
    i, j = adjacency.nonzero()
    if upper:
        i, j = i[i < j], j[i < j]
    return list(zip(i.tolist(), j.tolist(), strict=True))
