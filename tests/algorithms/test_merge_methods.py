"""RAC-LoRA, FLoRA, FedEx-LoRA and FedHL against plain per-client runs with dense bases, and what they promise."""

import multiprocessing
import signal
import threading
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import plain_merges as plain
import pytest
import torch
from plain_products import Drift
from test_product_methods import GRAPHS, NOBODY, SPEC, UNEQUAL, PendingExchange, assert_same, exchange, run, start

from cases import others_slow
from peerlora.algorithms import REGISTRY, build_algorithm
from peerlora.algorithms.base import prepare
from peerlora.algorithms.decaf import averaged_products
from peerlora.algorithms.fedhl import FedHLState, capped, corrected_reference, scores
from peerlora.algorithms.merging import check_merges, room
from peerlora.config.loading import load_config
from peerlora.config.sections import RingGraph, StarGraph
from peerlora.errors import CompositionError, ConfigError
from peerlora.exchange.schema import encoded_bytes
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapter_init import redrawn
from peerlora.lora.diagnostics import diagnose
from peerlora.lora.merged import Merged
from peerlora.runs.events import Evaluated, RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.export import export_from_run
from peerlora.runtime.model_choice import ModelChoice
from peerlora.runtime.simulate import resume, simulate
from peerlora.topology.schedule import build_topology
from waiting import until

pytestmark = pytest.mark.usefixtures("no_reports")

CASES = {
    "rac-lora": ({"chain": 2, "settle": 1}, lambda *run: plain.rac(*run, 2, 1, "right")),
    "rac-lora left": ({"chain": 1, "settle": 0, "side": "left"}, lambda *run: plain.rac(*run, 1, 0, "left")),
    "flora": ({}, plain.merge_received(plain.flora)),
    "fedex-lora": ({}, plain.merge_received(plain.fedex)),
    "fedhl": ({}, plain.fedhl),
    "fedhl plain": ({"weighting": "plain", "cap": 1.2, "growth": 1}, lambda *run: plain.fedhl(*run, "plain", 1.2, 1)),
    "fedhl equal": ({"weighting": "equal", "growth": 2}, lambda *run: plain.fedhl(*run, "equal", 2.0, 2)),
}
METHODS = ["rac-lora", "flora", "fedex-lora", "fedhl"]
ANY_RANKS = ["flora", "fedhl"]
EXACT = ["rac-lora", "flora", "fedex-lora"]
RING, STAR, COMPLETE, RANDOM = GRAPHS
GRAPH_IDS = [graph.kind for graph in GRAPHS]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def method(case):
    return build_algorithm(case.split()[0], CASES[case][0])


def parts(state):
    """(adapters, what each client has merged or holds as reference, by layer and dense)."""
    x, merged = (state.adapters, state.reference) if isinstance(state, FedHLState) else (state, state.merged)
    return replace(x, merged=None), {name: own.weight() for name, own in merged.layers.items()}


def models(x):
    """The whole dense update of every client, by layer."""
    found = {}
    for name, A in x.A.items():
        found[name] = x.scaling[:, None, None] * (x.B[name] @ A)
        if x.merged is not None:
            found[name] = found[name] + x.merged.layers[name].weight()
    return found


def assert_like_plain(found, expected, tolerance):
    assert len(found) == len(expected)
    for state, (x, bases) in zip(found, expected, strict=True):
        ours, dense = parts(state)
        assert_same([ours], [x], tolerance)
        for name, W in dense.items():
            assert (W - torch.stack([torch.from_numpy(base[name]) for base in bases])).abs().max() <= tolerance


@pytest.mark.parametrize("graph", GRAPHS, ids=GRAPH_IDS)
@pytest.mark.parametrize("case", CASES)
def test_a_run_equals_the_plain_one(case, graph):
    peers = exchange(graph)
    expected = CASES[case][1](start(), Drift(range(4)), peers.topology, 5)
    found = run(method(case), start(), peers, 5)
    assert_like_plain(found, expected, 1e-9)
    if not case.startswith("fedhl"):
        assert max(W.abs().max() for W in parts(found[-1])[1].values()) > 0.1, "nothing was merged"


@pytest.mark.parametrize("graph", GRAPHS, ids=GRAPH_IDS)
@pytest.mark.parametrize("case", [case for case in CASES if case.split()[0] in ANY_RANKS])
def test_a_run_with_unequal_ranks_equals_the_plain_one(case, graph):
    peers, x = exchange(graph), start(UNEQUAL)
    expected = CASES[case][1](x, Drift(range(4)), peers.topology, 4)
    assert_like_plain(run(method(case), x, peers, 4), expected, 1e-9)


