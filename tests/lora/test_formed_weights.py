"""Whole weights that are formed once give what base and factors give, until other adapters are bound."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from peerlora.lora import attach
from peerlora.lora.adapters import Adapters, LayerSpec
from peerlora.lora.attach import StackedModel, Targets
from peerlora.lora.merged import Merged


class Small(nn.Module):
    """Two layers, one of them without a bias."""

    def __init__(self):
        super().__init__()
        self.config = None
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def small_stack():
    torch.manual_seed(0)
    model = StackedModel(
        Small().double(), Targets((LayerSpec("first", 3, 5), LayerSpec("second", 5, 2)), ()), train_head=False
    )
    spec = model.spec(rank=2, alpha=3.0)
    return model, Adapters(spec, torch.randn(4, spec.parameters, dtype=torch.float64), torch.tensor([2, 2, 2, 2]))


def test_formed_weights_give_what_base_and_factors_give():
    model, x = small_stack()
    rows = torch.randn(4 * 6, 3, dtype=torch.float64)
    model.bind_adapters(x)
    expected = model.base(rows)
    model.form_weights()
    assert all(layer.formed is not None for layer in model._layers.values())
    assert torch.allclose(model.base(rows), expected, atol=1e-12)


def test_binding_other_adapters_forgets_what_was_formed():
    model, x = small_stack()
    rows = torch.randn(4, 3, dtype=torch.float64)
    model.bind_adapters(x)
    model.form_weights()
    before = model.base(rows)
    x.flat.mul_(2.0)
    model.bind_adapters(x)
    assert all(layer.formed is None for layer in model._layers.values())
    assert not torch.allclose(model.base(rows), before)


def test_nothing_is_formed_where_it_would_take_too_much_memory(monkeypatch):
    model, x = small_stack()
    monkeypatch.setattr(attach, "_FORMED", 4 * (15 + 10) - 1)
    model.bind_adapters(x)
    model.form_weights()
    assert all(layer.formed is None for layer in model._layers.values())


@pytest.mark.parametrize("columns", [1, 4])
def test_what_was_merged_is_part_of_a_formed_weight(columns):
    """Few columns stay a product, many become dense."""
    model, x = small_stack()
    products = {
        name: (torch.randn(4, d_out, columns, dtype=torch.float64), torch.randn(4, columns, d_in, dtype=torch.float64))
        for name, d_out, d_in in (("first", 5, 3), ("second", 2, 5))
    }
    shapes = {name: (left.shape[1], right.shape[2]) for name, (left, right) in products.items()}
    x = replace(x, merged=Merged.nothing(shapes, x.flat).plus(products))
    rows = torch.randn(4 * 6, 3, dtype=torch.float64)
    model.bind_adapters(x)
    expected = model.base(rows)
    model.form_weights()
    assert torch.allclose(model.base(rows), expected, atol=1e-12)
