"""Local steps and evaluation of all clients held here, in shared graphs on one frozen model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from peerlora.config.train import TrainConfig
from peerlora.data.batches import Batch, Shards, collate, in_order_of_length
from peerlora.data.dataset import Dataset
from peerlora.errors import DivergenceError
from peerlora.lora.adapters import Adapters, AdapterSpec, Block
from peerlora.lora.attach import StackedModel
from peerlora.randomness import torch_generator
from peerlora.train.backward_depth import BackwardDepth, TrainableColumns, all_columns, moment_groups, truncated_columns
from peerlora.train.base import LocalPlan, Scores, TrainStats
from peerlora.train.closure import Closure, active_part, flat_gradients
from peerlora.train.graph_size import PADDED_TOKENS, GraphSize
from peerlora.train.local_rules import ClientRows, LocalStep
from peerlora.train.loss_rules import LossRule, weigh_rows
from peerlora.train.metrics import NEEDS_SHARES, Predictions, compute_metric
from peerlora.train.optim import Moments, step
from peerlora.train.row_scores import Measure, score_shards
from peerlora.train.schedule import rate
from peerlora.train.tasks import Task, loss_terms
from peerlora.train.tiles import divide_by_tiles, evaluated_tiles, tiles_of, tiles_of_sizes
from peerlora.tree import leaves

_EVALUATED = 2048  # tokens of one evaluation's graph, at least; there is no backward, so more gain nothing on a CPU


@dataclass(frozen=True)
class _Round:
    """The round in progress."""

    jobs: Sequence[int]
    """Of every client held here, the number that decides its draws."""
    clients: ClientRows
    """The clients that train."""
    stats: TrainStats
    rate: float
    """The learning rate."""
    quiet: bool
    """Whether nobody trains."""


class StackedLearner:
    """The Learner of real models: one shared frozen model whose layers hold the adapters of every client in ``shards``.

    A ``fit`` outside a round draws as in round 0.
    """

    def __init__(
        self,
        model: StackedModel,
        task: Task,
        shards: Shards,
        settings: TrainConfig,
        pad: int,
        graph: GraphSize = GraphSize(PADDED_TOKENS, padded=True),  # noqa: B008 (frozen)
    ):
        self.model, self.task, self.shards, self.settings = model, task, shards, settings
        self.pad, self.graph = pad, graph
        self.shares_prefix = False
        """Whether later runs ask for the same rows again."""
        self.loss_rules: tuple[LossRule, ...] = ()
        """What is changed between logits and losses in training, in this order."""
        self.step_seconds: Float[Tensor, " client"] | None = None
        """Seconds that each client's local step takes in this round, on a virtual clock."""
        self.memory: Moments | None = None
        self._tiles = tiles_of(len(shards.clients), settings.block) if settings.block else None
        self._step_rows = sum(shards.batches)
        self._trained: tuple[str, ...] = ()
        self._round = self._begun(0, None, None)

    def hold_block(self, sizes: Sequence[int], rows: int) -> None:
        """Hold a part of a run's clients: of how many each of its tiles is, and the rows of a step of all clients."""
        self._tiles, self._step_rows = tiles_of_sizes(sizes) if self.settings.block else None, rows

    def _begun(self, t: int, jobs: Sequence[int] | None, clients: Sequence[int] | None) -> _Round:
        held = len(self.shards.clients)
        return _Round(
            [t] * held if jobs is None else list(jobs),
            list(range(held) if clients is None else clients),
            TrainStats(torch.full((held,), float("nan"))),
            rate(self.settings, t),
            self.settings.is_quiet(t),
        )

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

    def fit(self, x: Adapters, plan: LocalPlan | str) -> Adapters:
        """See ``Learner``."""
        if self._round.quiet:
            return replace(x, flat=x.flat.clone())
        plan = LocalPlan.of(plan)
        blocks = plan.trained(x.spec)
        per_layer_moments = plan.depth is not None and self.settings.optimizer_state != "round"
        memory = self._remembered(x, blocks, per_layer_moments)
        flat = x.flat.clone()
        losses = torch.full((x.clients,), float("nan"), dtype=torch.float64)
        for clients, columns in self._groups(x.spec, blocks, plan.depth, per_layer_moments):
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

    def _take_steps(
        self, x: Adapters, clients: ClientRows, columns: TrainableColumns, moments: Moments, plan: LocalPlan
    ) -> Float[Tensor, " client"]:
        """All local steps of some clients, in place on ``x.flat`` and ``moments``; returns their mean losses."""
        steps, several, start = self.settings.local_steps, self.settings.accumulate, x.flat.clone()
        rows = [self.shards.rows(i, self._round.jobs[i], steps * several) for i in clients]
        seen, active, trained, before = [], None, [], x.flat
        with self.model.training(self._streams(clients)):
            for k in range(steps):
                if columns.active(k) is not active:
                    active = columns.active(k)
                    trained = self._bind(x, active)
                    before = x.flat.clone() if columns.factor is not None else before
                if not active:
                    continue
                minibatches = [
                    partial(self._losses, [own[at] for own in rows], x, clients, plan.row_weights)
                    for at in range(k * several, (k + 1) * several)
                ]
                closure = Closure(minibatches, trained, self.model.step.streams or [], repeats=plan.rule is not None)
                at = LocalStep(x.flat, start, active, clients, partial(flat_gradients, x, closure, active))
                found = at.gradient() if plan.rule is None else plan.rule.gradient(at)
                step(self.settings, self._round.rate, x.flat, found, moments, active)
                assert closure.losses is not None, "a rule has to look at the minibatch"
                seen.append(closure.losses)
        x.flat.copy_(columns.corrected(before, x.flat))
        seen.append(x.flat.abs().amax(1))  # the last update has no loss to show that it diverged
        history = torch.stack(seen).cpu()  # looked at once, since a GPU would wait for every look
        self._require_finite(history, clients)
        return history[:-1].double().mean(0)

    @cached_property
    def _rows_return(self) -> bool:
        """Whether the average row is seen again, so that what was computed of it is worth keeping."""
        steps = self.settings.rounds * self.settings.local_steps * self.settings.accumulate
        return self.shares_prefix or steps * self._step_rows > len(self.shards.data)

    def _bind(self, x: Adapters, active: Mapping[str, slice]) -> list[Tensor]:
        """Let the model use these adapters; returns the tensors that are to have gradients."""
        views = _views(x, active)
        self.model.bind(x.spec, views, x.scaling, x.merged)
        return [view for view in views if view.requires_grad]

    def _losses(
        self,
        rows: Sequence[np.ndarray],
        x: Adapters,
        clients: ClientRows,
        row_weights: Float[Tensor, "everybody row"] | None,
    ) -> tuple[Float[Tensor, " client"], Float[Tensor, " client"]]:
        """The training losses of a minibatch, by the task, the weights of rows and the loss rules; and their terms."""
        batch = self._collated(self.shards.data, rows, x)
        self.model.step.extents = batch.extents
        logits = self.model(batch.inputs, batch.origin if self._rows_return else None)
        if row_weights is not None:
            batch = weigh_rows(batch, row_weights, self.shards, clients)
        terms = loss_terms(self.task, batch)
        for rule in self.loss_rules:  # after the weights of rows, which sum to 1: those of classes need not
            logits, batch = rule(logits, batch, clients)
        return self.task.losses(logits, batch), terms

    def _require_finite(self, history: Float[Tensor, "step client"], clients: ClientRows) -> None:
        bad = (~history.isfinite()).nonzero()
        if len(bad) == 0:
            return
        k, row = bad[0].tolist()
        client, now = clients[row], self._round.rate
        this_round = "" if now == self.settings.lr else f", {now:.3g} in this round"
        raise DivergenceError(
            f"the loss of client {self.shards.clients[client]} is {float(history[k, row])} in round "
            f"{self._round.jobs[client] + 1}, local step {min(k, len(history) - 2) + 1}; expected a finite number; "
            f"lower train.lr (now {self.settings.lr:g}{this_round}) or set train.clip"
        )

    def _streams(self, clients: ClientRows) -> list[torch.Generator]:
        """Each client's draws of dropout."""
        seed, numbers = self.shards.seed, self.shards.clients
        return [torch_generator(seed, "dropout", client=numbers[i], round=self._round.jobs[i]) for i in clients]

    def _groups(
        self, spec: AdapterSpec, blocks: tuple[Block, ...], depth: BackwardDepth | None, per_layer_moments: bool
    ) -> Iterator[tuple[ClientRows, TrainableColumns]]:
        """The clients of each graph, and what of them trains: with ``depth``, all of a graph get equally deep."""
        clients, steps = np.array(self._round.clients, dtype=int), self.settings.local_steps
        if depth is None:
            for part in self._graphs(clients):
                yield part, all_columns(spec, blocks)
            return
        depths = depth.depth.cpu().numpy()[clients]
        for each in np.unique(depths):
            for part in self._graphs(clients[depths == each]):
                columns = truncated_columns(spec, blocks, depth, part, steps, per_layer_moments)
                if columns.active(0):
                    yield part, columns

    def _graphs(self, clients: Int[np.ndarray, " client"]) -> Iterator[ClientRows]:
        """Parts of these clients, so many per graph that its activations stay in reach."""
        if self._tiles is not None:
            yield from divide_by_tiles(clients.tolist(), self._tiles, self.model.step.layout.rows_first)
            return
        if len(clients) == 0:
            return
        most = max(self.shards.batches[i] for i in clients.tolist())
        largest = self._together(self.graph.clients(most, self.shards.data.lengths))
        for part in np.array_split(clients, -(-len(clients) // largest)):
            yield part.tolist()

    @torch.no_grad()
    def evaluate(self, x: Adapters, data: Dataset, batch: int, metrics: Sequence[str] = ()) -> Scores:
        """See ``Learner``."""
        if self._tiles is not None and x.clients > (size := self.settings.block or 1):
            tiles = evaluated_tiles(x.clients, self._tiles, size)
            return Scores.join([self.evaluate(x.rows(tile), data, batch, metrics) for tile in tiles])
        equal = all(bool((leaf == leaf[:1]).all()) for leaf in leaves(x).values())
        if x.clients > 1 and equal:  # before training, say: one answer serves all
            return self.evaluate(x.rows(slice(0, 1)), data, batch, metrics).repeat(x.clients)
        outcomes, shares = np.zeros((x.clients, len(data), 2)), None
        for clients, rows, logits, stacked in self._forward_all(x, data, batch):
            found = self.task.outcomes(logits, stacked)
            outcomes[clients, rows] = found.view(-1, len(rows), 2).cpu().numpy()
            if any(name in NEEDS_SHARES for name in metrics):
                if shares is None:
                    shares = np.zeros((x.clients, len(data), logits.shape[1]), dtype=np.float32)
                shares[clients, rows] = logits.softmax(1).view(-1, len(rows), logits.shape[1]).cpu().numpy()
        scores = np.array([self.task.score(own, data.labels) for own in outcomes])
        predictions = [
            Predictions(own[:, 1], data.labels, loss, None if shares is None else shares[i])
            for i, (own, loss) in enumerate(zip(outcomes, scores[:, 1].tolist(), strict=True))
        ]
        more = {name: np.array([compute_metric(name, each) for each in predictions]) for name in metrics}
        return Scores(scores[:, 0], scores[:, 1], len(data), more)

    @torch.no_grad()
    def logits(self, x: Adapters, data: Dataset, batch: int) -> Float[np.ndarray, "client row label"]:
        """Every client's logits on the same rows of ``data``; not for language models."""
        found = None
        for clients, rows, logits, _ in self._forward_all(x, data, batch):
            found = np.zeros((x.clients, len(data), logits.shape[1])) if found is None else found
            found[clients, rows] = logits.view(-1, len(rows), logits.shape[1]).cpu().numpy()
        assert found is not None
        return found

    @torch.no_grad()
    def score(self, x: Adapters, measure: Measure, batch: int = 64) -> Float[Tensor, "client row"]:
        """See ``Learner``."""

        def forward(clients: list[int], rows: list[np.ndarray]) -> Tensor:
            return measure(*self._forward(x.rows(clients), self.shards.data, rows)).view(len(clients), -1)

        tokens = self._together(max(_EVALUATED, self.graph.tokens))
        return score_shards(self.shards, batch, tokens, forward, self._tiles)

    def _forward_all(self, x: Adapters, data: Dataset, batch: int) -> Iterator[tuple[slice, np.ndarray, Tensor, Batch]]:
        """Clients, rows, their logits and batch, until every client in ``x`` has seen all of ``data``."""
        for rows in in_order_of_length(data, batch):
            most = max(_EVALUATED, self.graph.tokens) // (len(rows) * int(data.lengths[rows].max()))
            size = self._together(max(1, most))
            for start in range(0, x.clients, size):
                part = x.rows(slice(start, start + size))
                yield slice(start, start + size), rows, *self._forward(part, data, [rows] * part.clients)

    def _forward(self, x: Adapters, data: Dataset, rows: Sequence[np.ndarray]) -> tuple[Tensor, Batch]:
        """Logits of some rows for each of these clients, and their batch; nothing drops."""
        self.model.bind_adapters(x)
        batch = self._collated(data, rows, x)
        return self.model(batch.inputs, batch.origin), batch

    def _collated(self, data: Dataset, rows: Sequence[np.ndarray], x: Adapters) -> Batch:
        left = self.model.step.layout.padding == "left"
        return collate(data, rows, self.pad, x.flat.dtype, left).to(x.flat.device)

    def _together(self, clients: int) -> int:
        """How many of these clients may share a graph: one, where layers mix the rows of a batch."""
        return clients if self.model.step.layout.rows_first else 1

    def state_dict(self) -> dict[str, Tensor]:
        """See ``Learner``."""
        if self.memory is None:
            return {}
        steps = {f"steps.{block}": count for block, count in self.memory.steps.items()}
        return {"first": self.memory.first, "second": self.memory.second, **steps}

    def load_state_dict(self, saved: Mapping[str, Tensor], trained: Sequence[str]) -> None:
        """See ``Learner``."""
        self._trained = tuple(trained)
        if saved:
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


def _views(x: Adapters, active: Mapping[str, slice]) -> list[Tensor]:
    """One autograd leaf per slot, each a view into the flat buffer; only those of active parts ask for gradients."""
    views = [x.spec.view(slot, x.flat).detach() for slot in x.spec.slots]
    return [
        view.requires_grad_(active_part(slot, active) is not None)
        for slot, view in zip(x.spec.slots, views, strict=True)
    ]
