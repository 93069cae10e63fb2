"""Wire format of a message: a strict header (msgpack) and a safetensors body, and every check before use.

Needs msgspec (the extra ``peer``).  Schemas of messages are in ``exchange/schema.py``.

A receiver checks in this order: ``read_header`` (is it a header at all?), ``Expected.check`` (of this run, this base
model, this adapter, by the peer that the channel names?), ``admission`` (late, from-the-future, replay), and only then
admits the body, which ``read_body`` compares with the schema.  Nothing is ever unpickled.  Each refusal is a
``Refused`` whose reason is one of ``network.base.REASONS``.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from safetensors.torch import save
from torch import Tensor

from peerlora.exchange.schema import Schema, encoded_bytes
from peerlora.network.base import HEADER_BYTES, PeerId, Refused
from peerlora.network.protocol.safetensors_reader import (
    Shapes,
    Whole,
    claimed_shapes,
    file_length,
    largest_body,
    read_vectors,
)

__all__ = ["EXCHANGED", "VERSION", "Expected", "Header", "Kind", "Schema", "encode_body", "encode_header"]
__all__ += ["encoded_bytes", "largest_body", "message_facts", "pack", "read_body", "read_claimed", "read_header"]
__all__ += ["KEY_BYTES", "WORD_LENGTH", "encode_table", "read_files", "read_table", "with_checksum"]

VERSION = 1
Kind = Literal["hello", "ask", "state", "mix", "relay", "push", "senders", "bye"]
EXCHANGED: tuple[Kind, ...] = ("mix", "relay")
"""Kinds whose messages belong to a numbered exchange of a round."""
WORD_LENGTH = 128
Word = Annotated[str, Meta(min_length=1, max_length=WORD_LENGTH)]
Hash = Annotated[str, Meta(max_length=64, pattern=r"^[0-9a-f]*\Z")]
Round = Annotated[int, Meta(ge=-20_000, le=2**53)]
KEY_BYTES = 32
Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Fact = int | Annotated[str, Meta(max_length=1024)]


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Header of a message; at most ``HEADER_BYTES`` when encoded, unknown fields are refused."""

    version: Literal[1] = VERSION
    run: Word
    """Id of the run: equal on all peers of one run, different for the next run."""
    kind: Kind
    """``mix``: vectors of one exchange; ``relay``: relayed adapters, in an exchange after it; ``ask`` for a state and
    ``state``, the answer; ``push``: outside of rounds; ``senders``: whose secure sum the sender asks for; ``hello``:
    handshake and probe; ``bye``: reserved."""
    round: Round = 0
    """Below 0 before the first round, while clients sum label counts."""
    step: Whole = 0
    """Number of the exchange within the round, from 0."""
    sender: Word
    """Name that the sender claims; only ever compared with the name that the channel proved."""
    base: Hash = ""
    """Hash of the base model."""
    spec: Hash = ""
    """Hash of the adapter's spec."""
    codec: Literal["identity", "difference"] = "identity"
    """``difference``: the body holds an encoded difference, not values; ``facts`` name the replica it builds on."""
    length: Whole = 0
    """Bytes of body; set by ``pack``."""
    sha256: Hash = ""
    """Of the body, hexadecimal; set by ``pack``."""
    facts: Annotated[dict[Annotated[str, Meta(max_length=64)], Fact], Meta(max_length=64)] = {}
    """Facts of a kind beside vectors, such as the outcomes of the last exchanges."""


@dataclass(frozen=True)
class Expected:
    """Facts that every message of a run must agree with."""

    run: str
    base: str
    spec: str

    def check(self, header: Header, sender: PeerId) -> None:
        """Raise Refused unless ``header`` is of this run and by ``sender``, the name that the channel proved."""
        if header.sender != sender:
            raise Refused("wrong-sender", f"calls itself {header.sender}, the channel says {sender}")
        for reason, given, own in (
            ("wrong-run", header.run, self.run),
            ("wrong-base", header.base, self.base),
            ("wrong-spec", header.spec, self.spec),
        ):
            if given != own:
                raise Refused(reason, f"{given[:16] or 'none'} given, {own[:16] or 'none'} expected")


def pack(header: Header, tensors: Mapping[str, Tensor]) -> tuple[bytes, bytes]:
    """Encode a message: header, with the body's length and hash filled in, and body (empty for no tensors)."""
    body = encode_body(tensors)
    return encode_header(with_checksum(header, body)), body


def encode_body(tensors: Mapping[str, Tensor]) -> bytes:
    """Encode vectors as safetensors; nothing for no vectors."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}) if tensors else b""


def with_checksum(header: Header, body: bytes) -> Header:
    """Add the body's length and hash to a header."""
    return msgspec.structs.replace(header, length=len(body), sha256=hashlib.sha256(body).hexdigest())


