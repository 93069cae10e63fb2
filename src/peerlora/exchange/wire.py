"""What one client's message looks like as bytes: a safetensors body."""

from collections.abc import Mapping
from functools import lru_cache

import torch
from safetensors.torch import save

Schema = Mapping[str, tuple[int, ...]]


def encoded_bytes(schema: Schema, dtype: torch.dtype) -> int:
    """The size of one encoded message in bytes, found by encoding one; the values don't change it."""
    return _encoded_bytes(tuple(schema.items()), dtype)


@lru_cache(maxsize=256)
def _encoded_bytes(schema: tuple[tuple[str, tuple[int, ...]], ...], dtype: torch.dtype) -> int:
    return len(save({name: torch.zeros(shape, dtype=dtype) for name, shape in schema}))
