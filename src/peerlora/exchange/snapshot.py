"""A client's whole state as vectors, for a neighbour that was away for long, and back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from peerlora.exchange.messages import Shapes, named
from peerlora.exchange.schema import Schema
from peerlora.lora.adapters import Adapters
from peerlora.lora.merged import Update
from peerlora.tree import rebuild, tree_map

_PER_VECTOR = 512  # bytes of safetensors header, name included, at most


def state_schema(state: Any, claimed: Shapes) -> Schema:
    """What a neighbour's state must look like: as the own one, but for how much it has merged."""
    found: Schema = {}
    for name, leaf in named((state,), (Update, Tensor)).items():
        if isinstance(leaf, Tensor):
            found[name] = (tuple(leaf.shape), leaf.dtype)
            continue
        (_, d_out, _), d_in = leaf.left.shape, leaf.right.shape[2]
        columns = min(_last(claimed, f"{name}.left"), _most(d_out, d_in))
        wide = d_in if _last(claimed, f"{name}.dense") else 0
        shapes = {"left": (1, d_out, columns), "right": (1, columns, d_in), "dense": (1, d_out, wide)}
        found.update({f"{name}.{side}": (shape, leaf.left.dtype) for side, shape in shapes.items()})
    return found


def largest_state(state: Any) -> int:
    """The most bytes that a neighbour's state may have."""
    total = 0
    for leaf in named((state,), (Update, Tensor)).values():
        if isinstance(leaf, Tensor):
            total += leaf.numel() * leaf.element_size() + _PER_VECTOR
        else:
            (_, d_out, _), d_in = leaf.left.shape, leaf.right.shape[2]
            scalars = _most(d_out, d_in) * (d_out + d_in) + d_out * d_in
            total += scalars * leaf.left.element_size() + 3 * _PER_VECTOR
    return total


def taken_over(own: Any, vectors: dict[str, Tensor], blocks: Collection[str]) -> Any | None:
    """A neighbour's state in place of the own one; None where its adapters have other ranks.

    Of Adapters, only ``blocks`` are taken over, the ones that the method ever exchanges, and a private head never is.
    """
    before = named((own,), (Adapters,))
    given = rebuild(own, vectors)
    theirs = named((given,), (Adapters,))
    if any(not torch.equal(x.ranks, theirs[name].ranks) for name, x in before.items()):
        return None

    def change(name: str, x: Adapters) -> Adapters:
        mine, flat = before[name], x.flat.clone()
        for block in x.spec.blocks:
            if block not in blocks or (block == "head" and x.spec.private_head):
                flat[:, x.spec.columns(block)] = mine.flat[:, x.spec.columns(block)]
        return replace(x, flat=flat)

    return tree_map(change, given, leaf=Adapters)


def _most(d_out: int, d_in: int) -> int:
    """Columns of a merged sum: beyond them it would be larger than two dense matrices, which no method lets happen."""
    return max(1, 2 * d_out * d_in // (d_out + d_in))


def _last(claimed: Shapes, name: str) -> int:
    return claimed[name][-1] if len(claimed.get(name, ())) == 3 else 0
