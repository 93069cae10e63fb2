"""Questions about products B·A that never form one densely.

Shapes: ``B`` [client, d_out, rank], ``A`` [client, rank, d_in]; the scaling alpha/rank is left out throughout, as in
the identities of Wang et al. 2025 (arXiv 2511.18291) and of the notes in docs/methods.md.  Call with float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_COLUMNS = 64  # of a product that is looked at in strips


def sum_norm2(B: Float[Tensor, "client d_out rank"], A: Float[Tensor, "client rank d_in"]) -> Float[Tensor, ""]:
    """``|| sum_i B_i A_i ||_F^2``, by Gram matrices of the ranks or, where those are larger, in strips of columns."""
    left = B.permute(1, 0, 2).reshape(B.shape[1], -1)  # [d_out, client*rank]
    right = A.reshape(-1, A.shape[-1])  # [client*rank, d_in]
    if left.shape[1] <= right.shape[1]:
        return ((left.T @ left) * (right @ right.T)).sum().clamp_min(0.0)  # rounding can push a zero below zero
    strips = right.split(_COLUMNS, dim=1)
    return torch.stack([(left @ strip).square().sum() for strip in strips]).sum()


def norms2(B: Float[Tensor, "client d_out rank"], A: Float[Tensor, "client rank d_in"]) -> Float[Tensor, " client"]:
    """``|| B_i A_i ||_F^2 = trace((B^T B)(A A^T))`` of every client."""
    return ((B.mT @ B) * (A @ A.mT)).sum((1, 2))


def deviation(x: Float[Tensor, "client ..."]) -> Float[Tensor, "client ..."]:
    """Every client's distance vector to the average."""
    return x - x.mean(0, keepdim=True)


def cross_term2(B: Float[Tensor, "client d_out rank"], A: Float[Tensor, "client rank d_in"]) -> Float[Tensor, ""]:
    """``|| mean_i B_i A_i - Bbar Abar ||_F^2``: what is lost when factors are averaged in place of products.

    Identity 1: it is the covariance ``mean_i (B_i - Bbar)(A_i - Abar)``.
    """
    return sum_norm2(deviation(B) / len(B), deviation(A))


def local_cross_term2(
    B: Float[Tensor, "sender d_out rank"], A: Float[Tensor, "sender rank d_in"], weights: Float[Tensor, " sender"]
) -> Float[Tensor, ""]:
    """What one receiver loses in one mixing, squared; ``weights`` is its row of W without the zeros.

    Identity 2: ``sum_j w_j B_j A_j - B+ A+ = sum_j w_j (B_j - B+)(A_j - A+)``.
    """
    w = weights[:, None, None]
    b, a = B - (w * B).sum(0), A - (w * A).sum(0)
    return sum_norm2(w * b, a)


def product_consensus(B: Float[Tensor, "client d_out rank"], A: Float[Tensor, "client rank d_in"]) -> Float[Tensor, ""]:
    """``(1/n) sum_i || B_i A_i - mean_j B_j A_j ||_F^2``.

    Taken from the deviations, ``B_i A_i - Bbar Abar = [b_i, Bbar] [A_i; a_i]``, so that nearly equal clients don't
    give the small difference of two large numbers.
    """
    mean = B.mean(0, keepdim=True).expand_as(B)
    left = torch.cat([deviation(B), mean], dim=2)
    right = torch.cat([A, deviation(A)], dim=1)
    return (norms2(left, right).mean() - cross_term2(B, A)).clamp_min(0.0)
