import json
import math

import pytest

from cases import others_slow
from peerlora.config.loading import parse_spec
from peerlora.errors import ConfigError
from peerlora.topology.describe import describe, rounds_to_halve
from peerlora.topology.schedule import build_topology


def figures(spec, clients=10, rounds=20, bytes_per_transfer=100):
    return describe(build_topology(parse_spec(spec), clients, 0), rounds, bytes_per_transfer)


def test_spec_in_one_string_or_several_words():
    one, several = parse_spec("random p=0.2 weights=laplacian"), parse_spec(["random", "p=0.2", "weights=laplacian"])
    assert one == several
    assert (one.kind, one.weights, one.p) == ("random", "laplacian", 0.2)


def test_spec_may_hold_lists_and_blanks():
    spec = parse_spec(["edges", "edges=[[0, 1], [1, 2]]", "allow_disconnected=true"])
    assert (spec.edges, spec.allow_disconnected) == ([(0, 1), (1, 2)], True)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("rnig", "did you mean 'ring'"),
        ("ring weigths=uniform", "unknown key .*did you mean 'weights'"),
        ("ring p=0.1", "unknown key"),
        ("random p=2", "less than or equal to 1"),
        ("random weights=metropolitan", "metropolis"),
        ("p=0.1", "names no kind"),
        ("", "names no kind"),
        ([], "names no kind"),
    ],
)
def test_bad_specs_say_what_was_expected(spec, told):
    with pytest.raises(ConfigError, match=told):
        parse_spec(spec)


def test_figures_of_a_ring():
    ring = figures("ring")
    assert ring["degree"] == {"min": 2, "mean": 2.0, "max": 2}
    assert (ring["connected"], ring["isolated"], ring["static"]) == (True, 0.0, True)
    promised = ("symmetric", "doubly_stochastic", "row_stochastic", "column_stochastic", "neighbours_only")
    assert ring["stochasticity"] == dict.fromkeys(promised, True)
    assert (ring["directed"], ring["period"], ring["messages_per_round"]) == (False, 1, 20)
    assert ring["left_after_period"] == pytest.approx(ring["rho"])
    assert ring["rho"] == pytest.approx(1 / 3 + 2 / 3 * math.cos(math.pi / 5))
    assert ring["spectral_gap"] == 1 - ring["rho"]
    assert ring["rounds_to_halve"] == pytest.approx(5.089, abs=0.001)
    assert ring["bytes_per_round"] == 20 * 100
    assert ring["estimated_from"] is None
    assert ring["union"] == {"rounds": 20, "connected": True, "reached": 1.0}


def test_figures_of_a_random_graph_as_known():
    sparse = figures("random p=0.1", rounds=100)
    assert sparse["rho"] == pytest.approx(0.804, abs=0.015)
    assert sparse["connected"] == pytest.approx(0.008, abs=0.01)
    assert sparse["isolated"] == pytest.approx(0.39, abs=0.02)
    assert sparse["bytes_per_round"] == pytest.approx(90 * 0.1 * 100, rel=0.05)
    assert sparse["bytes_per_round"] == round(sparse["degree"]["mean"] * 10 * 100)
    assert sparse["estimated_from"] == 1000
    assert sparse["union"]["connected"]


def test_the_union_needs_rounds():
    assert figures("random p=0.02", rounds=1)["union"]["reached"] < 0.6
    assert figures("random p=0.02", rounds=0)["union"] == {"rounds": 0, "connected": False, "reached": 0.1}


def test_figures_of_a_split_graph():
    split = figures("edges edges=[[0, 1], [1, 2]] allow_disconnected=true", clients=4)
    assert (split["connected"], split["isolated"], split["rho"], split["rounds_to_halve"]) == (False, 0.25, 1.0, None)
    assert split["union"] == {"rounds": 20, "connected": False, "reached": 0.75}


def test_figures_of_a_cycle_are_exact_over_its_period():
    peer = figures("one-peer", clients=8)
    assert (peer["period"], peer["messages_per_round"], peer["estimated_from"]) == (3, 8, None)
    assert (peer["directed"], peer["static"]) == (True, False)
    assert peer["connected"] == pytest.approx(1 / 3)  # i -> i + 1 is a ring, i -> i + 2 is two, i -> i + 4 four
    assert peer["left_after_period"] == 0 and peer["union"]["connected"]
    assert figures("one-peer", clients=6)["left_after_period"] == pytest.approx(0.2165, abs=1e-4)


def test_figures_of_a_directed_ring_with_a_chord():
    ring = figures("directed-ring chords=[[0, 2]]", clients=5)
    assert ring["degree"] == {"min": 1, "mean": 1.2, "max": 2}
    assert (ring["connected"], ring["directed"], ring["left_after_period"]) == (True, True, None)
    assert (ring["stochasticity"]["row_stochastic"], ring["stochasticity"]["column_stochastic"]) == (False, True)
    assert 0 < ring["rho"] < 1 and ring["messages_per_round"] == 6


NEW = ["directed-ring chords=[[0, 1]]", "random-out degree=1", "one-peer", "base-k", "d-equistatic", "ou-equidyn"]


@pytest.mark.parametrize("spec", ["ring", "random", "star weights=pairwise", "path drop_links=0.5", "complete"])
@pytest.mark.parametrize("clients", others_slow([1, 5], [1]))
def test_figures_are_plain_json(spec, clients):
    shown = figures(spec, clients=clients, rounds=3)
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown


@pytest.mark.parametrize(
    "spec", others_slow([*NEW, "matcha base=path", "one-peer drop_links=0.3", "hypercube lazy=true"], [0, 3, 6, 7])
)
def test_figures_of_every_new_kind_are_plain_json(spec):
    shown = figures(spec, clients=4, rounds=3)
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown


def test_rounds_to_halve():
    assert rounds_to_halve(0.5) == pytest.approx(1)
    assert (rounds_to_halve(0.0), rounds_to_halve(1.0)) == (0.0, None)
