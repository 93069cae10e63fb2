"""Push-sum on quadratics and on a ring with a chord, where in- and out-degrees differ."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratics import adapters, coupled, curvatures, exchange, run

from cases import others_slow
from peerlora.algorithms import build_algorithm
from peerlora.algorithms.push_sum import SGP
from peerlora.errors import CompositionError
from peerlora.exchange.schema import encoded_bytes
from peerlora.runtime.compose import compose
from peerlora.tree import tree_map

CHORD = {"kind": "directed-ring", "chords": [[0, 3]]}
RANDOM = {"kind": "random-out", "degree": 2}
DROPS = CHORD | {"drop_links": 0.3}


class Still:
    """A learner that changes nothing."""

    def fit(self, x, plan):
        return x


def seeded(clients=6):
    draw = np.random.default_rng(0)
    return 3 * draw.normal(size=clients), draw.uniform(0.5, 2, clients)


def finished(method, settings, learner, peers, x, rounds):
    """The clients' models after so many rounds; ratios are no affine map, so that none can be skipped."""
    algorithm, states = run(method, settings, learner, peers, x, rounds)
    return algorithm.model(states[-1]).flat


def started(values, **shape):
    x = adapters(len(values), **shape)
    return replace(x, flat=torch.from_numpy(np.repeat(np.asarray(values)[:, None], x.flat.shape[1], 1)))


@pytest.mark.parametrize("topology", [CHORD, RANDOM, DROPS, {"kind": "star", "weights": "push-sum"}])
def test_pure_averaging_reaches_the_exact_mean(topology):
    b, _ = seeded()
    algorithm, states = run("sgp", {}, Still(), exchange(topology, 6), started(b), 200)
    assert (algorithm.model(states[-1]).flat - b.mean()).abs().max() < 5e-15


def test_without_the_mass_it_ends_elsewhere_and_row_averages_do_too():
    b, _ = seeded()
    _, states = run("sgp", {}, Still(), exchange(CHORD, 6), started(b), 200)
    assert (states[-1].u.flat - b.mean()).abs().max() > 0.1
    W = exchange(CHORD | {"weights": "row-average"}, 6).graph.W
    limit = np.linalg.matrix_power(W, 2000) @ b
    assert np.ptp(limit) < 1e-12 and abs(limit[0] - b.mean()) > 0.05


@given(st.sampled_from([CHORD, RANDOM, DROPS]), st.integers(0, 50), st.sampled_from(["sgp", "push-diging"]))
@settings(max_examples=15)
def test_mass_is_kept_and_the_sum_changes_by_steps_only(topology, seed, method):
    peers, learner = exchange(topology, 6, seed), coupled(6, seed=seed)
    algorithm = build_algorithm(method, {"interval": 2})
    state = algorithm.start(adapters(6, head=2), peers)
    for t in range(12):
        peers.begin(t)
        before, state = state, algorithm.round(t, state, learner, peers)
        assert float(state.w.sum()) == pytest.approx(6, abs=1e-12) and float(state.w.min()) > 0
        if method == "push-diging":
            assert state.y.sum(0).numpy() == pytest.approx(state.g.sum(0).numpy(), abs=1e-10)
        else:
            steps = learner.fit(before.z, algorithm.active(t)).flat - before.z.flat
            assert state.u.flat.sum(0).numpy() == pytest.approx((before.u.flat + steps).sum(0).numpy(), abs=1e-12)


@pytest.mark.slow
def test_sgp_stops_beside_the_solution_by_an_error_that_shrinks_with_the_rate():
    b, a = seeded()
    spreads = []
    for lr in (0.1, 0.01):
        u = finished("sgp", {}, curvatures(a, b, lr=lr), exchange(CHORD, 6), adapters(6), 1000)[:, 0]
        spreads.append(float((u - u.mean()).norm()))
    assert spreads[0] > 0.1 and spreads[1] == pytest.approx(spreads[0] / 10, rel=0.2)


@pytest.mark.parametrize(("steps", "lr"), others_slow([(1, 0.1), (4, 0.03)], [1]))
@pytest.mark.parametrize("topology", [CHORD, RANDOM])
def test_push_diging_is_exact_on_unequal_curvatures(topology, steps, lr):
    b, a = seeded()
    learner = curvatures(a, b, lr=lr, local_steps=steps)
    u = finished("push-diging", {}, learner, exchange(topology, 6), adapters(6), 300)
    assert (u - learner.solution).abs().max() < 1e-11


def test_push_diging_is_exact_with_factors_in_turn():
    learner = coupled(6, lr=0.05)
    u = finished("push-diging", {"interval": 3}, learner, exchange(CHORD, 6), adapters(6, head=2), 600)
    assert (u - learner.solution).abs().max() < 1e-8


