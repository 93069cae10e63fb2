"""What the machines of a Ray cluster have room for: a worker's cores and GPUs must be on one of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peerlora.config.cluster import ClusterConfig
from peerlora.errors import ClusterError

_LOOK = 1.0  # seconds between two looks at a cluster that lacks machines
_LEAST = 1e-9  # of a core or GPU, below which a difference is rounding

Machine = Mapping[str, float]
"""What one machine has, by kind: CPU, GPU and others."""


def machines_of(ray: Any) -> list[Machine]:
    """What each machine of a cluster has that is alive, used or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def fitting_workers(settings: ClusterConfig, machines: Sequence[Machine]) -> int:
    """How many workers fit on the machines at once."""
    return sum(_fitting_on(settings, machine) for machine in machines)


def _fitting_on(settings: ClusterConfig, machine: Machine) -> int:
    by_cores = int(machine.get("CPU", 0.0) / settings.cpus_per_worker + _LEAST)
    each, gpus = settings.gpus_per_worker, machine.get("GPU", 0.0)
    if not each:
        return by_cores
    by_gpus = int(gpus + _LEAST) * int(1 / each + _LEAST) if each < 1 else int(gpus / each + _LEAST)
    return min(by_cores, by_gpus)


def lacking(settings: ClusterConfig, machines: Sequence[Machine]) -> str:
    """Say of what a cluster has less than is asked for; an empty string where it has enough."""
    for name, each in (("CPU", float(settings.cpus_per_worker)), ("GPU", settings.gpus_per_worker)):
        asked, has = settings.workers * each, sum(machine.get(name, 0.0) for machine in machines)
        if asked > has + _LEAST:
            return f"{settings.workers} workers with {each:g} {name}s each asked for, the cluster has {has:g} in all"
    fitting = fitting_workers(settings, machines)
    if fitting < settings.workers:
        return (
            f"{settings.workers} workers with {_each(settings)} each asked for, the cluster has room for {fitting}: a "
            "worker needs all of it on one machine"
        )
    return ""


def _each(settings: ClusterConfig) -> str:
    gpus = f" and {settings.gpus_per_worker:g} GPUs" if settings.gpus_per_worker else ""
    return f"{settings.cpus_per_worker} cores{gpus}"


def check_resources(settings: ClusterConfig, machines: Sequence[Machine]) -> None:
    """Raise ClusterError where a cluster has fewer cores or GPUs than are asked for."""
    if reason := lacking(settings, machines):
        raise ClusterError(f"{reason}; use fewer workers, or add machines")


def check_cores(settings: ClusterConfig) -> None:
    """Raise ClusterError where this machine has fewer cores than are asked for."""
    asked, there = settings.workers * settings.cpus_per_worker, len(os.sched_getaffinity(0))
    if asked > there:
        raise ClusterError(
            f"{settings.workers} workers with {settings.cpus_per_worker} cores each asked for, this process may use "
            f"{there}; use fewer workers, or the address of a larger cluster"
        )


def await_machines(ray: Any, settings: ClusterConfig, tell: Callable[[str], None]) -> None:
    """Return when all workers fit again, after machines have left; ``tell`` is told where that takes a while.

    Raises ClusterError where they do not within ``settings.wait`` seconds.
    """
    end, reported = time.monotonic() + settings.wait, False
    while reason := lacking(settings, machines_of(ray)):
        if time.monotonic() >= end:
            raise ClusterError(f"{reason}, {settings.wait:g} s after machines have left; add machines")
        if not reported:
            tell(f"machines have left: {reason}; waiting up to {settings.wait:g} s for others")
        reported = True
        time.sleep(_LOOK)


def describe_free(ray: Any) -> str:
    """Say what of a cluster nobody uses."""
    free, there = ray.available_resources(), ray.cluster_resources()
    kinds = [name for name in ("CPU", "GPU") if there.get(name)]
    return " and ".join(f"{free.get(name, 0.0):g} of {there[name]:g} {name}s" for name in kinds) + " are free"
