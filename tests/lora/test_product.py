"""Every question about products against its formula with dense float64 matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peerlora.config.sections import EdgesGraph, RandomGraph
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.lora.diagnostics import _lost2_alone, agreement, local_cross_term
from peerlora.lora.product import (
    cross_term2,
    deviation,
    norms2,
    product_consensus,
    sum_norm2,
)
from peerlora.topology.schedule import build_topology

LOCAL = settings(max_examples=60)


@st.composite
def factors(draw):
    """(B, A) of 1 to 6 clients; client*rank lies on both sides of d_in."""
    clients, rank = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    d_out, d_in = draw(st.integers(1, 9)), draw(st.integers(1, 90))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    size = 10.0 ** draw(st.integers(-3, 3))
    B = torch.randn(clients, d_out, rank, generator=generator, dtype=torch.float64) * size
    return B, torch.randn(clients, rank, d_in, generator=generator, dtype=torch.float64)


def weights_of(clients, seed):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(clients)))


def local_cross_term2(B, A, weights):
    """What one receiver loses in one mixing, squared; ``weights`` is its row of W."""
    return _lost2_alone(B, A, weights[None])[0]


def close(found, expected, scale):
    """Equal to 12 digits of the largest quantity that went into it."""
    return float((found - expected).abs().max()) <= 1e-12 * float(scale) + 1e-300


@LOCAL
@given(factors())
def test_norms_are_those_of_the_dense_products(case):
    B, A = case
    dense = (B @ A).square().sum((1, 2))
    assert close(norms2(B, A), dense, B.square().sum() * A.square().sum())


@LOCAL
@given(factors())
def test_norm_of_the_sum_is_that_of_the_dense_sum(case):
    B, A = case
    assert close(sum_norm2(B, A), (B @ A).sum(0).square().sum(), B.square().sum() * A.square().sum())


@pytest.mark.parametrize("clients, d_in", [(2, 6), (3, 5), (3, 7), (40, 150)])
def test_both_ways_to_the_norm_of_a_sum_agree_with_the_dense_one(clients, d_in):
    # client*rank = 6, 9, 9, 120: as many as d_in, more, more, fewer; 150 columns make three strips when reached.
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(clients, 4, 3, generator=generator, dtype=torch.float64)
    A = torch.randn(clients, 3, d_in, generator=generator, dtype=torch.float64)
    assert float(sum_norm2(B, A)) == pytest.approx(float((B @ A).sum(0).square().sum()), rel=1e-12)
    twice = torch.cat([B, B]), torch.cat([A, A])
    assert float(sum_norm2(*twice)) == pytest.approx(4 * float(sum_norm2(B, A)), rel=1e-12)


@LOCAL
@given(factors())
def test_identity_1_the_cross_term_is_what_averaging_factors_loses(case):
    B, A = case
    lost = (B @ A).mean(0) - B.mean(0) @ A.mean(0)
    assert close(cross_term2(B, A), lost.square().sum(), B.square().sum() * A.square().sum())


@LOCAL
@given(factors(), st.integers(0, 1000))
def test_identity_1_in_pairs(case, seed):
    """``1/2 sum_ij p_i p_j (B_i - B_j)(A_i - A_j)`` is the cross-term, of equal weights and of any."""
    B, A = case
    for p in (torch.full((len(B),), 1 / len(B), dtype=torch.float64), weights_of(len(B), seed)):
        pairs = (B[:, None] - B) @ (A[:, None] - A)
        lost2 = (torch.einsum("i,j,ijde->de", p, p, pairs) / 2).square().sum()
        assert close(local_cross_term2(B, A, p), lost2, B.square().sum() * A.square().sum())
        if p[0] == 1 / len(B):
            assert close(cross_term2(B, A), lost2, B.square().sum() * A.square().sum())


@LOCAL
@given(factors(), st.integers(0, 1000))
def test_identity_2_the_local_cross_term_is_what_one_mixing_loses(case, seed):
    B, A = case
    w = weights_of(len(B), seed)[:, None, None]
    lost = (w * (B @ A)).sum(0) - (w * B).sum(0) @ (w * A).sum(0)
    found = local_cross_term2(B, A, w.flatten())
    assert close(found, lost.square().sum(), B.square().sum() * A.square().sum())


@LOCAL
@given(factors(), st.floats(0.1, 1), st.integers(0, 1000))
def test_identity_4_mixing_keeps_the_mean_factors_and_moves_the_mean_product(case, p, seed):
    """By minus the mean over the receivers of identity 2."""
    (B, A), topology = case, build_topology(RandomGraph(kind="random", p=p), len(case[0]), seed)
    peers, W = StackedExchange(topology, range(len(B))), torch.from_numpy(topology.at(0).W)
    B_new, A_new = peers.mix({"B": B, "A": A}).values()
    scale = (B.square().sum() * A.square().sum()).sqrt()
    assert close(B_new.mean(0), B.mean(0), B.abs().max()) and close(A_new.mean(0), A.mean(0), A.abs().max())
    lost = torch.einsum("ij,ijdr,ijre->ide", W, B - B_new[:, None], A - A_new[:, None])
    assert close((B_new @ A_new).mean(0), (B @ A).mean(0) - lost.mean(0), scale)
    for own, w in zip(lost, W, strict=True):
        assert close(local_cross_term2(B, A, w), own.square().sum(), scale**2)


def test_identity_4_by_hand():
    # B = 1, 3 and A = 2, 6 become 2, 2 and 4, 4 on one link: the mean product goes from (2 + 18) / 2 to 8.
    B, A = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in ([1, 3], [2, 6]))
    topology = build_topology(EdgesGraph(kind="edges", edges=[(0, 1)]), 2, 0)
    B, A = StackedExchange(topology, range(2)).mix({"B": B, "A": A}).values()
    assert B.flatten().tolist() == [2, 2] and A.flatten().tolist() == [4, 4] and float((B @ A).mean()) == 8


@LOCAL
@given(factors())
def test_product_consensus_is_the_mean_squared_distance_of_the_dense_products(case):
    B, A = case
    dense = (B @ A - (B @ A).mean(0)).square().sum() / len(B)
    assert close(product_consensus(B, A), dense, B.square().sum() * A.square().sum())


@LOCAL
@given(factors(), st.booleans())
def test_no_cross_term_where_one_factor_is_common(case, left):
    B, A = case
    if left:
        B = B[:1].expand_as(B)
    else:
        A = A[:1].expand_as(A)
    scale = float(B.square().sum() * A.square().sum())
    assert float(cross_term2(B, A)) <= 1e-30 * scale
    assert float(local_cross_term2(B, A, weights_of(len(B), 0))) <= 1e-30 * scale


@LOCAL
@given(factors())
def test_the_cross_term_is_bounded_by_both_consensus_distances(case):
    B, A = case
    D_B, D_A = (deviation(x).square().sum() / len(x) for x in (B, A))
    assert float(cross_term2(B, A)) ** 0.5 <= float((D_A * D_B).sqrt()) * (1 + 1e-9)


def test_by_hand_two_clients_of_rank_one():
    # B = 1, 3 and A = 2, 6: mean product (2 + 18) / 2 = 10, product of means 2 * 4 = 8.
    B, A = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in ([1, 3], [2, 6]))
    assert float(cross_term2(B, A)) == pytest.approx(4)
    assert float(product_consensus(B, A)) == pytest.approx(64)  # products 2 and 18, 8 away from 10
    assert float(sum_norm2(B, A)) == pytest.approx(400) and norms2(B, A).tolist() == [4, 324]
    # weights 1/4, 3/4: mean product 14, factors 2.5 and 5
    assert float(local_cross_term2(B, A, torch.tensor([0.25, 0.75], dtype=torch.float64))) == pytest.approx(1.5**2)


@pytest.mark.parametrize("apart", [1e-5, 1e-8, 1e-11])
def test_nearly_equal_clients_keep_their_digits(apart):
    generator = torch.Generator().manual_seed(0)
    common = (
        torch.randn(5, 2, generator=generator, dtype=torch.float64),
        torch.randn(2, 7, generator=generator).double(),
    )
    turn = torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None, None] * apart
    b, a = torch.randn(5, 2, generator=generator).double(), torch.randn(2, 7, generator=generator).double()
    B, A = common[0] + turn * b, common[1] + turn * a
    # Products lie at C + e² b a ± e (b A + B a): half the spread is the consensus, the cross-term is e² b a.
    expected = apart**2 * (b @ common[1] + common[0] @ a).square().sum()
    assert float(product_consensus(B, A)) == pytest.approx(float(expected), rel=1e-4)
    if apart > 1e-10:  # nearer, storing the factors themselves loses the digits
        assert float(cross_term2(B, A)) == pytest.approx(float(apart**4 * (b @ a).square().sum()), rel=1e-4)


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize("clients", [3, 60])
def test_no_question_forms_a_dense_product(clients):
    d_out, d_in, rank = 137, 149, 4  # primes, and 60 clients have client*rank = 240 > d_in
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(clients, d_out, rank, generator=generator, dtype=torch.float64)
    A = torch.randn(clients, rank, d_in, generator=generator, dtype=torch.float64)
    with Shapes() as noted:
        sum_norm2(B, A), norms2(B, A), cross_term2(B, A), product_consensus(B, A)
        local_cross_term2(B, A, weights_of(clients, 0))
    assert noted.seen and not [shape for shape in noted.seen if d_out in shape and d_in in shape]


# --- summed over the layers of Adapters


def adapters(clients=4, seed=0):
    spec = AdapterSpec((LayerSpec("q", 5, 6), LayerSpec("v", 7, 3)), rank=2, alpha=4.0, head=(("out", (3,)),))
    flat = torch.randn(clients, spec.parameters, generator=torch.Generator().manual_seed(seed))
    return Adapters(spec, flat, torch.full((clients,), 2))


def test_agreement_sums_over_layers():
    x = adapters()
    pairs = [(x.B[layer].double(), x.A[layer].double()) for layer in x.A]
    found = agreement(x)
    assert found.consensus_A == pytest.approx(sum(float(deviation(A).square().sum()) / 4 for _, A in pairs))
    assert found.consensus_B == pytest.approx(sum(float(deviation(B).square().sum()) / 4 for B, _ in pairs))
    dense = [B @ A for B, A in pairs]
    assert found.consensus_product == pytest.approx(sum(float(deviation(d).square().sum()) / 4 for d in dense))
    lost = [d.mean(0) - B.mean(0) @ A.mean(0) for d, (B, A) in zip(dense, pairs, strict=True)]
    assert found.cross_term == pytest.approx(sum(float(d.square().sum()) for d in lost) ** 0.5)


def test_agreement_of_equal_clients_is_zero():
    x = adapters(1)
    same = Adapters(x.spec, x.flat.repeat(4, 1), torch.full((4,), 2))
    found = agreement(same)
    assert (found.consensus_A, found.consensus_B, found.cross_term) == (0, 0, 0)
    assert found.consensus_product <= 1e-24


def test_local_cross_term_averages_over_receivers():
    x = adapters()
    W = np.array([[0.5, 0.5, 0, 0], [0.5, 0.25, 0.25, 0], [0, 0.25, 0.5, 0.25], [0, 0, 0.25, 0.75]])
    expected = []
    for row in torch.from_numpy(W):
        w, total = row[:, None, None], 0.0
        for layer in x.A:
            A, B = x.A[layer].double(), x.B[layer].double()
            total += float(((w * (B @ A)).sum(0) - (w * B).sum(0) @ (w * A).sum(0)).square().sum())
        expected.append(total**0.5)
    assert local_cross_term(x, W) == pytest.approx(np.mean(expected))


def test_local_cross_term_is_the_global_one_where_all_meet_and_zero_where_nobody_does():
    x = adapters()
    assert local_cross_term(x, np.full((4, 4), 0.25)) == pytest.approx(agreement(x).cross_term)
    assert local_cross_term(x, np.eye(4)) == 0


def test_local_cross_term_samples_receivers_of_large_runs_evenly():
    x = adapters(100)
    rng = np.random.default_rng(0)
    W = 0.5 * np.eye(100) + 0.5 * np.eye(100)[rng.permutation(100)]
    everyone = np.mean([local_cross_term(x.rows([i, j]), np.full((2, 2), 0.5)) for i, j in pairs_of(W)])
    assert local_cross_term(x, W) == pytest.approx(everyone, rel=0.2)


def pairs_of(W):
    for i, row in enumerate(W):
        others = [j for j in np.flatnonzero(row) if j != i]
        yield i, int(others[0]) if others else i
