"""Losses and gradients of one local step: of one minibatch, or accumulated over several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.lora.adapters import Adapters, Slot
from peerlora.train.local_rules import Gradients

Minibatch = Callable[[], tuple[Tensor, Tensor]]
"""Computes the losses of one minibatch, with their graph, and of how many terms each is the mean; both [client]."""


class Closure:
    """Losses and gradients of a local step's minibatches, as often as a rule asks: with the same dropout every time.

    ``streams``: each client's draws of dropout; ``repeats``: whether a rule may ask more than once.
    """

    def __init__(
        self,
        minibatches: Sequence[Minibatch],
        trained: Sequence[Tensor],
        streams: Sequence[torch.Generator],
        repeats: bool,
    ):
        self._minibatches, self.trained = minibatches, trained
        self.losses: Float[Tensor, " client"] | None = None
        """Of the first evaluation."""
        self._streams = streams
        self._dropout = [stream.get_state() for stream in self._streams] if repeats else []

    def gradients(self) -> Sequence[Tensor]:
        """One per trained view, at the values that these have now."""
        if self.losses is not None:
            for stream, state in zip(self._streams, self._dropout, strict=True):
                stream.set_state(state)
        losses, found = self._single() if len(self._minibatches) == 1 else self._accumulated()
        if self.losses is None:
            self.losses = losses.detach()
        return found

    def _single(self) -> tuple[Tensor, Sequence[Tensor]]:
        losses, _ = self._minibatches[0]()
        return losses, _differentiate(losses, self.trained)

    def _accumulated(self) -> tuple[Tensor, Sequence[Tensor]]:
        """The means over the terms of all minibatches together, which share no graph."""
        sums = terms = found = None
        for minibatch in self._minibatches:
            losses, count = minibatch()
            gradients = _differentiate(losses * count, self.trained)
            if sums is None or terms is None or found is None:
                sums, terms, found = (losses * count).detach(), count, gradients
                continue
            sums, terms = sums + (losses * count).detach(), terms + count
            found = [total.add_(more) for total, more in zip(found, gradients, strict=True)]
        assert sums is not None and terms is not None and found is not None
        return sums / terms, [each.div_(terms.view(-1, *[1] * (each.ndim - 1))) for each in found]


def _differentiate(losses: Float[Tensor, " client"], trained: Sequence[Tensor]) -> Sequence[Tensor]:
    # No two clients share a parameter.  A layer may be left out of one step, such as an expert nobody was sent to.
    return torch.autograd.grad(losses.sum(), trained, allow_unused=True, materialize_grads=True)


def flat_gradients(x: Adapters, closure: Closure, active: Mapping[str, slice]) -> Gradients:
    """The gradients of each active part as [client, its columns], in the order of the flat buffer."""
    left = iter(closure.gradients())
    found: dict[str, list[Tensor]] = {name: [] for name in active}
    for slot in x.spec.slots:
        name = active_part(slot, active)
        if name is not None:
            found[name].append(next(left).flatten(1))
    return {name: torch.cat(own, dim=1) for name, own in found.items()}


def active_part(slot: Slot, active: Mapping[str, slice]) -> str | None:
    """The active part that a slot lies in."""
    return next((name for name, own in active.items() if own.start <= slot.start and slot.stop <= own.stop), None)


def autograd_views(x: Adapters, active: Mapping[str, slice]) -> list[Tensor]:
    """One autograd leaf per slot, each a view into the flat buffer; only those of active parts ask for gradients."""
    views = [x.spec.view(slot, x.flat).detach() for slot in x.spec.slots]
    return [
        view.requires_grad_(active_part(slot, active) is not None)
        for slot, view in zip(x.spec.slots, views, strict=True)
    ]
