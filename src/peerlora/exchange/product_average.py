"""The weighted average of products B A, cut to every receiver's rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.exchange.combine import Combined, Received
from peerlora.lora.adapters import Adapters
from peerlora.lora.product import Decomposition, decompose, joined


@dataclass(frozen=True)
class ProductAverage:
    """``sum_j w_j s_j B_j A_j`` of what reached each receiver, as factors of its rank."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """(B, A) by layer, without the receiver's scaling."""
    tail: Float[Tensor, " receiver"]
    """Squared norm of what the rank cuts off, summed over layers."""
    size: Float[Tensor, "#receiver"]
    """Squared norm of the average before the cut."""


Decompose = Callable[[Tensor, Tensor], Decomposition]


def average_products(received: Received, decompose: Decompose = decompose) -> ProductAverage:
    """Average the products that reached each receiver, with their scalings, and cut to its rank by SVD."""
    own = received.own
    ranks = own.ranks.to(own.flat.device)
    factors, tail = {}, torch.zeros(own.clients, dtype=torch.float64, device=own.flat.device)
    size = torch.zeros(len(received.weights), dtype=torch.float64, device=own.flat.device)
    for layer in received.layers:
        found = decompose(*joined(received.B(layer), received.A(layer), received.weights * received.scaling))
        factors[layer] = cut_to_rank(found, own, layer)
        tail += found.tail(ranks)
        size += found.norm2
    return ProductAverage(factors, tail, size)


def averaged_products(received: Received) -> Combined:
    """The weighted average of the products, truncated to each receiver's own rank."""
    found = average_products(received)
    return received.with_factors(found.factors, {"truncation_tail": found.tail})


def cut_to_rank(found: Decomposition, own: Adapters, layer: str) -> tuple[Tensor, Tensor]:
    """(B, A) of each client's rank, balanced, without its scaling; directions that are missing keep A and get B = 0."""
    rank, ranks = own.spec.rank, own.ranks.to(own.flat.device)
    B, A = found.factors(rank)
    alive = torch.arange(rank, device=ranks.device) < torch.minimum(found.rank, ranks)[:, None]
    shrink = own.scaling.double().rsqrt()[:, None, None]  # s B A is the product; the factors share 1/s evenly
    new_A = torch.where(alive[:, :, None], A * shrink, own.A[layer].double())
    return torch.where(alive[:, None, :], B * shrink, 0.0), new_A
