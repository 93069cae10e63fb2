"""Choice of the fast kernels that work for a model on this machine, with reasons for the others."""

from __future__ import annotations

import torch
from torch import nn

from peerlora.lora.attach import StackedModel
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


def use_encoder(model: StackedModel, fast: bool, shared: HiddenStates | None = None) -> Paths:
    """Switch a model to the fast forward where that works; ``shared``: what earlier runs on its base have computed."""
    device = next(model.base.parameters()).device.type
    if reads_images(model.base):
        return _use_image_encoder(model, fast, device, shared)
    if writes_words(model.base):
        return _use_decoder(model, fast, device)
    reason = encoder_unavailable(model.base, device) if fast else "train.fast is false"
    if reason is None and model.targets.saved:
        reason = _SAVED
    if reason is not None:
        return {"packed tokens": reason, "frozen prefix": reason}
    encoder = PackedEncoder(model, shared)
    model.forward = encoder
    return {"packed tokens": None, "frozen prefix": encoder.prefix_unavailable()}


def _use_image_encoder(model: StackedModel, fast: bool, device: str, shared: HiddenStates | None) -> Paths:
    reason = images_unavailable(model.base, device) if fast else "train.fast is false"
    if reason is None and model.targets.saved:
        reason = _SAVED
    if reason is None:
        model.forward = ImageEncoder(model, shared)
    return {"packed tokens": "images have no padding", "frozen prefix": reason}


def _use_decoder(model: StackedModel, fast: bool, device: str) -> Paths:
    reason = decoder_unavailable(model, device) if fast else "train.fast is false"
    if reason is None and model.targets.saved:
        reason = _SAVED
    if reason is None:
        model.forward = PackedDecoder(model)
    return {"packed tokens": reason, "frozen prefix": "the frozen prefix is for classifiers" if fast else reason}


def writes_words(base: nn.Module) -> bool:
    """Whether a model is a language model, in place of a classifier."""
    return getattr(base, "get_output_embeddings", lambda: None)() is not None


def reads_images(base: nn.Module) -> bool:
    """Whether a model reads pixels, in place of tokens."""
    return getattr(base, "main_input_name", None) == "pixel_values"


def graph_size(base: nn.Module, paths: Paths) -> GraphSize:
    """How much one graph of this model should hold."""
    weight = next(base.parameters())
    if weight.device.type == "cuda" and hasattr(base.config, "num_hidden_layers"):  # convolutions have none
        config, (free, _) = base.config, torch.cuda.mem_get_info(weight.device)
        words = config.vocab_size if writes_words(base) else 0  # pyright: ignore
        return GraphSize.of_gpu(free, config.num_hidden_layers, config.hidden_size, weight.dtype.itemsize, words)  # pyright: ignore
    if reads_images(base):
        return GraphSize(PACKED_TOKENS, padded=False)
    if paths["packed tokens"] is None:
        return GraphSize(DECODED_TOKENS if writes_words(base) else PACKED_TOKENS, padded=False)
    return GraphSize(PADDED_TOKENS, padded=True)
