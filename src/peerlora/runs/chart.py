"""Chart: the numbers behind a figure, for the page's script and for CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

LineStyle = Literal["thin", "thick", "dashed", "points", "edge"]
"""edge: one side of a band to the line before it, also an edge."""


@dataclass(frozen=True)
class Line:
    """One series."""

    label: str
    colour: str
    style: LineStyle
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Chart:
    """What one figure shows."""

    lines: Sequence[Line]
    xlabel: str = "round"
    ylabel: str = ""
    log: bool = False
    zero: bool = False
    """Whether the axis begins at zero."""

    def as_json(self) -> dict[str, Any]:
        """All series on one x axis; null where a series has no point."""
        xs = sorted({float(x) for line in self.lines for x in line.x})
        series = []
        for line in self.lines:
            known = {float(x): float(y) for x, y in zip(line.x, line.y, strict=True)}
            values = [_digits(known.get(x)) for x in xs]
            series.append({"label": line.label, "colour": line.colour, "style": line.style, "y": values})
        facts = {"xlabel": self.xlabel, "ylabel": self.ylabel, "log": self.log, "zero": self.zero}
        return {"x": xs, "series": series, **facts}


def _digits(value: float | None) -> float | None:
    """Six digits: the page shows four, and a file of thirty clients stays small."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
