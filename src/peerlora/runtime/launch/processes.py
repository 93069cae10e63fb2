"""A federation of real processes on this machine, with throw-away identities and injected faults."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peerlora.config.run import RunConfig
from peerlora.errors import ConfigError, Stopped
from peerlora.files import write_atomically
from peerlora.network.identity.authority import list_signer, throwaway
from peerlora.network.identity.members import sign_list, write_list
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.runs.store import new_folder, require_free
from peerlora.runs.write_failures import describe_write_failures
from peerlora.runtime.compose import resolve_threads
from peerlora.runtime.launch.faults import Fault
from peerlora.runtime.launch.peer_process import PeerProcess
from peerlora.runtime.launch.tcp_relay import Relay
from peerlora.runtime.peer.checks import plan_peer
from peerlora.runtime.peer.site import Site

_POLL = 0.05  # seconds between two polls of the processes
_PATIENCE = 30.0  # seconds that processes have to end after SIGTERM


def launch(
    config: RunConfig,
    out: Path | str | None = None,
    faults: Sequence[Fault] = (),
    *,
    listener: Callable[[Sequence[PeerProcess]], None] = lambda peers: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run ``config.clients`` peers as processes and wait for them; returns the summary, also in ``summary.json``.

    Its ``ok`` is true when every peer that was not killed for good has finished.  ``out`` gets config.yaml, identities,
    a run folder and a log per peer.
    """
    folder = Path(out) if out is not None else new_folder("launch")
    require_free(folder)
    if config.clients < 2:
        raise ConfigError("launch needs at least 2 peers; give --peers")
    if config.partition.kind == "own":
        raise ConfigError(
            "partition.kind=own given: all peers of launch read one file, so each would train on all of its rows; give "
            "a partition that deals them out, such as partition=iid"
        )
    federation = LocalFederation(config, folder, faults)
    try:
        federation.run(listener, stop)
    finally:
        federation.close()
    summary = federation.summary()
    with describe_write_failures(folder, lambda: "see the peers' own summaries there, all have ended"):
        write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


