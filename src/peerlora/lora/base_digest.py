"""The digest by which two base models are told apart."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def base_digest(base: nn.Module, halved: bool = False, originals: Mapping[str, str] | None = None) -> str:
    """Return the SHA-256 of all frozen weights, by name, hexadecimal.

    ``halved``: of the weights rounded to bf16, so that a base kept in fp32 and one kept in bf16 have the same.
    ``originals``: digests, by name, of weights that have been changed since they were read.
    """
    return digest_of(base.state_dict(), halved, originals)


def digest_of(
    tensors: Mapping[str, torch.Tensor], halved: bool = False, originals: Mapping[str, str] | None = None
) -> str:
    """Return the SHA-256 of tensors by name, hexadecimal; arguments as in `base_digest`."""
    digest, originals = hashlib.sha256(), originals or {}
    for name, value in sorted(tensors.items()):
        if name in originals:
            digest.update(f"{name} {originals[name]}\n".encode())
        else:
            _add(digest, name, value, halved)
    return digest.hexdigest()


def tensor_digest(value: torch.Tensor, halved: bool = False) -> str:
    """Return the SHA-256 of one tensor, hexadecimal; ``halved`` as in `base_digest`."""
    digest = hashlib.sha256()
    _add(digest, "", value, halved)
    return digest.hexdigest()


def _add(digest: Any, name: str, value: torch.Tensor, halved: bool) -> None:
    value = value.detach().cpu().contiguous()
    if halved and value.is_floating_point():
        value = value.to(torch.bfloat16)
    digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
    digest.update(value.flatten().view(torch.uint8).numpy() if value.numel() else b"")
