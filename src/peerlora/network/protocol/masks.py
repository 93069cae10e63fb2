"""Pairwise masks of secure sums: two senders of a receiver draw the same numbers, one adds and one subtracts them.

Source: Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning"; here without
shares of secrets: see docs/decisions/0024.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from jaxtyping import Int64, UInt64
from torch import Tensor

from peerlora.network.base import PeerId

_START = bytes(16)  # counter and nonce: a key is used for one mask, so they may be zero
_WORD = 8  # bytes


def keystream(key: bytes, words: int) -> UInt64[np.ndarray, " word"]:
    """Generate the mask of a key: ``words`` numbers below 2^64 of the ChaCha20 stream."""
    stream = Cipher(ChaCha20(key, _START), None).encryptor().update(bytes(_WORD * words))
    return np.frombuffer(stream, dtype="<u8").astype(np.uint64, copy=False)


def masked(values: Int64[Tensor, " word"], me: PeerId, keys: Mapping[PeerId, bytes]) -> Int64[Tensor, " word"]:
    """Add to values, modulo 2^64, the masks that a sender shares with each of the others.

    ``keys``: by the other sender; of a pair, the first in the alphabet adds the mask and the second subtracts it.
    """
    total = _words(values).copy()
    for other, key in keys.items():
        mask = keystream(key, len(total))
        if me < other:
            total += mask
        else:
            total -= mask
    return torch.from_numpy(total.view(np.int64))


def sum_of(messages: Iterable[Int64[Tensor, " word"]], words: int) -> Int64[Tensor, " word"]:
    """Add messages of ``words`` numbers modulo 2^64; the masks of a whole sender set cancel."""
    total = np.zeros(words, dtype=np.uint64)
    for message in messages:
        total += _words(message)
    return torch.from_numpy(total.view(np.int64))


def _words(values: Int64[Tensor, " word"]) -> UInt64[np.ndarray, " word"]:
    """The same bits as numbers without sign, whose sums wrap round."""
    return values.numpy().view(np.uint64)
