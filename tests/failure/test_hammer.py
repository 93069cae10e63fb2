"""Three real peers attacked by strangers and a member: nobody dies, rounds go on, memory and files are bounded."""

import asyncio
import os
import resource
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
import torch
from processes import QUICK, Processes
from safetensors.torch import load

from handshakes import Hammer
from peerlora.network.base import Refused, TransportError
from peerlora.network.identity.authority import issue
from peerlora.network.identity.identity import load_identity, read_key
from peerlora.network.identity.key_files import write_over
from peerlora.network.identity.members import check_address, load_members
from peerlora.network.identity.roster import Roster
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.network.protocol.wire import encode_body, encode_header, read_header, with_checksum
from peerlora.network.transport.grpc import GrpcTransport
from peerlora.runs.events import NeighbourChanged, RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events

FILES = 1024  # descriptors that a peer may have
IDLE = 1500
HUGE = (1e19, -3e38, 1e30, 1e12)
WORDS = [
    *QUICK,
    "clients=4",
    "topology=complete",
    "train.rounds=5",
    "peer.deadline=3",
    "peer.join=60",
    "checkpoint.every=1",
]


class Mallory:
    """A member that greets as it was greeted, and answers every message with one like it, of huge values."""

    def __init__(self, folder):
        who = load_identity(folder / "identities/site-3")
        self.members = load_members(folder / "identities/members.json", who.signers)
        self.transport = GrpcTransport(who, Roster("site-3", who.fingerprint, self.members))
        self.sent, self.answers, self.tasks = 0, {}, set()

    def admit(self, peer, header):
        return 1 << 26

    async def deliver(self, peer, header, body):
        kind = read_header(header).kind
        if kind in ("hello", "mix"):
            task = asyncio.ensure_future(self.answer(peer, read_header(header), bytes(body)))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def answer(self, peer, header, body):
        self.sent += 1
        value = HUGE[self.sent % len(HUGE)]
        vectors = {name: torch.full_like(each, value) for name, each in load(body).items()} if body else {}
        facts = header.facts | {"answer": 0} if header.kind == "hello" else {}
        body = encode_body(vectors)
        own = with_checksum(msgspec.structs.replace(header, sender="site-3", facts=facts), body)
        try:
            await self.transport.send(peer, encode_header(own), body, deadline=4)
            said = f"{header.kind} taken"
        except Refused as refusal:
            said = refusal.reason
        except TransportError:
            said = "unanswered"
        self.answers[said] = self.answers.get(said, 0) + 1


def idle(address, over):
    """Hold as many connections as the target may have files, without a byte; open those again that it closes."""
    held = []
    while not over.is_set():
        for each in held[:]:
            with suppress(BlockingIOError):
                try:
                    gone = each.recv(1) == b""
                except ConnectionError:
                    gone = True
                if gone:
                    each.close()
                    held.remove(each)
        while len(held) < IDLE and not over.is_set():
            with suppress(OSError):
                each = socket.create_connection(address, timeout=1)
                each.setblocking(False)
                held.append(each)
        time.sleep(0.2)
    for each in held:
        each.close()


def use(process):
    """MB of memory and open files of a process."""
    place = Path(f"/proc/{process.pid}")
    pages = int((place / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(place / "fd"))


@pytest.mark.slow
@pytest.mark.alone
def test_peers_under_attack_come_to_the_end(config, tmp_path):
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with Processes({"run": config("bert", *WORDS)}, tmp_path) as peers, EventLoopThread() as thread:
        peers_of_run = [peers.start(client) for client in range(3)]
        for process in peers_of_run:
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
        mallory = Mallory(tmp_path)
        thread.call(mallory.transport.start(mallory))
        key = tmp_path / "identities/site-3/key.pem"
        past = datetime.now(UTC) - timedelta(days=90)
        leaf = issue(tmp_path / "identities/authority", read_key(key).public_key(), "site-3", timedelta(days=30), past)
        write_over(tmp_path / "expired.pem", leaf + key.read_bytes(), 0o600)
        addresses = [check_address(mallory.members.member(f"site-{client}").address) for client in range(3)]
        hammers = [Hammer(address, mallory.transport.identity, tmp_path / "expired.pem") for address in addresses[:2]]
        over, attacks = threading.Event(), []
        while not all(select_events(events_of(peers, client), RoundDone) for client in range(3)):
            assert all(process.is_alive() for process in peers_of_run)
            time.sleep(0.1)
        before = [use(process) for process in peers_of_run]
        for hammer in hammers:
            attacks += [threading.Thread(target=hammer.shake) for _ in range(3)]
        attacks += [threading.Thread(target=idle, args=(address, over)) for address in addresses[1:]]
        for each in attacks:
            each.start()
        largest = before
        try:
            while any(process.is_alive() for process in peers_of_run):
                for hammer in hammers:
                    hammer.burst(100)
                time.sleep(0.1)
                with suppress(OSError):  # one has just ended
                    now = [use(process) for process in peers_of_run]
                    largest = [tuple(map(max, old, new)) for old, new in zip(largest, now, strict=True)]
        finally:
            over.set()
            for hammer in hammers:
                hammer.over.set()
            for each in attacks:
                each.join()
        thread.call(mallory.transport.close())
        assert peers.wait() == {0: 0, 1: 0, 2: 0}
        print([hammer.tried for hammer in hammers], mallory.answers, before, largest)
        assert mallory.answers.get("out-of-range") and not mallory.answers.get("mix taken")
        for client in range(3):
            events = events_of(peers, client)
            done = select_events(events, RoundDone)
            assert done[-1].round == 4 and sum(each.contacts > 0 for each in done) >= len(done) / 2
            assert any("out-of-range" in each.detail for each in select_events(events, NeighbourChanged))
        for (megabytes, _), (most_megabytes, most_files) in zip(before, largest, strict=True):
            assert most_files < 0.8 * FILES and most_megabytes < megabytes + 300


def events_of(peers, client):
    run = peers.run("run", client)
    return read_events(run) if (run / "run.json").exists() else []
