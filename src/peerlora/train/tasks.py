"""Losses and metrics of the kinds of tasks: classes, of images too, numbers, language models, chats, tags of words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peerlora.config.task_kinds import KINDS, Target, TaskKind, task_kind
from peerlora.data.batches import Batch
from peerlora.data.dataset import UNLEARNED, Dataset
from peerlora.train.entities import ENTITY_COUNTS, count_entities, entity_types
from peerlora.train.metrics import counts_of_entities, counts_of_labels, pooled_f1, spearman


@runtime_checkable
class Task(Protocol):
    """The training half of a ``TaskKind`` of rows: losses per client for training, outcomes per row for scoring.

    A task whose mean losses are not over rows also has ``loss_terms``, one that needs some places' logits only has
    ``needed_places``; see the functions of these names.
    """

    kind: ClassVar[TaskKind]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]

    def losses(self, logits: Tensor, batch: Batch) -> Float[Tensor, " client"]:
        """Every client's mean loss over its own rows (tokens, for language models); filler rows count nothing."""
        ...

    def row_losses(self, logits: Tensor, batch: Batch) -> Float[Tensor, " client*row"]:
        """The loss of every row alone (per token, for language models)."""
        ...

    def outcomes(self, logits: Tensor, batch: Batch) -> Float[Tensor, "client*row number"]:
        """Numbers per row from which ``score`` and further metrics follow: of classes and numbers (loss, prediction).

        Of targets ``labels``, ``tokens`` and ``tags`` they are what the tasks here that predict these give.
        """
        ...

    def score(self, outcomes: Float[np.ndarray, "row number"], labels: np.ndarray) -> tuple[float, float]:
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
class ImageClassification(Classification):
    """Cross-entropy of the classes of images; accuracy."""

    kind: ClassVar[TaskKind] = KINDS["image-classification"]


