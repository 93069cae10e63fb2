"""Reload of the certificate and of the member list while a peer runs."""

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
    """Files that are reloaded together when one of them is replaced."""

    def __init__(self, files: list[Path], apply: Callable[[], Awaitable[None]]):
        self.files, self.apply = files, apply
        self._seen: Stamps | None = None
        self._failure = ""

    async def check(self) -> None:
        """Reload changed files; a failure is logged once and tried again at the next call."""
        now = _stamps(self.files)
        if now == self._seen:
            return
        try:
            await self.apply()
        except Exception as error:  # of any kind: the next call must still try
            failure = str(error) or repr(error)
            if failure != self._failure:
                logging.getLogger(__name__).warning("not taken up: %s", failure)
            self._failure = failure
        else:
            self._seen, self._failure = now, ""


async def reload_on_change(transport: GrpcTransport, folder: Path, members: Path, every: float = 10.0) -> None:
    """Check the identity's ``folder`` and the list ``members`` every ``every`` seconds; runs until cancelled.

    A file that cannot be used (half copied, expired, not signed, older) changes nothing; one warning is logged, and it
    is tried again at every check.  The list does not wait for the certificate, whose renewal waits as long as another
    program has the port: a removal must hold in any case.
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
    async with asyncio.TaskGroup() as checks:
        checks.create_task(_check_regularly(own, every))  # the first: it may bring the key that signed a new list
        checks.create_task(_check_regularly(others, every))


async def _check_regularly(files: ReloadedFiles, every: float) -> None:
    while True:
        await asyncio.sleep(every)
        await files.check()


def _stamps(files: list[Path]) -> Stamps:
    """Modification time and inode of each file: these change when it is replaced."""
    found = {}
    for path in files:
        try:
            status = path.stat()
        except OSError:
            continue
        found[path] = (status.st_mtime_ns, status.st_ino)
    return found
