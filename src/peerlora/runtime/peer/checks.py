"""Which mixing matrices real peers can have: each knows its own links alone, and any of them may fail."""

from __future__ import annotations

from pathlib import Path

from peerlora.algorithms import ALIASES, REGISTRY, build_algorithm
from peerlora.algorithms.base import is_asynchronous, requirement
from peerlora.config.run import RunConfig
from peerlora.errors import CompositionError
from peerlora.runtime.peer import label_counts as counts
from peerlora.runtime.peer.site import Site
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


def counted(begun: Path | None) -> bool:
    """Whether the run in a folder has summed the network's label counts, which is done once."""
    return begun is not None and (begun / counts.FILE).is_file()


def not_in_run(config: RunConfig, site: Site) -> list[str]:
    """A warning, where the list has sites beyond ``clients``: those that were added while the run goes on."""
    beyond = [f"{name} (client {number})" for number, name in sorted(site.names.items()) if number >= config.clients]
    told = f"not in this run of clients={config.clients}: {', '.join(beyond)}; the next run can take them in"
    return [told] if beyond else []


def check_site(config: RunConfig, site: Site, counted: bool = False) -> None:
    """Refuse what real peers cannot do, before anything is loaded.

    ``counted``: the label counts of the network are known, so that not all sites need to be there for them any more.
    """
    name = config.algorithm.name
    if config.clock is not None:
        raise CompositionError("clock is the virtual time of a simulation, real peers have their own; drop clock")
    if is_asynchronous(REGISTRY[ALIASES.get(name, name)]):
        check_asynchronous(config)
    if config.adversary:
        raise CompositionError(
            "adversary is a simulation of attackers, who know all models, and real peers do not simulate; drop it "
            "(exchange.robust works between real peers)"
        )
    listed = sum(number < config.clients for number in site.names)
    if config.train.label_prior == "pooled" and listed < config.clients and not counted:
        raise CompositionError(
            f"with train.label_prior=pooled real peers sum label counts over all of clients={config.clients} before "
            f"round 0, and the member list has {listed} of them; set clients={listed} with numbers 0 to {listed - 1}, "
            "or use train.label_prior=uniform"
        )
    check_links(config)
    if site.client >= config.clients:
        raise CompositionError(
            f"{site.names[site.client]} is client {site.client} on the member list, clients={config.clients} allows 0 "
            f"to {config.clients - 1}; a new site takes part from the next run on, with clients={max(site.names) + 1} "
            "at all sites"
        )


def check_asynchronous(config: RunConfig) -> None:
    """Refuse what peers without common rounds cannot do; raises CompositionError."""
    if config.train.label_prior == "pooled":
        raise CompositionError(
            "train.label_prior=pooled sums label counts in rounds that real peers have in common, and "
            f"{config.algorithm.name} has none; use train.label_prior=uniform, or a method with rounds: dec-lora"
        )
