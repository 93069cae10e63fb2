"""Tables from files, from installed packages and from the Hugging Face hub; ``read_table`` is the only door in.

A source is written ``kind:place``:

- ``parquet:PATH``, ``csv:PATH``, ``jsonl:PATH``; a bare path with a known suffix does too (also .tsv, .json and .tab).
  PATH may be a folder of shards of one kind, or a pattern such as ``data/train-*.parquet``.  Text may be compressed.
- ``folder:PATH``: image files in a folder for each class, or, without classes, right in this one
- ``packaged:PACKAGE/FILE``: a file that an installed Python package ships
- ``hub:OWNER/NAME`` or ``hub:OWNER/NAME/CONFIG``, with or without ``:SPLIT``: ``hub:nyu-mll/glue/sst2:train[:10%]``;
  ``hub:/ABSOLUTE/PATH`` is a data set in a local folder
"""

import glob
import json
import re
import zlib
from collections.abc import Callable, Sequence
from functools import reduce
from lzma import LZMAError
from operator import getitem
from pathlib import Path
from typing import Any

import pyarrow as pa

from peerlora.data.columns import Columns, check_columns, select_columns, without_views
from peerlora.data.delimited import read_csv, read_tab
from peerlora.data.image_files import SUFFIXES as IMAGE_SUFFIXES
from peerlora.data.image_files import read_folder
from peerlora.data.json_rows import read_json
from peerlora.data.row_names import note_files
from peerlora.data.text_files import COMPRESSED, Unreadable, base_suffix, refuse_foreign
from peerlora.environment import package_file
from peerlora.errors import DataError, nearest

TRAIN_SPLIT, EVAL_SPLIT = "train", "validation"
"""Of a hub source that names none: those of training and of evaluation rows."""
_SPLITS = re.compile(r"(?<![a-z])(train|test|valid|validation|val|dev|eval)(?![a-z])")  # in a shard's name


def read_table(source: str, split: str = TRAIN_SPLIT, columns: Columns | None = None) -> pa.Table:
    """Read a source into memory.

    ``split`` is the hub split where the source names none.  ``columns``: those that are needed; None: all.
    Cells of CSV are text.  Raises DataError: unknown kind, missing, unreadable, empty, or without a needed column.
    """
    kind, place = parse_source(source)
    if kind == "hub":
        table = _read_hub(source, place, split)
        table = _prepared(source, table, columns)
    elif kind == "folder":
        table = _prepared(source, _read_images(source, place, columns), columns)
    else:
        paths = locate_files(source, kind, place)
        table = _joined(source, paths, [_read_file(source, kind, path, columns) for path in paths])
    if table.num_rows == 0:
        raise DataError(f"{source}: has no rows; expected at least one")
    return table


def name_folder(source: str) -> str:
    """Return a source, with ``folder:`` before one that is a path without tables, but with folders of images."""
    path = Path(source).expanduser()
    try:
        inside = list(path.iterdir()) if ":" not in source and path.is_dir() else []
        files = inside + [file for folder in inside if folder.is_dir() for file in folder.iterdir()]
    except OSError:  # reading will say what is wrong
        return source
    tables = any(base_suffix(file.name) in _SUFFIXES for file in inside)
    images = any(file.suffix.lower() in IMAGE_SUFFIXES for file in files)
    return f"folder:{source}" if images and not tables else source


def _read_images(source: str, place: str, columns: Columns | None) -> pa.Table:
    """The images of a folder, or of its folders; their paths are no texts, and often tell the class."""
    if columns and columns.text:
        raise DataError(
            f"{source}: holds images, and {', '.join(columns.text)} is named as a column of text; use "
            "task.kind=image-classification, and name no text"
        )
    try:
        return read_folder(Path(place).expanduser())
    except Unreadable as error:
        raise DataError(f"{source}: {error}") from None
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {_first_line(error)}; check its folders") from None


