"""Lines of text files, compressed or not; what is no UTF-8 text is refused by the name of what it seems to be."""

import bz2
import codecs
import gzip
import io
import lzma
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


class Unreadable(ValueError):
    """What is wrong with a file and what to do, as the end of a sentence that begins with its name."""


_HEAD = 1 << 12  # bytes at the beginning of a file by which it is recognised
_SHOWN = 40  # letters of a line that a message shows
_GZIP, _BZIP2, _XZ, _ZSTD = rb"\x1f\x8b", rb"BZh[1-9]1AY&SY", rb"\xfd7zXZ\x00", rb"\x28\xb5\x2f\xfd"
_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    _GZIP: lambda path: gzip.open(path, "rb"),
    _BZIP2: lambda path: bz2.open(path, "rb"),
    _XZ: lambda path: lzma.open(path, "rb"),
    _ZSTD: lambda path: _open_zstd(path),
}
_FOREIGN = {  # first bytes, as a pattern -> what the file is and what to do
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "is encoded as UTF-32; save it as UTF-8, e.g. by iconv -f UTF-32 -t UTF-8",
    rb"\xff\xfe|\xfe\xff": "is encoded as UTF-16; save it as UTF-8, e.g. by iconv -f UTF-16 -t UTF-8",
    rb"PK\x03\x04": "is an Excel workbook or a zip archive; save the sheet as CSV UTF-8, or unpack the archive",
    rb"\xd0\xcf\x11\xe0": "is an old Excel workbook; save the sheet as CSV UTF-8",
    rb"version https://git-lfs": "is a Git LFS pointer, not the file itself; fetch it by git lfs pull",
    rb"PAR1\x15": "is a parquet file; name it .parquet, or write parquet:PATH",
    b"|".join(_OPENERS): "is compressed here; unpack it",
    rb"(?i)\s*<(!doctype|html)": "is a web page; download the file itself",
}


def read_lines(path: Path) -> Generator[str, None, None]:
    """Yield the lines of a text file in UTF-8, each with its line break, without a byte order mark.

    A file may be compressed by gzip, zstd, bzip2 or xz: its first bytes tell, not its name.
    Raises Unreadable, naming the line, for other encodings and for files that are no text.
    """
    number = 0
    with open_decompressed(path) as file:
        refuse_foreign(file.peek(_HEAD)[:_HEAD])
        for chunk in file:
            # A file of an old Macintosh breaks lines by carriage returns alone.
            for line in chunk.splitlines(keepends=True) if b"\r" in chunk else (chunk,):
                number += 1
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield _decoded(line, number)


def open_decompressed(path: Path) -> io.BufferedReader:
    """Open a file for reading its bytes, decompressed where its first bytes say that it is compressed."""
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    opener = next((opener for magic, opener in _OPENERS.items() if re.match(magic, head)), None)
    return io.BufferedReader(opener(path) if opener else open(path, "rb", buffering=0))


def refuse_foreign(head: bytes) -> None:
    """Raise Unreadable where the first bytes of a file are those of another kind of file."""
    for magic, kind in _FOREIGN.items():
        if re.match(magic, head):
            raise Unreadable(kind)
    if b"\0" in head:
        one_of_two = b"\0" in head[::2], b"\0" in head[1::2]
        if all(one_of_two):
            raise Unreadable("is not text; expected text in UTF-8")
        raise Unreadable("is encoded as UTF-16; save it as UTF-8, e.g. by iconv -f UTF-16 -t UTF-8")


def base_suffix(name: str) -> str:
    """The suffix of a file name in lower case, without one of compression: ``.csv`` of ``rows.csv.gz``."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _decoded(line: bytes, number: int) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        guessed = line.decode("cp1252", errors="replace").strip()
        around = guessed[max(0, error.start - _SHOWN // 2) :][:_SHOWN]
        raise Unreadable(
            f"line {number} is not encoded as UTF-8 but perhaps as cp1252 ({around!r}); save the file as UTF-8, "
            "e.g. by iconv -f cp1252 -t UTF-8"
        ) from None
    if "\0" in text:
        raise Unreadable(f"line {number} holds a NUL character; expected text in UTF-8")
    return text


def _open_zstd(path: Path) -> Any:
    import pyarrow as pa

    return pa.input_stream(str(path), compression="zstd")
