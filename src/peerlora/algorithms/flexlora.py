"""FlexLoRA: average the products of adapters of any rank, give each client its own rank back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from peerlora.algorithms.decaf import DeCAF

if TYPE_CHECKING:
    from peerlora.topology.schedule import Topology


@dataclass(frozen=True)
class FlexLoRA(DeCAF):
    """``sum_i p_i s_i B_i A_i`` is factored by SVD; client i starts the next round from its leading r_i directions.

    Source: Bai et al. 2024, arXiv 2402.11505 (average of products, SVD, own rank: as others describe the paper).
    The server is the complete graph with equal weights p_i = 1/N.  Decentralised (ours): every receiver does the same
    with its row of W, which is DeCAF; the two names run the same code, on every graph.
    Differs (ours): equal weights where the paper counts samples, and DeCAF's balanced factors and care for directions
    that the average lacks.
    """

    traits: ClassVar = replace(DeCAF.traits, source="FlexLoRA, arXiv 2402.11505")

    def prepared(self, topology: Topology, rounds: int) -> tuple[FlexLoRA, tuple[str, ...]]:
        """The method as it is, with a note where there is no server."""
        if topology.averages_all:
            return self, ()
        return self, (
            f"flexlora averages over everybody only with topology=complete; on {topology.config.kind} it is its "
            "decentralised form, decaf",
        )