@pytest.mark.parametrize("case", ["rac-lora", "rac-lora left", "flora", "fedex-lora", "fedhl"])
def test_a_real_learner_trains_on_the_merged_base(config, case):
    words = [f"algorithm.{key}={value}" for key, value in CASES[case][0].items()]
    chosen = config("bert", f"algorithm.name={case.split()[0]}", *words, "train.lr=0.05")
    one, other = compose(chosen), compose(chosen)
    found = run(one.algorithm, one.start, one.exchange, 4, one.learner)
    assert_like_plain(found, CASES[case][1](other.start, other.learner, other.topology, 4), 1e-8)
    assert max(W.abs().max() for W in parts(found[-1])[1].values()) > 1e-2


@pytest.mark.parametrize("graph", [RING, RANDOM], ids=["ring", "random"])
@pytest.mark.parametrize("case", CASES)
def test_two_shards_of_two_equal_one_of_four(case, graph):
    x = start(UNEQUAL if case.split()[0] in ANY_RANKS else (4, 4, 4, 4))
    whole, meeting, found = run(method(case), x, exchange(graph))[-1], PendingExchange(2), {}
    topology = build_topology(graph, 4, seed=5)

    def shard(first):
        held = [first, first + 1]
        found[first] = run(method(case), x.rows(held), StackedExchange(topology, held, meeting.gather(first)))[-1]

    threads = [threading.Thread(target=shard, args=(first,)) for first in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    (x, bases), one, other = parts(whole), parts(found[0]), parts(found[2])
    assert (torch.cat([one[0].flat, other[0].flat]) - x.flat).abs().max() < 1e-10
    for name, W in bases.items():
        assert (torch.cat([one[1][name], other[1][name]]) - W).abs().max() < 1e-10


# --- limit cases and invariants


@pytest.mark.parametrize("name", ["flora", "fedex-lora", "fedhl"])
@pytest.mark.parametrize("clients", [1, 4])
def test_without_links_and_with_one_client_it_is_plain_lora(name, clients):
    x = start((4,) * clients)
    found = run(build_algorithm(name, {}), x, exchange(NOBODY, clients))
    local = run(build_algorithm("local", {}), x, exchange(NOBODY, clients))
    for state, expected in zip(found, local, strict=True):
        x, dense = parts(state)
        assert torch.equal(x.flat, expected.flat) and not any(W.any() for W in dense.values())


def test_without_links_a_chain_is_each_client_s_own():
    many = run(method("rac-lora"), start(), exchange(NOBODY), 6)[-1]
    alone = run(method("rac-lora"), start((4,)), exchange(NOBODY, 1), 6)[-1]
    assert torch.equal(many.flat[:1], alone.flat)
    for name, W in models(many).items():
        assert (W[:1] - models(alone)[name]).abs().max() < 1e-12


@pytest.mark.parametrize("graph", GRAPHS, ids=GRAPH_IDS)
def test_one_block_is_ffa_lora_with_the_block_s_factor(graph):
    peers = exchange(graph)
    drawn = redrawn(start(), "A", peers.shared_random("frozen factor"))
    ffa = run(build_algorithm("ffa-lora", {}), drawn, exchange(graph))
    rac = run(build_algorithm("rac-lora", {"chain": 4, "settle": 0}), start(), peers)
    assert_same(rac, ffa, 1e-13)


@pytest.mark.parametrize("name", METHODS)
def test_the_complete_graph_leaves_no_disagreement(name):
    settings = {"chain": 1, "settle": 0} if name == "rac-lora" else {}
    for state in run(build_algorithm(name, settings), start(), exchange(COMPLETE)):
        x, dense = parts(state)
        for W in [*models(x).values(), *dense.values()]:
            assert (W - W[:1]).abs().max() < 1e-12


@pytest.mark.parametrize("graph", GRAPHS, ids=GRAPH_IDS)
@pytest.mark.parametrize("name", EXACT)
def test_the_exchange_is_exact_gossip_of_products(name, graph):
    """``weight_i <- weight_i + sum_j w_ij s B_j A_j`` in place of its own product, so the mean model stays."""
    learner, peers, seen = Drift(range(4)), exchange(graph), []
    algorithm = build_algorithm(name, {"chain": 2, "settle": 0} if name == "rac-lora" else {})

    def fit(x, train):
        seen.append(learner.fit(x, train))
        return seen[-1]

    states = run(algorithm, start(), peers, 4, SimpleNamespace(round=learner.round, fit=fit))
    for t, (trained, after) in enumerate(zip(seen, states, strict=True)):
        W = torch.from_numpy(peers.topology.at(t).W)
        for n, whole in models(trained).items():
            own = models(replace(trained, merged=None))[n]
            expected = whole - own + torch.einsum("ij,jok->iok", W, own)
            assert torch.allclose(models(after)[n], expected, rtol=0, atol=1e-12)
            assert torch.allclose(models(after)[n].mean(0), whole.mean(0), rtol=0, atol=1e-12)


# --- RAC-LoRA


def test_random_projections_are_isotropic():
    """``E[A^T (A A^T)^-1 A] = (r / d_in) I``: every direction gets its turn."""
    x, total, draws = start((4,)), 0.0, 1000
    generator = torch.Generator().manual_seed(3)
    for _ in range(draws):
        A = redrawn(x, "A", generator).A["q"][0]
        total = total + A.T @ torch.linalg.solve(A @ A.T, A) / draws
    assert (total - 4 / 9 * torch.eye(9)).abs().max() < 0.04


def test_a_new_block_draws_a_new_factor_the_same_for_all_and_every_run():
    states = run(build_algorithm("rac-lora", {"chain": 1, "settle": 0}), start(), exchange(RING), 3)
    factors = [state.select("A").flat for state in states]
    assert all(torch.equal(A, A[:1].expand_as(A)) for A in factors)
    assert not torch.equal(factors[0], factors[1]) and not torch.equal(factors[1], factors[2])
    again = run(build_algorithm("rac-lora", {"chain": 1, "settle": 0}), start(), exchange(RING), 3)
    assert torch.equal(again[-1].flat, states[-1].flat)


def merged_any(x):
    return any(not own.empty for own in x.merged.layers.values())


def test_what_is_merged_too_early_stays_for_good_and_mixing_first_prevents_it():
    drift, left = Drift(range(4)), {}
    for settle in (0, 12):
        once = SimpleNamespace(round=nullcontext, fit=lambda x, train: x if merged_any(x) else drift.fit(x, train))
        algorithm, peers = build_algorithm("rac-lora", {"chain": 1, "settle": settle}), exchange(RING)
        apart = [diagnose(x, None, peers.graph.W).consensus_product for x in run(algorithm, start(), peers, 30, once)]
        assert apart[settle] == pytest.approx(apart[0] / 9**settle, rel=1e-6)  # rho = 1/3, squared, per round
        assert apart[-1] == pytest.approx(apart[settle], rel=1e-6, abs=1e-20)  # 17 more rounds of mixing change nothing
        left[settle] = apart[-1]
    assert left[12] < 1e-9 * left[0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("graph", GRAPHS, ids=GRAPH_IDS)
def test_the_disagreement_that_reached_a_client_is_measured(graph, side):
    learner, peers = Drift(range(4)), exchange(graph)
    algorithm = build_algorithm("rac-lora", {"chain": 3, "settle": 0, "side": side})
    x = run(algorithm, start(), peers, 2, learner)[-1]
    with learner.round(2):
        peers.begin(2)
        trained, W = learner.fit(x, algorithm.active), torch.from_numpy(peers.topology.at(2).W)
        algorithm.round(2, x, learner, peers)
    expected = torch.zeros(4, dtype=torch.float64)
    for P in models(replace(trained, merged=None)).values():
        mean = torch.einsum("ij,jok->iok", W, P)
        expected += torch.einsum("ij,ijok->i", W, (P[None] - mean[:, None]).square())
    assert torch.allclose(peers.stats.measures["residual_disagreement"], expected, rtol=1e-9, atol=1e-12)


CHOSEN = [
    ("complete", 5, 0, "0.0000"),
    ("ring", 5, 3, "0.3333"),  # (1/3)^3 < 0.1, and the next even number
    ("path", 5, 5, "0.6667"),  # 0.667^6 = 0.088
    ("path", 1, 1, "at most 1"),
    ("{kind: random-regular, degree: 10}", 5, 1, "0.0909"),  # of 12 clients; one mixing would do, and -1/11 turn it
]


@pytest.mark.parametrize(("graph", "chain", "settle", "told"), CHOSEN)
def test_the_topology_chooses_how_long_to_settle(graph, chain, settle, told):
    clients = 3 if graph == "path" else 12 if "degree" in graph else 4
    config = load_config({"clients": clients}, [f"topology={graph}"])
    topology = build_topology(config.topology, clients, 0)
    algorithm, (note,) = prepare(build_algorithm("rac-lora", {"chain": chain}), topology, 50)
    assert algorithm.settle == settle and algorithm.period == chain + settle
    assert f"mixes {settle} rounds" in note and told in note
    for given in (build_algorithm("rac-lora", {"settle": 3}), build_algorithm("rac-lora", {"mix_merged": True})):
        assert prepare(given, topology, 50) == (given, ())


def test_clients_that_never_all_meet_settle_as_long_as_it_goes():
    algorithm, (note,) = prepare(build_algorithm("rac-lora", {"chain": 2}), exchange(NOBODY).topology, 50)
    assert algorithm.settle == 3 and "rho = 1.0000" in note and "endless" in note


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_that_a_run_starts_from_is_kept(name):
    x = replace(start(), flat=Drift([0] * 4).fit(start(), "AB").flat)
    idle = SimpleNamespace(round=nullcontext, fit=lambda x, train: x)
    algorithm = build_algorithm(name, {"chain": 1, "settle": 0} if name == "rac-lora" else {})
    for state in run(algorithm, x, exchange(RING), 3, idle):
        for n, W in models(algorithm.model(state)).items():
            assert torch.allclose(W, models(x)[n], rtol=0, atol=1e-12)


# --- FedHL


def reference_of(x, columns, seed=1):
    """Adapters cut from a common reference of a higher rank, and that reference."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    for layer in x.spec.layers:
        left = torch.randn(1, layer.d_out, columns, generator=generator, dtype=torch.float64)
        right = torch.randn(1, columns, layer.d_in, generator=generator, dtype=torch.float64)
        layers[layer.name] = left.expand(x.clients, -1, -1), right.expand(x.clients, -1, -1)
    shapes = {layer.name: (layer.d_out, layer.d_in) for layer in x.spec.layers}
    dense = {n: left @ right for n, (left, right) in layers.items()}
    return dense, Merged.nothing(shapes, x.flat).plus(layers)


def settled(x, graph, columns, growth=4, apart=0.0):
    """A state of FedHL in which every client's adapter is cut from its reference of rank ``columns``."""
    dense, _ = reference_of(x, columns)
    algorithm = build_algorithm("fedhl", {"growth": growth})
    state, peers = algorithm.start(x, exchange(graph)), exchange(graph)
    width, eye = growth * x.spec.rank, {}
    for k, (n, W) in enumerate(dense.items()):
        own = W + apart * torch.randn(4, 1, 1, generator=torch.Generator().manual_seed(k), dtype=torch.float64) * W
        U, values, V = torch.linalg.svd(own, full_matrices=False)
        keep = min(width, len(values[0]))
        root = values[:, :keep].sqrt()
        root = torch.where(torch.arange(keep) < columns, root, 0.0)
        update = state.reference.layers[n]
        update.left[:, :, :keep], update.right[:, :keep] = (
            U[:, :, :keep] * root[:, None],
            root[:, :, None] * V[:, :keep],
        )
        s = x.scaling[:, None, None].sqrt()
        for i, r in enumerate(x.ranks.tolist()):
            x.B[n][i, :, :r], x.A[n][i, :r] = update.left[i, :, :r] / s[i], update.right[i, :r] / s[i]
        eye[n] = own
    return algorithm, replace(state, adapters=x), peers, eye


@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), UNEQUAL, (1, 1, 1, 1)])
def test_what_nobody_changed_stays_although_ranks_truncate_it(ranks):
    algorithm, state, peers, dense = settled(start(ranks), COMPLETE, 6)
    idle = SimpleNamespace(round=nullcontext, fit=lambda x, train: x)
    for t in range(3):
        state = algorithm.round(t, state, idle, peers)
        for n, W in parts(state)[1].items():
            assert torch.allclose(W, dense[n], rtol=0, atol=1e-11)
    flexlora = peers.combine(state.adapters, averaged_products)
    assert max((models(flexlora)[n] - dense[n]).abs().max() for n in dense) > 0.1, "FlexLoRA loses the tail"


