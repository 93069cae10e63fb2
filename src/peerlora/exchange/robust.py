"""Rules for what a receiver makes of its neighbours' adapters when some of them may send anything.

All look at one vector per client: A, B and a mixed head, one after the other.  Since (c A, B / c) is the same update as
(A, B), the distances between such vectors mean something only because all clients start from the same A and stay near.
Who sends a value that is not finite counts as absent.  Where too few are left to choose from, a client keeps its own.
All is computed in float64, in which squares of any finite float32 stay finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peerlora.config.exchange import RobustConfig
from peerlora.errors import CompositionError
from peerlora.exchange.combine import Combined, CombineRule, Received
from peerlora.exchange.wrapper import ExchangeWrapper, only_adapters
from peerlora.lora.adapters import Adapters

Coefficients = Float[Tensor, "#receiver sender"]


def trimmed_mean(received: Received, drop: int) -> Combined:
    """In every coordinate the plain mean without the ``drop`` largest and smallest.

    Source: Yin et al. 2018, arXiv 1803.01498; over a closed neighbourhood as in UBAR's and others' baselines.
    """
    return _trimmed(received, torch.full_like(present(received).sum(1), drop))


def median(received: Received) -> Combined:
    """In every coordinate the median; of an even number the mean of the middle two."""
    return _trimmed(received, (present(received).sum(1) - 1) // 2)


def clipped_gossip(received: Received, radius: float | None, drop: int) -> Combined:
    """``x_i + sum_j w_ij clip(x_j - x_i, tau_i)``: a neighbour moves a client by ``w_ij tau`` at most.

    Without ``radius`` tau is the distance of the neighbour after the ``drop`` farthest, 0 where there is none.

    Source: He, Karimireddy, Jaggi 2022, arXiv 2202.01545; the adaptive tau as in the authors' code (second largest).
    """
    distance = distances(received)
    if radius is None:
        # The receiver's own distance is the last, a zero: so many neighbours are needed as are dropped, and one more.
        ordered = distance.where(distance.isfinite(), 0).sort(dim=1, descending=True).values
        tau = ordered[:, drop : drop + 1] if ordered.shape[1] > drop else torch.zeros_like(ordered[:, :1])
    else:
        tau = torch.full_like(distance[:, :1], radius)
    shrunk = (tau / distance.clamp_min(torch.finfo(distance.dtype).tiny)).clamp_max(1)
    return blended(received, received.weights * shrunk, clipped=(shrunk < 1).double().mean(1))


def balance(received: Received, base: Float[Tensor, " parameter"], share: float, alpha: float) -> Combined:
    """``alpha x_i + (1 - alpha)`` mean of the ``x_j`` with ``|x_j - x_i| <= share |x_i - base|``, if there are any.

    Source: Fang et al. 2024, arXiv 2406.10416 (recalled); ``share = gamma exp(-kappa t / T)``.
    Differs: the norm is that of the update since the common start ``base``, since A's start would dominate ``|x_i|``.
    """
    distance = distances(received)
    near = distance <= share * (received.own.flat.double() - base.double()).norm(dim=1, keepdim=True)
    others = near.sum(1, keepdim=True) - 1  # the receiver is near itself
    each = near.to(distance) * (1 - alpha) / others.clamp_min(1)  # its own entry has no effect: blended sums x_j - x_i
    return blended(received, each, rejected=(~near).double().mean(1))


def rfa(received: Received, steps: int, smoothing: float) -> Combined:
    """The geometric median, by Weiszfeld steps with weights ``w_j / max(smoothing, |x_j - z|)``.

    Source: Pillutla, Kakade, Harchaoui 2019, arXiv 1912.13445.
    Differs: z starts at the coordinate-wise median; from the mean, one far sender costs more steps than there are.
    """
    values, here = _values(received), present(received)
    base = received.weights.clamp_min(0) * here
    base = base.where(base.sum(1, keepdim=True) > 0, here.double())
    z = _middle(received, (here.sum(1) - 1) // 2)[0]
    c = base
    for _ in range(steps):
        c = base / (values - z[:, None]).norm(dim=2).clamp_min(smoothing)
        c = c / c.sum(1, keepdim=True).clamp_min(torch.finfo(c.dtype).tiny)  # 0 where nobody is finite
        z = torch.einsum("rs,rsp->rp", c, values)
    return blended(received, c.expand(received.own.clients, -1))


def krum(received: Received, drop: int) -> Combined:
    """The model with the smallest sum of squared distances to its nearest ``n - drop - 2`` others.

    Source: Blanchard et al. 2017, arXiv 1703.02757.
    """
    values, here = _values(received), present(received)
    squared = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").square()
    squared = squared.masked_fill(~here[:, None, :], math.inf).masked_fill(~here[:, :, None], math.inf)
    compared = here.sum(1, keepdim=True) - drop - 2
    counts = torch.arange(squared.shape[2], device=squared.device) <= compared[..., None]  # the nearest is itself, at 0
    score = squared.sort(dim=2).values.where(counts, 0).sum(2).masked_fill(~here, math.inf)
    chosen = torch.nn.functional.one_hot(score.argmin(1), score.shape[1]).to(values) * (compared > 0)
    return blended(received, chosen.expand(received.own.clients, -1))


def present(received: Received) -> Bool[Tensor, "#receiver sender"]:
    """Whose values are all finite, and their norm in float64 too."""
    return _finite(received)[received.senders]


def distances(received: Received) -> Float[Tensor, "receiver sender"]:
    """``|x_j - x_i|`` in float64, infinite for senders whose values are not finite."""
    own, values = received.own.flat.double(), _values(received)
    mode = "donot_use_mm_for_euclid_dist"  # a product would lose the digits of near vectors
    if len(values) == 1:
        distance = torch.cdist(own, values[0], compute_mode=mode)
    else:
        distance = torch.cdist(own[:, None], values, compute_mode=mode)[:, 0]
    return distance.masked_fill(~present(received), math.inf)


def blended(received: Received, c: Coefficients, **measures: Float[Tensor, " receiver"]) -> Combined:
    """``x_i + sum_j c_ij (x_j - x_i)`` for finite ``x_j``, and what is worth logging."""
    flat, own, fine = received.all_adapters.flat.double(), received.own.flat.double(), _finite(received)
    weights = c.double().where(fine[received.senders], 0)
    kept = 1 - weights.sum(1, keepdim=True)
    mixed = kept * own + received.weighted_sum(weights.expand(len(own), -1), flat.where(fine[:, None], 0))
    return Combined(replace(received.own, flat=mixed.to(received.own.flat.dtype)), measures)


def _trimmed(received: Received, drop: Int[Tensor, "#receiver"]) -> Combined:
    own = received.own.flat
    mean, count = _middle(received, drop)
    return Combined(replace(received.own, flat=torch.where(count > 0, mean.to(own.dtype), own)))


def _middle(
    received: Received, drop: Int[Tensor, "#receiver"]
) -> tuple[Float[Tensor, "#receiver parameter"], Int[Tensor, "#receiver 1"]]:
    """In every coordinate the mean without the ``drop`` largest and smallest, and of how many; 0 of none."""
    ordered = _values(received, absent=math.inf).sort(dim=1).values
    place, left = torch.arange(ordered.shape[1], device=ordered.device), present(received).sum(1) - drop
    kept = (place >= drop[:, None]) & (place < left[:, None])  # [#receiver, sender]
    count = kept.sum(1, keepdim=True)
    return ordered.where(kept[..., None], 0).sum(1) / count.clamp_min(1), count


def _finite(received: Received) -> Bool[Tensor, " client"]:
    """By client; a norm that is infinite in float64 is no client's honest one either."""
    return received.all_adapters.flat.double().norm(dim=1).isfinite()


