"""Trainer: the loop over rounds, with evaluation, checkpoints and events."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from peerlora.display import format_now
from peerlora.errors import DivergenceError, Stopped, TooManyFiles
from peerlora.exchange.relayed_average import RelayedModels
from peerlora.runs.client_spread import spread
from peerlora.runs.events import LISTED_CLIENTS, Event, Resumed, RoundDone, RunFinished, RunStarted, Warned, plain
from peerlora.runs.metrics import find_start, summarise
from peerlora.runs.privacy_ledger import PrivacyLedger, Release
from peerlora.runs.store import RunStore, read_events
from peerlora.runtime.best_export import write_best, write_best_folders
from peerlora.runtime.compose import Federation, resolve_threads
from peerlora.runtime.evaluation import Evaluates, Evaluation, Evaluator, value_of
from peerlora.runtime.export import exporter, write_peft_folders, write_tensors
from peerlora.runtime.generation import generate_answers
from peerlora.runtime.participation import Participation
from peerlora.runtime.policy import show_policy
from peerlora.runtime.privacy import describe_promises, exhaustion_notice
from peerlora.runtime.relayed_export import write_relayed
from peerlora.runtime.result import Result
from peerlora.runtime.rounds import Rounds
from peerlora.runtime.selection import BestRounds, Selection, stop_notice
from peerlora.runtime.wall_clock import WallClock
from peerlora.train.handover import LoopEnded
from peerlora.train.schedule import rate
from peerlora.tree import leaves

_CURE = "lower train.lr, set train.clip, or see whom it mixed with in the last round"
_LISTED_LINKS = 5000  # links of a round, beyond which its event holds only their number

State = Any
Sink = Callable[[Event], None]
"""Takes every event of a run, in order; of a resumed run first ``Resumed``, then how it had started."""


@dataclass(frozen=True)
class CheckpointRule:
    """When a run writes checkpoints, and which of them a resumed run goes on from."""

    due: Callable[[int], bool]
    """Whether to write one after so many rounds."""
    unfit: Callable[[Mapping[str, Tensor]], str] = lambda tensors: ""
    """Why a checkpoint with these tensors does not fit; an empty string where it does."""
    or_newest: bool = False
    """Whether to go on from the newest where none fits; else from the start."""


class Trainer:
    """One run in its folder, for the clients held here.

        trainer = Trainer(federation, build_rounds(federation), AllClients(federation), store, sinks=[print])
        result = trainer.run()

    ``rounds`` advances these clients by one round, ``participation`` finds the others.  The store takes every event
    first, then the ``sinks`` in order.  ``stop`` is asked after every round; when it is true, a checkpoint is written
    and Stopped raised.  ``checkpoints``: when they are written, by default every ``checkpoint.every`` rounds, and which
    can be gone on from.  ``evaluator`` scores the clients, by default in this process.
    """

    def __init__(
        self,
        federation: Federation,
        rounds: Rounds,
        participation: Participation,
        store: RunStore,
        sinks: Sequence[Sink] = (),
        stop: Callable[[], bool] = lambda: False,
        checkpoints: CheckpointRule | None = None,
        evaluator: Evaluates | None = None,
    ):
        self.federation, self.rounds, self.participation = federation, rounds, participation
        self.store, self.sinks, self.stop = store, tuple(sinks), stop
        self.checkpoints = checkpoints or CheckpointRule(lambda done: done % federation.config.checkpoint.every == 0)
        self.config, self.algorithm, self.learner = federation.config, federation.algorithm, federation.learner
        self.evaluator = evaluator or Evaluator(federation, participation)
        self.best = _best_rounds(federation)
        self.opening_bytes = 0
        self.privacy = federation.learner.privacy
        self._exhausted = 0  # how many clients were told of whose budget is used up
        self.ledger = PrivacyLedger(store.folder)
        if self.privacy and not self.privacy.repeatable:
            self.privacy.record = self._spend
        self.wall_clock = WallClock(self.config.train.max_seconds)

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
        return self._finish(*self._all_rounds(first, state))

    def _all_rounds(self, done: int, state: State) -> tuple[int, State]:
        rounds = self.config.train.rounds
        while done < rounds and not self.wall_clock.ended:
            t, state, events = self.participation.next_round(done, state)
            self._emit(*events)
            if t != done:
                self._save(t, state)
            if t == rounds:
                break
            try:
                state = self._round(t, state)
            except LoopEnded as ended:
                self._emit(Warned(describe_end(ended, done, rounds)))
                self._save(done, state)
                break
            done = t + 1
            if self.wall_clock.look() and done < rounds:
                self._emit(Warned(self.wall_clock.describe(done, rounds)))
            if done % self.config.eval.every == 0 and done < rounds and not self.wall_clock.ended:
                self._evaluate(done, state, final=False)
            stopping = self.stop() and done < rounds and not self.wall_clock.ended
            if self.checkpoints.due(done) or done == rounds or stopping or self.wall_clock.ended:
                self._save(done, state)
            if stopping:
                command = self.participation.resume_command(self.store.folder)
                raise Stopped(f"stopped after {done} of {rounds} rounds; go on with: {command}")
        return done, state

    def _round(self, t: int, state: State) -> State:
        try:
            state, result = self.rounds.advance(t, state)
        except DivergenceError as error:
            raise self._diverged(t, str(error)) from None
        self._emit(*result.events)
        began = time.perf_counter()
        loss = self.evaluator.of_honest(np.array(result.losses))
        listed = len(loss) <= LISTED_CLIENTS
        event = RoundDone(
            round=t,
            loss=loss if listed else [],
            **self.participation.observe(t, state, result),
            edges=[list(edge) for edge in result.edges] if len(result.edges) <= _LISTED_LINKS else None,
            contacts=len(result.edges),
            bytes_per_edge=result.bytes_per_edge,
            bytes_sent=result.bytes_sent + (self.opening_bytes if t == 0 else 0),
            seconds_train=result.seconds_train,
            seconds_mix=result.seconds_mix,
            seconds_diagnostics=time.perf_counter() - began,
            measures={**result.measures, **self._rate(t), **({} if listed else spread("loss", loss))},
            virtual_seconds=self.rounds.virtual_seconds,
            absent=result.absent,
        )
        self._emit(event)
        if self.privacy and (fresh := self.privacy.exhausted[self._exhausted :]):
            self._exhausted += len(fresh)
            self._emit(Warned(exhaustion_notice(self.privacy, fresh, t, self.algorithm.training_end_refusal)))
        return state

    def _spend(self, releases: Sequence[Release]) -> None:
        """Write down what is about to be spent: from then on the folder is that of a run."""
        with self.store.spending():
            self.ledger.append(releases)

    def _rate(self, t: int) -> dict[str, float]:
        """The learning rate of a training round, where it is not the same in all."""
        train = self.config.train
        varies = (train.schedule != "constant" or train.warmup) and not train.is_quiet(t)
        return {"learning_rate": rate(train, t)} if varies else {}

    def _diverged(self, done: int, reason: str) -> DivergenceError:
        """Mark the checkpoint that training could not go on from, and say what a resumed run goes on from."""
        other = self.store.mark_diverged(done)
        if other is None:
            return DivergenceError(reason)
        command = self.participation.resume_command(self.store.folder)
        return DivergenceError(
            f"{reason}. The checkpoint after {done} rounds has been set aside; to go on from {other}: {command}"
        )

    def _evaluate(self, done: int, state: State, final: bool) -> RelayedModels | None:
        """Evaluate the clients' models, and return their relayed ones."""
        if self.learner.logs_evaluations and not final:
            return None
        began = time.perf_counter()
        found = self.evaluator.evaluate(state, final)
        fresh = self._select(done, found, final)
        event = self.evaluator.event(done, found, began, self.rounds.virtual_seconds, final)
        self._emit(replace(event, **self.best.as_fields()) if self.best else event)
        if fresh and self.best and self.best.patience:
            self._emit(Warned(stop_notice(fresh, done, self.best.patience, self.best.selection)))
        diverged = found.own.diverged()[self.federation.honest_rows]
        if final and not self.learner.logs_evaluations and diverged.any():  # no training follows to show it
            raise self._diverged(done, f"a client's loss is not finite after {done} rounds; {_CURE}")
        return found.relayed_models

    def _select(self, done: int, found: Evaluation, final: bool) -> list[int]:
        """Keep the clients' best adapters; return who trains no more from now on."""
        if self.best is None:
            return []
        selection = self.best.selection
        kept = found.relayed_models.adapters if selection.model == "relayed" and found.relayed_models else found.models
        values = value_of(self.evaluator.rescored(found, selection.of), selection)
        fresh = self.best.offer(done, values, kept, last=final)
        self._end_training()
        return fresh

    def _end_training(self) -> None:
        """Let those train no more that have had patience; asynchronous methods refuse ``eval.patience``."""
        if self.best and self.best.patience is not None:
            self.rounds.stopped = self.best.stopped

    def _save(self, done: int, state: State) -> None:
        state = self.participation.whole(state)
        if not all(end.isfinite() for end in self.algorithm.model(state).flat.aminmax()):  # with no copy of them
            raise DivergenceError(f"adapters are not finite after {done} rounds; {_CURE}")
        in_flight, facts = self.rounds.state_dict()
        kept, choice = self.best.state_dict() if self.best else ({}, {})
        parts = {
            "state": leaves(state),
            "learner": self.learner.state_dict(),
            "exchange": self.federation.exchange.state_dict(),
            "rounds": in_flight,
            "best": kept,
        }
        named = {f"{part}.{name}": leaf for part, own in parts.items() for name, leaf in own.items()}
        tensors = {name: leaf.cpu().contiguous() for name, leaf in named.items()}
        tensors |= self.participation.state_dict()
        facts = {"trained": self.learner.trained, "rounds": facts, "best": choice, "time": self.wall_clock.state_dict()}
        facts |= {"privacy": self.privacy.state_dict() if self.privacy else {}}
        try:
            self.store.save_checkpoint(done, tensors, {name: each for name, each in facts.items() if each != {}})
        except TooManyFiles as error:  # of many connections, say; the next checkpoint may be possible again
            self._emit(Warned(f"no checkpoint after {done} rounds: {error}"))

    def _restore(self, start: State) -> tuple[int, State]:
        """(rounds done, state) of the newest good checkpoint; (0, start) where there is none."""
        checkpoint = self.store.load_checkpoint(self.checkpoints.unfit)
        if checkpoint is None and self.checkpoints.or_newest:
            checkpoint = self.store.load_checkpoint()
        if self.privacy:
            self.privacy.load_state_dict(
                checkpoint.facts.get("privacy", {}) if checkpoint else {}, self.ledger.entries()
            )
            self._exhausted = len(self.privacy.exhausted)
        self.store.rewind(checkpoint)
        if checkpoint is None:
            return 0, start
        self._emit(Resumed(format_now(), checkpoint.round))
        self._tell(self._started())  # the store has it
        self._emit(*map(Warned, checkpoint.notes))

        def part(name: str) -> dict[str, Tensor]:
            return {key: leaf.to(self.config.device) for key, leaf in _below(f"{name}.", checkpoint.tensors).items()}

        self.participation.load_state_dict(checkpoint.tensors)
        self.learner.load_state_dict(part("learner"), checkpoint.facts["trained"])
        self.federation.exchange.load_state_dict(part("exchange"))
        state = self.participation.restored(start, _below("state.", checkpoint.tensors))
        x = self.algorithm.model(self.participation.whole(state))
        self.rounds.load_state_dict(part("rounds"), checkpoint.facts.get("rounds", {}), x)
        self.wall_clock.load_state_dict(checkpoint.facts.get("time", {}))
        if self.best and "best" in checkpoint.facts:
            self.best.load_state_dict(part("best"), checkpoint.facts["best"], x)
            self._end_training()
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
            select=self.best.selection.describe() if self.best else None,
            privacy=describe_promises(self.privacy) if self.privacy else None,
            secure_sums=config.exchange.secure,
        )
        return self.participation.describe(started)

    def _finish(self, done: int, state: State) -> Result:
        self._emit(*self.participation.leave(done, state))
        x = self.algorithm.model(self.participation.whole(state)).to("cpu")
        relayed, caches = self._evaluate(done, state, final=True), self.federation.exchange.relayed
        with self.store.writing():
            write_tensors(self.store.folder, x)  # first: nothing that comes now may cost a run its result
        if wanted := self.config.eval.generate:
            models = self.participation.evaluated(self.algorithm.model(state))
            self._emit(generate_answers(self.federation, wanted, models, done))
        self._emit(*show_policy(self.federation, lambda: self.participation.evaluated(x), done))
        with self.store.writing():
            if relayed and caches:
                write_relayed(self.store.folder, relayed, caches)
            if self.best:
                write_best(self.store.folder, self.best)
            events = read_events(self.store.folder)
            if find_start(events) is None:  # its line is damaged
                events.insert(0, self._started())
            summary = summarise(events) | {"run": str(self.store.folder)}
            to = exporter(self.federation, x)
            write_peft_folders(self.store.folder, x, to, summary, relayed)
            if self.best:
                write_best_folders(self.store.folder, to, summary)
        self._emit(RunFinished(format_now(), plain(summary)))
        deployed, best = relayed and relayed.adapters.to("cpu"), self.best and self.best.x and self.best.x.to("cpu")
        return Result(summary, self.store.folder, lambda: x, lambda: deployed, lambda: best)

    def _emit(self, *events: Event) -> None:
        for event in events:
            self.store.emit(event)
            self._tell(event)

    def _tell(self, event: Event) -> None:
        """Hand an event to the sinks, and not to the store."""
        for sink in self.sinks:
            sink(event)


def _best_rounds(federation: Federation) -> BestRounds | None:
    """What keeps the clients' best adapters; None where nothing is selected."""
    selection = Selection.of_run(federation.config, federation.learner.task)
    clients, patience = federation.exchange.clients, federation.config.eval.patience
    return selection and BestRounds(selection, patience, clients, federation.honest_rows)


def describe_end(ended: LoopEnded, done: int, rounds: int) -> str:
    """Say after how many rounds a training loop was over, and what of its steps was not exchanged."""
    lost = f"; its last {ended.steps} steps are in its own model only" if ended.steps else ""
    return f"the training loop ended after {done} of {rounds} rounds, and so does the run{lost}"


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
