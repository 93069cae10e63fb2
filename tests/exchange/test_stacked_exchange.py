from collections import namedtuple
from dataclasses import dataclass, replace
from math import cos, pi

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from peerlora.config.sections import CompleteGraph, EdgesGraph, PathGraph, RandomGraph, RingGraph
from peerlora.exchange.plain import operator
from peerlora.exchange.schema import encoded_bytes
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec, mask_ranks
from peerlora.topology.schedule import build_topology

SPEC = AdapterSpec((LayerSpec("q", 5, 6), LayerSpec("v", 4, 3)), rank=2, alpha=4.0, head=(("out.weight", (3, 2)),))
RING, PATH, COMPLETE = RingGraph(kind="ring"), PathGraph(kind="path"), CompleteGraph(kind="complete")
NOBODY = EdgesGraph(kind="edges", edges=[], allow_disconnected=True)
RANDOM = RandomGraph(kind="random", p=0.5)


def adapters(clients=6, spec=SPEC, dtype=torch.float64, ranks=None, seed=0):
    flat = torch.randn(clients, spec.parameters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mask_ranks(Adapters(spec, flat.to(dtype), torch.tensor(ranks or [spec.rank] * clients)))


def exchange(graph=RING, clients=6, t=0, held=None, **options):
    made = StackedExchange(build_topology(graph, clients, seed=1), held or list(range(clients)), **options)
    made.begin(t)
    return made


def disagreement(flat):
    return float((flat - flat.mean(0)).norm())


@pytest.mark.parametrize("graph", [RING, PATH, COMPLETE, RANDOM, RandomGraph(kind="random", p=0.6, weights="pairwise")])
def test_mix_multiplies_the_rows_by_W(graph):
    x, peers = adapters(), exchange(graph, t=3)
    mixed = peers.mix(x)
    assert torch.allclose(mixed.flat, torch.from_numpy(peers.graph.W) @ x.flat, rtol=0, atol=1e-14)
    assert not torch.allclose(mixed.flat, x.flat)
    by_hand = sum(peers.graph.W[2, j] * x.A["v"][j] for j in range(6))
    assert torch.allclose(mixed.A["v"][2], by_hand, rtol=0, atol=1e-14)


def test_mix_by_hand_on_a_path_of_two():
    x = Adapters(SPEC, torch.stack([torch.zeros(SPEC.parameters), torch.ones(SPEC.parameters)]), torch.tensor([2, 2]))
    assert (exchange(PATH, 2).mix(x).flat == 0.5).all()


def test_mix_leaves_its_input_alone():
    x = adapters()
    before = x.flat.clone()
    exchange().mix(x)
    assert torch.equal(x.flat, before)


@pytest.mark.parametrize("graph", [RING, PATH, RANDOM, RandomGraph(kind="random", p=0.6, weights="pairwise")])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_mixing_keeps_the_means_of_A_of_B_and_of_the_head(graph, dtype, tolerance):
    x, peers = adapters(dtype=dtype), exchange(graph)
    mixed = x
    for t in range(10):
        peers.begin(t)
        mixed = peers.mix(mixed)
    assert disagreement(mixed.flat) < 0.5 * disagreement(x.flat)
    for block in ("A", "B", "head"):
        before, after = x.select(block).flat.double().mean(0), mixed.select(block).flat.double().mean(0)
        assert (before - after).abs().max() < tolerance


def test_without_links_everything_stays_bit_for_bit():
    x, peers = adapters(), exchange(NOBODY)
    assert torch.equal(peers.mix(x).flat, x.flat)
    assert peers.stats.bytes_sent == 0


def test_the_complete_graph_agrees_at_once():
    mixed = exchange(COMPLETE).mix(adapters())
    assert torch.allclose(mixed.flat, adapters().flat.mean(0).expand(6, -1), rtol=0, atol=1e-14)


def test_a_private_head_is_not_mixed():
    x = adapters(spec=replace(SPEC, private_head=True))
    mixed = exchange().mix(x)
    assert torch.equal(mixed.select("head").flat, x.select("head").flat)
    assert torch.equal(mixed.select("A", "B").flat, exchange().mix(adapters()).select("A", "B").flat)


def test_one_factor_alone_is_mixed_though_the_head_is_private():
    x = adapters(spec=replace(SPEC, private_head=True))
    peers = exchange()
    mixed = peers.mix(x.select("B"))
    assert torch.allclose(mixed.flat, exchange().mix(x).select("B").flat, atol=1e-14)
    assert peers.stats.bytes_per_edge > 0


def test_disagreement_on_a_ring_never_exceeds_rho_to_the_rounds():
    x, peers = adapters(10), exchange(clients=10)
    rho = peers.topology.rho()
    assert rho == pytest.approx((1 + 2 * cos(2 * pi / 10)) / 3)
    start, flat = disagreement(x.flat), x
    for k in range(1, 30):
        flat = peers.mix(flat)
        assert disagreement(flat.flat) <= rho**k * start * (1 + 1e-12)


def test_the_slowest_mode_of_a_ring_decays_exactly_by_rho():
    x, peers = adapters(10), exchange(clients=10)
    wave = torch.tensor([cos(2 * pi * i / 10) for i in range(10)], dtype=torch.float64)[:, None]
    x = replace(x, flat=3.0 + wave * x.flat[:1])
    start, rho = disagreement(x.flat), (1 + 2 * cos(2 * pi / 10)) / 3
    for k in range(1, 30):
        x = peers.mix(x)
        assert disagreement(x.flat) == pytest.approx(rho**k * start, rel=1e-9)


# --- bytes


def encoded(x, client):
    """A real message of one client: its own rank, without a private head."""
    rank, tensors = int(x.ranks[client]), {}
    for layer in x.A:
        tensors[f"A:{layer}"] = x.A[layer][client, :rank].contiguous()
        tensors[f"B:{layer}"] = x.B[layer][client, :, :rank].contiguous()
    if not x.spec.private_head:
        tensors |= {f"head:{name}": value[client].contiguous() for name, value in x.head.items()}
    return len(save(tensors))


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("graph", "directed"), [(RING, 12), (PATH, 10), (COMPLETE, 30)])
def test_bytes_are_those_of_a_real_encoding_on_every_directed_link(graph, directed, dtype, private):
    x, peers = adapters(spec=replace(SPEC, private_head=private), dtype=dtype), exchange(graph)
    peers.mix(x)
    assert peers.stats.bytes_per_edge == encoded(x, 0)
    assert peers.stats.bytes_sent == directed * encoded(x, 0)


