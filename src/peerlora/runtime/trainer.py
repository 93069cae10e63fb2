"""Trainer: the loop over rounds, with evaluation, checkpoints and events."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from peerlora.data.dataset import Dataset
from peerlora.display import format_now
from peerlora.errors import DivergenceError, Stopped, TooManyFiles
from peerlora.exchange.relayed_average import RelayedModels
from peerlora.lora.adapters import Adapters
from peerlora.runs.events import Evaluated, Event, Resumed, RoundDone, RunFinished, RunStarted, Warned, plain
from peerlora.runs.metrics import find_start, summarise
from peerlora.runs.store import RunStore, read_events
from peerlora.runtime.compose import Federation, evaluation_rows, resolve_threads
from peerlora.runtime.export import exporter, write_peft_folders, write_tensors
from peerlora.runtime.generation import generate_answers
from peerlora.runtime.participation import Participation
from peerlora.runtime.relayed_export import write_relayed
from peerlora.runtime.rounds import Rounds
from peerlora.train.schedule import rate
from peerlora.tree import leaves, rebuild

_CURE = "lower train.lr, set train.clip, or see whom it mixed with in the last round"
_LISTED_LINKS = 5000  # links of a round, beyond which its event holds only their number

State = Any
Sink = Callable[[Event], None]
"""Takes every event of a run, in order."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    summary: dict[str, Any]
    """What ``peerlora train --json`` prints."""
    run: Path
    """The run folder, with events, metrics, report and a PEFT folder per client."""
    load: Callable[[], Adapters] = field(repr=False)
    """Gives ``adapters``."""
    load_relayed: Callable[[], Adapters | None] = field(default=lambda: None, repr=False)
    """Gives ``relayed``."""

    @cached_property
    def adapters(self) -> Adapters:
        """Every client's own final adapter."""
        return self.load()

    @cached_property
    def relayed(self) -> Adapters | None:
        """Every client's relayed average; None where nothing is relayed."""
        return self.load_relayed()

    @property
    def metrics(self):
        """The long metrics table (client, round, metric, value) as a pyarrow Table."""
        import pyarrow.parquet as pq

        return pq.read_table(self.run / "metrics.parquet")