def has_header_line(source: str) -> bool:
    """Whether a source is a CSV file, whose first line names its columns."""
    kind, place = parse_source(source)
    return kind == "csv" or _SUFFIXES.get(base_suffix(place)) == "csv"


def class_names(table: pa.Table, column: str) -> tuple[str, ...] | None:
    """The class names behind a column of integers, or of lists of them, where `datasets` left them in the metadata."""
    note = (table.schema.metadata or {}).get(b"huggingface")
    if note is None or column not in table.column_names:
        return None
    kind = table.schema.field(column).type
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not pa.types.is_integer(kind.value_type if nested else kind):
        return None
    try:
        features = json.loads(note)["info"]["features"]
        feature = features[column] if column in features else reduce(getitem, column.split("."), features)
        names = _inner(feature)["names"] if nested else feature["names"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else None


def _inner(feature: Any) -> Any:
    """What a list holds, in the ways that versions of `datasets` write it."""
    return feature[0] if isinstance(feature, list) else feature["feature"]


def parse_source(source: str) -> tuple[str, str]:
    """Kind and place of a source; "shards" for a bare folder or pattern.  Raises DataError for an unknown kind."""
    kind, colon, place = source.partition(":")
    if colon and place and kind in (*_READERS, *_PLACES):
        return kind, place
    suffix = base_suffix(source)
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix], source
    if glob.has_magic(source) or Path(source).expanduser().is_dir():
        return "shards", source
    kinds = (*_READERS, *_PLACES)
    raise DataError(
        f"{source!r} is not a source{nearest(kind, kinds) if colon else ''}; expected kind:place with kind one of "
        f"{', '.join(kinds)}, or a path that ends in {', '.join(_SUFFIXES)}"
    )


def locate_files(source: str, kind: str, place: str) -> list[Path]:
    """The tables of a source that is not on the hub; more than one where it is a folder or a pattern.

    Raises DataError where there are none, or some that do not go together.
    """
    if kind == "packaged":
        distribution, _, name = place.partition("/")
        if not distribution or not name:
            raise DataError(f"{source!r} names no file; expected packaged:PACKAGE/FILE")
        return [package_file(distribution, name)]
    path = Path(place).expanduser()
    if path.is_dir():
        return _shards(source, kind, sorted(file for file in path.iterdir() if file.is_file()))
    if path.exists():
        return [path]
    if glob.has_magic(place):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        return _shards(source, kind, [file for file in found if file.is_file()])
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f"{source}: file does not exist{nearest(path.name, beside)}; expected a {kind} file")


def _shards(source: str, kind: str, files: Sequence[Path]) -> list[Path]:
    """The files with a known suffix, if all are of one kind and of one split."""
    kinds = {file: _SUFFIXES.get(base_suffix(file.name)) for file in files if file.name[0] not in "._"}
    shards = [file for file, its in kinds.items() if its is not None and kind in (its, "shards")]
    if not shards:
        expected = f"{', '.join(_SUFFIXES)}; of images write folder:PATH" if kind == "shards" else f"{kind} files"
        raise DataError(f"{source}: holds no file that can be read; expected {expected}")
    if len({kinds[file] for file in shards}) > 1:
        names = ", ".join(sorted({str(kinds[file]) for file in shards}))
        raise DataError(f"{source}: holds files of several kinds ({names}); write one of them in front, with a colon")
    for file in shards:
        if file.suffix.lower() in COMPRESSED and file.with_suffix("") in shards:
            raise DataError(
                f"{source}: holds both {file.with_suffix('').name} and {file.name}, and would be read twice; remove "
                "one, or name one"
            )
    splits = {match[1] if (match := _SPLITS.search(file.name.lower())) else "" for file in shards}
    if len(splits) > 1:
        raise DataError(
            f"{source}: holds files of several splits ({', '.join(file.name for file in shards[:10])}); name those of "
            f"one by a pattern, such as {shards[0].parent}/train*{shards[0].suffix}"
        )
    return shards


