"""Clients with the same data, order and seed are one client: plain local training, and what is named here.

A client that nobody reaches leaves a method's rule out, so the one client is written down, not run by the method.
"""

from dataclasses import replace

import plain_merges
import plain_products as plain
import pytest
import torch
from plain_products import Drift
from test_merge_methods import Pull, models, parts, settled
from test_product_methods import GRAPHS, NOBODY, exchange, run, start

from cases import others_slow
from peerlora.algorithms import build_algorithm
from peerlora.data.batches import Shards
from peerlora.lora.diagnostics import agreement
from peerlora.runtime.compose import compose
from peerlora.topology.schedule import build_topology

GRAPH = pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.kind)
ROUNDS = 4  # the random graph leaves nobody alone in these
ALONE = ["clients=1", "topology.kind=edges", "topology.edges=[]", "topology.allow_disconnected=true"]


CUTS = {"gamma": 0.8, "penalty": 0.5, "smallest": 2}


def nothing(client, base, before, *_):
    return client


def cut(client, base, before, *_):
    return plain.hetlora_local(*CUTS.values())(before, client)


def factored_anew(client, base, before, t, *_):
    return plain.decaf([client], 0, [1.0], t)


def merged_and_redrawn(client, base, before, t, spec, seed):
    own = client.cut(client.rank)
    plain_merges.flora(own, base, [client], [1.0], spec, seed, t)
    return own


CASES = {
    "fedrot-lora": ({}, nothing),
    "fedrot-lora B first, all the way": ({"first": "B", "strength": 1.0}, nothing),
    "lora-fair": ({}, nothing),  # with any ridge: without a cross-term there is nothing to correct
    "lora-fair cosine": ({"objective": "cosine"}, nothing),
    "fedex-lora": ({}, nothing),  # and nothing is left to merge
    "hetlora": ({"gamma": 1.0}, nothing),
    "hetlora cut": (CUTS, cut),  # every client penalises and cuts its own tail, with or without neighbours
    "decaf": ({}, factored_anew),  # the product stays, but its new factors train along another path
    "flexlora": ({}, factored_anew),
    "fedhl": ({}, factored_anew),  # from zero a reference has no more than the rank of all, so no tail to keep
    "flora": ({}, merged_and_redrawn),  # the model stays, but a new A trains along another path
}


def one_client(x, learner, rounds, after, seed):
    """(adapters, the base's change by layer) of one client after every round, ``after`` done to what it trained."""
    client, states = plain.taken_apart(x)[0], []
    base = plain_merges.no_base(client)
    for t in range(rounds):
        with learner.round(t):
            (trained,) = plain.taken_apart(learner.fit(plain_merges.as_adapters(x, [client], [base]), "AB"))
        client = after(trained, base, client, t, x.spec, seed)
        states.append((plain.put_together(replace(x, merged=None), [client]), [base_of(base)]))
    return states


def base_of(base):
    return {n: W.copy() for n, W in base.items()}


def assert_one_client(algorithm, found, expected):
    """Factors, heads, ranks, bases; and then averaging factors loses nothing, not even those of an SVD."""
    for state, (one, (base,)) in zip(found, expected, strict=True):
        x, apart = algorithm.model(state), agreement(algorithm.model(state))
        assert torch.equal(x.ranks, one.ranks.expand(4)) and (x.flat - one.flat).abs().max() < 1e-9
        assert apart.cross_term < 1e-16 and apart.consensus_product < 1e-16
        for n, W in x.merged.layers.items() if x.merged else ():
            assert (W.weight() - torch.from_numpy(base[n])).abs().max() < 1e-9


@GRAPH
@pytest.mark.parametrize("case", CASES)
def test_it_is_one_client(case, graph):
    settings, after = CASES[case]
    algorithm, peers = build_algorithm(case.split()[0], settings), exchange(graph)
    found = run(algorithm, start(), peers, ROUNDS, Drift([0] * 4))
    expected = one_client(start((4,)), Drift([0]), ROUNDS, after, peers.topology.seed)
    assert_one_client(algorithm, found, expected)
    assert [int(x.ranks) for x, _ in expected] == ([4, 3, 2, 2] if case == "hetlora cut" else [4] * ROUNDS)


