"""report.html over several runs of the same question.  It shows what the runs show and names no winner."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from peerlora.display import format_bytes, format_number
from peerlora.runs.events import Event, RoundDone, RunStarted
from peerlora.runs.metrics import find_start, scores_of, select_events
from peerlora.runs.page import picture_html, write_page
from peerlora.runs.pictures import graph_picture, labels_picture, metric_curves, virtual_seconds
from peerlora.runs.write_failures import describe_write_failures

HEAD = (
    "run",
    "own models, mean",
    "lowest",
    "highest",
    "averaged model",
    "consensus of B·A",
    "cross-term",
    "sent",
    "seconds",
    "rounds",
)


@dataclass(frozen=True)
class ComparisonRow:
    """One run of a comparison."""

    name: str
    note: str
    """How it differs from the others, in a few words."""
    events: list[Event] | None
    """None: the run is in the table only."""
    summary: Mapping[str, Any]
    """As ``metrics.summarise`` returns it; ``run`` is its folder, absolute or relative to the comparison's."""


def write_comparison(folder: Path | str, rows: Sequence[ComparisonRow], findings: Sequence[str] = ()) -> Path:
    """Write report.html into ``folder``, which is made when missing; ``findings`` are sentences to put on top."""
    folder = Path(folder)
    starts = [start for row in rows if row.events and (start := find_start(row.events))]
    body = [_lead(rows, starts), *(f"<p>{escape(text)}</p>" for text in findings)]
    body += ["<h2>Results</h2>", _table(folder, rows), _unlike(rows, starts)]
    body += [picture_html(picture) for picture in _pictures(rows, starts)]
    with describe_write_failures(folder, lambda: "compare again; the runs are whole"):
        folder.mkdir(parents=True, exist_ok=True)
        return write_page(folder / "report.html", f"{len(rows)} runs compared", body)


def _lead(rows: Sequence[ComparisonRow], starts: Sequence[RunStarted]) -> str:
    metrics = sorted({str(row.summary["metric"]) for row in rows if row.summary.get("metric")})
    better = {start.metric: "higher" if start.higher_is_better else "lower" for start in starts}
    words = [f"{name} ({better[name]} is better)" if name in better else name for name in metrics]
    clients = sorted({row.summary["clients"] for row in rows if row.summary.get("clients")})
    text = f"Measured: {', '.join(words) or 'nothing yet'}. Clients: {', '.join(map(str, clients)) or 'unknown'}."
    return f'<p class="lead">{escape(text)}</p>'


def _table(folder: Path, rows: Sequence[ComparisonRow]) -> str:
    head = "".join(f"<th{' class=number' if column else ''}>{escape(word)}</th>" for column, word in enumerate(HEAD))
    lines = []
    for row in rows:
        cells = "".join(f"<td class=number>{escape(cell)}</td>" for cell in _cells(row.summary))
        note = f'<br><span class="note">{escape(row.note)}</span>' if row.note else ""
        lines.append(f'<tr><th scope="row">{_name(folder, row)}{note}</th>{cells}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _name(folder: Path, row: ComparisonRow) -> str:
    """The run's name, as a link to its own report where its folder is known."""
    run = row.summary.get("run")
    if not run:
        return escape(row.name)
    there = os.path.relpath(folder / run / "report.html", folder)  # an absolute run replaces folder here
    return f'<a href="{quote(Path(there).as_posix())}">{escape(row.name)}</a>'


def _cells(summary: Mapping[str, Any]) -> list[str]:
    scores, distance = scores_of(summary), summary.get("consensus") or {}
    sent = summary.get("bytes_sent")
    return [
        *(format_number(scores.get(key)) for key in ("own_mean", "own_min", "own_max", "averaged")),
        *(format_number(distance.get(key)) for key in ("product", "cross_term")),
        "–" if sent is None else format_bytes(sent),
        format_number((summary.get("seconds") or {}).get("total")),
        format_number(summary.get("rounds")),
    ]


def _pictured(rows: Sequence[ComparisonRow]) -> ComparisonRow | None:
    """The run whose data and graph are drawn: the one with the most contacts, the first of those."""
    drawable = [row for row in rows if row.events and find_start(row.events)]
    return max(
        drawable,
        key=lambda row: sum(done.contacts for done in select_events(row.events or (), RoundDone)),
        default=None,
    )


def _unlike(rows: Sequence[ComparisonRow], starts: Sequence[RunStarted]) -> str:
    """A note for figures that show one run's data and graph when the runs differ in them."""
    facts = {"data": "partition", "topology": "topology", "seed": "seed"}
    differ = [word for word, name in facts.items() if any(getattr(s, name) != getattr(starts[0], name) for s in starts)]
    shown = _pictured(rows)
    if not differ or shown is None:
        return ""
    text = f"The runs differ in {', '.join(differ)}; who holds what and the graph are shown for {shown.name}."
    return f'<p class="note">{escape(text)}</p>'


def _pictures(rows: Sequence[ComparisonRow], starts: Sequence[RunStarted]) -> list[Any]:
    """All figures for which there is anything to draw."""
    from peerlora.runs import figures

    named = _unique_names(rows)
    curves = {name: found for name, events in named.items() if (found := metric_curves(events))}
    trained = {name: events for name, events in named.items() if select_events(events, RoundDone)}
    distances = {name: _by_round(events, "consensus_product") for name, events in trained.items()}
    sent = {name: _by_round(events, "bytes_sent") for name, events in trained.items()}
    metric = ", ".join(sorted({start.metric for start in starts}))
    pictures = []
    if curves:
        title = f"{metric} of the clients' own models"
        pictures.append(figures.runs_figure("metric", title, curves))
        timed = {name: found for name, events in named.items() if (found := metric_curves(events, virtual_seconds))}
        if timed:
            by_time = f"{title}, by virtual seconds"
            pictures.append(figures.runs_figure("metric-time", by_time, timed, "virtual seconds"))
    if distances:
        title = "How far the clients are apart: consensus distance of the product B·A"
        pictures += [
            figures.log_figure("consensus", title, distances),
            figures.bytes_figure("bytes", "Bytes sent", sent),
        ]
    shown = _pictured(rows)
    if shown and shown.events and (start := find_start(shown.events)):
        pictures += [labels_picture(start), graph_picture(start, shown.events)]
    return [picture for picture in pictures if picture]


def _by_round(events: Sequence[Event], name: str) -> tuple[list[int], list[float]]:
    done = select_events(events, RoundDone)
    return [each.round + 1 for each in done], [getattr(each, name) for each in done]


def _unique_names(rows: Sequence[ComparisonRow]) -> dict[str, list[Event]]:
    """Row name -> events, of the rows that have any; a name that comes twice gets its row number."""
    named: dict[str, list[Event]] = {}
    for number, row in enumerate(rows, start=1):
        if row.events:
            named[f"{row.name} (row {number})" if row.name in named else row.name] = row.events
    return named
