"""The part that all exchanges without compression share."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.exchange.schema import Schema
from peerlora.randomness import torch_generator
from peerlora.topology.schedule import Topology


class PlainExchange:
    """Sends vectors uncompressed, and so keeps no state between rounds."""

    topology: Topology
    t: int

    def wire_schema(self, vectors: Schema) -> Schema:
        """Return the vectors unchanged."""
        return vectors

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: no round depends on an earlier one."""
        return {}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Restore nothing."""

    def shared_random(self, purpose: str) -> torch.Generator:
        """Derive the generator from the run's seed, which is the topology's, and the round."""
        return torch_generator(self.topology.seed, f"shared {purpose}", round=self.t)


_MANY, _FEW = 256, 0.1  # clients, and share of W that is not zero, from which the sparse product is faster


def operator(W: Float[np.ndarray, "receiver client"], like: Tensor) -> Tensor:
    """W as a matrix to multiply with, for ``like``; sparse for many clients that have few neighbours each.

    At 1,000 clients on a ring the sparse product takes a sixth of the dense one's time, at 300 half (docs/log.md).
    """
    dense = torch.from_numpy(W).to(like)
    if W.shape[1] < _MANY or np.count_nonzero(W) > _FEW * W.size:
        return dense
    with warnings.catch_warnings():  # told once per process by torch, of a format whose product is all we use
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return dense.to_sparse_csr()