def test_references_that_differ_are_gossiped_exactly_while_nobody_trains():
    algorithm, state, peers, dense = settled(start(UNEQUAL), RING, 3, apart=0.5)
    idle, W = SimpleNamespace(fit=lambda x, train: x), torch.from_numpy(peers.graph.W)
    apart = []
    for t in range(12):
        state = algorithm.round(t, state, idle, peers)
        dense = {n: torch.einsum("ij,jok->iok", W, own) for n, own in dense.items()}
        for n, own in parts(state)[1].items():
            assert torch.allclose(own, dense[n], rtol=0, atol=1e-10)
        apart.append(sum(float((own - own.mean(0)).square().sum()) for own in dense.values()))
    assert apart[-1] < 1e-9 < apart[0]


def test_with_equal_weights_and_rank_enough_it_is_the_average_of_products():
    algorithm, state, peers, dense = settled(start(), COMPLETE, 1)
    algorithm = build_algorithm("fedhl", {"weighting": "equal"})
    trained = Drift(range(4)).fit(state.adapters, "AB")
    after = algorithm.round(0, state, SimpleNamespace(fit=lambda x, train: trained), peers)
    for n, P in models(trained).items():
        assert torch.allclose(parts(after)[1][n], P.mean(0).expand(4, -1, -1), rtol=0, atol=1e-11)


