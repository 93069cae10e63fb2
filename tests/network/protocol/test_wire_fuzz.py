"""Mutated frames: none is accepted, none does anything but raise Refused, and memory stays flat.

A mutant whose bytes are those of the message is skipped.  ``resealed`` mutants carry the right length and hash for
their mutated body, as a hostile member would send them: those may be accepted only as what the schema allows.
"""

import json
import random
import resource
import tracemalloc

import msgspec
import pytest
from frames_of import SCHEMA, Site, in_pieces, message, with_checksum
from hypothesis import given, settings
from hypothesis import strategies as st

from peerlora.network.base import PeerDown, Refused
from peerlora.network.identity.proof import check_proof
from peerlora.network.protocol.wire import read_body, read_header
from peerlora.network.transport.frames import read_refusal
from peerlora.network.transport.virtual_loop import virtual_run

EDGES = [b"\x00", b"\xff", b"\x7f", b"\x80", b"\xc0", b"\xdf\xff\xff\xff\xff", b"\xff" * 8, b"\x00" * 8, b"{}", b"\xcb"]
"""Bytes on which decoders stumble: extremes of lengths, msgpack's and JSON's openings."""


def flip(data, draw):
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def cut(data, draw):
    return data[: draw.randrange(len(data))]


def drop(data, draw):
    start = draw.randrange(len(data))
    return data[:start] + data[start + draw.randint(1, 16) :]


def insert(data, draw):
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.choice([*EDGES, draw.randbytes(draw.randint(1, 16))]) + data[place:]


def overwrite(data, draw):
    place, new = draw.randrange(len(data)), draw.choice([*EDGES, draw.randbytes(draw.randint(1, 8))])
    return data[:place] + new + data[place + len(new) :]


def splice(data, draw):
    one, other, size = draw.randrange(len(data)), draw.randrange(len(data)), draw.randint(1, 64)
    return data[:one] + data[other : other + size] + data[one + size :]


MUTATIONS = [flip, cut, drop, insert, overwrite, splice]


def mutated(data, draw):
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        data = draw.choice(MUTATIONS)(data, draw) if data else draw.randbytes(3)
    return data


def shuffled(pieces, draw):
    """Pieces in another order, missing, or twice; or the bytes of one of them mutated."""
    pieces = list(pieces)
    one, other = draw.randrange(len(pieces)), draw.randrange(len(pieces))
    kind = draw.randrange(8)
    if kind == 0:
        pieces[one], pieces[other] = pieces[other], pieces[one]
    elif kind == 1:
        del pieces[one]
    elif kind == 2:
        pieces.insert(other, pieces[one])
    elif kind < 6:
        pieces[0] = mutated(pieces[0], draw)
    else:
        pieces[one] = mutated(pieces[one], draw)
    return pieces


def resealed(body, draw):
    changed = mutated(body, draw)
    return in_pieces(with_checksum(changed), changed)


async def outcome(site, pieces):
    """``accepted``, ``broken-off`` or the reason for which it was refused; everything else fails the test."""
    try:
        got = await site.take(pieces)
    except PeerDown:
        return "broken-off"
    except Refused as refusal:
        assert refusal.reason != "internal"  # the transport's word for whatever else was raised
        return refusal.reason
    assert {name: (tuple(vector.shape), vector.dtype) for name, vector in got.items()} == SCHEMA
    assert all(vector.isfinite().all() for vector in got.values())
    return "accepted"


async def fuzz(site, count, seed):
    """How often each reason came, over ``count`` mutants of which every fourth is resealed."""
    draw = random.Random(seed)
    header, body = message()
    good = in_pieces(header, body)
    assert await outcome(site, good) == "accepted"
    reasons, done = {}, 0
    while done < count:
        seal = done % 4 == 3
        pieces = resealed(body, draw) if seal else shuffled(good, draw)
        if pieces[:1] == good[:1] and b"".join(pieces[1:]).startswith(body):
            continue  # what follows a whole message is not read
        reason = await outcome(site, pieces)
        assert seal or reason != "accepted", pieces
        reasons[reason] = reasons.get(reason, 0) + 1
        done += 1
    return reasons


async def check(count, seed):
    """Fuzz; over the last fifth, also look at what Python keeps, and at the most that it holds at once."""
    site = Site()
    reasons = await fuzz(site, count - count // 5, seed)
    tracemalloc.start()
    try:
        late = await fuzz(site, count // 5, seed + 1)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1 << 18 and peak < 1 << 20, (kept, peak)
    reasons = {reason: reasons.get(reason, 0) + late.get(reason, 0) for reason in reasons | late}
    assert sum(reasons.values()) == count
    assert {"bad-header", "bad-body", "bad-frame", "oversize", "broken-off"} <= reasons.keys()
    assert reasons.get("accepted", 0) < count / 4


def test_five_thousand_mutated_frames():
    virtual_run(check(5_000, 1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10, 20])
def test_a_hundred_thousand_mutated_frames(seed):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    virtual_run(check(60_000, seed))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # kB


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_any_bytes_as_a_header_are_a_header_or_refused(data):
    try:
        header = read_header(data)
    except Refused as refusal:
        assert refusal.reason == "bad-header"
    else:
        assert msgspec.msgpack.encode(header) == data


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100)
@given(st.sampled_from(["run", "kind", "round", "sender", "length", "sha256", "facts", "version", "else"]), TREES)
def test_any_value_in_a_header_is_right_or_refused(name, value):
    fields = msgspec.to_builtins(read_header(message()[0])) | {name: value}
    try:
        header = read_header(msgspec.msgpack.encode(fields))
    except Refused as refusal:
        assert refusal.reason == "bad-header"
    else:
        assert getattr(header, name) == value


@settings(max_examples=300)
@given(st.binary(max_size=600))
def test_any_bytes_as_a_body_are_refused(body):
    with pytest.raises(Refused):
        read_body(read_header(with_checksum(body)), body, SCHEMA)


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from([*SCHEMA, "other"]), TREES, max_size=5), st.binary(min_size=0, max_size=64))
def test_any_json_before_the_vectors_is_refused(entries, data):
    head = json.dumps(entries, default=lambda value: value.hex()).encode()
    head += b" " * (-len(head) % 8)
    body = len(head).to_bytes(8, "little") + head + data
    with pytest.raises(Refused):
        read_body(read_header(with_checksum(body)), body, SCHEMA)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_as_a_refusal_or_a_proof_do_no_harm(data):
    assert isinstance(read_refusal(data), Refused)
    with pytest.raises(Refused, match="wrong-proof"):
        check_proof(data, bytes(32), "b", "00" * 32, "a", "11" * 32)


def test_the_largest_announcement_costs_no_memory():
    async def main():
        site, (header, body) = Site(), message()
        for tracing in (False, True):  # the first time, things are made that stay
            if tracing:
                tracemalloc.start()
            assert await outcome(site, [(2**60).to_bytes(8, "big") + header]) == "oversize"
            assert await outcome(site, [(0).to_bytes(8, "big") + with_checksum(body, length=2**50)]) == "oversize"
        return tracemalloc.get_traced_memory()[1]

    try:
        assert virtual_run(main()) < 1 << 16
    finally:
        tracemalloc.stop()
