"""Rounds of a client without common rounds, among real peers: one round is one job of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from peerlora.algorithms.base import AsynchronousAlgorithm
from peerlora.lora.adapters import Adapters
from peerlora.network.protocol.push_service import PeerMailbox
from peerlora.network.protocol.send_queue import SendStats
from peerlora.runtime.asynchronous import local_steps
from peerlora.runtime.rounds import RoundResult
from peerlora.train.base import Learner


class PeerAsyncRounds:
    """Advances a client by one job, in the order that ``AsynchronousRounds`` has for each client of a simulation.

    The state changes within a round only: messages that come while the client evaluates or saves wait until it begins
    the next job, so a checkpoint holds them.  During a job they are taken as they come, and answered.

    ``jobs``: how many the client does.  ``sent`` returns what became of messages since its last call; after the last
    job it first waits for those in flight.
    """

    virtual_seconds = float("nan")

    def __init__(
        self,
        algorithm: AsynchronousAlgorithm[Any],
        learner: Learner,
        mailbox: PeerMailbox,
        jobs: int,
        sent: Callable[[bool], SendStats],
    ):
        self.algorithm, self.learner, self.mailbox, self.jobs, self.sent = algorithm, learner, mailbox, jobs, sent
        self.state: Any = None
        """While a job is going on, the client's state, which received messages change."""
        self.news = False
        """True after a message came of which the method does not know yet."""
        self.stopped: set[int] = set()
        mailbox.on_arrival = self._arrived

    def advance(self, t: int, state: Any) -> tuple[Any, RoundResult]:
        """Job ``t`` of this client: begin, K local steps, push."""
        began = time.perf_counter()
        try:
            job, start, free = self._begin(state)
            trains = time.perf_counter()
            with self.learner.round(t, [job], [0]) as stats:
                trained = local_steps(self.learner, start, self.algorithm.active(job), free)
            trained_for = time.perf_counter() - trains
            state, measures, edges = self._end(start, trained)
        finally:
            self.state = None
        sent = self.sent(t + 1 == self.jobs)
        return state, RoundResult(
            losses=stats.losses.tolist(),
            sent=None,
            W=None,
            edges=edges,
            bytes_per_edge=sent.largest,
            bytes_sent=sent.total,
            seconds_train=trained_for,
            seconds_mix=time.perf_counter() - began - trained_for,
            measures=measures,
        )

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The mailbox."""
        return self.mailbox.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], x: Adapters) -> None:
        """Restore it."""
        self.mailbox.load_state_dict(tensors, facts)
        self.news = self.mailbox.has_messages

    def _begin(self, state: Any) -> tuple[int, Adapters, Bool[Tensor, "client parameter"] | None]:
        """The job's number, where it begins, and what it may change."""
        with self.mailbox.lock:
            self.state = state
            self._listen()
            self._let(self.algorithm.before_job)
            self.mailbox.mailboxes.begin_job(self.mailbox.client)
            job = self.mailbox.mailboxes.versions[self.mailbox.client]
            return job, self.algorithm.model(self.state), self.algorithm.coordinates(self.state)

    def _end(self, start: Adapters, trained: Adapters) -> tuple[Any, dict[str, float], list[tuple[int, int]]]:
        """The state after the job, and the measures and links since the one before."""
        with self.mailbox.lock:
            mailboxes = self.mailbox.mailboxes
            mailboxes.end_job(self.mailbox.client)
            self._let(lambda state, mailbox: self.algorithm.on_job(state, start, trained, mailbox))
            ended = self.state, mailboxes.measures(), sorted(mailboxes.used)
            self.state = None
            self.mailbox.closed = mailboxes.versions[self.mailbox.client] >= self.jobs
            mailboxes.begin_round()
            return ended

    def _arrived(self) -> None:
        """Note a received message; the lock is held."""
        self.news = True
        if self.state is not None:
            self._listen()

    def _listen(self) -> None:
        """Let the method take messages of which it does not know yet; the lock is held."""
        if self.news:
            self.news = False
            self._let(self.algorithm.on_message)

    def _let(self, hook: Callable[[Any, Any], Any]) -> None:
        """Let the method change the state and push; the lock is held."""
        self.state = hook(self.state, self.mailbox.mailbox())
        self.mailbox.dispatch()
