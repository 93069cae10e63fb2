"""Takes a renewed certificate and a new member list up while a peer runs."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from peerlora.errors import IdentityError
from peerlora.transport.grpc import GrpcTransport
from peerlora.transport.identity import load_identity
from peerlora.transport.members import load_members


async def follow(transport: GrpcTransport, folder: Path, members: Path, every: float = 10.0) -> None:
    """Look at the identity's ``folder`` and at the list ``members`` every so many seconds; runs until cancelled.

    What cannot be used (half copied, expired, not signed, older) changes nothing and is logged once.
    """
    files = [folder / "certificate.pem", folder / "trust.pem", members]
    seen = _stamps(files)
    while True:
        await asyncio.sleep(every)
        now = _stamps(files)
        if now == seen:
            continue
        seen = now
        try:
            await _take_up(transport, folder, members)
        except IdentityError as error:
            logging.getLogger(__name__).warning("not taken up: %s", error)


async def _take_up(transport: GrpcTransport, folder: Path, members: Path) -> None:
    identity = load_identity(folder)
    listed = load_members(members, identity.signers)
    if (identity.certificate, identity.roots) != (transport.identity.certificate, transport.identity.roots):
        await transport.renew(identity)
    if listed != transport.roster.members:
        await transport.update(listed)


def _stamps(files: list[Path]) -> dict[Path, tuple[int, int]]:
    """What changes when a file is replaced."""
    found = {}
    for path in files:
        try:
            status = path.stat()
        except OSError:
            continue
        found[path] = (status.st_mtime_ns, status.st_ino)
    return found
