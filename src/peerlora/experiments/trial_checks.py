"""Check a grid: every trial is planned, and composed as far as others do not stand for it, before any is run."""

from __future__ import annotations

import json
from collections.abc import Sequence

from peerlora.config.run import RunConfig
from peerlora.errors import CompositionError, PeerloraError
from peerlora.experiments.grid import GridConfig
from peerlora.experiments.resource_cache import ResourceCache, order_trials
from peerlora.experiments.trials import plan_search, plan_trials
from peerlora.runtime.compose import assemble
from peerlora.runtime.plan import Plan, plan


def check_grid(grid: GridConfig, cache: ResourceCache) -> None:
    """Plan every trial, and assemble one of all those that are the same to data and model.

    Raises CompositionError that lists every refused trial with its reason.
    """
    planned, searched = plan_trials(grid), plan_search(grid)
    refused, assembled = [*planned.refused, *searched.refused], {}
    for trial in order_trials([*searched.trials, *planned.trials]):
        if reason := _refusal(trial.config, cache, assembled):
            refused.append((trial.name, reason))
    if refused:
        count = len(planned.trials) + len(searched.trials) + len(planned.refused)
        raise CompositionError(_refusal_message(refused, count))


def _refusal(config: RunConfig, cache: ResourceCache, assembled: dict[str, str | None]) -> str | None:
    """Why a trial cannot run; None where it can.  ``assembled``: what came of others, by ``_assembly_key``."""
    if config.train.epochs is not None:
        return f"train.epochs={config.train.epochs:g} given; trials are compared by their rounds: give train.rounds"
    try:
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
    """The settings on which `assemble` depends; a method that merges is refused where its sums don't fit."""
    tree = planned.config.model_dump(mode="json")
    names = ["model", "adapter", "task", "data", "partition", "clients", "exchange", "adversary", "device", "seed"]
    if planned.algorithm.traits.merges_into:
        names += ["algorithm", "topology"]
    train = ("batch", "label_prior", "dtype", "fast", *(["rounds"] if planned.algorithm.traits.merges_into else []))
    return json.dumps([{name: tree[name] for name in names}, {name: tree["train"][name] for name in train}])


def _refusal_message(refused: Sequence[tuple[str, str]], count: int) -> str:
    """List every refused trial under its reason: most wrong grids are wrong in one setting."""
    reasons: dict[str, list[str]] = {}
    for name, reason in refused:
        reasons.setdefault(reason, []).append(name)
    lines = [f"  {'; '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
    return "\n".join([f"{len(refused)} of {count} cells cannot run, so none was started:", *lines])
