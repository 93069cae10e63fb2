"""What compressed gossip gives an Exchange: differences, and the replicas that they are differences from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Integer
from torch import Tensor

REPLICA = "replica"
"""The name of the vector in a message that holds all of a replica."""


@dataclass(frozen=True)
class Difference:
    """One exchange of CHOCO, seen from the clients held here."""

    message: dict[str, Tensor]
    """What a codec made of their differences: named vectors with the leading client axis."""
    before: Float[Tensor, "client scalar"]
    """The replicas that they are differences from."""
    s: Float[Tensor, "client scalar"]
    """``sum_j w_ij xhat_j``, before this exchange."""
    places: Integer[Tensor, " scalar"]
    """Where these scalars lie in the replica of all blocks."""
    decode: Callable[[dict[str, Tensor]], Float[Tensor, "client scalar"]]
    """What a message stands for, of any clients of this round."""
    fault: Callable[[dict[str, Tensor]], str | None]
    """Why the codec never makes a message that has the right shapes and dtypes; None for a good one."""

    @cached_property
    def after(self) -> Float[Tensor, "client scalar"]:
        """The replicas once the message has been taken in, by its senders as by its receivers."""
        return advanced(self.before, self.decode(self.message))


def advanced(
    replica: Float[Tensor, "client scalar"], difference: Float[Tensor, "client scalar"]
) -> Float[Tensor, "client scalar"]:
    """A replica and what a message stands for: the one sum that sender and receivers must do alike, to the bit."""
    return replica + difference
