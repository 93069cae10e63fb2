"""Secure sums of a real peer: its sender sets, and the keys that the member list must name for them."""

from __future__ import annotations

from functools import lru_cache

from peerlora.config.run import RunConfig
from peerlora.errors import CompositionError, IdentityError
from peerlora.network.base import PeerId
from peerlora.network.identity.agreement import agreement_public
from peerlora.network.identity.identity import Identity
from peerlora.network.identity.members import MemberList
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.sender_sets import SenderSets
from peerlora.runtime.peer.site import Site
from peerlora.topology.schedule import Topology

_ROUNDS = 4  # whose senders are remembered: sums are of this round or the next one


def sender_sets(topology: Topology, site: Site, endpoint: Endpoint, deadline: float) -> SenderSets:
    """Make the sender sets of a peer; raises CompositionError for a transport without key agreement."""
    agreement = endpoint.transport.agreement
    if agreement is None:
        raise CompositionError("exchange.secure needs a transport with key agreement; this one has none")
    numbers = {peer: client for client, peer in site.names.items()}
    graph_of = lru_cache(_ROUNDS)(topology.at)

    def planned(round: int, receiver: PeerId) -> list[PeerId]:
        client = numbers[receiver]
        neighbours = graph_of(round).neighbours(client) if client < topology.clients else []
        return [site.names[j] for j in neighbours if j in site.names]

    return SenderSets(endpoint, agreement, planned, deadline)


def check_agreement_keys(config: RunConfig, who: Identity, listed: MemberList) -> None:
    """Raise IdentityError unless the member list names the keys for secure sums, and the right one of this site."""
    if not config.exchange.secure:
        return
    taking_part = [member for member in listed.members if member.client < config.clients]
    if without := [member.site for member in taking_part if not member.agreement]:
        raise IdentityError(
            f"exchange.secure needs the agreement key of every site, and member list {listed.name!r} (version "
            f"{listed.version}) has none of {', '.join(without)}; have them added: peerlora members agree FILE --site "
            "SITE --agreement HEX, with what peerlora identity show tells at the site"
        )
    if listed.member(who.site).agreement != (own := agreement_public(who.key)):
        raise IdentityError(
            f"the member list names agreement key {str(listed.member(who.site).agreement)[:16]} for {who.site}, its "
            f"identity key gives {own[:16]}; have the list changed, or use the right folder"
        )