def encode_header(header: Header) -> bytes:
    """Encode a header."""
    encoded = msgspec.msgpack.encode(header)
    _decode(encoded)  # a header that the receiver would refuse is a fault of this code, and fails here
    return encoded


def read_header(data: bytes, most: int | None = None) -> Header:
    """Decode a header; Refused is ``oversize`` past HEADER_BYTES or ``most`` bytes of body, else ``bad-header``."""
    if len(data) > HEADER_BYTES:
        raise Refused("oversize", f"header of {len(data)} bytes; at most {HEADER_BYTES}")
    try:
        header = _decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Refused("bad-header", str(error)[:200]) from None
    if msgspec.msgpack.encode(header) != data:
        raise Refused("bad-header", "not in its one canonical form")  # repeated or reordered fields, other int widths
    if most is not None:
        check_length(header, most)
    return header


def check_length(header: Header, most: int) -> None:
    """Raise Refused where a header announces more than ``most`` bytes of body."""
    if header.length > most:
        raise Refused("oversize", f"body of {header.length} bytes announced; at most {most}")


def _decode(data: bytes) -> Header:
    return msgspec.msgpack.decode(data, type=Header)


def message_facts(data: bytes) -> dict[str, int | str]:
    """Facts of a message for an audit log, from its header; none for a header that cannot be decoded."""
    try:
        header = read_header(data)
    except Refused:
        return {}
    return {"kind": header.kind, "round": header.round, "step": header.step, "sha256": header.sha256}


def read_body(header: Header, body: bytes | bytearray | memoryview, schema: Schema) -> dict[str, Tensor]:
    """Decode a body whose names, shapes and dtypes must be exactly those of ``schema``, all values finite.

    The vectors are views of ``body`` where it can be written to.  Hashing takes a millisecond per MB: keep it off an
    event loop.  Raises Refused: ``oversize``, ``bad-body``, ``unknown-vector``, ``not-finite``.
    """
    view = memoryview(body).cast("B")
    if len(view) > largest_body(schema):
        raise Refused("oversize", f"body of {len(view)} bytes; at most {largest_body(schema)}")
    _complete(header, view)
    return read_vectors(view, schema)


def read_claimed(
    header: Header, body: bytes | bytearray | memoryview, widest: Schema, schema: Callable[[Shapes], Schema]
) -> dict[str, Tensor]:
    """Decode a body whose schema depends on the shapes that it claims for its vectors; see ``read_body``.

    ``widest``: the schema with the most vectors that it could have.  ``schema``: from the claimed shapes to the schema.
    """
    view = memoryview(body).cast("B")
    _complete(header, view)
    expected = schema(claimed_shapes(view, widest))
    if len(view) > largest_body(expected):
        raise Refused("oversize", f"body of {len(view)} bytes; at most {largest_body(expected)}")
    return read_vectors(view, expected)


def read_table(header: Header, body: bytes | bytearray | memoryview, most: int) -> dict[str, bytes]:
    """Decode a body that maps names to keys of 32 bytes, in one canonical form with rising names; raises Refused."""
    view = memoryview(body).cast("B")
    _complete(header, view)
    try:
        table = msgspec.msgpack.decode(view, type=dict[Word, Key])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Refused("bad-body", str(error)[:200]) from None
    if len(table) > most or encode_table(table) != view:
        raise Refused("bad-body", f"more than {most} names, or not in their one canonical form")
    return table


def encode_table(table: Mapping[str, bytes]) -> bytes:
    """Encode a map of names to keys."""
    return msgspec.msgpack.encode(dict(sorted(table.items())))


def read_files(
    header: Header, body: bytes | bytearray | memoryview, widest: Callable[[int], Schema], most: int
) -> list[memoryview]:
    """Split a body of several safetensors files, one after the other; each is still to be read by its schema.

    ``widest``: from a file's number to the schema with the most vectors that it could have.  ``most``: files, at most.
    Raises Refused.
    """
    view = memoryview(body).cast("B")
    _complete(header, view)
    files: list[memoryview] = []
    while len(view):
        if len(files) == most:
            raise Refused("oversize", f"more than {most} parts")
        length = file_length(view, widest(len(files)))
        if length > len(view):
            raise Refused("bad-body", f"part {len(files)} is cut off")
        files.append(memoryview(bytearray(view[:length])))  # of its own memory, where its values are aligned
        view = view[length:]
    return files


def _complete(header: Header, view: memoryview) -> None:
    """Raise Refused unless the bytes are those that the header announced; called before any of them is parsed."""
    if len(view) != header.length:
        raise Refused("bad-body", f"{len(view)} bytes came, {header.length} were announced")
    if not hmac.compare_digest(hashlib.sha256(view).hexdigest(), header.sha256):
        raise Refused("bad-body", "its SHA-256 is not the announced one")
