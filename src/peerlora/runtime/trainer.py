"""The loop over rounds, with evaluation, checkpoints and events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peerlora.algorithms.base import AsynchronousAlgorithm
from peerlora.errors import Stopped
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters
from peerlora.lora.diagnostics import Diagnostics, diagnose
from peerlora.runs.events import Evaluated, Event, Resumed, RoundDone, RunStarted, Warned
from peerlora.runs.metrics import summarise
from peerlora.runs.store import RunStore, read_events, resume_command
from peerlora.runtime.asynchronous import AsynchronousRounds
from peerlora.runtime.compose import Federation, evaluation_rows, opening_state, resolve_threads
from peerlora.runtime.export import write_adapters
from peerlora.runtime.rounds import RoundResult, Rounds
from peerlora.runtime.synchronous import SynchronousRounds
from peerlora.topology.weights import remove_links, rho
from peerlora.train.learner import Scores
from peerlora.tree import leaves, rebuild

_EDGES_TOLD = 5000  # a round with more links tells only their number


@dataclass(frozen=True)
class Result:
    """A finished run."""

    summary: dict[str, Any]
    """What ``peerlora train --json`` prints."""
    run: Path
    """The run folder, with events, metrics, report and a PEFT folder per client."""
    load: Callable[[], Adapters] = field(repr=False)
    """Gives ``adapters``."""

    @cached_property
    def adapters(self) -> Adapters:
        """Every client's own final adapter."""
        return self.load()

    @property
    def metrics(self):
        """The long metrics table (client, round, metric, value) as a pyarrow Table."""
        import pyarrow.parquet as pq

        return pq.read_table(self.run / "metrics.parquet")


def rounds_of(federation: Federation) -> Rounds:
    """How the clients of a federation come from one round to the next."""
    algorithm, clock = federation.algorithm, federation.clock
    if isinstance(algorithm, AsynchronousAlgorithm):
        assert clock is not None and isinstance(federation.exchange, StackedExchange)
        return AsynchronousRounds(algorithm, federation.learner, federation.exchange, clock)
    return SynchronousRounds(algorithm, federation.learner, federation.exchange, clock)


