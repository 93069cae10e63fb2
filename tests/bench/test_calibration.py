import numpy as np
import pytest

from calibration import calibration_error, recalls


def logits_of(shares):
    return np.log(np.array(shares))


def test_calibration_error_by_hand():
    # Two bins: 0.9 sure and 1 of 2 right; 0.6 sure and 2 of 2 right.
    shares = [[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.6, 0.4]]
    labels = np.array([0, 1, 1, 0])
    assert calibration_error(logits_of(shares), labels) == pytest.approx((0.4 * 2 + 0.4 * 2) / 4)
    assert calibration_error(logits_of(shares), labels, bins=1) == pytest.approx(abs(0.75 - 0.75))


def test_shifted_logits_are_the_same_model_and_certainty_falls_into_the_last_bin():
    sure, labels = np.array([[900.0, 0.0], [0.0, 900.0]]), np.array([0, 0])
    assert calibration_error(sure, labels) == pytest.approx(0.5)
    assert calibration_error(sure + 7, labels) == calibration_error(sure, labels)


def test_recalls_give_the_accuracy_under_any_proportions():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(200, 3)), generator.integers(0, 3, 200)
    found = recalls(logits, labels)
    shares = np.bincount(labels) / 200
    assert found @ shares == pytest.approx((logits.argmax(1) == labels).mean())
    assert np.isnan(recalls(logits[:, :], np.zeros(200, dtype=int))[1:]).all()
