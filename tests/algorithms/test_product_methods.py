"""DeCAF, FlexLoRA, HetLoRA, FedRot-LoRA and LoRA-FAIR against plain per-client runs, and what they have in common."""

import threading

import plain_products as plain
import pytest
import torch

from cases import others_slow
from peerlora.algorithms import REGISTRY, build_algorithm
from peerlora.config.sections import CompleteGraph, EdgesGraph, RandomGraph, RingGraph, StarGraph
from peerlora.errors import CompositionError, ConfigError
from peerlora.exchange.schema import encoded_bytes
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import AdapterSpec, LayerSpec, initial_adapters
from peerlora.randomness import torch_generator
from peerlora.runtime.compose import compose
from peerlora.topology.schedule import build_topology

SPEC = AdapterSpec((LayerSpec("q", 9, 8), LayerSpec("v", 7, 10)), rank=4, alpha=6.0, head=(("out.weight", (3, 2)),))
HET = {"gamma": 0.7, "penalty": 0.05, "smallest": 2}
CASES = {
    "decaf": ({}, plain.decaf, {}),
    "flexlora": ({}, plain.decaf, {}),
    "hetlora": (HET, plain.hetlora, {"local": plain.hetlora_local(*HET.values())}),
    "fedrot-lora": ({"strength": 0.6}, plain.fedrot(0.6), {}),
    "fedrot-lora B first, all the way": ({"strength": 1, "first": "B"}, plain.fedrot(1.0, "B"), {}),
    "lora-fair": ({"ridge": 0.1}, plain.fair(0.1), {}),
}
METHODS = ["decaf", "flexlora", "hetlora", "fedrot-lora", "lora-fair"]
ANY_RANKS = ["decaf", "flexlora", "hetlora"]
GRAPHS = [
    RingGraph(kind="ring"),
    StarGraph(kind="star"),
    CompleteGraph(kind="complete"),
    RandomGraph(kind="random", p=0.5),
]
NOBODY = EdgesGraph(kind="edges", edges=[], allow_disconnected=True)
UNEQUAL = [1, 4, 2, 3]


def start(ranks=(4, 4, 4, 4), spec=SPEC, dtype=torch.float64):
    head = {name: torch.zeros(shape) for name, shape in spec.head}
    return initial_adapters(spec, list(ranks), head, torch_generator(0, "adapter"), dtype)


def method(case):
    settings = CASES[case][0] if case in CASES else {"objective": "cosine"}
    return build_algorithm(case.split()[0], settings)


def run(algorithm, x, peers, rounds=4, learner=None):
    """The state after every round."""
    learner = learner or plain.Drift(peers.clients)
    state, states = algorithm.start(x, peers), []
    for t in range(rounds):
        with learner.round(t):
            peers.begin(t)
            state = algorithm.round(t, state, learner, peers)
        states.append(state)
    return states


def exchange(graph, clients=4):
    return StackedExchange(build_topology(graph, clients, seed=5), list(range(clients)))


def assert_same(found, expected, tolerance):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.ranks, theirs.ranks)
        assert (ours.flat - theirs.flat).abs().max() <= tolerance


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.kind)
@pytest.mark.parametrize("case", CASES)
def test_a_run_equals_the_plain_one(case, graph):
    peers = exchange(graph)
    expected = plain.run_plain(start(), plain.Drift(range(4)), peers.topology, CASES[case][1], 4, **CASES[case][2])
    assert_same(run(method(case), start(), peers), expected, 1e-9)


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.kind)
@pytest.mark.parametrize("case", ANY_RANKS)
def test_a_run_with_unequal_ranks_equals_the_plain_one(case, graph):
    peers, x = exchange(graph), start(UNEQUAL)
    expected = plain.run_plain(x, plain.Drift(range(4)), peers.topology, CASES[case][1], 4, **CASES[case][2])
    found = run(method(case), x, peers)
    assert_same(found, expected, 1e-9)
    for state in found:
        for A, B in zip(state.A.values(), state.B.values(), strict=True):
            for i, r in enumerate(state.ranks.tolist()):
                assert not A[i, r:].any() and not B[i, :, r:].any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head", others_slow(["mixed", "private"], ["mixed"]))
