"""The choice of precision and packing by measured speeds; here the speeds are given, whatever processor this is."""

import math

import pytest
import torch
from torch import nn

from peerlora.train.kernels import speed
from peerlora.train.kernels.frozen_linear import FrozenLinear
from peerlora.train.kernels.selection import prepare_base
from peerlora.train.kernels.speed import Rates, Speed, choose_speed, measure_rates

AVX2 = Rates(384, 384, plain=95.0, packed=85.0, bf16=4.9, packed_bf16=None)
AVX512 = Rates(384, 384, plain=109.0, packed=247.0, bf16=120.0, packed_bf16=130.0)
HALF = Rates(384, 384, plain=109.0, packed=247.0, bf16=499.0, packed_bf16=510.0)


def base(width=128):
    layers = {"body": nn.Linear(width, width), "wide": nn.Linear(width, 4 * width), "head": nn.Linear(width, 9 * width)}
    return nn.ModuleDict(layers).requires_grad_(False)


@pytest.fixture
def measured(monkeypatch):
    """Measured speeds of one's choice; returns the shapes that were asked for."""

    def give(rates):
        asked = []
        monkeypatch.setattr(speed, "measure_rates", lambda *shape: asked.append(shape) or rates)
        return asked

    return give


@pytest.mark.parametrize(
    ("rates", "dtype", "expected"),
    [
        (AVX2, "fp32", ("fp32", False)),
        (AVX2, "bf16", ("bf16", False)),
        (AVX2, "auto", ("fp32", False)),
        (AVX512, "fp32", ("fp32", True)),
        (AVX512, "bf16", ("bf16", False)),
        (AVX512, "auto", ("fp32", True)),
        (HALF, "fp32", ("fp32", True)),
        (HALF, "auto", ("bf16", False)),
    ],
)
def test_what_pays_is_taken(measured, rates, dtype, expected):
    measured(rates)
    chosen = choose_speed(base(), ("head",), dtype, fast=True)
    assert (chosen.dtype, chosen.packed) == expected


def test_the_layers_that_hold_most_weights_are_measured_and_no_head(measured):
    asked = measured(HALF)
    choose_speed(base(), ("head",), "fp32", fast=True)
    assert asked == [(128, 512)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_nothing_is_measured_where_nothing_can_be_gained(measured, dtype):
    asked = measured(AVX2)
    assert choose_speed(base(width=16), ("head",), dtype, fast=True) == Speed(dtype, packed=True)
    assert choose_speed(base(), ("head",), dtype, fast=False) == Speed(dtype, packed=True)
    assert choose_speed(base(), ("head",), "fp64", fast=True) == Speed("fp64")
    assert asked == []


def test_auto_is_fp32_where_nothing_is_measured(measured):
    measured(HALF)
    assert choose_speed(base(width=16), ("head",), "auto", fast=True) == Speed("fp32")
    assert choose_speed(base(), ("head",), "auto", fast=False) == Speed("fp32")


def test_figures_are_told_and_slow_bf16_is_warned_of(measured):
    measured(AVX2)
    slow = choose_speed(base(), ("head",), "bf16", fast=True)
    (warning,) = slow.warnings("bf16")
    assert "slower than fp32 on this machine (4.9 against 95 GFLOP/s)" in warning and "train.dtype=auto" in warning
    (note,) = choose_speed(base(), ("head",), "auto", fast=True).notes("auto")
    assert "fp32 95, packed fp32 85, bf16 4.9" in note and "packed bf16" not in note
    assert note.endswith("train.dtype=auto takes fp32")
    assert choose_speed(base(), ("head",), "auto", fast=True).warnings("auto") == ()
    measured(HALF)
    assert choose_speed(base(), ("head",), "bf16", fast=True).warnings("bf16") == ()


def test_weights_stay_plain_where_packing_does_not_pay():
    model = base()
    reason = prepare_base(model, ("head",), Speed("fp32", packed=False, rates=AVX2), fast=True)["packed weights"]
    assert reason == "no faster on this machine (85 against 95 GFLOP/s)"
    assert isinstance(model["body"], FrozenLinear) and not hasattr(model["body"], "_up")
    x = torch.randn(3, 128)
    assert torch.equal(model["body"](x), nn.functional.linear(x, model["body"].weight, model["body"].bias))
    resumed = prepare_base(base(), ("head",), Speed("fp32", packed=False), fast=True)["packed weights"]
    assert resumed is not None and "on which the run began" in resumed


def test_packed_and_plain_weights_give_the_same_within_rounding():
    torch.manual_seed(0)
    linear, x = nn.Linear(384, 384).requires_grad_(False), torch.randn(64, 384)
    packed, plain = FrozenLinear(linear), FrozenLinear(linear, pack=False)
    assert torch.allclose(packed(x), plain(x), atol=1e-5)
    assert torch.allclose(packed.back(x), plain.back(x), atol=1e-5)


def test_a_measurement_is_made_once_and_leaves_the_process_as_it_was():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    rates = measure_rates(130, 140)
    assert measure_rates(130, 140) is rates
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert all(math.isfinite(rate) and rate > 0 for rate in (rates.plain, rates.bf16))


def test_a_way_that_is_hopeless_is_not_repeated(monkeypatch):
    clock, calls = [0.0], [0, 0]
    monkeypatch.setattr(speed.time, "thread_time", lambda: clock[0])

    def way(place, seconds):
        def run():
            calls[place] += 1
            clock[0] += seconds

        return run

    assert speed._best_times([way(0, 1.0), None, way(1, 100.0)]) == [1.0, None, 100.0]
    assert calls == [speed._TURNS, 2]
