"""What wraps an Exchange to change how values cross, so that it works with every method that allows it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peerlora.errors import CompositionError
from peerlora.lora.adapters import Adapters


class ExchangeWrapper:
    """An Exchange around another; whatever it does not change is the inner one's."""

    def __init__(self, peers: Any):
        self.peers = peers

    def __getattr__(self, name: str) -> Any:
        if name == "peers":  # asked for before __init__ has set it, as copy does
            raise AttributeError(name)
        return getattr(self.peers, name)

    def state(self) -> dict[str, Tensor]:
        """What must be saved to go on."""
        return self.peers.state()

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Take up what ``state`` gave."""
        self.peers.load_state_dict(saved)


def unwrap(peers: Any) -> Any:
    """The exchange without its wrappers."""
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
