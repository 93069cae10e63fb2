import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerlora.config.sections import (
    ColumnPartition,
    DirichletPartition,
    IidPartition,
    QuantityPartition,
    SharesPartition,
)
from peerlora.data.dataset import Dataset
from peerlora.data.partition import _apportion, partition
from peerlora.errors import ConfigError, DataError

IID = IidPartition(kind="iid")


def rows(labels, names=None, **columns) -> Dataset:
    """One token per row."""
    labels = np.asarray(labels)
    return Dataset(
        ids=np.zeros(len(labels), dtype=np.int32),
        starts=np.arange(len(labels) + 1),
        types=None,
        labels=labels,
        names=tuple("xyz"[: labels.max() + 1]) if names is None else names,
        columns={name: np.array(values) for name, values in columns.items()},
    )


def without_classes(count: int) -> Dataset:
    return rows(np.zeros(count, dtype=np.float32), names=())


def dirichlet(concentration):
    return DirichletPartition(kind="dirichlet", concentration=concentration)


def shares(shares, counts):
    return SharesPartition(kind="shares", shares=shares, counts=counts)


def sizes_of(found):
    return [len(shard) for shard in found.shards]


# What must hold for every kind

CONCENTRATIONS = st.sampled_from([1e-3, 0.1, 1.0, 1e4])
WHOLE = st.one_of(
    st.just(IID),
    CONCENTRATIONS.map(dirichlet),
    CONCENTRATIONS.map(lambda concentration: QuantityPartition(kind="quantity", concentration=concentration)),
    st.just(ColumnPartition(kind="column", column="site")),
)


@settings(max_examples=60)
@given(kind=WHOLE, clients=st.integers(1, 9), extra=st.integers(0, 40), seed=st.integers(0, 2**40))
def test_shards_are_disjoint_and_together_everything_and_nobody_is_empty(kind, clients, extra, seed):
    count = clients + extra
    labels = np.random.default_rng(seed).integers(0, 3, count)
    data = rows(labels, names=("x", "y", "z"), site=np.arange(count) % max(clients, count // 2))
    found = partition(kind, data, clients, seed)
    assert len(found.shards) == clients and min(sizes_of(found)) >= 1
    assert sorted(np.concatenate(found.shards)) == list(range(count))
    for shard, counts in zip(found.shards, found.counts, strict=True):
        assert shard.dtype == np.int64 and (np.diff(shard) > 0).all()
        assert counts.tolist() == [int((labels[shard] == label).sum()) for label in range(3)]
    again = partition(kind, data, clients, seed)
    assert all(np.array_equal(one, other) for one, other in zip(found.shards, again.shards, strict=True))


@pytest.mark.parametrize("kind", [IID, dirichlet(1.0), QuantityPartition(kind="quantity"), shares([[0.5, 0.5]], [4])])
def test_another_seed_is_another_partition(kind):
    data = rows([0, 1] * 50)
    one, other = (partition(kind, data, 4, seed) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(one.shards, other.shards, strict=True))


# Each kind by hand


def test_iid_sizes_differ_by_at_most_one():
    assert sorted(sizes_of(partition(IID, rows([0, 1] * 7), 4, 0))) == [3, 3, 4, 4]


def test_iid_without_classes_counts_rows():
    found = partition(IID, without_classes(6), 3, 0)
    assert found.counts.tolist() == [[2], [2], [2]] and found.names == () and found.warnings == ()
    assert found.report()["names"] == ["rows"] and found.report()["counts"][0] == [2]


def test_concentration_sets_the_label_skew():
    data = rows([0, 1] * 500)
    even = partition(dirichlet(1e6), data, 5, 0).counts
    assert abs(even - 100).max() <= 1
    skewed = partition(dirichlet(0.05), data, 5, 0).counts
    assert skewed.max() > 300


def test_clients_that_no_draw_serves_get_a_row_of_the_richest():
    found = partition(dirichlet(1e-3), rows([0, 1] * 6), 10, 0)
    assert sum(sizes_of(found)) == 12 and max(sizes_of(found)) <= 3
    assert min(sizes_of(found)) == 1


def test_quantity_by_explicit_sizes():
    found = partition(QuantityPartition(kind="quantity", sizes=[1, 2, 5]), without_classes(16), 3, 0)
    assert sizes_of(found) == [2, 4, 10]
    # A size that rounds to nothing still gets one row.
    assert sizes_of(partition(QuantityPartition(kind="quantity", sizes=[1e-6, 1]), without_classes(5), 2, 0)) == [1, 4]


def test_shares_by_hand():
    found = partition(shares([[0.75, 0.25], [0.25, 0.75]], [1, 2]), rows([0] * 10 + [1] * 14), 3, 0)
    # m <= 10 / 1.25 = 8 for x and m <= 14 / 1.75 = 8 for y
    assert found.counts.tolist() == [[6, 2], [2, 6], [2, 6]]
    assert found.warnings == ()


def test_shares_leave_rows_over_and_say_so():
    found = partition(shares([[0.5, 0.5]], [2]), rows([0] * 10 + [1] * 4), 2, 0)
    assert found.counts.tolist() == [[2, 2], [2, 2]]
    assert found.warnings == ("6 of 14 training rows belong to no client",)


def test_shares_never_draw_a_row_twice_however_they_round():
    # m = 3 fits by the real numbers (1.5 of x each), but rounds to 2 + 2 > 3 of x; so m = 2.
    found = partition(shares([[0.5, 0.5]], [2]), rows([0] * 3 + [1] * 3), 2, 0)
    assert found.counts.tolist() == [[1, 1], [1, 1]]


@settings(max_examples=60)
@given(
    weights=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any), min_size=1, max_size=3),
    have=st.lists(st.integers(20, 60), min_size=3, max_size=3),
    data=st.data(),
)
def test_shares_give_equal_sizes_and_disjoint_rows(weights, have, data):
    counts = data.draw(st.lists(st.integers(1, 4), min_size=len(weights), max_size=len(weights)))
    table = [[weight / sum(row) for weight in row] for row in weights]
    found = partition(shares(table, counts), rows(np.repeat([0, 1, 2], have)), sum(counts), 0)
    assert len(set(sizes_of(found))) == 1 and min(sizes_of(found)) >= 1
    assert len(np.unique(np.concatenate(found.shards))) == sum(sizes_of(found))
    wanted = np.repeat(table, counts, axis=0) * sizes_of(found)[0]
    assert (abs(found.counts - wanted) < 1 + 1e-6).all()


