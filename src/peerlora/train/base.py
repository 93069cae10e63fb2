"""The contract of local training: what methods and the runtime ask of the clients held here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from peerlora.lora.adapters import Adapters, AdapterSpec, Block, parse_blocks
from peerlora.runs.events import Event
from peerlora.train.backward_depth import BackwardDepth
from peerlora.train.local_rules import LocalRule

if TYPE_CHECKING:
    from peerlora.config.train import TrainConfig
    from peerlora.train.loop_learner import LoopTask
    from peerlora.train.loss_rules import LossRule
    from peerlora.train.online.task import FlowPolicyTask
    from peerlora.train.privacy import PrivateTraining
    from peerlora.train.row_scores import Measure
    from peerlora.train.tasks import Task

    AnyTask = Task | FlowPolicyTask | LoopTask


@dataclass(frozen=True)
class LocalPlan:
    """What the local steps of one ``fit`` train, and how."""

    blocks: str | tuple[Block, ...]
    """The factors that train; the word "AB" is short for ("A", "B").  A head that is not frozen trains as well."""
    rule: LocalRule | None = None
    """Changes the gradient of every step before it is clipped."""
    depth: BackwardDepth | None = None
    """Cuts backward passes short, client by client."""
    row_weights: Float[Tensor, "client row"] | None = None
    """How much each row of a client's shard counts in its loss, by its place in the shard."""
    turn: int | None = None
    """Of a model whose blocks are fine-tuned one after another: the number of the turn, of N blocks turn mod N trains
    alone.  None: all train."""

    @classmethod
    def of(cls, plan: LocalPlan | str) -> LocalPlan:
        """The plan itself, or the plan that trains the blocks in a word."""
        return cls(plan) if isinstance(plan, str) else plan

    def trained(self, spec: AdapterSpec) -> tuple[Block, ...]:
        """The blocks that change: the factors that train, and a head that is not frozen."""
        return spec.trained(parse_blocks(self.blocks))


@dataclass
class TrainStats:
    """What a round of local training measured."""

    losses: Float[Tensor, " client"]
    """Mean training loss of the last ``fit``; NaN for clients that did not train."""
    measures: dict[str, list[float]] = field(default_factory=dict)
    """What else was measured of each client that trained, or its own training loop has logged, by name."""
    events: list[Event] = field(default_factory=list)
    """Evaluations and warnings of training loops of the user's own."""


