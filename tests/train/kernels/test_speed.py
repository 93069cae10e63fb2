"""The choice of precision and packing by measured speeds; here the speeds are given, whatever processor this is."""

import math

import pytest
import torch
from torch import nn

from peerlora.train.kernels import speed
from peerlora.train.kernels.frozen_linear import FrozenLinear
from peerlora.train.kernels.selection import prepare_base
from peerlora.train.kernels.speed import Rates, Speed, choose_speed, measure_rates

SHAPE = ((384, 384),)
AVX2 = Rates(SHAPE, plain=95.0, packed=85.0, bf16=4.9, packed_bf16=None)
AVX512 = Rates(SHAPE, plain=109.0, packed=247.0, bf16=120.0, packed_bf16=130.0)
HALF = Rates(SHAPE, plain=109.0, packed=247.0, bf16=499.0, packed_bf16=510.0)


def base(width=128):
    layers = {"body": nn.Linear(width, width), "wide": nn.Linear(width, 4 * width), "head": nn.Linear(width, 9 * width)}
    return nn.ModuleDict(layers).requires_grad_(False)


@pytest.fixture
def measured(monkeypatch):
    """Measured speeds of one's choice; returns what was asked for: shapes and rows."""

    def give(rates):
        asked = []
        monkeypatch.setattr(speed, "measure_rates", lambda *asks: asked.append(asks) or rates)
        return asked

    return give


@pytest.mark.parametrize(
    ("rates", "dtype", "expected"),
    [
        (AVX2, "fp32", ("fp32", False)),
        (AVX2, "bf16", ("bf16", False)),
        (AVX2, "auto", ("fp32", False)),
        (AVX512, "fp32", ("fp32", True)),
        (AVX512, "bf16", ("bf16", True)),
        (AVX512, "auto", ("fp32", True)),
        (HALF, "fp32", ("fp32", True)),
        (HALF, "auto", ("bf16", False)),
    ],
)
def test_what_pays_is_taken(measured, rates, dtype, expected):
    measured(rates)
    chosen = choose_speed(base(), ("head",), dtype, fast=True)
    assert (chosen.dtype, chosen.packed) == expected


def test_the_shapes_that_hold_most_weights_are_measured_and_no_head(measured):
    asked = measured(HALF)
    choose_speed(base(), ("head",), "fp32", fast=True)
    assert asked[0][0] == ((128, 512, 1), (128, 128, 1))
    several = {f"{name}{i}": nn.Linear(128, width) for i in range(3) for name, width in (("a", 128), ("b", 256))}
    more = nn.ModuleDict(several | {"c": nn.Linear(128, 129), "d": nn.Linear(16, 16), "e": nn.Linear(512, 512)})
    choose_speed(more.requires_grad_(False), (), "fp32", fast=True)
    assert asked[1][0] == ((512, 512, 1), (128, 256, 3), (128, 128, 3))


@pytest.mark.parametrize(("tokens", "rows"), [(1, 16), (100, 64), (512, 512), (10_000, 512)])
def test_products_are_measured_with_the_tokens_of_a_step(measured, tokens, rows):
    asked = measured(HALF)
    choose_speed(base(), ("head",), "fp32", fast=True, tokens=tokens)
    assert asked[0][1:] == (rows,)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_nothing_is_measured_where_nothing_can_be_gained(measured, dtype):
    asked = measured(AVX2)
    assert choose_speed(base(width=16), ("head",), dtype, fast=True) == Speed(dtype, packed=True)
    assert choose_speed(base(), ("head",), "fp32", fast=False) == Speed("fp32", packed=True)
    assert choose_speed(base(), ("head",), "fp64", fast=True) == Speed("fp64")
    assert asked == []


def test_auto_is_fp32_where_nothing_is_measured(measured):
    measured(HALF)
    assert choose_speed(base(width=16), ("head",), "auto", fast=True) == Speed("fp32")


