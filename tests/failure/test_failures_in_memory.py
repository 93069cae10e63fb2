"""Everything that networks and processes do, on the in-memory twin under a virtual clock."""

import asyncio

import numpy as np
import pytest
from rounds import DEADLINE, Federation, run, site

from cases import others_slow
from peerlora.config.sections import CompleteGraph, PathGraph, RandomGraph, RingGraph
from peerlora.network.protocol.control import PeerControl
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.wire import Expected, encode_header
from peerlora.network.transport.memory import MemoryNetwork, MemoryTransport
from peerlora.network.transport.virtual_loop import virtual_run

RING, COMPLETE = RingGraph(kind="ring"), CompleteGraph(kind="complete")
PATH, RANDOM = PathGraph(kind="path"), RandomGraph(kind="random", p=0.6)


def alone(federation, *clients):
    """Clients that finished every round."""
    return all(federation.done(client) == federation.rounds for client in clients)


@pytest.mark.parametrize("graph", [RING, COMPLETE, PATH, RANDOM])
def test_undisturbed_every_edge_is_used_and_the_mean_stays(graph):
    found = run(Federation(graph))
    found.check()
    assert alone(found, 0, 1, 2, 3) and not any(found.missed.values())
    for t in range(found.rounds):
        assert np.allclose(found.W(t), found.topology.at(t).W)
    assert np.mean(list(found.values.values())) == pytest.approx(1.5, abs=1e-12)
    assert all(len(reached) == 3 for reached in found.reached.values())
    assert not any(each.peers.isolated for each in found.endpoint.values())  # so nobody would take over a state


def test_different_speeds_within_the_deadline_cost_nothing():
    found = Federation(RING)
    found.seconds.update({0: 0.1, 1: 6.0})
    run(found).check()
    assert not any(found.missed.values()) and alone(found, 0, 1, 2, 3)


def test_a_peer_slower_than_the_deadline_is_left_behind_and_catches_up():
    found = Federation(RING, rounds=12)
    found.seconds[2] = 2.5 * DEADLINE
    run(found).check()
    assert alone(found, 0, 1, 3)
    assert 0 < found.done(2) < found.rounds  # it left rounds out, and came to the end
    assert max(t for t, client in found.used if client == 2) == found.rounds - 1
    assert "no message" in {reason for (t, i), missing in found.missed.items() if i == 1 for reason in missing.values()}


def test_a_peer_that_dies_costs_its_neighbours_less_than_a_deadline():
    async def script(found):
        await asyncio.sleep(8.5)
        found.kill(2)

    found = run(Federation(RING, rounds=16), script)
    found.check()
    assert alone(found, 0, 1, 3)
    after = [t for t in range(found.rounds) if 2 in found.missed[t, 1]]
    assert after and after[-1] == found.rounds - 1
    assert all(found.took[t, 1] < 1.0 for t in after)
    assert any(notice[:3] == (1, "down", site(2)) for notice in found.notices)


def test_a_peer_that_hangs_costs_one_deadline_at_most():
    async def script(found):
        await asyncio.sleep(8.5)
        found.network.hang(site(2))

    found = Federation(RING, rounds=16)
    run_until_others_end(found, script, 2)
    found.check()
    assert alone(found, 0, 1, 3)
    waited = [found.took[t, 1] for t in range(found.rounds) if 2 in found.missed[t, 1]]
    assert waited and sum(took > 1.0 for took in waited) <= 1
    assert {"suspect", "down"} <= {kind for client, kind, peer, _ in found.notices if (client, peer) == (1, site(2))}


def run_until_others_end(found, script, hanging):
    async def whole(found):
        await script(found)
        await asyncio.wait([task for client, task in found.tasks.items() if client != hanging])
        found.network.wake(site(hanging))
        found.kill(hanging)

    run(found, whole)


