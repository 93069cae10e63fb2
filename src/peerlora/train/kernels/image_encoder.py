"""The forward of ViT- and DeiT-type classifiers that computes their frozen lower blocks once for each image.

What runs is the model's own blocks, so it differs from its own forward by rounding only.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peerlora.data.batches import Origin
from peerlora.lora.attach import StackedModel
from peerlora.lora.layer import ClientDropout, StackedLinear
from peerlora.train.kernels.prefix_cache import HiddenStates, PrefixCache

_CLASSES = ("ViTForImageClassification", "DeiTForImageClassification")


def images_unavailable(base: nn.Module, device: str) -> str | None:
    """Why a model cannot use this forward, or None."""
    if device != "cpu":
        return "hidden states are kept on CPUs"
    if type(base).__name__ not in _CLASSES:
        return f"the frozen prefix is for ViT- and DeiT-type classifiers, the model is a {type(base).__name__}"
    if lowest_adapted(_blocks(base)) == 0:
        return "the lowest block is adapted"
    if any(isinstance(module, ClientDropout) for module in base.modules()):
        return "model.dropout draws anew in the frozen blocks"
    return None


def lowest_adapted(blocks: list[nn.Module]) -> int:
    """The number of the lowest block with adapters; all below are the same for all clients, always."""
    adapted = [any(isinstance(module, StackedLinear) for module in block.modules()) for block in blocks]
    return [*adapted, True].index(True)


def _blocks(base: Any) -> list[nn.Module]:
    return list(getattr(base, base.base_model_prefix).layers)


class ImageEncoder:
    """Logits of client-major images, as ``StackedModel`` gives them."""

    def __init__(self, model: StackedModel, shared: HiddenStates | None = None):
        self.base: Any = model.base
        self.body = getattr(self.base, self.base.base_model_prefix)
        self.blocks = _blocks(self.base)
        self.lowest = lowest_adapted(self.blocks)
        dtype = self.body.embeddings.patch_embeddings.projection.weight.dtype
        read = torch.promote_types(dtype, torch.float32)
        self.prefix = PrefixCache(self._flat_below, self.base.config.hidden_size * dtype.itemsize, shared, read)

    def __call__(self, inputs: dict[str, Tensor], origin: Origin | None = None) -> Float[Tensor, "row label"]:
        """One forward; ``origin`` says which images these are."""
        pixels = inputs["pixel_values"]
        if origin is not None and self.prefix.holds(origin.data):
            x = self.prefix(origin).view(len(pixels), -1, self.base.config.hidden_size)
        else:
            x = self._below(pixels)
        for block in self.blocks[self.lowest :]:
            x = block(x)
        return self.base.classifier(self.body.layernorm(x)[:, 0])

    def _below(self, pixels: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row token hidden"]:
        """Embeddings and the blocks below the lowest adapted one."""
        x = self.body.embeddings(pixels.to(self.body.embeddings.patch_embeddings.projection.weight.dtype))
        for block in self.blocks[: self.lowest]:
            x = block(x)
        return x

    def _flat_below(self, inputs: dict[str, Tensor]) -> Float[Tensor, "token hidden"]:
        return self._below(inputs["pixel_values"]).flatten(0, 1)
