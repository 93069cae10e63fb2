"""Reader of safetensors bodies that members sent: every name, shape and dtype is compared before a value is used.

The safetensors library never sees a received byte, so two parsers cannot disagree about it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from peerlora.exchange.schema import Schema, encoded_bytes
from peerlora.network.base import Refused

Whole = Annotated[int, Meta(ge=0, le=2**53)]
Shapes = Mapping[str, tuple[int, ...]]
NAMES = {dtype: name for name, dtype in (("F64", torch.float64), ("F32", torch.float32), ("F16", torch.float16))}
NAMES |= {torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.uint16: "U16"}
NAMES |= {torch.uint8: "U8", torch.bool: "BOOL"}
_SLACK = 64  # bytes per vector, at most, by which another version of safetensors pads its header


def largest_body(schema: Schema) -> int:
    """Upper bound in bytes of a body of this schema; 0 for an empty schema."""
    return encoded_bytes(schema) + _SLACK * (1 + len(schema)) if schema else 0


def file_length(view: memoryview, widest: Schema) -> int:
    """The length of the safetensors file with which ``view`` begins, by its own header; raises Refused."""
    size = _header_size(view, widest)
    ends = [entry.data_offsets[1] for entry in _parsed(view, size).values()]
    return 8 + size + max(ends, default=0)


def read_vectors(view: memoryview, schema: Schema, finite: bool = True) -> dict[str, Tensor]:
    """Decode vectors whose names, shapes and dtypes must be exactly those of ``schema``, views of what can be written.

    Raises Refused; with ``finite`` also for a value that is not.
    """
    if not schema:
        return {}
    start, entries = _entries(view, schema)
    data = view[start:] if not view.readonly else memoryview(bytearray(view[start:]))
    vectors = {name: _vector(data, entries[name], *schema[name]) for name in schema}
    for name, vector in vectors.items():
        if finite and not is_finite(vector):
            raise Refused("not-finite", name)
        if vector.dtype == torch.bool and vector.numel() and vector.view(torch.uint8).max() > 1:
            raise Refused("bad-body", f"{name} has truth values other than 0 and 1")  # they would act as weights
    return vectors


def claimed_shapes(view: memoryview, widest: Schema) -> Shapes:
    """The shapes that a body claims for its vectors, unchecked: a schema may depend on them, nothing else."""
    try:
        entries = _parsed(view, _header_size(view, widest))
    except Refused:
        return {}
    return {name: tuple(entry.shape) for name, entry in entries.items()}


def _header_size(view: memoryview, schema: Schema) -> int:
    """Length of the JSON at the start of a body; raises Refused beyond what vectors of a schema need."""
    size = int.from_bytes(view[:8], "little") if len(view) >= 8 else -1
    most = largest_body(schema) - sum(_bytes(*wanted) for wanted in schema.values())
    if not 0 <= size <= min(len(view), most) - 8 or size % 8:
        raise Refused("bad-body", "the length of the safetensors header is impossible")
    return size


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Entry of one vector in the JSON header of a safetensors file."""

    dtype: str
    shape: Annotated[list[Whole], Meta(max_length=8)]
    data_offsets: tuple[Whole, Whole]


def _parsed(view: memoryview, size: int) -> dict[str, _Entry]:
    """The entries in a safetensors header of this length; raises Refused."""
    try:
        return msgspec.json.decode(view[8 : 8 + size], type=dict[str, _Entry])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Refused("bad-body", f"safetensors header: {str(error)[:200]}") from None


def _entries(view: memoryview, schema: Schema) -> tuple[int, dict[str, _Entry]]:
    """Parse the safetensors header: where the data start, and each vector's entry; no gaps, exactly the schema."""
    size, data = _header_size(view, schema), sum(_bytes(*wanted) for wanted in schema.values())
    entries = _parsed(view, size)
    _compare(entries, schema)
    if 8 + size + data != len(view):
        raise Refused("bad-body", "there are bytes that belong to no vector")
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.data_offsets != (end, end + _bytes(*schema[name])):
            raise Refused("bad-body", f"{name} overlaps another vector or leaves a gap")
        end = entry.data_offsets[1]
    return 8 + size, entries


def _compare(entries: Mapping[str, _Entry], schema: Schema) -> None:
    """Raise Refused unless names, shapes and dtypes are those of the schema."""
    if unknown := sorted(entries.keys() - schema.keys()):
        raise Refused("unknown-vector", unknown[0][:100])
    if missing := sorted(schema.keys() - entries.keys()):
        raise Refused("bad-body", f"{missing[0]} is missing")
    for name, (shape, dtype) in schema.items():
        entry = entries[name]
        if tuple(entry.shape) != tuple(shape) or entry.dtype != NAMES[dtype]:
            expected = f"{NAMES[dtype]}{list(shape)}"
            raise Refused("bad-body", f"{name} is {entry.dtype[:16]}{entry.shape}, expected {expected}")


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _vector(data: memoryview, entry: _Entry, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    if entry.data_offsets[0] % dtype.itemsize:
        raise Refused("bad-body", "a vector does not start at a multiple of its element's size")
    return torch.frombuffer(data, dtype=dtype, count=count, offset=entry.data_offsets[0]).view(shape)


def is_finite(vector: Tensor) -> bool:
    """Whether all values of a vector are finite."""
    if not vector.dtype.is_floating_point or not vector.numel():
        return True
    low, high = vector.aminmax()  # both are NaN where any element is; needs no mask of the vector's size
    return bool(low.isfinite() & high.isfinite())
