"""Simulate: a run whose clients all live in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peerlora.algorithms.base import AsynchronousAlgorithm
from peerlora.config.run import RunConfig
from peerlora.errors import RunError
from peerlora.exchange.stacked import StackedExchange
from peerlora.runs.report import ReportWriter
from peerlora.runs.resume import check_same, default_folder, run_facts, stored_config
from peerlora.runs.store import RunStore, require_free
from peerlora.runs.trackers.tracking import check_trackers
from peerlora.runtime.asynchronous import AsynchronousRounds
from peerlora.runtime.compose import Federation, compose, resolve_threads, use_threads
from peerlora.runtime.inputs import check_inputs, facts_of, speed_of
from peerlora.runtime.participation import AllClients
from peerlora.runtime.policy import PolicyResources
from peerlora.runtime.resources import RunResources
from peerlora.runtime.rounds import Rounds
from peerlora.runtime.sequential import SequentialLearner
from peerlora.runtime.synchronous import SynchronousRounds
from peerlora.runtime.tracking import tracked_sinks
from peerlora.runtime.trainer import Result, Sink, Trainer


def simulate(
    config: RunConfig,
    out: Path | str | None = None,
    *,
    resources: RunResources | PolicyResources | None = None,
    partitioner: Any = None,
    sinks: Sequence[Sink] = (),
    stop: Callable[[], bool] = lambda: False,
    report: bool = True,
    learner: SequentialLearner | None = None,
) -> Result:
    """Run a config from the start in this process, in ``out`` or in a new folder under ``runs/``.

    ``runtime.cluster.run`` has the same for runs that may be on a cluster, and is what ``peerlora.simulate`` is.

    Each of ``sinks`` takes every event, in order, after the run folder; ``stop`` is asked after every round and, when
    true, a checkpoint is written and Stopped raised.  Without ``report`` no report.html is drawn at the end, which
    takes about a second; ``runs.report.write_report`` does it later.  ``learner``: Trainers that take the local steps,
    in place of our own learner.  Nothing is written before everything has been loaded and checked.
    """
    folder = Path(out) if out is not None else default_folder(config)
    require_free(folder)
    check_trackers(config)
    config = config.model_copy(update={"threads": resolve_threads(config.threads)})
    use_threads(config)
    if learner is not None:
        federation = learner.federation(config)
    else:
        federation = compose(config, resources=resources, partitioner=partitioner)
    facts = run_facts(config, partitioner, inputs=facts_of(federation))
    with (
        RunStore.create(folder, federation.config.to_yaml(), facts) as store,
        tracked_sinks(federation.config, store, sinks) as every,
        learner.running() if learner is not None else nullcontext(),
    ):
        return build_trainer(federation, store, every, stop, report).run()


def resume(
    folder: Path | str,
    *,
    expected: Callable[[RunConfig], RunConfig] = lambda stored: stored,
    resources: RunResources | PolicyResources | None = None,
    partitioner: Any = None,
    sinks: Sequence[Sink] = (),
    stop: Callable[[], bool] = lambda: False,
    report: bool = True,
) -> Result:
    """Resume a run from its last good checkpoint; the result is bit-identical to an undisturbed run.

    ``expected`` turns the stored config into the one that the user asks for; RunError lists the differences, and names
    data, base model or start adapter that changed since.
    """
    with RunStore.open(folder) as store:
        refuse_loops(store)
        config = stored_config(store)
        asked = expected(config)
        check_same(config, asked, store, partitioner)
        check_trackers(asked)
        use_threads(config)
        speed = speed_of(store.facts, config)
        federation = compose(config, resources=resources, partitioner=partitioner, speed=speed)
        check_inputs(store, federation)
        with tracked_sinks(asked, store, sinks) as every:
            return build_trainer(federation, store, every, stop, report).run(resumed=True)


def refuse_loops(store: RunStore) -> None:
    """Raise RunError for the run of a training loop of the user's own, which cannot be resumed."""
    if store.facts.get("loop"):
        raise RunError(
            f"{store.folder} was trained by loops of your own, whose optimisers and rows no checkpoint holds; "
            "start a new run with another --out"
        )


def build_trainer(
    federation: Federation,
    store: RunStore,
    sinks: Sequence[Sink] = (),
    stop: Callable[[], bool] = lambda: False,
    report: bool = True,
) -> Trainer:
    """Build the Trainer of a simulation; the report is its last sink."""
    every = (*sinks, *([ReportWriter(store.folder)] if report else []))
    return Trainer(federation, build_rounds(federation), AllClients(federation), store, every, stop)


def build_rounds(federation: Federation) -> Rounds:
    """Build what advances the clients of a federation by one round."""
    algorithm, clock = federation.algorithm, federation.clock
    if isinstance(algorithm, AsynchronousAlgorithm):
        assert clock is not None and isinstance(federation.exchange, StackedExchange)
        return AsynchronousRounds(algorithm, federation.learner, federation.exchange, clock)
    return SynchronousRounds(algorithm, federation.learner, federation.exchange, clock)
