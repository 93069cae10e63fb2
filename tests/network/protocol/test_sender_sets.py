"""Sender sets: what a sender answers, what it refuses, and what a receiver that lies about who is there gets."""

import asyncio
import random
import re
from pathlib import Path

import msgspec
import pytest
import torch
from test_masks import AGREED, agreements, message, sender_set
from test_wire_fuzz import mutated

from peerlora.network.base import Refused
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.link_history import ExchangeStep
from peerlora.network.protocol.masks import sum_of
from peerlora.network.protocol.sender_sets import SenderSet, SenderSets
from peerlora.network.protocol.wire import Expected, encode_table, read_table, with_checksum
from peerlora.network.transport.memory import MemoryNetwork

SENDERS = ("a", "b", "c", "d")
AT = ExchangeStep(3)
"""Where every peer of these tests is."""


def planned(round, receiver):
    """Whom a receiver hears from: r from all, others from r and c; in odd rounds of nobody but these."""
    return [*SENDERS] if receiver == "r" else ["c", "r"]


def sets_of(site, agreement=None):
    others = [name for name in (*SENDERS, "r") if name != site]
    transport = MemoryNetwork([*SENDERS, "r"]).transport(site, agreement=agreement or AGREED[site])
    endpoint = Endpoint(transport, Expected("run", "", ""), others)
    endpoint.at = AT
    return SenderSets(endpoint, transport.agreement, planned, 10.0)


def asked(chosen, sets, body=None):
    """Let a sender take what the receiver ``r`` asks for."""
    body = encode_table(chosen.keys) if body is None else body
    header = msgspec.structs.replace(
        sets.endpoint.header("senders"), sender=chosen.receiver, round=chosen.step.round, step=chosen.step.number
    )
    sets.take(chosen.receiver, with_checksum(header, body), bytearray(body))


def answer(sets, step=AT, receiver="r"):
    async def soon():
        async with asyncio.timeout(600):
            return await sets.answer(receiver, step)

    return asyncio.run(soon())


def of(*senders, step=AT):
    return sender_set(AGREED, senders, step)


def test_a_sender_answers_the_set_that_it_is_asked_for():
    sets = sets_of("a")
    asked(of("a", "b", "c"), sets)
    assert answer(sets) == of("a", "b", "c")
    asked(of("a", "b", "c"), sets)  # again, as after a lost acknowledgement
    assert answer(sets) == of("a", "b", "c") and sets.pair_keys(of("a", "b", "c")).keys() == {"b", "c"}


def test_until_it_has_answered_the_newest_set_counts():
    sets = sets_of("a")
    asked(of("a", "b", "c"), sets)
    asked(of("a", "b"), sets)
    assert answer(sets) == of("a", "b")


@pytest.mark.parametrize("second", [of("a", "b"), of("a", "b", "c", "d"), of("b", "c"), of()])
def test_a_second_set_of_the_same_sum_is_refused(second):
    """With both answers a receiver would have two sums, and their difference: what one of the senders sent."""
    sets = sets_of("a")
    asked(of("a", "b", "c"), sets)
    answer(sets)
    with pytest.raises(Refused, match="second-set"):
        asked(second, sets)
    assert answer(sets) == of("a", "b", "c")
    asked(of("a", "b", step=ExchangeStep(3, 1)), sets)  # another sum is another matter


def test_a_set_of_one_is_refused():
    with pytest.raises(Refused, match="few-senders"):
        asked(of("a"), sets_of("a"))


def test_a_sender_that_is_not_in_the_set_sends_nothing():
    for chosen in (of(), of("b", "c")):
        sets = sets_of("a")
        asked(chosen, sets)
        assert answer(sets) is None


def test_a_receiver_that_has_gone_on_is_not_waited_for():
    sets = sets_of("a")
    asked(of("a", "b", step=ExchangeStep(4)), sets)
    assert answer(sets) is None


