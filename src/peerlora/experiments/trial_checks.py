"""Check a grid: every trial is planned, and composed as far as others do not stand for it, before any is run."""

from __future__ import annotations

import json
from collections.abc import Sequence

from peerlora.config.cluster import ClusterConfig
from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import task_kind
from peerlora.errors import CompositionError, PeerloraError
from peerlora.experiments.grid import GridConfig
from peerlora.experiments.resource_cache import ResourceCache, order_trials
from peerlora.experiments.trials import plan_search, plan_trials
from peerlora.runtime.cluster.checks import refuse_device
from peerlora.runtime.compose import assemble
from peerlora.runtime.plan import Plan, plan

_OF_RUNNING = (
    "recipe",
    "checkpoint",
    "clock",
    "peer",
    "cluster",
    "track",
    "threads",
    "eval.every",
    "train.max_seconds",
)
_OF_OPTIMISER = (
    *("train.lr", "train.schedule", "train.warmup", "train.floor", "train.decay", "train.optimizer"),
    *("train.momentum", "train.weight_decay", "train.clip"),
)
_OF_STEPS = ("train.local_steps", "train.accumulate")
_OF_ROUNDS = ("train.rounds", "train.quiet")


def check_grid(grid: GridConfig, cache: ResourceCache) -> None:
    """Plan every trial, and assemble one of all those that are the same to data and model.

    Raises CompositionError that lists every refused trial with its reason.
    """
    planned, searched = plan_trials(grid), plan_search(grid)
    refused, assembled = [*planned.refused, *searched.refused], {}
    for trial in order_trials([*searched.trials, *planned.trials]):
        if reason := _refusal(trial.config, cache, assembled, grid.cluster):
            refused.append((trial.name, reason))
    if refused:
        count = len(planned.trials) + len(searched.trials) + len(planned.refused)
        raise CompositionError(_refusal_message(refused, count))


def _refusal(
    config: RunConfig, cache: ResourceCache, assembled: dict[str, str | None], cluster: ClusterConfig | None
) -> str | None:
    """Why a trial cannot run; None where it can.  ``assembled``: what came of others, by ``_assembly_key``.

    Trials for the workers of a cluster are assembled without a GPU, which the driver need not have.
    """
    if config.train.epochs is not None:
        return f"train.epochs={config.train.epochs:g} given; trials are compared by their rounds: give train.rounds"
    try:
        if cluster is not None:
            refuse_device(config, cluster)
            config = config.model_copy(update={"device": "cpu"})
        planned = plan(config)
    except PeerloraError as error:
        return str(error)
    key = _assembly_key(planned)
    if key not in assembled:
        try:
            assemble(planned, cache.resources(config))
            assembled[key] = None
        except PeerloraError as error:
            assembled[key] = str(error)
    return assembled[key]


def _assembly_key(planned: Plan) -> str:
    """All settings of a trial but those of which it is known that `assemble` depends on none of them."""
    tree = planned.config.model_dump(mode="json")
    for name in _unread_settings(planned):
        section, _, setting = name.partition(".")
        if setting:
            del tree[section][setting]
        else:
            del tree[section]
    return json.dumps(tree)


def _unread_settings(planned: Plan) -> tuple[str, ...]:
    """The settings that `assemble` does not read in a run of rows, or in none that could refuse this one.

    A merging method is refused where its sums don't fit, and a relayed one by its messages; privacy counts the steps.
    """
    config, merges = planned.config, bool(planned.algorithm.traits.merges_into)
    if task_kind(config.task.kind).acts:
        return _OF_RUNNING
    left_out = _OF_RUNNING + _OF_OPTIMISER
    if config.privacy is None:
        left_out += _OF_STEPS if merges else (*_OF_STEPS, *_OF_ROUNDS)
    if not merges:
        left_out += ("topology",) if config.exchange.relay else ("topology", "algorithm")
    return left_out


def _refusal_message(refused: Sequence[tuple[str, str]], count: int) -> str:
    """List every refused trial under its reason: most wrong grids are wrong in one setting."""
    reasons: dict[str, list[str]] = {}
    for name, reason in refused:
        reasons.setdefault(reason, []).append(name)
    lines = [f"  {'; '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
    return "\n".join([f"{len(refused)} of {count} cells cannot run, so none was started:", *lines])
