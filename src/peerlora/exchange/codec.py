"""What is sent in place of a full vector.  Every tensor of a message is compressed by itself.

Over the concatenation a codec would starve one factor: B starts at zero and A does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from peerlora.config.exchange import CodecConfig

Flat = Float[Tensor, "client scalar"]
Message = dict[str, Tensor]
"""Named vectors, each with the leading client axis."""
Sizes = Sequence[int]
"""The scalars of each tensor, in the order in which they lie in the flat buffer."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Draws:
    """Where codecs get their randomness."""

    shared: Callable[[], torch.Generator]
    """The same numbers for every client of the round, afresh at every call."""
    own: Callable[[], Sequence[torch.Generator]]
    """One generator for each client held here."""


@runtime_checkable
class Codec(Protocol):
    """Q: ``decode(encode(x))``, with Q(0) = 0 and ``|x - Q(x)|^2 <= (1 - delta) |x|^2`` for a delta above 0."""

    def encode(self, x: Flat, sizes: Sizes, draws: Draws) -> Message:
        """What is sent for ``x``."""
        ...

    def decode(self, message: Message, sizes: Sizes, draws: Draws) -> Flat:
        """What receivers make of it."""
        ...

    def fault(self, message: Message, sizes: Sizes) -> str | None:
        """Why ``encode`` never makes this message, whose names, shapes and dtypes are right; None for a good one.

        A receiver asks before it decodes what it does not trust.
        """
        ...


class Faultless:
    """A codec for which every finite value is a good one."""

    def fault(self, message: Message, sizes: Sizes) -> str | None:
        """Nothing can be wrong."""
        return None


@dataclass(frozen=True)
class Identity(Faultless):
    """Everything, as it is."""

    def encode(self, x: Flat, sizes: Sizes, draws: Draws) -> Message:
        """The values."""
        return {"value": x}

    def decode(self, message: Message, sizes: Sizes, draws: Draws) -> Flat:
        """The values."""
        return message["value"]


@dataclass(frozen=True)
class Cast(Faultless):
    """Everything, in half precision."""

    dtype: torch.dtype
    like: torch.dtype
    """What receivers compute in."""

    def encode(self, x: Flat, sizes: Sizes, draws: Draws) -> Message:
        """The rounded values."""
        return {"value": x.to(self.dtype)}

    def decode(self, message: Message, sizes: Sizes, draws: Draws) -> Flat:
        """The rounded values."""
        return message["value"].to(self.like)


@dataclass(frozen=True)
class TopK:
    """The largest entries of every tensor, and their places in it in 2 bytes each (4 in tensors above 65,536)."""

    share: float

    def encode(self, x: Flat, sizes: Sizes, draws: Draws) -> Message:
        """Values and places."""
        parts = x.split(list(sizes), dim=1)
        places = [
            part.abs().topk(kept(size, self.share), dim=1).indices for part, size in zip(parts, sizes, strict=True)
        ]
        values = [part.gather(1, place) for part, place in zip(parts, places, strict=True)]
        narrow = torch.uint16 if max(sizes) <= 2**16 else torch.int32
        return {"value": torch.cat(values, dim=1), "place": torch.cat(places, dim=1).to(narrow)}

    def decode(self, message: Message, sizes: Sizes, draws: Draws) -> Flat:
        """Zero where nothing was sent."""
        starts = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
        offset = starts.repeat_interleave(torch.tensor([kept(size, self.share) for size in sizes]))
        places = message["place"].long() + offset.to(message["place"].device)
        return scattered(message["value"], places, sum(sizes))

    def fault(self, message: Message, sizes: Sizes) -> str | None:
        """A place outside of its tensor, or one that is there twice."""
        counts = [kept(size, self.share) for size in sizes]
        for place, size in zip(message["place"].long().split(counts, dim=1), sizes, strict=True):
            if ((place < 0) | (place >= size)).any():
                return f"a place outside of a tensor of {size} scalars"
            if (place.sort(dim=1).values.diff(dim=1) == 0).any():
                return "a place that is there twice"
        return None


@dataclass(frozen=True)
class RandomK(Faultless):
    """Entries of every tensor that all clients of a round draw alike: nobody sends their places.

    Not scaled up by size / k: error feedback needs a contraction, not a mean without bias.
    """

    share: float

    def places(self, sizes: Sizes, draws: Draws) -> Integer[Tensor, " entry"]:
        """Where the entries of this round lie in the flat buffer."""
        generator, start, found = draws.shared(), 0, []
        for size in sizes:
            found.append(start + torch.randperm(size, generator=generator)[: kept(size, self.share)])
            start += size
        return torch.cat(found)

    def encode(self, x: Flat, sizes: Sizes, draws: Draws) -> Message:
        """Values alone."""
        return {"value": x[:, self.places(sizes, draws).to(x.device)]}

    def decode(self, message: Message, sizes: Sizes, draws: Draws) -> Flat:
        """Zero where nothing was sent."""
        value = message["value"]
        return scattered(value, self.places(sizes, draws).to(value.device).expand(len(value), -1), sum(sizes))