def test_the_reference_never_outgrows_its_bound_and_what_it_drops_is_measured():
    algorithm, peers = build_algorithm("fedhl", {"growth": 1}), exchange(RING)
    states = run(algorithm, start(UNEQUAL), peers, 4)
    assert all(own.left.shape[2] == 4 for state in states for own in state.reference.layers.values())
    assert set(peers.stats.measures) == {"truncation_tail", "reference_tail"}
    for n, own in states[-1].reference.layers.items():
        values = torch.linalg.svdvals(own.weight())
        assert (values[:, 4:] < 1e-9).all(), n
    tails = sum(
        torch.stack(
            [values[r:].square().sum() for values, r in zip(torch.linalg.svdvals(own.weight()), UNEQUAL, strict=True)]
        )
        for own in states[-1].reference.layers.values()
    )
    assert torch.allclose(
        peers.stats.measures["truncation_tail"] - peers.stats.measures["reference_tail"], tails, rtol=1e-8
    )


def test_weights_by_hand():
    W = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    error = torch.tensor([[0.0, 1.0, 1.0, 2.0], [1.0, 3.0, 0.0, 0.0]], dtype=torch.float64)
    V = capped(W, scores(error, "plain"), 2.0)
    # Client 0 would take nearly all: it stops at 2 * 0.25; the others share the rest as 1 : 1 : 1/2.
    assert torch.allclose(V[0], torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64), atol=1e-6)
    assert torch.allclose(V[1, :2], torch.tensor([0.75, 0.25], dtype=torch.float64), atol=1e-6)
    assert torch.allclose(capped(W, scores(error, "squared"), 2.0)[0, 3], torch.tensor(1 / 18, dtype=torch.float64))
    assert torch.equal(capped(W, scores(error, "equal"), 2.0), W)
    assert torch.allclose(capped(W, scores(0 * error, "squared"), 2.0), W)
    assert torch.allclose(capped(W, scores(error, "squared"), 1.0), W)


