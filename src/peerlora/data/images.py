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
        one size of it, or does more to values than to scale and shift them.
        """
        told = f"model.source={source!r}: its image processor"
        _check_sizes(processor, told)
        image = _noise(side)
        try:
            shown, read = (np.asarray(_processed(processor, image, plain)) for plain in (True, False))
        except Exception as error:  # any library processor may come, with any kind of failure
            raise ModelError(f"{told} fails on an image ({first_line(error)}); give another model") from None
        if shown.dtype != np.uint8 or shown.ndim != 3 or len(shown) != 3 or read.shape != shown.shape:
            raise ModelError(
                f"{told} makes {read.dtype} {list(read.shape)} of an RGB image; expected 3 channels of one height and "
                "width; give another model"
            )
        scale, shift = zip(*(_line(one, other) for one, other in zip(shown, read, strict=True)), strict=True)
        pixels = Pixels(shown[None], np.array(scale), np.array(shift))
        again = pixels.scale[:, None, None] * shown + pixels.shift[:, None, None]
        if np.abs(again - read).max() > _NOISE * max(1.0, float(np.abs(read).max())):
            raise ModelError(f"{told} does more to pixels than to scale and shift them; give another model")
        return cls(processor, tokens(shown.shape), shown.shape, pixels.scale, pixels.shift)

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


def _check_sizes(processor: Any, told: str) -> None:
    """Refuse sizes that no memory could hold, before an image gets them."""
    for name in ("size", "crop_size", "pad_size"):
        given = getattr(processor, name, None)
        for side, length in dict(given or {}).items():
            if isinstance(length, int | float) and not 1 <= length <= _LARGEST:
                raise ModelError(f"{told} has {name}.{side}={length}; expected 1 to {_LARGEST} pixels; mend it")


def _noise(side: int) -> Any:
    from PIL import Image

    values = numpy_generator(0, "noise").integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def _line(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Scale and shift of the straight line from one channel's bytes to what is read of them."""
    x, y = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    low, high = int(x.argmin()), int(x.argmax())
    scale = (y[high] - y[low]) / (x[high] - x[low]) if x[high] > x[low] else 0.0
    return scale, y[low] - scale * x[low]
