"""The frame: what is sent comes back to the bit; everything else is refused by name of the reason."""

import hashlib
import json
import struct
import tracemalloc

import msgspec
import pytest
import torch
from frames_of import ABOUT, EXPECTED, SCHEMA, Site, in_pieces, message, take, vectors, with_checksum
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load, save

from peerlora.network.base import HEADER_BYTES, REASONS, PeerDown, Refused
from peerlora.network.protocol.wire import (
    Header,
    largest_body,
    message_facts,
    pack,
    read_body,
    read_claimed,
    read_header,
)
from peerlora.network.transport.virtual_loop import virtual_run


def refused(reason, *call):
    with pytest.raises(Refused) as error:
        call[0](*call[1:])
    assert error.value.reason == reason, error.value
    return error.value


def test_a_message_comes_back_to_the_bit():
    header, body = message()
    got = take(in_pieces(header, body))
    assert list(got) == list(SCHEMA)
    assert all(torch.equal(got[name], vector) and got[name].dtype == vector.dtype for name, vector in vectors().items())
    for data in (bytes(body), bytearray(body), memoryview(body)):
        again = read_body(read_header(header), data, SCHEMA)
        assert all(torch.equal(again[name], vector) for name, vector in vectors().items())


def test_an_auditor_can_open_a_captured_body():
    header, body = message()
    assert all(torch.equal(load(body)[name], vector) for name, vector in vectors().items())
    said = message_facts(header)
    assert said == {"kind": "mix", "round": 3, "step": 1, "sha256": hashlib.sha256(body).hexdigest()}
    assert message_facts(b"?") == {}


@given(
    arrays.arrays(
        "float64", arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5), elements=st.floats(-1e9, 1e9)
    ),
    st.sampled_from(
        [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]
    ),
)
def test_every_shape_and_dtype_comes_back(values, dtype):
    vector = torch.from_numpy(values).nan_to_num().clamp(-100, 100).to(dtype)
    schema = {"x": (tuple(vector.shape), dtype), "y": ((3,), torch.float32)}
    header, body = pack(ABOUT, {"x": vector, "y": torch.ones(3)})
    got = read_body(read_header(header, largest_body(schema)), bytearray(body), schema)
    assert torch.equal(got["x"], vector) and got["x"].shape == vector.shape and got["x"].dtype == dtype


def test_a_message_without_vectors_has_an_empty_body():
    header, body = pack(Header(run="r", kind="hello", sender="a", facts={"round": 7, "note": "x"}), {})
    read = read_header(header, 0)
    assert body == b"" and read.facts == {"round": 7, "note": "x"} and read_body(read, b"", {}) == {}
    refused("oversize", read_body, read, b"x", {})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run": "run-2"}, "wrong-run"),
        ({"base": "00" * 32}, "wrong-base"),
        ({"base": ""}, "wrong-base"),
        ({"spec": "00" * 32}, "wrong-spec"),
        ({"sender": "b"}, "wrong-sender"),
    ],
)
def test_headers_of_something_else_are_refused(changes, reason):
    header, _ = message(**changes)
    refused(reason, EXPECTED.check, read_header(header), "a")
    EXPECTED.check(read_header(message()[0]), "a")


def tree(**changes):
    return msgspec.msgpack.encode(msgspec.to_builtins(read_header(message()[0])) | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": 1},
        {"version": 2},
        {"version": "1"},
        {"kind": "run"},
        {"round": -20_001},
        {"round": 1.0},
        {"round": 2**60},
        {"step": None},
        {"run": ""},
        {"run": "x" * 129},
        {"run": b"run-1"},
        {"base": "AB" * 32},
        {"base": "ab" * 33},
        {"sha256": "zz"},
        {"codec": "pickle"},
        {"length": -1},
        {"facts": {"x": 1.5}},
        {"facts": {"x": [1]}},
        {"facts": {str(i): i for i in range(65)}},
        {"facts": {"x" * 65: 1}},
        {"facts": {"x": "y" * 1025}},
        {"facts": None},
    ],
    ids=str,
)
def test_headers_with_impossible_values_are_refused(changes):
    read_header(tree())
    refused("bad-header", read_header, tree(**changes))


@pytest.mark.parametrize("missing", ["run", "kind", "sender"])
def test_headers_without_a_needed_field_are_refused(missing):
    fields = msgspec.to_builtins(read_header(message()[0]))
    del fields[missing]
    refused("bad-header", read_header, msgspec.msgpack.encode(fields))


