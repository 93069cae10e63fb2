"""The digest by which two base models are told apart."""

import hashlib

import torch
from torch import nn


def base_digest(base: nn.Module, halved: bool = False) -> str:
    """Return the SHA-256 of all frozen weights, by name, hexadecimal.

    ``halved``: of the weights rounded to bf16, so that a base kept in fp32 and one kept in bf16 have the same.
    """
    digest = hashlib.sha256()
    for name, value in sorted(base.state_dict().items()):
        value = value.detach().cpu().contiguous()
        if halved and value.is_floating_point():
            value = value.to(torch.bfloat16)
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy() if value.numel() else b"")
    return digest.hexdigest()
