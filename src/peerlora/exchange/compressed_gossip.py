"""CHOCO: gossip in which only compressed differences cross, with error feedback."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from peerlora.errors import CompositionError
from peerlora.exchange.codec import Codec, Draws, Sizes
from peerlora.exchange.replicas import Difference
from peerlora.exchange.schema import Schema
from peerlora.exchange.wrapper import ExchangeWrapper, only_adapters
from peerlora.lora.adapters import Adapters, AdapterSpec

if TYPE_CHECKING:
    from peerlora.exchange.base import DifferenceExchange, Exchange


@dataclass(frozen=True)
class Replicas:
    """What everybody knows of the clients held here, and what these know of their neighbours.

    ``s`` is all of the neighbours that is needed as long as W stays the same.  Between real peers it does not, since
    links fail: there the exchange has a copy of every neighbour's replica, and ``s`` follows from these.
    """

    xhat: Float[Tensor, "client parameter"]
    s: Float[Tensor, "client parameter"]
    """``sum_j w_ij xhat_j``"""

    @classmethod
    def of_start(cls, x: Adapters) -> Replicas:
        """All start from the same adapters and know it: nothing has to be sent for them."""
        return cls(x.flat.clone(), x.flat.clone())


def compressed_gossip(
    x: Adapters, known: Replicas, whole: AdapterSpec, codec: Codec, gamma: float, peers: DifferenceExchange
) -> tuple[Adapters, Replicas]:
    """One exchange of CHOCO in its memory form; ``x`` may hold some blocks of ``whole``, to which ``known`` belongs.

        q     =   Q(x - xhat)                       compressed, tensor by tensor: what is sent
        xhat <-   xhat + q,     s  <-  s + sum_j w_ij q_j
        x    <-   x + gamma (s - xhat)              = x + gamma sum_j w_ij (xhat_j - xhat_i)

    The mean over clients is untouched by what compression loses.  With Q = 1 and gamma = 1 it is plain mixing.

    Source: Koloskova, Stich, Jaggi 2019, arXiv 1902.00340 (memory form as in the authors' code).
    Differs: xhat starts at the common initial adapters in place of zero.
    """
    shared, columns = x.spec.shared, whole.columns_of(x.spec)
    sizes, draws = tensor_sizes(x.spec), _draws(peers)
    value, xhat, s = x.flat[:, shared], known.xhat[:, columns], known.s[:, columns]
    sent = Difference(
        codec.encode(value - xhat, sizes, draws),
        xhat,
        s,
        columns,
        decode=lambda message: codec.decode(message, sizes, draws),
        fault=lambda message: codec.fault(message, sizes),
    )
    s = peers.mix_differences(x, sent)
    flat = x.flat.clone()
    flat[:, shared] = value + gamma * (s - sent.after)
    return replace(x, flat=flat), Replicas(_with(known.xhat, columns, sent.after), _with(known.s, columns, s))


def compressed_message(vectors: Schema, codec: Codec) -> Schema:
    """What crosses in place of these named vectors; its sizes don't depend on their values."""
    draws = Draws(lambda: torch.Generator().manual_seed(0), lambda: [torch.Generator()])
    sizes, dtype = [prod(shape) for shape, _ in vectors.values()], next(iter(vectors.values()))[1]
    sent = codec.encode(torch.zeros(1, sum(sizes), dtype=dtype), sizes, draws)
    return {name: (tuple(value.shape[1:]), value.dtype) for name, value in sent.items()}


def tensor_sizes(spec: AdapterSpec) -> Sizes:
    """The scalars of each tensor that is exchanged."""
    return [prod(slot.shape) for slot in spec.slots if slot.start < spec.shared.stop]


class Compressed(ExchangeWrapper):
    """An Exchange whose ``mix`` is CHOCO's; what it remembers is saved with the run."""

    def __init__(self, peers: Any, codec: Codec, gamma: float, start: Adapters):
        super().__init__(peers)
        self.codec, self.gamma, self.spec = codec, gamma, start.spec
        self.known = Replicas.of_start(start)

    def mix(self, x: Any, target: str | None = None) -> Any:
        """Mix by ``compressed_gossip``; a payload with a target is more than adapters, and refused."""
        x = only_adapters(x, "exchange.codec")
        mixed, self.known = compressed_gossip(x, self.known, self.spec, self.codec, self.gamma, self.peers)
        return mixed

    def wire_schema(self, vectors: Schema) -> Schema:
        """What is sent in place of what the method mixes."""
        return compressed_message(vectors, self.codec)

    def combine(self, x: Adapters, rule: Any, merged: bool = False) -> Adapters:
        """Refused: replicas hold averages, and a rule needs what each neighbour sent."""
        raise CompositionError(
            "exchange.codec cannot be used by a method with a rule of its own: receivers know averages only; use "
            "dec-lora, adf-lora or another method that mixes adapters"
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the replicas."""
        return {**super().state_dict(), "xhat": self.known.xhat, "s": self.known.s}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Restore the replicas of the last round."""
        super().load_state_dict(saved)
        self.known = Replicas(saved["xhat"], saved["s"])


def _with(whole: Tensor, columns: Integer[Tensor, " column"], part: Tensor) -> Tensor:
    return whole.index_copy(1, columns.to(whole.device), part)


def _draws(peers: Exchange) -> Draws:
    def own() -> list[torch.Generator]:
        drawn = torch.randint(2**62, (peers.graph.clients,), generator=peers.shared_random("rounding"))
        return [torch.Generator().manual_seed(seed) for seed in drawn[list(peers.clients)].tolist()]

    return Draws(lambda: peers.shared_random("codec"), own)