def test_a_header_has_one_form_only():
    header, _ = message()
    fields = msgspec.to_builtins(read_header(header))
    refused("bad-header", read_header, msgspec.msgpack.encode(dict(reversed(fields.items()))))
    refused("bad-header", read_header, header + b"\x00")
    refused("bad-header", read_header, b"")
    twice = bytes([header[0] + 1]) + header[1:] + msgspec.msgpack.encode("round") + msgspec.msgpack.encode(9)
    refused("bad-header", read_header, twice)
    wide = header.replace(b"\xa5round\x03", b"\xa5round\xcc\x03")
    assert wide != header
    refused("bad-header", read_header, wide)
    refused("bad-header", read_header, b"\x91" * 60_000)  # nested far deeper than any header


def test_what_is_too_large_is_refused_before_it_is_read():
    refused("oversize", read_header, b"\x00" * (HEADER_BYTES + 1))
    refused("oversize", read_header, with_checksum(b"", length=largest_body(SCHEMA) + 1), largest_body(SCHEMA))
    refused("oversize", read_header, with_checksum(b"", length=2**50), largest_body(SCHEMA))
    body = bytes(largest_body(SCHEMA) + 1)
    refused("oversize", read_body, read_header(with_checksum(body)), body, SCHEMA)


def taken(body, schema=SCHEMA):
    return read_body(read_header(with_checksum(body)), bytearray(body), schema)


def changed(**changes):
    return {name: value for name, value in (vectors() | changes).items() if value is not None}


POISON = {
    "another shape": (changed(head=torch.ones(6, dtype=torch.float64)), "bad-body"),
    "a transposed shape": (changed(**{"q.A": vectors()["q.B"]}), "bad-body"),
    "another dtype of the same size": (changed(head=torch.ones(5, dtype=torch.int64)), "bad-body"),
    "another dtype": (changed(head=torch.ones(5)), "bad-body"),
    "a vector more": (changed(z=torch.ones(1)), "unknown-vector"),
    "a vector under another name": (changed(head=None, tail=vectors()["head"]), "unknown-vector"),
    "a vector less": (changed(head=None), "bad-body"),
    "nothing": ({}, "bad-body"),
    "NaN": (changed(head=torch.tensor([1, 2, float("nan"), 4, 5], dtype=torch.float64)), "not-finite"),
    "infinity": (changed(half=torch.full((7,), float("inf"), dtype=torch.bfloat16)), "not-finite"),
    "minus infinity": (changed(**{"q.A": torch.full((3, 8), float("-inf"))}), "not-finite"),
}


@pytest.mark.parametrize("what", POISON)
def test_poison_is_refused_though_its_hash_is_right(what):
    tensors, reason = POISON[what]
    refused(reason, taken, save(tensors))


@pytest.mark.parametrize("position", [0, 1, 11, 23])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(position, value):
    poisoned = vectors()
    poisoned["q.A"].view(-1)[position] = value
    refused("not-finite", taken, save(poisoned))


def laid_out(entries, data, pad=8):
    """A safetensors file written by hand."""
    head = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    head += b" " * (-len(head) % pad)
    return struct.pack("<Q", len(head)) + head + data


ONE = {"x": ((4,), torch.float32), "y": ((2,), torch.float32)}
X, Y = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]}
DATA = struct.pack("<6f", *range(6))


def test_a_file_written_by_hand_is_read():
    got = taken(laid_out({"x": X, "y": Y}, DATA), ONE)
    assert got["x"].tolist() == [0, 1, 2, 3] and got["y"].tolist() == [4, 5]
    other = {"y": Y | {"data_offsets": [0, 8]}, "x": X | {"data_offsets": [8, 24]}}
    assert taken(laid_out(other, DATA), ONE)["x"].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "entries",
    [
        {"x": X, "y": Y | {"data_offsets": [8, 16]}},  # overlap
        {"x": X, "y": Y | {"data_offsets": [0, 8]}},
        {"x": X, "y": Y | {"data_offsets": [20, 28]}},  # gap
        {"x": X, "y": Y | {"data_offsets": [24, 16]}},
        {"x": X, "y": Y | {"data_offsets": [16, 2**62]}},
        {"x": X, "y": Y | {"data_offsets": [-8, 0]}},
        {"x": X, "y": Y | {"data_offsets": [16]}},
        {"x": X, "y": Y | {"shape": [2, 1]}},
        {"x": X, "y": Y | {"shape": [-2]}},
        {"x": X, "y": Y | {"shape": [2.0]}},
        {"x": X, "y": Y | {"shape": [1] * 9}},
        {"x": X, "y": Y | {"dtype": "I32"}},
        {"x": X, "y": Y | {"dtype": 5}},
        {"x": X, "y": Y | {"more": 1}},
        {"x": X, "y": {"dtype": "F32", "shape": [2]}},
        {"x": X, "y": None},
        [X, Y],
        b"{",
        b"[" * 96,
        b'{"x":' * 19,
        b"\xff" * 96,
    ],
    ids=str,
)
def test_bodies_whose_own_header_lies_are_refused(entries):
    refused("bad-body", taken, laid_out(entries, DATA), ONE)


