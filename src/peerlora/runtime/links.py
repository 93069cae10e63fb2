"""Which mixing matrices real peers can have: each knows its own links alone, and any of them may fail."""

from __future__ import annotations

from peerlora.algorithms import build_algorithm
from peerlora.algorithms.base import requirement
from peerlora.config import RunConfig
from peerlora.errors import CompositionError
from peerlora.topology.schedule import build_topology


def check_links(config: RunConfig) -> None:
    """Raise CompositionError for a topology that real peers cannot mix by, or not with this method."""
    name, topology = config.algorithm.name, build_topology(config.topology, config.clients, config.seed)
    if not topology.properties.neighbours_only:
        raise CompositionError(
            f"topology.weights={config.topology.weights} reaches beyond a round's neighbours, and real peers hear from "
            "these alone; use topology.weights=metropolis"
        )
    needs = requirement(build_algorithm(name, config.algorithm.parameters))
    if not topology.properties.symmetric and (needs.symmetric or needs.row_stochastic):
        raise CompositionError(
            f"topology={config.topology.kind} with {config.topology.weights} weights is not symmetric, and links of "
            f"real peers fail: the sender keeps what it could not hand on, so rows lose their sum, which {name} needs; "
            "use algorithm.name=sgp or push-diging, or an undirected graph with topology.weights=metropolis"
        )