def test_a_peer_that_hung_and_goes_on_takes_part_again():
    async def script(found):
        await asyncio.sleep(8.5)
        found.network.hang(site(2))
        held = asyncio.get_running_loop().time()
        while found.done(1) < 6:
            await asyncio.sleep(0.5)
        assert asyncio.get_running_loop().time() - held < 60
        found.network.wake(site(2))

    found = Federation(RING, rounds=20)
    found.seconds = dict.fromkeys(range(4), 3.0)
    run(found, script).check()
    assert alone(found, 0, 1, 3)
    assert {1, 3} <= found.used[found.rounds - 1, 2]


def test_a_peer_whose_message_comes_late_asks_in_which_round_the_others_are():
    """Otherwise it would hear of it with their next message, and train many short rounds for nothing before."""
    network, ends = MemoryNetwork(map(site, range(2))), []

    async def script():
        for me in range(2):
            endpoint = Endpoint(network.transport(site(me)), Expected("run", "ba5e", "5bec"), [site(1 - me)])
            control = PeerControl(endpoint, {}, DEADLINE)
            ends.append((endpoint, control, RoundProtocol(endpoint, DEADLINE, lambda kind: 1 << 12, control)))
            await control.start(ends[me][2])
            endpoint.start_at(2)
        await asyncio.gather(*(control.handshake(5.0) for _, control, _ in ends))
        await asyncio.sleep(5)
        (mine, _, protocol), (theirs, _, _) = ends
        theirs.enter(10)
        outcome = await protocol.exchange((site(1),), b"", lambda header, body: None, DEADLINE)
        assert outcome.missing == {site(1): "late"}
        await asyncio.sleep(0.01)
        assert mine.peers.round_to_follow(3) == (10, site(1))
        for _, control, _ in ends:
            await control.close()

    virtual_run(script())


def test_a_peer_that_ran_ahead_alone_waits_and_takes_nobody_with_it():
    """Cut off, it has nobody to wait for; those who are still together leave no round out for it when it is back."""
    ahead = {}

    async def script(found):
        await asyncio.sleep(6.5)
        for other in (0, 1, 3):
            found.network.cut(site(2), site(other), True)
        await asyncio.sleep(14)
        ahead.update({client: found.endpoint[client].at.round for client in (1, 2)})
        for other in (0, 1, 3):
            found.network.heal(site(2), site(other))

    found = Federation(RING, rounds=40)
    found.seconds = {0: 2.0, 1: 2.0, 2: 1.0, 3: 2.0}
    run(found, script).check()
    assert ahead[2] >= ahead[1] + 3
    assert alone(found, 0, 1, 2, 3)
    assert found.used[found.rounds - 1, 2] == {1, 3}


def test_who_was_cut_off_or_stood_still_knows_that_the_others_may_have_gone_on():
    seen = {}

    async def script(found):
        await asyncio.sleep(8.5)
        seen["before"] = {client: found.endpoint[client].peers.isolated for client in range(4)}
        found.network.hang(site(2))
        await asyncio.sleep(20)
        found.network.wake(site(2))
        await asyncio.sleep(1.5)
        seen["woken"] = {client: found.endpoint[client].peers.isolated for client in range(4)}

    found = Federation(RING, rounds=40)
    found.seconds[2] = 1.5
    run(found, script).check()
    assert not any(seen["before"].values())
    assert seen["woken"] == {0: False, 1: False, 2: True, 3: False}
    assert not any(each.peers.isolated for each in found.endpoint.values()) and {1, 3} <= found.used[39, 2]


@pytest.mark.parametrize("both", [True, False])
def test_a_cut_link_carries_nothing_and_comes_back(both):
    async def script(found):
        await asyncio.sleep(8.5)
        found.network.cut(site(1), site(2), both)
        while found.done(1) < 6:
            await asyncio.sleep(0.5)
        found.network.heal(site(1), site(2))

    found = Federation(RING, rounds=20)
    found.seconds = dict.fromkeys(range(4), 2.0)
    run(found, script).check()
    assert alone(found, 0, 1, 2, 3)
    missed = [t for t in range(found.rounds) if 2 in found.missed[t, 1]]
    assert missed and all(1 in found.missed[t, 2] for t in missed)
    assert 2 in found.used[found.rounds - 1, 1]
    assert not any(set(found.missed[t, 0]) for t in range(found.rounds))
    assert sum(found.took[t, 1] > 1.0 for t in missed) <= 2


