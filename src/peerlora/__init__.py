"""peerlora: clients that may not pool their data fine-tune one model together, without a server.

    from peerlora import load_config, simulate
    result = simulate(load_config("peerlora.yaml"))

Names are imported when first used, so ``import peerlora`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peerlora.algorithms import REGISTRY as REGISTRY
    from peerlora.algorithms import describe_algorithms as describe_algorithms
    from peerlora.algorithms import register_method as register_method
    from peerlora.config.loading import load_config as load_config
    from peerlora.config.loading import schema as schema
    from peerlora.config.run import RunConfig as RunConfig
    from peerlora.config.sections import register_partition as register_partition
    from peerlora.config.task_kinds import register_task as register_task
    from peerlora.config.topology import register_topology as register_topology
    from peerlora.errors import ClusterError as ClusterError
    from peerlora.errors import CompositionError as CompositionError
    from peerlora.errors import ConfigError as ConfigError
    from peerlora.errors import DataError as DataError
    from peerlora.errors import DivergenceError as DivergenceError
    from peerlora.errors import ExtraMissing as ExtraMissing
    from peerlora.errors import IdentityError as IdentityError
    from peerlora.errors import ModelError as ModelError
    from peerlora.errors import PeerloraError as PeerloraError
    from peerlora.errors import QuorumMissed as QuorumMissed
    from peerlora.errors import RunError as RunError
    from peerlora.errors import Stopped as Stopped
    from peerlora.errors import TopologyError as TopologyError
    from peerlora.lora.adapters import Adapters as Adapters
    from peerlora.lora.adapters import AdapterSpec as AdapterSpec
    from peerlora.network.base import TransportError as TransportError
    from peerlora.runs.store import read_events as read_events
    from peerlora.runtime.cluster.run import resume as resume
    from peerlora.runtime.cluster.run import simulate as simulate
    from peerlora.runtime.compose import Federation as Federation
    from peerlora.runtime.compose import compose as compose
    from peerlora.runtime.export import export_from_run as export_from_run
    from peerlora.runtime.model_choice import ModelChoice as ModelChoice
    from peerlora.runtime.peer.join import join as join
    from peerlora.runtime.trainer import Result as Result
    from peerlora.topology.schedule import Topology as Topology
    from peerlora.topology.schedule import build_topology as build_topology

_HOMES = {
    "REGISTRY": "algorithms",
    "describe_algorithms": "algorithms",
    "register_method": "algorithms",
    "RunConfig": "config.run",
    "load_config": "config.loading",
    "schema": "config.loading",
    "register_partition": "config.sections",
    "register_task": "config.task_kinds",
    "register_topology": "config.topology",
    "ClusterError": "errors",
    "CompositionError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "DivergenceError": "errors",
    "ExtraMissing": "errors",
    "IdentityError": "errors",
    "ModelError": "errors",
    "PeerloraError": "errors",
    "QuorumMissed": "errors",
    "RunError": "errors",
    "Stopped": "errors",
    "TopologyError": "errors",
    "Adapters": "lora.adapters",
    "AdapterSpec": "lora.adapters",
    "TransportError": "network.base",
    "read_events": "runs.store",
    "Federation": "runtime.compose",
    "compose": "runtime.compose",
    "export_from_run": "runtime.export",
    "ModelChoice": "runtime.model_choice",
    "join": "runtime.peer.join",
    "Result": "runtime.trainer",
    "resume": "runtime.cluster.run",
    "simulate": "runtime.cluster.run",
    "Topology": "topology.schedule",
    "build_topology": "topology.schedule",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'peerlora' has no attribute {name!r}")
    return getattr(import_module(f"peerlora.{_HOMES[name]}"), name)
