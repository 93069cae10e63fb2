"""FedEx-LoRA: average the factors, and merge what the average of the products has more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.algorithms.flora import drift_notes
from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import Traits
from peerlora.exchange.combine import Combined, Received
from peerlora.lora.product import joined, norms2
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.lora.adapters import Adapters
    from peerlora.topology.schedule import Topology
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class FedExLoRA(FactorGossip):
    """K local steps on A and B; then ``A_i <- Abar``, ``B_i <- Bbar``, ``weight_i += s (D - Bbar Abar)`` with
    ``D = sum_j W_ij B_j A_j`` and the bars weighted in the same way.

    The residual is kept as factors, ``sum_{j != p} W_ij (B_j - Bbar)(A_j - A_p)`` with any sender p: of rank
    (senders - 1) r, and free of the difference of two large products.

    Source: "FedEx-LoRA", arXiv 2410.09432, and its code, as others describe them: averages, exact residual into the
    base, equal weights.  The server is the complete graph.  That code is said to add the residual transposed, which
    is wrong for ordinary linear layers; here it is not.
    Differs (ours): on another graph every receiver corrects with its row of W.  Then each client's model is exactly
    its own base plus the weighted average of products, but bases differ and are never mixed.
    """

    traits: ClassVar = Traits(
        source="FedEx-LoRA, arXiv 2410.09432",
        mixes="A and B; the residual of the products goes into the base",
        operator="sum-product",
        sends="merges",
        sends_gradients=False,
        requires=Properties(row_stochastic=True, column_stochastic=True, neighbours_only=True),
        merges_into="base",
    )

    def prepared(self, topology: Topology, rounds: int) -> tuple[FedExLoRA, tuple[str, ...]]:
        """The method as it is, with a note where there is no server."""
        return self, drift_notes("fedex-lora", topology)

    def merged_columns(self, rank: int, senders: int, rounds: int) -> int:
        """Every round's residual, side by side."""
        return rank * (senders - 1) * rounds

    def start(self, x: Adapters, peers: Exchange) -> Adapters:
        """Nothing is merged yet."""
        return x.with_empty_merges()

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round."""
        return peers.combine(learner.fit(x, "AB"), averaged_with_residual)


def averaged_with_residual(received: Received) -> Combined:
    """Averaged factors, with the residual merged; measures the square of its norm."""
    assert received.own.merged is not None
    W, scaling = received.weights, received.own.scaling[:1].double()  # ranks are equal
    residuals, size2 = {}, torch.zeros(len(W), dtype=torch.float64, device=W.device)
    for layer in received.layers:
        left, right = residual(received.B(layer), received.A(layer), W)
        residuals[layer] = scaling * left, right
        size2 += norms2(*residuals[layer])
    merged = received.own.merged.plus(residuals)
    return Combined(replace(received.average(), merged=merged), {"merged_residual": size2})


def residual(
    B: Float[Tensor, "receiver sender d_out rank"],
    A: Float[Tensor, "receiver sender rank d_in"],
    W: Float[Tensor, "receiver sender"],
) -> tuple[Float[Tensor, "receiver d_out wide"], Float[Tensor, "receiver wide d_in"]]:
    """``sum_j w_j B_j A_j - Bbar Abar`` as one product.  Since ``sum_j w_j (B_j - Bbar) = 0``, one sender drops out."""
    off = B - (W[..., None, None] * B).sum(1, keepdim=True)
    return joined(off[:, 1:], A[:, 1:] - A[:, :1], W[:, 1:])