@pytest.mark.parametrize("seed", range(20))
def test_no_weight_exceeds_the_cap_and_they_sum_to_one(seed):
    draw = np.random.default_rng(seed)
    W, error = (torch.from_numpy(part) for part in (draw.dirichlet(np.ones(7), 5), draw.exponential(1, (5, 7)) ** 6))
    cap = float(draw.uniform(1, 4))
    V = capped(W, scores(error, "squared"), cap)
    assert (V <= cap * W * (1 + 1e-12)).all() and (V >= 0).all() and torch.allclose(V.sum(1), torch.ones(5).double())
    for w, e, v in zip(W.numpy(), error.numpy(), V.numpy(), strict=True):
        assert np.allclose(v, plain.capped(w, 1 / (e**2 + 1e-6), cap), atol=1e-9)


# --- what is sent, told, refused


def test_bytes_are_those_of_the_messages():
    x, learner = start(), Drift(range(4))
    dec = encoded_bytes(x.message())
    for name, expected in (
        ("flora", dec),
        ("fedex-lora", dec),
        ("rac-lora", encoded_bytes(method("rac-lora").message(x))),
    ):
        peers = exchange(RING)
        run(build_algorithm(name, {}), x, peers, 3, learner)
        assert (peers.stats.bytes_per_edge, peers.stats.bytes_sent) == (expected, 8 * expected), name
    assert encoded_bytes(method("rac-lora").message(x)) < 0.6 * dec
    left = build_algorithm("rac-lora", {"side": "left"}).message(x)
    assert all(name.startswith(("A:", "head:")) for name in left)


def test_fedhl_sends_the_columns_of_its_reference_that_are_in_use():
    x, peers, algorithm = start(UNEQUAL), exchange(RING), build_algorithm("fedhl", {})
    states = run(algorithm, x, peers, 1)
    nothing = algorithm.start(x, peers).reference
    sizes = [encoded_bytes(x.message(i) | nothing.message(i)) for i in range(4)]
    assert peers.stats.bytes_sent == 2 * sum(sizes) and nothing.message(0)["left:q"][0] == (8, 0)
    run(algorithm, x, peers, 4)
    full = algorithm.message(x)
    assert set(full) == set(x.message() | nothing.message(0))
    told = states[0].reference.message(1)
    assert 0 < told["left:q"][0][1] <= full["left:q"][0][1] == 8
    assert peers.stats.bytes_per_edge == max(encoded_bytes(x.message(i) | full_of(full)) for i in range(4))


def full_of(schema):
    return {name: what for name, what in schema.items() if name.startswith(("left", "right"))}