class Trainer:
    """One run in its folder."""

    def __init__(
        self,
        federation: Federation,
        store: RunStore,
        listener: Callable[[Event], None] = lambda event: None,
        stop: Callable[[], bool] = lambda: False,
        report: bool = True,
    ):
        self.federation, self.store, self.listener, self.stop = federation, store, listener, stop
        self.report = report
        self.config, self.algorithm = federation.config, federation.algorithm
        self.learner, self.exchange = federation.learner, federation.exchange
        self.few_rows = evaluation_rows(federation)
        self.moment = np.zeros((self.config.clients, self.config.clients))
        self.honest = [row for row, i in enumerate(self.exchange.clients) if i not in federation.attackers]
        self.rounds = self._rounds()

    def run(self, resumed: bool = False) -> Result:
        """All rounds that are left, the final evaluation, and everything that is written at the end."""
        state = self._opening()
        first, state = self._take_up(state) if resumed else (0, state)
        if first == 0:
            self._emit(self._started())
            for warning in self.federation.warnings:
                self._emit(Warned(warning))
            self._evaluate(0, state, final=False)
        self._open(first, state)
        rounds, done = self.config.train.rounds, first
        while done < rounds:
            t, state = self._ready(done, state)
            if t == rounds:
                break
            state = self._round(t, state)
            done = t + 1
            if done % self.config.eval.every == 0 and done < rounds:
                self._evaluate(done, state, final=False)
            stopping = self.stop() and done < rounds
            if done % self.config.checkpoint.every == 0 or done == rounds or stopping:
                self._save(done, state)
            if stopping:
                raise Stopped(f"stopped after {done} of {rounds} rounds; go on with: {self._again()}")
        return self._finish(state)

    def _rounds(self) -> Rounds:
        """How the clients come from one round to the next."""
        return rounds_of(self.federation)

    def _opening(self) -> Any:
        """The state before round 0."""
        return opening_state(self.federation)

    def _open(self, done: int, state: Any) -> None:
        """Before the first round of this process."""

    def _ready(self, t: int, state: Any) -> tuple[int, Any]:
        """The round that comes next, and the state to begin it with."""
        return t, state

    def _again(self) -> str:
        """How to take the run up again."""
        return resume_command(self.store.folder)

    def _round(self, t: int, state: Any) -> Any:
        state, passed = self.rounds.advance(t, state)
        worked = time.perf_counter()
        edges = self._edges(passed)
        event = RoundDone(
            round=t,
            loss=self._honest(np.array(passed.losses)),
            **self._observed(t, state, passed),
            edges=[list(edge) for edge in edges] if len(edges) <= _EDGES_TOLD else None,
            contacts=len(edges),
            bytes_per_edge=passed.bytes_per_edge,
            bytes_sent=passed.bytes_sent,
            seconds_train=passed.seconds_train,
            seconds_mix=passed.seconds_mix,
            seconds_diagnostics=time.perf_counter() - worked,
            measures=dict(passed.measures),
            virtual_seconds=self.rounds.virtual_seconds,
            absent=passed.absent,
        )
        self._emit(event)
        return state

    def _diagnosed(self, after: Adapters, sent: Adapters | None, W: np.ndarray) -> Diagnostics:
        """About the honest clients alone, as if they had no link to attackers."""
        if len(self.honest) < after.clients:
            away = np.ones_like(W, dtype=bool)
            away[np.ix_(self.honest, self.honest)] = False
            W = remove_links(W, away & ~np.eye(len(W), dtype=bool))[np.ix_(self.honest, self.honest)]
            after, sent = after.rows(self.honest), sent and sent.rows(self.honest)
        return diagnose(after.to("cpu"), sent.to("cpu") if sent is not None else None, W)

    def _honest(self, values: np.ndarray) -> list[float]:
        """[client], NaN for attackers."""
        told = np.full(len(values), np.nan)
        told[self.honest] = values[self.honest]
        return told.tolist()

    def _observed(self, t: int, state: Any, passed: RoundResult) -> dict[str, Any]:
        """What there is to know about the clients after a round, under the names that its event has."""
        sent, W = passed.sent, passed.W if passed.W is not None else np.eye(self.config.clients)
        found = vars(self._diagnosed(self.algorithm.model(state), sent, W))
        self.moment += W.T @ W
        if passed.W is None:
            unknown = ("local_cross_term", "weak_mismatch", "strong_mismatch", "rho")
            return {**found, **dict.fromkeys(unknown, math.nan)}
        doubly = np.allclose(W.sum(axis=0), 1)  # a method may have put other weights in the topology's place
        return {**found, "rho": rho(self.moment / (t + 1)) if doubly else math.nan}

    def _edges(self, passed: RoundResult) -> list[tuple[int, int]]:
        """The links over which this round exchanged anything."""
        return passed.edges

    def _scored(self, x: Adapters) -> tuple[Adapters, ...]:
        """Whom to evaluate: the clients held here, and what they are averaged to, if that is known."""
        return _with_mean(x, self.honest)

    def _evaluate(self, done: int, state: Any, final: bool) -> None:
        began = time.perf_counter()
        x = self.algorithm.model(state)
        rows = self.federation.eval_data if final else self.few_rows
        groups = [self.learner.evaluate(some, rows, self.config.eval.batch) for some in self._scored(x)]
        metric, loss = (np.concatenate([getattr(scores, name) for scores in groups]) for name in ("metric", "loss"))
        scores, own = Scores(metric, loss, len(rows)), slice(0, x.clients)
        averaged = x.clients if len(scores.metric) > x.clients else None
        event = Evaluated(
            round=done,
            rows=scores.rows,
            own=self._honest(scores.metric[own]),
            averaged=float(scores.metric[averaged]) if averaged else float("nan"),
            own_loss=self._honest(scores.loss[own]),
            averaged_loss=float(scores.loss[averaged]) if averaged else float("nan"),
            seconds=time.perf_counter() - began,
            final=final,
            virtual_seconds=self.rounds.virtual_seconds,
        )
        self._emit(event)

    def _save(self, done: int, state: Any) -> None:
        tensors = {f"state.{name}": leaf for name, leaf in leaves(state).items()}
        tensors |= {f"learner.{name}": leaf for name, leaf in self.learner.state().items()}
        tensors |= {f"exchange.{name}": leaf for name, leaf in self.exchange.state().items()}
        in_flight, facts = self.rounds.saved()
        tensors |= {f"rounds.{name}": leaf for name, leaf in in_flight.items()}
        tensors = {name: value.cpu() for name, value in tensors.items()} | {"moment": torch.from_numpy(self.moment)}
        self.store.save_checkpoint(done, tensors, {"trained": self.learner.trained, "rounds": facts})

    def _take_up(self, state: Any) -> tuple[int, Any]:
        """(rounds done, state) of the newest good checkpoint; (0, start) where there is none."""
        checkpoint = self.store.load_checkpoint()
        self.store.rewind(checkpoint)
        if checkpoint is None:
            return 0, state
        self._emit(Resumed(datetime.now(UTC).isoformat(timespec="seconds"), checkpoint.round))
        for note in checkpoint.notes:
            self._emit(Warned(note))
        self.moment = checkpoint.tensors["moment"].numpy().copy()
        memory = {name: value.to(self.config.device) for name, value in _below("learner.", checkpoint.tensors).items()}
        self.learner.load_state_dict(memory, checkpoint.facts["trained"])
        known = _below("exchange.", checkpoint.tensors)
        self.exchange.load_state_dict({name: value.to(self.config.device) for name, value in known.items()})
        in_flight = {name: leaf.to(self.config.device) for name, leaf in _below("rounds.", checkpoint.tensors).items()}
        self.rounds.load_state_dict(in_flight, checkpoint.facts.get("rounds", {}))
        return checkpoint.round, rebuild(state, _below("state.", checkpoint.tensors))

    def _started(self) -> RunStarted:
        federation, config = self.federation, self.config
        return RunStarted(
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            method=config.algorithm.name,
            clients=config.clients,
            rounds=config.train.rounds,
            metric=self.learner.task.metric,
            higher_is_better=self.learner.task.higher_is_better,
            seed=config.seed,
            threads=resolve_threads(config.threads),
            versions=self.store.facts["versions"],
            partition=federation.partition.report(),
            topology=config.topology.model_dump(mode="json") | vars(federation.topology.properties),
            parameters=federation.start.spec.parameters,
            warnings=list(federation.warnings),
            notes=list(federation.notes),
            paths=federation.paths,
            clock=federation.clock.told() if federation.clock else None,
        )

    def _finish(self, state: Any) -> Result:
        x = self.algorithm.model(state).to("cpu")
        self._evaluate(self.config.train.rounds, state, final=True)
        summary = summarise(read_events(self.store.folder)) | {"run": str(self.store.folder)}
        write_adapters(self.store.folder, x, self.federation, summary)
        self.store.finish(summary)
        if self.report:
            from peerlora.runs.report import write_report

            write_report(self.store.folder)
        return Result(summary, self.store.folder, lambda: x)

    def _emit(self, event: Event) -> None:
        self.store.emit(event)
        self.listener(event)


def _with_mean(x: Adapters, honest: list[int]) -> tuple[Adapters, ...]:
    """The clients and, behind them, the average of the honest ones; unequal ranks have no average.

    Merged parts average to a sum of another shape, which is looked at by itself.
    """
    if not x.equal_ranks:
        return (x,)
    mean = x.mean() if len(honest) == x.clients else x.rows(honest).mean()
    if x.merged is not None:
        return x, mean
    return (replace(x, flat=torch.cat([x.flat, mean.flat]), ranks=torch.cat([x.ranks, mean.ranks])),)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
