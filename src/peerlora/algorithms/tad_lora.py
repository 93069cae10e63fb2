"""TAD-LoRA: ADF-LoRA with the switching interval chosen from the topology."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peerlora.algorithms.adf_lora import ADFLoRA
from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import Traits
from peerlora.errors import ConfigError

if TYPE_CHECKING:
    from peerlora.topology.schedule import Topology


@dataclass(frozen=True)
class TADLoRA(FactorGossip):
    """``T = round(c / sqrt(1 - rho))`` within [1, R/2], then ADF-LoRA with that interval.

    Weak graphs want long phases: the frozen factor has more time to agree, which keeps the cross-term small; strong
    graphs want short ones, since a long phase lets one factor alone do the work.

    rho is that of the scheduled topology: exact, or estimated from draws that every client can repeat.  It must not
    come from the contacts that a client happened to have, or clients would disagree on T.

    Source: same authors as ADF-LoRA, 2026, arXiv 2602.00451: update and ``T ~ 1 / sqrt(1 - rho)`` as others describe
    the paper.
    Differs: c = 1 is our choice, since the constant was not found; so are rounding and clamp.  The paper's results have
    T from a grid (1, 2, 3, 5, 10, 15).  Where T = 5 is chosen, as for ten clients that meet with p = 0.02, this is
    ``adf-lora`` with its default interval.
    """

    c: float = 1.0
    """Scales the interval."""
    traits: ClassVar = Traits(
        source="TAD-LoRA, arXiv 2602.00451",
        trains="B and A in turn, T rounds each, T from the topology",
        sends="adapters",
    )

    def __post_init__(self):
        if not 0 < self.c < math.inf:
            raise ConfigError(f"algorithm.c: {self.c} given; expected a finite number above 0")

    @property
    def alternates(self) -> bool:
        """True, with any interval."""
        return True

    def prepared(self, topology: Topology, rounds: int) -> tuple[ADFLoRA, tuple[str, ...]]:
        """ADF-LoRA with the chosen interval, and why this one."""
        draws = _draws(topology)
        rho = topology.rho(draws)
        wanted = self.c / math.sqrt(1 - rho) if rho < 1 else math.inf
        longest = max(1, rounds // 2)
        interval = round(min(max(wanted, 1), longest))
        known = "exact" if draws is None else f"estimated from {draws} draws"
        return ADFLoRA(interval), (
            f"tad-lora switches every {interval} rounds: c / sqrt(1 - rho) = {wanted:.3g} with c = {self.c:g} and "
            f"rho = {rho:.4f} ({known}), rounded and kept within 1 to {longest}, half of {rounds} rounds",
        )


def _draws(topology: Topology) -> int | None:
    """So many that the seed hardly changes the interval: few clients with few contacts need more than usual."""
    return topology.draws and min(5_000, max(topology.draws, 500_000 // topology.clients**2))
