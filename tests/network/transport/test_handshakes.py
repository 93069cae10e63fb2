"""Connections by strangers, in numbers: they end nothing, hold nothing for long, and a renewal loses no message."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from grpc import aio
from rigs import GrpcRig

from peerlora.network.identity.identity import load_identity
from peerlora.network.transport import connections
from peerlora.network.transport.connections import PER_MEMBER, Connections, most_connections, read_remote
from peerlora.network.transport.heartbeat import Timing
from peerlora.network.transport.server import TlsServer

HAMMER = Path(__file__).parents[3] / "bench/handshakes.py"


def hammered(*words):
    """What bench/handshakes.py finds; the target is a process of its own, since what is tried here ended it."""
    done = subprocess.run([sys.executable, HAMMER, *words], stdout=subprocess.PIPE, text=True, timeout=300)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("handshakes", "renewals", "every"),
    [(500, 2, 0.2), pytest.param(10_000, 100, 0.05, marks=[pytest.mark.slow, pytest.mark.alone])],
)
def test_handshakes_during_renewals_end_nothing(handshakes, renewals, every):
    found = hammered(f"--handshakes={handshakes}", f"--renewals={renewals}", f"--every={every}")
    assert found["exit"] == 0 and found["handshakes"] >= handshakes and found["renewals"] == 2 * renewals
    # That a renewal loses none is the next test's; here a new session may find the port crowded from its own address.
    assert found["messages"] > 0 and len(found["lost"]) < 0.1 * found["messages"]
    before, after = found["files"]
    assert after < before + 200  # those of the last burst, of 100, may still be there


def test_a_message_in_flight_outlives_renewals_at_both_ends(federation):
    """Neither is anybody reported as away: an exchange in progress would go on without them."""

    async def scenario(rig):
        await rig.all_up("a", "b")
        for box in rig.boxes.values():
            box.gate.clear()
        sends = [
            asyncio.ensure_future(rig.transports[one].send(other, one.encode(), bytes(3 << 20), deadline=20))
            for one, other in (("a", "b"), ("b", "a"))
        ]
        await rig.until(lambda: all(box.inside for box in rig.boxes.values()))
        for site in ("b", "a"):
            links = [rig.edge(*ends) for ends in (("a", "b"), ("b", "a"))]
            await rig.transports[site].renew(load_identity(federation / site))
            await rig.until(lambda links=links: all(rig.edge(*ends) not in (None, *links) for ends in ("ab", "ba")))
        for box in rig.boxes.values():
            box.gate.set()
        await asyncio.gather(*sends)
        for box, message in ((rig.boxes["a"], b"b"), (rig.boxes["b"], b"a")):  # a real receiver takes it once
            assert {got[1] for got in box.got} == {message}
        assert rig.kinds("a", "b") == rig.kinds("b", "a") == ["up"]

    GrpcRig(federation).run(scenario)


@pytest.mark.parametrize("host", ["unix", "xds", "ipv4", "127.0.0.1", "[::1]"])
def test_a_host_is_never_taken_for_a_scheme_of_grpc(federation, monkeypatch, host):
    dialled = []

    def no_channel(target, credentials, options):
        dialled.append(target)
        raise ZeroDivisionError

    monkeypatch.setattr(aio, "secure_channel", no_channel)

    async def scenario(rig):
        listed = [msgspec.structs.replace(each, address=f"{host}:7443") for each in rig.members.members]
        rig.members = msgspec.structs.replace(rig.members, members=listed)
        await rig.start("a")
        await rig.until(lambda: dialled)
        assert set(dialled) == {f"dns:///{host}:7443"}

    GrpcRig(federation).run(scenario)


def test_half_open_connections_are_few_and_short(federation):
    """gRPC itself takes as many as there are, for 120 s."""

    def ended(each):
        with suppress(BlockingIOError, ConnectionResetError):
            return each.recv(1) == b""
        return False

    async def scenario():
        server = TlsServer({}, Timing(handshake=0.4), 8, 10, lambda: None)
        await server.start("127.0.0.1:0", load_identity(federation / "a"))
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(30)]
        for each in held:
            each.setblocking(False)
        async with asyncio.timeout(600):
            while sum(map(ended, held)) < 20:
                await asyncio.sleep(0.02)
            while sum(map(ended, held)) < 30:
                await asyncio.sleep(0.02)
        for each in held:
            each.close()
        await server.close()

    asyncio.run(scenario())


@pytest.fixture
def listening():
    """A socket that listens, and a function that connects to it: both ends of the new connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        opened = []

        def connect():
            outer = socket.create_connection(server.getsockname())
            inner, _ = server.accept()
            outer.setblocking(False)
            opened.extend((outer, inner))
            return outer, inner

        yield server.getsockname()[1], connect
        for each in opened:
            each.close()


def is_open(outer):
    try:
        return outer.recv(1) != b""
    except BlockingIOError:
        return True


def named(outer):
    """As gRPC names it."""
    return "ipv4:{}:{}".format(*outer.getsockname())


def test_connections_without_a_members_call_are_closed_where_they_are_too_many(listening):
    port, connect = listening
    kept = Connections(age=60, most=3)
    pairs = [connect() for _ in range(3)]
    assert kept.trim(port) == 0
    later = [connect() for _ in range(2)]
    member, _ = connect()
    kept.prove("key", named(member))
    before = len(os.listdir("/dev/fd"))
    assert kept.trim(port) == 2
    assert [is_open(outer) for outer, _ in pairs + later] == [True] * 3 + [False] * 2 and is_open(member)
    assert len(os.listdir("/dev/fd")) == before


def test_connections_without_a_members_call_are_closed_where_they_are_old(listening, monkeypatch):
    port, connect = listening
    now = [100.0]
    monkeypatch.setattr(connections, "monotonic", lambda: now[0])
    kept = Connections(age=10, most=99)
    members = [connect()[0] for _ in range(PER_MEMBER + 1)]
    for member in members:
        kept.prove("key", named(member))
    stranger, _ = connect()
    assert kept.trim(port) == 0
    now[0] += 11
    assert kept.trim(port) == 2  # the stranger's, and the oldest of a member that has too many
    assert [is_open(member) for member in members] == [False] + [True] * PER_MEMBER and not is_open(stranger)


def test_names_of_connections_are_read():
    assert read_remote("ipv4:10.0.0.7:41234") == ("10.0.0.7", 41234)
    assert read_remote("ipv6:%5B2001:db8::1%5D:7443") == ("2001:db8::1", 7443)
    assert read_remote("ipv6:%5B::ffff:10.0.0.7%5D:7443") == ("10.0.0.7", 7443)
    assert read_remote("unix:a-socket") == ("unix:a-socket", 0)


def test_the_port_never_takes_more_than_half_of_the_file_descriptors(monkeypatch):
    for soft, members, most in ((1024, 3, 512), (65_536, 3, 1024), (65_536, 1000, 4000)):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda _, soft=soft: (soft, 65_536))
        assert most_connections(members) == most
