"""What one forward pass of a few rows shows of a base model, whatever its type: asked before anything is attached.

A stacked graph of many clients is right only where every adapted layer sees the rows of a batch one after another.
DeBERTa's projections also see relative positions, XLNet and Longformer put tokens first: such models show it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from peerlora.config.task_kinds import TaskKind
from peerlora.data.batches import collate
from peerlora.data.dataset import Dataset
from peerlora.errors import ModelError, first_line
from peerlora.lora.attach import inputs_of, with_decoder_inputs
from peerlora.lora.layer import Layout
from peerlora.randomness import numpy_generator

_ROWS = 3  # rows of one forward: one is exchanged at the front, then one at the end
_WRITTEN = 3  # tokens that a decoder writes in them
_NOISE = 1e-3  # of the largest value; larger differences are no rounding
_LOOKED_AT = 1000  # rows, among which the short ones are taken


@dataclass(frozen=True)
class ForwardFacts:
    """How a model's forward treats layers, rows, padding and later tokens."""

    used: frozenset[str]
    """The modules, of those asked for, on which the logits depend."""
    layout: Layout
    reads_padding: bool
    """Whether padding changes what is said of a row, on whichever side it is."""
    sees_later_tokens: bool
    """Whether the logits of a token depend on tokens behind it."""


def observe_forward(
    model: nn.Module, source: str, modules: Sequence[str], data: Dataset, pad: int | None, kind: TaskKind
) -> ForwardFacts:
    """Run a model on a few short rows of ``data`` and look at the inputs of ``modules``; a decoder writes some tokens.

    Of images those of ``data`` count for their size alone: noise shows more.

    Raises ModelError where the forward fails, or gives no logits.
    """
    watch = _Watch(model, modules)
    predicts_tokens, writes = kind.predicts_tokens, kind.target == "text"
    rows = _three_rows(data, predicts_tokens, writes) if data.pixels is None else _three_images(data)

    def forward(numbers: list[int], left: bool) -> tuple[Tensor, dict[str, list[Tensor]]]:
        with watch.inputs() as seen:
            return _logits_of(model, rows, numbers, pad, left, writes), seen

    try:
        both = not predicts_tokens and data.pixels is None
        side = _unread_side(lambda *given: forward(*given)[0], both=both, writes=writes)
        left = side == "left"
        first, before = forward([0, 1, 0], left)
        used = watch.used(first)
        with torch.no_grad():
            second, between = forward([2, 1, 0], left)
            third, after = forward([2, 1, 2], left)
    except Exception as error:  # any library model may come, with any kind of failure
        raise _failed(model, source, data, error) from None
    finally:
        watch.stop()
    rows_first = all(
        _rows_first(one, two, 0) and _rows_first(two, three, _ROWS - 1)
        for one, two, three in [
            *((before[name], between[name], after[name]) for name in modules if before[name]),
            ([first], [second], [third]),
        ]
    )
    changed = int(rows.lengths[0]) - 1  # of a language model's rows, the last token alone
    later = predicts_tokens and _differ(first[0, :changed], second[0, :changed])
    return ForwardFacts(used, Layout(rows_first and side is not None, side or "right"), side is None, later)


def find_padding_side(
    model: nn.Module, source: str, data: Dataset, pad: int, kind: TaskKind
) -> Literal["right", "left"] | None:
    """The side on which padding changes nothing of what a model says of a row; None where it does on both.

    ``data``: some short rows of unlike length.  Raises ModelError where the forward fails.
    """
    writes = kind.target == "text"
    rows = _three_rows(data, False, writes)

    def forward(numbers: list[int], left: bool) -> Tensor:
        return _logits_of(model, rows, numbers, pad, left, writes)

    try:
        return _unread_side(forward, both=True, writes=writes)
    except Exception as error:  # any library model may come, with any kind of failure
        raise _failed(model, source, data, error) from None


def _unread_side(
    forward: Callable[[list[int], bool], Tensor], both: bool, writes: bool
) -> Literal["right", "left"] | None:
    """The first side of padding that changes no logits; without ``both``, only the right one is looked at."""
    with torch.no_grad():
        alone = forward([0], False)[0]
        for side in ("right", "left") if both else ("right",):
            left = side == "left"
            if _same_row(alone, forward([0, 1, 0], left)[0], left and not writes):
                return side
    return None


def _logits_of(
    model: nn.Module, rows: Dataset, numbers: list[int], pad: int | None, left: bool, writes: bool
) -> Tensor:
    """What a model says of some rows, padded on one side; a decoder writes their targets."""
    batch = collate(rows, [np.array(numbers)], pad, next(_floats(model)).dtype, left).to(_device(model))
    inputs = with_decoder_inputs(model, batch.inputs, batch.targets) if writes else batch.inputs
    logits = model(**{name: each for name, each in inputs.items() if name in inputs_of(model)}).logits
    return logits[:, :_WRITTEN] if writes else logits


