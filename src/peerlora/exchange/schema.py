"""What one client's message holds, and how many bytes it takes: a safetensors body."""

from functools import lru_cache

import torch
from safetensors.torch import save

Schema = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> (shape, dtype) of every vector in a message."""


def encoded_bytes(schema: Schema) -> int:
    """The size of one encoded message in bytes, found by encoding one; the values don't change it."""
    return _encoded_bytes(tuple(schema.items()))


@lru_cache(maxsize=256)
def _encoded_bytes(schema: tuple[tuple[str, tuple[tuple[int, ...], torch.dtype]], ...]) -> int:
    return len(save({name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in schema}))
