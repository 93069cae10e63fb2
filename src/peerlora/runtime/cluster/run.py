"""Runs on a cluster: the driver composes and writes the run, workers hold the clients."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peerlora.config.cluster import ClusterConfig, asked_or_stored
from peerlora.config.run import RunConfig
from peerlora.data.dataset import Dataset
from peerlora.errors import DataError, RunError, WorkersLost
from peerlora.exchange.blocks import links_of
from peerlora.lora.attach import StackedModel
from peerlora.runs.events import Event, Warned
from peerlora.runs.report import ReportWriter
from peerlora.runs.resume import ASKED_THREADS, check_same, default_folder, run_facts, stored_config
from peerlora.runs.store import START_AGAIN, RunStore, require_free
from peerlora.runs.trackers.tracking import check_trackers
from peerlora.runtime import simulate as here
from peerlora.runtime.checks import check_rows
from peerlora.runtime.cluster.checks import refuse_config, refuse_device, refuse_objects
from peerlora.runtime.cluster.group import Engine, WorkerGroup
from peerlora.runtime.cluster.parts import (
    ClusterClients,
    ClusterEvaluator,
    ClusterRounds,
    RemoteExchange,
    RemoteLearner,
    RemoteParts,
)
from peerlora.runtime.cluster.placement import Placement, choose_tile_size, place, plan_transfers
from peerlora.runtime.cluster.recovery import Recovery
from peerlora.runtime.cluster.worker import WorkerTask
from peerlora.runtime.compose import assemble, use_threads
from peerlora.runtime.division import divide_rows
from peerlora.runtime.epochs import plan_rounds
from peerlora.runtime.federation import Federation, start_adapters
from peerlora.runtime.inputs import check_inputs, facts_of, require_same_inputs, speed_facts, speed_of
from peerlora.runtime.plan import plan
from peerlora.runtime.resources import load_resources
from peerlora.runtime.tracking import tracked_sinks
from peerlora.runtime.trainer import Result, Sink, Trainer
from peerlora.train.kernels.speed import Speed
from peerlora.train.learner import StackedLearner
from peerlora.train.tiles import tiles_of

Stop = Callable[[], bool]


def simulate(
    config: RunConfig,
    out: Path | str | None = None,
    *,
    cluster: ClusterConfig | None = None,
    engine: Callable[[ClusterConfig, int], Engine] | None = None,
    partitioner: Any = None,
    sinks: Sequence[Sink] = (),
    stop: Stop = lambda: False,
    report: bool = True,
    **options: Any,
) -> Result:
    """Run a config from the start: on a cluster where ``cluster`` or its section says so, else in this process.

    Arguments are those of ``runtime.simulate.simulate``; ``engine`` starts workers, by default those of Ray.
    Raises CompositionError for what a cluster cannot do yet, RunError where its workers are lost for good.
    """
    settings = cluster or config.cluster
    if settings is None:
        return here.simulate(config, out, partitioner=partitioner, sinks=sinks, stop=stop, report=report, **options)
    folder = Path(out) if out is not None else default_folder(config)
    require_free(folder)
    check_trackers(config)
    refuse_objects(partitioner, options)
    facts = {ASKED_THREADS: config.threads}
    config = config.model_copy(update={"cluster": settings, "threads": settings.cpus_per_worker})
    driver = compose_driver(config)
    facts |= run_facts(config, inputs=facts_of(driver.federation))
    with _connected(engine, driver, sinks) as machines:
        recovery = Recovery(machines, settings)
        first, speed = driver.start_first(machines, recovery)
        driver = replace(driver, speed=speed)  # of workers that take the place of lost ones, too
        with RunStore.create(folder, driver.config.to_yaml(), facts | {"speed": speed_facts(speed)}) as store:
            return driver.run(machines, first, recovery, store, sinks, stop, report, resumed=False)


def resume(
    folder: Path | str,
    *,
    where: Callable[[ClusterConfig | None], ClusterConfig | None] = lambda section: section,
    engine: Callable[[ClusterConfig, int], Engine] | None = None,
    expected: Callable[[RunConfig], RunConfig] = lambda stored: stored,
    partitioner: Any = None,
    sinks: Sequence[Sink] = (),
    stop: Stop = lambda: False,
    report: bool = True,
    **options: Any,
) -> Result:
    """Resume a run, on a cluster where its config says so, with any number of workers.

    ``where`` turns the section ``cluster`` of what is ``expected``, or else the stored one, into the one to use, None
    for this process.  Raises RunError where the run's graphs cannot be divided.
    """
    with RunStore.open(folder) as store:
        stored = stored_config(store)
        asked = expected(stored)
        settings = where(asked_or_stored(asked, stored))
        if settings is not None:
            here.refuse_loops(store)
            check_same(stored, asked, store, partitioner)
            check_trackers(asked)
            refuse_objects(partitioner, options)
            if stored.device == "cpu" and stored.train.block is None:
                raise RunError(
                    f"{folder} was begun in one process without train.block, by which graphs are the same on any "
                    "number of workers; go on in one process, or start anew on the cluster"
                )
            tracked = stored.model_copy(update={"track": asked.track})
            driver = compose_driver(tracked, speed_of(store.facts, stored), settings)
            check_inputs(store, driver.federation)
            with _connected(engine, driver, sinks) as machines:
                recovery = Recovery(machines, settings)
                return driver.run(machines, None, recovery, store, sinks, stop, report, resumed=True)
    return here.resume(
        folder, expected=lambda stored: asked, partitioner=partitioner, sinks=sinks, stop=stop, report=report, **options
    )


@contextmanager
def _connected(
    engine: Callable[[ClusterConfig, int], Engine] | None, driver: Driver, sinks: Sequence[Sink]
) -> Iterator[Engine]:
    """Connect to what starts the workers of a run, and pass on to ``sinks`` what they wait for."""
    with (engine or ray_engine)(driver.settings, driver.exchanged_bytes) as machines:
        machines.tell = partial(_warn, sinks=sinks)
        yield machines


def ray_engine(settings: ClusterConfig, exchanged_bytes: int) -> Engine:
    """The workers of a Ray cluster, whose machines hold what is under way of an exchange."""
    from peerlora.runtime.cluster.ray_engine import RayEngine

    return RayEngine(settings, exchanged_bytes)


@dataclass(frozen=True)
class Driver:
    """A composed run whose clients are to be held by workers."""

    federation: Federation
    """Of one client, for what the driver writes."""
    settings: ClusterConfig
    placement: Placement
    speed: Speed | None
    """Of the workers; None: the best on their machines."""

    @property
    def config(self) -> RunConfig:
        """The resolved config."""
        return self.federation.config

    @property
    def exchanged_bytes(self) -> int:
        """At most under way at once on one machine: two exchanges of a round, of rows of round 0 or for its figures."""
        links, workers = links_of(self.federation.topology.at(0)), len(self.placement.tiles)
        rows = plan_transfers(links, self.placement, nodes=1).rows
        figures = self.config.clients * (workers - 1) // workers  # every worker gets its share of the layers, of all
        return (max(rows, figures) + figures) * self.federation.start.flat[:1].nbytes

    def start(self, machines: Engine) -> tuple[WorkerGroup, Speed]:
        """Start workers and let them build their blocks; also return the speed of all of them.

        Where each would choose another, since their machines differ, all take that of the first.

        Raises DataError where one reads something else than the driver.
        """
        group = machines.start(len(self.placement.tiles), self.settings)
        try:
            task = WorkerTask(self.config, self.placement, group.nodes, self.speed, self.settings.timeout, os.getcwd())
            found = group.call("build", task)
            speed = speed_of(found[0], self.config)
            if any(facts["speed"] != found[0]["speed"] for facts in found):
                found = group.call("build", replace(task, speed=speed))
            self._compare([facts["inputs"] for facts in found])
            return group, speed
        except BaseException:
            group.close()
            raise

    def start_first(self, machines: Engine, recovery: Recovery) -> tuple[WorkerGroup, Speed]:
        """Like ``start``, for a run whose folder is not there yet; where workers are lost, new ones start."""
        while True:
            try:
                return self.start(machines)
            except WorkersLost as error:
                recovery.await_workers(error, lambda: START_AGAIN, machines.tell)
                machines.tell(f"{error}; new workers start")

    def _compare(self, found: Sequence[dict[str, Any]]) -> None:
        own = {name: each for name, each in facts_of(self.federation)["inputs"].items() if name != "start"}
        for worker, inputs in enumerate(found):
            try:
                require_same_inputs(own, {name: inputs[name] for name in own}, self.config, Path("this run"))
            except RunError as error:
                raise DataError(
                    f"worker {worker} reads other files than the driver: {error}; give all machines the same"
                ) from None

    def run(
        self,
        machines: Engine,
        group: WorkerGroup | None,
        recovery: Recovery,
        store: RunStore,
        sinks: Sequence[Sink],
        stop: Stop,
        report: bool,
        resumed: bool,
    ) -> Result:
        """Run to the end; where workers are lost, new ones go on from the last checkpoint.

        Raises RunError, which says what to do, where ``recovery`` finds no new workers.
        """
        every, events = (*sinks, *([ReportWriter(store.folder)] if report else [])), ()
        while True:
            try:
                group = group or self.start(machines)[0]
                with closing(group), tracked_sinks(self.config, store, every) as tracked:  # each attempt is a resume
                    return self._trainer(group, machines.notes, store, tracked, stop, events).run(resumed)
            except WorkersLost as error:
                tell = partial(_warn, sinks=(store.emit, *every))
                recovery.await_workers(error, store.what_then, tell)
                events = (Warned(f"{error}; new workers go on from the last checkpoint"),)
            group, resumed = None, True

    def _trainer(
        self,
        group: WorkerGroup,
        further: Sequence[str],
        store: RunStore,
        sinks: Sequence[Sink],
        stop: Stop,
        events: Sequence[Event],
    ) -> Trainer:
        parts = RemoteParts(group, self.placement)
        links = links_of(self.federation.topology.at(0))
        notes = [f"{len(self.placement.tiles)} workers hold {list(map(len, self.placement.blocks))} clients"]
        notes.append(plan_transfers(links, self.placement, group.nodes).describe())
        learner: Any = RemoteLearner(self.federation, parts)
        exchange: Any = RemoteExchange(self.config.clients, parts)
        notes = (*self.federation.notes, *notes, *further)
        config = self.config.model_copy(update={"device": "cpu"})  # where the driver keeps what it collects
        federation = replace(self.federation, config=config, learner=learner, exchange=exchange, notes=notes)
        clients = ClusterClients(federation, parts, events)
        rounds = ClusterRounds(parts, federation.clock is not None)
        return Trainer(federation, rounds, clients, store, sinks, stop, evaluator=ClusterEvaluator(federation, clients))


def _warn(message: str, sinks: Sequence[Sink]) -> None:
    for sink in sinks:
        sink(Warned(message))


def compose_driver(config: RunConfig, speed: Speed | None = None, cluster: ClusterConfig | None = None) -> Driver:
    """Compose a run of which workers hold the clients, and place these.

    Raises CompositionError for what a cluster cannot do.
    """
    settings = cluster or config.cluster
    assert settings is not None
    planned = plan(config)
    refuse_config(config, planned.algorithm)
    refuse_device(config, settings)
    use_threads(config)
    resources = load_resources(config)
    division = divide_rows(config, resources)
    planned = plan_rounds(planned, division.trained, clients=None)
    config = planned.config
    local = replace(planned, config=config.model_copy(update={"device": "cpu"}))
    federation = assemble(local, resources, clients=[0], speed=speed, division=division)
    check_rows(local.config, federation.start.spec, config.clients, "which the command collects and joins")
    if config.adapter.start is not None:  # whose digest is that of all clients
        clients = range(config.clients)
        assert isinstance(federation.model, StackedModel)
        start, _ = start_adapters(local.config, federation.model, federation.export, clients)
        federation = replace(federation, start=start)
    if config.device == "cpu" and config.train.block is None:
        block = choose_tile_size(config.clients, settings.workers, _most_per_graph(federation))
        config = config.model_copy(update={"train": config.train.model_copy(update={"block": block})})
    federation = replace(federation, config=config)
    tiles = tiles_of(config.clients, config.train.block or 1)
    links = links_of(planned.topology.at(0)) if planned.topology.graph is not None else None
    chosen = federation.speed if config.device == "cpu" else speed
    return Driver(federation, settings, place(tiles, settings.workers, links), chosen)


def _most_per_graph(federation: Federation) -> int:
    """As many clients as one process would put into a graph."""
    config, model, learner, data = federation.config, federation.model, federation.learner, federation.train_data
    assert isinstance(model, StackedModel) and isinstance(learner, StackedLearner) and isinstance(data, Dataset)
    if not model.step.layout.rows_first:
        return 1
    return learner.graph.clients(max(config.batches), data.all_lengths)
