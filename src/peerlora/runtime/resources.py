"""The base models of runs that follow each other: loaded once, with a head of the next run's seed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from peerlora.config.chat import resolve_template
from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import task_kind
from peerlora.data.dataset import Dataset
from peerlora.data.sources import load_datasets
from peerlora.errors import ConfigError, ModelError
from peerlora.lora.adapter_init import PRINCIPAL, Principal, take_principal, weights_of
from peerlora.lora.adapters import AdapterSpec
from peerlora.lora.attach import StackedModel, Targets, find_saved, find_targets, tied_to
from peerlora.lora.base_digest import tensor_digest
from peerlora.lora.base_models import Base, Storage, load_base, locate_base
from peerlora.lora.base_weights import quantised_form, within
from peerlora.lora.layer import Layout
from peerlora.lora.peft_io import ExportContext
from peerlora.randomness import derive
from peerlora.runtime.model_checks import (
    check_answers,
    check_head,
    check_lengths,
    check_norms,
    check_ranks,
    check_tokens,
    linears_of,
    some,
)
from peerlora.runtime.readers import load_reader
from peerlora.train.forward_facts import observe_forward
from peerlora.train.kernels.prefix_cache import HiddenStates
from peerlora.train.kernels.selection import Paths, prepare_base, use_fast_forward
from peerlora.train.kernels.speed import Speed, choose_speed


@dataclass(frozen=True)
class PreparedBase:
    """A base model with its frozen weights made fast, before adapters are attached."""

    base: Base
    targets: Targets
    speed: Speed
    paths: Paths
    layout: Layout
    principal: Principal | None
    """What clients begin with and the base is without; None where it is whole."""
    originals: dict[str, str]
    """Digests of the weights that were whole before, by the names of `base_digest` and of `plain_digest`."""
    warnings: tuple[str, ...]
    hidden: HiddenStates = field(default_factory=HiddenStates)
    """Of the blocks below the lowest adapted one, for runs that share them."""


@dataclass(frozen=True)
class BuiltModel:
    """A base model with adapters attached, how they are exported, which speed paths it takes, and what to warn of."""

    model: StackedModel
    export: ExportContext
    speed: Speed
    paths: Paths
    originals: dict[str, str]
    """Digests of weights that the base came with, by name, where they were changed."""
    warnings: tuple[str, ...]


class BaseModelCache:
    """Keeps the base model of the latest run for the next one that needs the same, with a head of the next one's seed.

    Only for runs that follow each other: with the next one, the adapters of the one before are taken off its model.
    """

    def __init__(self):
        self._key: Any = None
        self._seed = 0
        self._kept: PreparedBase | None = None
        self._user: StackedModel | None = None

    def get(self, key: Any, seed: int, load: Callable[[], PreparedBase]) -> PreparedBase:
        """The base model of ``key``, bit by bit as ``load`` gives it for ``seed``; ``key`` is without the seed."""
        if self._user is not None:
            self._user.detach()
        kept = self._kept if self._user is not None and key == self._key else None  # no user: attaching failed half way
        if kept is None or (seed != self._seed and not redraw(kept, self._seed, seed)):
            self._kept = kept = None  # the old one goes before the new one comes
            self._kept, self._key = load(), key
        self._user, self._seed = None, seed
        assert self._kept is not None
        return self._kept

    def used_by(self, model: StackedModel) -> None:
        """Remember what is attached to it now."""
        self._user = model


def redraw(prepared: PreparedBase, drawn: int, seed: int) -> bool:
    """Draw what came without weights anew, in place, as loading draws it; ``drawn``: the seed it was drawn from.

    Whether that was possible.  Only heads are as they were loaded, the rest has been made fast; and the library has no
    promise on the order of its draws, so those of ``drawn`` are repeated first: they must give what is there.
    """
    model, heads = prepared.base.model, prepared.targets.heads
    names = [name for name, _ in model.named_modules() if name in prepared.base.initialised]
    if not all(within(name, heads) for name in names):
        return False
    there = {name: model.get_submodule(name) for name in names}
    if not all(_equal(module, there[name]) for name, module in _drawn(model, there, drawn).items()):
        return False
    for name, module in _drawn(model, there, seed).items():
        there[name].load_state_dict(module.state_dict())
    return True


def _drawn(model: Any, modules: dict[str, nn.Module], seed: int) -> dict[str, nn.Module]:
    """Copies of modules with weights as they are drawn where a base lacks them."""
    copies = {name: deepcopy(module).to("cpu") for name, module in modules.items()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(derive(seed, "head"))
        for module in copies.values():
            model._init_weights(module)
    return copies


def _equal(module: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name].cpu()) for name, value in module.state_dict().items())


DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "auto": torch.float32, "fp64": torch.float64}
"""Of adapters, optimiser and loss, by ``train.dtype``."""


@dataclass(frozen=True)
class RunResources:
    """What many runs can share: the tokenised data and, for runs one after another, the base model."""

    train_data: Dataset
    eval_data: Dataset
    tokenizer: Any
    """Of images, the ``ImageReader``."""
    bases: BaseModelCache | None = None
    """None: every run loads its own."""
    share_prefix: bool = False
    """Whether these runs keep for each other what the frozen blocks below the adapted ones give; needs ``bases``."""


def load_resources(config: RunConfig) -> RunResources:
    """Read and tokenise the data of a config."""
    tokenizer = run_tokenizer(config)
    return RunResources(*load_datasets(config, tokenizer), tokenizer)


def run_tokenizer(config: RunConfig) -> Any:
    """The base model's tokenizer, with the chat template of the config if it gives one; of images the ImageReader."""
    tokenizer = load_reader(config.model.source, task_kind(config.task.kind), config.model.revision)
    if config.data.template is not None:
        tokenizer.chat_template = resolve_template(config.data.template)
    return tokenizer