@dataclass(frozen=True)
class MultiLabel:
    """Binary cross-entropy, mean over labels; micro-averaged F1 of labels predicted above one half."""

    kind: ClassVar[TaskKind] = KINDS["multi-label"]
    metric: ClassVar[str] = "micro-f1"
    higher_is_better: ClassVar[bool] = True

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean binary cross-entropy per client."""
        return _weighted(self.row_losses(logits, batch), batch)

    def row_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Binary cross-entropy, mean over the labels."""
        return F.binary_cross_entropy_with_logits(logits, batch.labels.to(logits.dtype), reduction="none").mean(1)

    def outcomes_width(self, names: Sequence[str]) -> int:
        """Loss, and a prediction for each label."""
        return 1 + len(names)

    def outcomes(self, logits: Tensor, batch: Batch) -> Tensor:
        """(binary cross-entropy, then per label 1 where it is predicted)."""
        loss = self.row_losses(logits, batch)
        return torch.cat([loss[:, None], (logits > 0).to(loss.dtype)], dim=1)

    def score(self, outcomes: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
        """(micro-averaged F1 of the labels, mean binary cross-entropy)."""
        return pooled_f1(counts_of_labels(outcomes, labels)), float(outcomes[:, 0].mean())


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


class TokenLosses(ABC):
    """Cross-entropy of tokens, for tasks that learn something of each token: means are over tokens, not rows."""

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy over each client's own tokens, 0 of none; those of a row count as the row does."""
        loss, tokens = self._sums(logits, batch)
        real = self._real(batch, loss.dtype)
        counted = self._counted(tokens, real)
        return (loss.view_as(real) * real).sum(1) / torch.where(counted > 0, counted, 1)

    def loss_terms(self, batch: Batch) -> Float[Tensor, " client"]:
        """The tokens over which ``losses`` takes its means."""
        real = self._real(batch, batch.weights.dtype)
        return self._counted((self.targets(batch) != UNLEARNED).to(real.dtype).sum(1), real)

    def row_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy per token; 0 for a row of one token, of which none is predicted."""
        loss, tokens = self._sums(logits, batch)
        return loss / tokens.clamp_min(1)

    @abstractmethod
    def targets(self, batch: Batch) -> Int[Tensor, "row token"]:
        """What is to be predicted: UNLEARNED where it does not count."""

    def predicting(self, batch: Batch) -> Bool[Tensor, "row token"]:
        """The places of the inputs that predict what counts, in the order of the targets."""
        return self.targets(batch) != UNLEARNED

    def _sums(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Per row, the summed cross-entropy and the number of tokens of which something is learned."""
        logits, targets, learned = self._learned(logits, batch)
        each = F.cross_entropy(logits, targets, reduction="none")
        return _sums_by_row(each, learned), learned.sum(1).to(logits.dtype)

    def _scored(self, logits: Tensor, batch: Batch) -> Float[Tensor, "row 3"]:
        """Per row the summed cross-entropy, the number of learned tokens, and how many are predicted right."""
        logits, targets, learned = self._learned(logits, batch)
        loss, tokens = self._sums(logits, batch)
        right = (logits.argmax(-1) == targets).to(loss.dtype)
        return torch.stack([loss, tokens, _sums_by_row(right, learned)], dim=1)

    def _learned(
        self, logits: Tensor, batch: Batch
    ) -> tuple[Float[Tensor, "place label"], Int[Tensor, " place"], Bool[Tensor, "row token"]]:
        """The logits and targets of the places of which something is learned, and which these are of ``targets``.

        ``logits``: of all places, or of those that predict alone.
        """
        targets = self.targets(batch)
        learned = targets != UNLEARNED
        return logits if logits.ndim == 2 else logits[self.predicting(batch)], targets[learned], learned

    @staticmethod
    def _real(batch: Batch, dtype: torch.dtype) -> Float[Tensor, "client row"]:
        return (batch.weights / batch.weights.amax(1, keepdim=True)).to(dtype)  # 1, or by a loss rule less

    @staticmethod
    def _counted(tokens: Tensor, real: Tensor) -> Float[Tensor, " client"]:
        return (tokens.view_as(real) * real).sum(1)


def mean_of_tokens(outcomes: Float[np.ndarray, "row number"]) -> float:
    """Mean loss per token, from the summed loss and the number of tokens of each row."""
    return float(outcomes[:, 0].sum() / outcomes[:, 1].sum())


def _sums_by_row(each: Float[Tensor, " place"], places: Bool[Tensor, "row token"]) -> Float[Tensor, " row"]:
    """The sum over each row of a number of its places, which come one row after another."""
    return torch.zeros(places.shape, dtype=each.dtype, device=each.device).masked_scatter(places, each).sum(1)


class WrittenTokens(TokenLosses):
    """Cross-entropy of the tokens of texts; the metric is the mean loss per token (lower is better)."""

    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False

    def needed_places(self, batch: Batch) -> Bool[Tensor, "row token"]:
        """See the function of this name."""
        return self.predicting(batch)

    def outcomes(self, logits: Tensor, batch: Batch) -> Tensor:
        """(summed cross-entropy, numbers of predicted tokens and of those predicted right)."""
        return self._scored(logits, batch)

    def outcomes_width(self, names: Sequence[str]) -> int:
        """Loss, tokens, right ones."""
        return 3

    def score(self, outcomes: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
        """Mean loss per token, twice: it is the metric and the loss."""
        loss = mean_of_tokens(outcomes)
        return loss, loss


@dataclass(frozen=True)
class CausalLM(WrittenTokens):
    """Next-token cross-entropy."""

    kind: ClassVar[TaskKind] = KINDS["causal-lm"]

    def targets(self, batch: Batch) -> Int[Tensor, "row token"]:
        """The tokens behind all places but the last."""
        if batch.targets is not None:
            return batch.targets[:, 1:]
        padding = batch.inputs["attention_mask"][:, 1:] == 0
        return batch.inputs["input_ids"][:, 1:].masked_fill(padding, UNLEARNED)

    def predicting(self, batch: Batch) -> Tensor:
        """Each place predicts the token behind it; the last one has none."""
        return F.pad(super().predicting(batch), (0, 1))


@dataclass(frozen=True)
class Chat(CausalLM):
    """Next-token cross-entropy of the tokens that are learned: those of answers, with the end of each turn."""

    kind: ClassVar[TaskKind] = KINDS["chat"]


@dataclass(frozen=True)
class SequenceToSequence(WrittenTokens):
    """Cross-entropy of the tokens that a decoder writes for what its encoder has read."""

    kind: ClassVar[TaskKind] = KINDS["sequence-to-sequence"]

    def targets(self, batch: Batch) -> Int[Tensor, "row token"]:
        """The tokens of the answers; the decoder's inputs are the same, one place to the right."""
        assert batch.targets is not None
        return batch.targets


@dataclass(frozen=True)
class TokenClassification(TokenLosses):
    """Cross-entropy of the tags of words; micro-averaged F1 of entities."""

    kind: ClassVar[TaskKind] = KINDS["token-classification"]
    metric: ClassVar[str] = "entity-f1"
    higher_is_better: ClassVar[bool] = True

    def targets(self, batch: Batch) -> Int[Tensor, "row token"]:
        """The tags, which stand on the first tokens of words."""
        assert batch.targets is not None
        return batch.targets

    def outcomes_width(self, names: Sequence[str]) -> int:
        """Loss, words, right ones, and the numbers of entities by type (``ENTITY_COUNTS``)."""
        return 3 + ENTITY_COUNTS * len(entity_types(tuple(names)))

    def outcomes(self, logits: Tensor, batch: Batch) -> Tensor:
        """(summed cross-entropy, numbers of words and right ones, then per type of entity: true, predicted, both)."""
        assert batch.targets is not None and batch.origin is not None
        known = (batch.targets != UNLEARNED).cpu().numpy()
        true, predicted = batch.targets.cpu().numpy(), logits.argmax(-1).cpu().numpy()
        names = batch.origin.data.names
        counts = [count_entities(true[row][own], predicted[row][own], names) for row, own in enumerate(known)]
        of_words = self._scored(logits, batch)
        return torch.cat([of_words, torch.from_numpy(np.stack(counts)).to(of_words)], dim=1)

    def score(self, outcomes: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
        """(micro-averaged F1 of entities, mean cross-entropy per word)."""
        return pooled_f1(counts_of_entities(outcomes)), mean_of_tokens(outcomes)


def outcomes_width(task: Task, data: Dataset) -> int:
    """How many numbers ``outcomes`` gives per row of these data: 2, unless a task has a method of this name."""
    own = getattr(task, "outcomes_width", None)
    return 2 if own is None else own(data.names)


def names_of_counts(target: Target, names: Sequence[str]) -> Sequence[str]:
    """What ``metrics.counts_by_name`` counts: labels, or the types of entities that tags make."""
    return entity_types(tuple(names)) if target == "tags" else names


def loss_terms(task: Task, batch: Batch) -> Float[Tensor, " client"]:
    """How many terms each client's mean loss has: where they differ between minibatches, a task counts them itself.

    A task may have the method ``loss_terms``; of others every minibatch counts the same, having equally many rows.
    """
    count = getattr(task, "loss_terms", None)
    return batch.weights.new_ones(len(batch.weights)) if count is None else count(batch)


def needed_places(task: Task, batch: Batch) -> Bool[Tensor, "row token"] | None:
    """The places whose logits ``losses`` and ``outcomes`` need; None: all.

    A task of tokens may have the method ``needed_places``; its ``logits`` may then be those of these places alone, as
    [place, word], one row after another.
    """
    find = getattr(task, "needed_places", None)
    return None if find is None else find(batch)


def _weighted(row_losses: Tensor, batch: Batch) -> Float[Tensor, " client"]:
    return (row_losses.view_as(batch.weights) * batch.weights).sum(1)


def task(kind: str) -> Task:
    """The Task of this ``task.kind``."""
    return resolve_name(task_kind(kind).task)()
