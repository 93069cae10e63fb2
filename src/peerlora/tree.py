"""States are trees of tensors (dict, tuple, dataclass, Adapters) whose every leaf has the leading client axis."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

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


def rebuild(like: Tree, tensors: dict[str, Tensor]) -> Tree:
    """A tree shaped like ``like`` with the tensors that ``leaves`` once took out of it, on the devices of ``like``."""
    return tree_map(lambda name, leaf: tensors[name].to(leaf.device), like)
