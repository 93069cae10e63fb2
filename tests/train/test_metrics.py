"""Further metrics against published examples, definitions and hand computation."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerlora.config.metrics import METRICS, higher_is_better
from peerlora.config.task_kinds import KINDS
from peerlora.data.dataset import Dataset
from peerlora.errors import ConfigError
from peerlora.runtime.compose import compose
from peerlora.train import metrics
from peerlora.train.metrics import Predictions, absent_classes, class_margins, compute_metric
from peerlora.train.online import learner as of_policies


def metric(name, predicted, labels, margins=None, loss=0.0):
    margins = None if margins is None else np.asarray(margins, dtype=float)
    outcomes = np.stack([np.zeros(len(predicted)), predicted], axis=1)
    target = METRICS[name][0]
    return compute_metric(name, target, Predictions(outcomes, np.array(labels), loss, margins))


def of_scores(labels, second):
    """AUROC of two classes by the scores of the second."""
    return metric("auroc", np.zeros(len(labels)), labels, [[1 - share, share] for share in second])


# The examples of scikit-learn's documentation
def test_the_examples_of_scikit_learn():
    assert metric("balanced-accuracy", [0, 1, 0, 0, 0, 1], [0, 1, 0, 0, 1, 0]) == pytest.approx(0.625)
    assert metric("macro-f1", [0, 2, 1, 0, 0, 1], [0, 1, 2, 0, 1, 2]) == pytest.approx(0.2666666, abs=1e-6)
    assert metric("micro-f1", [0, 2, 1, 0, 0, 1], [0, 1, 2, 0, 1, 2]) == pytest.approx(1 / 3)
    assert metric("matthews", [1, 0, 1, 1], [1, 1, 1, 0]) == pytest.approx(-1 / 3)
    assert of_scores([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == pytest.approx(0.75)
    assert metric("mean-absolute-error", [2.5, 0.0, 2, 8], [3, -0.5, 2, 7]) == pytest.approx(0.5)


ROWS = st.integers(2, 25).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 3), min_size=n, max_size=n),
        st.lists(st.integers(0, 3), min_size=n, max_size=n),
        st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=n, max_size=n),
    )
)


def by_definition(name, predicted, labels):
    predicted, labels = np.array(predicted), np.array(labels)
    if name in ("accuracy", "micro-f1"):
        return (predicted == labels).mean()
    if name == "balanced-accuracy":
        return np.mean([(predicted[labels == c] == c).mean() for c in set(labels)])
    if name == "macro-f1":
        found = []
        for c in set(labels) | set(predicted):
            right, said, there = ((predicted == c) & (labels == c)).sum(), (predicted == c).sum(), (labels == c).sum()
            precision, recall = right / said if said else 0, right / there if there else 0
            found.append(2 * precision * recall / (precision + recall) if right else 0.0)
        return np.mean(found)
    one, other = np.eye(4)[predicted], np.eye(4)[labels]  # Matthews: the correlation of indicator matrices
    one, other = one - one.mean(0), other - other.mean(0)
    scale = math.sqrt((one**2).sum() * (other**2).sum())
    return (one * other).sum() / scale if scale else 0.0


@pytest.mark.parametrize("name", ["accuracy", "micro-f1", "balanced-accuracy", "macro-f1", "matthews"])
@given(ROWS)
def test_class_metrics_are_their_definitions_whatever_classes_are_there(name, drawn):
    predicted, labels, _ = drawn
    assert metric(name, predicted, labels) == pytest.approx(by_definition(name, predicted, labels), abs=1e-12)


def pairs_right(scores, inside):
    """How often a row inside has the larger score of a pair; ties are half."""
    own, others = scores[inside], scores[~inside]
    return np.mean([(a > b) + 0.5 * (a == b) for a in own for b in others])


@given(ROWS)
def test_auroc_is_the_share_of_pairs_in_the_right_order(drawn):
    _, labels, scores = drawn
    labels, shares = np.array(labels), np.array(scores, dtype=float)
    areas = [pairs_right(shares[:, c], labels == c) for c in range(4) if 0 < (labels == c).sum() < len(labels)]
    found = metric("auroc", labels, labels, shares)
    assert math.isnan(found) if not areas else found == pytest.approx(np.mean(areas), abs=1e-12)


LOGITS = st.lists(st.lists(st.floats(-40, 40, width=32), min_size=3, max_size=3), min_size=1, max_size=9)


@given(LOGITS)
def test_margins_are_log_odds(rows):
    from fractions import Fraction

    z = torch.tensor(rows, dtype=torch.float32)
    found = class_margins(z)
    assert found.dtype == torch.float64
    for row, own in zip(z.double().tolist(), found.tolist(), strict=True):
        for c, margin in enumerate(own):
            others = sum(Fraction(math.exp(each - 40)) for k, each in enumerate(row) if k != c)
            assert margin == pytest.approx(row[c] - (math.log(others) + 40), rel=1e-12, abs=1e-12)


def test_sure_rows_are_ranked_by_how_sure_they_are():
    """In fp32 all these shares are 1 or 0, which are ties."""
    second = torch.tensor([20.0, 22.0, 24.0, 26.0])
    logits = torch.stack([torch.zeros(4), second], 1)
    assert (logits.softmax(1)[:, 1] == 1).all()
    assert metric("auroc", [1] * 4, [0, 0, 1, 1], class_margins(logits)) == 1.0
    assert metric("auroc", [1] * 4, [0, 1, 0, 1], class_margins(logits)) == 0.75
    three = torch.cat([logits, torch.zeros(4, 1)], 1)
    assert metric("auroc", [1] * 4, [0, 0, 1, 1], class_margins(three)) == 1.0


def test_rows_of_one_class_have_no_auroc_and_no_crash():
    assert math.isnan(of_scores([1, 1], [0.2, 0.7]))
    assert metric("matthews", [0, 0], [0, 0]) == 0.0 and metric("macro-f1", [1, 1], [1, 1]) == 1.0


def test_numbers_and_tokens():
    assert metric("pearson", [1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == pytest.approx(1.0)
    assert metric("pearson", [1.0, 2.0, 4.0], [1.0, 2.0, 3.0]) == pytest.approx(1.5 / math.sqrt(7 / 3 * 1), abs=1e-12)
    assert metric("pearson", [1.0, 1.0], [1.0, 2.0]) == 0.0 == metric("spearman", [1.0, 2.0], [3.0, 3.0])
    assert metric("spearman", [10, 20, 15, 100], [1, 2, 3, 4]) == pytest.approx(0.8)
    assert metric("perplexity", [1], [0], loss=math.log(7)) == pytest.approx(7)
    assert metric("perplexity", [1], [0], loss=1e4) == math.inf
    assert math.isnan(metric("perplexity", [1], [0], loss=math.nan))


def test_every_metric_has_a_direction_and_a_kind_of_task():
    assert {name for name in METRICS if not higher_is_better(name)} == {"mean-absolute-error", "perplexity"}
    assert {target for targets in METRICS.values() for target in targets} == {kind.target for kind in KINDS.values()}
    assert {(name, target) for name, targets in METRICS.items() for target in targets} == {
        *((name, target) for target, named in metrics._COMPUTE.items() for name in named),
        *((name, "action") for name in of_policies._METRICS),
    }


def test_clients_are_scored_by_their_own_logits(config):
    """AUROC, which alone sees more than losses and predictions, from the logits of each client."""
    federation = compose(config("bert"))
    x, rows = federation.start, federation.eval_data
    x.flat.add_(torch.randn(x.flat.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    found = federation.learner.evaluate(x, rows, 5, ["auroc", "macro-f1"])
    logits = federation.learner.logits(x, rows, 5)
    for client in range(4):
        z = np.exp(logits[client])
        odds = z / (z.sum(1, keepdims=True) - z)
        assert found.metrics["auroc"][client] == metric("auroc", rows.labels, rows.labels, odds)
        assert found.metrics["macro-f1"][client] == metric("macro-f1", logits[client].argmax(1), rows.labels)
    assert len(set(found.metrics["auroc"])) > 1


def test_one_note_names_the_classes_that_evaluation_rows_lack():
    rows = Dataset(np.zeros(4, np.int32), np.arange(5), None, np.array([0, 0, 2, 2]), ("bad", "fair", "good", "best"))
    told = "no evaluation row is of class fair, best; left out of: auroc; 0 in macro-f1 where a row is taken for it"
    assert absent_classes(["matthews", "macro-f1", "auroc"], rows) == (told,)
    assert absent_classes(["balanced-accuracy"], rows) == (
        "no evaluation row is of class fair, best; left out of: balanced-accuracy",
    )
    assert absent_classes(["matthews"], rows) == () == absent_classes([], rows)
    # what the note says: 0 of three classes with a prediction, nothing of a class without
    assert metric("macro-f1", [0, 1, 2, 2], [0, 0, 2, 2]) == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert metric("balanced-accuracy", [0, 1, 2, 2], [0, 0, 2, 2]) == pytest.approx((1 / 2 + 1) / 2)


REFUSED = {
    "eval.metrics=[perplexity]": "'perplexity' does not fit for task.kind=classification; expected of accuracy, ",
    "eval.metrics=[macro-f2]": "'macro-f2' is unknown for task.kind=classification (did you mean 'macro-f1'?)",
    "eval.metrics=[auroc, auroc]": "eval.metrics lists 'auroc' twice",
    "eval.metrics=auroc": "eval.metrics: 'auroc' given",
    "eval.select.metric=pearson": "eval.select.metric: 'pearson' does not fit",
    "eval.select={rows: own}": "eval.select.rows=own needs rows of each client's own; set eval.own=true",
    "eval.patience=3": "eval.patience=3 given; eval.select says by which value",
    "eval.select={mode: best}": "eval.select.mode: 'best' given",
    "eval.patience=0": "eval.patience: 0 given",
}


@pytest.mark.parametrize(("word", "said"), REFUSED.items())
def test_a_metric_that_does_not_fit_is_one_message(config, word, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        config("bert", word)


def test_a_run_whose_evaluation_rows_lack_a_class_says_so_once_and_goes_on(config, texts, tmp_path):
    rows = [row for row in texts.read_text().splitlines() if "class2" not in row]
    (tmp_path / "eval.jsonl").write_text("\n".join(rows))
    words = [f"data.eval=jsonl:{tmp_path}/eval.jsonl", "eval.metrics=[auroc, macro-f1, balanced-accuracy]"]
    federation = compose(config("bert", *words))
    told = "no evaluation row is of class class2; left out of: auroc, balanced-accuracy"
    told += "; 0 in macro-f1 where a row is taken for it"
    assert [each for each in federation.warnings if "no evaluation row" in each] == [told]
    found = federation.learner.evaluate(federation.start, federation.eval_data, 8, federation.config.eval.metrics)
    assert all(np.isfinite(values).all() for values in found.metrics.values())


def test_a_metric_that_rounds_are_selected_by_and_a_sample_are_looked_at_too(config, texts, tmp_path):
    rows = [row for row in texts.read_text().splitlines() if "class2" not in row]
    (tmp_path / "eval.jsonl").write_text("\n".join(rows))
    words = [f"data.eval=jsonl:{tmp_path}/eval.jsonl", "eval.select.metric=auroc"]
    assert "no evaluation row is of class class2; left out of: auroc" in compose(config("bert", *words)).warnings
    few = compose(config("bert", "eval.rows=2", "eval.metrics=[balanced-accuracy]")).warnings
    assert [each for each in few if each.startswith("no row of the sample (eval.rows=2) is of class class")]
    assert not any("is of class" in each for each in compose(config("bert", "eval.metrics=[auroc]")).warnings)


def test_one_note_names_the_labels_that_evaluation_rows_lack():
    labels = np.array([[1, 0, 0], [1, 0, 1]], np.float32)
    rows = Dataset(np.zeros(2, np.int32), np.arange(3), None, labels, ("spam", "rude", "long"))
    told = "no evaluation row has label rude; left out of: auroc; 0 in macro-f1 where a row is taken for it"
    assert absent_classes(["micro-f1", "macro-f1", "auroc"], rows) == (told,)
    assert absent_classes(["macro-f1"], rows.take([1])) and absent_classes(["micro-f1"], rows) == ()


@given(ROWS)
def test_auroc_of_several_labels_is_the_mean_share_of_pairs_in_the_right_order(drawn):
    several, _, scores = drawn
    labels = (np.array(several)[:, None] >> np.arange(2)) & 1  # two labels by the bits of a number
    shares = np.array(scores, dtype=float)[:, :2]
    areas = [pairs_right(shares[:, c], labels[:, c] > 0) for c in range(2) if 0 < labels[:, c].sum() < len(labels)]
    outcomes = np.zeros((len(labels), 3))
    found = compute_metric("auroc", "labels", Predictions(outcomes, labels.astype(np.float32), 0.0, shares))
    assert math.isnan(found) if not areas else found == pytest.approx(np.mean(areas), abs=1e-12)


def test_clients_are_scored_on_several_labels_by_their_own_logits(config):
    federation = compose(config("bert", "task.kind=multi-label", "data.label=several"))
    x, rows = federation.start, federation.eval_data
    x.flat.add_(torch.randn(x.flat.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    found = federation.learner.evaluate(x, rows, 5, ["auroc"]).metrics["auroc"]
    logits = federation.learner.logits(x, rows, 5)
    for client in range(4):
        areas = [pairs_right(logits[client][:, c], rows.labels[:, c] > 0) for c in range(len(rows.names))]
        assert found[client] == pytest.approx(np.mean(areas), abs=1e-12)
    assert len(set(found)) > 1


LABEL_ROWS = st.lists(st.tuples(*[st.booleans()] * 6), min_size=1, max_size=12)


@given(LABEL_ROWS)
def test_f1_of_several_labels_is_its_definition(rows):
    labels, predicted = (np.array(rows, dtype=float)[:, part] for part in (slice(3), slice(3, 6)))

    def by_hand(true, said):
        right = sum(1 for one, other in zip(true, said, strict=True) if one and other)
        precision, recall = right / max(1, sum(said)), right / max(1, sum(true))
        return 2 * precision * recall / (precision + recall) if right else 0.0

    found = Predictions(np.concatenate([np.zeros((len(rows), 1)), predicted], axis=1), labels, 0.0)
    known = [place for place in range(3) if labels[:, place].any() or predicted[:, place].any()]
    each = [by_hand(labels[:, place], predicted[:, place]) for place in known]
    assert compute_metric("macro-f1", "labels", found) == pytest.approx(np.mean(each) if each else 0.0)
    assert compute_metric("micro-f1", "labels", found) == pytest.approx(by_hand(labels.ravel(), predicted.ravel()))


def test_metrics_of_tokens_and_tags_are_sums_over_rows():
    """Rows of (loss, tokens, right ones), then of tags per type of entity (true, predicted, both)."""
    of_tokens = Predictions(np.array([[1.0, 4, 3], [2.0, 1, 0]]), np.zeros(2), 0.5)
    assert compute_metric("token-accuracy", "tokens", of_tokens) == pytest.approx(3 / 5)
    of_tags = Predictions(np.array([[1.0, 4, 3, 1, 1, 1, 0, 2, 0], [2.0, 2, 1, 1, 0, 0, 0, 0, 0]]), np.zeros(2), 0.5)
    assert compute_metric("token-accuracy", "tags", of_tags) == pytest.approx(4 / 6)
    assert compute_metric("entity-f1", "tags", of_tags) == pytest.approx(2 * 1 / (2 + 3))
    assert compute_metric("macro-f1", "tags", of_tags) == pytest.approx((2 * 1 / (2 + 1) + 0) / 2)
