"""Cached-DFL against dictionaries of numpy rows, its limit cases, what it refuses, and whole runs."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from quadratics import adapters, coupled

from peerlora.algorithms import build_algorithm
from peerlora.algorithms.cached_dfl import CachedDFL
from peerlora.algorithms.compatibility import cache_settings
from peerlora.algorithms.traits import Traits
from peerlora.config.exchange import CacheConfig
from peerlora.config.loading import load_config, parse_spec
from peerlora.errors import CompositionError, ConfigError
from peerlora.exchange.relay import RelayCaches
from peerlora.exchange.schema import encoded_bytes
from peerlora.exchange.stacked import StackedExchange
from peerlora.runs.events import Evaluated, RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.report import write_report
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.peer.checks import plan_peer
from peerlora.runtime.peer.site import Site
from peerlora.runtime.plan import plan
from peerlora.runtime.simulate import build_rounds, simulate
from peerlora.topology.schedule import build_topology
from peerlora.tree import held

CLIENTS, STEPS, ROUNDS, RATE = 6, 3, 9, 0.05
ROWS = {i: 10 * (i + 1) for i in range(CLIENTS)}
COLUMNS = {"AB": [0, 1, 2, 3], "A": [0, 2, 3], "B": [1, 2, 3]}


def own_peers(graph, algorithm, x, clients=CLIENTS):
    """An exchange whose clients keep the method's cache."""
    peers = exchange_of(graph, clients)
    peers.relayed = RelayCaches(algorithm.cache, x.spec, {i: ROWS[i] for i in range(clients)}, clients)
    return peers


def exchange_of(graph, clients):
    return StackedExchange(replace(build_topology(parse_spec(graph), clients, 0), interrupted=True), range(clients))


class Dictionaries:
    """One dictionary per client: origin -> (round, row); everything by hand."""

    def __init__(self, keep=None, max_age=None, weights="uniform", pull=0.0, when="rounds"):
        self.keep, self.max_age, self.weights, self.pull, self.when = keep, max_age, weights, pull, when
        self.held = [{} for _ in range(CLIENTS)]

    def round(self, t, u, adjacency, gradient, columns):
        x = u.copy()
        for _ in range(STEPS):
            x[:, columns] -= RATE * (gradient(x) + self.pull * (x - u))[:, columns]
        if self.max_age is not None:
            self.held = [{j: each for j, each in own.items() if t - each[0] <= self.max_age} for own in self.held]
        before = [dict(own) for own in self.held]
        for i, own in enumerate(self.held):
            for j in np.flatnonzero(adjacency[i]):
                for origin, each in before[j].items():
                    if origin != i and each[0] > own.get(origin, (-1,))[0]:
                        own[origin] = each
            for j in [i, *np.flatnonzero(adjacency[i])]:
                own[int(j)] = (t, x[j])
        for i, own in enumerate(self.held):
            others = sorted((j for j in own if j != i), key=lambda j, i=i, own=own: (-own[j][0], (j - i) % CLIENTS))
            for j in others[self.keep or CLIENTS :]:
                del own[j]
        after = x.copy()
        for i, own in enumerate(self.held):
            if self.when == "rounds" or adjacency[i].any():
                alpha = {j: ROWS[j] if self.weights == "rows" else 1 for j in own}
                after[i] = sum(alpha[j] * row for j, (_, row) in own.items()) / sum(alpha.values())
        return after


SETTINGS = [
    {},
    {"max_age": 2},
    {"keep": 2, "weights": "rows"},
    {"pull": 0.7, "when": "contacts"},
    {"interval": 2, "max_age": 4, "keep": 3, "when": "contacts"},
]
GRAPHS = ["path", "random p=0.15", "directed-ring", "ring drop_links=0.5"]


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("own", SETTINGS, ids=str)
def test_rounds_equal_dictionaries_of_rows(own, graph):
    learner, x = coupled(CLIENTS, 4, lr=RATE, local_steps=STEPS), adapters(CLIENTS, 1, 1, head=2)
    algorithm = build_algorithm("cached-dfl", own)
    peers = own_peers(graph, algorithm, x)
    plain = Dictionaries(**{name: value for name, value in own.items() if name != "interval"})
    H, r, u, state = learner.H.numpy(), learner.r.numpy(), x.flat.numpy().copy(), algorithm.start(x, peers)
    alone = 0
    for t in range(ROUNDS):
        peers.begin(t)
        state = algorithm.round(t, state, learner, peers)
        adjacency = peers.graph.adjacency
        alone += int((~adjacency.any(1)).sum())
        u = plain.round(t, u, adjacency, lambda at: np.einsum("cij,cj->ci", H, at) - r, COLUMNS[algorithm.active(t)])
        assert np.abs(state.flat.numpy() - u).max() < 1e-13, t
        told = [[each.get(j, (-1,))[0] + 1 for j in range(CLIENTS)] for each in plain.held]
        assert peers.relayed.versions.tolist() == told
    assert np.abs(u).max() > 0.05
    if graph != "path":
        assert alone or graph == "directed-ring"
    ages = np.array([ROUNDS - 1 - each[0] for own in plain.held for each in own.values()])
    assert ages.max() > 0 or own.get("max_age") == 0, "nothing came over more than one link"


