"""What an exchange costs, against dense float64 matrices and numbers that can be checked by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peerlora.lora import diagnostics
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec, mask_ranks
from peerlora.lora.diagnostics import agreement, before_exchange, diagnose, distances2, local_cross_term, mismatch
from peerlora.topology.graphs import complete, ring
from peerlora.topology.weights import metropolis

LOCAL = settings(max_examples=40)
SHAPES = ((5, 9), (9, 5), (6, 6))


def adapters(clients=4, seed=0, rank=2, shapes=SHAPES, ranks=None):
    spec = AdapterSpec(tuple(LayerSpec(f"layer{i}", *shape) for i, shape in enumerate(shapes)), rank, 4.0)
    flat = torch.randn(clients, spec.parameters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mask_ranks(Adapters(spec, flat, torch.tensor(ranks or [rank] * clients)))


def row_stochastic(clients, seed, share=1.0):
    rng = np.random.default_rng(seed)
    W = rng.random((clients, clients)) * (rng.random((clients, clients)) < share) + np.eye(clients) * 0.1
    return W / W.sum(1, keepdims=True)


def mixed(x, W, blocks="AB"):
    """Every client's averages of the named factors, its own of the others."""
    flat = x.flat.clone()
    for block in blocks:
        columns = x.spec.columns(block)
        flat[:, columns] = torch.from_numpy(W) @ x.flat[:, columns]
    return replace(x, flat=flat)


def products(x, layer):
    return x.scaling[:, None, None] / (x.spec.alpha / x.spec.rank) * (x.B[layer] @ x.A[layer])


def dense_local_cross_term(x, W, blocks="AB"):
    """The mean over receivers of || average of the products - product of what it then holds ||."""
    got, lost2 = mixed(x, W, blocks), torch.zeros(x.clients, dtype=torch.float64)
    for layer in x.A:
        average = torch.tensordot(torch.from_numpy(W), products(x, layer), 1)
        lost2 += (average - products(got, layer)).square().sum((1, 2))
    return float(lost2.sqrt().mean())


# --- the two mismatches


@LOCAL
@given(st.integers(1, 6), st.integers(0, 999))
def test_mismatches_are_those_of_the_dense_products(clients, seed):
    before, after = adapters(clients, seed), adapters(clients, seed + 1)
    weak = sum((products(after, layer) - products(before, layer)).square().sum() for layer in before.A) / clients
    found = mismatch(before, after)
    assert found.weak_mismatch == pytest.approx(float(weak), rel=1e-12)
    assert found.strong_mismatch == pytest.approx(float((after.flat - before.flat).square().sum()) / clients, rel=1e-12)


def test_mismatches_by_hand():
    # Two clients of rank one: B = 1, 3 and A = 2, 6.  Averages 2 and 4: the common product is 8, the own ones 2 and 18.
    x = replace(adapters(2, rank=1, shapes=((1, 1),)), flat=torch.tensor([[2.0, 1.0], [6.0, 3.0]], dtype=torch.float64))
    averaged = replace(x, flat=torch.tensor([[4.0, 2.0], [4.0, 2.0]], dtype=torch.float64))
    found = mismatch(x, averaged)
    assert found.weak_mismatch == pytest.approx((6**2 + 10**2) / 2)
    assert found.strong_mismatch == pytest.approx((2**2 + 1**2 + 2**2 + 1**2) / 2)
    apart = agreement(x)
    assert found.weak_mismatch == pytest.approx(apart.consensus_product + apart.cross_term**2)  # 64 + 4


@LOCAL
@given(st.integers(2, 6), st.integers(0, 999))
def test_of_one_pair_for_all_the_averages_are_closest_in_the_strong_sense(clients, seed):
    x = adapters(clients, seed)
    before, J = agreement(x), np.full((clients, clients), 1 / clients)
    averaged, other = mixed(x, J), mixed(adapters(clients, seed + 1), J)
    found = mismatch(x, averaged)
    assert found.strong_mismatch == pytest.approx(before.consensus_A + before.consensus_B, rel=1e-12)
    assert found.weak_mismatch == pytest.approx(before.consensus_product + before.cross_term**2, rel=1e-12)
    assert mismatch(x, other).strong_mismatch >= found.strong_mismatch


