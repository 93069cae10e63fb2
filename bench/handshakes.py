"""Handshakes by strangers against a running transport, while its certificate is renewed again and again.

    python bench/handshakes.py --handshakes 5000 --burst 100 --steady 20 --renewals 50

A process of its own, the target, holds site a, which listens, and site b, which dials it; they send each other numbered
messages all the time.  This process connects to a: in bursts of plain connections that are closed at once, and in
``--steady`` threads that go through TLS with an expired certificate.  Prints one JSON object: handshakes tried, the
target's exit code (negative: the signal that ended it), messages that were lost, memory and file descriptors.
"""

import argparse
import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from peerlora.network.base import Refused, TransportError
from peerlora.network.identity.authority import issue, throwaway
from peerlora.network.identity.identity import Identity, host_name, load_identity, read_key
from peerlora.network.identity.key_files import write_over
from peerlora.network.identity.members import check_address, load_members
from peerlora.network.identity.roster import Roster
from peerlora.network.transport.grpc import GrpcTransport

PAUSE = 0.02  # seconds between two messages
EXPIRED = "expired.pem"


class Box:
    """A receiver that notes the numbers of what it gets."""

    def __init__(self) -> None:
        self.got: set[bytes] = set()

    def admit(self, peer: str, header: bytes) -> int:
        """See Receiver."""
        return 1 << 20

    async def deliver(self, peer: str, header: bytes, body: bytearray) -> None:
        """See Receiver."""
        if header in self.got:
            raise Refused("replay")
        self.got.add(header)


def transport(folder: Path, site: str) -> GrpcTransport:
    who = load_identity(folder / site)
    return GrpcTransport(who, Roster(site, who.fingerprint, load_members(folder / "members.json", who.signers)))


async def send(own: GrpcTransport, to: str, halt: asyncio.Event) -> tuple[int, list[str]]:
    """Send until told to stop; how many messages there were, and why some were lost."""
    number, lost = 0, []
    while not halt.is_set():
        try:
            await own.send(to, str(number).encode(), bytes(10_000), deadline=30)
        except TransportError as error:
            if getattr(error, "reason", "") != "replay":  # it had arrived before
                lost.append(str(error))
        number += 1
        await asyncio.sleep(PAUSE)
    return number, lost


async def renew(folder: Path, own: GrpcTransport, renewals: int, every: float) -> None:
    public = read_key(folder / own.me / "key.pem").public_key()
    for _ in range(renewals):
        await asyncio.sleep(every)
        fresh = issue(folder / "authority", public, own.me, timedelta(days=60))
        write_over(folder / own.me / "certificate.pem", fresh)
        await own.renew(load_identity(folder / own.me))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def memory() -> float:
    """MB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def target(folder: Path, renewals: int, every: float) -> None:
    """Hold both sites until a line comes; print what was lost."""
    sites = {site: transport(folder, site) for site in ("a", "b")}
    for each in sites.values():
        await each.start(Box())
    async with asyncio.timeout(60):
        while not all(each.ends.edge(other).link for each, other in ((sites["a"], "b"), (sites["b"], "a"))):
            await asyncio.sleep(0.05)
    files, megabytes = open_files(), memory()
    print("up", flush=True)
    halt = asyncio.Event()
    sending = [asyncio.ensure_future(send(sites[one], other, halt)) for one, other in (("a", "b"), ("b", "a"))]
    renewing = [asyncio.ensure_future(renew(folder, each, renewals, every)) for each in sites.values()]
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.gather(*renewing)
    halt.set()
    sums = await asyncio.gather(*sending)
    facts = {
        "messages": sum(total for total, _ in sums),
        "lost": [why for _, lost in sums for why in lost],
        "renewals": renewals * len(sites),
        "files": [files, open_files()],
        "megabytes": [round(megabytes, 1), round(memory(), 1)],
    }
    for each in sites.values():
        await each.close()
    print(json.dumps(facts), flush=True)


class Hammer:
    """Connections to one port, counted."""

    def __init__(self, address: tuple[str, int], who: Identity, expired: Path):
        self.address, self.tried, self.over = address, 0, threading.Event()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.load_verify_locations(cadata=who.roots.decode())
        self.context.load_cert_chain(expired)
        self.context.set_alpn_protocols(["h2"])
        self._lock = threading.Lock()

    def burst(self, count: int) -> None:
        """Open connections at once and close them: not one byte of TLS."""
        opened = []
        for _ in range(count):
            each = socket.socket()
            each.setblocking(False)
            each.connect_ex(self.address)
            opened.append(each)
        time.sleep(0.05)
        for each in opened:
            each.close()
        self._count(count)

    def shake(self) -> None:
        """Go through TLS with an expired certificate, until told to stop."""
        while not self.over.is_set():
            with suppress(OSError), socket.create_connection(self.address, timeout=5) as raw:
                with self.context.wrap_socket(raw, server_hostname=host_name("a")) as channel:
                    channel.recv(1)
            self._count(1)

    def _count(self, more: int) -> None:
        with self._lock:
            self.tried += more


def attack(folder: Path, handshakes: int, burst: int, steady: int, renewals: int, every: float) -> dict[str, object]:
    """Start a target and hammer it; what came of it."""
    expired = folder / EXPIRED
    key = folder / "b/key.pem"
    past = datetime.now(UTC) - timedelta(days=90)
    leaf = issue(folder / "authority", read_key(key).public_key(), "b", timedelta(days=30), past)
    write_over(expired, leaf + key.read_bytes(), 0o600)
    who = load_identity(folder / "a")
    own = load_members(folder / "members.json", who.signers).member("a").address
    assert own is not None
    words = [f"--target={folder}", f"--renewals={renewals}", f"--every={every}"]
    command = [sys.executable, __file__, *words]
    environment = os.environ | {"GRPC_VERBOSITY": "NONE"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    assert process.stdout is not None
    process.stdout.readline()
    hammer, began = Hammer(check_address(own), who, expired), time.monotonic()
    threads = [threading.Thread(target=hammer.shake) for _ in range(steady)]
    for thread in threads:
        thread.start()
    while process.poll() is None and (hammer.tried < handshakes or time.monotonic() - began < (renewals + 1) * every):
        hammer.burst(burst)
    hammer.over.set()
    for thread in threads:
        thread.join()
    out, _ = process.communicate("\n")
    facts = json.loads(out) if out else {}
    seconds = round(time.monotonic() - began, 1)
    return {"handshakes": hammer.tried, "seconds": seconds, "exit": process.returncode, **facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--handshakes", type=int, default=5000)
    parser.add_argument("--burst", type=int, default=100)
    parser.add_argument("--steady", type=int, default=20)
    parser.add_argument("--renewals", type=int, default=50, help="of each site")
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two renewals")
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.target:
        asyncio.run(target(given.target, given.renewals, given.every))
        return
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), socket.create_server(("127.0.0.1", 0))
        address = f"127.0.0.1:{port.getsockname()[1]}"
        port.close()
        throwaway(folder, {"a": address, "b": None}, "handshakes")
        facts = attack(folder, given.handshakes, given.burst, given.steady, given.renewals, given.every)
    print(json.dumps(facts))
    raise SystemExit(facts["exit"] != 0)


if __name__ == "__main__":
    main()