def test_a_real_learner_and_either_head_equal_the_plain_run(config, case, head):
    words = [f"algorithm.{key}={value}" for key, value in CASES[case][0].items()]
    chosen = config("bert", f"algorithm.name={case.split()[0]}", *words, f"adapter.head={head}", "train.lr=0.05")
    one, other = compose(chosen), compose(chosen)
    found = run(one.algorithm, one.start, one.exchange, 3, one.learner)
    options = CASES[case][2] | {"private_head": head == "private"}
    expected = plain.run_plain(other.start, other.learner, other.topology, CASES[case][1], 3, **options)
    assert_same(found, expected, 1e-8)
    assert (found[-1].select("B").flat - one.start.select("B").flat).abs().max() > 1e-2


class PendingExchange:
    """Collects the rows of several shards that run in threads."""

    def __init__(self, shards):
        self.rows, self.barrier = {}, threading.Barrier(shards)

    def gather(self, first):
        def collect(rows):
            self.rows[first] = rows
            self.barrier.wait(timeout=60)
            everybody = torch.cat([self.rows[key] for key in sorted(self.rows)])
            self.barrier.wait(timeout=60)
            return everybody

        return collect


@pytest.mark.parametrize("graph", [GRAPHS[0], GRAPHS[3]], ids=["ring", "random"])
@pytest.mark.parametrize("case", others_slow([*CASES, "lora-fair cosine"], CASES))
def test_two_shards_of_two_equal_one_of_four(case, graph):
    x = start(UNEQUAL if case in ANY_RANKS else (4, 4, 4, 4))
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
    assert (torch.cat([found[0].flat, found[2].flat]) - whole.flat).abs().max() < 1e-10
    assert torch.equal(torch.cat([found[0].ranks, found[2].ranks]), whole.ranks)


# --- limit cases


@pytest.mark.parametrize("name", METHODS)
def test_without_links_and_with_one_client_it_is_training_alone(name):
    settings = {"gamma": 1.0} if name == "hetlora" else {}
    for clients in (1, 4):
        x = start((4,) * clients)
        found = run(build_algorithm(name, settings), x, exchange(NOBODY, clients))
        local = run(build_algorithm("local", {}), x, exchange(NOBODY, clients))
        assert all(torch.equal(ours.flat, theirs.flat) for ours, theirs in zip(found, local, strict=True))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "fedrot-lora"])
def test_the_complete_graph_leaves_no_disagreement(name):
    for state in run(build_algorithm(name, {}), start(), exchange(GRAPHS[2])):
        assert (state.flat - state.flat[:1]).abs().max() < 1e-12


EQUAL_TO_FEDIT = [
    ("fedrot-lora", {"strength": 0.0}, 0.0),
    ("lora-fair", {"ridge": 1e12}, 1e-9),
    ("lora-fair", {"ridge": 1e12, "objective": "cosine"}, 1e-9),
]


@pytest.mark.parametrize(("name", "settings", "tolerance"), EQUAL_TO_FEDIT)
@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.kind)
def test_without_its_own_step_it_averages_factors(name, settings, tolerance, graph):
    found = run(build_algorithm(name, settings), start(), exchange(graph))
    assert_same(found, run(build_algorithm("dec-lora", {}), start(), exchange(graph)), tolerance + 1e-13)


# --- what is sent, refused, left alone


@pytest.mark.parametrize("name", METHODS)
def test_it_sends_what_dec_lora_sends(name):
    settings = {"gamma": 1.0} if name == "hetlora" else {}
    algorithm, peers, x = build_algorithm(name, settings), exchange(GRAPHS[0]), start()
    run(algorithm, x, peers, 2)
    assert peers.stats.bytes_per_edge == encoded_bytes(algorithm.message(x)) == encoded_bytes(x.message())
    assert peers.stats.bytes_sent == 8 * peers.stats.bytes_per_edge and peers.stats.sent is not None


