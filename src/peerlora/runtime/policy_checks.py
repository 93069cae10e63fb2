"""Checks of flow policies, before anything is loaded; and what a config says of environment and policy."""

from __future__ import annotations

from typing import Any

from peerlora.algorithms.base import Algorithm
from peerlora.config.run import RunConfig
from peerlora.config.sections import EnvironmentPartition
from peerlora.environment import main_memory
from peerlora.errors import CompositionError, ConfigError
from peerlora.runtime.resources import DTYPES
from peerlora.train.online.effects import check_effects
from peerlora.train.online.environment_names import facts_of
from peerlora.train.online.environments import POINT_MASS, EnvironmentFacts
from peerlora.train.online.episodes import client_environments
from peerlora.train.online.flow import FLOW, FlowShape
from peerlora.train.online.point_mass import check_values
from peerlora.train.online.proximal import LOG_DET_ACTIONS


def check_policy(config: RunConfig, algorithm: Algorithm[Any]) -> tuple[str, ...]:
    """Refuse a method that cannot fine-tune flow policies, and an environment that cannot be acted in; return warnings.

    Raises CompositionError, ConfigError or ExtraMissing, before anything is loaded.
    """
    traits, name = algorithm.traits, config.algorithm.name
    if traits.sends not in ("adapters", "nothing", "cached"):
        raise CompositionError(
            f"{name} cannot fine-tune flow policies (task.kind=flow-policy): they go with methods that send adapters "
            "and nothing else, or nothing; use algorithm.name=swfp, dec-lora, adf-lora or local"
        )
    if traits.flow_policies_only and config.online.policy != "flow":
        raise CompositionError(
            f"{name} fine-tunes the flow's blocks in turn, and online.policy={config.online.policy} keeps them frozen; "
            "use algorithm.name=dec-lora, adf-lora or local"
        )
    facts, shape = environment_facts(config), flow_shape(config)
    assert isinstance(config.partition, EnvironmentPartition)
    warnings = ()
    if facts.name == POINT_MASS:
        environments = client_environments(POINT_MASS, config.partition, config.clients, config.seed)
        check_values(environments.values, environments.each)
    else:
        warnings = check_effects(facts, {**config.partition.vary, **config.partition.values})
    horizon_of(config, facts)
    if config.online.entropy and shape.action > LOG_DET_ACTIONS:
        raise CompositionError(
            f"online.entropy={config.online.entropy:g} needs the log-determinant of every block, which is computed for "
            f"at most {LOG_DET_ACTIONS} action dimensions, {facts.name} has {shape.action}; use online.entropy=0"
        )
    wanted = [*config.eval.metrics, *([config.eval.select.metric] if config.eval.select else [])]
    if "share-of-optimum" in wanted and facts.name != POINT_MASS:
        raise CompositionError(
            f"eval.metrics: share-of-optimum needs the optimal return, which is known of {POINT_MASS}, not of "
            f"{facts.name}; drop it"
        )
    return warnings


def check_replay(config: RunConfig, clients: int) -> None:
    """Refuse replay buffers of so many clients, those held here, that memory cannot hold; raises CompositionError."""
    shape, size = flow_shape(config), DTYPES[config.train.dtype].itemsize
    needed = size * clients * config.online.replay * (2 * shape.observation + shape.action + 2)
    if needed > main_memory():
        raise CompositionError(
            f"online.replay={config.online.replay} of {clients} clients needs {needed / 1e9:.3g} GB, this "
            f"machine has {main_memory() / 1e9:.3g} GB; keep fewer transitions"
        )


def horizon_of(config: RunConfig, facts: EnvironmentFacts) -> int:
    """Steps of an episode; raises ConfigError where neither config nor environment bounds them."""
    found = config.online.horizon or facts.horizon
    if found is None:
        raise ConfigError(f"{facts.name} has no time limit; give online.horizon, the steps of an episode")
    return found


def environment_facts(config: RunConfig) -> EnvironmentFacts:
    """What is known of a run's environment; raises as ``environments.facts_of`` does."""
    partition = config.partition
    assert isinstance(partition, EnvironmentPartition) and config.task.env is not None
    return facts_of(config.task.env, [*partition.vary, *partition.values])


def flow_shape(config: RunConfig) -> FlowShape:
    """The sizes of a run's policy."""
    facts = environment_facts(config)
    actor = FLOW if config.online.policy == "cloned" else config.online.policy
    return FlowShape(facts.observation, facts.action, config.task.blocks, config.task.width, actor)
