"""Real processes and real signals: SIGKILL, SIGSTOP, restart; and a sender's memory beside a receiver that stopped."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import peer_process
import pytest
from rigs import GrpcRig

import peerlora
from cases import others_slow
from peerlora.network.base import DeadlineMissed, PeerDown


class Signals(GrpcRig):
    """Site a in this process, b or c in another."""

    timing = peer_process.TIMING

    def spawn(self, site):
        environment = os.environ | {"PYTHONPATH": str(Path(peerlora.__file__).parents[1]), "GRPC_VERBOSITY": "ERROR"}
        script = Path(peer_process.__file__)
        command = [sys.executable, str(script), str(self.folder), site]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    def signal(self, number):
        os.kill(self.process.pid, number)

    async def pair(self, site):
        await self.start("a")
        self.spawn(site)
        await self.until(lambda: self.edge("a", site))

    async def stop(self):
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait()
        await super().stop()


@pytest.fixture
def rig(federation):
    return Signals(federation)


@pytest.mark.parametrize("site", ["b", "c"])  # a dials b, and is dialled by c
def test_a_killed_process_is_noticed_at_once_and_received_again_after_its_restart(rig, site):
    async def scenario(rig):
        await rig.pair(site)
        await rig.transports["a"].send(site, b"h", b"x" * 3_000_000, deadline=5)
        before = len(rig.told["a"])

        def downs():
            return [text for kind, who, text in rig.told["a"][before:] if (kind, who) == ("down", site)]

        rig.signal(signal.SIGKILL)
        await rig.until(downs)
        assert "no heartbeat" not in downs()[0], "it was noticed by the connection"
        with pytest.raises(PeerDown):
            await rig.transports["a"].send(site, b"h", b"x", deadline=5)
        rig.process.wait()
        rig.spawn(site)
        await rig.until(lambda: rig.edge("a", site))
        await rig.transports["a"].send(site, b"h", b"x" * 3_000_000, deadline=5)

    rig.run(scenario)


def test_a_stopped_process_is_noticed_by_its_missing_heartbeats(rig):
    async def scenario(rig):
        await rig.pair("b")
        rig.signal(signal.SIGSTOP)
        with pytest.raises(DeadlineMissed):
            await rig.transports["a"].send("b", b"h", b"x" * 1000, deadline=0.3)
        await rig.until(lambda: rig.kinds("a", "b")[-1] == "down")
        assert rig.kinds("a", "b")[-3:] == ["up", "suspect", "down"]
        rig.signal(signal.SIGCONT)
        await rig.until(lambda: rig.kinds("a", "b")[-1] == "up" and rig.edge("a", "b"))
        await rig.transports["a"].send("b", b"h", b"x", deadline=5)

    rig.run(scenario)


def resident():
    """Bytes that this process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to read this process's memory")
@pytest.mark.parametrize("site", others_slow(["b", "c"], [0]))
def test_a_receiver_that_does_not_read_bounds_the_senders_memory(rig, site):
    body = bytes(128 << 20)

    async def scenario(rig):
        await rig.pair(site)
        await rig.transports["a"].send(site, b"h", body[: 8 << 20], deadline=20)
        before, most = resident(), 0
        rig.signal(signal.SIGSTOP)
        sending = asyncio.ensure_future(rig.transports["a"].send(site, b"h", body, deadline=1.0))
        while not sending.done():
            most = max(most, resident() - before)
            await asyncio.sleep(0.02)
        with pytest.raises((DeadlineMissed, PeerDown)):
            await sending
        assert most < 48 << 20, f"{most >> 20} MB for a message of 128 MB"

    rig.run(scenario)