def test_bytes_follow_the_links_of_the_round():
    x, peers = adapters(), exchange(RANDOM)
    counts = set()
    for t in range(5):
        peers.begin(t)
        peers.mix(x)
        assert peers.stats.bytes_sent == 2 * len(peers.graph.edges) * encoded(x, 0)
        counts.add(peers.stats.bytes_sent)
    assert len(counts) > 1


def test_a_smaller_rank_sends_fewer_bytes():
    x, peers = adapters(ranks=[1, 2, 2, 2, 2, 2]), exchange()
    peers.mix(x)
    assert encoded(x, 0) < encoded(x, 1) == peers.stats.bytes_per_edge
    assert peers.stats.bytes_sent == 2 * encoded(x, 0) + 10 * encoded(x, 1)
    assert encoded_bytes(x.message(0)) < encoded_bytes(x.message(1))


def test_a_new_round_forgets_what_the_last_one_sent():
    x, peers = adapters(), exchange()
    peers.mix(x)
    once = peers.stats.bytes_sent
    peers.mix(x)
    assert (
        peers.stats.bytes_sent == 2 * once and peers.stats.bytes_per_edge == 2 * encoded(x, 0) and peers.stats.sent is x
    )
    peers.begin(1)
    assert (peers.stats.bytes_sent, peers.stats.bytes_per_edge, peers.stats.sent) == (0, 0, None)


def test_encoded_bytes_of_a_known_message():
    # safetensors: 8 bytes of length, a JSON header padded to a multiple of 8, the values
    header = len('{"x":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}')
    assert encoded_bytes({"x": ((2, 3), torch.float32)}) == 8 + -(-header // 8) * 8 + 24


# --- trees


Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True)
class Mass:
    weight: Tensor
    name: str


