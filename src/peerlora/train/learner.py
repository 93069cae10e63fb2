"""Learner: K local steps for all clients held here, in shared graphs.  It owns model and data, never communicates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from peerlora.config.sections import TrainConfig
from peerlora.data.batches import Batch, Shards, collate, in_order_of_length
from peerlora.data.dataset import Dataset
from peerlora.errors import DivergenceError
from peerlora.lora.adapters import Adapters, AdapterSpec, Slot
from peerlora.lora.attach import StackedModel
from peerlora.randomness import torch_generator
from peerlora.train.backward_depth import BackwardDepth, TrainableColumns, all_columns, cut, moment_groups
from peerlora.train.graph_size import PADDED_TOKENS, GraphSize
from peerlora.train.local_rules import Gradients, LocalRule, LocalStep, Rows
from peerlora.train.loss_rules import Emphasis, LossRule
from peerlora.train.optim import Moments, step
from peerlora.train.row_scores import Measure, score_shards
from peerlora.train.tasks import Task
from peerlora.tree import leaves

_EVALUATED = 2048  # tokens of one evaluation's graph, at least; there is no backward, so more gain nothing on a CPU


@dataclass(frozen=True)
class Scores:
    """Evaluation of each client's own model."""

    metric: Float[np.ndarray, " client"]
    loss: Float[np.ndarray, " client"]
    rows: int


