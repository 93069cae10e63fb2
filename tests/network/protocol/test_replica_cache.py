"""Compressed gossip between peers: copies stay equal to their owners' replicas, and poison is refused by name."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from in_memory import exchanges, together
from safetensors.torch import save

from cases import others_slow
from peerlora.config.exchange import CODEC
from peerlora.config.sections import RingGraph
from peerlora.exchange.codec import build_codec
from peerlora.exchange.compressed_gossip import Compressed, _draws, tensor_sizes
from peerlora.exchange.replicas import Difference
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.network.base import Refused
from peerlora.network.protocol.replica_cache import ReplicaCache, fingerprint, outgoing
from peerlora.network.protocol.wire import Header, encode_body, with_checksum
from peerlora.topology.schedule import build_topology

KINDS = ["identity", "cast", "top-k", "random-k", "sign", "qsgd"]
SPEC = AdapterSpec((LayerSpec("q", 12, 8), LayerSpec("v", 8, 8)), 2, 4.0, (("head.weight", (3, 8)),))
RING = build_topology(RingGraph(kind="ring"), 4, seed=1)


def adapters(seed=0, clients=4, spec=SPEC):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(clients, spec.parameters, generator=generator, dtype=torch.float64)
    return Adapters(spec, flat, torch.full((clients,), spec.rank))


def start(clients=4, spec=SPEC):
    return replace(adapters(9, clients, spec), flat=adapters(9, clients, spec).flat[:1].repeat(clients, 1))


def wrapped(exchange, kind, begin):
    config = CODEC.validate_python({"kind": kind})
    return Compressed(exchange, build_codec(config, torch.float64), config.step, begin)


class Gossip:
    """All peers of a ring, round by round: pure compressed gossip of random adapters."""

    def __init__(self, peers, kind):
        self.inner, self.x = peers, [adapters().rows([i]) for i in range(4)]
        self.peers = [wrapped(each, kind, start().rows([i])) for i, each in enumerate(peers)]
        self.network, self.t = peers[0].protocol.endpoint.transport.network, 0

    def round(self, blocks=None):
        """Everybody's missed links, and how many whole replicas each sent."""

        def one(i):
            self.peers[i].begin(self.t)
            x = self.x[i] if blocks is None else self.x[i].select(*blocks)
            self.x[i] = self.x[i].with_blocks(self.peers[i].mix(x))

        together([partial(one, i) for i in range(4)])
        self.t += 1
        whole = [int(each.stats.measures.get("whole_replicas", torch.zeros(1))) for each in self.inner]
        return [dict(each.stats.missing) for each in self.inner], whole

    def until_all_meet(self):
        """Rounds until every link is used again; how many whole replicas each peer sent in the last one."""
        for _ in range(8):
            missed, whole = self.round()
            if not any(missed):
                return whole
        raise AssertionError(missed)

    def mean(self):
        return torch.cat([x.flat for x in self.x]).mean(0)

    def check_copies(self):
        for i, exchange in enumerate(self.inner):
            for j in RING.at(0).neighbours(i):
                assert torch.equal(exchange.replicas.of(f"site-{j}"), self.peers[j].known.xhat), (i, j)


@pytest.mark.parametrize("kind", KINDS)
def test_peers_gossip_as_the_simulation_does(kind):
    stacked = wrapped(StackedExchange(RING, range(4)), kind, start())
    x = adapters()
    with exchanges(RING, start=start()) as peers:
        found = Gossip(peers, kind)
        for t, blocks in enumerate(["AB", "A", "B", None, None]):
            stacked.begin(t)
            x = x.with_blocks(stacked.mix(x if blocks is None else x.select(*blocks)))
            assert found.round(blocks) == ([{}] * 4, [0] * 4)
            assert sum(each.stats.bytes_sent for each in peers) == stacked.stats.bytes_sent
            assert {each.stats.bytes_per_edge for each in peers} == {stacked.stats.bytes_per_edge}
        assert torch.allclose(torch.cat([each.flat for each in found.x]), x.flat, rtol=0, atol=1e-12)
        assert torch.allclose(found.mean(), adapters().flat.mean(0), rtol=0, atol=1e-12)
        found.check_copies()


