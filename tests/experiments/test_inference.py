"""Intervals, tests and designs against textbook values, hand-worked examples, scipy and simulation."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from peerlora.experiments.inference import (
    detectable_difference,
    detectable_table,
    holm,
    is_same,
    sign_flip_test,
    smallest_sign_flip_p,
    subtract_scores,
    t_interval,
    t_test,
)

SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
"""Student 1908: hours of sleep that ten people gained by one drug more than by another."""
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
"""Fisher 1935: eighths of an inch by which cross-fertilised plants were taller than self-fertilised ones, by pair."""


def test_the_t_test_and_interval_of_the_sleep_data():
    assert t_test(SLEEP) == pytest.approx(0.002833, abs=1e-6)
    assert t_interval(SLEEP) == pytest.approx((0.7001, 2.4599), abs=1e-4)


@pytest.mark.parametrize("count", [3, 4, 10, 30])
def test_t_agrees_with_scipy(count):
    values = np.random.default_rng(count).normal(0.01, 0.02, count)
    theirs = stats.ttest_1samp(values, 0.0)
    assert t_test(values.tolist()) == pytest.approx(theirs.pvalue, rel=1e-12)
    assert t_interval(values.tolist()) == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-12)


def test_what_shows_no_spread_allows_no_inference():
    assert t_interval([0.1, 0.2]) is None and t_test([0.1, 0.2]) is None
    third = [0.7 - 0.6, 0.6 - 0.5, 0.5 - 0.4]  # equal but for rounding
    assert t_interval(third) is None and t_test(third) is None
    assert t_interval([0.0] * 3) == (0.0, 0.0) and t_test([0.0] * 3) == 1.0  # runs that are the same


@pytest.mark.parametrize("count", [3, 5])
def test_the_interval_covers_the_mean_of_normal_differences(count):
    """Also of three seeds, whose range covers it in three of four cases; 2,000 draws have a standard error of .49 %."""
    draws = np.random.default_rng(0).normal(1.0, 2.0, (2000, count))
    found = [t_interval(values) for values in draws.tolist()]
    covered = np.mean([low <= 1.0 <= high for low, high in found])
    assert abs(covered - 0.95) < 0.015
    assert np.mean((draws.min(1) <= 1.0) & (draws.max(1) >= 1.0)) == pytest.approx(1 - 2 / 2**count, abs=0.02)


@pytest.mark.slow
def test_the_interval_is_as_wrong_as_the_page_says_where_differences_are_not_normal():
    """Exponential ones, and of two values, as of a method that leaves chance in one seed of five."""
    draw = np.random.default_rng(0)
    skewed = draw.exponential(size=(4000, 3)) - 1
    apart = np.where(draw.random((4000, 3)) < 0.2, 2.0, -0.5) + draw.normal(scale=0.1, size=(4000, 3))
    for draws, expected in ((skewed, 0.88), (apart, 0.50)):
        found = [t_interval(values) for values in draws.tolist()]
        assert np.mean([low <= 0 <= high for low, high in found]) == pytest.approx(expected, abs=0.025)


def test_the_sign_flip_p_of_differences_by_hand():
    """Of the 8 patterns of 1, 2, 4 the sums 7, 5, 3, 1 and their negatives."""
    assert sign_flip_test([1, 2, 4]) == 2 / 8
    assert sign_flip_test([-1, 2, 4]) == 4 / 8
    assert sign_flip_test([1, -2, 4]) == 6 / 8
    assert sign_flip_test([1, 2, -4]) == 1.0
    assert sign_flip_test([0.0, 0.0]) == 1.0
    assert sign_flip_test([0.1, 0.2, 0.3]) == 0.25  # 0.1 + 0.2 is not 0.3 here, and ties must count all the same
    assert sign_flip_test([0.1, 0.2, -0.3]) == 1.0


@pytest.mark.parametrize("count", [4, 6, 8])
@pytest.mark.parametrize("cancel", [False, True])
def test_ties_of_the_sign_flip_test_are_those_of_whole_numbers(count, cancel):
    """Differences of accuracies are whole numbers of rows, whose sums tie often, and as floats rarely exactly; where
    they cancel out, what is left of them is rounding alone."""
    draw, signs = np.random.default_rng(count), np.array(list(product((-1, 1), repeat=count)))
    for _ in range(20):
        whole = draw.integers(-6, 7, count)
        whole[-1] = -whole[:-1].sum() if cancel else whole[-1]
        expected = np.mean(np.abs(signs @ whole) >= abs(whole.sum()))
        assert sign_flip_test(whole.tolist()) == expected
        assert sign_flip_test([(711 + each) / 872 - 711 / 872 for each in whole.tolist()]) == expected


def test_scores_that_differ_by_rounding_are_the_same():
    assert subtract_scores(0.1 + 0.2, 0.3) == 0.0 and subtract_scores(0.75, 0.5) == 0.25
    assert is_same(0.7 + 0.1, 0.8) and not is_same(0.8, 0.8 + 1e-9)


def test_the_sign_flip_p_is_fishers_of_darwins_plants():
    """863 of the 2^14 patterns on one side; fifteen pairs are drawn from, twelve are enumerated."""
    exact = np.array(list(product((-1, 1), repeat=14))) @ np.array(DARWIN[:-1])
    total = abs(sum(DARWIN))
    share = np.mean([abs(sums + sign * DARWIN[-1]) >= total for sums in exact for sign in (-1, 1)])
    assert share == pytest.approx(2 * 863 / 2**15)
    assert sign_flip_test(DARWIN) == pytest.approx(share, abs=0.009)  # four standard errors of 10,000 draws
    assert sign_flip_test(DARWIN) == sign_flip_test(DARWIN)
    twelve = stats.permutation_test(
        (np.array(SLEEP),), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert sign_flip_test(SLEEP) == pytest.approx(twelve.pvalue)


def test_the_smallest_sign_flip_p():
    assert [smallest_sign_flip_p(count) for count in (1, 3, 6, 12)] == [1.0, 0.25, 1 / 32, 1 / 2048]
    for count in (3, 8, 12, 40):
        assert sign_flip_test([1.0] * count) == pytest.approx(smallest_sign_flip_p(count), abs=1e-12)


def test_holm_by_hand():
    """4 x .01, 3 x .005 -> the larger of the two before it, and so on: .005 x 4, .01 x 3, .03 x 2, .04 -> .06."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}) and list(found) == ["a", "b", "c", "d"]
    assert holm({1: 0.5, 2: 0.9}) == {1: 1.0, 2: 1.0}
    assert holm({"alone": 0.04}) == {"alone": 0.04} and holm({}) == {}


