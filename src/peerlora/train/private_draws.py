"""Random numbers on which privacy rests: samples of rows and noise, from the system's generator or from seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float

from peerlora.randomness import numpy_generator, torch_generator

_SUMMED = 4  # normal draws behind each one: nobody can solve for what rounding of a float betrays (arXiv 2107.10138)
_MANTISSA = 53  # bits of a float64


@runtime_checkable
class PrivateDraws(Protocol):
    """Draws for one client's job; ``purpose`` tells apart what is drawn within it."""

    def uniform(self, count: int, purpose: str, client: int, job: int) -> Iterator[Float[np.ndarray, " count"]]:
        """Endless arrays of independent numbers in [0, 1), each drawn when it is asked for."""
        ...

    def normal(self, count: int, purpose: str, client: int, job: int) -> Float[np.ndarray, " count"]:
        """Independent numbers of mean 0 and variance 1, in float64."""
        ...

    def dropout(self, client: int, job: int) -> torch.Generator:
        """The generator of one job's dropout."""
        ...


class SeededDraws:
    """Draws by (seed, client, job, purpose): they repeat, and who knows the seed can take the noise off again."""

    def __init__(self, seed: int):
        self.seed = seed

    def uniform(self, count: int, purpose: str, client: int, job: int) -> Iterator[Float[np.ndarray, " count"]]:
        """See ``PrivateDraws``."""
        generator = numpy_generator(self.seed, purpose, client=client, round=job)
        while True:
            yield generator.random(count)

    def normal(self, count: int, purpose: str, client: int, job: int) -> Float[np.ndarray, " count"]:
        """See ``PrivateDraws``."""
        return numpy_generator(self.seed, purpose, client=client, round=job).standard_normal(count)

    def dropout(self, client: int, job: int) -> torch.Generator:
        """See ``PrivateDraws``."""
        return torch_generator(self.seed, "dropout", client=client, round=job)


class SystemDraws:
    """Draws by the operating system's cryptographic generator: nobody can repeat them, this run neither."""

    def uniform(self, count: int, purpose: str, client: int, job: int) -> Iterator[Float[np.ndarray, " count"]]:
        """See ``PrivateDraws``."""
        while True:
            yield _uniform(count)

    def normal(self, count: int, purpose: str, client: int, job: int) -> Float[np.ndarray, " count"]:
        """See ``PrivateDraws``."""
        return _box_muller(_SUMMED * count).reshape(_SUMMED, count).sum(0) / _SUMMED**0.5

    def dropout(self, client: int, job: int) -> torch.Generator:
        """See ``PrivateDraws``."""
        return torch.Generator().manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)


def _uniform(count: int) -> Float[np.ndarray, " count"]:
    words = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
    return (words >> np.uint64(64 - _MANTISSA)) * 2.0**-_MANTISSA


def _box_muller(count: int) -> Float[np.ndarray, " count"]:
    """Normal numbers from pairs of uniform ones (Box and Muller 1958)."""
    half = -(-count // 2)
    radius = np.sqrt(-2 * np.log1p(-_uniform(half)))
    angle = 2 * np.pi * _uniform(half)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
