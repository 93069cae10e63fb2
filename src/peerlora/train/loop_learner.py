"""The Learner of training loops of the user's own, one for each client held here."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.config.train import TrainConfig
from peerlora.data.dataset import Dataset
from peerlora.errors import CompositionError, DivergenceError
from peerlora.lora.adapters import Adapters
from peerlora.runs.events import Evaluated, Warned
from peerlora.train.base import LocalPlan, Scores, TrainStats
from peerlora.train.handover import EvaluateJob, Handover, LastJob, LoggedScores, LoopEnded, LoopReport, TrainJob
from peerlora.train.local_rules import Gradients, LocalRule, LocalStep
from peerlora.train.local_training import InRounds
from peerlora.train.loss_rules import LossRule
from peerlora.train.privacy import PrivateTraining
from peerlora.train.row_scores import Measure

LOSS = "loss"
"""The name by which a loop logs its training loss, and its loss in an evaluation."""

SECONDS = "loop_seconds"
"""The measure of a round that has the mean seconds of a client's local steps, where one loop works at a time."""


@dataclass(frozen=True)
class LoopTask:
    """What is known of a task whose loss a loop computes: the number by which its evaluations are told."""

    metric: str = LOSS
    higher_is_better: bool = False


@dataclass
class _Round:
    """The round in progress."""

    t: int
    clients: Sequence[int]
    stats: TrainStats
    quiet: bool