def test_a_set_with_an_old_session_key_of_the_sender_is_not_answered():
    """Of a process that has died: its masks may have been used with other values."""
    sets = sets_of("a", agreements()["a"])
    asked(of("a", "b"), sets)
    with pytest.raises(Refused, match="other-set"):
        answer(sets)


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (of("a", "b", step=ExchangeStep(2, 5)), "late"),
        (of("a", "b", step=ExchangeStep(5)), "from-the-future"),
        (SenderSet("r", AT, {"a": AGREED["a"].session_key, "x": bytes(32)}), "not-a-neighbour"),
        (SenderSet("b", AT, {"a": AGREED["a"].session_key, "c": bytes(32)}), "not-a-neighbour"),
    ],
)
def test_sets_that_are_none_of_this_sum_are_refused(chosen, told):
    with pytest.raises(Refused, match=told):
        asked(chosen, sets_of("a"))


def test_a_receiver_that_calls_a_present_sender_missing_gets_no_mask_of_it():
    """It has the messages of all, and wants the sum without a: no sender helps, and no two sums can be compared.

    Were masks towards missing senders given out afterwards, those of a would be known from b, c and d, who do not see
    that a has sent: see docs/decisions/0024.
    """
    senders = {site: sets_of(site) for site in SENDERS}
    own = {site: torch.full((3,), 10**number) for number, site in enumerate(SENDERS, 1)}
    sent = {}
    for site, sets in senders.items():
        asked(of(*SENDERS), sets)
        sent[site] = message(AGREED, site, answer(sets), own[site])
    assert torch.equal(sum_of(sent.values(), 3), sum_of(own.values(), 3))
    for site in ("b", "c", "d"):
        with pytest.raises(Refused, match="second-set"):
            asked(of("b", "c", "d"), senders[site])


def test_a_receiver_that_tells_each_sender_another_set_gets_no_sum_at_all():
    senders = {site: sets_of(site) for site in ("a", "b", "c")}
    told = {"a": of("a", "b", "c"), "b": of("b", "c"), "c": of("a", "c")}
    own = {site: torch.full((3,), 10**number) for number, site in enumerate(senders, 1)}
    sent = {}
    for site, sets in senders.items():
        asked(told[site], sets)
        sent[site] = message(AGREED, site, answer(sets), own[site])
    for group in (("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")):
        assert not torch.equal(sum_of([sent[site] for site in group], 3), sum_of([own[site] for site in group], 3))


def test_what_a_receiver_may_ask_for_is_bounded():
    sets, body = sets_of("a"), encode_table(of(*SENDERS).keys)
    for number in range(1000):
        asked(of("a", "b", step=ExchangeStep(4, number)), sets)
    assert len(sets._asked["r"]) <= 4 and len(sets._answered) <= 1
    header = msgspec.structs.replace(sets.endpoint.header("senders"), sender="r")
    assert len(body) <= sets.admit("r", header) <= 1 << 10


@pytest.mark.parametrize("seed", range(4))
def test_mutated_sets_are_refused_or_are_what_they_say(seed):
    """Resealed, as a hostile member would send them."""
    draw, chosen = random.Random(seed), of("a", "b", "c")
    body, taken = encode_table(chosen.keys), 0
    for _ in range(1500):
        changed, sets = mutated(body, draw), sets_of("a")
        try:
            asked(chosen, sets, changed)
        except Refused as refusal:
            assert refusal.reason in ("bad-body", "not-a-neighbour", "few-senders")
        else:
            taken += 1
            found = sets._asked["r"][AT].keys
            assert encode_table(found) == changed and set(found) <= set(SENDERS) and len(found) != 1
            assert all(len(key) == 32 for key in found.values())
    assert taken < 1500


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc0",
        msgspec.msgpack.encode({"b": bytes(32), "a": bytes(32)}),
        msgspec.msgpack.encode({"a": bytes(31), "b": bytes(32)}),
        msgspec.msgpack.encode({"a": "0" * 32, "b": bytes(32)}),
        msgspec.msgpack.encode([["a", bytes(32)]]),
        b"\x82\xa1a\xc4\x20" + bytes(32) + b"\xa1a\xc4\x20" + bytes(32),
        encode_table({f"s{number}": bytes(32) for number in range(5)}),
    ],
)
def test_tables_that_are_none_are_refused(body):
    header = with_checksum(sets_of("a").endpoint.header("senders"), body)
    with pytest.raises(Refused, match="bad-body"):
        read_table(header, body, 4)
    with pytest.raises(Refused, match="bad-body"):
        read_table(header, body + b"x", 10)


