"""Rows that every client sets aside of its own."""

import numpy as np
import pytest

from peerlora.config.sections import DirichletPartition
from peerlora.data.dataset import Dataset
from peerlora.data.holdout import set_aside_own
from peerlora.data.partition import count_labels, partition
from peerlora.runtime.compose import compose

LABELS = np.random.default_rng(0).integers(0, 3, 300)
TRAIN = Dataset(np.zeros(300, np.int32), np.arange(301), None, LABELS, ("a", "b", "c"))


def divided(seed=0, clients=5):
    return partition(DirichletPartition(kind="dirichlet", concentration=0.3), TRAIN, clients, seed)


def test_each_client_keeps_the_rest_in_order_and_its_proportions():
    whole = divided()
    left, held = set_aside_own(whole, TRAIN, 0.25, 7, range(5))
    for shard, kept, own in zip(whole.shards, left.shards, held, strict=True):
        assert np.array_equal(np.sort(np.concatenate([kept, own])), shard)
        assert np.array_equal(kept, np.sort(kept)) and len(own)
        there, aside = count_labels(TRAIN, shard), count_labels(TRAIN, own)
        assert [int(n) for n in aside] == [min(round(0.25 * n), n - 1) if n else 0 for n in there]
    assert np.array_equal(left.counts, np.stack([count_labels(TRAIN, kept) for kept in left.shards]))


def test_what_a_client_draws_depends_on_its_number_and_the_seed_alone():
    whole = divided()
    _, held = set_aside_own(whole, TRAIN, 0.25, 7, range(5))
    alone = type(whole)((whole.shards[3],), whole.names, whole.counts[[3]], ())
    assert np.array_equal(set_aside_own(alone, TRAIN, 0.25, 7, [3])[1][0], held[3])
    assert not np.array_equal(set_aside_own(alone, TRAIN, 0.25, 8, [3])[1][0], held[3])
    assert not np.array_equal(set_aside_own(alone, TRAIN, 0.25, 7, [2])[1][0], held[3])


def test_a_client_with_one_row_of_each_class_keeps_them_and_is_named():
    few = [np.array([int(np.flatnonzero(LABELS == label)[0]) for label in range(3)]), np.arange(100, 160)]
    whole = type(divided())(tuple(map(np.sort, few)), TRAIN.names, np.zeros((2, 3), np.int64), ("before",))
    left, held = set_aside_own(whole, TRAIN, 0.1, 0, [4, 9])
    assert len(held[0]) == 0 and len(left.shards[0]) == 3 and len(held[1]) > 0
    told = "too few rows to set any aside (eval.own), so no personalised score: clients 4"
    assert left.warnings == ("before", told)


def test_nobody_trains_on_them_and_without_the_setting_all_is_as_before(config):
    plain, own = compose(config("bert")), compose(config("bert", "eval.own=true", "data.holdout=0.2"))
    assert plain.own_rows == ()
    for client, rows in enumerate(own.own_rows):
        drawn = np.concatenate([np.concatenate(own.learner.shards.rows(client, t, 20)) for t in range(5)])
        assert len(rows) and not set(rows) & set(drawn)
        assert set(drawn) == set(own.partition.shards[client])


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_at_least_one_row_is_set_aside_and_one_of_each_class_is_kept(share):
    left, held = set_aside_own(divided(), TRAIN, share, 0, range(5))
    assert all(len(rows) for rows in held)
    assert np.array_equal(left.counts > 0, divided().counts > 0)