class LoopLearner(InRounds):
    """Hands every client's local steps to a loop, client after client, and waits for them.

    ``asked``: evaluations are asked of the loops; else they are what the loops log.  ``fit`` raises LoopEnded where a
    loop is over, LoopFailed where it ended by an error, DivergenceError where adapters are not finite.
    """

    def __init__(self, settings: TrainConfig, task: LoopTask, loops: Sequence[Handover], asked: bool = False):
        self._settings, self.task, self.loops, self.asked = settings, task, loops, asked
        self.loss_rules: tuple[LossRule, ...] = ()
        self.privacy: PrivateTraining | None = None
        self._rates: dict[int, float] = {}
        self._trained: tuple[str, ...] = ()
        self._known: set[int] = set()
        self._steps: list[int | None] = [None] * len(loops)
        self._newest: list[LoggedScores | None] = [None] * len(loops)
        self._handed_out = False
        """Whether the loops have their final adapters, of which their last evaluations are."""
        self._round: _Round = self._begun(0, None, None)

    @property
    def logs_evaluations(self) -> bool:
        """See ``Learner``."""
        return not self.asked

    @property
    def settings(self) -> TrainConfig:
        """Those of the run, with the mean rate of the loops' optimisers in the steps that they took last."""
        if not self._rates:
            return self._settings
        rate = math.fsum(self._rates.values()) / len(self._rates)
        return self._settings.model_copy(update={"lr": rate})

    def _begun(self, t: int, jobs: Sequence[int] | None, clients: Sequence[int] | None) -> _Round:
        """A loop draws what it draws, so ``jobs`` decide nothing."""
        held = len(self.loops)
        stats = TrainStats(torch.full((held,), float("nan"), dtype=torch.float64))
        return _Round(t, list(range(held) if clients is None else clients), stats, self._settings.is_quiet(t))

    def fit(self, x: Adapters, plan: LocalPlan | str) -> Adapters:
        """See ``Learner``."""
        flat = x.flat.clone()
        if self._round.quiet:
            return replace(x, flat=flat)
        plan = LocalPlan.of(plan)
        if plan.depth is not None or plan.row_weights is not None or x.merged is not None:
            raise CompositionError(
                "this method needs the rows, the backward pass or the base model of local steps, which belong to the "
                "training loop; use another one, such as algorithm.name=dec-lora"
            )
        blocks = plan.trained(x.spec)
        switched, self._trained = blocks != self._trained, blocks
        state = self._settings.optimizer_state
        for row in self._round.clients:
            fresh = state == "round" or (state == "phase" and switched) or row not in self._known
            self._known.add(row)
            rule = plan.rule and _OfClient(plan.rule, row)
            job = TrainJob(x.flat[row], blocks, self._settings.local_steps, fresh, rule, self._steps[row])
            began = time.perf_counter()
            report = self.loops[row].ask(job)
            if self.asked:  # no loop has waited for others meanwhile
                self._round.stats.measures.setdefault(SECONDS, []).append(time.perf_counter() - began)
            trained = self._reported(row, report)
            assert trained is not None, "a loop hands its adapters back after local steps"
            for block in blocks:  # what is held stays as it is, not as the loop's dtype rounds it
                flat[row, x.spec.columns(block)] = trained[x.spec.columns(block)].to(flat)
        self._require_finite(flat)
        return replace(x, flat=flat)

    def _reported(self, row: int, report: LoopReport) -> Tensor | None:
        """Note what a loop told beside its adapters."""
        stats, self._steps[row] = self._round.stats, report.steps
        if report.rate is not None:
            self._rates[row] = report.rate
        stats.losses[row] = report.logs.get(LOSS, math.nan)
        for name, value in report.logs.items():
            if name != LOSS:
                stats.measures.setdefault(name, []).append(value)
        stats.events += [Warned(note) for note in report.notes]
        if report.scores is not None:
            self._newest[row] = report.scores
            stats.events.append(self._evaluated(report.scores))
        return report.flat

    def _evaluated(self, scores: LoggedScores) -> Evaluated:
        """The event of an evaluation that one loop has logged in this round."""
        metric, loss, more = self._split(scores)
        return Evaluated(
            round=self._round.t,
            own=[metric],
            own_loss=[loss],
            averaged=math.nan,
            averaged_loss=math.nan,
            rows=scores.rows,
            seconds=math.nan,
            final=False,
            metrics={"own": {name: [value] for name, value in more.items()}} if more else {},
        )

    def _split(self, scores: LoggedScores) -> tuple[float, float, dict[str, float]]:
        """(metric, loss, further ones by name) of an evaluation."""
        more = {name: value for name, value in scores.values.items() if name not in (self.task.metric, LOSS)}
        return scores.values.get(self.task.metric, math.nan), scores.values.get(LOSS, math.nan), more

    def _require_finite(self, flat: Tensor) -> None:
        bad = [row for row in self._round.clients if not flat[row].isfinite().all()]
        if bad:
            raise DivergenceError(
                f"adapters that the training loop handed over in round {self._round.t + 1} are not finite; lower its "
                "learning rate, or clip its gradients"
            )

    def score(self, x: Adapters, measure: Measure, batch: int = 64) -> Float[Tensor, "client row"]:
        """Refuse: only the loop knows its rows."""
        raise CompositionError("this method scores rows, which only the training loop has; use algorithm.name=dec-lora")

    def evaluate(self, x: Adapters, data: Dataset, batch: int, metrics: Sequence[str] = ()) -> Scores:
        """Ask the loops, each by rows of its own; or hand out the final adapters and wait for what is logged of them.

        A model beyond the clients, which is their average, is evaluated by the first client's loop.  Loops that are not
        asked know nothing of further models, such as relayed ones: NaN.  So is what a loop without evaluation rows, or
        one that has ended, does not tell; ``Scores.unknown`` says whose.
        """
        if self._handed_out:
            unknown = np.full(x.clients, np.nan)
            return Scores(unknown, unknown, 0, unknown=np.isnan(unknown))
        self._handed_out = not self.asked
        found = []
        for row in range(x.clients):
            client = row if row < len(self.loops) else 0
            job = EvaluateJob(x.flat[row]) if self.asked else LastJob(x.flat[row])
            try:
                report = self.loops[client].ask(job)
            except LoopEnded as ended:  # before its rounds were over
                report = ended.report
            scores = report.scores or (None if self.asked else self._newest[client])
            found.append(scores or LoggedScores({}))
        split = [self._split(each) for each in found]
        names = set.intersection(*({*more} for _, _, more in split))
        further = {name: np.array([more[name] for _, _, more in split]) for name in sorted(names)}
        metric, loss = (np.array([each[place] for each in split]) for place in (0, 1))
        unknown = np.array([LOSS not in each.values for each in found])
        return Scores(metric, loss, found[0].rows, further, unknown=unknown)

    @property
    def trained(self) -> tuple[str, ...]:
        """See ``Learner``."""
        return self._trained

    def state_dict(self) -> dict[str, Tensor]:
        """The loops' steps so far: their optimisers' memory is their own to save."""
        return {"steps": torch.tensor([-1 if steps is None else steps for steps in self._steps])}

    def load_state_dict(self, saved: Mapping[str, Tensor], trained: Sequence[str]) -> None:
        """See ``Learner``."""
        self._trained, self._known = tuple(trained), set(range(len(self.loops)))
        if "steps" in saved:
            self._steps = [None if steps < 0 else steps for steps in saved["steps"].tolist()]


@dataclass(frozen=True)
class _OfClient:
    """A method's rule for the one client of a loop, whose row of the client axis it knows."""

    rule: LocalRule
    row: int

    def gradient(self, step: LocalStep) -> Gradients:
        """The rule's gradient."""
        return self.rule.gradient(replace(step, clients=[self.row]))
