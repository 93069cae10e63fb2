"""FedIT: federated averaging of both factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peerlora.algorithms.dec_lora import DecLoRA
from peerlora.algorithms.traits import Traits

if TYPE_CHECKING:
    from peerlora.topology.schedule import Topology


@dataclass(frozen=True)
class FedIT(DecLoRA):
    """K local steps on A and B, then everybody gets the average of A and the average of B.

    The server is the complete graph.  On any other graph the average runs over the neighbours, and the method is
    Dec-LoRA; the run then says so.

    Source: FedIT, arXiv 2305.05644, as others describe it.
    Differs: equal client weights, where the paper weighs clients by their rows; everybody takes part in every round.
    """

    traits: ClassVar = Traits(
        source="FedIT, arXiv 2305.05644",
        sends="adapters",
    )

    def prepared(self, topology: Topology, rounds: int) -> tuple[FedIT, tuple[str, ...]]:
        """The method as it is, with a note where there is no server."""
        if topology.averages_all:
            return self, ()
        return self, (
            f"fedit averages over everybody only with topology=complete; on {topology.config.kind} it is its "
            "decentralised form, dec-lora",
        )
