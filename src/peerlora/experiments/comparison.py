"""A comparison: the lines of its table, what its seeds can show, and the search of its learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerlora.experiments.inference import LEVEL, POWER
from peerlora.experiments.rate_search import RateSearch
from peerlora.experiments.statistics import Design, Line, assess_design

MAIN = "mean client"
"""The measure whose differences stand in the table."""


@dataclass(frozen=True)
class Comparison:
    """Results of a grid, and the folder with its files."""

    folder: Path
    lines: list[Line]
    metrics: Mapping[str, bool]
    """What the scores are -> whether higher is better; several where the rows' tasks differ, empty before any run."""
    baseline: Mapping[str, str]
    searches: Sequence[RateSearch] = ()
    """Empty where no rate was searched."""
    warnings: Sequence[str] = ()
    details: str = "table.csv and the report"
    """The files with all tests of every row, as the notes name them."""

    @property
    def metric(self) -> str | None:
        """The metrics by name; None before any run."""
        return ", ".join(self.metrics) or None

    @property
    def mixed(self) -> bool:
        """Whether scores of several metrics stand in the table."""
        return len(self.metrics) > 1

    @property
    def design(self) -> Design | None:
        """What the table's seeds can be expected to show; None where nothing was tested."""
        return assess_design(self.lines, MAIN)

    @property
    def ranked(self) -> list[Line]:
        """The lines in the order of the grid, those of unequal work behind the others."""
        return sorted(self.lines, key=lambda line: bool(line.unequal_work))

    def search_of(self, line: Line) -> RateSearch | None:
        """The search that a line's rate comes from."""
        return next((each for each in self.searches if each.labels == line.searched_on), None)

    def as_json(self) -> dict[str, Any]:
        """What ``peerlora compare --json`` prints."""
        return {
            "folder": str(self.folder),
            "report": str(self.folder / "report.html"),
            "metric": self.metric,
            "baseline": dict(self.baseline),
            "level": LEVEL,
            "power": POWER,
            "design": self.design and vars(self.design),
            "rows": [
                {
                    "labels": dict(line.labels),
                    "metric": line.metric or None,
                    "rate": line.rate,
                    "rate_from": line.rate_from,
                    "diverged": line.diverged,
                    "unequal_work": line.unequal_work,
                    "estimates": {name: vars(each) for name, each in line.estimates.items()},
                    "differences": {
                        name: vars(each) | {"distinguishable": each.distinguishable}
                        for name, each in line.differences.items()
                    },
                }
                for line in self.lines
            ],
            "search": [each.as_json() for each in self.searches],
            "warnings": list(self.warnings),
        }
