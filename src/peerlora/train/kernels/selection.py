"""Choice of the fast kernels that work for a model on this machine, with reasons for the others."""

from __future__ import annotations

import torch
from torch import nn

from peerlora.lora.attach import StackedModel
from peerlora.lora.word_places import layer_of_words
from peerlora.train.graph_size import DECODED_TOKENS, PACKED_TOKENS, PADDED_TOKENS, GraphSize
from peerlora.train.kernels.frozen_linear import freeze_linears, lower_precision
from peerlora.train.kernels.image_encoder import ImageEncoder, images_unavailable
from peerlora.train.kernels.packed_decoder import PackedDecoder, decoder_unavailable
from peerlora.train.kernels.packed_encoder import PackedEncoder, encoder_unavailable
from peerlora.train.kernels.prefix_cache import HiddenStates
from peerlora.train.kernels.speed import Speed

_SAVED = "layers of the body train in full (adapter.modules_to_save)"
Paths = dict[str, str | None]  # name of a speed path -> None where it is used, else the reason why not


def prepare_base(
    base: nn.Module, heads: tuple[str, ...], speed: Speed, fast: bool, saved: tuple[str, ...] = ()
) -> Paths:
    """Make a frozen base fast, in place, before adapters are attached; ``heads`` stay as they are.

    So do linear layers among ``saved``, which train in full; embeddings there take the precision of the body.
    """
    heads = (*heads, *(name for name in saved if isinstance(base.get_submodule(name), nn.Linear)))
    if speed.dtype == "bf16":
        lower_precision(base, heads)
        if next(base.parameters()).device.type == "cpu":  # the fused kernel's backward is several times slower there
            base.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
    if not fast:
        return {"packed weights": "train.fast is false"}
    return {"packed weights": freeze_linears(base, heads, speed.packed) or speed.not_packed}


def use_fast_forward(model: StackedModel, fast: bool, shared: HiddenStates | None = None) -> Paths:
    """Switch a model to the fast forward where that works; ``shared``: what earlier runs on its base have computed."""
    device = next(model.base.parameters()).device.type
    if reads_images(model.base):
        reason = _reason(model, fast, images_unavailable(model.base, device))
        if reason is None:
            model.forward = ImageEncoder(model, shared)
        return {"packed tokens": "images have no padding", "frozen prefix": reason}
    if layer_of_words(model.base) is not None:
        reason = _reason(model, fast, decoder_unavailable(model, device))
        if reason is None:
            model.forward = PackedDecoder(model)
        return {"packed tokens": reason, "frozen prefix": _reason(model, fast, "the frozen prefix is for classifiers")}
    reason = _reason(model, fast, encoder_unavailable(model.base, device))
    if reason is not None:
        return {"packed tokens": reason, "frozen prefix": reason}
    encoder = PackedEncoder(model, shared)
    model.forward = encoder
    return {"packed tokens": None, "frozen prefix": encoder.prefix_unavailable()}


def _reason(model: StackedModel, fast: bool, unavailable: str | None) -> str | None:
    """Why a fast forward is not used, or None; ``unavailable``: why it cannot be."""
    if not fast:
        return "train.fast is false"
    return unavailable or (_SAVED if model.targets.saved else None)


def reads_images(base: nn.Module) -> bool:
    """Whether a model reads pixels, in place of tokens."""
    return getattr(base, "main_input_name", None) == "pixel_values"


def graph_size(base: nn.Module, paths: Paths) -> GraphSize:
    """How much one graph of this model should hold."""
    weight = next(base.parameters())
    if weight.device.type == "cuda" and hasattr(base.config, "num_hidden_layers"):  # convolutions have none
        config, (free, _) = base.config, torch.cuda.mem_get_info(weight.device)
        words = config.vocab_size if layer_of_words(base) is not None else 0  # pyright: ignore
        return GraphSize.of_gpu(free, config.num_hidden_layers, config.hidden_size, weight.dtype.itemsize, words)  # pyright: ignore
    if reads_images(base):
        return GraphSize(PACKED_TOKENS, padded=False)
    if paths["packed tokens"] is None:
        return GraphSize(DECODED_TOKENS if layer_of_words(base) is not None else PACKED_TOKENS, padded=False)
    return GraphSize(PADDED_TOKENS, padded=True)
