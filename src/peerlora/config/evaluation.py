"""The section ``eval``: when clients are evaluated, by what, and what follows from it."""

from collections import Counter
from typing import Literal

from peerlora.config.base import Batch, Positive, Section
from peerlora.config.generation import GenerateConfig
from peerlora.config.metrics import LOSS, misfit
from peerlora.config.task_kinds import TaskKind


class SelectConfig(Section):
    """Which round's adapters of a client are its best ones."""

    metric: str | None = None
    """By what: loss, or a metric of the task, listed in `metrics` or not; null: the task's main metric."""
    mode: Literal["max", "min"] | None = None
    """Whether the largest or the smallest value is best; null: as the metric has it."""
    rows: Literal["common", "own"] = "common"
    """On which rows: the common evaluation rows, whose scores then flatter, or with `own`, the client's own."""


class EvalConfig(Section):
    """When clients are evaluated, on how much and by which metrics, and what follows from it."""

    every: Positive = 10
    """Rounds between two evaluations."""
    rows: Positive | None = None
    """Rows used during the run, a sample drawn once; null: all.  The last evaluation takes all."""
    batch: Batch = 64
    """Rows evaluated together."""
    metrics: list[str] = []
    """Further metrics: of classes accuracy, balanced-accuracy, macro-f1, micro-f1, matthews, auroc, see runs.md."""
    own: bool = False
    """Score each client on rows of its own, too: `data.holdout` of them, set aside before training."""
    select: SelectConfig | None = None
    """Keep each client's adapters of its best evaluation beside the last, as {metric: loss}; null: only the last."""
    patience: Positive | None = None
    """With `select`: evaluations without a better value after which a client trains no more; it goes on mixing."""

    generate: GenerateConfig | None = None
    """Answers that models write at the end of a run with task.kind=chat, beside the expected ones; null: none."""

    @property
    def computed(self) -> tuple[str, ...]:
        """The metrics that are asked for by name, to list or to select by."""
        chosen = self.select.metric if self.select else None
        return tuple(dict.fromkeys([*self.metrics, *([chosen] if chosen else [])]))

    def contradiction(self, kind: TaskKind) -> str | None:
        """What cannot hold together, or does not fit the task, and what to do; None where all can."""
        twice = [name for name, times in Counter(self.metrics).items() if times > 1]
        if twice:
            return f"eval.metrics lists {twice[0]!r} twice; list it once"
        for name in self.metrics:
            if found := misfit(name, kind):
                return f"eval.metrics: {found}"
        if self.select is None:
            ask = "eval.select says by which value, e.g. eval.select.metric=loss; give it, or drop eval.patience"
            return f"eval.patience={self.patience} given; {ask}" if self.patience else None
        wanted = self.select.metric
        if wanted not in (None, LOSS) and (found := misfit(wanted, kind)):
            return f"eval.select.metric: {found} or {LOSS}"
        if self.select.rows == "own" and not self.own:
            return "eval.select.rows=own needs rows of each client's own; set eval.own=true, or use rows=common"
        return None