@pytest.mark.parametrize("case", CASES)
def test_the_diagnostics_are_of_whole_models(case):
    algorithm, learner, peers = method(case), Drift(range(4)), exchange(RING)
    states = run(algorithm, start(), peers, 3, learner)
    x = algorithm.model(states[-1])
    told = diagnose(x, peers.stats.sent, peers.graph.W)
    unit = x.spec.alpha / x.spec.rank
    apart = sum(float((W - W.mean(0)).square().sum()) / 4 for W in models(x).values()) / unit**2
    assert told.consensus_product == pytest.approx(apart)
    if case in ("flora", "fedex-lora"):
        before = models(peers.stats.sent)
        moved = sum(float((W - before[n]).square().sum((1, 2)).mean()) for n, W in models(x).items()) / unit**2
        assert told.weak_mismatch == pytest.approx(moved)


@pytest.mark.parametrize("name", METHODS)
def test_a_private_head_stays_at_home(config, name):
    federation = compose(config("bert", f"algorithm.name={name}", "adapter.head=private"))
    learner, heads = federation.learner, []

    def fit(x, train):
        heads.append(learner.fit(x, train))
        return heads[-1]

    both = SimpleNamespace(round=learner.round, fit=fit)
    state = run(federation.algorithm, federation.start, federation.exchange, 2, both)[-1]
    assert torch.equal(federation.algorithm.model(state).select("head").flat, heads[-1].select("head").flat)


@pytest.mark.parametrize("name", METHODS)
def test_a_round_leaves_the_state_it_got_alone_and_keeps_its_dtype(name):
    algorithm, peers, learner = build_algorithm(name, {}), exchange(RING), Drift(range(4))
    first = run(algorithm, start(dtype=torch.float32), peers, 2, learner)[-1]
    x, dense = parts(first)
    before = x.flat.clone(), {n: W.clone() for n, W in dense.items()}
    after = parts(algorithm.round(2, first, learner, peers))
    assert torch.equal(x.flat, before[0]) and all(torch.equal(parts(first)[1][n], W) for n, W in before[1].items())
    assert after[0].flat.dtype == torch.float32 and all(W.dtype == torch.float32 for W in after[1].values())


REFUSED = [
    ("rac-lora", {"chain": 0}, "algorithm.chain=0, algorithm.settle=None given; expected at least 1 and 0"),
    ("rac-lora", {"settle": -1}, "algorithm.settle=-1"),
    ("rac-lora", {"settle": 1.5}, "algorithm.settle: 1.5 given; expected a whole number or null$"),
    ("rac-lora", {"side": "both"}, "algorithm.side: 'both' given; expected one of right, left"),
    ("fedhl", {"cap": 0.5}, "algorithm.cap=0.5, algorithm.growth=4 given; expected at least 1"),
    ("fedhl", {"growth": 0}, "algorithm.growth=0"),
    ("fedhl", {"weighting": "inverse"}, "algorithm.weighting: 'inverse' given; expected one of squared, plain, equal"),
    ("flora", {"rank": 2}, "unknown key 'algorithm.rank'; flora has no settings"),
]


@pytest.mark.parametrize(("name", "settings", "told"), REFUSED)
def test_settings_that_make_no_sense_are_refused(name, settings, told):
    with pytest.raises(ConfigError, match=told):
        build_algorithm(name, settings)


@pytest.mark.parametrize("name", METHODS)
def test_unequal_ranks_and_contacts_in_sequence_are_refused_where_they_cannot_work(config, name):
    assert (REGISTRY[name].traits.unequal_ranks is None) == (name in ANY_RANKS)
    if name not in ANY_RANKS:
        with pytest.raises(CompositionError, match=f"{name} cannot work with different ranks"):
            compose(config("bert", f"algorithm.name={name}", "adapter.rank=[1, 2, 3, 3]"))
    with pytest.raises(CompositionError, match=f"{name} needs a topology whose mixing matrix is .*neighbours only"):
        compose(config("bert", f"algorithm.name={name}", "topology.weights=pairwise"))


@pytest.mark.parametrize("name", ["decaf", "flexlora", "hetlora", "fedrot-lora", "fedhl", "flora"])
@pytest.mark.parametrize("kept", ["keep", "phase"])
def test_moments_of_factors_in_other_coordinates_are_not_kept(config, name, kept):
    with pytest.raises(CompositionError, match=f"{name} cannot keep the optimiser's memory.*optimizer_state={kept}"):
        compose(config("bert", f"algorithm.name={name}", f"train.optimizer_state={kept}"))


