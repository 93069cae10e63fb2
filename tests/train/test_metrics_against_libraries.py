"""Further metrics against scikit-learn and SciPy, on whatever rows, and F1 of entities against seqeval."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as theirs

from peerlora.train.entities import count_entities, entity_types, find_entities
from peerlora.train.metrics import Predictions, compute_metric

CLASSES = 4
CLASS = st.integers(0, CLASSES - 1)


@st.composite
def class_rows(draw):
    """Predictions, labels, of which some classes may be missing, and a few different shares of every class."""
    rows = draw(st.integers(2, 30))
    some = draw(st.sets(CLASS, min_size=1))
    labels = draw(st.lists(st.sampled_from(sorted(some)), min_size=rows, max_size=rows))
    predicted = draw(st.lists(CLASS, min_size=rows, max_size=rows))
    counts = draw(st.lists(st.lists(st.integers(1, 3), min_size=4, max_size=4), min_size=rows, max_size=rows))
    shares = np.array(counts) / np.sum(counts, axis=1, keepdims=True)
    return np.array(predicted), np.array(labels), shares


def ours(name, predicted, labels, margins=None):
    outcomes = np.stack([np.zeros(len(predicted)), predicted], axis=1)
    return compute_metric(name, "class", Predictions(outcomes, labels, 0.0, margins))


def quietly(function, *arguments, **options):
    """The result of a function that warns of classes that are missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


OF_CLASSES = {
    "accuracy": theirs.accuracy_score,
    "balanced-accuracy": theirs.balanced_accuracy_score,
    "macro-f1": lambda labels, predicted: theirs.f1_score(labels, predicted, average="macro", zero_division=0),
    "micro-f1": lambda labels, predicted: theirs.f1_score(labels, predicted, average="micro"),
    "matthews": theirs.matthews_corrcoef,
}


@pytest.mark.parametrize("name", OF_CLASSES)
@given(class_rows())
def test_metrics_of_classes_are_those_of_scikit_learn(name, drawn):
    predicted, labels, _ = drawn
    expected = quietly(OF_CLASSES[name], labels, predicted)
    assert ours(name, predicted, labels) == pytest.approx(expected, abs=1e-12)


def log_odds(shares):
    return np.log(shares) - np.log1p(-shares)


@given(class_rows())
def test_auroc_of_classes_is_that_of_scikit_learn_over_the_classes_that_some_rows_have(drawn):
    _, labels, shares = drawn
    some = [c for c in range(CLASSES) if 0 < (labels == c).sum() < len(labels)]
    found = ours("auroc", labels, labels, log_odds(shares))
    if not some:
        assert math.isnan(found)
        return
    areas = [theirs.roc_auc_score(labels == c, shares[:, c]) for c in some]
    assert found == pytest.approx(np.mean(areas), abs=1e-12)
    if len(some) == CLASSES:  # which scikit-learn asks for
        assert found == pytest.approx(theirs.roc_auc_score(labels, shares, multi_class="ovr"), abs=1e-12)


@given(class_rows())
def test_auroc_of_two_classes_is_that_of_the_second(drawn):
    _, labels, shares = drawn
    labels, second = labels % 2, shares[:, 0]
    assume(0 < labels.sum() < len(labels))
    found = ours("auroc", labels, labels, log_odds(np.stack([1 - second, second], 1)))
    assert found == pytest.approx(theirs.roc_auc_score(labels, second), abs=1e-12)


LABELS = 3
LABEL_ROWS = st.lists(
    st.tuples(*[st.booleans()] * LABELS, *[st.booleans()] * LABELS, *[st.integers(0, 4)] * LABELS),
    min_size=1,
    max_size=20,
)


@given(LABEL_ROWS)
def test_metrics_of_several_labels_are_those_of_scikit_learn(rows):
    labels, predicted, logits = np.split(np.array(rows, dtype=float), [LABELS, 2 * LABELS], axis=1)
    found = Predictions(np.concatenate([np.zeros((len(rows), 1)), predicted], axis=1), labels, 0.0, logits)
    micro = quietly(theirs.f1_score, labels, predicted, average="micro", zero_division=0)
    assert compute_metric("micro-f1", "labels", found) == pytest.approx(micro, abs=1e-12)
    known = [c for c in range(LABELS) if labels[:, c].any() or predicted[:, c].any()]
    each = theirs.f1_score(labels, predicted, average=None, zero_division=0)[known]
    assert compute_metric("macro-f1", "labels", found) == pytest.approx(each.mean() if known else 0.0, abs=1e-12)
    some = [c for c in range(LABELS) if 0 < labels[:, c].sum() < len(labels)]
    area = compute_metric("auroc", "labels", found)
    if some:
        expected = theirs.roc_auc_score(labels[:, some], logits[:, some], average="macro")
        assert area == pytest.approx(expected, abs=1e-12)
    else:
        assert math.isnan(area)


NUMBERS = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30)


@given(NUMBERS)
def test_metrics_of_numbers_are_those_of_scipy_and_scikit_learn(rows):
    predicted, labels = np.array(rows, dtype=float).T
    found = Predictions(np.stack([np.zeros(len(rows)), predicted], axis=1), labels.astype(np.float32), 0.0)
    error = theirs.mean_absolute_error(labels, predicted)
    assert compute_metric("mean-absolute-error", "number", found) == pytest.approx(error, abs=1e-12)
    for name, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        expected = quietly(function, predicted, labels).statistic  # NaN where a side is constant, which is 0 here
        expected = 0.0 if math.isnan(expected) else expected
        assert compute_metric(name, "number", found) == pytest.approx(expected, abs=1e-9)


# --- entities

TAGS = ("O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("PER", "LOC", "GEO-POL")))
SENTENCES = st.lists(
    st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1, max_size=12), min_size=1, max_size=5
)


@pytest.fixture(scope="module")
def seqeval():
    pytest.importorskip("seqeval", reason="seqeval is missing; make test-slow installs it")
    from seqeval import metrics
    from seqeval.metrics.sequence_labeling import get_entities

    return metrics, get_entities


@pytest.mark.slow
@given(rows=SENTENCES)
def test_entities_and_their_f1_are_those_of_seqeval_whatever_the_order_of_tags(seqeval, rows):
    """Its default mode; in any order, so most sequences have ends without a beginning and types that change."""
    of_seqeval, get_entities = seqeval
    true, predicted = ([[pair[side] for pair in row] for row in rows] for side in (0, 1))
    for tags in (*true, *predicted):
        assert find_entities(tags) == set(get_entities(tags))
    counts = []
    for one, other in zip(true, predicted, strict=True):
        ids = [np.array([TAGS.index(tag) for tag in tags]) for tags in (one, other)]
        counts.append(np.concatenate([[0.0, len(one), 0.0], count_entities(*ids, TAGS)]))
    found = Predictions(np.stack(counts), np.zeros(len(rows)), 0.0)
    for name, average in (("entity-f1", "micro"), ("macro-f1", "macro")):
        expected = quietly(of_seqeval.f1_score, true, predicted, average=average, zero_division=0)
        expected = 0.0 if math.isnan(expected) else float(expected)  # a mean over no type of entity
        assert compute_metric(name, "tags", found) == pytest.approx(expected, abs=1e-12)
    assert entity_types(TAGS) == ("GEO-POL", "LOC", "PER")


@pytest.mark.slow
@given(st.lists(st.sampled_from(["O", "B", "I"]), max_size=12))
def test_tags_without_a_type_are_those_of_seqeval(seqeval, tags):
    _, get_entities = seqeval
    assert find_entities(tags) == {("", first, last) for _, first, last in get_entities(tags)}
