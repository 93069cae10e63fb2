"""Weighted sums in whole numbers modulo 2^64, as secure sums need them: their order and the processor do not matter.

A value is rounded to a multiple of 2^-40, about 1e-12.  Values may be up to 2^22, about 4 million, in size: no honest
adapter comes near that.  The weights of a receiver are not negative and sum to 1, so that every sum of its terms is a
number of at most 2^62 steps, and a few more by rounding: within what 64 bits with a sign hold, whatever the values are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from peerlora.errors import DivergenceError
from peerlora.exchange.schema import Schema
from peerlora.topology.storage import Matrix, columns_of

STEP = 2.0**-40
"""What a value is rounded to a multiple of."""
LEAST_SENDERS = 2
"""Neighbours whose values a sum must hold: of one alone it would be that one's value."""
SUMMED = "summed"
"""Name of the vector that holds a client's weighted values in steps."""
LIMIT = 2.0**22
"""The largest size of a value."""


def summed_schema(vectors: Schema) -> Schema:
    """What crosses in place of named vectors: all their values in one, of 8 bytes each."""
    return {SUMMED: ((sum(math.prod(shape) for shape, _ in vectors.values()),), torch.int64)} if vectors else {}


def encode(x: Float[Tensor, "*shape"], weight: float) -> Int64[Tensor, "*shape"]:
    """``weight x`` in steps, rounded to the nearest whole number; raises DivergenceError, see ``check_range``."""
    check_range(x)
    return (x.double() * (weight / STEP)).round().to(torch.int64)


def check_range(x: Float[Tensor, "*shape"], client: int | None = None) -> None:
    """Raise DivergenceError for values beyond ``LIMIT`` or not finite: cut to it, they would bias a sum unseen.

    ``client``: whose they are, where several are held.
    """
    if x.numel() and not bool((x.abs() <= LIMIT).all()):
        whose = "an adapter" if client is None else f"the adapter of client {client}"
        raise DivergenceError(
            f"{whose} has values of {float(x.abs().max()):.3g}; secure sums (exchange.secure) hold up to {LIMIT:.0f}"
            ": training has diverged, lower train.lr"
        )


def decode(total: Int64[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """The value of a number of steps."""
    return (total.double() * STEP).to(dtype)


def weighted_sums(
    x: Float[Tensor, "client scalar"], W: Matrix, receivers: Sequence[int]
) -> Float[Tensor, "receiver scalar"]:
    """``sum_j W_ij x_j`` for some receivers i, each summed in whole numbers."""
    for j in sorted({j for i in receivers for j in columns_of(W, i)}):
        check_range(x[j], j)
    sums = []
    for i in receivers:
        total = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
        for j in columns_of(W, i):
            total += encode(x[j], float(W[i, j]))
        sums.append(decode(total, x.dtype))
    return torch.stack(sums)