def federations(config, name, settings):
    """Four clients with the first one's rows and seed, and the first one alone."""
    words = [f"algorithm.name={name}", *(f"algorithm.{key}={value}" for key, value in settings.items())]
    four, one = (compose(config("bert", *words, "train.lr=0.05", *more)) for more in ([], ALONE))
    old = four.learner.shards
    four.learner.shards = Shards(old.data, [old.shards[0]] * 4, old.batches, [0] * 4, old.seed)
    one.learner.shards = Shards(old.data, [old.shards[0]], old.batches[:1], [0], old.seed)
    return four, one


@pytest.mark.parametrize("case", others_slow(CASES, ["hetlora cut", "flora", "fedhl"]))
def test_it_is_one_client_on_a_real_model(config, case):
    settings, after = CASES[case]
    four, one = federations(config, case.split()[0], settings)
    found = run(four.algorithm, four.start, four.exchange, ROUNDS, four.learner)
    expected = one_client(one.start, one.learner, ROUNDS, after, four.topology.seed)
    assert_one_client(four.algorithm, found, expected)


RAC = {"chain": 2, "settle": 1}


@GRAPH
@pytest.mark.parametrize("side", ["right", "left"])
def test_rac_lora_is_the_chain_of_one_client(side, graph):
    """Not plain LoRA: a block trains one factor, against a random other one."""
    algorithm, peers = build_algorithm("rac-lora", {**RAC, "side": side}), exchange(graph)
    alone = build_topology(NOBODY, 1, peers.topology.seed)
    found = run(algorithm, start(), peers, 7, Drift([0] * 4))
    assert_one_client(algorithm, found, plain_merges.rac(start((4,)), Drift([0]), alone, 7, *RAC.values(), side))


def test_rac_lora_is_the_chain_of_one_client_on_a_real_model(config):
    four, one = federations(config, "rac-lora", RAC)
    found = run(four.algorithm, four.start, four.exchange, 7, four.learner)
    expected = plain_merges.rac(one.start, one.learner, one.topology, 7, *RAC.values(), "right")
    assert_one_client(four.algorithm, found, expected)


@GRAPH
def test_fedhl_adds_to_a_reference_above_its_rank_what_one_client_learned(graph):
    """``F <- F + T - S`` of one client; S, what it trains from, is the best approximation of F."""
    algorithm, state, peers, F = settled(start(), graph, 6)
    for t in range(ROUNDS):
        S, learner = models(state.adapters), Drift([0] * 4)
        with learner.round(t):
            peers.begin(t)
            trained = learner.fit(state.adapters, "AB")
            F = {n: F[n][:1] + (P - S[n])[:1] for n, P in models(trained).items()}
            state = algorithm.round(t, state, learner, peers)
        for n, W in parts(state)[1].items():
            U, values, V = torch.linalg.svd(F[n][0])
            best = (U[:, :4] * values[:4]) @ V[:4]
            assert values[4] > 0.1 and (W - F[n]).abs().max() < 1e-9
            assert (models(state.adapters)[n] - best).abs().max() < 1e-9
        assert agreement(state.adapters).cross_term < 1e-16


class Blind(Pull):
    """A step of the products alone towards a common target: the same from every pair of factors that makes them."""

    def __init__(self, clients):
        super().__init__(1.0)
        self.target = {n: own[:1].expand(clients, -1, -1) for n, own in self.target.items()}

    def fit(self, x, train):
        flat, s = x.flat.clone(), x.scaling[:, None, None]
        y = replace(x, flat=flat)
        for n, W in models(x).items():
            step = 0.3 * (W - self.target[n]) / s
            y.B[n].sub_(step @ torch.linalg.pinv(x.A[n]))
            y.A[n].sub_(torch.linalg.pinv(x.B[n]) @ step)
        return y


@GRAPH
@pytest.mark.parametrize("name", ["decaf", "flexlora", "fedhl"])
def test_where_training_does_not_see_the_gauge_products_are_those_of_plain_lora(name, graph):
    algorithm, peers = build_algorithm(name, {}), exchange(graph)
    found = run(algorithm, start(), peers, 8, Blind(4))
    local = run(build_algorithm("local", {}), start((4,)), exchange(NOBODY, 1), 8, Blind(1))
    for t, (state, one) in enumerate(zip(found, local, strict=True)):
        x = algorithm.model(state)
        for n, P in models(x).items():
            assert (P - models(one)[n]).abs().max() < 1e-9
        # A client that nobody reached keeps its own gauge.
        assert (agreement(x).cross_term < 1e-9) == bool((peers.topology.at(t).degrees > 0).all())
    errors = [float((models(one)["q"] - Blind(1).target["q"]).norm()) for one in local]
    assert errors[-1] < 0.8 * errors[0]
