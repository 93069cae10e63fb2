"""Secure sums of a real peer: it learns the weighted sum of its neighbours' vectors, and no neighbour's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from typing import Any, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from peerlora.exchange.base import ExchangeStats
from peerlora.exchange.fixed_point import SUMMED, check_range, decode, encode
from peerlora.exchange.payload import Payload
from peerlora.exchange.plain import open_messages_refused
from peerlora.exchange.schema import Schema, encoded_bytes
from peerlora.lora.adapters import Adapters
from peerlora.network.base import PeerId, Refused
from peerlora.network.protocol.event_loop import run_off_loop
from peerlora.network.protocol.link_history import ExchangeStep
from peerlora.network.protocol.masks import masked, sum_of
from peerlora.network.protocol.neighbour_exchange import NeighbourExchange, without
from peerlora.network.protocol.pending_exchange import ExchangeResult, OutgoingMessage
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.sender_sets import SenderSet, SenderSets
from peerlora.network.protocol.value_bounds import allowed, largest
from peerlora.network.protocol.wire import Header, encode_body, read_body
from peerlora.tree import leaves, tree_map

Tree = TypeVar("Tree")
Steps = Int64[Tensor, " scalar"]
_LEAVES = (Adapters, Tensor)
_MASKED = "senders"  # fact of a message: the sender set that it is masked for


async def secure_sum(
    protocol: RoundProtocol,
    sets: SenderSets,
    receivers: Collection[PeerId],
    weighted: Callable[[PeerId], Steps],
    scalars: int,
    deadline: float,
) -> ExchangeResult:
    """Exchange masked vectors of ``scalars`` steps: the received ones, if any, are those of the whole own sender set.

    ``weighted``: this client's vector with the weight that a receiver gives it.
    """
    step, run, own = protocol.endpoint.at, protocol.endpoint.expected.run, sets.begin_sum()
    schema: Schema = {SUMMED: ((scalars,), torch.int64)}

    async def provide(receiver: PeerId) -> tuple[Header, OutgoingMessage] | None:
        chosen = await sets.answer(receiver, step)
        return None if chosen is None else await run_off_loop(8 * scalars, message, receiver, chosen)

    def message(receiver: PeerId, chosen: SenderSet) -> tuple[Header, OutgoingMessage]:
        body = encode_body({SUMMED: masked(weighted(receiver), sets.me, sets.pair_keys(chosen))})
        made = OutgoingMessage(body, facts={_MASKED: chosen.digest(run)})
        return protocol.headers("mix", {receiver: made})[receiver], made

    def decoded(header: Header, body: bytearray) -> Steps:
        if header.facts.get(_MASKED) != own.digest(run):
            raise Refused("other-set", f"round {step.round}, exchange {step.number}")
        return read_body(header, body, schema)[SUMMED]

    try:
        return await protocol.exchange(receivers, provide, decoded, deadline, list(own.keys), all_or_none=True)
    finally:
        sets.end_sum()


class SecureExchange(NeighbourExchange):
    """Exchange of a real peer by secure sums; see NeighbourExchange, whose arguments it takes beside its sender sets.

    Senders weigh what they send by the receiver's row of W.  The weight of whoever is not in a sum goes to the
    receiver's diagonal; a sum that does not come together leaves the receiver's own values as they are.
    """

    secure = True

    def __init__(self, sender_sets: SenderSets, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.sender_sets = sender_sets
        self.given_up = 0
        """Sums of this process that did not come together."""

    def begin(self, t: int, absent: Sequence[int] = ()) -> ExchangeStats:
        """Begin a round, and ask those who are there for its first sum: nobody has to wait for that at its end."""
        stats = super().begin(t, absent)
        self.thread.loop.call_soon_threadsafe(self.sender_sets.ask, ExchangeStep(t))
        return stats

    def mix(self, x: Tree, target: str | None = None) -> Tree:
        """``x_i <- sum_j W_ij x_j`` for every leaf of ``x``, in whole numbers."""
        if target is not None:
            raise open_messages_refused()
        began = time.perf_counter()
        parts = [_exchanged(leaf) for leaf in leaves(x, _LEAVES).values()]
        received = self._sum_of(parts)
        sent = [leaf for leaf in leaves(x, _LEAVES).values() if isinstance(leaf, Adapters)]
        self.stats.sent, self.stats.received = (sent[-1] if sent else None), None
        if received is not None:
            (me,) = self.clients
            total = received + weighted_steps(parts, float(self.graph.W[me, me]))
            x = _filled(x, parts, total)
        self.stats.seconds += time.perf_counter() - began
        return x

    def _collect(self, payload: Payload, target: str | None = None) -> Any:
        """Refused: it would need each neighbour's message."""
        raise open_messages_refused()

    def _sum_of(self, parts: Sequence[Tensor]) -> Steps | None:
        """The neighbours' weighted sum, to which the round's graph is set; None where it did not come together."""
        (me,), planned = self.clients, self.topology.at(self.t)
        senders = {self.names[j]: j for j in planned.neighbours(me) if j in self.names}
        scalars = sum(part.numel() for part in parts)
        for part in parts:  # before anything is sent
            check_range(part)
        encoded = cache(partial(weighted_steps, parts))  # many receivers have the same weight

        def weighted(receiver: PeerId) -> Steps:
            return encoded(float(planned.W[senders[receiver], me]))

        result = self.thread.call(
            secure_sum(self.protocol, self.sender_sets, list(senders), weighted, scalars, self._deadline)
        )
        heard = {senders[peer]: values for peer, values in result.received.items()}
        total = _checked(heard, parts, sum(float(planned.W[me, j]) for j in heard))
        if total is None:
            reason = "out-of-range" if heard else "sum given up"
            result = result._replace(missing=dict.fromkeys(senders, reason) | result.missing)
            heard = {}
        missing = [j for j in planned.neighbours(me) if j not in heard]
        self.graph = without(planned, [(me, j) for j in missing])
        self._record(senders, result, missing, encoded_bytes({SUMMED: ((scalars,), torch.int64)}))
        return total

    def _record(self, senders: dict[PeerId, int], result: ExchangeResult, missing: list[int], size: int) -> None:
        """Count a sum's messages and note who is missing from it."""
        reasons = {senders[peer]: reason for peer, reason in result.missing.items()}
        unlisted = dict.fromkeys(set(missing) - set(senders.values()), "not on the member list")
        self.stats.missing |= {j: reason for j, reason in (reasons | unlisted).items() if j in missing}
        self.stats.bytes_per_edge += size
        self.stats.bytes_sent += size * len(result.delivered)
        planned = self.topology.at(self.t).neighbours(self.clients[0])
        if planned and len(missing) == len(planned):
            self.given_up += 1
            before = self.stats.measures.get("sums_given_up", torch.zeros(1))
            self.stats.measures["sums_given_up"] = before + 1


