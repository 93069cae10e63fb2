"""The figures of the reports, as inline SVG.

Words that come from the user (metric, labels, run names) are kept out of the drawings: they stand in title and legend,
which are HTML, so any script of the world can be shown and escaped in one place.  The same numbers give the same bytes.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peerlora.display import byte_unit
from peerlora.runs.chart import Chart, Line, Sheet, band

Style = Literal["thin", "thick", "dashed", "band"]
PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#44aa99", "#999933", "#882255")
MEAN, AVERAGED, CLIENT, INK, GRID = "#1f4e79", "#d1495b", "#7fa3c4", "#333333", "#e4e4e4"
OTHER = "#bbbbbb"
_VARIABLES = {MEAN: "mean", AVERAGED: "averaged", CLIENT: "client", INK: "ink", GRID: "line", "#999999": "soft"}
MANY_LINES = 50  # clients; above, quantile bands


@dataclass(frozen=True)
class Key:
    """One entry of a legend."""

    label: str
    colour: str
    style: Style


@dataclass(frozen=True)
class Picture:
    """A drawing with the words around it (not yet escaped)."""

    title: str
    svg: str
    legend: list[Key]
    note: str = ""
    square: bool = False
    chart: Chart | Sheet | None = None
    """The numbers: a Chart where the page can draw them by itself."""


@dataclass(frozen=True)
class Curves:
    """One quantity of every client over the rounds, or over virtual seconds."""

    rounds: Sequence[float]
    clients: np.ndarray
    """[round, client]"""
    averaged: list[float] | None = None
    """[round] of the averaged model."""
    rows: int = 0
    """On which it was measured."""
    end: "Curves | None" = None
    """The same after the last round on other rows: another quantity, so that no line leads there."""

    def without_averaged(self) -> "Curves":
        """The same of the clients alone."""
        return replace(self, averaged=None, end=self.end and self.end.without_averaged())


def clients_figure(name: str, title: str, curves: Curves, xlabel: str = "round") -> Picture:
    """Every client thin (quantile bands above 50 clients), their mean thick, the averaged model dashed."""
    with svg_figure(name, title) as (figure, out):
        axes = add_axes(figure, xlabel=xlabel)
        legend = _spread(axes, curves)
        axes.plot(curves.rounds, _mean(curves.clients), color=MEAN, linewidth=2.2, **point_markers(curves.rounds))
        legend.append(Key("mean over clients", MEAN, "thick"))
        if curves.averaged is not None:
            axes.plot(
                curves.rounds, curves.averaged, "--", color=AVERAGED, linewidth=2.2, **point_markers(curves.rounds)
            )
            legend.append(Key("averaged model", AVERAGED, "dashed"))
        if curves.end is not None:
            points = np.full(curves.end.clients.shape[1], curves.end.rounds[0])
            axes.scatter(points, curves.end.clients[0], s=4.0, color=CLIENT, zorder=2)
            _draw_end(axes, curves.end, MEAN, AVERAGED)
    return Picture(title, out.getvalue(), legend, _end_note([curves]), chart=_clients_chart(curves, xlabel))


def log_figure(name: str, title: str, lines: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Picture:
    """Distances by round on a log scale: label -> (rounds, values).  Zeros are left out, which the note then says."""
    values = {label: np.asarray(line[1], float) for label, line in lines.items()}
    zeros = any((each == 0).any() for each in values.values())
    positive = any((each > 0).any() for each in values.values())
    with svg_figure(name, title) as (figure, out):
        axes = add_axes(figure, "log scale")
        for (label, each), colour in zip(values.items(), line_colours(len(values)), strict=True):
            rounds = lines[label][0]
            axes.plot(rounds, np.where(each > 0, each, np.nan), color=colour, linewidth=1.8, **point_markers(rounds))
        if positive:
            axes.set_yscale("log")
        else:
            axes.set_yticks([])
            word = "all values are zero" if zeros else "not known"
            axes.text(0.5, 0.5, word, transform=axes.transAxes, ha="center", color=INK)
    legend = [Key(label, colour, "thick") for label, colour in zip(values, line_colours(len(values)), strict=True)]
    note = "Zeros are not drawn: a log scale has no place for them." if zeros else ""
    shown = [
        Line(key.label, key.colour, "thick", lines[key.label][0], np.where(each > 0, each, np.nan))
        for key, each in zip(legend, values.values(), strict=True)
    ]
    return Picture(title, out.getvalue(), legend, note, chart=Chart(shown, log=True) if positive else None)


def bytes_figure(name: str, title: str, lines: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Picture:
    """Bytes sent by all clients together since the start: label -> (finished rounds, bytes of each round)."""
    totals = {label: np.cumsum(np.asarray(line[1], float)) for label, line in lines.items()}
    top = max((each[-1] for each in totals.values() if len(each)), default=0.0)
    factor, unit = byte_unit(top)
    shown = {label: (lines[label][0], total / factor) for label, total in totals.items()}
    return lines_figure(name, title, shown, f"{unit} sent, all clients")


def lines_figure(name: str, title: str, lines: Mapping[str, tuple[Sequence[int], Any]], unit: str) -> Picture:
    """Values from zero up by round: label -> (rounds, values)."""
    colours = list(line_colours(len(lines)))
    with svg_figure(name, title, size=(7.4, 2.4)) as (figure, out):
        axes = add_axes(figure, unit)
        for (rounds, values), colour in zip(lines.values(), colours, strict=True):
            axes.plot(rounds, values, color=colour, linewidth=1.8, **point_markers(rounds))
        axes.set_ylim(bottom=0)
    legend = [Key(label, colour, "thick") for label, colour in zip(lines, colours, strict=True)]
    shown = [Line(key.label, key.colour, "thick", *lines[key.label]) for key in legend]
    return Picture(title, out.getvalue(), legend if len(legend) > 1 else [], chart=Chart(shown, ylabel=unit, zero=True))


def runs_figure(name: str, title: str, runs: Mapping[str, Curves], xlabel: str = "round") -> Picture:
    """Several runs: mean over clients, a band from the lowest to the highest client, the averaged model dashed."""
    with svg_figure(name, title, size=(7.4, 3.8)) as (figure, out):
        axes = add_axes(figure, xlabel=xlabel)
        for curves, colour in zip(runs.values(), line_colours(len(runs)), strict=True):
            low, high = _quantiles(curves.clients, 0.0, 1.0)
            axes.fill_between(curves.rounds, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(curves.rounds, _mean(curves.clients), color=colour, linewidth=2.2, **point_markers(curves.rounds))
            if curves.averaged is not None:
                axes.plot(curves.rounds, curves.averaged, "--", color=colour, linewidth=1.4)
            if curves.end is not None:
                _draw_end(axes, curves.end, colour, colour)
    legend = [Key(label, colour, "thick") for label, colour in zip(runs, line_colours(len(runs)), strict=True)]
    legend += [Key("lowest to highest client", OTHER, "band"), Key("averaged model", INK, "dashed")]
    return Picture(title, out.getvalue(), legend, _end_note(runs.values()), chart=_runs_chart(runs, xlabel))


def _clients_chart(curves: Curves, xlabel: str) -> Chart:
    """Every client, or the middle 90 % and 50 % of many, then the mean and the averaged model."""
    clients = curves.clients.shape[1]
    if clients > MANY_LINES:
        lines = []
        for low, high in ((5, 95), (25, 75)):
            labels, edges = (f"{low} % of clients", f"{high} % of clients"), (low / 100, high / 100)
            lines += band(labels, CLIENT, curves.rounds, *_quantiles(curves.clients, *edges))
    else:
        ys = curves.clients.T if clients > 1 else []
        lines = [Line(f"client {client}", CLIENT, "thin", curves.rounds, y) for client, y in enumerate(ys)]
    return Chart([*lines, *_mean_lines("", curves, MEAN, AVERAGED)], xlabel)


def _runs_chart(runs: Mapping[str, Curves], xlabel: str) -> Chart:
    """Of every run the lowest and the highest client, the mean over clients and the averaged model."""
    lines = []
    for (name, each), colour in zip(runs.items(), line_colours(len(runs)), strict=True):
        labels = f"{name}, lowest client", f"{name}, highest client"
        if each.clients.shape[1] > 1:
            lines += band(labels, colour, each.rounds, *_quantiles(each.clients, 0.0, 1.0))
        lines += _mean_lines(name, each, colour, colour)
    return Chart(lines, xlabel)


def _mean_lines(name: str, curves: Curves, mean: str, averaged: str) -> list[Line]:
    """The mean over clients and the averaged model, and both on other rows at the end, of one run."""
    first, last = (name, f"{name}, averaged model") if name else ("mean over clients", "averaged model")
    lines = [Line(first, mean, "thick", curves.rounds, _mean(curves.clients))]
    if curves.averaged is not None:
        lines.append(Line(last, averaged, "dashed", curves.rounds, curves.averaged))
    if curves.end is not None:
        end = curves.end
        rows = f" on all {end.rows:,} rows"
        lines.append(Line(first + rows, mean, "points", end.rounds, _mean(end.clients)))
        if end.averaged is not None:
            lines.append(Line(last + rows, averaged, "points", end.rounds, end.averaged))
    return lines


def _draw_end(axes: Any, end: Curves, mean: str, averaged: str) -> None:
    """Draw what was measured on other rows as points of their own."""
    axes.plot(end.rounds, _mean(end.clients), "D", color=mean, markersize=6.0)
    if end.averaged is not None:
        axes.plot(end.rounds, end.averaged, "D", color=averaged, markersize=6.0, fillstyle="none")


def _end_note(runs: Iterable[Curves]) -> str:
    """What the points at the end are, where there are any."""
    ended = [each for each in runs if each.end is not None]
    row_counts = {(each.rows, each.end.rows) for each in ended if each.end is not None}
    if not row_counts:
        return ""
    which = " filled, averaged model hollow" if any(each.averaged is not None for each in ended) else ""
    sizes = " or ".join(f"{few:,} of the {every:,} evaluation rows" for few, every in sorted(row_counts))
    return (
        f"Lines: on a sample, {sizes}. Diamonds after the last round: on all of them (mean over clients{which}); they "
        "differ from the lines by the rows, too."
    )


def _spread(axes: Any, curves: Curves) -> list[Key]:
    """Draw the clients behind their mean."""
    clients = curves.clients.shape[1]
    if clients <= MANY_LINES:
        point = point_markers(curves.rounds) and {"marker": "o", "markersize": 2.0}
        axes.plot(curves.rounds, curves.clients, color=CLIENT, linewidth=0.8, alpha=0.7, **point)
        return [Key("one client", CLIENT, "thin")] if clients > 1 else []
    for low, high, alpha in ((0.05, 0.95, 0.2), (0.25, 0.75, 0.35)):
        axes.fill_between(curves.rounds, *_quantiles(curves.clients, low, high), color=CLIENT, alpha=alpha, linewidth=0)
    return [Key("middle 90 % and 50 % of clients", CLIENT, "band")]


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over clients, without those that have no value; NaN where nobody has one."""
    known = np.isfinite(values)
    count = known.sum(1)
    return np.where(count > 0, np.where(known, values, 0).sum(1) / np.maximum(count, 1), math.nan)


