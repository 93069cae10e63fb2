"""What a grid expands to: its settings, the trials that are reported, and those that search learning rates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import task_kind
from peerlora.errors import ConfigError
from peerlora.experiments.file_names import number_equals
from peerlora.experiments.grid import GridConfig, Tree, axis_levels, written_out
from peerlora.experiments.setting_names import require_setting


@dataclass(frozen=True)
class Setting:
    """One combination of the axes' values, before seed and learning rate."""

    labels: dict[str, str]
    tree: Tree

    @property
    def name(self) -> str:
        """For people."""
        words = [f"{axis.rsplit('.', 1)[1]}={label}" if "." in axis else label for axis, label in self.labels.items()]
        return ", ".join(words) or "base"


@dataclass(frozen=True)
class Trial:
    """One run of the grid."""

    labels: dict[str, str]
    config: RunConfig
    folder: str
    """Below the comparison's own."""
    setting: str
    """The name of its setting."""

    @property
    def name(self) -> str:
        """For people."""
        rate = f", rate {self.config.train.lr:g}" if self.searches else ""
        return f"{self.setting}, seed {self.config.seed}{rate}"

    @property
    def searches(self) -> bool:
        """Whether the run serves the search of a learning rate."""
        return self.folder.startswith("search/")


@dataclass(frozen=True)
class TrialPlan:
    """The trials of a grid, and those that are refused."""

    trials: list[Trial] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(name of the trial, reason)"""


def apply_change(tree: Tree, change: Tree) -> Tree:
    """Return ``tree`` with a change; another kind or name drops the settings of the old one, as on the command line."""
    found = dict(tree)
    for key, value in change.items():
        below = found.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and not _other_kind(below, value):
            value = apply_change(below, value)
        found[key] = value
    return found


def _other_kind(was: Tree, now: Tree) -> bool:
    return any(was.get(word) not in (None, now[word]) for word in ("kind", "name") if word in now)


def expand_settings(grid: GridConfig) -> list[Setting]:
    """Combine the axes' values in every way, the last axis running fastest."""
    found = []
    for levels in product(*(axis_levels(axis, values) for axis, values in grid.axes.items())):
        tree = written_out(grid.base)
        for _, change in levels:
            tree = apply_change(tree, change)
        found.append(Setting({axis: label for axis, (label, _) in zip(grid.axes, levels, strict=True)}, tree))
    return found


def plan_trials(grid: GridConfig, rates: Mapping[str, float] | None = None) -> TrialPlan:
    """Plan the trials that are reported; ``rates``: setting -> the learning rate found for it."""
    found, first_names = TrialPlan(), {}
    names = _folders([setting.name for setting in expand_settings(grid)])
    for setting, folder in zip(expand_settings(grid), names, strict=True):
        for seed in grid.seeds:
            change: Tree = {"seed": seed}
            if grid.search.rates:
                change["train"] = {"lr": (rates or {}).get(setting.name, grid.search.rates[0])}
            _add_trial(found, setting, change, f"cells/{folder}__seed-{seed}", first_names)
    return found


def plan_search(grid: GridConfig, rates: Mapping[str, Sequence[float]] | None = None) -> TrialPlan:
    """Plan the trials that search learning rates: per group and rate, on rows set aside from the training rows.

    A policy, which reads no rows, is searched in the environments and episodes of seeds that are not reported.
    ``rates``: searched setting -> the rates that it has come to; by default those of the grid.
    """
    found, first_names = TrialPlan(), {}
    first = searched_settings(grid)
    for setting, folder in zip(first.values(), _folders([setting.name for setting in first.values()]), strict=True):
        config = load_config(setting.tree)
        if reason := _unsearchable(config, grid):
            found.refused.append((setting.name, reason))
            continue
        acts = task_kind(config.task.kind).acts
        holdout: Tree = {} if acts else {"data": {"eval": None, "holdout": grid.search.holdout}}
        for rate, seed in product((rates or {}).get(setting.name, grid.search.rates), grid.search.seeds):
            change = {"seed": seed, "train": {"lr": rate}} | holdout
            _add_trial(found, setting, change, f"search/{folder}__lr-{rate:g}__seed-{seed}", first_names)
    return found


def _unsearchable(config: RunConfig, grid: GridConfig) -> str | None:
    """Why a rate cannot be searched on what is not reported, and what to do; None where it can."""
    if task_kind(config.task.kind).acts:
        both = sorted(set(grid.search.seeds) & set(grid.seeds))
        if not both:
            return None
        return (
            f"search.seeds and seeds share {both[0]}, whose episodes are reported; give search.seeds others, such as "
            f"{max(grid.seeds) + 100}"
        )
    if config.data.eval is not None:
        return None
    return (
        "search.rates needs rows of its own, but data.eval is null, so the reported rows are training rows; name a "
        "file in data.eval, or give train.lr and no rates"
    )


def search_labels(grid: GridConfig) -> dict[str, dict[str, str]]:
    """Setting -> the labels of the setting that its learning rate is searched on; empty where none is searched."""
    first = searched_settings(grid)
    return {setting.name: first[group].labels for setting, group in rate_groups(grid)} if first else {}


def searched_settings(grid: GridConfig) -> dict[tuple[str, ...], Setting]:
    """The first setting of every group that shares a learning rate."""
    first: dict[tuple[str, ...], Setting] = {}
    for setting, group in rate_groups(grid) if grid.search.rates else ():
        first.setdefault(group, setting)
    return first


def rate_groups(grid: GridConfig) -> Iterator[tuple[Setting, tuple[str, ...]]]:
    """Yield every valid setting with the values that its learning rate depends on.

    Raises ConfigError for a name of ``search.each`` that no config has.
    """
    for key in grid.search.each:
        require_setting(key, "search.each")
    for setting in expand_settings(grid):
        try:
            values = load_config(setting.tree).model_dump(mode="json")
        except ConfigError:
            continue  # the plan of reported trials says why
        yield setting, tuple(repr(_value(values, key)) for key in grid.search.each)


def _value(values: Tree, key: str) -> Any:
    node: Any = values
    for part in key.split("."):
        if not isinstance(node, dict):
            return None
        node = node.get(part)  # a ring has no p
    return node


def _add_trial(found: TrialPlan, setting: Setting, change: Tree, folder: str, first_names: dict[str, str]) -> None:
    name = f"{setting.name}, seed {change['seed']}"
    try:
        config = load_config(apply_change(setting.tree, change))
    except ConfigError as error:
        found.refused.append((name, str(error)))
        return
    twin = first_names.setdefault(config.to_yaml(), name)
    if twin != name:
        found.refused.append((name, f"is the same run as {twin}; list each once"))
    found.trials.append(Trial(setting.labels, config, folder, setting.name))


def _folders(names: Sequence[str]) -> list[str]:
    """Names that every file system takes, all different."""
    plain = [re.sub(r"[^\w.=+-]+", "-", name, flags=re.ASCII).strip("-.")[:80] or "cell" for name in names]
    return number_equals(plain)
