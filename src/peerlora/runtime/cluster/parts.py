"""The parts of a Trainer whose clients are held by workers: each asks the workers, and joins what they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peerlora.lora.adapters import Adapters
from peerlora.lora.diagnostics import Diagnostics
from peerlora.lora.layer_shares import join_shares
from peerlora.runs.events import Event
from peerlora.runtime.cluster.group import WorkerGroup
from peerlora.runtime.cluster.placement import Placement
from peerlora.runtime.compose import Federation
from peerlora.runtime.evaluation import Evaluation, Evaluator
from peerlora.runtime.participation import AllClients, Opening
from peerlora.runtime.rounds import RoundResult
from peerlora.topology.storage import Matrix
from peerlora.train.base import Scores
from peerlora.tree import leaves, rebuild

_EVERYWHERE = "relay."  # begin of the names of tensors that every worker has whole


class RemoteState:
    """A state that the workers hold; ``tree`` is the whole of it, once it was asked for."""

    def __init__(self):
        self.tree: Any = None


class RemoteParts:
    """The tensors of a checkpoint's parts, gathered from the workers and divided among them."""

    def __init__(self, group: WorkerGroup, placement: Placement):
        self.group, self.placement = group, placement

    def joined(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of all clients from those of the blocks."""
        return {name: self._joined([part[name] for part in parts]) for name in parts[0] if not _everywhere(name)} | {
            name: value for name, value in parts[0].items() if _everywhere(name)
        }

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        whole = parts[0].new_empty(self.placement.clients, *parts[0].shape[1:])
        for block, part in zip(self.placement.blocks, parts, strict=True):
            whole[block] = part
        return whole

    def divided(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The blocks' tensors from those of all clients."""
        return [
            {name: value if _everywhere(name) else value[block] for name, value in tensors.items()}
            for block in self.placement.blocks
        ]

    def in_order(self, values: Sequence[Sequence[Any]]) -> list[Any]:
        """Lists [client] of the blocks as one."""
        found: dict[int, Any] = {}
        for block, own in zip(self.placement.blocks, values, strict=True):
            found.update(zip(block, own, strict=True))
        return [found[client] for client in range(self.placement.clients)]

    def collect(self, part: str) -> tuple[dict[str, Tensor], list[Any]]:
        """A part of a checkpoint, and every worker's facts."""
        answers = self.group.call("collect", part)
        return self.joined([tensors for tensors, _ in answers]), [facts for _, facts in answers]


def _everywhere(name: str) -> bool:
    return name.startswith(_EVERYWHERE)


class RemoteLearner:
    """What a Trainer asks of its learner."""

    privacy = None
    logs_evaluations = False

    def __init__(self, federation: Federation, parts: RemoteParts):
        self.task, self.settings, self.parts = federation.learner.task, federation.config.train, parts
        self.trained: Sequence[str] = ()
        """The blocks of the last round, as of the latest ``state_dict``."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the optimisers' memory of all clients."""
        tensors, facts = self.parts.collect("learner")
        self.trained = facts[0]
        return tensors

    def load_state_dict(self, saved: Mapping[str, Tensor], trained: Sequence[str]) -> None:
        """Restore it on the workers."""
        self.trained = trained
        self.parts.group.call_each("restore", [("learner", own, trained) for own in self.parts.divided(saved)])


class RemoteExchange:
    """What a Trainer asks of its exchange."""

    relayed = None

    def __init__(self, clients: int, parts: RemoteParts):
        self.clients, self.parts = range(clients), parts

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the exchanges of all workers keep."""
        return self.parts.collect("exchange")[0]

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Restore it on the workers."""
        self.parts.group.call_each("restore", [("exchange", own, None) for own in self.parts.divided(saved)])


class ClusterRounds:
    """Advances all clients by one round, which every worker does for its block."""

    def __init__(self, parts: RemoteParts, on_clock: bool):
        self.parts, self.stopped = parts, set[int]()
        self.virtual_seconds = 0.0 if on_clock else float("nan")

    def advance(self, t: int, state: RemoteState) -> tuple[RemoteState, RoundResult]:
        """Run round ``t``."""
        answers = self.parts.group.call("advance", t, sorted(self.stopped))
        self.virtual_seconds = answers[0][1]
        return RemoteState(), self._joined([result for result, _ in answers])

    def _joined(self, results: Sequence[RoundResult]) -> RoundResult:
        held = [len(block) for block in self.parts.placement.blocks]
        names = results[0].measures
        return replace(
            results[0],
            losses=self.parts.in_order([each.losses for each in results]),
            bytes_per_edge=max(each.bytes_per_edge for each in results),
            bytes_sent=sum(each.bytes_sent for each in results),
            seconds_train=max(each.seconds_train for each in results),
            seconds_mix=max(each.seconds_mix for each in results),
            measures={name: _measure(name, [each.measures[name] for each in results], held) for name in names},
        )

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint of a simulation keeps: all workers know the moment, each the jobs of its block."""
        answers = self.parts.group.call("collect", "rounds")
        tensors, facts = answers[0]
        if "jobs" not in facts:
            return tensors, facts
        return tensors, facts | {"jobs": self.parts.in_order([own["jobs"] for _, own in answers])}

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], x: Adapters) -> None:
        """Restore it on the workers."""
        blocks = self.parts.placement.blocks
        own = [dict(facts) | ({"jobs": [facts["jobs"][i] for i in block]} if facts else {}) for block in blocks]
        answers = self.parts.group.call_each("restore", [("rounds", dict(tensors), each) for each in own])
        self.virtual_seconds = answers[0]


def _measure(name: str, values: Sequence[float], held: Sequence[int]) -> float:
    """A measure of a round: counts of relayed things add up, all else is a mean over clients."""
    if name in ("relayed_entries", "relayed_bytes"):
        return float(sum(values))
    return float(np.average(values, weights=held))


class ClusterClients(AllClients):
    """All clients of a run, in blocks that workers hold.

    ``events`` are told once the run has begun, or goes on.
    """

    def __init__(self, federation: Federation, parts: RemoteParts, events: Sequence[Event] = ()):
        super().__init__(federation)
        self.parts, self.events = parts, events

    def start(self) -> Opening:
        """Start the method on every worker."""
        return Opening(RemoteState(), sum(self.parts.group.call("start")), self.events)

    def whole(self, state: RemoteState) -> Any:
        """Return the state of all clients: collected, once a round at most."""
        if state.tree is None:
            trees = self.parts.group.call("collect_state")
            state.tree = rebuild(trees[0], self.parts.joined([leaves(tree) for tree in trees]))
        return state.tree

    def restored(self, start: RemoteState, tensors: dict[str, Tensor]) -> RemoteState:
        """Give the workers the state that a checkpoint kept."""
        self.parts.group.call_each("restore_state", [(own,) for own in self.parts.divided(tensors)])
        return RemoteState()

    def _diagnosed(self, state: RemoteState, sent: Adapters | None, W: Matrix) -> Diagnostics:
        return join_shares([share for share in self.parts.group.call("measure") if share is not None])


class ClusterEvaluator(Evaluator):
    """Evaluates every block on its worker."""

    def __init__(self, federation: Federation, clients: ClusterClients):
        super().__init__(federation, clients)
        self.clients, self.parts = clients, clients.parts

    def evaluate(self, state: RemoteState, final: bool) -> Evaluation:
        """See ``Evaluates``."""
        answers = self.parts.group.call("evaluate", final)
        rows = self.federation.eval_data if final else self.few_rows
        averaged = next((found["averaged"] for found in answers if "averaged" in found), None)
        own = {name: self._joined([found[name] for found in answers]) for name in answers[0] if name != "averaged"}
        chosen = self.federation.config.eval.select is not None
        models = self.federation.algorithm.model(self.clients.whole(state)) if chosen else self.federation.start
        personal = own.get("personal")
        return Evaluation(rows, own["own"], averaged, None, personal, None, models, None)

    def rescored(self, found: Evaluation, of: str) -> Scores:
        """See ``Evaluates``."""
        if of != "own" or len(found.rows) == len(self.few_rows):
            return found.scores()[of]
        return self._joined(self.parts.group.call("rescore", of))

    def _joined(self, parts: Sequence[Scores]) -> Scores:
        def joined(values: Sequence[np.ndarray]) -> np.ndarray:  # copied: what came from the object store is read-only
            return self.parts.joined([{"": torch.tensor(each)} for each in values])[""].numpy()

        more = {name: joined([each.metrics[name] for each in parts]) for name in parts[0].metrics}
        counts = [each.counts for each in parts if each.counts is not None]
        return Scores(
            joined([each.metric for each in parts]),
            joined([each.loss for each in parts]),
            parts[0].rows,
            more,
            joined(counts) if len(counts) == len(parts) else None,
        )
