"""The LoRA adapter inside a PEFT model that a loop of the user's own trains: read, written, held and exported.

Values go through PEFT's own ``get_peft_model_state_dict`` and ``set_peft_model_state_dict``.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from peerlora.errors import ModelError
from peerlora.lora.adapters import Adapters, AdapterSpec, Block, LayerSpec, Slot, draw_factor, shape_at_rank
from peerlora.lora.attach import without_peft_warnings
from peerlora.lora.base_digest import digest_of
from peerlora.lora.peft_checks import (
    adapter_name,
    check_parameters,
    check_settings,
    lora_layers,
    quantisation,
    unwrap,
)
from peerlora.lora.peft_io import PREFIX, ExportContext, adapter_card, lora_tensors, own_factors, whole_number
from peerlora.lora.weight_order import keep_weight_order


class PeftAdapter:
    """The active LoRA adapter of a PEFT model, with its heads and other modules in full.

    ``private_head``: modules in full are trained and never exchanged.  ``largest_rank``: that of all clients, by
    default the adapter's own.  Raises ModelError for adapters that methods cannot mix, and for a base whose weights
    bitsandbytes has re-ordered.
    """

    def __init__(self, model: Any, private_head: bool = False, largest_rank: int | None = None):
        self.model = unwrap(model)
        self.name = adapter_name(self.model)
        self.config = self.model.peft_config[self.name]
        check_settings(self.config)
        keep_weight_order(self.model)
        self._layers = lora_layers(self.model, self.name)
        if not self._layers:
            raise ModelError(f"the PEFT adapter {self.name!r} adapts no layer; see LoraConfig(target_modules=...)")
        self.parameters = self._own_parameters()
        """Of the adapter, by the name in PEFT's state dict."""
        check_parameters(self.model, self.parameters)
        self.rank: int = self.config.r
        self.spec = self._spec(private_head, largest_rank or self.rank)
        self.slots: dict[str, Slot] = {_state_name(slot): slot for slot in self.spec.slots}
        """Where each tensor of PEFT's state dict lies in the flat buffer."""
        self.dtype = torch.float32
        for value in self.parameters.values():
            self.dtype = torch.promote_types(self.dtype, value.dtype)

    @cached_property
    def quantisation(self) -> str:
        """How the base is kept: none, int8 or nf4."""
        return quantisation(self.model)

    @property
    def task_type(self) -> str | None:
        """PEFT's task type."""
        return getattr(self.config.task_type, "value", self.config.task_type)

    @property
    def source(self) -> str:
        """The base model's name."""
        return str(self.config.base_model_name_or_path or type(self.model.get_base_model()).__name__)

    @torch.no_grad()
    def read(self) -> Float[Tensor, " parameter"]:
        """The adapter's values on the CPU, in fp32 or better; padding beyond the own rank is zero."""
        flat = torch.zeros(self.spec.parameters, dtype=self.dtype)
        state = self._state()
        for name, slot in self.slots.items():
            self.part(flat, slot).copy_(state[name])
        return flat

    @torch.no_grad()
    def write(self, flat: Float[Tensor, " parameter"], blocks: Collection[Block] = ("A", "B", "head")) -> None:
        """Put values into these blocks of the model, cast to the dtype of each parameter."""
        from peft import set_peft_model_state_dict

        state = {name: value for name, value in self._state().items() if name in self.slots}
        for name, slot in self.slots.items():
            if slot.block in blocks:
                state[name] = self.part(flat, slot).to(self.parameters[name]).clone()
        with without_peft_warnings():
            set_peft_model_state_dict(self.model, state, adapter_name=self.name)

    def tensors(self) -> dict[str, Tensor]:
        """What is exchanged, by the names in PEFT's state dict, as copies on the CPU in fp32 or better."""
        flat = self.read()
        shared = {name: slot for name, slot in self.slots.items() if slot.start < self.spec.shared.stop}
        return {name: self.part(flat, slot).clone() for name, slot in shared.items()}

    def put_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put in what ``tensors`` gave, here or elsewhere.  Raises ModelError for other names, shapes or values."""
        expected = self.tensors()
        wrong = sorted(set(tensors) ^ set(expected)) or [
            name for name, value in tensors.items() if value.shape != expected[name].shape or not value.isfinite().all()
        ]
        if wrong:
            raise ModelError(
                f"{wrong[0]} and {len(wrong) - 1} others of the tensors are not those of this adapter: missing, "
                "unknown, of another shape or not finite; compare LoraConfig at both ends"
            )
        flat = self.read()
        for name, value in tensors.items():
            self.part(flat, self.slots[name]).copy_(value)
        self.write(flat)

    def of_blocks(self, blocks: Collection[Block]) -> list[nn.Parameter]:
        """The parameters of these blocks."""
        return [self.parameters[name] for name, slot in self.slots.items() if slot.block in blocks]

    def draw_start(self, generator: torch.Generator) -> None:
        """Draw A where the adapter is PEFT's untrained default (A random, B zero), as a simulation's common start is.

        Sites need not seed their own draws then; any other start stays as it is.
        """
        flat = self.read()
        if self.config.init_lora_weights is not True or flat[self.spec.columns("B")].any():
            return
        for slot in self.spec.slots:
            if slot.block == "A":
                drawn = draw_factor(slot, generator).view(slot.shape)
                self.part(flat, slot).copy_(drawn[: self.rank])
        self.write(flat, ("A",))

    def adapters(self) -> Adapters:
        """The values as the adapters of one client."""
        return Adapters(self.spec, self.read()[None], torch.tensor([self.rank]))

    def digest(self, halved: bool = False, originals: Mapping[str, str] | None = None) -> str:
        """SHA-256, hexadecimal, of the frozen weights by their names in the base model; see ``base_digest``."""
        own, found = {id(value) for value in self.parameters.values()}, {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            replaced = ".original_module." in name or ".modules_to_save." in name or ".lora_" in name
            if id(value) not in own and not replaced and isinstance(value, Tensor):
                found[name.removeprefix(PREFIX).replace(".base_layer.", ".")] = value
        return digest_of(found, halved, originals)

    def export(self, folder: Path, x: Adapters, row: int, context: ExportContext) -> Path:
        """Write one row of ``x`` as a folder that ``PeftModel.from_pretrained`` loads."""
        folder.mkdir(parents=True, exist_ok=True)
        factors = own_factors(x.rows([row]))
        heads = {f"{PREFIX}{name}": value[row].contiguous().clone() for name, value in x.head.items()}
        save_file(lora_tensors(factors) | heads, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.deepcopy(self.config)
        config.r, config.lora_alpha = factors.rank, whole_number(factors.alpha)
        config.rank_pattern, config.alpha_pattern = factors.rank_pattern, factors.alpha_pattern
        config.init_lora_weights, config.inference_mode = True, True
        config.save_pretrained(str(folder))
        (folder / "README.md").write_text(adapter_card(context, factors), encoding="utf-8")
        return folder

    def _state(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        with without_peft_warnings():
            return get_peft_model_state_dict(self.model, adapter_name=self.name, save_embedding_layers=False)

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters behind PEFT's state dict, which names them without the adapter."""
        state = self._state()
        found = {}
        for name, value in self.model.named_parameters(remove_duplicate=False):
            plain = name.replace(f".modules_to_save.{self.name}.", ".").replace(f".{self.name}.", ".")
            if plain in state and name != plain:
                found[plain] = value
        buffers = sorted(set(state) - set(found))
        if buffers:
            raise ModelError(
                f"{buffers[0]} of the adapter is no parameter; modules in full may hold parameters only, so take its "
                "module out of LoraConfig(modules_to_save=...)"
            )
        return found

    def _spec(self, private_head: bool, largest: int) -> AdapterSpec:
        layers = tuple(
            LayerSpec(name.removeprefix(PREFIX), module.lora_A[self.name].in_features, module.out_features)
            for name, module in self._layers.items()
        )
        head = tuple(
            (name.removeprefix(PREFIX), tuple(value.shape))
            for name, value in self.parameters.items()
            if ".lora_" not in name
        )
        alpha, rslora = float(self.config.lora_alpha), bool(self.config.use_rslora)
        return AdapterSpec(layers, largest, alpha, head, private_head, rslora=rslora)

    def part(self, flat: Tensor, slot: Slot) -> Tensor:
        """The part of a slot that the adapter's own rank uses, as a view."""
        whole = flat[slot.start : slot.stop].view(slot.shape)
        shape = shape_at_rank(slot, self.rank)
        return whole[tuple(slice(0, length) for length in shape)]


def _state_name(slot: Slot) -> str:
    """The name of a slot's tensor in PEFT's state dict."""
    return f"{PREFIX}{slot.name}" if slot.block == "head" else f"{PREFIX}{slot.name}.lora_{slot.block}.weight"
