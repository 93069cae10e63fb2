"""``peerlora init``: what it guesses from a file, and that its config can be used as it is."""

import json

import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
from peerlora.config.template import template_lines
from peerlora.data.guess import METHOD, Guess, guess_columns, template_config, write_template
from peerlora.errors import ConfigError, DataError

WORDS = ["one two three", "four five six seven", "eight nine", "ten eleven twelve"]
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
    ],
)
def test_text_label_and_kind_are_guessed(columns, expected):
    assert facts(guess(**columns)) == expected


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
    config = template_config("csv:rows.csv", Guess(["text"], label, kind, 32, 4))
    lines = list(template_lines(config, "head", METHOD))
    tree = yaml.safe_load("\n".join(lines))
    assert list(tree) == list(RunConfig.model_fields)
    for name, section in config:
        if isinstance(section, BaseModel):
            assert set(tree[name]) == set(section.model_dump())
    assert all("  # " in line for line in lines[1:] if line and not line.endswith(":"))
    assert load_config(tree) == config
    assert config.task.kind == kind and config.data.label == label


@settings(max_examples=60, deadline=None)
@given(name=st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_column_name_survives_the_yaml(name):
    lines = template_lines(template_config(f"csv:{name}", Guess([name], name, "classification", 16, 2)), name, METHOD)
    config = load_config(yaml.safe_load("\n".join(lines)))
    assert (config.data.text, config.data.label, config.data.train) == ([name], name, f"csv:{name}")


def test_written_config_loads_and_the_file_is_never_overwritten(texts, tmp_path):
    to = tmp_path / "new" / "peerlora.yaml"
    found = write_template(f"jsonl:{texts}", to)
    assert facts(found) == (["text"], "label", "classification")
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
    assert told["kind"] == "classification"
    small = ["train.rounds=1", "train.local_steps=1", "threads=1", f"model.source={models('bert')}"]
    answer = cli("train", to, *small, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    answer = cli("init", "--train", f"jsonl:{texts}", "--to", to)
    assert answer.code == 2 and "exists already" in answer.err
