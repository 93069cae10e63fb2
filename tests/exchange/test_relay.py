"""Relayed adapters against a naive simulation of dictionaries, limit cases, and averages against dense products."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save

from cases import others_slow
from peerlora.config.exchange import RelayConfig
from peerlora.config.loading import parse_spec
from peerlora.exchange.entry_pool import Entry
from peerlora.exchange.relay import RelayCaches
from peerlora.exchange.relayed_average import relayed_models, uncut_model
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec, mask_ranks
from peerlora.topology.schedule import build_topology

SPEC = AdapterSpec((LayerSpec("q", 5, 6), LayerSpec("v", 4, 3)), rank=2, alpha=4.0, head=(("out.weight", (3, 2)),))
PRIVATE = replace(SPEC, private_head=True)


def adapters(clients, seed=0, spec=SPEC, ranks=None):
    flat = torch.randn(clients, spec.parameters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mask_ranks(Adapters(spec, flat, torch.tensor(ranks or [spec.rank] * clients)))


def relaying(graph, clients, spec=SPEC, rows=None, seed=0, **settings):
    topology = replace(build_topology(parse_spec(graph), clients, seed), interrupted=True)
    peers = StackedExchange(topology, range(clients))
    rows = rows or dict.fromkeys(range(clients), 10)
    peers.relayed = RelayCaches(RelayConfig(**settings), spec, rows, clients)
    return peers


def one_round(peers, t, x, absent=()):
    """What clients hold after a round in which they put ``x`` into the mixing."""
    peers.begin(t, absent)
    mixed = peers.mix(x)
    peers.relay()
    return mixed


def body(x, row):
    """One client's message, with the tensors that it really holds."""
    r = int(x.ranks[row])
    tensors = {f"A:{name}": A[row, :r] for name, A in x.A.items()} | {f"B:{n}": B[row, :, :r] for n, B in x.B.items()}
    heads = {} if x.spec.private_head else {f"head:{name}": value[row] for name, value in x.head.items()}
    return len(save({name: value.contiguous() for name, value in (tensors | heads).items()}))


class Naive:
    """One dictionary per client: origin -> (version, what was sent, its bytes)."""

    def __init__(self, clients, keep=None, max_age=None):
        self.held = [{} for _ in range(clients)]
        self.keep, self.max_age = keep, max_age
        self.bytes = self.entries = 0

    def step(self, t, x, adjacency, absent):
        n, self.bytes, self.entries = len(self.held), 0, 0
        for i, own in enumerate(self.held):
            for origin in list(own):
                if origin != i and self.max_age is not None and t + 1 - own[origin][0] > self.max_age:
                    del own[origin]
        before = [dict(own) for own in self.held]
        new = {j: (t + 1, x.flat[j, x.spec.shared].clone(), body(x, j)) for j in range(n) if j not in absent}
        for i in range(n):
            self.held[i] |= {j: new[j] for j in range(n) if j in new and (i == j or adjacency[i, j])}
        told = [{origin: version for origin, (version, *_) in own.items()} for own in self.held]
        for i, j in np.argwhere(adjacency).tolist():  # j to i
            self.bytes += len(save({"versions": torch.zeros(n, dtype=torch.int64)}))
            sent = {o: e for o, e in before[j].items() if o not in (i, j) and e[0] > told[i].get(o, 0)}
            self.entries += len(sent)
            self.bytes += len(save({"entries": torch.zeros(len(sent), 3, dtype=torch.int64)}))
            for origin, entry in sent.items():
                self.bytes += entry[2]
                if entry[0] > self.held[i].get(origin, (0,))[0]:
                    self.held[i][origin] = entry
        if self.keep is not None:
            for i, own in enumerate(self.held):
                others = sorted((o for o in own if o != i), key=lambda o: (-own[o][0], (o - i) % n))
                for origin in others[self.keep :]:
                    del own[origin]


GRAPHS = ["random p=0.3", "ring", "path", "complete", "d-equistatic degree=2", "random p=0.5 drop_links=0.3"]
SETTINGS = [{}, {"keep": 2}, {"max_age": 2}, {"keep": 3, "max_age": 4}]
CASES = [(graph, settings) for graph in GRAPHS for settings in SETTINGS]


