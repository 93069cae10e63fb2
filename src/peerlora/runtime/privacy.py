"""Differential privacy of a run: what it refuses, what its clients are promised, and what has to be told of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from peerlora.algorithms import REGISTRY
from peerlora.algorithms.base import Algorithm
from peerlora.config.privacy import PrivacyConfig
from peerlora.config.run import RunConfig
from peerlora.data.batches import Shards
from peerlora.data.shared_rows import find_shared_rows
from peerlora.errors import CompositionError, ModelError
from peerlora.lora.attach import StackedModel
from peerlora.train.accounting import has_accountants, noise_for, require_accountants, spent_epsilon
from peerlora.train.privacy import Guarantee, PrivateTraining
from peerlora.train.private_draws import SeededDraws, SystemDraws
from peerlora.train.tasks import Task

NO_GUARANTEE = "simulation, no guarantee"
_LISTED = 3  # clients in one warning


def check_privacy(config: RunConfig, algorithm: Algorithm[Any]) -> tuple[str, ...]:
    """Refuse what would tell of private rows without noise; return warnings.

    Raises CompositionError with the reason and an alternative, ConfigError where the accountants are not installed.
    """
    if config.privacy is None:
        return ()
    if not has_accountants():
        require_accountants()
    unit, name = config.privacy.unit, config.algorithm.name
    if reason := algorithm.traits.privacy_refusal(unit):
        others = ", ".join(own for own, kind in REGISTRY.items() if kind.traits.privacy_refusal(unit) is None)
        raise CompositionError(f"{name} cannot protect each {unit} (privacy.unit={unit}): {reason}; use {others}")
    _check_losses(config, config.privacy)
    _check_evaluation(config)
    return _evaluation_warnings(config)


def _check_losses(config: RunConfig, privacy: PrivacyConfig) -> None:
    """Refuse losses in which one row changes what others weigh, and what tells neighbours of labels."""
    train = config.train
    if train.pooled:
        raise CompositionError(
            f"privacy and {train.pooled} exclude each other: clients tell each other their label counts, which no "
            f"noise covers; use {train.pooled.removesuffix('pooled')}none"
        )
    if privacy.unit == "client":
        return
    counted = {"train.label_prior": train.label_prior, "train.class_weights": train.class_weights}
    for name, value in counted.items():
        if value != "none":
            raise CompositionError(
                f"privacy.unit=row and {name}={value} exclude each other: the loss of each row depends on the labels "
                f"of the client's other rows, so that clipping bounds no row's influence; use {name}=none"
            )
    if train.batches == "by-length":
        raise CompositionError(
            "privacy.unit=row samples every row by itself, and train.batches=by-length sorts a round's rows; use "
            "train.batches=shuffled"
        )


def _check_evaluation(config: RunConfig) -> None:
    """Refuse private rows in the run's events, scores of them by which models are chosen, and of what is learned."""
    data = config.data
    if data.eval is not None and (shared := find_shared_rows(data.train, data.eval)):
        raise CompositionError(
            f"privacy: data.eval={data.eval} and data.train={data.train} both read {shared}, and scores on training "
            "rows tell who is among them; name other rows as data.eval"
        )
    if config.eval.generate is not None and config.data.eval is None:
        raise CompositionError(
            "privacy: eval.generate would print rows held out of private ones (data.eval=null), with their expected "
            "answers; name public rows as data.eval, or drop eval.generate"
        )
    select = config.eval.select
    if select is not None and (select.rows == "own" or config.data.eval is None):
        which = "eval.select.rows=own" if select.rows == "own" else "data.eval=null, rows held out of data.train"
        raise CompositionError(
            f"privacy: eval.select would choose models by scores on private rows ({which}), which no noise covers; "
            "name public rows as data.eval, or drop eval.select"
        )


def _evaluation_warnings(config: RunConfig) -> tuple[str, ...]:
    """Warn of scores on rows that may be private; training losses are of the same kind, and stay with the run."""
    held_out = ["data.eval=null"] if config.data.eval is None else []
    held_out += ["eval.own=true"] if config.eval.own else []
    if not held_out:
        return ()
    return (
        f"privacy covers adapters and not scores: with {' and '.join(held_out)} evaluations are on rows held out of "
        "private ones; keep report and events to yourself, or name public rows as data.eval",
    )


def planned_releases(config: RunConfig, algorithm: Algorithm[Any], rounds: int) -> int:
    """Noisy steps, or changes, of a client that is never away, in a run's first so many rounds; 0 without privacy."""
    if config.privacy is None:
        return 0
    return algorithm.trained_rounds(rounds) * (config.train.local_steps if config.privacy.unit == "row" else 1)


def build_privacy(
    config: RunConfig,
    algorithm: Algorithm[Any],
    shards: Shards,
    model: StackedModel,
    task: Task,
    parameters: int,
    real: bool,
) -> tuple[PrivateTraining | None, tuple[str, ...]]:
    """What makes the training of these clients private, and warnings; (None, ()) without ``privacy``.

    ``parameters``: scalars of one adapter; ``real``: whether the client is a real peer, and not simulated.
    Raises ModelError for a model whose rows cannot be told apart, CompositionError for a task whose losses cannot,
    ConfigError for an epsilon that no noise gives.
    """
    privacy = config.privacy
    if privacy is None:
        return None, ()
    if privacy.unit == "row":
        check_task(task)
        _check_model(model)
    train = config.train
    releases = planned_releases(config, algorithm, train.training_rounds)
    sizes = [size * train.accumulate for size in shards.batches]
    guarantees = [
        _guarantee(privacy, len(rows), size, releases) for rows, size in zip(shards.shards, sizes, strict=True)
    ]
    generator = privacy.generator or ("system" if real else "seeded")
    draws = SystemDraws() if generator == "system" else SeededDraws(config.seed)
    found = PrivateTraining(privacy, shards.clients, guarantees, draws, train.local_steps)
    return found, noise_warnings(found, parameters)


