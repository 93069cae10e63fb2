"""Messages that hold some layers only, and weights that follow from what messages say."""

import numpy as np
import pytest
import torch
from in_memory import exchanges, together

from peerlora.config.sections import CompleteGraph, RandomGraph, RingGraph
from peerlora.exchange.payload import vectors
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.lora.layer_order import depth_of, reached_layers
from peerlora.lora.partial import REACHED, PartialAdapters
from peerlora.network.base import Refused
from peerlora.network.protocol.neighbour_exchange import _decode
from peerlora.network.protocol.wire import Header, encode_body, with_checksum
from peerlora.topology.schedule import build_topology

SPEC = AdapterSpec(
    (LayerSpec("layer.0.q", 5, 6), LayerSpec("layer.0.v", 4, 3), LayerSpec("layer.1.q", 5, 6)),
    rank=2,
    alpha=4.0,
    head=(("out.weight", (3, 2)),),
)
DEPTHS = torch.tensor([3, 1, 2, 0])
GRAPHS = [RingGraph(kind="ring"), CompleteGraph(kind="complete"), RandomGraph(kind="random", p=0.6)]


def adapters(private=False):
    spec = AdapterSpec(SPEC.layers, SPEC.rank, SPEC.alpha, SPEC.head, private)
    flat = torch.randn(4, spec.parameters, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Adapters(spec, flat, torch.full((4,), spec.rank))


def both(graph, call):
    """What ``call(exchange, rows)`` gives on a stacked exchange, and on one peer per client."""
    topology = build_topology(graph, 4, seed=1)
    stacked = StackedExchange(topology, range(4))
    stacked.begin(1)
    whole = call(stacked, slice(None))
    with exchanges(topology) as peers:

        def one(i):
            peers[i].begin(1)
            return call(peers[i], [i])

        parts = together([lambda i=i: one(i) for i in range(4)])
    assert sum(each.stats.bytes_sent for each in peers) == stacked.stats.bytes_sent
    return whole, parts


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.kind)
def test_layers_that_some_send_are_mixed_as_in_the_simulation(graph, private):
    x = adapters(private)
    reached = reached_layers(DEPTHS, depth_of(x.spec))

    def mixed(exchange, rows):
        return exchange.mix(
            {"layers": PartialAdapters.of(x.rows(rows), reached[rows]), REACHED: reached[rows].to(x.flat)}
        )

    whole, parts = both(graph, mixed)
    for i, part in enumerate(parts):
        assert torch.allclose(part["layers"].flat[0], whole["layers"].flat[i], rtol=0, atol=1e-12)
        assert torch.allclose(part[REACHED][0], whole[REACHED][i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("graph", [*GRAPHS, GRAPHS[1].model_copy(update={"lazy": True})], ids=lambda graph: graph.kind)
def test_weights_for_a_target_follow_from_the_messages(graph):
    x, c = adapters(), torch.tensor([0.5, 2.0, 1.0, 30.0]).double()

    def aimed(exchange, rows):
        own = c[rows]
        return exchange.mix({"x": x.rows(rows), "c": own}, target="c")

    whole, parts = both(graph, aimed)
    for i, part in enumerate(parts):
        assert torch.allclose(part["x"].flat[0], whole["x"].flat[i], rtol=0, atol=1e-12)


def test_a_link_that_fails_keeps_the_balance_of_a_target():
    topology, c = build_topology(GRAPHS[1], 4, seed=1), torch.tensor([0.5, 2.0, 1.0, 30.0]).double()
    value = torch.arange(4).double()
    with exchanges(topology, deadline=1.0) as peers:
        peers[0].protocol.endpoint.transport.network.lose("site-0", "site-3")

        def one(i):
            peers[i].begin(0)
            own = c[[i]]
            return peers[i].mix({"x": value[[i]], "c": own}, target="c")["x"]

        mixed = torch.cat(together([lambda i=i: one(i) for i in range(4)]))
        assert peers[0].stats.missing and peers[3].stats.missing
        W = np.stack([each.graph.W[i] for i, each in enumerate(peers)])
    assert np.allclose(W.sum(1), 1) and W[0, 3] == W[3, 0] == 0
    flow = c.numpy()[:, None] * W
    assert np.allclose(flow, flow.T)
    assert float((c * mixed).sum()) == pytest.approx(float((c * value).sum()))


# --- what is refused


def payload(i):
    x = adapters().rows([i])
    reached = reached_layers(DEPTHS[[i]], depth_of(x.spec))
    return ({"layers": PartialAdapters.of(x, reached), REACHED: reached.to(x.flat)},)


def checked(own, tensors, **options):
    body = encode_body(tensors)
    header = with_checksum(Header(run="r", kind="mix", sender="site-1"), body)
    return _decode(own, header, bytearray(body), **options)


@pytest.mark.parametrize("own", range(4))
@pytest.mark.parametrize("other", range(4))
def test_any_layers_are_taken_as_they_are_told(own, other):
    sent = vectors(payload(other))
    assert set(checked(payload(own), sent)) == set(sent)


def without(message, name):
    return {key: value for key, value in message.items() if key != name}


ONE = torch.ones((), dtype=torch.float64)
POISON = {
    "half a layer": (lambda m: without(m, "layers.A:layer.1.q"), "bad-body"),
    "a layer that it does not tell": (lambda m: m | {REACHED: torch.tensor([1.0, 0, 0]).double()}, "bad-body"),
    "a layer that it tells and does not hold": (lambda m: m | {REACHED: ONE.repeat(3)}, "bad-body"),
    "half told": (lambda m: m | {REACHED: ONE.repeat(3) * torch.tensor([1, 0.5, 0])}, "bad-body"),
    "told twice": (lambda m: m | {REACHED: ONE.repeat(3) * torch.tensor([2, 1, 0])}, "bad-body"),
    "not told": (lambda m: without(m, REACHED), "bad-body"),
    "told for more layers than there are": (lambda m: m | {REACHED: ONE.repeat(4)}, "bad-body"),
    "another layer": (lambda m: m | {"layers.A:layer.7.q": ONE.repeat(2, 5)}, "unknown-vector"),
    "another shape": (lambda m: m | {"layers.B:layer.1.q": ONE.repeat(6, 1)}, "bad-body"),
    "no number": (lambda m: m | {"layers.B:layer.1.q": ONE.repeat(6, 2) * float("nan")}, "not-finite"),
}


@pytest.mark.parametrize("what", POISON)
def test_poison_is_refused_by_name(what):
    change, reason = POISON[what]
    with pytest.raises(Refused) as refusal:
        checked(payload(0), change(vectors(payload(2))))
    assert refusal.value.reason == reason, refusal.value


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_weight_that_is_not_above_zero_is_refused(value):
    own = ({"c": torch.ones(1).double()},)
    with pytest.raises(Refused, match="bad-body .c is not above zero"):
        checked(own, {"c": torch.tensor(value).double()}, positive=["c"])
    assert checked(own, {"c": torch.tensor(0.1).double()}, positive=["c"])["c"] > 0


def test_a_difference_is_refused_where_values_are_exchanged():
    body = encode_body(vectors(payload(0)))
    header = with_checksum(Header(run="r", kind="mix", sender="site-1", codec="difference"), body)
    with pytest.raises(Refused, match="bad-header"):
        _decode(payload(0), header, bytearray(body))
