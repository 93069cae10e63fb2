"""Plan: a config checked as a whole, before any data is read; every refusal that needs no data is made here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from peerlora.algorithms import build_algorithm
from peerlora.algorithms.base import Algorithm, is_asynchronous, prepare
from peerlora.config.run import RunConfig
from peerlora.config.sections import ClockConfig
from peerlora.config.task_kinds import task_kind
from peerlora.errors import CompositionError
from peerlora.exchange.attacks import attackers
from peerlora.exchange.fixed_point import LEAST_SENDERS
from peerlora.exchange.gossip_sum import gossip_rounds
from peerlora.runtime.checks import check_composition, check_memory, check_own
from peerlora.runtime.exchange_stack import attack_notes, attack_warnings
from peerlora.runtime.policy_checks import check_replay
from peerlora.runtime.secure_checks import check_secure, secure_notes
from peerlora.runtime.virtual_clock import VirtualClock
from peerlora.topology.schedule import Topology, build_topology


@dataclass(frozen=True)
class Plan:
    """A run whose parts go together."""

    config: RunConfig
    algorithm: Algorithm[Any]
    topology: Topology
    clock: VirtualClock | None
    attackers: tuple[int, ...]
    """Clients whose results don't count."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    """What the method says about the run, such as a setting that it chose."""


def plan(
    config: RunConfig,
    clients: Sequence[int] | None = None,
    check: Callable[[Algorithm[Any], Topology], None] = lambda algorithm, topology: None,
    *,
    trains: bool = True,
) -> Plan:
    """Build what a config names and refuse parts that don't go together.

    ``clients``: those held here, all by default.  ``check`` may refuse more, as real peers do.  ``trains``: whether
    they will learn here, not only be exported, which takes no replay buffers.
    Raises CompositionError, ConfigError or TopologyError with the reason and an alternative.
    """
    check_own(config, clients)
    algorithm = build_algorithm(config.algorithm.name, config.algorithm.parameters)
    check_memory(config, algorithm)
    topology = build_topology(config.topology, config.clients, config.seed)
    check(algorithm, topology)
    clock = build_clock(config, algorithm)
    interrupted = clock is not None and clock.interrupts and not is_asynchronous(algorithm)
    least = LEAST_SENDERS if config.exchange.secure else 0
    topology = replace(topology, interrupted=interrupted, least_degree=least)
    attacking = attackers(config.adversary, config.clients, config.seed)
    warnings = (*check_composition(config, algorithm, topology), *attack_warnings(config, attacking))
    warnings = (*warnings, *_deadline_warnings(config, algorithm, clock))
    if trains and task_kind(config.task.kind).acts:
        check_replay(config, config.clients if clients is None else len(clients))
    check_secure(config, algorithm, topology)
    algorithm, notes = prepare(algorithm, topology, config.train.training_rounds)
    notes = (*_recipe_notes(config), *notes, *_pooling_notes(config, topology))
    notes = (*notes, *secure_notes(config), *attack_notes(config, attacking))
    return Plan(config, algorithm, topology, clock, attacking, warnings, notes)


def build_clock(config: RunConfig, algorithm: Algorithm[Any]) -> VirtualClock | None:
    """The virtual clock of a run; an asynchronous method without one gets equal speeds.

    Raises CompositionError for a clock that the method cannot keep.
    """
    name, settings = config.algorithm.name, config.clock
    if not is_asynchronous(algorithm):
        if settings and (settings.deadline or settings.away) and algorithm.traits.merges_into:
            raise CompositionError(
                f"{name} cannot do without a client in a round (clock.deadline, clock.away): what others merge must "
                "reach everybody; drop these settings, or use algorithm.name=dec-lora"
            )
        reason = algorithm.needs_clock
        if reason and not settings:
            raise CompositionError(f"{name}: {reason}; give the section clock, such as clock.speed=1.0")
        return VirtualClock(settings, config.clients, config.seed) if settings else None
    if settings and settings.deadline:
        raise CompositionError(
            f"{name} waits for nobody, so clock.deadline={settings.deadline:.15g} has no round to cut short; drop "
            "clock.deadline, or use a synchronous method such as algorithm.name=dec-lora"
        )
    if settings and any(absence.unit == "rounds" for absence in settings.away):
        raise CompositionError(
            f"the clients of {name} have no rounds in common, and clock.away counts in rounds; use unit: seconds"
        )
    if config.train.optimizer_state == "phase":
        raise CompositionError(
            f"the clients of {name} switch factors at moments of their own, so the optimiser's memory has no common "
            "phase (train.optimizer_state=phase); use train.optimizer_state=round or keep"
        )
    clock = VirtualClock(settings or ClockConfig(), config.clients, config.seed)
    if all(clock.back(client, 0) is None for client in range(config.clients)):
        raise CompositionError("clock.away leaves no client that ever begins; let at least one of them stay")
    return clock


def _deadline_warnings(config: RunConfig, algorithm: Algorithm[Any], clock: VirtualClock | None) -> tuple[str, ...]:
    """What a method's own deadline leaves the fastest client no time for; nothing where a trace changes speeds."""
    if clock is None or clock.config.trace:
        return ()
    steps = algorithm.traits.gradients * config.train.local_steps
    found = algorithm.deadline_warning(steps * clock.config.step / float(clock.speeds.max()))
    return (f"{config.algorithm.name}: {found}",) if found else ()


def _recipe_notes(config: RunConfig) -> tuple[str, ...]:
    """Which settings of the recipe the config gives otherwise, as a file that `peerlora init` wrote does."""
    kept = [
        f"{section}.{name}={'null' if given is None else given}"
        for section, settings in config.recipe_settings.items()
        for name, wanted in settings.items()
        if (given := getattr(getattr(config, section), name)) != wanted and not isinstance(given, BaseModel)
    ]
    if not kept:
        return ()
    return (
        f"recipe={config.recipe} sets no more than the config leaves open, which gives {', '.join(kept)}; delete what "
        "the recipe should set",
    )


def _pooling_notes(config: RunConfig, topology: Topology) -> tuple[str, ...]:
    if config.train.pooled is None:
        return ()
    return (
        f"{config.train.pooled}: clients sum their label counts in {gossip_rounds(topology)} rounds of gossip "
        "before round 0; their bytes are counted in the first round",
    )