def test_every_leaf_of_a_tree_is_mixed():
    generator = torch.Generator().manual_seed(0)
    leaf = [
        torch.randn(6, *shape, generator=generator, dtype=torch.float64) for shape in ((2,), (3, 2), (1,), (2, 2), (4,))
    ]
    tree = {"one": leaf[0], "pair": (leaf[1], leaf[2]), "named": Pair(leaf[3], "kept"), "mass": Mass(leaf[4], "kept")}
    peers = exchange()
    mixed, W = peers.mix(tree), torch.from_numpy(peers.graph.W)
    found = [mixed["one"], *mixed["pair"], mixed["named"].left, mixed["mass"].weight]
    for before, after in zip(leaf, found, strict=True):
        assert torch.allclose(after, torch.einsum("ij,j...->i...", W, before), rtol=0, atol=1e-14)
    assert isinstance(mixed["named"], Pair) and mixed["named"].right == "kept" and mixed["mass"].name == "kept"


def test_a_number_per_client_is_mixed():
    mass = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    peers = exchange()
    mixed = peers.mix({"mass": mass})["mass"]
    assert mixed.shape == (6,) and torch.allclose(mixed, torch.from_numpy(peers.graph.W) @ mass)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_of_a_tree_are_those_of_its_own_numbers(dtype):
    peers = exchange()
    peers.mix({"a": torch.zeros(6, 40, dtype=dtype), "b": torch.zeros(6, 2, 30, dtype=dtype)})
    message = len(save({".a": torch.zeros(40, dtype=dtype), ".b": torch.zeros(2, 30, dtype=dtype)}))
    assert peers.stats.bytes_per_edge == message and peers.stats.bytes_sent == 12 * message


def test_adapters_within_a_tree_are_mixed_like_adapters():
    x = adapters(spec=replace(SPEC, private_head=True))
    mixed = exchange().mix((x, {"z": x.flat}))
    assert torch.equal(mixed[0].flat, exchange().mix(x).flat)
    assert torch.equal(mixed[0].ranks, x.ranks)


# --- shards


@pytest.mark.parametrize("held", [[0, 1], [2, 3, 4], [5]])
def test_a_shard_gets_its_rows_of_what_all_would_get(held):
    x = adapters()
    shard = exchange(RANDOM, held=held, gather=lambda rows: x.flat)
    whole = exchange(RANDOM)
    part = shard.mix(x.rows(held))
    assert torch.allclose(part.flat, whole.mix(x).flat[held], rtol=0, atol=1e-14)
    degrees = whole.graph.adjacency.sum(1)
    assert shard.stats.bytes_sent == encoded(x, 0) * int(np.sum(degrees[held]))


@pytest.mark.parametrize(("graph", "sparse"), [(RING, True), (COMPLETE, False)])
def test_many_clients_with_few_neighbours_mix_by_a_sparse_product(graph, sparse):
    x, peers = adapters(300), exchange(graph, 300)
    W = peers.graph.W
    assert (operator(W, x.flat).layout == torch.sparse_csr) == sparse
    assert operator(W[:, :100], x.flat).layout == torch.strided
    assert torch.allclose(peers.mix(x).flat, torch.from_numpy(W) @ x.flat, rtol=0, atol=1e-13)


@pytest.mark.parametrize("held", [None, [3, 1200, 7, 640]])
def test_a_sparse_product_in_pieces_has_the_bits_of_the_whole(held, monkeypatch):
    x = adapters(1300)
    whole = StackedExchange(build_topology(RING, 1300, seed=1), range(1300)).mix(x)
    monkeypatch.setattr("peerlora.exchange.stacked._TOGETHER", 10**6 if held is None else 3)
    peers = StackedExchange(build_topology(RING, 1300, seed=1), held or range(1300), lambda rows: x.flat)
    assert torch.equal(
        peers.mix(x if held is None else x.rows(held)).flat, whole.flat if held is None else whole.flat[held]
    )
