"""A connection to a Ray cluster: started on this machine, or one that runs already; checked before it is used.

Every node that joins is trusted with code, data and results: a cluster is one institution's own.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from peerlora.config.cluster import ClusterConfig
from peerlora.display import format_bytes
from peerlora.environment import main_memory, need_extra
from peerlora.errors import ClusterError, first_line
from peerlora.runtime.cluster.machines import check_cores, check_resources, machines_of

STORE_BYTES = 200_000_000  # bytes, at least, of the object store of a cluster that is started here
_STORE_SHARE = 0.3  # of main memory, and _SHARED of /dev/shm, that an object store takes at most: Ray's own bounds
_SHARED = 0.9
_STORE_LEAST = 80_000_000  # bytes; Ray takes no less than 75 MiB
_SHARED_MEMORY = "/dev/shm"
_ANSWERS = 20.0  # seconds in which an address must answer
_CLIENT_PORT = 10001  # of ray:// addresses that name none
_QUESTION = "import sys, ray; print(flush=True); ray._raylet.GcsClient(address=sys.argv[1])"
_QUIET = {"log_to_driver": False, "logging_level": "ERROR"}
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # tells nobody of this run
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # without machines to join, Ray listens on loopback alone
}


@contextmanager
def ray_session(
    settings: ClusterConfig, stored_bytes: int = 0, note: Callable[[str], None] = lambda text: None
) -> Iterator[Any]:
    """Connect, and yield the module ``ray``; what was started here ends with it.

    ``stored_bytes``: what workers put into the object store at once; what does not fit goes through the disk.
    ``note`` is told how large the store is, where it is started here.

    A connection that the process has already is used and left as it is.
    Raises ExtraMissing without Ray, ClusterError where the address does not answer or has not what is asked for.
    """
    need_extra("cluster")
    if settings.address is None:
        check_cores(settings)
        os.environ.update({name: os.environ.get(name, value) for name, value in _SETTINGS.items()})
    ray: Any = import_module("ray")
    connected = ray.is_initialized()
    if not connected:
        _connect(ray, settings, stored_bytes, note)
    try:
        check_resources(settings, machines_of(ray))
        yield ray
    finally:
        if not connected:
            ray.shutdown()


def _connect(ray: Any, settings: ClusterConfig, stored_bytes: int, note: Callable[[str], None]) -> None:
    if settings.address is None:
        _start_here(ray, settings, stored_bytes, note)
        return
    address = find_address() if settings.address == "auto" else settings.address
    named = address if address == settings.address else f"{address} (auto)"
    check_address(address)
    try:
        ray.init(address=address, **_QUIET)
    except (Exception, SystemExit) as error:  # of many kinds: another version, no cluster, a wrong token
        raise ClusterError(
            f"the cluster at {named} cannot be used ({first_line(error)}); expected a running Ray cluster of version "
            f"{ray.__version__}, see `ray status`"
        ) from None


def _start_here(ray: Any, settings: ClusterConfig, stored_bytes: int, note: Callable[[str], None]) -> None:
    size = store_bytes(stored_bytes)
    less = f" of the {format_bytes(stored_bytes)} that may be under way; the rest goes through the disk"
    note(f"object store of {format_bytes(size)}{less if size < stored_bytes else ''}")
    try:
        with _on_loopback():
            ray.init(
                address="local",
                num_cpus=settings.workers * settings.cpus_per_worker,
                include_dashboard=False,
                object_store_memory=size,
                **_QUIET,
            )
    except (Exception, SystemExit) as error:
        raise ClusterError(
            f"Ray {ray.__version__} cannot be started on this machine ({first_line(error)}) with an object store of "
            f"{format_bytes(size)}; give it main memory and room in {_SHARED_MEMORY} (of a container: --shm-size), or "
            "use one process"
        ) from None


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let Ray listen on loopback alone, also where it was imported before ``_SETTINGS``, which it reads only then."""
    constants: Any = sys.modules.get("ray._private.ray_constants")
    joinable = getattr(constants, "ENABLE_RAY_CLUSTER", None)
    if constants is None or joinable is None:
        yield
        return
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = joinable


def store_bytes(wanted: int) -> int:
    """The size of an object store for so many bytes at once, as far as this machine has the memory."""
    most = int(_STORE_SHARE * main_memory())
    if os.path.isdir(_SHARED_MEMORY):
        most = min(most, int(_SHARED * shutil.disk_usage(_SHARED_MEMORY).free))
    return max(_STORE_LEAST, min(max(STORE_BYTES, wanted), most))


def find_address() -> str:
    """The address that "auto" stands for: that in RAY_ADDRESS, or of a cluster that was started on this machine."""
    services: Any = import_module("ray._private.services")
    try:
        return services.get_ray_address_from_environment("auto", None)
    except ConnectionError as error:
        raise ClusterError(
            f"no cluster found for --address auto ({first_line(error)}); start one with `ray start --head`, or leave "
            "the address out to start one on this machine"
        ) from None


def check_address(address: str) -> None:
    """Raise ClusterError where nobody listens at host and port, or does not answer as a cluster."""
    place = address.removeprefix("ray://")
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
