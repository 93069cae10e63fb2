"""The fast forward of BERT- and RoBERTa-type classifiers on a CPU: no work on padding, and of rows that are classified,
in the last block only that for the token that is pooled.

Exact: in fp32 it differs from the padded forward by rounding only.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from peerlora.data.batches import Origin
from peerlora.lora.attach import StackedModel
from peerlora.lora.layer import ClientDropout, StackedLinear
from peerlora.train.kernels.attention import attend
from peerlora.train.kernels.frozen_linear import FrozenLinear
from peerlora.train.kernels.lora_linear import adapted_linear, keep
from peerlora.train.kernels.packing import TokenPacking, TokenPositions
from peerlora.train.kernels.prefix_cache import HiddenStates, PrefixCache

_OF_TOKENS = "ForTokenClassification"
_CLASSES = tuple(
    f"{name}{task}"
    for name in ("Bert", "Roberta", "XLMRoberta", "Camembert")
    for task in ("ForSequenceClassification", _OF_TOKENS)
)


def encoder_unavailable(base: nn.Module, device: str) -> str | None:
    """Why a model cannot use this forward, or None."""
    kind, config = type(base).__name__, getattr(base, "config", None)
    if device != "cpu":
        return "packed tokens are for CPUs"
    if kind not in _CLASSES:
        return f"packed tokens are for BERT- and RoBERTa-type classifiers, the model is a {kind}"
    body = getattr(base, base.base_model_prefix)  # pyright: ignore[reportArgumentType,reportCallIssue]
    others = [each for each in body.modules() if isinstance(each, nn.Linear)]  # those that can be frozen, are
    if others:
        return f"packed tokens need plain linear layers, the model has {type(others[0]).__name__} there"
    if getattr(config, "is_decoder", False) or getattr(config, "position_embedding_type", "absolute") != "absolute":
        return "packed tokens need a bidirectional encoder with absolute positions"
    return None


class PackedEncoder:
    """Logits of client-major rows, as ``StackedModel`` gives them; all its linears must be frozen ones."""

    def __init__(self, model: StackedModel, shared: HiddenStates | None = None):
        self.base: Any = model.base
        self.step, self.inputs_read = model.step, model.inputs_read
        encoder = getattr(self.base, self.base.base_model_prefix)
        self.embeddings, self.layers = encoder.embeddings, list(encoder.encoder.layer)
        self.pooler = encoder.pooler  # RoBERTa's is part of its head
        self.of_tokens = type(self.base).__name__.endswith(_OF_TOKENS)
        self.heads = self.base.config.num_attention_heads
        adapted = [any(isinstance(m, StackedLinear) for m in layer.modules()) for layer in self.layers[:-1]]
        self.lowest = [*adapted, True].index(True)
        """Blocks below this one are the same for all clients, always."""
        self.prefix: PrefixCache | None = None
        if self.prefix_unavailable() is None:
            weight = next(iter(encoder.parameters()))
            self.prefix = PrefixCache(self._below, self.base.config.hidden_size * weight.dtype.itemsize, shared)

    def prefix_unavailable(self) -> str | None:
        """Why the blocks below the lowest adapted one are not cached, or None."""
        if self.lowest == 0:
            return "the lowest block is adapted"
        if any(isinstance(module, ClientDropout) for module in self.base.modules()):
            return "model.dropout draws anew in the frozen blocks"
        return None

    def __call__(self, inputs: dict[str, Tensor], origin: Origin | None = None) -> Float[Tensor, "row *token label"]:
        """One forward; ``inputs`` are padded on the right, ``origin`` says which rows they are."""
        packing = TokenPacking.of(inputs["attention_mask"], self.step.clients)
        if self.prefix is not None and origin is not None and self.prefix.holds(origin.data):
            x = self.prefix(origin)
        else:
            x = self._below(inputs)
        for layer in self.layers[self.lowest : -1]:
            x = self._block(layer, x, x, packing, packing.tokens)
        if self.of_tokens:
            x = self._block(self.layers[-1], x, x, packing, packing.tokens)
            padded = x.new_zeros(inputs["attention_mask"].numel(), x.shape[1]).index_copy(0, packing.tokens.padded, x)
            return self.base.classifier(self.base.dropout(padded.view(*inputs["attention_mask"].shape, -1)))
        x = self._block(self.layers[-1], x.index_select(0, packing.first), x, packing, packing.pooled)
        return self._head(x[:, None])

    def _below(self, inputs: dict[str, Tensor]) -> Float[Tensor, "token width"]:
        """Embeddings and the blocks below the lowest adapted one."""
        packing = TokenPacking.of(inputs["attention_mask"], 1)
        own = self.inputs_read(inputs)  # the cache has all that rows hold
        x = (
            self.embeddings(**{name: value for name, value in own.items() if name != "attention_mask"})
            .flatten(0, 1)
            .index_select(0, packing.tokens.padded)
        )
        for layer in self.layers[: self.lowest]:
            x = self._block(layer, x, x, packing, packing.tokens)
        return x

    def _block(
        self,
        layer: Any,
        q: Float[Tensor, "query width"],
        x: Float[Tensor, "token width"],
        packing: TokenPacking,
        positions: TokenPositions,
    ) -> Float[Tensor, "query width"]:
        """One transformer block for the tokens at ``positions``, whose vectors are ``q``; they attend to all ``x``."""
        own, attention = layer.attention.self, layer.attention
        c = attend(
            self._linear(own.query, q, packing, positions),
            self._linear(own.key, x, packing, packing.tokens),
            self._linear(own.value, x, packing, packing.tokens),
            packing,
            self.heads,
        )
        y = attention.output.LayerNorm(self._residual(attention.output, c, q, packing, positions))
        z = layer.intermediate.intermediate_act_fn(self._linear(layer.intermediate.dense, y, packing, positions))
        return layer.output.LayerNorm(self._residual(layer.output, z, y, packing, positions))

    def _residual(
        self, output: Any, x: Tensor, plus: Tensor, packing: TokenPacking, positions: TokenPositions
    ) -> Tensor:
        """``dropout(dense(x)) + plus``, in one pass where nothing is dropped."""
        p = output.dropout.p if isinstance(output.dropout, ClientDropout) else 0.0
        if p == 0.0 or self.step.streams is None:
            return self._linear(output.dense, x, packing, positions, plus)
        y = self._linear(output.dense, x, packing, positions)
        kept = keep(self.step, p, y, packing, positions)
        return plus + (y if kept is None else y * kept)

    def _linear(
        self, linear: nn.Module, x: Tensor, packing: TokenPacking, positions: TokenPositions, plus: Tensor | None = None
    ) -> Tensor:
        if isinstance(linear, StackedLinear):
            return adapted_linear(linear, x, packing, positions, plus)
        assert isinstance(linear, FrozenLinear)
        return linear(x, plus)

    def _head(self, x: Float[Tensor, "row 1 width"]) -> Tensor:
        if self.pooler is None:
            return self.base.classifier(x)
        return self.base.classifier(self.base.dropout(self.pooler(x)))
