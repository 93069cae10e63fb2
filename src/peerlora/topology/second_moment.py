"""The mean of ``W^T W`` over the rounds of a run, of which rho follows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from scipy.sparse import csr_array

from peerlora.topology.spectrum import largest_off_mean, mean_gram
from peerlora.topology.storage import Matrix, is_large
from peerlora.topology.weights import rho, rho_of_eigenvalue

_HASHES = 2**64
KEPT = 200  # different matrices of a large run, beyond which half of all that there are, then a quarter, are kept


class SecondMoment:
    """The second moment of the matrices so far: a dense sum, or, of many clients, the sparse matrices themselves.

    A matrix that comes again is counted.  Where more than ``KEPT`` differ, those of a sample are, each in all of its
    rounds: whether a matrix belongs to it follows from a hash of the matrix, so no period of the graph can be in step
    with the sample.
    """

    def __init__(self, clients: int):
        self.clients = clients
        self._sum = None if is_large(clients) else np.zeros((clients, clients))
        self._kept: dict[int, tuple[csr_array, int]] = {}
        """By their hash: matrix, and how many rounds had it."""
        self._stride = 1
        """One of how many different matrices is kept."""
        self._rho: float | None = None
        """Of what is kept, where it has been worked out."""

    def add(self, W: Matrix) -> None:
        """Add the matrix of the next round."""
        if self._sum is not None:
            self._sum += W.T @ W
            return
        W = csr_array(W)
        place = _hash(W)
        if place * self._stride >= _HASHES:
            return
        self._kept[place] = W, self._kept.get(place, (W, 0))[1] + 1
        self._rho = self._rho if len(self._kept) == 1 else None
        while len(self._kept) > KEPT:
            self._stride *= 2
            self._kept = {place: own for place, own in self._kept.items() if place * self._stride < _HASHES}

    def rho(self, rounds: int) -> float:
        """How much of the disagreement norm a round left, in the mean over the rounds so far."""
        if self._sum is not None:
            return rho(self._sum / rounds)
        if self._rho is None:
            matrices, times = zip(*self._kept.values(), strict=True)
            alone = matrices[0].T @ matrices[0] if len(matrices) == 1 else None
            largest = largest_off_mean(mean_gram(matrices, times), self.clients, alone)
            self._rho = rho_of_eigenvalue(largest, self.clients)
        return self._rho

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the arrays that a checkpoint keeps."""
        if self._sum is not None:
            return {"moment": self._sum}
        matrices = [W for W, _ in self._kept.values()]
        return {
            "moment.values": np.concatenate([np.zeros(0), *(W.data for W in matrices)]),
            "moment.columns": np.concatenate([np.zeros(0, np.int64), *(W.indices.astype(np.int64) for W in matrices)]),
            "moment.counts": np.array([np.diff(W.indptr) for W in matrices], np.int64).reshape(-1, self.clients),
            "moment.times": np.array([times for _, times in self._kept.values()], dtype=np.int64),
            "moment.stride": np.array([self._stride], dtype=np.int64),
        }

    def load_state_dict(self, saved: Mapping[str, np.ndarray]) -> None:
        """Restore them."""
        if self._sum is not None:
            self._sum = saved["moment"].copy()
            return
        self._rho, self._kept, start = None, {}, 0
        older = saved.get("moment.seen")  # of versions that kept every so many-th matrix
        self._stride = int((saved["moment.stride"] if older is None else older)[-1])
        for counts, times in zip(saved["moment.counts"], saved["moment.times"].tolist(), strict=True):
            stop = start + int(counts.sum())
            pointers = np.concatenate([[0], np.cumsum(counts)])
            parts = saved["moment.values"][start:stop], saved["moment.columns"][start:stop], pointers
            W = csr_array(parts, shape=(self.clients, self.clients))
            self._kept[_hash(W)] = W, times
            start = stop


def _hash(W: csr_array) -> int:
    """A number below ``_HASHES`` that follows from the entries of a sparse matrix."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (W.indptr.astype(np.int64), W.indices.astype(np.int64), W.data.astype(np.float64)):
        digest.update(part.tobytes())
    return int.from_bytes(digest.digest(), "little")
