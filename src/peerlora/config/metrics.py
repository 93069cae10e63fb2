"""The further metrics of evaluations: which tasks each fits, and which way it is better; no torch is needed to ask.

How they are computed stands in ``train.metrics``.
"""

from __future__ import annotations

from peerlora.config.task_kinds import Target, TaskKind
from peerlora.errors import nearest

LOSS = "loss"
"""What every task has, beside its metric; lower is better."""
METRICS: dict[str, tuple[Target, ...]] = {
    "accuracy": ("class",),
    "balanced-accuracy": ("class",),
    "macro-f1": ("class", "labels", "tags"),
    "micro-f1": ("class", "labels"),
    "matthews": ("class",),
    "auroc": ("class", "labels"),
    "pearson": ("number",),
    "spearman": ("number",),
    "mean-absolute-error": ("number",),
    "perplexity": ("tokens", "text"),
    "token-accuracy": ("tokens", "text", "tags"),
    "entity-f1": ("tags",),
    "share-of-optimum": ("action",),
}
"""Name -> what a task has to predict, one of these."""
_LOWER = (LOSS, "mean-absolute-error", "perplexity")


def higher_is_better(metric: str) -> bool:
    """Whether larger values of this metric, or of the loss, are the better ones."""
    return metric not in _LOWER


def metrics_of(kind: TaskKind) -> list[str]:
    """The further metrics that fit a task."""
    return [name for name, targets in METRICS.items() if kind.target in targets]


def misfit(metric: str, kind: TaskKind) -> str | None:
    """What is wrong with a metric for a task, and what fits; None where it fits."""
    known = metrics_of(kind)
    if metric in known:
        return None
    listed = ", ".join(known) or "none"
    wrong = "does not fit" if metric in METRICS else "is unknown"
    hint = "" if metric in METRICS else nearest(metric, known)
    return f"{metric!r} {wrong} for task.kind={kind.name}{hint}; expected of {listed}"
