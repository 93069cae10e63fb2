"""One client's adapter as a PEFT adapter folder, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peerlora.lora.adapter_card import write_card
from peerlora.lora.adapter_init import Principal
from peerlora.lora.adapters import Adapters
from peerlora.lora.attach import StackedModel
from peerlora.lora.merged import whole
from peerlora.lora.product import decompose

PREFIX = "base_model.model."
"""Of every tensor's name in a folder."""


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
    location: str = ""
    """Where PEFT finds the base model, if that is not ``base_source``."""
    revision: str | None = None
    """Of the base model on the hub."""
    principal: Principal | None = None
    """What the run's base is without and the adapters began with; an export is for the whole base."""
    initialised: tuple[str, ...] = ()
    """All modules whose weights the base lacks."""


def export_adapter(
    folder: Path, x: Adapters, client: int, model: StackedModel, context: ExportContext, rank: int | None = None
) -> Path:
    """Write row ``client`` of ``x`` as a folder that ``PeftModel.from_pretrained`` loads.

    What the client has merged becomes part of the adapter, whose rank grows.  ``rank``: the best approximation of at
    most this rank instead; the card says what it leaves out.
    """
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    x, client = x.rows([client]), 0  # a run writes a folder of each, and what follows is for this one alone
    x = context.principal.subtracted(x) if context.principal else x
    factors = own_factors(x) if rank is None and x.merged is None else _whole_factors(x, rank, context)
    context = replace(context, facts={**context.facts, **factors.facts, **context.facts})
    tensors = lora_tensors(factors) | full_tensors(x, client, model, context)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapted = {layer.name for layer in x.spec.layers}
    full = [
        *model.targets.heads,
        *model.targets.saved,
        *(name for name in context.extra_modules if name not in adapted),
    ]
    config = LoraConfig(
        r=factors.rank,
        lora_alpha=whole_number(factors.alpha),  # pyright: ignore[reportArgumentType] # PEFT takes fractions too
        lora_dropout=context.dropout,
        target_modules=[layer.name for layer in x.spec.layers],
        rank_pattern=factors.rank_pattern,
        alpha_pattern=factors.alpha_pattern,
        modules_to_save=full or None,
        task_type=context.task_type or None,
        auto_mapping=None if context.task_type else _own_class(model.base),
        base_model_name_or_path=context.location or context.base_source,
        revision=context.revision,
        fan_in_fan_out=_transposed(model),
        use_rslora=factors.rslora,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    _sort_config(folder / "adapter_config.json")
    if context.tokenizer is not None:
        context.tokenizer.save_pretrained(str(folder))
    if context.labels:  # PEFT's config has no place for them
        names = {"id2label": dict(enumerate(context.labels))}
        (folder / "labels.json").write_text(json.dumps(names, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(adapter_card(context, factors), encoding="utf-8")
    return folder


def _own_class(base: Any) -> dict[str, str] | None:
    """By which PEFT finds the class of a base model of a task that it has no type for."""
    kind = type(base)
    if kind.__module__.partition(".")[0] != "transformers":
        return None
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def whole_number(alpha: float) -> int | float:
    """A number as PEFT writes it: without a point where it is whole."""
    return int(alpha) if float(alpha).is_integer() else alpha


@dataclass(frozen=True)
class Factors:
    """One client's update as PEFT wants it: by layer (B, A), and alpha."""

    layers: Mapping[str, tuple[Tensor, Tensor]]
    rank: int
    """Of layers that have no pattern."""
    alpha: float
    facts: Mapping[str, Any]
    """For the card."""
    rslora: bool = False

    @property
    def rank_pattern(self) -> dict[str, int]:
        """The ranks of the layers that have a smaller one."""
        return {f"^{name}": len(A) for name, (_, A) in self.layers.items() if len(A) != self.rank}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """The alphas by which layers of a smaller rank have the same scaling."""
        power = 0.5 if self.rslora else 1.0
        return {name: self.alpha * (rank / self.rank) ** power for name, rank in self.rank_pattern.items()}


def own_factors(x: Adapters) -> Factors:
    """The factors of adapters of one client as they are, without ranks that are zero."""
    rank = int(x.ranks[0])
    layers = {name: _without_zeros(x.B[name][0, :, :rank], A[0, :rank]) for name, A in x.A.items()}
    return Factors(layers, rank, x.spec.alpha, {}, x.spec.rslora)


def _whole_factors(x: Adapters, rank: int | None, context: ExportContext) -> Factors:
    """All that one client adds to its base, with a scaling of 1.

    Low-rank sums stay the tensors they are, side by side, while that is no larger than the layer.  A larger or dense
    one, and any that is to be cut, is factored in float64.
    """
    own = x if x.merged is not None else x.with_empty_merges()
    merged, held = own.merged, int(own.ranks[0])
    assert merged is not None
    layers, left_out, size = {}, 0.0, 0.0
    for layer in x.spec.layers:
        B, A = own.B[layer.name][:, :, :held] * own.scaling[0], own.A[layer.name][:, :held]
        update = merged.layers[layer.name]
        largest = min(layer.d_out, layer.d_in)
        if rank is None and not update.dense.shape[2] and update.left.shape[2] + held <= largest:
            layers[layer.name] = torch.cat([B, update.left], 2)[0], torch.cat([A, update.right], 1)[0]
            continue
        total = whole(update, B, A)
        square = total.dense[0], torch.eye(layer.d_in, dtype=torch.float64, device=total.dense.device)
        found = decompose(*(square if total.dense.shape[2] else (total.left[0], total.right[0])))
        kept = min(int(found.rank), rank or largest)
        layers[layer.name] = found.factors(max(1, kept))  # PEFT knows no rank 0: no update is one column of zeros
        left_out += float(found.tail(torch.tensor(kept, device=found.values.device)))
        size += float(found.values.square().sum())
    layers = {name: _without_zeros(B.to(x.flat), A.to(x.flat)) for name, (B, A) in layers.items()}
    widest = max(len(A) for _, A in layers.values())
    facts = _whole_facts(context) if rank is None else _cut_facts(rank, left_out, size)
    return Factors(layers, widest, float(widest), facts)


def _without_zeros(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Factors without the columns and rows at the end that are zero in both; one of them stays."""
    used = (B.any(0) | A.any(1)).nonzero()
    rank = max(1, int(used[-1]) + 1 if len(used) else 0)
    return B[:, :rank], A[:rank]


def _whole_facts(context: ExportContext) -> dict[str, str]:
    if context.principal is None:
        return {"holds": "the adapter and all that was merged into the base before it; scaling 1"}
    return {"holds": "the adapter less its start, which the run took out of the base's weights; scaling 1"}


def _cut_facts(rank: int, left_out: float, size: float) -> dict[str, str]:
    share = (left_out / size) ** 0.5 if size else 0.0
    error = f"{left_out**0.5:.4g}, {share:.2%} of the update (Frobenius norm over all layers)"
    return {"holds": f"the best approximation of rank {rank}; scaling 1", "left out": error}


def lora_tensors(factors: Factors) -> dict[str, Tensor]:
    """The factors by their names in an adapter folder."""
    tensors = {}
    for name, (B, A) in factors.layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.contiguous().clone()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.contiguous().clone()
    return tensors


def full_tensors(x: Adapters, client: int, model: StackedModel, context: ExportContext) -> dict[str, Tensor]:
    """The head and other modules saved whole: trained tensors from the row, frozen ones from the base."""
    trained = {name: value[client] for name, value in x.head.items()}
    tensors = {}
    adapted = {layer.name for layer in x.spec.layers}
    for module in (*model.targets.heads, *model.targets.saved, *context.extra_modules):
        inside = f"{module}.base_layer." if module in adapted else f"{module}."  # PEFT's name under a LoRA layer
        for name, value in model.base.get_submodule(module).state_dict(prefix=inside).items():
            plain = name.replace(".base.", ".")  # a swapped-in layer keeps the original under `base`
            tensors[PREFIX + plain] = (trained[plain] if plain in trained else value).detach().contiguous().clone()
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


def adapter_card(context: ExportContext, factors: Factors) -> str:
    """The README.md of an adapter folder."""
    holds = f"Rank {factors.rank}, alpha {whole_number(factors.alpha)}, {len(factors.layers)} layers"
    return write_card(context.base_source, context.location, holds, context.facts)
