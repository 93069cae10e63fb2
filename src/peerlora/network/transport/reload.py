"""Takes a renewed certificate and a new member list up while a peer runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from peerlora.network.identity.identity import load_identity
from peerlora.network.identity.members import load_members
from peerlora.network.transport.grpc import GrpcTransport

Stamps = dict[Path, tuple[int, int]]


class ReloadedFiles:
    """Files that are taken up together when one of them is replaced."""

    def __init__(self, files: list[Path], apply: Callable[[], Awaitable[None]]):
        self.files, self.apply = files, apply
        self._seen: Stamps | None = None
        self._told = ""

    async def look(self) -> None:
        """Take up what is new, and try again at the next look where that failed; each failure is told once."""
        now = _stamps(self.files)
        if now == self._seen:
            return
        try:
            await self.apply()
        except Exception as error:  # whatever it is: the look after it must come
            told = str(error) or repr(error)
            if told != self._told:
                logging.getLogger(__name__).warning("not taken up: %s", told)
            self._told = told
        else:
            self._seen, self._told = now, ""


async def reload_on_change(transport: GrpcTransport, folder: Path, members: Path, every: float = 10.0) -> None:
    """Look at the identity's ``folder`` and at the list ``members`` every so many seconds; runs until cancelled.

    What cannot be used (half copied, expired, not signed, older) changes nothing; it is told once, as a warning, and
    tried again at every look.  The list does not wait for the certificate: a removal must hold whatever else is wrong.
    """

    async def certificate() -> None:
        identity, own = load_identity(folder), transport.identity
        if (identity.certificate, identity.roots, identity.signers) != (own.certificate, own.roots, own.signers):
            await transport.renew(identity)

    async def listed() -> None:
        found = load_members(members, transport.identity.signers)
        if found != transport.roster.members:
            await transport.update(found)

    own = ReloadedFiles([folder / "certificate.pem", folder / "trust.pem"], certificate)
    others = ReloadedFiles([members], listed)
    while True:
        await asyncio.sleep(every)
        await own.look()
        await others.look()


def _stamps(files: list[Path]) -> Stamps:
    """What changes when a file is replaced."""
    found = {}
    for path in files:
        try:
            status = path.stat()
        except OSError:
            continue
        found[path] = (status.st_mtime_ns, status.st_ino)
    return found
