"""Images -> pixels, as the image processor of a base model makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peerlora.data.dataset import Dataset
from peerlora.data.pixels import Pixels
from peerlora.environment import main_memory
from peerlora.errors import DataError, ModelError, first_line
from peerlora.randomness import numpy_generator

_SHARE = 4  # 1 / share of the machine's memory that the pixels of one source may take
_LARGEST = 2048  # pixels of a side of what a model reads
_NOISE = 1e-5  # of what a model reads; larger differences are no rounding


@dataclass(frozen=True)
class ImageReader:
    """What stands for images in place of a tokenizer: the base model's image processor."""

    processor: Any
    """Of transformers, with pillow behind it."""
    tokens: int
    """What the model makes of an image: its patches, and those of classes."""
    shape: tuple[int, ...]
    """Channels, height and width of what the model reads."""
    scale: np.ndarray
    """float64 [channel]; see ``Pixels``."""
    shift: np.ndarray
    """float64 [channel]"""

    pad_token_id = None
    """No image is padded."""

    @classmethod
    def of(cls, processor: Any, side: int, tokens: Callable[[tuple[int, ...]], int], source: str) -> ImageReader:
        """Find out what a processor does with an image of so many pixels a ``side``, as those that the model reads.

        ``tokens``: what the model makes of an image of a shape.  Raises ModelError for one that makes no RGB image of
        one size of it, or does anything to values but to scale and shift them.
        """
        subject = f"model.source={source!r}: its image processor"
        _check_sizes(processor, subject)
        image = _noise(side)
        try:
            with np.errstate(all="ignore"):  # of a deviation of 0, which is refused below
                shown, read = (np.asarray(_processed(processor, image, plain)) for plain in (True, False))
        except Exception as error:  # any library processor may come, with any kind of failure
            raise ModelError(f"{subject} fails on an image ({first_line(error)}); give another model") from None
        if shown.dtype != np.uint8 or shown.ndim != 3 or len(shown) != 3 or read.shape != shown.shape:
            raise ModelError(
                f"{subject} makes {read.dtype} {list(read.shape)} of an RGB image; expected 3 channels of one height "
                "and width; give another model"
            )
        with np.errstate(all="ignore"):
            found = _scale_and_shift(shown, read)
        if found is None:
            raise ModelError(
                f"{subject} does not scale and shift pixels to finite numbers; give another model, or mend it"
            )
        return cls(processor, tokens(shown.shape), shown.shape, *found)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the processor's settings into a folder."""
        self.processor.save_pretrained(folder)

    def read(self, images: Iterable[tuple[str, Any]], count: int, source: str) -> Pixels:
        """Resize ``count`` images of pillow, each with what a message calls it.

        Raises DataError where they do not fit into memory, or one comes out in another size.
        """
        size = count * int(np.prod(self.shape))
        if size > main_memory() // _SHARE:
            raise DataError(
                f"{source}: {count:,} images of {self.shape[1]} x {self.shape[2]} pixels take {size / 1e9:.1f} GB, "
                f"more than 1/{_SHARE} of this machine's memory; use fewer rows (data.train_per_class)"
            )
        found = np.empty((count, *self.shape), dtype=np.uint8)
        for place, (where, image) in enumerate(images):
            shown = _processed(self.processor, image, plain=True)
            if shown.shape != self.shape:
                raise DataError(
                    f"{where}: becomes {shown.shape[1]} x {shown.shape[2]} pixels, others {self.shape[1]} x "
                    f"{self.shape[2]}; the model's image processor does not bring all to one size: make them of one "
                    "shape, or set do_resize and a height and width in preprocessor_config.json"
                )
            found[place] = shown
        return Pixels(found, self.scale, self.shift)

    def dataset(self, pixels: Pixels, labels: np.ndarray, names: tuple[str, ...]) -> Dataset:
        """The images with their labels."""
        starts = np.arange(len(pixels) + 1, dtype=np.int64) * self.tokens
        return Dataset(np.zeros(0, np.int32), starts, None, labels, names, pixels=pixels)

    def samples(self, count: int, names: tuple[str, ...]) -> Dataset:
        """So many images of noise: for those who look at a model and have no data."""
        noise = numpy_generator(0, "sample images").integers(0, 256, (count, *self.shape), dtype=np.uint8)
        return self.dataset(Pixels(noise, self.scale, self.shift), np.zeros(count, np.int64), names)


def _processed(processor: Any, image: Any, plain: bool) -> np.ndarray:
    """[channel, height, width] what a processor makes of an image; ``plain``: in bytes, as it is resized."""
    more = {"do_rescale": False, "do_normalize": False} if plain else {}
    return processor(images=image, return_tensors="np", **more)["pixel_values"][0]


def _check_sizes(processor: Any, subject: str) -> None:
    """Refuse sizes that no memory could hold, before an image gets them."""
    for name in ("size", "crop_size", "pad_size"):
        given = getattr(processor, name, None)
        for side, length in dict(given or {}).items():
            if isinstance(length, int | float) and not 1 <= length <= _LARGEST:
                raise ModelError(f"{subject} has {name}.{side}={length}; expected 1 to {_LARGEST} pixels; mend it")


def _noise(side: int) -> Any:
    from PIL import Image

    values = numpy_generator(0, "noise").integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def _scale_and_shift(shown: np.ndarray, read: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """By channel the straight line from bytes to what is read of them; None where it is none, or not finite."""
    x, y = (each.reshape(len(each), -1).astype(np.float64) for each in (shown, read))
    low, high = x.argmin(1)[:, None], x.argmax(1)[:, None]
    x0, x1, y0, y1 = (np.take_along_axis(of, at, 1) for of in (x, y) for at in (low, high))
    scale = (y1 - y0) / np.maximum(x1 - x0, 1)
    shift = y0 - scale * x0
    wrong = np.abs(scale * x + shift - y).max()
    if not wrong <= _NOISE * max(1.0, float(np.abs(y).max())):  # of NaN neither holds
        return None
    return scale[:, 0], shift[:, 0]
