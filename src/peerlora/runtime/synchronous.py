"""Synchronous rounds, with or without a virtual clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from peerlora.algorithms.base import Algorithm
from peerlora.exchange.base import MeteredExchange
from peerlora.exchange.schema import encoded_bytes
from peerlora.lora.adapters import Adapters
from peerlora.runtime.rounds import RoundResult
from peerlora.runtime.virtual_clock import VirtualClock, seconds, ticks
from peerlora.topology.schedule import RoundGraph
from peerlora.topology.storage import identity_like
from peerlora.train.base import Learner
from peerlora.tree import held


class SynchronousRounds:
    """Synchronous rounds: everybody trains, then everybody exchanges.

    With a clock a round ends when the slowest client has computed and sent, or at the deadline.  Who is not ready then,
    or is away, is absent: in that round it has no links, whose weight goes to the diagonals of both ends, and its whole
    state stays as it was.  It goes on with its job and takes part in the first round that it is ready in; all others
    begin their next job at once.

    ``gather`` turns [client, 1] of the clients held here into that of all; where all are here it is the identity.
    """

    def __init__(
        self,
        algorithm: Algorithm[Any],
        learner: Learner,
        exchange: MeteredExchange,
        clock: VirtualClock | None,
        gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    ):
        self.algorithm, self.learner, self.exchange, self.clock = algorithm, learner, exchange, clock
        self.gather = gather
        self.now, self.jobs = 0, [0] * len(exchange.clients)
        self.ready: dict[int, int] = {}
        """Client that has begun a job -> when its result will have been sent."""
        self.stopped: set[int] = set()
        """Clients that train no more, and go on exchanging; only of methods whose rounds do no more than that."""
        timed = clock.clients if clock else 0
        self.step_seconds = torch.full((timed,), float("nan"), dtype=torch.float64)
        """[client] of the run: of the latest job, as long as it took from its beginning."""

    @property
    def virtual_seconds(self) -> float:
        """Since the start of the run."""
        return seconds(self.now) if self.clock else float("nan")

    def advance(self, t: int, state: Any) -> tuple[Any, RoundResult]:
        """Round ``t``; the state is that of its end."""
        absent = self._pass_time(self.clock, t, state) if self.clock else []
        gone = set(absent)
        here = [place for place, client in enumerate(self.exchange.clients) if client not in gone]
        stats = self.exchange.begin(t, absent)
        began = time.perf_counter()
        own_seconds = self.step_seconds[list(self.exchange.clients)] if self.clock else None
        jobs, step_seconds = (self.jobs, own_seconds) if self.clock else (None, None)
        training = [place for place in here if self.exchange.clients[place] not in self.stopped]
        with self.learner.round(t, jobs, training, step_seconds) as trained:
            advance = self.algorithm.quiet_round if self.learner.settings.is_quiet(t) else self.algorithm.round
            after = advance(t, state, self.learner, self.exchange)
        if absent:
            after = held(state, after, sorted({*range(len(self.jobs))}.difference(here)))
        if not stats.cached:  # else the method has relayed
            self.exchange.relay()
        worked = time.perf_counter() - began
        for client in here:
            self.jobs[client] += 1
        graph, mixes = self.exchange.graph, stats.sent is not None
        return after, RoundResult(
            losses=trained.losses.tolist(),
            sent=stats.sent,
            W=None if stats.cached else graph.W if mixes else identity_like(graph.W),
            edges=_links_of(graph, self.exchange.clients) if mixes else [],
            bytes_per_edge=stats.bytes_per_edge,
            bytes_sent=stats.bytes_sent,
            seconds_train=worked - stats.seconds,
            seconds_mix=stats.seconds,
            measures={name: float(values.mean()) for name, values in stats.measures.items()}
            | {name: fmean(values) for name, values in trained.measures.items()},
            absent=absent,
            received=stats.received,
            missing=stats.missing,
            events=trained.events,
        )

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the moment, the jobs done, and the clients at work; nothing without a clock."""
        if self.clock is None:
            return {}, {}
        facts = {"now": self.now, "jobs": self.jobs, "ready": sorted(self.ready.items())}
        return {"step_seconds": self.step_seconds}, facts

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], x: Adapters) -> None:
        """Restore them."""
        if self.clock is not None:
            self.now, self.jobs = facts["now"], list(facts["jobs"])
            self.step_seconds = tensors["step_seconds"].clone()
            self.ready = {client: moment for client, moment in facts["ready"]}

    def _pass_time(self, clock: VirtualClock, t: int, state: Any) -> list[int]:
        """Let one round's time pass; returns who is absent at its end."""
        clients = range(clock.clients)
        self._begin_jobs(clock, t, state)
        if self.ready:
            last = max(self.ready.values())
            self.now = last if clock.deadline is None else max(self.now, min(self.now + clock.deadline, last))
        else:  # nobody is there: on to the first return, where absences are in seconds
            self.now = min((back for i in clients if (back := clock.back(i, self.now)) is not None), default=self.now)
        there = {client for client, moment in self.ready.items() if moment <= self.now}
        self.ready = {client: moment for client, moment in self.ready.items() if client not in there}
        return [client for client in clients if client not in there]

    def _begin_jobs(self, clock: VirtualClock, t: int, state: Any) -> None:
        """Who is there and idle begins; a message that is late goes on being sent as it was begun."""
        idle = [i for i in range(clock.clients) if i not in self.ready]
        away = [i for i in idle if clock.away(i, self.now, t)]
        degrees, not_there = self.exchange.topology.at(t, away).degrees, set(away)
        steps, limit = self.learner.settings.local_steps, self.algorithm.time_limit
        quiet, begun, computed = self.learner.settings.is_quiet(t), [i for i in idle if i not in not_there], {}
        for i in begun:
            gradients = 0 if quiet or i in self.stopped else self.algorithm.traits.gradients
            self.step_seconds[i] = seconds(clock.compute(i, gradients, self.now))
            whole = clock.compute(i, gradients * steps, self.now)
            computed[i] = self.now + (whole if limit is None else min(whole, ticks(limit)))
        sizes = self._message_bytes(t, state, begun)
        for i in begun:
            links = int(degrees[i]) if sizes[i] else 0
            self.ready[i] = computed[i] + clock.upload(i, links * sizes[i], computed[i]) + (clock.delay if links else 0)

    def _message_bytes(self, t: int, state: Any, begun: list[int]) -> list[int]:
        """[client] of the run: the bytes of the message that each of those ``begun`` will send to a neighbour."""
        x, steps = self.algorithm.model(state), self.learner.settings.local_steps
        own, begins = torch.zeros(len(self.jobs), 1, dtype=torch.float64), set(begun)
        for place, client in enumerate(self.exchange.clients):
            if client in begins:
                vectors = self.algorithm.message_in_time(x.rows([place]), t, self.step_seconds[[client]], steps)
                message = self.exchange.wire_schema(vectors)
                own[place] = encoded_bytes(message) if message else 0
        return self.gather(own)[:, 0].long().tolist()


def _links_of(graph: RoundGraph, clients: Sequence[int]) -> list[tuple[int, int]]:
    """The links of a round that have an end among these clients."""
    if len(clients) == graph.clients:
        return graph.edges
    own = set(clients)
    return [edge for edge in graph.edges if own.intersection(edge)]
