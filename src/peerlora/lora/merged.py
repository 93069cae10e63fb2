"""What clients have folded into their base: per layer and client a sum of low-rank products, beside the shared weights.

The base itself is never copied or changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peerlora.lora.product import deviation, norms2, product_consensus

Rows = slice | Sequence[int]
Agree = Callable[[Int[Tensor, "layer 2"]], Int[Tensor, "layer 2"]]


@dataclass(frozen=True)
class Update:
    """``dense + left @ right`` of one layer, alpha/rank included.  Only one of the two has columns.

    Every merge adds columns to ``left`` and ``right``.  A sum of k columns holds k (d_in + d_out) numbers and costs as
    many multiplications per token; when that exceeds d_in * d_out (k = d/2 of a square layer) it becomes ``dense``.
    """

    left: Float[Tensor, "client d_out column"]
    right: Float[Tensor, "client column d_in"]
    dense: Float[Tensor, "client d_out wide"]

    @property
    def empty(self) -> bool:
        """Whether nothing was merged yet."""
        return self.left.shape[2] == self.dense.shape[2] == 0

    def weight(self) -> Float[Tensor, "client d_out d_in"]:
        """The sum written out."""
        return self.dense if self.dense.shape[2] else self.left @ self.right

    def plus(self, left: Float[Tensor, "#client d_out more"], right: Float[Tensor, "#client more d_in"]) -> Update:
        """With another product added; columns that are zero for all clients (padded ranks) are left out."""
        used = right.any(2).any(0)
        left, right = (part.to(self.left).expand(len(self.left), -1, -1) for part in (left[:, :, used], right[:, used]))
        if self.dense.shape[2]:
            return Update(self.left, self.right, torch.baddbmm(self.dense, left, right))
        return Update(torch.cat([self.left, left], 2), torch.cat([self.right, right], 1), self.dense)._compact()

    def apply(self, x: Float[Tensor, "client row d_in"]) -> Float[Tensor, "client row d_out"]:
        """Every client's rows through its own sum."""
        if self.dense.shape[2]:
            return torch.bmm(x, self.dense.mT.to(x.dtype))
        return torch.bmm(torch.bmm(x, self.right.mT.to(x.dtype)), self.left.mT.to(x.dtype))

    def mean(self) -> Update:
        """One client with the average of the products, exactly.

        Where one factor is common to all (RAC-LoRA's frozen one, or any on the complete graph) it is the other's
        average; else the products are put side by side.
        """
        if self.dense.shape[2]:
            return Update(self.left[:1], self.right[:1], client_mean(self.dense))
        if torch.equal(self.right, self.right[:1].expand_as(self.right)):
            return Update(client_mean(self.left), self.right[:1], self.dense[:1])
        if torch.equal(self.left, self.left[:1].expand_as(self.left)):
            return Update(self.left[:1], client_mean(self.right), self.dense[:1])
        left = self.left.permute(1, 0, 2).flatten(1) / len(self.left)
        return Update(left[None], self.right.flatten(0, 1)[None], self.dense[:1])._compact()

    def rows(self, clients: Rows) -> Update:
        """Some of the clients."""
        return Update(self.left[clients], self.right[clients], self.dense[clients])

    def to(self, device: torch.device | str) -> Update:
        """The same values on a device."""
        return Update(self.left.to(device), self.right.to(device), self.dense.to(device))

    def live(self, client: int) -> int:
        """The columns up to the last one that is not zero for this client."""
        (used,) = self.left[client].any(0).nonzero(as_tuple=True)
        return int(used[-1]) + 1 if len(used) else 0

    def _compact(self) -> Update:
        (_, d_out, columns), d_in = self.left.shape, self.right.shape[2]
        if columns * (d_in + d_out) <= d_in * d_out:
            return self
        return _dense(self.left @ self.right)


def _dense(weight: Float[Tensor, "client d_out d_in"]) -> Update:
    clients, d_out, d_in = weight.shape
    return Update(weight.new_zeros(clients, d_out, 0), weight.new_zeros(clients, 0, d_in), weight)


def client_mean(x: Float[Tensor, "client ..."]) -> Float[Tensor, "1 ..."]:
    """The average of the clients, taken about the first one, so that equal ones average to themselves to the bit."""
    return x[:1] + (x - x[:1]).mean(0, keepdim=True)


