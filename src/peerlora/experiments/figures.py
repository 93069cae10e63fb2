"""Figures of a comparison: one line per setting, mean over seeds, with a band from the lowest to the highest seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import ScalarFormatter

from peerlora.display import byte_unit
from peerlora.experiments.statistics import Outcome, find_metrics
from peerlora.runs import figures
from peerlora.runs.chart import Chart, Line, band
from peerlora.runs.events import Event, RoundDone
from peerlora.runs.figures import Key, Picture
from peerlora.runs.metrics import evaluations, select_events
from peerlora.runs.privacy_summary import largest_epsilon

Costs = Callable[[Sequence[Event]], Sequence[float]]
"""What every evaluation of a run had cost, such as its rounds or its bytes."""


class Curve(NamedTuple):
    """The score of one setting at the points that all of its seeds have."""

    x: np.ndarray
    """[point] mean over seeds."""
    y: np.ndarray
    """[seed, point]"""
    separate: bool
    """Whether the last point is on other rows than those before, so that no line leads there."""
    uneven: bool
    """Whether the last evaluations of the seeds are after different rounds."""


def comparison_figures(outcomes: Sequence[Outcome], axis: str | None) -> list[Picture]:
    """All figures for which there is anything to draw; ``axis`` is what the lines of one figure differ in."""
    finished = [each for each in outcomes if each.events]
    if not finished:
        return []
    pictures = []
    for number, (rest, panel) in enumerate(_panels(finished, axis).items()):
        where = f", {rest}" if rest else ""
        title = f"{_metrics([each for runs in panel.values() for each in runs])} of the mean client"
        pictures += [
            _by_cost(f"round{number}", f"{title} by round{where}", panel, "round", _rounds),
            _by_bytes(f"sent{number}", f"{title} by bytes sent{where}", panel),
            _by_seconds(f"time{number}", f"{title} by virtual seconds{where}", panel),
            _by_epsilon(f"epsilon{number}", f"{title} by epsilon spent{where}", panel),
            _logs(f"cross{number}", f"Cross-term by round{where}", panel, "cross_term"),
            _logs(f"apart{number}", f"Consensus distance of B·A by round{where}", panel, "consensus_product"),
        ]
    by_p = _by_p(finished, axis)
    return [picture for picture in [*by_p, *pictures] if picture]


def _metrics(outcomes: Sequence[Outcome]) -> str:
    return ", ".join(find_metrics(outcomes)) or "metric"


def _panels(outcomes: Sequence[Outcome], axis: str | None) -> dict[str, dict[str, list[Outcome]]]:
    """What the other axes are -> label of the line -> its seeds."""
    panels: dict[str, dict[str, list[Outcome]]] = {}
    for each in outcomes:
        rest = ", ".join(f"{name} {label}" for name, label in each.labels.items() if axis and name != axis)
        line = each.labels[axis] if axis else each.setting
        panels.setdefault(rest, {}).setdefault(line, []).append(each)
    return panels


def _rounds(events: Sequence[Event]) -> list[float]:
    return [score.round for score in evaluations(events)]


def _sent(events: Sequence[Event]) -> list[float]:
    total = np.concatenate([[0.0], np.cumsum([done.bytes_sent for done in select_events(events, RoundDone)])])
    return [float(total[score.round]) for score in evaluations(events)]


def _common(runs: Sequence[Mapping[Any, Any]]) -> list[Any]:
    """The places that all runs have, in the order of the first: seeds of one setting may end after other rounds."""
    return [place for place in runs[0] if all(place in run for run in runs)] if runs else []


def _curves(panel: Mapping[str, Sequence[Outcome]], costs: Costs) -> dict[str, Curve]:
    """The curve of every setting whose seeds have a point in common.

    Seeds evaluate in the same rounds; with a budget in seconds they end after other ones.  Last evaluations are one
    point, at the mean of their costs.
    """
    found = {}
    for label, runs in panel.items():
        each = [own for run in runs if (own := _points(run.events, costs))]
        if not (common := _common(each)):
            continue
        x, y = np.array([[own[place] for place in common] for own in each], float).transpose(2, 0, 1)
        last = {score.round for run in runs for score in evaluations(run.events)[-1:]}
        separate = common[-1] == "end" and any(_ends_on_other_rows(run.events) for run in runs)
        found[label] = Curve(x.mean(0), y, separate, common[-1] == "end" and len(last) > 1)
    return found


def _points(events: Sequence[Event], costs: Costs) -> dict[int | str, tuple[float, float]]:
    """Evaluation -> what it had cost and the mean client's score: by its round, the last one of a run as its end."""
    places = [("end" if score.final else score.round, float(np.nanmean(score.own))) for score in evaluations(events)]
    return {place: (cost, score) for (place, score), cost in zip(places, costs(events), strict=True)}


