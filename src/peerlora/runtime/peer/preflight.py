"""What would go wrong at a site before it does: everything is tried that a run will need, and nothing is trained."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from peerlora.algorithms.base import is_asynchronous
from peerlora.algorithms.compatibility import cache_settings, passes_on
from peerlora.config.run import RunConfig
from peerlora.display import utc_now
from peerlora.errors import PeerloraError
from peerlora.network.base import PeerId, TransportError, refused_for
from peerlora.network.identity.expiry import CURES, SOON
from peerlora.network.identity.members import check_address
from peerlora.network.identity.roster import Roster
from peerlora.network.protocol.control import HandshakeResult, PeerControl
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.transport import quiet_grpc
from peerlora.runtime.compose import compose, use_threads
from peerlora.runtime.peer.checks import warn_of_sites_beyond
from peerlora.runtime.peer.run import site_of
from peerlora.runtime.peer.site import Site, expected_of, settings_of

_SKEW = 30.0  # seconds that two clocks may differ
_LINGER = 0.5  # seconds that a neighbour's doctor has to hear the answer to its greeting
_CONNECT = 3.0  # seconds for a TCP connection
_CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")

Level = Literal["good", "advice", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    what: str
    do: str = ""


ADVICE = {
    "wrong-config": "compare the two config files: all sites need the same settings there, and the same labels",
    "wrong-base": "the model files differ; compare model.source and its version at both sites",
    "wrong-spec": "compare adapter.rank, adapter.targets, adapter.head and the model",
    "wrong-run": "compare peer.run and the name of the member list",
    "not-a-member": "the member list there is older or newer; give all sites the same list",
    "not-a-neighbour": "the member list there, or the topology of the config there, lacks this link; compare both",
    "list-expired": "ask for the member list's next version",
    "tls-failed": "a certificate is expired or of another consortium; see peerlora identity show at both sites",
}


def examine(
    config: RunConfig, identity: Path, members: Path, wait: float = 10.0, listen: str | None = None
) -> Iterator[Finding]:
    """Everything that a run at this site needs, one finding at a time; neighbours get ``wait`` seconds to answer.

    ``listen``: as in `run_peer`.
    """
    quiet_grpc()
    from peerlora.network.transport.grpc import GrpcTransport

    try:
        who, roster, site = site_of(config, identity, members)
    except PeerloraError as error:
        yield Finding("problem", str(error))
        return
    yield Finding("good", f"{who.site} is client {site.client} of {len(site.names)} on list {roster.members.name!r}")
    for warned in warn_of_sites_beyond(config, site):
        yield Finding("advice", warned.message, "set clients in the next run's config")
    yield from _expiry("the certificate", who.expires)
    if roster.members.expires is not None:
        yield from _expiry("the member list", roster.members.expires)
    yield congestion()
    try:
        use_threads(config)
        federation = compose(config, clients=[site.client])
    except PeerloraError as error:
        yield Finding("problem", str(error))
        return
    expected = expected_of(federation, site)
    rows = len(federation.train_data)
    yield Finding("good", f"config, model ({expected.base[:12]}) and {rows} rows can be used")
    if is_asynchronous(federation.algorithm):
        jobs = f"every peer does {config.train.rounds} jobs at its own pace and waits for nobody"
        yield Finding("good", f"{config.algorithm.name} has no common rounds: {jobs}")
    neighbours = site.neighbours(federation.topology)
    if cache_settings(config, federation.algorithm):
        yield _about_relaying(passes_on(config), site, config.clients, len(neighbours))
    with EventLoopThread() as thread:
        transport = GrpcTransport(who, roster, listen=listen)
        endpoint = Endpoint(transport, expected, list(neighbours.values()))
        control = PeerControl(endpoint, settings_of(federation), wait)
        try:
            thread.call(control.start(RoundProtocol(endpoint, wait, lambda kind: 0, control)))
        except TransportError as error:
            yield Finding("problem", str(error), "stop what uses the port (a running peer?), or change the address")
            return
        try:
            handshake = thread.call(control.handshake(wait))
            yield from _about_neighbours(roster, handshake, neighbours, control.skew, thread)
            thread.call(asyncio.sleep(_LINGER))
        finally:
            thread.call(control.close())


def _about_relaying(what: str, site: Site, clients: int, neighbours: int) -> Finding:
    """Who gets this site's adapter where sites pass adapters on, because of ``what``."""
    others = [name for client, name in sorted(site.names.items()) if client < clients and client != site.client]
    message = f"{what}: every site of the run gets this site's adapter, not its {neighbours} neighbours alone: "
    do = f"agree on that with all sites, or do without {what} at all of them"
    return Finding("advice", message + ", ".join(others), do)


def _about_neighbours(
    roster: Roster,
    handshake: HandshakeResult,
    neighbours: dict[int, PeerId],
    skew: dict[PeerId, float],
    thread: EventLoopThread,
) -> Iterator[Finding]:
    for peer in neighbours.values():
        if peer in handshake.reached:
            yield Finding("good", f"{peer} answers; it has the same config, model and adapter")
            skewed = skew.get(peer, 0.0)
            if abs(skewed) > _SKEW:
                problem = (
                    f"the clock of {peer} is {abs(skewed):.0f} s {'ahead of' if skewed > 0 else 'behind'} this one"
                )
                yield Finding("problem", problem, "let both machines follow a time server, e.g. chrony")
        elif peer in handshake.refused:
            problem = handshake.refused[peer]
            reason = next((word for word in ADVICE if problem.startswith(refused_for(word))), "")
            yield Finding("problem", f"{peer} does not go along: {problem}", ADVICE.get(reason, ""))
        else:
            yield thread.call(_unreached(roster, peer))


async def _unreached(roster: Roster, peer: PeerId) -> Finding:
    """Why a neighbour may not have answered."""
    me, address = roster.members.member(roster.me).address, roster.members.member(peer).address
    if not roster.dials(peer):
        here = f"it has to reach {me}" if me else "neither side has an address"
        return Finding("problem", f"{peer} did not come: {here}", f"run doctor or peer there, and let {me} in (TCP)")
    assert address is not None
    host, port = check_address(address)
    try:
        async with asyncio.timeout(_CONNECT):
            _, writer = await asyncio.open_connection(host, port)
        writer.close()
    except (OSError, TimeoutError, socket.gaierror, UnicodeError) as error:  # the last of a name that is none
        why = str(error) or "no answer"
        do = f"is doctor or peer running there, and does a firewall let TCP to {address} out here and in there?"
        return Finding("problem", f"{peer} cannot be reached at {address}: {why}", do)
    return Finding("problem", f"{peer} has {address} open but does not answer as a peer", "see its log and audit log")


def _expiry(what: str, expires: datetime) -> Iterator[Finding]:
    left = expires - utc_now()
    soon = left.days < SOON
    yield Finding("advice" if soon else "good", f"{what} is good for {left.days} days", CURES[what] if soon else "")


def congestion(read: Callable[[], str] = lambda: _CONGESTION.read_text().strip()) -> Finding:
    """Whether this host's TCP keeps its rate on lossy long-distance links."""
    try:
        control = read()
    except OSError:
        return Finding("advice", "this host does not say which congestion control its TCP uses")
    if control == "bbr":
        return Finding("good", "TCP congestion control is bbr")
    do = "on long-distance links: sysctl -w net.ipv4.tcp_congestion_control=bbr (with 1 % loss, 30 times the rate)"
    return Finding("advice", f"TCP congestion control is {control}", do)