@dataclass(frozen=True)
class Scores:
    """Evaluation of each client's own model."""

    metric: Float[np.ndarray, " client"]
    loss: Float[np.ndarray, " client"]
    rows: int
    metrics: Mapping[str, Float[np.ndarray, " client"]] = field(default_factory=dict)
    """Further metrics, by name."""
    counts: Float[np.ndarray, "client kind 3"] | None = None
    """Of each label or type of entity: how often it is true, predicted, and both; None for tasks without these."""
    unknown: Bool[np.ndarray, " client"] | None = None
    """Whose loss nobody has told, so that it is NaN without a reason to worry; None: nobody's."""

    def diverged(self) -> Bool[np.ndarray, " client"]:
        """Whose loss is known, and not finite."""
        bad = ~np.isfinite(self.loss)
        return bad if self.unknown is None else bad & ~self.unknown

    def repeat(self, clients: int) -> Scores:
        """The scores of one client as those of so many."""
        more = {name: values.repeat(clients) for name, values in self.metrics.items()}
        counts = None if self.counts is None else self.counts.repeat(clients, 0)
        unknown = None if self.unknown is None else self.unknown.repeat(clients)
        return Scores(self.metric.repeat(clients), self.loss.repeat(clients), self.rows, more, counts, unknown)

    def of(self, clients: slice) -> Scores:
        """The scores of some of these clients."""
        more = {name: values[clients] for name, values in self.metrics.items()}
        counts = None if self.counts is None else self.counts[clients]
        unknown = None if self.unknown is None else self.unknown[clients]
        return Scores(self.metric[clients], self.loss[clients], self.rows, more, counts, unknown)

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of all these clients on the same rows."""
        more = {name: np.concatenate([each.metrics[name] for each in parts]) for name in parts[0].metrics}
        metric, loss = (np.concatenate([getattr(each, name) for each in parts]) for name in ("metric", "loss"))
        counts = [each.counts for each in parts if each.counts is not None]
        together = np.concatenate(counts) if len(counts) == len(parts) else None
        unknown = None
        if any(each.unknown is not None for each in parts):
            known = [np.zeros(len(each.loss), bool) if each.unknown is None else each.unknown for each in parts]
            unknown = np.concatenate(known)
        return cls(metric, loss, parts[0].rows, more, together, unknown)


class Learner(Protocol):
    """Trains and evaluates the clients held here, each on its own rows.  It owns model and data, never communicates.

    The part that a method needs, for clients that each move halfway to a point of their own:

    >>> import contextlib, dataclasses, torch
    >>> from peerlora.lora.adapters import AdapterSpec, LayerSpec
    >>> class Halfway:
    ...     def __init__(self, targets):
    ...         self.targets = targets
    ...
    ...     @contextlib.contextmanager
    ...     def round(self, t, jobs=None, clients=None, step_seconds=None):
    ...         self.stats = TrainStats(torch.full((len(self.targets),), float("nan")))
    ...         yield self.stats
    ...
    ...     def fit(self, x, plan):
    ...         flat = x.flat.clone()
    ...         for block in LocalPlan.of(plan).trained(x.spec):
    ...             flat[:, x.spec.columns(block)].lerp_(self.targets[:, x.spec.columns(block)], 0.5)
    ...         self.stats.losses = (self.targets - flat).square().sum(1)
    ...         return dataclasses.replace(x, flat=flat)
    >>> spec = AdapterSpec((LayerSpec("layer", d_in=1, d_out=1),), rank=1, alpha=1.0)
    >>> x, learner = Adapters(spec, torch.zeros(2, 2), torch.tensor([1, 1])), Halfway(torch.tensor([[4.0, 2], [0, 6]]))
    >>> with learner.round(0) as trained:
    ...     x = learner.fit(x, "B")
    >>> x.flat.tolist(), trained.losses.tolist()
    ([[0.0, 1.0], [0.0, 3.0]], [17.0, 9.0])
    """

    loss_rules: tuple[LossRule, ...]
    """What is changed between logits and losses in training, in this order."""
    step_seconds: Float[Tensor, " client"] | None
    """Seconds that each client's local step takes in this round, on a virtual clock; None without one."""
    privacy: PrivateTraining | None
    """What makes local training differentially private; None: nothing does."""

    @property
    def settings(self) -> TrainConfig:
        """What local steps are taken with."""
        ...

    @property
    def logs_evaluations(self) -> bool:
        """Whether evaluations come with rounds, as a training loop of the user's own logs them, and are not asked for.

        Then ``evaluate`` is asked at the end only.
        """
        ...

    @property
    def task(self) -> AnyTask:
        """What is learned; of policies and of training loops of the user's own the metric alone is known."""
        ...

    def round(
        self,
        t: int,
        jobs: Sequence[int] | None = None,
        clients: Sequence[int] | None = None,
        step_seconds: Float[Tensor, " client"] | None = None,
    ) -> AbstractContextManager[TrainStats]:
        """Round ``t``: what ``fit`` draws inside depends on it, and what it measures stands in the result.

        ``jobs``: per client the number that decides its draws, ``t`` for all by default.  ``clients``: the rows of the
        client axis that train, all by default; ``fit`` leaves the others as they are.
        """
        ...

    def fit(self, x: Adapters, plan: LocalPlan | str) -> Adapters:
        """The adapters after K local steps of every client, with the rate of the round; ``x`` is not changed.

        In a quiet round (``train.quiet``) they are those of ``x``, to the bit, without losses: no row is drawn and no
        optimiser's memory touched.  With ``privacy`` a client whose budget is used up stays as it is, too.
        Raises DivergenceError at the first loss that is not finite, and CompositionError for weights of private rows.
        """
        ...

    def score(self, x: Adapters, measure: Measure, batch: int = 64) -> Float[Tensor, "client row"]:
        """A number for every row of each client's own shard, by its place there; NaN where a shard has ended.

        Raises CompositionError with ``privacy``, since scores have no noise.
        """
        ...

    def evaluate(self, x: Adapters, data: Any, batch: int, metrics: Sequence[str] = ()) -> Scores:
        """Every client in ``x`` on the same rows of ``data``, ``batch`` at a time, by further ``metrics``, too.

        ``data``: what this learner evaluates on, a ``Dataset`` or ``Episodes``.
        """
        ...

    @property
    def trained(self) -> tuple[str, ...]:
        """The blocks of the last round, where the optimiser's memory outlives it."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What must be saved to go on: empty unless the optimiser's memory outlives a round."""
        ...

    def load_state_dict(self, saved: Mapping[str, Tensor], trained: Sequence[str]) -> None:
        """Go on from what ``state_dict`` gave; ``trained`` are the blocks of the last round."""
        ...