@pytest.mark.parametrize("kind", others_slow(["top-k", "qsgd"], [0]))
def test_a_lost_message_costs_one_link_and_then_a_whole_replica(kind):
    with exchanges(RING, deadline=1.0, start=start()) as peers:
        found = Gossip(peers, kind)
        found.round()
        found.network.lose("site-0", "site-1")
        missed, _ = found.round()
        assert missed[0] == {1: "no acknowledgement"} and missed[1] == {0: "no message"} and not missed[2]
        assert torch.allclose(found.mean(), adapters().flat.mean(0), rtol=0, atol=1e-12)
        assert found.until_all_meet() == [1, 1, 0, 0]
        found.check_copies()
        assert found.round() == ([{}] * 4, [0] * 4)
        assert torch.allclose(found.mean(), adapters().flat.mean(0), rtol=0, atol=1e-12)


def test_a_lost_acknowledgement_leaves_no_copy_behind():
    with exchanges(RING, deadline=1.0, start=start()) as peers:
        found = Gossip(peers, "sign")
        found.round()
        found.network.lose("site-0", "site-1", what="ack")
        missed, _ = found.round()
        assert missed[0] == {1: "no acknowledgement"} and not missed[1]  # used at one end only
        assert found.until_all_meet() == [0, 1, 0, 0]  # only the end that did not use it lacks what the other sent
        found.check_copies()


@pytest.mark.parametrize("kind", others_slow(["top-k", "random-k"], [0]))
def test_whatever_messages_are_lost_the_mean_stays_and_those_who_met_know_each_other(kind):
    mean = adapters().flat.mean(0)
    with exchanges(RING, deadline=0.5, start=start()) as peers:
        found, lost = Gossip(peers, kind), 0
        for one in range(4):
            for other in range(4):
                found.network.loss(f"site-{one}", f"site-{other}", 0.1)
        for _ in range(8):
            missed, _ = found.round()
            lost += sum(map(len, missed))
            assert torch.allclose(found.mean(), mean, rtol=0, atol=1e-12)
            for i, exchange in enumerate(peers):
                assert all((i in missed[j]) == (j in missed[i]) for j in RING.at(0).neighbours(i))
                for j in set(RING.at(0).neighbours(i)) - set(missed[i]):
                    assert torch.equal(exchange.replicas.of(f"site-{j}"), found.peers[j].known.xhat), (i, j)
        assert 0 < lost < 8 * 8


def test_a_peer_that_starts_again_gets_whole_replicas_and_sends_its_own():
    with exchanges(RING, start=start()) as peers:
        found = Gossip(peers, "top-k")
        found.round()
        saved, x = found.peers[2].state_dict(), found.x[2]
        found.round()
        peers[2].replicas = ReplicaCache(start().flat[:1])  # a new process, with the checkpoint of a round before
        found.peers[2].load_state_dict(saved)
        found.x[2] = x
        assert found.round() == ([{}] * 4, [0, 1, 2, 1])
        found.check_copies()


def test_a_replica_that_changes_elsewhere_is_found_by_its_bits():
    with exchanges(RING, start=start()) as peers:
        found = Gossip(peers, "cast")
        found.round()
        of = peers[1].replicas.of("site-0").clone()
        of[0, 3] += 1e-12
        peers[1].replicas.put("site-0", torch.arange(of.shape[1]), of)
        assert found.round()[1] == [1, 0, 0, 0]
        found.check_copies()


# --- poison


def difference(kind):
    """What client 0 sends, and the check of a receiver that holds the common start."""
    x, begin = adapters(), start()
    codec = build_codec(CODEC.validate_python({"kind": kind}), torch.float64)
    peers = StackedExchange(RING, [0])
    sizes, draws = tensor_sizes(SPEC), _draws(peers)
    sent = Difference(
        codec.encode((x.flat - begin.flat)[:1], sizes, draws),
        begin.flat[:1],
        begin.flat[:1],
        torch.arange(SPEC.parameters),
        lambda message: codec.decode(message, sizes, draws),
        lambda message: codec.fault(message, sizes),
    )
    return sent, ReplicaCache(begin.flat[:1])


def received(sent, copies, tensors, codec="difference", **facts):
    body = encode_body(tensors) if isinstance(tensors, dict) else tensors
    facts = facts or outgoing(sent).facts
    header = with_checksum(Header(run="r", kind="mix", sender="site-1", codec=codec, facts=facts), body)
    return copies.decode(sent, header, bytearray(body))


