"""Admission of messages: what of a header is acceptable, and what a peer notes of its sender."""

from __future__ import annotations

from peerlora.network.base import PeerId, Refused
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.link_history import LAST, ExchangeStep
from peerlora.network.protocol.wire import EXCHANGED, Header, read_header

_AHEAD = 1  # rounds that a neighbour may be ahead and its message waits; one from further ahead is refused


class Admission:
    """Policy of a peer with common rounds; what it refuses leaves no trace."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint

    def read(self, peer: PeerId, data: bytes) -> Header:
        """Decode the header of a message that could be a neighbour's; raises Refused.  Nothing is remembered yet."""
        peers = self.endpoint.peers
        if peer not in peers.neighbours:  # a member list without edges lets everybody on it through to here
            raise Refused("not-a-neighbour", "this run links the two in no round")
        header = read_header(data)
        try:
            self.endpoint.expected.check(header, peer)
        except Refused as refusal:
            peers.record_refusal(peer, refusal)
            raise
        if header.round > self.endpoint.rounds:
            raise Refused("from-the-future", f"round {header.round} given, the run has {self.endpoint.rounds}")
        if header.kind != "hello" and peer in peers.mismatched:
            raise Refused("wrong-config", peers.mismatched[peer])
        if not LAST.fullmatch(_last_outcomes(header)):
            raise Refused("bad-header", "last")
        return header

    def note(self, peer: PeerId, header: Header) -> None:
        """Remember what a message says of its sender.

        Only of one that is taken, or that would have been at another time: whatever else is refused leaves no trace.
        """
        self.endpoint.peers.last_step[peer] = ExchangeStep(header.round, header.step)
        self.endpoint.history.record_claim(peer, _last_outcomes(header), self.endpoint.at)
        self.endpoint.peers.mark_present(peer)

    def check_timely(self, peer: PeerId, step: ExchangeStep) -> None:
        """Raise Refused for a message whose exchange is over, or too far ahead."""
        at = self.endpoint.at
        if step < at:
            taken = self.endpoint.history.used(peer, step)
            raise Refused("replay" if taken else "late", f"round {step.round} given, now in round {at.round}")
        if step.round > at.round + _AHEAD:
            raise Refused("from-the-future", f"round {step.round} given, now in round {at.round}")


class PushOnlyAdmission(Admission):
    """Policy of a peer without common rounds: no message belongs to an exchange."""

    def read(self, peer: PeerId, data: bytes) -> Header:
        """See Admission; refuses every message of an exchange."""
        header = super().read(peer, data)
        if header.kind in EXCHANGED:
            raise Refused("unexpected", "the method of this run has no common rounds")
        return header


def _last_outcomes(header: Header) -> str:
    return str(header.facts.get("last", ""))
