"""The search of learning rates: what each rate reached, which one a group takes, and where its rates should grow.

A group is the settings that share a rate; its first setting is searched.  A rate's score is the mean client of the last
evaluation on rows set aside, by search seed: of its relayed model where that is what it deploys, else of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
from peerlora.errors import ConfigError
from peerlora.experiments.grid import GridConfig, SearchConfig
from peerlora.experiments.inference import ROUNDING, is_same, subtract_scores
from peerlora.experiments.statistics import Estimate, Outcome, estimate, find_metrics
from peerlora.experiments.trials import rate_groups, searched_settings

OWN, RELAYED = "mean client", "relayed client"
"""Measures that rates are scored by."""


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
    measure: str = OWN
    """What the scores are of."""
    metric: str = ""
    """What they are; empty where every run diverged."""

    @property
    def edge(self) -> int:
        """-1 where the best rate is the lowest of several, 1 where it is the highest, 0 strictly inside.

        Where the best one lies inside, the same of the one that is taken.
        """
        return self._edge_of(self.best) or self._edge_of(self.taken)

    def _edge_of(self, rate: float) -> int:
        known = [each.rate for each in self.rates]
        return 0 if len(known) == 1 else (rate == known[-1]) - (rate == known[0])

    def as_json(self) -> dict[str, Any]:
        """What ``peerlora compare --json`` prints of it."""
        rates = []
        for each in self.rates:
            known = each.estimate
            numbers = {"mean": known and known.mean, "deviation": known and known.deviation}
            rates.append({"rate": each.rate, "seeds": len(each.scores), "diverged": each.diverged, **numbers})
        chosen = {"best": self.best, "ties": list(self.ties), "taken": self.taken, "at_edge": self.edge != 0}
        about = {"setting": self.setting, "labels": dict(self.labels), "metric": self.metric or None}
        about |= {"measure": self.measure}
        return {**about, "rates": rates, **chosen}


def scored_measure(config: RunConfig) -> str:
    """Return what a run's rate is scored by: the mean client of the models that are deployed."""
    relay = config.exchange.relay
    return RELAYED if relay is not None and relay.deploy == "relayed" else OWN


def gather_searches(grid: GridConfig, outcomes: Sequence[Outcome]) -> list[RateSearch]:
    """Gather what the search's runs reached, a group after the other, and decide which rate each takes."""
    searched = list(searched_settings(grid).values())
    measures = [scored_measure(load_config(setting.tree)) for setting in searched]
    runs = [[each for each in outcomes if each.setting == setting.name] for setting in searched]
    signs = [1.0 if all(each.higher_is_better for each in own) else -1.0 for own in runs]  # a grid may mix metrics
    found = [_rate_scores(own, measure) for own, measure in zip(runs, measures, strict=True)]
    tied = [_tied(rates, sign, grid.search) for rates, sign in zip(found, signs, strict=True)]
    groups_with = Counter(rate for rates in tied for rate in rates)
    searches = []
    for setting, own, measure, sign, rates, ties in zip(searched, runs, measures, signs, found, tied, strict=True):
        metric = ", ".join(find_metrics(own))
        worth = {each.rate: _worth(each, sign) for each in rates}
        most = max(groups_with[rate] for rate in ties)
        taken = first_of_best({rate: worth[rate] for rate in ties if groups_with[rate] == most})
        best = first_of_best(worth)
        searches.append(RateSearch(setting.name, setting.labels, rates, best, ties, taken, measure, metric))
    return searches


def _rate_scores(outcomes: Sequence[Outcome], measure: str) -> tuple[RateScore, ...]:
    found = []
    for rate in sorted({each.rate for each in outcomes}):
        own = [each for each in outcomes if each.rate == rate]
        scores = {each.seed: each.measures[measure] for each in own if measure in each.measures}
        found.append(RateScore(rate, scores, len(own) - len(scores)))
    return tuple(found)


def _worth(each: RateScore, sign: float) -> float:
    """The mean over seeds, negated where lower is better; minus infinity for a rate that is out."""
    return sign * each.estimate.mean if each.estimate else -math.inf


def first_of_best(worth: Mapping[float, float]) -> float:
    """Return the value that is worth most, the lowest of those that differ from it by rounding only."""
    top = max(worth.values())
    return min(value for value, own in worth.items() if is_same(own, top))


def _tied(rates: Sequence[RateScore], sign: float, search: SearchConfig) -> tuple[float, ...]:
    """The rates among which a group is indifferent: worse than the best by no more than the standard error.

    The error is that of the mean difference over search seeds, paired, for a seed decides shards and rows for both.
    Of two seeds in one of which both rates are level, mean and error are the same but for rounding.
    """
    top = first_of_best({each.rate: _worth(each, sign) for each in rates})
    best = next(each for each in rates if each.rate == top)
    if search.ties == "best" or best.estimate is None:
        return (best.rate,)
    found, size = [], ROUNDING * abs(best.estimate.mean)
    for each in rates:
        if each.estimate is not None:
            gaps = [sign * subtract_scores(best.scores[seed], each.scores[seed]) for seed in best.scores]
            if np.mean(gaps) <= np.std(gaps, ddof=1) / math.sqrt(len(gaps)) + size:
                found.append(each.rate)
    return tuple(found)


def next_rate(search: RateSearch, settings: SearchConfig) -> float | None:
    """The rate beyond the edge at which a group's best rate, or the one it takes, lies.

    None where both lie inside, or rates enough were tried.

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
