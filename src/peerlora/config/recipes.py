"""Recipes: named sets of settings, each for one kind of federation, which fill what a config does not give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from peerlora.config.base import Section
from peerlora.config.task_kinds import task_kind

if TYPE_CHECKING:
    from peerlora.config.run import RunConfig

Settings = dict[str, dict[str, Any]]
"""By section of a config, then by setting."""


def sparse(config: RunConfig, own: Mapping[str, Any], relays: bool) -> Settings:
    """Clients that meet rarely: what brings the model that each of them deploys near the averaged one.

    A rate that falls to zero lets disagreement fall with it; kept moments spare a client the first steps of a fresh
    AdamW in every round; the label prior keeps its own label proportions out of its model; the relayed average is of
    clients whom it has not met, too.  Only the last one costs bytes, and shows every client's adapter to all.
    """
    train: dict[str, Any] = {"schedule": "cosine"}
    if "optimizer_state" not in own:
        train["optimizer_state"] = "keep"
    rows_private = config.privacy is not None and config.privacy.unit == "row"  # whose losses must not know each other
    counted = config.train.counts_classes  # which is a prior, too
    if task_kind(config.task.kind).has_classes and not counted and not rows_private:
        train["label_prior"] = "uniform"
    return {"train": train, "exchange": {"relay": {}}} if relays else {"train": train}


RECIPES: dict[str, Callable[[RunConfig, Mapping[str, Any], bool], Settings]] = {"sparse": sparse}
"""A recipe's settings for a config, and its method by its own defaults of ``train`` and whether it relays."""


def fill(section: Section, settings: Mapping[str, Any]) -> Section:
    """The section with these settings where it was not given others."""
    given = {name: getattr(section, name) for name in section.model_fields_set}
    return type(section).model_validate({**settings, **given})
