"""Several labels of a row: what lists become, and what is refused."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peerlora.config.loading import load_config
from peerlora.data.sources import load_datasets
from peerlora.errors import DataError, PeerloraError
from peerlora.lora.base_models import load_tokenizer


def load(models, folder, lists, *words, evaluation=None):
    for name, cells in (("train", lists), ("eval", evaluation or lists)):
        rows = [{"text": f"w{place}", "labels": cell} for place, cell in enumerate(cells)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "text": ["text"]}
    tree = {"model": {"source": models("bert")}, "task": {"kind": "multi-label"}, "partition": "iid"}
    config = load_config(tree | {"data": data | {"label": "labels"}}, words)
    return load_datasets(config, load_tokenizer(models("bert")), None)


def test_lists_become_one_number_per_label(models, tmp_path):
    train, evaluation = load(models, tmp_path, [["b", "a"], [], ["c", "c"]], evaluation=[["c"], ["a"]])
    assert train.names == evaluation.names == ("a", "b", "c")
    assert train.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]] and train.labels.dtype == np.float32
    assert evaluation.labels.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert train.classes == () and train.take([2, 0]).labels.tolist() == [[0, 0, 1], [1, 1, 0]]


def test_whole_numbers_are_places_in_the_given_names(models, tmp_path):
    train, _ = load(models, tmp_path, [[2, 0], [1]], "task.labels=[x, y, z]")
    assert train.names == ("x", "y", "z") and train.labels.tolist() == [[1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize(
    ("lists", "told"),
    [
        ([["a", "b"], "a"], "column labels: row 2 is text ('a'), rows before it are a list"),
        (["a", "b"], "row 1 holds a str; expected a list of labels, [] for none"),
        ([["a", "b"], None], "row 2 holds nothing; expected a list of labels"),
        ([["a", "b"], ["a", ""]], "row 2 has an empty label in its list"),
        ([["a", "b"], ["a", None]], "row 2 has an empty label in its list"),
        ([[], []], "no row has a label"),
        ([["a"], ["a"]], "only one label, 'a'; expected at least 2"),
    ],
)
def test_bad_lists_are_named(models, tmp_path, lists, told):
    with pytest.raises(DataError, match=re.escape(told)):
        load(models, tmp_path, lists)


def test_a_map_is_no_list_of_labels(models, tmp_path):
    cells = pa.array([[("a", 1)], [("b", 2)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"text": ["w1", "w2"], "labels": cells}), tmp_path / "rows.parquet")
    rows = str(tmp_path / "rows.parquet")
    told = r"rows.parquet: holds map<string, int64.*>; expected a list of labels in each row; name another column"
    with pytest.raises(DataError, match=told):
        load(models, tmp_path, [["a"], ["b"]], f"data.train={rows}", f"data.eval={rows}")


def test_a_label_that_training_rows_lack_is_refused(models, tmp_path):
    with pytest.raises(DataError, match="eval.jsonl: row 4, place 3: label 'z' is not among the training labels"):
        load(models, tmp_path, [["a"], ["b"]], evaluation=[["a", "b"], [], ["a"], ["a", "b", "z"], ["z"]])


def test_numbers_are_told_with_row_and_place(models, tmp_path):
    with pytest.raises(DataError, match=re.escape("row 3, place 2: label 3 is out of range; task.labels has 3 names")):
        load(models, tmp_path, [[2, 0], [], [1, 3]], "task.labels=[x, y, z]")
    with pytest.raises(DataError, match=re.escape("row 2, place 1 holds 0.5, which is not a class")):
        load(models, tmp_path, [[2, 0], [0.5]])


@pytest.mark.parametrize(
    "words",
    [["partition=dirichlet"], ["train.label_prior=uniform"], ["adversary={attack: label-flip, clients: 1}"]],
)
def test_what_needs_one_class_per_row_is_refused(config, words):
    from peerlora.runtime.compose import compose

    with pytest.raises(PeerloraError, match="class|label"):
        compose(config("bert", "task.kind=multi-label", "data.label=several", *words))
