"""Rounds of an asynchronous run: each client trains, sends and receives on its own schedule, on the virtual clock.

One round is as many finished jobs as there are clients, so that a run of R rounds does the local steps of R
synchronous rounds, whoever does them.  A job is finished when its result has been sent.  Everything of one moment
belongs together: first jobs end and push, then messages arrive, then clients combine what they have and begin the next
job.  A round ends after the moment in which its last job was finished, so a job that begins then belongs to the next.

A job learns with the rate of the round in which it begins; at equal speeds that is the client's own count of jobs, by
which real peers go.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from peerlora.algorithms.base import AsynchronousAlgorithm
from peerlora.errors import RunError
from peerlora.exchange.mailbox import Mailboxes, Pushed
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters
from peerlora.runtime.rounds import RoundResult
from peerlora.runtime.virtual_clock import ARRIVED, BEGINS, DONE, EventQueue, ScheduledEvent, VirtualClock, seconds
from peerlora.train.base import Learner, LocalPlan
from peerlora.train.local_rules import Masked
from peerlora.tree import own_copy, put_row, rows_of

_BY_ITSELF, _AFTER_A_JOB = range(2)  # how a client comes to begin a job


class AsynchronousRounds:
    """Advances an asynchronous run by as many jobs as there are clients.

    Jobs in flight are independent, so none is computed when it begins: the first result that is needed computes all
    outstanding jobs, those of one round with the same active blocks in one stacked graph.
    """

    def __init__(
        self, algorithm: AsynchronousAlgorithm[Any], learner: Learner, exchange: StackedExchange, clock: VirtualClock
    ):
        self.algorithm, self.learner, self.clock = algorithm, learner, clock
        self.clients = clock.clients
        self.mailboxes = Mailboxes(exchange.topology.at(0), exchange.topology.seed, algorithm.traits.newest_only)
        self.queue = EventQueue([ScheduledEvent(0, BEGINS, client, _BY_ITSELF) for client in range(self.clients)])
        self.now, self.done, self.stopped = 0, 0, set[int]()
        self.outstanding: set[int] = set()
        self.began_in = [0] * self.clients
        """[client] the round in which its latest job began."""
        self.beginners = set[int]()
        """Those that have begun a job at this moment, whose round is known at its end."""
        self.start: Adapters | None = None
        """[client] where its latest job began."""
        self.result: Adapters | None = None
        """[client] where that job came to, unless it is outstanding."""
        self.losses = torch.full((self.clients,), float("nan"), dtype=torch.float64)
        self.sent_bytes, self.largest, self.seconds_train = 0, 0, 0.0
        self.ended: list[tuple[int, float]] = []

    @property
    def virtual_seconds(self) -> float:
        """Since the start of the run."""
        return seconds(self.now)

    def advance(self, t: int, state: Any) -> tuple[Any, RoundResult]:
        """Round ``t``; raises RunError when nobody is left who would ever begin a job."""
        began = time.perf_counter()
        self.sent_bytes, self.largest, self.seconds_train, self.ended = 0, 0, 0.0, []
        self.mailboxes.begin_round()
        state = own_copy(state)
        while self.done < (t + 1) * self.clients:
            if self.queue.moment is None:
                raise RunError(
                    f"all clients have left for good after {self.done} jobs, in round {t + 1}; change clock.away or "
                    "lower train.rounds"
                )
            self._moment(self.queue.moment, t, state)
        return state, self._passed(time.perf_counter() - began)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the event queue, the mailboxes, and the jobs in flight: where they began and, once computed, ended."""
        assert self.start is not None and self.result is not None
        in_flight, mailboxes = self.mailboxes.state_dict()
        tensors = {f"post.{name}": leaf for name, leaf in in_flight.items()}
        tensors |= {"start": self.start.flat, "result": self.result.flat, "losses": self.losses}
        facts = {"now": self.now, "done": self.done, "outstanding": sorted(self.outstanding)}
        facts["began_in"] = list(self.began_in)
        return tensors, facts | {"agenda": self.queue.to_list(), "post": mailboxes}

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], x: Adapters) -> None:
        """Restore them."""
        in_flight = {name.removeprefix("post."): leaf for name, leaf in tensors.items() if name.startswith("post.")}
        self.mailboxes.load_state_dict(in_flight, facts["post"])
        self.queue = EventQueue([ScheduledEvent(*each) for each in facts["agenda"]])
        self.now, self.done, self.outstanding = facts["now"], facts["done"], set(facts["outstanding"])
        self.began_in = list(
            facts.get("began_in", [self.done // self.clients] * self.clients)
        )  # earlier versions: none
        self.losses = tensors["losses"].cpu()
        self.start, self.result = (replace(x, flat=tensors[name]) for name in ("start", "result"))

    def _moment(self, now: int, t: int, state: Any) -> None:
        """Process all events of one moment, in order; ``state`` changes in place."""
        self.now = now
        self._prepare(self.algorithm.model(state))
        steps = {DONE: self._job_done, ARRIVED: self._arrived, BEGINS: self._begin}
        while self.queue.moment == now:
            event = self.queue.next()
            steps[event.kind](event, t, state)
        for client in self.beginners:
            self.began_in[client] = self.done // self.clients
        self.beginners.clear()

    def _prepare(self, x: Adapters) -> None:
        """Allocate the jobs in flight."""
        if self.start is None:
            self.start, self.result = own_copy(x), own_copy(x)

    def _job_done(self, event: ScheduledEvent, t: int, state: Any) -> None:
        client = event.client
        if client in self.outstanding:
            self._compute(state)
        assert self.start is not None and self.result is not None
        self.mailboxes.end_job(client)
        row, mailbox = rows_of(state, client), self.mailboxes.mailbox(client)
        put_row(
            state, client, self.algorithm.on_job(row, self.start.rows([client]), self.result.rows([client]), mailbox)
        )
        free = self._dispatch(client)  # an upload keeps a client from its next job
        self.queue.add(free, BEGINS, client, _AFTER_A_JOB)

    def _arrived(self, event: ScheduledEvent, t: int, state: Any) -> None:
        client = event.client
        back = self.clock.back(client, self.now)
        if back != self.now:  # deliver when the client is back; drop if it never comes back
            if back is not None:
                self.queue.add(back, *event[1:])
            return
        self.mailboxes.deliver(event.number)
        put_row(state, client, self.algorithm.on_message(rows_of(state, client), self.mailboxes.mailbox(client)))
        self._dispatch(client)  # an answer is sent while the client works on

    def _begin(self, event: ScheduledEvent, t: int, state: Any) -> None:
        client = event.client
        if event.number == _AFTER_A_JOB:
            self.done += 1
            self.ended.append((client, float(self.losses[client])))
        back = self.clock.back(client, self.now)
        if back != self.now:
            if back is not None:
                self.queue.add(back, BEGINS, client, _BY_ITSELF)
            return
        put_row(state, client, self.algorithm.before_job(rows_of(state, client), self.mailboxes.mailbox(client)))
        self.mailboxes.begin_job(client)
        assert self.start is not None
        self.start.flat[client] = self.algorithm.model(state).flat[client]
        self.outstanding.add(client)
        self.beginners.add(client)
        steps = self.learner.settings.local_steps
        self.queue.add(self.now + self.clock.compute(client, steps, self.now), DONE, client)

    def _dispatch(self, client: int) -> int:
        """Send what a client has pushed; return when its uplink is free again."""
        free = self.now
        for pushed in self.mailboxes.take_pushed():
            free += self.clock.upload(client, pushed.size * len(pushed.receivers), free)
            self._count(pushed)
            for receiver, number in zip(pushed.receivers, pushed.numbers, strict=True):
                self.queue.add(free + self.clock.delay, ARRIVED, receiver, number)
        return free

    def _count(self, pushed: Pushed) -> None:
        self.sent_bytes += pushed.size * len(pushed.receivers)
        self.largest = max(self.largest, pushed.size)

    def _compute(self, state: Any) -> None:
        """Compute all outstanding jobs."""
        began = time.perf_counter()
        assert self.start is not None and self.result is not None
        jobs, alike = self.mailboxes.versions, {}
        for client in sorted(self.outstanding):
            alike.setdefault((self.began_in[client], self.algorithm.active(jobs[client])), []).append(client)
        free = self.algorithm.coordinates(state)
        for (t, blocks), places in alike.items():
            with self.learner.round(t, jobs, places) as trained:
                self.result.flat[places] = local_steps(self.learner, self.start, blocks, free).flat[places]
            self.losses[places] = trained.losses[places].to(self.losses)
        self.outstanding.clear()
        self.seconds_train += time.perf_counter() - began

    def _passed(self, spent: float) -> RoundResult:
        losses = [[loss for who, loss in self.ended if who == client] for client in range(self.clients)]
        return RoundResult(
            losses=[sum(own) / len(own) if own else float("nan") for own in losses],
            sent=None,
            W=None,
            edges=sorted(self.mailboxes.used),
            bytes_per_edge=self.largest,
            bytes_sent=self.sent_bytes,
            seconds_train=self.seconds_train,
            seconds_mix=spent - self.seconds_train,
            measures=self.mailboxes.measures(),
        )


def local_steps(
    learner: Learner, start: Adapters, blocks: str, free: Bool[Tensor, "client parameter"] | None
) -> Adapters:
    """A job: K local steps from ``start`` on these blocks, of which only what is ``free`` changes; None: everything."""
    trained = learner.fit(start, LocalPlan(blocks, None if free is None else Masked(free)))
    return trained if free is None else replace(trained, flat=torch.where(free, trained.flat, start.flat))
