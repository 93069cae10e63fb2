"""What ``peerlora topology SPEC`` shows: a short way to write a topology, and its key figures."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from peerlora.config.loading import load_config
from peerlora.config.topology import TopologyConfig
from peerlora.errors import ConfigError
from peerlora.topology.graphs import Adjacency, components, is_connected
from peerlora.topology.schedule import Topology


def parse_spec(words: str | Sequence[str]) -> TopologyConfig | Any:
    """The topology written as a kind and its settings: ``random p=0.1``, in one string or in several.

    Raises ConfigError with the nearest valid word.
    """
    text = (words if isinstance(words, str) else " ".join(words)).strip()
    # Only a blank before `key=` separates, so that `edges=[[0, 1], [1, 2]]` may hold blanks.
    kind, *settings = re.split(r"\s+(?=\w+=)", text)
    if not kind or "=" in kind:
        raise ConfigError(f"topology {text!r} names no kind; start with one, e.g. 'ring' or 'random p=0.1'")
    return load_config(
        {"topology": kind}, [f"topology.{setting}" for setting in settings], train_defaults=False
    ).topology


def describe(topology: Topology, rounds: int, bytes_per_transfer: int) -> dict[str, Any]:
    """The key figures of a topology, as plain values for JSON.

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
    messages, rho = float(np.mean([links.sum() for links in drawn])), topology.rho()
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
    """ln 2 / -ln rho: the rounds that halve the disagreement; 0 when one round ends it, None when it never ends."""
    if rho >= 1:
        return None
    return math.log(2) / -math.log(rho) if rho > 0 else 0.0


def _shape(drawn: list[Adjacency], static: bool) -> dict[str, Any]:
    degrees = np.stack([links.sum(axis=0) for links in drawn])
    heard = np.stack([links.sum(axis=1) for links in drawn])
    connected = [is_connected(links) for links in drawn]
    return {
        "degree": {"min": int(degrees.min()), "mean": float(degrees.mean()), "max": int(degrees.max())},
        "connected": connected[0] if static else float(np.mean(connected)),
        "isolated": float((degrees + heard == 0).mean()),
    }


def _union(topology: Topology, rounds: int) -> dict[str, Any]:
    union = np.zeros((topology.clients, topology.clients), dtype=bool)
    for t in range(min(rounds, topology.period) if topology.period else rounds):
        union |= topology.links(t)
    largest = int(np.bincount(components(union)).max())
    return {"rounds": rounds, "connected": largest == topology.clients, "reached": largest / topology.clients}