@pytest.mark.parametrize("name", METHODS)
def test_merges_that_do_not_fit_are_refused_with_the_numbers(name, monkeypatch):
    algorithm, topology, base = build_algorithm(name, {}), exchange(RING).topology, torch.nn.Linear(2, 2)
    assert algorithm.traits.merges_into and not build_algorithm("dec-lora", {}).traits.merges_into
    check_merges(name, algorithm, topology, 100, start(), base)
    monkeypatch.setattr("os.sysconf", lambda what: 100 if what == "SC_PAGE_SIZE" else 10)
    with pytest.raises(
        CompositionError,
        match=rf"{name} would hold up to \d+ merged columns in each of 2 layers for each "
        r"of 4 clients: .* GB .*; this machine has|this machine has 1e-06 GB",
    ):
        check_merges(name, algorithm, topology, 100, start(), base)
    check_merges("dec-lora", build_algorithm("dec-lora", {}), topology, 100, start(), base)


def test_on_a_gpu_its_free_memory_counts(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (7, 80))
    assert room(torch.device("cuda:0")) == (7, "and the GPU has free")
    assert room(torch.device("cpu"))[0] > 10**8


def test_the_room_for_merges_is_what_they_take():
    for case in ("rac-lora", "flora", "fedex-lora", "fedhl"):
        algorithm = method(case)
        merged = run(algorithm, start(), exchange(RING), 1 if case != "rac-lora" else 4)[-1]
        held = merged.reference if case == "fedhl" else merged.merged
        bound = algorithm.merged_columns(4, 3, 1 if case != "rac-lora" else 4)
        for update in held.layers.values():
            columns = update.left.shape[2] or bound
            assert columns == bound, case


@pytest.mark.parametrize("name", [name for name in METHODS if name != "fedhl"])
def test_a_quantised_base_is_refused(name):
    base, topology = torch.nn.Linear(2, 2), exchange(RING).topology
    base.config = SimpleNamespace(quantization_config={"bits": 4})
    with pytest.raises(CompositionError, match="quantised.*unquantised"):
        check_merges(name, build_algorithm(name, {}), topology, 3, start(), base)
    base.config, base.weight = None, torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(CompositionError, match="weights in torch.uint8"):
        check_merges(name, build_algorithm(name, {}), topology, 3, start(), base)


def test_who_merges_nothing_into_it_takes_a_quantised_base():
    base = torch.nn.Linear(2, 2)
    base.config = SimpleNamespace(quantization_config={"bits": 4})
    check_merges("fedhl", build_algorithm("fedhl", {}), exchange(RING).topology, 3, start(), base)


@pytest.mark.parametrize(("name", "settings"), [("flora", {}), ("rac-lora", {"settle": 2})])
def test_a_method_whose_bases_can_run_away_says_so(name, settings):
    algorithm = build_algorithm(name, settings)
    assert prepare(algorithm, exchange(COMPLETE).topology, 5) == (algorithm, ())
    for graph in (RingGraph(kind="ring"), RANDOM):  # a ring of 6 has the eigenvalue -1/3
        (note,) = prepare(algorithm, build_topology(graph, 6, 0), 5)[1]
        assert "negative eigenvalues" in note and "topology.weights=laplacian" in note
    for graph in (StarGraph(kind="star"), RingGraph(kind="ring", weights="laplacian")):  # of 1/6 and 5/6; at least 1/3
        notes = prepare(algorithm, build_topology(graph, 6, 0), 5)[1]
        assert not any("negative" in note for note in notes) and bool(notes) == (name != "rac-lora")


def test_a_residual_stays_where_it_was_merged_and_the_run_says_so():
    algorithm = build_algorithm("fedex-lora", {})
    assert prepare(algorithm, exchange(COMPLETE).topology, 5) == (algorithm, ())
    (note,) = prepare(algorithm, exchange(RING).topology, 5)[1]
    assert "drift apart" in note and "eigenvalues" not in note


class Pull:
    """Every client's whole update goes a little towards its own target, as far as its random factor lets it."""

    def __init__(self, size):
        self.target = {
            layer.name: size * random(4, layer.d_out, layer.d_in, seed=k) for k, layer in enumerate(SPEC.layers)
        }

    round = staticmethod(nullcontext)

    def fit(self, x, train):
        x = replace(x, flat=x.flat.clone())
        for n, W in models(x).items():
            A = x.A[n]
            x.B[n].sub_(
                torch.linalg.solve(A @ A.mT, (W - self.target[n]) @ A.mT, left=False) / x.scaling[:, None, None]
            )
        return x


