"""Grids: one YAML file with a base config, axes and seeds, and the trials that it expands to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from peerlora.config.loading import load_config, override, parse, read_tree
from peerlora.config.run import RunConfig
from peerlora.config.sections import Section
from peerlora.errors import ConfigError, nearest
from peerlora.runs.resume import flatten

Tree = dict[str, Any]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
WORDS = {"algorithm": "name", "topology": "kind", "partition": "kind"}
"""Sections that may be one word, and the setting that this word is."""


class SearchConfig(Section):
    """How learning rates are found: on training rows set aside, so never on the rows that are reported."""

    rates: list[Annotated[float, Field(gt=0)]] = []
    """Empty: nothing is searched, ``train.lr`` is used."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the training rows that is set aside."""
    each: Annotated[list[str], Field(min_length=1)] = ["algorithm.name"]
    """Trials that agree on these settings share a rate, searched on the first of them."""


class GridConfig(Section):
    """Everything that decides a comparison's result."""

    base: dict[str, Any] = {}
    """What all trials have in common, as for ``peerlora train``."""
    axes: dict[str, Any] = {}
    """A dotted setting -> its values, or a name of your own -> changes to the base; as a list, or as label: value."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0, 1, 2]
    baseline: dict[str, str] = {}
    """One axis: its label that differences are taken against."""
    search: SearchConfig = SearchConfig()
    published: Literal["adf-lora", "tad-lora"] | None = None
    """The paper whose numbers the report puts beside ours."""

    @field_validator("axes")
    @classmethod
    def _have_values(cls, axes: Tree) -> Tree:
        for name, values in axes.items():
            if not isinstance(values, list | dict) or not values:
                raise ValueError(f"{name}: {values!r} given; expected at least one value, e.g. [0.1, 0.5]")
        return axes

    @field_validator("seeds")
    @classmethod
    def _differ(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{seeds} given; a seed twice would count one run as two, list each once")
        return seeds

    def to_yaml(self) -> str:
        """The whole grid, defaults written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


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


def load_grid(source: Path | str | Tree | None = None, words: Sequence[str] = ()) -> GridConfig:
    """Read a grid and apply ``key=value`` words: keys of the grid (``seeds``, ``search.rates``) or of its base.

    Raises ConfigError for everything that can be seen without composing a trial.
    """
    if not isinstance(source, dict) and source is not None and not Path(source).is_file():
        raise ConfigError(
            f"grid file {str(source)!r} does not exist; write one (docs/comparing.md), or use --preset adf-lora"
        )
    tree = read_tree(source)
    given = [_apply(tree, word) for word in words]
    grid = parse(GridConfig, tree)
    _check_axes(grid)
    _check_overridden(grid, [key for key in given if key])
    return grid


def _apply(tree: Tree, word: str) -> str | None:
    """Change one setting; returns its key where it belongs to the base."""
    key, equals, text = word.partition("=")
    if key.startswith("axes.") and equals:  # an axis may have dots in its name
        read: Tree = {}
        override(read, f"value={text}")
        tree["axes"] = {**(tree.get("axes") or {}), key.removeprefix("axes."): read["value"]}
        return None
    if key.split(".")[0] in GridConfig.model_fields and not key.startswith("base."):
        override(tree, word)
        return None
    word = word.removeprefix("base.")
    if not isinstance(tree.setdefault("base", {}), dict):
        raise ConfigError(f"base: {tree['base']!r} given; expected settings such as model:, data:, train:")
    override(tree["base"], word)
    return word.partition("=")[0]


def _check_axes(grid: GridConfig) -> None:
    levels = {name: _levels(name, values) for name, values in grid.axes.items()}
    changed = {key for axis in levels.values() for _, change in axis for key in flatten(change)}
    if "seed" in {*changed, *grid.base}:
        raise ConfigError("seed is set by the base or an axis; name the seeds in the grid's own seeds: [0, 1, 2]")
    taken = {"purpose", "seed", "learning rate", "client", "round", "metric", "value", "measure"}  # columns
    for axis in taken & grid.axes.keys():
        raise ConfigError(f"axes.{axis}: results.parquet has a column of this name already; name the axis otherwise")
    if grid.search.rates and "train.lr" in {*changed, *flatten(grid.base)}:
        raise ConfigError("train.lr is set, but search.rates asks to search it; drop one of them")
    for axis, label in grid.baseline.items():
        if axis not in levels:
            raise ConfigError(
                f"baseline.{axis}: no such axis{nearest(axis, levels)}; expected one of {', '.join(levels) or 'none'}"
            )
        known = [name for name, _ in levels[axis]]
        if label not in known:
            raise ConfigError(
                f"baseline.{axis}: {label!r} given{nearest(label, known)}; expected one of {', '.join(known)}"
            )
    if len(grid.baseline) > 1:
        raise ConfigError(
            f"baseline names the axes {', '.join(grid.baseline)}; differences are along one axis, name it"
        )


