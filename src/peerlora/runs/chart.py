"""The numbers behind a figure: a Chart, which the page's script can draw, or a Sheet, for CSV alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

LineStyle = Literal["thin", "thick", "dashed", "points", "edge"]
"""edge: one side of a band; edges come in pairs, see ``band``."""
MOST_CELLS = 50_000
"""Cells of a sheet; a report of thousands of clients stays small."""


@dataclass(frozen=True)
class Line:
    """One series."""

    label: str
    colour: str
    style: LineStyle
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray


def band(
    labels: tuple[str, str],
    colour: str,
    x: Sequence[float] | np.ndarray,
    low: Sequence[float] | np.ndarray,
    high: Sequence[float] | np.ndarray,
) -> list[Line]:
    """The two edges of a band; ``labels``: of the lower and of the upper one."""
    return [Line(labels[0], colour, "edge", x, low), Line(labels[1], colour, "edge", x, high)]


@dataclass(frozen=True)
class Chart:
    """What one figure shows."""

    lines: Sequence[Line]
    xlabel: str = "round"
    ylabel: str = ""
    log: bool = False
    zero: bool = False
    """Whether the axis begins at zero."""
    logx: bool = False

    def as_json(self) -> dict[str, Any]:
        """All series on one x axis; null where a series has no point."""
        xs = sorted({float(x) for line in self.lines for x in line.x})
        series = []
        for line in self.lines:
            known = {float(x): float(y) for x, y in zip(line.x, line.y, strict=True)}
            values = [_digits(known.get(x)) for x in xs]
            series.append({"label": line.label, "colour": line.colour, "style": line.style, "y": values})
        facts = {"xlabel": self.xlabel, "ylabel": self.ylabel, "log": self.log, "zero": self.zero}
        return {"x": xs, "series": series, **facts, "logx": self.logx}


@dataclass(frozen=True)
class Sheet:
    """The numbers of a drawing that the page's script does not draw, as rows below a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | float]]

    def as_json(self) -> dict[str, Any]:
        """As many rows as are at most ``MOST_CELLS`` cells."""
        return {"head": list(self.head), "rows": [list(row) for row in self.rows[: MOST_CELLS // len(self.head)]]}


def _digits(value: float | None) -> float | None:
    """Six digits: the page shows four, and a file of thirty clients stays small."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
