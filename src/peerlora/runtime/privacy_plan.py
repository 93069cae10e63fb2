"""What a config promises of privacy, told before anything is trained: noise, epsilon by round, and other choices."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from peerlora.algorithms.base import Algorithm
from peerlora.config.run import RunConfig
from peerlora.errors import ConfigError
from peerlora.runtime.compose import compose
from peerlora.runtime.privacy import describe_promises, planned_releases
from peerlora.train.accounting import spent_epsilon
from peerlora.train.privacy import Guarantee, PrivateTraining

_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the rounds that train, after which epsilon is told
_BATCHES, _ROUNDS = (0.5, 1, 2, 4), (0.5, 1, 2)  # times those of the config


def plan_privacy(config: RunConfig, client: int | None = None) -> dict[str, Any]:
    """Compose a run and tell what its rows, or clients, are promised; nothing is trained or written.

    ``client``: tell of this one alone, as a real peer; by default of all, as a simulation, but of any one site where
    each has a file of its own (partition.kind=own).
    Keys: unit, clip, accountant, generator, guarantee and planned as in a summary; by_round [{round, epsilon
    [client]}]; choices [{batch, rounds, epsilon}] with the same noise, of the client that spends most; at client level
    batch is None, since it changes nothing; and warnings.  Raises ConfigError for a config without privacy, for a
    client that does not exist, and for a site whose settings are listed by client and that is not named.
    """
    if config.privacy is None:
        raise ConfigError("privacy is null in this config, so nothing is promised; give one, such as privacy.epsilon=8")
    if client is None and config.partition.kind == "own":
        client = _any_site(config)
    if client is not None and not 0 <= client < config.clients:
        raise ConfigError(f"client {client} given; {config.clients} clients are numbered 0 to {config.clients - 1}")
    federation = compose(config, clients=None if client is None else [client])
    config, privacy = federation.config, federation.learner.privacy  # whose epochs have become rounds
    assert privacy is not None
    return {
        **describe_promises(privacy),
        "clients": list(privacy.clients),
        "by_round": _by_round(config, federation.algorithm, privacy),
        "choices": _choices(config, federation.algorithm, privacy),
        "warnings": [each for each in federation.warnings if each.startswith("privacy")],
    }


def _any_site(config: RunConfig) -> int:
    """The number of a site that has a file of its own, where all numbers have the same settings."""
    listed = {"train.batch": config.batches, "adapter.rank": config.ranks}
    for name, values in listed.items():
        if len(set(values)) > 1:
            raise ConfigError(
                f"partition.kind=own and {name}={values} given: what this site promises depends on its number, from 0 "
                f"to {config.clients - 1} in the order of the member list; give it as --client N"
            )
    return 0


def _by_round(config: RunConfig, algorithm: Algorithm[Any], privacy: PrivateTraining) -> list[dict[str, Any]]:
    rounds = sorted({max(1, round(share * config.train.training_rounds)) for share in _SHARES})
    releases = {t: planned_releases(config, algorithm, t) for t in rounds}
    return [
        {"round": t, "epsilon": [_epsilon(privacy, each, releases[t]) for each in privacy.guarantees]} for t in rounds
    ]


def _choices(config: RunConfig, algorithm: Algorithm[Any], privacy: PrivateTraining) -> list[dict[str, Any]]:
    """Epsilon of other batches and rounds with the same noise, for the client that has spent most at the end."""

    def planned(each: Guarantee) -> float:
        return spent_epsilon(each.noise, each.rate, each.releases, each.delta, privacy.settings.accountant)

    place, worst = max(enumerate(privacy.guarantees), key=lambda pair: planned(pair[1]))
    batch, train = config.batches[privacy.clients[place]], config.train
    found = []
    for size in [max(1, round(batch * times)) for times in _BATCHES] if privacy.by_row else [None]:
        rate = 1.0 if size is None else min(1.0, size * train.accumulate / worst.rows)
        for longer in _ROUNDS:
            rounds = max(1, round(train.training_rounds * longer))
            epsilon = _epsilon(privacy, replace(worst, rate=rate), planned_releases(config, algorithm, rounds))
            found.append({"batch": size, "rounds": rounds, "epsilon": epsilon})
    return found


def _epsilon(privacy: PrivateTraining, promised: Guarantee, releases: int) -> float | None:
    found = spent_epsilon(promised.noise, promised.rate, releases, promised.delta, privacy.settings.accountant)
    return found if math.isfinite(found) else None