def test_a_network_in_two_halves_goes_on_in_both_and_grows_together():
    async def script(found):
        await asyncio.sleep(8.5)
        found.network.split([site(0), site(1)])
        while found.done(1) < 8:
            await asyncio.sleep(0.5)
        for one in (0, 1):
            for other in (2, 3):
                found.network.heal(site(one), site(other))

    found = Federation(COMPLETE, rounds=24)
    run(found, script).check()
    assert found.used[found.rounds - 1, 0] == {1, 2, 3} and found.used[found.rounds - 1, 3] == {0, 1, 2}


def test_a_peer_that_returns_learns_the_round_and_takes_part():
    async def script(found):
        await asyncio.sleep(8.5)
        found.kill(2)
        while found.done(1) < 10:
            await asyncio.sleep(0.5)
        found.start(2, t=2)  # its checkpoint is from here

    found = run(Federation(RING, rounds=24), script)
    found.check()
    assert alone(found, 0, 1, 3)
    again = [t for t in range(found.rounds) if 2 in found.used[t, 1] and t > 8]
    assert again and again[0] <= 18 and again == list(range(again[0], found.rounds))
    assert any(notice[:3] == (1, "up", site(2)) for notice in found.notices)


def test_everybody_restarts_from_checkpoints_of_different_rounds():
    async def script(found):
        await asyncio.sleep(8.5)
        for client in range(4):
            found.kill(client)
        await asyncio.sleep(1)
        found.used = {key: value for key, value in found.used.items() if key[0] < 2}
        found.took.clear()
        for client, t in enumerate([2, 5, 3, 5]):
            found.start(client, t)

    found = run(Federation(RING, rounds=12), script)
    found.check()
    assert all(found.used[t, client] for t in range(7, 12) for client in range(4))


def test_a_lost_last_acknowledgement_is_found_at_the_next_contact():
    """One end used the edge, the other did not: both can tell, and it is counted."""

    async def script(found):
        await asyncio.sleep(5.9)
        # 1 acknowledges 2's message of the next exchange; that acknowledgement is lost.
        found.network.lose(site(2), site(1), what="ack")

    found = run(Federation(PATH, clients=3, rounds=8), script)
    one_sided = found.one_sided()
    assert len(one_sided) == 1 and one_sided[0][1:] == (1, 2)
    told = [(client, detail) for client, kind, _, detail in found.notices if kind == "half-used"]
    assert told and all(f"round {one_sided[0][0]}:" in detail for _, detail in told)
    assert sum(each.history.one_sided for each in found.endpoint.values()) == len(told)
    assert alone(found, 0, 1, 2)


@pytest.mark.parametrize("which", ["message", "ack"])
def test_a_lost_message_costs_its_own_edge_and_no_other(which):
    """Those who wait for its two ends in later exchanges have begun to wait as early: they must not lose patience."""

    async def script(found):
        await asyncio.sleep(2.5)
        found.network.lose(site(0), site(1), what=which)

    found = run(Federation(RING, clients=6), script)
    if which == "message":
        found.check()
    missed = {(client, j) for (_, client), missing in found.missed.items() for j in missing}
    assert missed <= {(0, 1), (1, 0)} and (0, 1) in missed
    assert len({t for (t, _), missing in found.missed.items() if missing}) == 1
    assert max(found.took.values()) <= DEADLINE


