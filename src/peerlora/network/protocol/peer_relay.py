"""Relayed adapters of one real peer: its cache, the signatures of what is in it, and what it says in a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from peerlora.exchange.entry_pool import Entry
from peerlora.exchange.relay import RelayCache, RelayCaches
from peerlora.lora.adapters import Adapters
from peerlora.network.base import PeerId, Refused
from peerlora.network.protocol.pending_exchange import Decoder, OutgoingMessage
from peerlora.network.protocol.relay_messages import ROWS, ReceivedEntries, RelayFormat, SignedEntry
from peerlora.network.protocol.wire import Header

_SIGNATURES = "relay.signatures"  # by the side of the caches' tensors in a checkpoint

OnRefusal = Callable[[Header, Refused], None]
"""Told of an entry that was refused, and of the header of the message that it came in."""


class PeerRelay:
    """The entries that one peer holds, with their signatures, and its messages about them.

    A round: ``sign`` before the mixing, ``begin`` after it, ``versions`` and ``entries_for`` each neighbour, ``end``.
    ``caches``: of this client alone.  An entry keeps the signature that it came with, through checkpoints too, and is
    passed on as long as others can verify it.
    """

    def __init__(self, caches: RelayCaches, form: RelayFormat, on_refusal: OnRefusal):
        (self.client,), self.max_age = caches.clients, caches.settings.max_age
        self.caches, self.form, self.on_refusal = caches, form, on_refusal
        self.t = self.refused = 0
        """The present round, and the entries that were refused in it."""
        self._signatures: dict[tuple[int, int], bytes] = {}
        """(origin, version) -> signature, of what the cache holds."""
        self._announced: Int[np.ndarray, " client"] = self.cache.versions
        self._headers: dict[PeerId, Header] = {}

    @property
    def cache(self) -> RelayCache:
        """This client's cache; another one after a checkpoint was loaded."""
        return self.caches[self.client]

    # --- the mixing

    def sign(self, t: int, x: Adapters) -> dict[str, str | int]:
        """The facts for the header of the message that puts ``x`` into the mixing of round ``t``."""
        x = x.exchanged()
        entry = self._entry(self.client, t, x, 0, self.caches.rows[self.client])
        signature = self._signatures[entry.origin, entry.version] = self.form.sign(entry, x.spec)
        return self.form.facts(entry, signature)

    def noting(self, decode: Decoder) -> Decoder:
        """The decoder of the messages of one mixing, which also remembers their headers."""
        self._headers = headers = dict[PeerId, Header]()  # of its own: an earlier one may still end in another thread

        def decode_and_note(header: Header, body: bytearray) -> object:
            values = decode(header, body)
            headers[header.sender] = header
            return values

        return decode_and_note

    def begin(self, t: int, sent: Adapters, received: Adapters, senders: Mapping[int, PeerId]) -> None:
        """Begin the relay of round ``t`` with the entries that its mixing brought.

        ``sent``: [1] the own adapters.  ``received``: [sender] those of used links and the own ones, in the order of
        client numbers.  ``senders``: the clients of used links, and their sites.
        """
        own, others = sent.exchanged(), received.exchanged()
        self.t, self.refused, self.caches.layout = t, 0, own.spec
        self.caches.begin(t)
        mine = self._entry(self.client, t, own, 0, self.caches.rows[self.client])
        self._take(SignedEntry(mine, self._signatures.get((mine.origin, mine.version), b"")))
        for row, client in enumerate(sorted([self.client, *senders])):
            if client != self.client:
                self._take_mixed(self._headers[senders[client]], client, others, row)
        self._announced = self.cache.versions

    def _take_mixed(self, header: Header, client: int, x: Adapters, row: int) -> None:
        rows = header.facts.get(ROWS)
        entry = self._entry(client, self.t, x, row, rows if type(rows) is int else 0)
        try:
            self._take(self.form.check_mixed(entry, header.facts, x.spec))
        except Refused as refusal:
            self._refuse(header, refusal)

    @staticmethod
    def _entry(client: int, t: int, x: Adapters, row: int, rows: int) -> Entry:
        return Entry(client, t + 1, int(x.ranks[row]), rows, x.flat[row].detach())

    # --- the two exchanges after it

    def versions(self) -> OutgoingMessage:
        """What this client tells all its neighbours."""
        return self.form.encode_versions(self._announced)

    def decode_versions(self) -> Decoder:
        """The decoder of what they tell."""
        return partial(self.form.decode_versions, self.t)

    def entries_for(self, versions: Int[np.ndarray, " client"]) -> tuple[OutgoingMessage, int]:
        """The message for a neighbour that holds these versions, and how many entries are in it."""
        found = self.cache.entries(self.cache.lacking(versions))
        signed = [SignedEntry(each, self._signatures.get((each.origin, each.version), b"")) for each in found]
        sent = [each for each in signed if self.form.may_pass(each)]
        return self.form.encode_entries(sent, self.caches.layout), len(sent)

    def decode_entries(self) -> Decoder:
        """The decoder of what neighbours send; it gives the header too."""
        own, known, max_age = self.caches.pool.entry(int(self.cache.places[self.client])), self._announced, self.max_age
        if max_age is not None:  # an honest neighbour has dropped what is older
            known = np.maximum(known, self.t - max_age)
        decode = partial(self.form.decode_entries, self.t, known, own, self.caches.layout)
        return lambda header, body: (header, decode(header, body))

    def end(self, received: Mapping[int, tuple[Header, ReceivedEntries]]) -> None:
        """Take what the neighbours sent, by client, and end the round."""
        for client in sorted(received):
            header, found = received[client]
            for signed in found.good:
                self._take(signed)
            for refusal in found.refused:
                self._refuse(header, refusal)
        self.caches.end()
        facts = self.caches.pool.facts[self.caches.pool.used, :2].tolist()
        self._signatures = {(origin, version): self._signatures[origin, version] for origin, version in facts}

    def _take(self, signed: SignedEntry) -> None:
        if self.cache.take(signed.entry):
            self._signatures[signed.entry.origin, signed.entry.version] = signed.signature

    def _refuse(self, header: Header, refusal: Refused) -> None:
        self.refused += 1
        self.on_refusal(header, refusal)

    # --- checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """Return the cache, and the signature of every entry in its order; those are equally long."""
        pool = self.caches.pool
        signed = [self._signatures[origin, version] for origin, version in pool.facts[pool.used, :2].tolist()]
        size = len(signed[0]) if signed else 0
        flat = torch.tensor(list(b"".join(signed)), dtype=torch.uint8)
        return {**self.caches.state_dict(), _SIGNATURES: flat.view(len(signed), size)}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned."""
        self.caches.load_state_dict(saved)
        pool, rows = self.caches.pool, saved[_SIGNATURES].tolist()
        facts = pool.facts[pool.used, :2].tolist()
        self._signatures = {(origin, version): bytes(row) for (origin, version), row in zip(facts, rows, strict=True)}
