"""How far clients disagree and what averaging factors costs, each round."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from peerlora.lora.adapters import Adapters
from peerlora.lora.product import cross_term2, deviation, local_cross_term2, product_consensus

_RECEIVERS = 32  # beyond this many clients the local cross-term is averaged over an even sample of receivers


@dataclass(frozen=True)
class Agreement:
    """Summed over layers.  Consensus distances are squared norms, cross-terms are norms."""

    consensus_A: float
    consensus_B: float
    consensus_product: float
    cross_term: float


def agreement(x: Adapters) -> Agreement:
    """Consensus of A, of B and of their product, and the global cross-term."""
    D_A = D_B = D_product = cross2 = 0.0
    for layer, A in x.A.items():
        A, B = A.double(), x.B[layer].double()
        D_A += float(deviation(A).square().sum()) / x.clients
        D_B += float(deviation(B).square().sum()) / x.clients
        D_product += float(product_consensus(B, A))
        cross2 += float(cross_term2(B, A))
    return Agreement(D_A, D_B, D_product, cross2**0.5)


def local_cross_term(x: Adapters, W: Float[np.ndarray, "receiver sender"]) -> float:
    """What this round's mixing of ``x`` loses, averaged over receivers (a sample of them where there are many)."""
    receivers = np.unique(np.linspace(0, len(W) - 1, min(len(W), _RECEIVERS)).astype(int))
    layers = [(x.A[layer].double(), x.B[layer].double()) for layer in x.A]
    lost = []
    for i in receivers:
        (senders,) = np.nonzero(W[i])
        weights = torch.from_numpy(W[i, senders])
        total = sum(float(local_cross_term2(B[senders], A[senders], weights)) for A, B in layers)
        lost.append(total**0.5)
    return float(np.mean(lost))