@pytest.mark.parametrize("name", ["decaf", "fedrot-lora", "lora-fair"])
def test_what_was_measured_is_there_for_every_client(name):
    peers = exchange(GRAPHS[0])
    run(build_algorithm(name, {}), start(), peers, 2)
    expected = {
        "decaf": {"truncation_tail"},
        "fedrot-lora": {"alignment_before", "alignment_after"},
        "lora-fair": {"uncorrected"},
    }
    assert set(peers.stats.measures) == expected[name]
    for values in peers.stats.measures.values():
        assert values.shape == (4,) and (values > 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_round_leaves_the_state_it_got_alone_and_keeps_its_dtype(name):
    x = plain.Drift(range(4)).fit(start(dtype=torch.float32), "AB")
    before = x.flat.clone()
    peers = exchange(GRAPHS[0])
    peers.begin(1)
    after = build_algorithm(name, {}).round(1, x, plain.Drift(range(4)), peers)
    assert torch.equal(x.flat, before) and after.flat.dtype == torch.float32


REFUSED = [
    ("fedrot-lora", {"strength": 1.5}, "algorithm.strength: 1.5 given; expected a number from 0 to 1"),
    ("fedrot-lora", {"strength": -0.1}, "from 0 to 1"),
    ("fedrot-lora", {"strength": float("nan")}, "algorithm.strength: nan given; expected a number, such as 0.5"),
    ("fedrot-lora", {"strength": True}, "algorithm.strength: True given; expected a number, such as 0.5"),
    ("fedrot-lora", {"strength": "0.5"}, "algorithm.strength: '0.5' given"),
    ("fedrot-lora", {"strength": None}, "algorithm.strength: None given"),
    ("fedrot-lora", {"first": "C"}, "algorithm.first: 'C' given; expected one of A, B"),
    ("lora-fair", {"ridge": 0}, "algorithm.ridge: 0.0 given; expected a number above 0"),
    ("lora-fair", {"ridge": float("inf")}, "algorithm.ridge: inf given"),
    ("lora-fair", {"objective": "cos"}, "algorithm.objective: 'cos' given; expected one of ridge, cosine"),
    ("hetlora", {"gamma": 0}, "algorithm.gamma: 0.0 given; expected a number above 0, at most 1"),
    ("hetlora", {"gamma": 1.01}, "at most 1"),
    ("hetlora", {"penalty": -1e-4}, "algorithm.penalty=-0.0001"),
    ("hetlora", {"smallest": 0}, "algorithm.smallest=0"),
    ("hetlora", {"smallest": 1.0}, "algorithm.smallest: 1.0 given; expected a whole number, such as 1"),
    ("decaf", {"rank": 3}, "unknown key 'algorithm.rank'; decaf has no settings"),
]


@pytest.mark.parametrize(("name", "settings", "told"), REFUSED)
def test_settings_that_make_no_sense_are_refused(name, settings, told):
    with pytest.raises(ConfigError, match=told):
        build_algorithm(name, settings)


def test_a_whole_number_serves_as_a_float():
    built = build_algorithm("fedrot-lora", {"strength": 1})
    assert built.strength == 1.0 and type(built.strength) is float
    assert build_algorithm("hetlora", {"gamma": 1, "smallest": 2}).smallest == 2


@pytest.mark.parametrize("name", METHODS)
def test_unequal_ranks_and_contacts_in_sequence_are_refused_where_they_cannot_work(config, name):
    assert (REGISTRY[name].traits.unequal_ranks is None) == (name in ANY_RANKS)
    if name not in ANY_RANKS:
        with pytest.raises(CompositionError, match=f"{name} cannot work with different ranks"):
            compose(config("bert", f"algorithm.name={name}", "adapter.rank=[1, 2, 3, 3]"))
    with pytest.raises(CompositionError, match=f"{name} needs a topology whose mixing matrix is .*neighbours only"):
        compose(config("bert", f"algorithm.name={name}", "topology.weights=pairwise"))