def test_holm_keeps_the_chance_of_any_false_finding():
    draws = np.random.default_rng(1).uniform(size=(4000, 5))
    any_found = np.mean([min(holm(dict(enumerate(p))).values()) <= 0.05 for p in draws.tolist()])
    assert abs(any_found - 0.05) < 0.014


@pytest.mark.parametrize(("effect", "count"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_detectable_differences_are_those_of_the_power_tables(effect, count):
    """Cohen's small, medium and large effect, paired, 5 % two-sided, 80 %: the numbers of pairs that G*Power gives."""
    assert detectable_difference(1.0, count) <= effect < detectable_difference(1.0, count - 1)


@pytest.mark.parametrize(("count", "level"), [(3, 0.05), (3, 0.05 / 16), (5, 0.0125), (10, 0.05)])
def test_a_detectable_difference_is_found_in_four_of_five_cases(count, level):
    draws = np.random.default_rng(2).normal(size=(20_000, count)) + detectable_difference(1.0, count, level)
    found = np.abs(draws.mean(1)) / draws.std(1, ddof=1) * np.sqrt(count) > stats.t.ppf(1 - level / 2, count - 1)
    assert found.mean() == pytest.approx(0.8, abs=0.012)


def test_detectable_differences_scale_with_the_spread_and_need_three_seeds():
    assert detectable_difference(0.02, 5) == pytest.approx(0.02 * detectable_difference(1.0, 5))
    assert detectable_difference(1.0, 2) is None
    assert detectable_difference(1.0, 5, power=0.9) > detectable_difference(1.0, 5)


def test_the_table_of_designs():
    lines = detectable_table([2, 5], [0.01, 0.05], tests=4).splitlines()
    five = [f"{detectable_difference(deviation, 5, 0.0125):.3f}" for deviation in (0.01, 0.05)]
    assert lines == [
        "| seeds | sd 0.01 | sd 0.05 |",
        "| --- | --- | --- |",
        "| 2 | – | – |",
        f"| 5 | {' | '.join(five)} |",
    ]
