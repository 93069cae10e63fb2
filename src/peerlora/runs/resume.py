"""Facts about a run in its folder, and the check that a resumed run is the same."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peerlora.config.loading import load_config, parse_tree
from peerlora.config.run import RunConfig
from peerlora.errors import ConfigError, RunError
from peerlora.runs.store import RunStore, new_folder

_MAY_CHANGE = (
    *("peer.deadline", "peer.join", "peer.pull", "peer.audit_days", "peer.quorum"),
    *("track.to", "track.project", "track.group", "track.adapters"),
)  # not what is trained

ASKED_THREADS = "asked_threads"
"""The fact of a run on a cluster what its config gave for ``threads``."""


def default_folder(config: RunConfig) -> Path:
    """Return a new folder under runs/, named by method and time."""
    return new_folder(config.algorithm.name)


def run_facts(
    config: RunConfig,
    partitioner: Any = None,
    held: Sequence[int] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Collect versions, seed and machine that decide a result beside the config; ``held``: the clients, if not all.

    ``inputs``: what data and model tell.
    """
    return {
        "versions": package_versions(),
        "machine": platform.machine(),
        "seed": config.seed,
        "threads": config.threads,
        "partitioner": type(partitioner).__name__ if partitioner is not None else None,
        **(inputs or {}),
        **({} if held is None else {"held": list(held)}),
        **({} if config.train.epochs is None else {"epochs": config.train.epochs}),
    }


def package_versions() -> dict[str, str]:
    """The versions here of what decides a result."""
    packages = ("peerlora", "torch", "transformers", "peft", "numpy", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def stored_config(store: RunStore) -> RunConfig:
    """Read the resolved config of a run folder.  Raises RunError where it is damaged."""
    try:
        return load_config(parse_tree(store.config_yaml, "config.yaml"))
    except ConfigError as error:
        raise RunError(
            f"{store.folder} cannot be resumed: {error}; was config.yaml changed or damaged? Put it back, or start "
            "a new run with another --out"
        ) from None


def check_same(stored: RunConfig, expected: RunConfig, store: RunStore, partitioner: Any) -> None:
    """Raise RunError, listing the differences, unless a resumed run is the run that was started."""
    if expected.train.epochs is not None and expected.train.epochs == store.facts.get("epochs"):
        same = {"rounds": stored.train.rounds, "epochs": None}  # which followed from these epochs then
        expected = expected.model_copy(update={"train": expected.train.model_copy(update=same)})
    was, now = (config.model_dump(mode="json", exclude={"cluster"}) for config in (stored, expected))
    if now.get("threads") in (None, *_replaced_threads(stored, expected, store)):
        now["threads"] = was.get("threads")
    if now["train"]["block"] is None:  # a run on a cluster has one of its own
        now["train"]["block"] = was["train"]["block"]
    changed = list_changes(was, now, ignored=_MAY_CHANGE)
    then, given = store.facts.get("partitioner"), type(partitioner).__name__ if partitioner is not None else None
    if then != given:
        changed.append(f"partitioner: {then} then, {given} now")
    if changed:
        raise RunError(
            f"{store.folder} was started with another config ({'; '.join(changed)}); "
            "resume with the same settings, or start a new run with another --out"
        )


def _replaced_threads(stored: RunConfig, expected: RunConfig, store: RunStore) -> Sequence[int | None]:
    """The ``threads`` for which the cores of a cluster's workers stood in; of an older run, whatever is expected."""
    return () if stored.cluster is None else (store.facts.get(ASKED_THREADS, expected.threads),)


def list_changes(was: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """List the settings that differ between two trees, one sentence each; ``ignored``: dotted keys."""
    then, later = flatten(was), flatten(now)
    return [
        f"{key}: {then.get(key)!r} then, {later.get(key)!r} now"
        for key in sorted({*then, *later})
        if then.get(key) != later.get(key) and key not in ignored
    ]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Turn a tree of settings into dotted key -> value."""
    if isinstance(tree, Mapping) and (tree or not prefix):
        return {name: leaf for key, value in tree.items() for name, leaf in flatten(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): tree}
