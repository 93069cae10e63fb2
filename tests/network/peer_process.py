"""A peer in a process of its own: ``peer_process.py FOLDER SITE``; prints ``up PEER`` and ``got N BYTES``."""

import asyncio
import sys
from pathlib import Path

from peerlora.network.identity.identity import load_identity
from peerlora.network.identity.members import load_members
from peerlora.network.identity.roster import Roster
from peerlora.network.transport.grpc import GrpcTransport
from peerlora.network.transport.heartbeat import Timing

TIMING = Timing(beat=0.3, backoff=(0.2, 1.0), handshake=2.0)


def transport(folder, site, timing=TIMING):
    identity = load_identity(folder / site)
    members = load_members(folder / "members.json", identity.signers)
    return GrpcTransport(identity, Roster(site, identity.fingerprint, members), timing=timing)


class Printing:
    """Says what it gets."""

    count = 0

    def admit(self, peer, header):
        return 1 << 30

    async def deliver(self, peer, header, body):
        self.count += 1
        print("got", self.count, len(body), flush=True)


async def main(folder, site):
    mine = transport(folder, site)
    await mine.start(Printing())
    async for event in mine.events():
        print(event.kind, event.peer, event.detail, flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
