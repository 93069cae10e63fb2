"""A grid's finished runs -> means over seeds, and differences to a baseline that are paired by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peerlora.runs.events import Event, RoundDone
from peerlora.runs.metrics import evaluations, find_start, rows, select_events

RESAMPLES = 10_000
FEWEST = 3  # seeds below which an interval over seeds would say nothing
MEASURES = (
    "mean client",
    "worst client",
    "averaged model",
    "relayed client",
    "worst relayed client",
    "best round",
    "number of the best round",
    "bytes sent",
    "consensus of B·A",
    "cross-term",
    "seconds",
    "virtual seconds",
)
"""What a run is summed up in.  Scores are of the last evaluation, but for ``best round``: the highest mean client of
any evaluation, picked on the very rows it is reported on, so it flatters.  Bytes and seconds are of the whole run,
consensus and cross-term of its last round."""


@dataclass(frozen=True)
class Outcome:
    """The result of one trial of a grid."""

    setting: str
    """Trials of one setting differ in their seed only."""
    labels: Mapping[str, str]
    """Axis -> the label of its value."""
    seed: int
    rate: float
    folder: str
    events: list[Event]
    diverged: str | None = None
    """Why there is no result."""
    p: float | None = None
    """Of a random topology: the probability that two clients meet."""
    searched_on: Mapping[str, str] | None = None
    """The labels of the setting that the rate was searched on; None where none was."""


@dataclass(frozen=True)
class Estimate:
    """Mean and standard deviation over seeds; no deviation of a single one."""

    mean: float
    deviation: float | None
    seeds: int


@dataclass(frozen=True)
class Difference:
    """Mean over seeds of (this - baseline), with what ``bootstrap`` says of its spread."""

    mean: float
    interval: tuple[float, float] | None
    seeds: int


@dataclass(frozen=True)
class Line:
    """The results of one setting of the grid, over its seeds."""

    setting: str
    labels: Mapping[str, str]
    rate: float
    estimates: dict[str, Estimate]
    differences: dict[str, Difference]
    """Empty for the baseline itself, and where none was chosen."""
    diverged: int
    """Seeds without a result."""
    method: str = ""
    """The method's own name; empty before the first run has begun."""
    searched_on: Mapping[str, str] | None = None
    """The labels of the setting that the rate was searched on; None where none was."""

    @property
    def rate_from(self) -> str:
        """The labels in which the setting that the rate was searched on differs; empty where it is this one."""
        other = self.searched_on or {}
        return ", ".join(label for axis, label in other.items() if label != self.labels[axis])

    @property
    def gauges_differ(self) -> bool:
        """Whether the averaged model is a mean of factors in different coordinates."""
        from peerlora.algorithms import find_method

        kind = find_method(self.method)
        return kind is not None and kind.traits.own_gauge


@dataclass(frozen=True)
class Comparison:
    """Results of a grid, and the folder with its files."""

    folder: Path
    lines: list[Line]
    metric: str | None
    higher_is_better: bool
    baseline: Mapping[str, str]
    resamples: int = RESAMPLES

    def as_json(self) -> dict[str, Any]:
        """What ``peerlora compare --json`` prints."""
        return {
            "folder": str(self.folder),
            "report": str(self.folder / "report.html"),
            "metric": self.metric,
            "baseline": dict(self.baseline),
            "resamples": self.resamples,
            "rows": [
                {
                    "labels": dict(line.labels),
                    "rate": line.rate,
                    "rate_from": line.rate_from,
                    "diverged": line.diverged,
                    "estimates": {name: vars(each) for name, each in line.estimates.items()},
                    "differences": {name: vars(each) for name, each in line.differences.items()},
                }
                for line in self.lines
            ],
        }


