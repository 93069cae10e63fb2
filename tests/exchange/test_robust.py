"""Robust rules: by hand, against plain mixing, and against attackers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from peerlora.config.exchange import AdversaryConfig, RobustConfig
from peerlora.config.sections import TopologyConfig
from peerlora.errors import CompositionError
from peerlora.exchange.attacks import ATTACKS, Adversarial, AttackContext, alie_quantile, attackers, flipped_labels
from peerlora.exchange.robust import Robust, balance, clipped_gossip, krum, median, rfa, trimmed_mean
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.topology.schedule import build_topology

SPEC = AdapterSpec((LayerSpec("q", 2, 2),), 1, 1.0)  # four numbers
RULES = {"trimmed-mean": {"drop": 1}, "median": {}, "clipped-gossip": {}, "balance": {}, "rfa": {}, "krum": {"drop": 1}}


def rows(values, spec=SPEC):
    """A client for each value, which all its entries have; or one row for each."""
    flat = torch.as_tensor(np.asarray(values, float))
    flat = flat[:, None].expand(-1, spec.parameters).clone() if flat.ndim == 1 else flat
    return Adapters(spec, flat, torch.full((len(flat),), spec.rank))


def drawn(clients=6, seed=0, spec=SPEC):
    return rows(np.random.default_rng(seed).normal(size=(clients, spec.parameters)), spec)


def exchange(topology="complete", clients=6):
    config = TypeAdapter(TopologyConfig).validate_python(topology if isinstance(topology, dict) else {"kind": topology})
    return StackedExchange(build_topology(config, clients, 1), range(clients))


def combined(x, rule, topology="complete"):
    return exchange(topology, x.clients).combine(x, rule).flat


def robust(x, kind, topology="complete", start=None, rounds=10, **own):
    config = TypeAdapter(RobustConfig).validate_python({"kind": kind, **RULES[kind], **own})
    return Robust(exchange(topology, x.clients), config, start or rows([0.0] * x.clients, x.spec), rounds)


# --- by hand


def test_trimmed_mean_and_median_by_hand():
    x = rows([0, 1, 2, 3, 100])
    assert (combined(x, lambda received: trimmed_mean(received, 1)) == 2).all()
    assert (combined(x, lambda received: trimmed_mean(received, 2)) == 2).all()
    assert (combined(x, median) == 2).all()
    assert (combined(rows([0, 1, 2, 100]), median) == 1.5).all()


def test_trimmed_mean_takes_each_coordinate_by_itself():
    x = rows([[0, 9, 1, 1], [1, 0, 1, 1], [9, 1, 1, 1]])
    assert combined(x, lambda received: trimmed_mean(received, 1)).tolist() == [[1, 1, 1, 1]] * 3


def test_who_has_too_few_neighbours_keeps_its_own():
    x = drawn(4)
    mixed = combined(x, lambda received: trimmed_mean(received, 1), "path")
    assert torch.equal(mixed[[0, 3]], x.flat[[0, 3]]) and not torch.equal(mixed[1], x.flat[1])
    assert torch.equal(combined(x, lambda received: krum(received, 1), "path"), x.flat)


def test_clipping_by_hand():
    x = rows([[0, 0, 0, 0], [3, 4, 0, 0]])  # 5 apart, weights 1/2
    mixed = combined(x, lambda received: clipped_gossip(received, 1.0, 1))
    assert mixed.numpy() == pytest.approx(np.array([[0.3, 0.4, 0, 0], [2.7, 3.6, 0, 0]]))


def test_the_adaptive_radius_is_the_second_largest_distance():
    x = rows([[0, 0, 0, 0], [1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 50, 0]])
    mixed = combined(x, lambda received: clipped_gossip(received, None, 1))[0]
    assert mixed.numpy() == pytest.approx([0.25, 0.5, 0.5, 0])


def test_balance_by_hand():
    x = rows([[1, 0, 0, 0], [1.1, 0, 0, 0], [0, 0, 9, 0]])
    base = torch.zeros(4, dtype=torch.float64)
    peers = exchange("complete", 3)
    mixed = peers.combine(x, lambda received: balance(received, base, 0.3, 0.5)).flat
    assert mixed[0].numpy() == pytest.approx([1.05, 0, 0, 0])
    assert torch.equal(mixed[2], x.flat[2])  # nobody is near
    assert peers.stats.measures["rejected"].numpy() == pytest.approx([1 / 3, 1 / 3, 2 / 3])


def test_balance_grows_stricter_and_measures_from_the_start():
    start = rows([5.0] * 3)
    x = replace(start, flat=start.flat + torch.tensor([[1.0], [2.5], [1.0]]))
    peers = robust(x, "balance", start=start, rounds=4)
    assert not torch.equal(peers.mix(x).flat, x.flat)  # 1.5 apart, and twice an update of 1 allowed
    peers.begin(3)
    assert torch.equal(peers.mix(x).flat[0], x.flat[0])  # 2 exp(-3/4) = .94


def test_krum_takes_one_of_the_crowd_and_rfa_hardly_moves_for_the_outlier():
    x = rows([0, 0.1, 0.2, 0.3, 0.25, 100])
    chosen = combined(x, lambda received: krum(received, 1))
    assert (chosen == chosen[0]).all() and float(chosen[0, 0]) in (0.1, 0.2, 0.25)
    assert combined(x, lambda received: rfa(received, 30, 1e-6))[:, 0].numpy() == pytest.approx(0.225, abs=0.03)


def test_the_geometric_median_of_a_triangle():
    corners = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [0.5, math.sqrt(3) / 2, 0, 0]])
    found = combined(rows(corners), lambda received: rfa(received, 50, 1e-9))
    assert found[0].numpy() == pytest.approx(corners.mean(0), abs=1e-9)  # equilateral: the centre


# --- limits


@pytest.mark.parametrize("topology", ["ring", "complete", "star", {"kind": "random", "p": 0.5}])
def test_an_infinite_radius_is_plain_gossip_and_none_stays(topology):
    x = drawn()
    plain = exchange(topology).mix(x).flat
    assert (combined(x, lambda r: clipped_gossip(r, math.inf, 1), topology) - plain).abs().max() < 1e-14
    assert (combined(x, lambda r: trimmed_mean(r, 0), "complete") - exchange().mix(x).flat).abs().max() < 1e-14
    assert torch.equal(combined(x, lambda r: clipped_gossip(r, 0.0, 1), topology), x.flat)


@given(st.sampled_from(["ring", "complete", "star", "path"]), st.floats(0.01, 5), st.integers(0, 50))
@settings(max_examples=8)
def test_one_attacker_moves_a_client_by_its_weight_times_the_radius_at_most(topology, radius, seed):
    x = drawn(seed=seed)
    bad = replace(x, flat=x.flat.clone())
    bad.flat[0] += torch.from_numpy(np.random.default_rng(seed).normal(size=4)) * 1e6
    peers = exchange(topology)
    for i in range(1, 6):
        still = replace(x, flat=x.flat[i].expand(6, -1).clone())  # everybody else agrees with i
        still.flat[0] = bad.flat[0]
        moved = exchange(topology).combine(still, lambda r: clipped_gossip(r, radius, 1)).flat[i] - x.flat[i]
        assert float(moved.norm()) <= peers.graph.W[i, 0] * radius * (1 + 1e-9) + 1e-14


@pytest.mark.parametrize("topology", ["ring", "star", {"kind": "erdos-renyi", "p": 0.5}])
def test_equal_radii_and_symmetric_weights_keep_the_mean(topology):
    x = drawn()
    mixed = combined(x, lambda r: clipped_gossip(r, 0.7, 1), topology)
    assert (mixed.mean(0) - x.flat.mean(0)).abs().max() < 1e-14
    assert (mixed - x.flat).abs().max() > 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("topology", ["complete", "exponential"])
def test_values_that_are_not_finite_contribute_nothing(kind, topology, bad):
    x = drawn(8)
    x.flat[2, 1] = bad
    mixed = robust(x, kind, topology).mix(x).flat
    others = [i for i in range(8) if i != 2]
    assert mixed[others].isfinite().all()
    if kind == "median" and topology == "complete":
        assert mixed[0].numpy() == pytest.approx(np.median(x.flat[others].numpy(), axis=0))


HUGE = {
    **{f"{size:g}": [size] * 4 for size in (1e6, 1e18, 2e19, 3e38)},
    **{f"-{size:g}": [-size] * 4 for size in (1e6, 1e18, 2e19, 3e38)},
    "one coordinate": [0.5, 3e38, 0.5, 0.5],
    "both signs": [3e38, -3e38, 3e38, -3e38],
}


@pytest.mark.parametrize("kind", RULES)
def test_one_client_of_huge_values_does_not_carry_the_others_away(kind):
    others, own = [i for i in range(8) if i != 2], {"smoothing": 1e-6} if kind == "rfa" else {}
    for topology in ("complete", "exponential"):
        for told, values in HUGE.items():
            x = drawn(8)
            x = replace(x, flat=x.flat.float())
            x.flat[2] = torch.tensor(values)
            mixed = robust(x, kind, topology, **own).mix(x).flat[others]
            widest = (x.flat[others].amax(0) - x.flat[others].amin(0)).norm()
            assert mixed.dtype == torch.float32 and mixed.isfinite().all(), told
            assert (mixed - x.flat[others].mean(0)).norm(dim=1).max() <= widest, told


@pytest.mark.parametrize("kind", RULES)
def test_tiny_values_mix_as_large_ones_do(kind):
    x, own = drawn(6), {"smoothing": 1e-300} if kind == "rfa" else {}
    plain = robust(x, kind, **own).mix(x).flat
    for size in (1e-42, 1e-39, 1e-30, 1e-25):
        small = replace(x, flat=(x.flat * size).float())
        lost = 2e-44 / size + 1e-5  # what float32 cannot hold of the small ones
        assert (robust(small, kind, **own).mix(small).flat.double() / size - plain).abs().max() < lost, size


@pytest.mark.parametrize("kind", RULES)
def test_many_huge_values_stay_finite_and_so_do_those_beyond_the_squares_of_float64(kind):
    x = replace(drawn(6), flat=drawn(6).flat.float())
    x.flat[2:] = 3e38  # no rule withstands four of six, but none may make NaN of them
    assert robust(x, kind).mix(x).flat.isfinite().all()
    x = drawn(6)
    x.flat[2] = 1e300
    others = robust(x, kind).mix(x).flat[[0, 1, 3, 4, 5]]
    assert others.abs().max() <= x.flat[[0, 1, 3, 4, 5]].abs().max() + 1e-12


@pytest.mark.parametrize("kind", RULES)
def test_clients_that_agree_stay_where_they_are(kind):
    x = rows(np.tile(np.random.default_rng(0).normal(size=4), (6, 1)))
    assert (robust(x, kind).mix(x).flat - x.flat).abs().max() < 1e-12


@pytest.mark.parametrize("kind", RULES)
def test_blocks_alone_and_private_heads_are_left_to_the_rule_alone(kind):
    spec = AdapterSpec((LayerSpec("q", 2, 2),), 1, 1.0, (("out", (3,)),), private_head=True)
    x = drawn(6, spec=spec)
    mixed = robust(x, kind).mix(x)
    assert torch.equal(mixed.select("head").flat, x.select("head").flat)
    alone = robust(x, kind).mix(x.select("A"))
    assert alone.spec.blocks == ("A",) and alone.flat.shape == (6, 2)


def test_what_is_more_than_adapters_is_refused():
    x = drawn()
    with pytest.raises(CompositionError, match="exchange.robust works on adapters alone"):
        robust(x, "median").mix({"x": x, "z": x.flat})
    with pytest.raises(CompositionError, match="a rule of its own"):
        robust(x, "median").combine(x, median)


# --- attacks


def attacked(x, attack, who=(0, 3), scale=None, topology="complete", start=None, seed=5, t=0):
    config = AdversaryConfig(clients=list(who), attack=attack, scale=scale)
    peers = Adversarial(exchange(topology, x.clients), config, who, start or rows([0.0] * x.clients, x.spec), seed)
    peers.begin(t)
    return peers


def sent(x, attack, **own):
    peers = attacked(x, attack, **own)
    peers.mix(x)
    return peers.peers.stats.sent.flat


@pytest.mark.parametrize("attack", ATTACKS)
def test_honest_clients_send_the_truth_and_attackers_do_not(attack):
    x = drawn(8)
    told = sent(x, attack, scale=0.7)
    honest = [1, 2, 4, 5, 6, 7]
    assert torch.equal(told[honest], x.flat[honest])
    assert ((told[[0, 3]] - x.flat[[0, 3]]).norm(dim=1) > 0.01).all()


def test_attacks_by_hand():
    x, start, honest = drawn(6), rows([0.5] * 6), [1, 2, 4, 5]
    mean, std = x.flat[honest].mean(0), x.flat[honest].std(0, correction=0)
    assert torch.allclose(sent(x, "sign-flip", start=start)[0], 1.0 - x.flat[0])
    assert torch.allclose(sent(x, "ipm", start=start)[3], 0.5 - 0.5 * (mean - 0.5))
    assert torch.allclose(sent(x, "alie", scale=1.5)[0], mean - 1.5 * std)
    W = torch.from_numpy(exchange("ring").graph.W)
    assert torch.allclose(sent(x, "dissensus", topology="ring")[0], 2 * x.flat[0] - (W @ x.flat)[0])
    assert (sent(x, "alie")[0] == sent(x, "alie")[3]).all()


def test_the_quantile_of_alie():
    x = drawn(50)
    who = range(12)
    mean, std = x.flat[12:].mean(0), x.flat[12:].std(0, correction=0)
    told = sent(x, "alie", who=tuple(who))[0]
    assert ((mean - told) / std).numpy() == pytest.approx(0.3360, abs=1e-3)  # of (38 - 14) / 38


@pytest.mark.parametrize(("attacking", "z"), [(2, 0.0), (3, 0.1800), (4, 0.4307)])  # of 4/8, 4/7 and 4/6
def test_alie_with_two_of_ten_sends_the_honest_mean_and_with_three_does_not(attacking, z):
    x, honest = drawn(10), list(range(attacking, 10))
    mean, std = x.flat[honest].mean(0), x.flat[honest].std(0, correction=0)
    told = sent(x, "alie", who=tuple(range(attacking)))[0]
    assert ((mean - told) / std).numpy() == pytest.approx(z, abs=1e-4)
    assert alie_quantile(10, attacking) == pytest.approx(z, abs=1e-4)


def test_noise_is_drawn_for_each_attacker_and_round():
    x = rows([0.0] * 6)
    told = sent(x, "gaussian", t=1)
    assert torch.equal(told, sent(x, "gaussian", t=1)) and not torch.equal(told[0], told[3])
    assert not torch.equal(told[0], sent(x, "gaussian", t=2)[0])


def test_attackers_go_on_from_the_plain_average_of_the_truth():
    x = drawn(6)
    for topology in ("ring", "complete"):
        mixed = attacked(x, "gaussian", topology=topology).mix(x)
        assert torch.allclose(mixed.flat[[0, 3]], exchange(topology).mix(x).flat[[0, 3]])


@pytest.mark.parametrize("topology", ["ring", "complete"])
def test_they_do_so_where_a_method_mixes_more_than_adapters(topology):
    x, z = drawn(6), torch.arange(12.0, dtype=torch.float64).view(6, 2)
    told = attacked(x, "gaussian", topology=topology, scale=50.0).mix({"x": x, "z": z})
    true = exchange(topology).mix({"x": x, "z": z})
    assert torch.equal(told["z"], true["z"])
    assert torch.allclose(told["x"].flat[[0, 3]], true["x"].flat[[0, 3]])
    assert float((told["x"].flat - true["x"].flat)[[1, 2, 4, 5]].norm(dim=1).min()) > 1


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("attack", ["sign-flip", "gaussian", "ipm"])
def test_robust_rules_keep_honest_clients_near_their_mean_where_averaging_does_not(kind, attack):
    noise = np.random.default_rng(0).normal(size=(10, 4))
    x = rows(3.0 + 0.1 * noise)
    peers = attacked(x, attack, who=(2, 7), scale=100.0)
    config = TypeAdapter(RobustConfig).validate_python(
        {"kind": kind, **RULES[kind]} | ({"drop": 2} if kind in ("trimmed-mean", "clipped-gossip", "krum") else {})
    )
    honest = [i for i in range(10) if i not in (2, 7)]
    true = x.flat[honest].mean(0)
    ours = Robust(peers, config, rows([0.0] * 10), 10).mix(x).flat[honest]
    plain = attacked(x, attack, who=(2, 7), scale=100.0).mix(x).flat[honest]
    assert float((ours - true).norm(dim=1).max()) < 0.6
    assert float((plain - true).norm(dim=1).max()) > 10


def test_scene_splits_clients():
    x = torch.arange(8.0).view(4, 2)
    scene = AttackContext(x, x[0], torch.eye(4), (1, 3), None, lambda i: torch.Generator())
    assert scene.own.tolist() == [[2, 3], [6, 7]] and scene.honest.tolist() == [[0, 1], [4, 5]]


def test_who_attacks():
    assert attackers(None, 5, 0) == ()
    assert attackers(AdversaryConfig(clients=[3, 1, 3]), 5, 0) == (1, 3)
    drawn_ = attackers(AdversaryConfig(clients=2), 10, 0)
    assert len(drawn_) == 2 and drawn_ == attackers(AdversaryConfig(clients=2), 10, 0)
    assert len({attackers(AdversaryConfig(clients=2), 10, seed) for seed in range(10)}) > 3
    for wanted in (5, [0, 5], [0, 1, 2, 3, 4]):
        with pytest.raises(Exception, match="adversary.clients=.*numbered 0 to 4"):
            attackers(AdversaryConfig(clients=wanted), 5, 0)


def test_flipped_labels():
    assert flipped_labels(np.array([0, 1, 2, 0]), np.array([0, 2]), 3).tolist() == [2, 1, 0, 0]