@pytest.mark.parametrize(("graph", "settings"), CASES)
@pytest.mark.parametrize("spec", [SPEC, PRIVATE], ids=["mixed head", "private head"])
def test_versions_values_and_bytes_are_those_of_dictionaries(graph, settings, spec):
    n = 7
    ranks = [2, 1, 2, 2, 1, 2, 2]
    peers, naive = relaying(graph, n, spec, seed=3, **settings), Naive(n, **settings)
    draw = np.random.default_rng(5)
    versions = peers.relayed.versions
    for t in range(12):
        x = adapters(n, t, spec, ranks)
        absent = np.flatnonzero(draw.random(n) < 0.25).tolist()
        one_round(peers, t, x, absent)
        naive.step(t, x, peers.graph.adjacency, absent)
        expected = np.array([[own.get(origin, (0,))[0] for origin in range(n)] for own in naive.held])
        assert (peers.relayed.versions == expected).all()
        if not settings:
            assert (peers.relayed.versions >= versions).all(), "a version went back"
            versions = peers.relayed.versions
        for i, cache in enumerate(peers.relayed.caches):
            for origin in cache.held.tolist():
                entry = cache.entry(origin)
                assert torch.equal(entry.values, naive.held[i][origin][1])
                assert (entry.origin, entry.version, entry.rank) == (origin, naive.held[i][origin][0], ranks[origin])
        told = {name: float(value) for name, value in peers.stats.measures.items()}
        assert (told["relayed_bytes"], told["relayed_entries"]) == (naive.bytes, naive.entries)
        mixing = sum(body(x, j) * int(peers.graph.out_degrees[j]) for j in range(n))
        assert peers.stats.bytes_sent == mixing + naive.bytes
        different = {(origin, entry[0]) for own in naive.held for origin, entry in own.items()}
        assert len(peers.relayed.pool) == len(different), "the same version is stored once, an old one not at all"


