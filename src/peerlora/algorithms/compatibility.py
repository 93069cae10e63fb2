"""Which methods can have their exchange wrapped, by their traits, and on which graphs; checked before data are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from peerlora.algorithms import REGISTRY
from peerlora.algorithms.choco import Choco
from peerlora.algorithms.traits import ONE_FACTOR
from peerlora.errors import CompositionError
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.algorithms.base import Algorithm
    from peerlora.algorithms.traits import Traits
    from peerlora.config.exchange import CacheConfig
    from peerlora.config.run import RunConfig
    from peerlora.lora.adapters import Adapters
    from peerlora.topology.schedule import Topology


def check_wrappers(config: RunConfig, traits: Traits, topology: Topology) -> None:
    """Refuse codecs, robust rules, relaying and attackers where they cannot work with the method or the topology.

    Raises CompositionError with the reason and an alternative.
    """
    codec, robust = config.exchange.codec, config.exchange.robust
    if codec and robust:
        raise CompositionError(
            "exchange.codec and exchange.robust exclude each other: with a codec receivers know averages of their "
            "neighbours only, and a robust rule has to see each of them; use one"
        )
    _check_method(config, traits)
    if codec and (missing := Choco.traits.requires.missing(topology.properties)):
        raise CompositionError(
            f"exchange.codec needs a mixing matrix that is {' and '.join(missing)}: "
            f"{Choco.traits.topology_reason}; use a fixed undirected graph without drop-outs, such as topology=ring"
        )
    if robust:
        _check_robust(robust, topology)
    if config.exchange.relay:
        _check_relay(config, traits)


def cache_settings(config: RunConfig, algorithm: Algorithm[Any]) -> CacheConfig | None:
    """Settings of the cache in which clients keep each other's newest adapters; None where they keep none.

    Raises CompositionError for a method, of another package, that has one and does not say so in its traits.
    """
    if algorithm.cache and algorithm.traits.sends != "cached":
        raise CompositionError(
            f'{config.algorithm.name} has a cache, and its traits say sends="{algorithm.traits.sends}", from which '
            'follows what goes with it; give them sends="cached"'
        )
    return config.exchange.relay or algorithm.cache


def passes_on(config: RunConfig) -> str:
    """What of a config lets clients pass on each other's adapters, in a word, where something does."""
    return "exchange.relay" if config.exchange.relay else f"algorithm.name={config.algorithm.name}"


def check_relayed_message(config: RunConfig, algorithm: Algorithm[Any], x: Adapters) -> None:
    """Refuse to relay what a method sends unless every factor that stays at home is common to all clients.

    Methods of this package say so in their traits; here one of another package is found out by its message.
    Raises CompositionError.
    """
    if config.exchange.relay is None or algorithm.traits.operator == "both":
        return
    sent = list(algorithm.message(x, 0))
    if not all(any(f"{block}:" in name for name in sent) for block in ("A", "B")):
        raise _refused("exchange.relay", config, ONE_FACTOR, f"one of {_relayable()}")


def relay_warnings(config: RunConfig, algorithm: Algorithm[Any], topology: Topology) -> tuple[str, ...]:
    """What to know of relayed models: among attackers, of factors in turn, and of their time on the virtual clock."""
    if cache_settings(config, algorithm) is None:
        return ()
    warnings = []
    if config.exchange.relay and (config.adversary or config.exchange.robust):
        warnings.append(
            "exchange.relay averages every adapter that a client has heard of, those of attackers too: a robust rule "
            "protects the mixing and not the relayed models"
        )
    if _mixes_phases(config, algorithm, topology):
        warnings.append(
            "exchange.relay.average=factors with A and B in turn: entries of different ages are of different phases, "
            "so that the product of their averaged factors can be far from the average of their products; use "
            "exchange.relay.average=products, or topology=complete"
        )
    if config.clock and config.clock.bandwidth is not None:
        warnings.append(
            f"{passes_on(config)} on the virtual clock: relayed entries count as bytes and take no virtual time, so "
            "that rounds end when they would without them"
        )
    return tuple(warnings)


