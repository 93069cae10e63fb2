"""report.html of a grid: one self-contained page with tables, published numbers, figures and the grid itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from peerlora.config.run import RunConfig
from peerlora.experiments.comparison import MAIN, Comparison
from peerlora.experiments.published import compare_protocols, dataset, describe_protocol, find_papers, fits
from peerlora.experiments.published_numbers import Number, Paper
from peerlora.experiments.statistics import Estimate, Line, Outcome
from peerlora.experiments.table_notes import rate_notes, table_notes
from peerlora.experiments.tables import (
    SCORES,
    column_names,
    difference_cells,
    difference_columns,
    difference_rows,
    format_p,
    rate_columns,
    rate_rows,
    row_cells,
)
from peerlora.files import atomic_file
from peerlora.runs.figures import Picture
from peerlora.runs.page import picture_html, table_html, write_page


def write_grid_report(
    result: Comparison,
    outcomes: Sequence[Outcome],
    searched: Sequence[Outcome],
    pictures: Sequence[Picture],
    grid: str,
    configs: Mapping[str, RunConfig],
    published: str | None,
) -> Path:
    """Write report.html; ``configs``: one per setting."""
    seeds = sorted({each.seed for each in outcomes})
    done = sum(bool(each.measures) for each in outcomes)
    text = f"{done} of {len(outcomes)} cells finished; seeds {', '.join(map(str, seeds))}."
    body = [f'<p class="lead">{escape(text)}</p>', "<h2>Results</h2>"]
    if result.lines:
        body.append(table_html([row_cells(result, line) for line in result.ranked], column_names(result)))
    body += _notes(table_notes(result))
    body += [_differences(result), _diverged([*outcomes, *searched])]
    rates = sorted({each.rate for each in searched})
    body += [_published(result, paper, configs, rates, seeds) for paper in find_papers(configs.values(), published)]
    body += ["<h2>Figures</h2>", *map(picture_html, pictures)]
    body += [*_searched(result), _grid(grid)]
    with atomic_file(result.folder / "report.html") as temporary:
        write_page(temporary, f"{len(result.lines)} settings compared", body)
    return result.folder / "report.html"


def _notes(sentences: Sequence[str]) -> list[str]:
    return [f'<p class="note">{escape(sentence)}</p>' for sentence in sentences]


def _differences(result: Comparison) -> str:
    """What is inferred from the differences to the baseline, of the mean client in full, then of other scores."""
    lines = [line for line in result.ranked if line.differences]
    if not lines:
        return ""
    top = f"<h2>Differences to {escape(', '.join(result.baseline.values()))}</h2>"
    head = [MAIN, "standard deviation", "t test, p", "p (Holm)", "sign-flip, p", "detectable"]
    whole = table_html([[line.setting, *_inferred(line)] for line in lines], ["", *head])
    return top + whole + table_html(difference_rows(result, SCORES[1:]), difference_columns(result, SCORES[1:]))


def _inferred(line: Line) -> list[str | float | None]:
    gap = line.differences.get(MAIN)
    shown, adjusted = difference_cells(line, MAIN)
    if gap is None:
        return [shown, None, None, adjusted, None, None]
    flipped = f"{format_p(gap.p_sign_flip)} (of {gap.p_sign_flip_smallest:.2g} at least)"
    return [shown, gap.deviation, format_p(gap.p), adjusted, flipped, gap.detectable]


def _diverged(outcomes: Sequence[Outcome]) -> str:
    items = [f"<li>{escape(f'{each.folder}: {each.diverged}')}</li>" for each in outcomes if each.diverged]
    return f'<h2>Runs that diverged</h2><ul class="warnings">{"".join(items)}</ul>' if items else ""


def _published(
    result: Comparison, paper: Paper, configs: Mapping[str, RunConfig], rates: list[float], seeds: list[int]
) -> str:
    """Published numbers and ours side by side, then every aspect in which the protocols differ."""
    fitting = [config for config in configs.values() if any(fits(each, config) for each in paper.numbers)]
    here = [describe_protocol(config, rates, seeds, paper.measure) for config in fitting or configs.values()]
    rows: list[Sequence[str]] = [
        [_numbers_name(found), f"{found.value:.4f}", _our_number(result, configs, found, paper.measure)]
        for found in paper.numbers
    ]
    rows.append(["How they were found, where the two differ or theirs was not found:", "", ""])
    caution = (
        f"{paper.trust} With the differences that the table lists, a number beside another says nothing about who is "
        "right; compare the order of the methods, if anything."
    )
    top = f"<h2>Beside the published numbers: {escape(paper.name)}</h2>"
    head = ["", "published", f"ours: {result.metric or 'metric'} of the {paper.measure}"]
    return top + table_html([*rows, *compare_protocols(paper, here)], head) + f'<p class="note">{escape(caution)}</p>'


def _numbers_name(published: Number) -> str:
    over = f"mean over {', '.join(published.tasks)}" if len(published.tasks) > 1 else "".join(published.tasks)
    return f"{published.label}: {published.over or over}"


def _our_number(result: Comparison, configs: Mapping[str, RunConfig], published: Number, measure: str) -> str:
    """Our measure of the same method: over the same tasks where we have them all, else of each task that we have.

    Where a grid has several settings of it, such as two graphs, each with its labels.
    """
    if not published.methods:
        return "–"
    lines = [line for line in result.lines if measure in line.estimates and fits(published, configs[line.setting])]
    axes = [axis for axis in (lines[0].labels if lines else ()) if len({line.labels[axis] for line in lines}) > 1]
    axes = [axis for axis in axes if not _by_task(axis, lines, configs)]
    found: dict[tuple[str, ...], dict[str, Estimate]] = {}
    for line in lines:
        own = tuple(line.labels[axis] for axis in axes)
        found.setdefault(own, {})[dataset(configs[line.setting])] = line.estimates[measure]
    named = {labels: _over_tasks(published, known) for labels, known in found.items()}
    if len(named) == 1:
        return next(iter(named.values()))
    return "; ".join(f"{', '.join(labels)}: {text}" for labels, text in named.items()) or "not run"


def _by_task(axis: str, lines: Sequence[Line], configs: Mapping[str, RunConfig]) -> bool:
    """Whether the labels of an axis name the tasks."""
    tasks: dict[str, set[str]] = {}
    for line in lines:
        tasks.setdefault(line.labels[axis], set()).add(dataset(configs[line.setting]))
    return (
        len(tasks) > 1
        and len(tasks) == len(set.union(*tasks.values()))
        and all(len(each) == 1 for each in tasks.values())
    )


def _over_tasks(published: Number, known: Mapping[str, Estimate]) -> str:
    if set(published.tasks) <= known.keys() and not (published.over and len(published.tasks) > 1):
        return f"{sum(known[task].mean for task in published.tasks) / len(published.tasks):.4f}"
    spread = {task: f" ± {each.deviation:.4f}" if each.deviation is not None else "" for task, each in known.items()}
    return "; ".join(f"{each.mean:.4f}{spread[task]} ({task} only)" for task, each in known.items())


def _searched(result: Comparison) -> list[str]:
    """Every searched rate of every group."""
    if not result.searches:
        return []
    table = table_html(rate_rows(result.searches), rate_columns(result.searches))
    return ["<h2>Search of the learning rate</h2>", table, *_notes(rate_notes(result))]


def _grid(grid: str) -> str:
    return f"<details><summary>The grid</summary><pre>{escape(grid)}</pre></details>"
