"""Refuses PEFT models whose adapters cannot be averaged, or cannot be read and written from outside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from peerlora.errors import ModelError

_NO_AVERAGE = {
    "use_dora": "DoRA divides by the norm of every row of W + B A, which is another one at every site",
    "lora_bias": "a bias of B is no part of the product B A that methods mix",
    "trainable_token_indices": "single rows of an embedding are no low-rank factors",
    "layer_replication": "replicated layers share their factors",
    "rank_pattern": "methods mix factors of one rank",
    "alpha_pattern": "methods know one scaling for all layers",
    "use_qalora": "QA-LoRA's factors have the shape of groups of inputs",
    "arrow_config": "Arrow routes between adapters, which stay as they are",
}
"""Settings of a LoraConfig -> why an adapter that uses them is refused."""


def unwrap(model: Any) -> Any:
    """The model inside torch's wrappers for several processes and for compilation.  Raises ModelError where sharded."""
    while True:
        if type(model).__name__.startswith("FullyShardedDataParallel") or type(model).__name__ == "DeepSpeedEngine":
            raise ModelError(_sharded(f"the model is in a {type(model).__name__}"))
        inside = getattr(model, "_orig_mod", None)
        if inside is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inside = model.module
        if inside is None:
            return model
        model = inside


def adapter_name(model: Any) -> str:
    """The one active LoRA adapter of a PEFT model.

    Raises ModelError for a model without PEFT adapters, with several active ones, or with another kind.
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "active_adapters"):
        raise ModelError(
            f"{type(model).__name__} given, which has no PEFT adapter; give the model of peft.get_peft_model(base, "
            "LoraConfig(...))"
        )
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ModelError(
            f"the PEFT model has {len(active)} active adapters ({', '.join(active)}); activate the one that is to be "
            "mixed: model.set_adapter(name)"
        )
    kind = str(getattr(model.peft_config[active[0]].peft_type, "value", model.peft_config[active[0]].peft_type))
    if kind != "LORA":
        raise ModelError(
            f"the PEFT adapter {active[0]!r} is {kind}, which has no low-rank product that methods mix; use LoRA: "
            "peft.LoraConfig"
        )
    return active[0]


def check_settings(config: Any) -> None:
    """Raise ModelError for settings of a LoraConfig by which adapters do not average."""
    if config.bias != "none":
        raise ModelError(
            f"LoraConfig(bias={config.bias!r}) given; biases of the base are no part of an adapter; use bias='none'"
        )
    for name, reason in _NO_AVERAGE.items():
        if getattr(config, name, None):
            raise ModelError(
                f"LoraConfig({name}={getattr(config, name)!r}) given; {reason}; drop it, or train this adapter alone"
            )


def lora_layers(model: Any, adapter: str) -> dict[str, Any]:
    """The adapted linear layers by name, in the model's order.

    Raises ModelError where a layer is merged, tied to another, or of a kind without factors of two axes.
    """
    from peft.tuners.lora import LoraLayer

    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, LoraLayer) or not _has(module, adapter):
            continue
        if adapter not in module.lora_A or type(module.lora_A[adapter]) is not nn.Linear:
            raise ModelError(
                f"layer {name} is a PEFT {type(module).__name__} of a {type(module.base_layer).__name__}; methods mix "
                "the factors of linear layers only; name these in LoraConfig(target_modules=...)"
            )
        if module.merged:
            raise ModelError(f"the adapter is merged into layer {name}; take it out first: model.unmerge_adapter()")
        found[name] = module
    _require_untied((name, module.lora_A[adapter].weight) for name, module in found.items())
    return found


def check_parameters(model: Any, own: dict[str, nn.Parameter]) -> None:
    """Check the adapter's parameters ``own``, by name, and that nothing else trains.

    Raises ModelError for shards, tied or frozen parameters, and for others that train.
    """
    for name, value in own.items():
        if hasattr(value, "ds_id") or type(value).__name__ == "DTensor" or type(value.data).__name__ == "DTensor":
            raise ModelError(_sharded(f"{name} is one shard of a parameter"))
        if not value.is_floating_point():
            raise ModelError(f"{name} holds {value.dtype} values; adapters are mixed as floating-point numbers")
        if not value.requires_grad:
            raise ModelError(
                f"{name} of the adapter does not train (requires_grad is False); load it with is_trainable=True, or "
                "call model.set_adapter(name) with inference_mode=False"
            )
    _require_untied(own.items())
    ours = {id(value) for value in own.values()}
    others = [name for name, value in model.named_parameters() if value.requires_grad and id(value) not in ours]
    if others:
        raise ModelError(
            f"{others[0]} trains beside the adapter ({len(others)} parameters in all), and would differ between sites "
            "without ever being mixed; freeze it, or name its module in LoraConfig(modules_to_save=...)"
        )


def quantisation(model: Any) -> str:
    """How the base's linear layers are kept, in the words of ``model.quantize``: none, int8 or nf4."""
    kinds = {type(module).__name__ for module in model.modules()}
    if "Linear8bitLt" in kinds:
        return "int8"
    four = {"Linear4bit", "QuantLinear", "WQLinear_GEMM", "HQQLinear", "AqlmLinear"}
    return "nf4" if kinds & four or getattr(model, "is_quantized", False) else "none"


def _has(module: Any, adapter: str) -> bool:
    return any(adapter in getattr(module, kind, {}) for kind in ("lora_A", "lora_embedding_A"))


def _require_untied(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    seen: dict[int, str] = {}
    for name, value in tensors:
        first = seen.setdefault(id(value), name)
        if first != name:
            raise ModelError(f"{name} and {first} are tied: they share one tensor, which mixing would count twice")


def _sharded(what: str) -> str:
    return (
        f"{what}, of which each process holds a part only (FSDP, DeepSpeed ZeRO); methods mix whole adapters: use DDP, "
        "or one process"
    )