@pytest.mark.parametrize(("rates", "expected"), [(AVX2, "fp32"), (AVX512, "fp32"), (HALF, "bf16")])
def test_without_speed_paths_auto_takes_the_same_precision(measured, rates, expected):
    measured(rates)
    assert [choose_speed(base(), ("head",), "auto", fast).dtype for fast in (True, False)] == [expected] * 2


def test_without_speed_paths_slow_bf16_is_warned_of_by_ordinary_products(measured):
    measured(AVX2)
    (warning,) = choose_speed(base(), ("head",), "bf16", fast=False).warnings("bf16")
    assert "(4.9 against 95 GFLOP/s)" in warning
    measured(AVX512)  # where packed fp32 would be faster than bf16, and ordinary fp32 is not
    plain = choose_speed(base(), ("head",), "bf16", fast=False)
    assert plain.warnings("bf16") == () and "packed" not in plain.notes("bf16")[0]
    assert choose_speed(base(), ("head",), "bf16", fast=True).warnings("bf16")


def test_figures_are_told_and_slow_bf16_is_warned_of(measured):
    measured(AVX2)
    slow = choose_speed(base(), ("head",), "bf16", fast=True)
    (warning,) = slow.warnings("bf16")
    assert "slower than fp32 on this machine (4.9 against 95 GFLOP/s)" in warning and "train.dtype=auto" in warning
    (note,) = choose_speed(base(), ("head",), "auto", fast=True).notes("auto")
    assert note.startswith("frozen products of 384 by 384 on one core, in GFLOP/s: fp32 95")
    assert "of 8 by 4, 4 by 4 on one core" in str(Rates(((8, 4), (4, 4)), 1.0, 1.0, 1.0, 1.0))
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
    shapes = ((130, 140, 2), (140, 130, 1))
    rates = measure_rates(shapes, 16)
    assert measure_rates(shapes, 16) is rates and rates.shapes == ((130, 140), (140, 130))
    assert all(math.isfinite(rate) and rate > 0 for rate in (rates.plain, rates.bf16))
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


class Clocked:
    """Products that take given seconds of a made-up clock, for every row the same; None: a way that is missing."""

    def __init__(self, monkeypatch, per_row):
        self.now, self.calls, self.per_row = 0.0, [], per_row
        monkeypatch.setattr(speed, "_product", self.product)
        monkeypatch.setattr(speed.time, "thread_time", lambda: self.now)
        speed.measure_rates.cache_clear()

    def product(self, d_in, d_out, rows, dtype, packed):
        seconds = self.per_row[(dtype == torch.bfloat16) * 2 + packed]
        if seconds is None:
            return None

        def run():
            self.calls.append((dtype, packed, rows))
            self.now += seconds * rows * d_in * d_out

        return run


def test_rates_are_over_all_layers_and_hopeless_ways_are_measured_on_few_tokens(monkeypatch):
    clocked = Clocked(monkeypatch, [1.0, 0.5, 100.0, None])
    found = measure_rates(((10, 20, 3), (5, 10, 1)), 64)
    assert (found.plain, found.packed, found.bf16) == pytest.approx((4e-9, 8e-9, 4e-11)) and found.packed_bf16 is None
    assert {rows for dtype, _, rows in clocked.calls if dtype == torch.bfloat16} == {speed._FEW}
    assert {rows for dtype, _, rows in clocked.calls if dtype == torch.float32} == {speed._FEW, 64}
    speed.measure_rates.cache_clear()


def test_large_layers_are_measured_with_fewer_rows(monkeypatch):
    clocked = Clocked(monkeypatch, [1.0, None, 1.0, None])
    assert measure_rates(((4096, 4096, 1),), 512).plain == pytest.approx(4e-9)
    assert {rows for *_, rows in clocked.calls} == {speed._FEW}
    speed.measure_rates.cache_clear()


def test_the_least_time_counts_and_not_that_of_the_first_turn(monkeypatch):
    ticks = iter([0.0, 1.0, 10.0, 19.0, 20.0, 22.0, 30.0, 34.0])
    monkeypatch.setattr(speed.time, "thread_time", lambda: next(ticks))
    assert speed._best_times([lambda: torch.zeros(1), None], turns=3) == [2, None]
