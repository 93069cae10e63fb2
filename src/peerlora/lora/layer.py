"""Layers that carry all clients in one forward pass: a frozen linear plus one low-rank update per client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from peerlora.lora.merged import Update
from peerlora.lora.row_gradients import RowGradients, client_product


@dataclass(frozen=True)
class Layout:
    """How a base model lays out the rows of a batch."""

    rows_first: bool = True
    """Whether the inputs of all layers hold the rows of a batch one after another, so that clients can share a graph;
    not so where tokens come first, or where a layer sees something that all rows share, such as positions."""
    padding: Literal["right", "left"] = "right"
    """The side on which padding does not change what is said of a row."""


@dataclass(frozen=True)
class PackedPass:
    """A forward pass on the real tokens alone, all rows in one."""

    linear: Callable[[StackedLinear, Float[Tensor, "1 token d_in"]], Float[Tensor, "1 token d_out"]]
    """Computes an adapted layer."""
    padded: Int[Tensor, " token"]
    """Position of each token in the padded [row * token]."""


@dataclass
class Step:
    """What the layers of one model need to know of the current step; all of them share this object.

    Rows of every activation are client-major: client 0's rows first.  ``extents`` are each client's own (rows,
    tokens) before padding, ``streams`` one generator per client; both are needed only where dropout is on.
    """

    clients: int = 1
    scaling: Float[Tensor, "client 1 1"] = field(default_factory=lambda: torch.ones(1, 1, 1))
    extents: list[tuple[int, int]] = field(default_factory=list)
    streams: list[torch.Generator] | None = None
    layout: Layout = Layout()
    written: list[int] | None = None
    """Each client's own tokens in the decoder, before padding on the right; None where there is none."""
    shape: tuple[int, int] = (0, 0)
    """(rows, tokens) of the inputs of this forward pass; -1 tokens of images, none of which is padding."""
    written_shape: tuple[int, int] = (0, 0)
    """The same of the decoder, whose tokens are another number."""
    row_gradients: RowGradients | None = None
    """Where the backward of this forward pass leaves the gradients of rows, in place of those of clients."""
    packed: PackedPass | None = None
    """Set while a forward pass leaves padding out."""

    def dropout(self, x: Float[Tensor, "row ..."], p: float) -> Float[Tensor, "row ..."]:
        """Inverted dropout drawn per client over its own rows and tokens.

        A client's draws thus depend neither on who shares the graph nor on how far its rows were padded.
        """
        keep = self.keep(x.shape, p, x)
        return x if keep is None else x * keep

    def keep(self, shape: Sequence[int], p: float, like: Tensor) -> Tensor | None:
        """What ``dropout`` multiplies a tensor of this shape by: 0 or 1/(1-p); None where nothing is dropped."""
        if p == 0.0 or self.streams is None:
            return None
        given, rows = shape, self.shape[0]
        if self.layout.rows_first and rows and shape[0] != rows:  # a row's tokens, or heads, one after another
            shape = (rows, shape[0] // rows, *shape[1:])
        mask = torch.zeros(self.clients, shape[0] // self.clients, *shape[1:], dtype=like.dtype)  # as the streams: CPU
        for client, (own, stream) in enumerate(zip(mask, self.streams, strict=True)):
            part = self._part(own, client)
            draw = torch.rand(part.shape, generator=stream, dtype=torch.float32)
            part.copy_((draw >= p).to(mask.dtype).div_(1 - p))
        return mask.view(*given).to(like.device, non_blocking=True)

    def _part(self, own: Tensor, client: int) -> Tensor:
        """A client's own rows and tokens in its share of a mask."""
        rows, tokens = self.extents[client]
        if not self.layout.rows_first:  # then the client is alone in the graph, and nobody pads it further
            return own
        if self.written is not None and own.ndim == 3 and own.shape[1] == self.written_shape[1]:
            return own[:rows, : self.written[client]]
        if own.ndim != 3 or (self.shape[1] and own.shape[1] != self.shape[1]):
            return own[:rows]
        return own[:rows, -tokens:] if self.layout.padding == "left" else own[:rows, :tokens]


class ClientDropout(nn.Module):
    """Stands in for a base model's nn.Dropout; drawn per client."""

    def __init__(self, p: float, step: Step):
        super().__init__()
        self.p, self.step = p, step

    def forward(self, x: Tensor) -> Tensor:
        """Drop while clients train; pass through otherwise."""
        return self.step.dropout(x, self.p)


class StackedLinear(nn.Module):
    """``y = base(x) + merged x + scaling * B A x`` with client i's factors on client i's rows.

    ``A`` [client, rank, d_in] and ``B`` [client, d_out, rank] are set before each step, and ``merged`` where a method
    merges: it is part of the base, so adapter dropout does not reach it.  ``formed``: every client's whole weight,
    where passes that need no gradients of the factors are many.
    """

    A: Tensor
    B: Tensor
    merged: Update | None
    formed: Float[Tensor, "client d_out d_in"] | None

    def __init__(self, base: nn.Module, d_in: int, d_out: int, dropout: float, step: Step):
        super().__init__()
        self.base, self.d_in, self.d_out, self.p, self.step = base, d_in, d_out, dropout, step
        self.merged = self.formed = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight, which some models ask for its type."""
        return self.base.weight  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base.bias  # pyright: ignore[reportReturnType]

    def forward(self, x: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row d_out"]:
        """One frozen product for all rows, two batched ones for the factors; or one where weights are formed."""
        if self.step.packed is not None:
            return self.step.packed.linear(self, x)
        if self.formed is not None:
            z = x.reshape(self.step.clients, -1, self.d_in)
            return _affine(z, self.formed, self.bias).view(*x.shape[:-1], self.d_out)
        y = self.base(x)
        if self.merged is not None:
            y = y + self.merged.apply(x.reshape(self.step.clients, -1, self.d_in)).view(y.shape)
        z = self.step.dropout(x, self.p).reshape(self.step.clients, -1, self.d_in)
        u = client_product(z, self.A, self.step.row_gradients) * self.step.scaling.to(z.dtype)
        if self.step.row_gradients is not None:
            return y + client_product(u, self.B, self.step.row_gradients).view(y.shape)
        return torch.baddbmm(y.reshape(self.step.clients, -1, self.d_out), u, self.B.mT.to(z.dtype)).view(y.shape)

    def form(self) -> None:
        """Form ``W + merged + scaling B A`` of every client, for passes without dropout until the factors are set."""
        weight = torch.baddbmm(self.weight, self.step.scaling * self.B, self.A)
        if self.merged is not None:
            weight = weight + self.merged.weight()
        self.formed = weight.detach()


def _affine(
    x: Float[Tensor, "client row d_in"], weight: Float[Tensor, "client d_out d_in"], bias: Tensor | None
) -> Float[Tensor, "client row d_out"]:
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias, x, weight.mT)


class StackedHead(nn.Module):
    """A linear layer of the head, trained in full: weight [client, d_out, d_in], bias [client, d_out].

    ``in_body``: it is one of the body, so what it gives has the precision of what it gets.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, base: nn.Linear, step: Step, in_body: bool = False):
        super().__init__()
        self.base, self.step, self.bias, self.in_body = base, step, None, in_body

    def forward(self, x: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row d_out"]:
        """Each client's rows through its own weights."""
        z = x.reshape(self.step.clients, -1, x.shape[-1]).to(self.weight.dtype)
        if self.step.row_gradients is not None:
            y = client_product(z, self.weight, self.step.row_gradients) + self._bias(z)
        elif self.bias is None:
            y = torch.bmm(z, self.weight.mT)
        else:
            y = torch.baddbmm(self.bias[:, None], z, self.weight.mT)
        return y.view(*x.shape[:-1], -1).to(x.dtype if self.in_body else y.dtype)

    def _bias(self, z: Float[Tensor, "client input d_in"]) -> Tensor | float:
        """The bias as a product with ones, so that its gradients by row are found as those of weights."""
        if self.bias is None:
            return 0.0
        return client_product(z.new_ones(*z.shape[:2], 1), self.bias[..., None], self.step.row_gradients, self.bias)


class StackedEmbedding(nn.Module):
    """An embedding table trained in full: weight [client, word, width]; the row of padding keeps its values."""

    weight: Tensor

    def __init__(self, base: nn.Embedding, step: Step):
        super().__init__()
        self.base, self.step = base, step

    def forward(self, ids: Int[Tensor, "row token"]) -> Float[Tensor, "row token width"]:
        """Each client's rows from its own table, in the precision of the body."""
        clients, words, width = self.weight.shape
        first = torch.arange(clients, device=ids.device) * words
        own = ids.view(clients, -1) + first[:, None]
        found = F.embedding(own, self.weight.reshape(-1, width)).view(*ids.shape, width)
        if self.base.padding_idx is not None:
            found = torch.where((ids == self.base.padding_idx)[..., None], found.detach(), found)
        return found.to(self.base.weight.dtype)
