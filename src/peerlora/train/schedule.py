"""The learning rate of every round: a function of the settings and the round alone, so that all clients agree on it.

It is constant within a round.  A client that was away, and a run that is resumed, learn with the rate of the round that
they are in.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from peerlora.config.train import DECAY, share_of

if TYPE_CHECKING:
    from peerlora.config.train import TrainConfig


def rate(settings: TrainConfig, t: int) -> float:
    """The learning rate of round ``t``, counted from 0."""
    return settings.lr * rate_factor(settings, t)


def rate_factor(settings: TrainConfig, t: int) -> float:
    """The share of ``train.lr`` that clients learn with in round ``t``, above 0 in every training round.

    Of W rounds of warm-up, round t has (t + 1) / (W + 1).  After them it is ``floor + (1 - floor) f`` with f as in
    transformers' schedules at step t of R, R the training rounds and D those of the decline:

        linear   (R - t) / (R - W)
        cosine   (1 + cos(pi (t - W) / (R - W))) / 2
        wsd      min(1, (R - t) / D)

    Beyond round R it is the floor; of a constant rate it is 1.
    """
    if settings.schedule == "constant" and not settings.warmup:
        return 1.0
    rounds = settings.training_rounds
    rising = settings.warmup_rounds
    if t < rising:
        return (t + 1) / (rising + 1)
    left, falling = max(rounds - t, 0), rounds - rising
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "wsd":
        falling = min(share_of(DECAY if settings.decay is None else settings.decay, rounds), falling)
    f = min(1.0, left / falling) if falling else float(left > 0)
    if settings.schedule == "cosine":
        f = (1 + math.cos(math.pi * (1 - f))) / 2
    return settings.floor + (1 - settings.floor) * f
