"""Checks of real peers: each knows its own links alone, and any of them may fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peerlora.algorithms import build_algorithm
from peerlora.algorithms.base import Algorithm, is_asynchronous, requirement
from peerlora.algorithms.compatibility import cache_settings, passes_on
from peerlora.config.run import RunConfig
from peerlora.config.train import NOT_POOLED
from peerlora.errors import CompositionError
from peerlora.runs.events import Warned
from peerlora.runtime.peer import label_counts
from peerlora.runtime.peer.site import Site
from peerlora.runtime.plan import Plan, plan
from peerlora.topology.schedule import Topology


def plan_peer(config: RunConfig, site: Site, sums_known: bool = False) -> Plan:
    """Plan a run of one real peer; refuse what real peers cannot do, before anything is loaded.

    ``sums_known``: the network's label counts are summed, so that not all sites need to be there for them any more.
    Raises CompositionError, ConfigError or TopologyError.
    """
    _check_config(config, site, sums_known)
    if config.train.epochs is not None:
        raise CompositionError(
            f"train.epochs={config.train.epochs:g} given; all sites count the same rounds, before any knows the "
            "others' rows: give train.rounds (a simulation tells how many they are)"
        )

    def check(algorithm: Algorithm[Any], topology: Topology) -> None:
        check_links(config, algorithm, topology)
        _check_number(config, site)

    return plan(config, [site.client], check)


def check_links(config: RunConfig, algorithm: Algorithm[Any], topology: Topology) -> None:
    """Raise CompositionError for a topology by which real peers cannot mix, or not with this method."""
    if not topology.properties.neighbours_only:
        raise CompositionError(
            f"topology.weights={config.topology.weights} reaches beyond a round's neighbours, and real peers hear from "
            "these alone; use topology.weights=metropolis"
        )
    needs = requirement(algorithm)
    if not topology.properties.symmetric and (needs.symmetric or needs.row_stochastic):
        raise CompositionError(
            f"topology={config.topology.kind} with {config.topology.weights} weights is not symmetric, and links of "
            "real peers fail: the sender keeps what it could not hand on, so rows lose their sum, which "
            f"{config.algorithm.name} needs; use algorithm.name=sgp or push-diging, or an undirected graph with "
            "topology.weights=metropolis"
        )
    if cache_settings(config, algorithm) and not topology.properties.symmetric:
        what = passes_on(config)
        raise CompositionError(
            f"{what} swaps adapters over links that go both ways, and topology={config.topology.kind} has others; use "
            f"an undirected graph, or do without {what}"
        )


def sums_known(begun: Path | None) -> bool:
    """Whether the run in a folder has summed the network's label counts, which is done once."""
    return begun is not None and (begun / label_counts.FILE).is_file()


def warn_of_sites_beyond(config: RunConfig, site: Site) -> list[Warned]:
    """Warn where the member list has sites beyond ``clients``: those that were added while the run goes on."""
    beyond = [f"{name} (client {number})" for number, name in sorted(site.names.items()) if number >= config.clients]
    warning = f"not in this run of clients={config.clients}: {', '.join(beyond)}; the next run can take them in"
    return [Warned(warning)] if beyond else []


def _check_config(config: RunConfig, site: Site, sums_known: bool) -> None:
    if config.clock is not None:
        raise CompositionError("clock is the virtual time of a simulation, real peers have their own; drop clock")
    if config.cluster is not None:
        raise CompositionError(
            "cluster has workers train the clients of a simulation, and a real peer trains where it runs; drop it: "
            "cluster=null"
        )
    algorithm = build_algorithm(config.algorithm.name, config.algorithm.parameters)
    if is_asynchronous(algorithm) and config.train.pooled:
        raise CompositionError(
            f"{config.train.pooled} sums label counts in rounds that real peers have in common, and "
            f"{config.algorithm.name} has none; use {NOT_POOLED}, or a method with rounds: dec-lora"
        )
    if config.adversary:
        raise CompositionError(
            "adversary is a simulation of attackers, who know all models, and real peers do not simulate; drop it "
            "(exchange.robust works between real peers)"
        )
    listed = sum(number < config.clients for number in site.names)
    if config.train.pooled and listed < config.clients and not sums_known:
        raise CompositionError(
            f"with {config.train.pooled} real peers sum label counts over all of clients={config.clients} before "
            f"round 0, and the member list has {listed} of them; set clients={listed} with numbers 0 to {listed - 1}, "
            f"or use {NOT_POOLED}"
        )


def _check_number(config: RunConfig, site: Site) -> None:
    if site.client >= config.clients:
        raise CompositionError(
            f"{site.names[site.client]} is client {site.client} on the member list, clients={config.clients} allows 0 "
            f"to {config.clients - 1}; a new site takes part from the next run on, with clients={max(site.names) + 1} "
            "at all sites"
        )
