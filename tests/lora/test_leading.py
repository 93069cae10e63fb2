"""The leading part of a product's decomposition against the dense one."""

import pytest
import torch

from peerlora.lora.product import decompose, decompose_leading


def product(d_out, wide, d_in, decay=0.5, seed=0):
    """Factors of a product whose singular values fall off, in so many columns."""
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((d_out, wide), (wide, d_in)))
    return left * decay ** torch.arange(wide).double().clamp_max(40), right


@pytest.mark.parametrize(("d_out", "wide", "d_in"), [(12, 40, 9), (9, 40, 12), (30, 6, 20), (8, 8, 8), (10, 3, 4)])
@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_the_best_approximation_with_the_norm_of_the_rest(d_out, wide, d_in, rank):
    pairs = product(d_out, wide, d_in), product(d_out, wide, d_in, 0.8, 1)
    left, right = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    found, ranks = decompose_leading(left, right, rank), torch.tensor([rank, rank])
    B, A = found.factors(rank)
    U, values, V = torch.linalg.svd(left @ right, full_matrices=False)
    best = (U[..., :rank] * values[:, None, :rank]) @ V[:, :rank]
    torch.testing.assert_close(B @ A, best, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.values[:, :rank], values[:, :rank], rtol=1e-12, atol=1e-13)
    size = float(values.square().sum())
    torch.testing.assert_close(found.tail(ranks), values[:, rank:].square().sum(1), rtol=0, atol=1e-13 * size)
    torch.testing.assert_close(found.norm2, values.square().sum(1), rtol=1e-12, atol=0)


def test_balanced_factors_are_those_of_the_whole_decomposition():
    left, right = (part[None] for part in product(12, 40, 9))
    found, whole = decompose_leading(left, right, 3), decompose(left, right)
    for ours, theirs in zip(found.factors(3), whole.factors(3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_values_that_are_nothing_but_rounding_are_no_directions():
    """Squaring would lift them: a value of 1e-9 must stay below one of 1e-16 that is not there."""
    left = torch.zeros(8, 20, dtype=torch.float64)
    left[:, :2] = torch.linalg.qr(torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    right = torch.zeros(20, 8, dtype=torch.float64)
    right[0, 0], right[1, 1] = 1.0, 1e-9
    found = decompose_leading(left[None], right[None], 4)
    assert int(found.rank) == 2
    assert found.values[0, :2].tolist() == pytest.approx([1.0, 1e-9], rel=1e-6)
    B, A = found.factors(4)
    assert not B[0, :, 2:].any() and not A[0, 2:].any()


def test_zero_has_no_direction_and_no_norm():
    found = decompose_leading(torch.zeros(1, 4, 10).double(), torch.zeros(1, 10, 5).double(), 2)
    assert int(found.rank) == 0 and float(found.norm2) == 0 and not any(part.any() for part in found.factors(2))


def test_each_product_has_the_same_bits_alone():
    pairs = [product(12, 40, 9, 0.9, seed) for seed in range(5)]
    left, right = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    together = decompose_leading(left, right, 3)
    for i in range(5):
        alone = decompose_leading(left[i : i + 1], right[i : i + 1], 3)
        assert torch.equal(alone.U[0], together.U[i]) and torch.equal(alone.V[0], together.V[i])


@pytest.mark.parametrize("wide", [3, 40])
def test_huge_factors_are_decomposed_and_infinite_ones_are_nan_for_their_own_client_alone(wide):
    left, right = (torch.stack([part] * 3) for part in product(12, wide, 9))
    left[0], right[0] = left[0] * 1e200, right[0] * 1e-180
    left[1, 0, 0] = float("inf")
    found = decompose_leading(left, right, 2)
    torch.testing.assert_close(found.values[0], found.values[2] * 1e20, rtol=1e-10, atol=0)
    assert found.values[1].isnan().all() and found.factors(2)[0][1].isnan().all()
    assert found.values[[0, 2]].isfinite().all()