def _values(received: Received, absent: float = 0.0) -> Float[Tensor, "#receiver sender parameter"]:
    """What was sent, in float64; ``absent`` in place of a message that is not finite."""
    sent = received.all_adapters.flat[received.senders].double()
    return sent.where(present(received)[..., None], absent)


@dataclass(frozen=True)
class RoundCounter:
    """How far the run is, for rules that grow stricter."""

    t: int
    rounds: int


def build_rule(config: RobustConfig, base: Float[Tensor, " parameter"], clock: RoundCounter) -> CombineRule:
    """The rule of a config in one round; ``base`` is the common start of what is mixed."""
    makers: dict[str, Callable[[Any], CombineRule]] = {
        "trimmed-mean": lambda config: partial(trimmed_mean, drop=config.drop),
        "median": lambda config: median,
        "clipped-gossip": lambda config: partial(clipped_gossip, radius=config.radius, drop=config.drop),
        "balance": lambda config: partial(
            balance,
            base=base,
            share=config.gamma * math.exp(-config.kappa * clock.t / clock.rounds),
            alpha=config.alpha,
        ),
        "rfa": lambda config: partial(rfa, steps=config.steps, smoothing=config.smoothing),
        "krum": lambda config: partial(krum, drop=config.drop),
    }
    return makers[config.kind](config)


class Robust(ExchangeWrapper):
    """An Exchange whose ``mix`` is a robust rule.  The mean over clients is no longer kept."""

    def __init__(self, peers: Any, config: RobustConfig, start: Adapters, rounds: int):
        super().__init__(peers)
        self.config, self.start, self.rounds = config, start, rounds

    def mix(self, x: Any, target: str | None = None) -> Adapters:
        """``x_i <- rule(received by i)``; a payload with a target is more than adapters, and refused."""
        x = only_adapters(x, "exchange.robust")
        base = self.start.flat[0, self.start.spec.columns_of(x.spec)]
        return self.peers.combine(x, build_rule(self.config, base, RoundCounter(self.peers.t, self.rounds)))

    def combine(self, x: Adapters, rule: CombineRule, merged: bool = False) -> Adapters:
        """Refused: there would be two rules."""
        raise CompositionError(
            "exchange.robust cannot be used by a method with a rule of its own; use dec-lora, adf-lora or another "
            "method that mixes adapters"
        )
