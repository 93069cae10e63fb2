"""What the studies take, and what their seeds can show: the tables of docs/results/studies.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from outcomes import Kept, OutcomeLines
from peerlora.experiments.grid import load_grid
from peerlora.experiments.inference import LEVEL, POWER, detectable_difference, smallest_sign_flip_p
from peerlora.experiments.markdown import markdown_table
from peerlora.experiments.trials import Trial, plan_search, plan_trials
from study_base import SEEDS, Study, Tree, split_labels
from study_tuning import tuning_grid, with_chosen

DEVIATIONS = (0.005, 0.01, 0.02, 0.03)
"""Accuracy; standard deviations of paired differences for which the page says what can be shown."""


@dataclass(frozen=True)
class Effort:
    """What a study takes, at least: rates and settings that grow come on top."""

    runs: int
    rows: int
    """For training."""
    tests: int
    """Rows that are set against a baseline and corrected together."""
    seeds: int
    """That are reported."""


def count_effort(study: Study, data: Path) -> Effort:
    """Count the runs of a study, each once, and the rows that they train on."""
    trials, tests = [], 0
    for tree in study.parts(data):
        reported, searched = planned(study, tree)
        trials += [*reported, *searched]
        for labels in {each.setting: split_labels(study, each.labels) for each in reported}.values():
            tests += {**labels, **study.baseline} != labels
    runs = {each.config.model_dump_json(): each.config.training_samples for each in trials}
    seeds = max(len(tree["seeds"]) for tree in study.parts(data))
    return Effort(len(runs), sum(runs.values()), tests, seeds)


def planned(study: Study, tree: Tree) -> tuple[list[Trial], list[Trial]]:
    """Plan the reported runs and those of all searches, of tuned settings with the first value that is tried."""
    tuned = {row: each for row, each in (study.tuned or {}).items() if row in tree["axes"].get("system", {})}
    searched, chosen = [], tree
    for row, each in tuned.items():
        searched += plan_search(load_grid(tuning_grid(tree, row, each, each.values))).trials
        rows = with_chosen(chosen["axes"]["system"], row, each, each.values[0])
        chosen = {**chosen, "axes": {**chosen["axes"], "system": rows}}
    grid = load_grid(chosen)
    return plan_trials(grid).trials, [*plan_search(grid).trials, *searched]


def list_studies(studies: Mapping[str, Study], efforts: Mapping[str, Effort], data: Path) -> str:
    """Write a line per study: runs, training rows, and core-hours by the seconds of the runs that have finished."""
    kept = {name: OutcomeLines(name, data).kept for name in studies}
    paces = paces_by_task(studies, kept, data)
    lines, hours = [], []
    for name, study in studies.items():
        known, page = efforts[name], f"[{study.page}]({study.page})"
        hours.append(core_hours(known.rows, seconds_per_row(kept[name]) or paces[task_of(study, data)]))
        lines.append([name, page, f"{known.runs:,}", f"{known.rows:,}", told(hours[-1]), f"{len(kept[name]):,}"])
    runs, rows = (sum(getattr(each, name) for each in efforts.values()) for name in ("runs", "rows"))
    whole = None if None in hours else sum(each for each in hours if each is not None)
    lines.append(["all", "", f"{runs:,}", f"{rows:,}", told(whole), f"{sum(map(len, kept.values())):,}"])
    head = ["study", "page", "runs, at least", "training rows, at least", "core-hours, about", "finished runs"]
    return f"{markdown_table(head, lines)}\n{hours_note(kept, paces)}\n"


def task_of(study: Study, data: Path) -> str:
    """What a study's runs learn: texts, or policies, whose rows cost much less."""
    kind = study.parts(data)[0]["base"].get("task", {}).get("kind")
    return "policies" if kind == "flow-policy" else "texts"


def paces_by_task(
    studies: Mapping[str, Study], kept: Mapping[str, Sequence[Kept]], data: Path
) -> dict[str, float | None]:
    """Task -> the seconds per training row of all studies that have it."""
    found: dict[str, list[Kept]] = {}
    for name, study in studies.items():
        found.setdefault(task_of(study, data), []).extend(kept[name])
    return {task: seconds_per_row(own) for task, own in found.items()}


def seconds_per_row(kept: Sequence[Kept]) -> float | None:
    """Return the median over training rows of a run's seconds per row, evaluation included; None without a run.

    Over rows and not over runs, since runs of a few rows spend their seconds on what comes before and after.
    """
    measures = [each.outcome.measures for each in kept]
    rows = [(own["seconds"] / own["training rows"], own["training rows"]) for own in measures if _is_timed(own)]
    if not rows:
        return None
    pace, weight = np.array(sorted(rows)).T
    return float(pace[np.searchsorted(weight.cumsum(), weight.sum() / 2)])


def _is_timed(measures: Mapping[str, float]) -> bool:
    return bool(measures.get("training rows")) and "seconds" in measures


def core_hours(rows: int, pace: float | None) -> float | None:
    """Return the hours of one core that so many training rows take."""
    return None if pace is None else rows * pace / 3600


def told(hours: float | None) -> str:
    """Write hours to two digits."""
    return "–" if hours is None else f"{float(f'{hours:.2g}'):,g}"


def hours_note(kept: Mapping[str, Sequence[Kept]], paces: Mapping[str, float | None]) -> str:
    """Say where the hours come from."""
    known = {task: pace for task, pace in paces.items() if pace is not None}
    if not known:
        return "Core-hours are told once a run has finished."
    machines = Counter(each.machine for own in kept.values() for each in own)
    where = ", ".join(f"{name} ({count:,})" for name, count in machines.most_common())
    lacking = ""
    if not all(kept.values()):
        lacking = (
            " A study without a finished run is reckoned by those of the same task, which is too little where texts "
            "are longer or all blocks adapted, as in those of text pairs."
        )
    rates = " and ".join(f"{1e3 * pace:.2g} s per 1,000 rows of {task}" for task, pace in known.items())
    return (
        "Core-hours: training rows times the seconds that a run has taken per row, evaluation included, on one thread, "
        f"as median over rows; over all studies that is {rates}. They are wall time, so runs beside others on a busy "
        f"machine make it too much.{lacking} Finished runs were computed on: {where}."
    )


def seeds_table(efforts: Iterable[Effort]) -> str:
    """Write what the studies' seeds can show, by the number of rows that are corrected together."""
    tests = sorted({1, *(each.tests for each in efforts if each.seeds == len(SEEDS))})
    lines = []
    for count in tests:
        found = [detectable_difference(deviation, len(SEEDS), LEVEL / count) for deviation in DEVIATIONS]
        lines.append([str(count), *("–" if each is None else f"{each:.3f}" for each in found)])
    head = ["rows against one baseline", *(f"sd {deviation:g}" for deviation in DEVIATIONS)]
    note = (
        f"The mean difference that {len(SEEDS)} seeds show with {POWER:.0%} probability, at Holm's first level "
        f"({LEVEL:g} / rows), by the standard deviation (sd) of the paired differences over seeds. A smaller one will "
        "mostly come out as not distinguishable, which does not say that there is none. Of the sign-flip test p is "
        f"{smallest_sign_flip_p(len(SEEDS)):g} at least, so with {len(SEEDS)} seeds it can never be below {LEVEL:g}."
    )
    return f"{markdown_table(head, lines)}\n{note}\n"