@pytest.mark.parametrize("interval", [None, 2])
@pytest.mark.parametrize("topology", ["ring", "directed-ring", "one-peer"])
def test_on_a_doubly_stochastic_graph_sgp_is_dfedavg(topology, interval):
    x, learner = adapters(4, head=2), coupled(4, local_steps=3, lr=0.05)
    _, states = run("sgp", {"interval": interval}, learner, exchange(topology, 4), x, 8)
    _, plain = run("dfedavg", {"interval": interval}, learner, exchange(topology, 4), x, 8)
    for ours, theirs in zip(states, plain, strict=True):
        assert (ours.z.flat - theirs.flat).abs().max() < 1e-13
        assert ours.w.numpy() == pytest.approx(1)


@pytest.mark.parametrize("method", ["sgp", "push-diging"])
def test_a_private_head_is_neither_mixed_nor_divided(method):
    b, a = seeded(4)
    peers, learner = exchange({"kind": "directed-ring", "chords": [[0, 2]]}, 4), curvatures(a, started(b, head=1).flat)
    u = finished(method, {}, learner, peers, adapters(4, head=1, private=True), 200)
    assert u[:, 2].numpy() == pytest.approx(b, abs=1e-4)  # each at its own minimum
    assert float((u[:, 0] - u[:, 0].mean()).norm()) < 2


@pytest.mark.parametrize("method", ["sgp", "push-diging"])
@pytest.mark.parametrize("head", ["mixed", "private"])
def test_the_message_is_what_is_sent(config, method, head):
    words = [f"algorithm.name={method}", "topology.kind=directed-ring", "topology.chords=[[0, 2]]"]
    federation = compose(config("bert", *words, f"adapter.head={head}"))
    learner, peers, algorithm = federation.learner, federation.exchange, federation.algorithm
    state = algorithm.start(federation.start, peers)
    for t in range(3):
        with learner.round(t):
            peers.begin(t)
            state = algorithm.round(t, state, learner, peers)
    size = encoded_bytes(algorithm.message(federation.start))
    assert (peers.stats.bytes_per_edge, peers.stats.bytes_sent) == (
        size,
        5 * size,
    )  # four links of the ring and a chord
    assert state.z.flat.isfinite().all()


def refusal(config, *words):
    with pytest.raises(CompositionError) as told:
        compose(config("bert", *words))
    return str(told.value)


def test_what_needs_double_sums_is_refused_on_one_way_links_and_told_of_push_sum(config):
    told = refusal(config, "algorithm.name=dec-lora", "topology.kind=directed-ring", "topology.chords=[[0, 2]]")
    assert "row stochastic" in told and "algorithm.name=sgp or push-diging" in told
    told = refusal(config, "algorithm.name=sgp", "topology.kind=directed-ring", "topology.weights=row-average",
                   "topology.chords=[[0, 2]]")  # fmt: skip
    assert "column stochastic" in told and "hand on all they have" in told
    assert told.endswith("; use topology.weights=push-sum")


CHORDS = ("topology.kind=directed-ring", "topology.chords=[[0, 2]]")
UNDIRECTED = ", or an undirected graph, such as topology=ring"
CURES = [
    (["fedspeed", *CHORDS], "algorithm.name=sgp or push-diging" + UNDIRECTED),
    (
        ["fedprox", *CHORDS, "topology.weights=row-average"],
        "topology.weights=push-sum with algorithm.name=sgp or push-diging" + UNDIRECTED,
    ),
    (["salf", *CHORDS], "an undirected graph, such as topology=ring"),
    (["d2", "topology.kind=random", "topology.p=0.5"], "a fixed graph without drop-outs, such as topology=ring"),
    (["dec-lora", "topology.kind=star", "topology.weights=push-sum"], "topology.weights=metropolis"),
]


@pytest.mark.parametrize(("words", "cure"), CURES)
def test_a_refusal_names_what_is_missing_and_nothing_that_is_there(config, words, cure):
    told = refusal(config, f"algorithm.name={words[0]}", *words[1:])
    assert told.rpartition("; use ")[2] == cure


def test_settings():
    assert SGP().active(7) == "AB" and [SGP(interval=1).active(t) for t in range(3)] == ["B", "A", "B"]


@pytest.mark.parametrize("method", ["sgp", "push-diging"])
def test_who_takes_over_a_neighbours_model_keeps_its_own_mass(method):
    b, a = seeded(4)
    x = adapters(4, head=1, private=True)
    learner = curvatures(a, started(b, head=1).flat)
    algorithm, states = run(method, {}, learner, exchange({"kind": "directed-ring", "chords": [[0, 2]]}, 4), x, 5)
    own, other = (tree_map(lambda _, leaf, i=i: leaf[[i]], states[-1]) for i in (1, 2))
    found = algorithm.on_rejoin(own, other)
    shared = x.spec.shared
    assert torch.allclose(found.z.flat[:, shared], other.z.flat[:, shared]) and torch.equal(found.w, own.w)
    if method == "push-diging":
        assert torch.equal(found.y, own.y) and torch.equal(found.g, own.g)
