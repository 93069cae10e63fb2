"""A member that sends what no honest peer sends: refused by name, nothing of it used, and the others go on."""

import asyncio
from dataclasses import replace
from functools import partial

import msgspec
import pytest
import torch

from peerlora.exchange.payload import vectors
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.network.base import REASONS, Refused
from peerlora.network.protocol.control import PeerControl
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.event_limiter import EventLimiter
from peerlora.network.protocol.link_history import ExchangeStep
from peerlora.network.protocol.neighbour_exchange import _decode
from peerlora.network.protocol.peer_table import PeerTable
from peerlora.network.protocol.pending_exchange import PendingExchange
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.wire import Expected, Header, encode_body, encode_header, largest_body, with_checksum
from peerlora.network.transport.memory import MemoryNetwork
from peerlora.network.transport.virtual_loop import virtual_run

SPEC = AdapterSpec((LayerSpec("q", 5, 6), LayerSpec("v", 4, 3)), rank=2, alpha=4.0, head=(("out.weight", (3, 2)),))
OWN = Adapters(SPEC, torch.randn(1, SPEC.parameters), torch.tensor([2]))
EXPECTED = Expected("run", "ba5e", "5bec")


def header(**changes):
    facts = {"run": "run", "kind": "mix", "round": 3, "sender": "mallory", "base": "ba5e", "spec": "5bec"}
    return Header(**(facts | changes))


def changed(**tensors):
    return {**{name: value.clone() for name, value in vectors((OWN,)).items()}, **tensors}


def attack(*messages, exchange=True, linked=True):
    """What an honest peer in round 3 answers to each message of a member, and what it then made of its exchange.

    Unless ``linked``, the member is on the list but no neighbour in the run's graph.
    """

    async def main():
        network = MemoryNetwork(["alice", "bob", "mallory"])
        transports = {name: network.transport(name) for name in ("alice", "bob", "mallory")}
        peers, endpoints, largest = {}, {}, largest_body(OWN.message())
        for name in ("alice", "bob"):
            others = [other for other in transports if other != name and (linked or other != "mallory")]
            endpoint = Endpoint(transports[name], EXPECTED, others, *([12] if name == "alice" else []))
            control = PeerControl(endpoint, {"train": "same"}, 10.0)
            peers[name], endpoints[name] = RoundProtocol(endpoint, 10.0, lambda kind: largest, control), endpoint
            await control.start(peers[name])
            endpoint.enter(3)
        mallory = Endpoint(transports["mallory"], EXPECTED, ["alice", "bob"])
        mallory.enter(2)  # so that what is sent to it waits, and is waited for
        await transports["mallory"].start(RoundProtocol(mallory, 10.0, lambda kind: largest))
        await asyncio.sleep(5)
        body = encode_body(vectors((OWN,)))
        check = partial(_decode, (OWN,))
        also = ["mallory"] if linked else []
        calls = [asyncio.create_task(peers[name].exchange([other, *also], body, check, 10.0))
                 for name, other in (("alice", "bob"), ("bob", "alice"))] if exchange else []  # fmt: skip
        await asyncio.sleep(0)
        answers = []
        for head, content in messages:
            try:
                await transports["mallory"].send("alice", head, content, deadline=5.0)
                answers.append("taken")
            except Refused as refusal:
                answers.append(refusal.reason)
        outcomes = [await call for call in calls]
        await network.close()
        return answers, outcomes, endpoints["alice"]

    return virtual_run(main())


def packed(tensors, **changes):
    body = encode_body(tensors)
    return encode_header(with_checksum(header(**changes), body)), body


def damaged(body):
    return encode_header(with_checksum(header(), body)), body


