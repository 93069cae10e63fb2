"""Choice of the places whose words a language model is asked for, ahead of the layer that computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from peerlora.lora.layer import StackedHead, StackedLinear, Step


class WordPlaces:
    """Lets the layer that gives a language model's words see some places only, until ``close``.

    That layer is the largest of most models, and its logits are most of what a step holds in memory.  Where it trains
    or is adapted for each client, which needs equally many places of each, it sees all.
    """

    def __init__(self, base: nn.Module, step: Step):
        self.step = step
        self.chosen = False
        """Whether the latest forward pass gave the logits of some places alone."""
        words = layer_of_words(base)
        words = None if isinstance(words, StackedHead | StackedLinear) else words
        self._hook = None if words is None else words.register_forward_pre_hook(self._choose)
        self._places: Bool[Tensor, "row token"] | None = None

    def logits(
        self, forward: Callable[[], Tensor], places: Bool[Tensor, "row token"] | None
    ) -> Float[Tensor, "row *token word"] | Float[Tensor, "place word"]:
        """The logits of a forward pass; of ``places`` alone, where some are given and can be chosen."""
        self._places, self.chosen = places, False
        try:
            found = forward()
        finally:
            self._places = None
        return found.flatten(0, 1) if self.chosen else found

    def close(self) -> None:
        """Let the layer see all places again."""
        if self._hook is not None:
            self._hook.remove()

    def _choose(self, words: nn.Module, inputs: Sequence[Any]) -> tuple[Any, ...] | None:
        hidden, *others = inputs
        places = self._among_packed(self._places)
        if places is None or hidden.shape[:-1] != places.shape:
            return None
        self.chosen = True
        return (hidden[places][None], *others)

    def _among_packed(self, places: Bool[Tensor, "row token"] | None) -> Tensor | None:
        """The same places where padding is left out; None where some of them are padding, which gets no logits."""
        if places is None or self.step.packed is None:
            return places
        packed = places.flatten()[self.step.packed.padded][None]
        return packed if packed.sum() == places.sum() else None


def layer_of_words(base: nn.Module) -> nn.Module | None:
    """The layer from hidden states to words; None of models without one, as classifiers."""
    return getattr(base, "get_output_embeddings", lambda: None)()
