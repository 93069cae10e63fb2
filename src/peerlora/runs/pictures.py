"""The figures of one run, from its events; drawn in full by ``runs.figures``."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from peerlora.runs.events import Evaluated, Event, RoundDone, RunStarted
from peerlora.runs.metrics import evaluations, link_uses, select_events
from peerlora.runs.privacy_summary import largest_epsilon

if TYPE_CHECKING:
    from peerlora.runs.figures import Curves, Picture


def finished_rounds(score: Evaluated) -> float:
    """How many rounds were over at an evaluation."""
    return score.round


def virtual_seconds(score: Evaluated) -> float:
    """How long a run had taken at an evaluation; NaN without a clock."""
    return score.virtual_seconds


def metric_curves(
    events: Sequence[Event], place: Callable[[Evaluated], float] = finished_rounds, of: str = "own"
) -> "Curves | None":
    """Collect the metric of every client and of the averaged model; None before the first evaluation.

    The last evaluation is on all rows; where the others are on a sample, it is no part of their curve.
    ``place``: where an evaluation lies on the x axis; one whose place is not finite is left out.  ``of``: the clients'
    "own" models or "relayed", of which a run without relaying has none.
    """
    import numpy as np

    from peerlora.runs.figures import Curves

    scores = [score for score in evaluations(events) if np.isfinite(place(score)) and getattr(score, of)]
    if not scores:
        return None

    def curves(some: Sequence[Evaluated], end: Curves | None = None) -> Curves:
        own = np.array([getattr(score, of) for score in some], float)
        places, averaged = [place(score) for score in some], [score.averaged for score in some]
        return Curves(places, own, averaged, some[-1].rows, end)

    *sampled, last = scores
    if sampled and last.rows != sampled[-1].rows:
        return curves(sampled, curves([last]))
    return curves(scores)


def labels_picture(start: RunStarted) -> "Picture | None":
    """Draw the labels of every client; None when the partition does not say."""
    from peerlora.runs.client_figures import labels_figure

    names, counts = start.partition.get("names"), start.partition.get("counts")
    whole = counts and len(counts) == start.clients  # a site with a file of its own knows no other's rows
    return labels_figure("labels", "Who holds which labels", names, counts) if names and counts and whole else None


def graph_picture(start: RunStarted, events: Sequence[Event]) -> "Picture | None":
    """Draw the links that were used; None for one client, or when no round wrote its links down."""
    from peerlora.runs.client_figures import graph_figure

    uses, rounds = link_uses(events), len(select_events(events, RoundDone))
    if uses is None or start.clients == 1:
        return None
    return graph_figure("graph", "Who exchanged with whom", start.clients, uses, rounds)


def relayed_pictures(start: RunStarted, events: Sequence[Event]) -> list["Picture"]:
    """What relayed models reach, and how old the entries are that they are made of; none where nothing is relayed."""
    from peerlora.runs import figures

    curves = metric_curves(events, of="relayed")
    relayed = [each for each in select_events(events, RoundDone) if "relayed_age_mean" in each.measures]
    title = f"{start.metric} of every client's relayed model and of the averaged model"
    found = [] if curves is None else [figures.clients_figure("relayed", title, curves)]
    if relayed:
        rounds = [each.round + 1 for each in relayed]
        shown = {"mean age": "relayed_age_mean", "oldest": "relayed_age_max"}
        lines = {label: (rounds, [each.measures[name] for each in relayed]) for label, name in shown.items()}
        found.append(figures.lines_figure("relayed-age", "Age of the entries that clients hold", lines, "rounds"))
    return found


def epsilon_picture(start: RunStarted, events: Sequence[Event]) -> "Picture | None":
    """Draw the metric of clients' own models by what they had spent then; None without privacy."""
    from peerlora.runs.figures import clients_figure

    if (curves := metric_curves(events, largest_epsilon)) is None:
        return None
    title = f"{start.metric} by epsilon spent (the client that spent most)"
    return clients_figure("epsilon", title, curves.without_averaged(), "epsilon")  # that one has spent nothing itself