def _mixes_phases(config: RunConfig, algorithm: Algorithm[Any], topology: Topology) -> bool:
    """Whether relayed factors of different phases are averaged entry by entry: where factors train in turn, always.

    But for a graph on which all clients meet in every round: all entries are then of the same one.
    """
    relay = config.exchange.relay
    if relay is None or relay.average != "factors" or not algorithm.alternates:
        return False
    return not topology.properties.static or int(topology.at(0).degrees.min()) < config.clients - 1


def _check_relay(config: RunConfig, traits: Traits) -> None:
    assert config.exchange.relay is not None
    if config.exchange.codec:
        raise CompositionError(
            "exchange.codec and exchange.relay exclude each other: with a codec receivers know replicas of their "
            "neighbours' adapters only, and have nothing whole to pass on; use one"
        )
    if reason := traits.refusal("relay"):
        raise _refused("exchange.relay", config, reason, f"one of {_relayable()}")
    if config.exchange.relay.average == "products":
        return
    ranks = len(set(config.ranks)) > 1 and "clients have different ranks"
    cut = traits.unequal_ranks is None and not traits.own_gauge and "it cuts clients' ranks while it runs"
    gauge = traits.own_gauge and "it leaves every client's factors in coordinates of their own"
    if reason := ranks or gauge or cut:
        raise _refused("exchange.relay.average=factors", config, reason, "exchange.relay.average=products")


def _relayable() -> str:
    """The methods of this package that can be relayed."""
    return _listed(lambda traits: traits.refusal("relay") is None)


def _check_method(config: RunConfig, traits: Traits) -> None:
    codec, robust, adversary = config.exchange.codec, config.exchange.robust, config.adversary
    if codec and (reason := traits.refusal("codec")):
        raise _refused("exchange.codec", config, reason, f"one of {_plain()}")
    if robust and (reason := traits.refusal("robust")):
        raise _refused("exchange.robust", config, reason, f"one of {_plain()}")
    if adversary and (reason := traits.refusal("label-flip")):
        raise _refused("adversary", config, reason, "dec-lora")
    if adversary and adversary.attack != "label-flip" and (reason := traits.refusal("attack")):
        raise _refused(f"adversary.attack={adversary.attack}", config, reason, "attack=label-flip, or dec-lora")


def _plain() -> str:
    """The methods of this package that go with every wrapper."""
    return _listed(lambda traits: traits.sends == "adapters")


def _listed(fits: Callable[[Traits], bool]) -> str:
    """The methods of this package for any task whose traits fit."""
    return ", ".join(
        name for name, kind in REGISTRY.items() if fits(kind.traits) and not kind.traits.flow_policies_only
    )


def _refused(what: str, config: RunConfig, reason: str, instead: str) -> CompositionError:
    return CompositionError(f"{what} cannot be used with {config.algorithm.name}: {reason}; use {instead}")


def _check_robust(robust: Any, topology: Topology) -> None:
    if missing := Properties(neighbours_only=True).missing(topology.properties):
        raise CompositionError(
            f"exchange.robust needs a mixing matrix that reaches {' and '.join(missing)}, for a rule sees neighbours; "
            "use topology.weights=metropolis"
        )
    if topology.directed:
        raise CompositionError(
            "exchange.robust needs links that go both ways, for who hears from few cannot tell whom to trust; use an "
            "undirected graph, such as topology=complete"
        )
    drop = getattr(robust, "drop", 0)
    least = {"trimmed-mean": 2 * drop, "krum": drop + 2, "clipped-gossip": drop + 1}.get(robust.kind, 0)
    if not topology.properties.static or getattr(robust, "radius", None) is not None:
        return  # who has too few neighbours in a round keeps its own
    degrees = topology.at(0).degrees
    if degrees.min() < least:
        client = int(np.argmin(degrees))
        raise CompositionError(
            f"exchange.robust.kind={robust.kind} with drop={drop} needs {least} neighbours, client {client} has "
            f"{degrees[client]} on this {topology.config.kind}; use a denser graph, such as topology=complete, or "
            "kind=median"
        )
