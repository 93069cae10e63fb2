"""The proximal (Jordan-Kinderlehrer-Otto) step of one block of a flow, as a regression; formulas ours.

A step of size beta on ``F(p) = E_p[-Q] - tau entropy(p)`` moves an action, to first order, by ``beta (grad Q - tau
grad log p)``.  Block k of N moves actions by ``v_k / N``; if each velocity gains that vector, one sweep over all blocks
is one step, whatever N.  Only the abstract of SWFP (arXiv 2510.15388) is known, so this is a reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

LOG_DET_ACTIONS = 3
"""Action dimensions up to which the log-determinant of a block is computed exactly."""


def one_jump(
    action: Float[Tensor, "*row action"], velocity: Float[Tensor, "*row action"], time: float, limit: float = 1.0
) -> Float[Tensor, "*row action"]:
    """The action at which the flow would arrive by one straight step from ``time``: ``clip(a + (1 - t) v)``."""
    return (action + (1 - time) * velocity).clamp(-limit, limit)


def proximal_velocity(
    old: Float[Tensor, "*row action"],
    gradient: Float[Tensor, "*row action"],
    beta: float,
    entropy: float = 0.0,
    score: Float[Tensor, "*row action"] | None = None,
) -> Float[Tensor, "*row action"]:
    """What a block's velocity is regressed on: ``v_old + beta (grad Q - tau score)``.

    ``score``: that of the density of actions, where it is known; else the entropy is a term of the loss.
    """
    return old + beta * (gradient if score is None else gradient - entropy * score)


def score_of_velocity(
    action: Float[Tensor, "*row action"], velocity: Float[Tensor, "*row action"], time: float
) -> Float[Tensor, "*row action"]:
    """``grad log p_t`` of a flow that has just been trained by flow matching: ``-(x - t v) / (1 - t)``, t below 1.

    From ``E[x_0 | x_t] = x_t - t v``.  After fine-tuning it is no longer exact.
    """
    return -(action - time * velocity) / (1 - time)


def log_det(
    velocity: Callable[[Tensor], Tensor], action: Float[Tensor, "row action"], step: float
) -> Float[Tensor, " row"]:
    """``log |det(I + step dv/da)|`` of every row's Euler step, with its graph; for few action dimensions.

    Rows must not depend on each other.
    """
    dimensions = action.shape[1]
    assert dimensions <= LOG_DET_ACTIONS
    action = action.detach().requires_grad_()
    with torch.enable_grad():
        moved = action + step * velocity(action)
        rows = [
            torch.autograd.grad(moved[:, i].sum(), action, create_graph=True, retain_graph=True)[0]
            for i in range(dimensions)
        ]
    return torch.linalg.slogdet(torch.stack(rows, dim=1)).logabsdet


def anchored_losses(
    action: Float[Tensor, "client row action"],
    anchor: Float[Tensor, "client row action"],
    value: Float[Tensor, " client"],
    beta: float,
) -> Float[Tensor, " client"]:
    """Each client's ``E |a - anchor|^2 - 2 beta E Q``: FQL's loss of a one-step net, ``alpha = 1 / (2 beta)``.

    ``value``: the mean Q of ``action``.  Of ``Q = -kappa/2 (a - a*)^2`` the minimum is ``(anchor + beta kappa a*) / (1
    + beta kappa)``.
    """
    return (action - anchor).square().sum(2).mean(1) - 2 * beta * value


def proximal_losses(
    velocity: Float[Tensor, "client row action"],
    target: Float[Tensor, "client row action"],
    beta: float = 0.0,
    entropy: float = 0.0,
    log_dets: Float[Tensor, "client row"] | None = None,
    step: float = 1.0,
) -> Float[Tensor, " client"]:
    """Each client's ``E |v - target|^2 - 2 beta tau / h E log|det|``; its minimum has ``v = target - beta tau score``.

    With the target of ``proximal_velocity`` this is, to first order in beta, ``2 beta`` times ``-Q / (1 - t) +
    |v - v_old|^2 / (2 beta) - tau / h log|det|``.
    """
    losses = (velocity - target).square().sum(2).mean(1)
    if log_dets is None:
        return losses
    return losses - 2 * beta * entropy / step * log_dets.mean(1)