def _guarantee(privacy: PrivacyConfig, rows: int, size: int, releases: int) -> Guarantee:
    rate = min(1.0, size / rows) if privacy.unit == "row" else 1.0
    delta, noise = privacy.delta_of(rows), privacy.noise
    if noise is None:
        assert privacy.epsilon is not None
        noise = noise_for(privacy.epsilon, rate, releases, delta, privacy.accountant)
    return Guarantee(rows, rate, noise, delta, releases)


def check_task(task: Task) -> None:
    """Refuse a task that changes ``losses`` and leaves ``row_losses`` as they were, which alone would be trained."""
    kind = type(task)
    of_client, of_rows = (kind.__mro__.index(_definer(kind, name)) for name in ("losses", "row_losses"))
    if of_client < of_rows:
        raise CompositionError(
            f"privacy.unit=row trains a task's row_losses, and {kind.__name__} has losses of its own beside the "
            f"row_losses of {_definer(kind, 'row_losses').__name__}: define row_losses whose mean they are, or, where "
            "rows of a batch compete, use privacy.unit=client"
        )


def _definer(kind: type, name: str) -> type:
    """The class that defines a method of ``kind``; ``kind`` itself where none in its order does."""
    return next((each for each in kind.__mro__ if name in vars(each)), kind)


def _check_model(model: StackedModel) -> None:
    if not model.step.layout.rows_first:
        raise ModelError(
            "privacy.unit=row needs the gradient of each row, and layers of this model mix the rows of a batch, or "
            "what it says of a row depends on its batch; use another base model, or privacy.unit=client"
        )
    embeddings = [name for name in model.targets.saved if _is_embedding(model, name)]
    if embeddings:
        raise ModelError(
            f"privacy.unit=row needs the gradient of each row, which is not found for embeddings such as "
            f"{embeddings[0]}; take it out of adapter.modules_to_save, or use privacy.unit=client"
        )


def _is_embedding(model: StackedModel, name: str) -> bool:
    module = model.base.get_submodule(name)
    return isinstance(getattr(module, "base", module), nn.Embedding)


def noise_warnings(privacy: PrivateTraining, parameters: int) -> tuple[str, ...]:
    """Warn of clients whose noise, over all releases, is longer than all that their rows could move an adapter.

    Noise of n releases adds up to ``noise sqrt(n parameters)`` clipping norms, what rows can do to n times the rows of
    a release: of n equal steps, the ratio is ``noise sqrt(parameters) / (rows sqrt(n))``.
    """
    drowned = []
    for client, each in zip(privacy.clients, privacy.guarantees, strict=True):
        moving = (each.expected_rows if privacy.by_row else 1.0) * math.sqrt(each.releases)
        if (ratio := each.noise * math.sqrt(parameters) / moving) > 1:
            drowned.append((ratio, client, each))
    if not drowned:
        return ()
    worst = sorted(drowned, key=lambda each: -each[0])[:_LISTED]
    ratios = "; ".join(
        f"client {client} with {each.rows} rows and noise {each.noise:.3g}: {ratio:.2g} times"
        for ratio, client, each in worst
    )
    return (
        f"privacy: for {len(drowned)} of {len(privacy.clients)} clients all noise together is longer than the way that "
        f"their rows could move an adapter in the whole run ({ratios}); expect little of their own training; more "
        "rows, more rounds, a lower adapter.rank or a larger epsilon help",
    )


def describe_promises(privacy: PrivateTraining) -> dict[str, Any]:
    """What a run's first event tells of its privacy; [client] lists, an epsilon without bound is None."""
    settings, own = privacy.settings, privacy.guarantees
    planned = [spent_epsilon(each.noise, each.rate, each.releases, each.delta, settings.accountant) for each in own]
    generator = "seeded" if privacy.repeatable else "system"
    return {
        "unit": settings.unit,
        "clip": settings.clip,
        "accountant": settings.accountant,
        "generator": generator,
        "guarantee": NO_GUARANTEE if privacy.repeatable else f"each {settings.unit}, see docs/privacy.md",
        "planned": {
            "epsilon": [value if math.isfinite(value) else None for value in planned],
            "delta": [each.delta for each in own],
            "releases": [each.releases for each in own],
            "noise": [each.noise for each in own],
            "rate": [each.rate for each in own],
            "rows": [each.rows for each in own],
        },
    }


def exhaustion_notice(privacy: PrivateTraining, clients: Sequence[int], done: int, reason: str | None) -> str:
    """Say whose budget is used up, and what follows; ``reason``: why the method wants all to train, if it does."""
    one = len(clients) == 1
    budget = privacy.settings.epsilon or math.inf
    who = f"client {clients[0]} has" if one else f"clients {', '.join(map(str, clients))} have"
    then = "it trains no more and goes on mixing" if one else "they train no more and go on mixing"
    but = f"; the method wants all to train, so expect worse models: {reason}" if reason else ""
    return f"{who} used up privacy.epsilon={budget:g} by round {done}: {then}{but}"
