"""AdamW and SGD for all clients at once, on the flat [client, parameter] buffer.

A frozen block is *held*: neither decayed, nor moved by old momentum, nor counted as a step.  Handing an optimiser a
zero gradient instead would still decay and move it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peerlora.config.sections import TrainConfig

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch's own defaults


@dataclass(frozen=True)
class Moments:
    """An optimiser's memory; every tensor has the leading client axis."""

    first: Float[Tensor, "client parameter"]
    """Mean of gradients (AdamW) or momentum buffer (SGD)."""
    second: Float[Tensor, "client parameter"]
    """Mean of squared gradients (AdamW; unused by SGD)."""
    steps: Mapping[str, Int[Tensor, " client"]]
    """Steps taken so far, by block."""

    @staticmethod
    def fresh(flat: Float[Tensor, "client parameter"], blocks: tuple[str, ...]) -> Moments:
        """An empty memory."""
        steps = {block: torch.zeros(len(flat), dtype=torch.int64, device=flat.device) for block in blocks}
        return Moments(torch.zeros_like(flat), torch.zeros_like(flat), steps)

    def rows(self, clients: list[int]) -> Moments:
        """Some clients' memory, as a copy."""
        return Moments(self.first[clients], self.second[clients], {k: v[clients] for k, v in self.steps.items()})

    def put(self, clients: list[int], part: Moments) -> None:
        """Write back a copy that ``rows`` made."""
        self.first[clients], self.second[clients] = part.first, part.second
        for block, count in self.steps.items():
            count[clients] = part.steps[block]


def step(
    settings: TrainConfig,
    rate: float,
    values: Float[Tensor, "client parameter"],
    gradients: Mapping[str, Float[Tensor, "client column"]],
    moments: Moments,
    active: Mapping[str, slice],
) -> None:
    """One optimiser step, in place, on the columns of the active blocks only; ``gradients`` has one entry for each.

    ``rate``: the learning rate of the round, see ``schedule``; that of the settings is not looked at.  A head has
    ``block_rate``.
    """
    if settings.clip is not None:
        clip(gradients, settings.clip)
    fused = settings.fast and hasattr(torch, "_fused_adamw_")
    update = _sgd if settings.optimizer == "sgd" else _fused_adamw if fused else _adamw
    for block, columns in active.items():
        moments.steps[block].add_(1)
        own = block_rate(settings, rate, block)
        update(settings, own, values[:, columns], gradients[block], moments, columns, moments.steps[block])


def block_rate(settings: TrainConfig, rate: float, block: str) -> float:
    """The learning rate of a block, of its layer ("head:1"), where that of the factors is ``rate``."""
    return rate * settings.head_rate if block.partition(":")[0] == "head" else rate


def clip(gradients: Mapping[str, Float[Tensor, "client column"]], largest: float) -> None:
    """Scale each client's gradient, in place, so that its norm over all blocks is at most ``largest``."""
    factor = (largest / (norms(gradients) + 1e-6)).clamp_max(1.0)  # torch.nn.utils.clip_grad_norm_'s own epsilon
    for g in gradients.values():
        g.mul_(factor[:, None])


def norms(gradients: Mapping[str, Float[Tensor, "client column"]]) -> Float[Tensor, " client"]:
    """Each client's gradient norm over all active blocks."""
    return torch.stack([g.square().sum(1) for g in gradients.values()]).sum(0).sqrt()


def _adamw(
    settings: TrainConfig, rate: float, x: Tensor, g: Tensor, moments: Moments, columns: slice, steps: Tensor
) -> None:
    """Loshchilov and Hutter 2019 (arXiv 1711.05101), in torch's order of operations."""
    m, v = moments.first[:, columns], moments.second[:, columns]
    t = steps[:, None].to(torch.float64)
    if settings.weight_decay:
        x.mul_(1 - rate * settings.weight_decay)
    m.lerp_(g, 1 - BETA1)
    v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
    root = (1 - BETA2**t).sqrt().to(x.dtype)
    size = (rate / (1 - BETA1**t)).to(x.dtype)
    x.sub_(size * m / (v.sqrt() / root).add_(EPS))


def _fused_adamw(
    settings: TrainConfig, rate: float, x: Tensor, g: Tensor, moments: Moments, columns: slice, steps: Tensor
) -> None:
    """The same in one pass over memory, by torch's own kernel on every client's row: a tenth of the time."""
    rows = [list(part.unbind(0)) for part in (x, g, moments.first[:, columns], moments.second[:, columns])]
    values, gradients, first, second = rows
    torch._fused_adamw_(
        values,
        gradients,
        first,
        second,
        [],
        list(steps.float().unbind(0)),
        lr=rate,
        beta1=BETA1,
        beta2=BETA2,
        weight_decay=settings.weight_decay,
        eps=EPS,
        amsgrad=False,
        maximize=False,
    )


def _sgd(
    settings: TrainConfig, rate: float, x: Tensor, g: Tensor, moments: Moments, columns: slice, steps: Tensor
) -> None:
    """torch's SGD: weight decay joins the gradient, the momentum buffer starts at the first gradient."""
    if settings.weight_decay:
        g = g + settings.weight_decay * x
    if settings.momentum:
        buffer = moments.first[:, columns]
        buffer.mul_(settings.momentum).add_(g)
        g = buffer
    x.sub_(rate * g)