def test_column_gives_each_value_to_one_client():
    data = rows([0, 1, 0, 1, 0], site=["p", "q", "p", "r", "r"])
    found = partition(ColumnPartition(kind="column", column="site"), data, 3, 0)
    assert [shard.tolist() for shard in found.shards] == [[0, 2], [1], [3, 4]]


def test_column_deals_many_values_round_by_size():
    data = rows([0, 1] * 5, site=["a"] * 1 + ["b"] * 4 + ["c"] * 3 + ["d"] * 2)
    found = partition(ColumnPartition(kind="column", column="site"), data, 2, 0)
    # b, d to client 0 and c, a to client 1
    assert [shard.tolist() for shard in found.shards] == [[1, 2, 3, 4, 8, 9], [0, 5, 6, 7]]


def test_clients_with_one_label_are_named():
    data = rows([0, 1, 0, 1, 1], site=["p", "p", "q", "r", "r"])
    found = partition(ColumnPartition(kind="column", column="site"), data, 3, 0)
    assert found.warnings == (
        "client 1 holds only one label: 'x' (1 rows)",
        "client 2 holds only one label: 'y' (2 rows)",
    )
    report = found.report()
    assert json.loads(json.dumps(report)) == report
    assert report["names"] == ["x", "y"] and report["counts"][2] == [0, 2]


@settings(max_examples=100)
@given(weights=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), total=st.integers(0, 200))
def test_apportioned_numbers_add_up_and_are_near(weights, total):
    exact = np.array(weights) / sum(weights)
    sizes = _apportion(exact, total)
    assert sizes.sum() == total and (abs(sizes - exact * total) < 1 + 1e-6).all() and (sizes >= 0).all()


# Mistakes