def build_model(config: RunConfig, resources: RunResources, begun: Speed | None = None) -> BuiltModel:
    """Load the base model, or take it from the cache, and attach adapters.

    ``begun``: the precision and layout that the run began with; None: choose them for this machine.
    Raises ConfigError, ModelError, or DataError where the model cannot read the tokens of the data.
    """
    data, source, tokenizer = resources.train_data, config.model.source, resources.tokenizer
    bases = resources.bases or BaseModelCache()
    key = _BaseKey(
        source,
        config.task.kind,
        data.names,
        config.train.dtype,
        config.train.fast,
        config.device,
        config.adapter.targets,
        config.model.dropout > 0,
        begun,
        (config.adapter.init, config.adapter.rank, config.adapter.alpha, config.adapter.rslora)
        if config.adapter.init in PRINCIPAL
        else None,
        config.adapter.modules_to_save and [*config.adapter.modules_to_save, config.adapter.head],
        (config.model.quantize, config.model.revision),
    )
    prepared = bases.get(key, config.seed, lambda: _prepared(config, resources, begun))
    base, targets = prepared.base, prepared.targets
    of_tokens = check_tokens(base, tokenizer, (data, resources.eval_data))  # a base is kept for other data, too
    check_lengths(config, base)
    of_tokens += check_answers(config, base, resources.eval_data, tokenizer)
    check_ranks(config, targets)
    model = StackedModel(
        base.model,
        targets,
        train_head=config.adapter.head != "frozen",
        dropout=config.adapter.dropout,
        base_dropout=config.model.dropout,
        layout=prepared.layout,
    )
    bases.used_by(model)
    extra = tuple(name for name in base.initialised if not within(name, targets.heads))
    peft_type = task_kind(config.task.kind).peft_type
    export = ExportContext(
        source,
        peft_type,
        config.adapter.dropout,
        extra,
        tokenizer,
        data.names,
        location=locate_base(source),
        principal=prepared.principal,
        revision=config.model.revision,
        initialised=base.initialised,
    )
    prepared.hidden.keep_only((data, resources.eval_data))
    paths = prepared.paths | use_fast_forward(
        model, config.train.fast, prepared.hidden if resources.share_prefix else None
    )
    return BuiltModel(model, export, prepared.speed, paths, prepared.originals, prepared.warnings + of_tokens)


class _BaseKey(NamedTuple):
    """The settings that a prepared base model depends on, beside the seed of its head."""

    source: str
    task: str
    names: tuple[str, ...]
    dtype: str
    fast: bool
    device: str
    targets: list[str] | str | None
    dropout: bool
    begun: Speed | None
    principal: tuple[Any, ...] | None
    saved: list[str]
    kept: tuple[str, str | None]


