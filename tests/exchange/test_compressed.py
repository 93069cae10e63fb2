"""Compressed gossip on stacked adapters: what it keeps, where it ends, what it costs."""

from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter

from cases import others_slow
from peerlora.config.exchange import CODEC
from peerlora.config.sections import TopologyConfig
from peerlora.errors import CompositionError
from peerlora.exchange.codec import build_codec
from peerlora.exchange.compressed_gossip import Compressed, compressed_message
from peerlora.exchange.schema import encoded_bytes
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.topology.schedule import build_topology

KINDS = ["identity", "cast", "top-k", "random-k", "sign", "qsgd"]
SPEC = AdapterSpec((LayerSpec("q", 12, 8), LayerSpec("v", 8, 8)), 2, 4.0, (("head.weight", (3, 8)),))


def adapters(spec=SPEC, seed=0, clients=6):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(clients, spec.parameters, generator=generator, dtype=torch.float64)
    return Adapters(spec, flat, torch.full((clients,), spec.rank))


def zeros(x):
    return replace(x, flat=torch.zeros_like(x.flat))


def exchange(topology="ring"):
    config = TypeAdapter(TopologyConfig).validate_python({"kind": topology})
    return StackedExchange(build_topology(config, 6, 3), range(6))


def compressed(kind, start, topology="ring", **own):
    config = CODEC.validate_python({"kind": kind, **own})
    return Compressed(exchange(topology), build_codec(config, start.flat.dtype), config.step, start)


def gossip(peers, x, rounds):
    for t in range(rounds):
        peers.begin(t)
        x = peers.mix(x)
    return x


def apart(x):
    return float((x.flat - x.flat.mean(0)).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_compression_does_not_touch_the_mean(kind):
    x = adapters()
    mixed = gossip(compressed(kind, zeros(x)), x, 20)
    assert (mixed.flat.mean(0) - x.flat.mean(0)).abs().max() < 1e-12


def test_identity_with_gamma_one_is_plain_mixing():
    x = adapters()
    ours, plain = gossip(compressed("identity", zeros(x)), x, 7), gossip(exchange(), x, 7)
    assert (ours.flat - plain.flat).abs().max() < 1e-14


@pytest.mark.slow
def test_top_k_gossip_agrees_where_naive_compressed_gossip_stalls():
    x = adapters()
    peers = compressed("top-k", zeros(x), share=0.2, gamma=0.3)
    assert apart(gossip(peers, x, 500)) < 1e-12
    naive, codec = x, peers.codec
    from peerlora.exchange.compressed_gossip import _draws, tensor_sizes

    sizes = tensor_sizes(SPEC)
    for t in range(500):
        peers.begin(t)
        sent = codec.decode(codec.encode(naive.flat, sizes, _draws(peers)), sizes, _draws(peers))
        naive = replace(naive, flat=naive.flat + 0.3 * (torch.from_numpy(peers.graph.W) @ sent - sent))
    assert apart(naive) > 0.5


@pytest.mark.parametrize("kind", others_slow(["random-k", "sign", "qsgd"], [1]))
def test_the_default_step_of_every_codec_agrees(kind):
    x = adapters()
    assert apart(gossip(compressed(kind, zeros(x)), x, 400)) < 0.02 * apart(x)


def test_a_quiet_network_sends_zeros_and_stays():
    x = replace(adapters(), flat=adapters().flat[:1].repeat(6, 1))
    for kind in ("top-k", "sign", "qsgd"):
        assert (gossip(compressed(kind, x), x, 5).flat - x.flat).abs().max() < 1e-13


def test_each_tensor_gets_its_share():
    x = adapters()
    small = replace(x, flat=x.flat.clone())
    small.flat[:, SPEC.columns("B")] *= 1e-6
    peers = compressed("top-k", zeros(x), share=0.25)
    peers.mix(small)
    for slot in SPEC.slots:
        said = (peers.known.xhat[:, slot.start : slot.stop] != 0).sum(1)
        assert (said == -(-(slot.stop - slot.start) // 4)).all(), slot


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_encoded_message(kind):
    x = adapters()
    peers = compressed(kind, zeros(x))
    peers.mix(x)
    size = encoded_bytes(compressed_message(x.message(), peers.codec))
    assert (peers.stats.bytes_per_edge, peers.stats.bytes_sent) == (size, 12 * size)
    assert peers.wire_schema(x.message()) == compressed_message(x.message(), peers.codec)
    if kind not in ("identity", "cast"):
        assert size < encoded_bytes(x.message()) / 2


def test_blocks_that_are_mixed_alone_use_their_own_replicas():
    x = adapters()
    peers = compressed("identity", zeros(x))
    for t, blocks in enumerate(["A", "B", "A"]):
        peers.begin(t)
        x = x.with_blocks(peers.mix(x.select(blocks)))
    plain, other = adapters(), exchange()
    for t, blocks in enumerate(["A", "B", "A"]):
        other.begin(t)
        plain = plain.with_blocks(other.mix(plain.select(blocks)))
    assert (x.flat - plain.flat).abs().max() < 1e-14
    assert (peers.known.xhat[:, SPEC.columns("head")] == 0).all()


def test_a_private_head_is_left_alone():
    spec = replace(SPEC, private_head=True)
    x = adapters(spec)
    mixed = gossip(compressed("top-k", zeros(x)), x, 3)
    assert torch.equal(mixed.select("head").flat, x.select("head").flat)


@pytest.mark.parametrize("kind", ["top-k", "qsgd"])
def test_what_is_remembered_can_be_saved_and_taken_up(kind):
    x = adapters()
    straight = gossip(compressed(kind, zeros(x)), x, 6)
    first, second = compressed(kind, zeros(x)), compressed(kind, zeros(x))
    half = gossip(first, x, 3)
    second.load_state_dict(first.state_dict())
    for t in range(3, 6):
        second.begin(t)
        half = second.mix(half)
    assert torch.equal(half.flat, straight.flat)


def test_what_cannot_be_compressed_is_refused():
    peers = compressed("sign", adapters())
    with pytest.raises(CompositionError, match="works on adapters alone"):
        peers.mix({"x": adapters(), "z": torch.zeros(6, 2)})
    with pytest.raises(CompositionError, match="a rule of its own"):
        peers.combine(adapters(), lambda received: None)
