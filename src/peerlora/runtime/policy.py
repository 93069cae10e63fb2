"""Flow policies in a run: the base is read or pre-trained, and environments take the place of rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from peerlora.algorithms.compatibility import cache_settings, check_relayed_message
from peerlora.config.policy import SCRIPTED
from peerlora.config.run import RunConfig
from peerlora.config.sections import EnvironmentPartition
from peerlora.config.task_kinds import task_kind
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters
from peerlora.lora.attach import StackedModel
from peerlora.lora.peft_io import ExportContext
from peerlora.runs.events import PolicyShown
from peerlora.runtime.exchange_stack import build_exchange
from peerlora.runtime.federation import Federation, start_adapters
from peerlora.runtime.plan import Plan
from peerlora.runtime.policy_checks import environment_facts, flow_shape, horizon_of
from peerlora.runtime.resources import DTYPES
from peerlora.train.kernels.speed import Speed
from peerlora.train.online.base_policy import (
    BasePolicy,
    PretrainingSettings,
    read_policy,
    scripted_policy,
    with_critic,
)
from peerlora.train.online.demonstrations import scripted_controller
from peerlora.train.online.environments import POINT_MASS
from peerlora.train.online.episodes import client_environments
from peerlora.train.online.flow import flow_targets
from peerlora.train.online.gymnasium_environment import BoxScale
from peerlora.train.online.illustrations import illustrate
from peerlora.train.online.learner import OnlineLearner


@dataclass(frozen=True)
class PolicyResources:
    """What many runs of a flow policy can share: the frozen base."""

    base: BasePolicy


def load_policy(config: RunConfig) -> PolicyResources:
    """Read the base of a flow policy, or pre-train it on scripted demonstrations.

    Raises ModelError for a folder that cannot be used, ConfigError for an environment that cannot.
    """
    facts, shape = environment_facts(config), flow_shape(config)
    assert config.task.env is not None
    if config.model.source != SCRIPTED:
        return PolicyResources(read_policy(Path(config.model.source).expanduser(), config.task.env, shape))
    online = config.online
    settings = PretrainingSettings(
        config.task.env, horizon_of(config, facts), online.demonstrations, online.pretraining, shape
    )
    return PolicyResources(scripted_policy(settings, policy_cache()))


def assemble_policy(
    planned: Plan, resources: PolicyResources, here: Sequence[int], gather: Callable[[Tensor], Tensor]
) -> Federation:
    """Give the clients held here their environments, attach the adapters and build learner and exchange."""
    config, online = planned.config, planned.config.online
    partition = config.partition
    assert isinstance(partition, EnvironmentPartition) and config.task.env is not None
    horizon = horizon_of(config, environment_facts(config))
    environments = client_environments(config.task.env, partition, config.clients, config.seed)
    episodes = environments.episodes(online.evaluated, horizon, config.seed)
    model, export = build_policy(config, resources)
    start, warnings = start_adapters(config, model, export, here)
    check_relayed_message(config, planned.algorithm, start.rows([0]))
    cache, rows_of = cache_settings(config, planned.algorithm), dict.fromkeys(range(config.clients), 1)
    exchange = StackedExchange(planned.topology, here, gather)
    own = np.arange(len(episodes)).reshape(config.clients, -1)
    return Federation(
        config=config,
        algorithm=planned.algorithm,
        topology=planned.topology,
        partition=environments,
        train_data=episodes,
        eval_data=episodes,
        model=model,
        learner=OnlineLearner(model, environments, here, config.train, online, horizon, config.seed),
        exchange=build_exchange(config, exchange, start, planned.attackers, cache, rows_of),
        start=start,
        export=export,
        warnings=(*planned.warnings, *warnings, *_demonstration_warnings(config)),
        notes=planned.notes,
        speed=Speed(config.train.dtype),
        paths={},
        originals={},
        clock=planned.clock,
        attackers=planned.attackers,
        own_rows=tuple(own[i] for i in here),
    )


def build_policy(config: RunConfig, resources: PolicyResources) -> tuple[StackedModel, ExportContext]:
    """The base with places for all clients' adapters, its critic drawn from the run's seed; and how it is exported."""
    policy = with_critic(resources.base.policy, config.seed, DTYPES[config.train.dtype])
    model = StackedModel(policy, flow_targets(policy), train_head=True)
    folder = str(resources.base.folder.resolve())
    kind, drawn = task_kind(config.task.kind).peft_type, model.targets.heads
    return model, ExportContext(config.model.source, kind, 0.0, location=folder, initialised=drawn)


def show_policy(
    federation: Federation, evaluated: Callable[[], Sequence[Adapters]], done: int
) -> Sequence[PolicyShown]:
    """Show what the last of the evaluated models does, where it is a flow policy; ``done``: finished rounds."""
    learner = federation.learner
    if not isinstance(learner, OnlineLearner):
        return ()
    models = evaluated()[-1]
    averaged = models.clients > len(federation.exchange.clients)
    episodes = learner.environments.episodes(1, learner.horizon, learner.seed)
    found = illustrate(learner, models.rows([models.clients - 1]), episodes)
    return [PolicyShown(done, "averaged" if averaged else "own", found.fields, found.shown, found.traces)]


def policy_cache() -> Path:
    """The folder for pre-trained policies: peerlora/policies in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "peerlora" / "policies"


def policy_card(config: RunConfig) -> dict[str, str]:
    """What the card of an exported policy says of its environment: its observations and actions are scaled."""
    if config.task.env is None or config.task.env == POINT_MASS:
        return {}
    name = f"{BoxScale.__module__}.{BoxScale.__name__}"
    return {
        "environment": config.task.env,
        "observations": f"scaled to [-1, 1] where their Box has bounds: `{name}(space).scaled`",
        "actions": f"in [-1, 1], to be scaled to their Box: `{name}(space).unscaled`",
    }


def _demonstration_warnings(config: RunConfig) -> tuple[str, ...]:
    if config.model.source != SCRIPTED or scripted_controller(str(config.task.env)) is not None:
        return ()
    return (
        f"no controller is written for {config.task.env}: the policy was pre-trained on random actions; give "
        "model.source, the folder of a better one",
    )
