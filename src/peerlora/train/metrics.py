"""Metrics of predictions over a data set, beside a task's own; ``config.metrics`` says which task each fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from peerlora.config.task_kinds import Target
from peerlora.data.dataset import Dataset

NEEDS_MARGINS = ("auroc",)
"""Metrics that look at the margins of all classes."""
_OF_ROWS = ("balanced-accuracy", "auroc")
"""Metrics that average over classes, and leave out those that rows lack."""
_OF_ROWS_AND_PREDICTIONS = ("macro-f1",)
"""Those that leave out classes only which rows lack and nothing is predicted as."""


@dataclass(frozen=True)
class Predictions:
    """What one client's model says of a data set."""

    outcomes: Float[np.ndarray, "row number"]
    """What the task tells of each row (``Task.outcomes``), the loss first."""
    labels: np.ndarray
    """[row]"""
    loss: float
    """Mean loss, as the task takes it."""
    margins: Float[np.ndarray, "row label"] | None = None
    """What `margins_of` gives, where a metric needs it."""

    @property
    def predicted(self) -> Float[np.ndarray, " row"]:
        """Class ids or numbers."""
        return self.outcomes[:, 1]


@torch.no_grad()
def class_margins(logits: Float[Tensor, "row label"]) -> Float[Tensor, "row label"]:
    """Log odds of each class, ``z_c - logsumexp of the others``, in float64.

    They order rows as the softmax shares do, which in fp32 are all 1 or 0 where a model is sure of itself.
    """
    z = logits.double()
    largest = z.argmax(1, keepdim=True)
    # no share but the largest is above 1/2, so 1 - share is precise
    margins = z - z.logsumexp(1, keepdim=True) - torch.log1p(-z.softmax(1).clamp(max=0.5))
    others = z.scatter(1, largest, -math.inf).logsumexp(1, keepdim=True)
    return margins.scatter(1, largest, z.gather(1, largest) - others)


def margins_of(target: Target, logits: Float[Tensor, "row label"]) -> Float[Tensor, "row label"]:
    """Log odds in float64 that rows have a class or a label: of labels, each judged by itself, the logits."""
    return class_margins(logits) if target == "class" else logits.double()


def confusion(predicted: np.ndarray, labels: np.ndarray) -> Int[np.ndarray, "label label"]:
    """Count the rows of each class (first axis) that are predicted as each class (second axis)."""
    size = int(max(predicted.max(), labels.max())) + 1
    pairs = labels.astype(np.int64) * size + predicted.astype(np.int64)
    return np.bincount(pairs, minlength=size * size).reshape(size, size)


def accuracy(counts: Int[np.ndarray, "label label"]) -> float:
    """Share of rows predicted right."""
    return float(np.trace(counts) / counts.sum())


def balanced_accuracy(counts: Int[np.ndarray, "label label"]) -> float:
    """Mean recall of the classes that rows have.

    Source: Brodersen et al. 2010, The balanced accuracy and its posterior distribution.
    """
    rows = counts.sum(1)
    return float((np.diagonal(counts)[rows > 0] / rows[rows > 0]).mean())


def f1(true: float, predicted: float, both: float) -> float:
    """``2 both / (true + predicted)``; 0 where there is none of either."""
    return 2 * both / (true + predicted) if true + predicted else 0.0


Counts = Float[np.ndarray, "kind 3"]
"""Of each class, label or type of entity: how often it is true, predicted, and both."""


def counts_of_classes(pairs: Int[np.ndarray, "label label"]) -> Counts:
    """Count every class of ``confusion``."""
    return np.stack([pairs.sum(1), pairs.sum(0), np.diagonal(pairs)], axis=1, dtype=float)


def counts_of_labels(outcomes: Float[np.ndarray, "row number"], labels: Float[np.ndarray, "row label"]) -> Counts:
    """Count every label of ``MultiLabel``'s outcomes (loss, then 1 for each label that is predicted)."""
    predicted = outcomes[:, 1:]
    return np.stack([labels.sum(0), predicted.sum(0), (labels * predicted).sum(0)], axis=1, dtype=float)


def counts_of_entities(outcomes: Float[np.ndarray, "row number"]) -> Counts:
    """Sum the counts in ``TokenClassification``'s outcomes (loss, words, right ones, then three by type of entity)."""
    return outcomes[:, 3:].sum(0).reshape(-1, 3)


def pooled_f1(counts: Counts) -> float:
    """F1 of all kinds together (micro): of classes the accuracy, where a row has one class."""
    return f1(*counts.sum(0).tolist())


def mean_f1(counts: Counts) -> float:
    """Mean F1 (macro) of those kinds that rows have or that are predicted; 0 without any."""
    known = counts[counts[:, :2].sum(1) > 0]
    return float(np.mean([f1(*own) for own in known.tolist()])) if len(known) else 0.0


def matthews(counts: Int[np.ndarray, "label label"]) -> float:
    """Matthews' correlation of classes with predictions; 0 where either is constant.

    Source: Gorodkin 2004, Comparing two K-category assignments by a K-category correlation coefficient.
    """
    rows, predictions, total = counts.sum(1).astype(float), counts.sum(0).astype(float), float(counts.sum())
    scale = math.sqrt(total**2 - predictions @ predictions) * math.sqrt(total**2 - rows @ rows)
    return float((np.trace(counts) * total - rows @ predictions) / scale) if scale else 0.0


