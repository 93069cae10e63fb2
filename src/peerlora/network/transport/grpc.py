"""Transport between real peers: gRPC over TCP with mutual TLS 1.3; needs the extra ``peer``.

One edge has one connection, opened by whichever end can dial.  Over it go a session (heartbeats both ways), one
client-streaming call for each message of the dialler, and for each message of the other side one call that the dialler
keeps open for it.  So only one end of an edge needs an open port.  A process that uses this must not fork.
"""

from __future__ import annotations

import asyncio
from datetime import datetime

from peerlora.errors import IdentityError
from peerlora.network.base import KeyAgreement, PeerId, Receiver, Signatures
from peerlora.network.identity.agreement import SiteAgreement, agreement_key
from peerlora.network.identity.identity import Identity
from peerlora.network.identity.members import MemberList, check_address
from peerlora.network.identity.roster import Roster
from peerlora.network.identity.signatures import SiteSignatures
from peerlora.network.transport.audit_log import AuditLog
from peerlora.network.transport.dialler import dial_for_ever
from peerlora.network.transport.heartbeat import Timing, give_up
from peerlora.network.transport.links import LinkTable, LinkTransport
from peerlora.network.transport.listener import Listener


class GrpcTransport(LinkTransport):
    """One peer's connections over gRPC; see Transport.

    ``listen``: host:port to open; None takes the port of the own address on the member list, on all of the machine's
    addresses, and opens none for a site without address.
    """

    def __init__(
        self,
        identity: Identity,
        roster: Roster,
        *,
        listen: str | None = None,
        timing: Timing | None = None,
        audit: AuditLog | None = None,
    ):
        if identity.site != roster.me:
            raise IdentityError(f"identity of {identity.site} given with the member list's view of {roster.me}")
        self.me: PeerId = identity.site
        self.identity, self.roster, self.timing = identity, roster, timing or Timing()
        own = roster.members.member(self.me).address
        self.listen = listen or (f"0.0.0.0:{check_address(own)[1]}" if own else None)
        self.signatures: Signatures | None = SiteSignatures(lambda: self.identity, roster)
        self.agreement: KeyAgreement | None = SiteAgreement(agreement_key(identity.key), roster.agreement)
        self.ends = LinkTable(self.me, roster, audit)
        self._listener = Listener(self.ends, roster, lambda: self.identity, self.timing)
        self._dialling: dict[PeerId, asyncio.Task] = {}
        self._anew: dict[PeerId, asyncio.Event] = {}

    @property
    def port(self) -> int:
        """Number of the open port; 0 for none."""
        return self._listener.port

    def ends_of_validity(self) -> dict[str, datetime | None]:
        """When the certificate and the member list that are in use end; see ``ExpiryWatch``."""
        return {"the certificate": self.identity.expires, "the member list": self.roster.members.expires}

    async def start(self, receiver: Receiver) -> None:
        """Open the port and dial; raises TransportError where the port cannot be opened."""
        self.ends.receiver = receiver
        if self.listen is not None:
            await self._listener.start(self.listen)
        self._dial()

    def _dial(self) -> None:
        for peer in self.roster.others():
            if peer not in self._dialling and self.roster.dials(peer):
                anew = self._anew[peer] = asyncio.Event()
                self._dialling[peer] = asyncio.ensure_future(
                    dial_for_ever(self.ends, self.roster, lambda: self.identity, peer, self.timing, anew)
                )

    async def update(self, members: MemberList) -> None:
        """Replace the member list by a newer one; sessions of removed members end at once.  Raises IdentityError.

        A change of the own address turns the direction in which edges are dialled, but leaves the own port as it is.
        """
        before = {member.site: member for member in self.roster.members.members}
        self.roster.replace(members)
        stays = {peer for peer in self.roster.others() if self.roster.members.member(peer) == before.get(peer)}
        gone = [peer for peer in self._dialling if peer not in stays or not self.roster.dials(peer)]
        await give_up(*(self._dialling.pop(peer) for peer in gone))
        for peer, edge in self.ends.edges.items():
            if peer not in stays and edge.link is not None:
                self.ends.lost(peer, edge.link, "the member list changed")
        self._dial()

    async def renew(self, identity: Identity) -> None:
        """Replace the certificate by a renewed one and open the sessions anew with it.

        A session ends when its successor has opened, so no message is lost, and no event says that anybody was away.
        """
        if (identity.site, identity.fingerprint) != (self.me, self.roster.fingerprint):
            raise IdentityError("a renewed certificate must be of the same site and key; a new key needs a new list")
        self.identity = identity
        await self._listener.renew()
        for peer in self._dialling:
            self._anew[peer].set()

    async def close(self) -> None:
        """See Transport."""
        self.ends.shut()
        await give_up(*self._dialling.values())
        await self._listener.close()
        self.ends.audit.close()
