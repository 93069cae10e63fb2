"""Messages of relayed adapters between real peers, and every check of an entry before it is used.

In the mixing a header tells, beside the vectors, the sender's training rows (fact ``rows``) and its signature of the
entry that receivers make of the message (fact ``signed``).  After it two exchanges of the kind ``relay`` follow: each
end tells the versions that it holds, then sends what the other lacks.  That body is a safetensors file with a table of
the entries and their signatures, and after it one file per entry, with the vectors of its origin's own message.

An entry stands by its origin's signature alone, whoever hands it on.  So one that fails a check costs itself and none
of the others in its message, and no mixing: that a neighbour hands on what a third one made, or made one up, is
audited by its name, and changes nothing else.  Only a body that cannot be taken apart is refused whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from peerlora.exchange.entry_pool import Entry
from peerlora.exchange.payload import expected as expected_of
from peerlora.exchange.payload import stack_with_own, vectors, widest
from peerlora.exchange.relay import table_schema, versions_schema
from peerlora.exchange.schema import Schema
from peerlora.lora.adapters import Adapters, AdapterSpec
from peerlora.network.base import PeerId, Refused, Signatures
from peerlora.network.protocol.pending_exchange import OutgoingMessage
from peerlora.network.protocol.safetensors_reader import (
    claimed_shapes,
    is_finite,
    largest_body,
    read_vectors,
)
from peerlora.network.protocol.value_bounds import check_values
from peerlora.network.protocol.wire import Expected, Header, encode_body, read_body, read_files

ROWS, SIGNED = "rows", "signed"
"""Facts of the header of a message that is mixed."""
_MOST_ROWS = 2**31
_DOMAIN = "relayed adapter 1"


class SignedEntry(NamedTuple):
    """An entry and its origin's signature; empty where the transport authenticates nobody."""

    entry: Entry
    signature: bytes


class ReceivedEntries(NamedTuple):
    """The entries of one message that passed every check, and why the others did not."""

    good: list[SignedEntry]
    refused: list[Refused]


