"""The small trial of rates and steps on frozen features."""

import importlib
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def trials(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("step_rules")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def memory(trials, gradients):
    return trials.Memory([torch.zeros_like(g) for g in gradients], [torch.zeros_like(g) for g in gradients])


def test_orthogonal_is_the_polar_factor(trials):
    wide = draw(2, 3, 8, 40)
    U, _, Vh = torch.linalg.svd(wide, full_matrices=False)
    torch.testing.assert_close(trials.orthogonal(wide), U @ Vh, atol=1e-4, rtol=1e-4)
    assert trials.orthogonal(torch.zeros(1, 8, 40)).abs().max() == 0


def test_the_plateau_is_around_the_best_and_without_gaps(trials):
    rates, accuracy = [1, 2, 4, 8, 16, 32], [[0.70], [0.60], [0.695], [0.70], [0.705], [0.60]]
    assert trials.plateau(rates, accuracy) == (4, 16)
    assert trials.middle(rates, accuracy) == pytest.approx(8)


@pytest.mark.parametrize("rule", ["noise divided", "preconditioned"])
def test_rules_equal_adamw_where_there_is_nothing_to_correct(trials, rule):
    """A first step has no noise in its moments; factors that are orthonormal precondition nothing."""
    A = torch.linalg.qr(draw(384, 8))[0].T[None, None]
    values = [A, A.mT, draw(1, 1, 2, 384)]
    gradients = [draw(*value.shape, seed=1) for value in values]
    trial = trials.Trial("p = 0.02", rule)
    found = trials.RULES[rule](trial, memory(trials, gradients), values, gradients)
    plain = trials.adamw(trial, memory(trials, gradients), values, gradients)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_preconditioned_gradients_are_those_of_the_other_factor(trials):
    A, B, head = draw(1, 1, 8, 384), draw(1, 1, 384, 8, seed=2), draw(1, 1, 2, 384)
    gradients = [draw(*value.shape, seed=3) for value in (A, B, head)]
    kept = memory(trials, gradients)
    trials.preconditioned(trials.Trial("complete"), kept, [A, B, head], gradients)
    torch.testing.assert_close((B.mT @ B) @ kept.first[0] * 10, gradients[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(kept.first[1] @ (A @ A.mT) * 10, gradients[1], atol=1e-3, rtol=1e-3)


def test_noise_is_divided_by_the_clients_that_a_model_averages(trials):
    gradients = [draw(1, 1, 8, 384), draw(1, 1, 384, 8), draw(1, 1, 2, 384)]
    kept = memory(trials, gradients)
    trial = trials.Trial("complete", "noise divided")
    trials.noise_divided(trial, kept, gradients, gradients)
    steps = trials.noise_divided(trial, kept, gradients, [-g for g in gradients])
    m, v = kept.first[0] / (1 - trials.BETA1**2), kept.second[0] / (1 - trials.BETA2**2)
    expected = m / (m * m + (v - m * m) / trials.CLIENTS).sqrt()
    torch.testing.assert_close(steps[0], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("graph", ["complete", "p = 0.1", "alone", "all data in one place"])
def test_a_short_trial_learns_on_every_graph(trials, monkeypatch, graph):
    monkeypatch.setattr(trials, "ROUNDS", 3)
    monkeypatch.setattr(trials, "SCHEDULE", trials.TrainConfig(rounds=3, schedule="cosine"))
    monkeypatch.setattr(trials, "SET_ASIDE", 50)
    monkeypatch.setattr(trials, "ROWS_OF_A_CLIENT", 20)
    labels = torch.arange(400) % 2
    features = 0.3 * draw(400, trials.WIDTH) + (2 * labels[:, None] - 1) * draw(trials.WIDTH, seed=5)
    rows = trials.Rows(features, features, labels, held=(features[:100], features[:100], labels[:100]))
    found = trials.run(trials.Trial(graph, rate=0.01), rows, [0, 1], aside=False)
    assert found.shape == (2, 1 if graph == trials.POOLED else 10)
    assert found.mean() > 0.9
    if graph == "complete":
        assert (found == found[:, :1]).all()
