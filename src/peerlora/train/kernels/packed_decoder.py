"""The forward of decoders without padding: the model's own layers on the real tokens of all rows, one after another.

What runs is the model's own code, with the places of the tokens and an attention that keeps rows apart, so it differs
from its own forward on padded rows by rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from peerlora.lora.attach import StackedModel
from peerlora.lora.layer import ClientDropout, PackedPass, StackedLinear
from peerlora.train.kernels.attention import attend, attend_long
from peerlora.train.kernels.frozen_linear import FrozenLinear
from peerlora.train.kernels.lora_linear import adapted_linear
from peerlora.train.kernels.packing import TokenPacking

_FAMILIES = ("Gemma", "Granite", "Llama", "Mistral", "Olmo2", "Phi3", "Qwen2", "Qwen3", "SmolLM3")
_SHORT = 256  # tokens of the longest row, up to which scores are kept for backward; their memory grows with the square
_ATTENTION = "peerlora-packed"  # by which models find this attention
_PACKING: ContextVar[TokenPacking] = ContextVar("packing")


def decoder_unavailable(model: StackedModel, device: str) -> str | None:
    """Why a model cannot use this forward, or None."""
    kind, modules = type(model.base).__name__, list(model.base.modules())
    if device != "cpu":
        return "packed tokens are for CPUs"
    if kind.removesuffix("ForCausalLM") not in _FAMILIES or not kind.endswith("ForCausalLM"):
        return f"packed tokens are for decoders of the families {', '.join(_FAMILIES)}, the model is a {kind}"
    if not model.step.layout.rows_first or model.step.layout.padding == "left":
        return "packed tokens need rows that are padded on the right and share nothing"
    if any(isinstance(module, ClientDropout) for module in modules):
        return "model.dropout draws by padded rows"
    bases = [module.base for module in modules if isinstance(module, StackedLinear)]
    if other := next((base for base in bases if not isinstance(base, FrozenLinear)), None):
        return f"packed tokens need plain linear layers, the model has {type(other).__name__} there"
    return None


class PackedDecoder:
    """Logits of client-major rows, as ``StackedModel`` gives them; its adapted layers must be frozen ones."""

    def __init__(self, model: StackedModel):
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, _attention)
        self.model, self.base = model, model.base
        self.window: int | None = getattr(model.base.config, "sliding_window", None)
        """Tokens that each attends to at most."""

    def __call__(self, inputs: dict[str, Tensor], origin: Any = None) -> Float[Tensor, "row token word"]:
        """One forward; ``inputs`` are padded on the right."""
        step, (rows, width) = self.model.step, inputs["input_ids"].shape
        if self.window is not None and width > self.window:
            return self.model.plain(inputs)
        packing = TokenPacking.of(inputs["attention_mask"], step.clients)
        padded = packing.tokens.padded
        step.packed = PackedPass(partial(_adapted, packing), padded)
        try:
            with _attending_within_rows(self.base.config, packing):
                ids = inputs["input_ids"].flatten()[padded]
                logits = self.base(input_ids=ids[None], position_ids=(padded % width)[None], use_cache=False).logits
        finally:
            step.packed = None
        if self.model.words.chosen:
            return logits
        return logits.new_zeros(rows * width, logits.shape[2]).index_copy(0, padded, logits[0]).view(rows, width, -1)


def _adapted(packing: TokenPacking, linear: StackedLinear, x: Float[Tensor, "1 token d_in"]) -> Tensor:
    return adapted_linear(linear, x[0], packing, packing.tokens)[None]


@contextmanager
def _attending_within_rows(config: Any, packing: TokenPacking) -> Iterator[None]:
    """Let models attend by ``_attention``, for which they make no mask."""
    usual, before = config._attn_implementation, _PACKING.set(packing)
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = usual
        _PACKING.reset(before)


def _attention(
    module: nn.Module,
    query: Float[Tensor, "1 head token part"],
    key: Float[Tensor, "1 shared token part"],
    value: Float[Tensor, "1 shared token part"],
    attention_mask: None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "1 token head part"], None]:
    """Causal attention in each row, as models of transformers ask for it."""
    heads, shared = query.shape[1], key.shape[1]
    q, k, v = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))
    packing = _PACKING.get()
    if packing.shape[1] <= _SHORT:
        out = attend(q, k, v, packing, heads, shared=shared, causal=True, scale=scaling)
    else:
        out = attend_long(q, k, v, packing, heads, shared, scaling)
    return out.view(1, len(out), heads, -1), None
