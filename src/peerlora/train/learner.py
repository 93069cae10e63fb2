"""Local steps and evaluation of all clients held here, in shared graphs on one frozen model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from peerlora.config.train import TrainConfig
from peerlora.data.batches import Batch, Shards, collate
from peerlora.data.dataset import Dataset
from peerlora.lora.adapters import Adapters, AdapterSpec, Block
from peerlora.lora.attach import StackedModel, with_decoder_inputs
from peerlora.lora.row_gradients import RowGradients
from peerlora.randomness import torch_generator
from peerlora.train.backward_depth import TrainableColumns, all_columns, truncated_columns
from peerlora.train.base import LocalPlan, Scores
from peerlora.train.client_outcomes import (
    Forward,
    RowsOfGraph,
    by_client,
    clients_at_once,
    graphs_of_part,
    parts_of_clients,
    rows_of_graphs,
    scores_of,
)
from peerlora.train.closure import Closure, autograd_views, flat_gradients
from peerlora.train.graph_size import PADDED_TOKENS, GraphSize
from peerlora.train.local_rules import ClientRows, Gradients, LocalStep
from peerlora.train.local_training import LocalTraining
from peerlora.train.loss_rules import weigh_rows
from peerlora.train.optim import Moments, step
from peerlora.train.privacy import PrivateStep
from peerlora.train.private_closure import PrivateClosure, noisy_gradients
from peerlora.train.row_scores import Measure, score_shards
from peerlora.train.tasks import Task, loss_terms, needed_places
from peerlora.train.tiles import divide_by_tiles, evaluated_tiles, tiles_of, tiles_of_sizes
from peerlora.tree import equal_rows

_EVALUATED = 2048  # tokens of one evaluation's graph, at least; there is no backward, so more gain nothing on a CPU


class StackedLearner(LocalTraining):
    """The Learner of real models: one shared frozen model whose layers hold the adapters of every client in ``shards``.

    A ``fit`` outside a round draws as in round 0.
    """

    def __init__(
        self,
        model: StackedModel,
        task: Task,
        shards: Shards,
        settings: TrainConfig,
        pad: int | None,
        graph: GraphSize = GraphSize(PADDED_TOKENS, padded=True),  # noqa: B008 (frozen)
    ):
        super().__init__(settings, shards.clients)
        self.model, self.task, self.shards = model, task, shards
        self.pad, self.graph = pad, graph
        self.shares_prefix = False
        """Whether later runs ask for the same rows again."""
        self._tiles = tiles_of(len(shards.clients), settings.block) if settings.block else None
        self._step_rows, self._shard_rows = sum(shards.batches), sum(map(len, shards.shards))

    def hold_block(self, sizes: Sequence[int], step_rows: int, shard_rows: int) -> None:
        """Hold a part of a run's clients, of how many each of its tiles is.

        ``step_rows``, ``shard_rows``: of all clients together, the rows of a minibatch and those that they train on.
        """
        self._tiles = tiles_of_sizes(sizes) if self.settings.block else None
        self._step_rows, self._shard_rows = step_rows, shard_rows

    def _take_steps(
        self, x: Adapters, clients: ClientRows, columns: TrainableColumns, moments: Moments, plan: LocalPlan
    ) -> Float[Tensor, " client"]:
        """All local steps of some clients, in place on ``x.flat`` and ``moments``; returns their mean losses."""
        steps, several, start = self.settings.local_steps, self.settings.accumulate, x.flat.clone()
        rows = [self._rows(i, steps, several) for i in clients]
        seen, active, trained, before = [], None, [], x.flat
        with self.model.training(self._streams(clients)):
            for k in range(steps):
                if columns.active(k) is not active:
                    active = columns.active(k)
                    trained = self._bind(x, active)
                    before = x.flat.clone() if columns.factor is not None else before
                if not active:
                    continue
                drawn = [[own[at] for own in rows] for at in range(k * several, (k + 1) * several)]
                closure, gradients = self._closure(drawn, x, clients, plan, trained, active, k)
                at = LocalStep(x.flat, start, active, clients, gradients)
                found = at.gradient() if plan.rule is None else plan.rule.gradient(at)
                step(self.settings, self._round.rate, x.flat, found, moments, active)
                assert closure.losses is not None, "a rule has to look at the minibatch"
                seen.append(closure.losses)
        x.flat.copy_(columns.corrected(before, x.flat))
        if self.privacy is not None and not self.privacy.by_row:
            self.privacy.release_change(x, start, PrivateStep(columns.full, clients, self._round.jobs))
        seen.append(x.flat.abs().amax(1))  # the last update has no loss to show that it diverged
        return self._mean_losses(seen, clients)

    def _rows(self, i: int, steps: int, several: int) -> list[np.ndarray]:
        """The rows of a client's minibatches, ``several`` for each local step."""
        if self.privacy is not None and self.privacy.by_row:
            return self.privacy.sample(i, self._round.jobs[i], self.shards.shards[i], steps, several)
        return self.shards.rows(i, self._round.jobs[i], steps * several)

    def _closure(
        self,
        drawn: Sequence[Sequence[np.ndarray]],
        x: Adapters,
        clients: ClientRows,
        plan: LocalPlan,
        trained: Sequence[Tensor],
        active: Mapping[str, slice],
        k: int,
    ) -> tuple[Closure, Callable[[], Gradients]]:
        """What local step ``k`` is computed by, from minibatches of each client's rows, and its gradients."""
        if self.privacy is not None and self.privacy.by_row:
            expected = x.flat.new_tensor([self.privacy.guarantees[i].expected_rows for i in clients])
            by_row = [partial(self._row_losses, rows, x, clients) for rows in drawn]
            private = PrivateClosure(by_row, trained, self.privacy.settings.clip, expected)
            at = PrivateStep(active, clients, self._round.jobs, k)
            return private, partial(noisy_gradients, self.privacy, x, private, at)
        minibatches = [partial(self._losses, rows, x, clients, plan.row_weights) for rows in drawn]
        closure = Closure(minibatches, trained, self.model.step.streams or [], repeats=plan.rule is not None)
        return closure, partial(flat_gradients, x, closure, active)

    @cached_property
    def _rows_return(self) -> bool:
        """Whether the average row of the run's clients is seen again, so that what was computed of it is worth keeping.

        Not of the data: a peer reads those of all clients, and is to decide as a simulation of equal clients does.
        """
        minibatches = self.settings.training_rounds * self.settings.minibatches
        return self.shares_prefix or minibatches * self._step_rows > self._shard_rows

    def _bind(self, x: Adapters, active: Mapping[str, slice]) -> list[Tensor]:
        """Let the model use these adapters; returns the tensors that are to have gradients."""
        views = autograd_views(x, active)
        self.model.bind(x.spec, views, x.scaling, x.merged)
        return [view for view in views if view.requires_grad]

    def _losses(
        self,
        rows: Sequence[np.ndarray],
        x: Adapters,
        clients: ClientRows,
        row_weights: Float[Tensor, "all_clients row"] | None,
    ) -> tuple[Float[Tensor, " client"], Float[Tensor, " client"]]:
        """The training losses of a minibatch, by the task, the weights of rows and the loss rules; and their terms."""
        logits, batch = self._train_forward(rows, x)
        if row_weights is not None:
            batch = weigh_rows(batch, row_weights, self.shards, clients)
        terms = loss_terms(self.task, batch)
        for rule in self.loss_rules:  # after the weights of rows, which sum to 1: those of classes need not
            logits, batch = rule(logits, batch, clients)
        return self.task.losses(logits, batch), terms

    def _row_losses(
        self, rows: Sequence[np.ndarray], x: Adapters, clients: ClientRows
    ) -> tuple[Float[Tensor, "client row"], RowGradients]:
        """The losses of a minibatch's rows, and where their backward leaves gradients; a client may have no row."""
        lengths, shown = self.shards.data.all_lengths, []
        for i, own in zip(clients, rows, strict=True):
            some = own if len(own) else self.shards.shards[i]
            shortest_first = some[lengths[some].argsort(kind="stable")]  # whose first one filler rows are copies of
            shown.append(shortest_first[: max(1, len(own))])
        width = max(map(len, shown))
        collected = self.model.step.row_gradients = RowGradients(len(clients), len(clients) * width)
        try:
            logits, batch = self._train_forward(shown, x)
        finally:
            self.model.step.row_gradients = None
        losses = self.task.row_losses(logits, batch).view(len(clients), width)
        counts = torch.tensor([len(own) for own in rows], device=losses.device)
        return losses * (torch.arange(width, device=losses.device) < counts[:, None]), collected

    def _train_forward(self, rows: Sequence[np.ndarray], x: Adapters) -> tuple[Tensor, Batch]:
        """Logits of a training minibatch, and the minibatch."""
        batch = self._collated(self.shards.data, rows, x)
        self.model.step.extents, self.model.step.written = batch.extents, batch.written
        origin = batch.origin if self._rows_return else None
        return self.model(batch.inputs, origin, needed_places(self.task, batch)), batch

    def _streams(self, clients: ClientRows) -> list[torch.Generator]:
        """Each client's draws of dropout."""
        seed, numbers = self.shards.seed, self.shards.clients
        if self.privacy is not None:
            return [self.privacy.draws.dropout(numbers[i], self._round.jobs[i]) for i in clients]
        return [torch_generator(seed, "dropout", client=numbers[i], round=self._round.jobs[i]) for i in clients]

    def _groups(
        self, spec: AdapterSpec, blocks: tuple[Block, ...], plan: LocalPlan, per_layer_moments: bool
    ) -> Iterator[tuple[ClientRows, TrainableColumns]]:
        """The clients of each graph, and what of them trains: with ``plan.depth``, all of a graph get equally deep."""
        assert plan.turn is None, "a method of turns is for flow policies, and refused before"
        depth = plan.depth
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
        largest = self._together(self.graph.clients(most, self.shards.data.all_lengths))
        for part in np.array_split(clients, -(-len(clients) // largest)):
            yield part.tolist()

    @torch.no_grad()
    def evaluate(self, x: Adapters, data: Dataset, batch: int, metrics: Sequence[str] = ()) -> Scores:
        """See ``Learner``."""
        if self._tiles is not None and x.clients > (size := self.settings.block or 1):
            tiles = evaluated_tiles(x.clients, self._tiles, size)
            return Scores.join([self.evaluate(x.rows(tile), data, batch, metrics) for tile in tiles])
        if x.clients > 1 and equal_rows(x):  # before training, say: one answer serves all
            return self.evaluate(x.rows(slice(0, 1)), data, batch, metrics).repeat(x.clients)
        most = clients_at_once(self.task, data, metrics)
        graphs, found = self._evaluated(data, batch, most), []
        for part in parts_of_clients(x.clients, graphs, most):
            forwards = self._forward_all(x, part, data, graphs)
            found.append(scores_of(self.task, data, len(part), forwards, metrics))
        return Scores.join(found)

    @torch.no_grad()
    def logits(self, x: Adapters, data: Dataset, batch: int) -> Float[np.ndarray, "client row label"]:
        """Every client's logits on the same rows of ``data``; not for language models."""
        graphs, found = self._evaluated(data, batch, x.clients), None
        for clients, _, rows, logits, _ in self._forward_all(x, range(x.clients), data, graphs):
            found = np.zeros((x.clients, len(data), logits.shape[1])) if found is None else found
            found[clients, rows] = by_client(logits, rows)
        assert found is not None
        return found

    @torch.no_grad()
    def score(self, x: Adapters, measure: Measure, batch: int = 64) -> Float[Tensor, "client row"]:
        """See ``Learner``."""
        if self.privacy is not None:
            self.privacy.refuse("scores rows")

        def forward(clients: list[int], rows: list[np.ndarray]) -> Tensor:
            return measure(*self._forward(x.rows(clients), self.shards.data, rows)).view(len(clients), -1)

        tokens = self._together(max(_EVALUATED, self.graph.tokens))
        return score_shards(self.shards, batch, tokens, forward, self._tiles)

    def _evaluated(self, data: Dataset, batch: int, most: int) -> list[RowsOfGraph]:
        tokens = max(_EVALUATED, self.graph.tokens)
        return [(rows, self._together(size)) for rows, size in rows_of_graphs(data, batch, tokens, most)]

    def _forward_all(self, x: Adapters, part: range, data: Dataset, graphs: Sequence[RowsOfGraph]) -> Iterator[Forward]:
        """Forward passes until every client of ``part``, some of those in ``x``, has seen all of ``data``."""
        for rows, size in graphs:
            for start, held, own in graphs_of_part(part, size):
                here = x.rows(slice(start, start + size))
                yield held, own, rows, *self._forward(here, data, [rows] * here.clients)

    def _forward(self, x: Adapters, data: Dataset, rows: Sequence[np.ndarray]) -> tuple[Tensor, Batch]:
        """Logits of some rows for each of these clients, and their batch; nothing drops."""
        self.model.bind_adapters(x)
        batch = self._collated(data, rows, x)
        return self.model(batch.inputs, batch.origin, needed_places(self.task, batch)), batch

    def _collated(self, data: Dataset, rows: Sequence[np.ndarray], x: Adapters) -> Batch:
        left = self.model.step.layout.padding == "left"
        batch = collate(data, rows, self.pad, x.flat.dtype, left).to(x.flat.device)
        if batch.written is not None:
            batch = replace(batch, inputs=with_decoder_inputs(self.model.base, batch.inputs, batch.targets))
        if self.shares_prefix or data is not self.shards.data:  # other runs may divide the same rows otherwise
            return batch
        return replace(batch, origin=batch.origin and replace(batch.origin, parts=self.shards.shards))

    def _together(self, clients: int) -> int:
        """How many of these clients may share a graph: one, where layers mix the rows of a batch."""
        return clients if self.model.step.layout.rows_first else 1
