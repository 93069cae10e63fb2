"""One site of a real federation: identity, member list and gRPC around a peer's run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from peerlora.config.run import RunConfig
from peerlora.errors import CompositionError, ConfigError
from peerlora.network.identity.expiry import ExpiryWatch
from peerlora.network.identity.identity import Identity, load_identity
from peerlora.network.identity.members import MemberList, load_members
from peerlora.network.identity.roster import Roster
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.network.protocol.wire import WORD_LENGTH, message_facts
from peerlora.network.transport import quiet_grpc
from peerlora.network.transport.audit_log import AuditLog
from peerlora.network.transport.connections import raise_descriptor_limit
from peerlora.runs.events import Warned
from peerlora.runs.metrics import find_start
from peerlora.runs.privacy_summary import UNCOVERED
from peerlora.runs.store import read_events
from peerlora.runtime.loop import OwnLoop
from peerlora.runtime.peer.checks import plan_peer, sums_known
from peerlora.runtime.peer.metrics_server import MetricsServer
from peerlora.runtime.peer.open_metrics import PeerMetrics
from peerlora.runtime.peer.secure import check_agreement_keys
from peerlora.runtime.peer.site import Site
from peerlora.runtime.peer.train import finished, train_peer
from peerlora.runtime.trainer import Result, Sink

if TYPE_CHECKING:
    from peerlora.network.transport.grpc import GrpcTransport


def run_peer(
    config: RunConfig,
    identity: Path,
    members: Path,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    listen: str | None = None,
    metrics: str | None = None,
    sinks: Sequence[Sink] = (),
    stop: Callable[[], bool] = lambda: False,
    loop: OwnLoop | None = None,
) -> Result:
    """Take part in a run as the site whose identity this is, with the others on the member list.

    A renewed certificate or a newer list is taken up when its file is replaced.

    ``resume``: go on with the run in ``out``, or begin one there where there is none yet.  ``listen``: host:port to
    open in place of the port of the own address on all of the machine's addresses.  ``loop``: as in `train_peer`.
    ``metrics``: host:port at which metrics are served over plain HTTP, see ``MetricsServer``.
    """
    quiet_grpc()
    from peerlora.network.transport.grpc import GrpcTransport
    from peerlora.network.transport.reload import reload_on_change

    if resume and out is None:
        raise ConfigError("--resume given without --out; name the folder of the run to go on with")
    begun = Path(out) if resume and out is not None and _begun(Path(out)) else None
    done = None if begun is None else finished(config, begun)
    if done is not None:
        return done  # nothing is left that needs an identity
    raise_descriptor_limit()
    who, roster, site = site_of(config, identity, members, begun)
    audit = AuditLog(
        identity / "audit.jsonl", message_facts, days=config.peer.audit_days, peers=sorted(site.names.values())
    )
    try:
        transport = GrpcTransport(who, roster, listen=listen, audit=audit)
        private = config.privacy is not None
        with EventLoopThread() as thread, served_metrics(metrics, transport, begun, out, sinks, private) as every:
            asyncio.run_coroutine_threadsafe(reload_on_change(transport, identity, members), thread.loop)
            return train_peer(
                config,
                site,
                transport,
                thread,
                out,
                resume=begun is not None,
                sinks=every,
                stop=stop,
                notices=ExpiryWatch(transport.ends_of_validity),
                loop=loop,
            )
    finally:
        audit.close()


@contextmanager
def served_metrics(
    address: str | None,
    transport: GrpcTransport,
    begun: Path | None,
    out: Path | str | None,
    sinks: Sequence[Sink],
    private: bool = False,
) -> Iterator[Sequence[Sink]]:
    """Serve metrics at ``address`` within the block; yield the sinks with the one that they come from.

    ``private``: whether the run promises privacy, which does not cover them; that is warned of.
    """
    if address is None:
        yield sinks
        return
    metrics = PeerMetrics(Path(out or "."), transport.ends_of_validity)
    if begun is not None and (start := find_start(read_events(begun))):
        metrics(start)
    with MetricsServer(address, metrics):
        for sink in sinks if private else ():
            sink(Warned(UNCOVERED.format(f"whoever reads {address}")))
        yield (*sinks, metrics)


def site_of(
    config: RunConfig, identity: Path, members: Path, begun: Path | None = None
) -> tuple[Identity, Roster, Site]:
    """Who this site is and who the others are; ``begun``: the folder of a run that goes on.

    Raises IdentityError or CompositionError.
    """
    who = load_identity(identity)
    listed = load_members(members, who.signers)
    roster = Roster(who.site, who.fingerprint, listed, identity)
    site = site_on(config, listed, who.site)
    check_agreement_keys(config, who, listed)
    linked = site.neighbours(plan_peer(config, site, sums_known(begun)).topology)
    barred = sorted(set(linked.values()) - set(roster.others()))
    if barred and begun is None:  # a run goes on without links that were taken off the list meanwhile
        raise CompositionError(
            f"topology={config.topology.kind} links {who.site} with {', '.join(barred)}, but the member list has no "
            "such edge; change the topology, or have the edges added: peerlora members link"
        )
    roster.keep_to(linked.values())
    return who, roster, site


def site_on(config: RunConfig, listed: MemberList, me: str) -> Site:
    """A site's place in the run: client numbers come from the list, the run's id from the list's and the run's name.

    Raises ConfigError for names that are too long together.
    """
    names, run = {member.client: member.site for member in listed.members}, f"{listed.name}/{config.peer.run}"
    if len(run) > WORD_LENGTH:
        raise ConfigError(
            f"peer.run={config.peer.run} given, {len(config.peer.run)} letters, and the member list's name has "
            f"{len(listed.name)}; expected at most {WORD_LENGTH - 1} together: give a shorter peer.run at all sites"
        )
    return Site(listed.member(me).client, names, run)


def _begun(folder: Path) -> bool:
    """Whether a folder holds a run to go on with."""
    return (folder / "run.json").is_file()
