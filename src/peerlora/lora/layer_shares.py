"""Diagnostics of a round by shares of the layers: each share is of all clients, and knows some layers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan, sqrt

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from peerlora.lora.adapters import Adapters, AdapterSpec
from peerlora.lora.diagnostics import (
    Agreement,
    Diagnostics,
    Mismatch,
    MixingMatrix,
    agreement,
    local_cross_terms2,
    mismatch,
)
from peerlora.lora.diagnostics import before_exchange as before
from peerlora.lora.merged import Merged

_FACTORS = ("A", "B")


@dataclass(frozen=True)
class LayerShare:
    """What some layers add to the diagnostics of a round."""

    agreement: Agreement
    mismatch: Mismatch | None
    """None where nothing was sent, or no models were."""
    lost2: Float[np.ndarray, " receiver"] | None
    """The squared local cross-terms, likewise."""
    sent: bool
    """Whether anything was."""


def split_layers(spec: AdapterSpec, shares: int) -> list[AdapterSpec]:
    """The layouts of the factors of consecutive layers, divided evenly; where layers are few, some have none."""
    blocks = tuple(block for block in spec.blocks if block in _FACTORS)
    parts = np.array_split(np.arange(len(spec.layers)), shares)
    cut = replace(spec, head=(), private_head=False, blocks=blocks)
    return [replace(cut, layers=tuple(spec.layers[i] for i in part)) for part in parts]


def columns_of_layers(spec: AdapterSpec, part: AdapterSpec) -> Int[Tensor, " column"]:
    """The columns of a layout that hold the factors of the layers of ``part``."""
    names = {layer.name for layer in part.layers}
    found = [slot for slot in spec.slots if slot.block in part.blocks and slot.name in names]
    return torch.cat([torch.arange(0), *(torch.arange(slot.start, slot.stop) for slot in found)])


def merged_of_layers(merged: Merged | None, part: AdapterSpec) -> Merged | None:
    """What was merged into the layers of ``part``."""
    return merged and Merged({layer.name: merged.layers[layer.name] for layer in part.layers})


def measure_share(after: Adapters, sent: Adapters | None, W: MixingMatrix) -> LayerShare:
    """Measure the layers of ``after`` and ``sent``, as ``diagnose`` does all of them."""
    if sent is None or not np.allclose(W.sum(axis=1), 1):
        return LayerShare(agreement(after), None, None, sent is not None)
    moved = mismatch(before(after, sent), after)
    return LayerShare(agreement(after), moved, local_cross_terms2(sent, W, after).numpy(), True)


def join_shares(shares: Sequence[LayerShare]) -> Diagnostics:
    """The diagnostics of the round: sums over layers, of cross-terms of their squares."""
    agreements = [vars(each.agreement) for each in shares]
    sums = {name: float(sum(each[name] for each in agreements)) for name in agreements[0] if name != "cross_term"}
    sums["cross_term"] = sqrt(sum(each["cross_term"] ** 2 for each in agreements))
    first = shares[0]
    if first.mismatch is None or first.lost2 is None:
        unknown = nan if first.sent else 0.0
        return Diagnostics(**sums, weak_mismatch=unknown, strong_mismatch=unknown, local_cross_term=unknown)
    moved = [each.mismatch for each in shares if each.mismatch is not None]
    lost2 = np.sum([each.lost2 for each in shares if each.lost2 is not None], axis=0)
    return Diagnostics(
        **sums,
        weak_mismatch=sum(each.weak_mismatch for each in moved),
        strong_mismatch=sum(each.strong_mismatch for each in moved),
        local_cross_term=float(np.sqrt(lost2).mean()),
    )
