from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import Tensor

from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.tree import leaves, rebuild, tree_map

Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True)
class State:
    x: Tensor
    round: int


def tree():
    spec = AdapterSpec((LayerSpec("q", 2, 2),), 1, 1.0)
    x = Adapters(spec, torch.arange(8.0).view(2, 4), torch.tensor([1, 1]))
    return {"x": x, "pair": (torch.ones(2), Pair(torch.zeros(2, 1), "word")), "state": State(torch.full((2,), 7.0), 3)}


def test_leaves_are_named_by_their_path():
    found = leaves(tree())
    assert list(found) == [".x.flat", ".x.ranks", ".pair.0", ".pair.1.0", ".state.x"]
    assert found[".state.x"].tolist() == [7, 7]


def test_a_tree_is_rebuilt_from_its_leaves():
    made = tree()
    doubled = rebuild(made, {name: leaf * 2 for name, leaf in leaves(made).items()})
    assert torch.equal(doubled["x"].flat, made["x"].flat * 2) and doubled["x"].spec == made["x"].spec
    assert doubled["pair"][1].right == "word" and isinstance(doubled["pair"][1], Pair)
    assert doubled["state"] == State(doubled["state"].x, 3) and doubled["state"].x.tolist() == [14, 14]
    assert made["state"].x.tolist() == [7, 7], "the old tree was changed"


def test_a_single_tensor_is_a_tree():
    assert tree_map(lambda name, leaf: leaf + 1, torch.zeros(2)).tolist() == [1, 1]
    assert tree_map(lambda name, leaf: leaf + 1, 5) == 5
