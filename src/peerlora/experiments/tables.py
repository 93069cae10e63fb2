"""Rows of a comparison as CSV, and as cells of a table for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from peerlora.config.metrics import METRICS
from peerlora.data.numerals import is_number
from peerlora.display import format_bytes, format_number
from peerlora.experiments.comparison import MAIN, Comparison
from peerlora.experiments.measures import FURTHER, MEASURES
from peerlora.experiments.rate_search import RateScore, RateSearch
from peerlora.experiments.statistics import Difference, Estimate, Line

GAUGE_SIGN, ALIKE_SIGN, UNEQUAL_SIGN = " †", " ≈", " ‡"
"""Signs behind a number: the mean of other coordinates, no difference shown, other work than the baseline's."""

MARKED = (
    "† The mean of factors that lie in different coordinates, since the method averages products or turns factors: it "
    "says little about the method."
)
NOT_DISTINGUISHABLE = "≈ Not distinguishable from the baseline: p, adjusted by Holm, is above 0.05."

_RELAYED = ("relayed client", "worst relayed client")
COMPARED = ("worst client", *_RELAYED)
"""Measures whose differences stand in a table of their own, below that of the mean client."""
_PERSONAL = ("personalised client", "worst personalised client")
_FURTHER = tuple(f"{metric}, {of}" for metric in METRICS for of in FURTHER)
_MEANS = tuple(name for name in _FURTHER if name.endswith(MAIN))
SCORES = (
    MAIN,
    "worst client",
    "averaged model",
    *_RELAYED,
    *_PERSONAL,
    *_MEANS,
    "best rounds of clients",
    "best round",
)
SELDOM = (*_RELAYED, *_PERSONAL, *_FURTHER, "best rounds of clients", "best round")
SELDOM += ("training rows", "row gradients", "gradients", "epsilon spent")
"""Measures that not every comparison has."""
_WORK = ("training rows", "row gradients", "bytes sent", "epsilon spent")


def shown_measures(result: Comparison, brief: bool = False) -> list[str]:
    """The measures of the table for people; the best round only where some run has evaluations enough.

    ``brief``: as many columns as a terminal has room for.
    """
    scores, more = (SCORES[:-1], []) if brief else (SCORES, ["consensus of B·A"])
    return known_measures(result, [*scores, *more, *_WORK])


def known_measures(result: Comparison, names: Sequence[str]) -> list[str]:
    """These measures, but those of ``SELDOM`` only where a line has them."""
    seen = {name for line in result.lines for name in line.estimates}
    return [name for name in names if name in seen or name not in SELDOM]


def csv_text(result: Comparison) -> str:
    """Write one CSV line per setting and measure, numbers in full."""
    axes = list(result.lines[0].labels) if result.lines else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["learning rate", "measure", "seeds", "mean", "deviation", "difference", "difference deviation", "low"]
    head += ["high", "p", "p holm", "p sign flip", "detectable", "diverged", "rate of", "rate at edge"]
    head += ["note", "metric"]
    writer.writerow([*axes, *head])
    for line in result.lines:
        for name in known_measures(result, MEASURES):
            known, gap = line.estimates.get(name), line.differences.get(name)
            low, high = (gap and gap.interval) or (None, None)
            numbers = [known and known.mean, known and known.deviation, gap and gap.mean, gap and gap.deviation]
            numbers += [low, high, gap and gap.p, gap and gap.p_holm, gap and gap.p_sign_flip, gap and gap.detectable]
            shown = [name, known.seeds if known else 0, *("" if each is None else repr(each) for each in numbers)]
            labels = map(_no_formula, line.labels.values())
            edge = "yes" if _at_edge(result, line) else ""
            rate = [line.diverged, line.rate_from, edge]
            remarks = " ".join(_remarks(line, name))
            writer.writerow([*labels, repr(line.rate), *shown, *rate, remarks, line.metric])
    return out.getvalue()


def _remarks(line: Line, name: str) -> list[str]:
    """What the signs behind a number of this line say, in words."""
    gap = line.differences.get(name)
    unequal = [f"{UNEQUAL_SIGN.strip()} Unequal work: {line.unequal_work}."] if gap and line.unequal_work else []
    alike = [NOT_DISTINGUISHABLE] if gap and gap.distinguishable is False else []
    return [*([MARKED] if gauge_marker(line, name) else []), *unequal, *alike]


def _no_formula(label: str) -> str:
    """A label as text for a spreadsheet too, which takes what begins with one of these signs for a formula."""
    return f"'{label}" if label.startswith(("=", "+", "-", "@", "\t", "\r")) and not is_number(label) else label


def column_names(result: Comparison, brief: bool = False) -> list[str]:
    """The columns of the table for people."""
    axes = list(result.lines[0].labels) if result.lines else []
    against = [f"{MAIN}, difference to {', '.join(result.baseline.values())}", "p (Holm)"]
    main, *others = shown_measures(result, brief)
    about = [*(["metric"] if result.mixed else []), "rate", "seeds"]
    return [*axes, *about, main, *(against if result.baseline else []), *others]


