"""Exchanges in which every neighbour gets a message of its own, and exchanges of relayed adapters after the mixing."""

import asyncio

import pytest
import torch

from peerlora.network.base import DeadlineMissed, Refused, TransportError
from peerlora.network.protocol.control import PeerControl
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.pending_exchange import OutgoingMessage
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.wire import (
    Expected,
    Header,
    encode_body,
    encode_header,
    pack,
    read_body,
    with_checksum,
)
from peerlora.network.transport.memory import MemoryNetwork
from peerlora.network.transport.virtual_loop import virtual_run

SCHEMA = {"x": ((), torch.float64)}
SITES = ("a", "b", "c")
LARGEST = {"mix": 1 << 10, "relay": 1 << 12, "state": 0}


def value(number):
    return OutgoingMessage(encode_body({"x": torch.tensor(float(number), dtype=torch.float64)}), facts={"n": number})


def decode(header, body):
    return float(read_body(header, body, SCHEMA)["x"]), header.facts["n"]


def rounds(play, sites=SITES, deadline=10.0):
    """What ``play(network, protocols)`` gives where all sites have greeted and entered round 0."""

    async def main():
        network, protocols = MemoryNetwork(sites), {}
        for name in sites:
            endpoint = Endpoint(network.transport(name), Expected("run", "", ""), [s for s in sites if s != name])
            control = PeerControl(endpoint, {}, deadline)
            protocols[name] = RoundProtocol(endpoint, deadline, lambda kind: LARGEST[kind], control)
            await control.start(protocols[name])
        await asyncio.sleep(5)
        result = await play(network, protocols)
        await network.close()
        return result

    return virtual_run(main())


def others(name, sites=SITES):
    return [site for site in sites if site != name]


def number(source, target):
    return 10 * SITES.index(source) + SITES.index(target)


def each(name):
    return {peer: value(number(name, peer)) for peer in others(name)}


async def all_exchange(protocols, kind="relay", messages=each):
    return await asyncio.gather(
        *(protocol.exchange(others(name), messages(name), decode, 10.0, kind=kind)
          for name, protocol in protocols.items())
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["mix", "relay"])
def test_every_neighbour_gets_its_own_body_and_facts(kind):
    outcomes = rounds(lambda network, protocols: all_exchange(protocols, kind))
    for name, outcome in zip(SITES, outcomes, strict=True):
        expected = {peer: (float(number(peer, name)), number(peer, name)) for peer in others(name)}
        assert outcome.received == expected and outcome.delivered == set(expected) and not outcome.missing


def test_one_message_for_all_is_still_one_message():
    outcomes = rounds(lambda network, protocols: all_exchange(protocols, "mix", lambda name: value(ord(name))))
    for name, outcome in zip(SITES, outcomes, strict=True):
        assert outcome.received == {peer: (float(ord(peer)), ord(peer)) for peer in others(name)}


def test_a_receiver_without_a_message_is_a_fault_of_the_caller():
    async def play(network, protocols):
        with pytest.raises(AssertionError, match="every receiver"):
            await protocols["a"].exchange(["b", "c"], {"b": value(1)}, decode, 10.0)

    rounds(play)


def test_exchanges_of_one_round_are_numbered_and_early_messages_wait():
    """b is slow between two exchanges; the others' messages of the second wait for it and are used."""

    async def peer(protocols, name):
        first = await protocols[name].exchange(others(name), value(1), decode, 10.0)
        await asyncio.sleep(6 if name == "b" else 0)
        second = await protocols[name].exchange(others(name), each(name), decode, 10.0, kind="relay")
        return first, second

    async def play(network, protocols):
        return await asyncio.gather(*(peer(protocols, name) for name in SITES))

    for name, (first, second) in zip(SITES, rounds(play), strict=True):
        assert set(first.received) == set(others(name))
        assert {peer: got for peer, (got, _) in second.received.items()} == {
            peer: number(peer, name) for peer in others(name)
        }


@pytest.mark.parametrize(("sent", "expected"), [("mix", "relay"), ("relay", "mix")])
def test_a_message_of_another_kind_than_the_exchange_is_refused(sent, expected):
    async def play(network, protocols):
        call = asyncio.create_task(protocols["a"].exchange(["b"], value(1), decode, 2.0, kind=expected))
        await asyncio.sleep(0)
        header = Header(run="run", kind=sent, round=0, sender="b")
        with pytest.raises(Refused) as refused:
            head, body = pack(header, {"x": torch.tensor(1.0, dtype=torch.float64)})
            await protocols["b"].endpoint.transport.send("a", head, body, deadline=1.0)
        return refused.value.reason, await call

    reason, outcome = rounds(play)
    assert reason == "unexpected" and not outcome.received


@pytest.mark.parametrize("kind", ["mix", "relay"])
@pytest.mark.parametrize("beyond", [0, 1])
def test_bounds_are_those_of_the_kind(kind, beyond):
    async def play(network, protocols):
        body = bytes(LARGEST[kind] + beyond)
        head = encode_header(with_checksum(Header(run="run", kind=kind, round=0, step=7, sender="b"), body))
        with pytest.raises(TransportError) as error:
            await protocols["b"].endpoint.transport.send("a", head, body, deadline=1.0)
        return error.value

    error = rounds(play)  # within its bound it waits, for an exchange that never begins
    assert error.reason == "oversize" if beyond else isinstance(error, DeadlineMissed)


def test_a_relay_that_fails_is_no_lack_of_contact():
    """c answers in the mixing and not in the relay: nobody stops waiting for it, nobody counts as left alone."""

    async def play(network, protocols):
        mixed = await all_exchange(protocols, "mix")
        calls = [protocols[name].exchange(others(name), each(name), decode, 10.0, kind="relay") for name in "ab"]
        relayed = await asyncio.gather(*calls)
        peers = [protocols[name].endpoint.peers for name in "ab"]
        seen = [(set(each.absent), each.connected, each.isolated) for each in peers]
        outcome = await protocols["a"].exchange(["b"], {"b": value(1)}, decode, 10.0, kind="relay")
        alone = protocols["a"].endpoint.peers
        return mixed, relayed, seen, outcome, (alone.connected, alone.isolated)

    mixed, relayed, seen, outcome, alone = rounds(play)
    assert all(len(each.received) == 2 for each in mixed)
    assert [set(each.received) for each in relayed] == [{"b"}, {"a"}]
    assert all(set(each.missing) == {"c"} for each in relayed)
    assert seen == [(set(), True, False)] * 2
    assert not outcome.received and alone == (True, False)


def test_a_mixing_without_answer_is_a_lack_of_contact():
    async def play(network, protocols):
        await protocols["a"].exchange(["b"], value(1), decode, 3.0)  # b is in no exchange
        peers = protocols["a"].endpoint.peers
        return peers.isolated, set(peers.absent)

    assert rounds(play) == (True, {"b"})


def test_a_lost_relay_message_costs_this_exchange_alone():
    async def play(network, protocols):
        await all_exchange(protocols, "mix")
        network.lose("a", "b")
        relayed = await all_exchange(protocols, "relay")
        for protocol in protocols.values():
            protocol.endpoint.enter(1)
        return relayed, await all_exchange(protocols, "mix")

    relayed, mixed = rounds(play)
    assert set(relayed[0].received) == {"c"} and set(relayed[1].received) == {"c"}
    assert set(relayed[2].received) == {"a", "b"}
    assert all(len(each.received) == 2 and not each.missing for each in mixed)
