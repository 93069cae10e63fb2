"""A PEFT adapter folder as the start of a run: all that it holds is used, or it is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from peerlora.errors import ModelError
from peerlora.lora.adapters import Adapters, LayerSpec, shape_at_rank
from peerlora.lora.attach import StackedModel
from peerlora.lora.base_models import same_base
from peerlora.lora.base_weights import check_class_order, real_names, within
from peerlora.lora.model_folder import ADAPTER, adapter_weights, base_name, read_settings
from peerlora.lora.peft_io import PREFIX, ExportContext, full_tensors, whole_number

_PLAIN = frozenset(
    "auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying "
    "eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform "
    "loftq_config lora_alpha lora_dropout lora_ga_config megatron_core modules_to_save peft_type peft_version "
    "qalora_group_size r rank_pattern alpha_pattern revision runtime_config target_modules task_type use_rslora".split()
)
"""Settings of PEFT under which the factors still mean scaling times B A, or which are looked at one by one."""
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base as it is."""


def read_adapter(
    folder: Path, x: Adapters, model: StackedModel, context: ExportContext
) -> tuple[Adapters, tuple[str, ...]]:
    """A PEFT adapter folder as the starting point of every client in ``x``, and warnings.

    Rank and scaling must equal the folder's, and every tensor must have its place: in a layer, in a head that trains,
    or in a frozen module with the same values.  A head that the folder lacks keeps its initial values.  A layer of a
    smaller rank (``rank_pattern``) keeps it, since rows and columns of zeros give each other no gradient; one of
    another scaling gets B multiplied by the ratio.
    Raises ModelError when the folder is missing, damaged, or made for something else.
    """
    tensors, config = _read_folder(folder)
    ranks = _check_meaning(config, x, folder)
    flat, known = x.flat.clone(), set()
    for slot in x.spec.slots:
        key = f"{PREFIX}{slot.name}" + ("" if slot.block == "head" else f".lora_{slot.block}.weight")
        known.add(key)
        if key in tensors or slot.block != "head":
            rank, ratio = ranks.get(slot.name, (x.spec.rank, 1.0))
            _check_tensor(key, tensors.get(key), shape_at_rank(slot, rank))
            given = tensors[key].to(flat.dtype)
            missing = x.spec.rank - rank
            if slot.block == "A":
                given = F.pad(given, (0, 0, 0, missing))
            elif slot.block == "B":
                given = F.pad(given * ratio, (0, missing))
            flat[:, slot.start : slot.stop] = given.reshape(-1)
    frozen = {name: value for name, value in full_tensors(x, 0, model, context).items() if name not in known}
    _check_unused({name: value for name, value in tensors.items() if name not in known}, frozen, model, folder)
    brought = [name for name, _ in x.spec.head if PREFIX + name in tensors]
    warnings = _of_base(folder, config, context)
    if brought or any(name in tensors for name in frozen):
        warnings += check_class_order(f"adapter.start={str(folder)!r}", _labels(folder), context.labels)
    elif x.spec.head:
        warnings += (f"adapter.start={str(folder)!r} has no head; the base's own is where clients begin",)
    return replace(x, flat=flat), warnings


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    subject = f"adapter.start={str(folder)!r}"
    path = adapter_weights(folder, subject)
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ModelError(f"{subject} cannot be read: {error}; use an undamaged adapter") from None
    return tensors, read_settings(folder / ADAPTER)


