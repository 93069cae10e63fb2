"""Images: what is read of files and columns, what a model sees of them, and what is refused."""

import io
import json
import re
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from peerlora.config.loading import load_config
from peerlora.config.task_kinds import KINDS
from peerlora.data import image_files, images
from peerlora.data.batches import collate
from peerlora.data.files import name_folder, read_table
from peerlora.data.first_config import write_template
from peerlora.data.guess import guess_columns
from peerlora.data.image_files import decode_image
from peerlora.data.sources import load_datasets
from peerlora.errors import DataError, ModelError
from peerlora.runtime.readers import load_reader

IMAGES = KINDS["image-classification"]


def saved(image, kind="PNG", **more):
    image.save(file := io.BytesIO(), format=kind, **more)
    return file.getvalue()


def noise(*shape, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def write(folder, cells, labels=None, name="rows.parquet", column="image"):
    labels = labels or [f"class{i % 2}" for i in range(len(cells))]
    pq.write_table(pa.table({column: cells, "label": labels}), folder / name)
    return folder / name


def load(models, source, *words, kind="vit"):
    config = load_config(
        {
            "model": {"source": models(kind)},
            "task": {"kind": "image-classification"},
            "partition": "iid",
            "data": {"train": str(source), "eval": None, "label": "label"},
        },
        words,
    )
    return load_datasets(config, load_reader(models(kind), IMAGES), None)


def pixels_of(models, content):
    """What a model reads of one file: [channel, height, width]."""
    reader = load_reader(models("vit"), IMAGES)
    found = reader.read([("a row", decode_image(content, "a row"))], 1, "a file")
    return found.values(np.array([0]), torch.float64)[0].numpy()


def by_the_library(models, image):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(models("vit"), backend="pil")
    return processor(images=image, return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize(
    "image",
    [
        noise(8, 8, 3),
        noise(30, 17, 3),
        noise(9, 9),
        noise(12, 9, 4),
        noise(20, 20, 3).convert("P", palette=Image.Palette.ADAPTIVE),
        noise(16, 16).convert("1"),
    ],
    ids=lambda image: f"{image.mode} {image.size}",
)
def test_pixels_are_those_of_the_image_processor(models, image):
    found = pixels_of(models, saved(image))
    assert found.shape == (3, 8, 8)
    assert np.abs(found - by_the_library(models, image.convert("RGB"))).max() < 1e-5


def test_sixteen_bits_of_grey_keep_their_upper_half(models):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    found = decode_image(saved(Image.fromarray(values)), "a row")
    assert found.mode == "RGB" and np.array_equal(np.asarray(found)[..., 1], values >> 8)


def test_an_image_is_turned_as_its_orientation_says():
    image, exif = noise(6, 4, 3), Image.Exif()
    exif[0x0112] = 6  # the top is on the right
    plain, turned = (decode_image(saved(image, exif=each), "a row") for each in (Image.Exif(), exif))
    assert plain.size == (4, 6) and turned.size == (6, 4)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(plain), -1))


def test_columns_of_bytes_of_datasets_and_folders_hold_the_same(models, pictures, picture_folder, tmp_path):
    train, evaluation = load(models, pictures)
    assert train.names == ("left", "middle", "right") and train.classes == train.names
    assert (len(train), len(evaluation)) == (42, 6) and len(train.ids) == 0
    assert train.lengths.tolist() == [5] * 42  # four patches and one of the class
    table = pq.read_table(pictures)
    plain = [cell["bytes"] for cell in table.column("image").to_pylist()]
    labels = [train.names[label] for label in table.column("label").to_pylist()]
    file = write(tmp_path, plain, labels, column="scan")
    again, _ = load(models, file, "data.columns={image: scan}")
    assert np.array_equal(again.pixels.bytes, train.pixels.bytes) and np.array_equal(again.labels, train.labels)
    order = np.argsort([labels.index(name) for name in train.names]).tolist()
    assert order == [0, 1, 2]
    whole, _ = load(models, f"folder:{picture_folder}", f"data.eval=folder:{picture_folder}")
    assert whole.names == train.names and whole.labels.tolist() == [0] * 16 + [1] * 16 + [2] * 16
    everything, _ = load(models, pictures, f"data.eval={pictures}")
    by_class = np.argsort(everything.labels, kind="stable")
    assert np.array_equal(whole.pixels.bytes, everything.pixels.bytes[by_class])


