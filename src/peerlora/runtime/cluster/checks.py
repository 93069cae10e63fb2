"""What a cluster cannot do yet: refused with the reason, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peerlora.algorithms.base import Algorithm, is_asynchronous
from peerlora.config.cluster import ClusterConfig
from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import task_kind
from peerlora.errors import CompositionError


def refuse_config(config: RunConfig, algorithm: Algorithm[Any]) -> None:
    """Raise CompositionError for settings that a cluster cannot follow yet."""
    _refuse_method(config, algorithm)
    if task_kind(config.task.kind).acts:
        raise CompositionError(
            f"task.kind={config.task.kind} cannot run on a cluster: workers load rows and a base model, and no "
            "environments yet; use another task, or one process"
        )
    if config.privacy is not None:
        raise CompositionError(
            "privacy cannot run on a cluster: what each client has spent is counted where it trains, and workers have "
            "no folder that would keep the count when they are lost; drop privacy, or use one process"
        )
    if config.exchange.relay:
        raise CompositionError(
            "exchange.relay cannot run on a cluster: the caches of all clients would have to be written by the driver, "
            "and it holds none; drop exchange.relay, or use one process"
        )
    if config.eval.generate:
        raise CompositionError(
            "eval.generate cannot run on a cluster: answers are generated where the adapters are, and workers do not "
            "yet send any; drop eval.generate, or use one process"
        )


def refuse_device(config: RunConfig, settings: ClusterConfig) -> None:
    """Raise CompositionError where workers would get GPUs that nobody uses, or none that a run asks for."""
    if settings.gpus_per_worker and config.device == "cpu":
        raise CompositionError(
            f"{settings.gpus_per_worker:g} GPUs per worker asked for, and device=cpu computes on none of them; give "
            "device=cuda, or leave --gpus-per-worker (cluster.gpus_per_worker) out"
        )
    if config.device == "cuda" and not settings.gpus_per_worker:
        raise CompositionError(
            "device=cuda given, and workers get no GPU; give --gpus-per-worker 1 (cluster.gpus_per_worker), or a part "
            "of one where several workers share it"
        )


def _refuse_method(config: RunConfig, algorithm: Algorithm[Any]) -> None:
    name = config.algorithm.name
    if is_asynchronous(algorithm):
        raise CompositionError(
            f"{name} cannot run on a cluster: its clients have no common round in which workers could exchange; that "
            "would take one queue of events whose jobs the workers compute; use a synchronous method such as "
            "algorithm.name=dec-lora, or one process"
        )
    if algorithm.traits.merges_into and len(set(config.ranks)) > 1:
        raise CompositionError(
            f"{name} with unequal ranks {sorted(set(config.ranks))} cannot run on a cluster: how many columns a merged "
            "sum has depends on the ranks of all clients; give one rank, or use one process"
        )


def refuse_objects(partitioner: Any, options: Mapping[str, Any]) -> None:
    """Raise CompositionError for what is given as an object of this process, which workers do not get."""
    given = sorted(name for name, value in options.items() if value is not None)
    if "learner" in given:
        raise CompositionError(
            "learner given; workers of a cluster train by peerlora's own steps, and Trainers are objects of this "
            "process; leave it out, or use one process"
        )
    if given:
        raise CompositionError(
            f"{', '.join(given)} given; workers of a cluster load rows and base model themselves; leave it out, or use "
            "one process"
        )
    if partitioner is not None:
        raise CompositionError(
            f"a partitioner {type(partitioner).__name__} given; workers of a cluster divide rows by the section "
            "partition alone; use that, or one process"
        )
