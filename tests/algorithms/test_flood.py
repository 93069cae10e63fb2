"""FLood: limits of the three mixings, equality with the host, and what a run does."""

from dataclasses import replace

import pytest
import torch
from quadratics import adapters, coupled, exchange
from quadratics import run as quadratic_run

from cases import others_slow
from peerlora.algorithms import build_algorithm
from peerlora.algorithms.flood import FLood, FLoodState, aimed, push_masses
from peerlora.errors import CompositionError, ConfigError, Stopped
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.runtime.compose import compose, opening_state
from peerlora.runtime.simulate import resume, simulate

pytestmark = pytest.mark.usefixtures("no_reports")


def values(clients, private=False):
    spec = AdapterSpec((LayerSpec("h.0.q", 2, 3),), 1, 1.0, (("head.weight", (2,)),), private)
    flat = torch.randn(clients, spec.parameters, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return Adapters(spec, flat, torch.ones(clients, dtype=torch.int64))


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


C = double(0.5, 2.0, 1.0, 4.0, 0.1, 1.5)
CHORD = {"kind": "directed-ring", "chords": [[0, 3]]}


def weighted_mean(x, c):
    return (c[:, None] * x.flat).sum(0) / c.sum()


def repeated(x, c, peers, how, rounds=1200):
    state = FLoodState(x, c, c, c[:, None][:, :0])
    for t in range(rounds):
        peers.begin(t)
        if how == "push-sum":
            state = push_masses(state, state.x, c, peers)
        else:
            state = replace(state, x=aimed(state.x, c, peers, how == "metropolis"))
    return state


@pytest.mark.parametrize("graph", others_slow(["ring", "path", "star", {"kind": "random", "p": 0.4}], [3]))
@pytest.mark.parametrize("how", others_slow(["metropolis", "push-sum"], ["push-sum"]))
def test_the_exact_mixings_end_at_the_confidence_weighted_mean(graph, how):
    x = values(6)
    found = repeated(x, C, exchange(graph, 6), how).x
    assert float((found.flat - weighted_mean(x, C)).abs().max()) < 1e-5


@pytest.mark.parametrize("graph", [CHORD, {"kind": "random-out", "degree": 2}, CHORD | {"drop_links": 0.3}])
def test_masses_end_at_the_weighted_mean_on_links_that_go_one_way_too(graph):
    x = values(6)
    assert float((repeated(x, C, exchange(graph, 6), "push-sum", 400).x.flat - weighted_mean(x, C)).abs().max()) < 1e-9


def test_with_equal_confidence_masses_are_those_of_sgp():
    x, learner, ones = adapters(6, head=2), coupled(6, local_steps=2, lr=0.05), torch.ones_like(C)
    _, states = quadratic_run("sgp", {}, learner, exchange(CHORD, 6), x, 8)
    ours, peers = FLoodState(x, ones, ones, ones[:, None][:, :0]), exchange(CHORD, 6)
    for t, theirs in enumerate(states):
        peers.begin(t)
        ours = push_masses(ours, learner.fit(ours.x, "AB"), ones, peers)
        assert float((ours.x.flat - theirs.z.flat).abs().max()) < 1e-12 and torch.allclose(ours.w, theirs.w)


def test_a_lazy_topology_has_lazy_weights_for_a_target():
    x, plain, lazy = values(6), exchange("star", 6), exchange({"kind": "star", "lazy": True}, 6)
    for peers in (plain, lazy):
        peers.mix({"c": C}, target="c")
    half = (torch.eye(6).double() + torch.from_numpy(plain.graph.W)) / 2
    assert torch.allclose(torch.from_numpy(lazy.graph.W), half) and torch.allclose(C @ half, C)
    assert float((repeated(x, C, lazy, "metropolis", 2000).x.flat - weighted_mean(x, C)).abs().max()) < 1e-9


def test_renormalised_rows_end_elsewhere():
    x = values(6)
    found = repeated(x, C, exchange("path", 6), "renormalised").x
    assert float((found.flat - found.flat[0]).abs().max()) < 1e-9, "they agree"
    assert float((found.flat - weighted_mean(x, C)).abs().max()) > 0.05, "but not on the weighted mean"


@pytest.mark.parametrize("how", ["metropolis", "push-sum", "renormalised"])
@pytest.mark.parametrize("private", [False, True])
def test_equal_confidence_is_the_base_mixing(how, private):
    x, peers = values(6, private), exchange("star", 6)
    base = peers.mix(x).flat
    peers.begin(0)
    assert float((repeated(x, torch.full_like(C, 3.0), peers, how, 1).x.flat - base).abs().max()) < 1e-12


def test_all_mass_on_one_client_makes_it_everybodys_model():
    c = torch.full((6,), 1e-9, dtype=torch.float64)
    c[0] = 1.0
    x = values(6)
    found = repeated(x, c, exchange("ring", 6), "push-sum").x
    assert float((found.flat - x.flat[0]).abs().max()) < 1e-6


def test_masses_stay_positive_and_sum_to_the_confidences_that_went_in():
    peers, generator = exchange("ring", 6), torch.Generator().manual_seed(1)
    state = FLoodState(values(6), torch.ones_like(C), torch.ones_like(C), C[:, None][:, :0])
    for t in range(60):
        peers.begin(t)
        c = (3 * torch.randn(6, generator=generator, dtype=torch.float64)).exp()
        state = push_masses(state, state.x, c, peers)
        assert bool((state.w > 0).all())
        assert float(state.w.sum()) == pytest.approx(float(state.c.sum()))
    for t in range(60, 160):
        peers.begin(t)
        state = push_masses(state, state.x, C, peers)
    assert torch.allclose(state.c, C), "what could not go in at once has gone in"


def test_a_lone_client_keeps_what_it_trained():
    x, peers = values(1), exchange("complete", 1)
    state = FLoodState(x, double(1.0), double(1.0), double(0.0)[:, None][:, :0])
    trained = replace(x, flat=x.flat + 1)
    for c in (3.0, 0.1):
        found = push_masses(state, trained, double(c), peers)
        assert torch.allclose(found.x.flat, trained.flat) and torch.equal(found.c, found.w)


def test_aim_replaces_this_rounds_matrix_only():
    peers = exchange("ring", 6)
    base = peers.graph.W
    peers.mix({"c": C}, target="c")
    W = torch.from_numpy(peers.graph.W)
    assert torch.allclose(W.sum(1), torch.ones(6).double()) and torch.allclose(C @ W, C)
    assert not (W - torch.from_numpy(base)).abs().max() < 0.01
    peers.begin(1)
    assert (peers.graph.W == base).all()


# --- in a run


SKEWED = (
    "partition.kind=shares",
    "partition.shares=[[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.4, 0.2, 0.4]]",
    "partition.counts=[1, 1, 2]",
)


def run(config, rounds=3):
    federation = compose(config)
    state = opening_state(federation)
    for t in range(rounds):
        with federation.learner.round(t):
            federation.exchange.begin(t)
            state = federation.algorithm.round(t, state, federation.learner, federation.exchange)
    return federation, federation.algorithm.model(state)


@pytest.mark.parametrize("interval", ["null", "1"])
def test_without_alpha_and_beta_it_is_the_host_to_the_bit(config, interval):
    host = ["algorithm.name=dec-lora"] if interval == "null" else ["algorithm.name=adf-lora", "algorithm.interval=1"]
    expected, x = run(config("bert", *SKEWED, *host))
    off = [f"algorithm.interval={interval}", "algorithm.alpha=0.0", "algorithm.beta=0.0"]
    found, y = run(config("bert", *SKEWED, "algorithm.name=flood", *off))
    assert torch.equal(x.flat, y.flat) and found.exchange.stats.bytes_sent == expected.exchange.stats.bytes_sent
    assert found.algorithm.message(y) == expected.algorithm.message(x)


@pytest.mark.parametrize("mixing", others_slow(["metropolis", "push-sum", "renormalised"], ["push-sum"]))
@pytest.mark.parametrize("score", ["auto", "max-softmax", "entropy", "nll"])
def test_every_choice_runs_and_changes_something(config, mixing, score):
    host = run(config("bert", *SKEWED, "algorithm.name=dec-lora"))[1]
    words = ("algorithm.name=flood", f"algorithm.mixing={mixing}", f"algorithm.score={score}")
    federation, x = run(config("bert", *SKEWED, *words))
    assert bool(x.flat.isfinite().all()) and float((x.flat - host.flat).abs().max()) > 1e-5
    plain = compose(config("bert", "algorithm.name=dec-lora")).exchange
    plain.mix(x)
    assert 8 <= (federation.exchange.stats.bytes_per_edge - plain.stats.bytes_per_edge) < 200  # a number, and its name


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bert", ("task.kind=regression", "data.label=score")),
        ("llama", ("task.kind=causal-lm", "data.label=null")),
    ],
)
def test_other_tasks_score_by_their_loss(config, kind, words):
    _, x = run(config(kind, *words, "algorithm.name=flood"), 1)
    assert bool(x.flat.isfinite().all())
    with pytest.raises(CompositionError, match="score=entropy needs class logits.*use score=nll"):
        compose(config(kind, *words, "algorithm.name=flood", "algorithm.score=entropy"))


