"""Refuses parts of a run that do not work together, with the reason and an alternative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peerlora.algorithms import REGISTRY
from peerlora.algorithms.base import Algorithm, is_asynchronous, requirement
from peerlora.algorithms.compatibility import check_wrappers, relay_warnings
from peerlora.algorithms.merging import room
from peerlora.config.run import RunConfig
from peerlora.config.sections import TrainConfig
from peerlora.config.task_kinds import task_kind
from peerlora.environment import main_memory
from peerlora.errors import CompositionError
from peerlora.exchange.gossip_sum import gossip_rounds
from peerlora.lora.adapter_init import PRINCIPAL
from peerlora.lora.adapters import AdapterSpec
from peerlora.runtime.policy_checks import check_policy
from peerlora.runtime.privacy import check_privacy
from peerlora.runtime.resources import DTYPES
from peerlora.topology.mixing_bytes import mixing_bytes
from peerlora.topology.properties import Properties
from peerlora.topology.schedule import Topology

_IN_A_ROUND = "before and after local steps"


def check_composition(config: RunConfig, algorithm: Algorithm[Any], topology: Topology) -> tuple[str, ...]:
    """Refuse a method on a topology or with ranks it cannot work with; return warnings.

    Raises CompositionError with the reason and an alternative.
    """
    name = config.algorithm.name
    required, traits = requirement(algorithm), algorithm.traits
    if missing := required.missing(topology.properties):
        raise CompositionError(
            f"{name} needs a topology whose mixing matrix is {' and '.join(missing)}; {config.topology.kind} with "
            f"{config.topology.weights} weights is not{_reason(algorithm)}; use {_cure(required, topology)}"
        )
    if len(set(config.ranks)) > 1 and traits.unequal_ranks:
        raise CompositionError(
            f"{name} cannot work with different ranks {sorted(set(config.ranks))}: {traits.unequal_ranks}; give one "
            f"adapter.rank, or use {', '.join(own for own in REGISTRY if not REGISTRY[own].traits.unequal_ranks)}"
        )
    stale = algorithm.fresh_optimizer
    if stale and config.train.optimizer_state != "round":
        raise CompositionError(
            f"{name} cannot keep the optimiser's memory (train.optimizer_state={config.train.optimizer_state}): "
            f"{stale}; use train.optimizer_state=round"
        )
    if config.train.quiet_rounds and (reason := algorithm.traits.quiet_refusal()):
        raise CompositionError(
            f"{name} cannot end with rounds without training (train.quiet={config.train.quiet:g}): {reason}; use "
            "train.quiet=0, or algorithm.name=dec-lora"
        )
    _check_selection(config, algorithm)
    _check_init(config, algorithm)
    _check_quantised(config, algorithm)
    algorithm.check_task(config.task.kind)
    of_policy = check_policy(config, algorithm) if task_kind(config.task.kind).acts else ()
    check_wrappers(config, traits, topology)
    if config.train.pooled:
        gossip_rounds(topology)
    warnings = (
        *of_policy,
        *_check_training(name, algorithm, config.train),
        *relay_warnings(config, algorithm, topology),
        *check_privacy(config, algorithm),
    )
    interval, every = algorithm.switches_every, algorithm.rounds_of_phase(config.task.blocks)
    trained = config.train.training_rounds
    if every is not None and every >= trained:
        which = "run" if trained == config.train.rounds else "part of the run that trains,"
        counted = "" if every == interval else f" ({every} rounds, since it counts sweeps over all blocks)"
        warnings += (
            f"algorithm.interval={interval}{counted} is not shorter than the {which} of {trained} rounds: only B "
            "is trained, as in FFA-LoRA",
        )
    return warnings


def _check_init(config: RunConfig, algorithm: Algorithm[Any]) -> None:
    """Refuse a start of the factors that the method would undo, or that clients could not have in common."""
    init, name = config.adapter.init, config.algorithm.name
    if init == "default":
        return
    if algorithm.traits.merges_into:
        raise CompositionError(
            f"{name} cannot begin with adapter.init={init}: it draws new factors after every merge; use "
            "adapter.init=default, or algorithm.name=dec-lora"
        )
    if len(set(config.ranks)) > 1:
        raise CompositionError(
            f"adapter.init={init} gives all clients the same factors, adapter.rank lists {sorted(set(config.ranks))}; "
            "give one rank, or use adapter.init=default"
        )
    if config.adapter.start is not None:
        raise CompositionError(
            f"adapter.init={init} and adapter.start={config.adapter.start} both say how adapters begin; drop one of "
            "them"
        )


def _check_quantised(config: RunConfig, algorithm: Algorithm[Any]) -> None:
    """Refuse what needs a base's weights in full precision where only a quantised form of them is kept."""
    how, name = config.model.quantize, config.algorithm.name
    if how == "none":
        return
    if algorithm.traits.merges_into == "base":
        raise CompositionError(
            f"{name} merges into the base, and model.quantize={how} keeps none in full precision; use "
            "model.quantize=none, or algorithm.name=dec-lora"
        )
    if config.adapter.init in PRINCIPAL:
        raise CompositionError(
            f"adapter.init={config.adapter.init} takes directions out of the base's weights, and model.quantize={how} "
            "keeps none in full precision; use adapter.init=default, or model.quantize=none"
        )
    if config.train.dtype == "fp64":
        raise CompositionError(
            f"model.quantize={how} computes in fp32 or bf16, train.dtype=fp64 given; use train.dtype=fp32"
        )


def _reason(algorithm: Algorithm[Any]) -> str:
    """Why a method asks for its kind of topology, where it says so."""
    reason = algorithm.traits.topology_reason
    return f" ({reason})" if reason else ""


