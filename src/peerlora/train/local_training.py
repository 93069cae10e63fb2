"""What learners have in common: the round in progress, fits of groups of clients, and the optimiser's memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.config.train import TrainConfig
from peerlora.errors import DivergenceError
from peerlora.lora.adapters import Adapters, AdapterSpec, Block
from peerlora.train.backward_depth import TrainableColumns, moment_groups
from peerlora.train.base import LocalPlan, TrainStats
from peerlora.train.local_rules import ClientRows
from peerlora.train.loss_rules import LossRule
from peerlora.train.optim import Moments
from peerlora.train.privacy import PrivateTraining
from peerlora.train.schedule import rate


@dataclass(frozen=True)
class TrainingRound:
    """The round in progress."""

    t: int
    jobs: Sequence[int]
    """Of every client held here, the number that decides its draws."""
    clients: ClientRows
    """The clients that train."""
    stats: TrainStats
    rate: float
    """The learning rate."""
    quiet: bool
    """Whether nobody trains."""


class InRounds(ABC):
    """The round in which a Learner is, and those of before: rounds may lie in one another."""

    step_seconds: Float[Tensor, " client"] | None = None
    """Seconds that each client's local step takes in this round, on a virtual clock."""
    _round: Any

    @abstractmethod
    def _begun(self, t: int, jobs: Sequence[int] | None, clients: Sequence[int] | None) -> Any:
        """The facts of a round, with ``stats`` among them."""

    @contextmanager
    def round(
        self,
        t: int,
        jobs: Sequence[int] | None = None,
        clients: Sequence[int] | None = None,
        step_seconds: Float[Tensor, " client"] | None = None,
    ) -> Iterator[TrainStats]:
        """See ``Learner``."""
        outside = self._round
        self._round, self.step_seconds = self._begun(t, jobs, clients), step_seconds
        try:
            yield self._round.stats
        finally:
            self._round, self.step_seconds = outside, None


