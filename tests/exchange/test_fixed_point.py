"""Sums in whole numbers: a step away from the plain ones, whatever their order, and never beyond 64 bits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerlora.config.sections import CompleteGraph, RandomGraph, RingGraph
from peerlora.errors import CompositionError, DivergenceError
from peerlora.exchange.combine import mean
from peerlora.exchange.fixed_point import LIMIT, STEP, decode, encode, summed_schema, weighted_sums
from peerlora.exchange.schema import encoded_bytes
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.topology.schedule import build_topology

SIZES = st.floats(-LIMIT, LIMIT, allow_nan=False)


@given(st.lists(SIZES, min_size=1, max_size=20), st.floats(0, 1))
def test_an_encoded_value_is_half_a_step_away(values, weight):
    x = torch.tensor(values, dtype=torch.float64)
    found = decode(encode(x, weight), torch.float64)
    assert float((found - weight * x).abs().max()) <= STEP / 2 + 1e-9 * 2.0**-20


@given(st.data(), st.integers(1, 60))
def test_sums_by_weights_that_sum_to_one_never_wrap_round(data, senders):
    weights = np.array(data.draw(st.lists(st.floats(0.001, 1), min_size=senders, max_size=senders)))
    weights /= weights.sum()
    signs = data.draw(st.sampled_from([-1.0, 1.0]))
    total = sum(int(encode(torch.tensor([signs * LIMIT], dtype=torch.float64), w)) for w in weights)
    assert abs(total) < 2**63 and abs(total * STEP) == pytest.approx(LIMIT, rel=1e-12)


@pytest.mark.parametrize("value", [2 * LIMIT, -2 * LIMIT, float("nan"), float("inf")])
def test_values_out_of_range_are_refused(value):
    with pytest.raises(DivergenceError, match="hold up to 4194304: training has diverged"):
        encode(torch.tensor([0.0, value]), 0.5)


def test_whose_values_are_out_of_range_is_told():
    W = build_topology(RingGraph(kind="ring"), 5, seed=1).at(0).W
    x = torch.zeros(5, 3)
    x[2, 1] = float("nan")
    with pytest.raises(DivergenceError, match="the adapter of client 2 has values of nan"):
        weighted_sums(x, W, [1])
    assert weighted_sums(x, W, [4]).abs().max() == 0, "client 2 is no neighbour of client 4"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("graph", [RingGraph(kind="ring"), CompleteGraph(kind="complete")])
def test_sums_are_those_of_plain_mixing_up_to_steps(graph, dtype):
    W = build_topology(graph, 5, seed=1).at(0).W
    x = torch.randn(5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    found = weighted_sums(x, W, range(5))
    expected = torch.from_numpy(W) @ x.double()
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=5 * STEP)
    assert not torch.equal(found, x)


def test_sums_do_not_depend_on_the_order_of_clients():
    W = build_topology(RandomGraph(kind="random", p=0.8), 6, seed=1).at(0).W
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = [3, 1, 5, 0, 4, 2]
    assert torch.equal(weighted_sums(x, W, range(6))[order], weighted_sums(x[order], W[np.ix_(order, order)], range(6)))


def test_a_block_of_clients_has_the_sums_that_all_together_have():
    """As on a worker of a cluster, which holds some clients and asks for the rows of their neighbours."""
    topology, x = build_topology(RingGraph(kind="ring"), 6, seed=1), torch.randn(6, 8)
    whole, block = StackedExchange(topology, range(6)), StackedExchange(topology, [1, 2], gather=lambda rows: x)
    whole.secure = block.secure = True
    assert torch.equal(block.mix(x[[1, 2]]), whole.mix(x)[[1, 2]])


def secure_exchange(clients=4):
    peers = StackedExchange(build_topology(CompleteGraph(kind="complete"), clients, seed=1), list(range(clients)))
    peers.secure = True
    return peers


def adapters(clients=4):
    spec = AdapterSpec((LayerSpec("q", 50, 60),), rank=4, alpha=4.0)
    return Adapters(spec, torch.randn(clients, spec.parameters), torch.tensor([4] * clients))


def test_a_message_takes_at_most_2_2_times_the_bytes():
    x, secure, plain = adapters(), secure_exchange(), secure_exchange()
    plain.secure = False
    for peers in (secure, plain):
        peers.begin(0)
        peers.mix(x)
    assert 1.8 < secure.stats.bytes_per_edge / plain.stats.bytes_per_edge <= 2.2
    assert secure.stats.bytes_per_edge == encoded_bytes(summed_schema(x.message()))


def test_whatever_needs_more_than_the_mean_is_refused():
    peers, x = secure_exchange(), adapters()
    for call in (lambda: peers.combine(x, mean), lambda: peers.mix({"c": torch.ones(4)}, target="c")):
        with pytest.raises(CompositionError, match="gives a client the mean over its neighbours alone"):
            call()