def _check_tensor(key: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    if value is None or tuple(value.shape) != shape:
        given = "no such tensor" if value is None else f"shape {tuple(value.shape)}"
        raise ModelError(f"adapter.start: {key}: {given}; expected shape {shape}; use an adapter of these layers")
    if not torch.isfinite(value).all():
        raise ModelError(f"adapter.start: {key} holds values that are not finite; use an undamaged adapter")


def _check_unused(
    tensors: Mapping[str, Tensor], frozen: Mapping[str, Tensor], model: StackedModel, folder: Path
) -> None:
    """Refuse tensors that no client would train or use, unless the model holds the same values."""
    layers = [name for name in tensors if ".lora_" in name]
    if layers:
        raise ModelError(
            f"adapter.start={str(folder)!r} adapts layers that this config does not ({layers[0]}, {len(layers)} "
            "tensors in all); make adapter.targets equal to the folder's target_modules"
        )
    base = dict(model.base.named_parameters())
    for name, value in tensors.items():
        held = frozen.get(name, base.get(name.removeprefix(PREFIX)))
        if held is not None and held.shape == value.shape and torch.equal(value.to(held), held):
            continue
        if name in frozen and within(name.removeprefix(PREFIX), model.targets.heads):
            raise ModelError(
                f"adapter.start={str(folder)!r} was trained with another head ({name} differs) and adapter.head=frozen "
                "would drop it; use adapter.head=mixed or private"
            )
        if name in frozen:
            raise ModelError(
                f"adapter.start={str(folder)!r} was trained with another {name.removeprefix(PREFIX)}, which the base "
                "lacks and this run draws from its seed; use the seed of the run that wrote the folder"
            )
        raise ModelError(
            f"adapter.start={str(folder)!r} holds {name.removeprefix(PREFIX)} ({len(tensors)} tensors beside factors "
            "and head), which would be left out, and the adapter is another without it; name the module in "
            "adapter.modules_to_save, or merge it into a base model with PEFT and start from that"
        )


def _check_meaning(config: dict[str, Any], x: Adapters, folder: Path) -> dict[str, tuple[int, float]]:
    """Refuse what would make the same factors another update than the folder means.

    Returns of every layer its rank and what its scaling is relative to the config's.
    """
    rank, alpha, start = config.get("r"), config.get("lora_alpha"), config.get("init_lora_weights", True)
    special = [name for name in sorted(config) if name not in _PLAIN and config[name]]
    if config.get("peft_type") != "LORA":
        special.insert(0, f"peft_type={config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        special.append(f"bias={config['bias']}")
    if start not in _STARTS:
        special.append(f"init_lora_weights={start}, which changes the base,")
    if special:
        raise ModelError(
            f"adapter.start={str(folder)!r} uses {' and '.join(special)}; expected plain LoRA, an update of "
            "scaling times B A"
        )
    rslora = bool(config.get("use_rslora"))
    if rslora != x.spec.rslora:
        raise ModelError(
            f"adapter.start={str(folder)!r} has use_rslora={rslora} where adapter.rslora={x.spec.rslora}; make "
            "adapter.rslora equal to the folder's"
        )
    layers = _rank_and_alpha(config, x.spec.layers, folder)
    widest = max((own for own, _ in layers.values()), default=0)
    if not x.equal_ranks or x.spec.rank not in (rank, widest) or x.spec.rank < widest or alpha != x.spec.alpha:
        raise ModelError(
            f"adapter.start={str(folder)!r} has rank {widest} and alpha {alpha}; the config has rank "
            f"{sorted(set(x.ranks.tolist()))} and alpha {whole_number(x.spec.alpha)}; make adapter.rank and "
            "adapter.alpha equal to the folder's"
        )
    plain = x.spec.scaling(x.spec.rank)
    return {name: (own, replace(x.spec, alpha=of).scaling(own) / plain) for name, (own, of) in layers.items()}


def _rank_and_alpha(config: dict[str, Any], layers: Sequence[LayerSpec], folder: Path) -> dict[str, tuple[int, float]]:
    """Rank and alpha of every adapted layer, by PEFT's own rules for patterns.  Raises ModelError."""
    from peft.utils.other import get_pattern_key

    patterns = []
    for setting, default, kinds in (("rank_pattern", "r", int), ("alpha_pattern", "lora_alpha", int | float)):
        found = config.get(setting) or {}
        if not isinstance(found, dict) or not all(isinstance(n, kinds) and n > 0 for n in found.values()):
            raise ModelError(
                f"adapter.start={str(folder)!r}: {setting} in adapter_config.json is {found!r}; expected layer names "
                "with positive numbers, whole ones for ranks; mend it"
            )
        patterns.append((found, config.get(default)))

    def own(name: str, found: dict[str, Any], default: Any) -> Any:
        return found.get(get_pattern_key(list(found), name), default)

    try:
        return {each.name: (int(own(each.name, *patterns[0])), float(own(each.name, *patterns[1]))) for each in layers}
    except (re.error, TypeError, ValueError) as error:
        raise ModelError(
            f"adapter.start={str(folder)!r}: rank and alpha of its layers cannot be told ({error}); mend r, lora_alpha "
            "and their patterns in adapter_config.json"
        ) from None


def _labels(folder: Path) -> tuple[str, ...]:
    """The class names that `peerlora` wrote into a folder; () where it wrote none."""
    path = folder / "labels.json"
    return real_names(read_settings(path)) if path.is_file() else ()


def _of_base(folder: Path, config: dict[str, Any], context: ExportContext) -> tuple[str, ...]:
    named = base_name(config)
    if named is None or any(same_base(named, own) for own in (context.base_source, context.location) if own):
        return ()
    return (
        f"adapter.start={str(folder)!r} was trained on {named}, this run's base is {context.base_source}; where "
        "these are not the same weights, it means nothing",
    )
