"""Losses and metrics of the kinds of tasks: classification, regression, causal language modelling."""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from peerlora.config.task_kinds import KINDS, TaskKind, task_kind
from peerlora.data.batches import Batch
from peerlora.train.metrics import spearman


@runtime_checkable
class Measured(Protocol):
    """What is known of every task: its kind, and the metric by which models are compared."""

    kind: ClassVar[TaskKind]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]


@runtime_checkable
class Task(Measured, Protocol):
    """The training half of a ``TaskKind`` of rows: losses per client for training, outcomes per row for scoring.

    A task whose mean losses are not over rows also has ``loss_terms``, see the function of that name.
    """

    def losses(self, logits: Tensor, batch: Batch) -> Float[Tensor, " client"]:
        """Every client's mean loss over its own rows (tokens, for language models); filler rows count nothing."""
        ...

    def row_losses(self, logits: Tensor, batch: Batch) -> Float[Tensor, " client*row"]:
        """The loss of every row alone (per token, for language models)."""
        ...

    def outcomes(self, logits: Tensor, batch: Batch) -> Float[Tensor, "client*row 2"]:
        """(loss, prediction) per row, from which ``score`` computes the metric; for language models (loss, tokens)."""
        ...

    def score(self, outcomes: Float[np.ndarray, "row 2"], labels: np.ndarray) -> tuple[float, float]:
        """(metric, loss) of one client over a data set."""
        ...


@dataclass(frozen=True)
class Classification:
    """Cross-entropy; accuracy."""

    kind: ClassVar[TaskKind] = KINDS["classification"]
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy per client."""
        return _weighted(self.row_losses(logits, batch), batch)

    def row_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(logits, batch.labels, reduction="none")

    def outcomes(self, logits: Tensor, batch: Batch) -> Tensor:
        """(cross-entropy, predicted class)."""
        loss = self.row_losses(logits, batch)
        return torch.stack([loss, logits.argmax(1).to(loss.dtype)], dim=1)

    def score(self, outcomes: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
        """(share of rows predicted right, mean cross-entropy)."""
        return float((outcomes[:, 1] == labels).mean()), float(outcomes[:, 0].mean())


@dataclass(frozen=True)
class Regression:
    """Squared error; Spearman's rank correlation."""

    kind: ClassVar[TaskKind] = KINDS["regression"]
    metric: ClassVar[str] = "spearman"
    higher_is_better: ClassVar[bool] = True

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean squared error per client."""
        return _weighted(self.row_losses(logits, batch), batch)

    def row_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Squared error."""
        return (logits.squeeze(-1) - batch.labels).square()

    def outcomes(self, logits: Tensor, batch: Batch) -> Tensor:
        """(squared error, prediction)."""
        return torch.stack([self.row_losses(logits, batch), logits.squeeze(-1)], dim=1)

    def score(self, outcomes: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
        """(Spearman correlation, mean squared error); 0 where either side is constant, since no order exists."""
        return spearman(outcomes[:, 1], labels), float(outcomes[:, 0].mean())


@dataclass(frozen=True)
class CausalLM:
    """Next-token cross-entropy; the metric is the mean loss per token (lower is better)."""

    kind: ClassVar[TaskKind] = KINDS["causal-lm"]
    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy over each client's own tokens; those of a row count as the row does."""
        loss, tokens = self._sums(logits, batch)
        real = self._real(batch, loss.dtype)
        return (loss.view_as(real) * real).sum(1) / self._counted(tokens, real)

    def loss_terms(self, batch: Batch) -> Float[Tensor, " client"]:
        """The tokens over which ``losses`` takes its means."""
        real = self._real(batch, batch.weights.dtype)
        return self._counted(batch.inputs["attention_mask"][:, 1:].to(real.dtype).sum(1), real)

    def row_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy per token."""
        loss, tokens = self._sums(logits, batch)
        return loss / tokens

    def outcomes(self, logits: Tensor, batch: Batch) -> Tensor:
        """(summed cross-entropy, number of predicted tokens)."""
        return torch.stack(self._sums(logits, batch), dim=1)

    def score(self, outcomes: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
        """Mean loss per token, twice: it is the metric and the loss."""
        loss = float(outcomes[:, 0].sum() / outcomes[:, 1].sum())
        return loss, loss

    @staticmethod
    def _real(batch: Batch, dtype: torch.dtype) -> Float[Tensor, "client row"]:
        return (batch.weights / batch.weights.amax(1, keepdim=True)).to(dtype)  # 1, or by a loss rule less

    @staticmethod
    def _counted(tokens: Tensor, real: Tensor) -> Float[Tensor, " client"]:
        return (tokens.view_as(real) * real).sum(1)

    @staticmethod
    def _sums(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        targets = batch.inputs["input_ids"][:, 1:]
        known = batch.inputs["attention_mask"][:, 1:].to(logits.dtype)
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none").view_as(known)
        return (each * known).sum(1), known.sum(1)


def loss_terms(task: Task, batch: Batch) -> Float[Tensor, " client"]:
    """How many terms each client's mean loss has: where they differ between minibatches, a task counts them itself.

    A task may have the method ``loss_terms``; of others every minibatch counts the same, having equally many rows.
    """
    count = getattr(task, "loss_terms", None)
    return batch.weights.new_ones(len(batch.weights)) if count is None else count(batch)


def _weighted(row_losses: Tensor, batch: Batch) -> Float[Tensor, " client"]:
    return (row_losses.view_as(batch.weights) * batch.weights).sum(1)


def task(kind: str) -> Task:
    """The Task of this ``task.kind``."""
    return resolve_name(task_kind(kind).task)()
