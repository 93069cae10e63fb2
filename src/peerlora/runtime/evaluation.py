"""Evaluations of a run: every client's models on the common rows, and on held-out rows of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from peerlora.config.metrics import LOSS
from peerlora.config.task_kinds import task_kind
from peerlora.data.dataset import Dataset
from peerlora.exchange.relayed_average import RelayedModels
from peerlora.lora.adapters import Adapters
from peerlora.runs.events import Evaluated
from peerlora.runtime.compose import Federation, evaluation_rows
from peerlora.runtime.participation import Participation
from peerlora.runtime.selection import Selection
from peerlora.train.base import Scores
from peerlora.train.metrics import f1
from peerlora.train.online.episodes import Episodes
from peerlora.train.tasks import names_of_counts


@dataclass(frozen=True)
class Evaluation:
    """The scores of one moment of a run, [client] each: of attackers, too."""

    rows: Dataset | Episodes
    own: Scores
    """The clients' own models on the common rows."""
    averaged: Scores | None
    """[1] their average; None where it is not known."""
    relayed: Scores | None
    """Their relayed models; None where nothing is relayed."""
    personal: Scores | None
    """Their own models on held-out rows of their own; None where none are held out."""
    personal_relayed: Scores | None
    models: Adapters
    relayed_models: RelayedModels | None

    def scores(self) -> dict[str, Scores]:
        """Those that there are, by name."""
        names = ("own", "averaged", "relayed", "personal", "personal_relayed")
        return {name: found for name in names if (found := getattr(self, name)) is not None}


class Evaluates(Protocol):
    """What a Trainer asks of its evaluator."""

    def evaluate(self, state: Any, final: bool) -> Evaluation:
        """Evaluate the clients' models in a state, their average, and their relayed ones: at the end, on all rows."""
        ...

    def rescored(self, found: Evaluation, of: str) -> Scores:
        """Return these scores of a final evaluation as the ones before were made."""
        ...

    def event(self, done: int, found: Evaluation, began: float, virtual_seconds: float, final: bool) -> Evaluated:
        """Tell the scores of honest clients after ``done`` rounds; ``began``: when the evaluation did."""
        ...

    def of_honest(self, values: np.ndarray) -> list[float]:
        """[client], NaN for attackers."""
        ...


class Evaluator:
    """Evaluates the clients held here, and makes the event that tells of it."""

    def __init__(self, federation: Federation, participation: Participation):
        self.federation, self.participation = federation, participation
        self.learner, self.settings = federation.learner, federation.config.eval
        self.few_rows = evaluation_rows(federation.config, federation.eval_data)
        self.own_rows = [federation.train_data.take(rows) if len(rows) else None for rows in federation.own_rows]
        self.metrics = further_metrics(self.settings.computed, self.learner.task.metric)

    def evaluate(self, state: Any, final: bool) -> Evaluation:
        """See ``Evaluates``."""
        x = self.federation.algorithm.model(state)
        rows = self.federation.eval_data if final else self.few_rows
        found = Scores.join([self._score(models, rows) for models in self.participation.evaluated(x)])
        relayed = self.federation.exchange.relayed_models(x)
        return Evaluation(
            rows,
            found.of(slice(0, x.clients)),
            found.of(slice(x.clients, x.clients + 1)) if len(found.metric) > x.clients else None,
            self._score(relayed.adapters, rows) if relayed else None,
            self._score_own(x),
            self._score_own(relayed.adapters) if relayed else None,
            x,
            relayed,
        )

    def rescored(self, found: Evaluation, of: str) -> Scores:
        """These scores of a final evaluation as the ones before were made: on the sample, where those were."""
        if of not in ("own", "relayed") or len(found.rows) == len(self.few_rows):
            return found.scores()[of]
        models = found.relayed_models.adapters if of == "relayed" and found.relayed_models else found.models
        return self._score(models, self.few_rows)

    def event(self, done: int, found: Evaluation, began: float, virtual_seconds: float, final: bool) -> Evaluated:
        """Tell the scores of honest clients after ``done`` rounds; ``began``: when the evaluation did."""
        fields = {
            f"{of}{what}": values
            for of, each in found.scores().items()
            for what, values in self._score_fields(of, each)
        }
        relayed = found.relayed_models
        return Evaluated(
            round=done,
            rows=found.own.rows,
            seconds=time.perf_counter() - began,
            final=final,
            virtual_seconds=virtual_seconds,
            relayed_cut=float(relayed.cut_share[self.federation.honest_rows].mean()) if relayed else float("nan"),
            metrics={of: self._further(of, each) for of, each in found.scores().items() if each.metrics},
            by_name=self._by_name(found) if final else {},
            privacy=self.learner.privacy.spent() if self.learner.privacy else {},
            **{"averaged": float("nan"), "averaged_loss": float("nan"), **fields},
        )

    def _score_fields(self, of: str, scores: Scores) -> Sequence[tuple[str, list[float] | float]]:
        pairs = (("", scores.metric), ("_loss", scores.loss))
        return [(what, float(values[0]) if of == "averaged" else self.of_honest(values)) for what, values in pairs]

    def _further(self, of: str, scores: Scores) -> dict[str, list[float]]:
        hides = of != "averaged"
        return {name: self.of_honest(values) if hides else values.tolist() for name, values in scores.metrics.items()}

    def _by_name(self, found: Evaluation) -> dict[str, dict[str, float]]:
        """Of each label or type of entity its number in the rows, and F1 of honest clients and of their average."""
        if found.own.counts is None:
            return {}
        target, averaged = task_kind(self.federation.config.task.kind).target, found.averaged
        names = names_of_counts(target, found.rows.names)
        scores = {}
        for place, name in enumerate(names):
            own = found.own.counts[self.federation.honest_rows, place]
            scores[name] = {"true": float(own[0, 0]), "own": float(np.mean([f1(*each) for each in own.tolist()]))}
            if averaged is not None and averaged.counts is not None:
                scores[name]["averaged"] = f1(*averaged.counts[0, place].tolist())
        return scores

    def of_honest(self, values: np.ndarray) -> list[float]:
        """[client], NaN for attackers."""
        honest = self.federation.honest_rows
        shown = np.full(len(values), np.nan)
        shown[honest] = values[honest]
        return shown.tolist()

    def _score(self, models: Adapters, rows: Dataset | Episodes) -> Scores:
        return self.learner.evaluate(models, rows, self.settings.batch, self.metrics)

    def _score_own(self, models: Adapters) -> Scores | None:
        """Each client on its own held-out rows, NaN for one that has none; None where nothing is held out."""
        if not self.own_rows:
            return None
        nothing = np.full(1, np.nan)
        none = Scores(nothing, nothing, 0, dict.fromkeys(self.metrics, nothing))
        return Scores.join(
            [none if rows is None else self._score(models.rows([i]), rows) for i, rows in enumerate(self.own_rows)]
        )


def further_metrics(wanted: Sequence[str], main: str) -> tuple[str, ...]:
    """The metrics to compute beside a task's main one and its loss."""
    return tuple(name for name in wanted if name not in (main, LOSS))


def value_of(scores: Scores, selection: Selection) -> np.ndarray:
    """[client] the values by which evaluations are compared."""
    if selection.metric == "loss":
        return scores.loss
    return scores.metrics.get(selection.metric, scores.metric)
