"""The closed forms beside the studies of privacy, against draws."""

import importlib
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
DRAWN = 4_000  # draws; a mean of so many squares is known to some three per cent


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("study_privacy")


@pytest.fixture
def noisy_factors():
    generator = torch.Generator().manual_seed(5)

    def draw(*shape, size=1.0):
        return size * torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = draw(3, 6), draw(5, 3)
    return A, B, A + draw(DRAWN, 3, 6, size=0.3), B + draw(DRAWN, 5, 3, size=0.7)


def test_noise_of_a_product_is_that_of_draws(study, noisy_factors):
    A, B, A_noisy, B_noisy = noisy_factors
    found = (B_noisy @ A_noisy - B @ A).square().sum((1, 2)).mean()
    terms = study.product_noise(float(A.square().sum()), float(B.square().sum()), 5, 6, 3, 0.3, 0.7)
    assert float(found) == pytest.approx(sum(terms.values()), rel=0.05)
    alone = (B_noisy @ A - B @ A).square().sum((1, 2)).mean()
    frozen = study.product_noise(float(A.square().sum()), float(B.square().sum()), 5, 6, 3, 0.0, 0.7)
    assert float(alone) == pytest.approx(frozen["B"], rel=0.05) and frozen["quadratic"] == frozen["A"] == 0


def test_the_cross_term_of_noise_is_that_of_draws(study, noisy_factors):
    _, _, A, B = noisy_factors
    A, B = A.view(-1, 10, 3, 6), B.view(-1, 10, 5, 3)
    found = ((B @ A).mean(1) - B.mean(1) @ A.mean(1)).square().sum((1, 2)).mean()
    assert float(found) == pytest.approx(study.noise_cross_term(10, 5, 6, 3, 0.3, 0.7), rel=0.1)