class LocalFederation:
    """The processes of one federation."""

    def __init__(self, config: RunConfig, folder: Path, faults: Sequence[Fault]):
        cores = resolve_threads(None)
        threads = config.threads or max(1, cores // config.clients)
        run = config.peer.model_copy(update={"run": secrets.token_hex(8)})
        self.config = config.model_copy(update={"threads": threads, "peer": run})
        self.folder, self.faults = folder, list(faults)
        self.relays: dict[tuple[int, int], Relay] = {}
        self.sites = [f"peer-{client}" for client in range(config.clients)]
        plan_peer(self.config, Site(0, dict(enumerate(self.sites)), f"launch/{self.config.peer.run}"))
        with describe_write_failures(folder, lambda: "choose another --out"):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "config.yaml", self.config.to_yaml())
        self.ports = free_ports(config.clients)
        addresses = {site: f"127.0.0.1:{port}" for site, port in zip(self.sites, self.ports, strict=True)}
        self.members = throwaway(folder / "identities", addresses, "launch")
        self.peers = [PeerProcess(client, folder / f"peer-{client:02d}", []) for client in range(config.clients)]
        self.thread = EventLoopThread()
        self.through_relays = any(each.kind == "cut" for each in faults)
        if self.through_relays:
            self._start_relays()
        for peer in self.peers:
            peer.command = self._command(peer)
        self.began: float | None = None

    def _command(self, peer: PeerProcess) -> list[str]:
        identities, site = self.folder / "identities", self.sites[peer.client]
        members = identities / (f"members-{peer.client}.json" if self.through_relays else "members.json")
        words = ["--identity", str(identities / site), "--members", str(members), "--out", str(peer.folder)]
        words += ["--resume", "--listen", f"127.0.0.1:{self.ports[peer.client]}"]
        return [sys.executable, "-m", "peerlora", "peer", str(self.folder / "config.yaml"), *words]

    def _start_relays(self) -> None:
        """Let every site dial the others through a relay of its own, which its member list names."""
        key = list_signer(self.folder / "identities" / "authority")
        pairs = [(i, j) for i in range(len(self.sites)) for j in range(len(self.sites)) if i != j]
        listens = dict(zip(pairs, free_ports(len(pairs)), strict=True))
        for i in range(len(self.sites)):
            seen = [
                member if member.client == i else _with_port(member, listens[i, member.client])
                for member in self.members.members
            ]
            own = _replace_fields(self.members, members=seen)
            write_list(self.folder / "identities" / f"members-{i}.json", sign_list(own, key, _validity(own)))
        for (i, j), listen in listens.items():
            self.relays[i, j] = self.thread.ask(Relay, self.ports[j])
            self.thread.call(self.relays[i, j].start(listen))

    def run(self, listener: Callable[[Sequence[PeerProcess]], None], stop: Callable[[], bool]) -> None:
        """Start all peers, inject the faults, and wait until all have ended."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.config.threads), "HF_HUB_OFFLINE": "1"}
        for peer in self.peers:
            peer.start(environment)
        due: list[tuple[float, Callable[[], None]]] = []
        while True:
            for peer in self.peers:
                self._poll(peer)
            if self.began is None and any(peer.state == "running" for peer in self.peers):
                self.began = time.monotonic()
                due = self._schedule_faults(environment)
            while due and time.monotonic() >= due[0][0]:
                due.pop(0)[1]()
            listener(self.peers)
            if stop():
                raise Stopped(f"stopped; every peer keeps its checkpoint in {self.folder}")
            if all(peer.killed or not (peer.alive or peer.state == "restarting") for peer in self.peers):
                return
            time.sleep(_POLL)

    def _poll(self, peer: PeerProcess) -> None:
        for event in peer.new_events():
            peer.record(event)
        code = peer.process.poll() if peer.process is not None else None
        if code is not None and peer.state not in ("restarting", "killed"):
            peer.state = "finished" if code == 0 else "killed" if peer.killed else f"failed ({code})"

    def _schedule_faults(self, environment: Mapping[str, str]) -> list[tuple[float, Callable[[], None]]]:
        """List (time, action) of every fault and its end, in order of time."""
        assert self.began is not None
        due: list[tuple[float, Callable[[], None]]] = []
        for fault in self.faults:
            begin, undo = self._actions(fault, environment)
            due.append((self.began + fault.at, begin))
            if fault.lasts is not None:
                due.append((self.began + fault.at + fault.lasts, undo))
        return sorted(due, key=lambda item: item[0])

    def _actions(self, fault: Fault, environment: Mapping[str, str]) -> tuple[Callable[[], None], Callable[[], None]]:
        """The action that begins a fault, and the one that ends it."""
        peer = self.peers[fault.peer]
        if fault.kind == "cut":
            return lambda: self._cut(fault, True), lambda: self._cut(fault, False)
        if fault.kind == "stop":
            return lambda: self._stop(peer, fault.lasts is None), lambda: self._continue(peer)
        return lambda: self._kill(peer, fault.lasts is not None), lambda: self._restart(peer, environment)

    def _kill(self, peer: PeerProcess, again: bool) -> None:
        if peer.process is None or not peer.alive:
            return  # it ended by itself
        peer.signal(signal.SIGKILL)
        peer.process.wait()
        peer.killed, peer.state = not again, "restarting" if again else "killed"

    def _restart(self, peer: PeerProcess, environment: Mapping[str, str]) -> None:
        if peer.state == "restarting":
            peer.start(environment)

    def _stop(self, peer: PeerProcess, for_good: bool) -> None:
        if peer.alive:
            peer.signal(signal.SIGSTOP)
            peer.killed, peer.state = peer.killed or for_good, "stopped"

    def _continue(self, peer: PeerProcess) -> None:
        if peer.alive and not peer.killed:
            peer.signal(signal.SIGCONT)
            peer.state = "running"

    def _cut(self, fault: Fault, cut: bool) -> None:
        one, other = fault.peer, fault.other
        assert other is not None
        for dialler, dialled in ((one, other), (other, one)):
            relay = self.relays[dialler, dialled]
            for forward in (True, False):
                source = dialler if forward else dialled
                if fault.both or source == one:
                    self.thread.ask(relay.cut, forward, cut)

    def close(self) -> None:
        """End the processes that still run, with SIGTERM and then SIGKILL; at once where this is interrupted."""
        try:
            self._terminate()
        finally:
            for peer in self.peers:
                if peer.process is not None and peer.alive:
                    peer.process.kill()
                    peer.process.wait()
        for relay in self.relays.values():
            self.thread.call(relay.close())
        self.thread.close()

    def _terminate(self) -> None:
        """Send every peer one SIGTERM and wait for its round and checkpoint, except for those stopped for good."""
        asked = [peer for peer in self.peers if not peer.killed]
        for peer in asked:
            peer.signal(signal.SIGCONT)
            peer.signal(signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE
        while any(peer.alive for peer in asked) and time.monotonic() < deadline:
            time.sleep(_POLL)

    def summary(self) -> dict[str, Any]:
        """Summarise how the federation and every peer ended."""
        relay, peers = self.config.exchange.relay, []
        for peer in self.peers:
            written = peer.folder / "summary.json"
            found = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else {}
            scores = found.get("accuracy", {})
            facts = {"client": peer.client, "ended": peer.state, "rounds": peer.round, "metric": scores.get("own_mean")}
            facts |= {"relayed": scores.get("relayed_mean")} if relay else {}
            facts |= {"starts": peer.starts, "missed": peer.missed, "skipped": peer.skipped}
            peers.append(facts | {"bytes_sent": found.get("bytes_sent"), "run": str(peer.folder), "log": str(peer.log)})
        own = _spread("own", [peer["metric"] for peer in peers])
        return {
            "ok": all(peer.state == "finished" or peer.killed for peer in self.peers) and own["own_mean"] is not None,
            "method": self.config.algorithm.name,
            "seconds": None if self.began is None else time.monotonic() - self.began,
            **own,
            **(_spread("relayed", [peer["relayed"] for peer in peers]) | {"deployed": relay.deploy} if relay else {}),
            "peers": peers,
            "run": str(self.folder),
        }


def _spread(name: str, scores: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and ends of the scores of those peers that have one."""
    known = [score for score in scores if score is not None]
    mean = sum(known) / len(known) if known else None
    return {f"{name}_mean": mean, f"{name}_min": min(known, default=None), f"{name}_max": max(known, default=None)}


def _with_port(member: Any, port: int) -> Any:
    return _replace_fields(member, address=f"127.0.0.1:{port}")


def _replace_fields(struct: Any, **changes: Any) -> Any:
    from msgspec import structs

    return structs.replace(struct, **changes)


def _validity(members: Any) -> Any:
    return members.expires - members.issued


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback address that are free at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