class Learner:
    """Trains and evaluates the clients in ``shards`` on one shared frozen model.

    ``begin(t)`` says which round it is; ``losses`` then holds each client's mean training loss of that round.  Where
    clients do not keep step, it also says which job of its own each client is at, and who trains at all.
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
        self.loss_rules: tuple[LossRule, ...] = ()
        """What is changed between logits and losses in training, in this order."""
        self._emphasis: tuple[LossRule, ...] = ()
        self.step_seconds: Float[Tensor, " client"] | None = None
        """How long each client's local step takes in this round, on a virtual clock."""
        self.begin(0)
        self.memory: Moments | None = None
        self._trained: tuple[str, ...] = ()

    def begin(self, t: int, jobs: Sequence[int] | None = None, places: Sequence[int] | None = None) -> None:
        """Set the round that the next ``fit`` belongs to; a round without one has no losses.

        ``jobs``: per client the number that decides its draws, ``t`` for all by default.  ``places``: the clients that
        train, by their places on the leading axis, all by default; ``fit`` leaves the others as they are.
        """
        self.t = t
        self.jobs = [t] * len(self.shards.clients) if jobs is None else list(jobs)
        self.places = None if places is None or len(places) == len(self.shards.clients) else list(places)
        self.losses: Float[Tensor, " client"] = torch.full((len(self.shards.clients),), float("nan"))

    def fit(
        self,
        x: Adapters,
        train: str,
        rule: LocalRule | None = None,
        reach: BackwardDepth | None = None,
        emphasis: Float[Tensor, "client place"] | None = None,
    ) -> Adapters:
        """K local steps of every client on the blocks in ``train`` ("A", "B" or "AB") and on a head that is trained.

        ``rule`` changes the gradient of every step before it is clipped; ``reach`` cuts backward passes short;
        ``emphasis`` says how much each row of a shard counts.  ``x`` is not changed.  Raises DivergenceError at the
        first loss that is not finite.
        """
        self._emphasis = () if emphasis is None else (Emphasis(emphasis, self.shards),)
        blocks = x.spec.trained(train)
        by_layer = reach is not None and self.settings.optimizer_state != "round"
        memory = self._remembered(x, blocks, by_layer)
        flat = x.flat.clone()
        losses = torch.full((x.clients,), float("nan"), dtype=torch.float64)
        for clients, cutting in self._groups(x.spec, blocks, reach, by_layer):
            part = replace(x.rows(clients), flat=flat[clients])
            kept = (
                memory.rows(clients)
                if memory
                else Moments.fresh(part.flat, moment_groups(x.spec, x.spec.blocks, by_layer))
            )
            losses[clients] = self._fit_block(part, clients, cutting, kept, rule, x.flat[clients])
            if not isinstance(clients, slice):  # then the rows are copies
                flat[clients] = part.flat
                if memory:
                    memory.put(clients, kept)
        self.losses = losses
        return replace(x, flat=flat)

    def _remembered(self, x: Adapters, blocks: tuple[str, ...], by_layer: bool) -> Moments | None:
        """The optimiser memory to go on with; None where every round starts afresh."""
        if self.settings.optimizer_state == "round":
            return None
        switched = self.settings.optimizer_state == "phase" and blocks != self._trained
        if self.memory is None or switched:
            self.memory = Moments.fresh(x.flat, moment_groups(x.spec, x.spec.blocks, by_layer))
        self._trained = blocks
        return self.memory

    def _fit_block(
        self,
        x: Adapters,
        clients: Rows,
        cut: TrainableColumns,
        moments: Moments,
        rule: LocalRule | None,
        start: Float[Tensor, "client parameter"],
    ) -> Float[Tensor, " client"]:
        """All local steps of some clients, in place on ``x.flat``; returns their mean losses."""
        self.model.step.streams = self._streams(clients)
        steps = self.settings.local_steps
        rows = [self.shards.rows(i, self.jobs[i], steps) for i in self._numbered(clients)]
        seen, active, trained, before = [], None, [], x.flat
        try:
            for k in range(steps):
                if cut.active(k) is not active:
                    active = cut.active(k)
                    trained = self._bind(x, active)
                    before = x.flat.clone() if cut.factor is not None else before
                if not active:
                    continue
                batch = collate(self.shards.data, [own[k] for own in rows], self.pad, x.flat.dtype).to(x.flat.device)
                self.model.step.extents = batch.extents
                look = _Look(self.model, partial(self._losses, batch, clients), trained, repeats=rule is not None)
                here = partial(_gradients, x, look, active)
                found = here() if rule is None else rule.gradient(LocalStep(x.flat, start, active, clients, here))
                step(self.settings, x.flat, found, moments, active)
                assert look.losses is not None, "a rule has to look at the minibatch"
                seen.append(look.losses)
        finally:
            self.model.step.streams = None  # evaluation drops nothing
        x.flat.copy_(cut.corrected(before, x.flat))
        seen.append(x.flat.abs().amax(1))  # the last update has no loss to show that it diverged
        history = torch.stack(seen).cpu()  # looked at once, since a GPU would wait for every look
        self._require_finite(history, clients)
        return history[:-1].double().mean(0)

    def _bind(self, x: Adapters, active: Mapping[str, slice]) -> list[Tensor]:
        """Let the model use these adapters; returns the tensors that are to have gradients."""
        views = _views(x, active)
        self.model.bind(x.spec, views, x.scaling, x.merged)
        return [view for view in views if view.requires_grad]

    def _losses(self, batch: Batch, clients: Rows) -> Float[Tensor, " client"]:
        """The training losses of one step, by the task and the loss rules."""
        logits = self.model(batch.inputs, batch.origin)
        for rule in (*self.loss_rules, *self._emphasis):
            logits, batch = rule(logits, batch, clients)
        return self.task.losses(logits, batch)

    def _require_finite(self, history: Float[Tensor, "step client"], clients: Rows) -> None:
        bad = (~history.isfinite()).nonzero()
        if len(bad) == 0:
            return
        k, row = bad[0].tolist()
        place = self._numbered(clients)[row]
        raise DivergenceError(
            f"the loss of client {self.shards.clients[place]} is {float(history[k, row])} in round "
            f"{self.jobs[place] + 1}, local step {min(k, len(history) - 2) + 1}; expected a finite number; lower "
            f"train.lr (now {self.settings.lr:g}) or set train.clip"
        )

    def _numbered(self, clients: Rows) -> list[int]:
        return list(range(len(self.shards.clients)))[clients] if isinstance(clients, slice) else clients

    def _streams(self, clients: Rows) -> list[torch.Generator]:
        seed, numbers = self.shards.seed, self.shards.clients
        places = self._numbered(clients)
        return [torch_generator(seed, "dropout", client=numbers[i], round=self.jobs[i]) for i in places]

    def _groups(
        self, spec: AdapterSpec, blocks: tuple[str, ...], reach: BackwardDepth | None, by_layer: bool
    ) -> Iterator[tuple[Rows, TrainableColumns]]:
        """The clients of each graph, and what of them trains: with ``reach``, one depth at a time."""
        places = np.arange(len(self.shards.clients)) if self.places is None else np.array(self.places, dtype=int)
        if reach is None:
            for part in self._client_blocks(places):
                yield (
                    slice(int(part[0]), int(part[-1]) + 1) if self.places is None else part.tolist(),
                    all_columns(spec, blocks),
                )
            return
        depths = reach.depth.cpu().numpy()[places]
        for depth in np.unique(depths):
            for part in self._client_blocks(places[depths == depth]):
                found = cut(spec, blocks, reach, part.tolist(), self.settings.local_steps, by_layer)
                if found.active(0):
                    everybody = self.places is None and len(part) == len(self.shards.clients)
                    yield slice(0, len(part)) if everybody else part.tolist(), found

    def _client_blocks(self, places: Int[np.ndarray, " place"]) -> Iterator[Int[np.ndarray, " place"]]:
        """Parts of these clients, so many per graph that its activations stay in reach."""
        if len(places) == 0:
            return
        most = max(self.shards.batches[i] for i in places.tolist())
        largest = self.settings.block or self.graph.clients(most, self.shards.data.lengths)
        yield from np.array_split(places, -(-len(places) // largest))

    @torch.no_grad()
    def evaluate(self, x: Adapters, data: Dataset, batch: int) -> Scores:
        """Every client in ``x`` on the same rows of ``data``, ``batch`` rows at a time."""
        equal = all(bool((leaf == leaf[:1]).all()) for leaf in leaves(x).values())
        if x.clients > 1 and equal:  # before training, say: one answer serves all
            one = self.evaluate(x.rows(slice(0, 1)), data, batch)
            return Scores(one.metric.repeat(x.clients), one.loss.repeat(x.clients), one.rows)
        outcomes = np.zeros((x.clients, len(data), 2))
        for clients, rows, logits, stacked in self._everywhere(x, data, batch):
            found = self.task.outcomes(logits, stacked)
            outcomes[clients, rows] = found.view(-1, len(rows), 2).cpu().numpy()
        scores = [self.task.score(own, data.labels) for own in outcomes]
        return Scores(np.array([metric for metric, _ in scores]), np.array([loss for _, loss in scores]), len(data))

    @torch.no_grad()
    def logits(self, x: Adapters, data: Dataset, batch: int) -> Float[np.ndarray, "client row label"]:
        """Every client's logits on the same rows of ``data``; not for language models."""
        found = None
        for clients, rows, logits, _ in self._everywhere(x, data, batch):
            found = np.zeros((x.clients, len(data), logits.shape[1])) if found is None else found
            found[clients, rows] = logits.view(-1, len(rows), logits.shape[1]).cpu().numpy()
        assert found is not None
        return found

    @torch.no_grad()
    def score(self, x: Adapters, measure: Measure, batch: int = 64) -> Float[Tensor, "client place"]:
        """A number for every row of each client's own shard, by its place there; NaN where a shard has ended."""

        def forward(clients: list[int], rows: list[np.ndarray]) -> Tensor:
            return measure(*self._forward(x.rows(clients), self.shards.data, rows)).view(len(clients), -1)

        return score_shards(self.shards, batch, max(_EVALUATED, self.graph.tokens), forward)

    def _everywhere(self, x: Adapters, data: Dataset, batch: int) -> Iterator[tuple[slice, np.ndarray, Tensor, Batch]]:
        """Clients, rows, their logits and batch, until every client in ``x`` has seen all of ``data``."""
        for rows in in_order_of_length(data, batch):
            size = max(1, max(_EVALUATED, self.graph.tokens) // (len(rows) * int(data.lengths[rows].max())))
            for start in range(0, x.clients, size):
                part = x.rows(slice(start, start + size))
                yield slice(start, start + size), rows, *self._forward(part, data, [rows] * part.clients)

    def _forward(self, x: Adapters, data: Dataset, rows: Sequence[np.ndarray]) -> tuple[Tensor, Batch]:
        """Logits of some rows for each of these clients, and their batch; nothing drops."""
        self.model.bind_adapters(x)
        batch = collate(data, rows, self.pad, x.flat.dtype).to(x.flat.device)
        return self.model(batch.inputs, batch.origin), batch

    def state_dict(self) -> dict[str, Tensor]:
        """What must be saved to go on: empty unless the optimiser's memory outlives a round."""
        if self.memory is None:
            return {}
        steps = {f"steps.{block}": count for block, count in self.memory.steps.items()}
        return {"first": self.memory.first, "second": self.memory.second, **steps}

    def load_state_dict(self, saved: Mapping[str, Tensor], trained: Sequence[str]) -> None:
        """Take up what ``state`` gave; ``trained`` are the blocks of the last round."""
        self._trained = tuple(trained)
        if saved:
            steps = {name.removeprefix("steps."): saved[name] for name in saved if name.startswith("steps.")}
            self.memory = Moments(saved["first"], saved["second"], steps)

    @property
    def trained(self) -> tuple[str, ...]:
        """The blocks of the last round, where the optimiser's memory outlives it."""
        return self._trained


def _views(x: Adapters, active: Mapping[str, slice]) -> list[Tensor]:
    """One autograd leaf per slot, each a view into the flat buffer; only those of active parts ask for gradients."""
    views = [x.spec.view(slot, x.flat).detach() for slot in x.spec.slots]
    return [
        view.requires_grad_(_part(slot, active) is not None) for slot, view in zip(x.spec.slots, views, strict=True)
    ]


def _part(slot: Slot, active: Mapping[str, slice]) -> str | None:
    """The active part that a slot lies in."""
    return next((name for name, own in active.items() if own.start <= slot.start and slot.stop <= own.stop), None)


class _Look:
    """A minibatch that is looked at once or, by a rule, more often: with the same dropout every time."""

    def __init__(self, model: StackedModel, losses_of: Callable[[], Tensor], trained: Sequence[Tensor], repeats: bool):
        self._losses_of, self.trained = losses_of, trained
        self.losses: Float[Tensor, " client"] | None = None
        """Of the first look."""
        self._streams = model.step.streams or []
        self._dropout = [stream.get_state() for stream in self._streams] if repeats else []

    def gradients(self) -> Sequence[Tensor]:
        """One per trained view, at the values that these have now."""
        if self.losses is not None:
            for stream, state in zip(self._streams, self._dropout, strict=True):
                stream.set_state(state)
        losses = self._losses_of()
        if self.losses is None:
            self.losses = losses.detach()
        return torch.autograd.grad(losses.sum(), self.trained)  # no two clients share a parameter


def _gradients(x: Adapters, look: _Look, active: Mapping[str, slice]) -> Gradients:
    """The gradients of each active part as [client, its columns], in the order of the flat buffer."""
    left = iter(look.gradients())
    found: dict[str, list[Tensor]] = {name: [] for name in active}
    for slot in x.spec.slots:
        name = _part(slot, active)
        if name is not None:
            found[name].append(next(left).flatten(1))
    return {name: torch.cat(own, dim=1) for name, own in found.items()}
