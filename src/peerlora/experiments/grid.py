"""Grids: one YAML file with a base config, axes and seeds; ``trials`` expands it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator

from peerlora.config.cluster import ClusterConfig
from peerlora.config.loading import override, parse, read_tree
from peerlora.config.run import RunConfig
from peerlora.config.sections import Section
from peerlora.errors import ConfigError, nearest
from peerlora.runs.resume import flatten

Tree = dict[str, Any]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
WORDS = {"algorithm": "name", "topology": "kind", "partition": "kind"}
"""Sections that may be one word, and the setting that this word is."""


DEFAULT_SEARCH_SEEDS = 2
"""The fewest of which there is a standard error."""


def _different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{seeds} given; a seed twice would count one run as two, list each once")
    return seeds


Seeds = Annotated[list[Seed], AfterValidator(_different)]


class SearchConfig(Section):
    """How learning rates are found: on training rows set aside, or in other environments, never on what is reported."""

    rates: list[Annotated[float, Field(gt=0)]] = []
    """Empty: nothing is searched, ``train.lr`` is used."""
    seeds: Seeds = []
    """Empty: two that are not among the grid's, whose runs are reported."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the training rows that is set aside."""
    each: Annotated[list[str], Field(min_length=1)] = ["algorithm.name"]
    """Trials that agree on these settings share a rate, searched on the first of them."""
    grow: bool = False
    """While a group's best rate, or the one it takes, lies at an edge of its rates, try one beyond by their ratio."""
    most: Annotated[int, Field(ge=2)] = 8
    """Rates that a group may come to by growing."""
    ties: Literal["best", "common"] = "best"
    """best: the rate with the best mean, the lowest of equals; common: of those no worse than it by more than the
    standard error, the one that most groups have among theirs."""

    @field_validator("rates")
    @classmethod
    def _rates_differ(cls, rates: list[float]) -> list[float]:
        if len({f"{rate:g}" for rate in rates}) < len(rates):
            raise ValueError(f"{rates} given; a rate twice, to six digits, would count its runs twice, list each once")
        return rates

    @model_validator(mode="after")
    def _can_do_what_it_says(self):
        if not self.rates:
            return self
        if self.grow and not 2 <= len(self.rates) <= self.most:
            raise ValueError(
                f"{len(self.rates)} rates and most={self.most} given with grow; expected at least two rates, whose "
                "ratio is gone on with, and at most `most`"
            )
        if self.ties == "common" and len(self.seeds) == 1:
            raise ValueError(
                f"ties=common with seeds={self.seeds} given; the standard error needs at least two seeds, or use "
                "ties=best"
            )
        return self


class GridConfig(Section):
    """Everything that decides a comparison's result."""

    base: dict[str, Any] = {}
    """What all trials have in common, as for ``peerlora train``."""
    axes: dict[str, Any] = {}
    """A dotted setting -> its values, or a name of your own -> changes to the base; as a list, or as label: value."""
    seeds: Annotated[Seeds, Field(min_length=1)] = [0, 1, 2]
    baseline: dict[str, str] = {}
    """One axis: its label that differences are taken against."""
    search: SearchConfig = SearchConfig()
    share_prefix: bool = False
    """Compute once for all trials what the frozen blocks below the adapted ones give of each row; a trial then equals
    the run alone to rounding, not to the bit."""
    cluster: ClusterConfig | None = None
    """Run several trials at once on workers of a cluster; null: one after another in one process."""
    published: Literal["adf-lora", "tad-lora"] | None = None
    """The paper whose numbers the report puts beside ours."""

    @field_validator("base")
    @classmethod
    def _run_in_one_process(cls, base: Tree) -> Tree:
        if base.get("cluster"):
            raise ValueError("cluster given; a trial runs on one worker, so `cluster` is a key of the grid itself")
        return base

    @field_validator("axes")
    @classmethod
    def _have_values(cls, axes: Tree) -> Tree:
        for name, values in axes.items():
            if not isinstance(values, list | dict) or not values:
                raise ValueError(f"{name}: {values!r} given; expected at least one value, e.g. [0.1, 0.5]")
        return axes

    @model_validator(mode="after")
    def _search_with_other_seeds(self):
        if not self.search.seeds:
            own = {"seeds": unreported_seeds(self.seeds, DEFAULT_SEARCH_SEEDS)}
            object.__setattr__(self, "search", self.search.model_copy(update=own))  # frozen, and not yet handed out
        return self

    def to_yaml(self) -> str:
        """The whole grid, defaults written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_grid(source: Path | str | Tree | None = None, words: Sequence[str] = ()) -> GridConfig:
    """Read a grid and apply ``key=value`` words: keys of the grid (``seeds``, ``search.rates``) or of its base.

    Raises ConfigError for everything that can be seen without composing a trial.
    """
    if isinstance(source, Path | str) and Path(source).is_dir():
        raise ConfigError(
            f"{str(source)!r} is a folder, no grid file; to go on with a comparison, or write its tables again: "
            f"peerlora compare --resume {source}"
        )
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


def unreported_seeds(reported: Sequence[int], number: int) -> list[int]:
    """Return the lowest seeds that are not among these."""
    return list(islice((seed for seed in count() if seed not in reported), number))


def search_warnings(grid: GridConfig) -> list[str]:
    """Warn where the reported seeds include some that rates were chosen with."""
    both = sorted({*grid.search.seeds} & {*grid.seeds})
    if not grid.search.rates or not both:
        return []
    free = ", ".join(map(str, unreported_seeds(grid.seeds, len(grid.search.seeds))))
    return [
        f"search.seeds and seeds both have {', '.join(map(str, both))}: the rates are chosen on other rows, but with "
        f"the shards and starts of runs that are reported; give the search seeds of its own, e.g. "
        f"search.seeds=[{free}]"
    ]


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
    levels = {name: axis_levels(name, values) for name, values in grid.axes.items()}
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
        changed = {key for _, change in axis_levels(axis, values) for key in flatten(change)}
        for key in given:
            if key in changed or f"{key}.{WORDS.get(key)}" in changed:
                raise ConfigError(f"{key} is given, but the axis {axis!r} sets it; change the axis: axes.{axis}=[...]")


def axis_levels(axis: str, values: list[Any] | Tree) -> list[tuple[str, Tree]]:
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
        return written_out(value)
    if isinstance(value, str) and not below:
        return {"algorithm": {"name": value}}
    if isinstance(value, dict) and not below:
        return written_out(value)
    known = list(RunConfig.model_fields)
    raise ConfigError(
        f"axes.{axis}: {value!r} given, and {first!r} is no setting{nearest(first, known)}; expected a dotted setting "
        f"(its first part one of {', '.join(known)}), or a name of your own with changes to the base or methods"
    )


def written_out(tree: Tree) -> Tree:
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