def values(sent):
    return {name: value[0].clone() for name, value in sent.message.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_difference_and_a_whole_replica_give_the_same(kind):
    sent, copies = difference(kind)
    message = outgoing(sent)
    after = received(sent, copies, message.body)
    assert torch.equal(after, sent.after)
    assert torch.equal(received(sent, copies, message.full_replica(), "identity"), sent.after)


def at(name, place, value):
    def change(message):
        message[name][place] = value
        return message

    return change


def wider(name):
    return lambda message: message | {name: torch.cat([message[name], message[name][:1]])}


NAN = float("nan")
POISON = {
    "a place outside of its tensor": ("top-k", at("place", 0, 24), "bad-body"),
    "a place outside of the last tensor": ("top-k", at("place", -1, 65_535), "bad-body"),
    "a place twice": ("top-k", lambda m: at("place", 0, int(m["place"][1]))(m), "bad-body"),
    "places of another size": ("top-k", lambda m: m | {"place": m["place"].to(torch.int32)}, "bad-body"),
    "one place more": ("top-k", wider("place"), "bad-body"),
    "one value more": ("top-k", wider("value"), "bad-body"),
    "no places": ("top-k", lambda m: {"value": m["value"]}, "bad-body"),
    "a value that is no number": ("top-k", at("value", 3, NAN), "not-finite"),
    "an infinite value": ("random-k", at("value", 3, float("inf")), "not-finite"),
    "values that overflow": ("identity", at("value", 3, 1.7e308), None),
    "half precision that is no number": ("cast", at("value", 0, NAN), "not-finite"),
    "full precision in place of half": ("cast", lambda m: {"value": m["value"].double()}, "oversize"),
    "a negative scale": ("sign", at("scale", 0, -1.0), "bad-body"),
    "a scale that is no number": ("sign", at("scale", 0, NAN), "not-finite"),
    "one bit more than entries": ("sign", wider("bits"), "bad-body"),
    "a level that is none": ("qsgd", at("bits", 0, 255), "bad-body"),
    "a negative norm": ("qsgd", at("norm", 1, -0.5), "bad-body"),
    "a vector more": ("sign", lambda m: m | {"x": torch.zeros(1)}, "unknown-vector"),
    "plain adapters": ("sign", lambda m: {"value": torch.zeros(SPEC.parameters)}, "oversize"),
}


@pytest.mark.parametrize("what", POISON)
def test_poison_is_refused_by_name(what):
    kind, change, reason = POISON[what]
    sent, copies = difference(kind)
    if reason is None:
        copies.put("site-1", torch.tensor([3]), torch.tensor([[1.7e308]]).double())
        sent = replace(sent, before=copies.of("site-1"))
        reason = "not-finite"
    with pytest.raises(Refused) as refusal:
        received(sent, copies, change(values(sent)))
    assert refusal.value.reason == reason
    if kind != "identity":
        assert torch.equal(copies.of("site-1"), start().flat[:1])


def test_bits_behind_the_last_entry_are_refused():
    spec = replace(SPEC, head=(("head.weight", (3, 7)),))
    sizes = tensor_sizes(spec)
    codec = build_codec(CODEC.validate_python({"kind": "sign"}), torch.float64)
    message = codec.encode(torch.ones(1, sum(sizes), dtype=torch.float64), sizes, _draws(StackedExchange(RING, [0])))
    assert codec.fault(message, sizes) is None
    message["bits"][0, -1] |= 128
    assert codec.fault(message, sizes) == "bits behind the last entry"


def test_another_base_is_refused_as_such_and_nothing_else_of_the_message_counts():
    sent, copies = difference("top-k")
    for facts in ({"builds on": fingerprint(sent.after)}, {"builds on": "x"}, {"builds on": 3}, {"other": "x"}):
        with pytest.raises(Refused) as refusal:
            received(sent, copies, b"anything", **facts)
        assert refusal.value.reason == "no-replica"


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"replica": torch.zeros(SPEC.parameters)}, "bad-body"),
        ({"replica": torch.zeros(SPEC.parameters + 1).double()}, "bad-body"),
        ({"replica": torch.full((SPEC.parameters,), NAN).double()}, "not-finite"),
        ({"value": torch.zeros(SPEC.parameters).double()}, "unknown-vector"),
    ],
)
def test_a_bad_replica_is_refused(tensors, reason):
    sent, copies = difference("top-k")
    with pytest.raises(Refused) as refusal:
        received(sent, copies, save(tensors), "identity")
    assert refusal.value.reason == reason