def test_a_path_of_three_has_ages_0_0_1_and_its_bytes_by_hand():
    peers, x = relaying("path", 3), adapters(3)
    one_round(peers, 0, x)
    assert peers.relayed.versions.tolist() == [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    assert float(peers.stats.measures["relayed_entries"]) == 0
    assert float(peers.stats.measures["relayed_known_min"]) == 2
    one_round(peers, 1, x)
    assert (peers.relayed.done - peers.relayed.versions).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    # 0 and 2 get each other's version of round 0 from 1: two entries; four times versions of 24 bytes of numbers.
    versions, none, one = (
        len(save({name: torch.zeros(shape, dtype=torch.int64)}))
        for name, shape in (("versions", 3), ("entries", (0, 3)), ("entries", (1, 3)))
    )
    assert float(peers.stats.measures["relayed_entries"]) == 2
    assert float(peers.stats.measures["relayed_bytes"]) == 4 * versions + 2 * none + 2 * one + 2 * body(x, 0)
    told = {name: float(value) for name, value in peers.stats.measures.items()}
    assert told["relayed_age_max"] == 1 and told["relayed_age_mean"] == pytest.approx(2 / 9)


def test_ages_on_a_path_are_one_less_than_the_distance():
    n = 6
    peers = relaying("path", n)
    for t in range(10):
        one_round(peers, t, adapters(n, t))
    distance = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    assert (peers.relayed.done - peers.relayed.versions == np.maximum(distance - 1, 0)).all()


@pytest.mark.parametrize("average", ["products", "factors"])
def test_on_a_complete_graph_all_ages_are_0_and_factors_give_the_averaged_model(average):
    peers = relaying("complete", 5, average=average)
    for t in range(3):
        mixed = one_round(peers, t, adapters(5, t))
    assert (peers.relayed.versions == 3).all()
    assert float(peers.stats.measures["relayed_entries"]) == 0, "nobody lacks what all have heard directly"
    found = peers.relayed_models(mixed)
    if average == "factors":
        torch.testing.assert_close(found.adapters.flat, mixed.mean().flat.expand(5, -1), rtol=0, atol=1e-14)
        assert (found.cut_share == 0).all()
    else:
        torch.testing.assert_close(found.adapters.flat[1:], found.adapters.flat[:1].expand(4, -1), rtol=0, atol=1e-12)
        assert ((0 < found.cut_share) & (found.cut_share < 1)).all()


def test_a_departed_client_ages_out_and_is_heard_of_again_when_it_returns():
    n, peers = 4, relaying("complete", 4, max_age=2)
    for t in range(10):
        one_round(peers, t, adapters(n, t), [3] if 2 <= t < 7 else [])
        age = t + 1 - 2  # of its last version, while it is away
        known = peers.relayed.versions[:3, 3]
        if t < 2 or t >= 7:
            assert (known == t + 1).all()
        else:
            assert (known == (2 if age <= 2 else 0)).all()
        if 4 < t < 7:
            assert peers.relayed.versions[3].tolist() == [0, 0, 0, 2], "its own never ages out"


def test_of_entries_of_one_version_those_next_in_number_are_kept():
    peers = relaying("complete", 5, keep=2)
    one_round(peers, 0, adapters(5))
    assert [cache.held.tolist() for cache in peers.relayed.caches] == [
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [0, 3, 4],
        [0, 1, 4],
    ]


def test_a_cache_takes_newer_versions_only():
    (cache,) = RelayCaches(RelayConfig(), SPEC, {1: 10}, 3).caches
    old, new = (Entry(0, version, 2, 10, torch.full((4,), float(version))) for version in (3, 5))
    cache.begin(6)
    assert cache.take(new) and not cache.take(old) and not cache.take(replace(new, values=torch.zeros(4)))
    assert cache.versions.tolist() == [5, 0, 0]
    assert cache.lacking(np.array([0, 0, 0])).tolist() == [], "what came in this round goes on in the next"
    cache.end()
    cache.begin(7)
    assert cache.lacking(np.array([4, 9, 0])).tolist() == [0]
    assert cache.lacking(np.array([5, 0, 0])).tolist() == []
    (sent,) = cache.entries(np.array([0]))
    assert sent.version == 5 and torch.equal(sent.values, new.values)


def dense(x, row):
    return {name: x.scaling[row] * x.B[name][row] @ A[row] for name, A in x.A.items()}


@pytest.mark.parametrize("weights", ["uniform", "rows", "age"])
@pytest.mark.parametrize("ranks", [[2] * 5, [2, 1, 2, 1, 2]], ids=["equal ranks", "unequal ranks"])
def test_products_are_averaged_exactly_and_cut_by_svd(weights, ranks):
    n, rows = 5, {0: 3, 1: 11, 2: 5, 3: 7, 4: 2}
    peers, sent = relaying("path", n, rows=rows, weights=weights), {}
    for t in range(6):
        x = adapters(n, t, ranks=ranks)
        sent |= {(j, t + 1): x.rows([j]) for j in range(n)}
        mixed = one_round(peers, t, x)
    versions = peers.relayed.versions
    given = {"uniform": np.ones((n, n)), "rows": np.tile(list(rows.values()), (n, 1)), "age": 1 / (1 + 6 - versions)}
    W = given[weights] / given[weights].sum(1, keepdims=True)
    found = peers.relayed_models(mixed)
    assert found.adapters.ranks.tolist() == ranks
    for i in range(n):
        parts = [sent[j, int(versions[i, j])] for j in range(n)]
        head = sum(W[i, j] * part.head["out.weight"][0] for j, part in enumerate(parts))
        torch.testing.assert_close(found.adapters.head["out.weight"][i], head, rtol=0, atol=1e-13)
        cut = size = 0.0
        for name in ("q", "v"):
            whole = sum(W[i, j] * dense(part, 0)[name] for j, part in enumerate(parts))
            U, values, V = torch.linalg.svd(whole)
            best = U[:, : ranks[i]] * values[: ranks[i]] @ V[: ranks[i]]
            torch.testing.assert_close(dense(found.adapters, i)[name], best, rtol=0, atol=1e-12)
            cut, size = cut + float(values[ranks[i] :].square().sum()), size + float(values.square().sum())
        assert float(found.cut_share[i]) == pytest.approx(cut / size, rel=1e-9)
        uncut = uncut_model(peers.relayed, mixed.rows([i]), i)
        for name in ("q", "v"):
            whole = sum(W[i, j] * dense(part, 0)[name] for j, part in enumerate(parts))
            merged = uncut.merged.layers[name]
            torch.testing.assert_close(
                dense(uncut, 0)[name] + merged.weight()[0], whole, rtol=0, atol=1e-12, check_dtype=False
            )
            assert int(uncut.ranks[0]) + merged.left.shape[2] == sum(ranks)


def test_products_are_right_under_alternation_where_averaged_factors_are_not():
    """Entries whose A and B are of different phases: the mean of the products is no product of the means."""
    n = 4
    made = {average: relaying("path", n, average=average) for average in ("products", "factors")}
    start = adapters(n, 0).flat[:1].expand(n, -1)
    x = replace(adapters(n), flat=start.clone())
    for t in range(8):
        moved = x.flat + 0.5 * adapters(n, t + 1).flat
        block = x.spec.columns("B" if t % 2 == 0 else "A")
        x = replace(x, flat=x.flat.index_copy(1, torch.arange(block.start, block.stop), moved[:, block]))
        for peers in made.values():
            one_round(peers, t, x)
    caches = made["products"].relayed
    apart = {average: 0.0 for average in made}
    for i in range(n):
        exact = uncut_model(caches, x.rows([i]), i)
        for name in ("q", "v"):
            whole = dense(exact, 0)[name] + exact.merged.layers[name].weight()[0]
            for average, peers in made.items():
                apart[average] += float((dense(peers.relayed_models(x).adapters, i)[name] - whole).norm() ** 2)
    assert apart["products"] < 0.5 * apart["factors"], apart


def test_a_private_head_is_the_clients_own_and_a_common_factor_need_not_travel():
    peers = relaying("complete", 3, PRIVATE)
    x = adapters(3, spec=PRIVATE)
    mixed = one_round(peers, 0, x)
    found = peers.relayed_models(mixed).adapters
    assert torch.equal(found.head["out.weight"], x.head["out.weight"])
    assert peers.relayed.pool.values.shape[1] == PRIVATE.shared.stop

    peers = relaying("complete", 3, average="factors")
    x = replace(adapters(3), flat=adapters(3).flat.clone())
    x.flat[:, SPEC.columns("A")] = x.flat[0, SPEC.columns("A")]
    peers.begin(0)
    mixed = x.with_blocks(peers.mix(x.select("B", "head")))
    peers.relay()
    found = peers.relayed_models(mixed).adapters
    torch.testing.assert_close(found.flat, mixed.mean().flat.expand(3, -1), rtol=0, atol=1e-14)
    assert peers.relayed.pool.values.shape[1] == SPEC.select("B", "head").parameters


def test_who_has_heard_of_nobody_deploys_its_own():
    peers, x = relaying("edges edges=[[0,1]] allow_disconnected=true", 3), adapters(3)
    assert torch.equal(peers.relayed_models(x).adapters.flat, x.flat), "before the first round"
    mixed = one_round(peers, 0, x)
    found = peers.relayed_models(mixed)
    assert torch.equal(found.adapters.flat[2], x.flat[2]) and float(found.cut_share[2]) == 0
    assert torch.equal(uncut_model(peers.relayed, mixed.rows([2]), 2).flat[0], x.flat[2])


@pytest.mark.parametrize("graph", others_slow(GRAPHS, [0]))
def test_a_restored_state_goes_on_to_the_bit(graph):
    n, settings = 6, {"max_age": 5, "weights": "age"}
    whole, first = relaying(graph, n, **settings), relaying(graph, n, **settings)
    for t in range(8):
        x = adapters(n, t)
        mixed = one_round(whole, t, x, [t % n])
        if t < 4:
            one_round(first, t, x, [t % n])
            continue
        if t == 4:
            second = relaying(graph, n, **settings)
            second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
        one_round(second, t, x, [t % n])
        assert whole.stats.bytes_sent == second.stats.bytes_sent
    one, other = whole.state_dict(), second.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(whole.relayed_models(mixed).adapters.flat, second.relayed_models(mixed).adapters.flat)


def test_an_average_has_the_same_bits_whoever_else_is_computed():
    """As at a real peer, whose pool holds its own entries alone."""
    n, peers = 6, relaying("path", 6)
    for t in range(7):
        mixed = one_round(peers, t, adapters(n, t))
    together = peers.relayed_models(mixed).adapters.flat
    for i in range(n):
        caches = RelayCaches(RelayConfig(), SPEC, {i: 10}, n)
        (cache,) = caches.caches
        caches.begin(6)
        for origin in range(n):
            assert cache.take(peers.relayed[i].entry(origin))
        caches.end()
        alone = relayed_models(caches, mixed.rows([i]), [i], "products").adapters.flat
        assert torch.equal(alone[0], together[i])
