"""Clipped sums of row gradients in one local step, and the noise that hides each row among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.errors import CompositionError
from peerlora.lora.adapters import Adapters
from peerlora.lora.row_gradients import RowGradients
from peerlora.train.closure import Closure, flat_gradients
from peerlora.train.local_rules import Gradients
from peerlora.train.privacy import PrivateStep, PrivateTraining, clip_factor

RowMinibatch = Callable[[], tuple[Tensor, RowGradients]]
"""Computes the losses [client, row] of one minibatch, zero for filler, and where their backward leaves gradients."""


class PrivateClosure(Closure):
    """Sums of clipped row gradients over a local step's minibatches, once.

    ``clip``: the largest norm of a row's gradient, over all ``trained``; ``expected``: rows of a step, on average.
    """

    def __init__(
        self,
        minibatches: Sequence[RowMinibatch],
        trained: Sequence[Tensor],
        clip: float,
        expected: Float[Tensor, " client"],
    ):
        super().__init__((), trained, (), repeats=False)
        self._rows, self.clip, self.expected = minibatches, clip, expected

    def gradients(self) -> Sequence[Tensor]:
        """One sum per trained view and client; the losses are means over the expected number of rows.

        Raises CompositionError when it is asked for twice.
        """
        if self.losses is not None:
            raise CompositionError(
                "a local rule asks for a second gradient of a minibatch, which would need noise of its own; use a "
                "method with one gradient a step, such as algorithm.name=dec-lora, or drop privacy"
            )
        losses, sums = torch.zeros_like(self.expected), [torch.zeros_like(each) for each in self.trained]
        for minibatch in self._rows:
            of_rows, found = minibatch()
            torch.autograd.grad(of_rows.sum(), self.trained, allow_unused=True)
            factors = clip_factor(found.squared_norms().sqrt(), self.clip).view(of_rows.shape)
            for total, own in zip(sums, found.weighted_sums(factors, self.trained), strict=True):
                total.add_(own)
            losses += of_rows.detach().sum(1).to(losses)
        self.losses = losses / self.expected
        return sums


def noisy_gradients(privacy: PrivateTraining, x: Adapters, closure: PrivateClosure, at: PrivateStep) -> Gradients:
    """The gradients of each active part, differentially private for every row that was sampled or not."""
    return privacy.add_gradient_noise(x, flat_gradients(x, closure, at.active), at)
