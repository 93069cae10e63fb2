"""Whole models from a run: a client's adapter merged into its base, or the base beside an adapter folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from peerlora.config.exchange import ExportedModel
from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import task_kind
from peerlora.errors import RunError
from peerlora.files import sync_tree
from peerlora.lora.attach import without_peft_warnings
from peerlora.lora.base_models import Storage, load_base, load_tokenizer, quiet
from peerlora.runs.write_failures import write_failures_told
from peerlora.runtime.export import class_names, config_of, export_from_run
from peerlora.runtime.reading import Reading

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = dict(zip(get_args(Precision), (torch.float32, torch.bfloat16, torch.float16), strict=True))


def merge_from_run(
    run: Path,
    to: Path,
    client: int | None,
    model: ExportedModel | None = None,
    dtype: Precision = "fp32",
) -> Path:
    """Write one client's whole model (None: that of the average) at ``to``, for programs that know no adapters.

    Base and adapter are added up by PEFT in fp32 and saved as ``dtype``, with the tokenizer, the class names in
    config.json, and how rows were read.  Needs run folder and base model, no data.  Raises RunError as
    `export_from_run` does, ModelError where the base model is gone.
    """
    _require_rows(run)
    with _in_the_making(to) as half:
        adapter = half.with_name(f"{half.name}-adapter")
        try:
            export_from_run(run, adapter, client, model=model)
            whole, tokenizer, config = _base_of(run)
            merged = _merged(whole, adapter)
        finally:
            shutil.rmtree(adapter, ignore_errors=True)
        _save(merged.to(_DTYPES[dtype]), tokenizer, half)
        Reading.of(config).write(half)
        whose = "the average of all clients" if client is None else f"client {client}"
        (half / "README.md").write_text(_card(config, whose), encoding="utf-8")
    return to


def export_with_base(
    run: Path,
    to: Path,
    client: int | None,
    rank: int | None = None,
    model: ExportedModel | None = None,
    exact: bool = False,
) -> Path:
    """Write an adapter folder as `export_from_run` does, and in its folder ``base`` the whole base model.

    ``adapter_config.json`` names that folder, so ``AutoPeftModel...`` and ``pipeline(model=folder)`` find a base whose
    config.json has the run's class names.
    """
    _require_rows(run)
    with _in_the_making(to) as half:
        half.rmdir()
        export_from_run(run, half, client, rank, model, exact)
        whole, tokenizer, config = _base_of(run)
        _save(whole, tokenizer, half / "base")
        path = half / "adapter_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = str(to.resolve() / "base")
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return to


@contextmanager
def _in_the_making(to: Path) -> Iterator[Path]:
    """A folder beside ``to`` that becomes it once it is whole.  Raises RunError where ``to`` is not free."""
    require_new(to)
    to = to.resolve()
    half = to.with_name(f"{to.name}.making")
    with write_failures_told(to.parent, lambda: "try again"):
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        try:
            yield half
            sync_tree(half)
            os.replace(half, to)
        finally:
            shutil.rmtree(half, ignore_errors=True)


def require_new(to: Path) -> None:
    """Raise RunError unless a folder is new or empty."""
    if to.exists() and not to.is_dir():
        raise RunError(f"--to {to} is a file; choose a folder that is new or empty")
    if to.is_dir() and any(to.iterdir()):
        raise RunError(f"--to {to} is not empty; choose a folder that is new or empty")


def _require_rows(run: Path) -> None:
    """Refuse a run of flow policies, whose base no other program loads."""
    if (run / "config.yaml").is_file() and task_kind(load_config(run / "config.yaml").task.kind).acts:
        raise RunError(
            f"{run} holds flow policies, which no other program loads as a whole model; use `peerlora export`, and "
            "give PEFT the base policy's folder (docs/flow-policies.md)"
        )


def _base_of(run: Path) -> tuple[Any, Any, RunConfig]:
    """The base model of a run in fp32, with the run's class names, its tokenizer, and the config."""
    config, _ = config_of(run)
    tokenizer, storage = (
        load_tokenizer(config.model.source, config.model.revision),
        Storage(revision=config.model.revision),
    )
    names = class_names(run, config)
    kind = task_kind(config.task.kind)
    base = load_base(config.model.source, kind.name, names, config.seed, tokenizer.pad_token_id, torch.float32, storage)
    return base.model, tokenizer, config


def _merged(base: Any, adapter: Path) -> Any:
    """A base model with an adapter folder added to its weights."""
    from peft import PeftModel

    _untie(base, json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")))
    with quiet(), without_peft_warnings():
        return PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=False).merge_and_unload()


def _untie(model: Any, settings: dict[str, Any]) -> None:
    """Give the output layer weights of its own where an adapter changes it: that is not meant for the input tokens."""
    out, into = model.get_output_embeddings(), model.get_input_embeddings()
    changed = {*settings["target_modules"], *(settings["modules_to_save"] or ())}
    touched = any(name in changed for name, module in model.named_modules() if module is out or module is into)
    if touched and out is not None and out.weight is into.weight:
        out.weight = nn.Parameter(out.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer; one that came from a GGUF file is an ordinary model once it is loaded."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    model.config.use_cache = True
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _card(config: RunConfig, whose: str) -> str:
    kinds = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation"}
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["lora", "peerlora", "merged"]}
    if kind := kinds.get(task_kind(config.task.kind).peft_type):
        head["pipeline_tag"] = kind
    return (
        f"---\n{json.dumps(head, indent=2)}\n---\n\n# A model trained without a server\n\n"
        f"`{config.model.source}` with the LoRA adapter of {whose} added to its weights.  Trained with peerlora "
        f"({config.algorithm.name}, {config.clients} clients): every client keeps its data and averages adapters with "
        f"its neighbours.  Rows were cut at {config.data.max_length} tokens.\n"
    )
