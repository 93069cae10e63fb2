"""The topologies that come with their own W, by kind."""

from collections.abc import Callable
from typing import Any

from peerlora.topology.equitopo import equidyn, equistatic
from peerlora.topology.finite import base_graph, hypercube, one_peer
from peerlora.topology.graphs import build_graph
from peerlora.topology.matcha import matcha
from peerlora.topology.planned import Plan

PLANS: dict[str, Callable[[Any, int, int], Plan]] = {
    "one-peer": lambda config, clients, seed: one_peer(clients),
    "hypercube": lambda config, clients, seed: hypercube(clients),
    "base-k": lambda config, clients, seed: base_graph(clients, config.degree),
    "d-equistatic": lambda config, clients, seed: equistatic(config.kind, clients, config.degree, seed),
    "u-equistatic": lambda config, clients, seed: equistatic(config.kind, clients, config.degree, seed),
    "od-equidyn": lambda config, clients, seed: equidyn(config.kind, clients, config.eta),
    "ou-equidyn": lambda config, clients, seed: equidyn(config.kind, clients, config.eta),
    "matcha": lambda config, clients, seed: matcha(build_graph(config.base, clients, seed), config.budget).plan,
}
