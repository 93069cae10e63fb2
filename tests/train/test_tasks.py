"""Losses and scores against hand computation."""

import re
from math import exp, log

import numpy as np
import pytest
import torch

from peerlora.config.loading import load_config
from peerlora.config.task_kinds import KINDS
from peerlora.data.batches import Batch
from peerlora.errors import ConfigError
from peerlora.train.tasks import CausalLM, Classification, MultiLabel, Regression, task

DOUBLE = torch.float64


def batch(labels, weights, ids=None, mask=None):
    inputs = {} if ids is None else {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    labels = torch.tensor(labels)
    return Batch(inputs, labels, torch.tensor(weights, dtype=DOUBLE), [(2, 3)] * len(weights))


def surprise(chosen, *others):
    """Cross-entropy of one row, by hand."""
    return log(exp(chosen) + sum(map(exp, others))) - chosen


def test_the_registry_names_what_the_config_knows():
    assert {name: task(name).higher_is_better for name in KINDS} == {
        "classification": True,
        "regression": True,
        "multi-label": True,
        "causal-lm": False,
        "token-classification": True,
        "sequence-to-sequence": False,
        "image-classification": True,
        "chat": False,
        "flow-policy": True,
    }


def test_classification_losses_weigh_own_rows_only():
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [9.0, -9.0]], dtype=DOUBLE)
    made = batch([0, 0, 1, 1], [[0.5, 0.5], [1.0, 0.0]])  # the last row is filler
    expected = [(surprise(1, 0) + surprise(0, 2)) / 2, surprise(0, 3)]
    assert Classification().losses(logits, made).tolist() == pytest.approx(expected)


def test_classification_score_is_accuracy_and_mean_loss():
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], dtype=DOUBLE)
    made = batch([0, 1, 1], [[1 / 3] * 3])
    outcomes = Classification().outcomes(logits, made)
    metric, loss = Classification().score(outcomes.numpy(), np.array([0, 1, 1]))
    assert metric == pytest.approx(2 / 3)
    assert loss == pytest.approx((surprise(1, 0) + surprise(2, 0) + surprise(0, 3)) / 3)


def test_several_labels_are_scored_by_micro_f1_and_binary_cross_entropy():
    logits = torch.tensor([[1.0, -2.0, 3.0], [-1.0, 0.5, -0.5], [9.0, 9.0, 9.0]], dtype=DOUBLE)
    labels = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    made = batch(labels, [[0.5, 0.5, 0.0]])  # the last row is filler

    def surprises(row):
        return [log(1 + exp(-z if y else z)) for z, y in zip(logits[row].tolist(), labels[row], strict=True)]

    expected = [sum(surprises(row)) / 3 for row in range(3)]
    assert MultiLabel().losses(logits, made).tolist() == pytest.approx([(expected[0] + expected[1]) / 2])
    outcomes = MultiLabel().outcomes(logits, made).numpy()
    assert outcomes.shape == (3, MultiLabel().outcomes_width(("a", "b", "c")))
    metric, loss = MultiLabel().score(outcomes[:2], np.array(labels[:2]))
    assert metric == pytest.approx(2 * 2 / (3 + 3))  # three true labels, three predicted ones, two of them right
    assert loss == pytest.approx((expected[0] + expected[1]) / 2)
    assert MultiLabel().score(np.zeros((2, 4)), np.zeros((2, 3))) == (0.0, 0.0)


def test_regression_loss_is_the_squared_error():
    logits = torch.tensor([[1.0], [3.0], [5.0], [100.0]], dtype=DOUBLE)
    made = batch([2.0, 1.0, 5.5, 0.0], [[0.5, 0.5], [1.0, 0.0]])
    assert Regression().losses(logits, made).tolist() == pytest.approx([2.5, 0.25])


def test_regression_score_is_spearmans_correlation():
    logits = torch.tensor([[10.0], [20.0], [15.0], [100.0]], dtype=DOUBLE)
    labels = [1.0, 2.0, 3.0, 4.0]
    outcomes = Regression().outcomes(logits, batch(labels, [[0.25] * 4]))
    metric, loss = Regression().score(outcomes.numpy(), np.array(labels))
    # Ranks 1 3 2 4 against 1 2 3 4: 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15) = 0.8
    assert metric == pytest.approx(0.8)
    assert loss == pytest.approx((81 + 18**2 + 144 + 96**2) / 4)


@pytest.mark.parametrize(("predicted", "labels"), [([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0]), ([1.0], [2.0])])
def test_no_order_means_no_correlation(predicted, labels):
    outcomes = np.stack([np.zeros(len(predicted)), predicted], axis=1)
    assert Regression().score(outcomes, np.array(labels)) == (0.0, 0.0)


def causal_case():
    """Two clients with two rows each over a vocabulary of 2; the last row is filler, the second is padded."""
    ids = [[0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 1]]
    mask = [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
    logits = torch.tensor(
        [
            [[0, 1], [2, 0], [9, 9]],  # predicts ids 1, 1
            [[0, 3], [7, 7], [9, 9]],  # predicts id 0, then padding
            [[1, 0], [0, 4], [9, 9]],  # predicts ids 0, 1
            [[5, 0], [5, 0], [9, 9]],
        ],
        dtype=DOUBLE,
    )
    return logits, batch([0, 0, 0, 0], [[0.5, 0.5], [1.0, 0.0]], ids, mask)


def test_causal_losses_are_means_over_the_clients_own_tokens():
    logits, made = causal_case()
    first = (surprise(1, 0) + surprise(0, 2) + surprise(0, 3)) / 3  # tokens, not rows
    second = (surprise(1, 0) + surprise(4, 0)) / 2
    assert CausalLM().losses(logits, made).tolist() == pytest.approx([first, second])


def test_causal_score_is_the_mean_over_tokens():
    logits, made = causal_case()
    outcomes = CausalLM().outcomes(logits, made).numpy()
    assert outcomes[:, 1].tolist() == [2, 1, 2, 2]
    assert outcomes[1, 0] == pytest.approx(surprise(0, 3))
    expected = (surprise(1, 0) + surprise(0, 2) + surprise(0, 3)) / 3
    assert CausalLM().score(outcomes[:2], np.zeros(2)) == pytest.approx((expected, expected))


def test_padding_tokens_do_not_count():
    logits, made = causal_case()
    made.inputs["input_ids"][1, 2] = 1
    logits[1, 1] = torch.tensor([-50.0, 50.0])
    expected = CausalLM().losses(*causal_case())
    assert torch.equal(CausalLM().losses(logits, made), expected)


def test_a_kind_and_its_task_refer_to_each_other():
    assert all(task(kind.name).kind is kind for kind in KINDS.values())


@pytest.mark.parametrize("given", ["clasification", 3, ["regression"]])
def test_an_unknown_kind_is_refused_with_those_that_exist(given):
    known = [f"'{name}'" for name in KINDS]
    told = f"task.kind: {given!r} given; input should be {', '.join(known[:-1])} or {known[-1]}"
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_config({"task": {"kind": given}})
