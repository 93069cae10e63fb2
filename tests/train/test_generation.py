"""Greedy answers against a loop over whole forward passes, and the scores of answers by hand."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from peerlora.data.batches import collate
from peerlora.data.dataset import UNLEARNED, Dataset
from peerlora.runtime.compose import compose
from peerlora.train.generation import (
    drawn_rows,
    exact_match,
    greedy_answers,
    ignores_left_padding,
    last_answer,
    room_behind,
    rouge_l,
    whole_answers,
)


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("police kill the gunman", "police killed the gunman", 0.75),  # Lin 2004, section 3.1: 3 of 4 words in order
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("a b c d", "a c", 2 * 2 / 6),
        ("Yes, indeed!", "yes indeed", 1.0),
        ("größer als", "größer als vier", 2 * 2 / 5),
        ("", "a", 0.0),
        ("a", "", 0.0),
        ("b a", "a b", 0.5),
        ("a x b y c", "a b c", 2 * 3 / 8),
    ],
)
def test_rouge_l_is_f1_of_the_longest_common_subsequence(answer, expected, score):
    assert rouge_l(answer, expected) == pytest.approx(score)
    assert rouge_l(expected, answer) == pytest.approx(score)


def test_exact_match_looks_at_letters_but_not_at_white_space_around_them():
    assert [exact_match(*pair) for pair in [(" a b\n", "a b"), ("a b", "A b"), ("a", "a b")]] == [1.0, 0.0, 0.0]


def test_the_last_answer_and_what_stands_before_it():
    ids = np.arange(10, 22, dtype=np.int32)
    learned = [0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1]
    targets = np.where(learned, ids, UNLEARNED).astype(np.int32)
    rows = Dataset(ids, np.array([0, 8, 12]), None, np.zeros(2, np.int64), (), targets=targets)
    assert [part.tolist() for part in last_answer(rows, 0)] == [[10, 11, 12, 13, 14], [15, 16]]
    assert [part.tolist() for part in last_answer(rows, 1)] == [[18], [19, 20, 21]]


@pytest.mark.parametrize(
    ("ids", "learned", "is_whole"),
    [
        ([5, 6, 7, 8, 9, 2], [0, 0, 0, 1, 1, 1], True),  # the answer ends with an end of turn
        ([5, 6, 7, 8, 2, 4], [0, 0, 0, 1, 1, 0], True),
        ([5, 6, 7, 8, 9, 9], [0, 0, 0, 1, 1, 1], False),
        ([5, 6, 7, 2, 4, 9], [0, 0, 1, 1, 0, 1], False),
        ([5, 6, 7, 8, 2, 4], [0, 1, 1, 1, 1, 0], False),  # its beginning was cut off
        ([5, 6, 7, 8, 9], [0, 0, 0, 1, 1], True),  # shorter than the limit, so nothing was cut
    ],
)
def test_answers_that_were_cut_are_found(ids, learned, is_whole):
    row = np.array(ids, dtype=np.int32)
    targets = np.where(learned, row, UNLEARNED).astype(np.int32)
    data = Dataset(row, np.array([0, len(ids)]), None, np.zeros(1, np.int64), (), targets=targets)
    assert whole_answers(data, 6, [2, 3]).tolist() == ([0] if is_whole else [])


def test_only_given_rows_are_drawn():
    assert drawn_rows(np.array([2, 5, 9]), 8, 0) == [2, 5, 9]
    assert set(drawn_rows(np.arange(10, 40), 5, 0)) < set(range(10, 40))


@pytest.fixture
def federation(config, chats):
    words = ["task.kind=chat", f"data.train=jsonl:{chats}", "data.label=null", "data.max_length=32"]
    made = compose(config("llama", *words))
    made.start.flat.normal_(generator=torch.Generator().manual_seed(3))
    return made


def by_whole_passes(model, x, prompt, most, ends):
    """The likeliest next token, again and again, each from a forward pass of all tokens."""
    written = []
    model.bind_adapters(x)
    while len(written) < most:
        ids = torch.tensor([[*prompt.tolist(), *written]])
        with torch.no_grad():
            token = int(model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
    return written


def test_greedy_answers_are_the_likeliest_tokens_one_by_one(federation):
    data, model = federation.eval_data, federation.model
    prompts = [last_answer(data, row)[0] for row in range(len(data))]
    assert len({len(prompt) for prompt in prompts}) > 1  # so that some are padded
    for client in (0, 2):
        x = federation.start.rows([client])
        free = [by_whole_passes(model, x, prompt, 6, ()) for prompt in prompts]
        end = free[0][3]  # a token that some answers write before they are cut
        for ends in ([], [end]):
            expected = [by_whole_passes(model, x, prompt, 6, ends) for prompt in prompts]
            assert greedy_answers(model, x, prompts, 6, 0, ends or [10_000]) == expected
        assert len({len(own) for own in expected}) > 1


def test_prompts_beyond_one_batch_are_answered_in_their_order(federation, monkeypatch):
    x, data = federation.start.rows([1]), federation.eval_data
    prompts = [last_answer(data, row)[0] for row in range(len(data))]
    together = greedy_answers(federation.model, x, prompts, 3, 0, [2])
    monkeypatch.setattr("peerlora.train.generation._PROMPTS", 1)
    assert greedy_answers(federation.model, x, prompts, 3, 0, [2]) == together


def test_only_learned_tokens_count_in_losses(federation):
    """A chat's loss is the mean surprise of its answers' tokens, whatever its questions' logits are."""
    data, task = federation.train_data, federation.learner.task
    batch = collate(data, [np.array([0, 1]), np.array([2])], 0, torch.float64)
    logits = torch.randn(4, batch.inputs["input_ids"].shape[1], 44, dtype=torch.float64)
    found = task.losses(logits, batch)
    for client, rows in enumerate([[0, 1], [2]]):
        total, count = 0.0, 0
        for row, number in enumerate(rows):
            ids, targets = (part[data.starts[number] : data.starts[number + 1]] for part in (data.ids, data.targets))
            for place in np.flatnonzero(targets != UNLEARNED):
                total -= float(logits[2 * client + row, place - 1].log_softmax(0)[ids[place]])
                count += 1
        assert float(found[client]) == pytest.approx(total / count, abs=1e-12)
    unlearned = batch.targets[:, 1:] == UNLEARNED
    logits[:, :-1][unlearned] += 5 * torch.randn_like(logits[:, :-1][unlearned])
    assert torch.equal(task.losses(logits, batch), found)


