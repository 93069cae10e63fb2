"""Pixels of images, resized once for a model, kept in a byte for each value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """The pixels of some images of one size; a model reads ``scale * byte + shift``, by channel."""

    bytes: np.ndarray
    """uint8 [image, channel, height, width]"""
    scale: np.ndarray
    """float64 [channel]"""
    shift: np.ndarray
    """float64 [channel]"""

    def __len__(self) -> int:
        return len(self.bytes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return self.bytes.shape[1:]

    def take(self, images: Sequence[int] | np.ndarray) -> Pixels:
        """The images with these numbers, in this order."""
        return replace(self, bytes=self.bytes[np.asarray(images, dtype=np.int64)])

    def values(self, images: np.ndarray, dtype: torch.dtype) -> Float[Tensor, "image channel height width"]:
        """What a model reads of the images with these numbers."""
        scale, shift = (torch.from_numpy(each).to(dtype)[:, None, None] for each in (self.scale, self.shift))
        return torch.from_numpy(self.bytes[images]).to(dtype) * scale + shift
