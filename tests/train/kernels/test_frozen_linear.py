"""The packed frozen linear against its plain twin."""

import pytest
import torch
from torch import nn

from peerlora.train.kernels.frozen_linear import FrozenLinear, freeze_linears, lower_precision, packing_unavailable

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}


def packable(dtype):
    reason = packing_unavailable(torch.zeros(1, dtype=dtype))
    return pytest.param(dtype, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


@pytest.mark.parametrize("dtype", [packable(torch.float32), packable(torch.bfloat16)])
def test_weights_are_packed(dtype):
    assert hasattr(FrozenLinear(nn.Linear(4, 4, dtype=dtype)), "_up")


@pytest.mark.parametrize("dtype", [packable(torch.float32), packable(torch.bfloat16), torch.float64])
@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24), (1, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("add", [True, False])
def test_frozen_equals_plain_in_both_directions(dtype, shape, bias, add):
    torch.manual_seed(0)
    linear = nn.Linear(24, 10, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    plus = torch.randn(*shape[:-1], 10, dtype=dtype, requires_grad=True)
    weight = torch.randn(*shape[:-1], 10, dtype=dtype)
    frozen = FrozenLinear(linear)
    mine, plain = frozen(x, plus if add else None), linear(x) + (plus if add else 0)
    assert torch.allclose(mine, plain, atol=TOLERANCE[dtype])
    assert torch.equal(mine, frozen.up(x.detach(), plus.detach() if add else None))
    leaves = [x, plus] if add else [x]
    for found, expected in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (mine, plain)), strict=True):
        assert torch.allclose(found, expected, atol=TOLERANCE[dtype])


def test_heads_stay_plain_and_everything_else_is_frozen():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)}).requires_grad_(False)
    freeze_linears(model, skip=("head",))
    assert isinstance(model["body"], FrozenLinear) and type(model["head"]) is nn.Linear


def test_fp64_works_without_packing_and_says_why():
    model = nn.ModuleDict({"body": nn.Linear(4, 4, dtype=torch.float64)})
    assert "float64" in str(freeze_linears(model))
    assert not hasattr(model["body"], "_up")


def test_a_torch_without_the_operations_falls_back(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    linear = nn.Linear(4, 4)
    model = nn.ModuleDict({"body": linear})
    assert "oneDNN" in str(freeze_linears(model))
    x = torch.randn(2, 4)
    assert torch.equal(model["body"](x), linear(x))


def test_lower_precision_leaves_heads_and_buffers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].register_buffer("frequencies", torch.ones(3))
    lower_precision(model, ("1",))
    assert model[0].weight.dtype == torch.bfloat16 and model[0].frequencies.dtype == torch.float32
    assert model[1].weight.dtype == torch.float32
    assert model(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.float32


class FourBits(nn.Linear):
    """Stands for a linear layer that computes in a way of its own."""


def test_layers_of_another_kind_stay_what_they_are():
    model = nn.Sequential(nn.Linear(4, 4), FourBits(4, 4))
    freeze_linears(model)
    assert type(model[1]) is FourBits and isinstance(model[0], FrozenLinear)
    assert freeze_linears(nn.Sequential(FourBits(4, 4))) == "the model has FourBits layers only"


def test_packed_integers_are_not_rounded_to_bf16():
    model = nn.Linear(4, 4)
    model.codes = nn.Parameter(torch.arange(200, 256, dtype=torch.uint8), requires_grad=False)
    lower_precision(model, ())
    assert model.weight.dtype == torch.bfloat16 and model.codes.tolist() == list(range(200, 256))


def test_a_model_may_change_what_a_frozen_layer_gives_in_place():
    x = torch.randn(2, 3, 16, requires_grad=True)
    layer = FrozenLinear(nn.Linear(16, 16).requires_grad_(False))
    y = layer(x)
    y /= 2  # as Longformer does
    y.sum().backward()
    assert torch.allclose(x.grad, (layer.weight.sum(0) / 2).expand_as(x), atol=1e-5)