def _prepared(config: RunConfig, resources: RunResources, begun: Speed | None) -> PreparedBase:
    source, dtype, data = config.model.source, DTYPES[config.train.dtype], resources.train_data
    task, pad = task_kind(config.task.kind), resources.tokenizer.pad_token_id
    storage = Storage(config.model.quantize, config.device, config.model.revision)
    base = load_base(source, task.name, data.names, config.seed, pad, dtype, storage)
    check_norms(base)
    check_lengths(config, base)
    check_tokens(base, resources.tokenizer, (data, resources.eval_data))  # else the forward below fails on them
    targets = find_targets(base.model, task.peft_type or None, config.adapter.targets)
    frozen_head = config.adapter.head == "frozen"
    targets = replace(targets, saved=find_saved(base.model, targets, config.adapter.modules_to_save, frozen_head))
    warnings = base.warnings + check_head(base, targets, data.names)
    device = _device(config)
    if config.model.quantize == "none":
        base.model.to(device)
    targets, layout, more = _observed(config, base, targets, resources)
    principal, originals = _principal(config, base, targets)
    tokens = int(sum(config.batches) * data.all_lengths.mean())
    speed = begun or choose_speed(base.model, targets.heads, config.train.dtype, config.train.fast, tokens)
    paths = prepare_base(base.model, targets.heads, speed, config.train.fast, targets.saved)
    warnings += more + speed.warnings(config.train.dtype)
    return PreparedBase(base, targets, speed, paths, layout, principal, originals, warnings)


def _principal(config: RunConfig, base: Base, targets: Targets) -> tuple[Principal | None, dict[str, str]]:
    """What ``adapter.init`` takes out of the base, and digests of the weights as they were before."""
    if config.adapter.init not in PRINCIPAL:
        return None, {}
    if form := quantised_form(base.model):
        raise ModelError(
            f"adapter.init={config.adapter.init} takes directions out of the base's weights, which must be in full "
            f"precision, and {form} (model.source={config.model.source!r}); give the base that it was made from, or "
            "adapter.init=default"
        )
    for layer in targets.layers:
        if other := tied_to(base.model, layer.name):
            raise ModelError(
                f"adapter.init={config.adapter.init} takes directions out of every adapted layer, and {layer.name} "
                f"shares its weights with {other}, which would lose them, too; drop it from adapter.targets, or use "
                "adapter.init=default or orthogonal"
            )
    rank = config.ranks[0]  # all are equal
    weights = weights_of(base.model, [layer.name for layer in targets.layers])
    halved = config.train.dtype == "auto"
    originals = {f"{name}.base.weight": tensor_digest(weight, halved) for name, weight in weights.items()}
    kept = {name: base.model.get_parameter(f"{name}.weight") for name in weights}  # GPT-2's are transposed
    originals |= {f"{name}.weight": tensor_digest(weight, halved=True) for name, weight in kept.items()}
    spec = AdapterSpec(targets.layers, rank, config.adapter.alpha, rslora=config.adapter.rslora)
    return take_principal(weights, rank, spec.scaling(rank), config.adapter.init), originals


def _observed(
    config: RunConfig, base: Base, targets: Targets, resources: RunResources
) -> tuple[Targets, Layout, tuple[str, ...]]:
    """The targets that the model's forward uses, how it lays out rows, and warnings.  Raises ModelError."""
    task, source = task_kind(config.task.kind), config.model.source
    layers = [layer.name for layer in targets.layers]
    watched = [*layers, *linears_of(base.model, targets.heads), *targets.saved]
    if config.model.dropout:
        watched += [name for name, module in base.model.named_modules() if isinstance(module, nn.Dropout)]
    facts = observe_forward(base.model, source, watched, resources.train_data, resources.tokenizer.pad_token_id, task)
    if facts.sees_later_tokens:
        raise ModelError(
            f"model.source={source!r}: {type(base.model).__name__} sees the tokens that it is to predict; "
            f"task.kind={task.name} needs a decoder, which sees earlier ones only; give one, or another task.kind"
        )
    unused = [name for name in layers if name not in facts.used]
    if len(unused) == len(layers):
        raise ModelError(
            f"{type(base.model).__name__} never uses {some(unused)} for task.kind={task.name}; name other layers in "
            "adapter.targets"
        )
    warnings = ()
    if unused:
        warnings += (
            f"{type(base.model).__name__} never uses {some(unused)} for task.kind={task.name}; no adapter is put there",
        )
    if facts.reads_padding:
        warnings += (
            f"what {type(base.model).__name__} says of a row depends on the padding behind it, and so on the longest "
            "row of its batch",
        )
    used = replace(targets, layers=tuple(layer for layer in targets.layers if layer.name in facts.used))
    return used, facts.layout, warnings


def _device(config: RunConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device=cuda given, but this torch sees no NVIDIA GPU; use device=cpu, or install a CUDA build"
        )
    return torch.device(config.device)