def weighted_steps(parts: Sequence[Tensor], weight: float) -> Steps:
    """Encode this client's values, all parts in one, with a weight."""
    return torch.cat([encode(part, weight).flatten().cpu() for part in parts])


def _exchanged(leaf: Adapters | Tensor) -> Tensor:
    """The values of a leaf that cross; of Adapters, all but a private head."""
    return leaf if isinstance(leaf, Tensor) else leaf.flat[:, leaf.spec.shared]


def _filled(x: Tree, parts: Sequence[Tensor], total: Steps) -> Tree:
    """``x`` with the values of a sum in all that crossed."""
    sizes = [part.numel() for part in parts]
    sums = iter([decode(each, part.dtype).view_as(part) for each, part in zip(total.split(sizes), parts, strict=True)])

    def fill(_: str, leaf: Adapters | Tensor) -> Adapters | Tensor:
        values = next(sums).to(leaf.device if isinstance(leaf, Tensor) else leaf.flat.device)
        return values if isinstance(leaf, Tensor) else leaf.with_shared(values)

    return tree_map(fill, x, leaf=_LEAVES)


def _checked(heard: dict[int, Steps], parts: Sequence[Tensor], weight: float) -> Steps | None:
    """The sum of what was heard, whose weights sum to ``weight``; None for none, or one that no honest senders have."""
    if not heard:
        return None
    total = sum_of(heard.values(), sum(part.numel() for part in parts))
    most = allowed(largest(parts)) * weight
    return total if largest([decode(total, torch.float64)]) <= most else None
