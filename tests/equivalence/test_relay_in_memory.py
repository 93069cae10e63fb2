"""Real peers relay what the simulation relays: versions, entries and bytes to the bit, averages to 1e-9 in fp64.

The averages are the same function of the same entries, over other shapes: the last bits may differ, as in the mixing.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from in_memory import exchanges, federation, names, sites_signatures, together
from safetensors.torch import load, load_file, save
from test_peers_in_memory import TOLERANCE, products, words

from cases import ROW_METHODS, others_slow
from peerlora.config.exchange import CacheConfig, RelayConfig
from peerlora.config.sections import CompleteGraph, EdgesGraph, PathGraph, RandomGraph, RingGraph, StarGraph
from peerlora.exchange.relay import RelayCaches
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec, mask_ranks
from peerlora.runs.events import Evaluated, RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.simulate import simulate
from peerlora.topology.schedule import build_topology

SPEC = AdapterSpec((LayerSpec("q", 5, 6), LayerSpec("v", 4, 3)), rank=2, alpha=4.0, head=(("out.weight", (3, 2)),))
CLIENTS, ROUNDS = 5, 6
RANDOM = RandomGraph(kind="random", p=0.3)


def adapters(t, spec=SPEC, ranks=None):
    """What all clients put into the mixing of round ``t``."""
    flat = torch.randn(CLIENTS, spec.parameters, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    return mask_ranks(Adapters(spec, flat, torch.tensor(ranks or [spec.rank] * CLIENTS)))


def caches(settings, clients, spec=SPEC):
    return RelayCaches(settings, spec, {client: 10 + client for client in clients}, CLIENTS)


def contents(held, client):
    """The entries that a client holds, by origin: version, rank, rows, values."""
    cache = held[client]
    return {
        origin: (entry.version, entry.rank, entry.rows, entry.values.tolist())
        for origin, entry in ((int(j), held.pool.entry(int(cache.places[j]))) for j in cache.held)
    }


def simulated(topology, settings, xs, spec=SPEC):
    """Round by round, what each client holds and deploys, and what it cost."""
    stacked = StackedExchange(topology, range(CLIENTS))
    stacked.relayed = caches(settings, range(CLIENTS), spec)
    told = []
    for t, x in enumerate(xs):
        stacked.begin(t)
        stacked.mix(x)
        mixed = stacked.stats.bytes_sent
        stacked.relay()
        held = [contents(stacked.relayed, client) for client in range(CLIENTS)]
        models = stacked.relayed_models(x)
        told.append((held, stacked.relayed.versions.tolist(), models, stacked.stats.bytes_sent - mixed))
    return told


def with_peers(topology, settings, xs, spec=SPEC, signatures=None):
    """The same of one peer per client."""
    with exchanges(topology, signatures=signatures) as peers:

        def one(i):
            peer, told = peers[i], []
            peer.relayed = caches(settings, [i], spec)
            for t, x in enumerate(xs):
                own = x.rows([i])
                stats = peer.begin(t)
                peer.mix(own)
                mixed = stats.bytes_sent
                peer.relay()
                assert not stats.missing and "relayed_refused" not in stats.measures
                assert float(stats.measures["relayed_bytes"]) == stats.bytes_sent - mixed
                cost = stats.bytes_sent - mixed
                held, versions = contents(peer.relayed, i), peer.relayed.versions[0].tolist()
                told.append((held, versions, peer.relayed_models(own), cost))
            return told

        return together([lambda i=i: one(i) for i in range(CLIENTS)])


def compare(whole, parts, t, i):
    held, versions, models, _ = parts[i][t]
    assert versions == whole[t][1][i]
    assert held == whole[t][0][i]
    assert torch.allclose(models.adapters.flat, whole[t][2].adapters.flat[[i]], rtol=0, atol=TOLERANCE)
    assert torch.equal(models.adapters.ranks, whole[t][2].adapters.ranks[[i]])
    assert torch.allclose(models.cut_share, whole[t][2].cut_share[[i]], rtol=0, atol=TOLERANCE)


CASES = [
    (RANDOM, {}, {}),
    (RANDOM, {"keep": 2}, {}),
    (RandomGraph(kind="random", p=0.15), {"max_age": 2, "weights": "age"}, {}),
    (PathGraph(kind="path"), {"weights": "rows"}, {"ranks": [1, 2, 2, 1, 2]}),
    (RingGraph(kind="ring", drop_links=0.3), {"average": "factors"}, {"spec": replace(SPEC, private_head=True)}),
    (StarGraph(kind="star"), {"max_age": 0}, {"spec": SPEC.select("B", "head")}),
    (CompleteGraph(kind="complete"), {"average": "factors"}, {}),
    (EdgesGraph(kind="edges", edges=[], allow_disconnected=True), {}, {}),
]


@pytest.mark.parametrize(("graph", "settings", "options"), others_slow(CASES, [0, 3]))
def test_peers_hold_and_deploy_what_simulated_clients_do(graph, settings, options):
    topology, settings = build_topology(graph, CLIENTS, seed=2), RelayConfig(**settings)
    xs = [adapters(t, **options) for t in range(ROUNDS)]
    spec = options.get("spec", SPEC)
    whole, parts = simulated(topology, settings, xs, spec), with_peers(topology, settings, xs, spec)
    for t in range(ROUNDS):
        for i in range(CLIENTS):
            compare(whole, parts, t, i)
        assert sum(each[t][3] for each in parts) == whole[t][3]
    if graph is RANDOM:
        alone = [not topology.at(t).neighbours(i) for t in range(ROUNDS) for i in range(CLIENTS)]
        assert any(alone) and not all(alone)
        ages = [t + 1 - np.array(whole[t][1]) for t in range(ROUNDS)]
        assert any((each > 0).any() for each in ages), "nothing came over more than one link"


CACHES = [
    (RANDOM, {}, {}),
    (PathGraph(kind="path"), {"keep": 2, "weights": "rows"}, {"spec": replace(SPEC, private_head=True)}),
    (RingGraph(kind="ring", drop_links=0.4), {"max_age": 1}, {}),
]


@pytest.mark.parametrize(("graph", "settings", "options"), CACHES)
def test_peers_that_average_their_caches_have_the_bits_of_the_simulation(tmp_path, graph, settings, options):
    """What each puts in is what it had, and a step of its own; all clients' rows are averaged in the same order."""
    signed = sites_signatures(tmp_path, list(names(CLIENTS).values()))
    topology, settings = build_topology(graph, CLIENTS, seed=2), CacheConfig(**settings)
    steps = [adapters(t, **options) for t in range(ROUNDS)]

    def run(peers, clients):
        peers.relayed, told = caches(settings, clients, steps[0].spec), []
        x = steps[0].rows(clients)
        for t, step in enumerate(steps):
            stats = peers.begin(t)
            x = peers.mix_cached(replace(x, flat=x.flat + step.flat[clients]))
            assert stats.cached and not stats.missing and "relayed_refused" not in stats.measures
            told.append((x.flat, peers.relayed.versions))
        assert peers.relayed_models(x) is None, "a cache for training is no model to deploy"
        return told

    whole = run(StackedExchange(topology, range(CLIENTS)), list(range(CLIENTS)))
    with exchanges(topology, signatures=signed) as peers:
        parts = together([lambda i=i: run(peers[i], [i]) for i in range(CLIENTS)])
    for t, (flat, versions) in enumerate(whole):
        assert torch.equal(torch.cat([part[t][0] for part in parts]), flat)
        assert np.concatenate([part[t][1] for part in parts]).tolist() == versions.tolist()