def auroc(found: Predictions) -> float:
    """Area under the ROC curve: how often a row of a class has larger odds of it than another row; ties are half.

    Of two classes, that of the second; of more, or of labels, the mean over these, each against the rest, of those that
    some rows have and some have not.  NaN where there is none.
    Source: Hanley and McNeil 1982 (by ranks, Mann and Whitney 1947); Provost and Domingos 2000 (one against the rest).
    """
    from scipy.stats import rankdata

    assert found.margins is not None
    classes, areas = found.margins.shape[1], []
    one_each = found.labels.ndim == 1
    for label in range(1, 2) if one_each and classes == 2 else range(classes):
        inside = found.labels == label if one_each else found.labels[:, label] > 0
        own, others = int(inside.sum()), int((~inside).sum())
        if own and others:
            above = rankdata(found.margins[:, label])[inside].sum() - own * (own + 1) / 2
            areas.append(above / (own * others))
    return float(np.mean(areas)) if areas else math.nan


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where either side is constant, since no order exists."""
    from scipy.stats import spearmanr

    return 0.0 if _constant(predicted, labels) else float(spearmanr(predicted, labels)[0])  # pyright: ignore


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation; 0 where either side is constant."""
    return 0.0 if _constant(predicted, labels) else float(np.corrcoef(predicted, labels.astype(float))[0, 1])


def _constant(predicted: np.ndarray, labels: np.ndarray) -> bool:
    return bool(len(labels) < 2 or np.ptp(predicted) == 0 or np.ptp(labels) == 0)


def perplexity(loss: float) -> float:
    """``exp`` of the mean loss per token; infinite where that is beyond the largest number."""
    return math.exp(loss) if loss < 709 else math.inf if loss == loss else math.nan


def token_accuracy(found: Predictions) -> float:
    """Share of the learned tokens, or of words with tags, that are predicted right."""
    return float(found.outcomes[:, 2].sum() / found.outcomes[:, 1].sum())


_OF_CLASSES: Mapping[str, Callable[[np.ndarray], float]] = {
    "accuracy": accuracy,
    "balanced-accuracy": balanced_accuracy,
    "macro-f1": lambda pairs: mean_f1(counts_of_classes(pairs)),
    "micro-f1": lambda pairs: pooled_f1(counts_of_classes(pairs)),
    "matthews": matthews,
}
_COUNTS: Mapping[Target, Callable[[Predictions], Counts]] = {
    "labels": lambda found: counts_of_labels(found.outcomes, found.labels),
    "tags": lambda found: counts_of_entities(found.outcomes),
}
_OF_TEXT: Mapping[str, Callable[[Predictions], float]] = {
    "perplexity": lambda found: perplexity(found.loss),
    "token-accuracy": token_accuracy,
}
_COMPUTE: Mapping[Target, Mapping[str, Callable[[Predictions], float]]] = {
    "class": {
        name: lambda found, compute=compute: compute(confusion(found.predicted, found.labels))
        for name, compute in _OF_CLASSES.items()
    }
    | {"auroc": auroc},
    "number": {
        "pearson": lambda found: pearson(found.predicted, found.labels),
        "spearman": lambda found: spearman(found.predicted, found.labels),
        "mean-absolute-error": lambda found: float(np.abs(found.predicted - found.labels).mean()),
    },
    "labels": {
        "micro-f1": lambda found: pooled_f1(_COUNTS["labels"](found)),
        "macro-f1": lambda found: mean_f1(_COUNTS["labels"](found)),
        "auroc": auroc,
    },
    "tokens": _OF_TEXT,
    "text": _OF_TEXT,
    "tags": {
        "entity-f1": lambda found: pooled_f1(_COUNTS["tags"](found)),
        "macro-f1": lambda found: mean_f1(_COUNTS["tags"](found)),
        "token-accuracy": token_accuracy,
    },
}


def counts_by_name(target: Target, found: Predictions) -> Counts | None:
    """The counts of every label or type of entity, in the order of their names; None for other targets."""
    count = _COUNTS.get(target)
    return None if count is None else count(found)


def compute_metric(name: str, target: Target, found: Predictions) -> float:
    """One of ``config.metrics.METRICS`` over one client's predictions of this target; at least one row."""
    return _COMPUTE[target][name](found)


def absent_classes(metrics: Sequence[str], rows: Dataset, what: str = "evaluation row") -> tuple[str, ...]:
    """Warn where evaluation rows lack a class, or a label, over which a metric averages; ``what``: one of these."""
    several = rows.labels.ndim == 2
    names = rows.names if several else rows.classes
    there = set((rows.labels.nonzero()[1] if several else rows.labels).tolist())
    lacking = [name for label, name in enumerate(names) if label not in there]
    out = [name for name in metrics if name in _OF_ROWS]
    zero = [name for name in metrics if name in _OF_ROWS_AND_PREDICTIONS]
    if not lacking or not out + zero:
        return ()
    left_out = f"; left out of: {', '.join(out)}" if out else ""
    counted = f"; 0 in {', '.join(zero)} where a row is taken for it" if zero else ""
    has = "has label" if several else "is of class"
    return (f"no {what} {has} {', '.join(lacking)}{left_out}{counted}",)
