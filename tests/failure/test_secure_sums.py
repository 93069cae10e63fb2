"""Secure sums while processes die, hang and come back: on the in-memory twin, under a virtual clock."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from in_memory import sites_agreements
from rounds import DEADLINE, Federation, run, site

from cases import others_slow
from peerlora.config.sections import CompleteGraph, RingGraph
from peerlora.exchange.fixed_point import decode, encode
from peerlora.network.protocol.control import PeerControl
from peerlora.network.protocol.link_history import ExchangeStep
from peerlora.network.protocol.masks import sum_of
from peerlora.network.protocol.neighbour_exchange import without
from peerlora.network.protocol.secure_exchange import secure_sum
from peerlora.network.protocol.sender_sets import SenderSets

RING, COMPLETE = RingGraph(kind="ring"), CompleteGraph(kind="complete")


class SecureFederation(Federation):
    """Peers that know the sums of their neighbours' numbers only."""

    def __init__(self, graph, **options):
        super().__init__(graph, **options)
        self.topology = replace(self.topology, least_degree=2)
        self.sets, self.asked = {}, {}
        self.agreements = sites_agreements([site(j) for j in range(self.clients)])

    def transport(self, client):
        agreement = sites_agreements([site(client)])[site(client)]  # of a new process: its session key is another
        agreement.listed, agreement._long_term = (
            self.agreements[site(client)].listed,
            self.agreements[site(client)]._long_term,
        )
        return self.network.transport(site(client), agreement=agreement)

    def control(self, client, endpoint):
        def planned(t, receiver):
            return [site(j) for j in self.topology.at(t).neighbours(int(receiver.removeprefix("site-")))]

        agreement = endpoint.transport.agreement
        self.sets[client] = SenderSets(endpoint, agreement, planned, self.deadline)
        return PeerControl(endpoint, {}, self.deadline, sender_sets=self.sets[client])

    def enter(self, client, endpoint, t):
        endpoint.enter(t)
        self.sets[client].ask(ExchangeStep(t))

    async def exchange(self, client, t, protocol):
        graph, sets = self.topology.at(t), self.sets[client]
        names = {site(j): j for j in graph.neighbours(client)}
        value = torch.tensor([self.values[client]], dtype=torch.float64)
        self.asked[t, client] = {names[peer] for peer in sets.own.keys} if sets.own else set()

        def weighted(receiver):
            return encode(value, float(graph.W[names[receiver], client]))

        found = await secure_sum(protocol, sets, list(names), weighted, 1, self.deadline)
        heard = {names[peer] for peer in found.received}
        assert heard in (set(), self.asked[t, client]), "a sum is of the whole set, or of nobody"
        row = without(graph, [(client, j) for j in names.values() if j not in heard]).W[client]
        if heard:
            total = sum_of(found.received.values(), 1) + encode(value, float(row[client]))
            plain = sum(row[j] * self.values_in[t][j] for j in heard) + row[client] * self.values[client]
            self.values[client] = float(decode(total, torch.float64))
            assert self.values[client] == pytest.approx(plain, abs=1e-9), "masks are left in the sum"
        self.missed[t, client] = {names[peer]: reason for peer, reason in found.missing.items()}
        self.used[t, client] = heard

    def given_up(self):
        """(round, client) of the sums that did not come together."""
        return sorted(key for key, heard in self.used.items() if not heard)


def federation(graph, **options):
    found = SecureFederation(graph, **options)
    found.values_in = _Noted(found)
    return found


class _Noted:
    """By round, what each client brought into its exchange: it is in no message that anybody could read."""

    def __init__(self, found):
        self.rounds, exchange = {}, found.exchange

        async def noted(client, t, protocol):
            self.rounds.setdefault(t, {})[client] = found.values[client]
            await exchange(client, t, protocol)

        found.exchange = noted

    def __getitem__(self, t):
        return self.rounds[t]


@pytest.mark.parametrize("graph", [RING, COMPLETE])
def test_undisturbed_all_sums_come_together_and_nobody_waits_longer_than_with_plain_mixing(graph):
    """Sender sets are there before the exchange begins: with delays on every link it takes what the plain one takes."""

    def took(kind):
        found = kind(graph)
        for one in range(4):
            for other in range(one):
                found.network.delay(site(one), site(other), 0.2)
        run(found)
        assert not any(found.missed.values()) and not any(notice[1] == "half-used" for notice in found.notices)
        for t in range(found.rounds):
            assert np.allclose(found.W(t), found.topology.at(t).W)
        assert np.mean(list(found.values.values())) == pytest.approx(1.5, abs=1e-9)
        return found.took

    secure, plain = took(federation), took(Federation)
    assert secure == pytest.approx(plain, abs=1e-6)


