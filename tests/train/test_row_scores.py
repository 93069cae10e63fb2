"""Scores of rows, ranks, and the weights that follow."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerlora.data.batches import collate
from peerlora.runtime.compose import compose
from peerlora.train.base import LocalPlan
from peerlora.train.loss_rules import weigh_rows
from peerlora.train.row_scores import energy, measure, ranks, row_weights
from peerlora.train.tasks import task

nan = float("nan")
SCORES = st.lists(st.floats(-50, 50), min_size=1, max_size=12)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_energy_moves_with_a_shift_and_ranks_do_not():
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature in (0.5, 1.0, 3.0):
        shifted = energy(logits + 7, temperature)
        assert torch.allclose(shifted, energy(logits, temperature) - 7)
        assert torch.equal(ranks(shifted[None]), ranks(energy(logits, temperature)[None]))
    assert float(energy(double([0.0, 0.0]))) == pytest.approx(-np.log(2))


def test_other_scores_by_hand():
    logits = double([0.0, 0.0], [100.0, 0.0]).log_softmax(1)
    assert measure("max-softmax", task("classification"))(logits, None).tolist() == pytest.approx([0.5, 0])
    assert measure("entropy", task("classification"))(logits, None).tolist() == pytest.approx([np.log(2), 0])


def test_ranks_by_hand():
    found = ranks(double([3.0, 1.0, 2.0, nan], [5.0, 5.0, nan, nan]))
    assert found[0, :3].tolist() == pytest.approx([5 / 6, 1 / 6, 3 / 6]) and found[1, :2].tolist() == [0.5, 0.5]
    assert found.isnan().sum() == 3


@given(SCORES, st.floats(0, 5), st.floats(0, 1), st.floats(0.01, 2), st.booleans())
def test_weights_grow_with_the_score_and_stay_within_bounds(scores, alpha, q, tau, hard):
    values = torch.tensor(scores, dtype=torch.float64)
    v = row_weights(values[None], alpha, q, tau, hard)[0]
    assert bool((v[values.argsort()].diff() >= -1e-12).all()) and bool(((v >= 1) & (v <= 1 + alpha)).all())
    if alpha == 0 or len(set(scores)) == 1:
        assert bool((v == v[0]).all())


def test_the_hard_rule_lifts_the_upper_ranks():
    v = row_weights(double([4.0, 3.0, 2.0, 1.0]), 2.0, 0.5, 1.0, True)
    assert v[0].tolist() == [3, 3, 1, 1]


def test_weights_of_a_batch_are_shares_of_its_mean(config):
    federation = compose(config("bert", "train.batch=[1, 3, 4, 2]"))
    shards = federation.learner.shards
    values = torch.rand(4, max(map(len, shards.shards)), generator=torch.Generator().manual_seed(0)).double() + 1
    rows = [shards.rows(i, 0, 1)[0] for i in (1, 3)]
    batch = collate(shards.data, rows, 0, torch.float64)
    found = weigh_rows(batch, values, shards, [1, 3])
    for place, (i, own) in enumerate(zip((1, 3), rows, strict=True)):
        v = torch.stack([values[i, list(shards.shards[i]).index(row)] for row in own])
        expected = v / v.mean() / len(own)
        assert torch.allclose(found.weights[place, : len(own)], expected)
        assert not found.weights[place, len(own) :].any() and float(found.weights[place].sum()) == pytest.approx(1)


TASK_WORDS = {
    "classification": [],
    "regression": ["task.kind=regression", "data.label=score"],
    "causal-lm": ["task.kind=causal-lm", "data.label=null"],
}


@pytest.mark.parametrize(("kind", "task"), [("bert", "classification"), ("bert", "regression"), ("llama", "causal-lm")])
@pytest.mark.parametrize("batch", [3, 64])
def test_every_row_is_scored_by_its_own_client(config, kind, task, batch):
    words = ["partition.kind=quantity", "partition.sizes=[1, 5, 2, 9]", *TASK_WORDS[task]]
    federation = compose(config(kind, *words))
    learner, x = federation.learner, federation.start
    x = type(x)(x.spec, x.flat + 0.1 * torch.arange(4)[:, None], x.ranks)
    found = learner.score(x, measure("nll", learner.task), batch)
    assert found.isnan().sum(1).tolist() == [
        max(map(len, learner.shards.shards)) - len(s) for s in learner.shards.shards
    ]
    for i, shard in enumerate(learner.shards.shards):
        for place in (0, len(shard) - 1):
            row = collate(learner.shards.data, [shard[place : place + 1]], 0, torch.float64)
            federation.model.bind_adapters(x.rows([i]))
            with torch.no_grad():
                loss = learner.task.losses(federation.model(row.inputs), row)
            assert float(found[i, place]) == pytest.approx(float(loss), rel=1e-9)


@pytest.mark.parametrize(("kind", "task"), [("bert", "classification"), ("bert", "regression"), ("llama", "causal-lm")])
def test_a_row_that_alone_counts_is_the_whole_loss(config, kind, task):
    federation = compose(config(kind, *TASK_WORDS[task], "train.local_steps=1", "train.batch=4"))
    learner, x = federation.learner, federation.start
    values = torch.full((4, 60), 1e-12, dtype=torch.float64)
    chosen = []
    for i, shard in enumerate(learner.shards.shards):
        row = learner.shards.rows(i, 0, 1)[0][2]
        values[i, list(shard).index(row)] = 1.0
        chosen.append(row)
    with learner.round(0) as trained:
        learner.fit(x, LocalPlan("B", row_weights=values))
    scores = learner.score(x, measure("nll", learner.task))
    for i, (shard, row) in enumerate(zip(learner.shards.shards, chosen, strict=True)):
        assert float(trained.losses[i]) == pytest.approx(float(scores[i, list(shard).index(row)]), rel=1e-6)


def test_equal_row_weights_are_the_plain_loss(config):
    federation = compose(config("bert"))
    plain = federation.learner.fit(federation.start, "AB").flat
    even = federation.learner.fit(
        federation.start, LocalPlan("AB", row_weights=torch.full((4, 60), 1.7, dtype=torch.float64))
    ).flat
    assert float((plain - even).abs().max()) < 1e-10
    assert torch.equal(federation.learner.fit(federation.start, "AB").flat, plain), "it lasts for one fit"
