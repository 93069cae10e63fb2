"""What one run is summed up in: scores, costs, and the work that was really done."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from peerlora.config.metrics import METRICS
from peerlora.config.run import RunConfig
from peerlora.runs.events import Evaluated, Event, RoundDone
from peerlora.runs.further_scores import metric_scores
from peerlora.runs.metrics import evaluations, find_start, select_events
from peerlora.runs.privacy_summary import largest_epsilon

FURTHER = {"mean client": "own_mean", "worst client": "own_worst", "averaged model": "averaged"}
"""Measure of a further metric -> its name in a summary."""
MEASURES = (
    "mean client",
    "worst client",
    "averaged model",
    "relayed client",
    "worst relayed client",
    "personalised client",
    "worst personalised client",
    "best round",
    "number of the best round",
    "best rounds of clients",
    "training rows",
    "row gradients",
    "gradients",
    "bytes sent",
    "epsilon spent",
    "consensus of B·A",
    "cross-term",
    "seconds",
    "virtual seconds",
    *(f"{metric}, {of}" for metric in METRICS for of in FURTHER),
)
"""Scores are of the last evaluation, but for ``best round``: the highest mean client of any evaluation, picked on the
very rows it is reported on, so it flatters; so does ``best rounds of clients``, the mean of the values by which
``eval.select`` kept each client's best adapters.  Personalised: on held-out rows of each client's own (``eval.own``).
Work, bytes and seconds are of the whole run, consensus and cross-term of its last round.  Epsilon: of the client that
spent most."""

UNRELAYED = {"relayed client": "mean client", "worst relayed client": "worst client"}
"""Measure of relayed models -> the same of the clients' own, which is what a run deploys that relays nothing."""

FEW_EVALUATIONS = 3
"""After training began; with no more than these the best round is hardly a choice, and is left out."""


def measure_run(events: Sequence[Event], config: RunConfig | None = None) -> dict[str, float]:
    """Compute ``MEASURES`` of one finished run; those that it has no number for are left out.

    Without its config a run has no number for its work.
    """
    start, scores, done = find_start(events), evaluations(events), select_events(events, RoundDone)
    if start is None or not scores or not done:
        return {}
    last = scores[-1]
    found = {
        "mean client": _mean(last.own),
        "worst client": _worst(last.own, start.higher_is_better),
        "averaged model": last.averaged,
        "relayed client": _mean(last.relayed),
        "worst relayed client": _worst(last.relayed, start.higher_is_better),
        "personalised client": _mean(last.personal),
        "worst personalised client": _worst(last.personal, start.higher_is_better),
        "best rounds of clients": _mean(last.best),
        **_further(last),
        **_best_round(scores, start.higher_is_better),
        **({} if config is None else count_work(done, config)),
        "bytes sent": float(sum(each.bytes_sent for each in done)),
        "epsilon spent": largest_epsilon(last),
        "consensus of B·A": done[-1].consensus_product,
        "cross-term": done[-1].cross_term,
        "virtual seconds": done[-1].virtual_seconds,
        "seconds": sum(each.seconds_train + each.seconds_mix for each in done) + sum(each.seconds for each in scores),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _further(last: Evaluated) -> dict[str, float]:
    """The measures of further metrics; NaN where a run has none."""
    found = metric_scores(last)
    return {
        f"{metric}, {of}": math.nan if scores.get(key) is None else float(scores[key] or 0.0)
        for metric, scores in found.items()
        for of, key in FURTHER.items()
    }


def _best_round(scores: Sequence[Evaluated], higher_is_better: bool) -> dict[str, float]:
    means = {score.round: _mean(score.own) for score in scores if score.round > 0}
    if len(means) <= FEW_EVALUATIONS:
        return {}
    best: Callable[..., Any] = max if higher_is_better else min
    at = best((number for number in means if not math.isnan(means[number])), key=lambda n: means[n], default=None)
    return {} if at is None else {"best round": means[at], "number of the best round": float(at)}


def count_work(done: Sequence[RoundDone], config: RunConfig) -> dict[str, float]:
    """Count the training rows, and the gradients of rows and of minibatches, that a run took, from its rounds' reports.

    A client trained in a round where it has a loss.  Attackers, whose losses are not written down, train whenever an
    honest client does and they are not absent.  Of a method without common rounds a round is as many local trainings
    as there are clients, whoever does them; each counts the mean batch.  A cut backward pass counts whole.
    """
    from peerlora.algorithms import build_algorithm
    from peerlora.algorithms.base import is_asynchronous
    from peerlora.exchange.attacks import attackers

    algorithm = build_algorithm(config.algorithm.name, config.algorithm.parameters)
    hidden = attackers(config.adversary, config.clients, config.seed)
    rows, trainings, batches = 0, 0, config.batches
    for each in done:
        trained = _trained(each, hidden, config.clients)
        if is_asynchronous(algorithm) and trained:
            trained = range(config.clients)
        rows += sum(batches[client] for client in trained)
        trainings += len(trained)
    each, passes = config.train.minibatches, algorithm.traits.gradients
    return {
        "training rows": float(rows * each),
        "row gradients": float(rows * each * passes),
        "gradients": float(trainings * each * passes),
    }


def _trained(done: RoundDone, hidden: Sequence[int], clients: int) -> Sequence[int]:
    if not done.loss and not math.isnan(done.mean_loss):  # too many to be listed: all who were there
        gone = set(done.absent)
        return [client for client in range(clients) if client not in gone]
    seen = [client for client, loss in enumerate(done.loss) if not math.isnan(loss)]
    return [*seen, *(client for client in hidden if client not in done.absent)] if seen else []


def _worst(values: Sequence[float], higher_is_better: bool) -> float:
    worst: Callable[..., Any] = min if higher_is_better else max
    return worst((value for value in values if not math.isnan(value)), default=math.nan)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