@pytest.mark.parametrize(
    ("kind", "data", "clients", "error", "words"),
    [
        (IID, rows([0, 1]), 3, DataError, "2 training rows for 3 clients"),
        (dirichlet(0.5), without_classes(9), 3, DataError, "partition.kind=dirichlet .* task.kind=classification"),
        (shares([[1.0]], [3]), without_classes(9), 3, DataError, "partition.kind=shares .* task.kind=classification"),
        (shares([[0.5, 0.5]], [2]), rows([0, 1, 2]), 2, DataError, r"2 numbers per row, the data have 3 labels"),
        (shares([[0.5, 0.5]], [2]), rows([0, 1, 1]), 3, ConfigError, "add up to 2, clients is 3"),
        (shares([[0.5, 0.5]], [3]), rows([0, 1, 1, 1, 1]), 3, DataError, "more of label 'x' than its 1 rows"),
        (
            QuantityPartition(kind="quantity", sizes=[1, 2]),
            rows([0, 1, 1]),
            3,
            ConfigError,
            "lists 2 sizes for 3 clients",
        ),
        (
            ColumnPartition(kind="column", column="sight"),
            rows([0, 1], site=["a", "b"]),
            2,
            DataError,
            "did you mean 'site'",
        ),
        (
            ColumnPartition(kind="column", column="site"),
            rows([0, 1], site=["a", "a"]),
            2,
            DataError,
            "has 1 values for 2 clients; use at most 1 clients",
        ),
    ],
)
def test_mistakes_say_what_to_do(kind, data, clients, error, words):
    with pytest.raises(error, match=words):
        partition(kind, data, clients, 0)


# Partitioners of flwr-datasets


def test_a_flwr_iid_partitioner():
    from flwr_datasets.partitioner import IidPartitioner

    found = partition(IidPartitioner(num_partitions=3), rows([0, 1, 0, 1, 0, 1, 1]), 3, 0)
    assert sizes_of(found) == [3, 2, 2] and sorted(np.concatenate(found.shards)) == list(range(7))


def test_a_flwr_dirichlet_partitioner_sees_the_labels():
    from flwr_datasets.partitioner import DirichletPartitioner

    data = rows([0, 1] * 50)
    partitioner = DirichletPartitioner(4, partition_by="target", alpha=1e6, min_partition_size=1, seed=5)
    found = partition(partitioner, data, 4, 0)
    assert abs(found.counts - 12.5).max() <= 1 and sum(sizes_of(found)) == 100
    assert all((np.diff(shard) > 0).all() for shard in found.shards)


def test_a_flwr_partitioner_can_divide_by_a_kept_column():
    from flwr_datasets.partitioner import NaturalIdPartitioner

    data = rows([0, 1, 0], site=["p", "q", "p"])
    found = partition(NaturalIdPartitioner(partition_by="site"), data, 2, 0)
    assert sorted(shard.tolist() for shard in found.shards) == [[0, 2], [1]]


def flwr_mistakes():
    from flwr_datasets.partitioner import IidPartitioner, Partitioner

    class Chosen(Partitioner):
        """Gives client i the rows ``chosen[i]``."""

        def __init__(self, *chosen):
            super().__init__()
            self.chosen = chosen

        def load_partition(self, partition_id):
            return self.dataset.select(self.chosen[partition_id])

        @property
        def num_partitions(self):
            return len(self.chosen)

    used = IidPartitioner(num_partitions=2)
    partition(used, rows([0, 1]), 2, 0)
    return {
        "another number": (IidPartitioner(num_partitions=3), "makes 3 partitions for 2 clients"),
        "used before": (used, "give it a fresh partitioner"),
        "twice": (Chosen([0, 1], [1, 2]), "gave row 1 to 2 clients"),
        "empty": (Chosen([0, 1], []), "gave client 1 no rows"),
    }


@pytest.mark.parametrize("mistake", ["another number", "used before", "twice", "empty"])
def test_flwr_partitioners_that_do_not_fit_are_refused(mistake):
    partitioner, words = flwr_mistakes()[mistake]
    with pytest.raises(DataError, match=words):
        partition(partitioner, rows([0, 1, 0, 1]), 2, 0)