def test_the_fast_forward_scores_alike(config):
    fast, plain = (
        run(config("bert", *SKEWED, "algorithm.name=flood", f"train.fast={on}"))[1] for on in ("true", "false")
    )
    assert float((fast.flat - plain.flat).abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("words", "scorings"),
    [(["beta=0.0"], 3), (["alpha=0.0"], 3), ([], 6), (["mixing=push-sum"], 6), (["mixing=renormalised"], 6)],
)
def test_scoring_every_few_rounds_scores_less_often(config, words, scorings):
    chosen = [f"algorithm.{word}" for word in ("name=flood", "every=2", *words)]
    federation = compose(config("bert", *SKEWED, *chosen))
    score, calls = federation.learner.score, []
    federation.learner.score = lambda *words: calls.append(1) or score(*words)
    state = opening_state(federation)
    for t in range(5):
        with federation.learner.round(t):
            federation.exchange.begin(t)
            state = federation.algorithm.round(t, state, federation.learner, federation.exchange)
    assert len(calls) == scorings and state.scores.shape[0] == 4
    assert bool((state.c != 1).all()) == ("beta=0.0" not in words), "the confidence of the last scoring is kept"


@pytest.mark.parametrize("words", [[], ["algorithm.every=3", "algorithm.mixing=push-sum"]])
def test_a_resumed_run_goes_on_to_the_bit(config, tmp_path, words):
    asked = config("bert", *SKEWED, "algorithm.name=flood", *words)
    whole = simulate(asked, tmp_path / "whole")
    with pytest.raises(Stopped):
        simulate(asked, tmp_path / "stopped", stop=lambda: True)
    assert torch.equal(resume(tmp_path / "stopped").adapters.flat, whole.adapters.flat)