def test_who_has_greeted_and_is_gone_again_is_not_waited_for():
    """A run that sends nothing may be over before a neighbour, whose transport is there already, begins its own."""

    async def main():
        network = MemoryNetwork([site(0), site(1)])
        controls, endpoints = [], []
        for client in (0, 1):
            expected = Expected("run", "ba5e", "5bec")
            endpoints.append(Endpoint(network.transport(site(client)), expected, [site(1 - client)], 8))
            controls.append(PeerControl(endpoints[client], {}, DEADLINE))
            await controls[client].start(RoundProtocol(endpoints[client], DEADLINE, lambda kind: 99, controls[client]))
        quick, slow = controls
        assert (await quick.handshake(100)).reached == {site(1)}
        await quick.close()
        began = asyncio.get_running_loop().time()
        assert (await slow.handshake(100)).reached == {site(0)}
        assert asyncio.get_running_loop().time() - began < 1
        assert endpoints[1].peers.absent == {site(0)}  # so no exchange waits for it either
        await slow.close()

    virtual_run(main())


class SlowToAnswer(MemoryTransport):
    """A transport on which every message is acknowledged after some seconds."""

    seconds = 0.0

    async def send(self, to, header, body, *, deadline):
        await asyncio.sleep(self.seconds)


@pytest.mark.parametrize(("message", "acknowledged", "counts", "took"), [
    (0.0, 0.79, True, 0.79),
    (0.0, 0.85, False, 0.8),  # half of it was there all the time: the other half is lost
    (0.79, 0.85, True, 0.85),  # half of it has only just come: the neighbour was late
    (0.79, 0.95, False, 0.89),
    (0.95, 0.99, True, 0.99),
    (0.95, 1.05, False, 1.0),
])  # fmt: skip
def test_an_edge_is_given_up_when_half_of_it_has_been_there_for_some_time(message, acknowledged, counts, took):
    """All in shares of the deadline."""

    async def main():
        network = MemoryNetwork([site(0), site(1)])
        transports = [SlowToAnswer(network, each) for each in sorted(network.sites)]
        transports[0].seconds = acknowledged * DEADLINE
        other, endpoint = (Endpoint(each, Expected("run", "ba5e", "5bec"), [site(1)]) for each in transports[::-1])
        own = RoundProtocol(endpoint, DEADLINE, lambda kind: 99)
        header, clock = encode_header(other.header("mix")), asyncio.get_running_loop().time
        began = clock()
        exchange = asyncio.create_task(own.exchange([site(1)], b"", lambda header, body: "theirs", DEADLINE))
        await asyncio.sleep(message * DEADLINE)
        await own.deliver(site(1), header, bytearray())
        outcome = await exchange
        assert outcome.received == ({site(1): "theirs"} if counts else {})
        assert clock() - began == pytest.approx(took * DEADLINE)

    virtual_run(main())


@pytest.mark.parametrize("seed", others_slow(range(6), [0, 3]))
def test_under_random_loss_every_one_sided_edge_is_told(seed):
    """Messages and acknowledgements vanish with probability 0.15; W is doubly stochastic but for what is told."""

    async def script(found):
        await asyncio.sleep(4)
        for one in range(4):
            for other in range(4):
                found.network.loss(site(one), site(other), 0.15)
                found.network.loss(site(one), site(other), 0.15, what="ack")
        while min(found.done(client) for client in range(4)) < 15:
            await asyncio.sleep(1)
        for one in range(4):
            for other in range(4):
                found.network.loss(site(one), site(other), 0)
                found.network.loss(site(one), site(other), 0, what="ack")

    found = run(Federation(COMPLETE, rounds=24, deadline=3.0, seed=seed), script)
    told = {
        (int(detail.split()[1].strip(":")), frozenset((site(client), peer)))
        for client, kind, peer, detail in found.notices
        if kind == "half-used"
    }
    happened = {(t, frozenset((site(i), site(j)))) for t, i, j in found.one_sided()}
    assert told == happened and happened
    for t in range(found.rounds):
        W = found.W(t)
        assert np.allclose(W.sum(1), 1)
        if not any(each[0] == t for each in happened):
            assert np.allclose(W.sum(0), 1)
    assert max(found.took.values()) <= 3.5


def test_duplicates_are_dropped():
    async def script(found):
        await asyncio.sleep(4)
        for one in range(4):
            for other in range(4):
                found.network.repeat(site(one), site(other), times=8)

    found = run(Federation(RING), script)
    found.check()
    assert not any(found.missed.values())
