"""Put the codec, the robust rule and the attackers of a config around its exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peerlora.config.exchange import CacheConfig
from peerlora.config.run import RunConfig
from peerlora.data.dataset import Dataset
from peerlora.errors import CompositionError
from peerlora.exchange.attacks import Adversarial, alie_quantile, flipped_labels
from peerlora.exchange.base import MeteredExchange
from peerlora.exchange.codec import build_codec
from peerlora.exchange.compressed_gossip import Compressed
from peerlora.exchange.relay import RelayCaches
from peerlora.exchange.robust import Robust
from peerlora.lora.adapters import Adapters


def build_exchange(
    config: RunConfig,
    plain: MeteredExchange,
    start: Adapters,
    attacking: tuple[int, ...],
    cache: CacheConfig | None = None,
    rows: Mapping[int, int] | None = None,
) -> Any:
    """The exchange in its wrappers: an attack is compressed like everything else, and a robust rule sees it.

    ``cache``: settings of the cache of others' adapters, if there is one.  ``rows``: client -> training rows, of those
    whose caches are kept here: in a simulation all.
    Raises CompositionError for attackers that would have to know clients of other processes.
    """
    peers: Any = plain
    plain.secure = config.exchange.secure
    codec, robust = config.exchange.codec, config.exchange.robust
    if cache:
        plain.relayed = RelayCaches(cache, start.spec, rows or {}, config.clients)
    if codec:
        peers = Compressed(peers, build_codec(codec, start.flat.dtype), codec.step, start)
    if config.adversary and config.adversary.attack != "label-flip":
        if len(plain.clients) < config.clients:
            raise CompositionError(
                f"adversary.attack={config.adversary.attack} needs all clients in one process, for attackers know "
                "everybody's model; use attack=label-flip, or one process"
            )
        peers = Adversarial(peers, config.adversary, attacking, start, config.seed)
    return Robust(peers, robust, start, config.train.rounds) if robust else peers


def poison_labels(config: RunConfig, data: Dataset, attacked: list[np.ndarray]) -> Dataset:
    """The training rows, with the labels of attackers turned round where that is their attack.

    Raises CompositionError where there are no classes.
    """
    if config.adversary is None or config.adversary.attack != "label-flip":
        return data
    if not data.classes:
        raise CompositionError(
            f"adversary.attack=label-flip needs classes, task.kind={config.task.kind} has none; use another attack"
        )
    return replace(data, labels=flipped_labels(data.labels, np.concatenate(attacked), len(data.classes)))


def attack_notes(config: RunConfig, attacking: tuple[int, ...]) -> tuple[str, ...]:
    """What a run has to say about its attackers."""
    if config.adversary is None:
        return ()
    who = ", ".join(map(str, attacking))
    return (
        f"attackers: {who} ({config.adversary.attack}); their results are left out of means, worst clients, the "
        "averaged model and the diagnostics",
    )


def attack_warnings(config: RunConfig, attacking: tuple[int, ...]) -> tuple[str, ...]:
    """Warn of an attack that is none."""
    settings = config.adversary
    if settings is None or settings.attack != "alie" or settings.scale is not None:
        return ()
    z = alie_quantile(config.clients, len(attacking))
    if z > 0:
        return ()
    return (
        f"adversary.attack=alie with {len(attacking)} of {config.clients} clients has z = {z:.2g}: attackers send the "
        "honest mean, or what lies on its other side, which is no attack; set adversary.scale, e.g. 1.5, or more "
        "adversary.clients",
    )
