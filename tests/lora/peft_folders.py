"""Adapters worth exporting, and their export; shared by the tests of both directions."""

from dataclasses import replace
from pathlib import Path

import torch

from peerlora.lora.adapters import mask_ranks
from peerlora.lora.peft_io import export_adapter

FP32 = "train.dtype=fp32"


def trained(federation, seed=3):
    """Adapters of which every tensor differs from the start, from client to client."""
    generator = torch.Generator().manual_seed(seed)
    x = federation.start
    noise = torch.randn(x.flat.shape, generator=generator, dtype=torch.float64).to(x.flat.dtype)
    return mask_ranks(replace(x, flat=x.flat + 0.1 * noise))


def export(federation, folder, x, client=0):
    return export_adapter(Path(folder), x, client, federation.model, federation.export)
