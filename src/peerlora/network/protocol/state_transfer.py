"""Transfer of a client's state to a neighbour that returns after many rounds.

Values that the method never exchanges stay local: such columns of adapters, and of vectors with the same layout, are
sent as zeros, and whole vectors that a method names (``local_only``) are left out.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from peerlora.exchange.payload import Shapes
from peerlora.exchange.schema import Schema
from peerlora.lora.adapters import Adapters
from peerlora.lora.merged import Update
from peerlora.tree import leaves, rebuild, tree_map

_PER_VECTOR = 512  # bytes, at most, of one vector in a safetensors header, its name included


def exportable(state: Any, blocks: Collection[str], local_only: Collection[str] = ()) -> dict[str, Tensor]:
    """Export a state for a neighbour; ``blocks`` of adapters are the only ones that are ever exchanged."""
    private = _private(state, blocks)
    sent = {name: leaf for name, leaf in leaves(state).items() if not _is_local(name, local_only)}
    if not private.any():
        return sent
    like = {name for name, leaf in sent.items() if leaf.shape[1:] == private.shape}
    return {name: leaf.masked_fill(private.to(leaf.device), 0) if name in like else leaf for name, leaf in sent.items()}


def state_schema(state: Any, claimed: Shapes, local_only: Collection[str] = ()) -> Schema:
    """Schema of a neighbour's state: the own one's, except for the columns of its merged parts."""
    found: Schema = {}
    for name, leaf in leaves(state, (Update, Tensor)).items():
        if _is_local(name, local_only):
            continue
        if isinstance(leaf, Tensor):
            found[name] = (tuple(leaf.shape), leaf.dtype)
            continue
        (_, d_out, _), d_in = leaf.left.shape, leaf.right.shape[2]
        columns = min(_last_size(claimed, f"{name}.left"), _most_columns(d_out, d_in))
        wide = d_in if _last_size(claimed, f"{name}.dense") else 0
        shapes = {"left": (1, d_out, columns), "right": (1, columns, d_in), "dense": (1, d_out, wide)}
        found.update({f"{name}.{side}": (shape, leaf.left.dtype) for side, shape in shapes.items()})
    return found


def largest_state(state: Any) -> int:
    """Upper bound in bytes of a neighbour's state."""
    total = 0
    for leaf in leaves(state, (Update, Tensor)).values():
        if isinstance(leaf, Tensor):
            total += leaf.numel() * leaf.element_size() + _PER_VECTOR
        else:
            (_, d_out, _), d_in = leaf.left.shape, leaf.right.shape[2]
            scalars = _most_columns(d_out, d_in) * (d_out + d_in) + d_out * d_in
            total += scalars * leaf.left.element_size() + 3 * _PER_VECTOR
    return total


def adopt(
    own: Any, vectors: dict[str, Tensor], blocks: Collection[str], local_only: Collection[str] = ()
) -> Any | None:
    """Replace the own state by a neighbour's; None where its adapters have other ranks.

    Of Adapters, only ``blocks`` are replaced, the ones that the method ever exchanges, and a private head never is.
    """
    kept = {name: leaf for name, leaf in leaves(own).items() if _is_local(name, local_only)}
    given, private = rebuild(own, vectors | kept), _private(own, blocks)
    theirs = leaves(given, (Adapters,))
    if any(not torch.equal(x.ranks, theirs[name].ranks) for name, x in leaves(own, (Adapters,)).items()):
        return None
    before = leaves(own)

    def change(name: str, leaf: Tensor) -> Tensor:
        if leaf.shape[1:] != private.shape:
            return leaf
        return torch.where(private.to(leaf.device), before[name], leaf)

    return tree_map(change, given)


def _private(state: Any, blocks: Collection[str]) -> Bool[Tensor, " parameter"]:
    """Mask of the columns of a state's adapters that are never exchanged."""
    spec = next(iter(leaves(state, (Adapters,)).values())).spec
    found = torch.zeros(spec.parameters, dtype=torch.bool)
    for block in spec.blocks:
        found[spec.columns(block)] = block not in blocks or (block == "head" and spec.private_head)
    return found


def _is_local(name: str, local_only: Collection[str]) -> bool:
    return name.removeprefix(".") in local_only


def _most_columns(d_out: int, d_in: int) -> int:
    """Columns of a merged sum, at most: with more, it would be larger than two dense matrices; methods fold before."""
    return max(1, 2 * d_out * d_in // (d_out + d_in))


def _last_size(claimed: Shapes, name: str) -> int:
    return claimed[name][-1] if len(claimed.get(name, ())) == 3 else 0
