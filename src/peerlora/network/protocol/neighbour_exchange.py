"""Exchange of a real peer: one client held here, whose neighbours are other processes."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.exchange.base import ExchangeStats
from peerlora.exchange.combine import CombineRule, apply_rule
from peerlora.exchange.payload import Payload, expected, fault, stack_with_own, vectors, widest
from peerlora.exchange.plain import PlainExchange, operator
from peerlora.exchange.replicas import Difference
from peerlora.lora.adapters import Adapters
from peerlora.network.base import PeerId, Refused
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.network.protocol.peer_relay import PeerRelay
from peerlora.network.protocol.pending_exchange import Decoder, ExchangeResult, OutgoingMessage
from peerlora.network.protocol.relay_messages import RelayFormat
from peerlora.network.protocol.replica_cache import ReplicaCache, outgoing
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.value_bounds import check_values
from peerlora.network.protocol.wire import Header, encode_body, encode_header, read_claimed
from peerlora.topology.schedule import RoundGraph, Topology
from peerlora.topology.storage import Matrix, entries_like
from peerlora.topology.weights import remove_links
from peerlora.tree import leaves, tree_map

Tree = TypeVar("Tree")


class NeighbourExchange(PlainExchange):
    """Sends the own row, collects the neighbours' until the deadline, and combines them by the own row of W.

    Sums run in the order of client numbers.  The weight of a link that is not used goes to the diagonal of both its
    ends, so W stays doubly stochastic; where links go one way, it stays with the sender, who keeps what was not
    acknowledged, so columns keep their sums.

    ``names``: client -> peer, for all neighbours of the run.  ``start``: the adapters with which all clients begin;
    compressed gossip builds on them.  ``positive_vectors``: names of those that are refused unless they are above zero.
    ``sites``: client -> peer, of all whose adapters may be relayed; by default ``names``.
    """

    def __init__(
        self,
        topology: Topology,
        client: int,
        names: Mapping[int, PeerId],
        protocol: RoundProtocol,
        thread: EventLoopThread,
        start: Adapters | None = None,
        positive_vectors: Collection[str] = (),
        sites: Mapping[int, PeerId] | None = None,
    ):
        self.topology, self.names = topology, names
        self.sites = names if sites is None else sites
        self.clients: Sequence[int] = [client]
        self.protocol, self.thread = protocol, thread
        self.replicas = None if start is None else ReplicaCache(start.flat[:1])
        self._deadline = protocol.deadline
        self._peer_relay: PeerRelay | None = None
        self.positive_vectors, self.one_way = tuple(positive_vectors), not topology.properties.symmetric
        self._set(0)

    def begin(self, t: int, absent: Sequence[int] = ()) -> ExchangeStats:
        """Begin a round, here and for the messages of neighbours."""
        self._set(t, absent)
        self.thread.loop.call_soon_threadsafe(self.protocol.endpoint.enter, t)
        return self.stats

    @contextmanager
    def extended_deadline(self, seconds: float) -> Iterator[None]:
        """Within the block an exchange waits up to ``seconds`` for neighbours."""
        before, self._deadline = self._deadline, seconds
        try:
            yield
        finally:
            self._deadline = before

    def _set(self, t: int, absent: Sequence[int] = ()) -> None:
        self.t, self.graph = t, self.topology.at(t, absent)
        self.stats = ExchangeStats()

    def mix(self, x: Tree, target: str | None = None) -> Tree:
        """``x_i <- sum_j W_ij x_j`` for every leaf of ``x``; W for the leaf ``target`` where one is named."""
        began = time.perf_counter()
        (met,), W = self._collect((x,), target)
        others = leaves(met, (Adapters, Tensor))
        mixed = tree_map(lambda name, leaf: self._leaf(leaf, others[name], W), x, leaf=(Adapters, Tensor))
        self.stats.seconds += time.perf_counter() - began
        return mixed

    def mix_differences(self, x: Adapters, sent: Difference) -> Float[Tensor, "client scalar"]:
        """``sum_j W_ij xhat_j``, with the cached replicas of the neighbours; see ``ReplicaCache``."""
        self._require_open()
        assert self.replicas is not None, "compressed gossip builds on the common start"
        began = time.perf_counter()
        received = self._exchange(outgoing(sent), partial(self.replicas.decode, sent))
        for j, after in received.items():
            self.replicas.put(self.names[j], sent.places, after)
        received[self.clients[0]] = sent.after
        senders = sorted(received)
        rows = torch.cat([received[j] for j in senders])
        self.stats.sent, self.stats.received = x, _replicas(x, rows)
        mixed = operator(self.graph.weights(self.clients, senders), rows) @ rows
        self.stats.seconds += time.perf_counter() - began
        return mixed

    def combine(self, x: Adapters, rule: CombineRule, merged: bool = False) -> Adapters:
        """``x_i <- rule(x_j of all senders j)``; without any contact ``x`` stays as it is."""
        began = time.perf_counter()
        sent = x.select("A", "B") if x.spec.private_head else x
        (met, *parts), W = self._collect((x, *([x.merged] if merged else [])))
        self.stats.sent, self.stats.received = x, met
        others = met.select("A", "B") if x.spec.private_head else met
        combined, measured = apply_rule(sent, replace(others, merged=parts[0] if parts else None), W, rule)
        self.stats.measures.update(measured)
        self.stats.seconds += time.perf_counter() - began
        return replace(x.with_blocks(combined), merged=combined.merged)

    def _send(self, x: Adapters) -> None:
        """Exchange adapters with the neighbours."""
        began = time.perf_counter()
        (met,), _ = self._collect((x,))
        self.stats.sent, self.stats.received = x, met
        self.stats.seconds += time.perf_counter() - began

    def _leaf(self, x: Any, others: Any, W: Float[np.ndarray, "1 sender"]) -> Any:
        """The average of one leaf; of Adapters, of everything but a private head."""
        if isinstance(x, Tensor):
            rows = others.reshape(len(others), -1)
            return (operator(W, rows) @ rows).view_as(x)
        self.stats.sent, self.stats.received = x, others
        rows = others.flat[:, x.spec.shared]
        return x.with_shared(operator(W, rows) @ rows)

    def _collect(self, payload: Payload, target: str | None = None) -> tuple[Payload, Float[np.ndarray, "1 sender"]]:
        """Exchange a payload: those of all senders whose link is used, and the own row of W for them."""
        own = vectors(payload)
        positive = [name for name in (*self.positive_vectors, target) if name in own]
        decode: Decoder = partial(_decode, payload, own=own, positive=positive, weighted=target is None)
        facts: Mapping[str, str | int] = {}
        if self._relay and (sent := _adapters_in(payload)):
            facts, decode = self._relay.sign(self.t, sent), self._relay.noting(decode)
        message = OutgoingMessage(encode_body(own), facts=facts)
        received = self._exchange(message, decode, None if target is None else (target, own[target]))
        received[self.clients[0]] = own
        senders = sorted(received)
        return stack_with_own(payload, [received[j] for j in senders]), self.graph.weights(self.clients, senders)

    def _exchange(
        self, message: OutgoingMessage, decode: Decoder, target: tuple[str, Tensor] | None = None
    ) -> dict[int, Any]:
        """Exchange a message: by client, the decoded ones of used links, to which the round's graph and W are set.

        ``target``: the vector for which W is weighted, by name, and this client's own value.
        """
        (me,), planned = self.clients, self.topology.at(self.t)
        senders, receivers = planned.neighbours(me), planned.receivers(me)
        numbers = {self.names[j]: j for j in [*senders, *receivers] if j in self.names}
        to, by = ([self.names[j] for j in clients if j in self.names] for clients in (receivers, senders))
        result = self.thread.call(
            self.protocol.exchange(to, message, decode, self._deadline, by if self.one_way else None)
        )
        stats = self.stats
        stats.missing |= {numbers[peer]: reason for peer, reason in result.missing.items()}
        stats.missing |= {j: "not on the member list" for j in [*senders, *receivers] if j not in self.names}
        received = {numbers[peer]: values for peer, values in result.received.items()}
        delivered = {numbers[peer] for peer in result.delivered}
        if target:
            name, own = target
            others = {j: float(values[name]) for j, values in received.items()}
            planned = replace(planned, W=self._weighted(planned, {**others, me: float(own)}))
        missing = [(me, j) for j in senders if j not in received] + [(j, me) for j in receivers if j not in delivered]
        self.graph = without(planned, missing, self.one_way)
        stats.bytes_per_edge += len(message.body)
        stats.bytes_sent += len(message.body) * len(delivered) + sum(result.full_replicas.values())
        if result.full_replicas:
            stats.measures["whole_replicas"] = torch.tensor([float(len(result.full_replicas))])
        return received

    # --- relayed adapters

    @cached_property
    def relay_format(self) -> RelayFormat:
        """The format of relayed adapters in this run; asked for once ``relayed`` is set."""
        assert self.relayed is not None, "nothing is relayed"
        endpoint, clients = self.protocol.endpoint, self.topology.clients
        most = min(clients, self.relayed.settings.keep or clients)
        return RelayFormat(endpoint.expected, clients, most, self.sites, endpoint.transport.signatures)

    @property
    def _relay(self) -> PeerRelay | None:
        """This client's side of relaying, from when ``relayed`` is set."""
        if self._peer_relay is None and self.relayed is not None:
            self._peer_relay = PeerRelay(self.relayed, self.relay_format, self._report_refusal)
        return self._peer_relay

    def _report_refusal(self, header: Header, refusal: Refused) -> None:
        report = self.protocol.endpoint.transport.report_refusal
        self.thread.ask(report, header.sender, refusal, encode_header(header))

    def relay(self) -> None:
        """Swap entries with the neighbours whose link was used in the mixing, in two more exchanges of the round.

        What fails in them costs entries, which come in a later round; the mixing stays as it was.
        """
        relay, sent, received = self._relay, self.stats.sent, self.stats.received
        if relay is None or sent is None or received is None:
            return
        began, before = time.perf_counter(), self.stats.bytes_sent
        met = {j: self.names[j] for j in self.graph.neighbours(self.clients[0])}
        relay.begin(self.t, sent, received, met)
        held = self._swap(dict.fromkeys(met.values(), relay.versions()), relay.decode_versions())
        offered = {peer: relay.entries_for(versions) for peer, versions in held.received.items()}
        swapped = self._swap({peer: message for peer, (message, _) in offered.items()}, relay.decode_entries())
        relay.end({j: swapped.received[peer] for j, peer in met.items() if peer in swapped.received})
        entries = sum(offered[peer][1] for peer in swapped.delivered)
        refused = {"relayed_refused": relay.refused} if relay.refused else {}
        sent_bytes = self.stats.bytes_sent - before
        self._record_relay(began, relayed_entries=entries, relayed_bytes=sent_bytes, **refused)

    def _swap(self, messages: Mapping[PeerId, OutgoingMessage], decode: Decoder) -> ExchangeResult:
        """One exchange of the kind ``relay``, without anybody there too: all peers count a round's exchanges alike."""
        result = self.thread.call(
            self.protocol.exchange(list(messages), messages, decode, self._deadline, kind="relay")
        )
        self.stats.bytes_sent += sum(len(messages[peer].body) for peer in result.delivered)
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """Return the relayed adapters with their signatures, where clients relay, and nothing else."""
        return self._relay.state_dict() if self._relay else {}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Restore them."""
        if self._relay:
            self._relay.load_state_dict(saved)

    def _weighted(self, planned: RoundGraph, known: Mapping[int, float]) -> Matrix:
        """W whose own row has Metropolis-Hastings weights for the known c; the other rows have no meaning."""
        c = np.ones(planned.clients)  # where c is unknown the link is not used
        c[list(known)] = list(known.values())
        return self.topology.aimed(planned.adjacency, c)


def _decode(
    payload: Payload,
    header: Header,
    body: bytearray,
    own: Mapping[str, Tensor] | None = None,
    positive: Collection[str] = (),
    weighted: bool = False,
) -> dict[str, Tensor]:
    """Decode a neighbour's vectors, with the names, shapes and dtypes that this client's own ``payload`` asks for.

    ``own``: this client's vectors.  ``positive`` and ``weighted``: see ``check_values``.
    """
    if header.codec != "identity":
        raise Refused("bad-header", f"codec {header.codec} where values are exchanged as they are")
    found = read_claimed(header, body, widest(payload), partial(expected, payload))
    if reason := fault(payload, found):
        raise Refused("bad-body", reason)
    for name in positive:
        if not bool((found[name] > 0).all()):
            raise Refused("bad-body", f"{name} is not above zero")
    check_values(vectors(payload) if own is None else own, found, positive, weighted)
    return found


def _adapters_in(payload: Payload) -> Adapters | None:
    """The adapters of a payload; None where it has none, as in a sum before the first round."""
    found = [leaf for tree in payload for leaf in leaves(tree, (Adapters,)).values() if isinstance(leaf, Adapters)]
    return found[-1] if found else None


def _replicas(x: Adapters, rows: Float[Tensor, "sender scalar"]) -> Adapters:
    """Adapters whose exchanged columns are these."""
    flat = x.flat.repeat(len(rows), 1)
    flat[:, x.spec.shared] = rows
    return replace(x, flat=flat, ranks=x.ranks.repeat(len(rows)))


def without(graph: RoundGraph, missing: list[tuple[int, int]], one_way: bool = False) -> RoundGraph:
    """A round's graph without some links (receiver, sender), whose weight goes to the diagonal of both ends.

    With ``one_way`` a link's other direction stays, and the weight goes to the sender.
    """
    if not missing:
        return graph
    links = {*missing} if one_way else {*missing, *((j, i) for i, j in missing)}
    i, j = np.array(sorted(links)).T
    gone = entries_like(graph.adjacency, i, j, True)
    return RoundGraph(graph.adjacency > gone, remove_links(graph.W, gone, one_way))
