"""What FedRot-LoRA promises: rotations are undone, products stay, nothing turns in round 0."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from plain_products import Drift, rotation
from test_product_methods import GRAPHS, exchange, run, start

from peerlora.algorithms import build_algorithm
from peerlora.algorithms.fedrot_lora import aligned_average
from peerlora.lora.product import nearest_rotation

GRAPH_IDS = [graph.kind for graph in GRAPHS]


def trained(size=0.3):
    return Drift(range(4), size).fit(start(), "AB")


def random_rotations(seed, count=4, rank=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [
            torch.from_numpy(rotation(torch.randn(rank, rank, generator=generator, dtype=torch.float64).numpy()))
            for _ in range(count)
        ]
    )


def turned(x, seed=0):
    """Every client in its own random gauge: ``R^T A`` and ``B R``."""
    x = replace(x, flat=x.flat.clone())
    for k, layer in enumerate(x.A):
        R = random_rotations(seed + k)
        x.A[layer].copy_(R.mT @ x.A[layer])
        x.B[layer].copy_(x.B[layer] @ R)
    return x


def copies(x):
    return replace(x, flat=x.flat[:1].repeat(4, 1))


def apart(x, y):
    return max(float((x.B[n] @ x.A[n] - y.B[n] @ y.A[n]).abs().max()) for n in x.A)


@pytest.mark.parametrize("on", ["A", "B"])
@pytest.mark.parametrize("graph", GRAPHS, ids=GRAPH_IDS)
def test_rotated_copies_of_one_adapter_average_to_it(graph, on):
    x, peers = turned(copies(trained())), exchange(graph)
    found = peers.combine(x, partial(aligned_average, on=on, strength=1.0))
    assert (found.flat - x.flat).abs().max() < 1e-8, "every receiver gets its own factors back"
    assert peers.stats.measures["alignment_after"].abs().max() < 1e-8
    if (peers.graph.degrees > 0).any():
        assert apart(peers.mix(x), x) > 0.1, "which plain averaging does not manage"


@pytest.mark.parametrize("on", ["A", "B"])
def test_half_a_turn_is_half_undone(on):
    x, peers = turned(copies(trained())), exchange(GRAPHS[2])
    soft = apart(peers.combine(x, partial(aligned_average, on=on, strength=0.5)), x)
    assert 1e-3 < soft < apart(peers.mix(x), x)


@pytest.mark.parametrize("on", ["A", "B"])
@pytest.mark.parametrize("graph", GRAPHS, ids=GRAPH_IDS)
def test_full_alignment_never_leaves_a_larger_distance(graph, on):
    for size in (0.01, 0.3, 3.0):
        peers = exchange(graph)
        peers.combine(trained(size), partial(aligned_average, on=on, strength=1.0))
        assert (peers.stats.measures["alignment_after"] <= peers.stats.measures["alignment_before"] + 1e-12).all()


def test_the_measured_distances_are_those_of_the_factors():
    x, peers = trained(), exchange(GRAPHS[0])
    peers.combine(x, partial(aligned_average, on="B", strength=0.7))
    before = after = 0.0
    for B in x.B.values():
        for j in (0, 1, 3):  # on a ring of 4, client 0 hears 1 and 3, a third each
            R = nearest_rotation(B[j].mT @ B[0], 0.7)
            before += float((B[j] - B[0]).square().sum()) / 3
            after += float((B[j] @ R - B[0]).square().sum()) / 3
    assert float(peers.stats.measures["alignment_before"][0]) == pytest.approx(before)
    assert float(peers.stats.measures["alignment_after"][0]) == pytest.approx(after)


def test_identity_2_holds_for_the_aligned_factors():
    x, peers = trained(), exchange(GRAPHS[0])
    found = peers.combine(x, partial(aligned_average, on="A", strength=1.0))
    for layer, A in x.A.items():
        products, covariance = 0.0, 0.0
        for j in (0, 1, 3):
            R = nearest_rotation(A[j] @ A[0].mT)
            products += x.B[layer][j] @ A[j] / 3
            covariance += (x.B[layer][j] @ R - found.B[layer][0]) @ (R.mT @ A[j] - found.A[layer][0]) / 3
        assert torch.allclose(products - found.B[layer][0] @ found.A[layer][0], covariance, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_random_rotations_hurt(seed):
    x, peers = trained(0.1), exchange(GRAPHS[2])
    wanted = {n: (x.B[n] @ x.A[n]).mean(0) for n in x.A}

    def lost(y):
        return sum(float((y.B[n] @ y.A[n] - wanted[n]).norm()) for n in wanted)

    assert lost(peers.mix(turned(x, seed))) > 1.5 * lost(peers.mix(x))
    assert lost(peers.combine(turned(x, seed), partial(aligned_average, on="A", strength=1.0))) < lost(
        peers.mix(turned(x, seed))
    )


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_round_0_averages_without_turning(strength):
    found = run(build_algorithm("fedrot-lora", {"strength": strength}), start(), exchange(GRAPHS[0]), 2)
    plain = run(build_algorithm("dec-lora", {}), start(), exchange(GRAPHS[0]), 2)
    assert torch.equal(found[0].flat, plain[0].flat) and not torch.allclose(found[1].flat, plain[1].flat)


def test_factors_are_aligned_in_turn():
    def order(**settings):
        return "".join(build_algorithm("fedrot-lora", settings).aligned(t) for t in range(1, 5))

    assert order() == "ABAB" and order(first="B") == "BABA"


def test_zero_factors_turn_nothing():
    x = start()  # B = 0 on every client
    for on in "AB":
        found = exchange(GRAPHS[0]).combine(x, partial(aligned_average, on=on, strength=0.5))
        assert torch.allclose(found.flat, x.flat, rtol=0, atol=1e-11)


def test_single_precision_keeps_products():
    x = turned(copies(trained()))
    single = replace(x, flat=x.flat.float())
    found = exchange(GRAPHS[2]).combine(single, partial(aligned_average, on="A", strength=1.0))
    size = max(float((x.B[n].norm(dim=(1, 2)) * x.A[n].norm(dim=(1, 2))).max()) for n in x.A)
    assert apart(found, single) < min(3e-6, 1e-6 * size)