def _check_overridden(grid: GridConfig, given: Sequence[str]) -> None:
    """A word that an axis overrules would be lost without a sound."""
    for axis, values in grid.axes.items():
        changed = {key for _, change in _levels(axis, values) for key in flatten(change)}
        for key in given:
            if key in changed or f"{key}.{WORDS.get(key)}" in changed:
                raise ConfigError(f"{key} is given, but the axis {axis!r} sets it; change the axis: axes.{axis}=[...]")


def _levels(axis: str, values: list[Any] | Tree) -> list[tuple[str, Tree]]:
    """(label, change to the base) of every value of an axis."""
    listed = list(values.items()) if isinstance(values, dict) else [(None, value) for value in values]
    changes = [(label, _change(axis, value)) for label, value in listed]
    named = [
        (_label(axis, value) if label is None else str(label), change)
        for (label, change), (_, value) in zip(changes, listed, strict=True)
    ]
    labels = [label for label, _ in named]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"axes.{axis} lists {label!r} twice; list each value once")
    return named


def _change(axis: str, value: Any) -> Tree:
    first, *below = axis.split(".")
    if first in RunConfig.model_fields:
        for part in reversed([first, *below]):
            value = {part: value}
        return _written_out(value)
    if isinstance(value, str) and not below:
        return {"algorithm": {"name": value}}
    if isinstance(value, dict) and not below:
        return _written_out(value)
    known = list(RunConfig.model_fields)
    raise ConfigError(
        f"axes.{axis}: {value!r} given, and {first!r} is no setting{nearest(first, known)}; expected a dotted setting "
        f"(its first part one of {', '.join(known)}), or a name of your own with changes to the base or methods"
    )


def _written_out(tree: Tree) -> Tree:
    """``topology: ring`` is short for ``topology: {kind: ring}``."""
    return {
        key: {WORDS[key]: value} if key in WORDS and isinstance(value, str) else value for key, value in tree.items()
    }


def _label(axis: str, value: Any) -> str:
    """What people call a value: ``adf-lora interval=5``, ``random p=0.1``, ``0.1``."""
    if not isinstance(value, dict):
        return _word(value)
    words = []
    for key, leaf in sorted(value.items(), key=lambda each: each[0] not in ("name", "kind")):
        own = WORDS.get(key)
        if own is not None and isinstance(leaf, dict):
            words.append(_label(key, leaf))
        else:
            words.append(_word(leaf) if own is not None or key in ("name", "kind") else f"{key}={_word(leaf)}")
    return " ".join(words)


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={_word(leaf)}" for key, leaf in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


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
    for levels in product(*(_levels(axis, values) for axis, values in grid.axes.items())):
        tree = _written_out(grid.base)
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


def plan_search(grid: GridConfig) -> TrialPlan:
    """Plan the trials that search learning rates: per group and rate, on rows set aside from the training rows."""
    found, first_names = TrialPlan(), {}
    first = _searched_settings(grid)
    for setting, folder in zip(first.values(), _folders([setting.name for setting in first.values()]), strict=True):
        if load_config(setting.tree).data.eval is None:
            reason = "search.rates needs rows of its own, but data.eval is null, so the reported rows are training rows"
            found.refused.append((setting.name, f"{reason}; name a file in data.eval, or give train.lr and no rates"))
            continue
        for rate, seed in product(grid.search.rates, grid.search.seeds):
            holdout = {"eval": None, "holdout": grid.search.holdout}
            change = {"seed": seed, "train": {"lr": rate}, "data": holdout}
            _add_trial(found, setting, change, f"search/{folder}__lr-{rate:g}__seed-{seed}", first_names)
    return found


def search_labels(grid: GridConfig) -> dict[str, dict[str, str]]:
    """Setting -> the labels of the setting that its learning rate is searched on; empty where none is searched."""
    first = _searched_settings(grid)
    return {setting.name: first[group].labels for setting, group in rate_groups(grid)} if first else {}


def _searched_settings(grid: GridConfig) -> dict[tuple[str, ...], Setting]:
    """The first setting of every group that shares a learning rate."""
    first: dict[tuple[str, ...], Setting] = {}
    for setting, group in rate_groups(grid) if grid.search.rates else ():
        first.setdefault(group, setting)
    return first


def rate_groups(grid: GridConfig) -> Iterator[tuple[Setting, tuple[str, ...]]]:
    """Yield every valid setting with the values that its learning rate depends on."""
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
        if part not in node and node is values:
            raise ConfigError(
                f"search.each: no setting {key!r}{nearest(part, node)}; expected one of {', '.join(node)}"
            )
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
    return [f"{name}-{plain[:at].count(name) + 1}" if plain.count(name) > 1 else name for at, name in enumerate(plain)]