def _by_bytes(name: str, title: str, panel: Mapping[str, Sequence[Outcome]]) -> Picture | None:
    """Random graphs of different seeds send a little differently; the unit is one that fits all lines."""
    curves = _curves(panel, _sent)
    top = max((float(each.x.max()) for each in curves.values()), default=0.0)
    if top == 0:
        return None
    factor, unit = byte_unit(top)
    lines = {label: each._replace(x=each.x / factor) for label, each in curves.items()}
    return _lines(name, title, lines, f"{unit} sent, all clients")


def _by_seconds(name: str, title: str, panel: Mapping[str, Sequence[Outcome]]) -> Picture | None:
    """Of the settings with a clock; the clients of seeds may differ in speed."""

    def passed(events: Sequence[Event]) -> list[float]:
        return [score.virtual_seconds for score in evaluations(events)]

    return _by_cost(name, title, panel, "virtual seconds", passed)


def _by_epsilon(name: str, title: str, panel: Mapping[str, Sequence[Outcome]]) -> Picture | None:
    """Of the settings with a bound; of each run by the client that spent most, whose number of rows seeds change."""

    def spent(events: Sequence[Event]) -> list[float]:
        return [largest_epsilon(score) for score in evaluations(events)]

    return _by_cost(name, title, panel, "epsilon", spent)


def _by_cost(name: str, title: str, panel: Mapping[str, Sequence[Outcome]], unit: str, costs: Costs) -> Picture | None:
    """x is the mean over seeds of what each evaluation had cost; settings without such a cost are left out."""
    lines = {label: each for label, each in _curves(panel, costs).items() if np.isfinite(each.x).all()}
    return _lines(name, title, lines, unit) if lines else None


def _logs(name: str, title: str, panel: Mapping[str, Sequence[Outcome]], field: str) -> Picture | None:
    """The mean over seeds, by the rounds that all of them have."""
    curves = {}
    for label, runs in panel.items():
        each = [{done.round + 1: getattr(done, field) for done in select_events(run.events, RoundDone)} for run in runs]
        if rounds := _common([own for own in each if own]):
            mean = np.array([[own[t] for t in rounds] for own in each if own], float).mean(0)
            curves[label] = rounds, mean.tolist()
    return figures.log_figure(name, title, curves) if curves else None


def _by_p(outcomes: Sequence[Outcome], axis: str | None) -> list[Picture]:
    """One figure per combination of the axes that are neither ``axis`` nor the one of p; some line needs two values."""
    of_p = _axis_of_p(outcomes)
    lines_of = {axis} if axis and axis != of_p else set(outcomes[0].labels) - {of_p}
    panels: dict[str, dict[str, dict[float, list[float]]]] = {}
    shown: dict[str, list[Outcome]] = {}
    for each in outcomes:
        reached = each.measures.get("mean client")
        if each.p is None or reached is None:
            continue
        rest = ", ".join(f"{name} {own}" for name, own in each.labels.items() if name not in {of_p, *lines_of})
        line = ", ".join(own for name, own in each.labels.items() if name in lines_of) or "mean client"
        panels.setdefault(rest, {}).setdefault(line, {}).setdefault(each.p, []).append(reached)
        shown.setdefault(rest, []).append(each)
    title = "{} of the mean client by p, last evaluation{}"
    return [
        _p_figure(f"by-p{number}", title.format(_metrics(shown[rest]), rest and f", {rest}"), lines)
        for number, (rest, lines) in enumerate(panels.items())
        if any(len(line) > 1 for line in lines.values())
    ]


def _axis_of_p(outcomes: Sequence[Outcome]) -> str | None:
    """The axis that decides p: all of one label have the same, and labels differ in it.  Of several, the last."""
    found = None
    for axis in outcomes[0].labels:
        of_label: dict[str, set[float | None]] = {}
        for each in outcomes:
            of_label.setdefault(each.labels[axis], set()).add(each.p)
        if all(len(some) == 1 for some in of_label.values()) and len(set.union(*of_label.values()) - {None}) > 1:
            found = axis
    return found


