"""The mean of ``W^T W`` over the rounds of a run, of which rho follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from peerlora.topology.spectrum import largest_off_mean, mean_gram
from peerlora.topology.storage import Matrix, is_large
from peerlora.topology.weights import rho, rho_of_eigenvalue

KEPT = 200  # matrices of a large run, beyond which every other one is dropped and half of the later ones are kept


class SecondMoment:
    """The second moment of the matrices so far: a dense sum, or, of many clients, the sparse matrices themselves.

    A matrix that comes again at once is kept once.  Where more than ``KEPT`` differ, every second of them is kept, then
    every fourth, and so on: rho is that of an even sample of the rounds.
    """

    def __init__(self, clients: int):
        self.clients = clients
        self._sum = None if is_large(clients) else np.zeros((clients, clients))
        self._kept: list[tuple[csr_array, int]] = []
        """Matrix, and how many rounds had it."""
        self._seen, self._stride = 0, 1
        """How many matrices differed from the one before, and one of how many of these is kept."""
        self._rho: float | None = None
        """Of what is kept, where it has been worked out."""

    def add(self, W: Matrix) -> None:
        """Add the matrix of the next round."""
        if self._sum is not None:
            self._sum += W.T @ W
            return
        W = csr_array(W)
        if self._kept and _equal(self._kept[-1][0], W):
            self._kept[-1] = W, self._kept[-1][1] + 1
            self._rho = self._rho if len(self._kept) == 1 else None
            return
        if self._seen % self._stride == 0:
            self._kept.append((W, 1))
            self._rho = None
        self._seen += 1
        if len(self._kept) > KEPT:
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    def rho(self, rounds: int) -> float:
        """How much of the disagreement norm a round left, in the mean over the rounds so far."""
        if self._sum is not None:
            return rho(self._sum / rounds)
        if self._rho is None:
            matrices, times = zip(*self._kept, strict=True)
            alone = matrices[0].T @ matrices[0] if len(matrices) == 1 else None
            largest = largest_off_mean(mean_gram(matrices, times), self.clients, alone)
            self._rho = rho_of_eigenvalue(largest, self.clients)
        return self._rho

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the arrays that a checkpoint keeps."""
        if self._sum is not None:
            return {"moment": self._sum}
        matrices = [W for W, _ in self._kept]
        return {
            "moment.values": np.concatenate([np.zeros(0), *(W.data for W in matrices)]),
            "moment.columns": np.concatenate([np.zeros(0, np.int64), *(W.indices.astype(np.int64) for W in matrices)]),
            "moment.counts": np.array([np.diff(W.indptr) for W in matrices], np.int64).reshape(-1, self.clients),
            "moment.times": np.array([times for _, times in self._kept], dtype=np.int64),
            "moment.seen": np.array([self._seen, self._stride], dtype=np.int64),
        }

    def load_state_dict(self, saved: Mapping[str, np.ndarray]) -> None:
        """Restore them."""
        if self._sum is not None:
            self._sum = saved["moment"].copy()
            return
        self._rho, self._kept, start = None, [], 0
        self._seen, self._stride = saved["moment.seen"].tolist()
        for counts, times in zip(saved["moment.counts"], saved["moment.times"].tolist(), strict=True):
            stop = start + int(counts.sum())
            pointers = np.concatenate([[0], np.cumsum(counts)])
            parts = saved["moment.values"][start:stop], saved["moment.columns"][start:stop], pointers
            self._kept.append((csr_array(parts, shape=(self.clients, self.clients)), times))
            start = stop


def _equal(one: Any, other: Any) -> bool:
    """Whether two sparse matrices are the same."""
    return one.nnz == other.nnz and np.array_equal(one.indices, other.indices) and np.array_equal(one.data, other.data)