def _quantiles(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """[2, round] quantiles over the clients that have a value."""
    known = [row[np.isfinite(row)] for row in values]
    pairs = [np.quantile(row, (low, high)) if len(row) else (math.nan, math.nan) for row in known]
    return np.array(pairs).reshape(-1, 2).T


def line_colours(count: int) -> list[str]:
    """Return the colours of so many lines; the palette repeats."""
    return [PALETTE[number % len(PALETTE)] for number in range(count)]


def point_markers(rounds: Sequence[float]) -> dict[str, Any]:
    """Points as well as lines where there are few, so that a single round can be seen."""
    return {"marker": "o", "markersize": 3.5} if len(rounds) <= 25 else {}


def _widen(figure: Figure) -> None:
    """Room around a single round, which has no width of its own."""
    for axes in figure.axes:
        low, high = axes.dataLim.intervalx
        if low == high:
            axes.set_xlim(low - 1, high + 1)


def add_axes(figure: Figure, ylabel: str = "", xlabel: str = "round") -> Any:
    """Add axes in the style of the reports."""
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=INK, width=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    return axes


@contextmanager
def svg_figure(name: str, title: str, size: tuple[float, float] = (7.4, 3.2)) -> Any:
    """A figure to draw on (inches) and the buffer that holds its SVG afterwards."""
    style: Any = {"svg.hashsalt": name, "svg.fonttype": "path", "font.size": 9.0, "font.family": ["DejaVu Sans"]}
    style["text.usetex"] = False
    with matplotlib.rc_context(style):
        figure, out = Figure(figsize=size, layout="constrained"), io.StringIO()
        yield figure, out
        _widen(figure)
        raw = io.StringIO()
        figure.savefig(
            raw, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    out.write(_inline(raw.getvalue(), name, title))


def _inline(svg: str, name: str, title: str) -> str:
    """The <svg> element alone, with ids that are unique in a page of several figures."""
    from html import escape

    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would count for the whole page
    for colour, variable in _VARIABLES.items():  # the page knows what they are in the dark
        svg = svg.replace(f": {colour}", f": var(--{variable}, {colour})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
