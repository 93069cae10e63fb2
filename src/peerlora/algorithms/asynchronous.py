"""What the methods without a common step have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peerlora.algorithms.adf_lora import ADFLoRA
from peerlora.algorithms.base import Method
from peerlora.errors import ConfigError
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor

    from peerlora.exchange.base import Mailbox, Vectors
    from peerlora.lora.adapters import Adapters


FIXED_GRAPH = Properties(symmetric=True, row_stochastic=True, column_stochastic=True, static=True, neighbours_only=True)
"""What an exchange between neighbours that have no round in common needs."""


class AsynchronousGossip(Method):
    """A fixed graph of neighbours, and factors that alternate by each client's own count of jobs.

    Not by a round that all agree on, as ADF-LoRA does: there is none, and the newest count heard of would be a trap. A
    client that is ten times as slow as the others would find them, with an interval of 5, always in the same phase, and
    never train the other factor.
    """

    interval: int

    def __post_init__(self):
        if self.interval < 0:
            raise ConfigError(
                f"algorithm.interval: {self.interval} given; expected a number of jobs, or 0 to train both factors"
            )

    @property
    def switches_every(self) -> int | None:
        """``interval``, in jobs."""
        return self.interval or None

    def active(self, job: int) -> str:
        """B and A in turn by ADF-LoRA's rule, or both."""
        return ADFLoRA(self.interval).active(job) if self.interval else "AB"

    def coordinates(self, state: object) -> Bool[Tensor, "client parameter"] | None:
        """All of them."""
        return None

    def flaw(self, x: Adapters, payload: Vectors) -> str | None:
        """Names, shapes and dtypes say it all."""
        return None

    def on_message(self, state, mailbox: Mailbox):
        """It waits until the next job begins."""
        return state

    def before_job(self, state, mailbox: Mailbox):
        """Nothing is left to do."""
        return state
