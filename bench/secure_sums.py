"""Time and bytes of a secure exchange against the plain one, by turns, between peers over gRPC on this machine.

    python bench/secure_sums.py --neighbours 3 --scalars 75000 --rounds 60

Every peer is a process of its own, linked with all others.  In each round all begin their exchange at the same moment,
after a pause in the place of training; even rounds are plain, odd ones secure, over the same connections.  Prints one
JSON object: milliseconds (median and tenth of the slowest, over rounds and peers; and of CPU, of all threads of a peer)
and bytes of a message, of both.
"""

import argparse
import json
import multiprocessing
import socket
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from peerlora.config.topology import CompleteGraph
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.network.identity.authority import throwaway
from peerlora.network.identity.identity import load_identity
from peerlora.network.identity.members import load_members
from peerlora.network.identity.roster import Roster
from peerlora.network.protocol.control import PeerControl
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.network.protocol.neighbour_exchange import NeighbourExchange
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.secure_exchange import SecureExchange
from peerlora.network.protocol.wire import Expected
from peerlora.network.transport.grpc import GrpcTransport
from peerlora.runtime.peer.secure import sender_sets
from peerlora.runtime.peer.site import Site
from peerlora.topology.schedule import build_topology

PAUSE = 0.1  # seconds in the place of training
DEADLINE = 60.0
WARM = 4  # rounds that do not count


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def peer(folder: Path, client: int, sites: dict[int, str], scalars: int, rounds: int, start: Any, results: Any) -> None:
    """One process: exchange in every round, and report (secure, seconds, CPU seconds, bytes of a message)."""
    torch.set_num_threads(1)
    me, topology = sites[client], build_topology(CompleteGraph(kind="complete"), len(sites), seed=0)
    who = load_identity(folder / me)
    transport = GrpcTransport(who, Roster(me, who.fingerprint, load_members(folder / "members.json", who.signers)))
    others = {j: site for j, site in sites.items() if j != client}
    spec = AdapterSpec((LayerSpec("layer", scalars // 16, scalars // 16),), rank=8, alpha=8.0)
    x = Adapters(spec, torch.randn(1, spec.parameters), torch.tensor([spec.rank]))
    with EventLoopThread() as thread:
        endpoint = Endpoint(transport, Expected("bench", "", ""), list(others.values()))
        sets = sender_sets(topology, Site(client, sites, "bench"), endpoint, DEADLINE)
        control = PeerControl(endpoint, {}, DEADLINE, sender_sets=sets)
        protocol = RoundProtocol(endpoint, DEADLINE, lambda kind: 1 << 24, control)
        plain = NeighbourExchange(topology, client, others, protocol, thread)
        secure = SecureExchange(sets, replace(topology, least_degree=2), client, others, protocol, thread)
        thread.call(control.start(protocol))
        assert len(thread.call(control.handshake(30)).reached) == len(others)
        for t in range(rounds + WARM):
            exchange = secure if t % 2 else plain
            exchange.begin(t)
            time.sleep(PAUSE)
            start.wait()
            cpu = time.process_time()
            exchange.mix(x)
            cpu = time.process_time() - cpu
            if t >= WARM:
                results.put((bool(t % 2), exchange.stats.seconds, cpu, exchange.stats.bytes_per_edge))
            assert not exchange.stats.missing, exchange.stats.missing
        start.wait()
        thread.call(control.close())


def summary(found: list[tuple[bool, float, float, int]], secure: bool) -> dict[str, float]:
    _, seconds, cpu, sizes = zip(*(each for each in found if each[0] is secure), strict=True)
    times = {"median": statistics.median(seconds), "slowest_tenth": statistics.quantiles(seconds, n=10)[-1]}
    times["cpu"] = statistics.median(cpu)
    return {f"{name}_ms": 1e3 * value for name, value in times.items()} | {"bytes": sizes[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neighbours", type=int, default=3)
    parser.add_argument("--scalars", type=int, default=75_000)
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args()
    sites = {client: f"s{client}" for client in range(given.neighbours + 1)}
    context = multiprocessing.get_context("spawn")  # gRPC's threads do not survive a fork
    start, results = context.Barrier(len(sites)), context.Queue()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        throwaway(folder, {site: f"127.0.0.1:{free_port()}" for site in sites.values()})
        words = [(folder, client, sites, given.scalars, given.rounds, start, results) for client in sites]
        processes = [context.Process(target=peer, args=each) for each in words]
        for process in processes:
            process.start()
        found = [results.get() for _ in range(given.rounds * len(sites))]
        for process in processes:
            process.join()
    plain, secure = summary(found, False), summary(found, True)
    more = {f"more_{name}": secure[name] - plain[name] for name in ("median_ms", "cpu_ms")}
    more["times_bytes"] = secure["bytes"] / plain["bytes"]
    print(json.dumps({**vars(given), "plain": plain, "secure": secure, **more}, indent=2))


if __name__ == "__main__":
    main()