class LocalTraining(InRounds):
    """The part of a Learner that does not depend on what clients learn from.

    ``numbers``: the clients held here.  A ``fit`` outside a round draws as in round 0.
    """

    logs_evaluations = False

    def __init__(self, settings: TrainConfig, numbers: Sequence[int]):
        self.settings, self._numbers = settings, list(numbers)
        self.loss_rules: tuple[LossRule, ...] = ()
        """What is changed between logits and losses in training, in this order."""
        self.privacy: PrivateTraining | None = None
        """What makes local training differentially private; None: nothing does."""
        self.memory: Moments | None = None
        self._trained: tuple[str, ...] = ()
        self._round: TrainingRound = self._begun(0, None, None)

    @abstractmethod
    def _groups(
        self, spec: AdapterSpec, blocks: tuple[Block, ...], plan: LocalPlan, per_layer_moments: bool
    ) -> Iterator[tuple[ClientRows, TrainableColumns]]:
        """The clients that train together, and what of them trains."""

    @abstractmethod
    def _take_steps(
        self, x: Adapters, clients: ClientRows, columns: TrainableColumns, moments: Moments, plan: LocalPlan
    ) -> Float[Tensor, " client"]:
        """All local steps of some clients, in place on ``x.flat`` and ``moments``; returns their mean losses."""

    def _counts_layers(self, plan: LocalPlan) -> bool:
        """Whether layers may train unequally often, so that the optimiser counts the steps of each."""
        return plan.depth is not None and self.settings.optimizer_state != "round"

    def _begun(self, t: int, jobs: Sequence[int] | None, clients: Sequence[int] | None) -> TrainingRound:
        held = len(self._numbers)
        return TrainingRound(
            t,
            [t] * held if jobs is None else list(jobs),
            list(range(held) if clients is None else clients),
            TrainStats(torch.full((held,), float("nan"))),
            rate(self.settings, t),
            self.settings.is_quiet(t),
        )

    def fit(self, x: Adapters, plan: LocalPlan | str) -> Adapters:
        """See ``Learner``."""
        if self._round.quiet:
            return replace(x, flat=x.flat.clone())
        plan = LocalPlan.of(plan)
        if self.privacy is not None:
            if plan.row_weights is not None:
                self.privacy.refuse("weighs rows")
            self._round = replace(self._round, clients=self.privacy.admit(self._round.clients, self._round.jobs))
        blocks = plan.trained(x.spec)
        per_layer_moments = self._counts_layers(plan)
        memory = self._remembered(x, blocks, per_layer_moments)
        flat = x.flat.clone()
        losses = torch.full((x.clients,), float("nan"), dtype=torch.float64)
        for clients, columns in self._groups(x.spec, blocks, plan, per_layer_moments):
            part = replace(x.rows(_consecutive(clients)), flat=x.flat[clients])
            moments = memory.rows(clients) if memory else _fresh(part, per_layer_moments)
            losses[clients] = self._take_steps(part, clients, columns, moments, plan)
            flat[clients] = part.flat
            if memory:
                memory.put(clients, moments)
        self._round.stats.losses = losses
        return replace(x, flat=flat)

    def _remembered(self, x: Adapters, blocks: tuple[Block, ...], per_layer_moments: bool) -> Moments | None:
        """The optimiser memory to go on with; None where every round starts afresh."""
        if self.settings.optimizer_state == "round":
            return None
        switched = self.settings.optimizer_state == "phase" and blocks != self._trained
        if self.memory is None or switched:
            self.memory = _fresh(x, per_layer_moments)
        self._trained = blocks
        return self.memory

    def _mean_losses(self, seen: Sequence[Float[Tensor, " client"]], clients: ClientRows) -> Float[Tensor, " client"]:
        """The mean over local steps; ``seen``: the losses of each, and last the largest size of a parameter.

        Raises DivergenceError where one is not finite.
        """
        history = torch.stack(list(seen)).cpu()  # looked at once, since a GPU would wait for every look
        bad = (~history.isfinite()).nonzero()
        if len(bad):
            k, row = bad[0].tolist()
            client, now = clients[row], self._round.rate
            this_round = "" if now == self.settings.lr else f", {now:.3g} in this round"
            raise DivergenceError(
                f"the loss of client {self._numbers[client]} is {float(history[k, row])} in round "
                f"{self._round.jobs[client] + 1}, local step {min(k, len(history) - 2) + 1}; expected a finite number; "
                f"lower train.lr (now {self.settings.lr:g}{this_round}) or set train.clip"
            )
        return history[:-1].double().mean(0)

    def state_dict(self) -> dict[str, Tensor]:
        """See ``Learner``."""
        if self.memory is None:
            return {}
        steps = {f"steps.{block}": count for block, count in self.memory.steps.items()}
        return {"first": self.memory.first, "second": self.memory.second, **steps}

    def load_state_dict(self, saved: Mapping[str, Tensor], trained: Sequence[str]) -> None:
        """See ``Learner``."""
        self._trained = tuple(trained)
        if "first" in saved:
            steps = {name.removeprefix("steps."): saved[name] for name in saved if name.startswith("steps.")}
            self.memory = Moments(saved["first"], saved["second"], steps)

    @property
    def trained(self) -> tuple[str, ...]:
        """See ``Learner``."""
        return self._trained


def _fresh(x: Adapters, per_layer_moments: bool) -> Moments:
    """An empty optimiser memory for these clients."""
    return Moments.fresh(x.flat, moment_groups(x.spec, x.spec.blocks, per_layer_moments))


def _consecutive(clients: ClientRows) -> slice | ClientRows:
    """As a slice where they follow one another: what clients have merged is large, and a slice copies none of it."""
    run = slice(clients[0], clients[-1] + 1)
    return run if clients == list(range(run.start, run.stop)) else clients
