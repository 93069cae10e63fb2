"""Flat buffers between a PEFT model and a rule that changes the gradients of every local step."""

from __future__ import annotations

from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peerlora.lora.adapters import Block
from peerlora.lora.peft_model import PeftAdapter


class StepBuffers:
    """Reads an adapter's values and gradients, and puts gradients back, by one call of torch for all layers.

    Buffers are on the device of the parameters, or on the CPU where these are on several; what is read is on the CPU.
    Through PEFT's state dicts, as ``PeftAdapter.read`` goes, a step of 48 layers took milliseconds
    (bench/loop_overhead.py --method dfedadmm).
    """

    def __init__(self, adapter: PeftAdapter):
        devices = {value.device for value in adapter.parameters.values()}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        self._values, self._gradients = (
            torch.zeros(adapter.spec.parameters, dtype=adapter.dtype, device=device) for _ in range(2)
        )
        self._parts: list[tuple[Block, nn.Parameter, Tensor, Tensor]] = [
            (
                slot.block,
                adapter.parameters[name],
                adapter.part(self._values, slot),
                adapter.part(self._gradients, slot),
            )
            for name, slot in adapter.slots.items()
        ]

    @torch.no_grad()
    def values(self) -> Float[Tensor, " parameter"]:
        """The adapter's values, until the next call; padding beyond the own rank is zero."""
        torch._foreach_copy_([values for *_, values, _ in self._parts], [value for _, value, *_ in self._parts])
        return self._values.cpu()

    @torch.no_grad()
    def gradients(self, blocks: Collection[Block]) -> Float[Tensor, " parameter"]:
        """The gradients of these blocks, until the next call; zero elsewhere, and where a parameter has none."""
        self._gradients.zero_()
        pairs = [(part, own.grad) for block, own, _, part in self._parts if block in blocks and own.grad is not None]
        if pairs:
            parts, gradients = zip(*pairs, strict=True)
            torch._foreach_copy_(parts, gradients)
        return self._gradients.cpu()

    @torch.no_grad()
    def put_gradients(self, flat: Float[Tensor, " parameter"], blocks: Collection[Block]) -> None:
        """Give the parameters of these blocks other gradients."""
        self._gradients.copy_(flat)
        into, parts = [], []
        for block, own, _, part in self._parts:
            if block in blocks:
                if own.grad is None:
                    own.grad = torch.empty_like(own)
                into.append(own.grad)
                parts.append(part)
        torch._foreach_copy_(into, parts)
