"""Flaws in rows of a source with several files are told with the file and the row's number in it."""

import json
import re

import pytest

from peerlora.config.loading import load_config
from peerlora.data.sources import load_datasets
from peerlora.errors import DataError
from peerlora.lora.base_models import load_tokenizer

GOOD = {
    "text": "w1 w2",
    "label": "a",
    "score": 1.0,
    "several": ["a", "b"],
    "site": "s",
    "tokens": ["w1", "w2"],
    "tags": ["O", "B-X"],
    "messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}],
    "prompt": "w1",
    "completion": "w2",
}
SITES = "partition={kind: column, column: site}"


@pytest.fixture
def shards(tmp_path):
    """A function that writes 10 rows in files of 3, 3 and 4, the second of the last file changed."""

    def make(**changed):
        folder = tmp_path / "rows"
        folder.mkdir()
        rows = [{**GOOD, "label": "ab"[i % 2]} for i in range(9)]
        rows.insert(7, {**GOOD, **changed})
        for name, start, end in (("part-0", 0, 3), ("part-2", 3, 6), ("part-3", 6, 10)):
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows[start:end])))
        return folder

    return make


@pytest.mark.parametrize("pattern", ["", "/part-*.jsonl"])
@pytest.mark.parametrize(
    ("changed", "words", "told"),
    [
        ({"text": None}, [], "data.text=text is missing in 1 of 10 rows, the first is ROW"),
        ({"label": ""}, [], "1 of 10 rows have no label, the first is ROW"),
        ({"label": "c"}, ["task.labels=[a, b]"], "ROW: label 'c' is not among task.labels"),
        ({"score": float("inf")}, ["task.kind=regression", "data.label=score"], "ROW holds inf"),
        ({"site": " "}, [SITES, "clients=1"], "partition.column=site is empty in ROW"),
        ({"several": ["a", ""]}, ["task.kind=multi-label", "data.label=several"], "ROW has an empty label"),
        ({"tags": ["O"]}, ["task.kind=token-classification"], "ROW: 2 tokens and 1 tags"),
        ({"messages": []}, ["task.kind=chat"], "ROW: messages is empty"),
        ({"completion": ""}, ["task.kind=sequence-to-sequence"], "ROW: completion is empty"),
    ],
)
def test_the_file_and_its_row_are_named(models, shards, pattern, changed, words, told):
    folder = shards(**changed)
    tree = {"model": {"source": models("bert")}, "partition": "iid"}
    data = {"train": f"{folder}{pattern}", "eval": None, "text": ["text"], "label": "label"}
    with pytest.raises(DataError) as caught:
        load_datasets(load_config({**tree, "data": data}, words), load_tokenizer(models("bert")), None)
    row = f"row 2 of {folder}/part-3.jsonl"
    assert f"{folder}{pattern}" in str(caught.value)
    assert told.replace("ROW", row) in str(caught.value)


def test_one_file_in_a_folder_needs_no_name(models, tmp_path):
    (tmp_path / "rows").mkdir()
    rows = [GOOD, {**GOOD, "text": None}]
    (tmp_path / "rows" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"train": str(tmp_path / "rows"), "eval": None, "text": ["text"], "label": "label"}
    with pytest.raises(
        DataError, match=re.escape("rows: data.text=text is missing in 1 of 2 rows, the first is row 2")
    ):
        load_datasets(load_config({"data": data, "partition": "iid", "task": {"labels": ["a", "b"]}}), None, None)


def test_rows_to_predict_are_told_so_too(models, tmp_path):
    from peerlora.runtime.predict import _texts

    for name, text in (("a", "w1"), ("b", None)):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "w1"}\n' + json.dumps({"text": text}))
    with pytest.raises(DataError, match=re.escape(f"column text is missing in row 2 of {tmp_path}/b.jsonl")):
        _texts(str(tmp_path), ("text",))
