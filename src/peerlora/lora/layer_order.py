"""The layers of an adapter in the order of a backward pass: the head first, then block by block, the last one first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peerlora.lora.adapters import AdapterSpec


@lru_cache(maxsize=64)
def layer_numbers(spec: AdapterSpec) -> tuple[int, ...]:
    """For every slot its layer's number: 1 for a trained head, then 2, 3, ... from the last transformer block down.

    One transformer block's factors, A and B, are one layer.  What is adapted above all blocks counts with the head,
    what is adapted below them with the lowest block.  Without either, the last block is 1.
    """
    numbers = [_block_number(layer.name) for layer in spec.layers]
    known = sorted({number for number in numbers if number is not None}, reverse=True)
    last = max((i for i, number in enumerate(numbers) if number is not None), default=-1)
    above = 1 if spec.head or last < len(numbers) - 1 else 0
    place = {number: above + i for i, number in enumerate(known, start=1)}
    own = {
        layer.name: place[number] if number is not None else 1 if i > last else above + len(known)
        for i, (layer, number) in enumerate(zip(spec.layers, numbers, strict=True))
    }
    return tuple(1 if slot.block == "head" else own[slot.name] for slot in spec.slots)


def depth_of(spec: AdapterSpec) -> int:
    """L, the number of layers."""
    return max(layer_numbers(spec))


def blocks_of(spec: AdapterSpec) -> int:
    """N, the number of transformer blocks, or blocks of a flow, that have adapters."""
    return len({number for layer in spec.layers if (number := _block_number(layer.name)) is not None})


def _block_number(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def columns_reached(spec: AdapterSpec, blocks: Sequence[str], depth: int, per_layer_moments: bool) -> dict[str, slice]:
    """The columns of these blocks in the first ``depth`` layers, by block or ("A:2") by block and layer.

    Layers lie in forward order, so in each block what a backward pass has reached is the end of it.
    """
    found: dict[str, slice] = {}
    for slot, number in zip(spec.slots, layer_numbers(spec), strict=True):
        if slot.block in blocks and number <= depth:
            name = f"{slot.block}:{number}" if per_layer_moments else slot.block
            start = found[name].start if name in found else slot.start
            assert name not in found or found[name].stop == slot.start, "layers are not in forward order"
            found[name] = slice(start, slot.stop)
    return found


def by_column(
    spec: AdapterSpec, values: Float[Tensor, "client layer"] | Bool[Tensor, "client layer"]
) -> Float[Tensor, "client parameter"] | Bool[Tensor, "client parameter"]:
    """A value per layer as one per parameter."""
    sizes = torch.tensor([slot.stop - slot.start for slot in spec.slots], device=values.device)
    numbers = torch.tensor(layer_numbers(spec), device=values.device)
    return values[:, numbers - 1].repeat_interleave(sizes, dim=1)


def reached_layers(depth: Int[Tensor, " client"], layers: int) -> Bool[Tensor, "client layer"]:
    """Which layers a backward pass of this depth reaches: the first ones."""
    return torch.arange(1, layers + 1, device=depth.device) <= depth[:, None]
