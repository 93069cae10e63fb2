"""Evaluations hold the outcomes of some clients at a time, and give what they give of all at once, bit for bit."""

import numpy as np
import pytest
from test_learner import noisy

from peerlora.runtime.compose import compose
from peerlora.train import client_outcomes
from peerlora.train import learner as learner_module
from peerlora.train.base import Scores
from peerlora.train.client_outcomes import graphs_of_part, parts_of_clients
from peerlora.train.graph_size import GraphSize


def evaluate_in_parts(monkeypatch, federation, x, numbers, metrics):
    """Scores of a model whose evaluations hold at most so many numbers, and how many clients each part has."""
    parts, scores_of = [], client_outcomes.scores_of

    def count(task, data, clients, *more):
        parts.append(clients)
        return scores_of(task, data, clients, *more)

    monkeypatch.setattr(client_outcomes, "_HELD", numbers)
    monkeypatch.setattr(learner_module, "scores_of", count)
    return federation.learner.evaluate(x, federation.eval_data, 4, metrics), parts


@pytest.mark.parametrize("tokens", [1, 90, 140, 100_000])
@pytest.mark.parametrize("most", [1, 3, 4, 6])
def test_clients_are_evaluated_in_parts_to_the_same_scores(config, monkeypatch, tokens, most):
    federation = compose(config("bert", "clients=7", "data.holdout=0.3"))
    x, rows = noisy(federation.start, 0.5), len(federation.eval_data)
    monkeypatch.setattr(learner_module, "_EVALUATED", tokens)
    federation.learner.graph = GraphSize(1, padded=True)
    metrics = ("auroc", "macro-f1")
    whole, one = evaluate_in_parts(monkeypatch, federation, x, 1 << 27, metrics)
    width = 2 + len(federation.eval_data.names)  # with margins
    found, parts = evaluate_in_parts(monkeypatch, federation, x, most * rows * width, metrics)
    assert one == [7] and len(parts) > 1 and max(parts) <= most and sum(parts) == 7
    sizes = {size for _, size in federation.learner._evaluated(federation.eval_data, 4, 7)}
    same = np.array_equal if max(sizes) <= most else np.allclose  # a graph of more clients than may be held is cut
    assert same(found.loss, whole.loss) and same(found.metric, whole.metric) and found.unknown is None
    assert all(same(found.metrics[name], whole.metrics[name]) for name in metrics)


def test_labels_are_counted_part_by_part(config, tagged, monkeypatch):
    words = ("task.kind=token-classification", f"data.train={tagged}", "data.label=null", "partition=iid")
    federation = compose(config("bert", *words, "data.holdout=0.3"))
    x = noisy(federation.start, 0.5)
    whole, _ = evaluate_in_parts(monkeypatch, federation, x, 1 << 27, ())
    found, parts = evaluate_in_parts(monkeypatch, federation, x, 1, ())
    assert parts == [1] * 4 and np.array_equal(found.counts, whole.counts)


def test_parts_take_the_clients_of_every_graph_once():
    graphs = [(np.arange(2), size) for size in (2, 3, 5)]
    parts = parts_of_clients(17, graphs, 7)
    assert [len(part) for part in parts] == [5, 5, 5, 2]
    for _, size in graphs:
        found = []
        for part in parts:
            for start, held, own in graphs_of_part(part, size):
                assert start % size == 0 and held.stop - held.start == own.stop - own.start
                assert start + own.start == part.start + held.start
                found += range(start + own.start, start + own.stop)
        assert found == list(range(17))


def test_scores_are_joined_with_what_is_unknown_of_some():
    known, other = (Scores(np.ones(1), np.ones(1), 3, unknown=each) for each in (None, np.ones(1, bool)))
    assert Scores.join([known, known]).unknown is None
    assert Scores.join([known, other]).unknown.tolist() == [False, True]
