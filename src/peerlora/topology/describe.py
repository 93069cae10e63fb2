"""Key figures of a topology, as ``peerlora topology SPEC`` prints them."""

import math
from typing import Any

import numpy as np

from peerlora.topology.graphs import components, is_connected
from peerlora.topology.schedule import Topology
from peerlora.topology.storage import Adjacency, column_counts, row_counts


def describe(topology: Topology, rounds: int, bytes_per_transfer: int) -> dict[str, Any]:
    """Compute the key figures of a topology, as plain values for JSON.

    Degrees, ``connected``, ``isolated``, messages, bytes and ``rho`` (beta in many papers) of a topology whose rounds
    are drawn are estimates from ``estimated_from`` draws, else over its ``period``; where that is not 1, ``connected``
    is the share of rounds with a connected graph.  Degrees are those of sending.  ``isolated`` is the mean share of
    clients without a neighbour.  ``rounds_to_halve`` is how many rounds halve the disagreement: 0 when one round ends
    it, null when it never ends.  ``left_after_period`` is what the product of a period leaves of it, null without one.
    ``union`` puts the links of the run's first ``rounds`` rounds together; ``reached`` is the share of clients in its
    largest connected part.
    """
    static = topology.properties.static
    drawn = [topology.links(t) for t in range(topology.period)] if topology.period else []
    drawn = drawn or list(topology.sample_links(topology.draws or 1))
    messages, rho = float(np.mean([row_counts(links).sum() for links in drawn])), topology.rho()
    return {
        "kind": topology.config.kind,
        "clients": topology.clients,
        "weights": topology.config.weights,
        **_shape(drawn, static),
        "stochasticity": {
            "symmetric": topology.properties.symmetric,
            "doubly_stochastic": topology.properties.doubly_stochastic,
            "row_stochastic": topology.properties.row_stochastic,
            "column_stochastic": topology.properties.column_stochastic,
            "neighbours_only": topology.properties.neighbours_only,
        },
        "directed": topology.directed,
        "static": static,
        "period": topology.period,
        "left_after_period": topology.left_after_period(),
        "rho": rho,
        "spectral_gap": 1 - rho,
        "rounds_to_halve": rounds_to_halve(rho),
        "messages_per_round": messages,
        "bytes_per_round": round(messages * bytes_per_transfer),
        "estimated_from": topology.draws,
        "union": _union(topology, rounds),
    }


def rounds_to_halve(rho: float) -> float | None:
    """Compute ln 2 / -ln rho: rounds that halve the disagreement; 0 when one round ends it, None when none does."""
    if rho >= 1:
        return None
    return math.log(2) / -math.log(rho) if rho > 0 else 0.0


def _shape(drawn: list[Adjacency], static: bool) -> dict[str, Any]:
    degrees = np.stack([column_counts(links) for links in drawn])
    heard = np.stack([row_counts(links) for links in drawn])
    connected = [is_connected(links) for links in drawn]
    return {
        "degree": {"min": int(degrees.min()), "mean": float(degrees.mean()), "max": int(degrees.max())},
        "connected": connected[0] if static else float(np.mean(connected)),
        "isolated": float((degrees + heard == 0).mean()),
    }


def _union(topology: Topology, rounds: int) -> dict[str, Any]:
    union = topology.links(0)
    for t in range(1, min(rounds, topology.period) if topology.period else rounds):
        union = union + topology.links(t)  # of bools: either
    largest = int(np.bincount(components(union)).max())
    return {"rounds": rounds, "connected": largest == topology.clients, "reached": largest / topology.clients}