GOOD = encode_body(vectors((OWN,)))
NAN = torch.full((2, 5), float("nan"))
POISON = {
    "another's name": (packed(changed(), sender="bob"), "wrong-sender"),
    "another run": (packed(changed(), run="other"), "wrong-run"),
    "another base model": (packed(changed(), base="0bad"), "wrong-base"),
    "another adapter": (packed(changed(), spec="0bad"), "wrong-spec"),
    "an old round": (packed(changed(), round=2), "late"),
    "a round of the future": (packed(changed(), round=5), "from-the-future"),
    "the last round there could be": (packed(changed(), round=2**53), "from-the-future"),
    "a vector more": (packed(changed(extra=torch.zeros(1))), "unknown-vector"),
    "a vector less": (packed({"A:q": torch.zeros(2, 5)}), "bad-body"),
    "another shape": (packed(changed(**{"B:v": torch.zeros(3, 1)})), "bad-body"),
    "a larger rank": (packed(changed(**{"A:q": torch.zeros(3, 5)})), "bad-body"),
    "rank 0": (packed(changed(**{"A:q": torch.zeros(0, 5)})), "bad-body"),
    "another dtype": (packed(changed(**{"B:v": torch.zeros(3, 2, dtype=torch.float64)})), "bad-body"),
    "not a number": (packed(changed(**{"A:q": NAN})), "not-finite"),
    "infinity": (packed(changed(**{"A:q": -NAN / 0})), "not-finite"),
    "a value beyond all bounds": (packed(changed(**{"A:q": torch.full((2, 5), 1e19)})), "out-of-range"),
    "the largest value there is": (packed(changed(**{"B:v": torch.full((3, 2), -3e38)})), "out-of-range"),
    "one large value": (
        packed(changed(**{"head:out.weight": torch.full((3, 2), 1.0).index_fill(0, torch.tensor(1), 1e7)})),
        "out-of-range",
    ),
    "a body that is none": (damaged(b"\xff" * len(GOOD)), "bad-body"),
    "half a body": (damaged(GOOD[: len(GOOD) // 2]), "bad-body"),
    "no body": (damaged(b""), "bad-body"),
    "a body beyond all bounds": (damaged(bytes(1 << 20)), "oversize"),
    "another hash": (
        (encode_header(msgspec.structs.replace(with_checksum(header(), GOOD), sha256="00" * 32)), GOOD),
        "bad-body",
    ),
    "no header": ((b"\x93junk", GOOD), "bad-header"),
    "a state that nobody asked for": (packed(changed(), kind="state"), "unexpected"),
    "a kind that this run does not know": (packed(changed(), kind="push"), "unexpected"),
    "a greeting with a body": (packed(changed(), kind="hello"), "oversize"),
    "nonsense about the last exchanges": (packed(changed(), facts={"last": "x" * 100}), "bad-header"),
}


@pytest.mark.parametrize("what", POISON)
def test_poison_is_refused_by_name_and_the_others_go_on(what):
    message, reason = POISON[what]
    answers, (alice, bob), _ = attack(message)
    assert answers == [reason]
    assert set(alice.received) == {"bob"} and set(bob.received) == {"alice"} and set(alice.missing) == {"mallory"}
    for name, value in vectors((OWN,)).items():
        assert torch.equal(alice.received["bob"][name], value)


def test_after_poison_the_same_member_can_still_send_a_good_message():
    answers, (alice, _), _ = attack(POISON["not a number"][0], packed(changed()), packed(changed()))
    assert answers == ["not-finite", "taken", "replay"]
    assert set(alice.missing) == {"mallory"}  # it never took alice's own message, so the link does not count


def test_another_config_is_refused_by_section():
    facts = {"setting train": "other", "answer": 0}
    answers, _, alice = attack(
        (encode_header(with_checksum(header(kind="hello", facts=facts), b"")), b""), exchange=False
    )
    assert answers == ["wrong-config"]
    assert any(notice.kind == "refused" and "other train" in notice.detail for notice in alice.events.waiting)


def hello(setting, answer=0):
    return packed({}, kind="hello", facts={"setting train": setting, "answer": answer})


def test_from_who_has_other_settings_no_message_is_taken_until_a_greeting_agrees():
    answers, (alice, bob), seen = attack(hello("other"), packed(changed()), hello("same"), packed(changed()))
    assert answers == ["wrong-config", "wrong-config", "taken", "late"]  # nobody waited for it in this exchange
    assert set(alice.received) == {"bob"} and set(bob.received) == {"alice"} and not seen.peers.mismatched


@pytest.mark.parametrize("greeting", ["there", "here"])
def test_who_has_other_settings_is_left_out_of_exchanges(greeting):
    """Of three sites one has other settings, which either side may say first; the two others do not wait for it."""

    async def main():
        network = MemoryNetwork(["alice", "bob", "carol"])
        controls, peers = {}, {}
        for name, setting in (("alice", "same"), ("bob", "same"), ("carol", "other")):
            others = [other for other in ("alice", "bob", "carol") if other != name]
            endpoint = Endpoint(network.transport(name), EXPECTED, others)
            controls[name] = PeerControl(endpoint, {"train": setting}, 10.0)
            peers[name] = RoundProtocol(endpoint, 10.0, lambda kind: 1 << 12, controls[name])
            await controls[name].start(peers[name])
        await asyncio.sleep(5)
        if greeting == "there":
            await controls["carol"].handshake(5.0)
        else:
            await asyncio.gather(*(controls[name].handshake(5.0) for name in ("alice", "bob")))
        began = asyncio.get_running_loop().time()
        outcomes = await asyncio.gather(
            *(
                protocol.exchange(protocol.endpoint.peers.neighbours, GOOD, partial(_decode, (OWN,)), 10.0)
                for name, protocol in peers.items()
                if name != "carol"
            )
        )
        took = asyncio.get_running_loop().time() - began
        await network.close()
        return outcomes, took

    outcomes, took = virtual_run(main())
    assert [outcome.missing for outcome in outcomes] == [{"carol": "wrong-config"}] * 2
    assert [set(outcome.received) for outcome in outcomes] == [{"bob"}, {"alice"}] and took < 1


def test_a_smaller_rank_is_a_neighbours_own_affair():
    small = replace(OWN, ranks=torch.tensor([1]))
    answers, _, _ = attack(packed(vectors((small,))))
    assert answers == ["taken"]


HALF_USED = packed({}, kind="hello", round=9, facts={"last": "0.0+ 1.0+", "answer": 1})


@pytest.mark.parametrize("message", [packed(changed()), HALF_USED, packed({}, kind="ask"), (b"junk", b"")])
def test_a_member_that_is_no_neighbour_leaves_no_trace(message):
    """The list names no edges, so the transport lets it through; the run's graph has no link with it."""
    answers, (_, bob), alice = attack(message, message, linked=False)
    assert answers == ["not-a-neighbour"] * 2 and set(bob.received) == {"alice"}
    assert "mallory" not in alice.peers.last_step and not alice.history.one_sided
    assert all(notice.peer == "bob" for notice in alice.events.waiting)


FUTURE = {"facts": {"answer": 0, "setting train": "same"}}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (packed({}, kind="hello", round=13, **FUTURE), "from-the-future"),
        (packed({}, kind="hello", round=2**53, **FUTURE), "from-the-future"),
        (packed(changed(), round=13), "from-the-future"),
        (packed({}, kind="hello", round=9), "wrong-config"),
        (packed({}, kind="bye", round=9), "unexpected"),
        (packed({}, kind="hello", round=9, facts={"last": "?"}), "bad-header"),
        (damaged(bytes(1 << 20)), "oversize"),
    ],
)
def test_what_is_refused_leaves_no_trace(message, reason):
    answers, _, alice = attack(message, exchange=False)
    assert answers == [reason] and "mallory" not in alice.peers.last_step
    assert alice.peers.round_to_follow(0) is None or alice.peers.round_to_follow(0)[1] != "mallory"


def test_a_round_that_the_run_has_is_heard_of():
    answers, _, alice = attack(packed({}, kind="hello", round=12, **FUTURE), exchange=False)
    assert answers == ["taken"] and alice.peers.last_step["mallory"].round == 12


@pytest.mark.parametrize(
    ("rounds", "to"),
    [
        ([40, 0, 0], None),
        ([40, 0], None),
        ([40], 40),  # of one neighbour alone there is no other word
        ([5, 6], 6),
        ([5, 6, 40], 6),
        ([0, 6, 40], 6),
        ([5, 6, 7, 40, 40], 7),
    ],
)
def test_one_neighbour_of_several_that_claims_a_later_round_takes_nobody_along(rounds, to):
    fresh = PeerTable([])
    fresh.last_step = {f"peer-{place}": ExchangeStep(round) for place, round in enumerate(rounds)}
    called = fresh.round_to_follow(0)
    assert (called and called[0]) == to


def test_equal_refusals_are_told_once_in_a_round_and_counted():
    messages = [POISON["another run"][0]] * 50 + [POISON["no header"][0]] * 3
    answers, _, alice = attack(*messages, exchange=False)
    assert answers == ["wrong-run"] * 50 + ["bad-header"] * 3
    told = [notice.detail for notice in alice.events.waiting if ", here" in notice.detail]
    assert [detail.partition(",")[0] for detail in told] == ["wrong-run", "bad-header"]
    alice.enter(4)
    assert [notice.detail for notice in alice.events.waiting if ", here: " in notice.detail][2:] == [
        "wrong-run, here: 49 more in round 3",
        "bad-header, here: 2 more in round 3",
    ]
    alice.enter(5)
    assert not any("more in round 4" in notice.detail for notice in alice.events.waiting)


def test_what_one_neighbour_causes_in_a_round_is_bounded():
    notices = EventLimiter()
    for number in range(10_000):
        notices.add("up" if number % 2 else "down", "mallory", "")
    for reason in REASONS:
        notices.add("refused", "mallory", f"{reason}, here")
    notices.add("down", "bob", "")
    assert len(notices.waiting) == 17 and notices.waiting[-1].peer == "bob"
    notices.next_round(7)
    assert [(notice.kind, notice.detail) for notice in list(notices.waiting)[17:]] == [
        ("down", "4992 more in round 7"),
        ("up", "4992 more in round 7"),
        ("refused", f"{len(REASONS)} more in round 7"),
    ]


def test_invented_exchanges_are_no_half_used_edges():
    """Alice was in one exchange with mallory: of that one alone there can be two opinions."""
    invented = [" ".join(f"{round}.{number}+" for number in range(16)) for round in range(3)]
    claims = [packed({}, kind="hello", facts=FUTURE["facts"] | {"last": last}) for last in invented]

    async def main():
        network = MemoryNetwork(["alice", "mallory"])
        alice, mallory = (Endpoint(network.transport(each), EXPECTED, other) for each, other in
                          (("alice", ["mallory"]), ("mallory", [])))  # fmt: skip
        control = PeerControl(alice, {"train": "same"}, 1.0)
        protocol = RoundProtocol(alice, 1.0, lambda kind: 99, control)
        await control.start(protocol)
        await mallory.transport.start(RoundProtocol(mallory, 1.0, lambda kind: 99))
        await asyncio.sleep(5)
        await protocol.exchange(["mallory"], b"", lambda header, body: body, 1.0)  # round 0, and mallory refuses
        alice.enter(3)
        for head, _ in claims * 3:
            await mallory.transport.send("alice", head, b"", deadline=5.0)
        await network.close()
        return alice

    alice = virtual_run(main())
    assert alice.history.one_sided == 1
    assert [notice.detail for notice in alice.events.waiting if notice.kind == "half-used"] == [
        "round 0: used there only"
    ]


@pytest.mark.parametrize("met", [False, True])
def test_a_process_that_goes_on_hears_of_what_it_died_in_but_of_no_more_than_a_message_tells(met):
    alice = Endpoint(MemoryNetwork([]).transport("alice"), EXPECTED, [])
    protocol = RoundProtocol(alice, 1.0, lambda kind: 0)
    alice.start_at(8)  # its checkpoint
    alice.enter(12)
    if met:
        pending = PendingExchange(["mallory"], ["mallory"], lambda header, body: body, False, 1.0)
        protocol._close(ExchangeStep(12), pending)
        alice.enter(20)
    for last in ("7.0+ 8.0+ 9.0- 10.0+", " ".join(f"11.{number}+" for number in range(16)), "15.0+ 15.1+"):
        protocol._note("mallory", header(kind="hello", facts={"last": last}))
    assert alice.history.one_sided == 8
