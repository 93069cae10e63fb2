"""The digests by which two base models are told apart."""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from peerlora.lora.base_weights import within

_OTHERWISE = {  # values of config.json that change no score, or that a run sets itself
    *("architectures", "transformers_version", "dtype", "torch_dtype", "torchscript", "quantization_config"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
    *("pad_token_id", "use_cache", "return_dict", "return_dict_in_generate", "output_attentions"),
    *("output_hidden_states", "gradient_checkpointing", "use_bfloat16", "auto_map", "attn_implementation"),
    *("experts_implementation", "name_or_path"),
}


def base_digest(base: nn.Module, halved: bool = False, originals: Mapping[str, str] | None = None) -> str:
    """Return the SHA-256 of all frozen weights, by name, hexadecimal.

    ``halved``: of the weights rounded to bf16, so that a base kept in fp32 and one kept in bf16 have the same.
    ``originals``: digests, by name, of weights that have been changed since they were read.
    """
    return digest_of(base.state_dict(), halved, originals)


def digest_of(
    tensors: Mapping[str, torch.Tensor], halved: bool = False, originals: Mapping[str, str] | None = None
) -> str:
    """Return the SHA-256 of tensors by name, hexadecimal; arguments as in `base_digest`."""
    digest, originals = hashlib.sha256(), originals or {}
    for name, value in sorted(tensors.items()):
        if name in originals:
            digest.update(f"{name} {originals[name]}\n".encode())
        else:
            _add(digest, name, value, halved)
    return digest.hexdigest()


def plain_digest(base: nn.Module, drawn: Collection[str] = (), originals: Mapping[str, str] | None = None) -> str:
    """Return the SHA-256 of the weights that a base model came with, hexadecimal, however they are kept.

    That is of floating point rounded to bf16, by names without adapters.  ``drawn``: modules whose weights were not
    there; ``originals``: digests of changed weights, by these names and of `tensor_digest` with ``halved``.
    """
    own, originals = {_plain_name(name): value for name, value in base.state_dict().items()}, originals or {}
    there = {name: value for name, value in own.items() if not within(name, drawn)}
    each = {name: originals.get(name) or tensor_digest(value, halved=True) for name, value in there.items()}
    return digest_of(there, originals=each)


def _plain_name(name: str) -> str:
    for kind in ("weight", "bias"):
        if name.endswith(f".base.{kind}"):
            return f"{name.removesuffix(f'.base.{kind}')}.{kind}"
    return name


def config_digest(model: nn.Module) -> str | None:
    """Return the SHA-256 of what a model does with its weights, by its config.json, hexadecimal; None without one.

    Names, paths, precision and versions are left out, and dropout, which ``model.dropout`` sets.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_diff_dict"):
        return None
    return hashlib.sha256(json.dumps(_counted(config.to_diff_dict()), sort_keys=True, default=str).encode()).hexdigest()


def _counted(values: Any) -> Any:
    """The values that count, without those that are not set, which a version of the library may not know."""
    if isinstance(values, Mapping):
        kept = {name: value for name, value in values.items() if value is not None and _counts(str(name))}
        return {str(name): _counted(value) for name, value in kept.items()}
    return [_counted(value) for value in values] if isinstance(values, list | tuple) else values


def _counts(name: str) -> bool:
    return name not in _OTHERWISE and not name.startswith("_") and "drop" not in name


def tensor_digest(value: torch.Tensor, halved: bool = False) -> str:
    """Return the SHA-256 of one tensor, hexadecimal; ``halved`` as in `base_digest`."""
    digest = hashlib.sha256()
    _add(digest, "", value, halved)
    return digest.hexdigest()


def _add(digest: Any, name: str, value: torch.Tensor, halved: bool) -> None:
    value = value.detach().cpu().contiguous()
    if halved and value.is_floating_point():
        value = value.to(torch.bfloat16)
    digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
    digest.update(value.flatten().view(torch.uint8).numpy() if value.numel() else b"")
