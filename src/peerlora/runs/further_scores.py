"""Scores beside those of the task's own metric on the common rows: in a summary, in tables and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from peerlora.config.metrics import higher_is_better
from peerlora.display import format_fixed
from peerlora.runs.events import Evaluated, RunStarted

ScoreRow = tuple[str, float | None]

MODELS = {
    "own": "clients' own models",
    "relayed": "clients' relayed models",
    "personal": "clients' own models, on held-out rows or in environments of their own",
    "personal_relayed": "clients' relayed models, on held-out rows or in environments of their own",
}
"""Field of ``Evaluated`` -> whose scores stand there."""


def mean_and_worst(values: Sequence[float], higher: bool) -> tuple[float | None, float | None]:
    """Of the values that are numbers; None where none is."""
    known = [value for value in values if not math.isnan(value)]
    worst = min if higher else max
    return (sum(known) / len(known), worst(known)) if known else (None, None)


def personal_scores(score: Evaluated | None, higher: bool) -> dict[str, float | None]:
    """The summary's scores on clients' own rows: personal_mean and _worst, personal_relayed_mean and _worst, if any."""
    found = {}
    for of in ("personal", "personal_relayed"):
        if score is not None and (values := getattr(score, of)):
            found[f"{of}_mean"], found[f"{of}_worst"] = mean_and_worst(values, higher)
    return found


def metric_scores(score: Evaluated | None) -> dict[str, dict[str, float | None]]:
    """Further metric -> own_mean, own_worst, averaged, and those of the other models; empty where none were asked."""
    found: dict[str, dict[str, float | None]] = {}
    for of, named in score.metrics.items() if score is not None else ():
        for name, values in named.items():
            mean, worst = mean_and_worst(values, higher_is_better(name))
            scores = {"averaged": mean} if of == "averaged" else {f"{of}_mean": mean, f"{of}_worst": worst}
            found.setdefault(name, {}).update(scores)
    return found


def best_scores(score: Evaluated | None, start: RunStarted | None) -> dict[str, Any] | None:
    """What the best evaluations of clients are chosen by, their rounds and values, and who trains no more; or None."""
    if score is None or start is None or start.select is None or not score.best:
        return None
    mean, _ = mean_and_worst(score.best, True)
    values = [None if math.isnan(value) else value for value in score.best]
    return {**start.select, "mean": mean, "values": values, "rounds": score.best_rounds, "stopped": score.stopped}


def table_rows(metric: str, summary: Mapping[str, Any]) -> list[ScoreRow]:
    """Tell all of a summary's further scores, (what, value) each."""
    scores: Mapping[str, Any] = summary.get("scores") or {}
    personal = {of: who for of, who in MODELS.items() if f"{of}_mean" in scores and of.startswith("personal")}
    rows = [row for of, who in personal.items() for row in _rows(metric, scores, of, who)]
    for name, found in (summary.get("metrics") or {}).items():
        for of, who in MODELS.items():
            if f"{of}_mean" in found:
                rows += _rows(name, found, of, who)
            if of == "own" and "averaged" in found:
                rows.append((f"{name}, averaged model", found["averaged"]))
    return rows


def _rows(metric: str, found: Mapping[str, Any], of: str, who: str) -> list[ScoreRow]:
    return [(f"{metric}, mean over {who}", found[f"{of}_mean"]), (f"{metric}, worst of {who}", found[f"{of}_worst"])]


def describe_further(metric: str, summary: Mapping[str, Any]) -> list[str]:
    """Tell the same in a line per metric."""
    by_metric: dict[str, list[str]] = {}
    scores: Mapping[str, Any] = summary.get("scores") or {}
    main = {key: value for key, value in scores.items() if key.startswith("personal")}
    for name, found in {metric: main, **(summary.get("metrics") or {})}.items():
        for of, who in MODELS.items():
            if f"{of}_mean" in found:
                numbers = {"mean": found[f"{of}_mean"], "worst": found[f"{of}_worst"]}
                numbers |= {"averaged": found["averaged"]} if of == "own" and "averaged" in found else {}
                numbers_text = ", ".join(f"{word} {format_fixed(value)}" for word, value in numbers.items())
                by_metric.setdefault(name, []).append(f"{numbers_text} ({who})")
    return [f"{name}: {'; '.join(numbers_text)}" for name, numbers_text in by_metric.items()]


_FLATTERS = {
    "common": "the common rows that all are scored on, so scores of the best rounds flatter",
    "own": "held-out rows of its own, so scores on these flatter, and those on the common rows do not",
}


def describe_best(summary: Mapping[str, Any]) -> list[str]:
    """Say of which rounds the best adapters are, on what they were chosen, and who trained no more; or nothing."""
    best = summary.get("best")
    if not best:
        return []
    first, last, mean = min(best["rounds"]), max(best["rounds"]), best["mean"]
    rounds = f"round {first}" if first == last else f"rounds {first} to {last}"
    reached = "" if mean is None else f" (mean {mean:.3f})"
    whose = "" if best["model"] == "own" else f" of the {best['model']} models"
    by = f"each client's by the {best['mode']}imum of {best['metric']}{reached} on {_FLATTERS[best['rows']]}"
    lines = [f"best adapters{whose}: of {rounds}, {by}"]
    if stopped := best["stopped"]:
        who = f"clients {', '.join(map(str, stopped))}" if len(stopped) <= 20 else f"{len(stopped)} clients"
        lines.append(f"trained no more at the end (eval.patience): {who}")
    return lines