@pytest.mark.parametrize("facts", [{"session": ""}, {"session": "zz"}, {"session": "00" * 31}, {"session": 7}])
def test_a_hello_with_a_session_key_that_is_none_is_refused(facts):
    sets = sets_of("a")
    sets.take_hello("b", sets.endpoint.header("hello"))
    assert not sets.session_keys, "as of peerlora doctor, which takes part in no sum"
    with pytest.raises(Refused, match="bad-header"):
        sets.take_hello("b", sets.endpoint.header("hello", **facts))
    sets.take_hello("b", sets.endpoint.header("hello", **sets_of("b").hello_facts))
    assert sets.session_keys == {"b": AGREED["b"].session_key}


def receiver(*known):
    sets = sets_of("r", agreements(("r",))["r"])
    for site in known:
        sets.session_keys[site] = AGREED[site].session_key
    return sets


def test_a_receiver_asks_those_who_are_there():
    sets = receiver("a", "b", "c")
    sets.endpoint.peers.mark_absent("b")
    sets.ask(AT)
    assert sets.own == SenderSet("r", AT, of("a", "c").keys) and sets._not_sent_to() == ["a", "c", "d"]


@pytest.mark.parametrize(("senders", "words"), [(3, r"(\d+) bytes with three neighbours"), (8, r"(\d+) with\s+eight")])
def test_asking_costs_what_the_docs_say(monkeypatch, senders, words):
    """Names of 18 letters, hashes as long as a run's, and as many outcomes of exchanges as a header holds."""
    names, me, at, sizes = [f"clinic-{i:011d}" for i in range(senders)], "r" * 18, ExchangeStep(3000), []
    agreed = agreements((*names, me))
    transport = MemoryNetwork([*names, me]).transport(me, agreement=agreed[me])
    endpoint = Endpoint(transport, Expected("run-1", "0" * 64, "0" * 64), names)
    sets = SenderSets(endpoint, transport.agreement, lambda round, receiver: names, 10.0)
    for name in names:
        sets.session_keys[name] = agreed[name].session_key
        for t in range(at.round - 20, at.round):
            endpoint.history.close(name, ExchangeStep(t), True, ExchangeStep(t + 1))

    async def send(peer, header, body, deadline):
        sizes.append(len(header) + len(body))

    async def ask_all():
        sets.ask(at)
        for name in names:
            sets._tasks[name] = asyncio.current_task()
            await sets._send(name)

    endpoint.at = at
    monkeypatch.setattr(transport, "send", send)
    asyncio.run(ask_all())
    page = (Path(__file__).parents[3] / "docs" / "privacy.md").read_text(encoding="utf-8")
    documented = int(re.search(words, page)[1])
    assert len(sizes) == senders and 0.95 * documented < max(sizes) <= documented


def test_of_fewer_than_two_nobody_is_asked():
    sets = receiver("a")
    sets.ask(AT)
    assert sets.own is not None and not sets.own.keys


def test_a_set_shrinks_before_the_sum_and_grows_with_the_next_one():
    sets = receiver("a", "b", "c")
    sets.ask(AT)
    sets.session_keys["d"] = AGREED["d"].session_key
    sets._renew()
    assert sets.own.keys.keys() == {"a", "b", "c"}, "who has answered would refuse another set"
    sets.endpoint.peers.mark_absent("b")
    sets._renew()
    assert sets.own.keys.keys() == {"a", "c", "d"}, "it cannot come together any more, so all are asked anew"
    frozen = sets.begin_sum()
    sets.endpoint.peers.mark_absent("a")
    sets._renew()
    assert sets.own is frozen
    sets.end_sum()
    sets.ask(ExchangeStep(4))
    assert sets.own.keys.keys() == {"c", "d"} and sets.own.step == ExchangeStep(4)
