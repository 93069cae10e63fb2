"""How the factors of all clients begin: drawn at random, or taken out of the base's own weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peerlora.errors import ConfigError
from peerlora.lora.adapters import Adapters, AdapterSpec, Block, draw_factor, mask_ranks

PRINCIPAL = ("pissa", "olora")
"""Values of ``adapter.init`` that take what clients begin with out of the base's weights."""
Factors = Mapping[str, tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]]
"""(B, A) by layer."""


def redrawn(x: Adapters, block: Block, generator: torch.Generator) -> Adapters:
    """One factor ("A" or "B") drawn anew as at the start, the same for all clients, and the other one zero."""
    flat = x.flat.clone()
    for slot in x.spec.slots:
        part = flat[:, slot.start : slot.stop]
        if slot.block == block:
            part.copy_(draw_factor(slot, generator))
        elif slot.block != "head":
            part.zero_()
    return mask_ranks(replace(x, flat=flat))


@dataclass(frozen=True)
class Principal:
    """What was taken out of a base's weights to be trained: ``W = residual + scaling B A`` in every adapted layer."""

    factors: Factors
    scaling: float

    def subtracted(self, x: Adapters) -> Adapters:
        """The same models as adapters of the whole base: what was taken out of it is part of what they add."""
        own = x if x.merged is not None else x.with_empty_merges()
        assert own.merged is not None
        products = {
            name: (-self.scaling * B.expand(x.clients, -1, -1), A.expand(x.clients, -1, -1))
            for name, (B, A) in self.factors.items()
        }
        return replace(own, merged=own.merged.plus(products))


def principal_factors(
    weight: Float[Tensor, "d_out d_in"], rank: int, scaling: float, init: str
) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
    """(B, A) in float64 with which a layer of this weight begins.

    pissa: ``scaling B A`` is the best approximation of rank r, its singular values shared by both factors (PiSSA,
    arXiv 2404.02948); olora: B and A are the first columns and rows of the QR decomposition (OLoRA, arXiv 2406.01775).
    Signs are fixed, so that all machines come to the same factors.
    """
    if init == "pissa":
        U, values, V = torch.linalg.svd(weight.double(), full_matrices=False)
        root = (values[:rank] / scaling).sqrt()
        B, A = U[:, :rank] * root, root[:, None] * V[:rank]
    else:
        Q, R = torch.linalg.qr(weight.double())
        B, A = Q[:, :rank], R[:rank]
    largest = B.gather(0, B.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(B)
    return (B * sign).contiguous(), (A * sign.mT).contiguous()


@torch.no_grad()
def take_principal(weights: Mapping[str, Tensor], rank: int, scaling: float, init: str) -> Principal:
    """Take the product that clients begin with out of each weight, in place; ``weights``: [d_out, d_in] by layer.

    Raises ConfigError where a layer is smaller than the rank.
    """
    factors = {}
    for name, weight in weights.items():
        if rank > min(weight.shape):
            raise ConfigError(
                f"adapter.init={init} takes {rank} directions out of every layer, {name} has {min(weight.shape)}; "
                "lower adapter.rank, or use adapter.init=default"
            )
        B, A = (factor.to(weight.dtype) for factor in principal_factors(weight, rank, scaling, init))
        weight.copy_(weight.double() - scaling * B.double() @ A.double())
        factors[name] = (B, A)
    return Principal(factors, scaling)


def with_factors(x: Adapters, factors: Factors) -> Adapters:
    """Every client with these factors."""
    flat = x.flat.clone()
    for slot in x.spec.slots:
        if slot.block != "head":
            B, A = factors[slot.name]
            flat[:, slot.start : slot.stop] = (A if slot.block == "A" else B).reshape(-1).to(flat)
    return replace(x, flat=flat)


def orthogonal_factors(spec: AdapterSpec, generator: torch.Generator) -> Factors:
    """(B, A) with ``B A = 0`` though neither is zero, in float64, as PEFT draws them for ``orthogonal``.

    Raises ConfigError where the rank is odd.
    """
    if spec.rank % 2:
        raise ConfigError(
            f"adapter.init=orthogonal shares the rank between two orthogonal halves, adapter.rank={spec.rank} is odd; "
            "give an even one"
        )

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    factors = {}
    for layer in spec.layers:
        Q, _ = torch.linalg.qr(normal(spec.rank, spec.rank))
        A = (normal(layer.d_in, spec.rank // 2) @ Q[0::2]).mT / 10
        B = (normal(spec.rank // 2, layer.d_out).mT @ Q[1::2]) / 10
        factors[layer.name] = (B, A.contiguous())
    return factors


def weights_of(base: nn.Module, layers: Iterable[str]) -> dict[str, Float[Tensor, "d_out d_in"]]:
    """The weights of linear layers, by name, as views into a base model before anything is attached."""
    found = {}
    for name in layers:
        module = base.get_submodule(name)
        weight: Tensor = module.weight.data  # pyright: ignore[reportAttributeAccessIssue,reportAssignmentType]
        found[name] = weight.mT if type(module).__name__ == "Conv1D" else weight  # GPT-2 stores them transposed
    return found
