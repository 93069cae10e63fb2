"""How much memory the links and weights of a topology take, told from its settings alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from peerlora.topology.storage import is_large

_DENSE, _SPARSE = 8, 17  # bytes of an entry: of W, and sparse of W, its columns and those of the links
_COPIES = 4  # of W: one without links that dropped, its transpose, and what products need

_LINKS: dict[str, Callable[[Any, int], float]] = {
    "ring": lambda config, clients: 2 * clients,
    "torus": lambda config, clients: 4 * clients,
    "path": lambda config, clients: 2 * clients,
    "star": lambda config, clients: 2 * clients,
    "complete": lambda config, clients: clients**2,
    "exponential": lambda config, clients: 2 * clients * math.log2(clients),
    "random-regular": lambda config, clients: config.degree * clients,
    "erdos-renyi": lambda config, clients: config.p * clients**2,
    "random": lambda config, clients: config.p * clients**2,
    "edges": lambda config, clients: 2 * len(config.edges),
    "directed-ring": lambda config, clients: clients + len(config.chords),
    "directed-exponential": lambda config, clients: clients * math.log2(clients),
    "random-out": lambda config, clients: config.degree * clients,
    "one-peer": lambda config, clients: clients,
    "hypercube": lambda config, clients: clients,
    "base-k": lambda config, clients: 2 * (config.degree + 1) * clients * math.log(clients, config.degree + 1),
    "d-equistatic": lambda config, clients: (config.degree or math.log2(clients)) * clients,
    "u-equistatic": lambda config, clients: 2 * (config.degree or math.log2(clients)) * clients,
    "od-equidyn": lambda config, clients: clients,
    "ou-equidyn": lambda config, clients: clients,
}
"""Directed links at once, of all rounds that are planned ahead."""


def mixing_bytes(config: Any, clients: int, dense: bool) -> float:
    """Bytes that links and mixing matrices of so many clients take; ``dense``: something else needs whole tables.

    Topologies that plan from dense matrices do, and so may those of other packages.
    """
    if dense or not is_large(clients) or config.kind not in _LINKS:
        return float(_COPIES * _DENSE * clients**2)
    return float(_COPIES * _SPARSE) * (clients + _LINKS[config.kind](config, clients))
