"""Find the target layers of any Hugging Face model by PEFT's own rules, and swap stacked layers in and out."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from peerlora.errors import ModelError
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.lora.base_weights import top_modules, within
from peerlora.lora.layer import ClientDropout, Layout, StackedEmbedding, StackedHead, StackedLinear, Step
from peerlora.lora.merged import Merged
from peerlora.lora.word_places import WordPlaces

_QUERIES_AND_VALUES = (("q_proj", "v_proj"), ("query", "value"), ("qkv",))
"""How models name their attention's projections."""
_FORMED = 1 << 26  # numbers of weights that are formed at most: 256 MB in fp32
_SHOWN = 200  # letters of what PEFT says


@dataclass(frozen=True)
class Targets:
    """Which modules of a base model are adapted (low rank) and which are heads (trained in full)."""

    layers: tuple[LayerSpec, ...]
    heads: tuple[str, ...]
    saved: tuple[str, ...] = ()
    """Layers of the body that are trained in full."""


def find_targets(model: nn.Module, task_type: str | None, targets: list[str] | str | None) -> Targets:
    """The layers that PEFT would adapt in ``model``, in forward order.

    PEFT itself is asked, on a copy without weights, so its rules are not written a second time here.
    ``task_type`` is PEFT's, such as SEQ_CLS or CAUSAL_LM.  Raises ModelError where nothing matches.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    targets = targets or _usual_targets(model)
    shell = _without_weights(model)
    try:
        with without_peft_warnings():
            asked = LoraConfig(
                r=1, target_modules=targets, task_type=task_type, exclude_modules=_in_heads(shell, targets)
            )
            wrapped = get_peft_model(shell, asked)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ModelError(_no_targets(model, targets, shorten(str(error), _SHOWN))) from None  # PEFT prints modules
    modules = {name.removeprefix("base_model.model."): module for name, module in wrapped.named_modules()}
    heads = [name for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)]
    if not heads and task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):  # PEFT knows heads named classifier and score only
        heads = list(top_modules(model))
    own = dict(model.named_modules())
    every = _is_every_linear(targets)  # PEFT counts routers and experts among them, which are no linear layers
    layers = [
        name
        for name, module in modules.items()
        if isinstance(module, LoraLayer)
        and not within(name, heads)
        and not (every and _d_in_and_out(own.get(name)) is None)
    ]
    if not layers:
        raise ModelError(_no_targets(model, targets, "only layers of the head, which trains in full"))
    return Targets(tuple(_layer_spec(own.get(name), name) for name in layers), tuple(heads))


def _usual_targets(model: nn.Module) -> list[str] | None:
    """Queries and values of attention, PEFT's choice for most models of texts; for those of images it has none."""
    if getattr(model, "main_input_name", None) != "pixel_values":
        return None
    endings = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return next((list(names) for names in _QUERIES_AND_VALUES if endings >= set(names)), None)


def find_saved(model: nn.Module, targets: Targets, endings: list[str], frozen_head: bool = False) -> tuple[str, ...]:
    """The layers that ``adapter.modules_to_save`` names, without those of heads, which train in full anyway.

    Raises ModelError for a name that matches nothing, a layer that is adapted, tied to another, or of another kind, or
    one of a head that does not train.
    """
    found: list[str] = []
    for ending in endings:
        names = [name for name, _ in model.named_modules() if name == ending or name.endswith(f".{ending}")]
        if not names:
            raise ModelError(f"adapter.modules_to_save={ending}: no module of {type(model).__name__} has this name")
        if frozen_head and any(within(name, targets.heads) for name in names):
            raise ModelError(
                f"adapter.modules_to_save={ending} is of the head, which adapter.head=frozen keeps as it is; drop one "
                "of them"
            )
        found += [name for name in names if not within(name, targets.heads) and name not in found]
    for name in found:
        module, subject = model.get_submodule(name), f"adapter.modules_to_save: {name}"
        if type(module) not in (nn.Linear, nn.Embedding):
            raise ModelError(
                f"{subject} is a {type(module).__name__}; linear and embedding layers can be trained in full"
            )
        if any(layer.name == name for layer in targets.layers):
            raise ModelError(f"{subject} is adapted, too; take it out of adapter.targets, or out of here")
        if other := tied_to(model, name):
            raise ModelError(
                f"{subject} shares its weights with {other}, and training one of them would untie them; drop it, or "
                "adapt linear layers by adapter.targets"
            )
    return tuple(found)


def tied_to(model: nn.Module, name: str) -> str | None:
    """The name of another module with the very weights of this one; None where it has them for itself."""
    own = _weight(model.get_submodule(name))
    return next((other for other, one in model.named_modules() if other != name and _weight(one) is own), None)


