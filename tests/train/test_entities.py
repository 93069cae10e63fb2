"""Entities in tags, by hand and by the examples of seqeval and conlleval; losses and F1 of tags."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from peerlora.data.batches import collate
from peerlora.data.dataset import UNLEARNED, Dataset
from peerlora.train.entities import count_entities, entity_types, find_entities
from peerlora.train.metrics import f1
from peerlora.train.tasks import TokenClassification


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ("B-PER I-PER O B-LOC", {("PER", 0, 1), ("LOC", 3, 3)}),  # seqeval's own examples, down to the last but three
        ("O O O B-MISC I-MISC I-MISC O", {("MISC", 3, 5)}),
        ("O O B-MISC I-MISC I-MISC I-MISC O", {("MISC", 2, 5)}),
        ("I-PER I-PER", {("PER", 0, 1)}),
        ("B-PER I-LOC", {("PER", 0, 0), ("LOC", 1, 1)}),
        ("B-PER B-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("O I-PER O", {("PER", 1, 1)}),
        ("B-PER I-PER E-PER S-LOC", {("PER", 0, 2), ("LOC", 3, 3)}),
        ("E-PER E-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("B I O B", {("", 0, 1), ("", 3, 3)}),
        ("DET NOUN NOUN", {("DET", 0, 0), ("NOUN", 1, 1), ("NOUN", 2, 2)}),
        ("O O", set()),
        ("B-a-b I-a-b", {("a-b", 0, 1)}),
    ],
)
def test_entities_of_a_sequence(tags, entities):
    assert find_entities(tags.split()) == entities


def test_types_may_have_a_dash():
    """One with the look of a prefix is a type where no tag begins or goes on."""
    assert find_entities(["B-E-MAIL", "I-E-MAIL", "O", "E-E-MAIL"]) == {("E-MAIL", 0, 1), ("E-MAIL", 3, 3)}
    plain = ("O", "E-MAIL", "MAIL", "S-BAR")
    assert entity_types(plain) == ("E-MAIL", "MAIL", "S-BAR")
    assert entity_types(("O", "B-GEO-POL", "I-GEO-POL", "B-GEO", "I-GEO")) == ("GEO", "GEO-POL")
    counts = count_entities(np.array([1, 1, 2, 0, 3]), np.array([1, 2, 2, 0, 3]), plain).reshape(-1, 3)
    assert counts.tolist() == [[2, 1, 1], [1, 2, 1], [1, 1, 1]]


def test_true_entities_are_found_once_for_all_clients(monkeypatch):
    from peerlora.train import entities

    found = []
    monkeypatch.setattr(entities, "find_entities", lambda tags, *more: found.append(tags) or find_entities(tags, *more))
    entities._entities.cache_clear()
    true = np.array([1, 3, 4])
    several = [count_entities(true, np.array(row), NAMES) for row in ([1, 3, 4], [4, 4, 4], [1, 3, 4], [4, 3, 4])]
    assert len(found) == 3 and [own.reshape(-1, 3)[1].tolist() for own in several] == [
        [1, 1, 1],
        [1, 0, 0],
        [1, 1, 1],
        [1, 1, 0],
    ]


NAMES = ("B-MISC", "B-PER", "I-MISC", "I-PER", "O")
TRUE = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
PREDICTED = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]


def test_f1_of_seqevals_example():
    """In seqeval's readme f1_score(TRUE, PREDICTED) is 0.50, of MISC 0.00 and of PER 1.00."""
    ids = [[[NAMES.index(tag) for tag in row] for row in rows] for rows in (TRUE, PREDICTED)]
    counts = np.stack([count_entities(np.array(t), np.array(p), NAMES) for t, p in zip(*ids, strict=True)])
    by_type = counts.sum(0).reshape(-1, 3)
    assert entity_types(NAMES) == ("MISC", "PER")
    assert [f1(*own) for own in by_type.tolist()] == [0.0, 1.0]
    assert f1(*by_type.sum(0).tolist()) == 0.5
    assert f1(0, 0, 0) == 0.0


@given(st.lists(st.sampled_from(NAMES), max_size=12))
def test_entities_are_runs_that_a_regular_expression_finds(tags):
    """One letter per tag: B or b begins, I or i goes on, of one type each; an I alone begins, too."""
    written = "".join({"B-MISC": "B", "I-MISC": "I", "B-PER": "b", "I-PER": "i", "O": "."}[tag] for tag in tags)
    runs = re.finditer(r"BI*|I+|bi*|i+", written)
    assert find_entities(tags) == {("MISC" if run[0][0] in "BI" else "PER", run.start(), run.end() - 1) for run in runs}


def rows(*tags):
    """A data set whose first and last token of each row have no tag."""
    targets = [[UNLEARNED, *(NAMES.index(tag) for tag in row), UNLEARNED] for row in tags]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in targets])])
    flat = np.array([tag for row in targets for tag in row], dtype=np.int32)
    ids = np.arange(len(flat), dtype=np.int32)
    return Dataset(ids, starts, None, np.zeros(len(tags), np.int64), NAMES, targets=flat)


def test_losses_are_means_over_a_clients_words_and_scores_over_all():
    data, task = rows(*TRUE), TokenClassification()
    batch = collate(data, [np.array([0, 1]), np.array([1])], 0, torch.float64)
    logits = torch.randn(4, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = task.losses(logits, batch)
    for client, (first, last) in enumerate([(0, 2), (2, 3)]):
        own, targets = logits[first:last].flatten(0, 1), batch.targets[first:last].flatten()
        expected = F.cross_entropy(own, targets, ignore_index=UNLEARNED)  # as the library's models take it
        assert float(found[client]) == pytest.approx(float(expected), abs=1e-12)
    both = collate(data, [np.array([0, 1])], 0, torch.float64)
    predicted = torch.zeros(2, 9, 5, dtype=torch.float64)
    for row, tags in enumerate(PREDICTED):
        predicted[row, torch.arange(1, len(tags) + 1), [NAMES.index(tag) for tag in tags]] = 1.0
    outcomes = task.outcomes(predicted, both).numpy()
    assert outcomes.shape == (2, task.outcomes_width(NAMES))
    metric, loss = task.score(outcomes, data.labels)
    assert metric == 0.5
    assert loss == pytest.approx(float(F.cross_entropy(predicted.flatten(0, 1), both.targets.flatten())))


def test_a_client_whose_rows_have_nothing_to_learn_loses_nothing():
    data, task = rows(*TRUE), TokenClassification()
    data.targets[data.starts[1] :] = UNLEARNED
    batch = collate(data, [np.array([0]), np.array([1])], 0, torch.float64)
    logits = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    losses = task.losses(logits, batch)
    losses.sum().backward()
    assert losses[0] > 0 and losses[1] == 0 and not logits.grad[1].any() and logits.grad[0].any()
