"""Fields inside columns of objects, named with dots, in every setting that names a column, and in a first config."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peerlora.config.loading import load_config
from peerlora.config.task_kinds import task_kind
from peerlora.data.columns import Columns
from peerlora.data.files import class_names, read_table
from peerlora.data.first_config import write_template
from peerlora.data.sources import load_datasets
from peerlora.errors import DataError
from peerlora.lora.base_models import load_tokenizer

ROWS = [
    {
        "review": {"body": f"w{i} w{i + 1} w{i % 7}", "head": {"title": f"w{i + 2}"}},
        "meta": {"stars": i % 4, "site": f"s{i % 2}", "share": i / 8, "tags": ["a", "b"][: 1 + i % 2]},
    }
    for i in range(24)
]
FLAT = [
    {"body": row["review"]["body"], "title": row["review"]["head"]["title"], **row["meta"]} for row in ROWS
]  # the same, in columns


@pytest.fixture(params=["jsonl", "parquet"])
def nested(request, tmp_path):
    path = tmp_path / f"nested.{request.param}"
    write(path, ROWS)
    return path


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load(models, file, kind, text, label, site="iid"):
    data = {"train": str(file), "eval": str(file), "text": text, "label": label, "max_length": 12}
    config = load_config(
        {"model": {"source": models("bert")}, "task": {"kind": kind}, "data": data, "partition": site, "clients": 2}
    )
    return load_datasets(config, load_tokenizer(models("bert")), None)[0]


@pytest.mark.parametrize(
    ("kind", "text", "label"),
    [
        ("classification", ["review.body"], "meta.stars"),
        ("classification", ["review.body", "review.head.title"], "meta.stars"),
        ("regression", ["review.body"], "meta.share"),
        ("multi-label", ["review.body"], "meta.tags"),
        ("causal-lm", ["review.head.title"], None),
    ],
)
def test_fields_are_read_as_columns_are(models, nested, tmp_path, kind, text, label):
    flat = write(tmp_path / "flat.jsonl", FLAT)
    found = load(models, nested, kind, text, label, {"kind": "column", "column": "meta.site"})
    last = [name.rpartition(".")[2] for name in text]
    plain = load(models, flat, kind, last, label and label.rpartition(".")[2], {"kind": "column", "column": "site"})
    assert found.names == plain.names
    for name in ("ids", "starts", "labels"):
        assert np.array_equal(getattr(found, name), getattr(plain, name))
    assert found.columns["meta.site"].tolist() == plain.columns["site"].tolist()


def test_the_image_and_the_class_of_a_row_may_be_fields(models, pictures, tmp_path):
    from peerlora.runtime.readers import load_reader

    table = pq.read_table(pictures)
    inner = [table.column(name).combine_chunks() for name in ("image", "label")]
    scan = pa.StructArray.from_arrays(inner, names=["picture", "kind"])
    nested = pa.table({"scan": scan})
    pq.write_table(nested, tmp_path / "scans.parquet")
    reader = load_reader(models("vit"), task_kind("image-classification"))
    found = []
    for file, image, label in (
        (tmp_path / "scans.parquet", "scan.picture", "scan.kind"),
        (pictures, "image", "label"),
    ):
        data = {"train": str(file), "eval": str(file), "columns": {"image": image}, "label": label}
        tree = {"model": {"source": models("vit")}, "task": {"kind": "image-classification"}, "data": data}
        found.append(load_datasets(load_config(tree | {"partition": "iid"}), reader, None)[0])
    assert np.array_equal(found[0].labels, found[1].labels)
    assert np.array_equal(found[0].pixels.bytes, found[1].pixels.bytes)


def test_a_column_whose_own_name_has_a_dot_comes_first(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("Product.Name,Product\na,b\n")
    assert read_table(str(path), columns=Columns(("Product.Name",))).to_pydict() == {"Product.Name": ["a"]}
    both = write(tmp_path / "both.jsonl", [{"a.b": "own", "a": {"b": "field"}}])
    assert read_table(str(both), columns=Columns(("a.b",))).to_pydict() == {"a.b": ["own"]}


def test_an_object_that_is_missing_has_no_fields(models, tmp_path):
    path = write(tmp_path / "rows.jsonl", [*ROWS, {"review": None, "meta": ROWS[0]["meta"]}])
    with pytest.raises(DataError, match="data.text=review.body is missing in 1 of 25 rows, the first is row 25"):
        load(models, path, "classification", ["review.body"], "meta.stars")


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (Columns(("review.boddy",)), "has no field 'boddy' for data.text=review.boddy: its fields are body, head"),
        (Columns(("review.body.x",)), "has no field 'x' for data.text=review.body.x: it holds"),
        (Columns(label="mata.stars"), "has no column 'mata.stars' for data.label; its columns are"),
        (Columns(owner="meta.sites"), "has no field 'sites' for partition.column=meta.sites: its fields are"),
    ],
)
def test_names_that_are_not_there_are_told(nested, columns, told):
    with pytest.raises(DataError, match=re.escape(told)):
        read_table(str(nested), columns=columns)


def test_a_field_has_the_class_names_that_datasets_wrote(tmp_path):
    note = {"info": {"features": {"meta": {"stars": {"names": ["bad", "good"], "_type": "ClassLabel"}}}}}
    table = pa.Table.from_pylist([{"meta": {"stars": 1}}]).replace_schema_metadata({"huggingface": json.dumps(note)})
    pq.write_table(table, tmp_path / "rows.parquet")
    found = read_table(str(tmp_path / "rows.parquet"), columns=Columns(label="meta.stars"))
    assert class_names(found, "meta.stars") == ("bad", "good")


def test_a_first_config_names_fields(models, nested, tmp_path):
    rows = [{key: {k: v for k, v in row[key].items() if k not in ("tags", "share")} for key in row} for row in ROWS]
    write(nested, rows)
    config = write_template(str(nested), tmp_path / "config.yaml", model=models("bert")).config
    assert (config.task.kind, config.data.text, config.data.label) == ("classification", ["review.body"], "meta.stars")
    assert len(load_datasets(config, load_tokenizer(models("bert")), None)[0]) > 0