def test_rows_are_taken_and_laid_out_by_client(models, pictures):
    train, _ = load(models, pictures, "data.train_per_class=4")
    assert np.bincount(train.labels).tolist() == [4, 4, 4]
    batch = collate(train, [np.array([3, 1]), np.array([2])], None, torch.float64)
    assert set(batch.inputs) == {"pixel_values"} and batch.inputs["pixel_values"].shape == (4, 3, 8, 8)
    expected = train.take([3, 1, 2, 2]).pixels.values(np.arange(4), torch.float64)
    assert torch.equal(batch.inputs["pixel_values"], expected)
    assert batch.labels.tolist() == train.labels[[3, 1, 2, 2]].tolist() and batch.extents == [(2, 5), (1, 5)]


def test_the_column_of_owners_is_kept(models, pictures):
    train, _ = load(models, pictures, "partition={kind: column, column: site}", "clients=4")
    assert set(train.columns["site"]) == {f"site{i}" for i in range(4)}


GOOD = saved(noise(8, 8, 3))


def bomb(width, height):
    """A PNG whose header promises so many pixels."""

    def part(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = part(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + data + part(b"IEND", b"")


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        (b"no image", "row 3: cannot be read as PNG, JPEG, WebP or BMP (cannot identify image file"),
        (GOOD[: len(GOOD) // 2], "row 3: cannot be read as PNG, JPEG, WebP or BMP (image file is truncated"),
        (saved(noise(8, 8, 3), "GIF"), "row 3: cannot be read as PNG, JPEG, WebP or BMP (cannot identify image file"),
        (b"", "row 3: the image is empty; expected a PNG, JPEG, WebP or BMP file"),
        (None, "row 3: the image is empty; expected a PNG, JPEG, WebP or BMP file"),
        (bomb(12_000, 12_000), "row 3: has 12,000 x 12,000 pixels; expected at most 89,478,485 in all"),
        (bomb(60_000, 60_000), "row 3: has too many pixels; expected at most 89,478,485 in all"),
        (bomb(60_000, 10), "row 3: has 60,000 x 10 pixels; expected sides of which none is more than 100 times"),
    ],
    ids=["text", "half", "gif", "empty", "null", "large", "huge", "narrow"],
)
def test_bad_images_are_named(models, tmp_path, cell, told):
    file = write(tmp_path, [GOOD, GOOD, cell, GOOD])
    with pytest.raises(DataError, match=re.escape(f"{file}: {told}")):
        load(models, file, f"data.eval={file}")


def test_a_path_without_bytes_is_not_followed(models, tmp_path):
    (tmp_path / "a.png").write_bytes(GOOD)
    file = write(tmp_path, [{"bytes": GOOD, "path": "x"}, {"bytes": None, "path": str(tmp_path / "a.png")}] * 2)
    with pytest.raises(DataError, match=r"row 2 \(.*a.png\): the image is only a path, no bytes; expected a PNG"):
        load(models, file, f"data.eval={file}")


def test_paths_of_downloaded_data_sets_are_followed(tmp_path):
    (tmp_path / "a.png").write_bytes(GOOD)
    paths = [str(tmp_path / "a.png"), str(tmp_path / "gone.png")]
    column = pa.chunked_array([[{"bytes": None, "path": path} for path in paths]])
    column = column.cast(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    found = image_files.read_images(column, np.arange(2), "hub:owner/name")
    where, image = next(found)
    assert where == f"hub:owner/name: row 1 ({paths[0]})" and image.size == (8, 8)
    with pytest.raises(DataError, match=r"row 2 \(.*gone.png\): cannot be read \(No such file or directory\)"):
        next(found)


@pytest.mark.parametrize(
    ("cells", "words", "told"),
    [
        ([1, 2, 3, 4], [], "the column of images holds int64; expected the bytes of PNG, JPEG, WebP or BMP files"),
        (["a.png"] * 4, [], "the column of images holds string; expected the bytes of PNG, JPEG, WebP or BMP files"),
        ([GOOD] * 4, ["data.columns={image: scan}"], "has no column 'scan' for data.columns"),
        ([GOOD] * 4, ["data.label=kind"], "has no column 'kind' for data.label"),
    ],
)
def test_columns_that_hold_no_images_are_refused(models, tmp_path, cells, words, told):
    with pytest.raises(DataError, match=re.escape(told)):
        load(models, write(tmp_path, cells), *words)


def test_a_table_without_images_is_refused(models, texts):
    with pytest.raises(DataError, match="has no columns for task.kind=image-classification; expected image"):
        load(models, texts)


def test_images_beyond_the_memory_are_refused_before_any_is_read(models, pictures, monkeypatch):
    monkeypatch.setattr(images, "main_memory", lambda: 4 * 3 * 8 * 8 * 40)
    with pytest.raises(DataError, match="42 images of 8 x 8 pixels take .* use fewer rows"):
        load(models, pictures)


def test_a_large_file_is_refused_before_it_is_read(models, picture_folder, monkeypatch):
    monkeypatch.setattr(image_files, "_MOST_BYTES", 100)
    with pytest.raises(DataError, match=r"row 1 \(.*00.png\): has more than"):
        load(models, f"folder:{picture_folder}")


@pytest.mark.parametrize(("kind", "more"), [("WEBP", {"lossless": True}), ("BMP", {})])
def test_other_formats_give_the_same_pixels(models, tmp_path, kind, more):
    images = [noise(9, 7, 3, seed=i) for i in range(8)]
    file = write(tmp_path, [saved(each, kind, **more) for each in images], column="scan")
    plain = write(tmp_path, [saved(each) for each in images], name="plain.parquet", column="scan")
    ours, theirs = (load(models, each, "data.columns={image: scan}")[0] for each in (file, plain))
    assert np.array_equal(ours.pixels.bytes, theirs.pixels.bytes)
    assert guess_columns(read_table(str(file)), str(file)).columns == {"image": "scan"}
    for number, each in enumerate(images):
        place = tmp_path / "folder" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.{kind.lower()}").write_bytes(saved(each, kind, **more))
    assert name_folder(str(tmp_path / "folder")) == f"folder:{tmp_path / 'folder'}"
    assert load(models, f"folder:{tmp_path / 'folder'}", "data.holdout=0.5")[0].names == ("class0", "class1")


@pytest.mark.parametrize(("kind", "at"), [("WEBP", 24), ("BMP", 18)])
def test_other_formats_that_promise_too_many_pixels_are_refused(kind, at):
    content = bytearray(saved(noise(9, 7, 3), kind, **({"xmp": b"<x/>"} if kind == "WEBP" else {})))
    assert kind == "BMP" or content[12:16] == b"VP8X"  # the header that has the size of the whole canvas
    size = struct.pack("<II", 60_000, 60_000) if kind == "BMP" else (16_382).to_bytes(3, "little") * 2
    content[at : at + len(size)] = size
    with pytest.raises(DataError, match="row 1: (has .*pixels|cannot be read)"):
        decode_image(bytes(content), "row 1")


def test_bytes_that_begin_like_a_bitmap_are_none(tmp_path):
    table = pa.table({"text": ["some words"] * 8, "blob": [b"BMW and others"] * 8, "label": ["a", "b"] * 4})
    assert guess_columns(table, "rows.parquet").kind == "classification"


def test_folders_that_are_no_classes_are_refused(models, tmp_path, caplog):
    root = tmp_path / "root"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
    refused = {
        "has no PNG, JPEG, WebP or BMP file in its folder 'cat'; a folder is a class": {},
        "holds images (x.png) beside folders (cat)": {"x.png": GOOD},
    }
    for told, files in refused.items():
        for name, content in files.items():
            (root / name).write_bytes(content)
        with pytest.raises(DataError, match=re.escape(told)):
            load(models, f"folder:{root}")
    (root / "x.png").rename(root / "cat/x.png")
    for i in range(4):
        (root / f"dog/{i}.jpg").write_bytes(saved(noise(9, 7, 3, seed=i), "JPEG"))
        (root / f"cat/{i}.JPEG").write_bytes(saved(noise(7, 9, 3, seed=i), "JPEG"))
    (root / "dog/notes.txt").write_text("a note")
    train, _ = load(models, f"folder:{root}", "data.holdout=0.25")
    assert train.names == ("cat", "dog") and "1 files are no PNG, JPEG, WebP or BMP and are left out" in caplog.text
    with pytest.raises(DataError, match="dog: has no column 'label' for data.label; its columns are image"):
        load(models, f"folder:{root}/dog")
    with pytest.raises(DataError, match="is no folder; expected one with a folder of PNG, JPEG, WebP or BMP"):
        load(models, f"folder:{root}/dogs")
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image; expected a folder of PNG, JPEG, WebP or BMP files"):
        load(models, f"folder:{root}/empty")
    with pytest.raises(DataError, match="holds no file that can be read; expected .*; of images write folder:PATH"):
        load(models, root)
    (root / "empty").rmdir()
    (root / "dog/0.jpg").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"folder:.*: row \d+ \(.*dog/0.jpg\): cannot be read as PNG, JPEG, WebP or BMP"
    ):
        load(models, f"folder:{root}", f"data.eval=folder:{root}")


def test_a_folder_of_images_is_recognised(picture_folder, pictures, tmp_path):
    assert name_folder(str(picture_folder)) == f"folder:{picture_folder}"
    assert name_folder(str(pictures.parent)) == str(pictures.parent) and name_folder(str(tmp_path)) == str(tmp_path)
    found = guess_columns(read_table(f"folder:{picture_folder}"), "folder:x")
    assert (found.kind, found.label, found.columns) == ("image-classification", "label", {"image": "image"})


def test_the_columns_of_images_are_guessed(pictures):
    table = pq.read_table(pictures)
    found = guess_columns(table, "rows.parquet")
    assert (found.kind, found.label, found.columns) == ("image-classification", "label", {"image": "image"})
    assert [each.name for each in found.candidates] == ["label", "site"]
    assert list(found.candidates[0].counts) == ["left", "middle", "right"]
    other = guess_columns(table.rename_columns(["scan", "kind", "site"]), "rows.parquet", label="site")
    assert (other.label, other.columns) == ("site", {"image": "scan"})
    bytes_of = pa.array([cell["bytes"] for cell in table.column("image").to_pylist()])
    assert guess_columns(pa.table({"b": bytes_of, "label": ["x", "y"] * 24}), "r").columns == {"image": "b"}
    hashes = {"hash": [b"12"] * 20, "text": ["one two three"] * 20, "label": ["a", "b"] * 10}
    assert guess_columns(pa.table(hashes), "r").kind == "classification"
    with pytest.raises(DataError, match="score is for regression; expected one class for each image"):
        guess_columns(pa.table({"image": bytes_of, "score": np.linspace(0, 1, 48)}), "r")
    with pytest.raises(DataError, match="holds images in column image and no column for their classes; give --label"):
        guess_columns(table.select(["image"]), "rows.parquet")
    with pytest.raises(DataError, match="no column for their classes"):
        guess_columns(table, "rows.parquet", label="none")


def broken(models, tmp_path, **changes):
    import shutil

    shutil.copytree(models("vit"), tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"size": {"height": 10**9, "width": 8}}, "has size.height=1000000000; expected 1 to 2048 pixels; mend it"),
        ({"image_mean": [0.5], "image_std": [0.5]}, "its image processor fails on an image"),
        ({"image_std": [0.5, 0, 0.5]}, "does not scale and shift pixels to finite numbers"),
        ({"rescale_factor": ".nan"}, "its image processor"),
        ({"image_processor_type": "Nobody"}, "preprocessor_config.json"),
    ],
)
def test_an_image_processor_that_does_not_fit_is_refused(models, tmp_path, changes, told):
    with pytest.raises(ModelError, match=re.escape(told)):
        load_reader(broken(models, tmp_path, **changes), IMAGES)