def test_signatures_change_nothing_but_what_a_swap_costs(tmp_path):
    signed = sites_signatures(tmp_path, list(names(CLIENTS).values()))
    topology, settings = build_topology(RANDOM, CLIENTS, seed=2), RelayConfig()
    xs = [adapters(t) for t in range(ROUNDS)]
    whole, parts = simulated(topology, settings, xs), with_peers(topology, settings, xs, signatures=signed)
    for t in range(ROUNDS):
        for i in range(CLIENTS):
            compare(whole, parts, t, i)
        extra = sum(each[t][3] for each in parts) - whole[t][3]
        assert (extra > 0) == bool(topology.at(t).edges)


def test_peers_that_resume_go_on_with_their_entries_and_signatures(tmp_path):
    """All stop after three rounds; what they hold and pass on in the others is as if they had not."""
    signed = sites_signatures(tmp_path, list(names(CLIENTS).values()))
    topology, settings = build_topology(PathGraph(kind="path"), CLIENTS, seed=2), RelayConfig()
    xs, half = [adapters(t) for t in range(ROUNDS)], ROUNDS // 2
    whole = simulated(topology, settings, xs)
    saved = {}

    def rounds(peers, i, first, last):
        peers[i].relayed = caches(settings, [i])
        if i in saved:
            peers[i].load_state_dict(saved[i])
        for t in range(first, last):
            stats = peers[i].begin(t)
            peers[i].mix(xs[t].rows([i]))
            peers[i].relay()
            assert not stats.missing and "relayed_refused" not in stats.measures
            assert contents(peers[i].relayed, i) == whole[t][0][i]
        return load(save(peers[i].state_dict()))

    for first, last in ((0, half), (half, ROUNDS)):
        with exchanges(topology, first=first, signatures=signed) as peers:
            states = together([lambda i=i: rounds(peers, i, first, last) for i in range(CLIENTS)])  # noqa: B023
        saved = dict(enumerate(states))
    assert saved[0]["relay.signatures"].shape == (CLIENTS, 97) and bool(saved[0]["relay.signatures"].any(1).all())