def _weight(module: nn.Module) -> Any:
    """A module's own weight; where it has none, the module, which is no other's."""
    weight = module._parameters.get("weight")
    return module if weight is None else weight


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Hold back what PEFT warns of where its models are built and which is known here."""
    with warnings.catch_warnings():
        # peft 0.21 calls a name that transformers 5.23 renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # PEFT mends it by layer
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # merging unties them
        yield


def _in_heads(model: nn.Module, targets: list[str] | str | None) -> list[str] | None:
    """The layers in heads that PEFT knows, which its "all-linear" takes, and then fails where one is a head itself."""
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    if not _is_every_linear(targets):
        return None
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in names if any(part.endswith(tuple(SEQ_CLS_HEAD_NAMES)) for part in name.split("."))] or None


def _without_weights(model: nn.Module) -> nn.Module:
    config = model.config
    kind = type(model)
    with torch.device("meta"):
        return kind(config)  # pyright: ignore[reportCallIssue]


def _layer_spec(module: nn.Module | None, name: str) -> LayerSpec:
    widths = _d_in_and_out(module)
    if widths is None:
        raise ModelError(f"layer {name} is {_kind(module)}; adapter.targets can adapt linear layers only")
    return LayerSpec(name, *widths)


def _d_in_and_out(module: nn.Module | None) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer; None for any other module."""
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and weight is not None:  # GPT-2 stores its linear weights transposed
        return weight.shape[0], weight.shape[1]
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else None


def _kind(module: nn.Module | None) -> str:
    return "a group of parameters" if module is None else f"a {type(module).__name__}"


def _is_every_linear(targets: list[str] | str | None) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _no_targets(model: nn.Module, targets: list[str] | str | None, error: str) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "." in name]
    some = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    wanted = f"adapter.targets={targets!r}" if targets else f"PEFT's default for {type(model).__name__}"
    there = f"linear layers that exist: {some or 'none'}; name some of them in adapter.targets, or all-linear"
    return f"no layer of {type(model).__name__} matches {wanted} ({error}); {there}"


def inputs_of(model: nn.Module) -> frozenset[str]:
    """The names of the inputs that a model's forward reads; some know no attention mask, or one token type only."""
    read = frozenset(inspect.signature(model.forward).parameters)
    return read - {"token_type_ids"} if getattr(model.config, "type_vocab_size", 2) in (0, 1) else read