@dataclass(frozen=True)
class Merged:
    """The updates of all adapted layers.

    A method that merges holds one from the start, empty: a checkpoint is read into a tree of the same names.
    """

    layers: Mapping[str, Update]

    @staticmethod
    def nothing(
        shapes: Mapping[str, tuple[int, int]], like: Float[Tensor, "client parameter"], columns: int = 0
    ) -> Merged:
        """Zero for layers of these (d_out, d_in), in so many columns; dtype and device as ``like``."""
        clients = len(like)
        return Merged(
            {
                name: Update(
                    like.new_zeros(clients, d_out, columns),
                    like.new_zeros(clients, columns, d_in),
                    like.new_zeros(clients, d_out, 0),
                )
                for name, (d_out, d_in) in shapes.items()
            }
        )

    def plus(self, products: Mapping[str, tuple[Tensor, Tensor]]) -> Merged:
        """With one more product (left, right) in every layer that is named."""
        return Merged(
            {name: own.plus(*products[name]) if name in products else own for name, own in self.layers.items()}
        )

    def rows(self, clients: Rows) -> Merged:
        """Some of the clients."""
        return Merged({name: own.rows(clients) for name, own in self.layers.items()})

    def to(self, device: torch.device | str) -> Merged:
        """The same values on a device."""
        return Merged({name: own.to(device) for name, own in self.layers.items()})

    def mean(self) -> Merged:
        """One client whose updates are the averages of all."""
        return Merged({name: own.mean() for name, own in self.layers.items()})

    def message(self, client: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What one client sends of a low-rank sum: name -> (shape without trailing zero columns, dtype)."""
        shapes = {}
        for name, own in self.layers.items():
            live, dtype = own.live(client), own.left.dtype
            shapes[f"left:{name}"] = ((own.left.shape[1], live), dtype)
            shapes[f"right:{name}"] = ((live, own.right.shape[2]), dtype)
        return shapes

    def with_rows(self, parts: Sequence[tuple[Sequence[int], Merged]], agree: Agree = lambda widths: widths) -> Merged:
        """With the rows of ``parts`` in the given places, in as many columns as the one with the most has.

        ``agree`` turns these widths into the largest of all who hold clients of the run.
        """
        of_layer = {name: [(rows, part.layers[name]) for rows, part in parts] for name in self.layers}
        widths = agree(torch.tensor([_widths(own, of_layer[name]) for name, own in self.layers.items()]))
        agreed = zip(self.layers.items(), widths.tolist(), strict=True)
        return Merged({name: _with_rows(own, of_layer[name], *width) for (name, own), width in agreed})


def _widths(whole: Update, parts: Sequence[tuple[Sequence[int], Update]]) -> tuple[int, int]:
    """The most columns that a low-rank sum has, and a dense one."""
    updates = [whole, *(part for _, part in parts)]
    return max(update.left.shape[2] for update in updates), max(update.dense.shape[2] for update in updates)


def _with_rows(whole: Update, parts: Sequence[tuple[Sequence[int], Update]], columns: int, dense: int) -> Update:
    if dense:
        weight = whole.weight().clone()
        for rows, part in parts:
            weight[rows] = part.weight()
        return _dense(weight)
    clients, d_out, before = whole.left.shape
    left = whole.left.new_zeros(clients, d_out, columns)
    right = whole.right.new_zeros(clients, columns, whole.right.shape[2])
    left[:, :, :before], right[:, :before] = whole.left, whole.right
    for rows, part in parts:
        left[rows], right[rows] = 0.0, 0.0
        left[rows, :, : part.left.shape[2]], right[rows, : part.right.shape[1]] = part.left, part.right
    return Update(left, right, whole.dense)


# --- whole updates: what was merged and the factors that still train


def whole(own: Update, B: Float[Tensor, "client d_out rank"], A: Float[Tensor, "client rank d_in"]) -> Update:
    """``own + B A`` (scaling inside B) in float64."""
    if own.dense.shape[2]:
        return Update(own.left.double(), own.right.double(), own.dense.double() + B.double() @ A.double())
    left, right = torch.cat([own.left.double(), B.double()], 2), torch.cat([own.right.double(), A.double()], 1)
    return Update(left, right, own.dense.double())


def consensus(update: Update) -> Float[Tensor, ""]:
    """``(1/n) sum_i || U_i - mean_j U_j ||_F^2``: how far the clients' models are apart in one layer."""
    if update.dense.shape[2]:
        return deviation(update.dense).square().sum() / len(update.dense)
    return product_consensus(update.left, update.right)


def distances2(before: Update, after: Update) -> Float[Tensor, " client"]:
    """``|| after_i - before_i ||_F^2`` of every client."""
    if before.dense.shape[2] or after.dense.shape[2]:
        return (after.weight() - before.weight()).square().sum((1, 2))
    left, right = torch.cat([after.left, -before.left], 2), torch.cat([after.right, before.right], 1)
    return norms2(left, right)
