"""The digest by which two base models are told apart."""

import hashlib

import torch
from torch import nn


def base_digest(base: nn.Module) -> str:
    """Return the SHA-256 of all frozen weights, by name, hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(base.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy() if value.numel() else b"")
    return digest.hexdigest()
