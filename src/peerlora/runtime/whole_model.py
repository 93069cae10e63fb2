"""Whole models from a run: a client's adapter merged into its base, or the base beside an adapter folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import task_kind
from peerlora.data.chat_tokens import answer_ends
from peerlora.errors import RunError
from peerlora.lora.attach import without_peft_warnings
from peerlora.lora.base_models import Storage, load_base, quiet
from peerlora.lora.base_weights import quantised_form
from peerlora.lora.model_folder import ADAPTER, read_settings, with_base
from peerlora.runs.json_files import read_json
from peerlora.runs.privacy_summary import privacy_card
from peerlora.runs.store import clients_of
from peerlora.runtime.export import class_names, config_of, write_export
from peerlora.runtime.inputs import require_same_base
from peerlora.runtime.model_choice import ModelChoice
from peerlora.runtime.new_folder import new_folder
from peerlora.runtime.reading import Reading
from peerlora.runtime.resources import run_tokenizer

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = dict(zip(get_args(Precision), (torch.float32, torch.bfloat16, torch.float16), strict=True))


def merge_from_run(run: Path, to: Path, choice: ModelChoice | int | None, dtype: Precision = "fp32") -> Path:
    """Write one whole model of a run at ``to``, for programs that know no adapters; ``choice`` as in `export_from_run`.

    Base and adapter are added up by PEFT in fp32 and saved as ``dtype``, with the tokenizer, the class names in
    config.json, and how rows were read.  Needs run folder and base model, no data.  Raises RunError as
    `export_from_run` does, ModelError where the base model is gone.
    """
    chosen, (config, named) = ModelChoice.of(choice).checked(run), config_of(run)
    _require_rows(run, config)
    with new_folder(to) as half:
        adapter = half / "adapter"
        write_export(run, adapter, chosen)
        whole, tokenizer = _base_of(run, config)
        merged = _merged(whole, adapter)
        shutil.rmtree(adapter)
        _save(merged.to(_DTYPES[dtype]), tokenizer, half)
        Reading.of(config).write(half)
        card = _card(config, named, chosen.whose) + _private(run, chosen.client)
        (half / "README.md").write_text(card, encoding="utf-8")
    return to


def export_with_base(run: Path, to: Path, choice: ModelChoice | int | None) -> Path:
    """Write an adapter folder as `export_from_run` does, and in its folder ``base`` the whole base model.

    ``adapter_config.json`` names that folder, so ``AutoPeftModel...`` and ``pipeline(model=folder)`` find a base whose
    config.json has the run's class names.
    """
    chosen, (config, _) = ModelChoice.of(choice).checked(run), config_of(run)
    _require_rows(run, config)
    with new_folder(to) as half:
        write_export(run, half, chosen)
        whole, tokenizer = _base_of(run, config)
        _save(whole, tokenizer, half / "base")
        for name, text in with_base(half, str(to.resolve() / "base")).items():
            (half / name).write_text(text, encoding="utf-8")
    return to


def _require_rows(run: Path, config: RunConfig) -> None:
    """Refuse a run of flow policies, whose base no other program loads."""
    if task_kind(config.task.kind).acts:
        raise RunError(
            f"{run} holds flow policies, which no other program loads as a whole model; use `peerlora export`, and "
            "give PEFT the base policy's folder (docs/flow-policies.md)"
        )


def _base_of(run: Path, config: RunConfig) -> tuple[Any, Any]:
    """The base model of a run in fp32, with the run's class names, and its tokenizer.

    Raises RunError for another base than the run's, and where only a quantised form of its weights is there.
    """
    tokenizer, storage = run_tokenizer(config), Storage(revision=config.model.revision)
    names = class_names(run, config)
    kind = task_kind(config.task.kind)
    base = load_base(config.model.source, kind.name, names, config.seed, tokenizer.pad_token_id, torch.float32, storage)
    model: Any = base.model
    if form := quantised_form(model):
        raise RunError(
            f"{run} was trained on model.source={config.model.source!r}, and a whole model needs a base in full "
            f"precision, where {form}; use `peerlora export` and load its folder with this base, or add the adapter to "
            "the base that it was made from, by PEFT"
        )
    require_same_base(run, model, config.model.source, base.initialised)
    if kind.is_chat:
        model.generation_config.eos_token_id = answer_ends(tokenizer)
    return model, tokenizer


def _merged(base: Any, adapter: Path) -> Any:
    """A base model with an adapter folder added to its weights."""
    from peft import PeftModel

    _untie(base, read_settings(adapter / ADAPTER))
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
    """Write model and tokenizer."""
    if tokenizer.pad_token_id is not None:
        model.config.use_cache = True
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _card(config: RunConfig, base: str, whose: str) -> str:
    """The README.md; ``base``: as the run named it, not where it lies."""
    kinds = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation", "TOKEN_CLS": "token-classification"}
    task = task_kind(config.task.kind)
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["lora", "peerlora", "merged"]}
    if kind := task.name if task.reads_images else kinds.get(task.peft_type):
        head["pipeline_tag"] = kind
    cut = f"Rows were cut at {config.data.max_length} tokens."
    read = "Images are read as preprocessor_config.json says." if task.reads_images else cut
    return (
        f"---\n{json.dumps(head, indent=2)}\n---\n\n# A model trained without a server\n\n"
        f"`{base}` with the LoRA adapter of {whose} added to its weights.  Trained with peerlora "
        f"({config.algorithm.name}, {config.clients} clients): every client keeps its data and averages adapters with "
        f"its neighbours.  {read}\n"
    )


def _private(run: Path, client: int | None) -> str:
    """What the README.md tells of privacy: nothing, where the run has none."""
    here = clients_of(run)
    facts = privacy_card(read_json(run / "summary.json"), here.index(client) if here and client is not None else client)
    return "".join(f"\n- {name}: {value}" for name, value in facts.items()) + ("\n" if facts else "")
