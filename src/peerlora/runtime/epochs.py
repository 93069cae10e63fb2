"""A budget in epochs: the rounds that follow from it once the training rows are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from peerlora.config.run import RunConfig
from peerlora.config.train import share_of
from peerlora.errors import CompositionError
from peerlora.runtime.plan import Plan, plan


def rounds_of(config: RunConfig, rows: int) -> int:
    """The fewest rounds in which the clients train ``train.epochs`` times on as many rows as there are.

    A larger client does fewer epochs and a smaller one more, since all take equally many steps of a round.
    """
    train = config.train
    assert train.epochs is not None
    per_round = train.local_steps * train.accumulate * sum(config.batches)
    training = max(1, math.ceil(train.epochs * rows / per_round))
    rounds = max(training, math.floor(training / (1 - train.quiet)) - 1)  # or a few more: a share of rounds is rounded
    return next(each for each in count(rounds) if each - share_of(train.quiet, each) >= training)


def plan_rounds(planned: Plan, rows: int, clients: Sequence[int] | None) -> Plan:
    """The plan with the rounds of ``train.epochs``, where it is given, for so many training rows.

    Raises CompositionError where other settings ask for more rounds than these are.
    """
    config = planned.config
    if config.train.epochs is None:
        return planned
    rounds = rounds_of(config, rows)
    train = config.train.model_copy(update={"rounds": rounds, "epochs": None})
    if flaw := train.contradiction():
        raise CompositionError(f"train.epochs={config.train.epochs:g} of {rows:,} training rows: {flaw}")
    again = plan(config.model_copy(update={"train": train}), clients)
    note = f"train.epochs={config.train.epochs:g} of {rows:,} training rows: train.rounds={rounds}"
    return replace(again, notes=(note, *again.notes))
