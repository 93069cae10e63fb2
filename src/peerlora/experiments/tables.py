"""Rows of a comparison as CSV, Markdown and the cells of an HTML table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from peerlora.data.numerals import is_number
from peerlora.display import format_bytes, format_number
from peerlora.experiments.statistics import MEASURES, Comparison, Difference, Estimate, Line

MARK = " †"


MARKED = (
    "† The mean of factors that lie in different coordinates, since the method averages products or turns factors: it "
    "says little about the method."
)


RELAYED = ("relayed client", "worst relayed client")
SHOWN = ("mean client", "worst client", "averaged model", "best round", "consensus of B·A", "bytes sent")


def shown_measures(result: Comparison) -> list[str]:
    """The measures in the table for people."""
    models = SHOWN.index("averaged model") + 1
    return known_measures(result, [*SHOWN[:models], *RELAYED, *SHOWN[models:]])


def known_measures(result: Comparison, names: Sequence[str]) -> list[str]:
    """These measures; those of relayed models only where a run has any."""
    relays = any(name in line.estimates for line in result.lines for name in RELAYED)
    return [name for name in names if relays or name not in RELAYED]


def csv_text(result: Comparison) -> str:
    """Write one CSV line per setting and measure, numbers in full."""
    axes = list(result.lines[0].labels) if result.lines else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["learning rate", "measure", "seeds", "mean", "deviation", "difference", "low", "high", "diverged"]
    writer.writerow([*axes, *head, "rate of", "note"])
    for line in result.lines:
        for name in known_measures(result, MEASURES):
            known, gap = line.estimates.get(name), line.differences.get(name)
            low, high = (gap and gap.interval) or (None, None)
            numbers = [known and known.mean, known and known.deviation, gap and gap.mean, low, high]
            shown = [name, known.seeds if known else 0, *("" if each is None else repr(each) for each in numbers)]
            note = MARKED if marker(line, name) else ""
            labels = map(_no_formula, line.labels.values())
            writer.writerow([*labels, repr(line.rate), *shown, line.diverged, line.rate_from, note])
    return out.getvalue()


def _no_formula(label: str) -> str:
    """A label as text for a spreadsheet too, which takes what begins with one of these signs for a formula."""
    return f"'{label}" if label.startswith(("=", "+", "-", "@", "\t", "\r")) and not is_number(label) else label


def column_names(result: Comparison) -> list[str]:
    """The columns of the table for people."""
    axes = list(result.lines[0].labels) if result.lines else []
    against = f"mean client, difference to {', '.join(result.baseline.values())}"
    shown = ["mean client", *([against] if result.baseline else []), *shown_measures(result)[1:]]
    return [*axes, "rate", "seeds", *shown]


def row_cells(result: Comparison, line: Line) -> list[str]:
    """One line of the table for people."""
    known = [_spread(name, line.estimates.get(name)) + marker(line, name) for name in shown_measures(result)]
    if result.baseline:
        base = all(line.labels.get(axis) == label for axis, label in result.baseline.items())
        known.insert(1, "baseline" if base else format_difference(line.differences.get("mean client")))
    seeds = line.estimates["mean client"].seeds if "mean client" in line.estimates else 0
    counted = f"{seeds}, {line.diverged} diverged" if line.diverged else str(seeds)
    rate = f"{line.rate:g}" + (f" (of {line.rate_from})" if line.rate_from else "")
    return [*line.labels.values(), rate, counted, *known]


def marker(line: Line, name: str) -> str:
    """The sign behind a measure that says little about this line's method; empty for the others."""
    known = name == "averaged model" and name in line.estimates
    return MARK if known and line.gauges_differ else ""


def _spread(name: str, known: Estimate | None) -> str:
    if known is None:
        return "–"
    if name == "bytes sent":
        return format_bytes(known.mean)
    if name == "consensus of B·A":
        return format_number(float(f"{known.mean:.3g}"))
    return f"{known.mean:.3f}" + (f" ± {known.deviation:.3f}" if known.deviation is not None else "")


def format_difference(gap: Difference | None) -> str:
    """``+0.012 [-0.003, +0.020]``."""
    if gap is None:
        return "–"
    low, high = gap.interval or (None, None)
    span = f"[{low:+.3f}, {high:+.3f}]" if low is not None and high is not None else "[no interval]"
    return f"{gap.mean:+.3f} {span}"


def notes(result: Comparison, searched: bool) -> list[str]:
    """How to read the table, in sentences."""
    better = "higher" if result.higher_is_better else "lower"
    sentences = [
        f"{result.metric or 'metric'} ({better} is better): mean over seeds ± standard deviation over seeds (divisor "
        "n - 1). Mean client, worst client and averaged model are of the last evaluation, on all rows; the best round "
        "is the best mean client of any evaluation, chosen on the rows it is reported on, so it flatters."
    ]
    if any(marker(line, name) for line in result.lines for name in SHOWN):
        sentences.append(MARKED)
    if result.baseline:
        sentences.append(
            "Differences are paired by seed. In brackets, of 3 seeds: the lowest and the highest difference, a range "
            "and no confidence interval (it holds the mean over all seeds in three of four cases); of more: the 95 % "
            f"percentile bootstrap interval over seeds, {result.resamples:,} resamples, seeded, which few seeds make "
            "too narrow; of fewer: nothing."
        )
    if searched:
        sentences.append("Each rate was searched on training rows set aside, at the same budget; see the report.")
    if any(line.rate_from for line in result.lines):
        sentences.append(
            "A rate 'of' another setting was searched there: both agree on what search.each of the grid names."
        )
    return sentences


def markdown(result: Comparison, searched: bool) -> str:
    """Write the table and its notes as Markdown."""
    top = [_escaped(word) for word in column_names(result)]
    lines = ["| " + " | ".join(top) + " |", "|" + " --- |" * len(top)]
    lines += ["| " + " | ".join(_escaped(cell) for cell in row_cells(result, line)) + " |" for line in result.lines]
    return "\n".join([*lines, "", *notes(result, searched)]) + "\n"


def _escaped(word: Any) -> str:
    return str(word).replace("|", "\\|").replace("\n", " ")
