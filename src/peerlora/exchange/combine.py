"""What a receiver makes of its neighbours' adapters where averaging every entry is not enough."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from peerlora.lora.adapters import Adapters
from peerlora.lora.merged import Agree

_SCALARS = 2**24  # of received adapters that a rule sees at once: 128 MB in float64


@dataclass(frozen=True)
class Received:
    """A block of receivers and what reached them, each receiver's own adapters included.

    Receivers with equal rows of W got the same: then the leading axis of ``senders`` and ``weights`` has length 1, and
    what is computed from those alone is computed once.  A rule must not let receivers of a block influence each other.
    """

    own: Adapters
    """[receiver]: what they sent themselves."""
    all_adapters: Adapters
    """[client]: read it through ``senders``."""
    senders: Int[Tensor, "#receiver sender"]
    """Clients with a weight above zero."""
    weights: Float[Tensor, "#receiver sender"]
    """Their entries of W, in float64; rows sum to 1."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the adapted layers."""
        return tuple(self.own.A)

    def A(self, layer: str) -> Float[Tensor, "#receiver sender rank d_in"]:
        """The factors A of one layer, in float64 as all algebra on products."""
        return self.all_adapters.A[layer][self.senders].double()

    def B(self, layer: str) -> Float[Tensor, "#receiver sender d_out rank"]:
        """The factors B of one layer, in float64."""
        return self.all_adapters.B[layer][self.senders].double()

    @property
    def scaling(self) -> Float[Tensor, "#receiver sender"]:
        """alpha/rank of every sender."""
        return self.all_adapters.scaling.double()[self.senders]

    def average(self) -> Adapters:
        """The receivers with the weighted average of all they got, entry by entry (heads too)."""
        mixed = self.weighted_sum(self.weights, self.all_adapters.flat)
        return replace(self.own, flat=mixed.expand(self.own.clients, -1).contiguous())

    def weighted_sum(
        self, weights: Float[Tensor, "row sender"], values: Float[Tensor, "client scalar"]
    ) -> Float[Tensor, "row scalar"]:
        """``sum_j w_ij x_j`` over the senders, in the precision of ``values``.

        A sparse product, on a CPU: in a dense one the last bits of a row depend on how many rows there are.
        """
        senders = self.senders.expand(len(weights), -1)
        if values.device.type == "cpu":
            starts = torch.arange(len(weights) + 1) * senders.shape[1]
            parts = starts, senders.flatten(), weights.to(values.dtype).flatten()
            return _csr_tensor(*parts, (len(weights), len(values))) @ values
        W = torch.zeros(len(weights), len(values), dtype=torch.float64, device=weights.device)
        return W.scatter_(1, senders, weights).to(values.dtype) @ values

    def with_factors(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        measures: Mapping[str, Tensor] | None = None,
        average: Adapters | None = None,
    ) -> Combined:
        """The receivers with new (B, A) by layer.  A mixed head is always averaged linearly.

        ``average``: where that has been computed already; it is changed.
        """
        x = self.average() if average is None else average
        for layer, (B, A) in factors.items():
            x.B[layer].copy_(B)
            x.A[layer].copy_(A)
        return Combined(x, dict(measures or {}))


@dataclass(frozen=True)
class Combined:
    """What a rule made: the receivers' new adapters, and by name a number per receiver that is worth logging."""

    adapters: Adapters
    measures: dict[str, Float[Tensor, "#receiver"]] = field(default_factory=dict)


CombineRule = Callable[[Received], Combined]


def mean(received: Received) -> Combined:
    """The rule with which ``combine`` is ``mix``."""
    return Combined(received.average())


def apply_rule(
    x: Adapters,
    all_adapters: Adapters,
    W: Any,
    rule: CombineRule,
    held: Sequence[int] | None = None,
    agree: Agree = lambda widths: widths,
) -> tuple[Adapters, dict[str, Float[Tensor, " receiver"]]]:
    """``x_i <- rule(what reached i)``, receivers in blocks; those whom nobody reached keep what they have.

    ``all_adapters``: of the clients that the columns of W, dense or sparse, stand for.  ``held``: the rows of W that
    ``x`` holds, all by default; the blocks are those of all rows.  ``agree``: see `Merged.with_rows`.  Also gives what
    the rule measured, by name.
    """
    result, parts, W = x.flat.clone(), [], _entries(W)
    measured: dict[str, Tensor] = {}
    place = {row: i for i, row in enumerate(range(W.shape[0]) if held is None else held)}
    (reached,) = np.nonzero(np.diff(W.indptr) > 1)
    for whole in receiver_blocks(W[reached], x.spec.parameters):
        clients = reached[whole.rows].tolist()
        here = [i for i, client in enumerate(clients) if client in place]
        rows = [place[clients[i]] for i in here]
        if not rows:
            continue
        # Products with what these receivers have in common depend in their last bits on how many they are.  They hear
        # from each other, so all of them are at hand; only what others have merged is not.
        together = len(here) < len(clients) and len(whole.senders) == 1 and x.merged is None
        block = whole if together else whole.of(here)
        own = all_adapters.rows(clients) if together else x.rows(rows)
        senders, weights = (torch.from_numpy(part).to(result.device) for part in (block.senders, block.weights))
        combined = rule(Received(own, all_adapters, senders, weights))
        result[rows] = combined.adapters.flat[here] if together else combined.adapters.flat
        parts.append((rows, combined.adapters.merged))
        for name, values in combined.measures.items():
            kept = measured.setdefault(name, torch.zeros(x.clients, dtype=torch.float64))
            kept[rows] = (values[here] if together and len(values) > 1 else values).to(kept)
    return replace(x, flat=result, merged=x.merged and x.merged.with_rows(parts, agree)), measured