def test_who_dies_while_all_train_is_left_out_of_the_sums_of_that_round():
    async def script(found):
        await asyncio.sleep(8.5)
        found.died = found.endpoint[2].at.round
        assert all(found.endpoint[i].at == found.endpoint[2].at for i in range(4))
        found.kill(2)

    found = run(federation(COMPLETE, rounds=16), script)
    assert found.given_up() == [] and max(found.took.values()) < 1.0
    for t in range(found.died, found.rounds):
        for client in (0, 1, 3):
            assert found.used[t, client] == {0, 1, 3} - {client}
            assert found.missed[t, client].keys() == {2}


def test_who_dies_within_an_exchange_costs_its_neighbours_one_sum():
    """They had asked for a sum with it; nothing is repaired, since that would take its masks off."""

    async def script(found):
        await asyncio.sleep(8.5)
        while not all(found.endpoint[client].at.round == found.endpoint[2].at.round for client in range(4)):
            await asyncio.sleep(0.1)
        found.died = found.endpoint[2].at.round
        await asyncio.sleep(2.0)  # the others wait in their exchange for the one that still trains
        assert all((found.died, client) not in found.used for client in range(4))
        found.kill(2)

    found = federation(COMPLETE, rounds=12)
    found.seconds[2] = 4.0
    run(found, script)
    assert found.given_up() == [(found.died, client) for client in (0, 1, 3)]
    for client in (0, 1, 3):
        assert found.missed[found.died, client].keys() == {0, 1, 2, 3} - {client}
        assert "sum given up" in found.missed[found.died, client].values()
        assert all(found.took[t, client] < 1.0 for t in range(found.died + 1, found.rounds))
        assert found.used[found.rounds - 1, client] == {0, 1, 3} - {client}


def test_who_hangs_costs_one_deadline_at_most():
    async def script(found):
        await asyncio.sleep(8.5)
        found.network.hang(site(2))
        await asyncio.wait([task for client, task in found.tasks.items() if client != 2])
        found.network.wake(site(2))
        found.kill(2)

    found = run(federation(COMPLETE, rounds=12), script)
    assert all(found.done(client) == found.rounds for client in (0, 1, 3))
    for client in (0, 1, 3):
        assert sum(found.took[t, client] > 1.0 for t in range(found.rounds)) <= 1
        assert max(found.took[t, client] for t in range(found.rounds)) <= DEADLINE + 0.5
        assert found.used[found.rounds - 1, client] == {0, 1, 3} - {client}


def test_who_comes_back_is_in_the_sums_again_with_other_keys():
    keys = []

    async def script(found):
        await asyncio.sleep(8.5)
        keys.append(found.sets[2].agreement.session_key)
        found.kill(2)
        while found.done(1) < 10:
            await asyncio.sleep(0.5)
        found.start(2, t=2)

    found = run(federation(COMPLETE, rounds=24), script)
    keys.append(found.sets[2].agreement.session_key)
    assert len(set(keys)) == 2
    for client in range(4):
        assert found.used[found.rounds - 1, client] == {0, 1, 2, 3} - {client}
    given_up = {t for t, client in found.given_up()}
    assert len(given_up) <= 3, f"it costs few sums: {found.given_up()}"
    assert found.sets[0].session_keys[site(2)] == keys[1]


def test_with_one_neighbour_left_nothing_is_summed_and_the_rest_goes_on():
    """On a ring of five, both neighbours of one that is gone have one neighbour left: its value alone is no sum."""

    async def script(found):
        await asyncio.sleep(8.5)
        found.kill(2)

    found = run(federation(RING, clients=5, rounds=14), script)
    last = found.rounds - 1
    assert found.used[last, 1] == found.used[last, 3] == set()
    assert found.used[last, 0] == {1, 4} and found.used[last, 4] == {0, 3}
    assert all(found.took[last, client] < 1.0 for client in (0, 1, 3, 4)), "nobody waits for what never comes"
    assert not found.sets[1].own and (last, 1) in found.given_up()
    assert any(notice[:2] == (0, "half-used") for notice in found.notices), "it is told that 1 took nothing"


@pytest.mark.parametrize("seed", others_slow(range(6), [0, 1]))
def test_whatever_dies_and_comes_back_no_mask_is_left_in_a_sum(seed):
    """``exchange`` compares every sum with what was brought into it."""
    draw = np.random.default_rng(seed)

    async def script(found):
        for _ in range(4):
            await asyncio.sleep(float(draw.uniform(2, 12)))
            victim = int(draw.integers(found.clients))
            found.kill(victim)
            await asyncio.sleep(float(draw.uniform(0, 12)))
            others = [found.endpoint[client].at.round for client in range(found.clients) if client != victim]
            found.start(victim, t=max(0, min(others) - 1))

    found = federation(COMPLETE, clients=5, rounds=60, seed=seed)
    found.seconds = {client: float(draw.uniform(0.5, 2.5)) for client in range(5)}
    run(found, script)
    assert max(found.took.values()) <= DEADLINE + 0.5
    assert all(found.used[found.rounds - 1, client] for client in range(5)), "at the end sums come together again"