@LOCAL
@given(st.integers(2, 5), st.integers(0, 999))
def test_of_one_pair_for_all_the_average_product_is_closest_in_the_weak_sense(clients, seed):
    x = adapters(clients, seed, rank=6)  # full rank, so the average product has factors
    factored = x.flat.clone()
    for layer in x.A:
        U, S, V = torch.linalg.svd(products(x, layer).mean(0), full_matrices=False)
        wide = len(S)
        for slot in x.spec.slots:
            if slot.name == layer:
                view = x.spec.view(slot, factored)
                view.zero_()
                if slot.block == "A":
                    view[:, :wide] = S[:, None] * V
                else:
                    view[:, :, :wide] = U
    common = replace(x, flat=factored)
    found = mismatch(x, common).weak_mismatch
    assert found == pytest.approx(agreement(x).consensus_product, rel=1e-9)
    J = np.full((clients, clients), 1 / clients)
    assert mismatch(x, mixed(x, J)).weak_mismatch >= found * (1 - 1e-12)


@pytest.mark.parametrize("apart", [1e-5, 1e-9])
def test_a_small_move_keeps_its_digits(apart):
    generator = torch.Generator().manual_seed(0)
    B, b = torch.randn(2, 3, 5, 2, generator=generator, dtype=torch.float64)
    A, a = torch.randn(2, 3, 2, 7, generator=generator, dtype=torch.float64)
    P, Q = B + apart * b, A + apart * a
    b, a = (P - B) / apart, (Q - A) / apart  # what was really added
    expected = apart**2 * (b @ A + B @ a + apart * b @ a).square().sum((1, 2))
    assert torch.allclose(distances2(B, A, P, Q), expected, rtol=1e-11, atol=0)


# --- the local cross-term, one factor kept or none, one receiver after another or all together


@pytest.fixture(params=["alone", "together"])
def route(request, monkeypatch):
    """Both ways to compute the local cross-term, also where the other one would be taken."""
    expensive = {"alone": "_cost_together", "together": "_cost_one_by_one"}[request.param]
    monkeypatch.setattr(diagnostics, expensive, lambda *sizes: math.inf)
    monkeypatch.setattr(diagnostics, "_COLUMNS", 4)  # several strips, and several blocks of senders
    monkeypatch.setattr(diagnostics, "_SCALARS", 80)


@pytest.mark.parametrize("blocks", ["AB", "A", "B", ""])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_local_cross_term_is_that_of_the_dense_products(route, blocks, share):
    for clients in (1, 2, 7):
        x, W = adapters(clients, clients), row_stochastic(clients, clients, share)
        after = mixed(x, W, blocks)
        expected = dense_local_cross_term(x, W, blocks)
        sent = x.select(*blocks, "head")
        assert local_cross_term(sent, W, after) == pytest.approx(expected, rel=1e-11, abs=1e-12)


def test_local_cross_term_where_receivers_are_alike(route):
    x = adapters(6)
    J = metropolis(complete(6))
    assert local_cross_term(x, J) == pytest.approx(agreement(x).cross_term, rel=1e-12)
    after = mixed(x, J, "B")
    assert local_cross_term(x.select("B"), J, after) == pytest.approx(dense_local_cross_term(x, J, "B"), rel=1e-12)


@pytest.mark.parametrize("apart", [1.0, 1e-4, 1e-7])
def test_both_routes_agree_on_nearly_equal_clients(monkeypatch, apart):
    x = adapters(8, rank=3)
    x = replace(x, flat=x.flat[:1] + apart * x.flat)
    W = row_stochastic(8, 0)
    found = []
    for expensive in ("_cost_together", "_cost_one_by_one"):
        with monkeypatch.context() as patch:
            patch.setattr(diagnostics, expensive, lambda *sizes: math.inf)
            found.append(local_cross_term(x, W))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("blocks", ["A", "B"])
def test_a_kept_factor_that_is_common_loses_nothing(route, blocks):
    x, other = adapters(5), "B" if blocks == "A" else "A"
    flat = x.flat.clone()
    flat[:, x.spec.columns(other)] = flat[:1, x.spec.columns(other)]
    x, W = replace(x, flat=flat), metropolis(ring(5))
    assert local_cross_term(x.select(blocks), W, mixed(x, W, blocks)) < 1e-14