@dataclass(frozen=True)
class SenderBlock:
    """Receivers that are handled together: places on the leading axis, with their senders and weights."""

    rows: Int[np.ndarray, " receiver"]
    senders: Int[np.ndarray, "#receiver sender"]
    weights: Float[np.ndarray, "#receiver sender"]

    def of(self, some: Sequence[int]) -> SenderBlock:
        """Some of its receivers, by their places in ``rows``."""
        own = self.weights[:1] if len(self.weights) == 1 < len(self.rows) else self.weights[some]
        senders = self.senders[:1] if len(self.senders) == 1 < len(self.rows) else self.senders[some]
        return SenderBlock(self.rows[some], senders, own)


def receiver_blocks(W: Any, parameters: int) -> Iterator[SenderBlock]:
    """All receivers of these rows of W, dense or sparse: equal rows together, else those with equally many senders.

    So nothing is padded, and what a receiver gets does not depend on who else is held here.
    """
    W = _entries(W)
    degrees = np.diff(W.indptr)
    for degree in np.unique(degrees):
        rows = np.flatnonzero(degrees == degree)
        places = W.indptr[rows][:, None] + np.arange(degree)
        senders, weights = W.indices[places].astype(np.int64), W.data[places]
        alike, alone = _equal_rows(senders, weights)
        for group in alike:
            for part in _pieces(group, parameters):
                yield SenderBlock(rows[part], senders[group[:1]], weights[group[:1]])
        for part in _pieces(alone, parameters * int(degree)):
            yield SenderBlock(rows[part], senders[part], weights[part])


def _equal_rows(
    senders: Int[np.ndarray, "row sender"], weights: Float[np.ndarray, "row sender"]
) -> tuple[list[Int[np.ndarray, " _"]], Int[np.ndarray, " alone"]]:
    """Groups of places with equal senders and weights, and the places of all other rows."""
    # Rounded, since the diagonal of W, what the others leave of 1, may differ from them in its last bit.
    both = np.concatenate([np.ones((len(senders), 1)), senders, weights.round(14)], axis=1)
    _, which, counts = np.unique(both, axis=0, return_inverse=True, return_counts=True)
    which = which.reshape(-1)
    groups = np.split(np.argsort(which, kind="stable"), np.cumsum(counts)[:-1])
    return [group for group in groups if len(group) > 1], np.flatnonzero(counts[which] == 1)


def _entries(W: Any) -> Any:
    """The entries of a dense or sparse matrix that are not zero, by rows and in order."""
    made = csr_array(W, copy=True)
    made.eliminate_zeros()
    made.sort_indices()
    return made


def sparse_tensor(W: Any, like: Tensor) -> Tensor:
    """A sparse matrix to multiply ``like`` with."""
    starts, columns = (torch.from_numpy(each.astype(np.int64)).to(like.device) for each in (W.indptr, W.indices))
    return _csr_tensor(starts, columns, torch.from_numpy(W.data).to(like), W.shape)


def _csr_tensor(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    _hear_notice()
    return torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=True)


def compressed(W: Float[Tensor, "receiver client"]) -> Tensor:
    """W as a sparse matrix, whose products have rows that do not depend on each other."""
    _hear_notice()
    return W.to_sparse_csr()


@lru_cache(maxsize=1)
def _hear_notice() -> None:
    """Let torch tell, unheard, what it tells once per process of a format whose product is all we use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        torch.ones(1, 1).to_sparse_csr()


def _pieces(rows: Int[np.ndarray, " receiver"], scalars: int) -> Iterator[Int[np.ndarray, " part"]]:
    """``rows`` in pieces whose receivers, of so many scalars each, stay within the bound."""
    size = max(1, _SCALARS // max(1, scalars))
    return (rows[start : start + size] for start in range(0, len(rows), size))