def test_batches_of_prompts_hold_a_bounded_number_of_tokens(federation, monkeypatch):
    x, data = federation.start.rows([1]), federation.eval_data
    prompts, widths = [last_answer(data, row)[0] for row in range(len(data))], []
    together = greedy_answers(federation.model, x, prompts, 3, 0, [2])
    generate = federation.model.base.generate

    def watched(input_ids, **words):
        widths.append(input_ids.shape)
        return generate(input_ids=input_ids, **words)

    monkeypatch.setattr(federation.model.base, "generate", watched)
    longest = max(map(len, prompts))
    monkeypatch.setattr("peerlora.train.generation._TOKENS", 2 * (longest + 3))
    assert greedy_answers(federation.model, x, prompts, 3, 0, [2]) == together
    assert max(rows for rows, _ in widths) == 2 and sum(rows for rows, _ in widths) == len(prompts)


def test_a_decoder_that_counts_columns_answers_prompts_one_by_one():
    """Its next token is another where padding stands before the prompt."""

    def forward(inputs, counts_columns):
        places = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
        places = places if counts_columns else inputs["position_ids"]
        return torch.nn.functional.one_hot(places + inputs["input_ids"], 30).double()

    for counts_columns in (True, False):
        found = ignores_left_padding(lambda inputs: forward(inputs, counts_columns), np.array([4, 5, 6]), 0)  # noqa: B023
        assert found != counts_columns


@pytest.mark.parametrize(("dtype", "ignores"), [(torch.bfloat16, True), (torch.float32, False)])
def test_padding_is_ignored_within_the_rounding_of_the_logits(dtype, ignores):
    """A hundredth is a rounding of bf16, whose batches are not answered one by one for it."""

    def forward(inputs):
        rows = len(inputs["input_ids"])
        return torch.full((rows, 1, 5), 1.0 + 0.01 * (rows > 1)).to(dtype)

    assert ignores_left_padding(forward, np.array([4, 5]), 0) == ignores


def test_prompts_that_nearly_fill_a_model_are_looked_at_and_answered(config, chats, tmp_path, write_tokenizer):
    """GPT-2 has learned places, 32 here: a longer row than its longest prompt is an error."""
    sizes = dict(vocab_size=write_tokenizer(tmp_path), n_embd=16, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path)
    words = ["task.kind=chat", f"data.train=jsonl:{chats}", "data.label=null", "data.max_length=32"]
    made = compose(config("gpt2", *words, f"model.source={tmp_path}"))
    x, model = made.start.rows([0]), made.model
    prompts = [np.arange(4, 4 + length) for length in (31, 30, 29)]
    expected = [by_whole_passes(model, x, prompt, 1, ()) for prompt in prompts]
    assert greedy_answers(model, x, prompts, 1, 0, [10_000]) == expected


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_no_row_is_longer_than_a_prompt_that_is_looked_at(length):
    """But for a prompt of one token, behind which a model that answers has room for another."""
    widths = []

    def forward(inputs):
        widths.append(inputs["input_ids"].shape[1])
        return torch.cumsum(inputs["attention_mask"], 1)[..., None].double()

    assert ignores_left_padding(forward, np.arange(4, 4 + length), 0)
    assert widths[1] == max(2, length) and 1 <= widths[0] < widths[1]


def test_room_is_what_a_model_reads_behind_a_prompt():
    assert [room_behind(30, 8, None), room_behind(30, 8, 40), room_behind(35, 8, 40), room_behind(40, 8, 40)] == [
        8,
        8,
        5,
        0,
    ]
