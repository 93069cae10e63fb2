"""Checks of secure sums: which methods, graphs and settings they go with."""

from __future__ import annotations

from typing import Any

import numpy as np

from peerlora.algorithms import REGISTRY
from peerlora.algorithms.base import Algorithm
from peerlora.config.run import RunConfig
from peerlora.errors import CompositionError
from peerlora.exchange.fixed_point import LEAST_SENDERS
from peerlora.topology.schedule import Topology

_DRAWN = 64  # rounds of a changing graph that are looked at for clients with enough neighbours


def check_secure(config: RunConfig, algorithm: Algorithm[Any], topology: Topology) -> None:
    """Refuse secure sums where they cannot work with the method, the graph or another setting.

    ``topology``: without the links of clients that have too few neighbours.  Raises CompositionError.
    """
    if not config.exchange.secure:
        return
    _check_settings(config)
    if reason := algorithm.traits.refusal("secure"):
        named = {name: kind.traits for name, kind in REGISTRY.items() if not kind.traits.flow_policies_only}
        fits = [name for name, traits in named.items() if traits.refusal("secure") is None]
        raise CompositionError(
            f"exchange.secure cannot be used with {config.algorithm.name}: {reason}; use one of {', '.join(fits)}"
        )
    _check_graph(topology)


def secure_notes(config: RunConfig) -> tuple[str, ...]:
    """What a run has to say about its secure sums."""
    if not config.exchange.secure:
        return ()
    return (
        "exchange.secure: clients get the weighted sum of their neighbours' adapters alone, in steps of 2^-40; a "
        f"client with fewer than {LEAST_SENDERS} neighbours in a round has no links in it",
    )


def _check_settings(config: RunConfig) -> None:
    exchange = config.exchange
    hidden = {
        "exchange.codec": (exchange.codec, "with a codec messages are differences, and no sum of them is a model"),
        "exchange.robust": (exchange.robust, "a robust rule has to see each of the neighbours"),
        "exchange.relay": (exchange.relay, "clients would pass on each other's adapters"),
        str(config.train.pooled): (config.train.pooled, "label counts would cross openly"),
    }
    for what, (given, reason) in hidden.items():
        if given:
            raise CompositionError(f"exchange.secure and {what} exclude each other: {reason}; use one of them")
    if len(set(config.ranks)) > 1:
        raise CompositionError(
            f"exchange.secure sums entry by entry, adapter.rank lists {sorted(set(config.ranks))}; give one rank"
        )


def _check_graph(topology: Topology) -> None:
    if topology.clients <= LEAST_SENDERS:
        raise CompositionError(
            f"exchange.secure sums at least {LEAST_SENDERS} neighbours, clients={topology.clients} given; use at least "
            f"{LEAST_SENDERS + 1} clients, or leave exchange.secure out"
        )
    properties, kind = topology.properties, topology.config.kind
    if not (properties.symmetric and properties.neighbours_only):
        raise CompositionError(
            f"exchange.secure needs links that go both ways and weights of neighbours alone, topology={kind} with "
            f"{topology.config.weights} weights has others; use an undirected graph with topology.weights=metropolis"
        )
    drawn = [topology.at(t) for t in range(topology.period or _DRAWN)]
    if any((graph.W < 0).any() for graph in drawn):
        raise CompositionError(
            f"exchange.secure needs weights that are not negative, topology={kind} has others; use "
            "topology.weights=metropolis"
        )
    alone = ~np.any([graph.adjacency.any(axis=1) for graph in drawn], axis=0)
    if alone.any():
        raise CompositionError(
            f"exchange.secure sums at least {LEAST_SENDERS} neighbours, and client {int(alone.argmax())} never has as "
            f"many who have as many themselves on topology={kind}; use a denser graph, such as topology=ring or, "
            "better, topology.kind=random-regular"
        )
