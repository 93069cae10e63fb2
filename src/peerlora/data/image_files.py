"""Image files: those of a folder for each class, and the decoding of PNG, JPEG, WebP and BMP, with bounds."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from peerlora.data.columns import is_binary, is_text
from peerlora.data.row_names import row_name
from peerlora.data.text_files import Unreadable
from peerlora.errors import DataError, first_line

IMAGE, LABEL = "image", "label"
"""The columns of a table of files: their paths, and the names of their folders."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_KINDS = "PNG, JPEG, WebP or BMP"
_BEGINNINGS = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF.{4}WEBP|BM.{4}\0{4}", re.DOTALL)
_LOOKED_AT = 10  # cells
_MOST_PIXELS = 89_478_485  # of an image, pillow's own limit: 256 MB of RGB
_MOST_BYTES = 1 << 28  # of a file
_NARROWEST = 100  # times as long as wide: what is resized by its shorter side stays bounded


def read_folder(path: Path) -> pa.Table:
    """The table of a folder's images, with the class of each where it has folders of classes.

    Raises Unreadable as ``list_images`` does.
    """
    paths, labels, others = list_images(path)
    if others:
        logging.getLogger(__name__).warning(
            "folder:%s: %d files are no %s and are left out, the first is %s", path, len(others), _KINDS, others[0]
        )
    columns = {IMAGE: [str(each) for each in paths]}
    return pa.table({**columns, LABEL: labels} if labels else columns)


def list_images(path: Path) -> tuple[list[Path], list[str], list[Path]]:
    """List the images of a folder, their classes, and what else lies beside them.

    Images lie in a folder for each class, by name, or, without classes, right in it.  Raises Unreadable where there
    are none, or some of both, and for a class without images.
    """
    if not path.is_dir():
        raise Unreadable(f"is no folder; expected one with a folder of {_KINDS} files for each class")
    folders = sorted(each for each in path.iterdir() if each.is_dir() and each.name[0] not in "._")
    here, _ = _images_of(path)
    if here and folders:
        raise Unreadable(
            f"holds images ({here[0].name}) beside folders ({folders[0].name}); expected a folder for each class, or "
            "images alone: move one of them"
        )
    if here:
        return here, [], []
    paths, labels, others = [], [], []
    for folder in folders:
        images, more = _images_of(folder)
        if not images:
            raise Unreadable(
                f"has no {_KINDS} file in its folder {folder.name!r}; a folder is a class: add images, or remove it"
            )
        paths += images
        labels += [folder.name] * len(images)
        others += more
    if not paths:
        raise Unreadable(f"holds no image; expected a folder of {_KINDS} files for each class")
    return paths, labels, others


def _images_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images of a folder by name, and what else lies there."""
    files = sorted(each for each in folder.iterdir() if each.name[0] not in "._")
    images = [each for each in files if each.suffix.lower() in SUFFIXES and each.is_file()]
    return images, [each for each in files if each not in set(images)]


def is_image_column(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold images: bytes, or the objects with bytes that `datasets` writes."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and is_binary(kind.field(place).type)
    return is_binary(kind)


def holds_images(column: pa.ChunkedArray) -> bool:
    """Whether the first cells of a column begin as image files do."""
    contents = [_parts(cell.as_py())[0] for cell in column[:_LOOKED_AT]]
    return any(contents) and all(content is None or _BEGINNINGS.match(content) for content in contents)


def read_images(column: pa.ChunkedArray, chosen: np.ndarray, source: str) -> Iterator[tuple[str, Any]]:
    """Decode the images of some rows, one after another: what a message calls each, and the RGB image of pillow.

    Paths are followed where the source is a folder, or a data set on the hub that `datasets` has put on this machine.
    Raises DataError, naming file and row, for what is no image, or too large.
    """
    follows = source.startswith(("folder:", "hub:"))
    if not is_image_column(column.type) and not (is_text(column.type) and source.startswith("folder:")):
        raise DataError(
            f"{source}: the column of images holds {column.type}; expected the bytes of {_KINDS} files, or "
            "objects with these as `bytes`, as `datasets` writes them; name the column in data.columns, e.g. "
            "{image: NAME}"
        )
    for row in chosen.tolist():
        cell = column[row].as_py()
        content, path = _parts(cell)
        where = f"{source}: {row_name(source, row)}" + (f" ({path})" if path else "")
        if content is None and path is not None and follows:
            content = _read_file(Path(path), where)
        if not content:
            only = "only a path, no bytes" if path else "empty"
            raise DataError(f"{where}: the image is {only}; expected a {_KINDS} file: write its bytes there")
        yield where, decode_image(content, where)


def image_paths(column: pa.ChunkedArray) -> Iterator[str | None]:
    """The path of every image of a column; None for those without."""
    for cell in column:
        yield _parts(cell.as_py())[1]


def _parts(cell: Any) -> tuple[bytes | None, str | None]:
    """The bytes and the path of an image, as far as a cell has them."""
    if isinstance(cell, dict):
        path = cell.get("path")
        return cell.get("bytes"), path if isinstance(path, str) and path else None
    return (None, cell) if isinstance(cell, str) else (cell, None)


def _read_file(path: Path, where: str) -> bytes:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{where}: has more than {_MOST_BYTES >> 20} MB; make the image smaller")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror}); put it back, or remove the row") from None


def decode_image(content: bytes, where: str) -> Any:
    """Decode an image file to an RGB image of pillow, turned as its EXIF orientation says.

    Grey images and palettes become RGB, transparency is left out, of moving images the first is taken.  Raises
    DataError: no image, damaged, too large.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pillow: of sizes, which are checked here, and of odd metadata
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                _check_size(image.size, where)
                image.load()
                return _as_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(_too_large(where)) from None
    except Exception as error:  # damaged files bring out errors of every class
        raise DataError(
            f"{where}: cannot be read as {_KINDS} ({first_line(error)}); save the image anew, or remove the row"
        ) from None


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    if width * height > _MOST_PIXELS:
        raise DataError(_too_large(where, f"{width:,} x {height:,} pixels"))
    if max(size) > _NARROWEST * min(size):
        raise DataError(
            f"{where}: has {width:,} x {height:,} pixels; expected sides of which none is more than {_NARROWEST} times "
            "the other; cut the image, or remove the row"
        )


def _too_large(where: str, size: str = "too many pixels") -> str:
    return (
        f"{where}: has {size}; expected at most {_MOST_PIXELS:,} in all, pillow's limit against files that unpack to "
        "fill the memory; make the image smaller"
    )


def _as_rgb(image: Any) -> Any:
    """An image as RGB; of 16 bits of grey the upper 8, where pillow's own conversion would cut all above 255."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
