"""Participation: where a Trainer's clients live, and how they find the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from peerlora.exchange.gossip_sum import NetworkSum
from peerlora.exchange.wrapper import unwrap
from peerlora.lora.adapters import Adapters
from peerlora.lora.diagnostics import Diagnostics, diagnose
from peerlora.runs.events import Event, RunStarted
from peerlora.runs.store import resume_command
from peerlora.runtime.compose import Federation, opening_state
from peerlora.runtime.rounds import RoundResult
from peerlora.topology.second_moment import SecondMoment
from peerlora.topology.storage import Matrix, entries_like, identity
from peerlora.topology.weights import remove_links
from peerlora.tree import rebuild

WITHOUT_W = ("local_cross_term", "weak_mismatch", "strong_mismatch", "rho")
"""Measures of a round that are not known where no single matrix describes it."""

State = Any


@dataclass(frozen=True)
class Opening:
    """The state before round 0, and the exchanges that it took."""

    state: State
    bytes_sent: int = 0
    events: Sequence[Event] = ()


class Participation(Protocol):
    """The part of a run that depends on where clients live: all here, one peer, or a block of a cluster worker."""

    def start(self) -> Opening:
        """Make the state before round 0, once clients know what their losses need to know of each other."""
        ...

    def join(self, done: int, state: State) -> Sequence[Event]:
        """Find the other clients after ``done`` rounds, before the first round of this process."""
        ...

    def next_round(self, t: int, state: State) -> tuple[int, State, Sequence[Event]]:
        """Return the round to run after ``t`` rounds, and its state: later ones where a client has fallen behind."""
        ...

    def observe(self, t: int, state: State, result: RoundResult) -> dict[str, Any]:
        """Measure the clients after a round: values of RoundDone, by field name."""
        ...

    def evaluated(self, x: Adapters) -> tuple[Adapters, ...]:
        """Return the models to evaluate: first the clients held here, then their average where it is known."""
        ...

    def whole(self, state: State) -> State:
        """Return the state as a checkpoint and the exports have it, of every client that this run writes."""
        ...

    def restored(self, start: State, tensors: dict[str, Tensor]) -> State:
        """Return a state like ``start`` with the tensors that a checkpoint kept of ``whole``."""
        ...

    def describe(self, started: RunStarted) -> RunStarted:
        """Add to a run's first event which clients are held here."""
        ...

    def leave(self, done: int, state: State) -> Sequence[Event]:
        """End the rounds after ``done`` of them; the final evaluation follows."""
        ...

    def resume_command(self, folder: Path) -> str:
        """Return the command that resumes a stopped run."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps."""
        ...

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned."""
        ...


class HeldState:
    """The state of a participation that holds all of what it writes."""

    def whole(self, state: State) -> State:
        """Return the state itself."""
        return state

    def restored(self, start: State, tensors: dict[str, Tensor]) -> State:
        """Return a state like ``start`` with these tensors."""
        return rebuild(start, tensors)


class AllClients(HeldState):
    """All clients of a run live in this process.

    Diagnostics leave attackers out, as if the honest clients had no link to them.
    """

    def __init__(self, federation: Federation):
        self.federation = federation
        self.moment = SecondMoment(federation.config.clients)
        """Of the rounds so far."""

    def start(self) -> Opening:
        """Sum label counts by gossip where the loss needs them, and start the method."""
        gossip = NetworkSum(unwrap(self.federation.exchange), self.federation.topology)
        state = opening_state(self.federation, gossip)
        return Opening(state, gossip.bytes_sent)

    def join(self, done: int, state: State) -> Sequence[Event]:
        """Find nobody: all are here."""
        return ()

    def next_round(self, t: int, state: State) -> tuple[int, State, Sequence[Event]]:
        """Return round ``t``: no client can fall behind."""
        return t, state, ()

    def observe(self, t: int, state: State, result: RoundResult) -> dict[str, Any]:
        """Measure agreement, mismatch and rho."""
        W = result.W if result.W is not None else identity(self.federation.config.clients)
        found = vars(self._diagnosed(state, result.sent, W))
        self.moment.add(W)
        if result.W is None:
            return {**found, **dict.fromkeys(WITHOUT_W, math.nan)}
        doubly = np.allclose(W.sum(axis=0), 1)  # a method may have replaced the topology's weights
        return {**found, "rho": self.moment.rho(t + 1) if doubly else math.nan}

    def evaluated(self, x: Adapters) -> tuple[Adapters, ...]:
        """Return the clients and the average of the honest ones; unequal ranks have no average.

        Merged parts average to a sum of another shape, which is evaluated by itself.
        """
        if not x.equal_ranks:
            return (x,)
        honest = self.federation.honest_rows
        mean = x.mean() if len(honest) == x.clients else x.rows(honest).mean()
        if x.merged is not None:
            return x, mean
        return (replace(x, flat=torch.cat([x.flat, mean.flat]), ranks=torch.cat([x.ranks, mean.ranks])),)

    def describe(self, started: RunStarted) -> RunStarted:
        """Add nothing: an event without ``held`` is of all clients."""
        return started

    def leave(self, done: int, state: State) -> Sequence[Event]:
        """Do nothing: nobody waits."""
        return ()

    def resume_command(self, folder: Path) -> str:
        """Return the command that resumes a simulation."""
        return resume_command(folder)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the mixing moment."""
        return {name: torch.from_numpy(values) for name, values in self.moment.state_dict().items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore the mixing moment."""
        own = {name: values.numpy() for name, values in tensors.items() if name.partition(".")[0] == "moment"}
        self.moment.load_state_dict(own)

    def _diagnosed(self, state: State, sent: Adapters | None, W: Matrix) -> Diagnostics:
        after, sent, W = of_clients(self.federation.honest_rows, self.federation.algorithm.model(state), sent, W)
        return diagnose(after.to("cpu"), sent.to("cpu") if sent is not None else None, W)


def of_clients(
    clients: Sequence[int], after: Adapters, sent: Adapters | None, W: Matrix
) -> tuple[Adapters, Adapters | None, Matrix]:
    """What some clients did in a round, as if they had no link to the others; of all clients, unchanged."""
    if len(clients) == after.clients:
        return after, sent, W
    others = ~np.isin(np.arange(W.shape[0]), clients)
    i, j = W.nonzero()
    cut = (others[i] | others[j]) & (i != j)
    kept = remove_links(W, entries_like(W, i[cut], j[cut], True))[list(clients)][:, list(clients)]
    return after.rows(clients), sent and sent.rows(clients), kept
