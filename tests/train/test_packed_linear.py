"""The packed frozen linear against its plain twin."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peerlora.train.frozen import PackedLinear, pack_frozen, packing_unavailable

needs_packing = pytest.mark.skipif(packing_unavailable("fp32") is not None, reason=str(packing_unavailable("fp32")))


@needs_packing
@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24), (1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_equals_plain_in_both_directions(shape, bias):
    torch.manual_seed(0)
    linear = nn.Linear(24, 10, bias=bias).requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(*shape[:-1], 10)
    (mine,) = torch.autograd.grad((PackedLinear(linear)(x) * weight).sum(), x)
    (plain,) = torch.autograd.grad((linear(x) * weight).sum(), x)
    assert torch.allclose(PackedLinear(linear)(x), F.linear(x, linear.weight, linear.bias), atol=1e-5)
    assert torch.allclose(mine, plain, atol=1e-5)


@needs_packing
def test_heads_stay_plain_and_everything_else_is_packed():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)}).requires_grad_(False)
    assert pack_frozen(model, "fp32", skip=("head",)) is None
    assert isinstance(model["body"], PackedLinear) and type(model["head"]) is nn.Linear


def test_other_dtypes_stay_plain_with_a_reason():
    model = nn.ModuleDict({"body": nn.Linear(4, 4)})
    assert "fp64" in str(pack_frozen(model, "fp64"))
    assert type(model["body"]) is nn.Linear


@needs_packing
def test_a_torch_without_the_operations_falls_back(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = nn.ModuleDict({"body": nn.Linear(4, 4)})
    assert "oneDNN" in str(pack_frozen(model, "fp32"))
    assert type(model["body"]) is nn.Linear