def _p_figure(name: str, title: str, lines: Mapping[str, Mapping[float, Sequence[float]]]) -> Picture:
    with figures.svg_figure(name, title) as (figure, out):
        axes = figures.add_axes(figure, xlabel="p: the probability that two clients meet in a round (log scale)")
        for line, colour in zip(lines.values(), figures.line_colours(len(lines)), strict=True):
            x = sorted(line)
            axes.plot(x, [np.mean(line[p]) for p in x], "o-", color=colour, markersize=4, linewidth=1.8)
            for p in x:
                axes.plot([p, p], [min(line[p]), max(line[p])], color=colour, linewidth=1.0)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xticks(sorted({p for line in lines.values() for p in line}), minor=False)
        axes.minorticks_off()
    note = "Bars, or bands, reach from the lowest to the highest seed."
    return Picture(title, out.getvalue(), _legend(lines), note, chart=_p_chart(lines))


def _p_chart(lines: Mapping[str, Mapping[float, Sequence[float]]]) -> Chart:
    found = []
    for (label, line), colour in zip(lines.items(), figures.line_colours(len(lines)), strict=True):
        x = sorted(line)
        if any(len(seeds) > 1 for seeds in line.values()):
            low, high = ([of(line[p]) for p in x] for of in (min, max))
            found += band((f"{label}, lowest seed", f"{label}, highest seed"), colour, x, low, high)
        found.append(Line(label, colour, "thick", x, [float(np.mean(line[p])) for p in x]))
    return Chart(found, "p, log scale", logx=True)


def _lines(name: str, title: str, lines: Mapping[str, Curve], xlabel: str) -> Picture:
    with figures.svg_figure(name, title, size=(7.4, 3.6)) as (figure, out):
        axes = figures.add_axes(figure, xlabel=xlabel)
        for (x, y, separate, _), colour in zip(lines.values(), figures.line_colours(len(lines)), strict=True):
            line = slice(None, -1 if separate else None)
            axes.fill_between(x[line], y.min(0)[line], y.max(0)[line], color=colour, alpha=0.12, linewidth=0)
            axes.plot(x[line], y.mean(0)[line], color=colour, linewidth=2.0, **figures.point_markers(list(x)))
            if separate:
                axes.plot(x[-1:], y.mean(0)[-1:], "D", color=colour, markersize=6.0)
    legend = [*_legend(lines), Key("lowest to highest seed", figures.OTHER, "band")]
    return Picture(title, out.getvalue(), legend, _lines_note(lines.values()), chart=_seeds_chart(lines, xlabel))


def _lines_note(curves: Collection[Curve]) -> str:
    notes = []
    if any(each.separate for each in curves):
        notes.append("Lines: on eval.rows of the evaluation rows. Diamonds after the last round: on all of them.")
    if any(each.uneven for each in curves):
        notes.append("Seeds ended after different rounds: a last point is at the mean of their last ones.")
    return " ".join(notes)


def _seeds_chart(lines: Mapping[str, Curve], xlabel: str) -> Chart:
    """Of every line the lowest and highest seed, every seed and their mean; points where the end is on other rows."""
    found = []
    for (label, (x, y, separate, _)), colour in zip(lines.items(), figures.line_colours(len(lines)), strict=True):
        line = slice(None, -1 if separate else None)
        seeds = y if len(y) > 1 else []
        if len(seeds):
            labels = f"{label}, lowest seed", f"{label}, highest seed"
            found += band(labels, colour, x[line], y.min(0)[line], y.max(0)[line])
        found += [
            Line(f"{label}, seed {number + 1}", colour, "thin", x[line], each[line])
            for number, each in enumerate(seeds)
        ]
        found.append(Line(label, colour, "thick", x[line], y.mean(0)[line]))
        if separate:
            found.append(Line(f"{label}, all rows", colour, "points", x[-1:], y.mean(0)[-1:]))
    return Chart(found, xlabel)


def _ends_on_other_rows(events: Sequence[Event]) -> bool:
    """Whether the last evaluation is on all rows and those before on a sample, which no line may join."""
    scores = evaluations(events)
    return len(scores) > 1 and scores[-1].rows != scores[-2].rows


def _legend(lines: Mapping[str, Any]) -> list[Key]:
    return [Key(label, colour, "thick") for label, colour in zip(lines, figures.line_colours(len(lines)), strict=True)]
