"""Wrappers of an Exchange: they change how values cross, for every method that allows it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peerlora.errors import CompositionError
from peerlora.lora.adapters import Adapters


class ExchangeWrapper:
    """An Exchange around another, to which it passes on everything that it does not change."""

    def __init__(self, peers: Any):
        self.peers = peers

    def __getattr__(self, name: str) -> Any:
        if name == "peers":  # asked for before __init__ has set it, as copy does
            raise AttributeError(name)
        return getattr(self.peers, name)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps."""
        return self.peers.state_dict()

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned."""
        self.peers.load_state_dict(saved)


def unwrap(peers: Any) -> Any:
    """Return the exchange without its wrappers."""
    return unwrap(peers.peers) if isinstance(peers, ExchangeWrapper) else peers


def only_adapters(x: object, what: str) -> Adapters:
    """``x``, where it is adapters and nothing else.

    Raises CompositionError for a method that exchanges anything beside: compose refuses those it knows before.
    """
    if isinstance(x, Adapters) and x.merged is None:
        return x
    raise CompositionError(
        f"{what} works on adapters alone, and this method exchanges more than them; leave it out, or use dec-lora, "
        "adf-lora or another method that mixes adapters once a round"
    )