def states(method, own, graph, rounds=ROUNDS, clients=CLIENTS):
    learner, x = coupled(clients, 4, lr=RATE, local_steps=STEPS), adapters(clients, 1, 1, head=2)
    algorithm = build_algorithm(method, own)
    peers = own_peers(graph, algorithm, x, clients) if method == "cached-dfl" else exchange_of(graph, clients)
    state, found = algorithm.start(x, peers), []
    for t in range(rounds):
        peers.begin(t)
        state = algorithm.round(t, state, learner, peers)
        found.append(algorithm.model(state).flat)
    return torch.stack(found)


@pytest.mark.parametrize(
    ("own", "method", "theirs"),
    [
        ({}, "dec-lora", {}),
        ({"when": "contacts", "max_age": 0}, "dec-lora", {}),
        ({"interval": 2}, "adf-lora", {"interval": 2}),
        ({"pull": 0.3}, "fedprox", {"mu": 0.3}),
    ],
)
def test_on_the_complete_graph_all_ages_are_0_and_it_is_plain_averaging(own, method, theirs):
    ours, plain = states("cached-dfl", own, "complete"), states(method, theirs, "complete")
    assert (ours - plain).abs().max() < 1e-14 and plain.abs().max() > 0.05


def test_without_old_entries_it_averages_the_closed_neighbourhood():
    """On a ring all have two neighbours, so Metropolis weights are equal."""
    ours, plain = states("cached-dfl", {"max_age": 0}, "ring"), states("dec-lora", {}, "ring")
    assert (ours - plain).abs().max() < 1e-14
    assert (states("cached-dfl", {}, "ring") - plain).abs().max() > 1e-3, "and with them something else"


@pytest.mark.parametrize("when", ["rounds", "contacts"])
def test_a_client_that_meets_nobody_trains_alone_to_the_bit(when):
    graph = "edges edges=[[0,1]] allow_disconnected=true"
    ours, alone = states("cached-dfl", {"when": when}, graph), states("local", {}, graph)
    assert torch.equal(ours[:, 2:], alone[:, 2:]) and not torch.equal(ours[-1, 0], alone[-1, 0])


def test_between_contacts_it_is_pulled_to_the_cache_unless_told_to_wait():
    """Clients 0 and 1 meet in the first round only."""
    learner, x = coupled(2, 4, lr=RATE, local_steps=STEPS), adapters(2, 1, 1, head=2)

    def later(when):
        algorithm = build_algorithm("cached-dfl", {"when": when})
        peers, state, found = own_peers("complete", algorithm, x, 2), x, []
        for t in range(3):
            peers.begin(t, [] if t == 0 else [1])
            with_cache = algorithm.round(t, state, learner, peers)
            found.append(with_cache.flat[0])
            state = held(state, with_cache, [1] if t else [])
        return found

    (first, *rounds), (same, *contacts) = later("rounds"), later("contacts")
    assert torch.equal(first, same)
    one = replace(x, flat=torch.stack([first, first]))
    assert torch.equal(contacts[0], learner.fit(one, "AB").flat[0])
    trained = learner.fit(x, "AB").flat[1]  # what 0 holds of 1
    torch.testing.assert_close(rounds[0], (contacts[0] + trained) / 2, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"max_age": -1}, "algorithm.max_age: -1 given; expected at least 0"),
        ({"keep": 0}, "algorithm.keep: 0 given; expected at least 1 entry, or null for all"),
        ({"pull": -0.1}, "algorithm.pull: -0.1 given; expected at least 0"),
        ({"interval": 0}, "algorithm.interval: 0 given; expected at least 1 round"),
        ({"weights": "age"}, "algorithm.weights: 'age' given"),
        ({"when": "always"}, "algorithm.when: 'always' given"),
    ],
)
def test_settings_out_of_range_are_refused(own, told):
    with pytest.raises(ConfigError, match=told):
        build_algorithm("cached-dfl", own)


def planned(*words, graph="ring"):
    return load_config({"clients": 6}, ["algorithm.name=cached-dfl", f"topology={graph}", *words])


def test_a_topology_whose_links_go_one_way_will_do_but_not_between_real_peers():
    one_way = planned("topology.kind=directed-ring")
    assert plan(one_way).warnings == ()
    with pytest.raises(CompositionError, match="algorithm.name=cached-dfl swaps adapters over links that go both ways"):
        plan_peer(one_way, Site(0, {i: f"s{i}" for i in range(6)}, "l/run"))