def test_a_peer_that_has_left_ages_out_of_what_the_others_hold():
    """It takes part in three rounds; the others wait for it in vain in the next ones."""
    topology, settings = build_topology(PathGraph(kind="path"), CLIENTS, seed=2), RelayConfig(max_age=2)
    xs, stays = [adapters(t) for t in range(ROUNDS)], 3

    def one(peers, i):
        peers[i].relayed, told = caches(settings, [i]), []
        for t, x in enumerate(xs[:stays] if i == 0 else xs):
            peers[i].begin(t)
            with peers[i].extended_deadline(20.0 if t < stays else 0.5):
                peers[i].mix(x.rows([i]))
                peers[i].relay()
            told.append(peers[i].relayed.versions[0].tolist())
        return told

    with exchanges(topology) as peers:
        _, next_to_it, beyond, *_ = together([lambda i=i: one(peers, i) for i in range(CLIENTS)])
    assert [versions[0] for versions in next_to_it] == [1, 2, 3, 3, 3, 0]
    assert [versions[0] for versions in beyond[:stays]] == [0, 1, 2] and beyond[-1][0] == 0


def folder_of(result, client):
    return load_file(result.run / "adapters" / f"client-{client:02d}" / "adapter_model.safetensors")


def same(one, other):
    """Whether two PEFT folders hold the same updates: of factors, which may be turned, the products."""
    A = [name for name in one if "lora_A" in name]
    pairs = [(name, name.replace("lora_A", "lora_B")) for name in A]
    return len(A) > 0 and all(
        torch.allclose(one[b] @ one[a], other[b] @ other[a], rtol=TOLERANCE, atol=TOLERANCE) for a, b in pairs
    )


RELAYED = [name for name, kind in ROW_METHODS.items() if kind.traits.refusal("relay") is None]
RUNS = [
    ["algorithm.name=dec-lora", "topology.kind=path", "topology.drop_links=0.3"],
    ["algorithm.name=adf-lora", "algorithm.interval=1", "topology.kind=random", "topology.p=0.3"],
    ["algorithm.name=dec-lora", "adapter.head=private", "topology.kind=ring", "exchange.relay.weights=rows"],
    ["algorithm.name=ffa-lora", "topology.kind=path", "exchange.relay.average=factors"],
    ["algorithm.name=hetlora", "adapter.rank=[3, 2, 3, 1]", "topology.kind=path"],
    ["algorithm.name=dec-lora", "exchange.robust=median", "topology.kind=complete"],
    *([*words(name), "topology.kind=path"] for name in RELAYED),
]


