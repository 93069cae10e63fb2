"""The weighted average of the entries that a client holds: a model to deploy, or to go on training from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.exchange.combine import Combined, CombineRule, Received, apply_rule
from peerlora.exchange.product_average import average_products
from peerlora.exchange.relay import RelayCaches
from peerlora.lora.adapters import Adapters
from peerlora.lora.merged import Merged, Update
from peerlora.lora.product import decompose_leading


@dataclass(frozen=True)
class RelayedModels:
    """The relayed averages of the clients held here."""

    adapters: Adapters
    """[client], of each client's own rank and with its own private head."""
    cut_share: Float[Tensor, " client"]
    """Share of the squared norm of the averaged products that the rank cut off; 0 where factors are averaged."""


def relayed_models(
    caches: RelayCaches, x: Adapters, clients: Sequence[int], average: Literal["products", "factors"]
) -> RelayedModels:
    """Average what these clients hold; ``x`` are their own models.

    Factors that never travel are common to all clients, and taken from there.  A client that holds its own entry alone
    gets that; one that has none yet, its own model.
    """
    rule: CombineRule = _products if average == "products" else _factors
    sent = entry_adapters(caches, x)
    averaged, measured = apply_rule(_own_entries(caches, sent, x, clients), sent, caches.weights(clients), rule)
    none = torch.zeros(x.clients, dtype=torch.float64)
    tail, size = measured.get("tail", none), measured.get("size", none)
    return RelayedModels(x.with_blocks(averaged), torch.where(size > 0, tail / size.clamp_min(1e-300), 0.0))


def entry_adapters(caches: RelayCaches, x: Adapters) -> Adapters:
    """The stored entries as adapters, [entry] in the order of ``caches.pool.used``."""
    used = caches.pool.used
    whole = x.exchanged().rows([0] * len(used))
    flat = whole.flat  # a copy, as rows are taken by number
    if caches.pool.values is not None:
        flat[:, whole.spec.columns_of(caches.layout).to(flat.device)] = caches.pool.values[used].to(flat)
    return replace(whole, flat=flat, ranks=torch.from_numpy(caches.pool.facts[used, 2]))


def uncut_model(caches: RelayCaches, x: Adapters, client: int) -> Adapters:
    """The average of the products that a client holds, with no cut: [1], at the sum of all ranks.

    One entry's part is in A and B, at that entry's rank, all others' in ``merged``.  ``x``: [1], the client's own.
    """
    sent, W = entry_adapters(caches, x), caches.weights([client])
    held: list[int] = np.flatnonzero(W[0]).tolist()
    if not held:
        return x.with_empty_merges()
    first, *others = held
    averaged, _ = apply_rule(_own_entries(caches, sent, x, [client]), sent, W, _factors)  # of which only a head stays
    whole = replace(x.with_blocks(averaged), ranks=sent.ranks[[first]])
    for name in whole.A:
        whole.A[name].copy_(sent.A[name][first])
        whole.B[name].copy_(W[0, first] * sent.B[name][first])
    products = {layer.name: _side_by_side(sent, others, W[0], layer.name) for layer in sent.spec.layers}
    updates = {
        name: Update(left[None], right[None], left.new_zeros(1, len(left), 0))
        for name, (left, right) in products.items()
    }
    return replace(whole, merged=Merged(updates))


def _side_by_side(
    sent: Adapters, which: Sequence[int], weights: Float[np.ndarray, " entry"], layer: str
) -> tuple[Float[Tensor, "d_out wide"], Float[Tensor, "wide d_in"]]:
    """``sum_j w_j s_j B_j A_j`` of some entries as one product, without the padding of small ranks."""
    B, A, scaling = sent.B[layer], sent.A[layer], sent.scaling
    ranks = sent.ranks.tolist()
    left = [weights[j] * scaling[j] * B[j, :, : ranks[j]] for j in which]
    right = [A[j, : ranks[j]] for j in which]
    return torch.cat([B[0, :, :0], *left], dim=1), torch.cat([A[0, :0], *right])


def _own_entries(caches: RelayCaches, sent: Adapters, x: Adapters, clients: Sequence[int]) -> Adapters:
    """Every client's own of all entries ``sent``; its own model, in ``x``, where it has none yet."""
    own, numbers = x.exchanged(), caches.pool.numbers
    flat, ranks = own.flat.clone(), own.ranks.clone()
    for row, client in enumerate(clients):
        number = numbers.get(int(caches[client].places[client]))
        if number is not None:
            flat[row], ranks[row] = sent.flat[number], sent.ranks[number]
    return replace(own, flat=flat, ranks=ranks)


def _products(received: Received) -> Combined:
    """The average of the products, cut to each rank, and the squared norms of what was cut and of the whole."""
    cut = partial(decompose_leading, rank=received.own.spec.rank)
    found, own = average_products(received, cut), received.own
    measures = {"tail": found.tail, "size": found.size.expand_as(found.tail)}
    head = own.spec.columns("head")  # all that the factors below leave of an average
    averaged = replace(own, flat=own.flat.clone())
    averaged.flat[:, head] = _sum_in_order(received, head).to(own.flat)
    return received.with_factors(found.factors, measures, averaged)


def _factors(received: Received) -> Combined:
    own, whole = received.own, slice(0, received.all_adapters.flat.shape[1])
    averaged = _sum_in_order(received, whole).to(own.flat).expand(own.clients, -1).contiguous()
    return Combined(replace(own, flat=averaged))


def _sum_in_order(received: Received, columns: slice) -> Float[Tensor, "#receiver column"]:
    """The weighted average of these columns, entry by entry, added up in the order of the senders.

    So it has the same bits whoever else's entries are in the table, which a matrix product does not promise.
    """
    values = received.all_adapters.flat[:, columns]
    total = torch.zeros(len(received.senders), values.shape[1], dtype=torch.float64, device=values.device)
    for senders, weights in zip(received.senders.T, received.weights.T, strict=True):
        total += weights[:, None] * values[senders].double()
    return total
