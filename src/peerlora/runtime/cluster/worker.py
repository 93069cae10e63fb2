"""BlockWorker: what one worker of a cluster does for its block of clients, when the driver asks."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.config.run import RunConfig
from peerlora.errors import DataError, ModelError
from peerlora.lora.adapters import Adapters
from peerlora.lora.layer_shares import (
    LayerShare,
    columns_of_layers,
    measure_share,
    merged_of_layers,
    split_layers,
)
from peerlora.lora.merged import client_mean
from peerlora.runs.resume import package_versions
from peerlora.runtime.cluster.placement import Placement
from peerlora.runtime.cluster.rows import Inbox, Send, SwappedRows, Values
from peerlora.runtime.compose import Block, Federation, assemble, use_threads
from peerlora.runtime.evaluation import Evaluation, Evaluator
from peerlora.runtime.inputs import facts_of
from peerlora.runtime.participation import AllClients, of_clients
from peerlora.runtime.plan import plan
from peerlora.runtime.resources import load_resources
from peerlora.runtime.rounds import RoundResult
from peerlora.runtime.synchronous import SynchronousRounds
from peerlora.topology.storage import identity
from peerlora.train.base import Scores
from peerlora.train.kernels.speed import Speed
from peerlora.tree import rebuild, tree_map


@dataclass(frozen=True)
class WorkerTask:
    """What the driver gives every worker."""

    config: RunConfig
    placement: Placement
    nodes: int
    """Machines that the workers are on."""
    speed: Speed | None
    """None: the best on the worker's machine."""
    timeout: float
    """Seconds that an exchange waits for another worker."""
    folder: str
    """The driver's working folder: paths of a config may be relative to it."""


def describe_process() -> dict[str, Any]:
    """Tell where this process is, and the versions that must be alike on all machines."""
    return {"host": platform.node(), "process": os.getpid(), "versions": package_versions()}


@contextmanager
def name_machine(worker: str) -> Iterator[None]:
    """Let a DataError or ModelError say which worker lacks something, and on which machine."""
    try:
        yield
    except (DataError, ModelError) as error:
        kind = DataError if isinstance(error, DataError) else ModelError
        raise kind(f"{worker} on {platform.node()}: {error}") from None


