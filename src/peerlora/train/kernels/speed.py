"""Choice of precision and packing by what this machine computes fastest, measured once per process.

Processors differ by more than tenfold in what they gain from bf16 or from a packed layout, and some lose by it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlora.lora.base_weights import within
from peerlora.train.kernels.frozen_linear import FrozenLinear, packing_unavailable

_ROWS = 512  # tokens of one measured product at most, as in a small graph
_FEW = 16  # tokens at least, and those by which a hopeless way is found
_MULTIPLICATIONS = 1 << 27  # of one measured product, at most: some milliseconds
_SHAPES = 3  # that are measured at most: a block of a transformer has as many
_SMALL = 128 * 128  # weights of a layer, below which calls take longer than products and nothing is worth measuring
_TURNS = 3  # beside one that warms up
_HOPELESS = 3.0  # times slower than the first way: measured on few tokens only
_PACKING_PAYS = 1.05  # times as fast as the plain product, from which weights are packed
_HALF_PAYS = 1.3  # times as fast as fp32, from which train.dtype=auto takes bf16


@dataclass(frozen=True)
class Rates:
    """GFLOP/s of frozen products on one core, up and back, by the way they are computed; None: missing."""

    shapes: tuple[tuple[int, int], ...]
    """(inputs, outputs), those that hold most weights first."""
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
        shapes = ", ".join(f"{d_in} by {d_out}" for d_in, d_out in self.shapes)
        return f"frozen products of {shapes} on one core, in GFLOP/s: {rates}"


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


def choose_speed(base: nn.Module, heads: tuple[str, ...], dtype: str, fast: bool, tokens: int = _ROWS) -> Speed:
    """The Speed for a base model in ``train.dtype``.

    ``fast`` is ``train.fast``: without it nothing is packed, and nothing is measured for fp32.  ``tokens``: of all
    clients in one step.
    """
    if next(base.parameters()).device.type != "cpu":
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        return Speed(half if dtype == "auto" else dtype)
    shapes = _large_shapes(base, heads)
    if not shapes or dtype == "fp64" or (dtype == "fp32" and not fast):
        return Speed("fp32" if dtype == "auto" else dtype)
    rates = measure_rates(shapes, _rows(tokens))
    if dtype == "auto":  # the same precision with and without speed paths, so that these can be compared
        dtype = "bf16" if rates.best("bf16") >= _HALF_PAYS * rates.best("fp32") else "fp32"
    rates = rates if fast else replace(rates, packed=None, packed_bf16=None)
    return Speed(dtype, rates.packing_pays(dtype), rates)


Shapes = tuple[tuple[int, int, int], ...]
"""(inputs, outputs, how many layers have them)."""


def _large_shapes(base: nn.Module, heads: tuple[str, ...]) -> Shapes:
    """The shapes that hold most of the frozen weights, those first that hold most; none where all layers are small."""
    layers: Counter[tuple[int, int]] = Counter()
    for name, module in base.named_modules():
        if type(module) is nn.Linear and not within(name, heads):
            layers[module.in_features, module.out_features] += 1
    large = [(*shape, count) for shape, count in layers.items() if shape[0] * shape[1] >= _SMALL]
    return tuple(sorted(large, key=math.prod, reverse=True)[:_SHAPES])


def _rows(tokens: int) -> int:
    """Rows of the measured products: so many tokens, rounded down to a power of two, within limits."""
    return 1 << (max(_FEW, min(_ROWS, tokens)).bit_length() - 1)


@lru_cache(maxsize=32)
def measure_rates(shapes: Shapes, rows: int) -> Rates:
    """Time frozen products of these shapes in every way, in turn; the least time of each counts.

    A rate is over one product of every layer.  It is processor time on one thread, whatever the run has: threads that
    wait for each other on a busy machine tell nothing of products (docs/decisions/0028).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = [
            [None if seconds is None else count * seconds for seconds in _times(d_in, d_out, rows)]
            for d_in, d_out, count in shapes
        ]
    finally:
        torch.set_num_threads(threads)
    flops = sum(2 * 2 * math.prod(shape) for shape in shapes)  # of a token: a product up and a product back
    rates = [None if None in own else flops / sum(own) / 1e9 for own in zip(*times, strict=True)]
    assert rates[0] is not None and rates[2] is not None, "plain products work everywhere"
    return Rates(tuple(shape[:2] for shape in shapes), rates[0], rates[1], rates[2], rates[3])


def _times(d_in: int, d_out: int, rows: int) -> list[float | None]:
    """Seconds for each row of a product of so many in fp32, packed fp32, bf16 and packed bf16; fewer of large layers.

    A few show first what is hopeless and not worth the time of many.
    """
    kinds = [(dtype, packed) for dtype in (torch.float32, torch.bfloat16) for packed in (False, True)]
    few = _best_times([_product(d_in, d_out, _FEW, *kind) for kind in kinds], turns=2)
    assert few[0] is not None
    worth = [seconds is not None and seconds < _HOPELESS * few[0] for seconds in few]
    rows = max(_FEW, min(rows, _MULTIPLICATIONS // (d_in * d_out)))
    ways = [_product(d_in, d_out, rows, *kind) if pays else None for kind, pays in zip(kinds, worth, strict=True)]
    many = _best_times(ways, _TURNS)
    found = [(least, rows) if least else (probed, _FEW) for least, probed in zip(many, few, strict=True)]
    return [None if seconds is None else seconds / of for seconds, of in found]


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
def _best_times(ways: Sequence[Callable[[], Tensor] | None], turns: int) -> list[float | None]:
    """The least seconds of each way over some turns, after one that warms up; None of one that is missing."""
    best: list[float | None] = [None] * len(ways)
    for turn in range(turns + 1):
        for place, way in enumerate(ways):
            if way is None:
                continue
            began = time.thread_time()
            way()
            seconds = max(time.thread_time() - began, 1e-9)  # of a clock that ticks slowly
            known = best[place]
            best[place] = seconds if known is None or turn == 1 else min(known, seconds)
    return best
