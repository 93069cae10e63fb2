"""Positions of a padded batch's real tokens, so that products and norms run on these only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_ROWS_PER_GROUP = 16  # rows; fewer make attention's batched products small; more pad further


@dataclass(frozen=True)
class TokenPositions:
    """Some tokens in packed order: those of client 0's first row, of its second row, ..., of the last client.

    Products per client need a rectangle, so a client with fewer tokens than another is filled up there.
    """

    padded: Int[Tensor, " token"]
    """Position of each token in the padded [row * token]."""
    clients: int
    slots: Int[Tensor, "client longest"] | None
    """The packed position of each client's tokens, for filling that of its first one; None: all have equally many."""
    filling: Bool[Tensor, "client longest"] | None
    where: Int[Tensor, " token"] | None
    """Position of each token in the flattened rectangle."""

    @staticmethod
    def of(padded: Int[Tensor, " token"], counts: Int[Tensor, " client"]) -> TokenPositions:
        """From the tokens' positions and each client's number of tokens."""
        longest = int(counts.max())
        if bool((counts == longest).all()):
            return TokenPositions(padded, len(counts), None, None, None)
        first = counts.cumsum(0) - counts
        steps = torch.arange(longest)
        filling = steps >= counts[:, None]
        slots = first[:, None] + steps.expand_as(filling).masked_fill(filling, 0)
        return TokenPositions(padded, len(counts), slots, filling, (~filling).flatten().nonzero()[:, 0])

    def by_client(self, x: Float[Tensor, "token width"]) -> Float[Tensor, "client longest width"]:
        """One rectangle of all clients' tokens; where a client has no more, its first one again."""
        if self.slots is None:
            return x.reshape(self.clients, -1, x.shape[-1])
        return x.index_select(0, self.slots.flatten()).view(*self.slots.shape, -1)

    def only_tokens(self, x: Float[Tensor, "client longest rank"]) -> Float[Tensor, "client longest rank"]:
        """Zeros, in place, where a client has no more tokens; on narrow rectangles, since it costs a pass."""
        return x if self.filling is None else x.masked_fill_(self.filling[..., None], 0.0)

    def packed(self, x: Float[Tensor, "client longest width"]) -> Float[Tensor, "token width"]:
        """The packed tokens of such a rectangle: the inverse of ``by_client``."""
        flat = x.flatten(0, 1)
        return flat if self.where is None else flat.index_select(0, self.where)


@dataclass(frozen=True)
class Group:
    """Rows of similar length, which attend in one rectangle."""

    rows: Int[Tensor, " row"]
    slots: Int[Tensor, "row token"]
    """The packed position of each token; where a row has ended, that of its first one."""
    ended: Bool[Tensor, "row 1 token"] | None
    """True where a row has ended; None where no row has."""


@dataclass(frozen=True)
class TokenPacking:
    """The real tokens of one batch whose rows are padded on the right."""

    shape: tuple[int, int]
    """Rows and tokens of the padded batch."""
    tokens: TokenPositions
    pooled: TokenPositions
    """Each row's first token only."""
    first: Int[Tensor, " row"]
    """The packed position of each row's first token."""
    groups: list[Group]
    lengths: Int[Tensor, " row"]
    """Tokens of each row."""

    @staticmethod
    def of(mask: Int[Tensor, "row token"], clients: int) -> TokenPacking:
        """From an attention mask of client-major rows, ones first; every client has equally many rows."""
        rows, width = mask.shape
        lengths = mask.sum(1)
        ends = lengths.cumsum(0)
        first = ends - lengths
        tokens = TokenPositions.of(mask.flatten().nonzero()[:, 0], lengths.view(clients, -1).sum(1))
        pooled = TokenPositions.of(torch.arange(rows) * width, torch.full((clients,), rows // clients))
        return TokenPacking((rows, width), tokens, pooled, first, _groups(lengths, first), lengths)

    def by_row(self, positions: TokenPositions) -> TokenPositions:
        """The same tokens, with a rectangle of rows in place of clients."""
        return self._rows_of_pooled if positions is self.pooled else self._rows_of_tokens

    @cached_property
    def _rows_of_tokens(self) -> TokenPositions:
        return TokenPositions.of(self.tokens.padded, self.lengths)

    @cached_property
    def _rows_of_pooled(self) -> TokenPositions:
        return TokenPositions.of(self.pooled.padded, torch.ones_like(self.lengths))

    def scores_bias(self, group: Group, dtype: torch.dtype) -> Float[Tensor, "row 1 token"] | None:
        """Bias of attention scores that gives ended tokens no weight."""
        if group.ended is None:
            return None
        return torch.zeros(group.ended.shape, dtype=dtype).masked_fill_(group.ended, torch.finfo(dtype).min)

    @staticmethod
    def causal_bias(group: Group, dtype: torch.dtype) -> Float[Tensor, "token token"]:
        """Bias of attention scores that gives tokens behind a query's own no weight."""
        tokens = group.slots.shape[1]
        return torch.full((tokens, tokens), torch.finfo(dtype).min, dtype=dtype).triu_(1)


def _groups(lengths: Int[Tensor, " row"], first: Int[Tensor, " row"]) -> list[Group]:
    order = lengths.argsort(stable=True)
    pieces = max(1, len(order) // _ROWS_PER_GROUP)
    found = []
    for rows in order.tensor_split(pieces):
        positions = torch.arange(int(lengths[rows[-1]]))
        ended = positions >= lengths[rows][:, None]
        slots = first[rows][:, None] + positions.expand_as(ended).masked_fill(ended, 0)
        found.append(Group(rows, slots, ended[:, None] if bool(ended.any()) else None))
    return found
