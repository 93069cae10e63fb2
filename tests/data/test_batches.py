from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerlora.data.batches import Shards, collate, in_order_of_length
from peerlora.data.dataset import Dataset

PAD = 99


def dataset(lengths, labels=None, types=True):
    """Row i holds the tokens 10i, 10i + 1, ...; its second half is of token type 1."""
    rows = [[10 * i + k for k in range(length)] for i, length in enumerate(lengths)]
    kinds = [[int(k >= length / 2) for k in range(length)] for length in lengths]
    return Dataset(
        ids=np.array(sum(rows, []), dtype=np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        types=np.array(sum(kinds, []), dtype=np.uint8) if types else None,
        labels=np.arange(len(lengths)) if labels is None else labels,
        names=(),
    )


def rows_of(*clients):
    return [np.array(own) for own in clients]


# --- putting rows together


def test_rows_are_client_major_and_padded_to_the_longest():
    batch = collate(dataset([2, 4, 1, 3]), rows_of([2, 0], [3, 2]), PAD, torch.float64)
    assert batch.inputs["input_ids"].tolist() == [[20, 99, 99], [0, 1, 99], [30, 31, 32], [20, 99, 99]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert batch.labels.tolist() == [2, 0, 3, 2]
    assert batch.weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert batch.extents == [(2, 2), (2, 3)]
    assert {value.dtype for value in batch.inputs.values()} == {torch.int64}


def test_padding_on_the_left_moves_rows_to_the_right():
    batch = collate(dataset([2, 4, 1, 3]), rows_of([2, 0], [3, 2]), PAD, torch.float64, pad_left=True)
    assert batch.inputs["input_ids"].tolist() == [[99, 99, 20], [99, 0, 1], [30, 31, 32], [99, 99, 20]]
    assert batch.inputs["attention_mask"].tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_a_smaller_batch_is_filled_with_its_first_row_at_weight_zero():
    batch = collate(dataset([2, 4, 1]), rows_of([1], [0, 2, 2]), PAD, torch.float32)
    assert batch.inputs["input_ids"][:3, 0].tolist() == [10, 10, 10] and batch.labels.tolist() == [1, 1, 1, 0, 2, 2]
    assert batch.weights.tolist() == [[1, 0, 0], pytest.approx([1 / 3] * 3)]
    assert batch.extents == [(1, 4), (3, 2)]
    assert batch.weights.dtype == torch.float32


def test_without_token_types_none_are_made():
    batch = collate(dataset([2, 3], types=False), rows_of([0, 1]), PAD, torch.float32)
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_real_labels_take_the_runs_precision_and_classes_stay_whole(dtype):
    real = dataset([2, 3], labels=np.array([0.5, 1.5], dtype=np.float32))
    assert collate(real, rows_of([0, 1]), PAD, dtype).labels.dtype == dtype
    assert collate(dataset([2, 3]), rows_of([0, 1]), PAD, dtype).labels.dtype == torch.int64


@settings(max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_every_row_can_be_read_back(lengths, data):
    made = dataset(lengths)
    place = st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4)
    clients = [np.array(own) for own in data.draw(st.lists(place, min_size=1, max_size=4))]
    batch = collate(made, clients, PAD, torch.float64)
    width = max(map(len, clients))
    assert batch.weights.sum(1).tolist() == pytest.approx([1] * len(clients))
    for i, own in enumerate(clients):
        for k, row in enumerate(own):
            ids = batch.inputs["input_ids"][i * width + k]
            inside = batch.inputs["attention_mask"][i * width + k].bool()
            assert ids[inside].tolist() == made.ids[made.starts[row] : made.starts[row + 1]].tolist()
            assert (ids[~inside] == PAD).all() and inside[: lengths[row]].all()
    sizes = torch.tensor([len(own) for own in clients])[:, None]
    assert not batch.weights[torch.arange(width) >= sizes].any()


def test_evaluation_order_holds_every_row_once_from_short_to_long():
    made = dataset([5, 1, 3, 1, 4])
    found = [rows.tolist() for rows in in_order_of_length(made, 2)]
    assert found == [[1, 3], [2, 4], [0]]


# --- the endless stream


def shards(sizes=(7, 5, 3), batches=(2, 2, 2), clients=(0, 1, 2), seed=4):
    held, first = [], 0
    for size in sizes:
        held.append(np.arange(first, first + size) * 10)
        first += size
    return Shards(dataset([1] * first), held, list(batches), list(clients), seed)


def drawn(made, client, rounds, steps):
    return np.concatenate([np.concatenate(made.rows(client, t, steps)) for t in range(rounds)])


@settings(max_examples=40)
@given(size=st.integers(1, 12), batch=st.integers(1, 7), steps=st.integers(1, 4))
def test_every_row_is_seen_once_per_epoch(size, batch, steps):
    made = shards(sizes=(size,), batches=(batch,), clients=(0,))
    stream = drawn(made, 0, 12, steps)
    for start in range(0, len(stream) - size + 1, size):
        assert sorted(stream[start : start + size]) == made.shards[0].tolist()


def test_a_shard_smaller_than_a_batch_goes_round_freshly_shuffled():
    made = shards(sizes=(3,), batches=(30,), clients=(0,))
    (rows,) = made.rows(0, 0, 1)
    epochs = [tuple(rows[start : start + 3]) for start in range(0, 30, 3)]
    assert Counter(rows) == {0: 10, 10: 10, 20: 10}
    assert len(set(epochs)) > 1


def test_batches_have_the_clients_own_size():
    made = shards(batches=(2, 4, 1))
    assert [[len(rows) for rows in made.rows(i, 1, 3)] for i in range(3)] == [[2] * 3, [4] * 3, [1] * 3]


def test_the_stream_depends_on_seed_client_round_and_step_only():
    made = shards()
    later = [made.rows(1, 5, 2), made.rows(2, 0, 2), made.rows(1, 0, 2)]
    again = shards()
    assert [np.array(rows).tolist() for rows in later] == [
        np.array(again.rows(i, t, 2)).tolist() for i, t in ((1, 5), (2, 0), (1, 0))
    ]


def test_a_shard_of_the_clients_draws_as_all_of_them_together():
    whole = shards()
    part = Shards(whole.data, whole.shards[1:], whole.batches[1:], [1, 2], whole.seed)
    for t in range(6):
        for k in (0, 1):
            assert np.array_equal(np.array(part.rows(k, t, 2)), np.array(whole.rows(k + 1, t, 2)))


def test_another_client_or_seed_shuffles_differently():
    sizes = (20, 20)
    made, other = shards(sizes, (20, 20), (0, 1)), shards(sizes, (20, 20), (0, 1), seed=5)
    first, second = (made.rows(i, 0, 1)[0] - 200 * i for i in (0, 1))
    assert sorted(first) == sorted(second) and not np.array_equal(first, second)
    assert not np.array_equal(first, other.rows(0, 0, 1)[0])


def test_another_clients_shard_changes_nothing():
    one, other = shards(), shards(sizes=(7, 5, 9))
    assert np.array_equal(drawn(one, 0, 10, 2), drawn(other, 0, 10, 2))


def test_two_epochs_are_ordered_differently():
    stream = drawn(shards(sizes=(20,), batches=(20,), clients=(0,)), 0, 4, 1).reshape(4, 20)
    assert len({tuple(epoch) for epoch in stream}) == 4
