"""AD-PSGD: average with one random neighbour at a time, while everybody trains on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from peerlora.algorithms.asynchronous import FIXED_GRAPH, AsynchronousGossip
from peerlora.algorithms.traits import Traits
from peerlora.errors import ConfigError
from peerlora.lora.adapters import Adapters
from peerlora.topology.storage import as_dense

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange, Mailbox
    from peerlora.exchange.payload import Shapes
    from peerlora.exchange.schema import Schema
    from peerlora.topology.storage import Adjacency


@dataclass(frozen=True)
class ADPSGDState:
    """A client's adapters, and with whom it begins an average."""

    x: Adapters
    partners: Bool[Tensor, "client other"]
    """The passive neighbours of an active client; none of a passive one."""
    asked: Int[Tensor, " client"]
    """Jobs that a client had done when it asked for the average that is open; -1: none is."""


@dataclass(frozen=True)
class ADPSGD(AsynchronousGossip):
    """``x_i += (trained - start)``; then an active client averages with one random passive neighbour:

    it sends x_i, the neighbour adds ``d = (x_i - x_j) / 2`` to its own model and answers d, which the first subtracts
    when it arrives.  Both go on training meanwhile, so a job's step is added to what its client is by then.  However
    long a message takes, ``x_i + x_j`` changes by local steps only.  An active client has one average open at a time.

    Source: Lian, Zhang, Zhang, Liu 2018, "Asynchronous decentralized parallel stochastic gradient descent", arXiv
    1710.06952 (pairwise halves, stale gradients and two roles as in others' released code; not read at first hand).
    Differs: the exchange by two messages is ours.  Roles on a graph with odd cycles are ours: a greedy cut that keeps
    all clients connected.  K local steps of any optimiser, whose displacement takes the place of the gradient step.
    """

    interval: int = 0
    """Jobs between two switches of the active factor; 0: both train."""
    patience: int = 10
    """Jobs after which an average that was never answered is given up."""
    traits: ClassVar = Traits(
        source="AD-PSGD, arXiv 1710.06952",
        trains="A and B, or in turn by `interval`; no common rounds",
        mixes="A and B, with one neighbour at a time",
        sends="pushes",
        sends_gradients=False,
        requires=FIXED_GRAPH,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.patience < 1:
            raise ConfigError(f"algorithm.patience: {self.patience} given; expected at least 1 job")

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """A question; an answer has the same size."""
        return {"x": ((x.spec.shared.stop,), x.flat.dtype)}

    def incoming(self, x: Adapters, claimed: Shapes) -> Schema:
        """A question, or an answer."""
        question = self.message(x)
        return {"d": question["x"]} if set(claimed) == {"d"} else question

    def start(self, x: Adapters, peers: Exchange) -> ADPSGDState:
        """Everybody knows its role from the graph alone."""
        adjacency = as_dense(peers.graph.adjacency)
        active_of_all = torch.from_numpy(roles(adjacency))
        active, passive = active_of_all[list(peers.clients)], ~active_of_all
        linked = torch.from_numpy(adjacency)[list(peers.clients)]
        asked = torch.full((len(active),), -1, dtype=torch.int64)
        return ADPSGDState(x, linked & active[:, None] & passive, asked)

    def on_job(self, state: ADPSGDState, before: Adapters, trained: Adapters, mailbox: Mailbox) -> ADPSGDState:
        """The step is added; an active client asks somebody."""
        x = replace(state.x, flat=state.x.flat + (trained.flat - before.flat))
        (partners,) = np.nonzero(state.partners[0].numpy())
        asked = int(state.asked[0])
        if len(partners) == 0 or (asked >= 0 and mailbox.version - asked < self.patience):
            return replace(state, x=x)
        partner = int(mailbox.random("partner").choice(partners))
        mailbox.push({"x": x.flat[0, x.spec.shared].clone()}, [partner])
        return replace(state, x=x, asked=torch.full_like(state.asked, mailbox.version))

    def on_message(self, state: ADPSGDState, mailbox: Mailbox) -> ADPSGDState:
        """Add and answer the half difference, or subtract it."""
        flat, asked, shared = state.x.flat.clone(), state.asked, state.x.spec.shared
        for message in mailbox.poll():
            if "x" in message.payload:
                d = (message.payload["x"] - flat[0, shared]) / 2
                flat[0, shared] += d
                mailbox.push({"d": d}, [message.sender])
            else:
                flat[0, shared] -= message.payload["d"]
                asked = torch.full_like(asked, -1)
        return replace(state, x=replace(state.x, flat=flat), asked=asked)

    def model(self, state: ADPSGDState) -> Adapters:
        """The adapters."""
        return state.x


def roles(adjacency: Adjacency) -> Bool[np.ndarray, " client"]:
    """Who is active: no average is begun by two clients with each other, so none can wait for each other.

    Clients are taken in order of their distance from the first of their part of the graph; each takes the role that
    fewer of its neighbours have taken, and if they are as many, the other one than the first of them.  So each has a
    neighbour of the other role among those before it, and the links between the roles connect all that the graph
    connects.  Of a bipartite graph all links are such.
    """
    active, order = np.zeros(len(adjacency), dtype=bool), breadth_first(adjacency)
    for place, client in enumerate(order):
        known = [other for other in order[:place] if adjacency[client, other]]
        balance = 2 * int(active[known].sum()) - len(known)
        active[client] = balance < 0 or (balance == 0 and not (known and active[known[0]]))
    return active


def breadth_first(adjacency: Adjacency) -> list[int]:
    """All clients, those of one part of the graph together, by their distance from its first."""
    order: list[int] = []
    seen = np.zeros(len(adjacency), dtype=bool)
    for first in range(len(adjacency)):
        queue = [] if seen[first] else [first]
        while queue:
            client = queue.pop(0)
            if not seen[client]:
                seen[client] = True
                order.append(client)
                queue += np.flatnonzero(adjacency[client] & ~seen).tolist()
    return order
