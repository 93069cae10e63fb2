"""Real peers in one process: every peer a thread, their in-memory transports on one event loop."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest.mock import patch

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from peerlora.network.identity.agreement import SiteAgreement
from peerlora.network.identity.authority import throwaway
from peerlora.network.identity.identity import load_identity
from peerlora.network.identity.roster import Roster
from peerlora.network.identity.signatures import SiteSignatures
from peerlora.network.protocol.control import PeerControl
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.network.protocol.neighbour_exchange import NeighbourExchange
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.secure_exchange import SecureExchange
from peerlora.network.protocol.wire import Expected
from peerlora.network.transport.heartbeat import Timing
from peerlora.network.transport.memory import MemoryNetwork
from peerlora.runtime.peer import train as peer_train
from peerlora.runtime.peer.secure import sender_sets
from peerlora.runtime.peer.site import Site
from peerlora.runtime.peer.train import train_peer

QUICK = Timing(beat=0.05, suspect=4, down=8)


def names(clients):
    return {client: f"site-{client}" for client in range(clients)}


@contextmanager
def network(clients, timing=QUICK):
    """A memory network and the event loop that its peers share."""
    with EventLoopThread() as thread:
        made = MemoryNetwork(names(clients).values(), timing=timing)
        yield made, thread
        thread.call(made.close())


@contextmanager
def exchanges(
    topology, deadline=20.0, largest=1 << 20, start=None, first=0, signatures=None, audits=None, secure=False
):
    """One NeighbourExchange per client, all greeted; ``start``: the common start, ``first``: the first round.

    ``signatures`` and ``audits``: site -> those of its transport.  ``secure``: each is a SecureExchange.
    """
    sites = names(topology.clients)
    agreements = sites_agreements(sites.values())
    with network(topology.clients) as (net, thread):
        made, controls = [], []
        for client, site in sites.items():
            others = [name for name in sites.values() if name != site]
            signs = signatures and signatures[site]
            transport = net.transport(site, audits and audits.get(site), signs, agreements[site])
            endpoint = Endpoint(transport, Expected("run", "ba5e", "5bec"), others)
            sets = sender_sets(topology, Site(client, sites, "run"), endpoint, deadline) if secure else None
            controls.append(PeerControl(endpoint, {"train": "same"}, deadline, sender_sets=sets))
            protocol = RoundProtocol(endpoint, deadline, lambda kind: largest, controls[-1])
            thread.ask(endpoint.start_at, first)  # as a run does: handshakes say in which round a peer is
            thread.call(controls[-1].start(protocol))
            parts = (topology, client, sites, protocol, thread, start)
            made.append(SecureExchange(sets, *parts) if secure else NeighbourExchange(*parts))
        handshakes = together([lambda control=control: thread.call(control.handshake(10)) for control in controls])
        assert all(len(each.reached) == topology.clients - 1 for each in handshakes)
        yield made
        for control in controls:
            thread.call(control.close())


def sites_signatures(folder, sites):
    """Site -> signatures by its own identity."""
    members = throwaway(folder, dict.fromkeys(sites) | {sites[0]: "127.0.0.1:1"})
    identities = {site: load_identity(folder / site) for site in sites}
    return {
        site: SiteSignatures(lambda identity=identity: identity, Roster(site, identity.fingerprint, members))
        for site, identity in identities.items()
    }


def sites_agreements(sites):
    """Site -> key agreement with long-term keys of its own, which all others know."""
    keys = {site: X25519PrivateKey.generate() for site in sites}
    listed = {site: key.public_key().public_bytes_raw().hex() for site, key in keys.items()}
    return {site: SiteAgreement(key, listed.get) for site, key in keys.items()}


def together(calls):
    """The results of synchronous calls that need each other."""
    with ThreadPoolExecutor(max(1, len(calls))) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@contextmanager
def one_at_a_time():
    """Models are loaded one after another: drawing a missing head seeds torch's global generator."""
    lock, assemble = threading.Lock(), peer_train.assemble

    def locked(*arguments, **options):
        with lock:
            return assemble(*arguments, **options)

    with patch.object(peer_train, "assemble", locked):
        yield


def federation(config, folder, **options):
    """The results of one peer per client of a config, each in its own folder; best with the fixture `no_reports`."""
    agreements = sites_agreements(names(config.clients).values())
    with one_at_a_time(), network(config.clients) as (net, thread):

        def run(client):
            site = Site(client, names(config.clients), "run")
            transport = net.transport(site.names[client], agreement=agreements[site.names[client]])
            return train_peer(config, site, transport, thread, folder / f"peer-{client}", **options)

        return together([lambda client=client: run(client) for client in range(config.clients)])
