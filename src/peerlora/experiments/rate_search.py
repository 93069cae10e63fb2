"""The search of learning rates: what each rate reached, which one a group takes, and where its rates should grow.

A group is the settings that share a rate; its first setting is searched.  A rate's score is the mean client of the last
evaluation on rows set aside, by search seed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peerlora.errors import ConfigError
from peerlora.experiments.grid import GridConfig, SearchConfig
from peerlora.experiments.statistics import Estimate, Outcome, estimate
from peerlora.experiments.trials import rate_groups, searched_settings

MEASURE = "mean client"


@dataclass(frozen=True)
class RateScore:
    """What one rate reached."""

    rate: float
    scores: Mapping[int, float]
    """Search seed -> score, of the runs that ended."""
    diverged: int = 0
    """Seeds without a result; such a rate is out."""

    @property
    def estimate(self) -> Estimate | None:
        """Over the seeds; None where a run diverged or has no score."""
        return estimate(list(self.scores.values())) if self.scores and not self.diverged else None


@dataclass(frozen=True)
class RateSearch:
    """The rates that one group has tried, and the one that it takes."""

    setting: str
    """The one that was searched."""
    labels: Mapping[str, str]
    rates: tuple[RateScore, ...]
    """By rising rate."""
    best: float
    """The rate with the best mean; the lowest of equals, and where all are out."""
    ties: tuple[float, ...]
    """Rates not distinguishable from it by the rule of ``search.ties``, itself among them."""
    taken: float

    @property
    def edge(self) -> int:
        """-1 where the best rate is the lowest of several, 1 where it is the highest, 0 strictly inside.

        A mean that two rates share lies inside where either of them does.
        """
        known = [each.rate for each in self.rates]
        top = next(each.estimate for each in self.rates if each.rate == self.best)
        equals = {each.rate for each in self.rates if top and each.estimate and each.estimate.mean == top.mean}
        if len(known) == 1 or equals - {known[0], known[-1]}:
            return 0
        return -1 if self.best == known[0] else 1 if self.best == known[-1] else 0

    def as_json(self) -> dict[str, Any]:
        """What ``peerlora compare --json`` prints of it."""
        rates = []
        for each in self.rates:
            known = each.estimate
            numbers = {"mean": known and known.mean, "deviation": known and known.deviation}
            rates.append({"rate": each.rate, "seeds": len(each.scores), "diverged": each.diverged, **numbers})
        chosen = {"best": self.best, "ties": list(self.ties), "taken": self.taken, "at_edge": self.edge != 0}
        return {"setting": self.setting, "labels": dict(self.labels), "rates": rates, **chosen}


def gather_searches(grid: GridConfig, outcomes: Sequence[Outcome]) -> list[RateSearch]:
    """Gather what the search's runs reached, a group after the other, and decide which rate each takes."""
    sign = 1.0 if all(each.higher_is_better for each in outcomes) else -1.0
    found = {}
    for setting in searched_settings(grid).values():
        own = [each for each in outcomes if each.setting == setting.name]
        found[setting.name] = _rate_scores(own)
    tied = {name: _tied(rates, sign, grid.search) for name, rates in found.items()}
    groups_with = Counter(rate for rates in tied.values() for rate in rates)
    searches = []
    for setting in searched_settings(grid).values():
        rates, ties = found[setting.name], tied[setting.name]
        best, worth = _best(rates, sign), {each.rate: _worth(each, sign) for each in rates}
        taken = min(ties, key=lambda rate: (-groups_with[rate], -worth[rate], rate))
        searches.append(RateSearch(setting.name, setting.labels, rates, best, ties, taken))
    return searches


def _rate_scores(outcomes: Sequence[Outcome]) -> tuple[RateScore, ...]:
    found = []
    for rate in sorted({each.rate for each in outcomes}):
        own = [each for each in outcomes if each.rate == rate]
        scores = {each.seed: each.measures[MEASURE] for each in own if MEASURE in each.measures}
        found.append(RateScore(rate, scores, len(own) - len(scores)))
    return tuple(found)


def _worth(each: RateScore, sign: float) -> float:
    """The sum over seeds, negated where lower is better; minus infinity for a rate that is out."""
    return sign * sum(each.scores.values()) if each.scores and not each.diverged else -math.inf


def _best(rates: Sequence[RateScore], sign: float) -> float:
    return max(rates, key=lambda each: _worth(each, sign)).rate


def _tied(rates: Sequence[RateScore], sign: float, search: SearchConfig) -> tuple[float, ...]:
    """The rates among which a group is indifferent: worse than the best by no more than the standard error.

    The error is that of the mean difference over search seeds, paired, for a seed decides shards and rows for both.
    """
    best = next(each for each in rates if each.rate == _best(rates, sign))
    if search.ties == "best" or best.estimate is None:
        return (best.rate,)
    found = []
    for each in rates:
        if each.estimate is not None:
            gaps = [sign * (best.scores[seed] - each.scores[seed]) for seed in best.scores]
            if np.mean(gaps) <= np.std(gaps, ddof=1) / math.sqrt(len(gaps)):
                found.append(each.rate)
    return tuple(found)


def next_rate(search: RateSearch, settings: SearchConfig) -> float | None:
    """The rate beyond the edge at which a group's best lies; None where it lies inside, or rates enough were tried.

    The step is the ratio of the two rates that the grid gives at that edge, and rates are rounded to six digits.
    Where every rate is out, the best counts as the lowest.
    """
    if not settings.grow or search.edge == 0 or len(search.rates) >= settings.most:
        return None
    given, tried = sorted(settings.rates), [each.rate for each in search.rates]
    beyond = tried[0] * given[0] / given[1] if search.edge < 0 else tried[-1] * given[-1] / given[-2]
    return float(f"{beyond:.6g}")


def choose_rates(grid: GridConfig, searches: Sequence[RateSearch]) -> dict[str, float]:
    """Setting -> the learning rate that its group takes.

    Raises ConfigError where every rate of a group diverged.
    """
    if not grid.search.rates:
        return {}
    for each in searches:
        if all(rate.estimate is None for rate in each.rates):
            tried = ", ".join(f"{rate.rate:g}" for rate in each.rates)
            raise ConfigError(
                f"every rate of search.rates diverged for {each.setting} ({tried}); start anew with lower ones"
            )
    groups, taken = searched_settings(grid), {each.setting: each.taken for each in searches}
    return {setting.name: taken[groups[group].name] for setting, group in rate_groups(grid)}
