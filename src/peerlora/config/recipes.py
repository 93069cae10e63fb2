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
    if _has_use_for_prior(config) and not _rows_private(config):
        train["label_prior"] = "uniform"
    return {"train": train, "exchange": {"relay": {}}} if relays else {"train": train}


def _has_use_for_prior(config: RunConfig) -> bool:
    """Whether the task has classes whose counts the loss does not know yet, which is a prior, too."""
    return task_kind(config.task.kind).has_classes and not config.train.counts_classes


def _rows_private(config: RunConfig) -> bool:
    """Whether rows are protected one by one, so that their losses must not know each other."""
    return config.privacy is not None and config.privacy.unit == "row"


def site_contradiction(config: RunConfig) -> str | None:
    """What a recipe would set at this site alone, by a section that is the site's own, and what to do; None if nothing.

    It is asked before the recipe has filled what was not given.  Sites agree on ``train``, and not on ``privacy``.
    """
    given = "label_prior" in config.train.model_fields_set
    if config.recipe is None or config.partition.kind != "own" or given:
        return None
    if not (_has_use_for_prior(config) and _rows_private(config)):
        return None
    return (
        f"recipe={config.recipe} and privacy.unit=row given at a site with rows of its own (partition.kind=own): the "
        "recipe sets train.label_prior=uniform at sites without privacy of rows, and none here, while all sites need "
        "one value; give train.label_prior=none at all sites"
    )


RECIPES: dict[str, Callable[[RunConfig, Mapping[str, Any], bool], Settings]] = {"sparse": sparse}
"""A recipe's settings for a config, and its method by its own defaults of ``train`` and whether it relays."""


def fill(section: Section, settings: Mapping[str, Any]) -> Section:
    """The section with these settings where it was not given others."""
    given = {name: getattr(section, name) for name in section.model_fields_set}
    return type(section).model_validate({**settings, **given})
