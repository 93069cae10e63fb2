"""Local rules change the gradient that the optimiser sees.  A rule never owns a training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from peerlora.train.optim import norms

_SMALLEST = 1e-12  # norm of a gradient that still gives a direction

Gradients = dict[str, Float[Tensor, "client column"]]
"""By active block, in the order of the flat buffer."""
ClientRows = list[int]
"""Rows of the leading client axis; indexing a tensor with them copies."""


@dataclass(frozen=True)
class LocalStep:
    """One local step of some clients, on one minibatch of each."""

    x: Float[Tensor, "client parameter"]
    """Their parameters now: the rows that the optimiser will change."""
    start: Float[Tensor, "client parameter"]
    """Their parameters at the start of the round."""
    active: Mapping[str, slice]
    """The blocks that train, and their columns."""
    clients: ClientRows
    """Their rows among the clients held here: those of a rule's own state."""
    closure: Callable[[], Gradients]
    """Gradients of the minibatch at ``x`` as it is now; the same minibatch and the same dropout at every call."""

    def gradient(self) -> Gradients:
        """The gradient at ``x``."""
        return self.closure()

    def gradient_at(self, shift: Gradients) -> Gradients:
        """The gradient at ``x + shift``; restores ``x`` to the bit."""
        before = {block: self.x[:, columns].clone() for block, columns in self.active.items()}
        for block, columns in self.active.items():
            self.x[:, columns].add_(shift[block])
        found = self.closure()
        for block, columns in self.active.items():
            self.x[:, columns].copy_(before[block])
        return found


@runtime_checkable
class LocalRule(Protocol):
    """Turns the gradient of every local step into the one that clipping and the optimiser see."""

    def gradient(self, step: LocalStep) -> Gradients:
        """The corrected gradients of the active blocks, as tensors that the caller may change."""
        ...


def gathers_steps(rule: LocalRule | None) -> bool:
    """Whether a rule, or one inside it, keeps something of a round's earlier steps, which no checkpoint has."""
    return rule is not None and (getattr(rule, "gathers", False) or gathers_steps(getattr(rule, "rule", None)))


Oracle = Callable[[LocalStep], Gradients]
"""Source of the gradient that a rule corrects."""


def plain(step: LocalStep) -> Gradients:
    """The minibatch's gradient."""
    return step.gradient()


@dataclass(frozen=True)
class Ascent:
    """``(1 - alpha) g1 + alpha g2``, with ``g2`` the same minibatch's gradient at ``x + rho g1 / |g1|``.

    alpha = 1 is SAM's gradient.  ``|g1|`` runs over the active blocks of a client, so only these are shifted.
    """

    rho: float
    alpha: float = 1.0

    def __call__(self, step: LocalStep) -> Gradients:
        """Two gradients, or one where the second would not count."""
        first = step.gradient()
        if self.rho == 0 or self.alpha == 0:
            return first
        size = (self.rho / norms(first).clamp_min(_SMALLEST))[:, None]
        second = step.gradient_at({block: size * g for block, g in first.items()})
        return {block: g.lerp(second[block], self.alpha) for block, g in first.items()}


@dataclass(frozen=True)
class DualProx:
    """``oracle's gradient + offset + pull (x - start)``.

    The terms join the gradient, not the weight decay, which AdamW would keep out of its moments.
    """

    offset: Float[Tensor, "client parameter"] | None = None
    """A dual or a correction, held by the clients here; read in active blocks only."""
    pull: float | Float[Tensor, "client 1"] = 0.0
    """Strength of the pull towards the start of the round."""
    oracle: Oracle = plain

    def gradient(self, step: LocalStep) -> Gradients:
        """The corrected gradient."""
        pull = self.pull[step.clients] if isinstance(self.pull, Tensor) else self.pull
        found = self.oracle(step)
        for block, columns in step.active.items():
            if self.offset is not None:
                found[block].add_(rows_of(self.offset[:, columns], step.clients))
            if isinstance(pull, Tensor) or pull:
                found[block].add_((step.x[:, columns] - step.start[:, columns]).mul_(pull))
        return found


def rows_of(values: Float[Tensor, "client column"], clients: ClientRows) -> Float[Tensor, "row column"]:
    """These clients' rows, to be read only: a view where they follow one another, which saves a copy in every step."""
    first, last = clients[0], clients[-1]
    if clients == list(range(first, last + 1)):
        return values[first : last + 1]
    return values[clients]


class Recorded:
    """A rule that also averages its gradients over all local steps of a ``fit``: before clipping and the optimiser.

    ``mean`` is zero in blocks that did not train.
    """

    gathers = True
    """See ``gathers_steps``."""

    def __init__(self, rule: LocalRule, like: Float[Tensor, "client parameter"]):
        self.rule = rule
        self._sum, self._steps = torch.zeros_like(like), torch.zeros(len(like), 1, dtype=like.dtype, device=like.device)

    def gradient(self, step: LocalStep) -> Gradients:
        """The rule's gradient."""
        found = self.rule.gradient(step)
        for block, columns in step.active.items():
            self._sum[step.clients, columns] += found[block]
        self._steps[step.clients] += 1
        return found

    @property
    def mean(self) -> Float[Tensor, "client parameter"]:
        """The mean corrected gradient of the steps so far."""
        return self._sum / self._steps.clamp_min(1)


@dataclass(frozen=True)
class Masked:
    """A rule that trains only some coordinates of each client; the others stay as they were at the start."""

    free: Bool[Tensor, "client parameter"]

    def gradient(self, step: LocalStep) -> Gradients:
        """Zero elsewhere; weight decay, which is not part of a gradient, is undone there."""
        free = self.free[step.clients]
        step.x.copy_(torch.where(free, step.x, step.start))
        return {block: gradient * free[:, step.active[block]] for block, gradient in step.gradient().items()}
