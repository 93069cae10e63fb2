"""Questions about products B·A that never form one densely.

Shapes: ``B`` [client, d_out, rank], ``A`` [client, rank, d_in]; the scaling alpha/rank is left out throughout, as in
the identities of Wang et al. 2025 (arXiv 2511.18291) and of the notes in docs/methods.md.  Call with float64.

``left`` [..., d_out, wide] and ``right`` [..., wide, d_in] stand for their product, a sum over several clients that
``joined`` writes as one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_COLUMNS = 64  # columns of one strip of a product


def sum_norm2(B: Float[Tensor, "client d_out rank"], A: Float[Tensor, "client rank d_in"]) -> Float[Tensor, ""]:
    """``|| sum_i B_i A_i ||_F^2``."""
    left = B.permute(1, 0, 2).reshape(B.shape[1], -1)  # [d_out, client*rank]
    return norms2(left[None], A.reshape(1, -1, A.shape[-1]))[0]


def norms2(left: Float[Tensor, "each d_out wide"], right: Float[Tensor, "each wide d_in"]) -> Float[Tensor, " each"]:
    """``|| L_i R_i ||_F^2 = trace((L^T L)(R R^T))`` of each; where these Gram matrices are larger than the product, in
    strips of its columns."""
    if left.shape[-1] <= right.shape[-1]:
        return ((left.mT @ left) * (right @ right.mT)).sum((1, 2)).clamp_min(0.0)  # rounding can push a zero below zero
    strips = right.split(_COLUMNS, dim=-1)
    return torch.stack([(left @ strip).square().sum((1, 2)) for strip in strips]).sum(0)


def deviation(x: Float[Tensor, "client ..."]) -> Float[Tensor, "client ..."]:
    """Every client's distance vector to the average."""
    return x - x.mean(0, keepdim=True)


def cross_term2(B: Float[Tensor, "client d_out rank"], A: Float[Tensor, "client rank d_in"]) -> Float[Tensor, ""]:
    """``|| mean_i B_i A_i - Bbar Abar ||_F^2``: what is lost when factors are averaged in place of products.

    Identity 1: it is the covariance ``mean_i (B_i - Bbar)(A_i - Abar)``.
    """
    return sum_norm2(deviation(B) / len(B), deviation(A))


def product_consensus(B: Float[Tensor, "client d_out rank"], A: Float[Tensor, "client rank d_in"]) -> Float[Tensor, ""]:
    """``(1/n) sum_i || B_i A_i - mean_j B_j A_j ||_F^2``.

    Taken from the deviations, ``B_i A_i - Bbar Abar = [b_i, Bbar] [A_i; a_i]``, so that nearly equal clients don't
    give the small difference of two large numbers.
    """
    mean = B.mean(0, keepdim=True).expand_as(B)
    left = torch.cat([deviation(B), mean], dim=2)
    right = torch.cat([A, deviation(A)], dim=1)
    return (norms2(left, right).mean() - cross_term2(B, A)).clamp_min(0.0)


# --- sums of products, and their best approximation of a rank


def joined(
    B: Float[Tensor, "*batch sender d_out rank"],
    A: Float[Tensor, "*batch sender rank d_in"],
    weights: Float[Tensor, "*batch sender"],
) -> tuple[Float[Tensor, "*batch d_out wide"], Float[Tensor, "*batch wide d_in"]]:
    """``sum_j w_j B_j A_j`` as one product: the weighted B side by side, the A below each other."""
    return (weights[..., None, None] * B).transpose(-3, -2).flatten(-2), A.flatten(-3, -2)


@dataclass(frozen=True)
class Decomposition:
    """The singular value decomposition of a product, largest value first."""

    U: Float[Tensor, "*batch d_out value"]
    values: Float[Tensor, "*batch value"]
    V: Float[Tensor, "*batch value d_in"]
    rank: Int[Tensor, "*batch"]
    """How many values stand above rounding."""
    rest: Float[Tensor, "*batch"] | float = 0.0
    """Squared norm of what is not among the values."""

    @property
    def norm2(self) -> Float[Tensor, "*batch"]:
        """The squared norm of the product."""
        return self.values.square().sum(-1) + self.rest

    def tail(self, rank: Int[Tensor, "*receiver"]) -> Float[Tensor, "*all"]:
        """``sum_{k > rank} sigma_k^2``, the squared distance to the best approximation of this rank."""
        beyond = torch.arange(self.values.shape[-1], device=rank.device) >= rank[..., None]
        return (self.values.square() * beyond).sum(-1) + self.rest

    def factors(self, rank: int) -> tuple[Float[Tensor, "*batch d_out {rank}"], Float[Tensor, "*batch {rank} d_in"]]:
        """The best approximation of a rank, as balanced (B, A): ``B^T B = A A^T = diag(sigma)``.

        The sign is fixed by making the largest entry of every row of A positive.  Directions that the product lacks
        are zero in both factors.
        """
        kept = min(rank, self.values.shape[-1])
        alive = torch.arange(kept, device=self.values.device) < self.rank[..., None]
        root = self.values[..., :kept].sqrt() * alive
        peak = self.V[..., :kept, :].gather(-1, self.V[..., :kept, :].abs().argmax(-1, keepdim=True))[..., 0]
        signed = torch.where(peak < 0, -root, root)
        B, A = self.U[..., :kept] * signed[..., None, :], signed[..., None] * self.V[..., :kept, :]
        missing = rank - kept
        return torch.nn.functional.pad(B, (0, missing)), torch.nn.functional.pad(A, (0, 0, 0, missing))


