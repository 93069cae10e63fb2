"""States are trees of tensors (dict, tuple, dataclass, Adapters) whose every leaf has the leading client axis."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Tree = TypeVar("Tree")


def tree_map(
    change: Callable[[str, Any], Any], tree: Tree, name: str = "", leaf: type | tuple[type, ...] = Tensor
) -> Tree:
    """The same tree with every leaf replaced by ``change(path, leaf)``; anything else is kept.

    Leaves are tensors, and whatever else is an instance of ``leaf``.
    """
    if isinstance(tree, leaf):
        return change(name, tree)
    if isinstance(tree, dict):
        return {key: tree_map(change, value, f"{name}.{key}", leaf) for key, value in tree.items()}  # pyright: ignore
    if isinstance(tree, tuple):
        changed = [tree_map(change, value, f"{name}.{i}", leaf) for i, value in enumerate(tree)]
        return type(tree)(*changed) if hasattr(tree, "_fields") else tuple(changed)  # pyright: ignore
    if is_dataclass(tree) and not isinstance(tree, type):
        values = {field.name: getattr(tree, field.name) for field in fields(tree)}
        return replace(tree, **{key: tree_map(change, value, f"{name}.{key}", leaf) for key, value in values.items()})
    return tree


def leaves(tree: Any, leaf: type | tuple[type, ...] = Tensor) -> dict[str, Any]:
    """All tensors of a tree by path, or all leaves of these types."""
    found: dict[str, Any] = {}

    def note(name: str, value: Any) -> Any:
        found[name] = value
        return value

    tree_map(note, tree, leaf=leaf)
    return found


def equal_rows(tree: Any) -> bool:
    """Whether all clients hold the same, to the bit."""
    return all(bool((leaf == leaf[:1]).all()) for leaf in leaves(tree).values())


def rebuild(like: Tree, tensors: dict[str, Tensor]) -> Tree:
    """A tree shaped like ``like`` with the tensors that ``leaves`` once took out of it, on the devices of ``like``."""
    return tree_map(lambda name, leaf: tensors[name].to(leaf.device), like)


def held(before: Any, after: Any, clients: list[int]) -> Any:
    """``after``, but with the rows of these clients as they were before."""
    kept = leaves(before)

    def put_back(name: str, leaf: Tensor) -> Tensor:
        if leaf.shape != kept[name].shape:  # a leaf that has only now got its size
            return leaf
        leaf = leaf.clone()
        leaf[clients] = kept[name][clients]
        return leaf

    return tree_map(put_back, after)


def rows_of(state: Any, client: int) -> Any:
    """One client's part of a state, as views."""
    return tree_map(lambda _, leaf: leaf[client : client + 1], state)


def put_row(state: Any, client: int, row: Any) -> None:
    """Write one client's part back, in place."""
    new = leaves(row)
    for name, leaf in leaves(state).items():
        leaf[client : client + 1] = new[name]


def own_copy(state: Any) -> Any:
    """A state that shares no memory with anything."""
    return tree_map(lambda _, leaf: leaf.clone(memory_format=torch.contiguous_format), state)
