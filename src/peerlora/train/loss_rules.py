"""Changes between the logits of a training step and its losses.  Evaluation never sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from peerlora.data.batches import Batch, Shards
from peerlora.train.local_rules import ClientRows


class LossRule(Protocol):
    """Changes logits, or how much each row counts, for the clients of one graph."""

    def __call__(self, logits: Tensor, batch: Batch, clients: ClientRows) -> tuple[Tensor, Batch]:
        """The logits [client*row, ...] and the batch that the task's loss is computed from.

        ``clients``: the clients, by their rows on the client axis, that the batch belongs to.
        """
        ...

    def agree(self, sum_of: Callable[[Tensor], Tensor]) -> None:
        """Learn before round 0 what the rule needs of others; ``sum_of`` sums a [client, ...] tensor over all."""
        ...


def weigh_rows(batch: Batch, row_weights: Float[Tensor, "client row"], shards: Shards, clients: ClientRows) -> Batch:
    """The batch whose rows count in proportion to ``row_weights``, each client's together as much as before.

    ``row_weights`` has a column per place in a shard; ``clients`` are the rows of the batch's clients.
    """
    assert batch.origin is not None
    numbers = batch.origin.numbers.reshape(len(clients), -1)
    places = [np.searchsorted(shards.shards[i], own) for i, own in zip(clients, numbers, strict=True)]
    v = torch.stack([row_weights[i, torch.from_numpy(own)] for i, own in zip(clients, places, strict=True)])
    return replace(batch, weights=F.normalize(batch.weights * v.to(batch.weights), p=1.0, dim=1))


class ClassWeights:
    """Multiplies the loss of every row by the weight of its class, scaled so that a client's rows weigh 1 on average.

    Over all of a client's rows that is the loss of torch's ``CrossEntropyLoss(weight)``.  A minibatch is not divided by
    the weights of the rows that it happens to hold, so its expectation is that loss, whatever its size.  With "pooled"
    weights, which a class has in common at all clients, it is the rows of all clients that weigh 1 on average: the mean
    of the clients' losses, each by its rows, is the balanced loss of all rows in one place.
    ``counts``: each client's rows by label; ``weights``: one number per label, "balanced" or "pooled".
    """

    def __init__(
        self, counts: Int[np.ndarray, "client label"], weights: Literal["balanced", "pooled"] | Sequence[float]
    ):
        self.counts = own = torch.from_numpy(counts).double()
        self.weights: Float[Tensor, "client label"] | None = None
        if weights != "pooled":
            given = balanced_weights(own) if weights == "balanced" else torch.tensor(weights, dtype=torch.float64)
            self.weights = given * own.sum(1, keepdim=True) / (given * own).sum(1, keepdim=True)

    def agree(self, sum_of: Callable[[Tensor], Tensor]) -> None:
        """Before round 0, for pooled weights; ``sum_of`` adds up a [client, ...] tensor over the whole network."""
        if self.weights is None:
            self.weights = balanced_weights(sum_of(self.counts))

    def __call__(self, logits: Tensor, batch: Batch, clients: ClientRows) -> tuple[Tensor, Batch]:
        """Each client's weights on each of its rows."""
        assert self.weights is not None, "agree() comes first"
        labels = batch.labels.view(len(clients), -1)
        of_rows = self.weights[clients].to(batch.weights).gather(1, labels)
        return logits, replace(batch, weights=batch.weights * of_rows)


def balanced_weights(counts: Float[Tensor, "client label"]) -> Float[Tensor, "client label"]:
    """``n / (k n_c)``: of n rows with k classes n_c have class c; 0 for a class without rows.

    Source: King and Zeng 2001, Logistic regression in rare events data; scikit-learn's ``class_weight="balanced"``.
    """
    present = (counts > 0).sum(1, keepdim=True)
    return torch.where(counts > 0, counts.sum(1, keepdim=True) / (present * counts), 0.0)


SMOOTHING = 1.0  # rows per class that every client counts beside its own


class LabelPrior:
    """Adds ``log(own label share) - log(target share)`` to training logits.

    The loss is then the one that clients would have if all held labels in the target's proportions: what a client
    learns of its own proportions goes into the offsets instead of the model.

    Source: Menon et al. 2021, arXiv 2007.07314 (logit adjustment); Ren et al. 2020, arXiv 2007.10740 (balanced
    softmax); per client: FedLC, Zhang et al. 2022, arXiv 2209.00189.
    Differs (ours): a target other than uniform; the smoothing in ``offsets``.
    """

    def __init__(self, counts: Int[np.ndarray, "client label"], target: Literal["uniform", "pooled"]):
        self.counts = torch.from_numpy(counts).double()
        self.target = target
        self._offsets = offsets(self.counts, torch.ones_like(self.counts)) if target == "uniform" else None

    def agree(self, sum_of: Callable[[Tensor], Tensor]) -> None:
        """Before round 0; ``sum_of`` adds up a [client, ...] tensor over the whole network."""
        if self.target == "pooled":
            self._offsets = offsets(self.counts, sum_of(self.counts))

    def __call__(self, logits: Tensor, batch: Batch, clients: ClientRows) -> tuple[Tensor, Batch]:
        """Each client's offsets on each of its rows."""
        assert self._offsets is not None, "agree() comes first"
        own = self._offsets[clients].to(logits)
        return (logits.view(len(own), -1, own.shape[1]) + own[:, None]).view_as(logits), batch


def offsets(own: Float[Tensor, "client label"], target: Float[Tensor, "client label"]) -> Float[Tensor, "client label"]:
    """``log(own share) - log(target share)`` from counts of rows; zero where both have the same proportions.

    Every client counts ``SMOOTHING`` more rows per class, dealt in the target's proportions, so that a class it lacks
    gets a finite offset: about ``-log(rows / classes)``, with which the loss hardly pushes that class down.
    """
    extra = SMOOTHING * own.shape[1]
    share = target / target.sum(1, keepdim=True)
    ratio = torch.where(own > 0, own / share, 0.0)  # a class that nobody has is one more that this client lacks
    return ((ratio + extra) / (own.sum(1, keepdim=True) + extra)).log()