def test_a_factor_that_was_not_sent_has_to_come_from_somewhere():
    x = adapters()
    assert math.isnan(local_cross_term(x.select("B"), np.eye(4)))
    assert torch.equal(before_exchange(mixed(x, metropolis(ring(4)), "B"), x.select("B")).flat, x.flat)
    assert before_exchange(x, x) is x


# --- one round


def test_diagnose_puts_a_round_together():
    x, W = adapters(), metropolis(ring(4))
    after = mixed(x, W, "B")
    found = vars(diagnose(after, x.select("B"), W))
    assert found == {
        **vars(agreement(after)),
        **vars(mismatch(x, after)),
        "local_cross_term": local_cross_term(x.select("B"), W, after),
    }
    silent = diagnose(after, None, W)
    assert (silent.weak_mismatch, silent.strong_mismatch, silent.local_cross_term) == (0, 0, 0)
    assert silent.consensus_B == found["consensus_B"]


def test_clients_that_merge_are_looked_at_as_whole_models():
    x, W = adapters(), metropolis(ring(4))
    after = x.with_empty_merges().fold()
    found = diagnose(after, x, W)
    assert found.weak_mismatch == pytest.approx(0, abs=1e-9)
    assert found.consensus_product == pytest.approx(agreement(x).consensus_product)
    assert found.local_cross_term == local_cross_term(x, W, after)


def test_with_different_ranks_the_products_carry_their_own_scaling():
    x = adapters(3, rank=4, ranks=[1, 2, 4])
    W = row_stochastic(3, 1)
    dense = [products(x, layer) for layer in x.A]
    found = agreement(x)
    consensus = sum((each - each.mean(0)).square().sum() for each in dense) / 3
    assert found.consensus_product == pytest.approx(float(consensus), rel=1e-12)
    other = adapters(3, 5, rank=4, ranks=[1, 2, 4])
    weak = sum((products(other, layer) - each).square().sum() for layer, each in zip(x.A, dense, strict=True)) / 3
    assert mismatch(x, other).weak_mismatch == pytest.approx(float(weak), rel=1e-12)
    lost2 = torch.zeros(3, dtype=torch.float64)
    for layer in x.A:
        s = (4 / x.ranks.double())[:, None, None]
        w = torch.from_numpy(W)
        lost = torch.tensordot(w, s * x.B[layer] @ x.A[layer], 1)
        lost -= torch.tensordot(w, s * x.B[layer], 1) @ torch.tensordot(w, x.A[layer], 1)
        lost2 += lost.square().sum((1, 2))
    assert local_cross_term(x, W) == pytest.approx(float(lost2.sqrt().mean()), rel=1e-12)


def test_equal_products_in_other_coordinates_agree_and_do_not_move():
    # The gauge (B R)(R^-1 A): figures of products don't see it, those of factors do.
    x = adapters(1)
    same = replace(x, flat=x.flat.repeat(4, 1), ranks=x.ranks.repeat(4))
    turned = same.flat.clone()
    R = torch.eye(2) + 0.2 * torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for slot in same.spec.slots:
        view = same.spec.view(slot, turned)
        view.copy_(torch.linalg.solve(R, view) if slot.block == "A" else view @ R)
    turned = replace(same, flat=turned)
    assert agreement(turned).consensus_product < 1e-12 < 1e-3 < agreement(turned).consensus_A
    assert mismatch(same, turned).weak_mismatch < 1e-12 < 1e-3 < mismatch(same, turned).strong_mismatch


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize("clients", [3, 40])
@pytest.mark.parametrize("blocks", ["AB", "B"])
def test_no_figure_forms_a_dense_product(clients, blocks):
    d_out, d_in = 137, 149
    x = adapters(clients, shapes=((d_in, d_out),))
    W = row_stochastic(clients, 0)
    after = mixed(x, W, blocks)
    with Shapes() as noted:
        diagnose(after, x.select(*blocks), W)
    dense = [shape for shape in noted.seen if math.prod(shape[-2:]) == d_out * d_in or d_out * d_in in shape]
    assert noted.seen and not dense
