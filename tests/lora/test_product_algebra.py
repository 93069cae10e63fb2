"""Truncated decomposition, alignment and correction against dense float64 matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peerlora.lora.product import decompose, joined, nearest_rotation, norms2, ridge_correction

LOCAL = settings(max_examples=50)
DOUBLE = torch.float64


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def rotation_of(seed, size):
    """A random rotation, determinant +1."""
    Q, R = torch.linalg.qr(draw(seed, size, size))
    Q = Q * R.diagonal().sign()
    Q[:, 0] *= torch.linalg.det(Q).sign()
    return Q


def tensor(values):
    return torch.tensor(values, dtype=DOUBLE)


@st.composite
def neighbourhoods(draw_):
    """(B, A, weights) of 1 to 5 senders; sender*rank lies on both sides of the widths."""
    senders, rank = draw_(st.integers(1, 5)), draw_(st.integers(1, 4))
    d_out, d_in, seed = draw_(st.integers(1, 9)), draw_(st.integers(1, 9)), draw_(st.integers(0, 10_000))
    size = 10.0 ** draw_(st.integers(-3, 3))
    weights = draw(seed + 2, senders).abs()
    return size * draw(seed, senders, d_out, rank), draw(seed + 1, senders, rank, d_in), weights / weights.sum()


def dense(B, A, w):
    return (w[:, None, None] * (B @ A)).sum(0)


def size_of(B, A):
    return float((B.square().sum() * A.square().sum()).sqrt()) + 1e-300


# --- joined, decompose


@LOCAL
@given(neighbourhoods())
def test_joined_is_the_weighted_sum_of_products(case):
    B, A, w = case
    left, right = joined(B, A, w)
    assert (left @ right - dense(B, A, w)).abs().max() <= 1e-13 * size_of(B, A)


@LOCAL
@given(neighbourhoods(), st.integers(1, 8))
def test_truncation_is_that_of_the_dense_product_and_loses_its_tail(case, rank):
    B, A, w = case
    P, found = dense(B, A, w), decompose(*joined(B, A, w))
    values = torch.linalg.svdvals(P)
    kept = min(len(values), len(found.values))
    assert (found.values[:kept] - values[:kept]).abs().max() <= 1e-13 * size_of(B, A)
    new_B, new_A = found.factors(rank)
    assert new_B.shape == (P.shape[0], rank) and new_A.shape == (rank, P.shape[1])
    lost = (P - new_B @ new_A).square().sum()
    tail = values[rank:].square().sum()
    assert abs(float(lost - tail)) <= 1e-12 * size_of(B, A) ** 2
    assert abs(float(found.tail(torch.tensor(rank)) - tail)) <= 1e-12 * size_of(B, A) ** 2


@LOCAL
@given(neighbourhoods(), st.integers(1, 6))
def test_factors_are_balanced_and_have_a_fixed_sign(case, rank):
    B, A, w = case
    found = decompose(*joined(B, A, w))
    new_B, new_A = found.factors(rank)
    scale = float(found.values[0]) + 1e-300
    grams = new_B.mT @ new_B, new_A @ new_A.mT
    kept = torch.zeros(rank, dtype=DOUBLE)
    kept[: len(found.values)] = found.values[:rank]
    for gram in grams:
        assert (gram - torch.diag(kept)).abs().max() <= 1e-11 * scale
    peaks = new_A.gather(1, new_A.abs().argmax(1, keepdim=True))
    assert (peaks >= 0).all() and (new_A[found.rank :] == 0).all() and (new_B[:, found.rank :] == 0).all()


@LOCAL
@given(neighbourhoods(), st.integers(0, 1000))
def test_the_decomposition_does_not_see_the_gauge_of_any_sender(case, seed):
    B, A, w = case
    R = torch.eye(A.shape[1], dtype=DOUBLE) + 0.2 * draw(seed, len(B), A.shape[1], A.shape[1]).clamp(-1, 1)
    turned = decompose(*joined(B @ R, torch.linalg.solve(R, A), w))
    found = decompose(*joined(B, A, w))
    scale = size_of(B, A) * float(torch.linalg.cond(R).max())
    assert (found.values - turned.values).abs().max() <= 1e-12 * scale
    gaps = (found.values[:-1] - found.values[1:]).tolist() + [float(found.values[-1])]
    if min(gaps) > 1e-3 * float(found.values[0]) and math.isfinite(scale):  # else vectors may turn within a pair
        for one, other in zip(found.factors(2), turned.factors(2), strict=True):
            assert (one - other).abs().max() <= 1e-8 * scale**0.5 * (1 + scale**0.5)


@pytest.mark.parametrize("senders", [1, 2, 3, 30])
def test_a_batch_is_its_members_and_the_order_of_senders_is_free(senders):
    B, A, w = draw(0, 4, senders, 7, 2), draw(1, 4, senders, 2, 6), draw(2, 4, senders).abs()
    found = decompose(*joined(B, A, w))
    for i in range(4):
        turn = torch.randperm(senders, generator=torch.Generator().manual_seed(i))
        one = decompose(*joined(B[i, turn], A[i, turn], w[i, turn]))
        for ours, theirs in zip(found.factors(3), one.factors(3), strict=True):
            assert torch.allclose(ours[i], theirs, rtol=0, atol=1e-10)


def test_by_hand_two_clients_of_rank_one():
    # 1/2 (6, 0)^T (1, 0) + 1/2 (0, 4)^T (0, 1) = diag(3, 2): values 3 and 2, rank 1 keeps 3 and loses 2^2.
    B, A = tensor([[[6], [0]], [[0], [4]]]), tensor([[[1, 0]], [[0, 1]]])
    found = decompose(*joined(B, A, tensor([0.5, 0.5])))
    assert torch.allclose(found.values, tensor([3, 2])) and int(found.rank) == 2
    assert float(found.tail(torch.tensor(1))) == pytest.approx(4)
    new_B, new_A = found.factors(1)
    assert torch.allclose(new_B, tensor([[3**0.5], [0]])) and torch.allclose(new_A, tensor([[3**0.5, 0]]))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_what_cancels_or_repeats_adds_no_rank(scale):
    B, A = scale * draw(0, 1, 9, 2), draw(1, 1, 2, 8)
    same = decompose(*joined(B.expand(3, -1, -1), A.expand(3, -1, -1), tensor([0.2, 0.3, 0.5])))
    assert int(same.rank) == 2
    none = decompose(*joined(torch.cat([B, -B]), torch.cat([A, A]), tensor([0.5, 0.5])))
    assert int(none.rank) == 0 and not any(factor.any() for factor in none.factors(2))
    zero = decompose(*joined(0 * B, A, tensor([1.0])))
    assert int(zero.rank) == 0 and not any(factor.any() for factor in zero.factors(2))


# --- rotations


@LOCAL
@given(st.integers(1, 6), st.integers(0, 10_000), st.floats(0, 1), st.booleans())
def test_a_rotation_keeps_the_product_and_has_determinant_one(rank, seed, strength, mirrored):
    A, B = draw(seed, rank, 9), draw(seed + 1, 7, rank)
    reference = rotation_of(seed + 2, rank) @ A + 0.1 * draw(seed + 3, rank, 9)
    if mirrored:
        reference[0] *= -1
    R = nearest_rotation(A @ reference.mT, strength)
    assert torch.allclose(R @ R.mT, torch.eye(rank, dtype=DOUBLE), atol=1e-12)
    assert float(torch.linalg.det(R)) == pytest.approx(1)
    assert torch.allclose((B @ R) @ (R.mT @ A), B @ A, atol=1e-12)
    single = nearest_rotation((A @ reference.mT).float(), strength)
    kept = (B.float() @ single) @ (single.mT @ A.float())
    assert torch.allclose(kept, (B @ A).float(), rtol=1e-5, atol=1e-5)
    assert (kept - B @ A).norm() <= 1e-6 * B.norm() * A.norm()


@LOCAL
@given(st.integers(2, 6), st.integers(0, 10_000), st.sampled_from(["A", "B"]), st.booleans())
def test_full_alignment_beats_no_and_any_other_rotation(rank, seed, on, mirrored):
    factor, reference = draw(seed, rank, 9), draw(seed + 1, rank, 9)
    if mirrored:
        reference = reference * tensor([-1.0] + [1.0] * (rank - 1))[:, None]
    if on == "A":
        R = nearest_rotation(factor @ reference.mT)
        apart = [(turn.mT @ factor - reference).norm() for turn in (R, torch.eye(rank).double())]
        others = [(rotation_of(k, rank).mT @ factor - reference).norm() for k in range(20)]
    else:
        B, B_ref = factor.mT, reference.mT
        R = nearest_rotation(B.mT @ B_ref)
        apart = [(B @ turn - B_ref).norm() for turn in (R, torch.eye(rank).double())]
        others = [(B @ rotation_of(k, rank) - B_ref).norm() for k in range(20)]
    assert float(apart[0]) <= min(float(other) for other in [apart[1], *others]) + 1e-9


@LOCAL
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_a_rotated_copy_is_turned_back(rank, seed):
    A, turn = draw(seed, rank, 12), rotation_of(seed + 1, rank)
    R = nearest_rotation((turn.mT @ A) @ A.mT)
    assert torch.allclose(R.mT @ turn.mT @ A, A, atol=1e-7)


def test_a_reflection_cannot_be_undone_by_a_rotation():
    A = draw(0, 3, 12)
    mirrored = A * tensor([-1, 1, 1])[:, None]
    R = nearest_rotation(mirrored @ A.mT)
    left = (R.mT @ mirrored - A).norm()
    assert 0 < float(left) <= float((mirrored - A).norm())


def test_by_hand_a_quarter_turn_and_half_of_it():
    quarter = tensor([[0, -1], [1, 0]])
    assert torch.allclose(nearest_rotation(3 * quarter), quarter)
    cos = math.sqrt(0.5)
    assert torch.allclose(nearest_rotation(3 * quarter, 0.5), tensor([[cos, -cos], [cos, cos]]))
    assert torch.allclose(nearest_rotation(3 * quarter, 0.0), torch.eye(2, dtype=DOUBLE))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_where_nothing_is_known_nothing_turns(strength):
    assert torch.allclose(nearest_rotation(torch.zeros(2, 3, 3, dtype=DOUBLE), strength), torch.eye(3, dtype=DOUBLE))
    half_known = torch.zeros(3, 3, dtype=DOUBLE)
    half_known[0, 0] = 1e-5
    assert torch.allclose(nearest_rotation(half_known, strength), torch.eye(3, dtype=DOUBLE))
    for seed in range(5):  # a factor of lower rank that is its own reference
        A = draw(seed, 5, 2) @ draw(seed + 9, 2, 8)
        assert torch.allclose(nearest_rotation(A @ A.mT, strength), torch.eye(5, dtype=DOUBLE), atol=1e-3)


@LOCAL
@given(st.integers(2, 6), st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_a_soft_rotation_goes_at_most_twice_its_share_of_the_way(rank, seed, strength):
    M, eye = draw(seed, rank, rank), torch.eye(rank, dtype=DOUBLE)
    soft, full = nearest_rotation(M, strength), nearest_rotation(M)
    assert float((soft - eye).norm()) <= 2 * strength * float((full - eye).norm()) + 1e-9


# --- correction of B


@LOCAL
@given(neighbourhoods(), st.floats(1e-3, 1e3))
def test_the_ridge_correction_is_the_stationary_point_of_its_objective(case, ridge):
    B, A, w = case
    common = draw(0, A.shape[1], A.shape[2])
    X = ridge_correction(*joined(B, A, w), common, ridge)
    gradient = 2 * (X @ common - dense(B, A, w)) @ common.mT + 2 * ridge * X
    assert gradient.abs().max() <= 1e-10 * (size_of(B, A) * float(common.norm()) + ridge)


def test_without_ridge_what_remains_is_off_the_row_space():
    B, A, w = draw(0, 3, 6, 2), draw(1, 3, 2, 8), tensor([0.5, 0.25, 0.25])
    common, D = draw(2, 2, 8), dense(B, A, w)
    projection = common.mT @ torch.linalg.solve(common @ common.mT, common)
    X = ridge_correction(*joined(B, A, w), common, 1e-13)
    assert torch.allclose(X @ common, D @ projection, atol=1e-10)
    off = ridge_correction(*joined(B, A @ (torch.eye(8).double() - projection), w), common, 0.01)
    assert off.abs().max() < 1e-12


def test_by_hand_the_ridge_correction_of_numbers():
    # (6 - 2 x)^2 + 2 x^2 is smallest at x = 12 / 6 = 2.
    one = tensor([[1.0]])
    assert float(ridge_correction(6 * one, one, 2 * one, 2.0)) == pytest.approx(2)


# --- nothing dense


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


def test_nothing_forms_a_dense_product():
    d_out, d_in = 137, 149
    B, A, w = draw(0, 2, 3, d_out, 4), draw(1, 2, 3, 4, d_in), draw(2, 2, 3).abs()
    with Shapes() as noted:
        left, right = joined(B, A, w)
        found = decompose(left, right)
        found.factors(4), found.tail(torch.tensor(4)), norms2(left, right)
        ridge_correction(left, right, A[:, 0], 0.1)
    assert noted.seen and not [shape for shape in noted.seen if d_out in shape and d_in in shape]
