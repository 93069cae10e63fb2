"""Figures of a comparison: one line per setting, mean over seeds, with a band from the lowest to the highest seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import ScalarFormatter

from peerlora.display import byte_unit
from peerlora.experiments.statistics import Outcome
from peerlora.runs import figures
from peerlora.runs.chart import Chart, Line
from peerlora.runs.events import Event, RoundDone
from peerlora.runs.figures import Key, Picture
from peerlora.runs.metrics import evaluations, find_start, select_events
from peerlora.runs.privacy_summary import largest_epsilon

Curve = tuple[np.ndarray, np.ndarray]  # x [point], y [seed, point]


def comparison_figures(outcomes: Sequence[Outcome], axis: str | None) -> list[Picture]:
    """All figures for which there is anything to draw; ``axis`` is what the lines of one figure differ in."""
    finished = [each for each in outcomes if each.events]
    if not finished:
        return []
    start = find_start(finished[0].events)
    metric = start.metric if start else "metric"
    pictures = []
    for number, (rest, panel) in enumerate(_panels(finished, axis).items()):
        where = f", {rest}" if rest else ""
        title = f"{metric} of the mean client"
        pictures += [
            _lines(f"round{number}", f"{title} by round{where}", _curves(panel, _accuracy), "round", panel),
            _by_bytes(f"sent{number}", f"{title} by bytes sent{where}", panel),
            _by_seconds(f"time{number}", f"{title} by virtual seconds{where}", panel),
            _by_epsilon(f"epsilon{number}", f"{title} by epsilon spent{where}", panel),
            _logs(f"cross{number}", f"Cross-term by round{where}", panel, "cross_term"),
            _logs(f"apart{number}", f"Consensus distance of B·A by round{where}", panel, "consensus_product"),
        ]
    by_p = _by_p(f"{metric} of the mean client by p, last evaluation", finished, axis)
    return [picture for picture in [*by_p, *pictures] if picture]


def _panels(outcomes: Sequence[Outcome], axis: str | None) -> dict[str, dict[str, list[Outcome]]]:
    """What the other axes are -> label of the line -> its seeds."""
    panels: dict[str, dict[str, list[Outcome]]] = {}
    for each in outcomes:
        rest = ", ".join(f"{name} {label}" for name, label in each.labels.items() if axis and name != axis)
        line = each.labels[axis] if axis else each.setting
        panels.setdefault(rest, {}).setdefault(line, []).append(each)
    return panels


def _accuracy(events: Sequence[Event]) -> tuple[list[float], list[float]]:
    scores = evaluations(events)
    return [score.round for score in scores], [float(np.nanmean(score.own)) for score in scores]


def _curves(panel: Mapping[str, Sequence[Outcome]], of_run: Any) -> dict[str, Curve]:
    """Seeds of one setting evaluate in the same rounds, so they stack."""
    found = {}
    for label, runs in panel.items():
        each = [of_run(run.events) for run in runs]
        found[label] = np.asarray(each[0][0], float), np.asarray([y for _, y in each], float)
    return found


def _by_bytes(name: str, title: str, panel: Mapping[str, Sequence[Outcome]]) -> Picture | None:
    """x is the mean over seeds of what was sent so far: random graphs of different seeds send a little differently."""

    def sent(events: Sequence[Event]) -> tuple[list[float], list[float]]:
        total = np.concatenate([[0.0], np.cumsum([done.bytes_sent for done in select_events(events, RoundDone)])])
        return [], [float(total[score.round]) for score in evaluations(events)]

    reached = _curves(panel, _accuracy)
    x = {label: line[1].mean(0) for label, line in _curves(panel, sent).items()}
    top = max(float(each.max()) for each in x.values())
    if top == 0:
        return None
    factor, unit = byte_unit(top)
    lines = {label: (x[label] / factor, reached[label][1]) for label in reached}
    return _lines(name, title, lines, f"{unit} sent, all clients", panel)


def _by_seconds(name: str, title: str, panel: Mapping[str, Sequence[Outcome]]) -> Picture | None:
    """Of the settings with a clock; x is the mean over seeds, whose clients may differ in speed."""

    def passed(events: Sequence[Event]) -> list[float]:
        return [score.virtual_seconds for score in evaluations(events)]

    return _by_cost(name, title, panel, "virtual seconds", passed)


def _by_epsilon(name: str, title: str, panel: Mapping[str, Sequence[Outcome]]) -> Picture | None:
    """Of the settings with a bound; of each run by the client that spent most, whose number of rows seeds change."""

    def spent(events: Sequence[Event]) -> list[float]:
        return [largest_epsilon(score) for score in evaluations(events)]

    return _by_cost(name, title, panel, "epsilon", spent)


def _by_cost(
    name: str,
    title: str,
    panel: Mapping[str, Sequence[Outcome]],
    unit: str,
    cost: Callable[[Sequence[Event]], list[float]],
) -> Picture | None:
    """x is the mean over seeds of what each evaluation had cost; settings without such a cost are left out."""
    reached = _curves(panel, _accuracy)
    x = {label: line[1].mean(0) for label, line in _curves(panel, lambda events: ([], cost(events))).items()}
    lines = {label: (x[label], reached[label][1]) for label in reached if np.isfinite(x[label]).all()}
    return _lines(name, title, lines, unit, panel) if lines else None


def _logs(name: str, title: str, panel: Mapping[str, Sequence[Outcome]], field: str) -> Picture:
    def values(events: Sequence[Event]) -> tuple[list[int], list[float]]:
        done = select_events(events, RoundDone)
        return [each.round + 1 for each in done], [getattr(each, field) for each in done]

    curves = {label: (list(map(int, x)), y.mean(0).tolist()) for label, (x, y) in _curves(panel, values).items()}
    return figures.log_figure(name, title, curves)


def _by_p(title: str, outcomes: Sequence[Outcome], axis: str | None) -> list[Picture]:
    """One figure per combination of the axes that are neither ``axis`` nor the one of p; some line needs two values."""
    of_p = _axis_of_p(outcomes)
    lines_of = {axis} if axis and axis != of_p else set(outcomes[0].labels) - {of_p}
    panels: dict[str, dict[str, dict[float, list[float]]]] = {}
    for each in outcomes:
        reached = each.measures.get("mean client")
        if each.p is None or reached is None:
            continue
        rest = ", ".join(f"{name} {own}" for name, own in each.labels.items() if name not in {of_p, *lines_of})
        line = ", ".join(own for name, own in each.labels.items() if name in lines_of) or "mean client"
        panels.setdefault(rest, {}).setdefault(line, {}).setdefault(each.p, []).append(reached)
    return [
        _p_figure(f"by-p{number}", f"{title}{f', {rest}' if rest else ''}", lines)
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
    note = "A bar reaches from the lowest to the highest seed."
    return Picture(title, out.getvalue(), _legend(lines), note)


def _lines(
    name: str, title: str, lines: Mapping[str, Curve], xlabel: str, panel: Mapping[str, Sequence[Outcome]]
) -> Picture:
    separate = any(_ends_on_other_rows(run.events) for runs in panel.values() for run in runs)
    with figures.svg_figure(name, title, size=(7.4, 3.6)) as (figure, out):
        axes = figures.add_axes(figure, xlabel=xlabel)
        for (x, y), colour in zip(lines.values(), figures.line_colours(len(lines)), strict=True):
            line = slice(None, -1 if separate else None)
            axes.fill_between(x[line], y.min(0)[line], y.max(0)[line], color=colour, alpha=0.12, linewidth=0)
            axes.plot(x[line], y.mean(0)[line], color=colour, linewidth=2.0, **figures.point_markers(list(x)))
            if separate:
                axes.plot(x[-1:], y.mean(0)[-1:], "D", color=colour, markersize=6.0)
    note = (
        "Lines: on eval.rows of the evaluation rows. Diamonds after the last round: on all of them." if separate else ""
    )
    legend = [*_legend(lines), Key("lowest to highest seed", figures.OTHER, "band")]
    return Picture(title, out.getvalue(), legend, note, chart=_seeds_chart(lines, xlabel, separate))


def _seeds_chart(lines: Mapping[str, Curve], xlabel: str, separate: bool) -> Chart:
    """The mean over seeds of every line, and every seed; points where the last evaluation is on other rows."""
    found = []
    for (label, (x, y)), colour in zip(lines.items(), figures.line_colours(len(lines)), strict=True):
        line = slice(None, -1 if separate else None)
        seeds = y if len(y) > 1 else []
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