def test_absent_clients_are_held(config, tmp_path):
    words = ("clock.speed=[1.0, 1.0, 1.0, 0.01]", "clock.deadline=5.0", "algorithm.every=2")
    result = simulate(config("bert", *SKEWED, "algorithm.name=flood", *words), tmp_path / "run")
    start = compose(config("bert")).start
    assert torch.equal(result.adapters.flat[3], start.flat[3])


def test_another_base_is_refused_and_bias_is_told(config):
    words = ("algorithm.name=flood", "topology.weights=laplacian")
    with pytest.raises(CompositionError, match="topology.weights=metropolis, or algorithm.mixing=push-sum"):
        compose(config("bert", *words))
    assert compose(config("bert", *words, "algorithm.mixing=push-sum")).notes == ()
    (note,) = compose(config("bert", *words, "algorithm.mixing=renormalised")).notes
    assert "biased" in note


def test_one_way_links_take_masses_and_nothing_else(config):
    graph = ("topology.kind=directed-ring", "topology.chords=[[0, 2]]", "algorithm.name=flood")
    federation, x = run(config("bert", *SKEWED, *graph, "algorithm.mixing=push-sum"))
    assert bool(x.flat.isfinite().all()) and not federation.topology.properties.row_stochastic
    for words in (["mixing=metropolis"], ["mixing=renormalised"], ["mixing=push-sum", "beta=0.0"]):
        with pytest.raises(CompositionError, match=r"row stochastic.*push-sum alone, with beta above 0"):
            compose(config("bert", *graph, *(f"algorithm.{word}" for word in words)))
    with pytest.raises(CompositionError, match=r"is column stochastic; .*; use topology.weights=push-sum$"):
        compose(config("bert", *graph, "algorithm.mixing=push-sum", "topology.weights=row-average"))


@pytest.mark.parametrize(
    "settings",
    [{"alpha": -1.0}, {"q": 2.0}, {"tau": 0.0}, {"beta": 1.5}, {"every": 0}, {"tau_c": -1.0}, {"mixing": "x"}],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        build_algorithm("flood", settings)


def test_confidence_falls_with_the_mean_energy():
    scores = double([-3.0, -1.0], [-1.0, -1.0], [float("nan"), 5.0])
    found = FLood(beta=1.0, tau_c=2.0).confidence(scores)
    assert found.tolist() == pytest.approx(torch.exp(double(1.0, 0.5, -2.5)).tolist())
    assert FLood(beta=1.0).confidence(double([-1e9], [1e9])).isfinite().all()
