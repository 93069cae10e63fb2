"""Train as one peer: the run of a site in its folder, over any transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from peerlora.algorithms.base import is_asynchronous
from peerlora.config.run import RunConfig
from peerlora.network.base import Transport
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.runs.report import ReportWriter, write_report
from peerlora.runs.resume import check_same, default_folder, run_facts, stored_config
from peerlora.runs.store import RunStore, require_free
from peerlora.runs.trackers.tracking import check_trackers
from peerlora.runtime.best_export import read_best
from peerlora.runtime.compose import Federation, assemble, load_run, resolve_threads, use_threads
from peerlora.runtime.export import exporter_of, read_adapters
from peerlora.runtime.inputs import check_inputs, facts_of, speed_of
from peerlora.runtime.loop import OwnLoop
from peerlora.runtime.peer.asynchronous import AsynchronousPeer
from peerlora.runtime.peer.checks import plan_peer, sums_known, warn_of_sites_beyond
from peerlora.runtime.peer.site import Site
from peerlora.runtime.peer.synchronous import SynchronousPeer
from peerlora.runtime.plan import Plan
from peerlora.runtime.policy import PolicyResources
from peerlora.runtime.relayed_export import relayed_adapters
from peerlora.runtime.resources import RunResources
from peerlora.runtime.tracking import tracked_sinks
from peerlora.runtime.trainer import Result, Sink, Trainer
from peerlora.train.kernels.speed import Speed


def train_peer(
    config: RunConfig,
    site: Site,
    transport: Transport,
    thread: EventLoopThread,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    resources: RunResources | PolicyResources | None = None,
    sinks: Sequence[Sink] = (),
    stop: Callable[[], bool] = lambda: False,
    notices: Callable[[], Sequence[str]] = lambda: (),
    loop: OwnLoop | None = None,
) -> Result:
    """Train as one client of a federation, over a transport whose event loop is ``thread``.

    ``notices`` returns warnings of this site that are due, once a round.  ``loop``: the training loop that takes the
    local steps, where it is the user's own.  With ``resume``, go on from the newest
    checkpoint in ``out``; a finished run is not touched.  Raises RunError when every neighbour refuses.
    """
    begun = Path(out) if resume and out is not None else None
    check_trackers(config)
    planned = plan_peer(config, site, sums_known(begun))
    for warning in warn_of_sites_beyond(config, site):
        for sink in sinks:
            sink(warning)
    if resume:
        assert begun is not None, "a resumed run has a folder"
        if (done := finished(config, begun)) is not None:
            return done
        with RunStore.open(begun) as store:
            stored = stored_config(store)
            check_same(stored, config, store, None)
            if loop is not None:
                federation = loop.assemble(planned, site.client, begun)
            else:
                federation = _assembled(planned, stored.threads, resources, site, speed_of(store.facts, stored))
            check_inputs(store, federation)
            return _run(federation, site, transport, thread, store, sinks, stop, notices, loop, resumed=True)
    folder = Path(out) if out is not None else default_folder(config)
    require_free(folder)
    if loop is not None:
        federation = loop.assemble(planned, site.client, None)
    else:
        federation = _assembled(planned, resolve_threads(config.threads), resources, site)
    facts = run_facts(federation.config, held=[site.client], inputs=facts_of(federation))
    with RunStore.create(folder, federation.config.to_yaml(), facts) as store:
        if loop is not None:
            loop.keep_start(folder)
        return _run(federation, site, transport, thread, store, sinks, stop, notices, loop, resumed=False)


def finished(config: RunConfig, folder: Path) -> Result | None:
    """Return the result of a run that has reached its end; None where rounds are left.  Nothing in the folder changes.

    Raises RunError where ``config`` is not the run's.
    """
    with RunStore.open(folder) as store:
        stored = stored_config(store)
        check_same(stored, config, store, None)
        summary = store.read("summary.json")
    if summary is None:
        return None
    if not (folder / "report.html").is_file():  # the end came between the two
        write_report(folder)
    return Result(
        summary,
        folder,
        lambda: read_adapters(folder, exporter_of(folder)),
        lambda: relayed_adapters(folder, exporter_of(folder).layout),
        lambda: read_best(folder, exporter_of(folder).layout),
    )


def _assembled(
    planned: Plan,
    threads: int | None,
    resources: RunResources | PolicyResources | None,
    site: Site,
    speed: Speed | None = None,
) -> Federation:
    config = planned.config.model_copy(update={"threads": threads})
    use_threads(config)
    return assemble(replace(planned, config=config), resources or load_run(config), [site.client], speed=speed)


def _run(
    federation: Federation,
    site: Site,
    transport: Transport,
    thread: EventLoopThread,
    store: RunStore,
    sinks: Sequence[Sink],
    stop: Callable[[], bool],
    notices: Callable[[], Sequence[str]],
    loop: OwnLoop | None,
    resumed: bool,
) -> Result:
    kind = AsynchronousPeer if is_asynchronous(federation.algorithm) else SynchronousPeer
    with (
        kind(federation, site, transport, thread, store) as peer,
        tracked_sinks(federation.config, store, sinks) as tracked,
    ):
        peer.stop, peer.notices = (lambda: stop() or (loop is not None and loop.left)), notices
        every = (*tracked, ReportWriter(store.folder))
        checkpoints = loop.checkpoints if loop is not None else None
        return Trainer(peer.federation, peer.rounds, peer, store, every, stop, checkpoints).run(resumed)