@dataclass(frozen=True)
class Sign:
    """``|x|_1 / size * sign(x)`` for every tensor: one bit an entry, and one number."""

    def encode(self, x: Flat, sizes: Sizes, draws: Draws) -> Message:
        """Bits and scales."""
        scale = torch.stack([part.abs().mean(1) for part in x.split(list(sizes), dim=1)], dim=1)
        return {"bits": packed((x >= 0).to(torch.uint8), 1), "scale": scale}

    def decode(self, message: Message, sizes: Sizes, draws: Draws) -> Flat:
        """Plus or minus the scale."""
        scale = repeated(message["scale"], sizes)
        return scale * (2 * unpacked(message["bits"], 1, sum(sizes)).to(scale) - 1)

    def fault(self, message: Message, sizes: Sizes) -> str | None:
        """A negative size, or bits behind the last."""
        if (message["scale"] < 0).any():
            return "a negative scale"
        return "bits behind the last entry" if left_over(message["bits"], 1, sum(sizes)) else None


@dataclass(frozen=True)
class QSGD:
    """Entries rounded at random, without bias, to multiples of ``norm / levels``; then scaled down by ``tau``.

    ``tau = 1 + min(d / levels^2, sqrt(d) / levels)`` for a tensor of d entries, which makes a contraction of it.
    Source: Alistarh et al. 2017, arXiv 1610.02132; tau: CHOCO, arXiv 1902.00340.
    """

    levels: int

    @property
    def bits(self) -> int:
        """Of one entry."""
        return (2 * self.levels).bit_length()

    def encode(self, x: Flat, sizes: Sizes, draws: Draws) -> Message:
        """Levels and norms."""
        norm = torch.stack([part.norm(dim=1) for part in x.split(list(sizes), dim=1)], dim=1)
        height = self.levels * x / repeated(norm, sizes).clamp_min(torch.finfo(x.dtype).tiny)
        chance = torch.stack([torch.rand(x.shape[1], generator=own, dtype=x.dtype) for own in draws.own()]).to(x.device)
        level = (height.abs() + chance).floor().clamp_max(self.levels) * height.sign()
        return {"bits": packed((level + self.levels).to(torch.uint8), self.bits), "norm": norm}

    def decode(self, message: Message, sizes: Sizes, draws: Draws) -> Flat:
        """Multiples of the norms."""
        tau = torch.tensor([1 + min(d / self.levels**2, sqrt(d) / self.levels) for d in sizes]).to(message["norm"])
        step = repeated(message["norm"] / (self.levels * tau), sizes)
        return step * (unpacked(message["bits"], self.bits, sum(sizes)).to(step) - self.levels)

    def fault(self, message: Message, sizes: Sizes) -> str | None:
        """A negative norm, a level that is none, or bits behind the last."""
        if (message["norm"] < 0).any():
            return "a negative norm"
        if (unpacked(message["bits"], self.bits, sum(sizes)) > 2 * self.levels).any():
            return f"a level above {self.levels}"
        return "bits behind the last entry" if left_over(message["bits"], self.bits, sum(sizes)) else None


def build_codec(config: CodecConfig, like: torch.dtype) -> Codec:
    """The codec of a config, for values of this dtype."""
    makers: dict[str, Callable[[Any], Codec]] = {
        "identity": lambda config: Identity(),
        "cast": lambda config: Cast(DTYPES[config.dtype], like),
        "top-k": lambda config: TopK(config.share),
        "random-k": lambda config: RandomK(config.share),
        "sign": lambda config: Sign(),
        "qsgd": lambda config: QSGD(config.levels),
    }
    return makers[config.kind](config)


def kept(size: int, share: float) -> int:
    """How many entries of a tensor are sent: its share, rounded up."""
    return ceil(size * share)


def scattered(values: Float[Tensor, "client entry"], places: Integer[Tensor, "client entry"], size: int) -> Flat:
    """Rows of ``size`` scalars with the values at their places, zero elsewhere."""
    return values.new_zeros(len(values), size).scatter_(1, places, values)


def repeated(values: Float[Tensor, "client tensor"], sizes: Sizes) -> Flat:
    """A number per tensor at each of its scalars."""
    return values.repeat_interleave(torch.tensor(sizes, device=values.device), dim=1)


def packed(values: UInt8[Tensor, "client scalar"], bits: int) -> UInt8[Tensor, "client byte"]:
    """Numbers below 2^bits side by side, lowest bit first."""
    places = torch.arange(bits, device=values.device, dtype=torch.uint8)
    flags = (values[..., None] >> places & 1).flatten(1)
    flags = torch.nn.functional.pad(flags, (0, -flags.shape[1] % 8)).unflatten(1, (-1, 8))
    return (flags << torch.arange(8, device=values.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpacked(data: UInt8[Tensor, "client byte"], bits: int, size: int) -> UInt8[Tensor, "client scalar"]:
    """What ``packed`` was given."""
    flags = (data[..., None] >> torch.arange(8, device=data.device, dtype=torch.uint8) & 1).flatten(1)
    flags = flags[:, : size * bits].unflatten(1, (size, bits))
    return (flags << torch.arange(bits, device=data.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def left_over(data: UInt8[Tensor, "client byte"], bits: int, size: int) -> bool:
    """Whether any bit is set behind the ``size`` numbers that ``packed`` was given."""
    used = size * bits % 8
    return bool(used and (data[:, -1] >> used).any())
