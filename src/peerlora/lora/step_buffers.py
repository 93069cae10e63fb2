"""Flat buffers between a PEFT model and a rule that changes the gradients of every local step."""

from __future__ import annotations

from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peerlora.lora.adapters import BLOCKS, Block
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
        self._own: list[Tensor] = [adapter.parameters[name] for name in adapter.slots]
        self._value_parts = [adapter.part(self._values, slot) for slot in adapter.slots.values()]
        self._of_block: dict[Block, tuple[list[nn.Parameter], list[Tensor]]] = {
            block: (adapter.of_blocks([block]), self._parts_of(adapter, block)) for block in BLOCKS
        }
        """By block, its parameters and where the gradient of each lies in the buffer."""

    @torch.no_grad()
    def values(self) -> Float[Tensor, " parameter"]:
        """The adapter's values, until the next call; padding beyond the own rank is zero."""
        torch._foreach_copy_(self._value_parts, self._own)
        return self._values.cpu()

    @torch.no_grad()
    def gradients(self, blocks: Collection[Block]) -> Float[Tensor, " parameter"]:
        """The gradients of these blocks, until the next call; zero elsewhere, and where a parameter has none."""
        self._gradients.zero_()
        gradients, parts = self._pairs(blocks)
        if parts:
            torch._foreach_copy_(parts, gradients)
        return self._gradients.cpu()

    @torch.no_grad()
    def put_gradients(self, flat: Float[Tensor, " parameter"], blocks: Collection[Block]) -> None:
        """Give the parameters of these blocks other gradients."""
        self._gradients.copy_(flat)
        gradients, parts = self._pairs(blocks)
        if parts:
            torch._foreach_copy_(gradients, parts)

    def _parts_of(self, adapter: PeftAdapter, block: Block) -> list[Tensor]:
        return [adapter.part(self._gradients, slot) for slot in adapter.slots.values() if slot.block == block]

    def _pairs(self, blocks: Collection[Block]) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients of these blocks' parameters, made where there are none, and where each lies in the buffer."""
        gradients: list[Tensor] = []
        parts: list[Tensor] = []
        for block in blocks:
            own, of_own = self._of_block[block]
            gradients += [_made(each) if each.grad is None else each.grad for each in own]
            parts += of_own
        return gradients, parts


def _made(parameter: nn.Parameter) -> Tensor:
    """A gradient of zero for a parameter without one."""
    parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