def _cure(required: Properties, topology: Topology) -> str:
    """What to change of a topology that lacks something of what is required, and nothing that is as it should be."""
    missing = required.missing(topology.properties)
    if "static" in missing:
        weights = "" if topology.config.weights == "metropolis" else ", with topology.weights=metropolis"
        return f"a fixed graph without drop-outs, such as topology=ring{weights}"
    if not topology.directed:
        return "topology.weights=metropolis"
    both_ways = "an undirected graph, such as topology=ring"
    if "symmetric" in missing:
        return both_ways
    push_sum = "" if topology.properties.column_stochastic else "topology.weights=push-sum"
    if not required.row_stochastic:
        return push_sum
    return f"{' with '.join(filter(None, [push_sum, 'algorithm.name=sgp or push-diging']))}, or {both_ways}"


def _check_training(name: str, algorithm: Algorithm[Any], train: TrainConfig) -> tuple[str, ...]:
    """Refuse local steps that a method cannot work with; warn of those for which it was not made."""
    traits = algorithm.traits
    if traits.one_step and train.local_steps != 1:
        raise CompositionError(
            f"{name} cannot take train.local_steps={train.local_steps}: {traits.one_step}; use train.local_steps=1"
        )
    if train.optimizer == "sgd":
        return ()
    if traits.sgd_only:
        raise CompositionError(
            f"{name} cannot use train.optimizer={train.optimizer}: {traits.sgd_only}; use "
            "train.optimizer=sgd or dfedavg"
        )
    if traits.sgd_preferred:
        reason = traits.sgd_preferred
        return (f"{name} with train.optimizer={train.optimizer}: {reason}; it was made for train.optimizer=sgd",)
    return ()


def _check_selection(config: RunConfig, algorithm: Algorithm[Any]) -> None:
    """Refuse best adapters and the early end of training where a method cannot have them."""
    name = config.algorithm.name
    if config.eval.select and algorithm.traits.merges_into:
        raise CompositionError(
            f"{name} cannot keep the adapters of a best round (eval.select): what a client has merged by then grows "
            "beside them in every round; drop eval.select and eval.patience, or use algorithm.name=dec-lora"
        )
    if config.eval.patience and (reason := algorithm.training_end_refusal):
        raise CompositionError(
            f"{name} cannot let a client end its training (eval.patience={config.eval.patience}): {reason}; drop "
            "eval.patience, or use algorithm.name=dec-lora"
        )


def check_memory(config: RunConfig, algorithm: Algorithm[Any]) -> None:
    """Refuse early links and mixing matrices that cannot be held: sparse ones, and dense ones where a part needs them.

    Raises CompositionError with what it is that needs them.
    """
    clients, reason = config.clients, _needs_dense(config, algorithm)
    needed, there = mixing_bytes(config.topology, clients, dense=reason is not None), main_memory()
    if needed > there:
        what = reason or f"topology.kind={config.topology.kind}"
        raise CompositionError(
            f"clients={clients} with {what} needs {needed / 1e9:.3g} GB for mixing matrices, this machine has "
            f"{there / 1e9:.0f} GB; use fewer clients, or a synchronous method such as algorithm.name=dec-lora on few "
            "links such as topology=ring"
        )


def check_rows(config: RunConfig, spec: AdapterSpec, clients: int, held: str = _IN_A_ROUND) -> None:
    """Refuse adapters of so many clients that cannot be held: they stay in memory, and nothing of them on a disk.

    Counted are two copies, as ``held`` says, and the optimiser's memory where it is kept: what every method needs.
    Raises CompositionError with their number, their size and what there is.
    """
    kept = config.train.optimizer_state != "round"
    copies, dtype = (4 if kept else 2), DTYPES[config.train.dtype]
    needed = clients * spec.parameters * dtype.itemsize * copies
    there, of_what = room(torch.device(config.device))
    if needed > there:
        moments = f", and the optimiser's two (train.optimizer_state={config.train.optimizer_state})" if kept else ""
        raise CompositionError(
            f"{clients} clients with {spec.parameters} trained numbers each need {needed / 1e9:.3g} GB for two copies, "
            f"{held}{moments}, {of_what} {there / 1e9:.3g} GB; use fewer clients, a smaller adapter.rank, or "
            "adapter.targets with fewer layers"
        )


def check_head_rate(config: RunConfig, spec: AdapterSpec) -> None:
    """Refuse a rate of its own for a head where none trains; raises CompositionError."""
    if config.train.head_rate == 1 or spec.head:
        return
    frozen = config.adapter.head == "frozen"
    why = "adapter.head=frozen keeps it as it is" if frozen else f"task.kind={config.task.kind} has none"
    cure = "adapter.head=mixed or private" if frozen else "adapter.modules_to_save, for modules that train in full"
    raise CompositionError(
        f"train.head_rate={config.train.head_rate:g} given, and no head trains: {why}; drop it, or use {cure}"
    )


def _needs_dense(config: RunConfig, algorithm: Algorithm[Any]) -> str | None:
    """What keeps tables [client, client], in words; None where links alone are kept."""
    if is_asynchronous(algorithm):
        return f"algorithm.name={config.algorithm.name}, whose clients know each other's versions,"
    if config.exchange.relay:
        return "exchange.relay, whose clients hold each other's adapters,"
    if config.adversary is not None:
        return "an adversary, which knows everybody's models,"
    return None


def check_own(config: RunConfig, clients: Sequence[int] | None) -> None:
    """Refuse to simulate sites that each have a file of their own."""
    if config.partition.kind == "own" and (clients is None or len(clients) != 1):
        raise CompositionError(
            "partition.kind=own is for `peerlora peer`, where every site has a file of its own; to simulate, put all "
            "rows in one file with a column that names the site, and use partition.kind=column partition.column=..."
        )
