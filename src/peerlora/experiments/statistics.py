"""A grid's finished runs -> means over seeds, and differences to a baseline that are paired by seed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from peerlora.config.run import RunConfig
from peerlora.experiments.inference import (
    LEVEL,
    detectable_difference,
    holm,
    sign_flip_test,
    smallest_sign_flip_p,
    subtract_scores,
    t_interval,
    t_test,
)
from peerlora.experiments.measures import MEASURES, UNRELAYED, measure_run
from peerlora.experiments.work import JUDGED, compare_work, with_row_gradients
from peerlora.runs.events import Event
from peerlora.runs.metrics import find_start, rows


@dataclass(frozen=True)
class Outcome:
    """The result of one trial of a grid: its measures, and its events where they are at hand.

    Comparing needs the measures only, so a line of ``to_json`` per finished trial can be kept in place of run folders.
    """

    setting: str
    """Trials of one setting differ in their seed only."""
    labels: Mapping[str, str]
    """Axis -> the label of its value."""
    seed: int
    rate: float
    folder: str
    measures: Mapping[str, float]
    """What ``measure_run`` returned; empty for a run that did not finish."""
    method: str = ""
    """The method's own name; empty before the run has begun."""
    metric: str = ""
    """What the scores are, e.g. accuracy; likewise."""
    higher_is_better: bool = True
    diverged: str | None = None
    """Why there is no result."""
    p: float | None = None
    """Of a random topology: the probability that two clients meet."""
    searched_on: Mapping[str, str] | None = None
    """The labels of the setting that the rate was searched on; None where none was."""
    events: Sequence[Event] = field(default=(), compare=False)
    """For figures and the long table; not stored."""

    @classmethod
    def of_events(
        cls,
        setting: str,
        labels: Mapping[str, str],
        seed: int,
        rate: float,
        folder: str,
        events: Sequence[Event],
        config: RunConfig | None = None,
        **known: Any,
    ) -> Outcome:
        """Measure a run; ``config``: its own, without which its work is not counted; ``known``: other fields."""
        if (start := find_start(events)) is not None:
            began = {"method": start.method, "metric": start.metric, "higher_is_better": start.higher_is_better}
            known = began | known
        return cls(setting, labels, seed, rate, folder, measure_run(events, config), events=events, **known)

    def to_json(self) -> str:
        """Write everything but the events, in one line."""
        return json.dumps(asdict(replace(self, events=())), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Outcome:
        """Restore what ``to_json`` wrote."""
        return cls(**json.loads(line))


@dataclass(frozen=True)
class Estimate:
    """Mean and standard deviation over seeds; no deviation of a single one."""

    mean: float
    deviation: float | None
    seeds: int


@dataclass(frozen=True)
class Difference:
    """Mean over seeds of (this - baseline), and what can be inferred from it; see ``inference``."""

    mean: float
    deviation: float | None
    """Of the paired differences; None of a single one."""
    interval: tuple[float, float] | None
    """The 95 % t interval of the mean; None where too few differences, or constant ones, allow none."""
    seeds: int
    p: float | None
    """Of the two-sided paired t test; None where there is no interval."""
    p_sign_flip: float
    """Of the two-sided sign-flip test."""
    p_sign_flip_smallest: float
    """The smallest p that test can give with so many seeds."""
    p_holm: float | None = None
    """``p`` adjusted over the rows of its table; None for one of unequal work, which is not ranked."""
    detectable: float | None = None
    """The difference found with 80 % probability, by this deviation and at Holm's first level."""

    @property
    def distinguishable(self) -> bool | None:
        """Whether it is told from zero at 5 %, adjusted; None where that was not tested."""
        return None if self.p_holm is None else self.p_holm <= LEVEL


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
    metric: str = ""
    """What the scores are; likewise."""
    searched_on: Mapping[str, str] | None = None
    """The labels of the setting that the rate was searched on; None where none was."""
    unequal_work: str = ""
    """The row gradients beside the baseline's, where they differ by over 1 %; such a row is not ranked."""

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
class Design:
    """The smallest difference of one measure that a table's seeds can be expected to show."""

    measure: str
    tests: int
    """Rows that are set against a baseline, over which Holm corrects."""
    seeds: int
    """The fewest of any such row."""
    deviation: float
    """Of the paired differences, as root mean square over these rows."""
    level: float
    """Holm's first level, 5 % divided by the tests."""
    detectable: float
    """Found with 80 % probability at that level."""


def estimate(values: Sequence[float]) -> Estimate:
    """Compute mean and sample standard deviation (divisor n - 1)."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Estimate(float(np.mean(values)), deviation, len(values))


def pair_differences(own: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """Average the difference over the seeds that both have; None where there is no such seed.

    Pairing removes what a seed does to both: its shards, its graphs, its start.
    """
    gaps = [subtract_scores(own[seed], base[seed]) for seed in sorted(own.keys() & base.keys())]
    if not gaps:
        return None
    known = estimate(gaps)
    smallest = smallest_sign_flip_p(len(gaps))
    return Difference(
        known.mean, known.deviation, t_interval(gaps), len(gaps), t_test(gaps), sign_flip_test(gaps), smallest
    )


def compare(outcomes: Sequence[Outcome], baseline: Mapping[str, str]) -> list[Line]:
    """Make one line per setting, in the order given, each against the one that differs in the baseline's axis only.

    A line whose scores are another metric than the baseline's has no differences.
    The p values of each measure are adjusted over all lines that have one and the baseline's work.  Relayed models are
    set against the baseline's relayed ones, or against its own where it relays nothing.
    """
    found: dict[str, dict[int, Mapping[str, float]]] = {}
    for each in outcomes:
        found.setdefault(each.setting, {})[each.seed] = with_row_gradients(each.measures, each.method)
    first = {each.setting: each for each in reversed(outcomes)}
    metrics = {each.setting: each.metric for each in reversed(outcomes) if each.metric}
    lines = []
    for setting, runs in found.items():
        own = first[setting]
        other = next((name for name, each in first.items() if each.labels == {**own.labels, **baseline}), setting)
        comparable = baseline and other != setting and metrics.get(other) == metrics.get(setting)
        base = found[other] if comparable else {}
        gaps = {name: pair_differences(_by_seed(runs, name), _of_baseline(base, name)) for name in MEASURES}
        same = [each for each in outcomes if each.setting == setting]
        lines.append(
            Line(
                setting,
                own.labels,
                own.rate,
                _estimates(runs),
                {name: gap for name, gap in gaps.items() if gap is not None},
                diverged=sum(each.diverged is not None for each in same),
                method=next((each.method for each in same if each.method), ""),
                metric=metrics.get(setting, ""),
                searched_on=own.searched_on,
                unequal_work=compare_work(_mean(runs, JUDGED), _mean(base, JUDGED)),
            )
        )
    return _adjusted(lines)


def find_metrics(outcomes: Sequence[Outcome]) -> dict[str, bool]:
    """Metric -> whether a higher score is better, of the runs that have begun, in their order."""
    return {each.metric: each.higher_is_better for each in outcomes if each.metric}


def _estimates(runs: Mapping[int, Mapping[str, float]]) -> dict[str, Estimate]:
    return {name: estimate(values) for name in MEASURES if (values := list(_by_seed(runs, name).values()))}


def _of_baseline(base: Mapping[int, Mapping[str, float]], name: str) -> dict[int, float]:
    return _by_seed(base, name) or _by_seed(base, UNRELAYED.get(name, name))


def _mean(runs: Mapping[int, Mapping[str, float]], name: str) -> float | None:
    known = list(_by_seed(runs, name).values())
    return estimate(known).mean if known else None


def _by_seed(runs: Mapping[int, Mapping[str, float]], name: str) -> dict[int, float]:
    return {seed: run[name] for seed, run in runs.items() if name in run}


def _adjusted(lines: Sequence[Line]) -> list[Line]:
    """With Holm's p and, at its first level, the detectable difference."""
    changed: list[dict[str, Difference]] = [{} for _ in lines]
    for name in MEASURES:
        adjusted = holm({place: gap.p for place, gap in _tested(lines, name).items() if gap.p is not None})
        level = LEVEL / max(1, len(adjusted))
        for place, line in enumerate(lines):
            if gap := line.differences.get(name):
                seen = gap.deviation and detectable_difference(gap.deviation, gap.seeds, level)
                changed[place][name] = replace(gap, p_holm=adjusted.get(place), detectable=seen or None)
    return [replace(line, differences=gaps) for line, gaps in zip(lines, changed, strict=True)]


def _tested(lines: Sequence[Line], measure: str) -> dict[int, Difference]:
    """Place of a line -> its difference, of those with the baseline's work."""
    ranked = {place: line.differences.get(measure) for place, line in enumerate(lines) if not line.unequal_work}
    return {place: gap for place, gap in ranked.items() if gap is not None and gap.p is not None}


def assess_design(lines: Sequence[Line], measure: str) -> Design | None:
    """Compute what a table can be expected to show.

    None where nothing was tested, nothing differed, or the differences are of several metrics.
    """
    places = _tested(lines, measure)
    tested = places.values()
    if len({lines[place].metric for place in places}) > 1:
        return None
    deviations = [gap.deviation for gap in tested if gap.deviation]
    if not deviations:
        return None
    deviation, seeds = float(np.sqrt(np.mean(np.square(deviations)))), min(gap.seeds for gap in tested)
    level = LEVEL / len(tested)
    found = detectable_difference(deviation, seeds, level)
    return None if found is None else Design(measure, len(tested), seeds, deviation, level, found)


def to_long_rows(outcomes: Sequence[Outcome], purpose: str) -> Iterator[dict[str, Any]]:
    """Yield every number of every run, with the axes' labels, the seed and the learning rate beside it."""
    for each in outcomes:
        known = {**each.labels, "purpose": purpose, "seed": each.seed, "learning rate": each.rate}
        for client, round, metric, value in rows(each.events):
            yield {**known, "client": client, "round": round, "metric": metric, "value": value}