def measure_run(events: Sequence[Event]) -> dict[str, float]:
    """Compute ``MEASURES`` of one finished run; those that it has no number for are left out."""
    start, scores, done = find_start(events), evaluations(events), select_events(events, RoundDone)
    if start is None or not scores or not done:
        return {}
    best: Callable[..., Any] = max if start.higher_is_better else min
    worst: Callable[..., Any] = min if start.higher_is_better else max
    last, trained = scores[-1], [score for score in scores if score.round > 0]
    means = {score.round: _mean(score.own) for score in trained}
    at = best((number for number in means if not math.isnan(means[number])), key=lambda n: means[n], default=None)
    found = {
        "mean client": _mean(last.own),
        "worst client": worst((value for value in last.own if not math.isnan(value)), default=math.nan),
        "averaged model": last.averaged,
        "relayed client": _mean(last.relayed),
        "worst relayed client": worst((value for value in last.relayed if not math.isnan(value)), default=math.nan),
        "best round": math.nan if at is None else means[at],
        "number of the best round": math.nan if at is None else float(at),
        "bytes sent": float(sum(each.bytes_sent for each in done)),
        "consensus of B·A": done[-1].consensus_product,
        "cross-term": done[-1].cross_term,
        "virtual seconds": done[-1].virtual_seconds,
        "seconds": sum(each.seconds_train + each.seconds_mix for each in done) + sum(each.seconds for each in scores),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def estimate(values: Sequence[float]) -> Estimate:
    """Compute mean and sample standard deviation (divisor n - 1)."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Estimate(float(np.mean(values)), deviation, len(values))


def pair_differences(
    own: Mapping[int, float], base: Mapping[int, float], resamples: int = RESAMPLES
) -> Difference | None:
    """Average the difference over the seeds that both have; None where there is no such seed.

    Pairing removes what a seed does to both: its shards, its graphs, its start.
    """
    gaps = [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]
    if not gaps:
        return None
    return Difference(float(np.mean(gaps)), bootstrap(gaps, resamples), len(gaps))


def bootstrap(values: Sequence[float], resamples: int = RESAMPLES) -> tuple[float, float] | None:
    """Compute the 95 % percentile interval of the mean over seeded resamples; None for fewer than 3 values.

    Of 3 values it is their range, since one resample in 27 is the lowest value three times.  A range of 3 holds the
    mean of a symmetric distribution with probability 3/4 only, so that no text may call it a confidence interval.
    """
    if len(values) < FEWEST:
        return None
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(np.asarray(values, float)[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def compare(outcomes: Sequence[Outcome], baseline: Mapping[str, str], resamples: int = RESAMPLES) -> list[Line]:
    """Make one line per setting, in the order given, each against the one that differs in the baseline's axis only."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for each in outcomes:
        found.setdefault(each.setting, {})[each.seed] = measure_run(each.events)
    first = {each.setting: each for each in reversed(outcomes)}
    lines = []
    for setting, runs in found.items():
        own = first[setting]
        other = next((name for name, each in first.items() if each.labels == {**own.labels, **baseline}), None)
        base = found[other] if baseline and other not in (None, setting) else {}
        estimates = {name: estimate(values) for name in MEASURES if (values := list(_by_seed(runs, name).values()))}
        differences = {
            name: gap
            for name in MEASURES
            if (gap := pair_differences(_by_seed(runs, name), _by_seed(base, name), resamples)) is not None
        }
        diverged = sum(each.diverged is not None for each in outcomes if each.setting == setting)
        starts = [find_start(each.events) for each in outcomes if each.setting == setting]
        method = next((start.method for start in starts if start is not None), "")
        lines.append(Line(setting, own.labels, own.rate, estimates, differences, diverged, method, own.searched_on))
    return lines


def _by_seed(runs: Mapping[int, Mapping[str, float]], name: str) -> dict[int, float]:
    return {seed: run[name] for seed, run in runs.items() if name in run}


def to_long_rows(outcomes: Sequence[Outcome], purpose: str) -> Iterator[dict[str, Any]]:
    """Yield every number of every run, with the axes' labels, the seed and the learning rate beside it."""
    for each in outcomes:
        known = {**each.labels, "purpose": purpose, "seed": each.seed, "learning rate": each.rate}
        for client, round, metric, value in rows(each.events):
            yield {**known, "client": client, "round": round, "metric": metric, "value": value}