@pytest.mark.usefixtures("no_reports")
@pytest.mark.parametrize("settings", others_slow(RUNS, [0]))
def test_whole_runs_relay_and_deploy_what_the_simulation_does(config, tmp_path, settings):
    chosen = config("bert", "peer.deadline=60", "peer.join=60", "exchange.relay={}", *settings, "train.dtype=fp64")
    whole, parts = simulate(chosen, tmp_path / "whole"), federation(chosen, tmp_path)
    told = select_events(read_events(whole.run), RoundDone)
    rounds = [select_events(read_events(part.run), RoundDone) for part in parts]
    (last,) = [each for each in select_events(read_events(whole.run), Evaluated) if each.final]
    moved = [float(product.abs().max()) for part in parts for product in products(part.relayed, 0).values()]
    assert max(moved) > 1e-3, "nothing was trained"
    for client, part in enumerate(parts):
        assert torch.allclose(part.adapters.flat, whole.adapters.flat[[client]], rtol=0, atol=TOLERANCE)
        for layer, product in products(part.relayed, 0).items():
            assert torch.allclose(product, products(whole.relayed, client)[layer], rtol=TOLERANCE, atol=TOLERANCE)
        (own,) = [each for each in select_events(read_events(part.run), Evaluated) if each.final]
        assert own.relayed_loss == pytest.approx([last.relayed_loss[client]], abs=TOLERANCE) and len(own.relayed) == 1
        assert part.summary["scores"]["relayed_mean"] == own.relayed[0] and part.summary["deployed"] == "relayed"
        assert same(folder_of(part, client), folder_of(whole, client))
    for t, done in enumerate(told):
        assert sum(each[t].bytes_sent for each in rounds) == done.bytes_sent
        assert not any(each[t].missed for each in rounds)
        for name in ("relayed_entries", "relayed_bytes"):
            assert sum(each[t].measures[name] for each in rounds) == done.measures[name]
        for name in ("relayed_age_mean", "relayed_known_mean"):
            found = [each[t].measures[name] for each in rounds]
            assert np.mean(found) == pytest.approx(done.measures[name])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_under_random_losses_no_version_goes_back_and_every_entry_is_its_origins(tmp_path, seed):
    """Messages and acknowledgements are lost at random, of the mixing and of the swaps alike."""
    signed = sites_signatures(tmp_path, list(names(CLIENTS).values()))
    topology = build_topology(RandomGraph(kind="random", p=0.5), CLIENTS, seed=seed)
    xs = [adapters(t) for t in range(10)]
    with exchanges(topology, deadline=0.5, signatures=signed) as peers:
        net = peers[0].protocol.endpoint.transport.network
        sites = names(CLIENTS)
        for pair in [(a, b) for a in sites for b in sites if a != b]:
            for what in ("message", "ack"):
                net.loss(sites[pair[0]], sites[pair[1]], 0.03, what)

        def one(i):
            peers[i].relayed, seen, refused = caches(RelayConfig(), [i]), [np.zeros(CLIENTS, dtype=int)], 0
            for t, x in enumerate(xs):
                stats = peers[i].begin(t)
                peers[i].mix(x.rows([i]))
                peers[i].relay()
                refused += "relayed_refused" in stats.measures
                seen.append(peers[i].relayed.versions[0])
                for origin, (version, *_, values) in contents(peers[i].relayed, i).items():
                    assert values == xs[version - 1].flat[origin].tolist()
            return seen, refused

        found = together([lambda i=i: one(i) for i in range(CLIENTS)])
    for i, (seen, refused) in enumerate(found):
        assert all((after >= before).all() for before, after in itertools.pairwise(seen)) and not refused
        assert [int(versions[i]) for versions in seen] == list(range(len(xs) + 1))
    assert sum(int((seen[-1] > 0).sum()) for seen, _ in found) > 2 * CLIENTS