def test_a_folder_without_an_image_processor_is_refused(models, tmp_path):
    folder = broken(models, tmp_path)
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="give a folder with config.json and preprocessor_config.json"):
        load_reader(folder, IMAGES)


def test_images_of_several_sizes_need_a_processor_that_resizes(models, tmp_path):
    reader = load_reader(broken(models, tmp_path, do_resize=False), IMAGES)
    assert reader.shape == (3, 8, 8)
    with pytest.raises(DataError, match="row 2: becomes 9 x 7 pixels, others 8 x 8; the model's image processor"):
        reader.read([("row 1", noise(8, 8, 3)), ("row 2", noise(9, 7, 3))], 2, "a file")


def test_paths_of_images_are_no_texts(picture_folder):
    """A model of texts would read the class in them."""
    source = f"folder:{picture_folder}"
    base = {"partition": "iid", "data": {"train": source, "text": ["image"], "label": "label"}}
    with pytest.raises(DataError, match=r"holds images, and image is named as a column of text; use task\.kind=image"):
        load_datasets(load_config(base), None, None)
    chat = {"task": {"kind": "chat"}, "data": {"train": source, "columns": {"prompt": "image", "completion": "label"}}}
    with pytest.raises(DataError, match="holds images; task.kind=chat reads none"):
        load_datasets(load_config(base | chat), None, None)
    with pytest.raises(DataError, match="image is named as a column of text"):
        write_template(source, picture_folder / "new.yaml", text=["image"])
    assert not (picture_folder / "new.yaml").exists()


def test_a_first_config_is_not_written_for_a_table_of_paths(tmp_path):
    """It would be one of images, which no run reads, or one of texts, which are the paths."""
    path = tmp_path / "list.csv"
    path.write_text("image,label\n" + "a/1.png,a\nb/2.JPG,b\n" * 4)
    with pytest.raises(DataError, match=r"holds paths of images \(a/1.png\), which are not followed; put the images"):
        write_template(str(path), tmp_path / "new.yaml")
    path.write_text("image,label\n" + "a poem,a\nof two images,b\n" * 4)
    assert write_template(str(path), tmp_path / "new.yaml").guess.kind == "classification"
