"""Choice of precision and packing by what this machine computes fastest, measured once per process.

Processors differ by more than tenfold in what they gain from bf16 or from a packed layout, and some lose by it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlora.lora.base_weights import within
from peerlora.train.kernels.frozen_linear import FrozenLinear, packing_unavailable

_ROWS = 512  # tokens of one measured product, as in a small graph
_MULTIPLICATIONS = 1 << 25  # of one measured product, at most: some milliseconds
_SMALL = 128 * 128  # weights of a layer, below which calls take longer than products and nothing is worth measuring
_TURNS = 8  # the first one warms up
_HOPELESS = 3.0  # times slower than the first way: not measured again
_PACKING_PAYS = 1.15  # times as fast as the plain product, from which weights are packed
_HALF_PAYS = 1.3  # times as fast as fp32, from which train.dtype=auto takes bf16


@dataclass(frozen=True)
class Rates:
    """GFLOP/s of one frozen product on one core, up and back, by the way it is computed; None: missing."""

    d_in: int
    d_out: int
    plain: float
    packed: float | None
    bf16: float
    packed_bf16: float | None

    def of(self, dtype: str) -> tuple[float, float | None]:
        """(plain, packed) of fp32 or bf16."""
        return (self.bf16, self.packed_bf16) if dtype == "bf16" else (self.plain, self.packed)

    def best(self, dtype: str) -> float:
        """Of the way that is taken in this precision."""
        plain, packed = self.of(dtype)
        return packed if packed is not None and self.packing_pays(dtype) else plain

    def packing_pays(self, dtype: str) -> bool:
        """Whether packing makes this precision faster by more than a measurement may err."""
        plain, packed = self.of(dtype)
        return packed is not None and packed >= _PACKING_PAYS * plain

    def __str__(self) -> str:
        ways = {"fp32": self.plain, "packed fp32": self.packed, "bf16": self.bf16, "packed bf16": self.packed_bf16}
        rates = ", ".join(f"{way} {rate:.3g}" for way, rate in ways.items() if rate is not None)
        return f"frozen products of {self.d_in} by {self.d_out} on one core, in GFLOP/s: {rates}"


@dataclass(frozen=True)
class Speed:
    """The precision and the layout of a run's frozen weights."""

    dtype: str
    """fp32, bf16 or fp64."""
    packed: bool = True
    """Whether weights are packed where that works."""
    rates: Rates | None = None
    """What it was chosen by; None where nothing was measured."""

    @property
    def not_packed(self) -> str | None:
        """Why weights are not packed although they could be; None where they may be."""
        if self.packed:
            return None
        if self.rates is None:
            return "no faster on the machine on which the run began"
        plain, packed = self.rates.of(self.dtype)
        return None if packed is None else f"no faster on this machine ({packed:.3g} against {plain:.3g} GFLOP/s)"

    def notes(self, asked: str) -> tuple[str, ...]:
        """What was measured, and what ``train.dtype=auto`` chose."""
        chosen = (f"train.dtype=auto takes {self.dtype}",) if asked == "auto" else ()
        return ("; ".join((str(self.rates), *chosen)),) if self.rates is not None else chosen

    def warnings(self, asked: str) -> tuple[str, ...]:
        """A warning where the precision that was asked for is the slower one."""
        if asked != "bf16" or self.rates is None or self.rates.best("bf16") >= self.rates.best("fp32"):
            return ()
        return (
            f"train.dtype=bf16 is slower than fp32 on this machine ({self.rates.best('bf16'):.3g} against "
            f"{self.rates.best('fp32'):.3g} GFLOP/s); use train.dtype=auto or fp32",
        )


def choose_speed(base: nn.Module, heads: tuple[str, ...], dtype: str, fast: bool) -> Speed:
    """The Speed for a base model in ``train.dtype``; ``fast`` is ``train.fast``, without which nothing is measured."""
    if next(base.parameters()).device.type != "cpu":
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        return Speed(half if dtype == "auto" else dtype)
    shape = _common_shape(base, heads)
    if not fast or dtype == "fp64" or shape is None:
        return Speed("fp32" if dtype == "auto" else dtype)
    rates = measure_rates(*shape)
    if dtype == "auto":
        dtype = "bf16" if rates.best("bf16") >= _HALF_PAYS * rates.best("fp32") else "fp32"
    return Speed(dtype, rates.packing_pays(dtype), rates)


def _common_shape(base: nn.Module, heads: tuple[str, ...]) -> tuple[int, int] | None:
    """(inputs, outputs) of the layers that hold most of the frozen weights; None where all of these are small."""
    weights: Counter[tuple[int, int]] = Counter()
    for name, module in base.named_modules():
        if type(module) is nn.Linear and not within(name, heads):
            weights[module.in_features, module.out_features] += module.weight.numel()
    if not weights:
        return None
    (d_in, d_out), _ = weights.most_common(1)[0]
    return (d_in, d_out) if d_in * d_out >= _SMALL else None


@lru_cache(maxsize=32)
def measure_rates(d_in: int, d_out: int) -> Rates:
    """Time one frozen product in every way, in turn; the least time of each counts.

    Processor time on one thread, since threads that wait for each other on a busy machine tell nothing of products.
    """
    rows = max(16, min(_ROWS, _MULTIPLICATIONS // (d_in * d_out)))
    ways = [
        _product(d_in, d_out, rows, dtype, packed)
        for dtype in (torch.float32, torch.bfloat16)
        for packed in (False, True)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = _best_times(ways)
    finally:
        torch.set_num_threads(threads)
    flops = 2 * 2 * rows * d_in * d_out  # a product up and a product back
    rates = [None if seconds is None else flops / seconds / 1e9 for seconds in times]
    assert rates[0] is not None and rates[2] is not None, "plain products work everywhere"
    return Rates(d_in, d_out, rates[0], rates[1], rates[2], rates[3])


def _product(d_in: int, d_out: int, rows: int, dtype: torch.dtype, packed: bool) -> Callable[[], Tensor] | None:
    """A frozen product up and back; None where it cannot be packed."""
    linear = nn.Linear(d_in, d_out, bias=False, device="meta").requires_grad_(False)
    linear.weight = nn.Parameter(torch.full((d_out, d_in), 0.01, dtype=dtype), requires_grad=False)
    x = torch.ones(rows, d_in, dtype=dtype)
    if not packed:
        weight = linear.weight
        return lambda: F.linear(x, weight) @ weight
    if packing_unavailable(linear.weight) is not None:
        return None
    frozen = FrozenLinear(linear)
    return lambda: frozen.back(frozen.up(x))


@torch.no_grad()
def _best_times(ways: Sequence[Callable[[], Tensor] | None]) -> list[float | None]:
    """The least seconds of each way over some turns; one that is hopeless beside the first is timed once or twice."""
    best: list[float | None] = [None] * len(ways)
    for turn in range(_TURNS):
        for place, way in enumerate(ways):
            known, first = best[place], best[0]
            if way is None or (turn > 1 and known and first and known > _HOPELESS * first):
                continue
            began = time.thread_time()
            way()
            seconds = time.thread_time() - began
            best[place] = seconds if known is None or turn == 1 else min(known, seconds)
    return best