class Trainer:
    """One run in its folder, for the clients held here.

        trainer = Trainer(federation, build_rounds(federation), AllClients(federation), store, sinks=[print])
        result = trainer.run()

    ``rounds`` advances these clients by one round, ``participation`` finds the others.  The store takes every event
    first, then the ``sinks`` in order.  ``stop`` is asked after every round; when it is true, a checkpoint is written
    and Stopped raised.
    """

    def __init__(
        self,
        federation: Federation,
        rounds: Rounds,
        participation: Participation,
        store: RunStore,
        sinks: Sequence[Sink] = (),
        stop: Callable[[], bool] = lambda: False,
    ):
        self.federation, self.rounds, self.participation = federation, rounds, participation
        self.store, self.sinks, self.stop = store, (store.emit, *sinks), stop
        self.config, self.algorithm, self.learner = federation.config, federation.algorithm, federation.learner
        self.few_rows = evaluation_rows(federation)
        self.opening_bytes = 0

    def run(self, resumed: bool = False) -> Result:
        """Run all rounds that are left, evaluate, and write the results."""
        opening = self.participation.start()
        self.opening_bytes = opening.bytes_sent
        first, state = self._restore(opening.state) if resumed else (0, opening.state)
        if first == 0:
            self._emit(self._started(), *map(Warned, self.federation.warnings))
        self._emit(*opening.events)
        if first == 0:
            self._evaluate(0, state, final=False)
        self._emit(*self.participation.join(first, state))
        return self._finish(self._all_rounds(first, state))

    def _all_rounds(self, done: int, state: State) -> State:
        rounds = self.config.train.rounds
        while done < rounds:
            t, state, events = self.participation.next_round(done, state)
            self._emit(*events)
            if t != done:
                self._save(t, state)
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
                command = self.participation.resume_command(self.store.folder)
                raise Stopped(f"stopped after {done} of {rounds} rounds; go on with: {command}")
        return state

    def _round(self, t: int, state: State) -> State:
        try:
            state, result = self.rounds.advance(t, state)
        except DivergenceError as error:
            raise self._diverged(t, str(error)) from None
        began = time.perf_counter()
        event = RoundDone(
            round=t,
            loss=self._of_honest(np.array(result.losses)),
            **self.participation.observe(t, state, result),
            edges=[list(edge) for edge in result.edges] if len(result.edges) <= _LISTED_LINKS else None,
            contacts=len(result.edges),
            bytes_per_edge=result.bytes_per_edge,
            bytes_sent=result.bytes_sent + (self.opening_bytes if t == 0 else 0),
            seconds_train=result.seconds_train,
            seconds_mix=result.seconds_mix,
            seconds_diagnostics=time.perf_counter() - began,
            measures={**result.measures, **self._rate(t)},
            virtual_seconds=self.rounds.virtual_seconds,
            absent=result.absent,
        )
        self._emit(event)
        return state

    def _rate(self, t: int) -> dict[str, float]:
        """The learning rate of a training round, where it is not the same in all."""
        train = self.config.train
        told = (train.schedule != "constant" or train.warmup) and not train.is_quiet(t)
        return {"learning_rate": rate(train, t)} if told else {}

    def _diverged(self, done: int, reason: str) -> DivergenceError:
        """Mark the checkpoint that training could not go on from, and say what a resumed run goes on from."""
        other = self.store.mark_diverged(done)
        if other is None:
            return DivergenceError(reason)
        command = self.participation.resume_command(self.store.folder)
        return DivergenceError(
            f"{reason}. The checkpoint after {done} rounds has been set aside; to go on from {other}: {command}"
        )

    def _of_honest(self, values: np.ndarray) -> list[float]:
        """[client], NaN for attackers."""
        honest = self.federation.honest_rows
        shown = np.full(len(values), np.nan)
        shown[honest] = values[honest]
        return shown.tolist()

    def _evaluate(self, done: int, state: State, final: bool) -> RelayedModels | None:
        """Evaluate the clients' models, and return their relayed ones."""
        began = time.perf_counter()
        x = self.algorithm.model(state)
        rows = self.federation.eval_data if final else self.few_rows
        metric, loss = self._scores(self.participation.evaluated(x), rows)
        relayed = self.federation.exchange.relayed_models(x)
        relayed_metric, relayed_loss = self._scores((relayed.adapters,), rows) if relayed else (None, None)
        own, averaged = slice(0, x.clients), x.clients if len(metric) > x.clients else None
        event = Evaluated(
            round=done,
            rows=len(rows),
            own=self._of_honest(metric[own]),
            averaged=float(metric[averaged]) if averaged else float("nan"),
            own_loss=self._of_honest(loss[own]),
            averaged_loss=float(loss[averaged]) if averaged else float("nan"),
            seconds=time.perf_counter() - began,
            final=final,
            virtual_seconds=self.rounds.virtual_seconds,
            relayed=[] if relayed_metric is None else self._of_honest(relayed_metric),
            relayed_loss=[] if relayed_loss is None else self._of_honest(relayed_loss),
            relayed_cut=float(relayed.cut_share[self.federation.honest_rows].mean()) if relayed else float("nan"),
        )
        self._emit(event)
        if final and not np.isfinite(loss[self.federation.honest_rows]).all():  # no training follows that would show it
            raise self._diverged(done, f"a client's loss is not finite after {done} rounds; {_CURE}")
        return relayed

    def _scores(self, models: Sequence[Adapters], rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Metric and loss of all these clients on the same rows."""
        found = [self.learner.evaluate(some, rows, self.config.eval.batch) for some in models]
        return np.concatenate([each.metric for each in found]), np.concatenate([each.loss for each in found])

    def _save(self, done: int, state: State) -> None:
        if not self.algorithm.model(state).flat.isfinite().all():
            raise DivergenceError(f"adapters are not finite after {done} rounds; {_CURE}")
        in_flight, facts = self.rounds.state_dict()
        parts = {
            "state": leaves(state),
            "learner": self.learner.state_dict(),
            "exchange": self.federation.exchange.state_dict(),
            "rounds": in_flight,
        }
        tensors = {f"{part}.{name}": leaf.cpu() for part, named in parts.items() for name, leaf in named.items()}
        tensors |= self.participation.state_dict()
        try:
            self.store.save_checkpoint(done, tensors, {"trained": self.learner.trained, "rounds": facts})
        except TooManyFiles as error:  # of many connections, say; the next checkpoint may be possible again
            self._emit(Warned(f"no checkpoint after {done} rounds: {error}"))

    def _restore(self, start: State) -> tuple[int, State]:
        """(rounds done, state) of the newest good checkpoint; (0, start) where there is none."""
        checkpoint = self.store.load_checkpoint()
        self.store.rewind(checkpoint)
        if checkpoint is None:
            return 0, start
        self._emit(Resumed(format_now(), checkpoint.round))
        self._emit(*map(Warned, checkpoint.notes))

        def part(name: str) -> dict[str, Tensor]:
            return {key: leaf.to(self.config.device) for key, leaf in _below(f"{name}.", checkpoint.tensors).items()}

        self.participation.load_state_dict(checkpoint.tensors)
        self.learner.load_state_dict(part("learner"), checkpoint.facts["trained"])
        self.federation.exchange.load_state_dict(part("exchange"))
        state = rebuild(start, _below("state.", checkpoint.tensors))
        self.rounds.load_state_dict(part("rounds"), checkpoint.facts.get("rounds", {}), self.algorithm.model(state))
        return checkpoint.round, state

    def _started(self) -> RunStarted:
        federation, config = self.federation, self.config
        started = RunStarted(
            time=format_now(),
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
            clock=federation.clock.describe() if federation.clock else None,
            deploys=config.exchange.relay.deploy if config.exchange.relay else "own",
        )
        return self.participation.describe(started)

    def _finish(self, state: State) -> Result:
        self._emit(*self.participation.leave(state))
        x = self.algorithm.model(state).to("cpu")
        relayed, caches = self._evaluate(self.config.train.rounds, state, final=True), self.federation.exchange.relayed
        if wanted := self.config.eval.generate:
            models = self.participation.evaluated(self.algorithm.model(state))
            self._emit(generate_answers(self.federation, wanted, models, self.config.train.rounds))
        with self.store.writing():
            write_tensors(self.store.folder, x)  # first: nothing that is wrong with the log may cost a run its result
            if relayed and caches:
                write_relayed(self.store.folder, relayed, caches)
            events = read_events(self.store.folder)
            if find_start(events) is None:  # its line is damaged
                events.insert(0, self._started())
            summary = summarise(events) | {"run": str(self.store.folder)}
            write_peft_folders(self.store.folder, x, exporter(self.federation), summary, relayed)
        self._emit(RunFinished(format_now(), plain(summary)))
        deployed = relayed and relayed.adapters.to("cpu")
        return Result(summary, self.store.folder, lambda: x, lambda: deployed)

    def _emit(self, *events: Event) -> None:
        for event in events:
            for sink in self.sinks:
                sink(event)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
