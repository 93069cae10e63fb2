"""What turns rows into what a base model reads: its tokenizer, or its image processor."""

from __future__ import annotations

from typing import Any

from peerlora.config.task_kinds import TaskKind
from peerlora.data.images import ImageReader
from peerlora.lora.base_models import load_image_processor, load_tokenizer

_SIDE, _PATCH = 224, 16  # pixels of an image's and of a patch's side, where a model's config does not say


def load_reader(source: str, kind: TaskKind, revision: str | None = None) -> Any:
    """Load the tokenizer of a base model, or of a task of images its ``ImageReader``.  Raises ModelError."""
    if not kind.reads_images:
        return load_tokenizer(source, revision)
    processor, config = load_image_processor(source, revision)
    return ImageReader.of(processor, _side(config), lambda shape: count_patches(config, shape), source)


def count_patches(config: Any, shape: tuple[int, ...]) -> int:
    """How many tokens a model makes of an image [channel, height, width]: one for each patch, and those of classes.

    Exact for ViT and DeiT; of other models it is what a graph of many rows is sized by.
    """
    patch = getattr(config, "patch_size", None)
    high, wide = patch if isinstance(patch, list | tuple) and len(patch) == 2 else (patch, patch)
    if not isinstance(high, int) or not isinstance(wide, int) or min(high, wide) < 1:
        high = wide = _PATCH
    of_classes = 2 if getattr(config, "model_type", None) == "deit" else 1  # DeiT has one of distillation, too
    return (shape[1] // high) * (shape[2] // wide) + of_classes


def _side(config: Any) -> int:
    """The side of the images that a model was trained on, in pixels."""
    given = getattr(config, "image_size", None)
    side = given[0] if isinstance(given, list | tuple) and given else given
    return side if isinstance(side, int) and 1 <= side <= 2048 else _SIDE
