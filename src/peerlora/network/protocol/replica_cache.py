"""Cache of a real peer's neighbours' replicas (CHOCO), kept equal to the owners' whatever messages are lost."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from peerlora.exchange.replicas import REPLICA, Difference, advanced
from peerlora.network.base import PeerId, Refused
from peerlora.network.protocol.pending_exchange import OutgoingMessage
from peerlora.network.protocol.value_bounds import check_values
from peerlora.network.protocol.wire import Header, Schema, encode_body, read_body

_BUILDS_ON = "builds on"


class ReplicaCache:
    """One client's copies of its neighbours' replicas (CHOCO's xhat), all blocks in one row; at first the common start.

    A replica is public: its owner advances it once an exchange, whether or not the message arrives.  A difference names
    the replica that it builds on, by a hash of its bits, and is added to that very replica only.  Where the receiver
    has another (a message was lost, the link was not used, one of the two restarted or adopted a state) it refuses with
    ``no-replica``, and is sent the full new replica in the same exchange.  So whenever a link is used, both its ends
    mix the same two replicas, to the bit, and what one end gains the other loses: the mean over clients is kept.
    """

    def __init__(self, start: Float[Tensor, "1 parameter"]):
        self._start = start
        self._of: dict[PeerId, Tensor] = {}

    def of(self, peer: PeerId) -> Float[Tensor, "1 parameter"]:
        """The copy of one neighbour's replica."""
        return self._of.get(peer, self._start)

    def put(self, peer: PeerId, places: Integer[Tensor, " scalar"], part: Float[Tensor, "1 scalar"]) -> None:
        """Store what ``decode`` made of a neighbour's message, once its link is used."""
        self._of[peer] = self.of(peer).index_copy(1, places.to(part.device), part)

    def decode(self, sent: Difference, header: Header, body: bytearray) -> Float[Tensor, "1 scalar"]:
        """A neighbour's replica after its message, where this client sends ``sent``; raises Refused."""
        if header.codec == "identity":
            values = read_body(header, body, replica_schema(sent.before.shape[1], sent.before.dtype))
            check_values({REPLICA: sent.after}, values)
            return values[REPLICA][None].to(sent.before.device)
        before = self.of(header.sender)[:, sent.places]
        if header.facts.get(_BUILDS_ON) != fingerprint(before):
            raise Refused("no-replica", f"round {header.round}")
        schema = {name: (tuple(value.shape[1:]), value.dtype) for name, value in sent.message.items()}
        values = read_body(header, body, schema)
        message = {name: value[None].to(before.device) for name, value in values.items()}
        if fault := sent.fault(message):
            raise Refused("bad-body", fault)
        after = advanced(before, sent.decode(message))
        if not bool(after.isfinite().all()):
            raise Refused("not-finite", "the replica with this difference")
        check_values({REPLICA: sent.after}, {REPLICA: after})
        return after


def outgoing(sent: Difference) -> OutgoingMessage:
    """The message for one client's difference."""
    after = sent.after
    return OutgoingMessage(
        body=encode_body({name: value[0] for name, value in sent.message.items()}),
        codec="difference",
        facts={_BUILDS_ON: fingerprint(sent.before)},
        full_replica=lambda: encode_body({REPLICA: after[0]}),
    )


def replica_schema(scalars: int, dtype: torch.dtype) -> Schema:
    """Schema of a message that holds a full replica."""
    return {REPLICA: ((scalars,), dtype)}


def fingerprint(replica: Float[Tensor, "1 scalar"]) -> str:
    """Hash of the bits: SHA-256, hexadecimal."""
    return hashlib.sha256(replica.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