def decompose(left: Float[Tensor, "*batch d_out wide"], right: Float[Tensor, "*batch wide d_in"]) -> Decomposition:
    """The decomposition of ``left @ right`` from the small core between the QR factors of both.

    A value counts as rounding below ``eps * max(d_out, d_in) * ||left|| * ||right||``: relative to what went in, since
    clients that cancel each other leave nothing but rounding.
    """
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.mT)
    U, values, V = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
    return Decomposition(Q_left @ U, values, V @ Q_right.mT, (values > _rounding(left, right)[..., None]).sum(-1))


def _rounding(
    left: Float[Tensor, "*batch d_out wide"], right: Float[Tensor, "*batch wide d_in"]
) -> Float[Tensor, "*batch"]:
    """Below what a singular value of ``left @ right`` is nothing but rounding."""
    widest = max(left.shape[-2], right.shape[-1]) * torch.finfo(left.dtype).eps
    return widest * torch.linalg.matrix_norm(left) * torch.linalg.matrix_norm(right)


def decompose_leading(
    left: Float[Tensor, "each d_out wide"], right: Float[Tensor, "each wide d_in"], rank: int
) -> Decomposition:
    """The ``rank`` leading values of ``left @ right``: of the factors of many clients in a fraction of the time.

    A product of nearly full rank has its leading vectors from the Gram matrix on its smaller side; a step of subspace
    iteration and a small decomposition of the product itself give back the digits that squaring loses.  One product at
    a time: what a client gets does not depend, to the bit, on who else is computed along with it.  NaN where a factor
    is not finite, as an attacker's may be.
    """
    parts = [_scaled_leading(*each, rank) for each in zip(left, right, strict=True)]
    U, values, V, alive, rest = (torch.stack(part) for part in zip(*parts, strict=True))
    return Decomposition(U, values, V, alive, rest)


_Leading = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""U, values, V, how many values stand above rounding, and the squared norm of the rest."""


def _scaled_leading(left: Float[Tensor, "d_out wide"], right: Float[Tensor, "wide d_in"], rank: int) -> _Leading:
    """Decompose factors of moderate size, whose squares are finite too."""
    size_left, size_right = (float(part.abs().amax()) or 1.0 for part in (left, right))
    if not math.isfinite(size_left + size_right):
        kept = min(rank, *left.shape, right.shape[1])
        U, values, V = (left.new_full(shape, math.nan) for shape in ((len(left), kept), (kept,), (kept, len(right.mT))))
        return U, values, V, torch.tensor(kept, device=left.device), left.new_tensor(math.nan)
    U, values, V, alive, rest = _leading(left / size_left, right / size_right, rank)
    scale = size_left * size_right
    return U, values * scale, V, alive, rest * scale * scale


def _leading(left: Float[Tensor, "d_out wide"], right: Float[Tensor, "wide d_in"], rank: int) -> _Leading:
    if 3 * left.shape[1] < 2 * min(left.shape[0], right.shape[1]):  # about where the two take equally long
        found, kept = decompose(left, right), torch.tensor(rank, device=left.device)
        return found.U[:, :rank], found.values[:rank], found.V[:rank], found.rank, found.tail(kept)
    M = left @ right
    if M.shape[0] > M.shape[1]:
        V, values, U, alive, rest = _leading(right.mT, left.mT, rank)
        return U.mT, values, V.mT, alive, rest
    space = torch.linalg.eigh(M @ M.mT).eigenvectors.flip(1)[:, :rank]  # largest first, as QR leaves the first alone
    space = torch.linalg.qr(M @ torch.linalg.qr(M.mT @ space).Q).Q
    U, values, V = torch.linalg.svd(space.mT @ M, full_matrices=False)
    rest = (M.square().sum() - values.square().sum()).clamp_min(0.0)
    return space @ U, values, V, (values > _rounding(left, right)).sum(), rest


# --- alignment


def nearest_rotation(M: Float[Tensor, "*batch rank rank"], strength: float = 1.0) -> Float[Tensor, "*batch rank rank"]:
    """The rotation R (determinant +1) with the largest ``<R, M>``; with a strength below 1 only part of the way to it.

    With ``M = A A_ref^T`` it minimises ``||R^T A - A_ref||``, with ``M = B^T B_ref`` it minimises ``||B R - B_ref||``.
    Part of the way: ``(1 - strength) I + strength R``, projected back.  That needs the determinant: halfway between I
    and a reflection lies a singular matrix.  Where M leaves R open (M = 0, say), R is the identity there.
    """
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    size = torch.linalg.matrix_norm(M).clamp_min(torch.finfo(M.dtype).tiny)
    R = _rotation(M / size[..., None, None] + 1e-12 * eye)
    return R if strength == 1 else _rotation((1 - strength) * eye + strength * R)


def _rotation(M: Float[Tensor, "*batch rank rank"]) -> Float[Tensor, "*batch rank rank"]:
    U, _, V = torch.linalg.svd(M)
    mirrored = torch.linalg.det(U @ V) < 0
    last = torch.where(mirrored[..., None], -U[..., -1], U[..., -1])  # the direction that costs least to flip
    return torch.cat([U[..., :-1], last[..., None]], dim=-1) @ V


# --- correction of B when A is given


def ridge_correction(
    left: Float[Tensor, "*batch d_out wide"],
    right: Float[Tensor, "*batch wide d_in"],
    A: Float[Tensor, "*batch rank d_in"],
    ridge: float,
) -> Float[Tensor, "*batch d_out rank"]:
    """The X with the smallest ``||left @ right - X A||^2 + ridge ||X||^2``: ``left right A^T (A A^T + ridge I)^-1``."""
    gram = A @ A.mT + ridge * torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)
    return torch.linalg.solve(gram, left @ (right @ A.mT), left=False)
