"""Prompts with completions for encoder-decoders: tokens, cuts, bad rows, batches."""

import json
import logging

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from peerlora.config.loading import load_config
from peerlora.data.batches import collate
from peerlora.data.dataset import UNLEARNED
from peerlora.data.sources import load_datasets
from peerlora.errors import ConfigError, DataError
from peerlora.lora.base_models import load_tokenizer

CLS, SEP, FIRST = 1, 2, 4  # [CLS], [SEP], w0 of the tests' tokenizer


@pytest.fixture
def read(models, tmp_path):
    """A function that writes rows, and reads them as training rows; the last one is held out."""

    def go(rows, *words):
        for name, some in (("train", rows), ("eval", rows[-1:])):
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
        tree = {"model": {"source": models("t5")}, "task": {"kind": "sequence-to-sequence"}}
        tree |= {"data": {"train": f"{tmp_path}/train.jsonl", "eval": f"{tmp_path}/eval.jsonl", "label": None}}
        config = load_config(tree, ["data.max_length=8", *words])
        return load_datasets(config, load_tokenizer(models("t5")), cache=None)[0]

    return go


def owned(values, starts, row):
    return values[starts[row] : starts[row + 1]].tolist()


def test_both_sides_are_tokenised_and_rows_keep_their_own(read):
    rows = [{"prompt": "w1 w2", "completion": "w3"}, {"prompt": "w4", "completion": "w5 w6 w7"}]
    data = read(rows)
    for row, (words, answer) in enumerate([([1, 2], [3]), ([4], [5, 6, 7])]):
        assert owned(data.ids, data.starts, row) == [CLS, *(FIRST + word for word in words), SEP]
        assert owned(data.targets, data.target_starts, row) == [CLS, *(FIRST + word for word in answer), SEP]
    turned = data.take([1, 0, 1])
    assert owned(turned.targets, turned.target_starts, 2) == owned(data.targets, data.target_starts, 1)
    assert turned.all_lengths.tolist() == [3 + 5, 4 + 3, 3 + 5]


def test_a_batch_pads_both_sides_and_tells_them_apart_by_width(read):
    rows = [{"prompt": "w1 w2", "completion": "w3"}, {"prompt": "w4", "completion": "w5 w6"}]
    batch = collate(read(rows), [np.array([0]), np.array([1])], 0, torch.float32)
    assert batch.inputs["input_ids"].shape == (2, 4) and batch.targets.shape == (2, 5)  # not 4 and 4
    assert batch.targets[0].tolist() == [CLS, FIRST + 3, SEP, UNLEARNED, UNLEARNED]
    assert (batch.extents, batch.written) == ([(1, 4), (1, 3)], [3, 4])


def test_what_is_too_long_is_cut_and_counted(read, caplog):
    rows = [{"prompt": "w1 " * 9, "completion": "w2"}, {"prompt": "w1", "completion": "w2 " * 20}]
    with caplog.at_level(logging.WARNING):
        data = read([*rows, {"prompt": "w1", "completion": "w2"}])
    assert (data.lengths.max(), np.diff(data.target_starts).max(), data.targets[-1]) == (8, 8, SEP)
    assert "prompts: 1 of 3 have more than data.max_length=8 tokens; their ends are cut off" in caplog.text
    assert "completions: 1 of 3 have more" in caplog.text


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "", "completion": "a"}, "train.jsonl: row 2: prompt is empty"),
        ({"prompt": "a", "completion": None}, "train.jsonl: row 2: completion is empty"),
    ],
)
def test_bad_rows_are_named(read, row, told):
    with pytest.raises(DataError, match=told):
        read([{"prompt": "w1", "completion": "w2"}, row, {"prompt": "w1", "completion": "w2"}])


def test_numbers_are_no_texts(read):
    with pytest.raises(DataError, match="row 1: completion is a int; expected text"):
        read([{"prompt": "w1", "completion": 3}] * 2)


def test_other_names_need_data_columns(read):
    rows = [{"ask": "w1", "say": "w2"}] * 2
    with pytest.raises(DataError, match="has no columns for task.kind=sequence-to-sequence; expected prompt and compl"):
        read(rows)
    assert len(read(rows, "data.columns={prompt: ask, completion: say}")) == 2
    with pytest.raises(ConfigError, match="data.columns names ask"):
        read(rows, "data.columns={ask: ask}")


@pytest.mark.parametrize(
    ("row", "read_columns"),
    [
        ({"prompt": "w1", "input": "w2", "output": "w3"}, "prompt, output, input"),
        ({"question": "w1", "context": "w2", "answer": "w3"}, "question, answer, context"),
        ({"instruction": "w1", "input": "w2", "output": "w3"}, "input, output, instruction"),
        ({"source": "w1", "System": "w2", "target": "w3"}, "source, target, System"),
    ],
)
def test_rows_that_hold_more_than_a_prompt_are_refused_unless_two_columns_are_named(read, row, read_columns):
    with pytest.raises(DataError, match=f"rows are chats, by {read_columns}; .* name the two in data.columns, or give"):
        read([row] * 2)
    first, _, last = row
    assert len(read([row] * 2, f"data.columns={{prompt: {first}, completion: {last}}}")) == 2


def test_rows_of_which_the_tokenizer_makes_nothing_are_left_out_or_refused(read, monkeypatch, caplog):
    """An answer of no token has no mean loss, and a prompt of none has nothing to attend to."""

    def bare(source):
        from tokenizers import normalizers

        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.backend_tokenizer.post_processor = None
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
        return tokenizer

    monkeypatch.setattr(f"{__name__}.load_tokenizer", bare)
    good = [{"prompt": "w1 w2", "completion": "w3"}, {"prompt": "w4", "completion": "w5"}]
    data = read([good[0], {"prompt": "w1", "completion": "\u200b"}, good[1]])
    assert owned(data.targets, data.target_starts, 1) == [FIRST + 5] and len(data) == 2
    assert "1 of 3 rows have no token to learn, the first is row 2" in caplog.text
    with pytest.raises(DataError, match="1 of 2 rows have fewer than 1 tokens, the first is row 1"):
        read([{"prompt": "\u200b", "completion": "w3"}, good[1]])
