"""Figures of a comparison as files, as wide as a column of a paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from peerlora.experiments.file_names import number_equals
from peerlora.files import atomic_file
from peerlora.runs.chart import Chart, Line
from peerlora.runs.figures import Picture, add_axes

SIZE = (3.3, 2.3)
"""Inches: the column of a paper with two."""
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "osD^vP*X"
_STYLE: Any = {"font.size": 8.0, "font.family": ["DejaVu Sans"], "svg.hashsalt": "peerlora", "pdf.fonttype": 42}
_STYLE["text.usetex"] = False  # whatever the user's own style says: names are no TeX


def write_figures(folder: Path, pictures: Sequence[Picture]) -> list[Path]:
    """Write ``figures/TITLE.pdf`` and ``.svg`` of all pictures whose numbers are known; return the files.

    Titles that differ only in what no file's name has are numbered.  The same numbers give the same bytes.
    """
    written = []
    known = [(picture.title, picture.chart) for picture in pictures if isinstance(picture.chart, Chart)]
    for (_, chart), name in zip(known, number_equals([file_name(title) for title, _ in known]), strict=True):
        (folder / "figures").mkdir(exist_ok=True)
        with matplotlib.rc_context(_STYLE):
            figure = draw_chart(chart)
            for form, undated in (("pdf", ("CreationDate", "ModDate")), ("svg", ("Date",))):
                path = folder / "figures" / f"{name}.{form}"
                with atomic_file(path) as temporary:
                    figure.savefig(temporary, format=form, metadata=dict.fromkeys(undated))
                written.append(path)
    return written


def draw_chart(chart: Chart) -> Figure:
    """Draw a chart with matplotlib; lines differ in dashes and markers as well as in colour."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = add_axes(figure, chart.ylabel, chart.xlabel)
    named = []
    edges = [line for line in chart.lines if line.style == "edge"]
    for low, high in zip(edges[::2], edges[1::2], strict=True):
        axes.fill_between(low.x, low.y, high.y, color=low.colour, alpha=0.12, linewidth=0)
    for line in (each for each in chart.lines if each.style != "edge"):
        (drawn,) = axes.plot(line.x, line.y, **_look(line, len(named)))
        named += [(drawn, line.label)] if line.style in ("thick", "dashed") else []
    if chart.logx:
        axes.set_xscale("log")
        axes.set_xticks(sorted({x for line in chart.lines for x in line.x}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
    if chart.log:
        axes.set_yscale("log")
    elif chart.zero:
        axes.set_ylim(bottom=0)
    texts = [axes.xaxis.label, axes.yaxis.label]
    if len(named) > 1:  # both lists are given, else labels that begin with _ would be left out
        texts += axes.legend(*zip(*named, strict=True), frameon=False, fontsize=7).get_texts()
    for text in texts:
        text.set_parse_math(False)  # a $ in a name is no formula
    return figure


def file_name(title: str) -> str:
    """A title as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:100] or "figure"


def _look(line: Line, number: int) -> dict[str, Any]:
    if line.style == "thin":
        return {"color": line.colour, "linewidth": 0.5, "alpha": 0.4}
    if line.style == "points":
        return {"color": line.colour, "linestyle": "", "marker": "D", "markersize": 4.0}
    marker = _MARKERS[number % len(_MARKERS)]
    places = np.linspace(0, len(line.x) - 1, min(len(line.x), 6)).astype(int).tolist()
    dash = _DASHES[number % len(_DASHES)]
    return {
        "color": line.colour,
        "linewidth": 1.3,
        "linestyle": dash,
        "marker": marker,
        "markersize": 3.5,
        "markevery": places,
        "label": line.label,
    }