def test_metadata_and_repeated_names_are_refused():
    refused("unknown-vector", taken, laid_out({"__metadata__": X, "x": X, "y": Y}, DATA), ONE)
    refused("bad-body", taken, laid_out({"__metadata__": {"format": "pt"}, "x": X, "y": Y}, DATA), ONE)
    doubled = (
        json.dumps({"x": X, "y": Y}).encode()[:-1] + b', "y": ' + json.dumps(Y | {"data_offsets": [0, 8]}).encode()
    )
    refused("bad-body", taken, laid_out(doubled + b"}", DATA), ONE)


@pytest.mark.parametrize("size", [0, 1, 7, 2**31, 2**63, 2**64 - 1, 2**64 - 8])
def test_an_impossible_length_of_the_bodys_own_header_is_refused(size):
    good = laid_out({"x": X, "y": Y}, DATA)
    refused("bad-body", taken, struct.pack("<Q", size) + good[8:], ONE)


def test_truncated_and_lengthened_bodies_are_refused():
    header, body = message()
    for size in range(0, len(body), 7):
        refused("bad-body", read_body, read_header(header), body[:size], SCHEMA)
        refused("bad-body", taken, body[:size])
    refused("bad-body", read_body, read_header(header), body + b"\0", SCHEMA)
    refused("bad-body", taken, body + b"\0" * 8)


def test_reordered_missing_and_repeated_pieces_are_refused():
    first, *rest = in_pieces(*message())
    assert len(rest) > 3
    take([first, *rest])
    refused("bad-body", take, [first, rest[1], rest[0], *rest[2:]])
    refused("bad-body", take, [first, rest[0], rest[0], *rest[2:]])
    refused("bad-frame", take, [first, rest[0], b"", *rest[1:]])
    refused("bad-frame", take, [first, *rest[:-1], rest[-1] + b"x"])
    refused("bad-frame", take, [])
    refused("bad-frame", take, [b"1234567"])


def test_a_message_whose_call_ends_before_it_is_a_sender_that_is_down_and_nothing_that_was_refused():
    first, *rest = in_pieces(*message())
    for count in range(len(rest)):
        site = Site()
        with pytest.raises(PeerDown, match=f"broke off after .* of {sum(map(len, rest))} bytes"):
            virtual_run(site.take([first, *rest[:count]]))
        assert not site.ends._events and not site.endpoint.events.waiting


def test_what_we_would_refuse_is_never_sent():
    with pytest.raises(msgspec.ValidationError):
        pack(Header(run="", kind="mix", sender="a"), {})


def test_every_reason_is_documented_and_no_other_can_be_given():
    with pytest.raises(AssertionError):
        Refused("because")
    assert all(word == word.lower() and meaning for word, meaning in REASONS.items())


# --- bodies whose shapes are their sender's choice


def claims(body, **changes):
    """What ``schema`` was asked, and the refusal that came of it."""
    asked = []

    def schema(shapes):
        asked.append(shapes)
        return SCHEMA

    try:
        read_claimed(read_header(with_checksum(body, **changes)), body, SCHEMA, schema)
    except Refused as refusal:
        return asked, refusal.reason
    return asked, "taken"


def test_shapes_are_claimed_by_a_header_of_json():
    _, body = message()
    shapes = {name: shape for name, (shape, _) in SCHEMA.items()}
    assert claims(body) == ([shapes], "taken")


def test_nothing_in_a_body_is_looked_at_before_its_hash():
    _, body = message()
    assert claims(body, sha256="00" * 32) == ([], "bad-body")
    assert claims(body, length=len(body) + 1) == ([], "bad-body")


def test_a_long_list_of_vectors_is_not_decoded():
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    head = json.dumps({f"vector-{number}": entry for number in range(50_000)}).encode()
    body = struct.pack("<Q", len(head) + -len(head) % 8) + head + b" " * (-len(head) % 8)
    tracemalloc.start()
    try:
        assert claims(body) == ([{}], "oversize")
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
