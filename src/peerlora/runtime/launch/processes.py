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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peerlora.config.run import RunConfig
from peerlora.errors import ConfigError, RunError, Stopped
from peerlora.files import write_atomically
from peerlora.network.identity.authority import list_signer, throwaway
from peerlora.network.identity.members import sign_list, write_list
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.network.transport.connections import raise_descriptor_limit
from peerlora.runs.store import new_folder, require_free
from peerlora.runs.write_failures import describe_write_failures
from peerlora.runtime.compose import resolve_threads
from peerlora.runtime.launch.faults import Fault, check_faults
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

    Its ``ok`` is true when every peer that was not killed for good has finished; ``not_injected`` lists the faults
    whose moment came after the run, or whose peer had ended.  ``out`` gets config.yaml, identities, a run folder and a
    log per peer.
    """
    folder = Path(out) if out is not None else new_folder("launch")
    require_free(folder, resumable=False)
    check_faults(faults)
    if config.clients < 2:
        raise ConfigError("launch needs at least 2 peers; give --peers")
    if config.partition.kind == "own":
        raise ConfigError(
            "partition.kind=own given: all peers of launch read one file, so each would train on all of its rows; give "
            "a partition that deals them out, such as partition=iid"
        )
    raise_descriptor_limit()
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
        pairs = sorted({pair for fault in faults for pair in fault.pairs})
        ports = free_ports(config.clients + len(pairs))  # before anything is written: --out stays free where it fails
        self.ports = ports[: config.clients]
        self.listens = dict(zip(pairs, ports[config.clients :], strict=True))
        """(Dialling, dialled) peer of a link that is cut -> port of its relay."""
        with describe_write_failures(folder, lambda: "choose another --out"):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "config.yaml", self.config.to_yaml())
        addresses = {site: f"127.0.0.1:{port}" for site, port in zip(self.sites, self.ports, strict=True)}
        self.members = throwaway(folder / "identities", addresses, "launch")
        self.peers = [PeerProcess(client, folder / f"peer-{client:02d}", []) for client in range(config.clients)]
        self.thread = EventLoopThread()
        self._write_lists()
        for peer in self.peers:
            peer.command = self._command(peer)
        self.began: float | None = None
        self.pending = list(faults)
        """Faults that have not been injected."""

    def _command(self, peer: PeerProcess) -> list[str]:
        identities, site = self.folder / "identities", self.sites[peer.client]
        members = str(self._list_path(peer.client))
        words = ["--identity", str(identities / site), "--members", members, "--out", str(peer.folder)]
        words += ["--resume", "--listen", f"127.0.0.1:{self.ports[peer.client]}"]
        return [sys.executable, "-m", "peerlora", "peer", str(self.folder / "config.yaml"), *words]

    def _list_path(self, client: int) -> Path:
        """The member list of a peer: one of its own where it dials through relays."""
        own = any(dialler == client for dialler, _ in self.listens)
        return self.folder / "identities" / (f"members-{client}.json" if own else "members.json")

    def _write_lists(self) -> None:
        """Write the lists of the peers that dial through relays; each names its relays in place of the other ends."""
        key = list_signer(self.folder / "identities" / "authority")
        for client in sorted({dialler for dialler, _ in self.listens}):
            seen = [
                _with_port(member, self.listens[client, member.client])
                if (client, member.client) in self.listens
                else member
                for member in self.members.members
            ]
            own = _replace_fields(self.members, members=seen)
            write_list(self._list_path(client), sign_list(own, key, _validity(own)))

    def _start_relays(self) -> None:
        """Start a relay for each end of every link that is cut, through which this end dials the other."""
        for (dialler, dialled), listen in self.listens.items():
            relay = self.thread.ask(Relay, self.ports[dialled])
            try:
                self.thread.call(relay.start(listen))
            except OSError as error:
                raise RunError(
                    f"the link of peers {dialler} and {dialled} cannot be cut, since its relay does not start "
                    f"({error}); launch again with another --out"
                ) from error
            self.relays[dialler, dialled] = relay

    def run(self, listener: Callable[[Sequence[PeerProcess]], None], stop: Callable[[], bool]) -> None:
        """Start all relays and peers, inject the faults, and wait until all have ended."""
        self._start_relays()
        environment = os.environ | {"OMP_NUM_THREADS": str(self.config.threads)}
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
                raise Stopped(
                    f"stopped; every peer keeps its run and its checkpoint in {self.folder}; launch begins anew, with "
                    "another --out"
                )
            if all(peer.killed or not (peer.alive or peer.state == "restarting") for peer in self.peers):
                return
            time.sleep(_POLL)

    def _poll(self, peer: PeerProcess) -> None:
        for event in peer.new_events():
            peer.record(event)
        code = peer.process.poll() if peer.process is not None else None
        if code is not None and peer.state not in ("restarting", "killed"):
            if not (code == 0 or peer.killed or peer.failed):
                peer.notices.append(peer.last_words() or f"wrote nothing; see {peer.log}")
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
            return lambda: self._stop(fault), lambda: self._continue(peer)
        return lambda: self._kill(fault), lambda: self._restart(peer, environment)

    def _kill(self, fault: Fault) -> None:
        peer, again = self.peers[fault.peer], fault.lasts is not None
        if peer.process is None or not peer.alive:
            return  # it ended by itself
        peer.signal(signal.SIGKILL)
        peer.process.wait()
        peer.killed, peer.state = not again, "restarting" if again else "killed"
        self.pending.remove(fault)

    def _restart(self, peer: PeerProcess, environment: Mapping[str, str]) -> None:
        if peer.state == "restarting":
            peer.start(environment)

    def _stop(self, fault: Fault) -> None:
        peer = self.peers[fault.peer]
        if peer.alive:
            peer.signal(signal.SIGSTOP)
            peer.killed, peer.state = peer.killed or fault.lasts is None, "stopped"
            self.pending.remove(fault)

    def _continue(self, peer: PeerProcess) -> None:
        if peer.alive and not peer.killed:
            peer.signal(signal.SIGCONT)
            peer.state = "running"

    def _cut(self, fault: Fault, cut: bool) -> None:
        if cut:
            self.pending.remove(fault)
        for dialler, dialled in fault.pairs:
            relay = self.relays[dialler, dialled]
            for forward in (True, False):
                source = dialler if forward else dialled
                if fault.both or source == fault.peer:
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
            facts |= {"why": peer.last_words()} if peer.failed else {}
            facts |= {"starts": peer.starts, "missed": peer.missed, "skipped": peer.skipped}
            peers.append(facts | {"bytes_sent": found.get("bytes_sent"), "run": str(peer.folder), "log": str(peer.log)})
        own = _spread("own", [peer["metric"] for peer in peers])
        return {
            "ok": all(peer.state == "finished" or peer.killed for peer in self.peers) and own["own_mean"] is not None,
            "method": self.config.algorithm.name,
            "seconds": None if self.began is None else time.monotonic() - self.began,
            **own,
            **(_spread("relayed", [peer["relayed"] for peer in peers]) | {"deployed": relay.deploy} if relay else {}),
            **({"not_injected": [str(fault) for fault in self.pending]} if self.pending else {}),
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
    """Return ports of the loopback address that are free at this moment; raises RunError where there are too few."""
    with ExitStack() as opened:
        try:
            sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
        except OSError as error:
            raise RunError(
                f"{count} free ports were asked for, and the system gives fewer ({error.strerror}); launch fewer "
                "peers, cut fewer links, or raise the limit of open files (ulimit -n)"
            ) from error
        return [each.getsockname()[1] for each in sockets]