def row_cells(result: Comparison, line: Line, brief: bool = False) -> list[str]:
    """One line of the table for people."""
    main, *others = [format_estimate(line, name) for name in shown_measures(result, brief)]
    against: list[str] = []
    if result.baseline:
        base = all(line.labels.get(axis) == label for axis, label in result.baseline.items())
        against = ["baseline", "–"] if base else difference_cells(line, MAIN)
    seeds = line.estimates[MAIN].seeds if MAIN in line.estimates else 0
    counted = f"{seeds}, {line.diverged} diverged" if line.diverged else str(seeds)
    about = [*([f"of {line.rate_from}"] if line.rate_from else []), *(["at the edge"] * _at_edge(result, line))]
    rate = f"{line.rate:g}" + (f" ({'; '.join(about)})" if about else "")
    metric = [line.metric or "–"] if result.mixed else []
    return [*line.labels.values(), *metric, rate, counted, main, *against, *others]


def _at_edge(result: Comparison, line: Line) -> bool:
    search = result.search_of(line)
    return search is not None and search.edge != 0


def difference_cells(line: Line, name: str) -> list[str]:
    """A line's difference with its interval and sign, and its adjusted p."""
    gap = line.differences.get(name)
    return [format_difference(gap) + difference_marker(line, name), format_p(gap and gap.p_holm)]


def difference_columns(result: Comparison, names: Sequence[str]) -> list[str]:
    """The columns of a table of differences to the baseline, of the measures in ``names`` that some line has."""
    return ["", *(word for name in known_measures(result, names) for word in (name, "p (Holm)"))]


def difference_rows(result: Comparison, names: Sequence[str]) -> list[list[str]]:
    """The lines that have a baseline, each with its differences and adjusted p, by measure."""
    known = known_measures(result, names)
    lines = [line for line in result.ranked if line.differences]
    return [[line.setting, *(cell for name in known for cell in _measured(line, name))] for line in lines]


def _measured(line: Line, name: str) -> list[str]:
    shown, adjusted = difference_cells(line, name)
    return [shown + gauge_marker(line, name), adjusted]


def difference_marker(line: Line, name: str) -> str:
    """The sign behind a difference that is none, or of unequal work; empty for the others."""
    gap = line.differences.get(name)
    if gap is None:
        return ""
    return UNEQUAL_SIGN if line.unequal_work else ALIKE_SIGN if gap.distinguishable is False else ""


def gauge_marker(line: Line, name: str) -> str:
    """The sign behind a measure that says little about this line's method; empty for the others."""
    known = name == "averaged model" and name in line.estimates
    return GAUGE_SIGN if known and line.gauges_differ else ""


def format_estimate(line: Line, name: str) -> str:
    """``0.750 ± 0.012 †``; of costs and consensus the mean only."""
    known = line.estimates.get(name)
    if known is None:
        return "–"
    forms: dict[str, Callable[[float], str]] = {
        "bytes sent": format_bytes,
        "training rows": lambda mean: f"{mean:,.0f}",
        "row gradients": lambda mean: f"{mean:,.0f}",
        "consensus of B·A": lambda mean: format_number(float(f"{mean:.3g}")),
    }
    return forms[name](known.mean) if name in forms else _spread(known) + gauge_marker(line, name)


def _spread(known: Estimate) -> str:
    return f"{known.mean:.3f}" + (f" ± {known.deviation:.3f}" if known.deviation is not None else "")


def format_difference(gap: Difference | None) -> str:
    """``+0.012 [-0.003, +0.020]``."""
    if gap is None:
        return "–"
    low, high = gap.interval or (None, None)
    span = f"[{low:+.3f}, {high:+.3f}]" if low is not None and high is not None else "[no interval]"
    return f"{gap.mean:+.3f} {span}"


def format_p(p: float | None) -> str:
    """A p value with three digits behind the point."""
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def rate_columns(searches: Sequence[RateSearch]) -> list[str]:
    """The columns of the table of searched rates."""
    metric = ["metric"] if _mixed(searches) else []
    return ["searched on", *metric, *(f"{rate:g}" for rate in _rates(searches)), ""]


def rate_rows(searches: Sequence[RateSearch]) -> list[list[str]]:
    """Every searched rate of every group: mean ± standard deviation over search seeds, and which one is taken."""
    found = []
    for each in searches:
        known = {rate.rate: rate for rate in each.rates}
        cells = [_rate_cell(each, known[rate]) if rate in known else "–" for rate in _rates(searches)]
        metric = [each.metric or "–"] if _mixed(searches) else []
        found.append([each.setting, *metric, *cells, "at the edge" if each.edge else ""])
    return found


def _mixed(searches: Sequence[RateSearch]) -> bool:
    """Whether groups were searched by several metrics."""
    return len({each.metric for each in searches} - {""}) > 1


def _rates(searches: Sequence[RateSearch]) -> list[float]:
    return sorted({rate.rate for each in searches for rate in each.rates})


def _rate_cell(search: RateSearch, tried: RateScore) -> str:
    chosen = " (taken)" if tried.rate == search.taken else " (best)" if tried.rate == search.best else ""
    return ("diverged" if tried.diverged else _spread(tried.estimate) if tried.estimate else "–") + chosen
