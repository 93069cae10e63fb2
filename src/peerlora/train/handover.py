"""The hand-over between a method, which waits, and a training loop of the user's own, each on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from peerlora.errors import PeerloraError
from peerlora.lora.adapters import Block
from peerlora.train.local_rules import LocalRule

_POLL = 1.0  # seconds between two looks whether the program is at its end


class LoopEnded(Exception):
    """The loop is over before the rounds are; raised where a method waits for local steps.

    ``steps``: those that it took since it last handed adapters over; ``report``: what it logged meanwhile.
    """

    def __init__(self, steps: int, report: LoopReport):
        super().__init__(f"the training loop is over, {steps} steps after its last exchange")
        self.steps, self.report = steps, report


class LoopFailed(PeerloraError):
    """Raised where a method waits for a loop that ended by an error; the loop's own error is its cause."""


@dataclass(frozen=True)
class TrainJob:
    """Local steps that a loop is to take."""

    flat: Float[Tensor, " parameter"]
    """Where they begin."""
    blocks: tuple[Block, ...]
    """What trains."""
    steps: int
    """Optimiser steps."""
    fresh: bool
    """Whether the optimiser's memory of the adapter starts anew."""
    rule: LocalRule | None = None
    """Changes the gradient of every step."""
    at: int | None = None
    """Steps that the loop had taken before, as a checkpoint has it; None: unknown."""


@dataclass(frozen=True)
class EvaluateJob:
    """An evaluation of these adapters, by the loop's own rows."""

    flat: Float[Tensor, " parameter"]


@dataclass(frozen=True)
class LastJob:
    """The final adapters, for the loop to go on with or to end; nothing is asked of it any more."""

    flat: Float[Tensor, " parameter"]


Job = TrainJob | EvaluateJob | LastJob


@dataclass(frozen=True)
class LoggedScores:
    """One evaluation that a loop has logged: numbers by name."""

    values: Mapping[str, float]
    rows: int = 0
    """0: not known."""


@dataclass(frozen=True)
class LoopReport:
    """What a loop hands back."""

    flat: Float[Tensor, " parameter"] | None
    """The adapters after a TrainJob."""
    steps: int
    """Optimiser steps that the loop has taken in all."""
    rate: float | None = None
    """The mean of the optimiser's learning rates in the steps since the last report; None: there were none."""
    logs: Mapping[str, float] = field(default_factory=dict)
    """The mean of every number that was logged since the last report."""
    scores: LoggedScores | None = None
    """The newest evaluation since the last report."""
    notes: tuple[str, ...] = ()
    """For the user."""


class Handover:
    """Jobs one way, reports the other, one at a time; whichever side ends wakes the other.

    The method's side calls ``ask``, ``finish`` and ``fail``; the loop's side ``take``, ``give``, ``check``, ``end`` and
    ``abort``.
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._job: Job | None = None
        self._report: LoopReport | None = None
        self._loop_over: Exception | None = None
        self._method_over = False
        self._error: BaseException | None = None

    def ask(self, job: Job) -> LoopReport:
        """Hand over a job and wait for its report.

        Raises LoopEnded where the loop is over, LoopFailed where it ended by an error or the program is at its end.
        """
        with self._changed:
            if self._loop_over is not None:
                raise self._loop_over
            self._job, self._report = job, None
            self._changed.notify_all()
            while self._report is None and self._loop_over is None:
                self._changed.wait(_POLL)
                if not threading.main_thread().is_alive():
                    raise LoopFailed("the program ended while a round was under way")
            if self._report is None:
                assert self._loop_over is not None
                raise self._loop_over
            return self._report

    def finish(self) -> None:
        """No job follows."""
        with self._changed:
            self._method_over = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """No job follows, because of this error, which ``take`` raises."""
        with self._changed:
            self._method_over, self._error = True, error
            self._changed.notify_all()

    def take(self) -> Job | None:
        """Wait for the next job; None where none follows.  Raises the method's error, with its traceback."""
        with self._changed:
            self._changed.wait_for(lambda: self._job is not None or self._method_over)
            if self._job is None and self._error is not None:
                raise self._error
            job, self._job = self._job, None
            return job

    def give(self, report: LoopReport) -> None:
        """Hand over the report of the job that was taken."""
        with self._changed:
            self._report = report
            self._changed.notify_all()

    def check(self) -> None:
        """Raise the method's error, with its traceback, where it has ended by one."""
        if self._error is not None:
            raise self._error

    @property
    def aborted(self) -> bool:
        """Whether the loop ended by an error."""
        return isinstance(self._loop_over, LoopFailed)

    def end(self, steps: int, report: LoopReport) -> None:
        """The loop is over, ``steps`` after its last report; this one tells what it logged since.

        It answers the job that was taken, if any, and every later one.
        """
        self._close(LoopEnded(steps, report))

    def abort(self, error: BaseException) -> None:
        """The loop ended by an error."""
        failed = LoopFailed(f"the training loop ended by an error: {type(error).__name__}: {error}".rstrip(": "))
        failed.__cause__ = error
        self._close(failed)

    def _close(self, reason: Exception) -> None:
        with self._changed:
            self._loop_over = self._loop_over or reason
            self._changed.notify_all()