def _read_file(source: str, kind: str, path: Path, columns: Columns | None) -> pa.Table:
    suffix = base_suffix(path.name)
    if kind in ("packaged", "shards"):
        if suffix not in _SUFFIXES:
            raise DataError(f"{source}: suffix {suffix!r} is unknown; expected {', '.join(_SUFFIXES)}")
        kind = _SUFFIXES[suffix]
    where = source if source.endswith(str(path)) or kind == "packaged" else str(path)
    try:
        return _prepared(where, _READERS[kind](path, columns), columns)
    except Unreadable as error:
        raise DataError(f"{where}: {error}") from None
    except (pa.ArrowException, OSError, EOFError, zlib.error, LZMAError, ValueError) as error:
        raise DataError(f"{where}: cannot be read: {_first_line(error)}; check that it is a {kind} file") from None
    except MemoryError:
        raise DataError(f"{where}: does not fit into memory; divide it, or use fewer rows") from None


def _prepared(where: str, table: pa.Table, columns: Columns | None) -> pa.Table:
    """The needed columns, without types that not all functions of pyarrow know."""
    try:
        return without_views(table if columns is None else select_columns(table, columns))
    except Unreadable as error:
        raise DataError(f"{where}: {error}") from None


def _joined(source: str, paths: Sequence[Path], tables: Sequence[pa.Table]) -> pa.Table:
    """One table of all shards, which must mean the same by a class number, with a note of who has which rows."""
    if len(tables) == 1:
        return tables[0]
    for column in tables[0].column_names:  # a label, or tags
        names = {class_names(table, column) for table in tables if table.num_rows}
        if len(names) > 1:
            shown = "; ".join(sorted(", ".join(each) if each else "none" for each in names))
            raise DataError(f"{source}: its files name the classes of {column} differently: {shown}")
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"{source}: its files do not go together: {_first_line(error)}") from None
    return note_files(table, [(str(path), each.num_rows) for path, each in zip(paths, tables, strict=True)])


def _read_parquet(path: Path, columns: Columns | None) -> pa.Table:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pa.ArrowInvalid:
        with open(path, "rb") as other:
            refuse_foreign(other.read(1 << 12))
        raise
    return file.read(columns=None if columns is None else check_columns(file.schema_arrow.names, columns))


def _read_hub(source: str, place: str, split: str) -> pa.Table:
    from datasets import load_dataset

    name, config, chosen = hub_place(place)
    try:
        rows = load_dataset(name, config, split=chosen or split)
        table = rows.with_format("arrow")[:]  # type: ignore[union-attr]
    except Exception as error:  # the hub client raises its own, those of its HTTP library and plain ones
        raise DataError(
            f"{source}: cannot be loaded: {_first_line(error)}; expected hub:OWNER/NAME[/CONFIG][:SPLIT], "
            "on the hub or in the local cache, or hub:/FOLDER[/CONFIG][:SPLIT]"
        ) from None
    return table.replace_schema_metadata(rows.features.arrow_schema.metadata)  # type: ignore[union-attr]


def hub_place(place: str) -> tuple[str, str | None, str]:
    """Name or folder, config and split; a path that is no folder may end in a config."""
    where, _, chosen = place.partition(":")
    if where.startswith(("/", "~", "./", "../")):
        path = Path(where).expanduser().absolute()
        if not path.is_dir() and path.parent.is_dir() and path.parent.parent != path.parent:
            return str(path.parent), path.name, chosen
        return str(path), None, chosen
    parts = where.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None, chosen


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".;")


_PLACES = ("packaged", "hub", "folder")
"""Kinds of sources that are no single file in one format."""
_READERS: dict[str, Callable[[Path, Columns | None], pa.Table]] = {
    "parquet": _read_parquet,
    "csv": read_csv,
    "jsonl": read_json,
    "tab": read_tab,
}
_SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_SUFFIXES |= {".json": "jsonl", ".tab": "tab"}
