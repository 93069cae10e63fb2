"""The part that all exchanges without compression share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peerlora.config.exchange import RelayConfig
from peerlora.errors import CompositionError
from peerlora.exchange.base import ExchangeStats
from peerlora.exchange.combine import compressed, sparse_tensor
from peerlora.exchange.fixed_point import summed_schema
from peerlora.exchange.relay import RelayCaches
from peerlora.exchange.relayed_average import RelayedModels, relayed_models
from peerlora.exchange.schema import Schema
from peerlora.lora.adapters import Adapters
from peerlora.randomness import torch_generator
from peerlora.topology.schedule import Topology


class PlainExchange(ABC):
    """Sends vectors uncompressed; between rounds it keeps relayed adapters, where clients relay, and nothing else."""

    topology: Topology
    clients: Sequence[int]
    t: int
    stats: ExchangeStats
    relayed: RelayCaches | None = None
    """What the clients held here know of all others' adapters; None where nothing is relayed."""
    secure: bool = False
    """Whether receivers get the weighted sum of their neighbours' vectors only, in whole numbers (``fixed_point``)."""

    def wire_schema(self, vectors: Schema) -> Schema:
        """Return the vectors unchanged, or with secure sums the one in their place."""
        return summed_schema(vectors) if self.secure else vectors

    def state_dict(self) -> dict[str, Tensor]:
        """Return the relayed adapters: no round depends on an earlier one in anything else."""
        return self.relayed.state_dict() if self.relayed else {}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Restore them."""
        if self.relayed:
            self.relayed.load_state_dict(saved)

    @abstractmethod
    def relay(self) -> None:
        """Swap over the links of this round what the clients know of others; see ``exchange.relay``."""

    def mix_cached(self, x: Adapters) -> Adapters:
        """``x_i <- sum_j alpha_ij (the newest x_j that i holds)``, after this round's messages and swaps."""
        if self.relayed is None:
            raise CompositionError("the method averages a cache and has none; let its property `cache` give settings")
        self._send(x)
        self.relay()
        began = time.perf_counter()
        averaged = relayed_models(self.relayed, x, self.clients, "factors").adapters
        self.stats.cached = True
        self.stats.seconds += time.perf_counter() - began
        return averaged

    def _require_open(self, needed: bool = True) -> None:
        """Raise CompositionError with secure sums, for a method that needs more than them."""
        if self.secure and needed:
            raise open_messages_refused()

    @abstractmethod
    def _send(self, x: Adapters) -> None:
        """Send adapters to the neighbours, and mix nothing; their cost joins the stats."""

    def _record_relay(self, began: float, **counts: int) -> None:
        """Add to the stats what a relay that began at this moment cost, by name, and what the caches hold after it."""
        assert self.relayed is not None
        self.stats.measures |= self.relayed.measures()
        self.stats.measures |= {name: torch.tensor([count], dtype=torch.float64) for name, count in counts.items()}
        self.stats.seconds += time.perf_counter() - began

    def relayed_models(self, x: Adapters) -> RelayedModels | None:
        """The averages that the clients held here, whose models are ``x``, deploy; None where nothing is relayed.

        A cache that the method keeps for its training is no model to deploy.
        """
        if self.relayed is None or not isinstance(self.relayed.settings, RelayConfig):
            return None
        return relayed_models(self.relayed, x, self.clients, self.relayed.settings.average)

    def shared_random(self, purpose: str) -> torch.Generator:
        """Derive the generator from the run's seed, which is the topology's, and the round."""
        return torch_generator(self.topology.seed, f"shared {purpose}", round=self.t)


def open_messages_refused() -> CompositionError:
    """The error of a method that needs each neighbour's message, where there are sums only."""
    return CompositionError(
        "exchange.secure gives a client the mean over its neighbours alone, and this method needs more of them than "
        "that; leave exchange.secure out, or use dec-lora"
    )


_MANY, _FEW = 256, 0.1  # clients, and share of W that is not zero, from which the sparse product is faster


def operator(W: Any, like: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """W, or some rows of it, as a matrix to multiply with, for ``like``; sparse where ``is_sparse`` says so."""
    part = W if rows is None else W[np.asarray(rows, dtype=int)]
    if not isinstance(part, np.ndarray):
        return sparse_tensor(part, like)
    dense = torch.from_numpy(part).to(like)
    return compressed(dense) if is_sparse(W) else dense


def is_sparse(W: Any) -> bool:
    """Whether products with W are sparse ones.

    Those with a sparse one are.  Of dense ones: at 1,000 clients on a ring the sparse product takes a sixth of the
    dense one's time, at 300 half (docs/log.md).
    """
    if not isinstance(W, np.ndarray):
        return True
    return W.shape[1] >= _MANY and bool(np.count_nonzero(W) <= _FEW * W.size)
