"""LoRA-FAIR: average the factors, then correct B for what averaging them lost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import Traits
from peerlora.errors import ConfigError
from peerlora.exchange.combine import Combined, Received
from peerlora.lora.product import joined, norms2, ridge_correction
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.lora.adapters import Adapters
    from peerlora.train.base import Learner

_STEPS = 1000  # of the descent on the cosine objective at most, as in re-implementations of the paper


@dataclass(frozen=True)
class LoRAFAIR(FactorGossip):
    """K local steps on A and B, then ``A_i <- Abar`` and ``B_i <- Bbar + dB``, where dB minimises

    ``||D - (Bbar + dB) Abar||^2 + ridge ||dB||^2``   (objective "ridge", in closed form), or
    ``1 - cos(D, (Bbar + dB) Abar) + ridge ||dB||^2`` (objective "cosine", by descent from dB = 0),

    with ``D = sum_j W_ij B_j A_j`` and the bars weighted in the same way.

    Source: "LoRA-FAIR", arXiv 2411.14961 (correction of B, cosine similarity, lambda = 0.01 and the descent as others
    describe the paper; its code was not read).  There the penalty is ||dB||; the square, and the cosine of the matrices
    written as one vector each, are a re-implementation's (another takes column by column).
    Differs (ours): the closed form, and its lambda, which is on another scale than the cosine's; the server is replaced
    by each receiver with its row of W (the server's case is the complete graph), in which neighbours weigh the same,
    however many rows they have; the descent takes a quarter of a step that would not lower the objective and doubles
    one that does, because the gradient of a cosine grows without bound as B gets small, as at the start; so it goes to
    the optimum, where the published number of plain steps stops before it, and corrects more.
    """

    ridge: float = 0.01
    """Lambda: how much dB is held back; large values approach plain averaging."""
    objective: Literal["ridge", "cosine"] = "ridge"
    traits: ClassVar = Traits(
        source="LoRA-FAIR, arXiv 2411.14961",
        mixes="A and B, then B is corrected",
        sends="models",
        sends_gradients=False,
        requires=Properties(row_stochastic=True, column_stochastic=True, neighbours_only=True),
    )

    def __post_init__(self):
        if not self.ridge > 0:
            raise ConfigError(f"algorithm.ridge: {self.ridge} given; expected a number above 0")

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round."""
        rule = partial(corrected_average, ridge=self.ridge, cosine=self.objective == "cosine")
        return peers.combine(learner.fit(x, "AB"), rule)


def corrected_average(received: Received, ridge: float, cosine: bool) -> Combined:
    """Averaged factors with the correction of B; measures what is left of ``||D - (Bbar + dB) Abar||^2``."""
    W = received.weights
    factors, left_over = {}, torch.zeros(len(W), dtype=torch.float64, device=W.device)
    for layer in received.layers:
        B, A = received.B(layer), received.A(layer)
        B_mean, A_mean = ((W[..., None, None] * factor).sum(1) for factor in (B, A))
        # Identity 2: the covariance of the factors is D - Bbar Abar, without the difference of two large products.
        lost = joined(B - B_mean[:, None], A - A_mean[:, None], W)
        if cosine:
            dB = cosine_correction(B_mean, A_mean, *joined(B, A, W), ridge)
        else:
            dB = ridge_correction(*lost, A_mean, ridge)
        factors[layer] = B_mean + dB, A_mean
        left_over += norms2(torch.cat([lost[0], -dB], dim=2), torch.cat([lost[1], A_mean], dim=1))
    return received.with_factors(factors, {"uncorrected": left_over})


def cosine_correction(
    B: Float[Tensor, "receiver d_out rank"],
    A: Float[Tensor, "receiver rank d_in"],
    left: Float[Tensor, "receiver d_out wide"],
    right: Float[Tensor, "receiver wide d_in"],
    ridge: float,
) -> Float[Tensor, "receiver d_out rank"]:
    """The dB to which descent on ``1 - cos(left right, (B + dB) A) + ridge ||dB||^2`` comes from zero.

    With ``C = left right A^T`` and ``G = A A^T``, ``<left right, X A> = <C, X>`` and ``||X A||^2 = <X G, X>``: no step
    sees anything of the size of a product.
    """
    C, G = left @ (right @ A.mT), A @ A.mT
    C = C / norms2(left, right).clamp_min(torch.finfo(C.dtype).tiny).sqrt()[:, None, None]

    def objective(dB: Tensor) -> tuple[Tensor, Tensor]:
        """Its value and its gradient; B = 0 has no cosine and stays."""
        X = B + dB
        size = ((X @ G) * X).sum((1, 2), keepdim=True).clamp_min(0).sqrt()
        inverse = torch.where(size > 0, 1 / size, 0.0)
        similarity = (C * X).sum((1, 2), keepdim=True) * inverse
        gradient = 2 * ridge * dB - (C - similarity * inverse * (X @ G)) * inverse
        return 1 - similarity + ridge * dB.square().sum((1, 2), keepdim=True), gradient

    dB = torch.zeros_like(B)
    step = torch.full((len(B), 1, 1), 0.01, dtype=B.dtype, device=B.device)
    value, gradient = objective(dB)
    for _ in range(_STEPS):
        moving = (step * gradient).abs().amax((1, 2), keepdim=True) > 1e-6 * B.abs().amax((1, 2), keepdim=True)
        if not moving.any():
            break
        trial = dB - step * gradient
        new_value, new_gradient = objective(trial)
        lower = moving & (new_value < value)  # who has arrived stays, whatever the others of the block still do
        dB, gradient = torch.where(lower, trial, dB), torch.where(lower, new_gradient, gradient)
        value = torch.where(lower, new_value, value)
        step = torch.where(lower, 2 * step, torch.where(moving, step / 4, step))
    return dB
