"""Local rules: what an optimiser is given in place of the plain gradient.  A rule never owns a training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Gradients = dict[str, Float[Tensor, "client column"]]
"""By active block, in the order of the flat buffer."""


@dataclass(frozen=True)
class LocalStep:
    """One local step of some clients, on one minibatch of each."""

    x: Float[Tensor, "client parameter"]
    """Where they are: the rows that the optimiser will change."""
    start: Float[Tensor, "client parameter"]
    """Where they were when the round began."""
    active: Mapping[str, slice]
    """The blocks that train, and their columns."""
    clients: slice
    """Which of the clients held here they are: the rows of a rule's own state."""
    here: Callable[[], Gradients]
    """Gradients of the minibatch at ``x`` as it is now; the same minibatch and the same dropout at every call."""

    def gradient(self) -> Gradients:
        """At ``x``."""
        return self.here()

    def gradient_at(self, shift: Gradients) -> Gradients:
        """At ``x + shift``; ``x`` is afterwards what it was, to the bit."""
        before = {block: self.x[:, columns].clone() for block, columns in self.active.items()}
        for block, columns in self.active.items():
            self.x[:, columns].add_(shift[block])
        found = self.here()
        for block, columns in self.active.items():
            self.x[:, columns].copy_(before[block])
        return found


@runtime_checkable
class Rule(Protocol):
    """Turns the gradient of every local step into the one that clipping and the optimiser see."""

    def gradient(self, step: LocalStep) -> Gradients:
        """The corrected gradients of the active blocks, as tensors that the caller may change."""
        ...


class Recorded:
    """A rule whose mean over all local steps of a ``fit`` is kept: raw, before clipping and the optimiser.

    ``mean`` is zero in blocks that did not train.
    """

    def __init__(self, rule: Rule, like: Float[Tensor, "client parameter"]):
        self.rule = rule
        self._sum, self._steps = torch.zeros_like(like), torch.zeros(len(like), 1, dtype=like.dtype, device=like.device)

    def gradient(self, step: LocalStep) -> Gradients:
        """What the rule makes of it."""
        found = self.rule.gradient(step)
        for block, columns in step.active.items():
            self._sum[step.clients, columns] += found[block]
        self._steps[step.clients] += 1
        return found

    @property
    def mean(self) -> Float[Tensor, "client parameter"]:
        """The mean corrected gradient of the steps so far."""
        return self._sum / self._steps.clamp_min(1)