class BlockWorker:
    """One block of clients.  Its methods are called by one thread, ``deliver`` by another.

    ``send`` brings arrays to the inboxes of other workers.
    """

    def __init__(self, index: int):
        self.index, self.inbox = index, Inbox()
        self.send: Send | None = None
        self.state: Any = None
        self.result: RoundResult | None = None

    def deliver(self, number: int, sender: int, values: Values) -> None:
        """Take an array of an exchange from another worker."""
        self.inbox.put(number, sender, values)

    def close(self, reason: str) -> None:
        """Let an exchange that waits end."""
        self.inbox.close(reason)

    def build(self, task: WorkerTask) -> dict[str, Any]:
        """Load data and base model and compose the block; return the facts that these tell."""
        if os.path.isdir(task.folder):
            os.chdir(task.folder)
        config = task.config
        use_threads(config)
        assert self.send is not None
        self.rows = SwappedRows(self.index, task.placement, task.nodes, self.inbox, self.send, task.timeout)
        block = Block(task.placement.tiles[self.index], self.rows)
        with name_machine(f"worker {self.index}"):
            self.federation = assemble(plan(config), load_resources(config), speed=task.speed, block=block)
        federation, self.placement = self.federation, task.placement
        self.rounds = SynchronousRounds(
            federation.algorithm, federation.learner, federation.exchange, federation.clock, self.rows.all_rows
        )
        self.participation = BlockClients(federation, self.rows)
        self.evaluator = Evaluator(federation, self.participation)
        return facts_of(federation)

    def start(self) -> int:
        """Start the method; return the bytes that this block sent for it."""
        use_threads(self.federation.config)
        opening = self.participation.start()
        self.state = opening.state
        return opening.bytes_sent

    def advance(self, t: int, stopped: Sequence[int]) -> tuple[RoundResult, float]:
        """Run round ``t``; return what it did, and the virtual seconds since the start of the run.

        The adapters that went into the mixing stay here; W and the links come from one worker.
        Raises DivergenceError for the first client of the block whose loss is not finite.
        """
        use_threads(self.federation.config)
        self.rounds.stopped = set(stopped)
        self.state, self.result = self.rounds.advance(t, self.state)
        result = replace(self.result, sent=None, received=None)
        graph = self.federation.exchange.graph
        edges = graph.edges if self.result.sent is not None else []
        result = replace(result, edges=edges) if self.index == 0 else replace(result, edges=[], W=None)
        return result, self.rounds.virtual_seconds

    def measure(self) -> LayerShare | None:
        """Measure this worker's share of the layers after the last round, of all honest clients."""
        assert self.result is not None
        x, W = self.federation.algorithm.model(self.state), self.result.W
        parts = split_layers(x.spec, len(self.placement.tiles))
        after, sent = self._share(x, parts), self.result.sent and self._share(self.result.sent, parts)
        if not after.spec.layers:
            return None
        whole = identity(self.placement.clients) if W is None else W
        attackers = set(self.federation.attackers)
        honest = [each for each in range(self.placement.clients) if each not in attackers]
        return measure_share(*of_clients(honest, after, sent, whole))

    def _share(self, x: Adapters, parts: Sequence[Any]) -> Adapters:
        """All clients' factors of this worker's layers."""
        own = parts[self.index]
        spec = replace(own, blocks=tuple(block for block in own.blocks if block in x.spec.blocks))
        flat = self.rows.columns(x.flat, [columns_of_layers(x.spec, part) for part in parts])
        ranks = self.rows.all_rows(x.ranks[:, None])[:, 0]
        merged = tree_map(lambda _, leaf: gather_rows(self.rows, leaf), x.merged)
        return Adapters(spec, flat, ranks, merged_of_layers(merged, own)).to("cpu")

    def evaluate(self, final: bool) -> dict[str, Scores]:
        """Score the block's clients and, on the worker that has it, the average of all."""
        use_threads(self.federation.config)
        self.evaluation: Evaluation = self.evaluator.evaluate(self.state, final)
        return self.evaluation.scores()

    def rescore(self, of: str) -> Scores:
        """Score the block again as the evaluations before the final one did."""
        return self.evaluator.rescored(self.evaluation, of)

    def collect_state(self) -> Any:
        """Return the block's part of the state, as a tree."""
        return tree_map(lambda _, leaf: leaf.detach().cpu(), self.state)

    def collect(self, part: str) -> tuple[dict[str, Tensor], Any]:
        """Return the tensors [client, ...] of a part of a checkpoint, and its facts."""
        if part == "rounds":
            return self.rounds.state_dict()
        owner = self.federation.learner if part == "learner" else self.federation.exchange
        tensors = {name: value.detach().cpu() for name, value in owner.state_dict().items()}
        return tensors, self.federation.learner.trained if part == "learner" else None

    def restore_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the block's part of the state, from its leaves."""
        self.state = rebuild(self.state, dict(tensors))

    def restore(self, part: str, tensors: Mapping[str, Tensor], facts: Any) -> float:
        """Restore what ``collect`` returned; return the virtual seconds since the start of the run."""
        federation = self.federation
        moved = {name: value.to(federation.config.device) for name, value in tensors.items()}
        if part == "learner":
            federation.learner.load_state_dict(moved, facts)
        elif part == "exchange":
            federation.exchange.load_state_dict(moved)
        else:
            self.rounds.load_state_dict(moved, facts, federation.algorithm.model(self.state))
        return self.rounds.virtual_seconds


class BlockClients(AllClients):
    """The clients of one worker, whose average one worker evaluates: the one with the last client."""

    def __init__(self, federation: Federation, rows: SwappedRows):
        self.federation, self.rows = federation, rows
        self.last = next(i for i, block in enumerate(rows.placement.blocks) if rows.placement.clients - 1 in block)

    def evaluated(self, x: Adapters) -> tuple[Adapters, ...]:
        """Return the block's clients and, on the last client's worker, the average of all honest clients.

        Every worker averages a share of the columns; of merged parts all do all.
        """
        if not bool(self.rows.all_rows(torch.tensor([[x.equal_ranks]] * x.clients)).all()):
            return (x,)
        honest = [i for i in range(self.rows.placement.clients) if i not in self.federation.attackers]
        merged = tree_map(lambda _, leaf: gather_rows(self.rows, leaf), x.merged)
        shares = list(torch.arange(x.flat.shape[1]).tensor_split(len(self.rows.blocks)))
        mine = self.rows.columns(x.flat, shares)[honest]
        parts = self.rows.to_one(self.last, client_mean(mine)[0])
        if not parts:
            return (x,)
        flat = torch.cat(parts)[None].to(x.flat)
        if merged is not None:
            return x, replace(x, flat=flat, ranks=x.ranks[:1], merged=merged.rows(honest).mean())
        return (replace(x, flat=torch.cat([x.flat, flat]), ranks=torch.cat([x.ranks, x.ranks[:1]])),)


def gather_rows(rows: SwappedRows, leaf: Float[Tensor, "client ..."]) -> Float[Tensor, "all_clients ..."]:
    """One leaf of a tree, of all clients."""
    return rows.all_rows(leaf.flatten(1)).view(rows.placement.clients, *leaf.shape[1:])
