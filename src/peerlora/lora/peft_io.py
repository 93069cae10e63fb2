"""One client's adapter <-> a PEFT adapter folder, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peerlora.errors import ModelError
from peerlora.lora.adapters import Adapters, AdapterSpec, cut
from peerlora.lora.attach import StackedModel

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class ExportContext:
    """What an adapter folder says beside its tensors."""

    base_source: str
    task_type: str
    dropout: float
    extra_modules: tuple[str, ...] = ()
    """Frozen modules whose weights the base lacks and which we initialised: exported, else a loader draws its own."""
    tokenizer: Any = None
    labels: tuple[str, ...] = ()
    """Class names by id."""
    facts: Mapping[str, Any] = field(default_factory=dict)


def export_adapter(folder: Path, x: Adapters, client: int, model: StackedModel, context: ExportContext) -> Path:
    """Write row ``client`` of ``x`` as a folder that ``PeftModel.from_pretrained`` loads."""
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    rank = int(x.ranks[client])
    tensors = _lora_tensors(x, client, rank) | _full_tensors(x, client, model, context)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    full = [*model.targets.heads, *context.extra_modules]
    config = LoraConfig(
        r=rank,
        lora_alpha=_whole(x.spec.alpha),  # pyright: ignore[reportArgumentType] # PEFT takes fractions too
        lora_dropout=context.dropout,
        target_modules=[layer.name for layer in x.spec.layers],
        modules_to_save=full or None,
        task_type=context.task_type,
        base_model_name_or_path=context.base_source,
        fan_in_fan_out=_transposed(model),
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    _sort_config(folder / "adapter_config.json")
    if context.tokenizer is not None:
        context.tokenizer.save_pretrained(str(folder))
    if context.labels:  # PEFT's config has no place for them
        names = {"id2label": dict(enumerate(context.labels))}
        (folder / "labels.json").write_text(json.dumps(names, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(context, rank, x.spec), encoding="utf-8")
    return folder


def _whole(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _lora_tensors(x: Adapters, client: int, rank: int) -> dict[str, Tensor]:
    tensors = {}
    for slot in x.spec.slots:
        if slot.block != "head":
            value = x.spec.view(slot, x.flat)[client]
            own = value[:rank] if slot.block == "A" else value[:, :rank]
            tensors[f"{_PREFIX}{slot.name}.lora_{slot.block}.weight"] = own.contiguous().clone()
    return tensors


def _full_tensors(x: Adapters, client: int, model: StackedModel, context: ExportContext) -> dict[str, Tensor]:
    """The head and other modules saved whole: trained tensors from the row, frozen ones from the base."""
    trained = {name: value[client] for name, value in x.head.items()}
    tensors = {}
    for module in (*model.targets.heads, *context.extra_modules):
        for name, value in model.base.get_submodule(module).state_dict(prefix=f"{module}.").items():
            plain = name.replace(".base.", ".")  # a swapped-in layer keeps the original under `base`
            tensors[_PREFIX + plain] = (trained[plain] if plain in trained else value).detach().contiguous().clone()
    return tensors


def _transposed(model: StackedModel) -> bool:
    first = model.base.get_submodule(model.targets.layers[0].name)
    return type(getattr(first, "base", first)).__name__ == "Conv1D"


def _sort_config(path: Path) -> None:
    """PEFT writes its target set in hash order; sorted, equal adapters give equal files."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card(context: ExportContext, rank: int, spec: AdapterSpec) -> str:
    head = {"base_model": context.base_source, "library_name": "peft", "tags": ["lora", "peerlora"]}
    facts = "\n".join(f"| {key} | {value} |" for key, value in context.facts.items())
    return (
        f"---\n{json.dumps(head, indent=2)}\n---\n\n# LoRA adapter trained without a server\n\n"
        f"Rank {rank}, alpha {_whole(spec.alpha)}, {len(spec.layers)} layers of `{context.base_source}`.  "
        "Trained with peerlora: every client keeps its data and averages adapters with its neighbours.\n\n"
        "```python\nfrom peft import PeftModel\n"
        "model = PeftModel.from_pretrained(base_model, this_folder)\n```\n\n"
        f"| run | |\n| --- | --- |\n{facts}\n"
    )


def read_adapter(folder: Path, spec: AdapterSpec, like: Adapters) -> Adapters:
    """A PEFT adapter folder as the starting point of every client in ``like``.

    Ranks must equal the folder's; scaling too.  A head that the folder lacks keeps its initial values.
    Raises ModelError when the folder is missing, damaged, or made for other layers.
    """
    path, config_path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if not path.is_file() or not config_path.is_file():
        raise ModelError(f"adapter.start={str(folder)!r} has no adapter_model.safetensors and adapter_config.json")
    try:
        tensors = load_file(path)
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError) as error:
        raise ModelError(f"adapter.start={str(folder)!r} cannot be read: {error}") from None
    _check_scaling(config, spec, like, folder)
    flat = like.flat.clone()
    for slot in spec.slots:
        key = f"{_PREFIX}{slot.name}" + ("" if slot.block == "head" else f".lora_{slot.block}.weight")
        if key not in tensors and slot.block == "head":
            continue
        value = tensors.get(key)
        if value is None or tuple(value.shape) != cut(slot, spec.rank):
            given = "no such tensor" if value is None else f"shape {tuple(value.shape)}"
            raise ModelError(
                f"adapter.start: {key}: {given}; expected shape {cut(slot, spec.rank)}; use an adapter of these layers"
            )
        if not torch.isfinite(value).all():
            raise ModelError(f"adapter.start: {key} holds values that are not finite; use an undamaged adapter")
        flat[:, slot.start : slot.stop] = value.reshape(-1).to(flat.dtype)
    return Adapters(spec, flat, like.ranks)


def _check_scaling(config: dict[str, Any], spec: AdapterSpec, like: Adapters, folder: Path) -> None:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not like.equal_ranks or rank != spec.rank or alpha != spec.alpha or config.get("use_rslora"):
        raise ModelError(
            f"adapter.start={str(folder)!r} has rank {rank} and alpha {alpha}; the config has rank "
            f"{sorted(set(like.ranks.tolist()))} and alpha {_whole(spec.alpha)}; make adapter.rank and adapter.alpha "
            "equal to the folder's"
        )