def _failed(model: nn.Module, source: str, data: Dataset, error: Exception) -> ModelError:
    name = f"model.source={source!r}: {type(model).__name__} fails on"
    if data.pixels is None:
        return ModelError(
            f"{name} rows of tokens ({first_line(error)}); give a model that reads texts, or another task.kind"
        )
    size = " x ".join(map(str, data.pixels.shape))
    return ModelError(
        f"{name} images of {size} values, which its image processor makes ({first_line(error)}); give a model with the "
        "image processor that belongs to it"
    )


class _Watch:
    """Hooks on some modules: their inputs, and whether what they give reaches the logits."""

    def __init__(self, model: nn.Module, modules: Sequence[str]):
        self._seen: dict[str, list[Tensor]] = {}
        self._zeros = {name: torch.zeros((), device=_device(model), requires_grad=True) for name in modules}
        self._hooks = [self._hook(name, model.get_submodule(name)) for name in modules]

    def _hook(self, name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def note(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
            self._seen[name].append(given[0].detach())
            return result + self._zeros[name].to(result.dtype)

        return module.register_forward_hook(note)

    @contextmanager
    def inputs(self) -> Iterator[dict[str, list[Tensor]]]:
        """The inputs of every module, call by call, of the forward inside."""
        self._seen = {name: [] for name in self._zeros}
        yield self._seen

    def used(self, logits: Tensor) -> frozenset[str]:
        """The modules on which ``logits`` depend."""
        zeros = list(self._zeros.values())
        if not logits.requires_grad:
            return frozenset()
        found = torch.autograd.grad(logits.float().sum(), zeros, allow_unused=True)
        return frozenset(name for name, gradient in zip(self._zeros, found, strict=True) if gradient is not None)

    def stop(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def _three_rows(data: Dataset, predicts_tokens: bool, writes: bool) -> Dataset:
    """Two short rows of unlike tokens, first and last, and a longer one between them.

    Of a language model's, the last one is the first with another last token.  What a decoder writes is as long for all,
    and other tokens for each.
    """
    lengths = data.lengths[:_LOOKED_AT]
    short = np.argsort(lengths, kind="stable")
    order: list[int] = np.concatenate([short[lengths[short] > 2], short[lengths[short] <= 2]]).tolist()
    first = order[0]
    longer = next((row for row in order if lengths[row] > lengths[first]), first)
    unlike = next((row for row in order if not np.array_equal(_tokens(data, row), _tokens(data, first))), first)
    rows = data.take([first, longer, first if predicts_tokens else unlike])
    if predicts_tokens or unlike == first:
        ids = rows.ids.copy()
        ids[-1] = next((token for token in data.ids.tolist() if token != ids[-1]), ids[-1])
        rows = Dataset(ids, rows.starts, rows.types, rows.labels, rows.names)
    if writes:
        tokens = np.resize(np.unique(data.ids), _ROWS).astype(np.int32)
        starts = np.arange(_ROWS + 1) * _WRITTEN
        rows = replace(rows, targets=np.repeat(tokens, _WRITTEN), target_starts=starts)
    return rows


def _three_images(data: Dataset) -> Dataset:
    """Three images of noise."""
    assert data.pixels is not None
    rows = data.take([0] * _ROWS)
    noise = numpy_generator(0, "observed images").integers(0, 256, (_ROWS, *data.pixels.shape), dtype=np.uint8)
    return replace(rows, pixels=replace(data.pixels, bytes=noise))


def _tokens(data: Dataset, row: int) -> np.ndarray:
    return data.ids[data.starts[row] : data.starts[row + 1]]


def _rows_first(before: Sequence[Tensor], after: Sequence[Tensor], row: int) -> bool:
    """Whether an exchange of one row changed this row's share of every tensor's first axis, and nothing else."""
    return len(before) == len(after) and all(
        one.shape == other.shape
        and one.shape[0] % _ROWS == 0
        and [_differ(*pair) for pair in zip(one.chunk(_ROWS), other.chunk(_ROWS), strict=True)]
        == [place == row for place in range(_ROWS)]
        for one, other in zip(before, after, strict=True)
    )


def _same_row(alone: Tensor, padded: Tensor, left: bool) -> bool:
    """Whether the logits of a row, or of its tokens, are those that it has without padding."""
    if alone.ndim > 1:
        padded = padded[-len(alone) :] if left else padded[: len(alone)]
    return not _differ(alone, padded)


def _differ(one: Tensor, other: Tensor) -> bool:
    if not one.numel():
        return False
    return bool((one - other).abs().max() > _NOISE * one.abs().max().clamp_min(1e-6))


def _floats(model: nn.Module) -> Iterator[Tensor]:
    return (parameter for parameter in model.parameters() if parameter.is_floating_point())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