@dataclass(frozen=True)
class RelayFormat:
    """Encoder and decoder of entries in one run.

    ``clients``: of the run.  ``most``: entries, at most, of one message: no client passes on more than it keeps.
    ``sites``: client -> site, of all that the member list names.  ``signatures``: of the transport; None where it
    authenticates nobody, and then entries are not signed.
    """

    expected: Expected
    clients: int
    most: int
    sites: Mapping[int, PeerId]
    signatures: Signatures | None

    # --- signatures

    def sign(self, entry: Entry, layout: AdapterSpec) -> bytes:
        """Sign this site's own entry; nothing where the transport authenticates nobody."""
        return self.signatures.sign(self._statement(entry, layout)) if self.signatures else b""

    def facts(self, entry: Entry, signature: bytes) -> dict[str, str | int]:
        """The facts of a header by which a receiver makes this entry of the message, and may pass it on."""
        return {ROWS: entry.rows} | ({SIGNED: signature.hex()} if signature else {})

    def check_mixed(self, entry: Entry, facts: Mapping[str, object], layout: AdapterSpec) -> SignedEntry:
        """Return the entry in a neighbour's message of the mixing; raises Refused where it cannot be passed on.

        ``facts``: of the message's header.
        """
        try:
            signature = _signature_in(facts)
            self._check_signed(entry, signature, layout)
        except Refused as refusal:
            raise self._named(entry.origin, entry.version, refusal) from None
        return SignedEntry(entry, signature)

    def may_pass(self, signed: SignedEntry) -> bool:
        """Whether other sites can verify an entry: its origin is on the list still, under the key that signed."""
        site = self.sites.get(signed.entry.origin, "")
        return self.signatures is None or self.signatures.current(site, signed.signature)

    def _check_signed(self, entry: Entry, signature: bytes, layout: AdapterSpec) -> None:
        """Raise Refused for an entry that its origin did not sign as it is."""
        if not 1 <= entry.rows <= _MOST_ROWS:
            raise Refused("bad-header", f"{entry.rows} training rows; expected 1 to {_MOST_ROWS}")
        site = self.sites.get(entry.origin)
        if site is None or entry.origin >= self.clients:
            raise Refused("unknown-origin", f"the run has clients 0 to {self.clients - 1}")
        if self.signatures is not None:
            self.signatures.verify(site, self._statement(entry, layout), signature)

    def _statement(self, entry: Entry, layout: AdapterSpec) -> bytes:
        """What the origin of an entry signs: all that it is, in this run alone.

        The digest covers the bytes of the vectors as they cross, in the order of the layout, which the run's spec and
        the rank give; base model and spec are those of the run.
        """
        digest = hashlib.sha256()
        for vector in entry_vectors(entry, layout).values():
            digest.update(vector.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        signed = [_DOMAIN, self.expected.run, self.expected.base, self.expected.spec, entry.origin, entry.version]
        signed += [entry.rank, entry.rows, str(entry.values.dtype), list(layout.blocks), digest.hexdigest()]
        return json.dumps(signed, separators=(",", ":")).encode()

    # --- versions

    def encode_versions(self, versions: Int[np.ndarray, " client"]) -> OutgoingMessage:
        """The message that tells which versions this client holds."""
        return OutgoingMessage(encode_body({"versions": torch.from_numpy(versions.astype(np.int64))}))

    def decode_versions(self, t: int, header: Header, body: bytearray) -> Int[np.ndarray, " client"]:
        """The versions that a neighbour holds in round ``t``; raises Refused."""
        found = read_body(header, body, versions_schema(self.clients))["versions"]
        if bool((found < 0).any()):
            raise Refused("bad-body", "a version below 0")
        if int(found.max()) > t + 1:
            raise Refused("from-the-future", f"version {int(found.max())} held in round {t}")
        return found.numpy().copy()

    # --- entries

    def encode_entries(self, sent: Sequence[SignedEntry], layout: AdapterSpec) -> OutgoingMessage:
        """The message with these entries."""
        table = [[entry.origin, entry.version, entry.rows] for entry, _ in sent]
        first = {"entries": torch.tensor(table, dtype=torch.int64).view(-1, 3)}
        if self.signatures is not None:
            signed = bytearray(b"".join(signature for _, signature in sent))
            flat = torch.frombuffer(signed, dtype=torch.uint8) if signed else torch.zeros(0, dtype=torch.uint8)
            first["signatures"] = flat.view(-1, self.signatures.size)
        files = [encode_body(first), *(encode_body(entry_vectors(entry, layout)) for entry, _ in sent)]
        return OutgoingMessage(b"".join(files))

    def decode_entries(
        self,
        t: int,
        known: Int[np.ndarray, " client"],
        own: Entry,
        layout: AdapterSpec,
        header: Header,
        body: bytearray,
    ) -> ReceivedEntries:
        """The entries of a neighbour's message in round ``t``; raises Refused for a message that is none.

        ``known``: by origin, the version beyond which this client takes one.  ``own``: its own entry.
        """
        like = _adapters(own, layout)
        parts = [self._table_schema(self.most), widest((like,))]
        files = read_files(header, body, lambda number: parts[min(number, 1)], 1 + self.most)
        if not files:
            raise Refused("bad-body", "no table of entries")
        rows, *_ = (*claimed_shapes(files[0], parts[0]).get("entries", ()), 0)
        count = min(rows, self.most)
        table = read_vectors(files[0], self._table_schema(count))
        if len(files) != 1 + count:
            raise Refused("bad-body", f"{len(files) - 1} entries came, the table has {count}")
        mine, good, refused, origins = entry_vectors(own, layout), [], [], set[int]()
        for number, (origin, version, rows) in enumerate(table["entries"].tolist()):
            signature = bytes(table["signatures"][number].tolist()) if self.signatures else b""
            try:
                if origin in origins:
                    raise Refused("stale-version", "a second entry of this origin")
                origins.add(origin)
                self._check_wanted(t, known, origin, version)
                entry = _read_entry(files[1 + number], like, origin, version, rows)
                self._check_signed(entry, signature, layout)
                _check_values(mine, entry, layout)
                good.append(SignedEntry(entry, signature))
            except Refused as refusal:
                refused.append(self._named(origin, version, refusal))
        return ReceivedEntries(good, refused)

    def _check_wanted(self, t: int, known: Int[np.ndarray, " client"], origin: int, version: int) -> None:
        """Raise Refused for an entry that no honest neighbour passes on to this client in round ``t``."""
        if not 0 <= origin < self.clients:
            raise Refused("unknown-origin", f"the run has clients 0 to {self.clients - 1}")
        if version > t:  # one link a round: an entry of this round is in its origin's own message only
            raise Refused("from-the-future", f"in round {t}")
        if version <= known[origin]:
            raise Refused("stale-version", f"expected one after version {known[origin]}")

    def _table_schema(self, entries: int) -> Schema:
        found = table_schema(entries)
        if self.signatures is not None:
            found["signatures"] = ((entries, self.signatures.size), torch.uint8)
        return found

    def _named(self, origin: int, version: int, refusal: Refused) -> Refused:
        """The refusal with the entry that it is of."""
        site = self.sites.get(origin, "of no site")
        return Refused(refusal.reason, f"adapter of client {origin} ({site}), version {version}: {refusal.detail}")

    def largest(self, start: Adapters) -> int:
        """The most bytes of body that a message of relayed adapters may have; ``start``: any adapters of the run."""
        entry = widest((start.exchanged().rows([0]),))
        every = largest_body(self._table_schema(self.most)) + self.most * largest_body(entry)
        return max(every, largest_body(versions_schema(self.clients)))


def _signature_in(facts: Mapping[str, object]) -> bytes:
    """The signature that a header tells; empty where it tells none."""
    signed = facts.get(SIGNED, "")
    try:
        return bytes.fromhex(signed if isinstance(signed, str) else "")
    except ValueError:
        raise Refused("bad-signature", "not hexadecimal") from None


def entry_vectors(entry: Entry, layout: AdapterSpec) -> dict[str, Tensor]:
    """The vectors of an entry as its origin's message has them: by name, at the origin's rank."""
    return vectors((_adapters(entry, layout),))


def _adapters(entry: Entry, layout: AdapterSpec) -> Adapters:
    return Adapters(layout, entry.values[None], torch.tensor([entry.rank]))


def _read_entry(file: memoryview, like: Adapters, origin: int, version: int, rows: int) -> Entry:
    """Decode one entry, whose values may still be any; ``like``: adapters of the same layout."""
    schema = expected_of((like,), claimed_shapes(file, widest((like,))))
    (x,) = stack_with_own((like,), [read_vectors(file, schema, finite=False)])
    return Entry(origin, version, int(x.ranks[0]), rows, x.flat[0])


def _check_values(own: Mapping[str, Tensor], entry: Entry, layout: AdapterSpec) -> None:
    """Raise Refused for values that are not finite, or far from the own vectors."""
    given = entry_vectors(entry, layout)
    for name, vector in given.items():
        if not is_finite(vector):
            raise Refused("not-finite", name)
    check_values(own, given)