def test_on_a_bounded_virtual_clock_the_run_says_that_entries_take_no_time():
    (told,) = plan(planned("clock.bandwidth=1000")).warnings
    assert told.startswith("algorithm.name=cached-dfl on the virtual clock: relayed entries count as bytes and take no")


class Undeclared(CachedDFL):
    """Of another package: its traits do not say that it keeps a cache."""

    traits: ClassVar = Traits(source="a test", sends="adapters")


def test_a_method_with_a_cache_must_say_so_in_its_traits():
    assert cache_settings(planned(), CachedDFL(keep=2)) == CacheConfig(keep=2)
    assert cache_settings(planned("algorithm.name=dec-lora"), build_algorithm("dec-lora", {})) is None
    with pytest.raises(CompositionError, match='has a cache, and its traits say sends="adapters".*; give them sends='):
        cache_settings(planned(), Undeclared())


def test_a_method_that_averages_a_cache_that_nobody_keeps_is_told():
    learner, x = coupled(2, 4), adapters(2, 1, 1, head=2)
    with pytest.raises(CompositionError, match="averages a cache and has none; let its property `cache` give settings"):
        build_algorithm("cached-dfl", {}).round(0, x, learner, exchange_of("complete", 2))


def test_what_an_attacker_sends_is_passed_on_and_averaged_far_away(config):
    """On a path 0 - 1 - 2 - 3 whose client 0 attacks."""

    def run(*words):
        chosen = config("bert", "algorithm.name=cached-dfl", "topology=path", "train.lr=0.05", *words)
        federation = compose(chosen)
        rounds, state = build_rounds(federation), federation.start
        for t in range(3):
            state, _ = rounds.advance(t, state)
        return federation, state

    attack = ["adversary.clients=[0]", "adversary.attack=sign-flip", "adversary.scale=30"]
    (federation, attacked), (plain, honest) = run(*attack), run()
    moved = (attacked.flat - honest.flat).norm(dim=1)
    assert moved[3] > 0.05, "over three links, in three rounds"
    base = federation.start.flat[0]
    entries = [each.exchange.relayed.caches[3] for each in (federation, plain)]
    theirs, true = (cache.entry(0).values - base for cache in entries)
    assert entries[0].versions[0] == 1 and torch.allclose(theirs, -30 * true, rtol=1e-9, atol=1e-12)
    x, peers = plain.start, federation.exchange
    x = replace(x, flat=torch.randn(x.flat.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    peers.begin(3)
    after = peers.mix_cached(x).flat[0]
    torch.testing.assert_close(after, x.flat[:2].mean(0), rtol=0, atol=1e-12)  # it goes on from true models around it


@pytest.mark.usefixtures("drawn")
def test_a_run_tells_how_old_entries_are_and_what_they_cost_and_relays_nothing_to_deploy(config, tmp_path):
    words = ["topology=path", "train.rounds=4", "eval.every=1", "eval.rows=4"]
    chosen = config("bert", "algorithm.name=cached-dfl", *words)
    run = simulate(chosen, tmp_path / "run").run
    told = select_events(read_events(run), RoundDone)
    assert [each.measures["relayed_age_max"] for each in told] == [0, 1, 2, 2]
    assert [each.measures["relayed_known_min"] for each in told] == [2, 3, 4, 4]
    assert [each.measures["relayed_entries"] for each in told][:2] == [0, 4]  # in round 1: of 0 and 2, of 1 and 3
    federation = compose(chosen)
    message = encoded_bytes(federation.algorithm.message(federation.start, 0))
    assert told[0].bytes_sent == 6 * message + told[0].measures["relayed_bytes"] > 6 * message
    assert all(each.local_cross_term != each.local_cross_term and each.rho != each.rho for each in told)
    assert all(not each.relayed for each in select_events(read_events(run), Evaluated))
    assert not (run / "adapters" / "relayed.safetensors").exists()
    page = write_report(run).read_text()
    assert "Age of the entries that clients hold" in page and "relayed model" not in page


def test_who_is_away_on_the_virtual_clock_makes_no_entry_and_stays_as_it_is(config):
    away = "clock.away=[{client: 3, leave: 1, back: 3}]"
    federation = compose(config("bert", "algorithm.name=cached-dfl", "topology=complete", "train.rounds=4", away))
    rounds, state, versions, kept = build_rounds(federation), federation.start, [], []
    for t in range(4):
        state, told = rounds.advance(t, state)
        versions.append(federation.exchange.relayed.versions[0].tolist())
        kept.append(state.flat[3].clone())
        assert told.absent == ([3] if t in (1, 2) else [])
    assert versions == [[1, 1, 1, 1], [2, 2, 2, 1], [3, 3, 3, 1], [4, 4, 4, 4]]
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[1], kept[2]) and not torch.equal(kept[2], kept[3])
