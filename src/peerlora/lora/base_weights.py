"""What a base model's files lack or bring beside the model: refused, warned of, or a head to be drawn."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from peerlora.config.task_kinds import task_kind
from peerlora.errors import ModelError

_SHOWN = 4  # names in one message


def check_weights(
    source: str, model: Any, info: dict[str, Any], kind: str, own: tuple[str, ...], names: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(modules that were drawn since the files lack them, warnings) from the library's loading report ``info``.

    ``own``: the base's class names, ``names``: those of the data.  Raises ModelError where anything but a head or a
    pooler is missing or has another shape, and where a language model has no head of its own.
    """
    mismatched = {str(key): (tuple(theirs), tuple(ours)) for key, theirs, ours in info["mismatched_keys"]}
    _check_shapes(source, model, mismatched)
    if flaws := [*info["error_msgs"], *info.get("conversion_errors", {}).values()]:
        raise ModelError(f"model.source={source!r}: {str(flaws[0]).strip().splitlines()[0]}; give undamaged weights")
    missing = sorted({*info["missing_keys"], *mismatched})
    inner = [key for key in missing if inside_body(model, key) and "pooler" not in key]
    if inner:
        extra = sorted(info["unexpected_keys"])
        others = f"; the files hold others instead: {_some(extra)}" if extra else ""
        raise ModelError(
            f"model.source={source!r}: the weights of {len(inner)} tensors of {type(model).__name__} are missing: "
            f"{_some(inner)}{others}; give a model whose weights and config.json belong together"
        )
    if missing and task_kind(kind).has_language_head:
        raise ModelError(
            f"model.source={source!r} has no weights for its language head ({_some(missing)}); task.kind={kind} needs "
            "a model that was saved with it; give one, or another task.kind"
        )
    drawn = tuple(sorted({key.rsplit(".", 1)[0] for key in missing}))
    return drawn, (*_of_heads(source, mismatched, own, names), *_of_layers(source, model, info["unexpected_keys"]))


def inside_body(model: Any, name: str) -> bool:
    """Whether a parameter belongs to the model itself, not to what its task puts on top."""
    body = getattr(model, "base_model_prefix", "")
    return name.startswith(f"{body}.") if body and hasattr(model, body) else True


def within(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or a parameter is one of these modules, or lies inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def quantised_form(base: nn.Module) -> str | None:
    """How a base keeps its weights, in words for a message, where only a quantised form of them is there; else None."""
    if getattr(getattr(base, "config", None), "quantization_config", None):
        return "this one is quantised"
    kinds = {parameter.dtype for parameter in base.parameters() if not parameter.is_floating_point()}
    return f"this one has weights in {', '.join(sorted(map(str, kinds)))}" if kinds else None


def top_modules(model: Any) -> tuple[str, ...]:
    """What a task puts on top of a model: its modules with parameters outside the model itself."""
    children = [name for name, module in model.named_children() if next(module.parameters(), None) is not None]
    return tuple(name for name in children if not inside_body(model, f"{name}."))


def real_names(config: dict[str, Any]) -> tuple[str, ...]:
    """The class names in a model's config, by id; () where there are none but LABEL_0, LABEL_1, ..."""
    given = config.get("id2label")
    if not isinstance(given, dict) or not given:
        return ()
    try:
        names = {int(number): str(name) for number, name in given.items()}
    except ValueError:
        return ()
    if sorted(names) != list(range(len(names))) or all(name == f"LABEL_{i}" for i, name in names.items()):
        return ()
    return tuple(names[i] for i in range(len(names)))


def check_class_order(what: str, own: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """Warnings on a trained head whose class names ``own`` are not the data's.

    Raises ModelError where they are the same in another order, which would swap what the head has learned.
    """
    if not own or not names or own == names:
        return ()
    plain = {name.strip().casefold(): name for name in names}
    if len(plain) == len(names) and set(plain) == {name.strip().casefold() for name in own}:
        order = [plain[name.strip().casefold()] for name in own]
        if tuple(order) == names:  # another spelling only
            return ()
        raise ModelError(
            f"{what} was trained with the classes in the order {', '.join(own)}, the data have them as "
            f"{', '.join(names)}; set task.labels={order}".replace("'", '"')
        )
    return (
        f"{what} was trained on the classes {_some(own)}, the data have {_some(names)}: what it knows of the former is "
        "taken for the latter, in this order",
    )


def _check_shapes(source: str, model: Any, mismatched: dict[str, tuple[Any, Any]]) -> None:
    for key, (theirs, ours) in sorted(mismatched.items()):
        if inside_body(model, key):
            raise ModelError(
                f"model.source={source!r} cannot be loaded ({key} has the shape {theirs}, config.json asks for {ours}; "
                f"{len(mismatched)} such tensors); give a model whose weights and config.json belong together"
            )


def _of_heads(
    source: str, mismatched: dict[str, tuple[Any, Any]], own: tuple[str, ...], names: tuple[str, ...]
) -> tuple[str, ...]:
    if not mismatched:
        return ()
    theirs, ours = next(iter(mismatched.values()))
    they = f" ({_some(own)})" if own else ""
    we = f" ({_some(names)})" if names else ""
    return (
        f"{source} has a head of {theirs[0]} outputs{they}, the data need {ours[0]}{we}: a new head is drawn from the "
        "seed, and what the old one has learned is left out",
    )


def _of_layers(source: str, model: nn.Module, unexpected: Iterable[str]) -> tuple[str, ...]:
    """A warning where the files hold numbered layers that the model lacks: its config.json was cut, or is another's."""
    stacks = [f".{name}" for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    numbered = [(key, re.match(r"(.+?)\.\d+\.", key)) for key in unexpected]
    cut = sorted(key for key, found in numbered if found and any(stack.endswith(f".{found[1]}") for stack in stacks))
    if not cut:
        return ()
    return (
        f"{source}: {len(cut)} tensors of its files belong to no layer of the model and are left out: {_some(cut)}",
    )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (f", ... ({len(listed)} in all)" if len(listed) > _SHOWN else "")
