"""What trials share: tokenised rows and the base model, kept from one trial to the next, and the order that suits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import task_kind
from peerlora.experiments.trials import Trial
from peerlora.runtime.compose import load_run
from peerlora.runtime.policy import PolicyResources
from peerlora.runtime.resources import BaseModelCache, RunResources


class ResourceCache:
    """Keeps the tokenised rows and the base model of the latest trial, for the next one.

    ``share_prefix``: and what the base's frozen blocks below the adapted ones give of each row.
    """

    def __init__(self, share_prefix: bool = False):
        self.share_prefix = share_prefix
        self._key: Any = None
        self._kept: RunResources | PolicyResources | None = None
        self._bases = BaseModelCache()

    def resources(self, config: RunConfig) -> RunResources | PolicyResources:
        """Return a trial's resources, loaded only where the previous trial had others."""
        key = data_key(config)
        if self._kept is None or key != self._key:
            self._kept = None  # free the old rows first; both may not fit
            loaded, self._key = load_run(config), key
            rows = isinstance(loaded, RunResources)
            self._kept = replace(loaded, bases=self._bases, share_prefix=self.share_prefix) if rows else loaded
        return self._kept


def data_key(config: RunConfig) -> str:
    """Everything that ``load_run`` depends on; the seed only where it draws rows."""
    data = config.data
    drawn = data.eval is None or data.train_per_class or data.eval_per_class
    column = getattr(config.partition, "column", None)
    acts = (config.online, config.adapter.rank) if task_kind(config.task.kind).acts else None
    return repr(
        (acts, config.model.source, config.model.revision, data, config.task, column, config.seed if drawn else None)
    )


def order_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Sort trials by their rows, then by seed: so little is loaded twice, and early seeds are whole."""
    keys = [(data_key(trial.config), trial.config.seed) for trial in trials]
    rows = list(dict.fromkeys(data for data, _ in keys))
    seeds = list(dict.fromkeys(keys))
    return [
        trial
        for _, _, trial in sorted(
            ((rows.index(key[0]), seeds.index(key), trial) for key, trial in zip(keys, trials, strict=True)),
            key=lambda each: each[:2],
        )
    ]
