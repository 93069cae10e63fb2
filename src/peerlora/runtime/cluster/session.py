"""A connection to a Ray cluster: started on this machine, or one that runs already; checked before it is used.

Every node that joins is trusted with code, data and results: a cluster is one institution's own.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from peerlora.config.cluster import ClusterConfig
from peerlora.environment import need_extra
from peerlora.errors import ClusterError, first_line

STORE_BYTES = 200_000_000  # bytes, at least, of the object store of a cluster that is started here
_ANSWERS = 20.0  # seconds in which an address must answer
_CLIENT_PORT = 10001  # of ray:// addresses that name none
_QUESTION = "import sys, ray; print(flush=True); ray._raylet.GcsClient(address=sys.argv[1])"
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # tells nobody of this run
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # without machines to join, Ray listens on loopback alone
}


@contextmanager
def ray_session(settings: ClusterConfig, stored_bytes: int = 0) -> Iterator[Any]:
    """Connect, and yield the module ``ray``; what was started here ends with it.

    ``stored_bytes``: what workers put into the object store at once; what does not fit goes through the disk.

    A connection that the process has already is used and left as it is.
    Raises ExtraMissing without Ray, ClusterError where the address does not answer or has not what is asked for.
    """
    need_extra("cluster")
    if settings.address is None:
        _check_cores(settings)
        os.environ.update({name: os.environ.get(name, value) for name, value in _SETTINGS.items()})
    ray: Any = import_module("ray")
    connected = ray.is_initialized()
    if not connected:
        _connect(ray, settings, max(STORE_BYTES, stored_bytes))
    try:
        check_resources(settings, ray.cluster_resources())
        yield ray
    finally:
        if not connected:
            ray.shutdown()


def _connect(ray: Any, settings: ClusterConfig, store_bytes: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if settings.address is None:
        ray.init(
            address="local",
            num_cpus=settings.workers * settings.cpus_per_worker,
            include_dashboard=False,
            object_store_memory=store_bytes,
            **quiet,
        )
        return
    check_address(settings.address)
    try:
        ray.init(address=settings.address, **quiet)
    except Exception as error:  # of many kinds: another version, no cluster, a wrong token
        raise ClusterError(
            f"the cluster at {settings.address} cannot be used ({first_line(error)}); expected a running Ray cluster "
            f"of version {ray.__version__}, see `ray status`"
        ) from None


def check_address(address: str) -> None:
    """Raise ClusterError where nobody listens at host and port; what "auto" means, Ray finds out at once."""
    place = address.removeprefix("ray://")
    if place == "auto":
        return
    host, _, port = place.rpartition(":") if ":" in place else (place, "", str(_CLIENT_PORT))
    if not port.isdigit() or not host:
        raise ClusterError(f"cluster address {address!r} given; expected auto, host:port or ray://host:port")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWERS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no cluster answers at {address} ({first_line(error)}); start one with `ray start --head`, or leave the "
            "address out to start one on this machine"
        ) from None
    if not address.startswith("ray://"):
        _require_answer(address)


def _require_answer(address: str) -> None:
    """Raise ClusterError where what listens at host:port does not answer as a cluster does.

    Asked by a process of its own, which can be ended: Ray's client waits for minutes, and not for this process.
    """
    asked = [sys.executable, "-c", _QUESTION, address]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()  # once Ray is imported, which may take longer than any answer
            child.wait(timeout=_ANSWERS)
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"what listens at {address} gave no answer within {_ANSWERS:g} s; expected a running Ray cluster, see "
                "`ray status`"
            ) from None
        finally:
            child.kill()


def _check_cores(settings: ClusterConfig) -> None:
    """Raise ClusterError where this machine has fewer cores than are asked for."""
    asked, there = settings.workers * settings.cpus_per_worker, len(os.sched_getaffinity(0))
    if asked > there:
        raise ClusterError(
            f"{settings.workers} workers with {settings.cpus_per_worker} cores each asked for, this process may use "
            f"{there}; use fewer workers, or the address of a larger cluster"
        )


def check_resources(settings: ClusterConfig, there: dict[str, float]) -> None:
    """Raise ClusterError where a cluster has fewer cores or GPUs than are asked for."""
    if reason := lacking(settings, there):
        raise ClusterError(f"{reason}; use fewer workers, or add machines")


def lacking(settings: ClusterConfig, there: dict[str, float]) -> str:
    """Say of which kind a cluster has less than is asked for; an empty string where it has enough."""
    for name, each in (("CPU", float(settings.cpus_per_worker)), ("GPU", settings.gpus_per_worker)):
        asked, has = settings.workers * each, there.get(name, 0.0)
        if asked > has + 1e-9:
            return f"{settings.workers} workers with {each:g} {name}s each asked for, the cluster has {has:g} in all"
    return ""
