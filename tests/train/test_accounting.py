"""Epsilon against published numbers, against an exact formula, and the noise that is found for it."""

import math
import sys

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from cases import others_slow
from peerlora.config.privacy import PrivacyConfig
from peerlora.errors import ConfigError
from peerlora.train import accounting
from peerlora.train.accounting import noise_for, spent_epsilon

needs_opacus = pytest.mark.skipif(
    not accounting.has_accountants(), reason="opacus is missing; install the extra privacy"
)


PUBLISHED = [
    # Abadi et al. 2016 (arXiv 1607.00133), section 3.2: 1.26 by the moments accountant
    (4.0, 0.01, 10_000, 1e-5, 1.26, 1.035490, 0.946999),
    # TensorFlow Privacy's MNIST tutorial, 60 epochs of 60,000 rows in batches of 256: 2.92
    (1.1, 256 / 60_000, 60 * 234, 1e-5, 2.92, 2.594363, 2.379644),
]
"""Noise, rate, steps, delta; the published epsilon by a looser conversion; those of dp-accounting 0.6, rdp and pld."""


@needs_opacus
@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "published", "renyi", "sharp"), PUBLISHED)
def test_epsilon_is_that_of_a_second_library_and_below_the_published_one(
    noise, rate, steps, delta, published, renyi, sharp
):
    found = spent_epsilon(noise, rate, steps, delta, "rdp")
    assert sharp < found < published
    assert 0.999 * renyi < found < 1.01 * renyi, "with fewer orders it may be larger, and not smaller"


@needs_opacus
@pytest.mark.slow
@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "published", "renyi", "sharp"), PUBLISHED)
def test_the_prv_accountant_is_tighter(noise, rate, steps, delta, published, renyi, sharp):
    found = spent_epsilon(noise, rate, steps, delta, "prv")
    assert sharp - 0.01 < found < min(renyi, sharp + 0.02)
    assert noise_for(8.0, 0.03, 200, 1e-3, "prv") < noise_for(8.0, 0.03, 200, 1e-3, "rdp")


@needs_opacus
@pytest.mark.parametrize(("batch", "noise"), others_slow([(1, 1.0), (1, 3.0), (4, 1.0), (4, 3.0)], [1]))
def test_epsilon_of_few_rows_is_never_below_zero_and_never_falls(batch, noise):
    for rows in (2, 3, 5, 10, 30, 100):
        rate, delta = min(1.0, batch / rows), PrivacyConfig(noise=noise).delta_of(rows)
        found = [spent_epsilon(noise, rate, releases, delta, "rdp") for releases in (0, 1, 2, 5, 20, 100)]
        assert found == sorted(found) and found[0] == 0 < found[-1], rows
        assert noise_for(0.5, rate, 100, delta, "rdp") > noise_for(50.0, rate, 100, delta, "rdp")


@needs_opacus
@pytest.mark.parametrize("rows", [3, 100])
def test_the_prv_accountant_finds_no_more_than_renyis(rows):
    rate, delta = 1 / rows, PrivacyConfig(noise=3).delta_of(rows)
    found = [spent_epsilon(3.0, rate, releases, delta, "prv") for releases in (0, 1, 5, 100)]
    renyi = [spent_epsilon(3.0, rate, releases, delta, "rdp") for releases in (0, 1, 5, 100)]
    assert found == sorted(found) and found[:2] == [0, 0]
    assert all(sharp <= bound for sharp, bound in zip(found, renyi, strict=True)) and 0 < found[-1] < renyi[-1]


def exact_epsilon(noise, releases, delta):
    """Of the Gaussian mechanism without sampling (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    mu = math.sqrt(releases) / noise

    def excess(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta

    return brentq(excess, 0, 100)


@needs_opacus
@pytest.mark.parametrize(("noise", "releases", "delta"), [(20.0, 100, 1e-3), (5.0, 10, 1e-5), (60.0, 400, 1e-4)])
@pytest.mark.parametrize("kind", ["rdp", "prv"])
def test_without_sampling_epsilon_bounds_the_exact_one_from_above(noise, releases, delta, kind):
    found, exact = spent_epsilon(noise, 1.0, releases, delta, kind), exact_epsilon(noise, releases, delta)
    assert exact < found < 1.2 * exact


@needs_opacus
@pytest.mark.parametrize(("epsilon", "rate", "releases"), [(8.0, 0.05, 100), (1.0, 1.0, 20), (90.0, 0.5, 3)])
def test_the_noise_that_is_found_spends_the_epsilon_and_hardly_less(epsilon, rate, releases):
    noise = noise_for(epsilon, rate, releases, 1e-3, "rdp")
    assert 0.98 * epsilon < spent_epsilon(noise, rate, releases, 1e-3, "rdp") <= epsilon
    assert spent_epsilon(0.99 * noise, rate, releases, 1e-3, "rdp") > epsilon


@needs_opacus
def test_an_epsilon_that_no_noise_gives_is_refused():
    with pytest.raises(ConfigError, match="larger epsilon"):
        noise_for(1e-9, 1.0, 100, 1e-9, "rdp")


@needs_opacus
@pytest.mark.parametrize("kind", ["rdp", "prv"])
@pytest.mark.parametrize(("epsilon", "releases"), [(1e3, 1), (1e5, 200), (1e9, 200)])
@pytest.mark.parametrize("rate", [0.05, 1.0])
def test_an_epsilon_that_promises_nothing_is_had_for_hardly_any_noise(epsilon, releases, rate, kind):
    noise = noise_for(epsilon, rate, releases, 1e-3, kind)
    assert noise == 0.05 and spent_epsilon(noise, rate, releases, 1e-3, kind) <= epsilon


def test_nothing_costs_nothing_and_no_noise_has_no_bound():
    assert spent_epsilon(1.0, 0.1, 0, 1e-3, "rdp") == 0 and spent_epsilon(0.0, 0.1, 1, 1e-3, "rdp") == math.inf


def test_missing_accountants_are_told_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[privacy\]'"):
        accounting.require_accountants()
