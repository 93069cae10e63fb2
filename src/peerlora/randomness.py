"""Every random draw comes from (seed, client, round, purpose), never from who runs where or in which order."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(seed: int, purpose: str, *, client: int | None = None, round: int | None = None) -> int:
    """A 63-bit seed, equal on every machine for equal arguments and independent for different ones."""
    key = f"{seed}|{client}|{round}|{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def numpy_generator(
    seed: int, purpose: str, *, client: int | None = None, round: int | None = None
) -> np.random.Generator:
    """A numpy generator for one purpose."""
    return np.random.default_rng(derive(seed, purpose, client=client, round=round))


def torch_generator(
    seed: int, purpose: str, *, client: int | None = None, round: int | None = None
) -> "torch.Generator":
    """A torch CPU generator for one purpose."""
    import torch

    return torch.Generator().manual_seed(derive(seed, purpose, client=client, round=round))