def _shifted(model: Any, targets: Tensor) -> Tensor:
    """Targets one place to the right, behind the token with which the decoder starts, as the model itself does it."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=targets)
    start = torch.full_like(targets[:, :1], model.config.decoder_start_token_id)  # Blenderbot, M2M100
    shifted = torch.cat([start, targets[:, :-1]], dim=1)
    return shifted.masked_fill(shifted < 0, model.config.pad_token_id)


def with_decoder_inputs(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor | None) -> dict[str, Tensor]:
    """The inputs of a model whose decoder is to write ``targets``: these, one place to the right."""
    assert targets is not None
    shifted = _shifted(model, targets)
    return {**inputs, "decoder_input_ids": shifted}


class StackedModel:
    """A frozen base model whose target layers hold one low-rank update per client.

    The base is shared by all clients and never changed; ``detach`` puts the original modules back.
    """

    def __init__(
        self,
        base: nn.Module,
        targets: Targets,
        *,
        train_head: bool,
        dropout: float = 0.0,
        base_dropout: float = 0.0,
        layout: Layout = Layout(),  # noqa: B008 (frozen)
    ):
        self.base = base.requires_grad_(False).eval()
        self.targets = targets
        self.step = Step(layout=layout)
        self.forward: Callable[[dict[str, Tensor], Any], Tensor] = self.plain
        """What a call runs: the base model's own forward, or a faster one that equals it."""
        self._read = inputs_of(base)
        self._originals: dict[str, nn.Module] = {}
        self._heads: dict[str, StackedHead | StackedEmbedding] = {}
        self._layers: dict[str, StackedLinear] = {}
        for spec in targets.layers:
            module = StackedLinear(base.get_submodule(spec.name), spec.d_in, spec.d_out, dropout, self.step)
            self._layers[spec.name] = module
            self._swap(spec.name, module)
        if train_head:
            for name, linear in _head_linears(base, targets.heads):
                self._heads[name] = StackedHead(linear, self.step)
                self._swap(name, self._heads[name])
        for name in targets.saved:
            module = base.get_submodule(name)
            if isinstance(module, nn.Embedding):
                self._heads[name] = StackedEmbedding(module, self.step)
            else:
                assert isinstance(module, nn.Linear)
                self._heads[name] = StackedHead(module, self.step, in_body=not within(name, top_modules(base)))
            self._swap(name, self._heads[name])
        if base_dropout:
            for name, module in list(base.named_modules()):
                if isinstance(module, nn.Dropout):
                    self._swap(name, ClientDropout(base_dropout, self.step))
        self.words = WordPlaces(base, self.step)

    def _swap(self, name: str, module: nn.Module) -> None:
        self._originals[name] = self.base.get_submodule(name)
        self.base.set_submodule(name, module)

    def detach(self) -> nn.Module:
        """The base model as it came."""
        self.words.close()
        for name, module in reversed(self._originals.items()):
            self.base.set_submodule(name, module)
        self._originals.clear()
        return self.base

    def head(self) -> dict[str, Tensor]:
        """The base's own head tensors that are to be trained, by parameter name."""
        return {
            f"{name}.{kind}": value.detach()
            for name, module in self._heads.items()
            for kind, value in module.base.named_parameters(recurse=False)
        }

    def spec(self, rank: int, alpha: float, private_head: bool = False, rslora: bool = False) -> AdapterSpec:
        """The layout of adapters for this model."""
        head = tuple((name, tuple(value.shape)) for name, value in self.head().items())
        return AdapterSpec(self.targets.layers, rank, alpha, head, private_head, rslora=rslora)

    def bind(self, spec: AdapterSpec, views: list[Tensor], scaling: Tensor, merged: Merged | None = None) -> None:
        """Let the next forward passes use these tensors, one per slot of ``spec``, and what was merged."""
        self.step.clients = len(scaling)
        self.step.scaling = scaling[:, None, None].to(views[0].device)
        for slot, view in zip(spec.slots, views, strict=True):
            if slot.block == "head":
                name, kind = slot.name.rsplit(".", 1)
                setattr(self._heads[name], kind, view)
            else:
                setattr(self._layers[slot.name], slot.block, view)
        for name, layer in self._layers.items():
            update = merged.layers[name] if merged is not None else None
            layer.merged = None if update is None or update.empty else update
            layer.formed = None

    def bind_adapters(self, x: Adapters) -> None:
        """Let the next forward passes use the adapters of these clients."""
        self.bind(x.spec, [x.spec.view(slot, x.flat) for slot in x.spec.slots], x.scaling, x.merged)

    def form_weights(self) -> None:
        """Let passes that need no gradients of the adapters multiply by every client's whole weights, formed once.

        For layers that are small and plain (no quantised base), and until other adapters are bound; nothing is formed
        where these weights would take more than ``_FORMED`` numbers.
        """
        sizes = [layer.d_in * layer.d_out for layer in self._layers.values()]
        if self.step.clients * sum(sizes) <= _FORMED:
            for layer in self._layers.values():
                layer.form()

    @contextmanager
    def training(self, streams: list[torch.Generator]) -> Iterator[None]:
        """Drop out in the forward passes inside, by one generator per client; evaluation drops nothing."""
        self.step.streams = streams
        try:
            yield
        finally:
            self.step.streams = None

    def __call__(
        self, inputs: dict[str, Tensor], origin: Any = None, places: Bool[Tensor, "row token"] | None = None
    ) -> Tensor:
        """Logits of client-major rows, in fp32 or better; ``origin`` says which rows of which data set they are.

        ``places``: of a language model, those whose logits are wanted; where they can be chosen, these alone come, as
        [place, word].
        """
        self.step.shape = _shape_of(inputs)
        if "decoder_input_ids" in inputs:
            self.step.written_shape = (inputs["decoder_input_ids"].shape[0], inputs["decoder_input_ids"].shape[1])
        logits = self.words.logits(partial(self.forward, self.inputs_read(inputs), origin), places)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def inputs_read(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of the inputs that the base model reads."""
        return {name: value for name, value in inputs.items() if name in self._read}

    def plain(self, inputs: dict[str, Tensor], origin: Any = None) -> Tensor:
        """The base model's own forward."""
        return self.base(**inputs).logits


def _shape_of(inputs: dict[str, Tensor]) -> tuple[int, int]:
    """(rows, tokens) of what a model reads; -1 for images, all tokens of which are real."""
    if "pixel_values" in inputs:
        return len(inputs["pixel_values"]), -1
    return inputs["input_ids"].shape[0], inputs["input_ids"].shape[1]


def _head_linears(base: nn.Module, heads: tuple[str, ...]) -> list[tuple[str, nn.Linear]]:
    found = []
    for head in heads:
        for name, module in base.get_submodule(head).named_modules(prefix=head):
            if isinstance(module, nn.Linear):
                found.append((name, module))
            elif next(module.parameters(recurse=False), None) is not None:
                kind = type(module).__name__
                raise ModelError(
                    f"head {head} holds a {kind} at {name}; only linear heads train; set adapter.head=frozen"
                )
    return found