def test_along_negative_eigenvalues_an_odd_number_of_mixings_runs_away():
    """W of a ring of 4 has the eigenvalue -1/3, that of Laplacian weights none below 1/3."""
    found = {}
    cases = {"odd": (0, "metropolis"), "even": (1, "metropolis"), "laplacian": (0, "laplacian")}
    for name, (settle, weights) in cases.items():
        algorithm = build_algorithm("rac-lora", {"chain": 1, "settle": settle})
        peers = exchange(RingGraph(kind="ring", weights=weights))
        x = run(algorithm, start(), peers, 80 * (settle + 1), Pull(1.0))[-1]
        found[name] = diagnose(x, None, peers.graph.W).consensus_product
    assert found["odd"] > 1e3 * found["even"] and found["odd"] > 1e3 * found["laplacian"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rounds", [3, 8])
def test_merged_factors_can_be_mixed_on(side, rounds):
    """Then every exchange is exact gossip of whole models, low-rank or dense, and clients agree."""
    algorithm = build_algorithm("rac-lora", {"chain": 1, "mix_merged": True, "side": side})
    learner, peers, seen, sizes = Drift(range(4)), exchange(RING), [], []

    def fit(x, train):
        seen.append(learner.fit(x, train) if learner.t < rounds else x)
        sizes.append(
            encoded_bytes({k.removeprefix("."): v for k, v in algorithm.message(x).items() if k[0] == "."})
            if learner.t
            else 0
        )
        return seen[-1]

    both = SimpleNamespace(round=learner.round, fit=fit)
    states = run(algorithm, start(), peers, rounds + 12, both)
    for trained, after in zip(seen, states, strict=True):
        W = torch.from_numpy(peers.graph.W)
        for n, whole in models(trained).items():
            assert torch.allclose(models(after)[n], torch.einsum("ij,jok->iok", W, whole), rtol=0, atol=1e-11)
    assert diagnose(states[-1], None, peers.graph.W).consensus_product < 1e-8
    alone = encoded_bytes(build_algorithm("rac-lora", {"side": side}).message(start()))
    assert peers.stats.bytes_per_edge == alone + sizes[-1]


def test_the_rule_of_fedhl_needs_the_references_of_others():
    x = start().with_empty_merges()
    with pytest.raises(AssertionError):
        exchange(RING).combine(x, lambda received: corrected_reference(received, "equal", 2.0))


# --- whole runs

RUN = [
    "train.rounds=5",
    "train.dtype=fp32",
    "checkpoint.every=2",
    "topology.kind=random",
    "topology.p=0.6",
    "train.lr=0.05",
]


class Stop(Exception):
    pass


def settings(config, name):
    extra = ["algorithm.chain=1", "algorithm.settle=1"] if name == "rac-lora" else []
    return config("bert", *RUN, f"algorithm.name={name}", *extra)


@pytest.mark.parametrize("name", others_slow(["flora", "fedex-lora", "fedhl"], [0]))
def test_a_run_that_broke_off_goes_on_to_the_same_bytes(config, tmp_path, name):
    whole = simulate(settings(config, name), tmp_path / "whole").run

    def listen(event):
        if isinstance(event, RoundDone) and event.round == 3:
            raise Stop

    with pytest.raises(Stop):
        simulate(settings(config, name), tmp_path / "broken", sinks=[listen])
    again = resume(tmp_path / "broken").run
    for file in ("all.safetensors", "client-01/adapter_model.safetensors", "average/adapter_model.safetensors"):
        assert (again / "adapters" / file).read_bytes() == (whole / "adapters" / file).read_bytes()
    assert len(select_events(read_events(whole), Evaluated)) >= 2


def run_alone(yaml, folder):
    """What the process that is killed does."""
    simulate(load_config(yaml), folder)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(config, tmp_path):
    chosen = settings(config, "rac-lora")
    (tmp_path / "config.yaml").write_text(chosen.to_yaml())
    whole = simulate(chosen, tmp_path / "whole").run
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft", "transformers.models.bert.modeling_bert", "peerlora.runtime.simulate"])
    process, folder = (
        context.Process(target=run_alone, args=(tmp_path / "config.yaml", tmp_path / "killed")),
        tmp_path / "killed",
    )
    process.start()
    until((folder / "checkpoints" / "round-000004.json").exists, process.is_alive, every=0.0005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (folder / "summary.json").exists()
    resume(folder)
    one, other = (run / "adapters" / "all.safetensors" for run in (whole, folder))
    assert one.read_bytes() == other.read_bytes()


def test_a_run_exports_any_client_at_any_rank(config, tmp_path):
    done = simulate(settings(config, "rac-lora"), tmp_path / "run")
    card = (export_from_run(done.run, tmp_path / "cut", ModelChoice(1, rank=2)) / "README.md").read_text()
    assert "Rank 2, alpha 2" in card and "| left out |" in card
    grown = (export_from_run(done.run, tmp_path / "grown", None) / "README.md").read_text()
    assert "Rank 9, alpha 9" in grown and "all that was merged" in grown
    averaged = [event.averaged_loss for event in select_events(read_events(done.run), Evaluated)]
    assert np.isfinite(averaged).all()
