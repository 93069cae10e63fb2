"""A payload and the named vectors that stand for one client's share of it on the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peerlora.exchange.schema import Schema
from peerlora.lora.adapters import Adapters
from peerlora.lora.merged import Merged, Update
from peerlora.lora.partial import PartialAdapters
from peerlora.lora.partial import fault as contradiction
from peerlora.tree import leaves, tree_map

Payload = tuple[Any, ...]
"""The trees that cross together in one exchange."""
Leaf = Adapters | Merged | Tensor
LEAVES = (Adapters, Merged, Tensor)


def message(payload: Payload, row: int = 0) -> Schema:
    """What the client in this row sends: the name, shape (at its real rank) and dtype of every vector."""
    found: Schema = {}
    for name, leaf in _leaves(payload):
        found.update({name + part: what for part, what in _message(leaf, row).items()})
    return found


def vectors(payload: Payload, row: int = 0) -> dict[str, Tensor]:
    """The values of ``message``, as views."""
    found = {}
    for name, leaf in _leaves(payload):
        padded = _padded(leaf)
        for part, (shape, _) in _message(leaf, row).items():
            found[name + part] = padded[part][row][_corner(shape)]
    return found


def fault(payload: Payload, sent: Mapping[str, Tensor]) -> str | None:
    """Why a neighbour's vectors, each as it was ``expected``, contradict each other; None where they don't."""
    partly = [(name, leaf) for name, leaf in _leaves(payload) if isinstance(leaf, PartialAdapters)]
    return next((found for name, leaf in partly if (found := contradiction(leaf, name, sent))), None)


Shapes = Mapping[str, tuple[int, ...]]


def expected(payload: Payload, claimed: Shapes) -> Schema:
    """What a neighbour may send where this client sends ``payload``: the same names, at the neighbour's own rank.

    Its rank, the columns of its merged parts, and where clients send some layers only, which ones it sends, are taken
    from the shapes it ``claimed`` as far as they are possible.
    """
    found: Schema = {}
    for name, leaf in _leaves(payload):
        if isinstance(leaf, Adapters):
            rank = min(max(1, _rank(name, leaf, claimed)), leaf.spec.rank)
            shapes = leaf.expected_shapes(
                rank, {given.removeprefix(name) for given in claimed if given.startswith(name)}
            )
            found.update({name + part: (shape, leaf.flat.dtype) for part, shape in shapes.items()})
        elif isinstance(leaf, Merged):
            for layer, own in leaf.layers.items():
                columns = min(_size(claimed, f"{name}left:{layer}", 1, 0), own.left.shape[2])
                found[f"{name}left:{layer}"] = ((own.left.shape[1], columns), own.left.dtype)
                found[f"{name}right:{layer}"] = ((columns, own.right.shape[2]), own.right.dtype)
        else:
            found[name] = (tuple(leaf.shape[1:]), leaf.dtype)
    return found


def widest(payload: Payload) -> Schema:
    """``expected`` of a neighbour that sends every vector that it could, at the largest rank."""
    whole = [(name, leaf.spec) for name, leaf in _leaves(payload) if isinstance(leaf, Adapters)]
    claims = {name + part: shape for name, spec in whole for part, shape in spec.row_shapes(spec.rank).items()}
    return expected(payload, claims)


def stack_with_own(payload: Payload, messages: Sequence[dict[str, Tensor]]) -> Payload:
    """Stack the payloads of those whose messages these are, in this order, padded as ``payload`` is.

    What does not cross, such as a private head, is the own one for all.
    """

    def filled(path: str, leaf: Leaf) -> Leaf:
        name = _prefix(path, leaf)
        if isinstance(leaf, Tensor):
            return torch.stack([sent[name].to(leaf.device) for sent in messages])
        if isinstance(leaf, Merged):
            return _merged(name, leaf, messages)
        return _adapters(name, leaf, messages)

    return tuple(tree_map(filled, x, leaf=LEAVES) for x in payload)


def _leaves(payload: Payload) -> list[tuple[str, Leaf]]:
    """All leaves in order, also where two trees of a payload have one at the same path."""
    return [(_prefix(path, leaf), leaf) for x in payload for path, leaf in leaves(x, LEAVES).items()]


def _prefix(path: str, leaf: Leaf) -> str:
    """What the names of a leaf's vectors begin with on the wire: ``z``, or ``x.`` before ``A:layer``."""
    path = path.removeprefix(".")
    return path if isinstance(leaf, Tensor) or not path else f"{path}."


def _message(leaf: Leaf, row: int) -> Schema:
    return {"": (tuple(leaf.shape[1:]), leaf.dtype)} if isinstance(leaf, Tensor) else leaf.message(row)


def _padded(leaf: Leaf) -> dict[str, Tensor]:
    """By name on the wire, what all clients held here have, padding included."""
    if isinstance(leaf, Tensor):
        return {"": leaf}
    if isinstance(leaf, Adapters):
        return {f"{slot.block}:{slot.name}": leaf.spec.view(slot, leaf.flat) for slot in leaf.spec.slots}
    return {f"{side}:{layer}": getattr(own, side) for layer, own in leaf.layers.items() for side in ("left", "right")}


def _corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(size) for size in shape)


def _rank(name: str, leaf: Adapters, sent: Shapes) -> int:
    """The rank that a message has, by its first factor; the own one where it has no factor."""
    for slot in leaf.spec.slots:
        if slot.block in ("A", "B"):
            return _size(sent, f"{name}{slot.block}:{slot.name}", 0 if slot.block == "A" else 1, leaf.spec.rank)
    return int(leaf.ranks[0])


def _size(sent: Shapes, name: str, axis: int, other: int) -> int:
    shape = sent.get(name, ())
    return shape[axis] if len(shape) == 2 else other


def _adapters(name: str, leaf: Adapters, messages: Sequence[dict[str, Tensor]]) -> Adapters:
    shapes = [{key: tuple(value.shape) for key, value in sent.items()} for sent in messages]
    ranks = torch.tensor([_rank(name, leaf, shape) for shape in shapes])
    whole = Adapters(leaf.spec, leaf.flat[:1].repeat(len(messages), 1), ranks)
    for part in leaf.spec.row_shapes(leaf.spec.rank):
        _fill(_padded(whole)[part], [sent.get(name + part) for sent in messages])
    return whole


def _merged(name: str, leaf: Merged, messages: Sequence[dict[str, Tensor]]) -> Merged:
    layers = {}
    for layer, own in leaf.layers.items():
        left, right = (part.new_zeros(len(messages), *part.shape[1:]) for part in (own.left, own.right))
        _fill(left, [sent[f"{name}left:{layer}"] for sent in messages])
        _fill(right, [sent[f"{name}right:{layer}"] for sent in messages])
        layers[layer] = Update(left, right, own.dense.new_zeros(len(messages), *own.dense.shape[1:]))
    return Merged(layers)


def _fill(padded: Tensor, sent: Sequence[Tensor | None]) -> None:
    """In place: every client's vector in the corner of its row, zero around it and where it sent none."""
    padded.zero_()
    for row, value in zip(padded, sent, strict=True):
        if value is None:
            continue
        row[_corner(tuple(value.shape))] = value.to(row.device)
